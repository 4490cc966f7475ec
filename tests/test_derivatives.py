"""Derivatives of the model forwards, and of its gradients, against finite differences in float64."""

import pytest
import torch
from helpers import tiny_inputs, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_mp import trust_rows_


# PyTorch's forward mode imports what it has itself deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

MODELS = {
    "A": ("A", ("scale", "shift", "gate")),
    "A rotate": ("A", ("scale", "shift", "rotate", "gate")),
    "E": ("E", ("scale", "rotate", "gate")),
    "E shift": ("E", ("scale", "shift", "rotate", "gate")),
    "F": ("F", ("scale", "rotate", "gate")),
    "F shift": ("F", ("scale", "shift", "gate")),
}
STEP = 1e-6


def velocity_of(name, num_layers=1, dtype=torch.float64):
    """A model in training as a function of latents and time, and both."""
    model = tiny_model(*MODELS[name], num_layers=num_layers).to(dtype).train()
    inputs = tiny_inputs(dtype=dtype)
    latents, time = inputs.pop("hidden_states"), inputs.pop("timestep").to(dtype)
    return model, lambda latents, time: model(latents, timestep=time, **inputs).sample, latents, time


def difference(function, latents, time, tangents):
    """Central difference along a direction."""
    ahead = function(latents + STEP * tangents[0], time + STEP * tangents[1])
    return (ahead - function(latents - STEP * tangents[0], time - STEP * tangents[1])) / (2 * STEP)


@pytest.mark.parametrize("name", MODELS)
def test_forwards_in_latents_and_time(name):
    # As consistency and mean-flow training do.
    model, velocity, latents, time = velocity_of(name)
    tangents = torch.randn_like(latents), torch.ones_like(time)
    value, derivative = torch.func.jvp(velocity, (latents, time), tangents)
    torch.testing.assert_close(value, velocity(latents, time), rtol=1e-12, atol=1e-12)
    expected = difference(velocity, latents, time, tangents)
    torch.testing.assert_close(derivative, expected, rtol=1e-5, atol=1e-7)
    with torch.autograd.forward_ad.dual_level():
        dual = velocity(*map(torch.autograd.forward_ad.make_dual, (latents, time), tangents))
        other = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(other, derivative, rtol=1e-12, atol=1e-12)
    derivative.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_gradients(name):
    model, velocity, latents, time = velocity_of(name)
    weight = model.transformer_blocks[0].attn_modulation.proj.weight

    def gradient(latents, time):
        latents = latents.detach().requires_grad_()
        # The one kind of attention that PyTorch differentiates twice
        with sdpa_kernel(SDPBackend.MATH):
            return latents, torch.autograd.grad(velocity(latents, time).pow(3).sum(), latents, create_graph=True)[0]

    source, first = gradient(latents, time)
    along = torch.randn_like(first)
    second, of_weight = torch.autograd.grad((first * along).sum(), (source, weight))
    tangents = torch.randn_like(latents), torch.zeros_like(time)
    of_latents = difference(lambda *at: (gradient(*at)[1] * along).sum(), latents, time, tangents)
    torch.testing.assert_close((second * tangents[0]).sum(), of_latents, rtol=1e-5, atol=1e-6)

    moved, values = torch.randn_like(weight), []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * STEP * moved)
        values.append((gradient(latents, time)[1] * along).sum())
        with torch.no_grad():
            weight.sub_(sign * STEP * moved)
    expected = (values[0] - values[1]) / (2 * STEP)
    torch.testing.assert_close((of_weight * moved).sum(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_transforms_need_no_kind_of_attention():
    _, velocity, latents, time = velocity_of("E")

    def energy(latents):
        return velocity(latents, time).square().sum()

    along = torch.randn_like(latents)
    _, product = torch.func.jvp(torch.func.grad(energy), (latents,), (along,))
    source = latents.clone().requires_grad_()
    (twice,) = torch.autograd.grad((torch.func.grad(energy)(source) * along).sum(), source)
    torch.testing.assert_close(twice, product)


def test_a_compiled_model_says_that_it_cannot_be_differentiated_twice():
    model, _, latents, time = velocity_of("E")
    compiled = torch.compile(model, backend="aot_eager")
    latents.requires_grad_()
    output = compiled(latents, timestep=time, class_labels=torch.zeros(3, dtype=torch.long)).sample
    (first,) = torch.autograd.grad(output.square().sum(), latents, create_graph=True)
    with pytest.raises(RuntimeError, match="aot_autograd does not currently support double backward"):
        first.sum().backward()


@pytest.mark.slow  # compiles a model
@pytest.mark.parametrize("name", ["A", "E shift", "F"])
def test_compiled_forwards_is_the_eager_one(name):
    model, velocity, latents, time = velocity_of(name, dtype=torch.float32)
    trust_rows_(model)
    tangents, parameters = (torch.randn_like(latents), torch.ones_like(time)), list(model.parameters())

    def loss_of(latents, time):
        value, derivative = torch.func.jvp(velocity, (latents, time), tangents)
        derivative = derivative.detach()  # whose own gradient Inductor cannot take: pytorch/pytorch#177261
        return value, derivative, (value - derivative).square().mean()

    eager, compiled = loss_of(latents, time), torch.compile(loss_of, fullgraph=True)(latents, time)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    pairs = zip(torch.autograd.grad(eager[2], parameters), torch.autograd.grad(compiled[2], parameters), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
