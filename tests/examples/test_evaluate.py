"""The script that evaluates: on small real models, alone and as two processes, killed, and with bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.guiders import ClassifierFreeGuidance
from evaluation_runs import NUM_PHOTOS, evaluate, make_pipeline, snapshots_of_a_run
from helpers import EXAMPLES, random_image, tiny_model, tiny_vae
from hub_client import TOKEN, client
from PIL import Image
from processes import run_processes

from diffusers_mp import MPDiTPipeline, frechet_distance, reconstruct_ema
from diffusers_mp.data.pixels import prepare_image
from diffusers_mp.evaluation import model
from diffusers_mp.evaluation.features import transformers_extractor
from diffusers_mp.evaluation.frechet import RunningStatistics
from diffusers_mp.evaluation.generation import generate_images
from diffusers_mp.evaluation.precision_recall import precision_recall
from diffusers_mp.evaluation.reference import drawn


pytestmark = pytest.mark.usefixtures("examples_run_here")


def without_circumstances(cell):
    return {key: value for key, value in cell.items() if key not in ("seconds", "num_processes", "batch_size")}


def test_the_numbers_are_those_of_the_library(arguments, folder, photos, dinov2, capsys):
    results = evaluate(arguments, "--guidance_scales", 2, "--write_card")
    (cell,) = results["cells"]
    extractor, pipe = transformers_extractor(dinov2), MPDiTPipeline.from_pretrained(folder)
    options = {"seed": 0, "class_ids": [0, 1, 2], "num_inference_steps": 3, "guidance_scale": 2.0}
    made, _ = extractor(generate_images(pipe, range(12), **options))
    real, _ = extractor(torch.stack([prepare_image(Image.open(path), 32, 3) for path in sorted(photos.iterdir())]))
    moments = [RunningStatistics().update(features) for features in (made, real)]
    expected = frechet_distance(*(tensor for one in moments for tensor in (one.mean, one.covariance)))
    (metrics,) = cell["metrics"]
    assert metrics["frechet_distance"] == pytest.approx(expected, rel=1e-3)
    assert metrics["num_images_compared"] == 12
    assert (metrics["precision"], metrics["recall"]) == precision_recall(real[drawn(NUM_PHOTOS, 12)], made)
    settings = results["settings"]
    sampler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    assert settings["sampler"] == {"class": "DDPMScheduler", **sampler}
    assert settings["classes"] == {"drawn": "in turn", "counts": {"cat": 4, "dog": 4, "owl": 4}}
    assert settings["extractors"][0]["class"] == "Dinov2Model"
    assert settings["references"][0]["num_images"] == NUM_PHOTOS
    unlabelled = "the reference has no class labels that are known here: classes come in turn"
    assert [warning[: len(unlabelled)] for warning in results["warnings"]] == [unlabelled]
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^(\w+)  +(.*)$", printed, re.MULTILINE))
    assert list(rows) == ["device", "data", "model", "images", "measures", "output"]
    assert f"frechet_distance {metrics['frechet_distance']:.5g}" in printed
    assert "Classes, in turn: cat (id 0) 4, dog (id 1) 4, owl (id 2) 4" in printed
    card = (folder / "README.md").read_text()
    assert f"| 2 | 3 | {metrics['frechet_distance']:.5g} | {metrics['precision']:.5g} |" in card
    assert str(dinov2.parent) not in card
    assert str(photos) not in card


def test_two_processes_measure_what_one_measures(arguments, tmp_path):
    results = evaluate(arguments, "--batch_size", 3)
    more = ["--output_dir", tmp_path / "two", "--batch_size", 3]
    printed = run_processes(EXAMPLES / "evaluate.py", *arguments, *more)
    shared = json.loads((tmp_path / "two" / "results.json").read_text())
    assert shared["best"]["num_processes"] == 2
    assert printed.count("Best of 1") == 1
    assert shared["settings"] == results["settings"]
    # Of every image, byte by byte.
    assert shared["best"]["images_sha256"] == results["best"]["images_sha256"]
    (one,), (other,) = shared["best"]["metrics"], results["best"]["metrics"]
    assert one | {"frechet_distance": pytest.approx(one["frechet_distance"], rel=1e-6)} == other


@pytest.mark.slow
def test_a_killed_sweep_goes_on(arguments, tmp_path, capsys):
    sweep = [*arguments, "--num_inference_steps", 20, "--num_samples", 60, "--guidance_scales", 1, 2, 3, 4]
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "evaluate.py"), *map(str, sweep)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    cells = tmp_path / "evaluation" / "cells"
    first, last = cells / "guidance-1.0_steps-20.json", cells / "guidance-4.0_steps-20.json"
    while not first.is_file():
        assert process.poll() is None, "it ended before its first cell"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not last.is_file()
    assert not (tmp_path / "evaluation" / "results.json").exists()
    content = first.read_bytes()

    results = evaluate(sweep)
    assert len(results["cells"]) == 4
    assert first.read_bytes() == content
    assert "guidance-1.0_steps-20: " not in capsys.readouterr().out.split("Best of")[0]
    whole = evaluate(sweep, "--output_dir", tmp_path / "whole")
    for one, other in zip(results["cells"], whole["cells"], strict=True):
        assert without_circumstances(one) == without_circumstances(other)
    # More cells join those there are; once all are there, nothing is generated again.
    evaluate(sweep, "--guidance_scales", 1, 1.5)
    assert "Best of 5" in capsys.readouterr().out


def test_images_that_are_not_finite_fail_their_cell_alone(arguments, tmp_path):
    sweep = [*arguments, "--guidance_scales", 1, 1e38, 2]
    for _ in range(2):  # tried again, it fails again
        with pytest.raises(
            RuntimeError, match=r"1 of 3 cells failed .* guidance-1e\+38_steps-3: failed: image 0 \(se"
        ):
            evaluate(sweep)
        results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
        assert [cell["guidance_scale"] for cell in results["cells"]] == [1, 2]
        assert (
            "class 0) is not finite with guidance scale 1e+38 and 3 steps in torch.float32"
            in (results["failed"][0]["error"])
        )
    assert len(evaluate(arguments, "--guidance_scales", 1, 2)["cells"]) == 2


def test_sweep_over_widths(arguments, folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert list(snapshots_of_a_run(run, 6)) == [2, 4, 6]
    (run / "training_arguments.json").write_text(json.dumps({"learning_rate": 0.01, "ema_stds": [0.05, 0.1]}))
    (run / "logs").mkdir()
    (run / "logs" / "metrics.jsonl").write_text('{"step": 6, "train/loss": 0.5}\n')

    sweep = [*arguments, "--pretrained_model_name_or_path", run, "--ema_stds", 0.05, 0.075]
    results = evaluate(sweep, "--guidance_scales", 1, 2, "--heat_map")
    assert "Width 0.075: fit error " in capsys.readouterr().out
    cells = {(cell["ema_std"], cell["guidance_scale"]): cell for cell in results["cells"]}
    assert cells.keys() == {(0.05, 1), (0.05, 2), (0.075, 1), (0.075, 2)}
    assert len({cell["images_sha256"] for cell in cells.values()}) == 4
    # What is measured is what `reconstruct_ema` gives.
    reconstruct_ema(run / "ema_snapshots", tmp_path / "rebuilt", 0.075)
    alone = evaluate(
        arguments, "--pretrained_model_name_or_path", tmp_path / "rebuilt", "--output_dir", tmp_path / "alone"
    )
    assert alone["best"]["images_sha256"] == cells[0.075, 1]["images_sha256"]

    early = evaluate(sweep, "--ema_stds", 0.075, "--step", 4, "--output_dir", tmp_path / "early")
    assert "of the profile's norm at step 4" in capsys.readouterr().out
    assert early["best"]["images_sha256"] != cells[0.075, 1]["images_sha256"]

    best, evaluation = results["best"], tmp_path / "evaluation"
    assert best["metrics"][0]["frechet_distance"] == min(
        cell["metrics"][0]["frechet_distance"] for cell in results["cells"]
    )
    assert list(evaluation.glob("rebuilt*")) == []
    reconstruct_ema(run / "ema_snapshots", tmp_path / "best", best["ema_std"])
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (evaluation / "best" / weights).read_bytes() == (tmp_path / "best" / weights).read_bytes()
    card = (evaluation / "best" / "README.md").read_text()
    assert f"holds the average of the weights of relative width {best['ema_std']:g}." in card
    assert "| learning_rate | 0.01 |" in card
    assert card.count("## Evaluation of samples") == 1
    assert f"| {best['ema_std']:g} | {best['guidance_scale']:g} | 3 |" in card.split("## Evaluation of samples")[1]
    with Image.open(evaluation / "heat_map.png") as image:
        assert np.asarray(image.convert("RGB")).std() > 10
    assert (evaluation / "best" / "evaluation.png").read_bytes() == (evaluation / "heat_map.png").read_bytes()
    with pytest.raises(OSError, match="--ema_stds needs the snapshots of a run"):
        evaluate(arguments, "--ema_stds", 0.05)


def test_a_sweep_has_one_step_though_training_goes_on(arguments, tmp_path, monkeypatch):
    training = snapshots_of_a_run(tmp_path / "run", 8)
    assert (next(training), next(training)) == (2, 4)
    rebuild, steps = model.reconstruct_ema, []

    def rebuild_and_train_on(*arguments, **options):
        steps.append(rebuild(*arguments, **options).step)
        next(training, None)

    monkeypatch.setattr(model, "reconstruct_ema", rebuild_and_train_on)
    sweep = [*arguments, "--pretrained_model_name_or_path", tmp_path / "run", "--ema_stds", 0.05]
    results = evaluate(sweep, 0.075)
    # Both widths, and the best of them.
    assert steps == [4, 4, 4]
    assert results["settings"]["step"] == 4
    assert list(training) == []
    with pytest.raises(ValueError, match="differs in model_sha256: .*; step: 4 and 8. `--step 4` goes on with its"):
        evaluate(sweep, 0.1)
    assert len(evaluate(sweep, 0.1, "--step", 4)["cells"]) == 3
    with pytest.raises(ValueError, match=r'differs in sampler.class: "DDPMScheduler" and "DDIMScheduler"$'):
        evaluate(sweep, 0.1, "--step", 4, "--scheduler", "DDIMScheduler")


def test_two_sweeps_at_once_measure_their_own_weights(arguments, tmp_path, monkeypatch):
    list(snapshots_of_a_run(tmp_path / "run", 4))
    sweep = [*arguments, "--pretrained_model_name_or_path", tmp_path / "run", "--ema_stds"]
    alone = evaluate([*sweep, 0.05, 0.1], "--output_dir", tmp_path / "alone")
    rebuild = model.reconstruct_ema

    def rebuild_then_let_the_other_run(*arguments, **options):
        plan = rebuild(*arguments, **options)
        monkeypatch.setattr(model, "reconstruct_ema", rebuild)
        evaluate([*sweep, 0.1])
        return plan

    monkeypatch.setattr(model, "reconstruct_ema", rebuild_then_let_the_other_run)
    together = evaluate([*sweep, 0.05])
    for one, other in zip(together["cells"], alone["cells"], strict=True):
        assert without_circumstances(one) == without_circumstances(other)


def test_a_grey_unconditional_model_of_pixels(arguments, tmp_path):
    shape = {"in_channels": 1, "out_channels": 1, "sample_size": 16}
    make_pipeline(num_classes=None, **shape).save_pretrained(tmp_path / "grey")
    results = evaluate(arguments, "--pretrained_model_name_or_path", tmp_path / "grey", "--nearest_k", 0)
    assert results["settings"]["classes"] is None
    assert results["best"]["metrics"][0].keys() == {"extractor", "frechet_distance", "warnings"}
    (reference,) = results["settings"]["references"]
    assert (reference["resolution"], reference["num_channels"]) == (16, 1)
    assert f"{NUM_PHOTOS} of {NUM_PHOTOS} reference images have colours" in results["warnings"][0]


def test_several_extractors_samplers_and_classes(arguments, dinov2, tmp_path, monkeypatch):
    source = "import torch\ndef colours(images):\n    return images.float().mean((2, 3))\n"
    (tmp_path / "my_features.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    both = [*arguments, "--extractors", "my_features:colours", dinov2, "--class_labels", "owl", 0]
    results = evaluate(both, "--scheduler", "DDIMScheduler")
    assert results["settings"]["classes"] == {"drawn": "in turn", "counts": {"owl": 6, "cat": 6}}
    assert [metrics["extractor"] for metrics in results["best"]["metrics"]] == ["my_features:colours", str(dinov2)]
    first = results["best"]["metrics"][0]["frechet_distance"]
    assert first != results["best"]["metrics"][1]["frechet_distance"]
    # Another sampler, another seed, another precision: other images.
    hashes = {results["best"]["images_sha256"]}
    for number, more in enumerate(((), ("--scheduler", "DDIMScheduler", "--seed", 1), ("--dtype", "bfloat16"))):
        other = evaluate(both, "--output_dir", tmp_path / f"other-{number}", *more)
        hashes.add(other["best"]["images_sha256"])
    assert len(hashes) == 4
    assert len(list((tmp_path / "evaluation" / "reference").iterdir())) == 2
    with pytest.raises(ValueError, match='differs in sampler.class: "DDIMScheduler" and "DDPMScheduler"'):
        evaluate(both)


def test_statistics_without_their_images(arguments, folder, tmp_path, capsys):
    expected = evaluate(arguments)
    (path,) = (tmp_path / "evaluation" / "reference").iterdir()
    place = arguments.index("--reference_dir")
    arguments = [*arguments[:place], *arguments[place + 2 :], "--reference_statistics", path, "--output_dir"]
    assert without_circumstances(evaluate([*arguments, tmp_path / "b"])["best"]) == (
        without_circumstances(expected["best"])
    )
    # A checkpoint of other latents than those the statistics were made for.
    make_pipeline(tiny_vae(), sample_size=4).save_pretrained(tmp_path / "smaller")
    with pytest.raises(ValueError, match="must be of resolution 16, which the pipeline generates, got 32"):
        evaluate([*arguments, tmp_path / "c", "--pretrained_model_name_or_path", tmp_path / "smaller"])


def test_too_few_images_are_told(arguments, tmp_path, capsys):
    few = ["--num_samples", 8, "--max_reference_images", 8]
    results = evaluate(arguments, *few, "--write_card")
    assert "Warning: 8 generated images for 8 features" in capsys.readouterr().out
    starts = ["8 reference images for", "8 generated images for", "the reference has no c"]
    assert [warning[:22] for warning in results["warnings"]] == starts
    assert "- Warning: 8 generated images for 8 features" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"--nearest_k must be less than the number of reference images \(3\), or 0"):
        evaluate(arguments, "--max_reference_images", 3, "--output_dir", tmp_path / "b")


def test_bad_input_is_refused_before_anything_is_generated(arguments, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`reference_dir` \(.*\) must be a folder of images, it holds nothing"):
        evaluate(arguments, "--reference_dir", tmp_path / "empty")
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    random_image(np.random.default_rng(0)).save(tmp_path / "empty" / "b.png")
    with pytest.raises(ValueError, match=r"must be readable, number 0 \(a.png\) is not"):
        evaluate(arguments, "--reference_dir", tmp_path / "empty")
    with pytest.raises(ValueError, match="must hold a saved pipeline"):
        evaluate(arguments, "--pretrained_model_name_or_path", tmp_path / "empty")
    for more, message in (
        (["--dataset_name", "a/b"], "exactly one of --reference_dir, --dataset_name and --reference_statistics"),
        (["--num_samples", 3], "--num_samples must be more than --nearest_k (3), got 3"),
        (["--num_inference_steps", 0], "--num_inference_steps: must be at least 1, got 0"),
        # Cells of equal values would be one.
        (
            ["--guidance_scales", 1, 2, "1.0"],
            "--guidance_scales must differ from each other, each is a cell, got [1.0",
        ),
        (["--num_inference_steps", 25, 25], "--num_inference_steps must differ from each other"),
        (["--ema_stds", 0.05, "5e-2"], "--ema_stds must differ in six digits"),
        (["--ema_stds", 0.3], "--ema_stds: must be in (0, 1/sqrt(12)), that is below 0.2887, got 0.3"),
        (["--scheduler", "Sampler"], "DPMSolverMultistepScheduler, got Sampler"),
        (["--scheduler", "AutoencoderKL"], "--scheduler must be a scheduler of diffusers"),
        (["--write_card", "--ema_stds", 0.05], "--write_card needs the folder of one pipeline"),
        (["--write_card", "--pretrained_model_name_or_path", "user/name"], "--write_card needs the folder of one"),
    ):
        with pytest.raises(SystemExit, match="2"):
            evaluate(arguments, *more)
        assert message in capsys.readouterr().err


def test_pipelines_that_cannot_be_measured_are_refused_before_the_reference_is(arguments, folder, tmp_path):
    make_pipeline(tiny_vae(), class_dropout_prob=0.0).save_pretrained(tmp_path / "unguided")
    make_pipeline().save_pretrained(tmp_path / "latents")
    guided = make_pipeline(tiny_vae())
    # Not by assignment: in place of None, diffusers does not write it to the index.
    guided.register_modules(guider=ClassifierFreeGuidance(guidance_scale=2.0))
    guided.save_pretrained(tmp_path / "guided")
    stock = DiTTransformer2DModel(2, 8, num_layers=1, in_channels=4, sample_size=8, num_embeds_ada_norm=3)
    DiTPipeline(stock, tiny_vae(), DDPMScheduler()).save_pretrained(tmp_path / "stock")
    for name, more, message in (
        ("unguided", ["--guidance_scales", 1, 2], "`guidance_scale` must be 1 for a transformer trained without drop"),
        ("latents", [], "must generate images of 1 or 3 channels, it has 4 and no VAE"),
        ("guided", [], "must be a pipeline without a `guider`, .* has a ClassifierFreeGuidance; after"),
        ("stock", [], "must be an MPDiTPipeline, .* holds a DiTPipeline"),
        ("model", ["--class_labels", "cow"], "got the unknown name 'cow'"),
        ("model", ["--class_labels", 3], r"must be ids in \[0, 2\] or names, got 3"),
        ("model", ["--scheduler", "FlowMatchEulerDiscreteScheduler"], "flow"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(arguments, "--pretrained_model_name_or_path", tmp_path / name, *more)
        assert not (tmp_path / "evaluation").exists(), name
    guided.guider = None
    guided.save_pretrained(tmp_path / "unguided")
    evaluate(arguments, "--pretrained_model_name_or_path", tmp_path / "unguided")


PUSH = """
import json, sys
sys.path.insert(0, {examples!r})
import torch
torch.set_num_threads(1)
import evaluate
calls, done = json.load(sys.stdin), []
for arguments in calls:
    evaluate.main(evaluate.parse_args(arguments))
