"""Color crops of ten photographs, a class each: the real images of `rates.py` and `headline.py`, and their judge.

    python benchmarks/quality/crops.py

prints what they are and the floor of the Fréchet distance, real crops against real ones. The photographs lie in the
wheels of scikit-image and scikit-learn. Blocks of 64 x 64 pixels belong to training, validation or the judge, and no
crop crosses a block, so that no pixel is in two of the three.
"""

import functools
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ablation_judge import Judge, distance, fit_judge
from PIL import Image
from shared import table


PHOTOGRAPHS = {
    **{name: "skimage.data" for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")},
    **{name: "skimage.data" for name in ("motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg", "ihc.png")},
    **{name: "sklearn.datasets.images" for name in ("china.jpg", "flower.jpg")},
}
BLOCK, SIZE = 64, 16
# Shares of the blocks of each photograph.
SHARES = {"training": 0.6, "validation": 0.2, "judge": 0.2}
NUM_TRAINING, NUM_VALIDATION, NUM_JUDGE, NUM_JUDGE_STEPS = 20_000, 512, 8000, 1000


class Crops(NamedTuple):
    """uint8 crops, (N, 3, SIZE, SIZE), and the number of the photograph of each."""

    images: torch.Tensor
    labels: torch.Tensor


@functools.cache
def blocks(part: str) -> list[torch.Tensor]:
    """The blocks of a part, for each photograph: uint8, (N, 3, BLOCK, BLOCK)."""
    found = []
    for name, package in PHOTOGRAPHS.items():
        with Image.open(Path(str(files(package) / name))) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        rows, columns = (length // BLOCK for length in pixels.shape[1:])
        tiles = pixels[:, : rows * BLOCK, : columns * BLOCK].reshape(3, rows, BLOCK, columns, BLOCK)
        tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)
        order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0))
        ends = [round(len(tiles) * share) for share in np.cumsum([0.0, *SHARES.values()])]
        chosen = list(SHARES).index(part)
        found.append(tiles[order[ends[chosen] : ends[chosen + 1]]])
    return found


def draw_crops(part: str, number: int, seed: int = 0, size: int = SIZE) -> Crops:
    """Crops of a part: each photograph, block and place is as likely as any other.

    Args:
        part (str): "training", "validation" or "judge".
        number, seed (int): how many, and which.
        size (int): height and width, at most BLOCK.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(PHOTOGRAPHS), (number,), generator=generator)
    shares = torch.rand(number, generator=generator)
    corners = torch.randint(BLOCK - size + 1, (number, 2), generator=generator).tolist()
    images = torch.empty(number, 3, size, size, dtype=torch.uint8)
    tiles = blocks(part)
    for index, (label, share, (top, left)) in enumerate(zip(labels.tolist(), shares.tolist(), corners, strict=True)):
        of_photograph = tiles[label]
        block = of_photograph[int(share * len(of_photograph))]
        images[index] = block[:, top : top + size, left : left + size]
    return Crops(images, labels)


@functools.cache
def standards() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the channels of training crops, (1, 3, 1, 1)."""
    pixels = draw_crops("training", NUM_TRAINING).images.double()
    mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    return mean.float(), std.float()


@functools.cache
def _standardised(size: int):
    mean, std = standards()
    parts = draw_crops("training", NUM_TRAINING, size=size), draw_crops("validation", NUM_VALIDATION, size=size)
    return tuple(((images.float() - mean) / std, labels) for images, labels in parts)


def crops(seed: int = 0, size: int = SIZE):
    """Standardised crops and labels: of training, and of validation; the same for all seeds."""
    return _standardised(size)


def as_pixels(standardised: torch.Tensor) -> torch.Tensor:
    """Standardised images as bytes."""
    mean, std = standards()
    return (standardised * std + mean).round().clamp(0, 255).to(torch.uint8)


@functools.cache
def the_judge() -> Judge:
    """Trained on the judge's blocks to tell the photographs apart; the same for all runs."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        return fit_judge(*draw_crops("judge", NUM_JUDGE), NUM_JUDGE_STEPS)


@torch.no_grad()
def features_of(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The judge's features and logits of uint8 crops."""
    parts = [the_judge()(part) for part in images.split(1000)]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def nearest_training_ratio(images: torch.Tensor) -> float:
    """Mean distance of uint8 crops to the nearest of training, over that of validation crops: 1 for new ones."""
    trained = draw_crops("training", NUM_TRAINING).images.flatten(1).float()

    def nearest(others):
        # By way of products a distance of 0 would not be 0.
        exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
        parts = others.flatten(1).float().split(250)
        return torch.cat([torch.cdist(part, trained, **exact).amin(1) for part in parts]).mean()

    return (nearest(images) / nearest(draw_crops("validation", len(images), seed=1).images)).item()


def main():
    rows = [[part, sum(map(len, blocks(part))), min(map(len, blocks(part)))] for part in SHARES]
    print(table(["part", "blocks", "fewest of a photograph"], rows), "\n")
    trained, again = (features_of(draw_crops("training", 10_000, seed).images)[0] for seed in (1, 2))
    unseen = draw_crops("validation", 10_000, seed=1)
    features, logits = features_of(unseen.images)
    print(f"The judge names {(logits.argmax(1) == unseen.labels).double().mean():.1%} of validation crops rightly.")
    print(f"Fréchet distance of 10,000 training crops from 10,000 others of training: {distance(again, trained):.3f},")
    print(f"from 10,000 of validation: {distance(features, trained):.3f}.")
    print(f"Nearest-training ratio of training crops drawn anew: {nearest_training_ratio(again_crops().images):.3f}")


def again_crops() -> Crops:
    """Crops of training blocks that are not those trained on."""
    return draw_crops("training", 500, seed=3)


if __name__ == "__main__":
    main()
