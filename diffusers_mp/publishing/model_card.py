"""Model cards: of a trained pipeline, with its sample grid and its training curve, and of a rotation swap."""

import json
import math
import re
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from ..files import component_names
from .hub import (
    ADAPTER_CONFIG_NAME,
    CARD_NAME,
    CURVE_NAME,
    GRID_NAME,
    HEAT_MAP_NAME,
    WEIGHTS,
    files_to_publish,
    has_component,
    is_repo_id,
    mask,
)


_NUM_CURVE_ROWS = 10
_REPORTED_ARGUMENTS = (
    *("preset", "configuration", "variance_type", "prediction_type", "resolution", "random_flip", "seed"),
    *("class_dropout_prob", "optimizer", "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_constant_steps"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "mixed_precision", "ema_stds", "snr_gamma"),
    *("logit_mean", "logit_std"),
)
# Conditions of the model, and the keys of its config that say so.
_CONDITIONS = {"class": "num_classes", "vector": "pooled_projection_dim"}
_CITATION = """@article{bill2025exploring,
  title   = {Exploring Magnitude Preservation and Rotation Modulation in Diffusion Transformers},
  author  = {Bill, Eric Tillman and Perez Jensen, Cristian and Anagnostidis, Sotiris and von R{\\"u}tte, Dimitri},
  journal = {arXiv preprint arXiv:2505.19122},
  year    = {2025}
}"""


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

    The facts come from the files that `examples/train_mpdit.py` leaves there; those that are missing are left out. Of
    the arguments only named ones are told, and no local path. The curve is a table, and a picture where matplotlib is
    installed. An existing README.md is replaced.

    Args:
        folder (str or Path): the pipeline's folder.
        repo_id (str, optional): where it will be published, for the card's code; without it the code says "folder".
        revision (str, optional): branch it will be published on.
        license (str, optional): licence of the weights, such as "apache-2.0", or "other" with the next two.
        license_name, license_link (str, optional): name and address of another licence.
        data (str, optional): what the training data are, in place of what the arguments tell.
        sample_grid (str or Path, optional): picture of samples; by default the last of `samples/`, else the one of
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
    index, config = _read_json(folder / "model_index.json"), _read_json(folder / "transformer" / "config.json")
    arguments = _read_json(folder / "training_arguments.json")
    log = _read_log(folder / (arguments.get("logging_dir") or "logs") / "metrics.jsonl")
    num_updates = max((entry["step"] for entry in log), default=None)
    given = [name for name, key in _CONDITIONS.items() if config.get(key) is not None]
    kind = f"{'- and '.join(given).capitalize()}-conditional" if given else "Unconditional"
    dataset, base = arguments.get("dataset_name"), arguments.get("pretrained_model_name_or_path")
    started = ""
    if base is not None:
        started = f", starting from {f'[{base}](../../{base})' if is_repo_id(base) else 'weights of the author'}"

    sections = [
        f"# {_text(repo_id.split('/')[-1]) if repo_id else 'Magnitude-preserving diffusion transformer'}",
        f"{kind} image generation with a magnitude-preserving diffusion transformer (MPDiT), after "
        f"[arXiv 2505.19122](https://arxiv.org/abs/2505.19122), trained with `diffusers-mp`{started}.",
        _grid_section(folder, sample_grid, arguments),
        "## How to use\n\n" + _usage(folder, index, config, repo_id, revision),
        "## Data\n\n" + _data(folder, index, config, arguments, data),
        "## VAE\n\n" + _vae(folder, arguments),
        "## Model\n\n" + _model(folder, config, arguments),
        "## Training\n\n" + _training(folder, log, arguments, num_updates, num_images_seen, num_seconds, hardware),
        _metrics(log, metrics),
        "## Licence of the weights\n\n" + _licence(license, license_name, license_link),
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    ]
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
    text = "\n\n".join(section for section in sections if section)
    card = ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{mask(text)}\n")
    card.save(folder / CARD_NAME)
    return card


