"""What a call of the pipeline is given: held against the components, and made what the loop takes."""

import difflib
import math
from collections.abc import Sequence

import numpy as np
import torch

from . import guidance
from .class_labels import ids_by_name


def label_ids(
    class_labels: int | str | Sequence[int | str] | torch.Tensor, num_classes: int | None, id2label: dict | None
) -> list[int]:
    """Class ids for ids and names; errors as in `MPDiTPipeline.get_label_ids`."""
    if num_classes is None:
        raise ValueError(
            "`class_labels` must be None for a transformer without classes (`num_classes=None`); set "
            f"`num_images_per_class` for the number of images. Got {class_labels!r}."
        )
    if isinstance(class_labels, (torch.Tensor, np.ndarray)):
        class_labels = class_labels.reshape(-1).tolist()
    if isinstance(class_labels, (int, str, np.integer)):
        class_labels = [class_labels]
    if not isinstance(class_labels, (list, tuple, range)) or len(class_labels) == 0:
        raise ValueError(f"`class_labels` must be a label or a non-empty list of labels, got {class_labels!r}.")
    ids_of, ids = ids_by_name(id2label), []
    for label in class_labels:
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
        elif isinstance(label, (int, np.integer)) and not isinstance(label, bool):
            if not 0 <= label < num_classes:
                raise ValueError(f"`class_labels` must be ids in [0, {num_classes - 1}] or names, got {label}.")
            ids.append(int(label))
        else:
            raise ValueError(f"`class_labels` must be ids (int) or names (str), got {label!r}.")
    return ids


def check_inputs(
    pipe,
    num_images_per_class: int,
    height: int,
    width: int,
    num_inference_steps: int,
    output_type: str,
    callback_on_step_end_tensor_inputs: list[str],
) -> None:
    """Refuse sizes and kinds of output that the components cannot make; errors as in `MPDiTPipeline.check_inputs`."""
    patch_size = pipe.transformer.config.patch_size
    if pipe.guidance_transformer is not None:
        patch_size = math.lcm(patch_size, pipe.guidance_transformer.config.patch_size)
    multiple = pipe.vae_scale_factor * patch_size
    if any(not isinstance(side, int) or side < 1 or side % multiple for side in (height, width)):
        raise ValueError(
            f"`height` and `width` must be positive multiples of {multiple} (VAE factor {pipe.vae_scale_factor} x "
            f"patch size {patch_size}), got {height}x{width}."
        )
    counts = {"num_images_per_class": num_images_per_class, "num_inference_steps": num_inference_steps}
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an int of at least 1, got {value!r}.")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
    unknown = [name for name in callback_on_step_end_tensor_inputs if name not in pipe._callback_tensor_inputs]
    if unknown:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` must be among {pipe._callback_tensor_inputs}, got {unknown}."
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
