"""The trainer under Accelerate's FSDP2, in two processes on the CPU.

Accelerate shards on accelerators only and turns the request into DistributedDataParallel on a CPU. The worker tells it
that its processes are those of several GPUs, before it asks: one value of `PartialState`. All that follows is
Accelerate's and PyTorch's own code, over gloo: its plugin, its `prepare`, `fully_shard`, `no_sync`, clipping.
"""

import json
import shutil
import sys

import pytest
import torch
from helpers import EXAMPLES
from processes import run_processes
from training_runs import arguments, assert_same_weights, metrics, raw_weights, stored, train, weights

from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel
from diffusers_mp.averages.snapshots import find_snapshots
from diffusers_mp.training import check_checkpoint


pytestmark = pytest.mark.usefixtures("examples_run_here")

# What only the order of sums may change in float32 after six updates.
TOLERANCE = 1e-5
# A fixed adam_epsilon above the gradient: the sign of a gradient of rounding errors must not decide.
OPTIONS = [
    *("--adam_epsilon", "1e-2", "--max_grad_norm", "0.5", "--validation_steps", "3", "--ema_snapshot_steps", "3"),
    *("--logging_steps", "1", "--random_flip"),
]
ONE = ["--total_batch_size", "4", *OPTIONS]
TWO = ["--total_batch_size", "4", "--train_batch_size", "1", *OPTIONS]
BF16 = ["--mixed_precision", "bf16", "--max_train_steps", "3", "--prediction_type", "flow_prediction"]
MUON = ["--optimizer", "muon"]
SKIP = ["--on_non_finite", "skip", "--max_train_steps", "2"]

