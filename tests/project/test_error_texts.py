"""The likeliest mistakes of a new user, each with a message that says what to do."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel, IPNDMScheduler
from helpers import tiny_inputs, tiny_model, tiny_vae
from processes import run_python
from torch import nn

from diffusers_mp import (
    MPDiTPipeline,
    MPDiTTransformer2DModel,
    MPLinear,
    MPPatchEmbed,
    RotationModulation,
    ScaleModulation,
    get_preset,
    parameter_groups,
)
from diffusers_mp.functional import position_table


def model(**changes):
    return lambda: tiny_model().eval()(**{**tiny_inputs(), **changes})


def pipeline(*args, vae=True, **arguments):
    def call():
        pipe = MPDiTPipeline(tiny_model().eval(), DDIMScheduler(clip_sample=False), tiny_vae() if vae else None)
        pipe(*args, num_inference_steps=2, **arguments)

    return call


MISTAKES = {
    "another dtype than the model's": (
        model(hidden_states=torch.zeros(3, 4, 8, 8, dtype=torch.bfloat16)),
        r"must have the dtype of the model, torch.float32, got torch.bfloat16: convert one to the other, or use",
    ),
    "images as bytes": (
        model(hidden_states=torch.zeros(3, 4, 8, 8, dtype=torch.uint8)),
        "must have the dtype of the model, torch.float32, got torch.uint8",
    ),
    "class labels as floats": (
        model(class_labels=torch.zeros(3)),
        r"`class_labels` must be integers \(int64 or int32\) of shape \(3,\) .*, got torch.float32",
    ),
    "class labels as one-hot vectors": (
        model(class_labels=torch.zeros(3, 10, dtype=torch.long)),
        r"of shape \(3,\) for a model with `num_classes=10`, got torch.int64 of shape \(3, 10\)",
    ),
    "no class labels": (
        model(class_labels=None),
        "for a model with `num_classes=10`, got None: the null id 10 stands for no class",
    ),
    "a class label too many": (
        model(class_labels=torch.tensor([0, 1, 11])),
        r"must be in \[0, 10\], where 10 is the null",
    ),
    "a number for a timestep": (
        model(timestep=5),
        r"at least float32 of shape \(3,\), got 5: .*`torch.full\(\(3,\), step\)` is one step for all",
    ),
    "one timestep for the batch": (
        model(timestep=torch.tensor(5)),
        r"`timestep` must be .* of shape \(3,\), got torch.int64 of shape \(\)",
    ),
    "timesteps in half precision": (
        model(timestep=torch.zeros(3, dtype=torch.bfloat16)),
        "must be integers or at least float32 .* got torch.bfloat16 of shape .*: half precision rounds",
    ),
    "latents without a batch": (model(hidden_states=torch.zeros(4, 8, 8)), r"shape \(B, 4, H, W\), got \(4, 8, 8\)"),
    "latents of wrong size": (
        model(hidden_states=torch.zeros(3, 4, 8, 9)),
        r"must be divisible by `patch_size` \(2\), got 8x9",
    ),
    "RGB images to a latent model": (
        model(hidden_states=torch.zeros(3, 3, 8, 8)),
        r"must have shape \(B, 4, H, W\), got \(3, 3, 8, 8\)",
    ),
    "an unknown preset": (
        lambda: get_preset("DiT-XL/2"),
        r"must be one of .*'XL'\], a slash and one of .* got 'DiT-XL/2'",
    ),
    "a preset without a size": (lambda: get_preset(2), "as in 'S/2', got 2"),
    "an unknown modulation": (
        lambda: tiny_model(modulation=("scale", "rotation")),
        r"distinct names out of \['scale', 'shift', 'rotate', 'gate'\], got \['scale', 'rotation'\]",
    ),
    "no patches": (lambda: tiny_model(patch_size=0), "`patch_size` must be an integer of at least 1, got 0"),
    "no heads": (lambda: tiny_model(num_attention_heads=0), "`num_attention_heads` must be an integer of .* 1, got 0"),
    "a size of two numbers": (
        lambda: tiny_model(sample_size=(8, 8)),
        r"`sample_size` must be an integer of at least 1, got \(8, 8\)",
    ),
    "no channels": (lambda: tiny_model(out_channels=0), "`out_channels` must be an integer of .*, or None, got 0"),
    "no feed-forward": (lambda: tiny_model(mlp_ratio=0), "`mlp_ratio` must give .* a width of at least 1, got 0"),
    "labels in a list": (model(class_labels=[0, 1, 2]), r"must be .* of shape \(3,\) .*, got \[0, 1, 2\]"),
    "patches that do not fit": (
        lambda: MPPatchEmbed(2, 3, 8)(torch.zeros(1, 3, 5, 4)),
        r"must have shape \(B, 3, H, W\), H and W divisible by 2, got \(1, 3, 5, 4\)",
    ),
    "tokens without a batch": (
        lambda: RotationModulation(8, 4)(torch.zeros(2, 8), torch.zeros(2, 4)),
        r"must have shape \(B, N, 8\) and `conditioning` \(B, 4\), got \(2, 8\) and \(2, 4\)",
    ),
    "tokens in rows and columns": (
        lambda: ScaleModulation(8, 4)(torch.zeros(2, 2, 5, 8), torch.zeros(2, 4)),
        r"must have shape \(B, N, 8\) and `conditioning` \(B, 4\), got \(2, 2, 5, 8\)",
    ),
    "a position table of odd width": (
        lambda: position_table(2, 2, 6, torch.device("cpu"), torch.float32),
        "`dim` must be divisible by 4, got 6",
    ),
    "no scheduler": (lambda: MPDiTPipeline(tiny_model(), None), "must be a scheduler of diffusers, got a NoneType"),
    "a scheduler without a prediction type": (
        lambda: MPDiTPipeline(tiny_model(), IPNDMScheduler()),
        "must have a prediction_type, or be one for flows: .*; IPNDMScheduler has none",
    ),
    "a bias": (lambda: MPLinear(4, 4, bias=True), "`bias` must be False: .* append a constant 1 to the input"),
    "a bias by its place": (lambda: MPLinear(4, 4, True), "`bias` must be False"),
    "rotation of an odd width": (lambda: RotationModulation(7, 4), "must be a multiple of 2 for 'rotate', .* got 7"),
    "weight decay on unit rows": (
        lambda: parameter_groups(tiny_model(), lr=1e-2, weight_decay=0.1),
        "`weight_decay` must be 0 for a model with normalised rows",
    ),
    "a name without names": (
        pipeline("cat"),
        r"has the name 'cat', but this pipeline has no `id2label`; use an id in",
    ),
    "no class to sample": (pipeline(), r"`class_labels` must be given: ids in \[0, 9\] or names"),
    "a size that does not fit": (pipeline(1, height=20, width=16), "positive multiples of .* got 20 x 16"),
    "latents of another size to the pipeline": (
        pipeline(1, latents=torch.zeros(1, 4, 4, 4)),
        r"`latents` must be a tensor of shape \(1, 4, 8, 8\), got \(1, 4, 4, 4\)",
    ),
    "too few generators": (
        pipeline([1, 2], generator=[torch.Generator()]),
        "a list with one for each of the 2 images, got 1",
    ),
    "a seed for a generator": (
        pipeline([1, 2], generator=3),
        "`generator` must be one torch.Generator or a list with one for each of the 2 images, got 3",
    ),
    "guidance of no number": (
        pipeline(1, guidance_scale=float("nan")),
        "`guidance_scale` must be a finite number, got nan",
    ),
    "no steps": (
        lambda: MPDiTPipeline(tiny_model(), DDIMScheduler())(1, num_inference_steps=0),
        "`num_inference_steps` must be an int of at least 1, got 0",
    ),
    "a stock DiT in the pipeline": (
        lambda: MPDiTPipeline(
            DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1), DDIMScheduler()
        ),
        "`transformer` must be an MPDiTTransformer2DModel, .* diffusers' own DiT runs in its DiTPipeline",
    ),
    "a VAE of other latents": (
        lambda: MPDiTPipeline(tiny_model(in_channels=3), DDIMScheduler(), tiny_vae()),
        r"`vae` must have as many latent channels as the transformer has input channels \(3\), got 4",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_message(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_a_plain_layer_s_arguments_are_taken():
    layer = MPLinear(4, 3, False)
    assert layer.weight.shape == (3, 4) == nn.Linear(4, 3, False).weight.shape


# Messages that are not ours to write, but that a user of this package will read


@pytest.fixture
def saved(tmp_path):
    MPDiTPipeline(tiny_model(), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    return tmp_path


def test_loading_with_the_base_class(saved):
    with pytest.raises(AttributeError, match="MPDiTPipeline"):
        DiffusionPipeline.from_pretrained(saved)


def test_forgetting_the_import(saved):
    printed = run_python(
        """
        import sys
        from diffusers import DiffusionPipeline
        try:
            DiffusionPipeline.from_pretrained(sys.argv[1])
        except Exception as error:
            print(type(error).__name__, error)
        """,
        saved,
    )
    assert "MPDiTPipeline" in printed


def test_loading_the_transformer_from_the_pipeline_s_folder(saved):
    with pytest.raises(OSError, match="config.json"):
        MPDiTTransformer2DModel.from_pretrained(saved)
    assert MPDiTTransformer2DModel.from_pretrained(saved, subfolder="transformer").config.num_classes == 10
