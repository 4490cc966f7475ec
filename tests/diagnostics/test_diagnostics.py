"""The recorder on modules whose magnitudes, updates, angles and gates are known, and on real models; its pictures."""

import builtins
import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import compile_regions
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from helpers import relative_error, reset_accelerate, tiny_inputs, tiny_model
from PIL import Image
from processes import run_processes, run_python
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from diffusers_mp import (
    GateModulation,
    MagnitudeRecorder,
    RotationModulation,
    normalize_weights_,
    parameter_groups,
    swap_adaln_for_rotation,
)
from diffusers_mp.diagnostics import plots
from diffusers_mp.diagnostics.history import load_history
from diffusers_mp.diagnostics.recorder import NUM_ANGLE_BINS
from diffusers_mp.modulation import Modulation


DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}


class Times(nn.Module):
    """A factor, and a count of calls."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([float(factor)]))
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        return x * self.factor


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def num_hooks(model, *optimizers):
    of_modules = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in of_modules) + sum(
        len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
        for optimizer in optimizers
    )


def train(model, num_updates, recorder_options=None, start=0, optimizer=None):
    """Updates of a tiny MPDiT; its losses, and the recorder."""
    optimizer = optimizer or torch.optim.Adam(parameter_groups(model, lr=1e-2))
    recorder = MagnitudeRecorder(model, optimizer, **recorder_options) if recorder_options is not None else None
    losses = []
    for update in range(start + 1, start + num_updates + 1):
        inputs = tiny_inputs(seed=update)
        loss = (model(**inputs).sample - inputs["hidden_states"]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        normalize_weights_(model)
        losses.append(loss.item())
        if recorder is not None:
            recorder.step()
    return losses, recorder


class TestValues:
    def test_activations_are_root_mean_squares_of_outputs(self):
        model = Stack(Times(3), Times(0.5))
        with MagnitudeRecorder(model) as recorder:
            model(torch.tensor([[1.0, -7.0]]))
        values = recorder.values()
        assert values["magnitude/activations/blocks.0"] == pytest.approx(3 * 5)
        assert values["magnitude/activations/blocks.1"] == pytest.approx(1.5 * 5)
        assert values["magnitude/weights/blocks.1"] == 0.5
        assert not [name for name in values if "gradients" in name or "update" in name]

    def test_weights_gradients_and_relative_updates(self):
        linear = nn.Linear(2, 1)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor([[1.0, 2.0]]))
            linear.bias.fill_(2.0)
        model = Stack(linear)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        recorder = MagnitudeRecorder(model, optimizer)
        model(torch.tensor([[3.0, 4.0]])).sum().backward()  # gradients 3, 4 and 1
        optimizer.step()
        optimizer.zero_grad()
        assert recorder.step()
        assert recorder.values() == pytest.approx(
            {
                "magnitude/activations/blocks.0": 13.0,
                "magnitude/weights/blocks.0": math.sqrt((0.5**2 + 0 + 1.5**2) / 3),
                "magnitude/gradients/blocks.0": math.sqrt(26 / 3),
                "relative_update/blocks.0": 0.5 * math.sqrt(26) / 3,
            }
        )

    def test_relative_update_includes_forced_normalisation(self):
        model, optimizer_options = tiny_model(), {"lr": 1.0}
        name = "transformer_blocks.1"
        before = torch.cat([p.detach().flatten().clone() for p in model.get_submodule(name).parameters()])
        optimizer = torch.optim.SGD(model.parameters(), **optimizer_options)
        _, recorder = train(model, 1, {}, optimizer=optimizer)
        after = torch.cat([p.detach().flatten() for p in model.get_submodule(name).parameters()])
        expected = relative_error(after, before)
        assert recorder.values()[f"relative_update/{name}"] == pytest.approx(expected, rel=1e-5)

    def test_updates_of_zero_weights_and_skipped_updates_are_absent(self):
        model = Stack(Times(0), Times(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        recorder = MagnitudeRecorder(model, optimizer, stride=1)
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        recorder.step()
        assert recorder.values()["magnitude/gradients/blocks.0"] == 1
        assert "relative_update/blocks.0" not in recorder.values()
        assert recorder.values()["relative_update/blocks.1"] == 0
        model(torch.ones(1, 1)).sum().backward()
        recorder.step()  # no step of the optimiser
        assert sorted(recorder.values()) == sorted(
            f"magnitude/{quantity}/blocks.{index}" for quantity in ("activations", "weights") for index in range(2)
        )
        recorder.close()

    @pytest.mark.parametrize("fused", [False, True])
    def test_gradients_under_a_scaler_are_unscaled_and_absent_where_they_overflow(self, fused):
        values = []
        for factor in (1.0, math.inf):
            model = Stack(nn.Linear(2, 1))
            optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            recorder = MagnitudeRecorder(model, optimizer)
            scaler.scale(factor * model(torch.tensor([[3.0, 4.0]])).sum()).backward()
            if not fused:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            assert recorder.step()
            values.append(recorder.values())
        assert values[0]["magnitude/gradients/blocks.0"] == pytest.approx(math.sqrt(26 / 3))
        assert values[0]["relative_update/blocks.0"] > 0
        assert not [name for name in values[1] if "gradients" in name or "update" in name]

    def test_gradients_are_those_that_the_optimizer_receives(self):
        model = Stack(nn.Linear(3, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = MagnitudeRecorder(model, optimizer)
        for _ in range(2):
            model(100 * torch.randn(4, 3)).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recorder.step()
        assert recorder.values()["magnitude/gradients/blocks.0"] == pytest.approx(1 / math.sqrt(12), rel=1e-4)

    def test_sparse_gradients_are_those_of_a_dense_table(self):
        values = []
        for sparse in (False, True):
            table = nn.Embedding.from_pretrained(torch.eye(5, 4), freeze=False, sparse=sparse)
            model = Stack(table)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            recorder = MagnitudeRecorder(model, optimizer)
            # A row that is looked up twice has two entries, whose sum is its gradient.
            model(torch.tensor([0, 1, 1])).sum().backward()
            optimizer.step()
            recorder.step()
            recorder.close()
            values.append(recorder.values())
        assert values[0]["magnitude/gradients/blocks.0"] == pytest.approx(math.sqrt((4 * 1 + 4 * 2**2) / 20))
        assert values[1] == pytest.approx(values[0])

    def test_micro_batches_are_one_batch(self):
        model = Stack(Times(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = MagnitudeRecorder(model, optimizer)
        parts = torch.full((1, 2), 5.0), torch.randn(7, 2)
        for part in parts:
            model(part).sum().backward()
        optimizer.step()
        recorder.step()
        expected = torch.cat(parts).square().mean().sqrt().item()
        assert recorder.values()["magnitude/activations/blocks.0"] == pytest.approx(expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_norms_in_float32_at_least(self, dtype):
        model = Stack(Times(1)).to(dtype)
        # Squares beyond float16, a sum of them beyond the precision of bfloat16.
        x = torch.randn(64, 64).to(dtype) * 300
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        recorder = MagnitudeRecorder(model, optimizer)
        (model(x) * 1e-3).mean().backward()
        optimizer.step()
        recorder.step()
        expected = x.double().square().mean().sqrt().item()
        assert recorder.values()["magnitude/activations/blocks.0"] == pytest.approx(expected, rel=1e-6)

    def test_several_outputs_are_numbered(self):
        class Two(nn.Module):
            def forward(self, x):
                return 2 * x, {"ids": torch.arange(3), "tokens": [3 * x]}

        class Model(Stack):
            def forward(self, x):
                return self.blocks[0](x)

        model = Model(Two())
        with MagnitudeRecorder(model) as recorder:
            model(torch.ones(2, 2))
        assert recorder.values() == {"magnitude/activations/blocks.0/0": 2, "magnitude/activations/blocks.0/1": 3}


def site(kinds, rows, gains, **options):
    """A modulation whose maps of a one-hot conditioning vector are known: `rows` times its gains."""
    modulation = Modulation(4, 3, kinds, forced_weight_normalization=False, **options)
    with torch.no_grad():
        modulation.proj.weight.copy_(torch.as_tensor(rows))
        if modulation.gain is not None:
            modulation.gain.copy_(torch.as_tensor(gains))
    return modulation


class TestModulations:
    def test_angles_scales_shifts_and_gates_by_hand(self):
        # Rows of one entry each, so that unit rows are signs: two scales, two shifts, angles and gates of 4 channels.
        signs = torch.tensor([1, 1, -1, 1] + [1, 1, 1, 1] + [1, -1] + [1, 1, 1, -1.0])
        modulation = site(("scale", "shift", "rotate", "gate"), 7 * signs[:, None] * torch.eye(3)[0], (2, 3, 0.5, 4))
        model = nn.Sequential(modulation)
        with MagnitudeRecorder(_Conditioned(model[0])) as recorder:
            recorder._model(torch.ones(2, 5, 4), torch.eye(3)[[0, 0]])
        expected = {
            "scale": (2 * 0.5, 2, 2),
            "shift": (3, 3, 3),
            "rotate": (0, 0.5, 0.5),
            "gate": ((5 * 3 - 3) / 4, math.sqrt((3 * 25 + 9) / 4), 5),
        }
        values = recorder.values()
        for kind, statistics in expected.items():
            for statistic, value in zip(("mean", "rms", "max"), statistics, strict=True):
                assert values[f"{kind}/{statistic}/site"] == pytest.approx(value, abs=1e-6), (kind, statistic)
        # x (1 + scale) + shift is 6, 6, 2, 6 before the rotation, which keeps it.
        assert values["magnitude/activations/site"] == pytest.approx(math.sqrt((3 * 36 + 4) / 4))

    def test_plain_gates_are_the_map_itself(self):
        model = _Conditioned(site(("gate",), 0.25 * torch.ones(4, 3), None, weight_normalization=False))
        with MagnitudeRecorder(model) as recorder:
            model(torch.ones(2, 5, 4), torch.ones(2, 3))
        assert recorder.values()["gate/mean/site"] == pytest.approx(0.75)

    def test_histogram_of_angles_modulo_a_turn(self):
        modulation = RotationModulation(4, 2, forced_weight_normalization=False)
        with torch.no_grad():
            modulation.proj.weight.copy_(torch.eye(2))
            modulation.gain.fill_(1.0)
        model = _Conditioned(modulation)
        width = 2 * math.pi / NUM_ANGLE_BINS
        conditioning = torch.tensor([[0.5 * width, -0.5 * width], [1.5 * width + 2 * math.pi, 3.0 - 4 * math.pi]])
        with MagnitudeRecorder(model) as recorder:
            model(torch.ones(2, 5, 4), conditioning)
            model(torch.ones(2, 5, 4), conditioning)
        counts = recorder.history[-1]["rotate/histogram/site"]
        middle = NUM_ANGLE_BINS // 2
        expected = {middle: 2, middle - 1: 2, middle + 1: 2, middle + math.floor(3.0 / width): 2}
        assert {index: count for index, count in enumerate(counts) if count} == expected
        assert recorder.values()["rotate/max/site"] == pytest.approx(4 * math.pi - 3, rel=1e-6)
        assert not [name for name in recorder.values() if "histogram" in name]

    def test_named_modulations(self):
        model = _Conditioned(GateModulation(4, 3))
        with MagnitudeRecorder(model) as recorder:
            model(torch.ones(2, 5, 4), torch.randn(2, 3))
        assert recorder.values()["gate/mean/site"] == 1
        assert recorder.values()["magnitude/activations/site"] == pytest.approx(1)

    def test_a_modulation_that_passes_its_map_by_is_reported(self):
        class PassingBy(Modulation):
            def forward(self, hidden_states, conditioning):
                return hidden_states, None

        model = _Conditioned(PassingBy(4, 3, ("gate",)))
        with (
            pytest.raises(RuntimeError, match="the modulation site has run without a call of its `proj`"),
            MagnitudeRecorder(model),
        ):
            model(torch.ones(2, 5, 4), torch.randn(2, 3))
        assert num_hooks(model) == 0

    def test_angles_of_a_swapped_model(self):
        model = DiTTransformer2DModel(**DIT)
        swap_adaln_for_rotation(model)
        heads = {name: module for name, module in model.named_modules() if type(module).__name__ == "RotationLinear"}
        for module in heads.values():
            nn.init.zeros_(module.rotation.weight)
            half = module.rotation.bias.shape[0] // 2
            with torch.no_grad():
                module.rotation.bias[:half].fill_(0.25)
                module.rotation.bias[half:].fill_(-0.75)
        with MagnitudeRecorder(model) as recorder, torch.no_grad():
            model(torch.randn(2, 4, 8, 8), timestep=torch.tensor([1, 2]), class_labels=torch.tensor([3, 4]))
        values = recorder.values()
        name = "transformer_blocks.1.norm1.linear"
        assert name in heads
        assert values[f"rotate/mean/{name}/0"] == pytest.approx(0.25)
        assert values[f"rotate/mean/{name}/1"] == pytest.approx(-0.75)
        assert values[f"rotate/max/{name}/1"] == pytest.approx(0.75)
        assert f"gate/rms/{name}/1" in values


class _Conditioned(nn.Module):
    def __init__(self, site):
        super().__init__()
        self.site = site

    def forward(self, hidden_states, conditioning):
        return self.site(hidden_states, conditioning=conditioning)


class TestTraining:
    def test_first_update_and_every_stride(self):
        model = tiny_model()
        optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2))
        _, recorder = train(model, 7, {"stride": 3}, optimizer=optimizer)
        assert [entry["step"] for entry in recorder.history] == [1, 3, 6]
        assert num_hooks(model, optimizer) == 0
        recorder.step()
        assert num_hooks(model, optimizer) > 0  # for update 9
        recorder.close()
        assert num_hooks(model, optimizer) == 0
        # Histograms of the last only: a history must stay small.
        assert [any("histogram" in name for name in entry) for entry in recorder.history] == [False, False, True]

    def test_resumed_run_records_the_same_updates(self):
        _, whole = train(tiny_model(), 4, {"stride": 2})
        model = tiny_model()
        optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2))
        _, first = train(model, 3, {"stride": 2}, optimizer=optimizer)
        first.close()
        _, second = train(model, 1, {"stride": 2, "num_updates": 3}, start=3, optimizer=optimizer)
        assert first.history + second.history == [
            *whole.history[:1],
            # The last entry of each recorder has its histograms.
            *[{**entry, **first.history[-1]} for entry in whole.history[1:2]],
            *whole.history[2:],
        ]

    @pytest.mark.parametrize("configuration", ["A", "E"])
    def test_training_is_the_same_to_the_bit(self, configuration):
        models = [tiny_model(configuration) for _ in range(2)]
        losses, _ = train(models[0], 4)
        recorded_losses, recorder = train(models[1], 4, {"stride": 1})
        assert losses == recorded_losses
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert len(recorder.history) == 4
        recorder.close()

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_what_checkpointing_computes_again_does_not_count(self, use_reentrant):
        class Checkpointed(Stack):
            def forward(self, x):
                for block in self.blocks:
                    x = checkpoint(block, x, use_reentrant=use_reentrant)
                return x

        class Growing(Times):
            def forward(self, x):
                return super().forward(x) * self.num_calls

        model = Checkpointed(Growing(2), Growing(2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = MagnitudeRecorder(model, optimizer)
        model(torch.ones(1, 3, requires_grad=True)).sum().backward()
        optimizer.step()
        recorder.step()
        assert [block.num_calls for block in model.blocks] == [2, 2]
        assert recorder.values()["magnitude/activations/blocks.0"] == pytest.approx(2)
        assert recorder.values()["magnitude/activations/blocks.1"] == pytest.approx(4)

    def test_gradient_checkpointing_of_our_model_records_the_same(self):
        _, plain = train(tiny_model(), 1, {})
        model = tiny_model()
        model.enable_gradient_checkpointing()
        _, checkpointed = train(model, 1, {})
        assert plain.history == checkpointed.history

    def test_validation_in_between_does_not_count(self):
        model = Stack(Times(2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = MagnitudeRecorder(model, optimizer)
        with torch.no_grad():
            model(torch.full((1, 3), 50.0))
        average = copy.deepcopy(model)
        average(torch.full((1, 3), 70.0))
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        recorder.step()
        assert recorder.values()["magnitude/activations/blocks.0"] == pytest.approx(2)

    def test_nothing_is_read_from_the_device_during_an_update(self):
        class Reads(TorchDispatchMode):
            names = []

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                    self.names.append(str(func))
                return func(*args, **(kwargs or {}))

        model = _Conditioned(site(("scale", "shift", "rotate", "gate"), torch.randn(14, 3), (1, 1, 1, 1)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = MagnitudeRecorder(model, optimizer)
        with Reads() as reads:
            model(torch.randn(2, 5, 4), torch.randn(2, 3))[0].square().mean().backward()
            optimizer.step()
        assert reads.names == []
        recorder.step()
        assert len(recorder.values()) == 4 + 4 * 3
        with Reads() as reads:
            torch.ones(1).item()
        assert reads.names, "this test sees nothing"

    def test_a_model_that_is_not_finite_is_recorded_as_it_is(self, tmp_path):
        model = tiny_model()
        with torch.no_grad():
            model.transformer_blocks[0].attn_modulation.gain.fill_(math.nan)
        _, recorder = train(model, 1, {})
        assert math.isnan(recorder.values()["magnitude/activations/transformer_blocks.1"])
        assert math.isnan(recorder.values()["rotate/rms/transformer_blocks.0.attn_modulation"])
        recorder.save(tmp_path / "magnitudes.json")
        (entry,) = load_history(tmp_path / "magnitudes.json")
        assert math.isnan(entry["magnitude/activations/transformer_blocks.1"])

    def test_two_optimizers(self):
        model = Stack(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
        muon = torch.optim.Muon(model.blocks[0].parameters(), lr=0.1)
        adam = torch.optim.Adam(model.blocks[1].parameters(), lr=0.1)
        recorder = MagnitudeRecorder(model, [muon, adam])
        model(torch.randn(8, 4)).square().mean().backward()
        muon.step()
        adam.step()
        recorder.step()
        for index in range(2):
            assert recorder.values()[f"relative_update/blocks.{index}"] > 0
        assert num_hooks(model, muon, adam) == 0

    def test_accelerate_with_accumulation_and_its_tracker(self, tmp_path):
        accelerator = Accelerator(gradient_accumulation_steps=2, log_with="tensorboard", project_dir=str(tmp_path))
        accelerator.init_trackers("recorder")
        model = tiny_model()
        plain_optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2))
        model, optimizer = accelerator.prepare(model, plain_optimizer)
        recorder = MagnitudeRecorder(model, optimizer, stride=2)
        for micro_batch in range(8):
            with accelerator.accumulate(model):
                inputs = tiny_inputs(seed=micro_batch)
                loss = (model(**inputs).sample - inputs["hidden_states"]).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and recorder.step():
                accelerator.log(recorder.values(), step=recorder.num_updates)
        accelerator.end_training()
        assert [entry["step"] for entry in recorder.history] == [1, 2, 4]
        assert recorder.values()["relative_update/transformer_blocks.0"] > 0
        reset_accelerate()

    # PyTorch's own, of a block that is compiled alone and is given what has a gradient.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    @pytest.mark.parametrize("how", ["whole", "blocks", "replaced", "regional"])
    def test_compiled_models_are_recorded_and_not_compiled_again(self, how):
        _, expected = train(tiny_model(), 4, {"stride": 2})
        torch._dynamo.reset()
        counter = CompileCounter()
        model = tiny_model()
        called = model
        if how == "whole":
            called = torch.compile(model, backend=counter)
        elif how == "blocks":
            model.compile_repeated_blocks(backend=counter)
        elif how == "replaced":
            for index, block in enumerate(model.transformer_blocks):
                model.transformer_blocks[index] = torch.compile(block, backend=counter)
        else:
            called = compile_regions(model, backend=counter)
        optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2))
        recorder = MagnitudeRecorder(called, optimizer, stride=2)
        counts = []
        for update in range(1, 5):
            inputs = tiny_inputs(seed=update)
            (called(**inputs).sample - inputs["hidden_states"]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            normalize_weights_(model)
            recorder.step()
            counts.append(counter.frame_count)
        recorder.close()
        # Update 3 runs compiled, the recorded ones do not, and leave nothing behind that would be compiled anew.
        assert counts[1] == 0
        assert counts[2] == counts[3] > 0
        called(**tiny_inputs(seed=5)).sample.mean().backward()
        assert counter.frame_count == counts[3]
        for ours, theirs in zip(recorder.history, expected.history, strict=True):
            assert _floats(ours) == pytest.approx(_floats(theirs), rel=1e-4, abs=1e-6)
        torch._dynamo.reset()


def _floats(entry):
    return {name: value for name, value in entry.items() if "histogram" not in name}


class TestModels:
    def test_stock_dit(self):
        model = DiTTransformer2DModel(**DIT)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        recorder = MagnitudeRecorder(model, optimizer)
        model.enable_gradient_checkpointing()
        seen = {}
        model.transformer_blocks[1].register_forward_hook(lambda *args: seen.setdefault("output", args[2]))
        model(
            torch.randn(2, 4, 8, 8), timestep=torch.tensor([1, 2]), class_labels=torch.tensor([3, 4])
        ).sample.square().mean().backward()
        optimizer.step()
        recorder.step()
        assert {name.rpartition("/")[2] for name in recorder.values()} == {
            "transformer_blocks.0",
            "transformer_blocks.1",
        }
        expected = seen["output"].detach().double().square().mean().sqrt().item()
        assert recorder.values()["magnitude/activations/transformer_blocks.1"] == pytest.approx(expected, rel=1e-6)

    def test_flux_has_two_kinds_of_blocks_with_two_outputs(self):
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
        )
        with MagnitudeRecorder(model) as recorder, torch.no_grad():
            model(
                hidden_states=torch.randn(1, 4, 4),
                encoder_hidden_states=torch.randn(1, 3, 16),
                pooled_projections=torch.randn(1, 16),
                timestep=torch.tensor([0.5]),
                img_ids=torch.zeros(4, 3),
                txt_ids=torch.zeros(3, 3),
            )
        names = [name for name in recorder.values() if name.startswith("magnitude/activations")]
        assert sorted(names) == [
            f"magnitude/activations/{block}.0/{output}"
            for block in ("single_transformer_blocks", "transformer_blocks")
            for output in range(2)
        ]

    def test_choice_of_modules(self):
        model = tiny_model()
        chosen = {
            r"transformer_blocks\.\d+\.attn": ["transformer_blocks.0.attn", "transformer_blocks.1.attn"],
            (lambda name, module: isinstance(module, nn.Linear) and name.startswith("output")): [
                "output.modulation.proj",
                "output.proj",
            ],
        }
        for modules, names in chosen.items():
            with MagnitudeRecorder(model, modules=modules) as recorder, torch.no_grad():
                model(**tiny_inputs())
            prefix = "magnitude/activations/"
            assert [name.removeprefix(prefix) for name in recorder.values() if name.startswith(prefix)] == names

    def test_default_modules(self):
        model = tiny_model()
        with MagnitudeRecorder(model) as recorder, torch.no_grad():
            model(**tiny_inputs())
        blocks = [f"transformer_blocks.{index}" for index in range(2)]
        sites = [f"{block}.{site}" for block in blocks for site in ("attn_modulation", "ff_modulation")]
        names = {name.removeprefix("magnitude/weights/") for name in recorder.values() if "weights" in name}
        assert names == {*blocks, *sites, "output.modulation"}
        # A list within a block (`attn.to_out`) is no block.
        assert not [name for name in recorder.values() if "to_out" in name]


class TestErrors:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"stride": 0}, r"^`stride` must be at least 1, got 0\.$"),
            ({"modules": r"blocks\.7"}, r"`modules` must choose some .* of a Stack; its children are \['blocks'\]"),
        ],
    )
    def test_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            MagnitudeRecorder(Stack(Times(1)), **options)

    def test_model_without_blocks(self):
        with pytest.raises(ValueError, match="got None, which chooses none of a Linear"):
            MagnitudeRecorder(nn.Linear(2, 2))

    def test_order_of_calls(self):
        model = Stack(Times(1))
        recorder = MagnitudeRecorder(model)
        with pytest.raises(RuntimeError, match="nothing has been recorded yet"):
            recorder.values()
        with pytest.raises(ValueError, match="`optimizer` must be given to record training by `step`"):
            recorder.step()
        recorder = MagnitudeRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(RuntimeError, match="is recording an update"), recorder:
            pass
        recorder.close()

    def test_a_model_that_never_ran_is_no_silent_record(self):
        model = Stack(Times(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = MagnitudeRecorder(model, optimizer)
        model.blocks[0](torch.ones(1)).sum().backward()  # not through the model
        optimizer.step()
        with pytest.raises(RuntimeError, match="no forward pass of `model` was seen .* got a Stack"):
            recorder.step()
        assert num_hooks(model, optimizer) == 0

    def test_an_error_within_the_block_leaves_no_hooks(self):
        model = Stack(Times(1))
        recorder = MagnitudeRecorder(model)
        with pytest.raises(TypeError), recorder:
            model()
        assert num_hooks(model) == 0
        assert recorder.history == []


def test_history_survives_a_file(tmp_path):
    _, recorder = train(tiny_model("A", open_gains=False), 4, {"stride": 2})
    recorder.close()
    recorder.save(tmp_path / "magnitudes.json")
    history = load_history(tmp_path / "magnitudes.json")
    assert [list(entry) == list(original) for entry, original in zip(history, recorder.history, strict=True)]
    for entry, original in zip(history, recorder.history, strict=True):
        assert _floats(entry) == pytest.approx(_floats(original), rel=1e-5)
    assert history[-1].keys() == recorder.history[-1].keys()
    # What is zero at first has no relative update, and gets none by a file.
    assert "relative_update/output.modulation" not in history[0]
    assert "relative_update/output.modulation" in history[-1]
    resumed = MagnitudeRecorder(tiny_model(), num_updates=3)
    resumed.load(tmp_path / "magnitudes.json")
    assert [entry["step"] for entry in resumed.history] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["magnitudes.json"]


# Two processes with half a batch each, in float64, so that nothing but the order of sums differs.
TWO_PROCESSES = """
import os, warnings
from datetime import timedelta
import torch
import torch.distributed as dist
from helpers import tiny_inputs, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from diffusers_mp import MagnitudeRecorder, normalize_weights_, parameter_groups