# argv: a folder with runs.json, names to (arguments, what is broken). Writes what became of each in this process.
WORKER = f"""
import json, math, os, sys, warnings
from pathlib import Path
sys.path.insert(0, {str(EXAMPLES)!r})
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, Shard
import train_mpdit
from diffusers_mp.training import DDPMObjective

torch.set_num_threads(1)
# A user is told nothing that is not meant for the user.
warnings.simplefilter("error")
# DPM-Solver passes tensors to np.array; theirs to mend.
warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword", DeprecationWarning)
# The group of processes outlives the runs.
PartialState.destroy_process_group = lambda self, group=None: None
PartialState(cpu=True)
rank = dist.get_rank()

update, num_updates = train_mpdit.PowerFunctionEMA.update, 0
def update_of_shards(self, step):
    global num_updates
    num_updates += 1
    for name, parameter in self.model.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.placements == (Shard(0),), name
    assert type(self.model).__name__ == "FSDPMPDiTTransformer2DModel"
    for average in self.state_dict()["averages"]:
        assert all(isinstance(tensor, DTensor) for tensor in average.values())
    update(self, step)
train_mpdit.PowerFunctionEMA.update = update_of_shards

# A loss that is not finite on the second process, in its second batch.
loss, num_losses = DDPMObjective.loss, None
def loss_with_a_hole(self, *args):
    global num_losses
    terms = loss(self, *args)
    if num_losses is not None and rank == 1:
        num_losses += 1
        if num_losses == 2:
            # Its gradient stays finite: nothing but the word of this process tells the other.
            terms["loss"] = terms["loss"] + math.nan
    return terms
DDPMObjective.loss = loss_with_a_hole

save_checkpoint = train_mpdit.save_checkpoint
def save_with_a_hole(accelerator, output_dir, step, state, *args):
    if broken == "weights" and rank == 1:
        with torch.no_grad():
            state.model.patch_embed.proj.weight.to_local().mul_(math.nan)
    return save_checkpoint(accelerator, output_dir, step, state, *args)
train_mpdit.save_checkpoint = save_with_a_hole

folder, outcomes = Path(sys.argv[1]), {{}}
for name, (argv, broken) in json.loads((folder / "runs.json").read_text()).items():
    num_losses = 0 if broken == "loss" else None
    # Accelerate looks at this alone when it decides whether to shard.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    outcomes[name] = {{"error": None}}
    try:
        train_mpdit.main(train_mpdit.parse_args(argv))
    except FloatingPointError as error:
        outcomes[name]["error"] = str(error)
    outcomes[name]["num_updates"], num_updates = num_updates, 0
    AcceleratorState._reset_state()
    GradientState._reset_state()
(folder / f"outcomes-{{rank}}.json").write_text(json.dumps(outcomes))
dist.barrier()
sys.stdout.flush()
# gloo's threads now and then abort the process while it is torn down ("terminate called without an active exception").
os._exit(0)
"""
ENVIRONMENT = {
    # As `accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP` sets them.
    **{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},
    **{"FSDP_TRANSFORMER_CLS_TO_WRAP": "MPDiTTransformerBlock", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    **{"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
}


def train_sharded(folder, **runs):
    """What became of runs in two processes that shard: by name, one for each process."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    (folder / "runs.json").write_text(json.dumps(runs))
    run_processes(script, folder, **ENVIRONMENT)
    outcomes = [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in (0, 1)]
    return {name: [outcome[name] for outcome in outcomes] for name in runs}


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folders of runs: in one process, in two that shard, and each resumed from the other's checkpoint."""
    sys.path.insert(0, str(EXAMPLES))
    folder = tmp_path_factory.mktemp("runs")
    one = train(data, folder / "one", *ONE)
    for name, more in (("one_in_bf16", BF16), ("one_until_4", ("--max_train_steps", "4")), ("one_muon", MUON)):
        train(data, folder / name, *ONE, *more)
    shutil.copytree(folder / "one_until_4", folder / "sharded_from_4_of_one")
    sharded = folder / "sharded"
    at_4 = ["--resume_from_checkpoint", str(sharded / "checkpoint-4"), "--latents_dir", str(one / "latents")]
    latest = ["--resume_from_checkpoint", "latest"]
    outcomes = train_sharded(
        folder,
        sharded=(arguments(data, sharded, *TWO), None),
        sharded_from_4=(arguments(data, folder / "sharded_from_4", *TWO, *at_4), None),
        sharded_from_4_of_one=(arguments(data, folder / "sharded_from_4_of_one", *TWO, *latest), None),
        sharded_in_bf16=(arguments(data, folder / "sharded_in_bf16", *TWO, *BF16), None),
        sharded_muon=(arguments(data, folder / "sharded_muon", *TWO, *MUON), None),
        skipped=(arguments(data, folder / "skipped", *TWO, *SKIP), "loss"),
        stopped=(arguments(data, folder / "stopped", *TWO), "loss"),
        weights=(arguments(data, folder / "weights", *TWO), "weights"),
    )
    train(data, folder / "one_from_4_of_sharded", *ONE, *at_4)
    return folder, outcomes


def assert_close(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        difference = (tensor - second[name]).abs().max()
        assert difference <= TOLERANCE, (name, difference)


def test_a_sharded_run_ends_where_one_process_ends(runs):
    folder, outcomes = runs
    # Parameters and averages were looked at in each update: see the worker.
    assert [outcome["num_updates"] for outcome in outcomes["sharded"]] == [6, 6]
    one, sharded = folder / "one", folder / "sharded"
    for part in ("transformer", "transformer_ema_0.1"):
        assert_close(weights(sharded / part), weights(one / part))
    states = [stored(run / "checkpoint-6") for run in (sharded, one)]
    assert_close(states[0]["model"], states[1]["model"])
    for ours, theirs in zip(states[0]["ema"]["averages"], states[1]["ema"]["averages"], strict=True):
        assert_close(ours, theirs)
    assert states[0]["optimizer"]["state"].keys() == states[1]["optimizer"]["state"].keys()
    for name in ("train/loss", "train/learning_rate", "validation/loss"):
        assert metrics(sharded, name) == pytest.approx(metrics(one, name), abs=TOLERANCE)
    # Two processes have written: nothing was gathered into one of them.
    assert len(list((sharded / "checkpoint-6" / "shards").glob("*.distcp"))) == 2
    assert check_checkpoint(sharded / "checkpoint-6") is None


def test_its_pipeline_is_that_of_a_plain_model(runs):
    folder, _ = runs
    for name in ("transformer", "transformer_ema_0.1", "ema_snapshots/step-0000003_std-0.05"):
        config = json.loads((folder / "sharded" / name / "config.json").read_text())
        assert config["_class_name"] == "MPDiTTransformer2DModel"
    pipe = MPDiTPipeline.from_pretrained(folder / "sharded")
    assert type(pipe.transformer) is MPDiTTransformer2DModel
    assert pipe.id2label == {0: "dark", 1: "light"}
    assert pipe([0, "light"], num_inference_steps=2, output_type="pt").images.isfinite().all()
    names = [sorted(path.name for path in (folder / run / "samples").iterdir()) for run in ("one", "sharded")]
    assert names[0] == names[1] == ["step-0000003.png", "step-0000006.png"]


def test_its_snapshots_are_those_of_one_process(runs):
    folder, _ = runs
    one, sharded = (find_snapshots(folder / run / "ema_snapshots") for run in ("one", "sharded"))
    assert [(s.step, s.std) for s in sharded] == [(3, 0.05), (3, 0.1), (6, 0.05), (6, 0.1)]
    for ours, theirs in zip(sharded, one, strict=True):
        assert_close(weights(ours.path), weights(theirs.path))
    last = stored(folder / "sharded" / "checkpoint-6")["ema"]["averages"][0]
    assert_same_weights(weights(sharded[2].path), last)


def test_it_resumes_to_the_bit(runs):
    folder, outcomes = runs
    assert [outcome["num_updates"] for outcome in outcomes["sharded_from_4"]] == [2, 2]
    whole, resumed = folder / "sharded", folder / "sharded_from_4"
    assert_same_weights(raw_weights(whole / "checkpoint-6"), raw_weights(resumed / "checkpoint-6"))
    for part in ("transformer", "transformer_ema_0.1"):
        assert_same_weights(weights(whole / part), weights(resumed / part))
    losses = metrics(whole, "train/loss")
    assert metrics(resumed, "train/loss") == {step: losses[step] for step in (5, 6)}


@pytest.mark.parametrize("run", ["sharded_from_4_of_one", "one_from_4_of_sharded"])
def test_a_checkpoint_resumes_under_another_engine(runs, run):
    folder, outcomes = runs
    assert [outcome["num_updates"] for outcome in outcomes["sharded_from_4_of_one"]] == [2, 2]
    assert_close(raw_weights(folder / run / "checkpoint-6"), raw_weights(folder / "one" / "checkpoint-6"))
    assert_close(weights(folder / run / "transformer"), weights(folder / "one" / "transformer"))


def test_bf16_is_that_of_the_other_engines(runs):
    """Rows are normalised in float32 and times, here those of rectified flow, are not rounded."""
    folder, _ = runs
    first, second = (stored(folder / run / "checkpoint-3") for run in ("one_in_bf16", "sharded_in_bf16"))
    assert all(tensor.dtype == torch.float32 for tensor in second["model"].values())
    assert_close(first["model"], second["model"])
    losses = [metrics(folder / run, "train/loss") for run in ("one_in_bf16", "sharded_in_bf16")]
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)


def test_all_skip_what_one_process_found(runs):
    folder, outcomes = runs
    assert [outcome["error"] for outcome in outcomes["skipped"]] == [None, None]
    # Batch 2 of the second process belongs to update 1.
    assert list(metrics(folder / "skipped", "train/loss")) == [2]
    evidence = folder / "skipped" / "non_finite" / "step-0000001"
    report = json.loads((evidence / "report.json").read_text())
    assert report["action"] == "skip"
    assert [process["losses"][1] == "nan" for process in report["processes"]] == [False, True]
    # The evidence holds whole weights, as they were.
    found, saved = weights(evidence, "weights.safetensors"), raw_weights(folder / "skipped" / "checkpoint-2")
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in saved.items()}
    assert all(tensor.isfinite().all() for tensor in (*found.values(), *saved.values()))


def test_all_stop_at_what_one_process_found(runs):
    folder, outcomes = runs
    assert [outcome["error"].startswith("update 1: ") for outcome in outcomes["stopped"]] == [True, True]
    assert not list((folder / "stopped").glob("checkpoint-*"))


def test_no_process_saves_what_is_not_finite_on_one(runs):
    folder, outcomes = runs
    message = "weights are not finite after update 2: no checkpoint of them is written"
    assert [outcome["error"] for outcome in outcomes["weights"]] == [message, message]
    assert not list((folder / "weights").glob("checkpoint-*"))


def test_muon_sees_whole_matrices(runs):
    """Not their shards; rounding in its bfloat16 iteration makes 2 % of what is learned from update 2 on."""
    folder, outcomes = runs
    assert [outcome["num_updates"] for outcome in outcomes["sharded_muon"]] == [6, 6]
    start, one, sharded, adam = (
        raw_weights(folder / run / f"checkpoint-{step}")
        for run, step in (("one_muon", 2), ("one_muon", 6), ("sharded_muon", 6), ("one", 6))
    )
    names = [name for name in one if name.startswith("transformer_blocks") and name.endswith("weight")]
    assert len(names) == 8
    for name in names:
        learned = (one[name] - start[name]).norm()
        assert (one[name] - sharded[name]).norm() < 0.1 * learned, name
        assert (one[name] - adam[name]).norm() > 0.5 * learned, name