_REPORTED_FINETUNING = (
    *("swap", "anneal_steps", "distillation", "train", "rank", "sublayers", "num_calibration_samples"),
    *("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler"),
    *("lr_warmup_steps", "adam_weight_decay", "max_grad_norm", "class_dropout_prob", "random_flip", "mixed_precision"),
    "seed",
)


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
    config = _read_json(folder / ADAPTER_CONFIG_NAME) or _read_json(folder / "transformer" / "config.json")
    swap = config if is_adapter else config.get("rotation_modulation")
    class_name = config["base_model_class"] if is_adapter else config["_class_name"].removeprefix("Rotation")
    is_dit = class_name == "DiTTransformer2DModel"
    pipeline_class = "DiTPipeline" if is_dit else "DiffusionPipeline"
    base, arguments = base_model if is_repo_id(base_model) else None, record.get("arguments", {})
    base_text = f"[{base}](https://huggingface.co/{base})" if base else "a model of the author's own"
    what = "fine-tuned, without a swap"
    if swap is not None:
        what = "whose AdaLN shifts were swapped for rotations by `diffusers-mp`, then fine-tuned"
    if arguments.get("max_train_steps") == 0:
        what = what.replace(", then fine-tuned", " and not fine-tuned")
    source = _quoted(repo_id or "folder")
    variant = "" if is_adapter else _variant_option(folder, component_names(folder))
    # Importing the package alone is enough for a folder, but not for a repository.
    class_import = ""
    if swap is not None and not is_adapter:
        class_import = f"\nfrom diffusers_mp import {config['_class_name']}  # known to diffusers from here on"
    usage = f"""from diffusers import {pipeline_class}{class_import}

pipe = {pipeline_class}.from_pretrained({source}{variant})"""
    if is_adapter:
        usage = f"""from diffusers import {pipeline_class}
from diffusers_mp import load_rotation_adapter

pipe = {pipeline_class}.from_pretrained({_quoted(base or "base model")})
load_rotation_adapter(pipe.transformer, {source})"""
    title = f"{'DiT' if is_dit else class_name} with rotation modulation"
    sections = [
        f"# {_text(repo_id.split('/')[-1]) if repo_id else title}",
        f"{'Adapter for' if is_adapter else 'From'} {base_text}, `{class_name}`, {what}. Rotation modulation is that "
        "of [arXiv 2505.19122](https://arxiv.org/abs/2505.19122), which trains with it from scratch.",
        f"## How to use\n\n```python\n{usage}\n```",
    ]
    if swap is not None:
        options = [(name, swap[name]) for name in ("sublayers", "keep_shift", "mean_shift", "rank")]
        sections.append("## Swap\n\n" + _table(("option", "value"), options))
    stages = [stage for stage in ("before", "after_swap", "final") if stage in record]
    if stages:
        names = ("loss", "mse", "relative_error")
        rows = [(stage.replace("_", " "), *(record[stage][name] for name in names)) for stage in stages]
        parameters = record["num_parameters"]
        sections.append(
            "## Evaluation\n\nOn images held out of the fine-tuning, at fixed noise levels. The relative error is the "
            "squared difference of the predicted noise from the untouched model's.\n\n"
            + _table(("stage", "loss", "squared error", "relative error"), rows)
            + f"\n\nParameters of the transformer: {parameters['before']:,} before, {parameters['after']:,} after."
        )
    dataset = arguments.get("dataset_name")
    told = [(key, arguments[key]) for key in _REPORTED_FINETUNING if arguments.get(key) is not None]
    if told:
        data = f"[{dataset}](../../datasets/{dataset})" if is_repo_id(dataset) else "data on the author's machine"
        sections.append(f"## Fine-tuning\n\nOn {data}.\n\n" + _table(("argument", "value"), told))
    sections += [
        "## Licence of the weights\n\n" + _licence(license, None, None),
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    ]
    card_data = ModelCardData(
        library_name="diffusers",
        base_model=base,
        license=license,
        datasets=[dataset] if is_repo_id(dataset) else None,
        tags=["diffusers", "diffusers-mp", "diffusion-transformer"]
        + (["class-conditional"] if is_dit else [])
        + (["rotation-modulation"] if swap is not None else [])
        + ["arxiv:2505.19122"],
    )
    text = "\n\n".join(sections)
    card = ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{mask(text)}\n")
    card.save(folder / CARD_NAME)
    return card


