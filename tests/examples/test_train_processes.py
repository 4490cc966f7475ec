"""The trainer in several processes, under the engines that a launcher can ask for, and beside another trainer."""

import json
import os
import platform
import re
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from helpers import EXAMPLES, reset_accelerate
from processes import run_processes, run_python
from training_runs import arguments, assert_same_weights, contents, metrics, raw_weights, train, weights

from diffusers_mp import MPDiTPipeline
from diffusers_mp.training import (
    check_checkpoint,
)


pytestmark = pytest.mark.usefixtures("examples_run_here")


# argv: a script, and JSON of the arguments of each run. The group of processes outlives the runs. Checkpoints that a
# process reads to their end, to compare them with their manifest, are noted in a file of its own.
RUNS = """
import json, os, runpy, sys
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers_mp.training import checkpoints

check_checkpoint = checkpoints.check_checkpoint
def check_and_note(checkpoint):
    with open(os.path.join(os.path.dirname(__file__), f"checked-by-{os.environ['RANK']}"), "a") as file:
        print(checkpoint.name, file=file)
    return check_checkpoint(checkpoint)
checkpoints.check_checkpoint = check_and_note

PartialState.destroy_process_group = lambda self, group=None: None
script, *runs = sys.argv[1:]
for argv in runs:
    sys.argv = [script, *json.loads(argv)]
    runpy.run_path(script, run_name="__main__")
    AcceleratorState._reset_state()
    GradientState._reset_state()
dist.barrier()
# gloo's threads now and then abort the process while it is torn down.
os._exit(0)
"""


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """Runs of two processes, DDP over gloo on the CPU: one from its beginning, one that has begun as one process.

    `accelerate launch` starts several processes on accelerators only; torchrun starts them on the CPU.
    """
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(RUNS)
    more = ("--adam_epsilon", "1e-2")
    begun = ("--max_train_steps", "4", "--adam_epsilon", "1e-2")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        train(data, folder / "resumed", *begun)
    runs = [
        arguments(data, folder / "whole", *more, "--validation_steps", "3"),
        arguments(data, folder / "resumed", *more, "--resume_from_checkpoint", "latest"),
    ]
    printed = run_processes(folder / "script.py", EXAMPLES / "train_mpdit.py", *map(json.dumps, runs))
    (folder / "printed.txt").write_text(printed)
    return folder


@pytest.mark.parametrize("run", ["whole", "resumed"])
def test_two_processes_are_the_same_run(coarse, two, run):
    """The global batch, hence the run, is that of one process up to the rounding of sums."""
    first, second = (raw_weights(folder / "checkpoint-6") for folder in (coarse, two / run))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-5), name
    assert MPDiTPipeline.from_pretrained(two / run).id2label == {0: "dark", 1: "light"}
    of_one, of_two = (metrics(folder, "train/loss") for folder in (coarse, two / run))
    assert list(of_one) == [2, 4, 6]
    assert of_two == pytest.approx(of_one, abs=1e-5)


def test_one_process_reads_the_checkpoint_to_its_end(two):
    assert (two / "checked-by-0").read_text() == "checkpoint-4\n"
    assert not (two / "checked-by-1").exists()


def test_two_processes_say_it_once(two):
    rows = re.findall(r"^(device|batch|updates) +(.*)$", (two / "printed.txt").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == ["device", "batch", "updates"] * 2
    batch = "4 images an update = 2 x 2 processes x 1 accumulated"
    assert [value for name, value in rows if name == "batch"] == [batch] * 2
    assert all(value.endswith("float32, 2 processes (DDP)") for name, value in rows if name == "device")
    assert "from update 4" in rows[-1][1]


# argv: the trainer's arguments. The sender has to be another process: PyTorch's workers take SIGTERM from their parent
# for the end of their work.
SIGNAL_TO_THE_GROUP = f"""
import multiprocessing, os, signal, subprocess, sys, time
# As in a process of its own, which leads a group, and whose workers have its handlers.
multiprocessing.set_start_method("fork", force=True)
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in the foreground
sys.path.insert(0, {str(EXAMPLES)!r})
import torch
torch.set_num_threads(1)
import train_mpdit

update = train_mpdit.PowerFunctionEMA.update
def update_and_signal(self, step):
    update(self, step)
    if step == 3:
        subprocess.run(["sh", "-c", "kill -s " + sys.argv[1][3:] + " 0"])
        time.sleep(0.5)  # word of a dead worker comes within
train_mpdit.PowerFunctionEMA.update = update_and_signal
train_mpdit.main(train_mpdit.parse_args(sys.argv[2:]))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_to_all_processes_of_a_group_does_not_end_the_workers(data, tmp_path, name):
    """As a cluster's scheduler sends it to all processes of a job, and a terminal to those in the foreground."""
    argv = arguments(data, tmp_path / "run", "--checkpointing_steps", "100", "--dataloader_num_workers", "2")
    assert f"{name}: stopped after update 3" in run_python(SIGNAL_TO_THE_GROUP, name, *argv)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


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
    more = ("--validation_steps", "2")
    printed = run_processes(tmp_path / "script.py", *arguments(data, tmp_path / "run", *more))
    assert "Validation failed after update 2, whose checkpoint is saved" in printed
    assert "no memory for 10 images\n" in printed
    assert "validation failed on the main process\n" in printed
    assert check_checkpoint(tmp_path / "run" / "checkpoint-2") is None


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
        with pytest.raises(AssertionError, match="error: --output_dir must be a folder"):
            run_processes(EXAMPLES / "train_mpdit.py", *arguments(data, output_dir))
        holder.kill()
    assert [path.name for path in output_dir.iterdir()] == [".lock"]


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


NOT_FOUND = "launched as 2 processes, but Accelerate runs 1"


def test_processes_that_did_not_find_each_other_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=NOT_FOUND):
        train(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_launcher_for_gpus_without_any_is_refused(data, tmp_path):
    script = str(EXAMPLES / "train_mpdit.py")
    done = accelerate_launch("--num_processes", "2", "--multi_gpu", script, *arguments(data, tmp_path / "run"))
    assert done.returncode != 0
    assert NOT_FOUND in done.stderr
    assert not (tmp_path / "run").exists()


def test_accumulation_that_the_environment_changes_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with pytest.raises(RuntimeError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set .* to 3: unset"):
        train(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_half_precision_that_accelerate_leaves_out_is_refused(data, tmp_path):
    with pytest.raises(RuntimeError, match="`--mixed_precision fp16` was asked for, .* on this device"):
        train(data, tmp_path / "run", "--mixed_precision", "fp16")


def test_fp8_of_the_launcher_is_refused(data, tmp_path, monkeypatch):
    # Accelerate itself wants a GPU's library for it.
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp8"))
    with pytest.raises(RuntimeError, match="fp8 was asked for, .* other linear maps in the place of those with unit"):
        train(data, tmp_path / "run")
