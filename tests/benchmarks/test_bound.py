"""The short trainings on digits: bounds in each place hold, records are made once, failures are counted."""

import json

import pytest
import torch
from helpers import BENCHMARKS


TINY = {"width": 32, "num_layers": 2, "num_updates": 7}


@pytest.fixture(autouse=True)
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "quality"))


@pytest.mark.parametrize("place", ["stream", "branch", "both"])
def test_the_stream_of_a_training_stays_below_its_bound(place):
    import bound

    plain = bound.fused.gated_sum
    record = bound.train(bound.Run(place, 0.5, "rotate", 0.5, 0, **TINY))
    assert record["ended"]
    # A cap of branches alone bounds the stream by the larger of what comes in and 4.88 times the cap.
    assert 0.4 < record["largest_rms"] < (2.44 if place == "branch" else 0.50001)
    assert bound.fused.gated_sum is plain
    free = bound.train(bound.Run("none", 0.0, "rotate", 0.5, 0, **TINY))
    assert free["largest_rms"] > record["largest_rms"]


def test_a_capped_training_is_that_of_configuration_f():
    import bound
    import short_runs

    of_screen = bound.train(bound.Run("both", 2.0, "shift", 0.1, 0, **TINY))
    of_model = short_runs.train(short_runs.Run("F", "shift", 0.1, 0, **TINY))
    assert of_model["validation_loss"] == pytest.approx(of_screen["validation_loss"], rel=1e-6)


@pytest.mark.parametrize("precision, tolerance", [("float32", 0), ("bf16", 0.02)])
def test_a_run_is_a_function_of_its_seed(precision, tolerance):
    import short_runs

    run = short_runs.Run("F", "rotate", 0.1, 0, **TINY)
    expected = short_runs.train(run)["validation_loss"]
    found = short_runs.train(run._replace(precision=precision))["validation_loss"]
    assert abs(found / expected - 1) <= tolerance
    assert (found == expected) == (precision == "float32")
    assert short_runs.train(run._replace(seed=1))["validation_loss"] != expected


def test_runs_with_a_record_are_not_made_again(tmp_path, monkeypatch):
    import short_runs

    runs = [short_runs.Run("E", "shift", rate, 0) for rate in (0.1, 0.2, 0.3, 0.4)]
    made = []
    for argv in (["--part", "1", "--parts", "2"], ["--part", "1", "--parts", "2"], ["--report"], []):
        monkeypatch.setattr("sys.argv", ["cliff.py", *argv])
        records = short_runs.make_records(tmp_path / "runs", runs, lambda run: made.append(run) or {"ended": 1}, "")
        assert records == [json.loads(line) for line in (tmp_path / "runs").read_text().splitlines()]
    assert [run.learning_rate for run in made] == [0.2, 0.4, 0.1, 0.3]
    assert {record["code"] for record in records} == {short_runs.hash_of_code()}


def test_the_tables_of_the_cliff(capsys):
    import cliff

    def record(run):
        of_arm = {"E": 0.2, "F": 0.1}[run.configuration] + run.learning_rate / 100 + run.seed / 1e6
        if run.configuration == "E" and run.learning_rate > 0.1:
            return run._asdict() | {
                "ended": False,
                "update": 9,
                "largest_rms": 1e9,
                "largest_hidden": 1e9,
                "largest_loss": 7.0,
            }
        lost = run.learning_rate > 0.3
        more = {
            "ended": True,
            "largest_rms": 2.0,
            "largest_hidden": 5.0,
            "largest_loss": 3.0,
            "validation_loss": 1.2 if lost else of_arm,
        }
        return run._asdict() | more

    assert cliff.paired([]) == []
    records = [record(run) for run in cliff.CLIFF]
    pairs = cliff.paired(records)
    assert {(run.configuration, run.learning_rate) for run in pairs} == {("E", 0.025), ("F", 0.025)}
    assert len(pairs) == 4 * 8
    records += [record(run) for run in pairs]
    cliff.report_failures(records, "all")
    cliff.report_pairs(records)
    printed = capsys.readouterr().out
    assert "| E | shift | 0.4 | 5 of 5 | 9, 9, 9, 9, 9 |  |  | 1e+09 | 1e+09 | 7 |" in printed
    assert "| F | rotate | 0.4 | 5 of 5 |  | 5 |  | 2 | 5 | 3 |" in printed
    # 0.10025 over 0.20025, less what the seeds add.
    assert "| shift | 8 | 0.2003 at 0.025 | 0.1003 at 0.025 | -49.94 ± 0.00 | -49.94 |" in printed


def test_a_mean_and_its_interval():
    import cliff

    # Of two values: half of the interval is 12.706 times their standard error, 1.
    mean, half = cliff.interval([1.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(12.706, rel=1e-4))


def test_a_loss_that_is_not_finite_ends_a_run(monkeypatch):
    import short_runs

    run = short_runs.Run("E", "shift", 0.1, 0, **TINY)

    def spoil(model, update, loss):
        if update == 3:
            with torch.no_grad():
                model.output.gain.fill_(float("nan"))

    record = short_runs.train(run, spoil)
    assert (record["ended"], record["update"]) == (False, 4)
    assert "validation_loss" not in record
