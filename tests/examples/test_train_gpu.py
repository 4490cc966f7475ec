"""Whole tiny runs of the trainer on a GPU; skipped without one, and unproven until a run says so."""

import shutil
import subprocess
import sys

import pytest
import torch
from helpers import EXAMPLES, vector
from training_runs import arguments, metrics, train, weights

from diffusers_mp import MPDiTPipeline


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("examples_run_here"),
]

# A fixed adam_epsilon above the gradient: the sign of a gradient of rounding errors must not decide.
OPTIONS = ["--adam_epsilon", "1e-2", "--max_grad_norm", "0.5", "--validation_steps", "3", "--logging_steps", "1"]
OPTIONS += ["--no-compile"]  # one case compiles, as it is by default
FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
FSDP2 += ["--fsdp_transformer_layer_cls_to_wrap", "MPDiTTransformerBlock", "--fsdp_reshard_after_forward", "true"]


@pytest.fixture
def on_cpu(data, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setenv("ACCELERATE_USE_CPU", "1")
        return train(data, tmp_path / "cpu", *OPTIONS)


def assert_same_run(actual, expected, tolerance):
    losses = metrics(expected, "train/loss")
    assert len(losses) == 6
    assert metrics(actual, "train/loss") == pytest.approx(losses, rel=tolerance)
    assert metrics(actual, "validation/loss") == pytest.approx(metrics(expected, "validation/loss"), rel=tolerance)
    actual, expected = (vector(weights(folder / "transformer")) for folder in (actual, expected))
    assert (actual - expected).norm() < tolerance * expected.norm()


# Dynamo asks each input of a block for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "precision, tolerance, more", [("no", 1e-3, []), ("bf16", 0.05, []), ("bf16", 0.05, ["--compile"])]
)
def test_a_run_is_that_of_the_cpu(data, on_cpu, tmp_path, precision, tolerance, more):
    run = train(data, tmp_path / "gpu", *OPTIONS, "--mixed_precision", precision, *more)
    assert torch.cuda.max_memory_allocated() > 0
    assert_same_run(run, on_cpu, tolerance)
    pipe = MPDiTPipeline.from_pretrained(run).to("cuda")
    assert len(pipe([0, 1], num_inference_steps=2).images) == 2


def test_a_run_goes_on_where_it_was_stopped(data, tmp_path):
    whole, run = train(data, tmp_path / "whole", *OPTIONS), tmp_path / "run"
    shutil.copytree(whole, run)
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(run / name)
    train(data, run, *OPTIONS, "--resume_from_checkpoint", "latest")
    # The order of sums is the kernels' own.
    assert_same_run(run, whole, 1e-4)


def test_fsdp2_in_one_process(data, on_cpu, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", *FSDP2, str(EXAMPLES / "train_mpdit.py")]
    command = [*launcher, *arguments(data, tmp_path / "sharded", *OPTIONS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "sharded", on_cpu, 1e-3)
