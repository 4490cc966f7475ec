"""Training, sampling and all around them on a device that is not the CPU: same values, no mix, no wait unheard of.

There is none here: pretended_device.py makes one, and pretended_cases.py has what is run on it, in one process of its
own for all cases.
"""

import contextlib
import json
import re
import textwrap
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from pretended_cases import CASES
from pretended_device import marks, noted, set_up
from processes import ROOT, run_python

from diffusers_mp import PowerFunctionEMA
from diffusers_mp.blocks import MPDiTOutput, MPDiTTransformerBlock
from diffusers_mp.training import DDPMObjective


def check(case, **files):
    """Run a case on both devices, and say what is wrong, if anything is."""
    expected = case.function("cpu", **case.options, **files)
    noted.clear()
    marks.clear()
    values = case.function("gpu", **case.options, **files)
    assert values.keys() == expected.keys(), values.keys() ^ expected.keys()
    for name, value in values.items():
        if isinstance(value, str):
            assert value == expected[name], f"{name}: {value}, on the CPU {expected[name]}"
            continue
        value, wanted = (torch.as_tensor(each).detach().cpu().double() for each in (value, expected[name]))
        error = ((value - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()
        assert error <= case.tolerance, f"{name} differs by {error:.2g} of its largest entry"
    _, first, *others = marks
    each = Counter()
    for unit in others:
        each |= unit
    known_of_each = each if case.each is None else case.each
    for when, found, known in (("later units", each, known_of_each), ("the first unit", first - each, case.more)):
        new, gone = dict(found - Counter(known)), dict(Counter(known) - found)
        assert not new, f"the host waits in {when}, where nobody knows of it: {new}"
        assert not gone, f"the host does not wait in {when} as it is said to: {gone}"


# Mistakes


def instead(owner, name, make):
    """A patch that puts `make(the original)` in the place of a method."""
    return mock.patch.object(owner, name, make(getattr(owner, name)))


def only_on_device(then):
    """Of a method of an objective whose second argument is latents: `then(latents)` is added to what it returns."""

    def make(original):
        def method(self, latents, noise, timesteps):
            noisy = original(self, latents, noise, timesteps)
            return noisy if latents.device.type == "cpu" else noisy + then(latents)

        return method

    return instead(DDPMObjective, "add_noise", make)


def in_a_block(then):
    return instead(MPDiTTransformerBlock, "forward", lambda forward: lambda *args: forward(*args) + then(args[1]))


def moves(function):
    return function(torch.zeros(1)).device.type != "cpu"


@torch.no_grad()
def altered(ema):
    if ema.model.device.type != "cpu":
        next(iter(ema._averages[ema.stds[0]].values())).mul_(1 + 1e-9)


ONE = CASES["configuration E"]
# What is planted, where it is, and what has to be said of it.
MISTAKES = {
    "a tensor of the CPU in a block": (
        in_a_block(lambda tokens: torch.zeros(tokens.shape[-1], dtype=tokens.dtype)),
        "same device",
    ),
    "indices of the CPU": (
        in_a_block(lambda tokens: 0 * tokens[torch.zeros(3, dtype=torch.long)]),
        "later units, where nobody knows of it: {'copy",
    ),
    "a module that stays on the CPU": (
        instead(MPDiTOutput, "_apply", lambda apply: lambda self, move: self if moves(move) else apply(self, move)),
        "same device",
    ),
    "numbers from a generator of the CPU": (
        only_on_device(lambda x: torch.randn(x.shape, device=x.device, generator=torch.Generator())),
        "generator",
    ),
    "a number that is read": (only_on_device(lambda x: 0 * x.max().item()), "later units, where nobody knows"),
    "a condition": (only_on_device(lambda x: 1.0 if x.isnan().any() else 0.0), "later units, where nobody knows"),
    "a mask": (only_on_device(lambda x: 0 * x[x > 0].sum()), "later units, where nobody knows"),
    "a number that is sent": (
        only_on_device(lambda x: torch.tensor(0.0, device=x.device)),
        "later units, where nobody knows",
    ),
    "a value that is altered": (
        instead(PowerFunctionEMA, "update", lambda update: lambda ema, step: (update(ema, step), altered(ema))),
        "differs by",
    ),
    "a wait that is no more": (
        contextlib.nullcontext(),
        "does not wait in later units as it is said to: {'read nowhere': 1}",
    ),
}


# The process


def answer(path, names, files):
    """In the process of the device: the errors of cases by name, as JSON."""
    set_up()
    errors = {}
    for name in names:
        patch, case = contextlib.nullcontext(), CASES.get(name, ONE)
        if name in MISTAKES:
            patch = MISTAKES[name][0]
        if name == "a wait that is no more":
            case = case._replace(each={**case.each, "read nowhere": 1})
        try:
            with patch:
                check(case, **files.get(name, {}))
        except Exception:
            errors[name] = traceback.format_exc()
    Path(path).write_text(json.dumps(errors))


@pytest.fixture(scope="module")
def errors(request, image_folder, dinov2, tmp_path_factory):
    names = [item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)]
    files = {"encoding": {"images": str(image_folder)}, "evaluation": {"dinov2": str(dinov2)}}
    path = tmp_path_factory.mktemp("pretended") / "errors.json"
    code = """
        import json, sys
        sys.path[:0] = json.loads(sys.argv[1])
        from test_pretended_device import answer
        answer(*map(json.loads, sys.argv[2:]))
    """
    folders = [str(ROOT / "tests"), str(ROOT / "tests" / "project")]
    run_python(textwrap.dedent(code), *map(json.dumps, (folders, str(path), names, files)))
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", CASES)
def test_as_on_the_cpu(name, errors):
    if name in errors:
        pytest.fail(errors[name], pytrace=False)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_caught(name, errors):
    assert re.search(MISTAKES[name][1], errors.get(name, "nothing")), errors.get(name)
