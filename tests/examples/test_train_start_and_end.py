"""What a run of the trainer says before its first update and after its last one."""

import json
import shlex
import shutil

import pytest
from helpers import reset_accelerate, write_table
from PIL import Image
from processes import run_python
from training_runs import MODEL, arguments, contents, metrics, train, weights

from diffusers_mp.data.images import load_image_dataset


pytestmark = pytest.mark.usefixtures("examples_run_here")


@pytest.fixture
def singles(data, tmp_path):
    """Ten classes of one image each."""
    for number, path in enumerate(sorted((data / "images" / "dark").iterdir())[:10]):
        (tmp_path / "singles" / f"class {number}").mkdir(parents=True)
        shutil.copy(path, tmp_path / "singles" / f"class {number}")
    return tmp_path / "singles"


def test_a_run_says_what_it_trains_on_what(data, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    output_dir = train(data, tmp_path / "run", "--validation_steps", "3", "--train_batch_size", "3")
    printed = capfd.readouterr().out.splitlines()
    lowered = "--train_batch_size 3 becomes 2, the most that divides the 4 samples that an update has for each process"
    start = printed.index(lowered)
    rows = dict(line.split(maxsplit=1) for line in printed[start + 1 : start + 9])
    assert list(rows) == ["device", "batch", "data", "model", "objective", "updates", "output", "memory"]
    assert rows["batch"] == "4 images an update = 2 x 1 process x 2 accumulated"
    assert rows["data"] == (
        f"{data / 'images'}: 40 images at 16 pixels, 2 classes: dark (20), light (20); 5 held out, 0 left out"
    )
    num_parameters = sum(tensor.numel() for tensor in weights(output_dir / "transformer").values())
    assert f"; {num_parameters:,} parameters, latents of 4 x 4 x 4" in rows["model"]
    assert rows["updates"] == "6 (0.7 epochs); learning rate 0.01, inverse_sqrt"
    warnings = [line for line in printed if line.startswith("warning: ")]
    assert [line.split()[1:5] for line in warnings] == [
        ["no", "accelerator", "was", "found:"],
        ["an", "update", "has", "4"],
    ]

    first, last = metrics(output_dir, "validation/loss").values()
    loss = metrics(output_dir, "train/loss")[6]
    at_first = f"({first:.4f} at the first validation)"
    assert f"6 updates: loss {loss:.4f}, of held-out images {last:.4f} {at_first}" in printed
    assert f"Saved the pipeline to {output_dir}: MPDiTPipeline.from_pretrained({str(output_dir)!r})" in printed
    train(data, output_dir, "--resume_from_checkpoint", "checkpoint-4")
    assert "updates    6 (0.7 epochs), from update 4; learning rate 0.01, inverse_sqrt" in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["classes", "unlabelled"])
def test_the_next_command_draws_an_image(data, tmp_path, capfd, kind):
    more = ()
    if kind == "unlabelled":
        shutil.copytree(data / "images" / "dark", tmp_path / "a folder")
        more = ("--train_data_dir", str(tmp_path / "a folder"))
    train(data, tmp_path / 'the "run"', "--max_train_steps", "1", *more)
    printed = capfd.readouterr().out
    assert ("warning: no classes were found" in printed) == (kind == "unlabelled")
    (line,) = [line for line in printed.splitlines() if line.startswith("Next, an image of it: ")]
    python, flag, code = shlex.split(line.removeprefix("Next, an image of it: "))
    assert (python, flag) == ("python", "-c")
    run_python(f"import os; os.chdir({str(tmp_path)!r})\n{code}")
    with Image.open(tmp_path / "sample.png") as image:
        assert image.size == (16, 16)


def test_classes_of_one_image_are_all_trained_on(data, singles, tmp_path, capfd):
    output_dir = train(data, tmp_path / "run", "--train_data_dir", str(singles), "--validation_steps", "6")
    printed = capfd.readouterr().out
    assert "; 0 held out, 0 left out" in printed
    assert "warning: 0 images are held out and not 5: each class keeps its last" in printed
    assert "have no image to train on" not in printed
    # The samples are there, without a loss of images that are not.
    assert metrics(output_dir, "validation/loss") == {}
    assert (output_dir / "samples" / "step-0000006.png").is_file()


@pytest.mark.parametrize("encoded", [False, True])
def test_a_dry_run_says_it_and_writes_nothing(data, plain, tmp_path, capfd, encoded):
    more = ("--latents_dir", str(plain / "latents")) if encoded else ()
    before = contents(plain)
    assert train(data, tmp_path / "dry", "--dry_run", *more) == tmp_path / "dry"
    dry = capfd.readouterr().out.splitlines()
    assert not (tmp_path / "dry").exists()
    assert contents(plain) == before
    assert dry[-1] == f"Nothing was {'' if encoded else 'encoded or '}trained: without --dry_run this begins"
    # But for that it is what the run itself says.
    train(data, tmp_path / "dry", *more)
    start = next(number for number, line in enumerate(dry) if line.startswith("device "))
    assert "\n".join(dry[start:-1]) in capfd.readouterr().out


def test_a_dry_run_of_small_classes_of_a_stream_and_of_what_goes_on(data, plain_copy, singles, tmp_path, capfd):
    import train_mpdit

    train(data, tmp_path / "dry", "--dry_run", "--train_data_dir", str(singles))
    assert "10 classes: class 0 (1), " in (printed := capfd.readouterr().out)
    assert "; 0 held out, 0 left out" in printed
    table = ("--dataset_name", write_table(load_image_dataset(data / "images").dataset, tmp_path / "table"))
    _, _, *others = arguments(data, tmp_path / "dry")  # without --train_data_dir
    train_mpdit.main(train_mpdit.parse_args([*others, *table, "--streaming", "--dry_run"]))
    reset_accelerate()
    assert "a stream of 2 classes, counted while it is encoded at 16 pixels" in capfd.readouterr().out
    before = contents(plain_copy)
    train(data, plain_copy, "--dry_run", "--resume_from_checkpoint", "checkpoint-4", "--max_train_steps", "8")
    assert "updates    8 (0.9 epochs), from update 4;" in capfd.readouterr().out
    assert contents(plain_copy) == before


def test_a_dry_run_refuses_what_the_run_would(data, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({**MODEL, "num_classes": 5}))
    import train_mpdit

    argv = arguments(data, tmp_path / "dry", "--dry_run", "--model_config_name_or_path", str(tmp_path / "model.json"))
    with pytest.raises(ValueError, match=r"`num_classes` of .*model\.json must be 2 .* got 5"):
        train_mpdit.main(train_mpdit.parse_args(argv))
    reset_accelerate()
    assert not (tmp_path / "dry").exists()
