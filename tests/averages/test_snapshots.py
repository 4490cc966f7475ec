"""Snapshots of averages: what is in them, and what a kill or another run leaves of them."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from helpers import small_run, tiny_model, tiny_vae, vector
from training_runs import contents, weights

from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel, PowerFunctionEMA
from diffusers_mp.averages.snapshots import discard_snapshots_after, find_snapshots, save_snapshots


def test_a_snapshot_is_the_average_in_a_folder_that_diffusers_loads(tmp_path):
    ema, pipeline = small_run(tmp_path, num_steps=2, vae=tiny_vae(), stds=(0.05, 0.123456789))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model_index.json",
        "scheduler",
        *(f"step-000000{step}_std-{std}" for step in (1, 2) for std in (0.05, 0.123456789)),
        "vae",
    ]
    (_, _, _, last) = find_snapshots(tmp_path)
    assert (last.step, last.std) == (2, 0.123456789)
    stored, average = weights(last.path), ema.state_dict()["averages"][1]
    assert stored.keys() == average.keys()
    assert all(torch.equal(stored[name], average[name]) and stored[name].dtype == torch.float32 for name in stored)
    # The folder beside completes it to a pipeline.
    transformer = MPDiTTransformer2DModel.from_pretrained(last.path)
    pipe = MPDiTPipeline.from_pretrained(tmp_path, transformer=transformer)
    assert torch.equal(vector(pipe.transformer.state_dict()), vector(average))
    assert pipe.config.latents_mean == [0.5] * 4
    assert torch.equal(vector(pipe.vae.state_dict()), vector(pipeline.vae.state_dict()))


def test_a_bf16_model_leaves_float32_snapshots(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    ema = PowerFunctionEMA(model)
    ema.update(1)
    save_snapshots(ema, tmp_path, MPDiTPipeline(model, DDPMScheduler()))
    assert {tensor.dtype for tensor in weights(tmp_path / "step-0000001_std-0.05").values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of torch itself
def test_a_compiled_transformer_is_saved_as_what_it_is(tmp_path):
    model = tiny_model()
    ema = PowerFunctionEMA(model)
    ema.update(1)
    (folder, _) = save_snapshots(ema, tmp_path, MPDiTPipeline(torch.compile(model), DDPMScheduler()))
    assert type(MPDiTTransformer2DModel.from_pretrained(folder)) is MPDiTTransformer2DModel


def test_discarding_and_saving_again_leaves_what_an_uninterrupted_run_leaves(tmp_path):
    ema, pipeline = small_run(tmp_path, num_steps=3)
    wanted = {
        snapshot.path.name: (snapshot.path / "snapshot.json").read_text() for snapshot in find_snapshots(tmp_path)
    }
    unfinished = tmp_path / "step-0000004_std-0.05.unfinished"
    unfinished.mkdir()
    assert len(find_snapshots(tmp_path)) == 6
    discard_snapshots_after(tmp_path, 2)
    assert not unfinished.exists()
    assert [snapshot.step for snapshot in find_snapshots(tmp_path)] == [1, 1, 2, 2]
    save_snapshots(ema, tmp_path, pipeline)
    save_snapshots(ema, tmp_path, pipeline)
    assert wanted == {
        snapshot.path.name: (snapshot.path / "snapshot.json").read_text() for snapshot in find_snapshots(tmp_path)
    }
    assert not list(tmp_path.glob("*.unfinished"))
    discard_snapshots_after(tmp_path, 0)
    assert not tmp_path.exists()
    discard_snapshots_after(tmp_path, 0)


def test_a_kill_while_saving_leaves_no_snapshot(tmp_path, monkeypatch):
    ema, pipeline = small_run(tmp_path, num_steps=1)
    ema.update(2)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers_mp.averages.snapshots.sha256_of_file", die)
    with pytest.raises(KeyboardInterrupt):
        save_snapshots(ema, tmp_path, pipeline)
    assert [snapshot.step for snapshot in find_snapshots(tmp_path)] == [1, 1]
    # Of the pipeline's parts, the index comes last.
    monkeypatch.setattr(DDPMScheduler, "save_pretrained", die)
    with pytest.raises(KeyboardInterrupt):
        save_snapshots(ema, tmp_path / "new", pipeline)
    assert not (tmp_path / "new" / "model_index.json").exists()
    monkeypatch.undo()
    save_snapshots(ema, tmp_path / "new", pipeline)
    assert MPDiTPipeline.from_pretrained(tmp_path / "new", transformer=ema.model).scheduler is not None


def test_discarding_removes_nothing_that_saving_has_not_written(tmp_path):
    model = tiny_model()
    ema, pipeline = PowerFunctionEMA(model), MPDiTPipeline(model, DDPMScheduler())
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "state.pt").write_text("weeks of work")
    ema.update(1000)
    save_snapshots(ema, tmp_path, pipeline)
    discard_snapshots_after(tmp_path, 500)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoint-500", "state.pt"]
    # The pipeline of a run, taken for the folder of its snapshots.
    pipeline.save_pretrained(tmp_path / "run")
    files = sorted(tmp_path.rglob("*"))
    discard_snapshots_after(tmp_path / "run", 0)
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("is_absolute", [True, False])
def test_an_index_that_names_other_folders_is_refused_and_nothing_removed(is_absolute, tmp_path):
    snapshots = tmp_path / "ema_snapshots"
    small_run(snapshots, num_steps=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    index = json.loads((snapshots / "model_index.json").read_text())
    hostile = str(tmp_path / "mine") if is_absolute else "../mine"
    (snapshots / "model_index.json").write_text(json.dumps(index | {hostile: ["diffusers", "DDPMScheduler"]}))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"model_index.json must name .* plain name each, got '{hostile}'"):
        discard_snapshots_after(snapshots, 0)
    assert contents(tmp_path) == before


def test_saving_what_has_seen_nothing(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="must have been updated before .* step is 0"):
        save_snapshots(PowerFunctionEMA(model), tmp_path, MPDiTPipeline(model, DDPMScheduler()))


def test_saving_a_model_that_cannot_be_rebuilt(tmp_path):
    model = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=8)
    ema = PowerFunctionEMA(model)
    ema.update(1)
    with pytest.raises(TypeError, match="must have an MPDiTTransformer2DModel, .* got a DiTTransformer2DModel"):
        save_snapshots(ema, tmp_path / "new", DiTPipeline(model, AutoencoderKL(), DDPMScheduler()))
    assert not (tmp_path / "new").exists()


def test_saving_beside_another_pipeline(tmp_path):
    ema, _ = small_run(tmp_path, num_steps=1)
    pipeline = MPDiTPipeline(ema.model, DDPMScheduler(), latents_mean=[0.0] * 4, latents_std=[2.0] * 4)
    with pytest.raises(ValueError, match=r"snapshots of this pipeline; .* differs in \['latents_mean'\]"):
        save_snapshots(ema, tmp_path, pipeline)
