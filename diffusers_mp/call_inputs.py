"""What a call of the pipeline is given: held against the components, and made what the loop takes."""

import difflib
import inspect
import math
import operator
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch
from diffusers import EDMEulerScheduler, UniPCMultistepScheduler
from diffusers.schedulers import SchedulerMixin

from . import autoencoders, guidance, schedulers
from .class_labels import ids_by_name


_TAKE_OTHER_SIGMAS = (EDMEulerScheduler, UniPCMultistepScheduler)


def label_ids(
    class_labels: int | str | Sequence[int | str] | torch.Tensor, num_classes: int | None, id2label: dict | None
) -> list[int]:
    """Class ids for ids and names; errors as in `MPDiTPipeline.get_label_ids`."""
    if num_classes is None:
        raise ValueError(
            "`class_labels` must be None for a transformer without classes (`num_classes=None`); set "
            f"`num_images_per_class` for the number of images. Got {class_labels!r}."
        )
    labels = _flat(class_labels)
    if not labels:
        raise ValueError(f"`class_labels` must be a label or a non-empty list of labels, got {class_labels!r}.")
    ids_of, ids = ids_by_name(id2label), []
    for label in labels:
        if isinstance(label, str):
            if id2label is None:
                raise ValueError(
                    f"`class_labels` has the name {label!r}, but this pipeline has no `id2label`; use an id in "
                    f"[0, {num_classes - 1}]."
                )
            found = sorted(ids_of.get(label.strip(), ()))
            if len(found) > 1:
                raise ValueError(f"`class_labels` has the ambiguous name {label!r}; use one of its ids: {found}.")
            if not found:
                close = difflib.get_close_matches(label, ids_of, n=3, cutoff=0.5)
                hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
                raise ValueError(
                    f"`class_labels` must be ids or names from `pipe.id2label`, got the unknown name {label!r}.{hint}"
                )
            ids.extend(found)
        elif is_whole(label):
            if not 0 <= label < num_classes:
                raise ValueError(f"`class_labels` must be ids in [0, {num_classes - 1}] or names, got {label}.")
            ids.append(int(label))
        else:
            raise ValueError(f"`class_labels` must be ids (int) or names (str), got {label!r}.")
    return ids


def _flat(labels) -> list:
    # As nested as `[[1], [4]]`, which is how diffusers makes a batch of `[1]`.
    if isinstance(labels, (torch.Tensor, np.ndarray)):
        labels = labels.reshape(-1).tolist()
    if isinstance(labels, (list, tuple, range)):
        return [label for each in labels for label in _flat(each)]
    return [labels]


