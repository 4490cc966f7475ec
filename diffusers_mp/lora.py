"""LoRA of the transformer through the pipeline: diffusers' loader, with a file that does not fit refused."""

import torch
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin

from .rows import check_start


class TransformerLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """What pipelines of diffusers have for LoRA: `load_lora_weights`, `set_adapters`, `fuse_lora` and the rest.

    Other pipelines of one transformer have copies of the class of diffusers that this one extends. A
    `guidance_transformer` has none of the LoRA: it is what is guided away from.
    """

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, **kwargs):
        """As in diffusers, from safetensors only.

        Raises:
            ValueError: if another kind of file is asked for.
        """
        weight_name = kwargs.get("weight_name")
        if kwargs.get("use_safetensors") is False or weight_name and not str(weight_name).endswith(".safetensors"):
            raise ValueError(
                "`weight_name` must be a safetensors file and `use_safetensors` not False: a LoRA is read from "
                f"safetensors only, got {weight_name!r}."
            )
        return super().lora_state_dict(pretrained_model_name_or_path_or_dict, **{**kwargs, "use_safetensors": True})

    @classmethod
    def load_lora_into_transformer(cls, state_dict, transformer, *args, metadata=None, **kwargs) -> None:
        """As in diffusers.

        Raises:
            ValueError: if a weight is of a layer that the transformer has not, or of one of another size; if the
                LoRA changes weights beside it, which normalised rows (`forced_weight_normalization=False`) refuse.
        """
        for name, weight in state_dict.items():
            _check_fit(name, weight, transformer)
        if transformer._has_free_rows():
            check_start({name.removeprefix("transformer."): value for name, value in (metadata or {}).items()})
        super().load_lora_into_transformer(state_dict, transformer, *args, metadata=metadata, **kwargs)


def _check_fit(name: str, weight: torch.Tensor, transformer: torch.nn.Module) -> None:
    layer_name, _, part = name.removeprefix("transformer.").partition(".lora")
    got = f"{name!r} of shape {tuple(weight.shape)}"
    if not name.startswith("transformer."):
        raise ValueError(
            "names in a LoRA for a pipeline must begin with 'transformer.', as `save_lora_weights` writes them, got "
            f"{got}: one saved by `transformer.save_lora_adapter` is for `pipe.transformer.load_lora_adapter(..., "
            "prefix=None)`."
        )
    try:
        layer = transformer.get_submodule(layer_name)
    except AttributeError:
        layer = None
    sizes = getattr(getattr(layer, "base_layer", layer), "weight", torch.empty(0)).shape
    # Of a linear map: A from its inputs, B to its outputs.
    side = {"_A.weight": 1, ".down.weight": 1, "_B.weight": 0, ".up.weight": 0}.get(part)
    if len(sizes) != 2 or side is not None and weight.shape[side] != sizes[side]:
        has = "no such layer" if layer is None else f"one with a weight of shape {tuple(sizes)}"
        raise ValueError(f"a LoRA must be of layers that the transformer has, got {got}, where it has {has}.")
