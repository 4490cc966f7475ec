"""Pinned norms: unchanged at first, exactly back after updates, what is pinned by rule and what is not."""

import copy
import pickle

import diffusers
import pytest
import torch
from accelerate import Accelerator, cpu_offload
from adaln_single_transformers import CONFIGS
from helpers import reset_accelerate, tiny_inputs, tiny_model
from peft import LoraConfig
from pinned_networks import NAMES, assert_norms, assert_same, network, norms_of, state_of, update_
from safetensors.torch import load_file
from tiny_transformers import CASES, fill_, make
from torch import nn

from diffusers_mp import (
    MPEmbedding,
    MPLinear,
    load_weight_norms,
    normalize_weights_,
    parameter_groups,
    pin_weight_norms_,
    save_weight_norms,
    swap_adaln_for_rotation,
)
from diffusers_mp.optimization import check_optimizer
from diffusers_mp.projection import pinned
from diffusers_mp.rotation_swap.coverage import COVERAGE, TABLES


# Every transformer


def swapped(case):
    model, _ = make(case)
    swap_adaln_for_rotation(model)
    return model, {name for name, _ in model.named_parameters() if name.endswith("rotation.weight")}


def single(name):
    model = fill_(getattr(diffusers, name)(**CONFIGS[name]))
    # The map that all blocks share; AceStep adds two, LTX2 has one for each modality.
    ends = (
        *("adaln_single.linear.weight", "time_embed.linear.weight", "time_proj.weight", "time_mod_proj.weight"),
        *("time_projection.1.weight", "t_block.1.weight", "adaln_global_mlp.mlp.1.weight"),
        "global_cond_embedder.2.weight",
    )
    zero = {n for n, _ in model.named_parameters() if n.endswith(ends)}
    for n in zero:
        nn.init.zeros_(model.get_parameter(n))
    return model, zero


MODELS = {
    **{case: (swapped, case) for case in CASES},
    **{f"AdaLN-single {name}": (single, name) for name in CONFIGS},
}


@pytest.mark.parametrize("name", MODELS)
def test_norms_of_a_transformer_stay(name):
    make_model, of = MODELS[name]
    model, zero = make_model(of)
    assert zero
    start = state_of(model)
    for per in ("row", "matrix"):
        report = pin_weight_norms_(model, per=per)
        normalize_weights_(model)
        assert_same(model, start)
        # Maps of more than one dimension, but for those of zeros and tables that are added.
        maps = {n for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1}
        assert {*report.pinned} == maps - zero
        assert report.free == {n: len(model.get_parameter(n)) for n in zero}
        before = norms_of(model, report.pinned, per)
        updated = state_of(update_(model))
        normalize_weights_(model)
        assert_norms(norms_of(model, report.pinned, per), before)
        assert_same(model, updated, {*updated} - {*report.pinned})
        model.load_state_dict(start)


def test_classes_of_adaln_single_are_those_of_the_table():
    # `Transformer2DModel` has it by an option.
    assert {*CONFIGS} == {name for name, state in COVERAGE.items() if state == TABLES} | {"Transformer2DModel"}


# The rule


@pytest.mark.parametrize("per", ["row", "matrix"])
def test_directions_are_kept_and_settled_weights_are_left_alone_to_the_bit(per):
    model = network()
    report = pin_weight_norms_(model, per=per)
    rows = {name: len(model.get_parameter(name)) for name in NAMES}
    assert report.pinned == (rows if per == "row" else dict.fromkeys(NAMES, 1))
    assert str(report) == f"{sum(report.pinned.values())} norms of 7 weights are pinned"
    before = norms_of(model, NAMES, per)
    updated = copy.deepcopy(update_(model))
    assert normalize_weights_(model) is model
    for name in NAMES:
        ours, theirs = model.get_parameter(name), updated.get_parameter(name).double()
        factor = before[name] / norms_of(updated, [name], per)[name]
        expected = theirs * (factor.view(-1, *[1] * (theirs.ndim - 1)) if per == "row" else factor)
        torch.testing.assert_close(ours.double(), expected, rtol=3e-6, atol=0)
    assert_same(model, state_of(updated), {n for n in updated.state_dict() if n not in NAMES})
    once = state_of(model)
    normalize_weights_(model)
    assert_same(model, once)


