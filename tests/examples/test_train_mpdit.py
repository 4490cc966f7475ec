"""The trainer on a small real image folder: digits-like pictures, a tiny AutoencoderKL, a tiny model, on the CPU."""

import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from diffusers import DPMSolverMultistepScheduler
from helpers import EXAMPLES, reset_accelerate
from PIL import Image
from processes import run_processes, run_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from training_runs import MODEL, arguments, assert_same_weights, contents, metrics, raw_weights, stored, train, weights

from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel, normalize_weights_
from diffusers_mp.data.latents import LatentDataset
from diffusers_mp.presets import CONFIGURATIONS
from diffusers_mp.training import (
    DDPMObjective,
    StopRequest,
    TrainingSamples,
    check_checkpoint,
    engine,
    leave_signals_to_main_process,
    preview,
    resolve_checkpoint,
    split_validation,
    validation_losses,
    validation_timesteps,
)
from diffusers_mp.training.arguments import parse_args
from diffusers_mp.training.engine import check_engine
from diffusers_mp.training.model import model_config


pytestmark = pytest.mark.usefixtures("examples_run_here")


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """The run that the arguments alone describe. To be read; what goes on with it takes a copy."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return train(data, tmp_path_factory.mktemp("plain") / "run")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture
def plain_copy(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "run")


def test_run_becomes_a_pipeline(data, tmp_path, capfd):
    more = ("--validation_steps", "3", "--logging_steps", "2", "--report_to", "tensorboard")
    output_dir = train(data, tmp_path / "run", *more)
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    assert pipe.id2label == {0: "dark", 1: "light"}
    assert pipe.transformer.config.out_channels == 8
    assert pipe.transformer.config.num_classes == 2
    assert pipe.scheduler.config.variance_type == "learned_range"
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe(["dark", 1], num_inference_steps=2, output_type="pt").images.shape == (2, 3, 16, 16)

    # The pipeline's transformer is the first average, the other one lies beside it; neither is the raw model.
    first = weights(output_dir / "transformer")
    second = weights(output_dir / "transformer_ema_0.1")
    raw = raw_weights(output_dir / "checkpoint-6")
    for other in (second, raw):
        assert any(not torch.equal(first[name], other[name]) for name in first)
    rows = first["transformer_blocks.0.attn.to_q.weight"].norm(dim=1)
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)

    assert list(metrics(output_dir, "train/loss")) == [2, 4, 6]
    assert list(metrics(output_dir, "validation/loss")) == [3, 6]
    last = json.loads((output_dir / "logs" / "metrics.jsonl").read_text().splitlines()[-1])
    assert sum(name.startswith("validation/mse_t") for name in last) == 8
    assert sorted(path.name for path in (output_dir / "samples").iterdir()) == ["step-0000003.png", "step-0000006.png"]
    with Image.open(output_dir / "samples" / "step-0000006.png") as grid:
        assert grid.size == (32, 16)
    events = EventAccumulator(str(next((output_dir / "logs").rglob("events.*")).parent)).Reload()
    assert [event.step for event in events.Images("validation/samples")] == [3, 6]
    assert "train/loss" in events.Tags()["scalars"]
    shown = capfd.readouterr().err
    assert "loss=" in shown
    assert "images/s=" in shown
    assert "6/6" in shown


def test_loss_falls(data, tmp_path):
    output_dir = train(data, tmp_path / "run", "--max_train_steps", "150", "--checkpointing_steps", "150")
    losses = list(metrics(output_dir, "train/loss").values())
    assert losses[-1] < 0.9 * losses[0]


def test_resume_gives_the_weights_and_losses_of_an_uninterrupted_run(data, tmp_path, monkeypatch):
    import train_mpdit

    more = ("--logging_steps", "1", "--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5", "--random_flip")
    whole = train(data, tmp_path / "whole", *more)
    resumed, update = tmp_path / "parts", train_mpdit.PowerFunctionEMA.update

    def update_and_die(self, step):
        update(self, step)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_mpdit.PowerFunctionEMA, "update", update_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(data, resumed, *more)
    reset_accelerate()
    assert sorted(path.name for path in resumed.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    train(data, resumed, *more, "--resume_from_checkpoint", "latest")

    assert metrics(resumed, "train/loss") == metrics(whole, "train/loss")
    assert list(metrics(resumed, "train/loss")) == [1, 2, 3, 4, 5, 6]
    assert_same_weights(raw_weights(whole / "checkpoint-6"), raw_weights(resumed / "checkpoint-6"))
    for part in ("transformer", "transformer_ema_0.1"):
        assert_same_weights(weights(whole / part), weights(resumed / part))


def test_going_back_leaves_no_later_checkpoint_for_latest(data, plain_copy, monkeypatch):
    output_dir = plain_copy
    before = raw_weights(output_dir / "checkpoint-6")

    def die(self, step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        import train_mpdit

        patch.setattr(train_mpdit.PowerFunctionEMA, "update", die)
        with pytest.raises(KeyboardInterrupt):
            train(data, output_dir, "--resume_from_checkpoint", "checkpoint-2")
    reset_accelerate()
    assert resolve_checkpoint("latest", output_dir).name == "checkpoint-2"
    assert_same_weights(raw_weights(output_dir / "checkpoint-6.abandoned"), before)
    train(data, output_dir, "--resume_from_checkpoint", "latest")
    assert_same_weights(raw_weights(output_dir / "checkpoint-6"), before)


def test_resume_at_the_end_trains_nothing_more(data, plain_copy):
    output_dir = plain_copy
    before = weights(output_dir / "transformer")
    # Nor does one that is to be shorter than it already is, whose card tells of all its updates.
    for num_steps in ("6", "4"):
        train(data, output_dir, "--resume_from_checkpoint", "checkpoint-6", "--max_train_steps", num_steps)
        assert_same_weights(before, weights(output_dir / "transformer"))
        assert "| images seen | 24 |" in (output_dir / "README.md").read_text()


def test_resume_with_another_number_of_steps_keeps_the_rates(data, tmp_path):
    more = ("--logging_steps", "1")
    output_dir = train(data, tmp_path / "run", *more)
    train(data, output_dir, *more, "--resume_from_checkpoint", "latest", "--max_train_steps", "8")
    rates = metrics(output_dir, "train/learning_rate")
    # Constant until update max(1, 6 // 10), then 1 / sqrt(u); the rate logged after update u is that of u + 1.
    assert rates == pytest.approx({u: 1e-2 / (u + 1) ** 0.5 for u in range(1, 9)})


def test_resume_of_another_run_is_refused(data, plain_copy):
    output_dir = plain_copy
    with pytest.raises(ValueError, match=r"seed 0 \(now 1\), total_batch_size 4 \(now 8\)"):
        train(data, output_dir, "--resume_from_checkpoint", "latest", "--seed", "1", "--train_batch_size", "8")
    with pytest.raises(ValueError, match=r"ema_stds \[0.05, 0.1\] \(now \[0.05\]\)"):
        train(data, output_dir, "--resume_from_checkpoint", "latest", "--ema_stds", "0.05")
    with pytest.raises(ValueError, match=r"lr_constant_steps 1 \(now 3\)"):
        train(data, output_dir, "--resume_from_checkpoint", "latest", "--lr_constant_steps", "3")
    with pytest.raises(FileNotFoundError, match=r"got 'checkpoint-3'; .* \['checkpoint-2', 'checkpoint-4'"):
        train(data, output_dir, "--resume_from_checkpoint", "checkpoint-3")


def damage(path):
    """Flip one byte in the middle of a file: its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damaged_checkpoint_is_passed_over_aloud(data, plain, plain_copy, caplog):
    whole, output_dir = plain, plain_copy
    damage(output_dir / "checkpoint-6" / "shards" / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"checkpoint-6` is damaged: shards/__0_0.distcp has other content"):
        train(data, output_dir, "--resume_from_checkpoint", "checkpoint-6")
    train(data, output_dir, "--resume_from_checkpoint", "latest")
    assert (
        "checkpoint-6 is damaged, going back to the one before it: shards/__0_0.distcp has other content"
        in caplog.text
    )
    assert_same_weights(raw_weights(whole / "checkpoint-6"), raw_weights(output_dir / "checkpoint-6"))
    assert check_checkpoint(output_dir / "checkpoint-6") is None