_EVALUATION_HEADING = "## Evaluation of samples"


def write_evaluation(folder: str | Path, results: Mapping) -> ModelCard:
    """Put the results of `examples/evaluate.py` into the card of a pipeline's folder, in place of earlier ones.

    The rest of the card stays as it is. Of models and data no local path is told. The heat map is shown if it lies in
    the folder.

    Args:
        folder (str or Path): the pipeline's folder, with a card.
        results (mapping): content of `results.json`.
    Returns:
        ModelCard: the card as written.
    Raises:
        ValueError: if the folder holds no complete pipeline, or no card.
    """
    folder = Path(folder)
    if CARD_NAME not in files_to_publish(folder):
        raise ValueError(f"`folder` must hold a {CARD_NAME}, {folder} does not; `write_model_card` makes one.")
    card = (folder / CARD_NAME).read_text(encoding="utf-8")
    parts = re.split(r"^(?=## )", card, flags=re.MULTILINE)
    parts = [part for part in parts if not part.startswith(f"{_EVALUATION_HEADING}\n")]
    # Before the licence, with which the formal end of our own cards begins; else at the end.
    place = next((i for i, part in enumerate(parts) if part.startswith("## Licence")), len(parts))
    parts[place - 1] = parts[place - 1].rstrip("\n") + "\n\n"
    parts.insert(place, mask(f"{_EVALUATION_HEADING}\n\n{_evaluation(folder, results)}\n\n"))
    card = ModelCard("".join(parts).rstrip("\n") + "\n")
    card.save(folder / CARD_NAME)
    return card


def _evaluation(folder: Path, results: Mapping) -> str:
    settings, best = results["settings"], results["best"]
    classes = "unconditional"
    if settings["class_labels"] is not None:
        classes = f"{len(settings['class_labels'])} classes in turn"
    text = (
        f"{settings['num_samples']:,} images for each row, {classes}, seed {settings['seed']}, "
        f"`{_text(settings['scheduler'])}`, {settings['dtype']}. By `examples/evaluate.py` of diffusers-mp "
        f"{results['versions']['diffusers_mp']} (torch {results['versions']['torch']}, diffusers "
        f"{results['versions']['diffusers']}). The first row is the best."
    )
    if (folder / HEAT_MAP_NAME).is_file():
        text += f"\n\n![Fréchet distances]({HEAT_MAP_NAME})"
    has_widths = best["ema_std"] is not None
    names = [_extractor_name(extractor) for extractor in settings["extractors"]]
    measures = ("frechet_distance", "precision", "recall", "inception_score")
    columns = [(i, key) for i, metrics in enumerate(best["metrics"]) for key in measures if key in metrics]
    header = [f"{key.replace('_', ' ').replace('frechet', 'Fréchet')}, {_text(names[i])}" for i, key in columns]
    rows = []
    for cell in sorted(results["cells"], key=lambda cell: cell["metrics"][0]["frechet_distance"]):
        varied = ([cell["ema_std"]] if has_widths else []) + [cell["guidance_scale"], cell["num_inference_steps"]]
        rows.append((*varied, *(cell["metrics"][i][key] for i, key in columns)))
    varied = [*(["width of the average"] if has_widths else []), "guidance scale", "steps"]
    text += "\n\n" + _table((*varied, *header), rows) + "\n"
    for name, extractor, reference in zip(names, settings["extractors"], settings["references"], strict=True):
        facts = {key: value for key, value in extractor.items() if key != "id" and value is not None}
        told = "; ".join(f"{key} {_text(value)}" for key, value in facts.items())
        text += (
            f"\n- Features of {_text(name)}: {told}. Reference: {reference['num_images']:,} images of "
            f"{reference['resolution']}x{reference['resolution']} pixels ({_text(reference['preparation'])}), content "
            f"hash {reference['content_hash'][:16]}."
        )
    if "precision" in best["metrics"][0]:
        num_compared = f"{best['metrics'][0]['num_images_compared']:,}"
        text += (
            f"\n- Precision and recall (arXiv 1904.06991): k = {settings['nearest_k']}, {num_compared} images each."
        )
    text += "".join(f"\n- Warning: {_text(warning)}" for warning in results["warnings"])
    return text


