"""What a model of pixels predicts: the experiment in small."""

import crops
import pixel_prediction
import pytest
import torch


@pytest.fixture
def small(monkeypatch):
    """The experiment with few crops and steps."""
    for name, value in {"NUM_TRAINING": 64, "NUM_VALIDATION": 16}.items():
        monkeypatch.setattr(crops, name, value)
    for name, value in {"NUM_SAMPLES": 16, "NUM_STEPS": 2}.items():
        monkeypatch.setattr(pixel_prediction, name, value)
    for cached in (crops.standards, crops._standardised):
        cached.cache_clear()
    yield
    for cached in (crops.standards, crops._standardised):
        cached.cache_clear()


def test_patches_are_cut_row_by_row():
    images = torch.randn(3, 3, 32, 32)
    patches = pixel_prediction.patches(images)
    assert patches.shape == (3 * 16, 192)
    # The second patch of the second image.
    assert torch.equal(patches[16 + 1].view(3, 8, 8), images[1, :, :8, 8:16])


@pytest.mark.slow  # trains three models
def test_each_prediction_is_trained_sampled_and_told(small, capsys):
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
    assert "Distance of other crops of training" in told
