"""The model card of a rotation swap: of a pipeline, or of an adapter of any class."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..files import component_names, read_json
from .cards import filled, licence, quoted, table, text_of, told_arguments, variant_option, write_card
from .hub import ADAPTER_CONFIG_NAME, files_to_publish, is_repo_id


_REPORTED_FINETUNING = (
    *("swap", "anneal_steps", "distillation", "train", "rank", "sublayers", "num_calibration_samples"),
    *("max_train_steps", "total_batch_size", "learning_rate", "lr_scheduler"),
    *("lr_warmup_steps", "adam_weight_decay", "max_grad_norm", "class_dropout_prob", "random_flip", "mixed_precision"),
    *("lr_num_cycles", "lr_power", "seed"),
)
_OPTIONS = ("sublayers", "keep_shift", "mean_shift", "rank")
_MEASURES = ("loss", "mse", "relative_error")


def write_rotation_card(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    base_model: str | None = None,
    record: Mapping | None = None,
    license: str | None = None,
) -> ModelCard:
    """Write README.md of a `DiTPipeline` whose shifts became rotations, or of a rotation adapter of any class.

    Says how to load it, what was swapped, and what `examples/finetune_rotation.py` has measured; no local path.

    Args:
        folder (str or Path): what `save_pretrained` or `save_rotation_adapter` wrote.
        repo_id (str, optional): where it will be published, for the card's code.
        base_model (str, optional): what was swapped, told if it is the id of a repository.
        record (mapping, optional): content of `evaluation.json`: `arguments`, `num_parameters`, and a mapping of
            measures for each of `before`, `after_swap` and `final`.
        license (str, optional): licence of the weights.
    Returns:
        ModelCard: the card as written.
    Raises:
        ValueError: if the folder holds no complete pipeline or adapter.
    """
    folder, record = Path(folder), record or {}
    files_to_publish(folder)
    is_adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
    config = read_json(folder / ADAPTER_CONFIG_NAME, {}) or read_json(folder / "transformer" / "config.json", {})
    swap = config if is_adapter else config.get("rotation_modulation")
    class_name = config["base_model_class"] if is_adapter else config["_class_name"].removeprefix("Rotation")
    is_dit = class_name == "DiTTransformer2DModel"
    base, arguments = base_model if is_repo_id(base_model) else None, record.get("arguments", {})
    what = "fine-tuned, without a swap"
    if swap is not None:
        what = "whose AdaLN shifts were swapped for rotations by `diffusers-mp`, then fine-tuned"
    if arguments.get("max_train_steps") == 0:
        what = what.replace(", then fine-tuned", " and not fine-tuned")
    title = f"{'DiT' if is_dit else class_name} with rotation modulation"
    dataset = arguments.get("dataset_name")
    finetuning = told_arguments(arguments, _REPORTED_FINETUNING)
    if finetuning:
        data = f"[{dataset}](../../datasets/{dataset})" if is_repo_id(dataset) else "data on the author's machine"
        finetuning = f"On {data}.\n\n{finetuning}"
    parts = {
        "title": text_of(repo_id.split("/")[-1]) if repo_id else title,
        "adapter_or_from": "Adapter for" if is_adapter else "From",
        "base": f"[{base}](https://huggingface.co/{base})" if base else "a model of the author's own",
        "class_name": class_name,
        "what": what,
        "usage": _usage(folder, config, "DiTPipeline" if is_dit else "DiffusionPipeline", base, repo_id),
        "swap": table(("option", "value"), [(name, swap[name]) for name in _OPTIONS] if swap is not None else []),
        "evaluation": _stages(record),
        "finetuning": finetuning,
        "license": licence(license, None, None),
    }
    card_data = ModelCardData(
        library_name="diffusers",
        base_model=base,
        license=license,
        datasets=[dataset] if is_repo_id(dataset) else None,
        tags=[
            *("diffusers", "diffusers-mp", "diffusion-transformer"),
            *(["class-conditional"] if is_dit else []),
            *(["rotation-modulation"] if swap is not None else []),
            "arxiv:2505.19122",
        ],
    )
    return write_card(folder, card_data, filled(("rotation", "end"), parts))


def _usage(folder: Path, config: dict, pipeline_class: str, base: str | None, repo_id: str | None) -> str:
    source = quoted(repo_id or "folder")
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return f"""from diffusers import {pipeline_class}
from diffusers_mp import load_rotation_adapter

pipe = {pipeline_class}.from_pretrained({quoted(base or "base model")})
load_rotation_adapter(pipe.transformer, {source})"""
    # Importing the package alone is enough for a folder, but not for a repository.
    class_import = ""
    if config.get("rotation_modulation") is not None:
        class_import = f"\nfrom diffusers_mp import {config['_class_name']}  # known to diffusers from here on"
    return f"""from diffusers import {pipeline_class}{class_import}

pipe = {pipeline_class}.from_pretrained({source}{variant_option(folder, component_names(folder))})"""


def _stages(record: Mapping) -> str:
    stages = [stage for stage in ("before", "after_swap", "final") if stage in record]
    if not stages:
        return ""
    rows = [(stage.replace("_", " "), *(record[stage][name] for name in _MEASURES)) for stage in stages]
    return (
        "On images held out of the fine-tuning, at fixed noise levels. The relative error is the squared difference "
        "of the predicted noise from the untouched model's.\n\n"
        + table(("stage", "loss", "squared error", "relative error"), rows)
        + f"\n\nParameters of the transformer: {record['num_parameters']['before']:,} before, "
        f"{record['num_parameters']['after']:,} after."
    )
