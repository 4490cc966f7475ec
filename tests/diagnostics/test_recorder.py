"""The recorder on modules whose magnitudes, updates, angles and gates are known, and on models of diffusers."""

import math

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from helpers import relative_error, tiny_inputs, tiny_model
from recorded_models import DIT, Conditioned, Stack, Times, num_hooks, site, train
from torch import nn

from diffusers_mp import GateModulation, MagnitudeRecorder, RotationModulation, swap_adaln_for_rotation
from diffusers_mp.diagnostics.magnitudes import NUM_ANGLE_BINS
from diffusers_mp.modulation import Modulation


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


class TestModulations:
    def test_angles_scales_shifts_and_gates_by_hand(self):
        # Rows of one entry each, so that unit rows are signs: two scales, two shifts, angles and gates of 4 channels.
        signs = torch.tensor([1, 1, -1, 1] + [1, 1, 1, 1] + [1, -1] + [1, 1, 1, -1.0])
        modulation = site(("scale", "shift", "rotate", "gate"), 7 * signs[:, None] * torch.eye(3)[0], (2, 3, 0.5, 4))
        model = nn.Sequential(modulation)
        with MagnitudeRecorder(Conditioned(model[0])) as recorder:
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
        model = Conditioned(site(("gate",), 0.25 * torch.ones(4, 3), None, weight_normalization=False))
        with MagnitudeRecorder(model) as recorder:
            model(torch.ones(2, 5, 4), torch.ones(2, 3))
        assert recorder.values()["gate/mean/site"] == pytest.approx(0.75)

    def test_histogram_of_angles_modulo_a_turn(self):
        modulation = RotationModulation(4, 2, forced_weight_normalization=False)
        with torch.no_grad():
            modulation.proj.weight.copy_(torch.eye(2))
            modulation.gain.fill_(1.0)
        model = Conditioned(modulation)
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
        model = Conditioned(GateModulation(4, 3))
        with MagnitudeRecorder(model) as recorder:
            model(torch.ones(2, 5, 4), torch.randn(2, 3))
        assert recorder.values()["gate/mean/site"] == 1
        assert recorder.values()["magnitude/activations/site"] == pytest.approx(1)

    def test_a_modulation_that_passes_its_map_by_is_reported(self):
        class PassingBy(Modulation):
            def forward(self, hidden_states, conditioning):
                return hidden_states, None

        model = Conditioned(PassingBy(4, 3, ("gate",)))
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