def _extractor_name(extractor: Mapping) -> str:
    # An id of the Hub, or a function; of a folder its last part.
    name = extractor["id"]
    return name if is_repo_id(name) or "/" not in name else name.rstrip("/").split("/")[-1]


def _grid_section(folder: Path, sample_grid: str | Path | None, arguments: dict) -> str | None:
    samples = sorted((folder / "samples").glob("step-*.png"), key=lambda path: int(path.stem.removeprefix("step-")))
    source = sample_grid or (samples[-1] if samples else folder / GRID_NAME)
    if sample_grid is None and not source.is_file():
        return None
    with Image.open(source) as picture:
        # Pixels alone, without what a picture's metadata may tell.
        picture = picture.convert("L" if picture.mode == "L" else "RGB")
    Image.frombytes(picture.mode, picture.size, picture.tobytes()).save(folder / GRID_NAME, format="PNG")
    caption = "Samples."
    if sample_grid is None and samples and "validation_inference_steps" in arguments:
        scale = arguments.get("validation_guidance_scale")
        caption = f"Samples at the end of training, {arguments['validation_inference_steps']} steps, guidance scale "
        caption += f"{'as the pipeline has it' if scale is None else f'{scale:g}'}, not selected."
    return f"![samples]({GRID_NAME})\n\n{caption}"


def _weights(folder: Path) -> tuple[str, list[Path]]:
    """The variant that counts of a model's folder, and its files: the plain weights, "", if they are there."""
    variants = defaultdict(list)
    for path in sorted(folder.glob(WEIGHTS)):
        # What stands between two dots but for the number of a shard: name.fp16-00001-of-00002.safetensors.
        variants[".".join(re.sub(r"-\d{5}-of-\d{5}", "", path.name).split(".")[1:-1])].append(path)
    variant = min(variants, default="")
    return variant, variants[variant]


def _variant_option(folder: Path, names: Sequence[str]) -> str:
    """What `from_pretrained` has to be told where weights of these parts are there in a variant alone."""
    variant = max(_weights(folder / name)[0] for name in names)
    return f", variant={_quoted(variant)}" if variant else ""


def _quoted(value: str | list) -> str:
    """Python source of names or ids, with the quotes that formatters ask for."""
    return json.dumps(value, ensure_ascii=False)


def _usage(folder: Path, index: dict, config: dict, repo_id: str | None, revision: str | None) -> str:
    source = _quoted(repo_id or "folder") + (f", revision={_quoted(revision)}" if revision else "")
    variant = _variant_option(folder, component_names(folder))
    names = [name for _, name in sorted((index.get("id2label") or {}).items(), key=lambda item: int(item[0]))]
    num_classes = config.get("num_classes")
    dim, conditions, first, vectors = config.get("pooled_projection_dim"), [], "", ""
    if num_classes is not None:
        plain = len(set(names)) == len(names) and not any("," in name for name in names)
        labels = names[:2] if names and plain else list(range(min(2, num_classes)))
        conditions.append(f"class_labels={_quoted(labels)}")
    if dim is not None:
        first = "import torch\n"
        num_vectors = 2 if num_classes is None else len(labels)
        vectors = f"\nvectors = torch.randn({num_vectors}, {dim})  # in the place of those it was trained on"
        conditions.append("pooled_projections=vectors")
    call = ", ".join(conditions or ["num_images_per_class=2"])
    text = f"""```python
{first}from diffusers_mp import MPDiTPipeline

pipe = MPDiTPipeline.from_pretrained({source}{variant}){vectors}
images = pipe({call}, num_inference_steps=50).images
```

`DiffusionPipeline.from_pretrained` does not know this class: import it from `diffusers_mp` as above."""
    others = sorted(path.name for path in folder.glob("transformer_ema_*"))
    if others:
        subfolder = f"{_quoted(others[0])}{_variant_option(folder, others[:1])}"
        text += f"""

Averages of the weights of other widths are beside it: {", ".join(f"`{name}`" for name in others)}.

```python
from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel

transformer = MPDiTTransformer2DModel.from_pretrained({source}, subfolder={subfolder})
pipe = MPDiTPipeline.from_pretrained({source}{variant}, transformer=transformer)
```"""
    return text


