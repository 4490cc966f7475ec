"""Snapshots, and averages rebuilt from them: against averages tracked directly, in a real training run and by hand."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from helpers import EXAMPLES, ROOT, reset_accelerate, row_norms, tiny_model, tiny_vae
from PIL import Image
from processes import run_python
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from training_runs import assert_same_weights, stored

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
from diffusers_mp.averages.snapshots import Snapshot, discard_snapshots_after, find_snapshots, save_snapshots
from diffusers_mp.training import DDPMObjective, inverse_sqrt_schedule


WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = [str(digit) for digit in range(10)]


def weights_of(folder):
    return load_file(Path(folder) / WEIGHTS)


def vector(tensors):
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def fitted(snapshots, std, step=None):
    """The rebuilt average before its rows are normalised, and how it was made."""
    fit = plan_reconstruction(snapshots, std, step)
    loaded = {name: vector(weights_of(snapshots[0].path.parent / name)) for name in fit.weights}
    return sum(weight * loaded[name] for name, weight in fit.weights.items()), fit, loaded


# A real run


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
    nearest.load_state_dict(weights_of(directory / fit.nearest_snapshot))
    assert (row_norms(wanted.transformer_blocks[0].attn.to_q.weight) - 1).abs().max() > 1e-4
    used = [vector(normalize_weights_(model).state_dict()) for model in (pipe.transformer, wanted, nearest)]
    assert (used[0] - used[1]).norm() < fit.fit_error_to_nearest * (used[2] - used[1]).norm()
    stored = weights_of(tmp_path / "pipeline" / "transformer")["transformer_blocks.0.attn.to_q.weight"]
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


def test_the_script_reports_and_writes(run, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import reconstruct_ema as script

    script.main(script.parse_args([str(run[0]), "--ema_stds", "0.03", "0.075"]))
    shown = capsys.readouterr().out
    assert "20 snapshots" in shown
    assert "std 0.03 at step 400" in shown
    assert "std 0.075 at step 400: fit error" in shown
    output = tmp_path / "out"
    script.main(script.parse_args([str(run[0]), "--ema_stds", "0.075", "--step", "400", "--output_dir", str(output)]))
    assert str(output) in capsys.readouterr().out
    assert MPDiTPipeline.from_pretrained(output).id2label[7] == "7"
    with pytest.raises(SystemExit):
        script.parse_args([str(run[0]), "--ema_stds", "0.03", "0.075", "--output_dir", str(tmp_path / "two")])
    assert "--output_dir takes one pipeline" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(script.parse_args([str(tmp_path / "nowhere"), "--ema_stds", "0.075"]))
    assert f"--ema_snapshot_steps does, got {tmp_path / 'nowhere'}" in capsys.readouterr().err


# What the fit error means.


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


# Snapshots.


def small_run(directory, num_steps=4, vae=None, stds=(0.05, 0.10), **overrides):
    model = tiny_model(**overrides)
    pipeline = MPDiTPipeline(model, DDPMScheduler(), vae, latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    ema = PowerFunctionEMA(model, stds)
    for step in range(1, num_steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        normalize_weights_(model)
        ema.update(step)
        save_snapshots(ema, directory, pipeline)
    return ema, pipeline


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
    stored, average = weights_of(last.path), ema.state_dict()["averages"][1]
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
    assert {tensor.dtype for tensor in weights_of(tmp_path / "step-0000001_std-0.05").values()} == {torch.float32}


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


def test_memory_is_that_of_two_models(tmp_path):
    """Ten snapshots of a model of 40 MB: peak of the resident memory over what the process had before."""
    code = """
    import gc, re, sys, torch
    sys.path.insert(0, sys.argv[2])
    from pathlib import Path
    from diffusers import DDPMScheduler
    from helpers import tiny_model
    from diffusers_mp import MPDiTPipeline, PowerFunctionEMA, reconstruct_ema
    from diffusers_mp.averages.snapshots import save_snapshots
    torch.set_num_threads(1)

    def resident(key):
        return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    directory = Path(sys.argv[1])
    if sys.argv[3] == "write":
        model = tiny_model(num_attention_heads=4, attention_head_dim=64, num_layers=8)
        ema, pipeline = PowerFunctionEMA(model), MPDiTPipeline(model, DDPMScheduler())
        for step in range(1, 6):
            ema.update(step)
            save_snapshots(ema, directory / "ema_snapshots", pipeline)
    else:
        small = tiny_model()
        small.save_pretrained(directory / "warm")
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        reconstruct_ema(directory / "ema_snapshots", directory / "rebuilt", 0.075)
        print(resident("VmHWM") - before)
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("peak memory is read as Linux tells it")
    run_python(code, tmp_path, ROOT / "tests", "write")
    peak = int(run_python(code, tmp_path, ROOT / "tests", "rebuild"))
    size = (tmp_path / "rebuilt" / "transformer" / WEIGHTS).stat().st_size
    print(f"peak {peak / size:.2f} models of {size / 1e6:.0f} MB")
    assert size > 35e6
    assert size < peak < 2.3 * size


# Errors.


