"""The demo: its digits, VAE and judge on the real scans, and the whole in small, which ends the same interrupted.

Expected values follow from the definitions.
"""

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from helpers import ROOT
from PIL import Image
from processes import start
from sklearn.datasets import load_digits

from diffusers_mp.sheets import CELL_SIZE


sys.path.insert(0, str(ROOT / "examples"))
import demo


# On one CPU: two threads would wait for each other on a busy machine, as the server of processes has them spin.
ON_ONE_CPU = """
import os, runpy, signal, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

SMALL = ("--max_train_steps", "2", "--num_images_per_class", "2", "--num_inference_steps", "2")


def run(folder, vae_steps=1, until=None, signal_number=signal.SIGKILL):
    """Run the demo to its end, or until a file is there; its exit status and what it printed."""
    output = folder.with_name(f"{folder.name}.output")
    arguments = (demo.__file__, "--output_dir", folder, "--vae_steps", vae_steps, *SMALL)
    process = start(ON_ONE_CPU, arguments=arguments, paths=[demo.EXAMPLES], output=output)
    while until is not None and process.exitcode is None and not list(folder.glob(until)):
        time.sleep(0.01)
    if until is not None:
        os.kill(process.pid, signal_number)
    process.join()
    return process.exitcode, output.read_text()


def test_it_leaves_a_labelled_sheet_and_says_what_comes_next(tmp_path):
    status, printed = run(tmp_path / "demo")
    assert status == 0, printed[-3000:]
    lines = printed.replace("\r", "\n").splitlines()
    assert lines[0].startswith("Trains a VAE and a diffusion transformer on 896 real handwritten digits")
    assert lines[-1].startswith("Next: ")
    assert {"VAE", "Training"} <= {line.partition(":")[0] for line in lines}  # progress bars
    assert (tmp_path / "demo" / "loss.png").is_file()
    with Image.open(tmp_path / "demo" / "samples.png") as sheet:
        assert sheet.height > 10 * CELL_SIZE
        assert sheet.width > 2 * CELL_SIZE


@pytest.mark.slow
def test_interrupted_anywhere_it_ends_with_the_same_images(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, vae_steps=60)[0] == 0
    for until in ("digits/*/9/*.png", "vae.60-0.pt", "model/latents/*.safetensors"):
        assert run(broken, vae_steps=60, until=until)[0] == -signal.SIGKILL
    status, printed = run(broken, vae_steps=60, until="model/training_arguments.json", signal_number=signal.SIGINT)
    assert status == 130
    assert printed.endswith("demo.py: interrupted: the same command goes on\n")
    assert run(broken, vae_steps=60)[0] == 0
    assert (broken / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()
    assert not list(tmp_path.glob("broken.old-*"))
    # Once more: nothing is trained anew, and the images are the same.
    status, printed = run(broken, vae_steps=60)
    assert status == 0
    assert "VAE:" not in printed
    assert (broken / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()


def test_a_folder_of_another_version_is_moved_aside(tmp_path, capsys):
    folder = tmp_path / "demo"
    args = demo.parse_args(["--output_dir", str(folder)])
    num_threads = demo.open_folder(args)
    assert num_threads == demo.usable_cpus() > 0
    (folder / "mine.txt").touch()

    # Threads stay those it was begun with.
    record = json.loads((folder / "demo.json").read_text())
    (folder / "demo.json").write_text(json.dumps({**record, "num_threads": 7}))
    assert demo.open_folder(args) == 7
    assert capsys.readouterr().out == ""

    for number, change in enumerate(({"flags": {}}, {"versions": {}}, {"sources_sha256": "0"}), start=1):
        (folder / "demo.json").write_text(json.dumps({**record, **change}))
        assert demo.open_folder(args) == num_threads
        (name,) = change
        assert f"another version ({name}): kept as {folder}.old-{number}" in capsys.readouterr().out
        assert [path.name for path in folder.iterdir()] == ["demo.json"]
    assert (tmp_path / "demo.old-1" / "mine.txt").is_file()
    (folder / "demo.json").unlink()
    (folder / "other").touch()
    demo.open_folder(args)
    assert "no record" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["num_images_per_class", "vae_steps", "max_train_steps"])
def test_flags_that_end_badly_are_refused_at_once(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.parse_args([f"--{flag}", "0"])
    assert f"argument --{flag}: must be at least" in capsys.readouterr().err


# Digits and their judge


@pytest.fixture(scope="module")
def splits():
    return demo.split_digits()


@pytest.fixture(scope="module")
def judge(splits):
    return demo.fit_judge(splits["judge"])


def test_split_is_disjoint_complete_and_stratified(splits):
    numbers = np.concatenate([part.numbers for part in splits.values()])
    np.testing.assert_array_equal(np.sort(numbers), np.arange(1797))
    class_sizes = np.bincount(load_digits().target)
    for name, share in {"train": 1 / 2, "judge": 1 / 4, "held_out": 1 / 4}.items():
        part = splits[name]
        np.testing.assert_array_equal(part.labels, load_digits().target[part.numbers])
        # Halves and quarters of a whole number miss their share by less than one image, what is left over by two.
        assert np.abs(np.bincount(part.labels) - share * class_sizes).max() < 2


def test_split_is_the_same_every_time(splits):
    again = demo.split_digits()
    for name, part in splits.items():
        np.testing.assert_array_equal(part.numbers, again[name].numbers)
        assert all(np.array_equal(a, b) for a, b in zip(part.images, again[name].images, strict=True))


def test_no_scan_is_in_two_parts_under_different_numbers():
    scans = load_digits().data
    assert len(np.unique(scans, axis=0)) == len(scans)


def test_lanczos_keeps_the_scan_best():
    scans = load_digits().images

    def error(resampling):
        small = [Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8)) for scan in scans]
        large = [image.resize((32, 32), resampling) for image in small]
        return np.sqrt(np.mean((demo.features(large) - scans.reshape(-1, 64) / 16) ** 2))

    lanczos = error(Image.Resampling.LANCZOS)
    assert lanczos < error(Image.Resampling.BICUBIC) < error(Image.Resampling.BILINEAR)
    upscaled = demo.features([demo.upscale(scan) for scan in scans])
    assert np.sqrt(np.mean((upscaled - scans.reshape(-1, 64) / 16) ** 2)) == pytest.approx(lanczos, abs=1e-9)


def test_image_folder_round_trips(splits, tmp_path):
    held_out = splits["held_out"]
    demo.write_image_folder(tmp_path / "held_out", held_out)
    demo.write_image_folder(tmp_path / "held_out", held_out)  # once more does no harm
    paths = sorted((tmp_path / "held_out").rglob("*.png"))
    assert len(paths) == len(held_out.images)
    by_number = dict(zip(held_out.numbers, zip(held_out.images, held_out.labels, strict=True), strict=True))
    for path in paths:
        image, label = by_number[int(path.stem)]
        with Image.open(path) as read:
            assert (read.mode, read.size) == ("L", (32, 32))
            np.testing.assert_array_equal(np.asarray(read), np.asarray(image))
        assert path.parent.name == str(label)


def test_label_ids_of_the_folder_are_the_digits(splits, tmp_path):
    demo.write_image_folder(tmp_path / "digits", splits["judge"])
    dataset = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "digits"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert dataset.features["label"].names == demo.CLASS_NAMES
    np.testing.assert_array_equal(np.bincount(dataset["label"]), np.bincount(splits["judge"].labels))


def test_foreign_file_in_the_folder_is_refused(splits, tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "cat.png").touch()
    with pytest.raises(ValueError, match=r"`folder` must hold nothing but the digits.*1 other files.*cat\.png"):
        demo.write_image_folder(tmp_path, splits["judge"])
    assert not (tmp_path / "0").exists()


def test_features_are_area_averages():
    pixels = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
    expected = pixels.reshape(8, 4, 8, 4).mean(axis=(1, 3)).reshape(1, 64) / 255
    np.testing.assert_allclose(demo.features([Image.fromarray(pixels)]), expected, atol=0.5 / 255 + 1e-9)
    np.testing.assert_array_equal(
        demo.features([Image.fromarray(pixels).convert("RGB")]), demo.features([Image.fromarray(pixels)])
    )


def test_judge_reads_held_out_digits(splits, judge):
    held_out = splits["held_out"]
    assert demo.recognised(judge, held_out.images, held_out.labels) >= 0.98
    # Control: labels of other digits are not recognised.
    assert demo.recognised(judge, held_out.images, (held_out.labels + 1) % 10) <= 0.02


def test_real_digits_against_themselves_have_ratio_one(splits):
    held_out = splits["held_out"]
    assert demo.within_class_ratio(held_out.images, held_out.labels, held_out) == pytest.approx(1, abs=1e-12)
    ratio = demo.nearest_training_ratio(held_out.images, held_out.labels, held_out, splits["train"])
    assert ratio == pytest.approx(1, abs=1e-12)


def test_other_real_digits_have_ratios_of_about_one(splits):
    """Ten of each class, as a demo samples: what a perfect model would show. Independent of the number of images."""
    part = splits["judge"]
    few = np.concatenate([np.flatnonzero(part.labels == digit)[:10] for digit in range(10)])
    images, labels = [part.images[i] for i in few], part.labels[few]
    assert demo.within_class_ratio(images, labels, splits["held_out"]) == pytest.approx(1, abs=0.1)
    ratio = demo.nearest_training_ratio(images, labels, splits["held_out"], splits["train"])
    assert ratio == pytest.approx(1, abs=0.1)


def test_memorised_images_have_nearest_training_ratio_zero(splits):
    train = splits["train"]
    ratio = demo.nearest_training_ratio(train.images, train.labels, splits["held_out"], train)
    assert ratio == pytest.approx(0, abs=1e-6)
    assert demo.within_class_ratio(train.images, train.labels, splits["held_out"]) > 0.9


def test_one_repeated_image_has_within_class_ratio_zero(splits):
    held_out = splits["held_out"]
    first = [held_out.images[np.flatnonzero(held_out.labels == digit)[0]] for digit in range(10)]
    images, labels = [image for image in first for _ in range(5)], np.repeat(np.arange(10), 5)
    assert demo.within_class_ratio(images, labels, held_out) == pytest.approx(0, abs=1e-6)


def test_distances_match_hand_calculation():
    def grey(value):
        return Image.new("L", (32, 32), value)

    # Uniform images 51 levels apart differ by 51/255 in each of 64 features: distance 0.2 * 8 = 1.6.
    images, labels = [grey(0), grey(51), grey(102), grey(0), grey(102)], [0, 0, 0, 1, 1]
    # Class 0: pairs at 1.6, 1.6, 3.2; class 1: one pair at 3.2.
    assert demo.within_class_distance(images, labels) == pytest.approx((6.4 / 3 + 3.2) / 2)
    # Nearest of {0, 153}: class 0 at 0, 1.6, 1.6; class 1 at 0, 1.6.
    assert demo.nearest_distance(images, labels, [grey(0), grey(153)]) == pytest.approx((3.2 / 3 + 1.6 / 2) / 2)


def test_ratios_compare_the_same_classes(splits):
    held_out = splits["held_out"]
    ones = np.flatnonzero(held_out.labels == 1)
    images, labels = [held_out.images[i] for i in ones], held_out.labels[ones]
    assert demo.within_class_ratio(images, labels, held_out) == pytest.approx(1, abs=1e-12)
    assert demo.nearest_training_ratio(images, labels, held_out, splits["train"]) == pytest.approx(1, abs=1e-12)


def test_wrong_number_of_labels_and_single_images_are_refused(splits, judge):
    images = splits["held_out"].images[:3]
    for call in (
        lambda: demo.recognised(judge, images, [1, 2]),
        lambda: demo.within_class_distance(images, [1, 2]),
        lambda: demo.nearest_distance(images, [1, 2], images),
    ):
        with pytest.raises(ValueError, match=r"`labels` must hold one digit per image, got shape \(2,\) for 3 images"):
            call()
    with pytest.raises(ValueError, match="at least two images of each class, got one of class 2"):
        demo.within_class_distance(images, [1, 1, 2])


def test_reconstruct_is_the_decoded_mean_of_the_posterior(splits):
    images = splits["held_out"].images[:3]
    torch.manual_seed(0)
    vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=[8], norm_num_groups=4).eval()
    pixels = torch.tensor(np.stack(images), dtype=torch.float32)[:, None] / 127.5 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample[:, 0]
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().numpy()
    reconstructions = np.stack([np.asarray(image, dtype=float) for image in demo.reconstruct(vae, images)])
    # A value that lies between two levels may fall on either.
    np.testing.assert_allclose(reconstructions, expected, atol=1)
    assert expected.std() > 1


# The VAE


@pytest.fixture
def small_vae(monkeypatch):
    monkeypatch.setattr(demo, "VAE", {**demo.VAE, "block_out_channels": [8, 8, 8]})


@pytest.fixture(scope="module")
def few(splits):
    train = splits["train"]
    return demo.LabelledImages(train.images[:40], train.labels[:40], train.numbers[:40])


def test_pixels_are_those_of_the_folder_in_the_order_of_its_paths(few, tmp_path):
    demo.write_image_folder(tmp_path, few)
    expected = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.rglob("*.png"))]) / 127.5 - 1
    np.testing.assert_allclose(demo.pixels_of(few)[:, 0], expected, atol=1e-6)


@pytest.mark.slow
def test_vae_learns(few, tmp_path):
    demo.train_vae(tmp_path / "vae", few, num_steps=60, seed=0)
    vae, pixels = AutoencoderKL.from_pretrained(tmp_path / "vae"), demo.pixels_of(few)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        error = (vae.decode(posterior.mode()).sample - pixels).square().mean()
    assert posterior.mean.shape == (40, 1, 8, 8)
    # The best constant image, the mean image, errs by the variance around it.
    assert error < pixels.var(dim=0, correction=0).mean()


@pytest.mark.usefixtures("small_vae")
def test_vae_of_a_killed_run_ends_the_same(few, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SAVING_STEPS", 2)
    demo.train_vae(tmp_path / "vae", few, num_steps=6, seed=0)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")

    class Killed(Exception):
        pass

    losses = []

    def killing_loss(*tensors):
        losses.append(F.mse_loss(*tensors))
        if len(losses) == 4:
            raise Killed
        return losses[-1]

    with monkeypatch.context() as patch:
        patch.setattr(demo, "F", SimpleNamespace(mse_loss=killing_loss))
        with pytest.raises(Killed):
            demo.train_vae(tmp_path / "killed", few, num_steps=6, seed=0)
        assert not (tmp_path / "killed").exists()
        assert len(losses) == 4
        torch.manual_seed(1)  # nothing depends on the state of the process
        demo.train_vae(tmp_path / "killed", few, num_steps=6, seed=0)
        assert len(losses) == 4 + 4  # from the last save, of update 2
    again = AutoencoderKL.from_pretrained(tmp_path / "killed")
    for name, value in vae.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert {path.name for path in tmp_path.iterdir()} == {"vae", "killed"}
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


@pytest.mark.usefixtures("small_vae")
def test_vae_of_other_flags_does_not_go_on_from_what_these_left(few, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(demo, "SAVING_STEPS", 1)
        patch.setattr(demo, "whole_folder", None)  # ends with an error, as by a kill, once it is trained
        with pytest.raises(TypeError):
            demo.train_vae(tmp_path / "vae", few, num_steps=1, seed=1)
    demo.train_vae(tmp_path / "vae", few, num_steps=2, seed=1)
    demo.train_vae(tmp_path / "other", few, num_steps=2, seed=1)
    first, second = (AutoencoderKL.from_pretrained(tmp_path / name).state_dict() for name in ("vae", "other"))
    assert all(torch.equal(first[name], second[name]) for name in first)
