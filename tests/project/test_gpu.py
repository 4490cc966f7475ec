"""What only a GPU can show; skipped without one. Written where there was none: unproven until a run says so."""

import pytest
import torch
from helpers import tiny_inputs, tiny_model

from diffusers_mp import PowerFunctionEMA, normalize_weights_, parameter_groups, trust_rows_


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("configuration", ["A", "E"])
def test_same_as_on_the_cpu(configuration):
    model, inputs = tiny_model(configuration).eval().double(), tiny_inputs(dtype=torch.float64)
    with torch.no_grad():
        expected = model(**inputs).sample
        assert torch.allclose(model.cuda()(**on_gpu(inputs)).sample.cpu(), expected, atol=1e-9)


def gradients(function, model, inputs):
    model.zero_grad()
    function(**inputs).sample.square().mean().backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("trusted", [False, True])
def test_gradients_are_those_of_the_cpu(trusted):
    model, inputs = tiny_model().train().double(), tiny_inputs(dtype=torch.float64)
    if trusted:
        trust_rows_(model)
    expected = gradients(model, model, inputs)
    model.cuda()
    for name, actual in gradients(model, model, on_gpu(inputs)).items():
        assert torch.allclose(actual, expected[name], rtol=1e-6, atol=1e-9), name


def test_bf16_is_close_to_float32():
    model, inputs = tiny_model().eval().cuda(), on_gpu(tiny_inputs())
    with torch.no_grad():
        expected = model(**inputs).sample
        model.to(torch.bfloat16)
        actual = model(**{**inputs, "hidden_states": inputs["hidden_states"].bfloat16()}).sample
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()


def test_a_training_step_never_waits_for_the_device(request):
    model, inputs = tiny_model().train().cuda(), on_gpu(tiny_inputs())
    optimizer = torch.optim.Adam(parameter_groups(model), betas=(0.9, 0.99), fused=True)
    ema = PowerFunctionEMA(model)

    def step(number):
        model(**inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        normalize_weights_(model)
        ema.update(number)

    step(1)  # the first one builds the optimiser's state
    request.getfixturevalue("no_synchronisation")
    step(2)
    rows = model.transformer_blocks[0].attn.to_q.weight.norm(dim=1)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
# Inductor recommends TF32, which rounds more than the tolerances below allow.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("trusted", [False, True])
def test_compiled_training_is_the_eager_one(trusted):
    model, inputs = tiny_model().train().cuda(), on_gpu(tiny_inputs())
    if trusted:
        trust_rows_(model)
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(compiled(**inputs).sample, model(**inputs).sample, atol=1e-4)
    expected = gradients(model, model, inputs)
    for name, actual in gradients(compiled, model, inputs).items():
        assert (actual - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6, name