class TestErrors:
    @pytest.fixture
    def snapshots_dir(self, tmp_path):
        small_run(tmp_path / "ema_snapshots", num_steps=3)
        return tmp_path / "ema_snapshots"

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
        tensors = weights_of(folder)
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

    def test_saving_what_has_seen_nothing(self, tmp_path):
        model = tiny_model()
        with pytest.raises(ValueError, match="must have been updated before .* step is 0"):
            save_snapshots(PowerFunctionEMA(model), tmp_path, MPDiTPipeline(model, DDPMScheduler()))

    def test_saving_a_model_that_cannot_be_rebuilt(self, tmp_path):
        model = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=8)
        ema = PowerFunctionEMA(model)
        ema.update(1)
        with pytest.raises(TypeError, match="must have an MPDiTTransformer2DModel, .* got a DiTTransformer2DModel"):
            save_snapshots(ema, tmp_path / "new", DiTPipeline(model, AutoencoderKL(), DDPMScheduler()))
        assert not (tmp_path / "new").exists()

    def test_saving_beside_another_pipeline(self, snapshots_dir):
        model = tiny_model()
        ema = PowerFunctionEMA(model)
        ema.update(1)
        pipeline = MPDiTPipeline(model, DDPMScheduler(), latents_mean=[0.0] * 4, latents_std=[2.0] * 4)
        with pytest.raises(ValueError, match=r"snapshots of this pipeline; .* differs in \['latents_mean'\]"):
            save_snapshots(ema, snapshots_dir, pipeline)


# The trainer.


@pytest.mark.usefixtures("examples_run_here")
class TestTrainer:
    @pytest.fixture
    def train(self, tmp_path):
        rng = np.random.default_rng(0)
        for index in range(12):
            folder = tmp_path / "images" / NAMES[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{index}.png")
        model = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
        (tmp_path / "model.json").write_text(json.dumps(model))

        def train(output_dir, *more):
            import train_mpdit
            import training_arguments

            arguments = [
                *("--train_data_dir", str(tmp_path / "images"), "--vae", "none", "--image_channels", "1"),
                *("--model_config_name_or_path", str(tmp_path / "model.json"), "--resolution", "8"),
                *("--train_batch_size", "2", "--max_train_steps", "8", "--checkpointing_steps", "4"),
                *("--validation_steps", "0", "--num_validation_images", "0", "--ema_snapshot_steps", "2"),
                *("--output_dir", str(output_dir), *more),
            ]
            train_mpdit.main(training_arguments.parse_args(arguments))
            reset_accelerate()
            return output_dir

        return train

    @staticmethod
    def records(output_dir):
        snapshots = find_snapshots(output_dir / "ema_snapshots")
        return {
            snapshot.path.name: json.loads((snapshot.path / "snapshot.json").read_text()) for snapshot in snapshots
        }

    def test_run_leaves_snapshots_that_become_a_pipeline(self, train, tmp_path):
        output_dir = train(tmp_path / "run", "--ema_stds", "0.05", "0.1", "0.2")
        steps = [snapshot.step for snapshot in find_snapshots(output_dir / "ema_snapshots")]
        assert steps == [2, 2, 2, 4, 4, 4, 6, 6, 6, 8, 8, 8]
        checkpoint = stored(output_dir / "checkpoint-8")["ema"]["averages"][2]
        assert_same_weights(weights_of(output_dir / "ema_snapshots" / "step-0000008_std-0.2"), checkpoint)
        reconstruct_ema(output_dir / "ema_snapshots", tmp_path / "rebuilt", 0.15)
        pipe = MPDiTPipeline.from_pretrained(tmp_path / "rebuilt")
        assert pipe.id2label == {0: "0", 1: "1"}
        assert pipe.config.latents_std is not None
        assert len(pipe([0, "1"], num_inference_steps=2).images) == 2

    @pytest.mark.parametrize("killed_at", [3, 7])
    def test_a_resumed_run_leaves_the_same_snapshots(self, train, tmp_path, monkeypatch, killed_at):
        whole = self.records(train(tmp_path / "whole"))
        assert len(whole) == 8

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
        beyond = [name for name in self.records(resumed) if name.startswith(f"step-000000{left}")]
        assert not beyond
        shutil.rmtree(tmp_path / "parts" / "checkpoint-8")
        if killed_at > 4:
            resumed = train(tmp_path / "parts", "--resume_from_checkpoint", "checkpoint-4")
            assert self.records(resumed) == whole

    def test_a_kill_during_a_checkpoint_loses_no_snapshot_of_its_step(self, train, tmp_path, monkeypatch):
        import train_mpdit

        def die(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(train_mpdit, "save_checkpoint", die)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "run")
        # Whoever has the checkpoint has its snapshots.
        assert [snapshot.step for snapshot in find_snapshots(tmp_path / "run" / "ema_snapshots")] == [2, 2, 4, 4]

    def test_averages_move_every_few_updates(self, train, tmp_path, monkeypatch):
        steps, update = [], PowerFunctionEMA.update

        def note(self, step):
            steps.append(step)
            update(self, step)

        monkeypatch.setattr(PowerFunctionEMA, "update", note)
        train(tmp_path / "run", "--ema_update_steps", "2", "--ema_snapshot_steps", "4", "--max_train_steps", "7")
        assert steps == [2, 4, 6]
        # The last ones are named by what they have seen.
        assert list(self.records(tmp_path / "run")) == [
            f"step-000000{step}_std-{std}" for step in (4, 6) for std in (0.05, 0.1)
        ]

    @pytest.mark.parametrize(
        "more, message",
        [
            (("--ema_update_steps", "0"), "--ema_update_steps must be at least 1, got 0"),
            (("--ema_snapshot_steps", "-2"), "--ema_snapshot_steps must be a multiple of --ema_update_steps (1) or 0"),
            (
                ("--ema_update_steps", "3"),
                "--ema_snapshot_steps must be a multiple of --ema_update_steps (3) or 0, got 2",
            ),
        ],
    )
    def test_arguments(self, train, tmp_path, capsys, more, message):
        with pytest.raises(SystemExit):
            train(tmp_path / "run", *more)
        assert message in capsys.readouterr().err


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