def test_rows_of_zeros_are_free_and_told():
    model = network()
    with torch.no_grad():
        model.label.weight[2] = 0
        for block in model.blocks:
            block.to_q.weight.zero_()
    report = pin_weight_norms_(model)
    assert report.free == {"label.weight": 1, "blocks.0.to_q.weight": 8, "blocks.1.to_q.weight": 8}
    assert report.pinned["label.weight"] == 4
    assert "rows that were zero are free: label.weight (1), blocks.*.to_q.weight (16)" in str(report)
    updated = state_of(update_(model))
    normalize_weights_(model)
    assert torch.equal(model.label.weight[2], updated["label.weight"][2])
    assert not torch.equal(model.label.weight[1], updated["label.weight"][1])
    # A matrix with rows that are not zero has a norm.
    assert pin_weight_norms_(network(), per="matrix").free == {}


def test_a_second_call_forgets_the_norms_of_the_first():
    model = network()
    pin_weight_norms_(model)
    pin_weight_norms_(update_(model), include=["label"])
    second = norms_of(model, NAMES, "row")
    updated = state_of(update_(model))
    normalize_weights_(model)
    assert_norms(norms_of(model, ["label.weight"], "row"), {"label.weight": second["label.weight"]})
    assert_same(model, updated, {*updated} - {"label.weight"})


@pytest.mark.parametrize("patterns, found", [(["to_q"], [3, 5]), (["0.to_q", "label.weight"], [2, 3])])
def test_names_are_those_of_peft(patterns, found):
    assert [*pin_weight_norms_(network(), include=patterns).pinned] == [NAMES[index] for index in found]
    rest = [name for index, name in enumerate(NAMES) if index not in found]
    assert [*pin_weight_norms_(network(), exclude=patterns).pinned] == rest
    expression = r"blocks\.\d+\.to_(q|out)"
    assert [*pin_weight_norms_(network(), include=expression, exclude=["to_out"]).pinned] == [NAMES[3], NAMES[5]]


def test_a_tied_weight_is_pinned_once():
    model = network()
    model.blocks[1].to_q.weight = model.blocks[0].to_q.weight
    report = pin_weight_norms_(model)
    assert [*report.pinned] == [name for name in NAMES if name != NAMES[5]]
    before = norms_of(model, report.pinned, "row")
    normalize_weights_(update_(model))
    assert_norms(norms_of(model, report.pinned, "row"), before)


def test_normalised_rows_keep_their_own_rule():
    for configuration in "CE":
        model = tiny_model(configuration)
        report = pin_weight_norms_(model)
        assert (report.pinned, report.free) == ({}, {})
        assert len(report.normalized) == sum(isinstance(m, (MPEmbedding, MPLinear)) for m in model.modules())
        assert "normalised rows have their own rule: patch_embed.proj.weight (1), " in str(report)
    model = nn.ModuleList([MPLinear(6, 4), nn.Linear(4, 3)])
    assert [*pin_weight_norms_(model).pinned] == ["1.weight"]
    normalize_weights_(update_(model))
    torch.testing.assert_close(model[0].weight.norm(dim=1), torch.ones(4))


def test_a_frozen_base_under_a_lora_has_nothing_to_do():
    model, _ = make("SD3")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    report = pin_weight_norms_(model)
    assert (report.pinned, report.free) == ({}, {})
    assert len(report.frozen) == len([n for n, p in model.named_parameters() if p.ndim > 1 and "lora_" not in n])
    assert "0 norms of 0 weights are pinned\nnothing to do for frozen weights: " in str(report)
    updated = state_of(update_(model))
    assert_same(normalize_weights_(model), updated)


def test_weights_that_are_frozen_later_are_left_alone():
    model = network()
    pin_weight_norms_(model)
    model.label.requires_grad_(False)
    updated = state_of(update_(model))
    normalize_weights_(model)
    assert_same(model, updated, {"label.weight"})
    assert not torch.equal(model.patch.weight, updated["patch.weight"])


@pytest.mark.parametrize("per", ["row", "matrix"])
def test_half_precision_has_norms_in_float32(per):
    model = network(dtype=torch.bfloat16)
    report = pin_weight_norms_(model, per=per)
    assert {norms.dtype for norms in report.state_dict().values()} == {torch.float32}
    before = norms_of(model, NAMES, per)
    for seed in range(3):
        normalize_weights_(update_(model, seed=seed))
        once = state_of(model)
        assert_same(normalize_weights_(model), once)
    assert_norms(norms_of(model, NAMES, per), before, torch.finfo(torch.bfloat16).eps)


