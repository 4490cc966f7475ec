"""The demo's data and its judge: real handwritten digits as an image folder, and the measures of samples.

    python examples/digits.py --output_dir demo/digits

writes `demo/digits/{train,judge,held_out}/<digit>/<number>.png`, 32x32 in 8-bit greyscale. The scans are the 1797 that
scikit-learn ships (8x8, values 0 to 16), so no network is needed. The three parts share no image:

- `train`, half of each class: the VAE and the diffusion transformer see these;
- `judge`, a quarter: the classifier that reads the samples is fitted on these, which no generative model saw;
- `held_out`, a quarter: seen by neither. What real digits score here is what a perfect model would score.

Both distances below are Euclidean, in the features that the judge reads (`features`), and their ratios to real digits
are about 1 for a perfect model. A model that repeats one picture per class has a within-class ratio of 0, one that has
memorised its training images a nearest-training ratio of 0.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC


IMAGE_SIZE = 32
SCAN_SIZE = 8
# The order of `datasets.load_dataset("imagefolder")`, which sorts the names: the id of a class is its digit.
CLASS_NAMES = [str(digit) for digit in range(10)]
SPLIT_SEED = 0


class LabelledImages(NamedTuple):
    """N pictures, their digits, shape (N,), and their places among all the scans, shape (N,)."""

    images: list[Image.Image]
    labels: np.ndarray
    numbers: np.ndarray


def upscale(scan):
    """One 8x8 scan with values 0 to 16 as a 32x32 8-bit greyscale image.

    Lanczos, because averaging its 4x4 blocks returns the scan more closely than after bilinear or bicubic upscaling:
    the larger picture is smooth enough to look at and still what was scanned.

    Args:
        scan (np.ndarray): shape (8, 8), values in [0, 16].
    Returns:
        PIL.Image.Image: mode L, 32x32.
    """
    image = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)


def split_digits():
    """All 1797 digits in three disjoint parts, each class divided 1/2, 1/4, 1/4 by a fixed shuffle.

    Returns:
        dict[str, LabelledImages]: keys `train`, `judge`, `held_out`.
    """
    digits = load_digits()
    rng = np.random.default_rng(SPLIT_SEED)
    numbers = {"train": [], "judge": [], "held_out": []}
    for digit in range(len(CLASS_NAMES)):
        members = rng.permutation(np.flatnonzero(digits.target == digit))
        half, quarter = len(members) // 2, len(members) // 4
        parts = np.split(members, [half, half + quarter])
        for name, part in zip(numbers, parts, strict=True):
            numbers[name].extend(part)
    splits = {}
    for name, part in numbers.items():
        part = np.sort(part)
        splits[name] = LabelledImages([upscale(digits.images[number]) for number in part], digits.target[part], part)
    return splits


def write_image_folder(folder, digits):
    """Write `folder/<digit>/<number>.png`, the layout that `datasets.load_dataset("imagefolder")` reads.

    Writing the same digits again is harmless. Nothing is deleted.

    Args:
        folder (str or Path): created if missing.
        digits (LabelledImages): one part of `split_digits()`.
    Raises:
        ValueError: if `folder` holds a file that does not belong to `digits`, which would become training data.
    """
    folder = Path(folder)
    paths = [
        folder / CLASS_NAMES[label] / f"{number:04d}.png"
        for label, number in zip(digits.labels, digits.numbers, strict=True)
    ]
    strangers = sorted({path for path in folder.rglob("*") if path.is_file()} - set(paths))
    if strangers:
        raise ValueError(
            f"`folder` must hold nothing but the digits to be written, got {folder} with {len(strangers)} other "
            f"files, the first {strangers[0]}. Name an empty folder."
        )
    for path, image in zip(paths, digits.images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def features(images):
    """What the judge reads: greyscale, averaged over areas down to 8x8, in [0, 1].

    Args:
        images (list[PIL.Image.Image]): any mode, any size from 8x8, for example a pipeline's `images`.
    Returns:
        np.ndarray: float64, shape (N, 64).
    """
    size = (SCAN_SIZE, SCAN_SIZE)
    scans = [np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), dtype=float) for image in images]
    return np.stack(scans).reshape(len(scans), -1) / 255


def fit_judge(images, labels):
    """A support vector classifier with a Gaussian kernel on `features`.

    Args:
        images (list[PIL.Image.Image]): the `judge` part.
        labels (np.ndarray): their digits, shape (N,).
    Returns:
        sklearn.svm.SVC: the judge.
    """
    return SVC(C=10.0).fit(features(images), labels)


def recognised(judge, images, labels):
    """Fraction of images in which the judge reads the digit that `labels` says: of real ones its accuracy.

    Args:
        judge (sklearn.svm.SVC): from `fit_judge`.
        images (list[PIL.Image.Image]): N images.
        labels (np.ndarray or list[int]): the digit each is meant to show, shape (N,).
    Returns:
        float: in [0, 1].
    Raises:
        ValueError: if there are not as many labels as images.
    """
    return float(np.mean(judge.predict(features(images)) == check_labels(images, labels)))


def within_class_distance(images, labels):
    """Mean distance between two different images of a class, averaged over the classes present.

    No image is paired with itself, so the expectation does not depend on how many images a class has, and each class
    counts once: sets of different sizes compare, as long as they hold the same classes.

    Args:
        images (list[PIL.Image.Image]): at least two of each class.
        labels (np.ndarray or list[int]): their digits, shape (N,).
    Returns:
        float: distance in `features`.
    Raises:
        ValueError: if a class has a single image, or there are not as many labels as images.
    """
    labels, points = check_labels(images, labels), features(images)
    means = []
    for label in np.unique(labels):
        members = points[labels == label]
        if len(members) < 2:
            raise ValueError(f"`images` must hold at least two images of each class, got one of class {label}.")
        means.append(pairwise_distances(members)[np.triu_indices(len(members), k=1)].mean())
    return float(np.mean(means))


def nearest_distance(images, labels, training_images):
    """Mean distance to the nearest of all training images, within each class, averaged over the classes present.

    Depends on the number of training images, not on the number of `images`.

    Args:
        images (list[PIL.Image.Image]): N images.
        labels (np.ndarray or list[int]): their digits, shape (N,); only used to let each class count once.
        training_images (list[PIL.Image.Image]): the `train` part.
    Returns:
        float: distance in `features`.
    Raises:
        ValueError: if there are not as many labels as images.
    """
    labels = check_labels(images, labels)
    nearest = pairwise_distances(features(images), features(training_images)).min(axis=1)
    return float(np.mean([nearest[labels == label].mean() for label in np.unique(labels)]))


def within_class_ratio(images, labels, held_out):
    """`within_class_distance` of samples over that of the real digits in `held_out`, restricted to the same classes.

    Args:
        images (list[PIL.Image.Image]): samples, at least two of each class.
        labels (np.ndarray or list[int]): the digit each is meant to show, shape (N,).
        held_out (LabelledImages): real digits.
    Returns:
        float: about 1 for a perfect model, 0 for one picture per class.
    """
    real = same_classes(held_out, labels)
    return within_class_distance(images, labels) / within_class_distance(real.images, real.labels)


def nearest_training_ratio(images, labels, held_out, train):
    """`nearest_distance` of samples over that of the real digits in `held_out`, restricted to the same classes.

    Args:
        images (list[PIL.Image.Image]): samples.
        labels (np.ndarray or list[int]): the digit each is meant to show, shape (N,).
        held_out (LabelledImages): real digits that are not in `train`.
        train (LabelledImages): what the model was trained on.
    Returns:
        float: about 1 for a perfect model, 0 for copies of training images.
    """
    real = same_classes(held_out, labels)
    samples = nearest_distance(images, labels, train.images)
    return samples / nearest_distance(real.images, real.labels, train.images)


@torch.no_grad()
def reconstruct(vae, images):
    """The images after one pass through the VAE: encoded to the mean of the posterior, decoded, rounded to 8 bits.

    Args:
        vae (diffusers.AutoencoderKL): with 1 (greyscale) or 3 (RGB) input channels.
        images (list[PIL.Image.Image]): any mode, one size.
    Returns:
        list[PIL.Image.Image]: as a pipeline would deliver them.
    """
    processor = VaeImageProcessor(
        do_convert_grayscale=vae.config.in_channels == 1, do_convert_rgb=vae.config.in_channels == 3
    )
    pixels = processor.preprocess(images).to(vae.device, vae.dtype)
    reconstructions = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    return processor.postprocess(reconstructions)


def check_labels(images, labels):
    labels = np.asarray(labels)
    if labels.shape != (len(images),):
        raise ValueError(f"`labels` must hold one digit per image, got shape {labels.shape} for {len(images)} images.")
    return labels


def same_classes(digits, labels):
    keep = np.flatnonzero(np.isin(digits.labels, labels))
    return LabelledImages([digits.images[i] for i in keep], digits.labels[keep], digits.numbers[keep])


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for train/, judge/ and held_out/")
    return parser.parse_args(arguments)


def main(args):
    for name, digits in split_digits().items():
        write_image_folder(args.output_dir / name, digits)
        print(f"{name}: {len(digits.images)} images in {args.output_dir / name}")


if __name__ == "__main__":
    main(parse_args())
