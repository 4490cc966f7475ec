"""`--pretrained_model_name_or_path` of the trainer: the checkpoint of docs/tiny, trained on with other classes."""

import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import ROOT, reset_accelerate, tiny_model, tiny_vae
from hub_client import TOKEN, client
from PIL import ImageOps
from safetensors.torch import load_file, save_file

from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel, normalize_weights_
from diffusers_mp.data.settings import vae_fingerprint
from diffusers_mp.files import sha256_of_weights
from diffusers_mp.training.arguments import DEFAULT_VAE


sys.path.insert(0, str(ROOT / "examples"))
import demo
import train_mpdit


TINY = ROOT / "docs" / "tiny"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TABLE = "conditioning_embedder.class_embedder.weight"


pytestmark = pytest.mark.usefixtures("examples_run_here")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Thirty images each of the digits 7 and 3, which the checkpoint knows, and of a negative, which it does not."""
    folder, real = tmp_path_factory.mktemp("data"), demo.split_digits()["judge"]
    for name, digit in (("7", 7), ("3", 3), ("negative", 7)):
        (folder / name).mkdir()
        for number in np.flatnonzero(real.labels == digit)[:30]:
            image = real.images[number]
            image = ImageOps.invert(image) if name == "negative" else image
            image.save(folder / name / f"{number:04d}.png")
    return folder


def parse(data, output_dir, *more, source=TINY):
    arguments = [
        *("--train_data_dir", data, "--resolution", 8),  # grey, as the checkpoint says
        *("--output_dir", output_dir, "--total_batch_size", 16, "--max_train_steps", 6, "--checkpointing_steps", 3),
        *("--logging_steps", 1, "--validation_steps", 0, "--num_validation_images", 0, "--ema_stds", 0.05, 0.1),
        *(("--vae", "none", "--image_channels", 1) if source is None else ("--pretrained_model_name_or_path", source)),
        *more,
    ]
    return train_mpdit.parse_args([*map(str, arguments)])


def train(data, output_dir, *more, source=TINY):
    train_mpdit.main(parse(data, output_dir, *more, source=source))
    reset_accelerate()
    return output_dir


def start_of(data, output_dir, monkeypatch, *more, source=TINY):
    """The run as it stands before its first update."""
    runs = []
    with monkeypatch.context() as patch:
        patch.setattr(train_mpdit, "train", lambda args, run, stop, at_end: runs.append(run))
        train(data, output_dir, *more, source=source)
    return runs[0]


def losses(output_dir):
    entries = map(json.loads, (output_dir / "logs" / "metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry["train/loss"] for entry in entries if "train/loss" in entry}


def test_the_run_starts_from_the_weights_and_keeps_rows_by_name(data, tmp_path, monkeypatch, capsys):
    run = start_of(data, tmp_path / "run", monkeypatch)
    assert f"{TINY} knows 2 of 3 classes by name" in capsys.readouterr().out
    assert run.pipeline.id2label == {0: "3", 1: "7", 2: "negative"}
    base = load_file(TINY / "transformer" / WEIGHTS)
    averages = []
    for std in run.ema.stds:
        run.ema.copy_to(run.pipeline.transformer, std)
        averages.append({name: value.clone() for name, value in run.pipeline.transformer.state_dict().items()})
    for weights in (run.transformer.state_dict(), *averages):
        assert weights.keys() == base.keys()
        assert weights[TABLE].shape == (4, 64)
        assert torch.equal(weights[TABLE][[0, 1, 3]], base[TABLE][[3, 7, 10]])
        assert weights[TABLE][2].norm().item() == pytest.approx(8, rel=1e-5)
        assert all(torch.equal(value, base[name]) for name, value in weights.items() if name != TABLE)

    # What the transformer is given is in the units that it knows, not in those of the new data.
    pipe = MPDiTPipeline.from_pretrained(TINY)
    assert run.pipeline.config.latents_mean == pipe.config.latents_mean
    assert run.pipeline.config.latents_std == pipe.config.latents_std
    means = [run.samples[(0, index)]["latents"].mean().item() for index in range(90)]
    labels = [int(run.samples.dataset[index]["label"]) for index in range(90)]
    assert np.mean([mean for mean, label in zip(means, labels, strict=True) if label < 2]) == pytest.approx(0, abs=0.2)
    assert np.mean([mean for mean, label in zip(means, labels, strict=True) if label == 2]) > 0.8


def test_all_the_same_classes_are_all_the_same_weights(tmp_path, monkeypatch):
    real = demo.split_digits()["judge"]
    demo.write_image_folder(tmp_path / "digits", real)
    run = start_of(tmp_path / "digits", tmp_path / "run", monkeypatch)
    base = load_file(TINY / "transformer" / WEIGHTS)
    assert all(torch.equal(value, base[name]) for name, value in run.transformer.state_dict().items())


def test_it_begins_with_what_the_checkpoint_has_learnt(data, tmp_path):
    config = ("--model_config_name_or_path", TINY / "transformer" / "config.json")
    known = {**json.loads(config[1].read_text()), "num_classes": 2}
    (tmp_path / "model.json").write_text(json.dumps(known))
    shutil.copytree(data, tmp_path / "known", ignore=shutil.ignore_patterns("negative"))
    continued = losses(train(tmp_path / "known", tmp_path / "continued"))
    config = ("--model_config_name_or_path", tmp_path / "model.json")
    fresh = losses(train(tmp_path / "known", tmp_path / "fresh", *config, source=None))
    assert fresh[1] == pytest.approx(1, abs=0.2)
    assert continued[1] < 0.35
    pipe = MPDiTPipeline.from_pretrained(tmp_path / "continued")
    assert pipe.id2label == {0: "3", 1: "7"}
    assert pipe.transformer.config.num_classes == 2


def test_a_run_is_known_by_the_weights_of_the_checkpoint_and_not_by_what_is_made_of_them(data, tmp_path, monkeypatch):
    run = start_of(data, tmp_path / "run", monkeypatch)
    stored = MPDiTTransformer2DModel.from_pretrained(TINY, subfolder="transformer")
    assert run.facts["pretrained_weights_sha256"] == sha256_of_weights(stored.state_dict())


def test_resume(data, tmp_path):
    output_dir = train(data, tmp_path / "run")
    whole, curve = load_file(output_dir / "transformer" / WEIGHTS), losses(output_dir)
    assert list(curve) == [1, 2, 3, 4, 5, 6]
    # From a copy elsewhere: it is the weights that count.
    moved = shutil.copytree(TINY, tmp_path / "moved")
    train(data, output_dir, "--resume_from_checkpoint", "checkpoint-3", source=moved)
    again = load_file(output_dir / "transformer" / WEIGHTS)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert losses(output_dir) == curve

    config = ("--model_config_name_or_path", output_dir / "transformer" / "config.json")
    with pytest.raises(ValueError, match=r"has pretrained_weights_sha256 \w{64} \(now None\)"):
        train(data, output_dir, "--resume_from_checkpoint", "latest", *config, source=None)
    other = load_file(moved / "transformer" / WEIGHTS)
    other["output.gain"] += 1e-3
    save_file(other, moved / "transformer" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has pretrained_weights_sha256 \w{64} \(now \w{64}\)"):
        train(data, output_dir, "--resume_from_checkpoint", "latest", source=moved)


def test_a_transformer_alone_has_no_names(data, tmp_path, monkeypatch, capsys):
    # Not as `save_pretrained` of an average leaves it, but as a snapshot holds it: rows shorter than 1.
    model = MPDiTTransformer2DModel.from_pretrained(TINY, subfolder="transformer")
    query = model.transformer_blocks[0].attn.to_q.weight
    before = query.detach().clone()
    query.data.mul_(0.5)
    model.save_pretrained(tmp_path / "transformer")
    run = start_of(data, tmp_path / "run", monkeypatch, "--vae", "none", source=tmp_path / "transformer")
    said = capsys.readouterr().out
    assert "knows 0 of 3 classes by name" in said
    assert "knows none of the classes by name, and learns all of them anew" in said
    base, weights = load_file(TINY / "transformer" / WEIGHTS), run.transformer.state_dict()
    assert torch.equal(weights[TABLE][-1], base[TABLE][-1])
    assert not any(torch.equal(row, old) for row in weights[TABLE][:-1] for old in base[TABLE])
    torch.testing.assert_close(weights["transformer_blocks.0.attn.to_q.weight"], before)
    # Nothing tells the units that it knows: those of the data.
    assert run.pipeline.config.latents_mean == run.samples.dataset.index["latents_mean"]


def test_the_share_of_dropped_labels_is_the_checkpoint_s_or_the_flag_s(data, tmp_path, monkeypatch):
    shares = []
    for number, more in enumerate([(), ("--class_dropout_prob", 0.3)]):
        run = start_of(data, tmp_path / f"run-{number}", monkeypatch, *more)
        shares.append((run.transformer.config.class_dropout_prob, run.samples.class_dropout_prob))
    assert shares == [(0.1, 0.1), (0.3, 0.3)]


def test_a_model_of_latents_with_its_own_vae(data, tmp_path, monkeypatch):
    vae, model = tiny_vae(in_channels=3), tiny_model(out_channels=8, sample_size=4, num_classes=2)
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    pipe = MPDiTPipeline(model, scheduler, vae, {0: "7", 1: "cup"}, **statistics)
    pipe.save_pretrained(tmp_path / "base")
    more = ("--vae", tmp_path / "base" / "vae", "--resolution", 16)
    run = start_of(data, tmp_path / "run", monkeypatch, *more, source=tmp_path / "base")
    table = run.transformer.state_dict()[TABLE]
    assert torch.equal(table[[1, 3]], normalize_weights_(model).state_dict()[TABLE][[0, 2]])
    assert run.pipeline.config.latents_std == statistics["latents_std"]


@pytest.mark.slow
def test_from_the_hub(data, server, tmp_path):
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "examples")!r})
import train_mpdit
from diffusers_mp.publishing.hub import publish
folder, argv = json.load(sys.stdin)
publish(folder, "user/tiny")
train_mpdit.main(train_mpdit.parse_args(argv))
print("RESULTS " + json.dumps(None))
"""
    argv = [
        *("--train_data_dir", data, "--resolution", 8, "--image_channels", 1),
        *("--output_dir", tmp_path / "run", "--total_batch_size", 16, "--max_train_steps", 1, "--validation_steps", 0),
        *("--pretrained_model_name_or_path", "user/tiny", "--learning_rate", 1e-9),
    ]
    client(server, tmp_path / "home", code, [str(TINY), [*map(str, argv)]], HF_TOKEN=TOKEN)
    table = load_file(tmp_path / "run" / "transformer" / WEIGHTS)[TABLE]
    torch.testing.assert_close(table[[0, 1, 3]], load_file(TINY / "transformer" / WEIGHTS)[TABLE][[3, 7, 10]])


