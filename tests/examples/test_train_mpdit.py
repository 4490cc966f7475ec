"""The trainer on a small real image folder: a tiny AutoencoderKL, a tiny model, on the CPU."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from helpers import reset_accelerate, write_table
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader
from training_runs import (
    MODEL,
    arguments,
    assert_same_weights,
    damage,
    metrics,
    raw_weights,
    train,
    weights,
)

from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel
from diffusers_mp.data.latents import LatentDataset
from diffusers_mp.presets import CONFIGURATIONS
from diffusers_mp.training import (
    DDPMObjective,
    TrainingSamples,
    optimizers,
    split_validation,
    validation_losses,
    validation_timesteps,
)


pytestmark = pytest.mark.usefixtures("examples_run_here")


def test_run_becomes_a_pipeline(data, tmp_path, capfd):
    more = ("--validation_steps", "3", "--logging_steps", "2", "--report_to", "tensorboard")
    output_dir = train(data, tmp_path / "run", *more)
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    assert pipe.id2label == {0: "dark", 1: "light"}
    assert pipe.transformer.config.out_channels == 8
    assert pipe.transformer.config.num_classes == 2
    assert pipe.scheduler.config.variance_type == "learned_range"
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe(["dark", 1], num_inference_steps=2, output_type="pt").images.shape == (2, 3, 16, 16)

    # The pipeline's transformer is the first average, the other one lies beside it; neither is the raw model.
    first = weights(output_dir / "transformer")
    second = weights(output_dir / "transformer_ema_0.1")
    raw = raw_weights(output_dir / "checkpoint-6")
    for other in (second, raw):
        assert any(not torch.equal(first[name], other[name]) for name in first)
    rows = first["transformer_blocks.0.attn.to_q.weight"].norm(dim=1)
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)

    assert list(metrics(output_dir, "train/loss")) == [2, 4, 6]
    assert list(metrics(output_dir, "validation/loss")) == [3, 6]
    last = json.loads((output_dir / "logs" / "metrics.jsonl").read_text().splitlines()[-1])
    assert sum(name.startswith("validation/mse_t") for name in last) == 8
    assert sorted(path.name for path in (output_dir / "samples").iterdir()) == ["step-0000003.png", "step-0000006.png"]
    with Image.open(output_dir / "samples" / "step-0000006.png") as grid:
        # Two images of 16 pixels, enlarged six times, with their classes' names above.
        assert grid.size == (2 * (96 + 6), 20 + 96 + 6)
        cell = np.asarray(grid.crop((0, 20, 96, 116)))
        assert np.array_equal(cell, cell[::6, ::6].repeat(6, 0).repeat(6, 1))
        assert grid.crop((0, 0, 96, 20)).convert("L").getextrema()[0] < 128
    events = EventAccumulator(str(next((output_dir / "logs").rglob("events.*")).parent)).Reload()
    assert [event.step for event in events.Images("validation/samples")] == [3, 6]
    assert "train/loss" in events.Tags()["scalars"]
    shown = capfd.readouterr().err
    assert "loss=" in shown
    assert "images/s=" in shown
    assert "6/6" in shown


def test_the_log_has_the_norm_of_the_gradient_before_clipping_and_the_rate_of_the_update(
    data, tmp_path, monkeypatch, capfd
):
    import train_mpdit

    computed, check = {}, train_mpdit.Watchdog.check

    def compute_and_check(self, step, grad_norm=None):
        squares = [parameter.grad.double().square().sum() for parameter in self.model.parameters()]
        computed[step] = sum(squares).sqrt().item(), train_mpdit_rates(self)
        return check(self, step, grad_norm)

    made, adam = [], torch.optim.Adam

    def train_mpdit_rates(watchdog):
        return next(group["lr"] for group in made[-1].param_groups if group["name"] == "as_published")

    monkeypatch.setattr(train_mpdit.Watchdog, "check", compute_and_check)
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **kwargs: made.append(adam(*args, **kwargs)) or made[-1])
    # Constant until update 1: the rates of updates 2 to 4 all differ.
    more = ("--max_train_steps", "4", "--logging_steps", "1", "--train_batch_size", "2")
    plain = train(data, tmp_path / "plain", *more)
    norms, rates = metrics(plain, "train/grad_norm"), metrics(plain, "train/learning_rate")
    assert norms == pytest.approx({step: norm for step, (norm, _) in computed.items()}, rel=1e-5)
    assert rates == pytest.approx({step: rate for step, (_, rate) in computed.items()})
    assert len({*rates.values()}) == 4
    shown = capfd.readouterr().err
    assert f"lr={rates[4]:.2g}, grad_norm={norms[4]:.3g}" in shown
    assert "<00:00" in shown  # time left
    clipped = train(data, tmp_path / "clipped", *more, "--max_grad_norm", "1e-3")
    assert metrics(clipped, "train/grad_norm")[1] == pytest.approx(norms[1], rel=1e-5)
    assert computed[1][0] == pytest.approx(1e-3, rel=1e-2)


def test_loss_falls(data, tmp_path):
    output_dir = train(data, tmp_path / "run", "--max_train_steps", "150", "--checkpointing_steps", "150")
    losses = list(metrics(output_dir, "train/loss").values())
    assert losses[-1] < 0.9 * losses[0]


def test_accumulation_does_not_change_the_run(data, coarse, tmp_path):
    # Each sample is a function of (seed, epoch, index), so that only the rounding of sums differs.
    more = ("--train_batch_size", "2", "--adam_epsilon", "1e-2")
    first, second = (raw_weights(run / "checkpoint-6") for run in (coarse, train(data, tmp_path / "run", *more)))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-5), name


def test_the_recipe_reaches_the_run(data, tmp_path, monkeypatch):
    """What the flags say is what the run is made with: a wire that is not connected shows nowhere else."""
    import train_mpdit

    made = {}

    def spy(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            made.setdefault(name, []).append((args, kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    spy(train_mpdit, "TrainingSamples")
    spy(optimizers, "parameter_groups")
    spy(torch.optim, "Adam")
    spy(MPDiTPipeline, "__call__")
    output_dir = train(
        *(data, tmp_path / "run", "--random_flip", "--class_dropout_prob", "0.25", "--adam_beta2", "0.95"),
        *("--max_train_steps", "2", "--validation_steps", "2", "--gradient_checkpointing"),
        *("--validation_guidance_scale", "3", "--max_train_samples", "30", "--allow_tf32", "--deterministic"),
    )
    assert torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    ((_, preview),) = made["__call__"]
    assert (preview["guidance_scale"], preview["num_inference_steps"]) == (3.0, 2)
    (_, held_out), (_, training) = made["TrainingSamples"]
    assert (training["class_dropout_prob"], training["random_flip"], training["num_classes"]) == (0.25, True, 2)
    assert held_out.get("class_dropout_prob", 0) == 0
    assert (len(training["indices"]), len(held_out["indices"])) == (25, 5)
    assert not set(training["indices"].tolist()) & set(held_out["indices"].tolist())
    (groups,), adam = made["Adam"][0]
    assert adam["betas"] == (0.9, 0.95)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["as_published"] == 1e-2
    assert rates["unit_rows_16"] == 1e-2 / 4
    model = made["parameter_groups"][-1][0][0]
    assert model.is_gradient_checkpointing
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    index = json.loads((output_dir / "latents" / "index.json").read_text())
    assert pipe.config.latents_mean == index["latents_mean"]
    assert pipe.config.latents_std == index["latents_std"]
    assert pipe.transformer.config.class_dropout_prob == 0.25


def test_validation_is_that_of_the_averaged_weights(data, tmp_path):
    more = ("--validation_steps", "6", "--learning_rate", "3e-2", "--lr_constant_steps", "6")
    output_dir = train(data, tmp_path / "run", *more)
    latents = LatentDataset(output_dir / "latents")
    _, held_out = split_validation(len(latents), 5, 0)
    samples = TrainingSamples(latents, seed=0, num_classes=2, indices=held_out)
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    objective = DDPMObjective(pipe.scheduler)
    batches = DataLoader(samples, sampler=[(0, i) for i in range(5)], batch_size=5)
    levels = validation_timesteps(objective, 8)
    expected = validation_losses(pipe.transformer.eval(), objective, batches, levels, torch.device("cpu"))
    assert metrics(output_dir, "validation/loss")[6] == pytest.approx(expected["loss"], rel=1e-5)
    pipe.transformer.load_state_dict(raw_weights(output_dir / "checkpoint-6"))
    of_raw = validation_losses(pipe.transformer, objective, batches, levels, torch.device("cpu"))["loss"]
    assert of_raw != pytest.approx(expected["loss"], rel=1e-4)


def test_clipping_and_the_rate_of_configuration_a(data, coarse, tmp_path):
    clipped = train(data, tmp_path / "clipped", "--max_grad_norm", "1e-3", "--adam_epsilon", "1e-2")
    first, second = (raw_weights(run / "checkpoint-6") for run in (clipped, coarse))
    assert (first["output.gain"] - second["output.gain"]).abs() > 1e-3
    (tmp_path / "a.json").write_text(json.dumps({**MODEL, **CONFIGURATIONS["A"]}))
    more = (
        "--model_config_name_or_path",
        str(tmp_path / "a.json"),
        "--lr_constant_steps",
        "100",
        "--logging_steps",
        "1",
    )
    assert set(metrics(train(data, tmp_path / "a", *more), "train/learning_rate").values()) == {1e-4}


def test_every_scheduler_trains(data, tmp_path):
    for name in ("constant_with_warmup", "cosine"):
        more = ("--lr_scheduler", name, "--lr_warmup_steps", "2", "--logging_steps", "1", "--max_train_steps", "4")
        rates = metrics(train(data, tmp_path / name, *more, "--num_validation_images", "0"), "train/learning_rate")
        # diffusers' schedules begin at 0, then half of the rate, then all, then the schedule's own way.
        assert (rates[1], rates[2], rates[3]) == pytest.approx((0, 0.5e-2, 1e-2))
        assert rates[4] == pytest.approx(1e-2 if name == "constant_with_warmup" else 0.5e-2)


def test_samples_are_of_the_classes_asked_for(data, tmp_path, monkeypatch):
    asked, call = [], MPDiTPipeline.__call__

    def note(self, class_labels, **kwargs):
        asked.append(class_labels)
        return call(self, class_labels, **kwargs)

    monkeypatch.setattr(MPDiTPipeline, "__call__", note)
    more = ("--max_train_steps", "1", "--validation_steps", "1", "--validation_labels")
    train(data, tmp_path / "names", *more, "light", "0", "light")
    assert asked == [[1, 0, 1]]
    # A name that is a number is a name, not an id.
    for name, number in (("dark", "1"), ("light", "0")):
        shutil.copytree(data / "images" / name, tmp_path / "numbers" / number)
    train(data, tmp_path / "numbered", *more, "1", "--train_data_dir", str(tmp_path / "numbers"))
    assert asked[1:] == [[1]]
    # Before anything is encoded, and of images that are encoded already.
    message = "`validation_labels` must be names or ids of the 2 classes, got 'lihgt'. Did you mean 'light'?"
    with pytest.raises(ValueError, match=re.escape(message)):
        train(data, tmp_path / "wrong", *more, "lihgt")
    assert not (tmp_path / "wrong" / "latents").exists()


def test_bf16(data, tmp_path):
    more = ("--max_train_steps", "2", "--logging_steps", "1", "--mixed_precision")
    runs = {precision: train(data, tmp_path / precision, *more, precision) for precision in ("bf16", "no")}
    losses = {precision: metrics(output_dir, "train/loss") for precision, output_dir in runs.items()}
    assert losses["bf16"] != losses["no"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05)
    assert MPDiTTransformer2DModel.from_pretrained(runs["bf16"], subfolder="transformer").dtype == torch.float32


def test_two_workers_do_not_change_the_run(data, plain, tmp_path):
    two = train(data, tmp_path / "two", "--dataloader_num_workers", "2")
    assert_same_weights(weights(plain / "transformer"), weights(two / "transformer"))


def test_streaming_does_not_change_the_run(data, plain, tmp_path, monkeypatch):
    import train_mpdit

    load, asked = train_mpdit.load_image_dataset, []

    def note(*args, **kwargs):
        asked.append(kwargs["streaming"])
        return load(*args, **kwargs)

    monkeypatch.setattr(train_mpdit, "load_image_dataset", note)
    images, _, _ = load(data / "images")
    table = ("--dataset_name", write_table(images, tmp_path / "table"), "--streaming")
    _, _, *others = arguments(data, tmp_path / "streamed")  # without --train_data_dir
    train_mpdit.main(train_mpdit.parse_args([*others, *table]))
    streamed = tmp_path / "streamed"
    assert asked == [True]
    assert_same_weights(weights(plain / "transformer"), weights(streamed / "transformer"))
    assert MPDiTPipeline.from_pretrained(streamed).id2label == {0: "dark", 1: "light"}


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def compiled_frames(request, monkeypatch):
    """Graphs that `--compile` makes, by a backend that takes seconds and by the real one; a second one is an error."""
    counter, compile_blocks = CompileCounterWithBackend(request.param), MPDiTTransformer2DModel.compile_repeated_blocks
    with monkeypatch.context() as patch, torch._dynamo.config.patch(error_on_recompile=True):
        patch.setattr(
            MPDiTTransformer2DModel,
            "compile_repeated_blocks",
            lambda self, **options: compile_blocks(self, backend=counter, **options),
        )
        yield counter
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
# Dynamo asks each input of a block for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_run_is_the_run_and_goes_on_plain(data, tmp_path, compiled_frames):
    # With validations, looks at norms and records between its updates, none of which compile anything.
    more = ("--logging_steps", "1", "--validation_steps", "3", "--record_magnitudes_steps", "2")
    more += ("--norm_watch_steps", "2")
    plain = train(data, tmp_path / "plain", *more)
    compiled = train(data, tmp_path / "compiled", *more, "--compile")
    assert compiled_frames.frame_count == 1  # for all blocks, whole and once
    assert metrics(compiled, "train/loss") == pytest.approx(metrics(plain, "train/loss"), rel=1e-4)
    expected = weights(plain / "transformer")
    assert weights(compiled / "transformer").keys() == expected.keys()
    train(data, compiled, *more, "--resume_from_checkpoint", "checkpoint-4", "--no-compile")
    for name, tensor in weights(compiled / "transformer").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_pixels_without_a_vae(data, tmp_path):
    output_dir = train(data, tmp_path / "run", "--vae", "none", "--image_channels", "1")
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    assert pipe.vae is None
    (image,) = pipe(1, num_inference_steps=2).images
    assert (image.mode, image.size) == ("L", (16, 16))


def test_unlabelled_images(data, tmp_path):
    (tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted((data / "images").rglob("*.png"))):
        (tmp_path / "flat" / f"{i}.png").write_bytes(path.read_bytes())
    output_dir = train(data, tmp_path / "run", "--train_data_dir", str(tmp_path / "flat"), "--validation_steps", "6")
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    assert pipe.transformer.config.num_classes is None
    assert pipe.transformer.config.class_dropout_prob == 0
    assert len(pipe(num_images_per_class=2, num_inference_steps=2).images) == 2


def test_encoded_images_alone_are_enough_and_keep_their_settings(data, plain, tmp_path):
    first = plain
    (tmp_path / "second").mkdir()
    # What a run leaves that stopped before its first update does not stand in the way of the next try.
    shutil.copytree(first / "latents", tmp_path / "second" / "latents")
    import train_mpdit

    argv = arguments(data, tmp_path / "second")
    for flag in ("--train_data_dir", "--vae", "--resolution"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    train_mpdit.main(train_mpdit.parse_args(argv))
    assert_same_weights(weights(first / "transformer"), weights(tmp_path / "second" / "transformer"))


def test_encoded_images_of_other_data_are_refused(data, plain_copy, tmp_path):
    first = plain_copy
    for name in ("dark", "light"):
        (tmp_path / "other" / name).mkdir(parents=True)
        for path in sorted((data / "images" / name).iterdir())[1:]:
            (tmp_path / "other" / name / path.name).write_bytes(path.read_bytes())
    more = ("--train_data_dir", str(tmp_path / "other"), "--latents_dir", str(first / "latents"))
    with pytest.raises(ValueError, match=r"was encoded with number of images 40 \(now 38\)"):
        train(data, tmp_path / "second", *more)
    assert (first / "latents" / "index.json").is_file()


def test_a_damaged_shard_of_latents_can_be_made_again_as_its_message_says(data, tmp_path):
    more = ("--max_train_steps", "1", "--latents_dir", str(tmp_path / "latents"))
    train(data, tmp_path / "first", *more)
    shard = tmp_path / "latents" / "shard-00000.safetensors"
    before = shard.read_bytes()
    damage(shard)
    with pytest.raises(ValueError, match="shard-00000.safetensors: delete the file and encode again"):
        train(data, tmp_path / "second", *more)
    reset_accelerate()
    shard.unlink()
    train(data, tmp_path / "third", *more)
    assert shard.read_bytes() == before


class TestErrors:
    def test_missing_column(self, data, tmp_path):
        with pytest.raises(ValueError, match=r"`image_column` must be one of .*image.* got 'photo'"):
            train(data, tmp_path / "run", "--image_column", "photo")

    def test_corrupt_image_is_named_and_can_be_skipped(self, data, tmp_path):
        folder = tmp_path / "images" / "dark"
        folder.mkdir(parents=True)
        (tmp_path / "images" / "light").mkdir()
        for path in (data / "images").rglob("*.png"):
            (tmp_path / "images" / path.parent.name / path.name).write_bytes(path.read_bytes())
        (folder / "broken.png").write_bytes(b"not an image")
        with pytest.raises(ValueError, match=r"broken\.png.*--skip_corrupt"):
            train(data, tmp_path / "run", "--train_data_dir", str(tmp_path / "images"))
        output_dir = train(data, tmp_path / "skipped", "--train_data_dir", str(tmp_path / "images"), "--skip_corrupt")
        assert (output_dir / "model_index.json").is_file()

    def test_model_config_that_does_not_fit_the_data(self, data, tmp_path):
        (tmp_path / "model.json").write_text(json.dumps({**MODEL, "num_classes": 5}))
        with pytest.raises(ValueError, match=r"`num_classes` of .*model\.json must be 2 .* got 5"):
            train(data, tmp_path / "run", "--model_config_name_or_path", str(tmp_path / "model.json"))

    @pytest.mark.parametrize(
        "model, more, message",
        [
            ({}, ("--vae", "none", "--resolution", "9"), r"`--resolution 9` .* 3 x 9 x 9, .*`patch_size` \(2\)"),
            # The VAE has a factor of 4.
            ({}, ("--resolution", "20"), r"`--resolution 20` .* 4 x 5 x 5, .*`patch_size` \(2\)"),
            ({"in_channels": 3}, (), r"latents of 4 x 4 x 4, .*`in_channels` of .* must be 4 .* got 3"),
        ],
    )
    def test_model_that_does_not_fit_the_latents_before_they_are_made(self, data, tmp_path, model, more, message):
        (tmp_path / "model.json").write_text(json.dumps({**MODEL, **model}))
        with pytest.raises(ValueError, match=message):
            train(data, tmp_path / "run", *more, "--model_config_name_or_path", str(tmp_path / "model.json"))
        assert not (tmp_path / "run" / "latents").exists()

    def test_latents_of_another_vae(self, data, plain_copy, tmp_path):
        with pytest.raises(ValueError, match="was encoded with `vae` .* or another `folder`"):
            train(data, tmp_path / "other", "--vae", "none", "--latents_dir", str(plain_copy / "latents"))

    def test_averages_that_would_never_move(self, data, tmp_path):
        import train_mpdit

        argv = arguments(data, tmp_path / "run", "--num_train_epochs", "0.25", "--ema_update_steps", "4")
        place = argv.index("--max_train_steps")
        args = train_mpdit.parse_args([*argv[:place], *argv[place + 2 :]])
        # A quarter of 35 images, in batches of 4.
        with pytest.raises(ValueError, match="`--ema_update_steps` must be at most .* updates, 3, .* got 4"):
            train_mpdit.main(args)
