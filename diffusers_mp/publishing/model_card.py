"""The model card of a trained pipeline, with its sample grid and its training curve."""

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from ..autoencoders import geometry, has_statistics
from ..files import component_names, read_json
from .cards import (
    filled,
    licence,
    quoted,
    table,
    text_of,
    told_arguments,
    variant_option,
    weights,
    write_card,
)
from .hub import CURVE_NAME, GRID_NAME, average_folders, files_to_publish, has_component, is_repo_id
from .training_curve import curve_rows, draw_curve, log_file, read_log, seconds_of_updates


_REPORTED_ARGUMENTS = (
    *("preset", "configuration", "variance_type", "prediction_type", "resolution", "random_flip", "seed"),
    *("class_dropout_prob", "optimizer", "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_constant_steps"),
    "total_batch_size",
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "mixed_precision", "ema_stds", "snr_gamma"),
    *("loss_space", "logit_mean", "logit_std", "shift", "base_shift", "max_shift"),
    *("lr_num_cycles", "lr_power", "use_8bit_adam", "adam_weight_decay"),
)
_SAMPLES = re.compile(r"step-(\d+)\.png")
# Conditions of the model, and the keys of its config that say so.
_CONDITIONS = {"class": "num_classes", "vector": "pooled_projection_dim"}


def write_model_card(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    revision: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    data: str | None = None,
    sample_grid: str | Path | None = None,
    num_images_seen: int | None = None,
    num_seconds: float | None = None,
    hardware: str | None = None,
    metrics: Mapping[str, float | str] | None = None,
) -> ModelCard:
    """Write README.md, the sample grid and the training curve of a pipeline's folder.

    The facts come from the files that `examples/train_mpdit.py` leaves there; those that are missing are left out.
    Only the arguments listed in this module are told, and no local path. The curve is a table, and an image where
    matplotlib is installed. An existing README.md is replaced.

    Args:
        folder (str or Path): the pipeline's folder.
        repo_id (str, optional): where it will be published, for the card's code; without it the code says "folder".
        revision (str, optional): branch it will be published on.
        license (str, optional): licence of the weights, such as "apache-2.0", or "other" with the next two.
        license_name, license_link (str, optional): name and address of another licence.
        data (str, optional): what the training data are, in place of what the arguments tell.
        sample_grid (str or Path, optional): image of samples; by default the last of `samples/`, else the one of
            the card that is replaced.
        num_images_seen (int, optional): images in all updates together.
        num_seconds (float, optional): duration of the training; by default that of the updates, from the log's
            images per second, where `num_images_seen` is given.
        hardware (str, optional): what it was trained on.
        metrics (mapping, optional): names and values of measurements made after training.
    Returns:
        ModelCard: the card as written.
    Raises:
        ValueError: if the folder holds no complete pipeline.
    """
    folder = Path(folder)
    files_to_publish(folder)
    index, config = read_json(folder / "model_index.json", {}), read_json(folder / "transformer" / "config.json", {})
    arguments = read_json(folder / "training_arguments.json", {})
    log = read_log(log_file(folder, arguments))
    given = [name for name, key in _CONDITIONS.items() if config.get(key) is not None]
    dataset, base = arguments.get("dataset_name"), arguments.get("pretrained_model_name_or_path")
    started = ""
    if base is not None:
        started = f", starting from {f'[{base}](../../{base})' if is_repo_id(base) else 'weights of the author'}"
    parts = {
        "title": text_of(repo_id.split("/")[-1]) if repo_id else "Magnitude-preserving diffusion transformer",
        "kind": f"{'- and '.join(given).capitalize()}-conditional" if given else "Unconditional",
        "started": started,
        "samples": _samples(folder, sample_grid, arguments),
        **_usage(folder, index, config, repo_id, revision),
        "data": _data(folder, index, config, arguments, data),
        "vae": _vae(folder, index, arguments),
        "num_parameters": f"{_num_parameters(folder / 'transformer'):,}",
        "configuration": table(("key", "value"), [item for item in config.items() if not item[0].startswith("_")]),
        "scheduler": _scheduler(folder, index, arguments),
        "costs": _costs(log, num_images_seen, num_seconds, hardware),
        "arguments": told_arguments(arguments, _REPORTED_ARGUMENTS),
        "curve": _curve(folder, log),
        "metrics": _metrics(log, metrics),
        "license": licence(license, license_name, license_link),
    }
    card_data = ModelCardData(
        library_name="diffusers",
        base_model=base if is_repo_id(base) else None,
        license=license,
        license_name=license_name,
        license_link=license_link,
        datasets=[dataset] if is_repo_id(dataset) and data is None else None,
        pipeline_tag=None if given else "unconditional-image-generation",
        tags=[
            *("diffusers", "diffusers-mp", "diffusion-transformer", "magnitude-preserving"),
            *([f"{name}-conditional" for name in given] or ["unconditional-image-generation"]),
            "arxiv:2505.19122",
        ],
    )
    return write_card(folder, card_data, filled(("pipeline", "end"), parts))


