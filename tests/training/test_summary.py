"""The start block of a training run: each row from what it is told of, each warning from what a user overlooked."""

import pytest
from accelerate import Accelerator, init_empty_weights
from helpers import reset_accelerate

from diffusers_mp import MPDiTTransformer2DModel
from diffusers_mp.training.arguments import parse_args
from diffusers_mp.training.batch_size import divide_batch
from diffusers_mp.training.model import model_config
from diffusers_mp.training.summary import DataSummary, start_of_run


DATA = DataSummary(1000, {"cat": 600, "dog": 400}, 50, 3)


@pytest.fixture
def block(monkeypatch):
    """Rows by name, and the warnings, of a run that was never begun."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    reset_accelerate()

    def make(
        *flags,
        data=DATA,
        pooled_dim=None,
        learning_rate=None,
        num_known=None,
        max_train_steps=400_000,
        latent_shape=(4, 32, 32),
    ):
        args = parse_args(["--train_data_dir", "photos", "--output_dir", "never written", *flags])
        accelerator = Accelerator(cpu=True)
        batch = divide_batch(args, 1)
        args.train_batch_size, args.gradient_accumulation_steps = batch.micro, batch.accumulation
        with init_empty_weights():
            classes = len(data.counts) if data.counts else None
            model = MPDiTTransformer2DModel(**model_config(args, latent_shape, classes, pooled_dim))
        text = start_of_run(args, accelerator, data, model, learning_rate or 1e-2, max_train_steps, 0, num_known)
        lines = [line for line in text.splitlines() if not line.startswith("warning: ")]
        warnings = [line.removeprefix("warning: ") for line in text.splitlines() if line.startswith("warning: ")]
        return dict(line.split(maxsplit=1) for line in lines), warnings

    yield make
    reset_accelerate()


def test_rows_of_the_recipe(block):
    rows, warnings = block("--train_batch_size", "64", "--resolution", "256")
    assert warnings == []
    assert "float32, 1 process" in rows.pop("device")
    assert rows == {
        "batch": "256 images an update = 64 x 1 process x 4 accumulated",
        "data": "photos: 1,000 images at 256 pixels, 2 classes: cat (600), dog (400); 50 held out, 3 left out",
        "model": "S/2, configuration F; scale, rotate, gate; 30,568,011 parameters, latents of 4 x 32 x 32",
        "objective": "epsilon, variance_type learned_range",
        # 400 000 updates of 256 images out of 950.
        "updates": "400,000 (107,789.5 epochs); learning rate 0.01, inverse_sqrt",
        "output": "never written: logs/metrics.jsonl each 10 updates, samples/ each 5,000, checkpoints each 5,000 "
        "(the last 3 are kept)",
        # 24 bytes for a parameter, 4 for one of the copy, 81 MiB for an image.
        "memory": "0.68 GiB of weights, gradients, optimiser and 2 averages; 116.6 MiB of the model that is "
        "validated, in main memory; about 5.08 GiB of activations of 64 images",
    }


def test_a_model_narrower_than_its_tokens_is_warned_of(block):
    _, warnings = block("--preset", "XS/8", "--train_batch_size", "64", latent_shape=(16, 32, 32))
    assert warnings == [
        "the model is 256 wide and its tokens have 1,024 numbers: a narrower model cannot learn them "
        "(RAE, arXiv 2510.11690)"
    ]
    assert block("--preset", "XS/8", "--train_batch_size", "64")[1] == []  # 4 channels: 256 numbers
    assert block("--preset", "XS/8", "--train_batch_size", "64", "--vae", "none", latent_shape=(16, 32, 32))[1] == []


def test_rows_follow_the_flags(block):
    rows, _ = block(
        *("--vae", "none", "--prediction_type", "flow_prediction", "--validation_steps", "0", "--ema_stds", "0.05"),
        *("--checkpoints_total_limit", "0", "--latents_dir", "elsewhere", "--configuration", "A"),
        *("--modulation", "scale", "shift", "gate", "--gradient_checkpointing"),
    )
    assert rows["objective"] == "flow_prediction, logit_mean 0.0, logit_std 1.0"
    assert rows["model"].startswith("S/2, configuration A; scale, shift, gate; ")
    assert rows["model"].endswith("pixels of 4 x 32 x 32")
    assert rows["output"].endswith("each 10 updates, checkpoints each 5,000 (all are kept)")
    assert " 1 averages; " in rows["memory"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("flow_sample --loss_space velocity", "flow_sample, logit_mean 0.0, logit_std 1.0, loss_space velocity"),
        # 4 x 32 x 32 values are those at which nothing is shifted.
        ("flow_epsilon --shift dimension", "flow_epsilon, logit_mean 0.0, logit_std 1.0, shift dimension (1)"),
        # exp(0.5) at 16 x 16 tokens.
        ("flow_epsilon --shift resolution", "flow_epsilon, logit_mean 0.0, logit_std 1.0, shift resolution (1.649)"),
        ("sample --loss_space epsilon", "sample, variance_type fixed_small, loss_space epsilon"),
    ],
)
def test_the_objective_is_told_with_its_loss_and_its_shift(block, flags, words):
    assert block("--prediction_type", *flags.split())[0]["objective"] == words


def test_a_stream_is_counted_by_encoding_it(block):
    data = DataSummary(None, {}, None)
    rows, warnings = block("--streaming", "--num_train_epochs", "2", data=data, max_train_steps=None)
    assert rows["data"] == "photos: a stream of numbered classes, counted while it is encoded at 128 pixels"
    assert rows["updates"] == "2.0 epochs; learning rate 0.01, inverse_sqrt"
    assert warnings == []


@pytest.mark.parametrize(
    "flags, options, message",
    [
        ((), {"data": DATA._replace(counts=None)}, "no classes were found, so the model is unconditional"),
        ((), {"data": DATA._replace(counts={"cat": 1000})}, "there is one class only"),
        ((), {"data": DATA._replace(counts={"cat": 1000, "dog": 0})}, "1 of 2 classes have no image to train on"),
        ((), {"num_known": 0}, "None knows none of the classes by name"),
        # 1000 images, of which 50 are held out by default.
        ((), {"data": DATA._replace(num_held_out=7)}, "7 images are held out and not 50: each class keeps its last"),
        (
            ("--num_validation_images", "800"),
            {"data": DATA._replace(num_held_out=800)},
            "an update has 256 images, more than the 200 there are",
        ),
        (("--total_batch_size", "64"), {}, "an update has 64 images, the recipe's 256"),
        ((), {"learning_rate": 1e-4}, "the learning rate is 0.0001, the recipe's for weights of norm 1 is 0.01"),
        (
            ("--configuration", "A", "--modulation", "scale", "shift", "gate"),
            {"learning_rate": 1e-2},
            "the learning rate is 0.01, the recipe's for plain weights is 0.0001",
        ),
    ],
)
def test_what_a_user_is_likely_to_have_overlooked(block, flags, options, message):
    (warning,) = block(*flags, **options)[1]
    assert warning.startswith(message)


def test_condition_vectors_are_conditions(block):
    assert block(data=DATA._replace(counts=None), pooled_dim=8)[1] == []