torch.set_num_threads(1)
warnings.simplefilter("ignore")
dist.init_process_group("gloo", timeout=timedelta(seconds=1200))
rank = dist.get_rank()

def record(model, called, rank=None):
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2, eps=1e-3))
    recorder = MagnitudeRecorder(called, optimizer, stride=2)
    for step in range(1, 3):
        inputs = tiny_inputs(batch_size=4, seed=step, dtype=torch.float64)
        if rank is not None:
            inputs = {name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items()}
        (called(**inputs).sample - inputs["hidden_states"]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        normalize_weights_(model)
        recorder.step()
    return recorder.history

def model():
    return tiny_model().double().train()

whole = model()
expected = record(whole, whole)
replicated = model()
histories = {"ddp": record(replicated, DistributedDataParallel(replicated), rank)}
sharded = model()
for block in sharded.transformer_blocks:
    fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
histories["fully_shard"] = record(sharded, sharded, rank)
compared = 0
for engine, history in histories.items():
    for ours, theirs in zip(history, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name.startswith(("magnitude/weights", "magnitude/gradients", "relative_update")):
                assert abs(ours[name] / value - 1) < 1e-9, (engine, name, ours[name], value)
                compared += 1
# Each process has measured its half of the activations: together, those of the whole batch.
name = "magnitude/activations/transformer_blocks.1"
for engine, history in histories.items():
    squares = torch.tensor(history[-1][name], dtype=torch.float64).square()
    dist.all_reduce(squares)
    assert abs((squares / 2).sqrt().item() / expected[-1][name] - 1) < 1e-9, engine
if rank == 0:
    print("compared", compared, flush=True)
dist.barrier()
# Without the end of gloo's threads, which now and then aborts a process that is done.
os._exit(0)
"""


def test_two_processes_replicated_and_sharded(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    assert "compared 84" in run_processes(script)


@pytest.mark.usefixtures("examples_run_here")
class TestTrainer:
    @pytest.fixture
    def train(self, picture_folder, tmp_path):
        model = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 4}
        (tmp_path / "model.json").write_text(json.dumps(model))

        def train(name, *more):
            import train_mpdit
            import training_arguments

            arguments = [
                *("--train_data_dir", str(picture_folder), "--cache_dir", str(tmp_path / "cache")),
                *("--vae", "none", "--resolution", "8", "--model_config_name_or_path", str(tmp_path / "model.json")),
                *("--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_train_steps", "5"),
                *("--logging_steps", "1", "--checkpointing_steps", "3", "--validation_steps", "0"),
                *("--num_validation_images", "2", "--output_dir", str(tmp_path / name), *more),
            ]
            train_mpdit.main(training_arguments.parse_args(arguments))
            reset_accelerate()
            lines = (tmp_path / name / "logs" / "metrics.jsonl").read_text().splitlines()
            return tmp_path / name, [json.loads(line) for line in lines]

        return train

    def test_recording_changes_nothing_and_resumes(self, train):
        plain, plain_metrics = train("plain")
        recorded, metrics = train("recorded", "--record_magnitudes_steps", "2")
        losses = [[entry["train/loss"] for entry in m if "train/loss" in entry] for m in (plain_metrics, metrics)]
        assert len(losses[0]) == 5
        assert losses[0] == losses[1]
        weights = [
            (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
            for folder in (plain, recorded)
        ]
        assert weights[0] == weights[1]
        assert not (plain / "logs" / "magnitudes.json").exists()
        history = load_history(recorded / "logs" / "magnitudes.json")
        assert [entry["step"] for entry in history] == [1, 2, 4]
        logged = [entry for entry in metrics if "magnitude/activations/transformer_blocks.0" in entry]
        assert [entry["step"] for entry in logged] == [1, 2, 4]
        for entry, written in zip(history, logged, strict=True):
            assert _floats(entry) == pytest.approx(written, rel=1e-5)

        # From the checkpoint after update 3: update 4 is recorded again, and once.
        _, metrics = train(
            "recorded", "--record_magnitudes_steps", "2", "--resume_from_checkpoint", str(recorded / "checkpoint-3")
        )
        again = load_history(recorded / "logs" / "magnitudes.json")
        assert again == history

    def test_a_run_that_fails_leaves_the_process_compiled(self, train, monkeypatch):
        import train_mpdit

        def fail(self, step):
            raise KeyboardInterrupt

        monkeypatch.setattr(train_mpdit.PowerFunctionEMA, "update", fail)
        with pytest.raises(KeyboardInterrupt):
            train("run", "--record_magnitudes_steps", "1")
        counter = CompileCounter()
        torch.compile(torch.sin, backend=counter)(torch.ones(1))
        assert counter.frame_count == 1

    def test_wrong_stride(self, train, capsys):
        with pytest.raises(SystemExit):
            train("run", "--record_magnitudes_steps", "-1")
        assert "--record_magnitudes_steps must not be negative, got -1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def history():
    torch.manual_seed(0)
    _, recorder = train(tiny_model(num_layers=3), 6, {"stride": 2})
    recorder.close()
    return recorder.history


class TestPlots:
    @pytest.fixture(autouse=True)
    def _page(self, tmp_path):
        self.folder = tmp_path

    def written(self, figure):
        figure.savefig(self.folder / "figure.png")
        with Image.open(self.folder / "figure.png") as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert pixels.shape[1] == 1050  # 7 inches
        assert pixels.std() > 5
        return figure

    def test_blocks(self, history):
        (self.folder / "magnitudes.json").write_text("")
        recorder = MagnitudeRecorder(tiny_model())
        recorder.history = history
        recorder.save(self.folder / "magnitudes.json")
        figure = self.written(plots.plot_blocks({"E": history, "again": self.folder / "magnitudes.json"}))
        (axes,) = figure.axes
        assert axes.get_xlabel() == "block"
        assert axes.get_ylabel() == "magnitude (RMS) of the output"
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == [f"{name}, update {step}" for name in ("E", "again") for step in (1, 6)]
        first, last, *from_file = axes.get_lines()
        name = "magnitude/activations/transformer_blocks"
        assert list(first.get_xdata()) == [1, 2, 3]
        assert list(first.get_ydata()) == [history[0][f"{name}.{index}"] for index in range(3)]
        assert list(last.get_ydata()) == [history[-1][f"{name}.{index}"] for index in range(3)]
        assert from_file[1].get_ydata() == pytest.approx(last.get_ydata(), rel=1e-5)

    def test_over_time(self, history):
        figure = self.written(plots.plot_over_time({"E": history, "F": history}, "relative_update"))
        left, right = figure.axes
        assert left.get_ylabel() == "relative update, RMS[new - old] / RMS[old]"
        assert (left.get_title(), right.get_title()) == ("E", "F")
        assert left.get_xlabel() == right.get_xlabel() == "update"
        line = left.get_lines()[1]
        assert list(line.get_xdata()) == [1, 2, 4, 6]
        assert list(line.get_ydata()) == [entry["relative_update/transformer_blocks.1"] for entry in history]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [
            f"transformer_blocks.{index}" for index in range(3)
        ]

    def test_lines_are_in_the_order_of_depth(self):
        """Records name blocks first, and a block with what is in it."""
        names = ["patch_embed", "blocks.0", "blocks.1", "blocks.10", "blocks.2", "single_blocks.0", "output"]
        names += [f"blocks.{index}.{part}_modulation" for index in (0, 1, 10, 2) for part in ("attn", "ff")]
        entry = {"step": 1, **{f"relative_update/{name}": 1.0 for name in names}}
        axes = plots.plot_over_time({"A": [entry]}, "relative_update", ".*").axes[0]
        parts = ("", ".attn_modulation", ".ff_modulation")
        blocks = [f"blocks.{index}{part}" for index in (0, 1, 2, 10) for part in parts]
        assert [line.get_label() for line in axes.get_lines()] == ["patch_embed", *blocks, "single_blocks.0", "output"]

    def test_quantities_with_a_sign_are_not_drawn_on_a_logarithm(self, history):
        figure = self.written(plots.plot_over_time({"E": history}, "scale/mean", ".*"))
        assert figure.axes[0].get_yscale() == "linear"
        assert len(figure.axes[0].get_lines()) == 7

    def test_angles(self, history):
        figure = self.written(plots.plot_angles({"E": history}, r"transformer_blocks\..*"))
        axes = figure.axes[0]
        assert axes.get_xlabel() == "angle, radians"
        assert axes.get_title() == "E, update 6"
        assert [text.get_text() for text in axes.get_yticklabels()][:2] == [
            "transformer_blocks.0.attn_modulation",
            "transformer_blocks.0.ff_modulation",
        ]
        low, high = axes.get_xlim()
        assert low == -high
        assert high >= max(value for name, value in history[-1].items() if name.startswith("rotate/rms"))

    def test_ema_widths(self):
        figure = self.written(plots.plot_ema_widths({"E": {0.2: 3.0, 0.05: 2.0, 0.1: 1.5}}, ylabel="held-out loss"))
        axes = figure.axes[0]
        assert axes.get_ylabel() == "held-out loss"
        assert axes.get_xlabel() == "relative width of the average (fraction of training)"
        assert list(axes.get_lines()[0].get_ydata()) == [2.0, 1.5, 3.0]
        assert axes.get_legend().get_texts()[0].get_text() == "E, best 1.5 at 0.1"
        assert list(axes.get_lines()[1].get_xdata()) == [0.1]
        axes = plots.plot_ema_widths({"E": {0.03: math.nan, 0.05: 2.0, 0.1: 3.0}}, ylabel="held-out loss").axes[0]
        assert axes.get_legend().get_texts()[0].get_text() == "E, best 2 at 0.05"

    def test_samples(self):
        images = [Image.new("L", (8, 8), 40 * index) for index in range(5)]
        figure = self.written(plots.plot_samples({"A": images, "E": images}, columns=list("01234")))
        assert len(figure.axes) == 10
        assert [axes.get_title() for axes in figure.axes[:5]] == list("01234")
        assert [figure.axes[0].get_ylabel(), figure.axes[5].get_ylabel()] == ["A", "E"]
        with pytest.raises(ValueError, match="`rows` must have 5 images each, .* got 4 in 'A'"):
            plots.plot_samples({"A": images[:4]}, columns=list("01234"))

    def test_a_record_without_the_quantity(self, history):
        with pytest.raises(ValueError, match=re.escape("must have values nonsense/… of modules that match 'x', got")):
            plots.plot_over_time({"E": history}, "nonsense", "x")
        with pytest.raises(ValueError, match="a record must have entries"):
            plots.plot_blocks({"E": []})

    def test_without_matplotlib(self, monkeypatch):
        real = builtins.__import__

        def without(name, *args, **kwargs):
            if name.startswith("matplotlib"):
                raise ImportError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(ImportError, match="plots need matplotlib, which is not installed: `pip install"):
            plots.plot_ema_widths({"E": {0.1: 1.0}}, ylabel="loss")


def test_matplotlib_is_not_imported_with_the_package():
    code = """
        import sys
        assert "matplotlib" not in sys.modules
        from diffusers_mp import MagnitudeRecorder
        from diffusers_mp.diagnostics import plots
        assert "matplotlib" not in sys.modules
    """
    run_python(code)
