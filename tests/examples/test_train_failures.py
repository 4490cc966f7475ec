"""What goes wrong while the trainer is at work: a validation, a number that is not finite, a signal."""

import contextlib
import json
import math
import os
import pkgutil
import signal

import pytest
import torch
from accelerate import Accelerator
from helpers import EXAMPLES, full_disk, reset_accelerate
from training_runs import (
    assert_same_weights,
    metrics,
    raw_weights,
    stored,
    train,
    weights,
)

from diffusers_mp import MPDiTPipeline
from diffusers_mp.files import NoSpaceError
from diffusers_mp.training import (
    DDPMObjective,
    StopRequest,
    check_checkpoint,
    checkpoints,
    engine,
    leave_signals_to_main_process,
    preview,
    resolve_checkpoint,
)


pytestmark = pytest.mark.usefixtures("examples_run_here")


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


# where: (what meets a full disk, at which of its calls, how much fits into a file, what is named, the last checkpoint)
FULL_DISKS = {
    "checkpoint": ("train_mpdit.save_checkpoint", 2, 20_000, r"checkpoint-4 .*: it takes more than 0\.\d MB, and", 2),
    "samples": (
        *("diffusers_mp.training.preview.validate_pipeline", 1, 100, r"samples/step-0000003\.png", 3),
        *("--validation_steps", "3", "--num_validation_images", "0"),
    ),
    "metrics": (
        *("diffusers_mp.training.JSONLinesTracker.log", 3, 10, r"logs/metrics\.jsonl could", 2),
        *("--logging_steps", "1"),
    ),
    "parts": ("train_mpdit.save_snapshots", 1, 1_500, "ema_snapshots could", 2, "--ema_snapshot_steps", "3"),
    "snapshots": (
        *("diffusers_mp.averages.snapshots.save_file", 1, 1_500, r"ema_snapshots/step-0000003_std-0\.05 could", 2),
        *("--ema_snapshot_steps", "3"),
    ),
    "end": ("train_mpdit.finish", 1, 1_500, "run could", 6),
}