def is_whole(value) -> bool:
    """Whether a value is an integer, of Python or NumPy, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_inputs(
    pipe, numbers: dict[str, int], height: int, width: int, output_type: str, names_for_callback: list[str]
) -> None:
    """Refuse numbers, sizes and kinds of output that the components of a pipeline cannot make.

    Raises:
        ValueError: naming the argument of the call, the rule and what it got.
    """
    patch_size = pipe.transformer.config.patch_size
    if pipe.guidance_transformer is not None:
        patch_size = math.lcm(patch_size, pipe.guidance_transformer.config.patch_size)
    multiple = pipe.vae_scale_factor * patch_size
    if any(not is_whole(side) or side < 1 or side % multiple for side in (height, width)):
        raise ValueError(
            f"`height` and `width` must be ints, positive multiples of {multiple} (VAE factor "
            f"{pipe.vae_scale_factor} x patch size {patch_size}), got {height!r} x {width!r}."
        )
    if pipe.vae is not None:
        autoencoders.check_image_size(pipe.vae, height, width)
    for name, value in numbers.items():
        if not is_whole(value) or value < 1:
            raise ValueError(f"`{name}` must be an int of at least 1, got {value!r}.")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
    if isinstance(names_for_callback, str) or not set(names_for_callback) <= set(pipe._callback_tensor_inputs):
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` must be a list of names out of {pipe._callback_tensor_inputs}, got "
            f"{names_for_callback!r}."
        )


def conditions(pipe, class_labels, pooled_projections, num_images_per_class: int) -> dict[str, torch.Tensor]:
    """What the transformer is told of each image, by the names of its arguments."""
    num_classes, dim = pipe.transformer.config.num_classes, pipe.transformer.config.pooled_projection_dim
    of_images = {}
    if class_labels is not None:
        of_images["class_labels"] = torch.tensor(pipe.get_label_ids(class_labels))
    elif num_classes is not None:
        raise ValueError(f"`class_labels` must be given: ids in [0, {num_classes - 1}] or names from `pipe.id2label`.")
    if pooled_projections is not None:
        guidance.check_vectors("pooled_projections", pooled_projections, dim)
        of_images["pooled_projections"] = pooled_projections
    elif dim is not None:
        raise ValueError(f"`pooled_projections` must be given: vectors of shape (N, {dim}), one for each condition.")
    numbers = [len(of_each) for of_each in of_images.values()]
    if len(set(numbers)) > 1:
        raise ValueError(
            f"`class_labels` and `pooled_projections` must be of equal number, got {numbers[0]} and {numbers[1]}."
        )
    return {
        name: of_each.to(pipe._execution_device).repeat_interleave(num_images_per_class, dim=0)
        for name, of_each in of_images.items()
    }


def set_timesteps(
    scheduler: SchedulerMixin,
    num_tokens: int,
    num_inference_steps: int,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> None:
    """Set the steps of a scheduler: a number of them, or those given. A flow's shift applies to both.

    Raises:
        ValueError: if the scheduler does not take them, or would take others than those; if both are given.
    """
    # On the CPU, as the scheduler's tables are: it would read one of a device several times in each step.
    shift = schedulers.shift_options(scheduler, num_tokens)
    if timesteps is None and sigmas is None:
        scheduler.set_timesteps(num_inference_steps, device="cpu", **shift)
        return
    if timesteps is not None and sigmas is not None:
        raise ValueError("`timesteps` and `sigmas` must not be given both: each says which steps to take.")
    name, values = ("timesteps", timesteps) if sigmas is None else ("sigmas", sigmas)
    is_flow, options = schedulers.is_flow(scheduler), inspect.signature(scheduler.set_timesteps).parameters
    # For flows, diffusers shifts the noise level and not the timestep, or ignores what is given. EDM's samplers take
    # positions on their curve for noise levels, UniPC levels of a flow alone.
    suits = not is_flow if name == "timesteps" else is_flow or not isinstance(scheduler, _TAKE_OTHER_SIGMAS)
    if name not in options or not suits:
        kind = "flow" if is_flow else "diffusion"
        way_out = "; `sigmas` are its shares of the noise" if is_flow and name != "sigmas" in options else ""
        raise ValueError(
            f"`{name}` must be None with {type(scheduler).__name__}, which takes none of a {kind}{way_out}; got "
            f"{values!r}."
        )
    values = values.tolist() if isinstance(values, (torch.Tensor, np.ndarray)) else values
    top = {"timesteps": scheduler.config.num_train_timesteps - 1, "sigmas": 1 if is_flow else math.inf}[name]
    if not _is_descending(values, top):
        raise ValueError(f"`{name}` must be numbers that descend from {top} at most to 0 at least, got {values!r}.")
    # UniPC calculates with what it is given.
    scheduler.set_timesteps(**{name: np.array(values)}, device="cpu", **shift)
    taken = scheduler.timesteps.unique().flip(0).tolist()  # samplers of order 2 have each twice
    if name == "timesteps" and taken != list(values):
        raise ValueError(
            f"`timesteps` must be whole for a {type(scheduler).__name__}, which takes {taken}; got {values}."
        )


def _is_descending(values, top: float) -> bool:
    if not isinstance(values, (list, tuple, range)) or not all(isinstance(value, Real) for value in values):
        return False
    return len(values) > 0 and top >= values[0] and values[-1] >= 0 and all(map(operator.gt, values, values[1:]))


def latents_after(returned: dict | None, latents: torch.Tensor) -> torch.Tensor:
    """The latents to go on with after a callback has returned.

    Raises:
        TypeError: if it has returned something else than a dict or None.
    """
    if returned is None:
        return latents
    if not isinstance(returned, dict):
        raise TypeError(f"`callback_on_step_end` must return a dict or None, got {type(returned).__name__}.")
    return returned.get("latents", latents)
