"""Snapshots that the trainer leaves: killed, resumed, every few updates."""

import json
import shutil

import numpy as np
import pytest
from helpers import reset_accelerate
from PIL import Image
from training_runs import MODEL, assert_same_weights, stored, weights

from diffusers_mp import MPDiTPipeline, PowerFunctionEMA, reconstruct_ema
from diffusers_mp.averages.snapshots import find_snapshots


pytestmark = pytest.mark.usefixtures("examples_run_here")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Twelve images of two classes, encoded by the first run, and the config of a model."""
    folder, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for index in range(12):
        of_class = folder / "images" / str(index % 2)
        of_class.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(of_class / f"{index}.png")
    (folder / "model.json").write_text(json.dumps(MODEL))
    return folder


@pytest.fixture
def train(sources):
    def train(output_dir, *more):
        import train_mpdit

        arguments = [
            *("--train_data_dir", str(sources / "images"), "--vae", "none", "--image_channels", "1"),
            *("--latents_dir", str(sources / "latents"), "--cache_dir", str(sources / "cache")),
            *("--model_config_name_or_path", str(sources / "model.json"), "--resolution", "8"),
            *("--total_batch_size", "2", "--max_train_steps", "8", "--checkpointing_steps", "4"),
            *("--validation_steps", "0", "--num_validation_images", "0", "--ema_snapshot_steps", "2"),
            *("--output_dir", str(output_dir), *more),
        ]
        train_mpdit.main(train_mpdit.parse_args(arguments))
        reset_accelerate()
        return output_dir

    return train


def records(output_dir):
    snapshots = find_snapshots(output_dir / "ema_snapshots")
    return {snapshot.path.name: json.loads((snapshot.path / "snapshot.json").read_text()) for snapshot in snapshots}


def test_run_leaves_snapshots_that_become_a_pipeline(train, tmp_path):
    output_dir = train(tmp_path / "run", "--ema_stds", "0.05", "0.1", "0.2")
    steps = [snapshot.step for snapshot in find_snapshots(output_dir / "ema_snapshots")]
    assert steps == [2, 2, 2, 4, 4, 4, 6, 6, 6, 8, 8, 8]
    checkpoint = stored(output_dir / "checkpoint-8")["ema"]["averages"][2]
    assert_same_weights(weights(output_dir / "ema_snapshots" / "step-0000008_std-0.2"), checkpoint)
    reconstruct_ema(output_dir / "ema_snapshots", tmp_path / "rebuilt", 0.15)
    pipe = MPDiTPipeline.from_pretrained(tmp_path / "rebuilt")
    assert pipe.id2label == {0: "0", 1: "1"}
    assert pipe.config.latents_std is not None
    assert len(pipe([0, "1"], num_inference_steps=2).images) == 2


@pytest.mark.parametrize("killed_at", [3, 7])
def test_a_resumed_run_leaves_the_same_snapshots(train, tmp_path, monkeypatch, killed_at):
    def die_at(step_of_death):
        update = PowerFunctionEMA.update

        def die(self, step):
            update(self, step)
            if step == step_of_death:
                raise KeyboardInterrupt

        return die

    with monkeypatch.context() as patch:
        patch.setattr(PowerFunctionEMA, "update", die_at(killed_at))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts")
    reset_accelerate()
    left = max(snapshot.step for snapshot in find_snapshots(tmp_path / "parts" / "ema_snapshots"))
    assert left == killed_at - 1
    # What lies past the point of resuming goes, even if the rest of the run never comes by it again.
    resumed = train(tmp_path / "parts", "--resume_from_checkpoint", "latest", "--ema_snapshot_steps", "4")
    beyond = [name for name in records(resumed) if name.startswith(f"step-000000{left}")]
    assert not beyond
    shutil.rmtree(tmp_path / "parts" / "checkpoint-8")
    if killed_at > 4:
        resumed = train(tmp_path / "parts", "--resume_from_checkpoint", "checkpoint-4")
        whole = records(train(tmp_path / "whole"))
        assert len(whole) == 8
        assert records(resumed) == whole


def test_a_kill_during_a_checkpoint_loses_no_snapshot_of_its_step(train, tmp_path, monkeypatch):
    import train_mpdit

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_mpdit, "save_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run")
    # Whoever has the checkpoint has its snapshots.
    assert [snapshot.step for snapshot in find_snapshots(tmp_path / "run" / "ema_snapshots")] == [2, 2, 4, 4]


def test_averages_move_every_few_updates(train, tmp_path, monkeypatch):
    steps, update = [], PowerFunctionEMA.update

    def note(self, step):
        steps.append(step)
        update(self, step)

    monkeypatch.setattr(PowerFunctionEMA, "update", note)
    train(tmp_path / "run", "--ema_update_steps", "2", "--ema_snapshot_steps", "4", "--max_train_steps", "7")
    assert steps == [2, 4, 6]
    # The last ones are named by what they have seen.
    assert list(records(tmp_path / "run")) == [
        f"step-000000{step}_std-{std}" for step in (4, 6) for std in (0.05, 0.1)
    ]


@pytest.mark.parametrize(
    "more, message",
    [
        (("--ema_update_steps", "0"), "must be at least 1, got 0"),
        (("--ema_snapshot_steps", "-2"), "--ema_snapshot_steps: must be at least 0, got -2"),
        (
            ("--ema_update_steps", "3"),
            "--ema_snapshot_steps must be a multiple of --ema_update_steps (3) or 0, got 2",
        ),
    ],
)
def test_arguments(train, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", *more)
    assert message in capsys.readouterr().err
