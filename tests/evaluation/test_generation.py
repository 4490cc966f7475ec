"""An image of an evaluation depends on its seed and class alone."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from helpers import tiny_model, tiny_vae

from diffusers_mp import MPDiTPipeline
from diffusers_mp.data.draws import keyed_generator
from diffusers_mp.evaluation.generation import NonFiniteImageError, generate_images, image_generator


@pytest.fixture(scope="module")
def pipe():
    pipe = MPDiTPipeline(
        tiny_model(class_dropout_prob=0.1).eval(),
        DDIMScheduler(clip_sample=False),
        tiny_vae(),
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL = {"seed": 3, "class_ids": [0, 4, 7], "num_inference_steps": 3, "guidance_scale": 2.0}


def test_batches_of_any_size_give_the_same_images(pipe):
    together = generate_images(pipe, range(7), **CALL)
    assert together.dtype == torch.uint8
    assert together.shape == (7, 3, 32, 32)
    for size in (1, 2, 5):
        parts = [generate_images(pipe, list(range(7))[start : start + size], **CALL) for start in range(0, 7, size)]
        difference = (torch.cat(parts).int() - together.int()).abs()
        # Sums of another order may round a value to the byte beside it.
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3
    images = generate_images(pipe, [5, 1], **CALL)
    assert ((images.int() - together[[5, 1]].int()).abs() <= 1).all()
    assert (together[0] != together[3]).any()  # of one class, of other seeds


def test_an_image_is_what_the_pipeline_makes_of_its_seed_and_class(pipe):
    options = {"num_inference_steps": 3, "guidance_scale": 2.0}
    image = pipe([7], generator=image_generator(3, 5), **options).images[0]
    assert np.array_equal(np.asarray(image), generate_images(pipe, [5], **CALL)[0].permute(1, 2, 0))


def test_seeds_are_unrelated_to_each_other_and_to_training():
    draws = [image_generator(seed, index).initial_seed() for seed in (0, 1) for index in range(50)]
    draws += [keyed_generator(0, *key).initial_seed() for key in ((), *((epoch,) for epoch in range(50)))]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_named(pipe, value):
    broken = copy.deepcopy(pipe)
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias[0] = value
    message = r"image 4 \(seed 3, class 4\) is not finite with guidance scale 2 and 3 steps in torch.float32; 2 of its"
    with pytest.raises(NonFiniteImageError, match=message):
        generate_images(broken, [4, 5], **CALL)
