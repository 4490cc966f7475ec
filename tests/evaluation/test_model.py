"""The model of an evaluation: what of it is copied, and how its sampler is described."""

import json

import pytest
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from evaluation_runs import make_pipeline
from helpers import tiny_model
from training_runs import contents

from diffusers_mp import MPDiTPipeline, PowerFunctionEMA
from diffusers_mp.averages.reconstruction import reconstruct_ema
from diffusers_mp.averages.snapshots import save_snapshots
from diffusers_mp.evaluation.model import EvaluatedModel, sampler_options
from diffusers_mp.schedulers import sampler_for


def test_a_copy_has_what_belongs_and_the_record_of_the_run(tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    make_pipeline().save_pretrained(run)
    for name in ("checkpoint-2/optimizer.bin", ".env", "latents/shard-00000.safetensors", "logs/a/metrics.jsonl"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    (run / "training_arguments.json").write_text(json.dumps({"logging_dir": "logs/a", "seed": 3}))
    before = contents(run)
    EvaluatedModel(run).save_copy(None, copy)
    assert contents(run) == before
    names = {path.relative_to(copy).as_posix() for path in contents(copy)}
    parts = {"model_index.json", "scheduler/scheduler_config.json"}
    parts |= {f"transformer/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    assert names == parts | {"training_arguments.json", "logs/metrics.jsonl"}
    assert json.loads((copy / "training_arguments.json").read_text()) == {"logging_dir": "logs", "seed": 3}


@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_log_elsewhere_is_not_copied(tmp_path, is_absolute):
    run = tmp_path / "run"
    make_pipeline().save_pretrained(run)
    (tmp_path / "metrics.jsonl").write_text("{}")
    hostile = str(tmp_path) if is_absolute else ".."
    (run / "training_arguments.json").write_text(json.dumps({"logging_dir": hostile}))
    with pytest.raises(ValueError, match="training_arguments.json must have a `logging_dir` inside that folder, got"):
        EvaluatedModel(run).save_copy(None, tmp_path / "copy")


def test_options_of_a_sampler_are_all_that_it_takes_as_json():
    pipe = make_pipeline()
    own = sampler_options(pipe)
    assert own == {"class": "DDPMScheduler", **{k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"}}
    pipe.scheduler = sampler_for(pipe.scheduler, "DPMSolverMultistepScheduler")
    options = sampler_options(pipe)
    assert (options["class"], options["solver_order"]) == ("DPMSolverMultistepScheduler", 2)
    assert (options["timestep_spacing"], options["prediction_type"]) == ("linspace", "epsilon")
    assert options["lambda_min_clipped"] == "-inf"
    assert "clip_sample" not in options  # of DDPM, to which DPM-Solver does not look
    json.dumps(options, allow_nan=False)
    # As it samples: of a variance that the transformer learns, only ancestral sampling knows.
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(DDPMScheduler().config, variance_type="learned_range")
    assert sampler_options(pipe)["variance_type"] is None


def test_what_a_flow_predicts_is_known_of_pipelines_and_of_snapshots(tmp_path):
    flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=2.0)
    pipe = MPDiTPipeline(tiny_model("A", out_channels=4, in_channels=4), flow, prediction_type="flow_sample")
    assert sampler_options(pipe)["prediction_type"] == "flow_sample"
    ema = PowerFunctionEMA(pipe.transformer, (0.05, 0.10))
    for step in (1, 2):
        ema.update(step)
        save_snapshots(ema, tmp_path / "run" / "ema_snapshots", pipe)
    reconstruct_ema(tmp_path / "run" / "ema_snapshots", tmp_path / "rebuilt", 0.08)
    rebuilt = MPDiTPipeline.from_pretrained(tmp_path / "rebuilt")
    assert rebuilt.config.prediction_type == "flow_sample"
    assert (rebuilt.scheduler.config.use_dynamic_shifting, rebuilt.scheduler.config.max_shift) == (True, 2.0)
    rebuilt.scheduler = sampler_for(rebuilt.scheduler, "DPMSolverMultistepScheduler")
    told = sampler_options(rebuilt)
    assert (told["prediction_type"], told["use_dynamic_shifting"]) == ("flow_sample", True)
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize("sampler", [None, "UniPCMultistepScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_flow_of_samples_is_measured_with_any_of_its_samplers(tmp_path, sampler):
    model = tiny_model("A", out_channels=3, in_channels=3)
    MPDiTPipeline(model, FlowMatchEulerDiscreteScheduler(), prediction_type="flow_sample").save_pretrained(tmp_path)
    pipe = EvaluatedModel(tmp_path).without_weights(sampler)
    assert pipe.config.prediction_type == "flow_sample"
    assert type(pipe.scheduler).__name__ == (sampler or "FlowMatchEulerDiscreteScheduler")
