"""The trainer with each objective, on ten small images without a VAE; each run's pipeline samples without a word."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from helpers import reset_accelerate

from diffusers_mp import MPDiTPipeline
from diffusers_mp.predictions import FLOW_PREDICTIONS
from diffusers_mp.training import DDPMObjective, FlowMatchObjective
from diffusers_mp.training.model import make_objective


MODEL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 4}


pytestmark = pytest.mark.usefixtures("examples_run_here")


@pytest.fixture
def arguments(image_folder, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    return [
        *("--train_data_dir", str(image_folder), "--cache_dir", str(tmp_path / "cache")),
        *("--vae", "none", "--resolution", "8", "--model_config_name_or_path", str(tmp_path / "model.json")),
        *("--total_batch_size", "4", "--max_train_steps", "2", "--logging_steps", "1", "--checkpointing_steps", "2"),
        *("--validation_steps", "2", "--num_validation_images", "2", "--num_validation_levels", "4"),
        *("--validation_inference_steps", "2", "--output_dir", str(tmp_path / "run")),
    ]


def train(arguments):
    import train_mpdit

    args = train_mpdit.parse_args(arguments)
    train_mpdit.main(args)
    reset_accelerate()
    return args.output_dir


def metrics(output_dir):
    merged = {}
    for line in (output_dir / "logs" / "metrics.jsonl").read_text().splitlines():
        merged |= json.loads(line)
    return merged


@pytest.mark.parametrize(
    "flags, scheduler_class, config, out_channels",
    [
        ("", DDPMScheduler, ("epsilon", "learned_range"), 6),
        ("--variance_type fixed_small --snr_gamma 5", DDPMScheduler, ("epsilon", "fixed_small"), 3),
        ("--prediction_type v_prediction --snr_gamma 5", DDPMScheduler, ("v_prediction", "learned_range"), 6),
        (
            "--prediction_type v_prediction --variance_type fixed_large",
            DDPMScheduler,
            ("v_prediction", "fixed_large"),
            3,
        ),
        ("--prediction_type sample --loss_space velocity", DDPMScheduler, ("sample", "fixed_small"), 3),
        ("--prediction_type flow_prediction", FlowMatchEulerDiscreteScheduler, (None, None), 3),
        ("--prediction_type flow_sample --loss_space velocity", FlowMatchEulerDiscreteScheduler, (None, None), 3),
    ],
)
def test_run_becomes_a_pipeline_that_needs_no_word(arguments, flags, scheduler_class, config, out_channels):
    output_dir = train([*arguments, *flags.split()])
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is scheduler_class
    assert (pipe.scheduler.config.get("prediction_type"), pipe.scheduler.config.get("variance_type")) == config
    assert pipe.transformer.config.out_channels == out_channels
    words = flags.split()
    predicted = words[words.index("--prediction_type") + 1] if "--prediction_type" in words else "epsilon"
    assert pipe.config.prediction_type == predicted
    card = (output_dir / "README.md").read_text()
    assert f"prediction_type {predicted}" in card
    assert ("| loss_space | velocity |" in card) == ("--loss_space" in words)
    images = pipe(["cat", "dog"], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)
    assert images.isfinite().all()

    logged = metrics(output_dir)
    is_flow = scheduler_class is FlowMatchEulerDiscreteScheduler
    levels = [240, 421, 579, 760] if is_flow else [125, 375, 625, 875]
    assert [name for name in logged if "mse_t" in name] == [f"validation/mse_t{level:04d}" for level in levels]
    by_level = [logged[f"validation/mse_t{level:04d}"] for level in levels]
    assert logged["validation/mse"] == pytest.approx(sum(by_level) / 4)
    assert (output_dir / "samples" / "step-0000002.png").is_file()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", *FLOW_PREDICTIONS])
def test_the_objective_is_the_one_of_the_flags(arguments, prediction_type):
    import train_mpdit

    is_flow = prediction_type in FLOW_PREDICTIONS
    more = ["--logit_mean", "-0.5", "--logit_std", "0.7", "--loss_space", "sample"] if is_flow else []
    more = more or ["--snr_gamma", "3", "--variance_type", "fixed_small"]
    args = train_mpdit.parse_args([*arguments, "--prediction_type", prediction_type, *more])
    objective = make_objective(args, {})
    latents, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    if is_flow:
        expected = FlowMatchObjective(FlowMatchEulerDiscreteScheduler(), -0.5, 0.7, prediction_type, "sample")
    else:
        scheduler = DDPMScheduler(
            beta_start=1e-4, beta_end=0.02, prediction_type=prediction_type, variance_type="fixed_small"
        )
        expected = DDPMObjective(scheduler, snr_gamma=3.0)
    timesteps = expected.timesteps(torch.tensor([0.1, 0.8], dtype=torch.float64))
    assert torch.equal(objective.timesteps(torch.tensor([0.1, 0.8], dtype=torch.float64)), timesteps)
    prediction = torch.randn(2, 3, 8, 8)
    losses = expected.loss(prediction, latents, noise, timesteps)
    assert torch.equal(objective.loss(prediction, latents, noise, timesteps)["loss"], losses["loss"])


def test_resume_with_another_objective_is_refused(arguments):
    train([*arguments, "--prediction_type", "flow_prediction"])
    resume = [*arguments, "--resume_from_checkpoint", "latest", "--prediction_type"]
    with pytest.raises(ValueError, match=r"logit_mean 0.0 \(now 1.0\)"):
        train([*resume, "flow_prediction", "--logit_mean", "1"])
    with pytest.raises(ValueError, match=r"shift None \(now dimension\)"):
        train([*resume, "flow_prediction", "--shift", "dimension"])
    with pytest.raises(ValueError, match=r"loss_space None \(now sample\)"):
        train([*resume, "flow_prediction", "--loss_space", "sample"])
    with pytest.raises(ValueError, match=r"prediction_type flow_prediction \(now flow_sample\)"):
        train([*resume, "flow_sample"])
    with pytest.raises(ValueError, match=r"prediction_type flow_prediction \(now v_prediction\)"):
        train([*resume, "v_prediction", "--variance_type", "fixed_small"])


def test_a_model_config_of_another_objective_is_refused(arguments, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({**MODEL, "out_channels": 6}))
    with pytest.raises(ValueError, match="`out_channels` .* must be 3 .* --prediction_type flow_prediction .* got 6"):
        train([*arguments, "--prediction_type", "flow_prediction"])


def test_a_shift_of_the_times_is_that_of_training_sampling_and_fine_tuning(arguments, tmp_path):
    flow = [*arguments, "--prediction_type", "flow_sample"]
    # 3 x 8 x 8 values, 2 x 2 tokens.
    output_dir = train([*flow, "--shift", "dimension"])
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    assert pipe.scheduler.config.shift == pytest.approx((192 / 4096) ** 0.5)
    logged = metrics(output_dir)
    unshifted = torch.sigmoid(torch.special.ndtri(torch.tensor([0.125, 0.375, 0.625, 0.875])))
    shifted = pipe.scheduler.config.shift * unshifted / (1 + (pipe.scheduler.config.shift - 1) * unshifted)
    levels = (1000 * shifted).round().int().tolist()
    assert [name for name in logged if "mse_t" in name] == [f"validation/mse_t{level:04d}" for level in levels]

    start = ["--pretrained_model_name_or_path", str(output_dir), "--output_dir", str(tmp_path / "tuned")]
    place = flow.index("--model_config_name_or_path")
    flow = [*flow[:place], *flow[place + 2 :], *start]
    with pytest.raises(ValueError, match="with shift 1.0 of the scheduler, got 0.216.*; see --shift"):
        train(flow)
    with pytest.raises(ValueError, match="`--prediction_type` must be flow_sample, which is what .* got epsilon"):
        train([*flow, "--prediction_type", "epsilon"])
    train([*flow, "--shift", "dimension"])

    resolution = ["--shift", "resolution", "--max_shift", "3", "--output_dir", str(tmp_path / "dynamic")]
    pipe = MPDiTPipeline.from_pretrained(train([*arguments, "--prediction_type", "flow_prediction", *resolution]))
    stored = pipe.scheduler.config
    assert (stored.use_dynamic_shifting, stored.base_shift, stored.max_shift) == (True, 0.5, 3.0)
    assert pipe(["cat"], num_inference_steps=2, output_type="pt").images.isfinite().all()
