"""Runs of the trainer that go on, from where they were left or from before; and those that must not."""

import json
import shutil
import time

import pytest
import torch
from helpers import reset_accelerate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import (
    MODEL,
    assert_same_weights,
    contents,
    damage,
    metrics,
    raw_weights,
    stored,
    train,
    weights,
)

from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel, normalize_weights_
from diffusers_mp.presets import CONFIGURATIONS
from diffusers_mp.training import (
    check_checkpoint,
    resolve_checkpoint,
)


pytestmark = pytest.mark.usefixtures("examples_run_here")


def test_resume_gives_the_weights_and_losses_of_an_uninterrupted_run(data, tmp_path, monkeypatch):
    import train_mpdit

    more = ("--logging_steps", "1", "--train_batch_size", "2", "--max_grad_norm", "0.5", "--random_flip")
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


def test_pinned_norms_are_kept_and_resumed(data, tmp_path, monkeypatch, capfd):
    import train_mpdit

    (tmp_path / "model.json").write_text(json.dumps({**MODEL, **CONFIGURATIONS["A"]}))
    options = ("--model_config_name_or_path", str(tmp_path / "model.json"), "--learning_rate", "1e-2")
    options += ("--latents_dir", str(tmp_path / "latents"), "--pin_weight_norms")
    with pytest.raises(ValueError, match="^`pin_weight_norms` must be left out for a model with `weight_normali"):
        train(data, tmp_path / "refused", "--pin_weight_norms", "row")
    assert [path.name for path in (tmp_path / "refused").iterdir()] == [".lock"]
    reset_accelerate()
    whole = train(data, tmp_path / "whole", *options, "row")
    assert "; the norm of each row is pinned" in (said := capfd.readouterr().out)
    assert "rows that were zero are free: transformer_blocks.*.attn_modulation.proj.weight (" in said
    first, last = raw_weights(whole / "checkpoint-2"), raw_weights(whole / "checkpoint-6")
    norms = stored(whole / "checkpoint-6")["pinned_norms"]
    assert {name for name in last if name not in norms} == {name for name in last if "modulation" in name} | {
        "output.proj.weight"
    }
    for name, of_weight in norms.items():
        torch.testing.assert_close(last[name].flatten(1).norm(dim=1), of_weight, rtol=4e-6, atol=0)
        assert not torch.equal(last[name], first[name]), name

    def update_and_die(self, step):
        if step == 5:
            raise KeyboardInterrupt
        update(self, step)

    update = train_mpdit.PowerFunctionEMA.update
    with monkeypatch.context() as patch:
        patch.setattr(train_mpdit.PowerFunctionEMA, "update", update_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "parts", *options, "row")
    reset_accelerate()
    with pytest.raises(ValueError, match=r"which has pin_weight_norms row \(now matrix\)"):
        train(data, tmp_path / "parts", *options, "matrix", "--resume_from_checkpoint", "latest")
    reset_accelerate()
    resumed = train(data, tmp_path / "parts", *options, "row", "--resume_from_checkpoint", "latest")
    assert_same_weights(last, raw_weights(resumed / "checkpoint-6"))


def test_tensorboard_shows_each_update_once_after_a_resume(data, tmp_path, monkeypatch):
    import train_mpdit

    more = ("--logging_steps", "1", "--report_to", "tensorboard", "--validation_steps", "3")
    more += ("--tracker_project_name", "project", "--tracker_run_name", "first")
    output_dir, update = tmp_path / "run", train_mpdit.PowerFunctionEMA.update

    def update_and_die(self, step):
        update(self, step)
        if step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_mpdit.PowerFunctionEMA, "update", update_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(data, output_dir, *more)
    reset_accelerate()
    time.sleep(1.1)  # files of events are read in the order of their names, which have the second
    train(data, output_dir, *more, "--resume_from_checkpoint", "checkpoint-2")
    assert len(list((output_dir / "logs" / "project" / "first").glob("events.*"))) == 2
    events = EventAccumulator(str(output_dir / "logs" / "project" / "first")).Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert logged == pytest.approx(metrics(output_dir, "train/loss"))
    assert [event.step for event in events.Images("validation/samples")] == [3, 6]


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
    train(data, output_dir, "--resume_from_checkpoint", "checkpoint-6")
    assert_same_weights(before, weights(output_dir / "transformer"))
    assert "| images seen | 24 |" in (output_dir / "README.md").read_text()


def test_resume_with_another_number_of_steps_keeps_the_rates(data, plain_copy):
    more = ("--logging_steps", "1", "--resume_from_checkpoint", "checkpoint-2", "--max_train_steps", "20")
    rates = metrics(train(data, plain_copy, *more, "--checkpointing_steps", "20"), "train/learning_rate")
    # Constant until update max(1, 6 // 10), then 1 / sqrt(u).
    assert rates == pytest.approx({u: 1e-2 / u**0.5 for u in range(2, 21)})


def test_another_rate_on_resume_is_applied(data, plain_copy, capfd):
    more = ("--resume_from_checkpoint", "latest", "--max_train_steps", "8", "--learning_rate", "2e-3")
    output_dir = train(data, plain_copy, *more)
    assert "Learning rate 0.01 of the checkpoint, now 0.002" in capfd.readouterr().out
    assert metrics(output_dir, "train/learning_rate")[8] == pytest.approx(2e-3 / 8**0.5)
    # Of the update that comes next.
    groups = stored(output_dir / "checkpoint-8")["optimizer"]["param_groups"]
    assert {group["name"]: group["lr"] for group in groups}["as_published"] == pytest.approx(2e-3 / 3)


