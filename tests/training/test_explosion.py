"""When a loss counts as exploded, by the rule: above 10 times the median of the last 100, 20 times running."""

import math
import random

import pytest

from diffusers_mp.training.explosion import LossHistory


def alarms(losses):
    """The updates, counted from 1, at which an alarm is given, with the median."""
    history = LossHistory()
    found = {update: history.add(loss) for update, loss in enumerate(losses, start=1)}
    return {update: median for update, median in found.items() if median is not None}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_the_twentieth_update_of_an_explosion_is_told_once(scale):
    losses = [scale * (1 + 0.5 * (update % 2)) for update in range(100)]
    assert alarms(losses + [16 * scale] * 200) == {120: pytest.approx(1.5 * scale)}
    # Not ten times the median, or not so often running.
    assert alarms(losses + [10 * scale] * 200) == {}
    assert alarms(losses + ([16 * scale] * 19 + [scale]) * 10) == {}


def test_a_loss_that_grows_and_grows_is_told_once():
    losses = [0.5] * 150 + [0.5 * 1.5**update for update in range(80)]
    # 1.5^6 is the first above 10.
    assert alarms(losses) == {150 + 6 + 20: 0.5}


def test_the_second_explosion_is_told_as_well():
    assert list(alarms([1.0] * 100 + [20.0] * 30 + [1.0] * 100 + [20.0] * 30)) == [120, 250]
    # One from where the first has led: its losses are the median by then.
    assert list(alarms([1.0] * 100 + [20.0] * 150 + [300.0] * 30)) == [120, 270]


def test_nothing_is_told_of_the_first_hundred_updates():
    assert alarms([1.0] * 60 + [100.0] * 40) == {}
    assert alarms([1.0] * 79 + [100.0] * 21 + [1.0] * 50) == {}
    # Those of its first ones that are in the window count from there on.
    assert list(alarms([1.0] * 90 + [100.0] * 40)) == [120]


@pytest.mark.parametrize(
    "losses",
    [
        [1e-9] * 200 + [1e-6] * 100,
        [0.0] * 200 + [1e-7] * 100,
        [-1.0] * 200 + [0.0] * 100,
        [1 - 0.99 * min(1, update / 500) for update in range(2000)],
    ],
    ids=["by heart", "zero", "negative", "learns"],
)
def test_what_is_no_explosion(losses):
    assert alarms(losses) == {}


def test_losses_of_single_images_give_no_false_alarm():
    """They differ by their noise level a hundredfold: here one in sixteen is above ten times the median."""
    generator = random.Random(0)
    losses = [math.exp(generator.gauss(-3, 1.5)) for _ in range(100_000)]
    assert sum(loss > 10 * math.exp(-3) for loss in losses) > 5_000
    assert alarms(losses) == {}