@pytest.mark.parametrize(
    "where",
    [pytest.param(w, marks=pytest.mark.slow) if w in ("metrics", "parts", "end") else w for w in FULL_DISKS],
)
def test_a_full_disk_says_what_it_did_not_take_and_the_run_can_go_on(data, plain, tmp_path, monkeypatch, where):
    target, call, num_bytes, named, checkpoint, *more = FULL_DISKS[where]
    function, calls = pkgutil.resolve_name(target), []

    def on_a_full_disk(*args, **kwargs):
        calls.append(args)
        with full_disk(num_bytes) if len(calls) == call else contextlib.nullcontext():
            return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, on_a_full_disk)
        with pytest.raises(NoSpaceError, match=rf"/{named}.* are free there") as caught:
            train(data, tmp_path / "run", *more)
    assert len(calls) == call
    assert str(caught.value).startswith(str(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("*.unfinished"))
    assert resolve_checkpoint("latest", tmp_path / "run").name == f"checkpoint-{checkpoint}"
    reset_accelerate()
    output_dir = train(data, tmp_path / "run", *more, "--resume_from_checkpoint", "latest")
    assert MPDiTPipeline.from_pretrained(output_dir)
    if where != "samples":  # which has five more images to train on
        assert_same_weights(raw_weights(plain / "checkpoint-6"), raw_weights(output_dir / "checkpoint-6"))


def test_a_disk_that_is_full_at_the_start(data, plain, tmp_path):
    with pytest.raises(NoSpaceError, match="run could not be written .File too large"), full_disk():
        train(data, tmp_path / "run")
    reset_accelerate()
    output_dir = train(data, tmp_path / "run")
    assert_same_weights(raw_weights(plain / "checkpoint-6"), raw_weights(output_dir / "checkpoint-6"))


def test_what_a_kill_left_unfinished_makes_room_for_the_resumed_run(data, plain_copy):
    left = [plain_copy / name for name in ("checkpoint-9.unfinished", "ema_snapshots/step-9.unfinished")]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x")
    train(data, plain_copy, "--resume_from_checkpoint", "latest")
    assert not any(folder.exists() for folder in left)


@pytest.fixture
def foreground():
    """As a process that Ctrl+C reaches, which those in the background of a shell's script ignore."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_signal_saves_a_checkpoint_and_leaves_with_0(data, plain, tmp_path, monkeypatch, capfd, number):
    import train_mpdit

    update = train_mpdit.PowerFunctionEMA.update

    def update_and_signal(self, step):
        update(self, step)
        if step == 3:
            os.kill(os.getpid(), number)

    former = signal.getsignal(number)
    monkeypatch.setattr(train_mpdit.PowerFunctionEMA, "update", update_and_signal)
    output_dir = train(data, tmp_path / "run", "--checkpointing_steps", "100")
    monkeypatch.undo()
    assert signal.getsignal(number) is former
    printed = capfd.readouterr()
    assert f"{number.name}: stopped after update 3" in printed.out
    said = "Ctrl+C: saving after this update; again to quit at once\n"
    assert (said in printed.err) == (number == signal.SIGINT)
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (output_dir / "model_index.json").exists()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train(data, output_dir, "--checkpointing_steps", "100", "--resume_from_checkpoint", "latest")
    assert_same_weights(weights(plain / "transformer"), weights(output_dir / "transformer"))


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("where", ["update", "checkpoint"])
def test_ctrl_c_twice_quits_at_once_and_the_run_can_go_on(data, plain, tmp_path, monkeypatch, where):
    import train_mpdit

    update, save = train_mpdit.PowerFunctionEMA.update, checkpoints.save_accelerator_state

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("still here")

    def update_and_interrupt(self, step):
        update(self, step)
        if step == 4 and where == "update":
            interrupt()

    def save_and_interrupt(*args):
        save(*args)
        if args[-2] == 4 and where == "checkpoint":
            interrupt()

    former = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(train_mpdit.PowerFunctionEMA, "update", update_and_interrupt)
        patch.setattr(checkpoints, "save_accelerator_state", save_and_interrupt)
        with pytest.raises(SystemExit) as quits:
            train(data, tmp_path / "run")
    assert quits.value.code == 130
    assert signal.getsignal(signal.SIGINT) is former
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    reset_accelerate()
    output_dir = train(data, tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert_same_weights(raw_weights(plain / "checkpoint-6"), raw_weights(output_dir / "checkpoint-6"))


def test_workers_ignore_every_signal_of_a_stop_request():
    # Of SIGUSR1 a forked worker would not die, which has its parent's handler; one that is spawned would.
    numbers = (*StopRequest.SIGNALS, signal.SIGINT)
    former = {number: signal.getsignal(number) for number in numbers}
    leave_signals_to_main_process(0)
    assert {signal.signal(number, handler) for number, handler in former.items()} == {signal.SIG_IGN}


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
    more += ("--checkpoints_total_limit", "0")
    output_dir = train(data, tmp_path / "run", *more)
    assert list(metrics(output_dir, "train/loss")) == [3, 4]
    first, second, third, last = (stored(output_dir / f"checkpoint-{step}") for step in (1, 2, 3, 4))
    assert_same_weights(first["model"], second["model"])
    assert any(not torch.equal(tensor, second["model"][name]) for name, tensor in third["model"].items())
    adam = [state["optimizer"]["state"]["output.gain"]["step"].item() for state in (second, third, last)]
    assert adam == [0, 1, 2]  # saving makes Adam's state, but no update
    assert [state["ema"]["step"] for state in (first, second, third)] == [1, 2, 3]
    rates = metrics(output_dir, "train/learning_rate")
    assert rates == pytest.approx({step: 1e-2 / step**0.5 for step in (3, 4)})
    # Not those of the scaled loss.
    assert all(norm < 2.0**10 for norm in metrics(output_dir, "train/grad_norm").values())

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


def test_non_finite_update_stops_and_no_checkpoint_holds_it(data, tmp_path):
    more = ("--learning_rate", "1e30", "--lr_scheduler", "constant", "--checkpointing_steps", "1")
    with pytest.raises(FloatingPointError, match="update 2|after update 1"):
        train(data, tmp_path / "run", *more, "--logging_steps", "100")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in raw_weights(checkpoint).values())


def test_a_loss_that_explodes_stops_the_run_though_it_is_finite(data, tmp_path, monkeypatch):
    """The first updates, in which it falls from where it started, are those of any run."""

    def loss_that_explodes(self, *args):
        terms = loss(self, *args)
        calls.append(terms)
        return {**terms, "loss": terms["loss"] * (30 if len(calls) > 130 else 1)}

    loss, calls = DDPMObjective.loss, []
    monkeypatch.setattr(DDPMObjective, "loss", loss_that_explodes)
    with pytest.raises(FloatingPointError, match="^update 150: the loss is .* a learning rate that is too high"):
        train(data, tmp_path / "run", "--max_train_steps", "200", "--checkpointing_steps", "50")
    assert (tmp_path / "run" / "non_finite" / "step-0000150" / "report.json").is_file()
    assert resolve_checkpoint("latest", tmp_path / "run").name == "checkpoint-100"


@pytest.mark.parametrize("skipped", [1, 2])
def test_non_finite_update_can_be_skipped(data, tmp_path, monkeypatch, skipped):

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
