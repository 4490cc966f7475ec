"""The demo's digits, judge and VAE trainer, on the real scans. Expected values follow from the definitions."""

import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from helpers import ROOT
from PIL import Image
from sklearn.datasets import load_digits


sys.path.insert(0, str(ROOT / "examples"))
import digits as demo
import train_digits_vae


@pytest.fixture(scope="module")
def splits():
    return demo.split_digits()


@pytest.fixture(scope="module")
def judge(splits):
    return demo.fit_judge(splits["judge"].images, splits["judge"].labels)


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


def vae_arguments(data, output, *arguments):
    small = ["--block_out_channels", "8", "8", "8", "--train_batch_size", "8"]
    return train_digits_vae.parse_args(
        ["--train_data_dir", str(data), "--output_dir", str(output), *small, *arguments]
    )


@pytest.fixture
def few_digits(splits, tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    for number, image in enumerate(splits["train"].images[:40]):
        image.save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("in_channels", [1, 3])
def test_vae_trains_and_reloads(splits, few_digits, tmp_path, in_channels, capsys):
    arguments = ("--max_train_steps", "8", "--in_channels", str(in_channels), "--latent_channels", "2")
    vae = train_digits_vae.main(vae_arguments(few_digits, tmp_path / "vae", *arguments))
    assert "8 updates" in capsys.readouterr().out
    reloaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert reloaded.config.in_channels == in_channels
    assert not reloaded.training
    images = splits["held_out"].images[:4]
    with torch.no_grad():
        assert reloaded.encode(torch.zeros(1, in_channels, 32, 32)).latent_dist.mean.shape == (1, 2, 8, 8)
    for image, expected in zip(demo.reconstruct(reloaded, images), demo.reconstruct(vae, images), strict=True):
        assert (image.mode, image.size) == ("L" if in_channels == 1 else "RGB", (32, 32))
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_vae_learns_and_a_killed_run_ends_with_the_same(few_digits, tmp_path, monkeypatch):
    arguments = ("--max_train_steps", "60")
    vae = train_digits_vae.main(vae_arguments(few_digits, tmp_path / "vae", *arguments))
    pixels = train_digits_vae.read_images(few_digits, in_channels=1)
    with torch.no_grad():
        error = (vae.decode(vae.encode(pixels).latent_dist.mode()).sample - pixels).square().mean()
    # The best constant image, the mean image, errs by the variance around it.
    assert error < pixels.var(dim=0, correction=0).mean()

    class Killed(Exception):
        pass

    losses = []

    def killing_loss(*tensors):
        losses.append(F.mse_loss(*tensors))
        if len(losses) == 56:
            raise Killed
        return losses[-1]

    with monkeypatch.context() as patch:
        patch.setattr(train_digits_vae, "F", SimpleNamespace(mse_loss=killing_loss))
        with pytest.raises(Killed):
            train_digits_vae.main(vae_arguments(few_digits, tmp_path / "killed", *arguments))
    assert not (tmp_path / "killed").exists()
    assert len(losses) == 56
    with pytest.raises(ValueError, match="must be of a run with the same flags"):
        train_digits_vae.main(vae_arguments(few_digits, tmp_path / "killed", "--max_train_steps", "61"))
    torch.manual_seed(1)  # nothing depends on the state of the process
    again = train_digits_vae.main(vae_arguments(few_digits, tmp_path / "killed", *arguments))
    for name, value in vae.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_latent_statistics_are_those_of_posterior_draws(few_digits, tmp_path):
    vae = train_digits_vae.main(vae_arguments(few_digits, tmp_path / "vae", "--max_train_steps", "1"))
    pixels = train_digits_vae.read_images(few_digits, in_channels=1)
    mean, std, posterior_std = train_digits_vae.latent_statistics(vae, pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        draws = torch.cat([posterior.sample() for _ in range(50)])
        noise = draws - posterior.mean.repeat(50, 1, 1, 1)
    # 50 draws of 40 images of 64 places: relative error of a std 1 / sqrt(2 * 128000), times five.
    tolerance = 5 / (2 * 128_000) ** 0.5
    torch.testing.assert_close(std, draws.std((0, 2, 3)), rtol=tolerance, atol=0)
    torch.testing.assert_close(posterior_std, noise.std((0, 2, 3)), rtol=tolerance, atol=0)
    torch.testing.assert_close(mean, draws.mean((0, 2, 3)), rtol=0, atol=2 * tolerance * std.max().item())


def test_vae_trainer_names_what_is_wrong(few_digits, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="`train_data_dir` must hold images.*got none in .*empty"):
        train_digits_vae.main(vae_arguments(empty, tmp_path / "vae"))
    with pytest.raises(ValueError, match="`output_dir` must be new or empty, got .*few, which holds files"):
        train_digits_vae.main(vae_arguments(few_digits, few_digits))
    (few_digits / "broken.png").write_bytes((few_digits / "0.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"`train_data_dir` must hold readable images, got .*broken\.png"):
        train_digits_vae.main(vae_arguments(few_digits, tmp_path / "vae"))
    Image.new("L", (36, 32)).save(few_digits / "broken.png")
    with pytest.raises(ValueError, match=r"All images must have one size, got .*broken\.png"):
        train_digits_vae.main(vae_arguments(few_digits, tmp_path / "vae"))
    Image.new("L", (34, 32)).save(few_digits / "broken.png")
    with pytest.raises(ValueError, match=r"Image sides must be divisible by 4, got \(32, 34\) in .*broken\.png"):
        train_digits_vae.main(vae_arguments(few_digits, tmp_path / "vae"))
    assert not (tmp_path / "vae").exists()
