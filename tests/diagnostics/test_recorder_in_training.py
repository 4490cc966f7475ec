"""Recording is at a stride, changes nothing in training, and is the same for every kind of training."""

import copy
import json
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import compile_regions
from helpers import reset_accelerate, tiny_inputs, tiny_model
from processes import run_processes
from recorded_models import Conditioned, Stack, Times, floats, num_hooks, site, train
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from diffusers_mp import MagnitudeRecorder, normalize_weights_, parameter_groups
from diffusers_mp.diagnostics.history import load_history


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

        model = Conditioned(site(("scale", "shift", "rotate", "gate"), torch.randn(14, 3), (1, 1, 1, 1)))
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
    @pytest.mark.parametrize(
        "how", ["whole", "regional", *(pytest.param(how, marks=pytest.mark.slow) for how in ("blocks", "replaced"))]
    )
    def test_compiled_models_are_recorded_and_not_compiled_again(self, how):
        _, expected = train(tiny_model(num_layers=1), 4, {"stride": 2})
        torch._dynamo.reset()
        counter = CompileCounter()
        model = tiny_model(num_layers=1)
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
            assert floats(ours) == pytest.approx(floats(theirs), rel=1e-4, abs=1e-6)
        torch._dynamo.reset()


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
from diffusers_mp import MagnitudeRecorder, NormWatch, normalize_weights_, parameter_groups

torch.set_num_threads(1)
warnings.simplefilter("ignore")
dist.init_process_group("gloo", timeout=timedelta(seconds=1200))
rank = dist.get_rank()

def record(model, called, rank=None):
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2, eps=1e-3))
    recorder = MagnitudeRecorder(called, optimizer, stride=2)
    watch = NormWatch(called, every=2, limits={"gate": 0.1}, warn=False)
    for step in range(1, 3):
        inputs = tiny_inputs(batch_size=4, seed=step, dtype=torch.float64)
        if rank is not None:
            inputs = {name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items()}
        (called(**inputs).sample - inputs["hidden_states"]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        normalize_weights_(model)
        recorder.step()
        watch.step()
    return recorder.history, watch

def model():
    return tiny_model().double().train()

whole = model()
expected, expected_watch = record(whole, whole)
replicated = model()
recorded = {"ddp": record(replicated, DistributedDataParallel(replicated), rank)}
sharded = model()
for block in sharded.transformer_blocks:
    fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
recorded["fully_shard"] = record(sharded, sharded, rank)
histories = {engine: history for engine, (history, _) in recorded.items()}
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
# The largest entry of both halves is that of the batch; root mean squares are those of the larger half.
num_watched = 0
for engine, (_, watch) in recorded.items():
    assert watch.values().keys() == expected_watch.values().keys()
    for name, value in watch.values().items():
        if name.startswith(("weight_growth", "relative_update", "median_update", "largest_growth")):
            of_whole = expected_watch.values()[name]
            assert abs(value / of_whole - 1) < (1e-9 if "update" in name else 1e-6), (engine, name, value, of_whole)
            num_watched += 1
    both = [None, None]
    dist.all_gather_object(both, (watch.values(), watch.alarms, watch.state_dict()["start"]))
    assert both[0] == both[1], engine
    (alarm,) = watch.alarms
    assert alarm[:3] == (1, "gate", "transformer_blocks.0.attn_modulation"), alarm
if rank == 0:
    print("compared", compared, "watched", num_watched, flush=True)
dist.barrier()
# Without the end of gloo's threads, which now and then aborts a process that is done.
os._exit(0)
"""


def test_two_processes_replicated_and_sharded(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    assert "compared 84 watched 94" in run_processes(script)


@pytest.mark.usefixtures("examples_run_here")
class TestTrainer:
    @pytest.fixture
    def train(self, image_folder, tmp_path):
        model = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 4}
        (tmp_path / "model.json").write_text(json.dumps(model))

        def train(name, *more):
            import train_mpdit

            arguments = [
                *("--train_data_dir", str(image_folder), "--cache_dir", str(tmp_path / "cache")),
                *("--vae", "none", "--resolution", "8", "--model_config_name_or_path", str(tmp_path / "model.json")),
                *("--total_batch_size", "4", "--train_batch_size", "2", "--max_train_steps", "5"),
                *("--logging_steps", "1", "--checkpointing_steps", "3", "--validation_steps", "0"),
                *("--num_validation_images", "2", "--output_dir", str(tmp_path / name), *more),
            ]
            train_mpdit.main(train_mpdit.parse_args(arguments))
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
            assert floats(entry) == pytest.approx(written, rel=1e-5)

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
        assert "--record_magnitudes_steps: must be at least 0, got -1" in capsys.readouterr().err
