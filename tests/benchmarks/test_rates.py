"""One rate for all sizes: what each arm's rates are, and what is read off records."""

import math

import pytest
import rates
import torch


def records_of(best_log_rates, curvature=0.05, spread=0.0):
    """Runs of the whole grid whose log losses are parabolas around these log2 rates, by arm and size."""
    records = []
    for run in rates.RUNS:
        away = math.log2(run.learning_rate) - best_log_rates(run.arm, run.width, run.num_layers)
        away += spread if run.seed == 100 else -spread
        records.append(run._asdict() | {"validation_loss": 0.2 * math.exp(curvature * away**2), "seconds": 36})
    return records


def test_a_parabola_finds_the_best_rate_between_two_of_the_grid():
    records = records_of(lambda arm, width, depth: math.log2(rates.ARMS[arm]) + 0.3)
    for arm in rates.ARMS:
        losses = rates.losses_of(records, arm, (96, 6))
        assert rates.best_log_rate(losses, [100, 101]) == pytest.approx(math.log2(rates.ARMS[arm]) + 0.3)
    assert rates.extended(records) == []


def test_a_run_that_failed_is_left_out():
    losses = {2.0**power: {100: 0.2 * math.exp(0.05 * power**2), 101: math.inf} for power in range(-2, 3)}
    assert rates.best_log_rate(losses, [100]) == pytest.approx(0)
    losses[2.0] = {100: math.inf}
    losses[4.0] = {100: math.inf}
    # What is left, from 1/4 to 1, falls to the end: the best of the grid.
    assert rates.best_log_rate(losses, [100]) == 0


def test_slopes_and_their_intervals(capsys):
    def best(arm, width, depth):
        slope = {"F": 0.0, "A": -1.0}.get(arm, -0.5)
        return math.log2(rates.ARMS[arm]) + slope * math.log2(width / 96) - 0.5 * math.log2(depth / 6)

    records = records_of(best)
    assert rates.slope_of(records, "A", rates.WIDTHS) == pytest.approx(-1)
    assert rates.slope_of(records, "F", rates.WIDTHS) == pytest.approx(0)
    assert rates.slope_of(records, "F", rates.DEPTHS) == pytest.approx(-0.5)
    rates.report(records)
    printed = capsys.readouterr().out
    assert "| width | A | -1.00 | -1.00 to -1.00 | -1.00 to -1.00 |" in printed
    assert "| width | F | +0.00 | +0.00 to +0.00 |  |" in printed.replace("-0.00", "+0.00")
    # Seeds that differ widen the interval.
    drawn = rates.bootstrap(records_of(best, spread=0.3), rates.WIDTHS)["A"]
    assert drawn.min() < -1.1
    assert drawn.max() > -0.9


def test_a_grid_goes_on_where_the_best_is_at_its_end():
    records = records_of(lambda arm, width, depth: math.log2(rates.ARMS[arm]) + (2.6 if arm == "A muP" else 0))
    more = rates.extended(records)
    assert {(run.arm, run.learning_rate) for run in more} == {("A muP", 0.08)}
    assert len(more) == len(rates.SIZES) * len(rates.SEEDS)
    assert rates.extended([record for record in records if record["seed"] == 100]) == []


@pytest.mark.parametrize(
    "arm, width, of_patches, of_hidden, of_mlp, of_table",
    [
        ("A", 192, 0.01, 0.01, 0.01, 0.01),
        ("A muP", 192, 0.01, 0.005, 0.005, 0.01),
        ("A/sqrt(n)", 192, 0.01 / 49**0.5, 0.01 / 192**0.5, 0.01 / 768**0.5, 0.01 / 192**0.5),
    ],
)
def test_the_rates_of_an_arm(arm, width, of_patches, of_hidden, of_mlp, of_table):
    run = rates.short_runs.Run("A", "shift", 0.01, 0, width=width, num_layers=1)
    model = rates.build(arm)(run, torch.zeros(1, 3, 16, 16))
    groups = rates.groups_of_arm(arm, width)(model, lr=0.01)
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert len(rate_of) == len(list(model.parameters()))
    (mlp,) = (layer for layer in model.modules() if getattr(layer, "in_features", 0) == 4 * width)
    block = model.transformer_blocks[0]
    found = [
        rate_of[id(each)]
        for each in (
            model.patch_embed.proj.weight,
            block.attn.to_q.weight,
            mlp.weight,
            model.conditioning_embedder.class_embedder.weight,
        )
    ]
    assert found == pytest.approx([of_patches, of_hidden, of_mlp, of_table])


def test_mup_is_plain_at_the_width_from_which_it_scales(monkeypatch):
    monkeypatch.setattr(rates.short_runs, "NUM_HELD_OUT", 64)
    monkeypatch.setattr(rates, "crops", rates.short_runs.digits)
    short = {"num_layers": 1, "seed": 0, "num_updates": 3, "learning_rate": 0.01}
    plain, mup = (rates.train(rates.Run(arm, 96, **short))["validation_loss"] for arm in ("A", "A muP"))
    assert plain == pytest.approx(mup, rel=1e-6)
    plain, mup, root, of_f = (rates.train(rates.Run(arm, 48, **short))["validation_loss"] for arm in rates.ARMS)
    assert len({plain, mup, root, of_f}) == 4
    assert max(plain, mup, root, of_f) < 1.2
