"""Crops of photographs: no pixel is in two parts, and what is measured of them."""

import crops
import pytest
import torch


def test_blocks_are_in_one_part_each_and_hold_the_photograph():
    parts = {part: crops.blocks(part) for part in crops.SHARES}
    for number in range(len(crops.PHOTOGRAPHS)):
        found = [block.numpy().tobytes() for of_part in parts.values() for block in of_part[number]]
        # Black sky is alike.
        assert len(set(found)) > 0.9 * len(found)
        sizes = [len(of_part[number]) for of_part in parts.values()]
        assert sizes[0] > sizes[1] >= 5
        assert sizes[2] >= 5
    astronaut = parts["training"][0], parts["validation"][0], parts["judge"][0]
    assert sum(map(len, astronaut)) == (512 // crops.BLOCK) ** 2


def test_a_crop_lies_in_a_block_of_its_photograph():
    drawn = crops.draw_crops("validation", 4, seed=5)
    for image, label in zip(drawn.images, drawn.labels, strict=True):
        windows = crops.blocks("validation")[label].unfold(2, 16, 1).unfold(3, 16, 1)
        assert (windows == image[None, :, None, None]).flatten(4).all(-1).all(1).any()
    assert not torch.equal(drawn.images, crops.draw_crops("validation", 4, seed=6).images)


def test_standardised_crops_are_of_magnitude_one_and_come_back(monkeypatch):
    monkeypatch.setattr(crops, "NUM_TRAINING", 500)
    crops.standards.cache_clear()
    crops._standardised.cache_clear()
    (images, _), _ = crops.crops()
    assert images.mean((0, 2, 3)).abs().max() < 1e-4
    assert images.std((0, 2, 3)) == pytest.approx([1.0] * 3, abs=1e-4)
    assert torch.equal(crops.as_pixels(images), crops.draw_crops("training", 500).images)
    # What is trained on is its own nearest.
    assert crops.nearest_training_ratio(crops.draw_crops("training", 500).images[:100]) < 1e-3
    assert 0.7 < crops.nearest_training_ratio(crops.draw_crops("validation", 100, seed=2).images) < 1.3
    crops.standards.cache_clear()
    crops._standardised.cache_clear()


def test_the_judge_tells_photographs_apart(monkeypatch):
    monkeypatch.setattr(crops, "NUM_JUDGE", 1000)
    monkeypatch.setattr(crops, "NUM_JUDGE_STEPS", 60)
    crops.the_judge.cache_clear()
    unseen = crops.draw_crops("validation", 300)
    features, logits = crops.features_of(unseen.images)
    crops.the_judge.cache_clear()
    assert features.shape == (300, 32)
    assert (logits.argmax(1) == unseen.labels).double().mean() > 0.4