def _data(folder: Path, index: dict, config: dict, arguments: dict, data: str | None) -> str:
    dataset, latents = arguments.get("dataset_name"), _read_json(folder / "latents" / "index.json")
    source = "a data set on the author's machine"
    if data is not None:
        source = _text(data)
    elif is_repo_id(dataset):
        source = f"[{dataset}](../../datasets/{dataset})"
        if arguments.get("dataset_config_name"):
            source += f", configuration {_text(arguments['dataset_config_name'])}"
        source += f", split {_text(arguments.get('dataset_split') or 'train')}"
    lines = [f"- source: {source}"]
    if "num_samples" in latents:
        lines.append(f"- images: {latents['num_samples']:,} (those held out for validation among them)")
    if "resolution" in latents:
        lines.append(f"- resolution: {latents['resolution']} pixels, centre crop")
    names = [_text(name) for _, name in sorted((index.get("id2label") or {}).items(), key=lambda item: int(item[0]))]
    if names:
        lines.append(f"- classes: {len(names)} ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})")
    elif config.get("num_classes") is not None:
        lines.append(f"- classes: {config['num_classes']}")
    return "\n".join(lines)


def _vae(folder: Path, arguments: dict) -> str:
    if not has_component(folder, "vae"):
        return "None: the transformer works on pixels."
    config = _read_json(folder / "vae" / "config.json")
    name = arguments.get("vae")
    source = f"[{name}](../../{name})" if is_repo_id(name) else "of the author's own"
    return (
        f"`{_text(config.get('_class_name'))}` {source}, {config.get('latent_channels')} latent channels, factor "
        f"{2 ** (len(config.get('block_out_channels', [0])) - 1)}, {_num_parameters(folder / 'vae'):,} parameters, in "
        "`vae/`. The transformer sees its latents standardised by the statistics in `model_index.json`."
    )


def _model(folder: Path, config: dict, arguments: dict) -> str:
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    text = f"{_num_parameters(folder / 'transformer'):,} parameters (without the VAE). Configuration:\n\n"
    text += _table(("key", "value"), [(key, value) for key, value in config.items() if not key.startswith("_")])
    keys = ("num_train_timesteps", "beta_schedule", "prediction_type", "variance_type")
    facts = [f"{key} {_text(scheduler[key])}" for key in keys if scheduler.get(key) is not None]
    text += f"\n\nScheduler: `{_text(scheduler.get('_class_name'))}`{', ' if facts else ''}{', '.join(facts)}."
    if arguments.get("ema_stds"):
        text += f" `transformer/` holds the average of the weights of relative width {arguments['ema_stds'][0]:g}."
    return text


