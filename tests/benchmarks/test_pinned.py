"""Pinning a stock DiT: the experiment in small."""

import pytest
from helpers import BENCHMARKS


@pytest.fixture
def pinned(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "quality"))
    import pinned

    monkeypatch.setattr(pinned, "EVERY", 4)
    monkeypatch.setattr(pinned, "SAMPLED_AT", (8,))
    for name, value in (("NUM_SAMPLES", 40), ("NUM_STEPS", 2), ("NUM_JUDGE_STEPS", 3)):
        monkeypatch.setattr(pinned, name, value)
    return pinned


@pytest.mark.slow  # trains four models, and a judge for each
def test_pinned_norms_stay_and_others_move(pinned, capsys, tmp_path, monkeypatch):
    records = []
    for arm in pinned.ARMS:
        run = pinned.Run(arm, 0, num_updates=8)
        records.append(run._asdict() | pinned.train(run))
        assert [entry["update"] for entry in records[-1]["measured"]] == [4, 8]
        last = records[-1]["measured"][-1]
        moved = max(abs(last["growth"] - 1), abs(last["largest_growth"] - 1))
        assert moved < 1e-5 if arm in ("rows", "matrices") else moved > 1e-4
        assert last["frechet"] > 0
        assert 0 < last["relative_update"] < 0.1
    records += [record | {"seed": 1} for record in records]
    pinned.report(records)
    assert "| 8 | rows | 2 | 1.000 |" in capsys.readouterr().out
    monkeypatch.setattr(pinned, "FIGURE", tmp_path / "pinned.png")
    pinned.draw(records)
    assert (tmp_path / "pinned.png").stat().st_size > 10_000