print("RESULTS " + json.dumps(done))
"""


@pytest.mark.slow
def test_the_best_is_published_with_its_table(arguments, folder, server, tmp_path):
    tiny_model(num_classes=3, seed=7, class_dropout_prob=0.1).save_pretrained(folder / "transformer_ema_0.1")
    (folder / "secret.txt").write_text("private")
    push = [*arguments, "--guidance_scales", 1, 2, "--push_to_hub", "--hub_model_id", "user/name", "--hub_license"]
    first = [*push, "mit", "--heat_map", "--write_card"]
    # Evaluated again, from the Hub: what was published beside it stays.
    again = [*push, "mit", "--pretrained_model_name_or_path", "user/name", "--seed", 1, "--output_dir"]
    calls = [list(map(str, call)) for call in (first, [*again, tmp_path / "again"])]
    client(server, tmp_path / "home", PUSH.format(examples=str(EXAMPLES)), calls, HF_TOKEN=TOKEN)
    repository = server.repositories["user/name"]
    files = repository.files()
    assert repository.messages[-1] in ("Evaluation: guidance-1.0_steps-3", "Evaluation: guidance-2.0_steps-3")
    assert "secret.txt" not in files
    assert "transformer_ema_0.1/config.json" in files
    card = files["README.md"].decode()
    table = (tmp_path / "again" / "best" / "README.md").read_text()
    assert card == table
    assert card.count("## Evaluation of samples") == 1
    assert "license: mit" in card
    assert "12 images for each row, 3 classes in turn, seed 1, `DDPMScheduler`, prediction_type epsilon" in card
    assert "seed 0" in (folder / "README.md").read_text()
    assert (folder / "evaluation.png").is_file()
    for path in (tmp_path / "evaluation", tmp_path / "again"):
        assert not [file for file in path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
