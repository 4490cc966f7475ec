"""Images of an evaluation: each has its own seed and class, whatever it is generated together with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..data.draws import keyed_generator


if TYPE_CHECKING:
    from ..pipeline_mpdit import MPDiTPipeline


class NonFiniteImageError(FloatingPointError):
    """A pipeline has made an image with NaN or infinity in it."""


def image_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of one generated image, unrelated to that of any other and to all of training's.

    Args:
        seed (int): of the evaluation, not negative.
        index (int): of the image.
    Returns:
        torch.Generator: freshly seeded.
    """
    # Training's keys have up to two numbers.
    return keyed_generator(seed, 0, 0, index)


def generate_images(
    pipe: "MPDiTPipeline",
    indices: Sequence[int],
    *,
    seed: int,
    class_ids: Sequence[int] | None,
    num_inference_steps: int,
    guidance_scale: float,
) -> torch.Tensor:
    """Images by their numbers: each has its own seed and class, whatever it is generated together with.

    On one device in one precision, batches of other sizes change an image by no more than the rounding of the model.

    Args:
        pipe (MPDiTPipeline): class-conditional or unconditional.
        indices (sequence of int): numbers of the images.
        seed (int): of the evaluation; image i draws from `image_generator(seed, i)`.
        class_ids (sequence of int, optional): classes, which image i takes in turn, `class_ids[i % len(class_ids)]`:
            as many images of each, from the first on. None for a transformer without classes.
        num_inference_steps, guidance_scale: as in the pipeline's call.
    Returns:
        torch.Tensor: uint8, shape (B, channels, H, W), rounded as the pipeline rounds for PIL.
    Raises:
        NonFiniteImageError: naming the first image with NaN or infinity in it.
    """
    call: dict[str, Any] = {"num_images_per_class": len(indices)}
    if class_ids is not None:
        call = {"class_labels": [class_ids[index % len(class_ids)] for index in indices]}
    latents = pipe(
        **call,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=[image_generator(seed, index) for index in indices],
        output_type="latent",
    ).images
    with torch.no_grad():
        images = pipe.decode_latents(latents).float()
    # Before the range is cut, which would make white of infinity.
    wrong = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        index = indices[wrong[0]]
        label = "" if class_ids is None else f", class {class_ids[index % len(class_ids)]}"
        raise NonFiniteImageError(
            f"image {index} (seed {seed}{label}) is not finite with guidance scale {guidance_scale:g} and "
            f"{num_inference_steps} steps in {pipe.transformer.dtype}; {len(wrong)} of its batch of {len(indices)} "
            "are so. Weights that are not finite, half precision, or a guidance scale too large are the usual causes."
        )
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