class TestErrors:
    @pytest.mark.parametrize(
        "more, message",
        [
            (("--resolution", 16), f"`sample_size` of {TINY} must be 16 for these data .* got 8"),
            (("--image_channels", 3), f"`in_channels` of {TINY} must be 3 .* got 1"),
            (("--variance_type", "fixed_small"), f"`out_channels` of {TINY} must be 1 .* got 2"),
            (
                ("--prediction_type", "v_prediction"),
                "`--prediction_type` must be epsilon, .* got v_prediction",
            ),
            (
                ("--prediction_type", "flow_prediction"),
                "must be epsilon, which is what .* got flow_prediction",
            ),
        ],
        ids=lambda value: value[1] if isinstance(value, tuple) else "",
    )
    def test_other_data_or_another_objective(self, data, tmp_path, more, message):
        with pytest.raises(ValueError, match=message):
            train(data, tmp_path / "run", *more)

    def test_another_vae(self, data, tmp_path):
        tiny_vae().save_pretrained(tmp_path / "vae")
        with pytest.raises(ValueError, match=r"`--vae` must be the VAE of .*none: it works on pixels.* got .*vae"):
            train(data, tmp_path / "run", "--vae", tmp_path / "vae")
        # Before images are encoded.
        assert not (tmp_path / "run").exists()

    def test_weights_that_no_training_comes_of(self, data, tmp_path):
        source = shutil.copytree(TINY, tmp_path / "broken")
        tensors = load_file(source / "transformer" / WEIGHTS)
        tensors[TABLE][1, 0] = float("nan")
        save_file(tensors, source / "transformer" / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"the weights in {source} must be finite, {TABLE} has NaN or infinity"):
            train(data, tmp_path / "run", source=source)
        config = source / "transformer" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 1}))
        with pytest.raises(ValueError, match=r"those that its config.json describes \(unexpected \d+, such as tr"):
            train(data, tmp_path / "run", source=source)
        assert not (tmp_path / "run").exists()

    def test_unlabelled_data(self, data, tmp_path):
        shutil.copytree(data / "3", tmp_path / "unlabelled")
        with pytest.raises(ValueError, match="`num_classes` of .* must be None for these data .* got 10"):
            train(tmp_path / "unlabelled", tmp_path / "run")

    def test_nothing_to_load(self, data, tmp_path):
        with pytest.raises(OSError, match=r"config\.json"):
            train(data, tmp_path / "run", source=data)

    @pytest.mark.parametrize(
        "flag", [("--preset", "B/2"), ("--model_config_name_or_path", "model.json"), ("--mp_silu",)]
    )
    def test_flags_that_it_stands_instead_of(self, data, tmp_path, capsys, flag):
        with pytest.raises(SystemExit):
            parse(data, tmp_path / "run", *flag)
        assert f"--pretrained_model_name_or_path stands instead of {flag[0]}" in capsys.readouterr().err


