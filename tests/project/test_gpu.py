"""What only a GPU can show; skipped without one. Written where there was none: unproven until a run says so.

`make gpu` runs these and `tests/examples/test_train_gpu.py` first, and writes what became of them.
"""

import contextlib

import pytest
import torch
from diffusers import DDIMScheduler
from helpers import tiny_inputs, tiny_model

from diffusers_mp import MPDiTPipeline, PowerFunctionEMA, normalize_weights_, parameter_groups, trust_rows_


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# How far what is computed may be from float32 on the CPU, relative to its norm.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@pytest.fixture
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def gradients(function, model, inputs):
    model.zero_grad()
    function(**inputs).sample.float().square().mean().backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


def distance(actual, expected):
    """Of all tensors together, relative to what is expected."""
    names = sorted(expected)
    actual, expected = (torch.cat([of[name].double().flatten() for name in names]) for of in (actual, expected))
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("configuration", ["A", "E", "F"])
def test_same_as_on_the_cpu(configuration):
    model, inputs = tiny_model(configuration).eval().double(), tiny_inputs(dtype=torch.float64)
    with torch.no_grad():
        expected = model(**inputs).sample
        assert torch.allclose(model.cuda()(**on_gpu(inputs)).sample.cpu(), expected, atol=1e-9)


@pytest.mark.parametrize("trusted", [False, True])
def test_gradients_are_those_of_the_cpu(trusted):
    model, inputs = tiny_model().train().double(), tiny_inputs(dtype=torch.float64)
    if trusted:
        trust_rows_(model)
    expected = gradients(model, model, inputs)
    model.cuda()
    for name, actual in gradients(model, model, on_gpu(inputs)).items():
        assert torch.allclose(actual, expected[name], rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("configuration", ["A", "E", "F"])
def test_training_in_a_dtype_is_close_to_the_cpu(configuration, dtype):
    # As the trainer does it: bf16 is autocast over float32 weights.
    model, inputs = trust_rows_(tiny_model(configuration).train()), tiny_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
    expected_gradients = gradients(model, model, inputs)
    model.cuda()
    autocast = contextlib.nullcontext() if dtype is torch.float32 else torch.autocast("cuda", dtype)
    with autocast:
        with torch.no_grad():
            actual = model(**on_gpu(inputs)).sample
        actual_gradients = gradients(model, model, on_gpu(inputs))
    assert distance({"sample": actual.cpu()}, {"sample": expected}) < TOLERANCES[dtype]
    assert distance(actual_gradients, expected_gradients) < TOLERANCES[dtype]


def test_bf16_is_close_to_float32():
    model, inputs = tiny_model().eval().cuda(), on_gpu(tiny_inputs())
    with torch.no_grad():
        expected = model(**inputs).sample
        model.to(torch.bfloat16)
        actual = model(**{**inputs, "hidden_states": inputs["hidden_states"].bfloat16()}).sample
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("interval", [None, (0.3, 5.0)], ids=["everywhere", "interval"])
def test_samples_are_those_of_the_cpu(interval):
    pipe = MPDiTPipeline(tiny_model().eval(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)

    def sample():
        options = {"num_inference_steps": 4, "guidance_scale": 2.0, "guidance_interval": interval}
        # Noise comes from the CPU, wherever the model is.
        generator = torch.Generator().manual_seed(0)
        return pipe([1, 7], generator=generator, output_type="latent", **options).images.float().cpu()

    expected = sample()
    pipe.to("cuda")
    assert distance({"images": sample()}, {"images": expected}) < 1e-3
    pipe.to(torch.bfloat16)
    assert distance({"images": sample()}, {"images": expected}) < 0.1


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
# Dynamo asks each input of a block for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
# Of products in float32, which is what is compared.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
# Compilation takes most of the time that these tests take.
@pytest.mark.parametrize("trusted, blocks", [(False, False), (True, True)], ids=["whole", "trusted-blocks"])
def test_compiled_training_is_the_eager_one(trusted, blocks):
    model, inputs = tiny_model().train().cuda(), on_gpu(tiny_inputs())
    if trusted:
        trust_rows_(model)
    output, expected = model(**inputs).sample, gradients(model, model, inputs)
    compiled = model
    if blocks:
        model.compile_repeated_blocks(fullgraph=True)
    else:
        compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(compiled(**inputs).sample, output, atol=1e-4)
    for name, actual in gradients(compiled, model, inputs).items():
        assert (actual - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6, name