def _samples(folder: Path, sample_grid: str | Path | None, arguments: dict) -> str:
    # Of the trainer's names alone: a user may keep others beside them.
    found = [(_SAMPLES.fullmatch(path.name), path) for path in (folder / "samples").glob("step-*.png")]
    samples = sorted((int(name[1]), path) for name, path in found if name)
    source = sample_grid or (samples[-1][1] if samples else folder / GRID_NAME)
    if sample_grid is None and not source.is_file():
        return ""
    with Image.open(source) as image:
        # Pixels alone, without what an image's metadata may tell.
        image = image.convert("L" if image.mode == "L" else "RGB")
    Image.frombytes(image.mode, image.size, image.tobytes()).save(folder / GRID_NAME, format="PNG")
    caption = "Samples."
    if sample_grid is None and samples and "validation_inference_steps" in arguments:
        scale = arguments.get("validation_guidance_scale")
        caption = f"Samples at the end of training, {arguments['validation_inference_steps']} steps, guidance scale "
        caption += f"{'as the pipeline has it' if scale is None else f'{scale:g}'}, not selected."
    return f"![samples]({GRID_NAME})\n\n{caption}"


def _usage(folder: Path, index: dict, config: dict, repo_id: str | None, revision: str | None) -> dict[str, str]:
    source = quoted(repo_id or "folder") + (f", revision={quoted(revision)}" if revision else "")
    variant = variant_option(folder, component_names(folder))
    num_classes, dim = config.get("num_classes"), config.get("pooled_projection_dim")
    conditions, num_vectors, vectors = [], 2, ""
    if num_classes is not None:
        names = _names_of_classes(index)
        is_plain = len(set(names)) == len(names) and not any("," in name for name in names)
        labels = names[:2] if names and is_plain else list(range(min(2, num_classes)))
        conditions.append(f"class_labels={quoted(labels)}")
        num_vectors = len(labels)
    if dim is not None:
        vectors = f"\nvectors = torch.randn({num_vectors}, {dim})  # in the place of those it was trained on"
        conditions.append("pooled_projections=vectors")
    averages, others = "", sorted(path.name for path in average_folders(folder))
    if others:
        subfolder = f"{quoted(others[0])}{variant_option(folder, others[:1])}"
        names = ", ".join(f"`{name}`" for name in others)
        parts = {"names": names, "source": source, "subfolder": subfolder, "variant": variant}
        averages = filled(["averages"], parts)
    return {
        "imports": "" if dim is None else "import torch\n",
        "source": source,
        "variant": variant,
        "vectors": vectors,
        "conditions": ", ".join(conditions or ["num_images_per_class=2"]),
        "averages": averages,
    }


