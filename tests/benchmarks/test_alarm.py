"""Replays of trainings with a watch: when a loss has doubled, what a record has, what the table counts."""

import pytest
from helpers import BENCHMARKS


@pytest.fixture
def alarm(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "quality"))
    import alarm

    return alarm


def test_when_a_loss_has_doubled(alarm):
    from short_runs import doubled_at

    assert doubled_at([4.0] * 10 + [1.0] * 20) is None
    # The median is above 2 when six of ten are: the 9 and five more. The 9 alone does nothing.
    assert doubled_at([1.0] * 15 + [9.0] + [1.0] * 4 + [2.1] * 10) == 25
    assert doubled_at([1.0] * 10 + [float("nan")] * 10) is not None


def test_a_run_far_beyond_its_rate_is_warned_of(alarm):
    from short_runs import Run, train, train_watched

    run = Run("E", "shift", 0.8, 0, width=32, num_layers=1, num_updates=101)
    record = train_watched(run)
    assert (record["alarms"][0]["update"], record["alarms"][0]["quantity"]) == (100, "relative_update")
    assert len(record["looks"]["relative_update"]) == 3  # updates 1, 50 and 100
    assert max(record["looks"]["relative_update"]) > 0.03
    assert record["looks"]["weight_growth"] == pytest.approx([1, 1, 1], rel=1e-3)
    assert {name: record[name] for name in ("last_loss", "largest_loss")} == {
        name: value for name, value in train(run).items() if name in ("last_loss", "largest_loss")
    }


def test_the_table(alarm, capsys):
    def record(rate, doubled, update, configuration="E", **more):
        alarms = [] if update is None else [{"update": update, "quantity": "gate"}]
        run = {"configuration": configuration, "learning_rate": rate, "num_updates": 1500, "ended": True}
        return {**run, "validation_loss": 0.1, "doubled": doubled, "alarms": alarms, **more}

    alarm.report(
        [
            *(record(0.1, None, update) for update in (None, None, 700)),
            *(record(0.2, doubled, 150) for doubled in (120, 199, 200, 260, 800)),
            record(0.2, 900, None),
            record(0.2, None, 150, validation_loss=1.2),
            record(0.2, None, 100, "F"),
        ]
    )
    printed = capsys.readouterr().out
    assert "| E | 0.1 | 3 | 1 | 0 | 0 |  | gate |" in printed
    assert "| E | 0.2 | 0 | 0 | 7 | 4 | 110, 650, None, 1350 | gate |" in printed
    assert "| F | 0.2 | 1 | 1 | 0 | 0 |  | gate |" in printed
    assert "a lead of 50 updates or more in 3 of 4 runs; 1 false alarms" in printed
