"""A run killed again and again, at random moments and in the middle of saving, is the run that never was.

The trainer is imported once and forked for each try, so that a try costs no start-up. Moments are counted in updates,
CPU time and operations on files, so that the speed of a machine decides nothing.
"""

import json
import math

import pytest
from helpers import EXAMPLES
from processes import run_python
from training_runs import arguments, assert_same_weights, metrics, raw_weights, train, weights

from diffusers_mp.averages.snapshots import find_snapshots


pytestmark = pytest.mark.usefixtures("examples_run_here")


OPTIONS = [
    *("--checkpointing_steps", "4", "--logging_steps", "3", "--checkpoints_total_limit", "2"),
    *("--total_batch_size", "6", "--train_batch_size", "3", "--dataloader_num_workers", "2"),
    *("--max_grad_norm", "0.5", "--num_validation_images", "5", "--random_flip"),
    # Some snapshots fall on a checkpoint, others between two.
    *("--ema_snapshot_steps", "6"),
]

# argv: number of kills, the most updates between them, seed, the trainer's arguments.
# Prints JSON: how many kills, how many of them while saving.
HARNESS = f"""
import json, multiprocessing, os, random, signal, sys
# As in a process of its own: workers of another server would not see that their trainer was killed, and stay.
multiprocessing.set_start_method("fork", force=True)
sys.path.insert(0, {str(EXAMPLES)!r})
import torch, train_mpdit
from pathlib import Path

torch.set_num_threads(1)

(num_kills, most_updates, seed), argv = map(int, sys.argv[1:4]), sys.argv[4:]
output_dir = Path(argv[argv.index("--output_dir") + 1])
rng = random.Random(seed)
left = {{"updates": None, "operations": None}}
update = train_mpdit.PowerFunctionEMA.update

def update_and_arm(self, step):
    update(self, step)
    count_update()

def count_update():
    if left["updates"] == 0:
        arm()
    if left["updates"] is not None:
        left["updates"] -= 1

def arm():
    if at_save:
        left["operations"] = operations
    else:
        # SIGPROF, which nobody handles, ends the process as SIGKILL does, in the middle of whatever it computes.
        signal.setitimer(signal.ITIMER_PROF, seconds)

def count_operation(event, arguments):
    # Before a file of what is not yet a checkpoint, a snapshot or a log is opened, or it is renamed to become one.
    if left["operations"] is not None and event in ("open", "os.rename", "os.mkdir"):
        path = Path(os.fsdecode(arguments[0])) if isinstance(arguments[0], (str, bytes, os.PathLike)) else Path()
        folders = [folder for folder in (path, *path.parents) if folder.name.endswith(".unfinished")]
        if folders and output_dir in path.parents:
            left["operations"] -= 1
            # Not where there is nothing yet that could be left over.
            if left["operations"] < 0 and folders[0].exists():
                os.kill(os.getpid(), signal.SIGKILL)

train_mpdit.PowerFunctionEMA.update = update_and_arm
kills = while_saving = 0
while True:
    at_save, last = kills % 2 == 1, kills == num_kills
    # Not always the first save: those of a few updates come before it.
    updates, operations = rng.randint(0, most_updates), rng.randint(0, 8)
    seconds = rng.uniform(0.001, 0.01 if updates else 0.4)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        log = os.open(str(output_dir) + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if not last:
            sys.addaudithook(count_operation)
            left["updates"] = updates
            if updates == 0:
                count_update()
        train_mpdit.main(train_mpdit.parse_args([*argv, "--resume_from_checkpoint", "latest"]))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if last:
        break
    if not os.WIFSIGNALED(status):
        raise SystemExit("not killed, see its log: " + open(str(output_dir) + ".log").read()[-3000:])
    kills += 1
    while_saving += os.WTERMSIG(status) == signal.SIGKILL and any(output_dir.rglob("*.unfinished"))
if status:
    raise SystemExit("the run failed, see its log: " + open(str(output_dir) + ".log").read()[-3000:])
print(json.dumps({{"kills": kills, "while_saving": while_saving}}))
"""


def run(argv, num_kills, most_updates, seed=0):
    return json.loads(run_python(HARNESS, num_kills, most_updates, seed, *argv).splitlines()[-1])


def contents(folder):
    """Files by name: what JSON says, the order of whose keys is that of a set, and what others are."""
    return {
        path.relative_to(folder): json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "num_steps, num_kills, validation_steps", [(60, 4, 20), pytest.param(1500, 24, 40, marks=pytest.mark.slow)]
)
def test_killed_run_is_the_uninterrupted_one(data, tmp_path, num_steps, num_kills, validation_steps):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = (*OPTIONS, "--max_train_steps", str(num_steps), "--validation_steps", str(validation_steps))
    train(data, whole, *more)
    report = run(arguments(data, killed, *more), num_kills, num_steps // num_kills // 2)
    assert report == {"kills": num_kills, "while_saving": num_kills // 2}
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