def _data(folder: Path, index: dict, config: dict, arguments: dict, data: str | None) -> str:
    dataset, latents = arguments.get("dataset_name"), read_json(folder / "latents" / "index.json", {})
    source = "a data set on the author's machine"
    if data is not None:
        source = text_of(data)
    elif is_repo_id(dataset):
        source = f"[{dataset}](../../datasets/{dataset})"
        if arguments.get("dataset_config_name"):
            source += f", configuration {text_of(arguments['dataset_config_name'])}"
        source += f", split {text_of(arguments.get('split') or 'train')}"
    lines = [f"- source: {source}"]
    if "num_samples" in latents:
        lines.append(f"- images: {latents['num_samples']:,} (those held out for validation among them)")
    if "resolution" in latents:
        lines.append(f"- resolution: {latents['resolution']} pixels, centre crop")
    names = [text_of(name) for name in _names_of_classes(index)]
    if names:
        lines.append(f"- classes: {len(names)} ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})")
    elif config.get("num_classes") is not None:
        lines.append(f"- classes: {config['num_classes']}")
    return "\n".join(lines)


def _vae(folder: Path, index: dict, arguments: dict) -> str:
    if not has_component(folder, "vae"):
        return "None: the transformer works on pixels."
    config = read_json(folder / "vae" / "config.json", {})
    channels, factor, *_ = geometry(config)
    # Those of the data are 0 and 1 then.
    is_own = has_statistics(config) and not any(index.get("latents_mean") or [])
    name = arguments.get("vae")
    source = f"[{name}](../../{name})" if is_repo_id(name) else "of the author's own"
    return (
        f"`{text_of(config.get('_class_name'))}` {source}, {channels} latent channels, factor {factor}, "
        f"{_num_parameters(folder / 'vae'):,} parameters, in `vae/`. The transformer sees its latents standardised by "
        f"{'the statistics that the VAE brings' if is_own else 'the statistics in `model_index.json`'}."
    )


def _scheduler(folder: Path, index: dict, arguments: dict) -> str:
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", {})
    if index.get("prediction_type") is not None:  # which schedulers of flows do not know
        scheduler["prediction_type"] = index["prediction_type"]
    keys = ["num_train_timesteps", "beta_schedule", "prediction_type", "variance_type"]
    keys += ["use_dynamic_shifting", "base_shift", "max_shift"] if scheduler.get("use_dynamic_shifting") else ["shift"]
    facts = [f"{key} {text_of(scheduler[key])}" for key in keys if scheduler.get(key) is not None]
    text = f"Scheduler: `{text_of(scheduler.get('_class_name'))}`{', ' if facts else ''}{', '.join(facts)}."
    if arguments.get("ema_stds"):
        text += f" `transformer/` holds the average of the weights of relative width {arguments['ema_stds'][0]:g}."
    return text


def _costs(log: list[dict], num_images_seen: int | None, num_seconds: float | None, hardware: str | None) -> str:
    num_updates = max((entry["step"] for entry in log), default=None)
    seconds_of = "in all"
    if num_seconds is None and num_updates and num_images_seen:
        num_seconds, seconds_of = seconds_of_updates(log, num_images_seen / num_updates), "in updates"
    costs = [
        ("updates", None if num_updates is None else f"{num_updates:,}"),
        ("images seen", None if num_images_seen is None else f"{num_images_seen:,}"),
        (f"seconds {seconds_of}", None if num_seconds is None else f"{num_seconds:,.0f}"),
        ("trained on", hardware),
    ]
    return table(("cost", ""), [(name, "not recorded" if value is None else value) for name, value in costs])


def _curve(folder: Path, log: list[dict]) -> str:
    rows = curve_rows(log)
    image = f"![training curve]({CURVE_NAME})\n\n" if rows and draw_curve(log, folder / CURVE_NAME) else ""
    return image + table(("update", "training loss since the row above", "validation loss"), rows)


def _metrics(log: list[dict], metrics: Mapping | None) -> str:
    rows = list((metrics or {}).items())
    validations = [entry for entry in log if any(key.startswith("validation/") for key in entry)]
    for key, value in validations[-1].items() if validations else ():
        if key != "step":
            rows.append((f"validation {key.removeprefix('validation/')} at update {validations[-1]['step']}", value))
    return table(("metric", "value"), rows)


def _names_of_classes(index: dict) -> list[str]:
    return [name for _, name in sorted((index.get("id2label") or {}).items(), key=lambda item: int(item[0]))]


def _num_parameters(folder: Path) -> int:
    """Number of parameters, from the headers of the safetensors files of one variant."""
    count = 0
    for path in weights(folder)[1]:
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count
