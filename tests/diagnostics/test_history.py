"""A history as a file."""

import pytest
from helpers import tiny_model
from recorded_models import floats, train

from diffusers_mp import MagnitudeRecorder
from diffusers_mp.diagnostics.history import load_history


def test_history_survives_a_file(tmp_path):
    _, recorder = train(tiny_model("A", open_gains=False), 4, {"stride": 2})
    recorder.close()
    recorder.save(tmp_path / "magnitudes.json")
    history = load_history(tmp_path / "magnitudes.json")
    for entry, original in zip(history, recorder.history, strict=True):
        assert entry.keys() == original.keys()
        assert floats(entry) == pytest.approx(floats(original), rel=1e-5)
    # What is zero at first has no relative update, and gets none by a file.
    assert "relative_update/output.modulation" not in history[0]
    assert "relative_update/output.modulation" in history[-1]
    resumed = MagnitudeRecorder(tiny_model(), num_updates=3)
    resumed.load(tmp_path / "magnitudes.json")
    assert [entry["step"] for entry in resumed.history] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["magnitudes.json"]
