"""Options of the swap, and the calls beside it."""

import copy

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from helpers import relative_error, tiny_model
from tiny_transformers import LABELS, make, run
from torch.nn.functional import silu

import diffusers_mp
from diffusers_mp import (
    drop_shift_,
    save_rotation_adapter,
    set_shift_scale,
    swap_adaln_for_rotation,
    unswap_rotation,
)
from diffusers_mp.rotation_swap.linear import rotation_linears
from diffusers_mp.rotation_swap.sites import find_sites


ZERO = ("rotate", "scale", "gate", "rotate", "scale", "gate")


@pytest.mark.parametrize(
    "case, sublayers, expected",
    [
        ("DiT", ["attention"], {"norm1.linear": "rotate scale gate shift scale gate"}),
        ("DiT", ["mlp"], {"norm1.linear": "shift scale gate rotate scale gate"}),
        ("DiT", ["final"], {"proj_out_1": "rotate scale"}),
        ("CogVideoX", ["mlp"], {"norm2.linear": "rotate scale gate rotate scale gate"}),
        ("CogVideoX", ["final"], {"norm_out.linear": "rotate scale"}),
        ("SD3.5", ["mlp"], {"norm1.linear": "shift scale gate rotate scale gate shift scale gate"}),
        ("Flux", ["final"], {"norm_out.linear": "scale rotate"}),
        (
            "CogView4",
            ["mlp"],
            {"norm1.linear": "shift shift scale scale gate gate rotate rotate scale scale gate gate"},
        ),
        ("QwenImage", ["mlp", "final"], {"img_mod.1": "shift scale gate rotate scale gate"}),
    ],
)
def test_sublayers(case, sublayers, expected):
    stock, inputs = make(case)
    model, _ = make(case)
    report = swap_adaln_for_rotation(model, sublayers=sublayers)
    for end, kinds in expected.items():
        found = [kinds_of_map for name, kinds_of_map in report.replaced.items() if name.endswith(end)]
        assert tuple(kinds.split()) in found
    if sublayers == ["final"]:
        assert len(report.replaced) == 1
    assert report.replaced.keys() == rotation_linears(model).keys()
    assert model.config.rotation_modulation["sublayers"] == sublayers
    # Shifts of other sublayers are still there.
    model, _ = make(case)
    swap_adaln_for_rotation(model, sublayers=sublayers, keep_shift=True)
    torch.testing.assert_close(run(model, inputs), run(stock, inputs), rtol=1e-5, atol=1e-5)
    unswap_rotation(model)
    assert list(model.state_dict()) == list(stock.state_dict())


@torch.no_grad()
def test_shift_scale_runs_from_the_stock_model_to_none():
    stock, inputs = make("DiT")
    expected = {1.0: run(stock, inputs)}
    for site in find_sites(stock):
        groups = (
            site.linear.weight.unflatten(0, (len(site.kinds), -1)),
            site.linear.bias.unflatten(0, (len(site.kinds), -1)),
        )
        for rows in groups:
            rows[[place for place, kind in enumerate(site.kinds) if kind == "rotate"]] = 0
    expected[0.0] = run(stock, inputs)
    for shift_scale, value in expected.items():
        model, _ = make("DiT")
        swap_adaln_for_rotation(model, keep_shift=True, shift_scale=shift_scale)
        torch.testing.assert_close(run(model, inputs), value, rtol=1e-5, atol=1e-5)
    set_shift_scale(model, 1)
    torch.testing.assert_close(run(model, inputs), expected[1.0], rtol=1e-5, atol=1e-5)
    set_shift_scale(model, 0)
    drop_shift_(model)
    torch.testing.assert_close(run(model, inputs), expected[0.0], rtol=1e-5, atol=1e-5)
    sliced, _ = make("DiT")
    swap_adaln_for_rotation(sliced)
    assert torch.equal(run(sliced, inputs), run(model, inputs))
    assert dict(sliced.config) == dict(model.config)
    assert sliced.state_dict().keys() == model.state_dict().keys()