def test_the_command_of_the_docs_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "import_dit.md").read_text(), re.S)
    (command,) = [line for block in blocks for line in block.splitlines() if "train_mpdit.py" in line]
    args = train_mpdit.parse_args(shlex.split(command.partition("train_mpdit.py")[2]))
    assert args.pretrained_model_name_or_path in command
    assert args.vae is None


def test_the_vae_is_the_checkpoints(data, tmp_path, monkeypatch):
    source, vae = tmp_path / "base", tiny_vae(in_channels=1)
    model = tiny_model(sample_size=4, out_channels=8)
    MPDiTPipeline(model, DDPMScheduler(clip_sample=False), vae).save_pretrained(source)
    run = start_of(data, tmp_path / "run", monkeypatch, "--resolution", 16, source=source)
    assert vae_fingerprint(run.pipeline.vae) == vae_fingerprint(vae)
    index = json.loads((tmp_path / "run" / "latents" / "index.json").read_text())
    assert index["vae"]["id"] == str(source)


def test_a_transformer_alone_has_no_vae(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train_mpdit, "load_vae", lambda name, cache_dir: asked.append(name) or sys.exit())
    with pytest.raises(SystemExit):
        train(data, tmp_path / "run", source=TINY / "transformer")
    assert asked == [DEFAULT_VAE]
