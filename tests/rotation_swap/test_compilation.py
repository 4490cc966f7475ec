"""Swapped models are compiled as the stock ones are."""

from contextlib import nullcontext

import pytest
import torch
from helpers import relative_error
from swapped_transformers import slow_unless, swapped
from tiny_transformers import CASES, make, run

from diffusers_mp import set_shift_scale


# The stock models of these do not compile as one graph either: they read values of tensors in their forward.
BRANCHING = ("HunyuanVideo15", "HiDream")


def assert_compiles_as_one_graph(case, backend):
    model, inputs = swapped(case, 0.3, keep_shift=case == "Flux")
    with torch.no_grad():
        expected = run(model, inputs)
        value = run(torch.compile(model, fullgraph=True, backend=backend), inputs)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


@pytest.mark.parametrize("case", slow_unless([case for case in CASES if case not in BRANCHING], ["DiT"]))
def test_compiles_as_one_graph(case, clean_compiler):
    assert_compiles_as_one_graph(case, "aot_eager")


# What a swap puts in the place of tensors is gone from a captured graph, so capturing is what tells models apart.
@pytest.mark.parametrize("case", slow_unless(["SD3.5", "HunyuanDiT", "HunyuanVideo"], ["SD3.5"]))
def test_is_captured_as_one_graph(case, clean_compiler):
    assert_compiles_as_one_graph(case, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", BRANCHING)
def test_stock_models_that_do_not_compile(case, clean_compiler):
    model, inputs = make(case)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.TorchDynamoException):
        run(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # of inductor itself
@pytest.mark.parametrize("case", ["DiT", "Flux"])
def test_compiles_with_inductor(case, clean_compiler):
    model, inputs = swapped(case, 0.3)
    expected = run(model, inputs)
    with torch.set_grad_enabled(case == "DiT"):
        value = run(torch.compile(model, fullgraph=True), inputs)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    if case == "DiT":
        expected.square().mean().backward()
        gradient = model.proj_out_1.rotation.weight.grad
        model.zero_grad()
        value.square().mean().backward()
        torch.testing.assert_close(
            model.proj_out_1.rotation.weight.grad, gradient, rtol=1e-3, atol=1e-3 * gradient.std().item()
        )


@pytest.mark.parametrize("case", ["Flux", pytest.param("QwenImage", marks=pytest.mark.slow)])
def test_compiles_by_regions(case, clean_compiler):
    model, inputs = swapped(case, 0.3)
    with torch.no_grad():
        expected = run(model, inputs)
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        value = run(model, inputs)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def test_annealing_does_not_compile_anew(clean_compiler):
    model, inputs = swapped("DiT", 0.3, keep_shift=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    values = []
    with torch.no_grad(), torch.compiler.set_stance("default"):
        for step, shift_scale in enumerate((1.0, 0.6, 0.2, 0.0)):
            set_shift_scale(model, shift_scale)
            with torch.compiler.set_stance("fail_on_recompile") if step else nullcontext():
                values.append(run(compiled, inputs))
            torch.testing.assert_close(values[-1], run(model, inputs), rtol=1e-4, atol=1e-3)
    assert relative_error(values[0], values[-1]) > 0.05
