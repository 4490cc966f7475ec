"""A watch names the layer whose norm, update, stream or gate was made to leave its limit, and when, and no other."""

import json
import math
import warnings

import pytest
import torch
from diffusers import DiTTransformer2DModel
from helpers import tiny_inputs, tiny_model
from recorded_models import DIT, Conditioned, Stack, Times, num_hooks, train
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_mp import (
    MagnitudeRecorder,
    NormWatch,
    normalize_weights_,
    parameter_groups,
    swap_adaln_for_rotation,
)
from diffusers_mp.diagnostics import norm_watch


class Raised(Times):
    """Its first entry is larger by `addend`."""

    addend = 0.0

    def forward(self, x):
        return super().forward(x) + self.addend * nn.functional.one_hot(torch.tensor(0), x.shape[-1])


def watched(model, num_updates, plant=None, every=2, inputs=None, **options):
    """A watch after some updates of a small rate; `plant` is called after the optimiser, with the update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    watch = NormWatch(model, every=every, **options)
    for update in range(1, num_updates + 1):
        if inputs is None:
            model(torch.ones(2, 4000)).mean().backward()
        else:
            model(**inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            if plant is not None:
                plant(update)
        watch.step()
    watch.close()
    return watch


def dit(**options):
    torch.manual_seed(0)
    return DiTTransformer2DModel(**DIT, **options)


DIT_INPUTS = {
    "hidden_states": torch.ones(2, 4, 8, 8),
    "timestep": torch.tensor([1, 2]),
    "class_labels": torch.tensor([3, 4]),
}


class TestAlarms:
    def test_a_matrix_that_grows(self):
        model = dit()
        name = "transformer_blocks.1.attn1.to_k.weight"

        def plant(update):
            if update == 3:
                model.get_parameter(name).mul_(6)

        with pytest.warns(UserWarning, match="^update 4: ") as caught:
            watch = watched(model, 8, plant, inputs=DIT_INPUTS)
        assert watch.alarms == [(4, "weight_growth", name, pytest.approx(6, rel=1e-3), 5.0)]
        (warning,) = caught
        assert str(warning.message) == str(watch.alarms[0])
        assert warning.filename == __file__
        assert str(watch.alarms[0]).startswith(
            f"update 4: the norm over that at the start in {name} (weight_growth) is 6, above 5; weights that grow"
        )

    def test_updates_that_are_too_large_at_two_looks_running(self):
        model = dit()
        names = [f"transformer_blocks.{index}.ff.net.2.weight" for index in (1, 0)]

        def plant(update):
            for name in names:
                if update in (4, 8, 9, 10):
                    model.get_parameter(name).mul_(1.05)

        with pytest.warns(UserWarning, match="above 0.03 for 2 looks running; .* learning rate that is too high"):
            watch = watched(model, 12, plant, inputs=DIT_INPUTS)
        # Of the two the first in the model.
        assert watch.alarms == [(10, "relative_update", names[1], pytest.approx(0.05 / 1.05, rel=1e-2), 0.03)]

    def test_updates_that_are_too_large_in_most_matrices(self):
        model = dit()

        def plant(update):
            for name, parameter in model.named_parameters():
                if update > 2:
                    parameter.mul_(1.025 if name == "transformer_blocks.1.attn1.to_q.weight" else 1.02)

        message = "median over all matrices .* the largest of which is in transformer_blocks.1.attn1.to_q.weight"
        with pytest.warns(UserWarning, match=message):
            watch = watched(model, 8, plant, inputs=DIT_INPUTS)
        name = "transformer_blocks.1.attn1.to_q.weight"
        assert watch.alarms == [(6, "median_update", name, pytest.approx(0.02 / 1.02, rel=1e-2), 0.0115)]
        assert watch.values()["median_update"] == pytest.approx(0.02 / 1.02, rel=1e-2)

    def test_unit_rows_that_are_turned(self):
        model, name = tiny_model(), "transformer_blocks.1.attn.to_v.weight"

        def plant(update):
            if update > 2:
                weight = model.get_parameter(name)
                weight.add_(torch.randn_like(weight) * 0.1 / math.sqrt(weight.shape[1]))
            normalize_weights_(model)

        watch = watched(model, 6, plant, inputs=tiny_inputs(), warn=False)
        assert watch.alarms == [(6, "relative_update", name, pytest.approx(0.1, rel=0.1), 0.03)]
        assert watch.values()[f"weight_growth/{name}"] == pytest.approx(1)

    @pytest.mark.parametrize(
        "quantity, plant, value",
        [
            ("stream_growth", lambda block: block.factor.fill_(40), 40),
            # One of 4000 entries.
            ("largest_growth", lambda block: setattr(block, "addend", 150.0), 151),
        ],
    )
    def test_a_stream_that_grows(self, quantity, plant, value):
        model = Stack(Raised(1), Raised(1), Raised(1))
        with pytest.warns(UserWarning, match=r"blocks\.1 .* or bound the tokens \(`max_magnitude`, configuration F\)"):
            watch = watched(model, 8, lambda update: update == 4 and plant(model.blocks[1]))
        # The update is looked at whose forward pass comes first.
        limit = norm_watch.LIMITS[quantity]
        assert watch.alarms == [(6, quantity, "blocks.1", pytest.approx(value, rel=1e-2), limit)]

    @pytest.mark.parametrize("kind", ["gate", "scale"])
    def test_gates_and_scales(self, kind):
        model = tiny_model(open_gains=False)
        site = model.transformer_blocks[1].ff_modulation

        def plant(update):
            if update == 2:
                site.gain[site.kinds.index(kind)] = 12.0

        watch = watched(model, 4, plant, inputs=tiny_inputs(), warn=False)
        ((update, quantity, name, value, limit),) = watch.alarms
        assert (update, quantity, name, limit) == (4, kind, "transformer_blocks.1.ff_modulation", 5.0)
        assert 5 < value < 20

    def test_what_is_not_finite_is_beyond_any_limit(self):
        model = tiny_model()

        def plant(update):
            if update == 1:
                model.transformer_blocks[0].attn.to_q.weight[0, 0] = math.nan

        watch = watched(model, 3, plant, every=1, inputs=tiny_inputs(), warn=False)
        first = {alarm.quantity: (alarm.update, alarm.name) for alarm in watch.alarms}
        assert first["weight_growth"] == (1, "transformer_blocks.0.attn.to_q.weight")
        assert first["stream_growth"] == (2, "transformer_blocks.0")

    def test_each_quantity_warns_once_and_other_limits_count(self):
        model = Stack(Times(1), Times(1))

        def plant(update):
            model.blocks[0].factor.fill_(3 * update)

        assert not watched(model, 4, plant, warn=False).alarms
        model.blocks[0].factor.data.fill_(1)
        watch = watched(model, 6, plant, every=1, warn=False, limits={"stream_growth": 2.0})
        assert watch.alarms == [(2, "stream_growth", "blocks.0", pytest.approx(3, rel=1e-2), 2.0)]
        model.blocks[0].factor.data.fill_(1)
        limits = dict.fromkeys(norm_watch.LIMITS, math.inf)
        assert not watched(model, 50, plant, every=1, limits=limits).alarms

    def test_a_matrix_that_starts_at_zero_counts_as_rows_of_norm_one(self):
        model = nn.Sequential(nn.Linear(16, 9, bias=False))
        nn.init.zeros_(model[0].weight)
        watch = NormWatch(model, every=1)
        for _ in range(2):
            model(torch.ones(1, 16))
            with torch.no_grad():
                model[0].weight.add_(torch.full((9, 16), 0.001))  # rows longer by 0.004
            assert not watch.step()
        assert watch.values()["relative_update/0.weight"] == pytest.approx(0.004)
        assert watch.values()["weight_growth/0.weight"] == pytest.approx(0.008)
        watch.close()


class TestModels:
    def test_a_healthy_training_of_ours(self):
        model = tiny_model()
        optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2))
        watch = NormWatch(model, every=1)
        for update in range(6):
            inputs = tiny_inputs(seed=update)
            (model(**inputs).sample - inputs["hidden_states"]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            normalize_weights_(model)
            assert watch.step() == []
        watch.close()
        values = watch.values()
        assert values["weight_growth/transformer_blocks.0.attn.to_q.weight"] == pytest.approx(1)
        assert 0.001 < values["relative_update/transformer_blocks.0.attn.to_q.weight"] < 0.02
        blocks, sites = [f"transformer_blocks.{index}" for index in range(2)], ("attn_modulation", "ff_modulation")
        sites = [f"{block}.{site}" for block in blocks for site in sites]
        assert {name for name in values if not name.startswith(("weight", "relative"))} == {
            "median_update",
            *(f"{kind}/{site}" for kind in ("gate", "scale") for site in sites),
            "scale/output.modulation",
            *(f"{quantity}_growth/{block}" for quantity in ("stream", "largest") for block in blocks),
        }

    def test_a_stock_transformer_plain_and_swapped(self):
        watch = watched(dit(), 3, inputs=DIT_INPUTS)
        assert not watch.alarms
        assert "stream_growth/transformer_blocks.1" in watch.values()
        assert not [name for name in watch.values() if "gate" in name or "bias" in name]
        model = dit()
        swap_adaln_for_rotation(model)
        watch = watched(model, 3, inputs=DIT_INPUTS)
        assert not watch.alarms
        assert "gate/transformer_blocks.1.norm1.linear" in watch.values()

    def test_plain_modules(self):
        model = nn.Sequential(nn.Linear(4000, 8), nn.Tanh(), nn.Linear(8, 3))
        model[0].weight.requires_grad_(False)
        watch = watched(model, 3)
        expected = {"weight_growth/2.weight", "relative_update/2.weight", "median_update"}
        expected |= {f"{quantity}_growth/{index}" for quantity in ("stream", "largest") for index in range(3)}
        assert set(watch.values()) == expected
        of_weight = {"weight_growth/weight", "relative_update/weight", "median_update"}
        assert set(watched(nn.Linear(4000, 3), 3).values()) == of_weight
        assert not watched(Stack(Times(1)), 3).alarms  # a vector, no matrix

    def test_the_largest_of_all_micro_batches_counts(self):
        model = Stack(Times(1))
        watch = NormWatch(model, every=1, warn=False)
        for parts in ([1.0], [2.0, 40.0, 3.0]):
            for part in parts:
                model(torch.full((1, 4), part)).sum().backward()
            alarms = watch.step()
        assert alarms == [(2, "stream_growth", "blocks.0", 40.0, 30.0)]
        watch.close()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes(self, dtype):
        inputs = tiny_inputs(dtype=dtype)
        values = watched(tiny_model().to(dtype), 2, every=1, inputs=inputs).values()
        expected = watched(tiny_model(), 2, every=1, inputs=tiny_inputs()).values()

        assert values.keys() == expected.keys()
        for name in expected:
            if "update" in name:  # below the rounding of half precision
                continue
            assert values[name] == pytest.approx(expected[name], rel=0.05), name

    def test_norms_in_float32_at_least(self):
        model = nn.Linear(400, 400, bias=False).to(torch.float16)
        nn.init.ones_(model.weight)  # the sum of squares is beyond float16
        watch = NormWatch(model, every=1, warn=False)
        with torch.no_grad():
            model.weight.add_(0.5)
        watch.step()
        watch.close()
        expected = {"weight_growth/weight": 1.5, "relative_update/weight": 1 / 3, "median_update": 1 / 3}
        assert watch.values() == pytest.approx(expected)

    def test_checkpointed_activations_count_once(self):
        plain = watched(tiny_model(), 2, inputs=tiny_inputs()).values()
        model = tiny_model()
        model.enable_gradient_checkpointing()
        assert watched(model, 2, inputs=tiny_inputs()).values() == plain


class TestTraining:
    @pytest.mark.parametrize("configuration", ["A", "E"])
    def test_is_the_same_to_the_bit(self, configuration):
        plain, watched = (tiny_model(configuration) for _ in range(2))
        expected, _ = train(plain, 4)
        watch = NormWatch(watched, every=1, warn=False)
        losses, _ = train(watched, 4, watch=watch)
        assert watch.values()
        watch.close()
        assert losses == expected
        for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("every", [1, 2, 3, 50])
    def test_hooks_and_copies_are_there_for_a_look_only(self, every):
        model = tiny_model(num_layers=1)
        watch, looks = NormWatch(model, every=every), []
        for update in range(1, 8):
            if num_hooks(model):
                looks.append(update)
            assert bool(num_hooks(model)) == (watch._old is not None)
            model(**tiny_inputs()).sample.mean().backward()
            watch.step()
        watch.close()
        assert looks == [update for update in range(1, 8) if update == 1 or update % every == 0]
        assert num_hooks(model) == 0

    def test_one_read_of_the_host_at_each_look(self, monkeypatch):
        class Reads(TorchDispatchMode):
            names = []

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                    self.names.append(str(func))
                return func(*args, **(kwargs or {}))

        fetched = []

        def fetch(tensors):
            fetched.append(len(tensors))
            return plain(tensors)

        plain = norm_watch.fetch
        monkeypatch.setattr(norm_watch, "fetch", fetch)
        model = Conditioned(tiny_model().transformer_blocks[0].attn_modulation)
        tokens, conditioning = torch.ones(2, 5, 32), torch.ones(2, model.site.proj.in_features)
        watch = NormWatch(model, every=2)
        assert fetched == [1]  # of the norms at the start
        with Reads() as reads:
            for _ in range(5):
                model(tokens, conditioning)[0].mean().backward()
                watch.step()
        assert fetched == [1, 2, 2, 2]  # weights and calls, at updates 1, 2 and 4
        assert reads.names == []
        with Reads() as reads:
            torch.ones(1).item()
        assert reads.names, "this test sees nothing"
        watch.close()

    @pytest.mark.parametrize("stop, num_to_come", [(5, 2), (7, 0)])
    def test_a_resumed_run_goes_on(self, stop, num_to_come):
        model, resumed = dit(), dit()

        def plant_in(model):
            weight = model.get_parameter("transformer_blocks.0.attn1.to_q.weight")
            return lambda update: weight.mul_(1.9 if update in (4, 5, 6) else 1)  # 6.9 together

        whole = watched(model, 8, plant_in(model), inputs=DIT_INPUTS, warn=False)
        first = watched(resumed, stop, plant_in(resumed), inputs=DIT_INPUTS, warn=False)
        second, plant = NormWatch(resumed, every=2, warn=False), plant_in(resumed)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        to_come = []
        for update in range(stop + 1, 9):
            resumed(**DIT_INPUTS).sample.square().mean().backward()
            with torch.no_grad():
                plant(update)
            to_come += second.step()
        second.close()
        found, expected = ([alarm[:3] for alarm in watch.alarms] for watch in (second, whole))
        assert found == expected
        assert [alarm[:2] for alarm in whole.alarms] == [(6, "weight_growth"), (6, "relative_update")]
        assert len(to_come) == num_to_come

    def test_a_compiled_model_is_not_compiled_for_looks(self):
        torch._dynamo.reset()
        counter, counts = CompileCounter(), []
        model = tiny_model(num_layers=1)
        called = torch.compile(model, backend=counter)
        watch = NormWatch(called, every=2)
        for _ in range(4):
            called(**tiny_inputs()).sample.mean().backward()
            watch.step()
            counts.append(counter.frame_count)
        watch.close()
        assert counts[1] == 0 < counts[2] == counts[3]
        assert "stream_growth/transformer_blocks.0" in watch.values()
        assert "weight_growth/transformer_blocks.0.attn.to_q.weight" in watch.values()
        torch._dynamo.reset()

    def test_compilation_rests_until_both_a_recorder_and_a_watch_are_done(self):
        model, counter = Stack(Times(1)), CompileCounter()
        recorder = MagnitudeRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1))
        watch = NormWatch(model)
        recorder.close()
        torch.compile(torch.sin, backend=counter)(torch.ones(1))
        assert counter.frame_count == 0
        watch.close()
        torch.compile(torch.sin, backend=counter)(torch.ones(1))
        assert counter.frame_count == 1
        torch._dynamo.reset()


class TestErrors:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"every": 0}, r"^`every` must be at least 1, got 0\.$"),
            (
                {"limits": {"gates": 3.0}},
                r"`limits` must be positive numbers for some of .*'gate'.*, got {'gates': 3.0}",
            ),
            ({"limits": {"gate": math.nan}}, "`limits` must be positive"),
        ],
    )
    def test_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            NormWatch(Stack(Times(1)), **options)

    def test_a_model_that_never_ran(self):
        model = Stack(Times(1))
        watch = NormWatch(model)
        with pytest.raises(RuntimeError, match="no forward pass of `model` was seen .* got a Stack"):
            watch.step()
        assert num_hooks(model) == 0

    def test_nothing_is_said_where_the_caller_says_it(self):
        model = Stack(Times(1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch = watched(model, 2, lambda update: model.blocks[0].factor.fill_(99), warn=False)
        assert watch.alarms
        assert not caught