def _training(folder, log, arguments, num_updates, num_images_seen, num_seconds, hardware) -> str:
    seconds_of = "in all"
    if num_seconds is None and num_updates and num_images_seen:
        num_seconds, seconds_of = _seconds_of_updates(log, num_images_seen / num_updates), "in updates"
    costs = [
        ("updates", None if num_updates is None else f"{num_updates:,}"),
        ("images seen", None if num_images_seen is None else f"{num_images_seen:,}"),
        (f"seconds {seconds_of}", None if num_seconds is None else f"{num_seconds:,.0f}"),
        ("trained on", hardware),
    ]
    text = _table(("cost", ""), [(name, "not recorded" if value is None else value) for name, value in costs])
    told = [(key, arguments[key]) for key in _REPORTED_ARGUMENTS if arguments.get(key) is not None]
    if told:
        text += "\n\n" + _table(("argument", "value"), told)
    rows = _curve_rows(log)
    if rows:
        if _draw_curve(log, folder / CURVE_NAME):
            text += f"\n\n![training curve]({CURVE_NAME})"
        text += "\n\n" + _table(("update", "training loss since the row above", "validation loss"), rows)
    return text


def _metrics(log: list[dict], metrics: Mapping | None) -> str | None:
    rows = [(name, value) for name, value in (metrics or {}).items()]
    validations = [entry for entry in log if any(key.startswith("validation/") for key in entry)]
    if validations:
        last = validations[-1]
        of_log = [(key.removeprefix("validation/"), value) for key, value in last.items() if key != "step"]
        rows += [(f"validation {name} at update {last['step']}", value) for name, value in of_log]
    return "## Metrics\n\n" + _table(("metric", "value"), rows) if rows else None


def _licence(license: str | None, license_name: str | None, license_link: str | None) -> str:
    if license is None:
        return "None was given: ask the author before you use them."
    name = _text(license_name or license)
    return f"[{name}]({license_link})" if license_link else name


def _draw_curve(log: list[dict], picture: Path) -> bool:
    """Draw the losses over updates, if matplotlib is installed."""
    picture.unlink(missing_ok=True)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    smallest = math.inf
    for key, label in (("train/loss", "training"), ("validation/loss", "validation, averaged weights")):
        points = [(entry["step"], entry[key]) for entry in log if math.isfinite(entry.get(key, math.nan))]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if key == "validation/loss" else None)
            smallest = min(smallest, *(loss for _, loss in points), math.inf)
    axes.set(xlabel="update", ylabel="loss", yscale="log" if 0 < smallest < math.inf else "linear")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(picture, dpi=120, bbox_inches="tight", metadata={"Software": None})
    return True


def _curve_rows(log: list[dict]) -> list[tuple]:
    """Mean training loss of up to ten equal stretches of the log, and the last validation loss in each."""
    steps = [entry["step"] for entry in log if "train/loss" in entry]
    if not steps:
        return []
    num_rows = min(_NUM_CURVE_ROWS, len(steps))
    ends = [steps[math.ceil(len(steps) * (row + 1) / num_rows) - 1] for row in range(num_rows)]
    rows = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        stretch = [entry for entry in log if start < entry["step"] <= end]
        losses = [entry["train/loss"] for entry in stretch if "train/loss" in entry]
        validation = [entry["validation/loss"] for entry in stretch if "validation/loss" in entry]
        rows.append((f"{end:,}", sum(losses) / len(losses), validation[-1] if validation else ""))
    return rows


def _seconds_of_updates(log: list[dict], total_batch_size: float) -> float | None:
    seconds, previous = 0.0, 0
    for entry in log:
        if entry.get("train/images_per_second"):
            seconds += (entry["step"] - previous) * total_batch_size / entry["train/images_per_second"]
            previous = entry["step"]
    return seconds or None


def _num_parameters(folder: Path) -> int:
    """Number of parameters, from the headers of the safetensors files of one variant."""
    count = 0
    for path in _weights(folder)[1]:
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def _read_log(path: Path) -> list[dict]:
    """Entries of the log in order, without a last line that a kill cut off."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return sorted(entries, key=lambda entry: entry["step"])


def _text(value) -> str:
    """A value on one line of Markdown that starts no markup of its own."""
    if isinstance(value, float):
        value = f"{value:.5g}"
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]|<>])", r"\\\1", text)


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, ["---"] * len(header), *(map(_text, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
