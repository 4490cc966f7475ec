"""Features of images, from a declared model: what the distances of an evaluation are measured in.

A distance means something only together with the model, its weights and the way images are brought to its size. Each
extractor therefore has a description of all three, which goes into every result.
"""

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from ..files import sha256_of_weights
from ..masking import masked
from ..sources import check_reachable


INCEPTION = "torch-fidelity"
# Entries of a description that name the model, and those that identify it wherever it lies.
_NAMES = ("id", "revision", "transformers")
_CONTENTS = ("weights_sha256", "source_sha256")


class FeatureExtractor:
    """A function from images to features, with the description that results are labelled by.

    Args:
        function (callable): from images, uint8 of shape (B, 3, H, W), to features of shape (B, D), or to a tuple of
            features and logits of classes, shape (B, K), where an Inception score is wanted.
        description (mapping): at least `id`, its name; anything that JSON knows. Change it when the function changes:
            statistics are cached under it.
    Raises:
        ValueError: if the description has no `id`.
    """

    def __init__(self, function: Callable[[torch.Tensor], Any], description: Mapping[str, Any]):
        if not description.get("id"):
            raise ValueError(f"`description` must name the extractor under 'id', got {dict(description)}.")
        self.function = function
        self.description = masked(description)  # it goes into every result

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the description, without names of places if it has the hash of a content."""
        content = self.description
        if any(name in content for name in _CONTENTS):
            content = {key: value for key, value in content.items() if key not in _NAMES}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features of images, checked.

        Args:
            images (torch.Tensor): uint8, shape (B, 1 or 3, H, W); grey ones are given to the function as RGB.
        Returns:
            tuple: features, float32 on the CPU, shape (B, D), and logits likewise, or None.
        Raises:
            ValueError: if images are of another kind, or features of another shape or not finite.
        """
        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
            is_tensor = isinstance(images, torch.Tensor)
            kind = f"{images.dtype} of shape {tuple(images.shape)}" if is_tensor else type(images).__name__
            raise ValueError(
                "`images` must be one uint8 tensor of shape (B, 1 or 3, H, W), all of one size (`prepare_image` "
                f"makes them so), got {kind}."
            )
        if images.shape[1] not in (1, 3):
            raise ValueError(f"`images` must have 1 or 3 channels, got shape {tuple(images.shape)}.")
        output = self.function(images.expand(-1, 3, -1, -1))
        features, logits = output if isinstance(output, tuple) else (output, None)
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(
                f"the extractor {self.description['id']!r} must return features of shape ({len(images)}, D), got "
                f"{shape}."
            )
        if not features.isfinite().all():
            raise ValueError(f"the extractor {self.description['id']!r} returned features that are not finite.")
        return features.float().cpu(), None if logits is None else logits.float().cpu()


def load_extractor(
    name: str,
    *,
    revision: str | None = None,
    output: str = "pooler_output",
    device: str | torch.device = "cpu",
    cache_dir: str | None = None,
) -> FeatureExtractor:
    """The extractor that a name stands for.

    Args:
        name (str): a vision model of `transformers` by id or path; "module:function", something importable that takes
            images as in `FeatureExtractor`; or "torch-fidelity", the Inception network of FID. A function is known
            by the source of its module; what else it depends on, such as a file of weights, it must tell in a mapping
            `description` of its own (`function.description = {"weights_sha256": ...}`).
        revision, output, cache_dir: as in `transformers_extractor`.
        device (str or torch.device): where it computes, and where a function of one's own gets images.
    Returns:
        FeatureExtractor: with its description.
    Raises:
        ImportError: if the function, or torch-fidelity, cannot be imported.
        OSError, ValueError: as in `transformers_extractor`.
    """
    if name == INCEPTION:
        return inception_extractor(device)
    if ":" in name and not Path(name).exists():
        module_name, _, function_name = name.partition(":")
        module = importlib.import_module(module_name)
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ImportError(
                f"{module_name} must have a function {function_name!r}, named by the extractor {name!r}."
            )
        source_hash = hashlib.sha256(inspect.getsource(module).encode()).hexdigest()
        description = {**getattr(function, "description", {}), "id": name, "function": function_name}
        description["source_sha256"] = source_hash
        return FeatureExtractor(lambda images: function(images.to(device, non_blocking=True)), description)
    return transformers_extractor(name, revision=revision, output=output, device=device, cache_dir=cache_dir)


