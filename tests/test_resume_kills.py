"""A run killed again and again, at random moments and in the middle of saving, is the run that never was.

The trainer is imported once and forked for each try, so that a try costs no start-up; children get SIGKILL.
"""

import json
import math
import subprocess
import sys

import pytest
from test_train_mpdit import (  # noqa: F401
    EXAMPLES,
    arguments,
    assert_same_weights,
    data,
    metrics,
    raw_weights,
    train,
    weights,
)

from diffusers_mp.snapshots import find_snapshots


pytestmark = pytest.mark.usefixtures("examples_run_here")


OPTIONS = [
    *("--checkpointing_steps", "4", "--logging_steps", "3", "--checkpoints_total_limit", "2"),
    *("--train_batch_size", "3", "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2"),
    *("--max_grad_norm", "0.5", "--num_validation_images", "5", "--validation_steps", "40", "--random_flip"),
    # Some snapshots fall on a checkpoint, others between two.
    *("--ema_snapshot_steps", "6"),
]

# argv: number of kills, seed, the trainer's arguments. Prints JSON: how many kills, how many of them while saving.
HARNESS = """
import contextlib, os, random, signal, sys, time
sys.path.insert(0, {examples!r})
import torch, train_mpdit, training_arguments
from pathlib import Path

torch.set_num_threads(1)

num_kills, seed, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
output_dir = Path(argv[argv.index("--output_dir") + 1])
rng = random.Random(seed)
kills = while_saving = tries = 0

def unfinished():
    # A checkpoint or a snapshot, and when it was last written to: what an earlier kill has left is no save.
    found = set()
    for path in [*output_dir.glob("*.unfinished"), *output_dir.glob("ema_snapshots/*.unfinished")]:
        with contextlib.suppress(FileNotFoundError):
            found.add((path, path.stat().st_ctime_ns))
    return found

while True:
    left = unfinished()
    child = os.fork()
    if child == 0:
        log = os.open(str(output_dir) + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        train_mpdit.main(training_arguments.parse_args([*argv, "--resume_from_checkpoint", "latest"]))
        os._exit(0)
    tries += 1
    if kills < num_kills:
        deadline, at_save = time.monotonic() + rng.uniform(0.1, 0.8), kills % 2 == 1
        # A save is waited for, however slow the machine is; not always the first one.
        while time.monotonic() < deadline + 60 * at_save and os.waitpid(child, os.WNOHANG) == (0, 0):
            if at_save and time.monotonic() > deadline - 0.4 and unfinished() - left:
                time.sleep(rng.uniform(0, 0.005))
                break
            time.sleep(0.001)
        try:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            raise SystemExit("the run ended before it could be killed often enough")
        if os.WIFSIGNALED(status):
            kills += 1
            while_saving += bool(unfinished() - left)
    else:
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit("the run failed, see its log: " + open(str(output_dir) + ".log").read()[-3000:])
        print('{{"kills": %d, "while_saving": %d}}' % (kills, while_saving))
        break
"""


def run(data, output_dir, num_steps, num_kills, seed=0):  # noqa: F811
    program = HARNESS.format(examples=str(EXAMPLES))
    argv = arguments(data, output_dir, *OPTIONS, "--max_train_steps", str(num_steps))
    command = [sys.executable, "-c", program, str(num_kills), str(seed), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def contents(folder):
    """Files by name: what JSON says, the order of whose keys is that of a set, and what others are."""
    return {
        path.relative_to(folder): json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("num_steps, num_kills", [(240, 4), pytest.param(1500, 24, marks=pytest.mark.slow)])
def test_killed_run_is_the_uninterrupted_one(data, tmp_path, num_steps, num_kills):  # noqa: F811
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(data, whole, *OPTIONS, "--max_train_steps", str(num_steps))
    report = run(data, killed, num_steps, num_kills)
    print(report)
    assert report["kills"] == num_kills
    assert report["while_saving"] > 0 or num_kills < 20
    assert metrics(killed, "train/loss") == metrics(whole, "train/loss")
    assert metrics(killed, "validation/loss") == metrics(whole, "validation/loss")
    last = f"checkpoint-{num_steps}"
    assert_same_weights(raw_weights(killed / last), raw_weights(whole / last))
    for part in ("transformer", "transformer_ema_0.1"):
        assert_same_weights(weights(killed / part), weights(whole / part))
    # Snapshots: none lost, none left over, each the same.
    assert contents(killed / "ema_snapshots") == contents(whole / "ema_snapshots")
    assert len(find_snapshots(killed / "ema_snapshots")) == 2 * math.ceil(num_steps / 6)
    assert not list(killed.rglob("*.unfinished"))