def test_weights_in_another_memory_layout():
    model = network()
    pin_weight_norms_(model)
    before = norms_of(model, NAMES, "row")
    model.patch.to(memory_format=torch.channels_last)
    assert not model.patch.weight.is_contiguous()
    normalize_weights_(update_(model))
    assert_norms(norms_of(model, NAMES, "row"), before)


def test_pins_go_with_the_model_and_not_with_its_state():
    model = network()
    names = [*model.state_dict()]
    pin_weight_norms_(model)
    before = norms_of(model, NAMES, "row")
    assert [*model.state_dict()] == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double().float()):
        normalize_weights_(update_(other))
        assert_norms(norms_of(other, NAMES, "row"), before)
    part = update_(model).blocks[0]
    normalize_weights_(part)
    assert_norms(norms_of(model, NAMES[3:5], "row"), {name: before[name] for name in NAMES[3:5]})
    with pytest.raises(AssertionError):
        assert_norms(norms_of(model, NAMES[5:], "row"), {name: before[name] for name in NAMES[5:]})


def test_norms_that_are_not_finite_are_noticed():
    model = network()
    pin_weight_norms_(model)
    with torch.no_grad():
        model.label.weight[1, 0] = 1e30
    normalize_weights_(model)
    assert model.label.weight.isfinite().all(dim=1).tolist() == [True, False, True, True, True]


# Weight decay


