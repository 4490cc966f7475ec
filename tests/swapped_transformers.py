"""Swapped models of every kind, and their gradients."""

import pytest
import torch
from tiny_transformers import CASES, make, run

from diffusers_mp import swap_adaln_for_rotation
from diffusers_mp.rotation_swap.linear import rotation_linears


# Without the variants of a class: what a test of mechanics needs.
CLASSES = [case for case, (name, *_) in CASES.items() if case == next(c for c in CASES if CASES[c][0] == name)]


def slow_unless(cases, names):
    """Parameters of a test, those beyond `names` marked slow."""
    return [pytest.param(case, marks=() if case in names else pytest.mark.slow) for case in cases]


def swapped(case, angles=0.0, dtype=torch.float32, **options):
    """A swapped model whose heads are random, of this standard deviation, and inputs."""
    model, inputs = make(case, dtype)
    swap_adaln_for_rotation(model, **options)
    turn_(model, angles)
    return model, inputs


@torch.no_grad()
def turn_(model, std, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for linear in rotation_linears(model).values():
        for parameter in linear.rotation.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std / fan_in**0.5)


def gradients(model, inputs):
    model.zero_grad()
    run(model, inputs).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