def calibration_batches():
    return [{**make("DiT")[1], "timestep": torch.tensor([t, t // 2])} for t in (10, 400, 990)]


@torch.no_grad()
def test_calibration_is_the_mean_shift_in_the_consumers_bias():
    """b += W E[h], by hand, for the maps behind every modulation of a DiT."""
    stock, inputs = make("DiT")
    for block in [*stock.transformer_blocks, None]:
        # The last modulation takes its conditioning from the first block.
        norm = (block or stock.transformer_blocks[0]).norm1
        linear, num_maps = (norm.linear, 6) if block is not None else (stock.proj_out_1, 2)
        conditionings = [
            silu(norm.emb(batch["timestep"], batch["class_labels"], hidden_dtype=torch.float32))
            for batch in calibration_batches()
        ]
        means = linear(torch.cat(conditionings)).mean(dim=0).unflatten(0, (num_maps, -1))
        weight, bias = linear.weight.unflatten(0, (num_maps, -1)), linear.bias.unflatten(0, (num_maps, -1))
        for place in range(0, num_maps, 3):
            if block is None:
                consumers = [stock.proj_out_2]
            elif place == 0:
                consumers = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
            else:
                consumers = [block.ff.net[0].proj]
            for consumer in consumers:
                consumer.bias += consumer.weight @ means[place]
            weight[place], bias[place] = 0, 0
    expected = run(stock, inputs)
    model, _ = make("DiT")
    swap_adaln_for_rotation(model, calibration=iter(calibration_batches()))
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    without, _ = make("DiT")
    swap_adaln_for_rotation(without)
    assert relative_error(run(without, inputs), expected) > 0.05


def test_calibration_leaves_modes_hooks_and_gradients_as_they_were():
    model, inputs = make("DiT")
    model.train()
    model.transformer_blocks[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    calls = []
    handle = model.transformer_blocks[1].register_forward_hook(lambda *args: calls.append(1))
    swap_adaln_for_rotation(model, calibration=[inputs, inputs])
    assert len(calls) == 2
    assert {name: model.get_submodule(name).training for name in modes} == modes
    hooks = {name: module._forward_hooks for name, module in model.named_modules() if module._forward_hooks}
    assert list(hooks) == ["transformer_blocks.1"]
    handle.remove()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_report():
    model, _ = make("DiT")
    before = sum(parameter.numel() for parameter in model.parameters())
    report = swap_adaln_for_rotation(model)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert (report.num_parameters_before, report.num_parameters_after) == (before, after)
    # Half of the shift rows: two of a block's six maps, and one of the last two.
    assert before - after == (2 * 2 + 1) * (16 * 16 + 16) // 2
    assert report.replaced == {
        "transformer_blocks.0.norm1.linear": ZERO,
        "transformer_blocks.1.norm1.linear": ZERO,
        "proj_out_1": ("rotate", "scale"),
    }
    share = (after - before) / before
    assert str(report) == (
        f"5 shifts of 3 maps became rotations; {before:,} parameters before, {after:,} after ({share:+.1%})"
    )


def test_frozen_models_stay_frozen_but_for_the_heads():
    model, _ = make("Flux")
    model.requires_grad_(False)
    swap_adaln_for_rotation(model, calibration=[make("Flux")[1]])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".rotation." in name or name.endswith("mean_shift") for name in trainable)
    unswap_rotation(model, make("Flux")[0])
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("trained", [False, True])
def test_maps_of_shifts_alone_are_trained_after_the_way_back_if_the_base_s_are(trained):
    model, base = make("HunyuanDiT")[0], make("HunyuanDiT")[0].requires_grad_(trained)
    swap_adaln_for_rotation(model)
    (name, *_) = [name for name, linear in rotation_linears(model).items() if linear.kinds == ["rotate"]]
    unswap_rotation(model, base)
    assert model.get_submodule(name).weight.requires_grad is trained


# The other calls


def test_set_shift_scale_refuses():
    model, _ = make("DiT")
    for kept in (model, copy.deepcopy(model)):
        if kept is not model:
            swap_adaln_for_rotation(kept)
        with pytest.raises(ValueError, match="must be swapped with `keep_shift=True` for its shifts to be scaled"):
            set_shift_scale(kept, 0.5)
    with pytest.raises(ValueError, match=r"`shift_scale` must be in \[0, 1\], got 2"):
        set_shift_scale(model, 2)


def test_drop_shift_refuses():
    model, _ = make("DiT")
    with pytest.raises(
        ValueError, match="`model` must be swapped by `swap_adaln_for_rotation`, got a DiTTransformer2DM"
    ):
        drop_shift_(model)
    sliced = copy.deepcopy(model)
    swap_adaln_for_rotation(sliced)
    with pytest.raises(ValueError, match="must be swapped with `keep_shift=True`, its shifts are gone already"):
        drop_shift_(sliced)
    swap_adaln_for_rotation(model, keep_shift=True, shift_scale=0.25)
    with pytest.raises(
        ValueError, match=r"annealed to 0 first, transformer_blocks.0.norm1.linear has 0.25: `set_shift"
    ):
        drop_shift_(model)
    assert model.config.rotation_modulation["keep_shift"]


def test_unswap_refuses():
    stock, _ = make("DiT")
    with pytest.raises(
        ValueError, match="`model` must be swapped by `swap_adaln_for_rotation`, got a DiTTransformer2DM"
    ):
        unswap_rotation(stock)
    model = copy.deepcopy(stock)
    swap_adaln_for_rotation(model)
    state = model.state_dict()
    wider = diffusers.DiTTransformer2DModel(**{**LABELS, "attention_head_dim": 16})
    offloaded, not_loaded, with_integers = copy.deepcopy(stock), copy.deepcopy(stock).to("meta"), copy.deepcopy(stock)
    cpu_offload(offloaded, execution_device="cpu")
    weight = with_integers.transformer_blocks[0].norm1.linear.weight
    weight.requires_grad_(False).data = weight.data.to(torch.int8)
    for base, message in (
        (None, "`base` must be the stock model: transformer_blocks.0.norm1.linear no longer has its shift rows"),
        (make("Flux")[0], "`base` must be a DiTTransformer2DModel, got a FluxTransformer2DModel"),
        (model, "`base` must be a DiTTransformer2DModel, got a RotationDiTTransformer2DModel"),
        (wider, "`base` must have 96 rows in transformer_blocks.0.norm1.linear, got 192"),
        (offloaded, r"`base` must be without hooks .*, it has one: attach them afterwards"),
        (not_loaded, "`base` must hold weights, some of its tensors are on the meta device: load it first"),
        (with_integers, "`base` must have plain linear maps to take shift rows from, .* of torch.int8: load it"),
    ):
        with pytest.raises(ValueError, match=message):
            unswap_rotation(model, base)
    assert type(model).__name__ == "RotationDiTTransformer2DModel"
    assert model.state_dict().keys() == state.keys()


OTHER_CALLS = {
    "set_shift_scale": lambda model, folder: set_shift_scale(model, 0.5),
    "drop_shift_": lambda model, folder: drop_shift_(model),
    "unswap_rotation": lambda model, folder: unswap_rotation(model, make("DiT")[0]),
    "save_rotation_adapter": lambda model, folder: save_rotation_adapter(model, folder / "adapter"),
}


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_offloaded_models_are_refused_and_still_run(call, tmp_path):
    model, inputs = make("DiT")
    swap_adaln_for_rotation(model, keep_shift=True, shift_scale=0.0)
    expected = run(model, inputs)
    cpu_offload(model, execution_device="cpu", offload_buffers=True)
    with pytest.raises(ValueError, match=r"must be without hooks .*, it has one: attach them afterwards"):
        OTHER_CALLS[call](model, tmp_path)
    assert torch.equal(run(model, inputs), expected)
    assert model.config.rotation_modulation["keep_shift"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["unswap_rotation", "save_rotation_adapter"])
def test_offloaded_models_without_shifts_are_refused_and_still_run(call, tmp_path):
    model, inputs = make("DiT")
    swap_adaln_for_rotation(model)
    expected = run(model, inputs)
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"must be without hooks .*, it has one: attach them afterwards"):
        OTHER_CALLS[call](model, tmp_path)
    assert torch.equal(run(model, inputs), expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_swapped_models_on_the_meta_device_are_refused(call, tmp_path):
    model, _ = make("DiT")
    swap_adaln_for_rotation(model, keep_shift=True)
    model.to("meta")
    with pytest.raises(ValueError, match="must hold weights, some of its tensors are on the meta device: load it"):
        OTHER_CALLS[call](model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_scale_that_is_not_offloaded_is_set():
    model, inputs = make("DiT")
    swap_adaln_for_rotation(model, keep_shift=True, shift_scale=0.25)
    expected = run(model, inputs)
    set_shift_scale(model, 1)
    cpu_offload(model, execution_device="cpu")
    assert relative_error(run(model, inputs), expected) > 1e-3
    set_shift_scale(model, 0.25)
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_the_native_swap_has_none_of_these(call, tmp_path):
    model = tiny_model("E", ["scale", "shift", "gate"])
    swap_adaln_for_rotation(model, keep_shift=True)
    with pytest.raises(ValueError, match="is not available for MPDiTTransformer2DModel: its swap is another conf"):
        OTHER_CALLS[call](model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_swapped_class_needs_its_options():
    with pytest.raises(
        ValueError, match="`rotation_modulation` must hold the options of the swap: make a DiTTransformer"
    ):
        diffusers_mp.RotationDiTTransformer2DModel(**LABELS)


def test_no_rotation_class_of_other_names():
    for name in ("RotationPixArtTransformer2DModel", "RotationNothing", "Rotation"):
        with pytest.raises(AttributeError, match=f"module 'diffusers_mp' has no attribute '{name}'"):
            getattr(diffusers_mp, name)