def test_all_checkpoints_damaged_is_no_fresh_start(data, tmp_path):
    output_dir = train(data, tmp_path / "run", "--checkpointing_steps", "3")
    (output_dir / "checkpoint-3" / "shards" / ".metadata").unlink()
    (output_dir / "checkpoint-6" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="all 2 in .* are damaged"):
        train(data, output_dir, "--resume_from_checkpoint", "latest")


def test_latest_is_no_fresh_start_in_the_folder_of_a_run_that_has_ended(data, tmp_path, capfd):
    more = ("--resume_from_checkpoint", "latest", "--ema_snapshot_steps", "6")
    output_dir = train(data, tmp_path / "run", *more)
    assert f"No checkpoint in {output_dir} yet, starting from the beginning" in capfd.readouterr().out
    for checkpoint in output_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = contents(output_dir)
    with pytest.raises(ValueError, match=r"`--resume_from_checkpoint latest` must .* has its pipeline .* but no"):
        train(data, output_dir, *more)
    assert contents(output_dir) == before


def test_latest_is_no_fresh_start_where_checkpoints_are_gone(data, tmp_path):
    more = ("--resume_from_checkpoint", "latest", "--ema_snapshot_steps", "1", "--checkpointing_steps", "2")
    output_dir = train(data, tmp_path / "run", *more, "--max_train_steps", "3")
    (output_dir / "model_index.json").unlink()
    for checkpoint in output_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = contents(output_dir)
    with pytest.raises(ValueError, match="must find a checkpoint where a run has come to update 3: .* but no check"):
        train(data, output_dir, *more)
    assert contents(output_dir) == before


def test_latest_is_a_fresh_start_before_the_first_checkpoint(data, tmp_path):
    more = ("--resume_from_checkpoint", "latest", "--logging_steps", "1", "--max_train_steps", "3")
    output_dir = train(data, tmp_path / "run", *more, "--checkpointing_steps", "5000")
    # What a kill leaves: a log, and the arguments.
    (output_dir / "model_index.json").unlink()
    shutil.rmtree(output_dir / "checkpoint-3")
    train(data, output_dir, *more, "--checkpointing_steps", "1")
    assert check_checkpoint(output_dir / "checkpoint-1") is None


@pytest.mark.parametrize("due", [False, True])
def test_a_validation_that_fails_costs_no_update(data, plain, tmp_path, monkeypatch, due):

    def fail(args, run, pipeline):
        raise torch.OutOfMemoryError("no memory for 10 images")

    more = ("--validation_steps", "3", "--checkpointing_steps", "3" if due else "5000")
    with monkeypatch.context() as patch:
        patch.setattr(preview, "validate_pipeline", fail)
        with pytest.raises(torch.OutOfMemoryError, match="no memory for 10 images"):
            train(data, tmp_path / "run", *more)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    reset_accelerate()
    output_dir = train(data, tmp_path / "run", *more, "--resume_from_checkpoint", "latest")
    assert_same_weights(raw_weights(plain / "checkpoint-6"), raw_weights(output_dir / "checkpoint-6"))