def test_resume_of_another_run_is_refused(data, plain_copy):
    output_dir = plain_copy
    with pytest.raises(ValueError, match=r"seed 0 \(now 1\), total_batch_size 4 \(now 8\)"):
        train(data, output_dir, "--resume_from_checkpoint", "latest", "--seed", "1", "--total_batch_size", "8")
    with pytest.raises(ValueError, match=r"ema_stds \[0.05, 0.1\] \(now \[0.05\]\)"):
        train(data, output_dir, "--resume_from_checkpoint", "latest", "--ema_stds", "0.05")
    with pytest.raises(ValueError, match=r"lr_constant_steps 1 \(now 3\)"):
        train(data, output_dir, "--resume_from_checkpoint", "latest", "--lr_constant_steps", "3")
    before = contents(output_dir)
    with pytest.raises(ValueError, match=r"`max_train_steps` must be at least 6, the .* that .*-6 has seen, got 4"):
        train(data, output_dir, "--resume_from_checkpoint", "latest", "--max_train_steps", "4")
    assert contents(output_dir) == before
    with pytest.raises(FileNotFoundError, match=r"got 'checkpoint-3'; .* \['checkpoint-2', 'checkpoint-4'"):
        train(data, output_dir, "--resume_from_checkpoint", "checkpoint-3")


def test_other_images_on_resume_are_refused(data, plain_copy, tmp_path):
    images = shutil.copytree(data / "images", tmp_path / "images")
    content, more = (images / "dark" / "03.png").read_bytes(), ("--train_data_dir", str(images))
    (images / "dark" / "03.png").write_bytes((images / "dark" / "04.png").read_bytes())
    resume = (*more, "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match=r"03\.png is not what .*latents/shard-00000.* was made from"):
        train(data, plain_copy, *resume)
    # Encoded elsewhere they are other data all the same.
    with pytest.raises(ValueError, match=r"must go on with the run .*, which has images_sha256 .* \(now"):
        train(data, plain_copy, *resume, "--latents_dir", str(tmp_path / "latents"))
    (images / "dark" / "03.png").write_bytes(content)
    train(data, plain_copy, *resume)


def test_another_model_on_resume_is_refused(data, plain_copy, tmp_path):
    output_dir = plain_copy
    (tmp_path / "model.json").write_text(json.dumps({**MODEL, "cosine_attention": False}))
    more = ("--model_config_name_or_path", str(tmp_path / "model.json"), "--random_flip")
    with pytest.raises(ValueError, match=r"random_flip False \(now True\), model.cosine_attention True \(now False\)"):
        train(data, output_dir, "--resume_from_checkpoint", "latest", "--latents_dir", str(tmp_path / "new"), *more)


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


def test_all_checkpoints_damaged_is_no_fresh_start(data, plain_copy):
    output_dir = plain_copy
    (output_dir / "checkpoint-2" / "shards" / ".metadata").unlink()
    (output_dir / "checkpoint-4" / "training_state.json").unlink()
    (output_dir / "checkpoint-6" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="all 3 in .* are damaged"):
        train(data, output_dir, "--resume_from_checkpoint", "latest")


def test_latest_is_no_fresh_start_in_the_folder_of_a_run_that_has_ended(data, plain_copy):
    output_dir = plain_copy
    for checkpoint in output_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = contents(output_dir)
    with pytest.raises(ValueError, match=r"`--resume_from_checkpoint latest` must .* has its pipeline .* but no"):
        train(data, output_dir, "--resume_from_checkpoint", "latest")
    assert contents(output_dir) == before


def test_latest_is_no_fresh_start_where_checkpoints_are_gone(data, plain_copy):
    output_dir = plain_copy
    (output_dir / "model_index.json").unlink()
    for checkpoint in output_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = contents(output_dir)
    with pytest.raises(ValueError, match="must find a checkpoint where a run has come to update 6: .* but no check"):
        train(data, output_dir, "--resume_from_checkpoint", "latest")
    assert contents(output_dir) == before


def test_latest_is_a_fresh_start_before_the_first_checkpoint(data, tmp_path, capfd):
    more = ("--resume_from_checkpoint", "latest", "--logging_steps", "1", "--max_train_steps", "3")
    output_dir = train(data, tmp_path / "run", *more, "--checkpointing_steps", "5000")
    assert f"No checkpoint in {output_dir} yet, starting from the beginning" in capfd.readouterr().out
    # What a kill leaves: a log, and the arguments.
    (output_dir / "model_index.json").unlink()
    shutil.rmtree(output_dir / "checkpoint-3")
    train(data, output_dir, *more, "--checkpointing_steps", "1")
    assert check_checkpoint(output_dir / "checkpoint-1") is None


def test_checkpoints_total_limit(data, tmp_path):
    output_dir = train(data, tmp_path / "run", "--checkpoints_total_limit", "2")
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


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


@pytest.mark.parametrize("name", ["README.md", "training_curve.png", "samples"])
def test_a_folder_of_the_user_is_not_taken_for_that_of_a_run(data, plain, tmp_path, name):
    (tmp_path / "latents").mkdir()
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    for checkpoint in ("latest", str(plain / "checkpoint-4")):
        with pytest.raises(
            ValueError, match=f"the folder of a run or in an empty one: .* has {name} but no training_ar"
        ):
            train(data, tmp_path, "--resume_from_checkpoint", checkpoint)
        assert {path: content for path, content in contents(tmp_path).items() if path.name != ".lock"} == before
