"""The results of an evaluation in a card that is there."""

import pytest
from hub_client import rewrite

from diffusers_mp.publishing.evaluation_card import write_evaluation


def results(home, distance):
    extractor = {"id": f"{home}/dinov2", "revision": None, "weights_sha256": "abc", "output": "pooler_output"}
    reference = {"num_images": 5000, "resolution": 32, "preparation": "centre crop", "content_hash": "f" * 64}
    sampler = {"class": "DPMSolverMultistepScheduler", "solver_order": 2, "beta_start": 0.1, "solver_type": None}
    classes = {"drawn": "in turn", "counts": {"cat": 5000, "dog": 5000}}
    settings = {"num_samples": 10000, "seed": 3, "classes": classes, "sampler": sampler, "nearest_k": 3}
    settings |= {"dtype": "float32", "extractors": [extractor], "references": [reference], "model": f"{home}/run"}
    metrics = {"precision": 0.5, "recall": 0.25, "num_images_compared": 5000}
    cells = [
        {
            "ema_std": 0.05,
            "guidance_scale": scale,
            "num_inference_steps": 25,
            "metrics": [{"frechet_distance": d} | metrics],
        }
        for scale, d in ((1.0, distance), (2.0, distance / 2))
    ]
    versions = {"diffusers_mp": "1.2", "torch": "3.4", "diffusers": "5.6"}
    return {"settings": settings, "versions": versions, "warnings": ["few | images"], "best": cells[1], "cells": cells}


def test_evaluation_takes_the_place_of_the_last_one(run):
    before = (run / "README.md").read_text()
    rewrite(run / "README.md", before)
    write_evaluation(run, results("/home/author", 8.0))
    first = (run / "README.md").read_text()
    write_evaluation(run, results("/home/author", 4.0))
    second = (run / "README.md").read_text()
    assert [text.count("## Evaluation of samples") for text in (before, first, second)] == [0, 1, 1]
    assert "| 0.05 | 2 | 25 | 4 | 0.5 | 0.25 |\n| 0.05 | 1 | 25 | 8 | 0.5 | 0.25 |" in first
    # All else stays, byte by byte.
    for text in (first, second):
        start, end = text.index("## Evaluation of samples"), text.index("## Licence of the weights")
        assert text[:start] + text[end:] == before
        assert "author" not in text[start:end]
    for fact in (
        "10,000 images for each row, 2 classes in turn, seed 3, `DPMSolverMultistepScheduler`, solver_order 2, f",
        "of diffusers-mp 1.2 (torch 3.4, diffusers 5.6)",
        "| width of the average | guidance scale | steps | Fréchet distance, dinov2 | precision, dinov2 | recall, din",
        "- Features of dinov2: weights_sha256 abc; output pooler_output. Reference: 5,000 images of 32x32 pixels",
        "k = 3, 5,000 images each",
        "- Warning: few \\| images",
    ):
        assert fact in second, fact
    assert "evaluation.png" not in second
    rewrite(run / "evaluation.png", "")
    assert "![Fréchet distances](evaluation.png)" in str(write_evaluation(run, results("/home/author", 4.0)))
    (run / "README.md").unlink()
    with pytest.raises(ValueError, match="must hold a README.md, .* `write_model_card` makes one"):
        write_evaluation(run, results("/home/author", 4.0))