def test_a_validation_that_fails_while_it_samples_leaves_snapshots_as_they_are_wanted(data, tmp_path, monkeypatch):
    def fail(pipeline, **kwargs):
        raise torch.OutOfMemoryError("no memory for 10 images")

    more = ("--validation_steps", "3", "--ema_snapshot_steps", "3")
    with monkeypatch.context() as patch:
        patch.setattr(MPDiTPipeline, "__call__", fail)
        with pytest.raises(torch.OutOfMemoryError, match="no memory for 10 images"):
            train(data, tmp_path / "run", *more)
    reset_accelerate()
    assert check_checkpoint(tmp_path / "run" / "checkpoint-3") is None
    output_dir = train(data, tmp_path / "run", *more, "--resume_from_checkpoint", "latest")
    for folder in (output_dir, output_dir / "ema_snapshots"):
        index = json.loads((folder / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert len(list((output_dir / "ema_snapshots").glob("step-*"))) == 4


# argv: what the trainer is given. Its validation fails on the main process, which the other must hear of.
FAILING_VALIDATION = """
import os, sys
import torch.distributed as dist
import train_mpdit
from diffusers_mp.training import preview

def fail(args, run, pipeline):
    raise MemoryError("no memory for 10 images")

preview.validate_pipeline = fail
try:
    train_mpdit.main(train_mpdit.parse_args(sys.argv[1:]))
except (MemoryError, RuntimeError) as error:
    print(error, flush=True)
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_a_validation_that_fails_stops_all_processes(data, tmp_path):
    (tmp_path / "script.py").write_text(f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n" + FAILING_VALIDATION)
    more = ("--validation_steps", "2", "--train_batch_size", "2")
    printed = run_processes(tmp_path / "script.py", *arguments(data, tmp_path / "run", *more))
    assert "Validation failed after update 2, whose checkpoint is saved" in printed
    assert "no memory for 10 images\n" in printed
    assert "validation failed on the main process\n" in printed
    assert check_checkpoint(tmp_path / "run" / "checkpoint-2") is None


def test_half_precision_that_accelerate_leaves_out_is_refused(data, tmp_path):
    with pytest.raises(RuntimeError, match="`--mixed_precision fp16` was asked for, .* on this device"):
        train(data, tmp_path / "run", "--mixed_precision", "fp16")


def test_fp8_of_the_launcher_is_refused(data, tmp_path, monkeypatch):
    # Accelerate itself wants a GPU's library for it.
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp8"))
    with pytest.raises(RuntimeError, match="fp8 was asked for, .* other linear maps in the place of those with unit"):
        train(data, tmp_path / "run")


# argv: a file. Locks it for as long as its input lasts, or says what is in it.
HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    raise SystemExit(open(sys.argv[1]).read().strip())
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_trainer_in_the_same_folder_is_refused(data, tmp_path, monkeypatch):
    import train_mpdit

    output_dir, answers, update = tmp_path / "run", [], train_mpdit.PowerFunctionEMA.update
    command = [sys.executable, "-c", HOLDER, str(output_dir / ".lock")]

    def update_and_ask(self, step):
        update(self, step)
        answers.append(subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stderr)

    with monkeypatch.context() as patch:
        patch.setattr(train_mpdit.PowerFunctionEMA, "update", update_and_ask)
        train(data, output_dir, "--max_train_steps", "2")
    assert answers == [f"process {os.getpid()} on {platform.node()}\n"] * 2

    more = ("--resume_from_checkpoint", "latest", "--max_train_steps", "4")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        before = contents(output_dir)
        with pytest.raises(RuntimeError, match=f"`--output_dir` must .*, {output_dir} is in use by process"):
            train(data, output_dir, *more)
        assert contents(output_dir) == before
        holder.kill()
    reset_accelerate()
    train(data, output_dir, *more)
    assert (output_dir / "checkpoint-4").is_dir()


@pytest.mark.slow
def test_a_second_trainer_of_two_processes_is_refused_in_both(data, tmp_path):
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    command = [sys.executable, "-c", HOLDER, str(output_dir / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(AssertionError, match="RuntimeError: `--output_dir` must be a folder"):
            run_processes(EXAMPLES / "train_mpdit.py", *arguments(data, output_dir, "--train_batch_size", "2"))
        holder.kill()
    assert [path.name for path in output_dir.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_saves_a_checkpoint_and_leaves_with_0(data, plain, tmp_path, monkeypatch, capfd, name):
    import train_mpdit

    update = train_mpdit.PowerFunctionEMA.update

    def update_and_signal(self, step):
        update(self, step)
        if step == 3:
            os.kill(os.getpid(), getattr(signal, name))

    former = signal.getsignal(getattr(signal, name))
    monkeypatch.setattr(train_mpdit.PowerFunctionEMA, "update", update_and_signal)
    output_dir = train(data, tmp_path / "run", "--checkpointing_steps", "100")
    monkeypatch.undo()
    assert signal.getsignal(getattr(signal, name)) is former
    assert f"{name}: stopped after update 3" in capfd.readouterr().out
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (output_dir / "model_index.json").exists()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train(data, output_dir, "--checkpointing_steps", "100", "--resume_from_checkpoint", "latest")
    assert_same_weights(weights(plain / "transformer"), weights(output_dir / "transformer"))


# argv: the trainer's arguments. The sender has to be another process: PyTorch's workers take SIGTERM from their parent
# for the end of their work.
SIGNAL_TO_THE_GROUP = f"""
import multiprocessing, os, sys, time
# As in a process of its own, which leads a group, and whose workers have its handlers.
multiprocessing.set_start_method("fork", force=True)
os.setsid()
sys.path.insert(0, {str(EXAMPLES)!r})
import torch
torch.set_num_threads(1)
import train_mpdit

update = train_mpdit.PowerFunctionEMA.update
def update_and_signal(self, step):
    update(self, step)
    if step == 3:
        os.system("kill -s TERM 0")
        time.sleep(0.5)  # word of a dead worker comes within
train_mpdit.PowerFunctionEMA.update = update_and_signal
train_mpdit.main(train_mpdit.parse_args(sys.argv[1:]))
"""


def test_signal_to_all_processes_of_a_group_does_not_end_the_workers(data, tmp_path):
    """As a cluster's scheduler sends it to all processes of a job."""
    argv = arguments(data, tmp_path / "run", "--checkpointing_steps", "100", "--dataloader_num_workers", "2")
    assert "SIGTERM: stopped after update 3" in run_python(SIGNAL_TO_THE_GROUP, *argv)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_workers_ignore_every_signal_of_a_stop_request():
    # Of SIGUSR1 a forked worker would not die, which has its parent's handler; one that is spawned would.
    former = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    leave_signals_to_main_process(0)
    assert {signal.signal(number, handler) for number, handler in former.items()} == {signal.SIG_IGN}


def test_checkpoints_total_limit(data, tmp_path):
    output_dir = train(data, tmp_path / "run", "--checkpoints_total_limit", "2")
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_accumulation_does_not_change_the_run(data, tmp_path):
    # Each sample is a function of (seed, epoch, index), so that only the rounding of sums differs.
    one = train(data, tmp_path / "one", "--adam_epsilon", "1e-2")
    two = train(
        *(data, tmp_path / "two", "--train_batch_size", "2", "--gradient_accumulation_steps", "2"),
        *("--adam_epsilon", "1e-2"),
    )
    first, second = (raw_weights(run / "checkpoint-6") for run in (one, two))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-5), name


def test_the_recipe_reaches_the_run(data, tmp_path, monkeypatch):
    """What the flags say is what the run is made with: a wire that is not connected shows nowhere else."""
    import train_mpdit

    made = {}

    def spy(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            made.setdefault(name, []).append((args, kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("TrainingSamples", "parameter_groups"):
        spy(train_mpdit, name)
    spy(torch.optim, "Adam")
    spy(MPDiTPipeline, "__call__")
    output_dir = train(
        *(data, tmp_path / "run", "--random_flip", "--class_dropout_prob", "0.25", "--adam_beta2", "0.95"),
        *("--max_train_steps", "2", "--validation_steps", "2", "--gradient_checkpointing"),
        *("--validation_guidance_scale", "3", "--max_train_samples", "30", "--allow_tf32"),
    )
    assert torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    ((_, preview),) = made["__call__"]
    assert (preview["guidance_scale"], preview["num_inference_steps"]) == (3.0, 2)
    (_, held_out), (_, training) = made["TrainingSamples"]
    assert (training["class_dropout_prob"], training["random_flip"], training["num_classes"]) == (0.25, True, 2)
    assert held_out.get("class_dropout_prob", 0) == 0
    assert (len(training["indices"]), len(held_out["indices"])) == (25, 5)
    assert not set(training["indices"].tolist()) & set(held_out["indices"].tolist())
    (groups,), adam = made["Adam"][0]
    assert adam["betas"] == (0.9, 0.95)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["as_published"] == 1e-2
    assert rates["unit_rows_16"] == 1e-2 / 4
    model = made["parameter_groups"][0][0][0]
    assert model.is_gradient_checkpointing
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    index = json.loads((output_dir / "latents" / "index.json").read_text())
    assert pipe.config.latents_mean == index["latents_mean"]
    assert pipe.config.latents_std == index["latents_std"]
    assert pipe.transformer.config.class_dropout_prob == 0.25


def test_validation_is_that_of_the_averaged_weights(data, tmp_path):
    more = ("--validation_steps", "6", "--learning_rate", "3e-2", "--lr_constant_steps", "6")
    output_dir = train(data, tmp_path / "run", *more)
    latents = LatentDataset(output_dir / "latents")
    _, held_out = split_validation(len(latents), 5, 0)
    samples = TrainingSamples(latents, seed=0, num_classes=2, indices=held_out)
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    objective = DDPMObjective(pipe.scheduler)
    batches = DataLoader(samples, sampler=[(0, i) for i in range(5)], batch_size=5)
    levels = validation_timesteps(objective, 8)
    expected = validation_losses(pipe.transformer.eval(), objective, batches, levels, torch.device("cpu"))
    assert metrics(output_dir, "validation/loss")[6] == pytest.approx(expected["loss"], rel=1e-5)
    pipe.transformer.load_state_dict(raw_weights(output_dir / "checkpoint-6"))
    of_raw = validation_losses(pipe.transformer, objective, batches, levels, torch.device("cpu"))["loss"]
    assert of_raw != pytest.approx(expected["loss"], rel=1e-4)


def test_clipping_and_the_rate_of_configuration_a(data, tmp_path):
    clipped = train(data, tmp_path / "clipped", "--max_grad_norm", "1e-3", "--adam_epsilon", "1e-2")
    free = train(data, tmp_path / "free", "--adam_epsilon", "1e-2")
    first, second = (raw_weights(run / "checkpoint-6") for run in (clipped, free))
    assert (first["output.gain"] - second["output.gain"]).abs() > 1e-3
    (tmp_path / "a.json").write_text(json.dumps({**MODEL, **CONFIGURATIONS["A"]}))
    more = (
        "--model_config_name_or_path",
        str(tmp_path / "a.json"),
        "--lr_constant_steps",
        "100",
        "--logging_steps",
        "1",
    )
    assert set(metrics(train(data, tmp_path / "a", *more), "train/learning_rate").values()) == {1e-4}


def test_another_rate_on_resume_is_applied(data, tmp_path, capfd):
    more = ("--lr_constant_steps", "100", "--logging_steps", "1")
    output_dir = train(data, tmp_path / "run", *more)
    train(
        data,
        output_dir,
        *more,
        "--resume_from_checkpoint",
        "latest",
        "--max_train_steps",
        "8",
        "--learning_rate",
        "2e-3",
    )
    assert "Learning rate 0.01 of the checkpoint, now 0.002" in capfd.readouterr().out
    assert metrics(output_dir, "train/learning_rate")[8] == pytest.approx(2e-3)
    groups = stored(output_dir / "checkpoint-8")["optimizer"]["param_groups"]
    assert {group["name"]: group["lr"] for group in groups}["as_published"] == pytest.approx(2e-3)


def test_another_model_on_resume_is_refused(data, plain_copy, tmp_path):
    output_dir = plain_copy
    (tmp_path / "model.json").write_text(json.dumps({**MODEL, "cosine_attention": False}))
    more = ("--model_config_name_or_path", str(tmp_path / "model.json"), "--random_flip")
    with pytest.raises(ValueError, match=r"random_flip False \(now True\), model.cosine_attention True \(now False\)"):
        train(data, output_dir, "--resume_from_checkpoint", "latest", "--latents_dir", str(tmp_path / "new"), *more)


def test_encoded_images_alone_are_enough_and_keep_their_settings(data, plain, tmp_path):
    first = plain
    (tmp_path / "second").mkdir()
    # What a run leaves that stopped before its first update does not stand in the way of the next try.
    shutil.copytree(first / "latents", tmp_path / "second" / "latents")
    import train_mpdit

    argv = arguments(data, tmp_path / "second")
    for flag in ("--train_data_dir", "--vae", "--resolution"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    train_mpdit.main(train_mpdit.parse_args(argv))
    assert_same_weights(weights(first / "transformer"), weights(tmp_path / "second" / "transformer"))


def test_encoded_images_of_other_data_are_refused(data, plain_copy, tmp_path):
    first = plain_copy
    for name in ("dark", "light"):
        (tmp_path / "other" / name).mkdir(parents=True)
        for path in sorted((data / "images" / name).iterdir())[1:]:
            (tmp_path / "other" / name / path.name).write_bytes(path.read_bytes())
    more = ("--train_data_dir", str(tmp_path / "other"), "--latents_dir", str(first / "latents"))
    with pytest.raises(ValueError, match="num_rows 40"):
        train(data, tmp_path / "second", *more)
    assert (first / "latents" / "index.json").is_file()


def test_a_damaged_shard_of_latents_can_be_made_again_as_its_message_says(data, tmp_path):
    more = ("--max_train_steps", "1", "--latents_dir", str(tmp_path / "latents"))
    train(data, tmp_path / "first", *more)
    shard = tmp_path / "latents" / "shard-00000.safetensors"
    before = shard.read_bytes()
    damage(shard)
    with pytest.raises(ValueError, match="shard-00000.safetensors: delete the file and encode again"):
        train(data, tmp_path / "second", *more)
    reset_accelerate()
    shard.unlink()
    train(data, tmp_path / "third", *more)
    assert shard.read_bytes() == before


def test_two_workers_do_not_change_the_run(data, tmp_path):
    one = train(data, tmp_path / "one", "--max_train_steps", "3")
    two = train(data, tmp_path / "two", "--max_train_steps", "3", "--dataloader_num_workers", "2")
    assert_same_weights(weights(one / "transformer"), weights(two / "transformer"))


@pytest.fixture
def scalers(monkeypatch):
    """The trainer with float16's scaler, of which this is a list, but on the CPU, so in float32."""

    class Scaled(Accelerator):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scaler = scalers.append(torch.amp.GradScaler("cpu", init_scale=2.0**15)) or scalers[-1]

        def unscale_gradients(self, optimizer=None):
            # Accelerate's own does the same where the precision is fp16, which it has on accelerators only.
            for optimizer in self._optimizers:
                self.scaler.unscale_(optimizer.optimizer)

    scalers = []
    monkeypatch.setattr(engine, "Accelerator", Scaled)
    return scalers


def test_updates_that_the_scaler_of_float16_skips_are_updates_by_zero(data, tmp_path, monkeypatch, scalers):
    """Weights and Adam's state stay, everything that counts updates goes on."""

    def loss_with_gradients_too_large(self, *args):
        terms = loss(self, *args)
        if scalers[-1].get_scale() > 2.0**13:
            terms["loss"].register_hook(lambda gradient: gradient * math.inf)
        return terms

    loss = DDPMObjective.loss
    monkeypatch.setattr(DDPMObjective, "loss", loss_with_gradients_too_large)
    more = ("--logging_steps", "1", "--checkpointing_steps", "1", "--max_train_steps", "4")
    output_dir = train(data, tmp_path / "run", *more)
    assert list(metrics(output_dir, "train/loss")) == [3, 4]
    first, second, third, last = (stored(output_dir / f"checkpoint-{step}") for step in (1, 2, 3, 4))
    assert_same_weights(first["model"], second["model"])
    assert any(not torch.equal(tensor, second["model"][name]) for name, tensor in third["model"].items())
    adam = [state["optimizer"]["state"]["output.gain"]["step"].item() for state in (second, third, last)]
    assert adam == [0, 1, 2]  # saving makes Adam's state, but no update
    assert [state["ema"]["step"] for state in (first, second, third)] == [1, 2, 3]
    rates = metrics(output_dir, "train/learning_rate")
    assert rates == pytest.approx({step: 1e-2 / (step + 1) ** 0.5 for step in (3, 4)})

    # The scale is part of a checkpoint: no further update is skipped.
    resumed = train(data, output_dir, *more, "--resume_from_checkpoint", "checkpoint-3")
    assert_same_weights(raw_weights(resumed / "checkpoint-4"), last["model"])


def test_clipping_and_the_scaler_of_float16_go_on_after_a_skipped_update(data, tmp_path, monkeypatch, scalers):
    """Clipping has unscaled the gradients that no step of the optimiser takes then."""

    def loss_with_a_hole(self, *args):
        terms = loss(self, *args)
        calls.append(terms)
        return {**terms, "loss": terms["loss"] / (0 if len(calls) == 2 else 1)}

    loss, calls = DDPMObjective.loss, []
    monkeypatch.setattr(DDPMObjective, "loss", loss_with_a_hole)
    more = ("--max_grad_norm", "0.5", "--on_non_finite", "skip", "--logging_steps", "1")
    output_dir = train(data, tmp_path / "run", *more)
    assert list(metrics(output_dir, "train/loss")) == [1, 3, 4, 5, 6]
    # The scaler has seen that the gradients were infinite.
    assert scalers[-1].get_scale() == 2.0**14


def test_streaming_does_not_change_the_run(data, tmp_path, monkeypatch):
    import train_mpdit

    load, asked = train_mpdit.load_image_dataset, []

    def note(*args, **kwargs):
        asked.append(kwargs["streaming"])
        return load(*args, **kwargs)

    monkeypatch.setattr(train_mpdit, "load_image_dataset", note)
    whole = train(data, tmp_path / "whole")
    streamed = train(data, tmp_path / "streamed", "--streaming")
    assert asked == [False, True]
    assert_same_weights(weights(whole / "transformer"), weights(streamed / "transformer"))
    assert MPDiTPipeline.from_pretrained(streamed).id2label == {0: "dark", 1: "light"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_run_is_the_run_and_goes_on_plain(data, tmp_path, monkeypatch):
    more = ("--logging_steps", "1", "--validation_steps", "3")
    plain = train(data, tmp_path / "plain", *more)
    with monkeypatch.context() as patch:
        # What `accelerate launch --dynamo_backend inductor` sets.
        patch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
        compiled = train(data, tmp_path / "compiled", *more)
    torch._dynamo.reset()
    assert metrics(compiled, "train/loss") == pytest.approx(metrics(plain, "train/loss"), rel=1e-4)
    expected = weights(plain / "transformer")
    assert weights(compiled / "transformer").keys() == expected.keys()
    train(data, compiled, *more, "--resume_from_checkpoint", "checkpoint-4")
    for name, tensor in weights(compiled / "transformer").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_a_checkpoint_becomes_a_pipeline_elsewhere(data, tmp_path):
    """As docs/resume.md has it: nothing of the run changes."""
    run = train(data, tmp_path / "run", "--ema_snapshot_steps", "2")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    more = ("--latents_dir", str(run / "latents"), "--resume_from_checkpoint", str(run / "checkpoint-4"))
    output_dir = train(data, tmp_path / "early", *more, "--max_train_steps", "4")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    snapshot = MPDiTTransformer2DModel.from_pretrained(run / "ema_snapshots" / "step-0000004_std-0.05")
    assert_same_weights(normalize_weights_(snapshot).state_dict(), pipe.transformer.state_dict())
    assert not list(output_dir.glob("checkpoint-*"))


def test_pixels_without_a_vae(data, tmp_path):
    output_dir = train(data, tmp_path / "run", "--vae", "none", "--image_channels", "1")
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    assert pipe.vae is None
    (image,) = pipe(1, num_inference_steps=2).images
    assert (image.mode, image.size) == ("L", (16, 16))


def test_unlabelled_images(data, tmp_path):
    (tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted((data / "images").rglob("*.png"))):
        (tmp_path / "flat" / f"{i}.png").write_bytes(path.read_bytes())
    output_dir = train(data, tmp_path / "run", "--train_data_dir", str(tmp_path / "flat"), "--validation_steps", "6")
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    assert pipe.transformer.config.num_classes is None
    assert pipe.transformer.config.class_dropout_prob == 0
    assert len(pipe(num_images_per_class=2, num_inference_steps=2).images) == 2


def test_preset_flags(tmp_path):
    args = parse_args(
        [
            *("--train_data_dir", "x", "--output_dir", str(tmp_path / "new")),
            *(
                "--preset",
                "B/4",
                "--configuration",
                "C",
                "--modulation",
                "scale",
                "shift",
                "--no-mp_silu",
                "--layer_norm",
            ),
        ]
    )
    config = model_config(args, (4, 16, 16), 7)
    assert (config["num_layers"], config["patch_size"], config["num_classes"]) == (12, 4, 7)
    assert (config["modulation"], config["mp_silu"], config["layer_norm"]) == (["scale", "shift"], False, True)
    assert (config["in_channels"], config["out_channels"]) == (4, 8)


def test_bf16(data, tmp_path):
    more = ("--max_train_steps", "2", "--logging_steps", "1", "--mixed_precision")
    runs = {precision: train(data, tmp_path / precision, *more, precision) for precision in ("bf16", "no")}
    losses = {precision: metrics(output_dir, "train/loss") for precision, output_dir in runs.items()}
    assert losses["bf16"] != losses["no"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05)
    assert MPDiTTransformer2DModel.from_pretrained(runs["bf16"], subfolder="transformer").dtype == torch.float32


@pytest.mark.parametrize(
    "wrong, message",
    [
        (("--preset", "S/x"), "`size` must be one of"),
        (("--modulation", "spin"), "`modulation` must be a non-empty list"),
        (("--no-weight_normalization",), "`forced_weight_normalization=True` needs `weight_normalization=True`"),
    ],
)
def test_a_wrong_model_is_refused_before_images_are_encoded(tmp_path, capsys, wrong, message):
    import train_mpdit

    with pytest.raises(SystemExit, match="2"):
        train_mpdit.main(parse_args(["--train_data_dir", "x", "--output_dir", str(tmp_path / "new"), *wrong]))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_every_scheduler_trains(data, tmp_path):
    for name in ("constant_with_warmup", "cosine"):
        more = ("--lr_scheduler", name, "--lr_warmup_steps", "2", "--logging_steps", "1", "--max_train_steps", "4")
        rates = metrics(train(data, tmp_path / name, *more, "--num_validation_images", "0"), "train/learning_rate")
        # The rate logged after update u is that of update u + 1: half of it, then all, then the schedule's own way.
        assert (rates[1], rates[2]) == pytest.approx((0.5e-2, 1e-2))
        assert rates[4] == pytest.approx(1e-2 if name == "constant_with_warmup" else 0.0, abs=1e-9)


def test_help_says_no_second_default(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "default: None" not in shown
    assert "(default: 256)" in shown


@pytest.mark.parametrize("page", ["resume.md", "scale_out.md"])
def test_every_command_of_the_docs_is_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", (EXAMPLES.parent / "docs" / page).read_text(), re.S)
    commands = [line for block in blocks for line in block.splitlines() if "train_mpdit.py" in line]
    assert len(commands) >= 5
    for command in commands:
        argv = shlex.split(command.partition("train_mpdit.py")[2])
        if "--train_data_dir" not in argv:
            (tmp_path / "run" / "latents").mkdir(parents=True)
            (tmp_path / "run" / "latents" / "index.json").write_text('{"resolution": 256, "vae": {"id": "x"}}')
        args = parse_args(argv)
        assert args.preset in command


class TestErrors:
    def test_output_dir_in_use(self, data, tmp_path, capsys):
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(SystemExit):
            train(data, tmp_path)
        assert "--output_dir must be new or empty" in capsys.readouterr().err
        assert (tmp_path / "thesis.txt").read_text() == "years of work"
        assert list(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]

    def test_missing_column(self, data, tmp_path):
        with pytest.raises(ValueError, match=r"`image_column` must be one of .*image.* got 'photo'"):
            train(data, tmp_path / "run", "--image_column", "photo")

    def test_corrupt_image_is_named_and_can_be_skipped(self, data, tmp_path):
        folder = tmp_path / "images" / "dark"
        folder.mkdir(parents=True)
        (tmp_path / "images" / "light").mkdir()
        for path in (data / "images").rglob("*.png"):
            (tmp_path / "images" / path.parent.name / path.name).write_bytes(path.read_bytes())
        (folder / "broken.png").write_bytes(b"not a picture")
        with pytest.raises(ValueError, match=r"broken\.png.*--skip_corrupt"):
            train(data, tmp_path / "run", "--train_data_dir", str(tmp_path / "images"))
        output_dir = train(data, tmp_path / "skipped", "--train_data_dir", str(tmp_path / "images"), "--skip_corrupt")
        assert (output_dir / "model_index.json").is_file()

    def test_model_config_that_does_not_fit_the_data(self, data, tmp_path):
        (tmp_path / "model.json").write_text(json.dumps({**MODEL, "num_classes": 5}))
        with pytest.raises(ValueError, match=r"`num_classes` of .*model\.json must be 2 .* got 5"):
            train(data, tmp_path / "run", "--model_config_name_or_path", str(tmp_path / "model.json"))

    @pytest.mark.parametrize(
        "model, more, message",
        [
            ({}, ("--vae", "none", "--resolution", "9"), r"`--resolution 9` .* 3 x 9 x 9, .*`patch_size` \(2\)"),
            # The VAE has a factor of 4.
            ({}, ("--resolution", "20"), r"`--resolution 20` .* 4 x 5 x 5, .*`patch_size` \(2\)"),
            ({"in_channels": 3}, (), r"latents of 4 x 4 x 4, .*`in_channels` of .* must be 4 .* got 3"),
        ],
    )
    def test_model_that_does_not_fit_the_latents_before_they_are_made(self, data, tmp_path, model, more, message):
        (tmp_path / "model.json").write_text(json.dumps({**MODEL, **model}))
        with pytest.raises(ValueError, match=message):
            train(data, tmp_path / "run", *more, "--model_config_name_or_path", str(tmp_path / "model.json"))
        assert not (tmp_path / "run" / "latents").exists()

    def test_latents_of_another_vae(self, data, plain_copy, tmp_path):
        with pytest.raises(ValueError, match="holds an encoding with vae .* Take another folder"):
            train(data, tmp_path / "other", "--vae", "none", "--latents_dir", str(plain_copy / "latents"))

    def test_averages_that_would_never_move(self, data, tmp_path):
        import train_mpdit

        argv = arguments(data, tmp_path / "run", "--num_train_epochs", "0.25", "--ema_update_steps", "4")
        place = argv.index("--max_train_steps")
        args = train_mpdit.parse_args([*argv[:place], *argv[place + 2 :]])
        # A quarter of 35 images, in batches of 4.
        with pytest.raises(ValueError, match="`--ema_update_steps` must be at most .* updates, 3, .* got 4"):
            train_mpdit.main(args)

    def test_non_finite_update_stops_and_no_checkpoint_holds_it(self, data, tmp_path):
        more = ("--learning_rate", "1e30", "--lr_scheduler", "constant", "--checkpointing_steps", "1")
        with pytest.raises(FloatingPointError, match="update 2|after update 1"):
            train(data, tmp_path / "run", *more, "--logging_steps", "100")
        for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
            assert all(tensor.isfinite().all() for tensor in raw_weights(checkpoint).values())

    @pytest.mark.parametrize("skipped", [1, 2])
    def test_non_finite_update_can_be_skipped(self, data, tmp_path, monkeypatch, skipped):

        loss = DDPMObjective.loss

        def loss_with_a_hole(self, *args):
            terms = loss(self, *args)
            calls.append(terms)
            return {**terms, "loss": terms["loss"] / (0 if len(calls) == skipped else 1)}

        calls = []
        monkeypatch.setattr(DDPMObjective, "loss", loss_with_a_hole)
        output_dir = train(data, tmp_path / "run", "--on_non_finite", "skip", "--logging_steps", "1")
        assert list(metrics(output_dir, "train/loss")) == [step for step in range(1, 7) if step != skipped]
        evidence = output_dir / "non_finite" / f"step-000000{skipped}"
        assert "inf" in (evidence / "report.json").read_text()
        assert list(evidence.glob("*.safetensors"))
        assert MPDiTPipeline.from_pretrained(output_dir)

    @pytest.mark.parametrize(
        "more, message",
        [
            (("--dataset_name", "x"), "give one of --train_data_dir and --dataset_name"),
            (("--num_train_epochs", "2"), "give one of --max_train_steps and --num_train_epochs"),
            (("--report_to", "wandb"), "--report_to wandb: not installed"),
            (("--train_batch_size", "0"), "argument --train_batch_size: must be at least 1, got 0"),
            (("--preset", "S/3"), "--model_config_name_or_path stands instead of --preset"),
            (("--max_train_steps", "0"), "argument --max_train_steps: must be at least 1, got 0"),
            # Noticed by the first validation otherwise, before the first checkpoint.
            (
                ("--validation_inference_steps", "0"),
                "argument --validation_inference_steps: must be at least 1, got 0",
            ),
            (("--ema_stds", "0.5"), "argument --ema_stds: must be in (0, 1/sqrt(12)), that is below 0.2887, got 0.5"),
            (("--ema_stds", "0.1", "0.05", "0.1"), "--ema_stds must differ from each other, got [0.1, 0.05, 0.1]"),
            (("--learning_rate", "0"), "argument --learning_rate: must be positive, got 0"),
            (("--learning_rate", "nan"), "argument --learning_rate: must be positive, got nan"),
            # Off in other trainers; clipped to nothing, gradients change no weight.
            (("--max_grad_norm", "0"), "argument --max_grad_norm: must be positive, got 0"),
            (("--adam_epsilon", "0"), "argument --adam_epsilon: must be positive, got 0"),
            (("--adam_beta1", "1"), "argument --adam_beta1: must be in [0, 1), got 1"),
            (("--lr_warmup_steps", "-1"), "argument --lr_warmup_steps: must be at least 0, got -1"),
            (("--validation_steps", "-1"), "argument --validation_steps: must be at least 0, got -1"),
            (("--num_validation_images", "-1"), "argument --num_validation_images: must be at least 0, got -1"),
            (("--validation_guidance_scale", "nan"), "argument --validation_guidance_scale: must be finite, got nan"),
            (("--resolution", "0"), "argument --resolution: must be at least 1, got 0"),
            (
                ("--class_dropout_prob", "0", "--validation_guidance_scale", "2", "--validation_steps", "3"),
                "--validation_guidance_scale needs dropped conditions in training, not --class_dropout_prob 0",
            ),
            (
                ("--lr_scheduler", "constant", "--lr_warmup_steps", "5"),
                "--lr_warmup_steps has no meaning for --lr_scheduler constant",
            ),
            (
                ("--lr_scheduler", "cosine", "--lr_constant_steps", "5"),
                "--lr_constant_steps has no meaning for --lr_scheduler cosine",
            ),
            (("--logging_dir", "../other/logs"), "got ../other/logs"),
            (("--logging_dir", "/dev/null/logs"), "--logging_dir must lie inside --output_dir"),
            (("--ema_update_steps", "7"), "--ema_update_steps must be at most --max_train_steps (6), got 7"),
            (("--preset", "B/2", "--no-mp_silu"), "--model_config_name_or_path stands instead of --preset, --mp_silu"),
        ],
    )
    def test_arguments(self, data, tmp_path, capsys, more, message):
        with pytest.raises(SystemExit):
            train(data, tmp_path / "run", *more)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def accelerate_launch(*command):
    options = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options]
    return subprocess.run([*launcher, *command], capture_output=True, text=True)


@pytest.mark.slow  # the launcher is Accelerate's; processes as it starts them are tested below
def test_accelerate_launch(data, plain, tmp_path):
    script = str(EXAMPLES / "train_mpdit.py")
    done = accelerate_launch("--num_processes", "1", script, *arguments(data, tmp_path / "launched"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(weights(plain / "transformer"), weights(tmp_path / "launched" / "transformer"))


def test_two_processes_are_the_same_run(data, tmp_path):
    """DDP over gloo on the CPU: the global batch, hence the run, is that of one process up to the rounding of sums."""
    # `accelerate launch` starts several processes on accelerators only; torchrun starts them on the CPU.
    more = ("--adam_epsilon", "1e-2", "--train_batch_size", "2", "--validation_steps", "3")
    run_processes(EXAMPLES / "train_mpdit.py", *arguments(data, tmp_path / "two", *more))
    one = train(data, tmp_path / "one", "--adam_epsilon", "1e-2")
    first, second = (raw_weights(run / "checkpoint-6") for run in (one, tmp_path / "two"))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-5), name
    assert MPDiTPipeline.from_pretrained(tmp_path / "two").id2label == {0: "dark", 1: "light"}
    losses = [metrics(run, "train/loss")[6] for run in (one, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_checkpoint_resumes_under_another_number_of_processes(data, tmp_path):
    """One process for 4 updates, two for 2 more: still the run of one, up to the rounding of sums."""
    more = ("--adam_epsilon", "1e-2", "--lr_constant_steps", "1")
    whole = train(data, tmp_path / "whole", *more)
    parts = train(data, tmp_path / "parts", *more, "--max_train_steps", "4")
    more = (*more, "--train_batch_size", "2", "--resume_from_checkpoint", "latest")
    run_processes(EXAMPLES / "train_mpdit.py", *arguments(data, parts, *more))
    first, second = (raw_weights(run / "checkpoint-6") for run in (whole, parts))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-5), name


NOT_FOUND = "launched as 2 processes, but Accelerate runs 1"


def test_processes_that_did_not_find_each_other_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=NOT_FOUND):
        train(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_accumulation_that_the_environment_changes_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with pytest.raises(RuntimeError, match="must be what ACCELERATE_GRADIENT_ACCUMULATION_STEPS .* 3; got 2"):
        train(data, tmp_path / "run", "--gradient_accumulation_steps", "2")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_launcher_for_gpus_without_any_is_refused(data, tmp_path):
    script = str(EXAMPLES / "train_mpdit.py")
    done = accelerate_launch("--num_processes", "2", "--multi_gpu", script, *arguments(data, tmp_path / "run"))
    assert done.returncode != 0
    assert NOT_FOUND in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "engine, message",
    [
        ("FSDP", "FSDP was asked for, but Accelerate chose NO: it shards on several accelerators only"),
        ("DEEPSPEED", "DEEPSPEED was asked for, but this trainer runs on one process, DDP or FSDP2"),
        ("MEGATRON_LM", "MEGATRON_LM was asked for, but this trainer runs on one process, DDP or FSDP2"),
    ],
)
def test_engine_that_is_not_given_is_refused(monkeypatch, engine, message):
    # On the CPU Accelerate would go on without it and say nothing.

    accelerator = Accelerator()
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(RuntimeError, match=message):
        check_engine(accelerator, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fsdp_version": 1}, "FSDP version 1 was asked for, .* launch with `--fsdp_version 2`"),
        ({"activation_checkpointing": True}, "`--fsdp_activation_checkpointing` renames parameters"),
    ],
)
def test_kind_of_fsdp_that_is_not_supported_is_refused(monkeypatch, options, message):

    # A single process says that it shards: nothing needs a second one to be refused.
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **options})
        accelerator = Accelerator(fsdp_plugin=plugin)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        with pytest.raises(RuntimeError, match=message):
            check_engine(accelerator, 1)
