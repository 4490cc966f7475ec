"""Averages rebuilt from snapshots: against averages tracked directly, in a real training run and by hand."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import ROOT, row_norms, small_run, tiny_model, vector
from processes import run_python
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from training_runs import weights

from diffusers_mp import (
    MPDiTPipeline,
    MPDiTTransformer2DModel,
    PowerFunctionEMA,
    normalize_weights_,
    parameter_groups,
    reconstruct_ema,
)
from diffusers_mp.averages.ema import exponent_of_std, profile_inner_product
from diffusers_mp.averages.reconstruction import plan_reconstruction, profile_fit_error, reconstruction_weights
from diffusers_mp.averages.snapshots import Snapshot, find_snapshots, save_snapshots
from diffusers_mp.optimization import inverse_sqrt_schedule
from diffusers_mp.training import DDPMObjective


WEIGHTS = "diffusion_pytorch_model.safetensors"


NAMES = [str(digit) for digit in range(10)]


def fitted(snapshots, std, step=None):
    """The rebuilt average before its rows are normalised, and how it was made."""
    fit = plan_reconstruction(snapshots, std, step)
    loaded = {name: vector(weights(snapshots[0].path.parent / name)) for name in fit.weights}
    return sum(weight * loaded[name] for name, weight in fit.weights.items()), fit, loaded


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """400 updates on scanned digits: snapshots of 0.05 and 0.1 every 40, and other widths that are tracked only."""
    num_steps, folder = 400, tmp_path_factory.mktemp("run")
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    mean, std = images.mean().item(), images.std().item()
    model = tiny_model(open_gains=False, in_channels=1, out_channels=1).train()
    scheduler = DDPMScheduler(variance_type="fixed_small", clip_sample=False)
    pipeline = MPDiTPipeline(model, scheduler, id2label=dict(enumerate(NAMES)), latents_mean=[mean], latents_std=[std])
    objective = DDPMObjective(scheduler)
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2), betas=(0.9, 0.99))
    schedule = inverse_sqrt_schedule(optimizer, num_steps // 150, num_steps // 10)
    stored, others = PowerFunctionEMA(model, (0.05, 0.10)), PowerFunctionEMA(model, (0.03, 0.075))
    generator, losses, tracked, trajectory = torch.Generator().manual_seed(0), [], {}, []
    for step in range(1, num_steps + 1):
        index = torch.randint(0, len(images), (32,), generator=generator)
        clean = (images[index] - mean) / std
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (32,), generator=generator)
        dropped = torch.rand(32, generator=generator) < 0.1
        noisy = objective.add_noise(clean, noise, timesteps)
        prediction = model(noisy, timestep=timesteps, class_labels=labels[index].masked_fill(dropped, 10)).sample
        loss = objective.loss(prediction, clean, noise, timesteps)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        normalize_weights_(model)
        stored.update(step)
        others.update(step)
        losses.append(loss.item())
        trajectory.append(vector({name: weight.detach() for name, weight in model.named_parameters()}).float())
        if step % 40 == 0:
            save_snapshots(stored, folder / "ema_snapshots", pipeline)
            for width, averages in zip(others.stds, others.state_dict()["averages"], strict=True):
                tracked[step, width] = {name: average.clone() for name, average in averages.items()}
    assert np.mean(losses[-20:]) < 0.3 * losses[0], "this run has learnt nothing"
    return folder / "ema_snapshots", tracked, torch.stack(trajectory)


def misses(run, std, step, every):
    """Measured and reported: the miss relative to that of the best snapshot, both in the space of the weights."""
    directory, tracked, _ = run
    snapshots = [snapshot for snapshot in find_snapshots(directory) if snapshot.step % every == 0]
    rebuilt, fit, loaded = fitted(snapshots, std, step)
    wanted = vector(tracked[step, std])
    nearest = min((snapshot - wanted).norm() for snapshot in loaded.values())
    return ((rebuilt - wanted).norm() / nearest).item(), fit.fit_error_to_nearest


@pytest.mark.parametrize("step, every", [(400, 40), (200, 40), (320, 80), (400, 80)])
def test_a_width_tracked_but_not_stored_is_rebuilt_within_the_reported_error(run, step, every):
    measured, reported = misses(run, 0.075, step, every)
    assert measured < reported < 0.2
    # Control: the noise in the weights is more than rounding, so there was something to be rebuilt.
    assert measured > 1e-4


def test_measured_figures_of_the_docs(run):
    # Of docs/ema.md: from four stored steps, and from ten.
    assert misses(run, 0.075, 320, 80) == pytest.approx((0.09, 0.15), rel=0.2)
    measured, reported = misses(run, 0.075, 400, 40)
    assert (measured, reported) == pytest.approx((0.004, 0.04), rel=0.3)
    assert measured < reported / 8
    # With two steps stored, and outside the stored widths, the reported error is not a bound.
    for std in (0.075, 0.03):
        measured, reported = misses(run, std, 400, 200)
        assert reported < measured < 3.5 * reported


@pytest.mark.parametrize("std, step, every", [(0.03, 400, 200), (0.075, 400, 200), (0.075, 400, 40), (0.03, 200, 40)])
def test_the_bound_holds_for_every_width_and_spacing(run, std, step, every):
    directory, tracked, trajectory = run
    rebuilt, fit, _ = fitted([one for one in find_snapshots(directory) if one.step % every == 0], std, step)
    exponent = exponent_of_std(std)
    profile_norm = profile_inner_product(step, exponent, step, exponent) ** 0.5
    deviation = (trajectory[:step] - trajectory[:step].mean(dim=0)).norm().item()
    miss = (rebuilt - vector(tracked[step, std])).norm().item()
    assert 0 < miss < fit.fit_error * profile_norm * deviation


def test_the_pipeline_is_the_tracked_average_with_normalised_rows(run, tmp_path):
    directory, tracked, _ = run
    fit = reconstruct_ema(directory, tmp_path / "pipeline", 0.075, step=200)
    pipe = MPDiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.id2label == dict(enumerate(NAMES))
    assert pipe.config.latents_std == MPDiTPipeline.load_config(directory)["latents_std"]
    assert pipe.vae is None
    assert pipe(["3", 4], num_inference_steps=2, output_type="pt").images.shape == (2, 1, 8, 8)

    wanted, nearest = (MPDiTTransformer2DModel.from_config(pipe.transformer.config).eval() for _ in range(2))
    wanted.load_state_dict(tracked[200, 0.075])
    nearest.load_state_dict(weights(directory / fit.nearest_snapshot))
    assert (row_norms(wanted.transformer_blocks[0].attn.to_q.weight) - 1).abs().max() > 1e-4
    used = [vector(normalize_weights_(model).state_dict()) for model in (pipe.transformer, wanted, nearest)]
    assert (used[0] - used[1]).norm() < fit.fit_error_to_nearest * (used[2] - used[1]).norm()
    stored = weights(tmp_path / "pipeline" / "transformer")["transformer_blocks.0.attn.to_q.weight"]
    torch.testing.assert_close(row_norms(stored), torch.ones(32, dtype=torch.float64), rtol=0, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "pipeline").iterdir()) == [
        "model_index.json",
        "reconstruction.json",
        "scheduler",
        "transformer",
    ]
    report = json.loads((tmp_path / "pipeline" / "reconstruction.json").read_text())
    assert (report["step"], report["std"], report["weights"]) == (200, 0.075, fit.weights)
    assert sorted(report["weights"]) == [s.path.name for s in find_snapshots(directory) if s.step <= 200]


def test_a_stored_average_is_itself_to_the_bit(run, tmp_path):
    directory, _, _ = run
    fit = reconstruct_ema(directory, tmp_path / "pipeline", 0.1)
    assert (fit.weights, fit.fit_error, fit.fit_error_to_nearest) == ({"step-0000400_std-0.1": 1.0}, 0.0, 0.0)
    model = MPDiTTransformer2DModel.from_pretrained(directory / "step-0000400_std-0.1")
    rebuilt = MPDiTTransformer2DModel.from_pretrained(tmp_path / "pipeline", subfolder="transformer")
    assert torch.equal(vector(normalize_weights_(model).state_dict()), vector(rebuilt.state_dict()))


def on_a_grid(snapshots, step, std, num_cells=200_000):
    """Profiles of snapshots and of the wanted average on a midpoint grid, and the width of a cell."""
    last = max(step, *(snapshot[0] for snapshot in snapshots))
    grid = (np.arange(num_cells) + 0.5) / num_cells * last

    def profile(end, width):
        exponent = exponent_of_std(width)
        return np.where(grid <= end, (exponent + 1) / end * (np.minimum(grid, end) / end) ** exponent, 0.0)

    return np.stack([profile(*snapshot) for snapshot in snapshots]), profile(step, std), last / num_cells


@pytest.mark.parametrize("step, std", [(1000, 0.075), (1000, 0.03), (600, 0.2)])
def test_fit_error_is_the_distance_of_the_profiles(step, std):
    snapshots = [(stored, width) for stored in (250, 500, 1000) for width in (0.05, 0.10)]
    columns = *zip(*snapshots, strict=True), step, std
    weights = reconstruction_weights(*columns)
    profiles, wanted, cell = on_a_grid(snapshots, step, std)
    expected = np.sqrt(((weights @ profiles - wanted) ** 2).sum() * cell / ((wanted**2).sum() * cell))
    assert profile_fit_error(weights, *columns) == pytest.approx(expected, rel=1e-3)


def test_fit_error_is_the_expected_quotient_for_white_noise_and_no_bound():
    snapshots = [(step, std) for step in range(100, 1001, 100) for std in (0.05, 0.10)]
    listed = [Snapshot(step, std, Path(f"step-{step}_std-{std}")) for step, std in snapshots]
    fit = plan_reconstruction(listed, 0.075)
    profiles, wanted, _ = on_a_grid(snapshots, 1000, 0.075, num_cells=4000)
    nearest = profiles[[snapshot.path.name for snapshot in listed].index(fit.nearest_snapshot)]
    difference = np.array(list(fit.weights.values())) @ profiles - wanted
    noise = np.random.default_rng(0).normal(size=(4000, 2000))
    quotient = np.linalg.norm(difference @ noise) / np.linalg.norm((nearest - wanted) @ noise)
    # 2000 draws: a relative standard error of 1.6 % for each of the norms.
    assert quotient == pytest.approx(fit.fit_error_to_nearest, rel=0.08)
    assert fit.fit_error_to_nearest < 0.1
    # No bound: along this trajectory the nearest snapshot is the tracked average, and the rebuilt one is not.
    away = nearest - wanted
    worst = difference - away * (difference @ away) / (away @ away)
    assert abs(difference @ worst) > 1e6 * abs(away @ worst)


def test_more_snapshots_fit_better_and_later_ones_play_no_role():
    def listed(every, last=1000):
        steps = range(every, last + 1, every)
        return [Snapshot(step, std, Path(f"step-{step}_std-{std}")) for step in steps for std in (0.05, 0.10)]

    errors = [plan_reconstruction(listed(every), 0.075).fit_error for every in (500, 200, 100, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100
    assert plan_reconstruction(listed(100), 0.075, step=500) == plan_reconstruction(listed(100, 500), 0.075)
    # Between two steps: allowed, and reported to be much worse.
    between = plan_reconstruction(listed(100), 0.075, step=550)
    assert max(int(name[5:].split("_")[0]) for name in between.weights) == 600
    assert between.fit_error > 10 * plan_reconstruction(listed(100), 0.075, step=600).fit_error


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read as Linux tells it")
def test_memory_is_that_of_two_models(tmp_path):
    """Ten snapshots of a model of 40 MB: peak of the resident memory over what the process had before."""
    model = tiny_model(num_attention_heads=4, attention_head_dim=64, num_layers=8)
    ema, pipeline = PowerFunctionEMA(model), MPDiTPipeline(model, DDPMScheduler())
    for step in range(1, 6):
        ema.update(step)
        save_snapshots(ema, tmp_path / "ema_snapshots", pipeline)
    printed = run_python(
        """
        import gc, re, sys, torch
        sys.path.insert(0, sys.argv[2])
        from pathlib import Path
        from helpers import tiny_model
        from diffusers_mp import reconstruct_ema
        torch.set_num_threads(1)

        def resident(key):
            return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

        directory = Path(sys.argv[1])
        tiny_model().save_pretrained(directory / "warm")
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        reconstruct_ema(directory / "ema_snapshots", directory / "rebuilt", 0.075)
        print(resident("VmHWM") - before)
        """,
        tmp_path,
        ROOT / "tests",
    )
    size = (tmp_path / "rebuilt" / "transformer" / WEIGHTS).stat().st_size
    assert size > 35e6
    assert size < int(printed) < 2.3 * size


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    small_run(folder, num_steps=3)
    return folder


class TestErrors:
    @pytest.fixture
    def snapshots_dir(self, saved, tmp_path):
        return shutil.copytree(saved, tmp_path / "ema_snapshots")

    def refused(self, snapshots_dir, error, message, std=0.075, step=None):
        output = snapshots_dir.parent / "output"
        with pytest.raises(error, match=message):
            reconstruct_ema(snapshots_dir, output, std, step)
        assert not output.exists()

    @pytest.mark.parametrize("std", [0, -0.1, 0.2887, float("nan")])
    def test_width_out_of_range(self, snapshots_dir, std):
        self.refused(snapshots_dir, ValueError, f"`std` must lie in .* got {std}", std=std)

    @pytest.mark.parametrize("step", [0, 4, -1])
    def test_step_outside(self, snapshots_dir, step):
        self.refused(snapshots_dir, ValueError, f"`step` must lie between .* 1 and 3, got {step}", step=step)

    def test_step_that_is_no_integer(self, snapshots_dir):
        self.refused(snapshots_dir, TypeError, "integer", step=2.5)

    def test_too_few_snapshots(self, snapshots_dir):
        for snapshot in find_snapshots(snapshots_dir)[1:]:
            shutil.rmtree(snapshot.path)
        self.refused(snapshots_dir, ValueError, r"two snapshots or more up to step 1, got \['step-0000001_std-0.05'")
        with pytest.raises(ValueError, match="two snapshots or more to combine, got none"):
            plan_reconstruction([], 0.075)

    def test_no_snapshots(self, tmp_path):
        self.refused(tmp_path / "nothing", FileNotFoundError, "`snapshots_dir` must hold folders like .*nothing")

    @pytest.mark.parametrize("name", ["config.json", WEIGHTS, "snapshot.json"])
    def test_missing_file(self, snapshots_dir, name):
        (snapshots_dir / "step-0000002_std-0.1" / name).unlink()
        self.refused(snapshots_dir, FileNotFoundError, f"step-0000002_std-0.1 must hold {name}")

    @pytest.mark.parametrize("change", ["truncated", "one bit"])
    def test_damaged_weights(self, snapshots_dir, change):
        path = snapshots_dir / "step-0000003_std-0.05" / WEIGHTS
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content[:-100] if change == "truncated" else content)
        self.refused(snapshots_dir, ValueError, r"step-0000003_std-0.05/diffusion_.* is damaged")

    def test_damaged_json(self, snapshots_dir):
        (snapshots_dir / "step-0000003_std-0.05" / "snapshot.json").write_text('{"step": 3')
        self.refused(snapshots_dir, ValueError, r"step-0000003_std-0.05 is damaged: its JSON")

    def test_renamed_snapshot(self, snapshots_dir):
        (snapshots_dir / "step-0000003_std-0.05").rename(snapshots_dir / "step-0000004_std-0.05")
        self.refused(snapshots_dir, ValueError, "step-0000004_std-0.05 must be the average of its name, .* at step 3")

    def test_snapshots_of_another_model(self, snapshots_dir, tmp_path):
        small_run(tmp_path / "other", num_steps=4, num_layers=1)
        shutil.copytree(tmp_path / "other" / "step-0000004_std-0.1", snapshots_dir / "step-0000004_std-0.1")
        self.refused(snapshots_dir, ValueError, r"of one model: .*step-0000004_std-0.1 differs .* \['num_layers'\]")

    def test_weights_that_are_not_those_of_the_config(self, snapshots_dir):
        folder = snapshots_dir / "step-0000003_std-0.05"
        tensors = weights(folder)
        tensors["output.gain"] = torch.zeros(3)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        record = json.loads((folder / "snapshot.json").read_text())
        record["sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        (folder / "snapshot.json").write_text(json.dumps(record))
        self.refused(snapshots_dir, ValueError, r"weights that its config describes, it differs in \['output.gain'\]")

    def test_missing_pipeline_parts(self, snapshots_dir):
        shutil.rmtree(snapshots_dir / "scheduler")
        self.refused(snapshots_dir, FileNotFoundError, "must hold the folder scheduler, which model_index.json names")
        (snapshots_dir / "model_index.json").unlink()
        self.refused(snapshots_dir, FileNotFoundError, "must hold model_index.json")

    @pytest.mark.parametrize("is_absolute", [True, False])
    def test_an_index_that_names_other_folders(self, snapshots_dir, tmp_path, is_absolute):
        (tmp_path / "mine").mkdir()
        index = json.loads((snapshots_dir / "model_index.json").read_text())
        hostile = str(tmp_path / "mine") if is_absolute else "../mine"
        (snapshots_dir / "model_index.json").write_text(json.dumps(index | {hostile: ["diffusers", "DDPMScheduler"]}))
        self.refused(snapshots_dir, ValueError, f"model_index.json must name .* one plain name each, got '{hostile}'")

    def test_what_was_put_into_output_dir_meanwhile_is_not_lost(self, snapshots_dir, tmp_path, monkeypatch):
        output_dir, save = tmp_path / "rebuilt", MPDiTTransformer2DModel.save_pretrained

        def save_while_a_user_writes(*args, **kwargs):
            output_dir.mkdir()
            (output_dir / "thesis.txt").write_text("years of work")
            save(*args, **kwargs)

        monkeypatch.setattr(MPDiTTransformer2DModel, "save_pretrained", save_while_a_user_writes)
        with pytest.raises(OSError, match="not empty"):
            reconstruct_ema(snapshots_dir, output_dir, 0.075)
        assert (output_dir / "thesis.txt").read_text() == "years of work"

    def test_output_dir_in_use(self, snapshots_dir, tmp_path):
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
        with pytest.raises(FileExistsError, match="`output_dir` must be new or empty"):
            reconstruct_ema(snapshots_dir, tmp_path / "thesis", 0.075)
        assert (tmp_path / "thesis" / "thesis.txt").read_text() == "years of work"
