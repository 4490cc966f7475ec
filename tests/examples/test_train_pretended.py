"""The whole trainer on the device of pretended_device.py: the CPU's run, no mix of devices, no wait unheard of."""

import json
from collections import Counter

import pytest
from processes import ROOT, run_python
from training_runs import arguments, assert_same_weights, metrics, stored, weights


# Sums on both devices differ in their last bits, which Adam makes large where gradients are none.
FLAGS = ["--adam_epsilon", "1e-2", "--train_batch_size", "2", "--max_grad_norm", "1", "--logging_steps", "2"]
FLAGS += ["--validation_steps", "3", "--record_magnitudes_steps", "3", "--norm_watch_steps", "3"]
# With the weights of the VAE and of the model: 148 and 18.
TIMES = {"start": 1, "log": 3, "record": 3, "look": 3, "checkpoint": 3, "validation": 2, "average": 4}
SAMPLING, MOVED = "diffusers_mp/pipeline_mpdit.py", "torch/nn/modules/module.py:convert"
# Where the host waits, and how often for each of what comes so often.
WAITS = {
    # All numbers at once: of an entry of the log, of a record, of a look and of the norms to compare with.
    "read diffusers_mp/training/progress.py:log": {"log": 1},
    "read diffusers_mp/diagnostics/magnitudes.py:fetch": {"record": 1, "look": 1, "start": 1},
    # Whether the update that is recorded is made.
    "read diffusers_mp/diagnostics/recorder.py:_before_update": {"record": 1},
    # Before a checkpoint is written, each weight is looked at, and all rows are.
    "read diffusers_mp/training/trace.py:is_finite": {"checkpoint": 18},
    "read diffusers_mp/training/watchdog.py:all_finite": {"checkpoint": 1},
    "copy diffusers_mp/training/watchdog.py:all_finite": {"checkpoint": 1},
    "read diffusers_mp/rows.py:_before_reading_": {"checkpoint": 1},
    # An average goes into the model of the pipeline, which is on the CPU, and this to the device and back.
    "read diffusers_mp/averages/ema.py:_copy_each": {"average": 18},
    f"copy diffusers_mp/training/preview.py:validate > {MOVED}": {"validation": 148 + 18},
    f"read diffusers_mp/training/preview.py:validate > {MOVED}": {"validation": 148 + 18},
    # Three batches at eight noise levels, and one of samples.
    "copy diffusers_mp/training/validation.py:validation_losses": {"validation": 3},
    "read diffusers_mp/training/validation.py:validation_losses": {"validation": 1},
    "copy diffusers_mp/call_inputs.py:conditions": {"validation": 1},
    f"copy {SAMPLING}:prepare_latents > diffusers/utils/torch_utils.py:randn_tensor": {"validation": 1},
    f"copy {SAMPLING}:decode_latents": {"validation": 2},
    f"read {SAMPLING}:__call__ > diffusers/image_processor.py:pt_to_numpy": {"validation": 1},
    # The VAE, which encodes all images in one batch and is hashed; the model; tables of noise levels.
    f"copy examples/train_mpdit.py:load_latents > {MOVED}": {"start": 148},
    f"read examples/train_mpdit.py:load_latents > {MOVED}": {"start": 148},
    "read diffusers_mp/files.py:sha256_of_weights": {"start": 148},
    "read diffusers_mp/data/shards.py:_fetched": {"start": 4},
    f"copy examples/train_mpdit.py:set_up > {MOVED}": {"start": 18},
    "copy diffusers_mp/training/objectives.py:add_noise > diffusers/schedulers/scheduling_ddpm.py:add_noise": {
        "start": 1
    },
    "copy diffusers_mp/training/objectives.py:_table_rows": {"start": 1},
}
RUN = """
import json, os, shutil, sys
from pathlib import Path

folders, calls, found = map(json.loads, sys.argv[1:])
sys.path[:0] = folders
import pretended_device
pretended_device.set_up()
import train_mpdit
from helpers import reset_accelerate

update_weights = train_mpdit.update_weights
train_mpdit.update_weights = lambda *of_run: (pretended_device.mark(), update_weights(*of_run))[1]
waits = []
for device, arguments in calls:
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    if "--resume_from_checkpoint" in arguments:
        shutil.copytree(Path(found).parent / "gpu", Path(found).parent / "resumed")
    train_mpdit.main(train_mpdit.parse_args(arguments))
    reset_accelerate()
    pretended_device.mark()
    waits.append(pretended_device.marks[:])
    pretended_device.marks.clear()
Path(found).write_text(json.dumps(waits))
"""


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folders of a run on the CPU, one on the device, and one that went on there from a checkpoint of the latter."""
    folder = tmp_path_factory.mktemp("runs")
    calls = [(device, arguments(data, folder / device, *FLAGS)) for device in ("cpu", "gpu")]
    resumed = arguments(data, folder / "resumed", *FLAGS, "--resume_from_checkpoint", "checkpoint-4")
    calls.append(("gpu", resumed))
    folders = [str(ROOT / "tests"), str(ROOT / "examples")]
    run_python(RUN, *map(json.dumps, (folders, calls, str(folder / "waits.json"))))
    return folder


def test_the_run_is_that_of_the_cpu(runs):
    expected = weights(runs / "cpu" / "transformer")
    for name, tensor in weights(runs / "gpu" / "transformer").items():
        assert (tensor - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    for name in ("train/loss", "train/grad_norm", "validation/loss", "magnitude/weights/output.modulation"):
        assert metrics(runs / "gpu", name) == pytest.approx(metrics(runs / "cpu", name), rel=1e-4), name


def test_the_host_waits_where_it_is_said_to(runs):
    _, marks, _ = json.loads((runs / "waits.json").read_text())
    expected = Counter({place: sum(TIMES[what] * n for what, n in each.items()) for place, each in WAITS.items()})
    found = sum(map(Counter, marks), Counter())
    assert dict(found - expected) == {}  # nobody knows of these
    assert dict(expected - found) == {}  # these are said to be, and are not
    assert marks[5] == {}  # an update with nothing else due


def test_a_resumed_run_is_the_same_run(runs):
    assert metrics(runs / "resumed", "train/loss") == metrics(runs / "gpu", "train/loss")
    assert (runs / "resumed" / "checkpoint-6.abandoned").exists()  # was made anew
    ours, theirs = (stored(runs / name / "checkpoint-6") for name in ("resumed", "gpu"))
    assert_same_weights(ours["model"], theirs["model"])
    assert_same_weights(weights(runs / "resumed" / "transformer"), weights(runs / "gpu" / "transformer"))
