"""The experiment that compares the ways of swapping, in small."""

import json

import pytest
import rotation_digits
import torch
from helpers import tiny_vae


pytestmark = pytest.mark.usefixtures("examples_run_here")


def experiment(folder, *more):
    options = {
        "--output_dir": folder,
        "--max_train_steps": 4,
        "--finetune_steps": 2,
        "--validation_steps": 1,
        "--train_batch_size": 64,
        "--vae_steps": 4,
        "--num_layers": 1,
        "--num_images_per_class": 2,
        "--num_inference_steps": 2,
        "--num_validation_images": 8,
        "--report": folder / "report" / "swap.md",
    }
    argv = [*sum(options.items(), ()), *more]
    args = rotation_digits.parse_args(list(map(str, argv)))
    rotation_digits.main(args)
    return args


@pytest.mark.usefixtures("few_digits")
@pytest.mark.slow  # 21 runs of the experiment; the script itself is run above
def test_experiment_is_resumed_run_by_run_and_reported(tmp_path, monkeypatch):
    small = {"num_attention_heads": 1, "attention_head_dim": 8}
    monkeypatch.setattr(rotation_digits, "MODEL", {**rotation_digits.MODEL, **small})
    args = experiment(tmp_path, "--seeds", 0, 1, "--learning_rates", 1e-4, 1e-2)
    records = {path: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    # For each seed a base, two swaps without training and five arms; and five arms at the other rate.
    assert len(records) == 2 * 8 + 5
    for arm in rotation_digits.ARMS:
        losses = {
            rate: rotation_digits.read(args, f"{arm}_lr{rate:g}_seed0")["final"]["loss"] for rate in (1e-4, 1e-2)
        }
        assert losses[rotation_digits.best_rate(args, arm)] == min(losses.values())
    report = tmp_path / "report" / "swap.md"
    text = report.read_text()
    for label in (
        "base",
        "(a) right after `drop`",
        "(b) right after `mean`",
        "`control`",
        "`distillation`",
        "2 seeds",
    ):
        assert label in text
    assert (tmp_path / "report" / "swap_loss.png").stat().st_size > 10_000

    report.write_text(text.replace("## Numbers", "It works.\n\n## Numbers"))
    lost = tmp_path / "records" / "mean_lr0.0001_seed0.json"
    lost.unlink()
    experiment(tmp_path, "--seeds", 0, 1, "--learning_rates", 1e-4, 1e-2)
    again = {path: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    assert [path for path in records if again[path] != records[path]] in ([], [lost])
    # The run that was done again gave the same, but for the time it took.
    first, second = json.loads(records[lost]), json.loads(again[lost])
    assert {**first, "cpu_seconds": 0} == {**second, "cpu_seconds": 0}
    assert report.read_text().partition("\n## Numbers")[0].endswith("\nIt works.\n")
    assert f"- machine: {first['machine']}\n" in text
    with pytest.raises(
        ValueError, match="settings of this command, .*'finetune_steps': 3.* has .*'finetune_steps': 2"
    ):
        experiment(tmp_path, "--seeds", 0, "--finetune_steps", 3)


@pytest.mark.slow
def test_experiment_at_minute_scale(tmp_path):
    small = ("--max_train_steps", 300, "--finetune_steps", 75, "--vae_steps", 100, "--num_layers", 3)
    args = experiment(tmp_path, "--seeds", 0, "--learning_rates", 1e-3, "--train_batch_size", 32, *small)
    losses = {arm: rotation_digits.read(args, f"{arm}_lr0.001_seed0") for arm in rotation_digits.ARMS}
    base = rotation_digits.read(args, "base_seed0")
    assert base["final"]["loss"] < 0.6 * base["before"]["loss"]
    assert losses["mean"]["after_swap"]["relative_error"] < losses["drop"]["after_swap"]["relative_error"]
    assert losses["drop"]["final"]["loss"] < losses["drop"]["after_swap"]["loss"]


def test_latent_std_is_that_of_posterior_draws():
    vae, pixels = tiny_vae(in_channels=1, latent_channels=1), torch.rand(200, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        draws = torch.cat([posterior.sample() for _ in range(20)])
    # 20 draws of 200 images of 64 places: relative error of a std 1 / sqrt(2 * 256000), times five.
    assert rotation_digits.latent_std(vae, pixels) == pytest.approx(draws.std().item(), rel=5 / 512_000**0.5)
    assert posterior.var.mean() > 0.1 * draws.var()  # means alone would not do
