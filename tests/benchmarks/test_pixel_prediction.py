"""What a model of pixels predicts: the experiment in small."""

import pytest
import torch
from helpers import BENCHMARKS


@pytest.fixture
def pixel_prediction(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "quality"))
    import pixel_prediction

    monkeypatch.setattr(pixel_prediction, "NUM_CROPS", 16)
    monkeypatch.setattr(pixel_prediction, "NUM_STEPS", 2)
    return pixel_prediction


def test_patches_are_cut_from_crops_of_photographs(pixel_prediction):
    images = pixel_prediction.photographs()
    assert {"china", "flower"} <= {*images}
    pixels = torch.cat([image.flatten() for image in images.values()])
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((0, 1), abs=1e-4)
    crops = pixel_prediction.crops([images["china"]], 3, torch.Generator().manual_seed(0))
    patches = pixel_prediction.patches(crops)
    assert patches.shape == (3 * 16, 192)
    # The second patch of the second crop.
    assert torch.equal(patches[16 + 1].view(3, 8, 8), crops[1, :, :8, 8:16])


@pytest.mark.slow  # trains six models
def test_each_prediction_is_trained_sampled_and_told(pixel_prediction, capsys):
    screen = [run._replace(num_updates=4) for run in pixel_prediction.SCREEN if run.learning_rate == 0.05]
    records = [run._asdict() | pixel_prediction.train(run) for run in screen]
    assert all(record["validation_loss"] > 0 and record["distance"] > 0 for record in records)
    assert pixel_prediction.best_runs(records) == []
    records += [record | {"learning_rate": rate, "validation_loss": 9e9} for record in records for rate in (0.02, 0.1)]
    runs = pixel_prediction.best_runs(records)
    assert len(runs) == 15
    assert {run.learning_rate for run in runs} == {0.05}
    records += [run._asdict() | records[number % 3] | {"seed": run.seed} for number, run in enumerate(runs)]
    pixel_prediction.report(records)
    told = capsys.readouterr().out
    assert "| x | 0.05 | 5 |" in told
    assert "Photographs: china, flower" in told