def test_pinned_weights_keep_their_rate_and_have_no_decay():
    model = network()
    pin_weight_norms_(model, exclude=["label"])
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    assert {group["lr"] for group in groups} == {1e-3}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0 if name in NAMES and name != "label.weight" else 0.1), name
    check_optimizer(model, torch.optim.AdamW(groups))
    with pytest.warns(UserWarning, match="has weight decay 0.1 on normalised rows or pinned weights"):
        check_optimizer(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    alone = nn.Linear(3, 3, bias=False)
    pin_weight_norms_(alone)
    with pytest.raises(ValueError, match=r"`weight_decay` must be 0 for .* weights of pinned norms: .* Got 0.1\."):
        parameter_groups(alone, weight_decay=0.1)


# Files and checkpoints


@pytest.mark.parametrize("per", ["row", "matrix"])
def test_norms_are_saved_and_loaded(tmp_path, per):
    model = network()
    pin_weight_norms_(model, per=per, exclude=["label"])
    save_weight_norms(model, tmp_path / "folder" / "norms.safetensors")
    other = network(seed=3)
    report = load_weight_norms(other, tmp_path / "folder" / "norms.safetensors")
    assert [*report.pinned] == [name for name in NAMES if name != "label.weight"]
    assert_norms(norms_of(normalize_weights_(other), report.pinned, per), norms_of(model, report.pinned, per))
    assert torch.equal(other.label.weight, network(seed=3).label.weight)
    assert {*load_file(tmp_path / "folder" / "norms.safetensors")} == {*report.pinned}


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        inputs = tiny_inputs(seed=step)
        (model(**inputs).sample - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        normalize_weights_(model)


def test_a_run_that_accelerate_resumes_is_the_run_that_went_on(tmp_path):
    def start(seed):
        accelerator, model = Accelerator(cpu=True), tiny_model("A", open_gains=False, seed=seed)
        report = pin_weight_norms_(model)
        assert len(report.free) == 6
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(parameter_groups(model, lr=1e-2)))
        accelerator.register_for_checkpointing(report)
        return accelerator, model, optimizer, report

    accelerator, model, optimizer, report = start(seed=0)
    before = norms_of(model, report.pinned, "row")
    train(model, optimizer, 0, 2)
    accelerator.save_state(tmp_path)
    train(model, optimizer, 2, 4)
    assert_norms(norms_of(model, report.pinned, "row"), before)
    reset_accelerate()
    # Weights of another seed have other norms, until the state is loaded.
    accelerator, resumed, optimizer, other = start(seed=1)
    accelerator.load_state(tmp_path)
    assert (other.pinned, other.free) == (report.pinned, report.free)
    train(resumed, optimizer, 2, 4)
    assert_same(resumed, state_of(model))
    reset_accelerate()


# Refusals


def offloaded():
    return cpu_offload(network(), execution_device="cpu")


def cast_by_layers():
    model, _ = make("DiT")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return model


def quantised(dtype=torch.int8):
    model = network()
    model.blocks[0].to_q.weight = nn.Parameter(model.blocks[0].to_q.weight.detach().to(dtype), requires_grad=False)
    return model


def not_finite():
    model = network()
    with torch.no_grad():
        model.frames.weight[1, 0, 0, 0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    "make_model, options, message",
    [
        (network, {"per": "rows"}, "`per` must be 'row' or 'matrix', got 'rows'"),
        (lambda: nn.LayerNorm(4), {}, "`model` must have weights of two or more dimensions .*, a LayerNorm has none"),
        (network, {"exclude": ".*"}, "`model` must have weights of two or more dimensions that `include` and `excl"),
        (network, {"include": ["to_k"]}, "`include` must match weights that can be pinned, 'to_k' matches none of 7"),
        (network, {"exclude": ["label", "norm"]}, "`exclude` must match weights .*, 'norm' matches none of 7, such"),
        (network, {"include": "to_q"}, "`include` must match .*: a string is a regular expression for a whole name"),
        (lambda: network().to("meta"), {}, "`model` must hold weights, some of its tensors are on the meta device"),
        (offloaded, {}, r"`model` must be without hooks \(offloading, .* has one"),
        (cast_by_layers, {}, r"`model` must be without hooks \(offloading, .* has one"),
        (quantised, {}, "not quantised, blocks.0.to_q.weight is a Parameter of torch.int8: leave it out by `exclude`"),
        (
            lambda: quantised(torch.float8_e4m3fn),
            {},
            "not quantised, blocks.0.to_q.weight is a Parameter of torch.flo",
        ),
        (not_finite, {}, "`model` must have finite weights, frames.weight has NaN or infinity"),
    ],
)
def test_what_cannot_be_pinned_is_refused(make_model, options, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        pin_weight_norms_(model, **options)
    assert not [*pinned(model.modules())]


def test_quantised_weights_may_be_left_out():
    assert "blocks.0.to_q.weight" not in pin_weight_norms_(quantised(), exclude=["blocks.0.to_q"]).pinned


def other_rows():
    model = network()
    model.label = nn.Embedding(7, 6)
    return model


@pytest.mark.parametrize(
    "make_model, message",
    [
        (lambda: nn.Linear(6, 8), r"has norms of .*\.weight, which is no weight of a Linear that can be pinned"),
        (other_rows, r"label.weight has shape \(7, 6\), got \(5,\) norms of its rows"),
    ],
)
def test_norms_of_another_model_are_refused_by_name(tmp_path, make_model, message):
    path, model = tmp_path / "norms.safetensors", network()
    report = pin_weight_norms_(model)
    save_weight_norms(model, path)
    other = make_model()
    pin_weight_norms_(other)
    with pytest.raises(ValueError, match=f"{path} must be of this model: .*{message}"):
        load_weight_norms(other, path)
    assert pin_weight_norms_(make_model()).pinned == pin_weight_norms_(other).pinned
    with pytest.raises(ValueError, match=f"`state_dict` must be of this model: .*{message}"):
        pin_weight_norms_(other).load_state_dict(report.state_dict())


def test_files_that_are_missing_damaged_or_without_norms(tmp_path):
    path = tmp_path / "norms.safetensors"
    with pytest.raises(FileNotFoundError):
        load_weight_norms(network(), path)
    path.write_bytes(b"no file of norms")
    with pytest.raises(ValueError, match=rf"{path} is damaged \(.*\): save the norms again"):
        load_weight_norms(network(), path)
    with pytest.raises(ValueError, match="`model` must have pinned weights, a ModuleDict has none: call `pin_weig"):
        save_weight_norms(network(), path)


def test_a_pinned_weight_of_another_shape_is_refused():
    model = network()
    pin_weight_norms_(model)
    model.label.weight = nn.Parameter(torch.randn(9, 6))
    with pytest.raises(ValueError, match=r"must keep its shape, got \(9, 6\) for 5 norms: pin the norms again"):
        normalize_weights_(model)
