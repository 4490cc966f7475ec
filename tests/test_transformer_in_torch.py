"""What PyTorch does with the model: checkpointing, half precision, autocast, one graph, `torch.func`."""

import copy
import importlib

import pytest
import torch
from helpers import forward, gradients, relative_error, tiny_inputs, tiny_model

from diffusers_mp import functional, fused


compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


@pytest.mark.parametrize("configuration", ["A", "C", "E"])
def test_gradient_checkpointing_changes_nothing(configuration):
    model, inputs = tiny_model(configuration), tiny_inputs()
    expected_sample, expected = forward(model, inputs), copy.deepcopy(gradients(model, inputs))
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    calls = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(forward(model, inputs), expected_sample)
    del calls[:]
    for name, gradient in gradients(model, inputs).items():
        assert torch.equal(gradient, expected[name]), name
    # Twice forward in `gradients`, once more in its backward pass.
    assert len(calls) == 3


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("configuration", ["A", "C", "E"])
def test_half_precision_inference(configuration, dtype, tolerance):
    model, inputs = tiny_model(configuration).eval(), tiny_inputs()
    with torch.no_grad():
        expected = forward(model, inputs)
        sample = forward(model.to(dtype), {**inputs, "hidden_states": inputs["hidden_states"].to(dtype)})
    assert sample.dtype == dtype
    assert 0 < relative_error(sample, expected) < tolerance


@pytest.mark.parametrize("configuration", ["A", "E"])
def test_autocast_training(configuration):
    model, inputs = tiny_model(configuration), tiny_inputs()
    expected = copy.deepcopy(gradients(model, inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert forward(model, inputs).isfinite().all()
        found = gradients(model, inputs)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name
    flat = [torch.cat([grads[name].flatten() for name in expected]) for grads in (found, expected)]
    assert relative_error(*flat) < 0.05


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_of_each_sample_by_torch_func():
    model, inputs = tiny_model().train(), tiny_inputs()
    samples = inputs["hidden_states"], inputs["timestep"], inputs["class_labels"]

    def loss(parameters, hidden_states, timestep, label):
        inputs = {"hidden_states": hidden_states[None], "timestep": timestep[None], "class_labels": label[None]}
        return torch.func.functional_call(model, parameters, (), inputs).sample.square().mean()

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, *samples)
    for number, sample in enumerate(zip(*samples, strict=True)):
        alone = torch.autograd.grad(loss(dict(model.named_parameters()), *sample), list(model.parameters()))
        for of_all, of_one in zip(together.values(), alone, strict=True):
            torch.testing.assert_close(of_all[number], of_one, rtol=1e-3, atol=1e-6)


# Compiled


def assert_compiled_equals_eager(model, inputs, backend):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(forward(compiled, inputs), forward(model, inputs), rtol=1e-4, atol=1e-4)
    if not model.training:
        return
    expected, found = copy.deepcopy(gradients(model, inputs)), gradients(compiled, inputs)
    for name, gradient in found.items():
        # Both are about 1e-5 away from the gradient in float64.
        assert relative_error(gradient, expected[name.removeprefix("_orig_mod.")]) < 1e-4, name


# Evaluation in one graph is also in test_diffusers_testers.py, without AOTAutograd.
@compiles
@pytest.mark.parametrize(
    "configuration, training",
    [("A", True), ("E", True), *(pytest.param(name, False, marks=pytest.mark.slow) for name in "AE")],
)
def test_compiles_into_one_graph(configuration, training):
    model = tiny_model(configuration, num_layers=1).train(training)
    assert_compiled_equals_eager(model, tiny_inputs(), "aot_eager")


@compiles
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_compiles_into_one_graph_with_gradient_checkpointing():
    model = tiny_model("E", num_layers=1)
    model.enable_gradient_checkpointing()
    assert_compiled_equals_eager(model, tiny_inputs(), "aot_eager")


# Each kernel costs a call of the C++ compiler where nothing is cached, so the fast test has what fuses into one.
@pytest.mark.slow
@compiles
@torch.no_grad()
def test_the_elementwise_part_of_a_block_compiles_with_inductor(monkeypatch):
    torch._dynamo.reset()
    # Too few kernels for processes, compiled headers and a trial of the processor's instructions to pay.
    config = importlib.import_module("torch._inductor.config")
    monkeypatch.setattr(config, "compile_threads", 1)
    monkeypatch.setattr(config, "cpp_cache_precompile_headers", False)
    monkeypatch.setattr(config.cpp, "vec_isa_ok", True)

    def block(x, scale, angle, gate):
        branch = functional.mp_silu(fused.modulate(x, scale=scale, angle=angle))
        return fused.gated_sum(x, branch, gate, 0.3)

    inputs = torch.randn(3, 16, 32), torch.randn(3, 1, 32), torch.randn(3, 1, 16), torch.randn(3, 1, 32)
    compiled = torch.compile(block, fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(*inputs), block(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@compiles
def test_compiles_with_inductor():
    with torch.no_grad():
        assert_compiled_equals_eager(tiny_model("E", num_layers=1).eval(), tiny_inputs(), "inductor")


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("configuration", "ABCDEF")
def test_trains_compiled_with_inductor(configuration):
    assert_compiled_equals_eager(tiny_model(configuration), tiny_inputs(), "inductor")
