"""The headline experiment in small: a run's record, rates, pairs, averages that are rebuilt."""

import math

import crops
import headline
import pytest


@pytest.fixture(scope="module")
def small():
    """The experiment with few crops, samples and looks."""
    patch = pytest.MonkeyPatch()
    for name, value in {"NUM_TRAINING": 300, "NUM_VALIDATION": 64, "NUM_JUDGE": 300, "NUM_JUDGE_STEPS": 20}.items():
        patch.setattr(crops, name, value)
    for name, value in {"NUM_SAMPLES": 60, "NUM_QUANTISED_SAMPLES": 50, "NUM_STEPS": 2, "NUM_LAYERS": 1}.items():
        patch.setattr(headline, name, value)
    patch.setattr(headline, "WIDTH", 32)
    patch.setattr(headline.bits, "LIMITS", (4.0, 8.0))
    for cached in (crops.standards, crops._standardised, crops.the_judge):
        cached.cache_clear()
    yield
    patch.undo()
    for cached in (crops.standards, crops._standardised, crops.the_judge):
        cached.cache_clear()


@pytest.mark.slow  # trains two models, samples, and measures ten schemes
def test_a_run_notes_all_that_the_pages_say(small):
    record = headline.train(headline.Run("F rotate", 0.05, 0, num_updates=30))
    assert record["ended"]
    assert math.isfinite(record["frechet"])
    assert 0 < record["nearest"]
    assert set(record["rises"]) == set(headline.bits.SCHEMES)
    assert set(record["quantised_frechet"]) == {"float32", *headline.ENDPOINTS}
    assert [look["update"] for look in record["averages"]] == [10, 20, 30]
    for look in record["averages"]:
        for std, loss in look["tracked"].items():
            assert look["rebuilt"][std] == pytest.approx(loss, rel=0.01)
    # The average that the record's own loss is of.
    swept = headline.train(headline.Run("F rotate", 0.05, 100, num_updates=3))
    assert "frechet" not in swept
    assert swept["validation_loss"] < 1.2


def records_of(losses):
    """A whole sweep, best at twice the middle rate, and fresh seeds at these losses, by arm and seed."""
    records = []
    for run in headline.SWEEP:
        middle = headline.ARMS[run.arm][2]
        away = math.log2(run.learning_rate / middle) - 1
        records.append(run._asdict() | {"validation_loss": 0.1 + 0.01 * away**2, "seconds": 360})
    for run in headline.fresh(records):
        loss = losses(run.arm, run.seed)
        records.append(run._asdict() | {"validation_loss": loss, "frechet": 100 * loss, "seconds": 360})
    return records


def test_fresh_runs_are_at_the_best_rate_and_two_at_half_of_it():
    records = records_of(lambda arm, seed: 0.1)
    runs = headline.fresh(records)
    assert len(runs) == 8 * (len(headline.ARMS) + len(headline.HALVED))
    assert {run.learning_rate for run in runs if run.arm == "A"} == {0.02, 0.01}
    assert {run.learning_rate for run in runs if run.arm == "F shift"} == {0.1}
    assert headline.fresh(records[: len(headline.SWEEP) - 1]) == []


def test_a_rate_at_which_a_run_failed_is_not_the_best():
    records = [run._asdict() | {"validation_loss": 0.1 + run.learning_rate} for run in headline.SWEEP]
    assert headline.best_rates(records)["A"] == 0.0025
    for record in records:
        if record["arm"] == "A" and record["learning_rate"] == 0.0025 and record["seed"] == 101:
            del record["validation_loss"]
    assert headline.best_rates(records)["A"] == 0.005


def test_pairs_are_compared_by_log_ratios(capsys):
    headline.report(
        records_of(lambda arm, seed: (0.2 if arm == "A" else 0.19) + 0.01 * seed + 0.001 * (seed % 2) * (arm == "A"))
    )
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| F rotate | A | validation_loss"))
    mean = sum(math.log((0.19 + 0.01 * seed) / (0.2 + 0.01 * seed + 0.001 * (seed % 2))) for seed in range(8)) / 8
    assert f"| {100 * math.expm1(mean):+.1f} |" in row
    assert "| F scale | F shift | validation_loss | 8 | 0.225 | 0.225 | +0.0 | +0.0 to +0.0 | 2 | 0.0 |" in printed


def test_seeds_that_an_effect_needs():
    # Of two values that are 2 apart, the deviation is √2; with 10 seeds half of the interval is 2.262 √2 / √10 = 1.01.
    assert headline.seeds_to_resolve([0.0, 2.0], 1.02) == 10
    assert headline.seeds_to_resolve([0.0, 2.0], 1.00) == 11
