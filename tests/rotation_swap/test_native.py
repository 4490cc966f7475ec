"""This package's own model, whose swap is another configuration of it."""

import pytest
import torch
from helpers import ROOT, relative_error, tiny_inputs, tiny_model
from processes import run_python
from swapped_transformers import gradients
from tiny_transformers import run

from diffusers_mp import swap_adaln_for_rotation


def native(keep_shift, **overrides):
    model = tiny_model("E", ["scale", "shift", "gate"], **overrides)
    swap_adaln_for_rotation(model, keep_shift=keep_shift)
    return model.eval(), tiny_inputs()


@torch.no_grad()
def test_native_kept_shift_and_closed_gain_are_the_model_of_before():
    expected = run(tiny_model("E", ["scale", "shift", "gate"]).eval(), tiny_inputs())
    model, inputs = native(keep_shift=True)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("configuration", ["A", "E"])
@pytest.mark.parametrize("keep_shift", [False, True])
def test_native_rows_and_gains_are_kept_exactly(configuration, keep_shift):
    before = tiny_model(configuration, ["scale", "shift", "gate"])
    model = tiny_model(configuration, ["scale", "shift", "gate"])
    report = swap_adaln_for_rotation(model, keep_shift=keep_shift)
    assert list(model.config.modulation) == ["scale", *["shift"] * keep_shift, "gate", "rotate"]
    for name in report.replaced:
        old, new = (m.get_submodule(name.removesuffix(".proj")) for m in (before, model))
        old_rows = dict(zip(old.kinds, old.proj.weight.split(old.sizes), strict=True))
        new_rows = dict(zip(new.kinds, new.proj.weight.split(new.sizes), strict=True))
        assert ("shift" in new_rows) == keep_shift
        for kind in set(old_rows) & set(new_rows):
            assert torch.equal(old_rows[kind], new_rows[kind])
            if new.gain is not None:
                assert torch.equal(old.gain[old.kinds.index(kind)], new.gain[new.kinds.index(kind)])
    assert len(report.replaced) == 5
    assert report.num_parameters_after == sum(parameter.numel() for parameter in model.parameters())


def test_native_equals_a_model_made_with_rotation_and_reloads(tmp_path):
    model, inputs = native(keep_shift=False)
    with torch.no_grad():
        before = run(model, inputs)
        for name, gain in model.named_parameters():
            if name.endswith("gain"):
                gain.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
        expected = run(model, inputs)
    assert relative_error(expected, before) > 0.01
    made = tiny_model("E", ["scale", "gate", "rotate"]).eval()
    made.load_state_dict(model.state_dict())
    assert torch.equal(run(made, inputs), expected)
    model.save_pretrained(tmp_path / "native")
    run_python(
        """
        import sys
        sys.path.insert(0, sys.argv[2])
        import torch
        from helpers import tiny_inputs
        from diffusers_mp import MPDiTTransformer2DModel

        torch.set_num_threads(1)
        model = MPDiTTransformer2DModel.from_pretrained(sys.argv[1]).eval()
        with torch.no_grad():
            torch.save(model(**tiny_inputs(), return_dict=False)[0], sys.argv[1] + "/output.pt")
        """,
        tmp_path / "native",
        ROOT / "tests",
    )
    assert torch.equal(torch.load(tmp_path / "native" / "output.pt", weights_only=True), expected)


@pytest.mark.parametrize("keep_shift", [False, True])
def test_native_gradients_and_checkpointing(keep_shift):
    model, inputs = native(keep_shift)
    fill_gains_(model)
    expected = gradients(model, inputs)
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        if "modulation" in name:
            assert gradient.any(), name
    model.enable_gradient_checkpointing()
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def fill_gains_(model):
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            parameter.fill_(0.4)


@torch.no_grad()
def test_native_compiles_and_runs_in_bfloat16(clean_compiler):
    model, inputs = native(keep_shift=False)
    fill_gains_(model)
    expected = run(model, inputs)
    value = run(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    model.to(torch.bfloat16)
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    assert relative_error(run(model, inputs), expected) < 0.05