def transformers_extractor(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    output: str = "pooler_output",
    device: str | torch.device = "cpu",
    cache_dir: str | None = None,
) -> FeatureExtractor:
    """A vision model of `transformers` in float32.

    Images are resized as a whole to the side that the model was trained on, by PIL with the filter that the image
    processor names (PIL filters without aliasing), and normalised by the processor's mean and standard deviation. The
    processor itself is not used: many resize to more than that side and cut the borders off, where defects would go
    unseen, and some compute otherwise where torchvision is installed.

    Args:
        name (str): id on the Hub, or a folder with the model (safetensors) and its `preprocessor_config.json`.
        revision (str, optional): of the repository.
        output (str): the field of the model's output that is taken, one vector for each image. For DINOv2
            `pooler_output` is the class token after the last normalisation, as in arXiv 2306.04675.
        device (str or torch.device): where it computes.
        cache_dir (str, optional): where files of the Hub are kept.
    Returns:
        FeatureExtractor: its description holds id, commit, class, SHA-256 of the weights, output and preprocessing.
    Raises:
        OSError: if there is no such model, or none within reach.
        ValueError: if weights are missing in the checkpoint, the processor names no size, or there is no such output.
    """
    source = {"revision": revision, "cache_dir": cache_dir}
    try:
        check_reachable("extractors", str(name), ["config.json"], **source, instead="a folder, or 'module:function'")
        processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil", **source).to_dict()
        model, loading = transformers.AutoModel.from_pretrained(
            name, **source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise OSError(
            "an extractor must be a vision model of transformers, by folder or by its id on the Hub, within reach or "
            f"downloaded before, 'module:function', or {INCEPTION!r}, got {str(name)!r}: {error}"
        ) from error
    if loading["missing_keys"]:
        raise ValueError(
            f"{str(name)!r} must hold all weights of a {type(model).__name__}, it lacks "
            f"{sorted(loading['missing_keys'])[:5]}: features would come from random ones."
        )
    preprocessing = _preprocessing(str(name), processor)
    weights_hash = sha256_of_weights(model.state_dict())
    model = model.to(device).eval()

    def function(images: torch.Tensor) -> torch.Tensor:
        try:
            pixels = prepare_pixels(images, preprocessing)
            outputs = model(pixel_values=pixels.to(device, non_blocking=True))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{str(name)!r} must be a vision model, which takes pixel values alone; {type(model).__name__} says: "
                f"{error}"
            ) from error
        if outputs.get(output) is None:
            raise ValueError(f"`output` must be one of {list(outputs)} for {str(name)!r}, got {output!r}.")
        # Convolutional networks keep two axes of size 1.
        return outputs[output].flatten(1) if outputs[output].shape[2:].numel() == 1 else outputs[output]

    description = {
        "id": str(name),
        "revision": getattr(model.config, "_commit_hash", None) or revision,
        "class": type(model).__name__,
        "weights_sha256": weights_hash,
        "output": output,
        "preprocessing": preprocessing,
        "transformers": transformers.__version__,
    }
    return FeatureExtractor(function, description)


def _preprocessing(name: str, processor: Mapping[str, Any]) -> dict[str, Any]:
    size = (processor.get("do_center_crop") and processor.get("crop_size")) or processor.get("size") or {}
    side = size.get("shortest_edge")
    height, width = size.get("height", side), size.get("width", side)
    if not height or not width:
        raise ValueError(f"the image processor of {name!r} must name a size, got {dict(size)}.")
    normalizes = processor.get("do_normalize", True)
    return {
        "size": [height, width],
        "resample": Image.Resampling(processor.get("resample", Image.Resampling.BICUBIC)).name.lower(),
        "rescale_factor": processor.get("rescale_factor", 1 / 255),
        "mean": list(processor["image_mean"]) if normalizes else [0.0] * 3,
        "std": list(processor["image_std"]) if normalizes else [1.0] * 3,
    }


def prepare_pixels(images: torch.Tensor, preprocessing: Mapping[str, Any]) -> torch.Tensor:
    """Images as a model takes them.

    Args:
        images (torch.Tensor): uint8, shape (B, 3, H, W).
        preprocessing (mapping): `size` (height, width), `resample` (PIL's name), `rescale_factor`, `mean`, `std`.
    Returns:
        torch.Tensor: float32 on the CPU, shape (B, 3, height, width).
    """
    height, width = preprocessing["size"]
    resample = Image.Resampling[preprocessing["resample"].upper()]
    images = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    resized = np.stack([np.asarray(image.resize((width, height), resample)) for image in images])
    pixels = torch.from_numpy(resized).permute(0, 3, 1, 2).float() * preprocessing["rescale_factor"]
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def inception_extractor(device: str | torch.device = "cpu") -> FeatureExtractor:
    """The Inception network of FID and of the Inception score, as torch-fidelity has it.

    torch-fidelity needs torchvision, which this package does without: no test has run this function.

    Args:
        device (str or torch.device): where it computes.
    Returns:
        FeatureExtractor: 2048 features, and the logits that torch-fidelity takes for the Inception score.
    Raises:
        ImportError: if torch-fidelity is not installed.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.version import __version__
    except ImportError as error:
        raise ImportError(
            "FID and Inception score need two packages: `pip install torch-fidelity torchvision`."
        ) from error
    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device)
    description = {
        "id": f"{INCEPTION} inception-v3-compat",
        "revision": __version__,
        "class": "FeatureExtractorInceptionV3",
        "weights_sha256": sha256_of_weights(model.state_dict()),
        "output": "2048",
        "preprocessing": "torch-fidelity's: bilinear to 299x299 as in TensorFlow 1",
    }

    def extract(images):
        return tuple(model(images.to(device, non_blocking=True).contiguous()))

    return FeatureExtractor(extract, description)
