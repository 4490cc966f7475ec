"""Measure a pipeline's images against real ones: Fréchet distance, precision, recall; FID with torch-fidelity.

    accelerate launch examples/evaluate.py --pretrained_model_name_or_path run --reference_dir photos
    accelerate launch examples/evaluate.py --pretrained_model_name_or_path run --reference_dir photos
        --ema_stds 0.03 0.05 0.075 0.10 --guidance_scales 1 1.25 1.5 2 --num_inference_steps 25 50 --heat_map

The second line sweeps: it measures each combination (widths are rebuilt from the snapshots of the run). Images go
straight to the measures. Each has a seed of its own, so that any number of processes and any batch size give the same
ones (without accelerators: `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2`); the output folder must be one that all
processes see. Killed, it goes on after the last finished cell when started again with the same arguments.

    evaluation/results.json, heat_map.png   everything measured, and how
    evaluation/cells/*.json, *.png          each cell, when it is finished, and its first images
    evaluation/reference/                   statistics of the real images, by content hash
    evaluation/best/                        the pipeline of the best cell, for sweeps over widths and for Hub models
"""

import argparse
import datetime
import hashlib
import importlib.util
import itertools
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm
from training_arguments import HelpFormatter

import diffusers_mp
from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel, reconstruct_ema
from diffusers_mp.averages.reconstruction import plan_reconstruction, snapshots_up_to
from diffusers_mp.averages.snapshots import check_snapshots, find_snapshots, pipeline_parts
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.evaluation.features import load_extractor
from diffusers_mp.evaluation.frechet import RunningStatistics, rank_warning
from diffusers_mp.evaluation.generation import NonFiniteImageError, generate_images
from diffusers_mp.evaluation.precision_recall import MAX_FEATURES
from diffusers_mp.evaluation.reference import ReferenceStatistics, image_metrics, reference_statistics
from diffusers_mp.files import read_json, write_json
from diffusers_mp.publishing.hub import (
    HEAT_MAP_NAME,
    check_hub_access,
    download_pipeline,
    files_to_publish,
    has_component,
    publish,
)
from diffusers_mp.publishing.model_card import write_evaluation, write_model_card
from diffusers_mp.schedulers import sampler_for
from diffusers_mp.training.engine import check_processes


NUM_SHOWN = 16


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure generated images against real ones.",
        formatter_class=HelpFormatter,
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path", required=True, help="pipeline by path or Hub id, or output_dir of a run"
    )
    group.add_argument("--revision", help="of a pipeline on the Hub")
    group.add_argument("--cache_dir", help="where the Hub client and `datasets` keep their files")
    group.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the pipeline"
    )
    group.add_argument("--scheduler", help="sampler, by its name in diffusers, instead of the pipeline's own")
    group.add_argument("--output_dir", type=Path, default=Path("evaluation"), help="folder for everything")

    group = parser.add_argument_group("images")
    group.add_argument("--num_samples", type=int, default=50_000, help="generated images for each cell")
    group.add_argument("--batch_size", type=int, default=32, help="images that a process generates at once")
    group.add_argument("--seed", type=int, default=0, help="image i depends on this and i alone")
    group.add_argument(
        "--class_labels", type=label, nargs="+", help="ids or names, taken in turn; all classes by default"
    )

    group = parser.add_argument_group("sweep (each combination is a cell)")
    group.add_argument("--ema_stds", type=float, nargs="+", help="widths, rebuilt from the run's ema_snapshots")
    group.add_argument("--step", type=int, help="step of these averages, by default that of the last snapshot")
    group.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0], help="1 is without guidance")
    group.add_argument("--num_inference_steps", type=int, nargs="+", default=[50], help="sampling steps")
    group.add_argument("--heat_map", action="store_true", help="draw the distances; needs matplotlib")

    group = parser.add_argument_group("reference (one of the first three)")
    group.add_argument("--reference_dir", help="folder of real images")
    group.add_argument("--dataset_name", help="data set on the Hub, or a path `datasets.load_dataset` understands")
    group.add_argument(
        "--reference_statistics", nargs="+", help="files from an earlier `reference/`, one for each extractor"
    )
    group.add_argument("--dataset_config_name", help="configuration of the data set")
    group.add_argument("--dataset_split", default="train", help="its split")
    group.add_argument("--image_column", default="image", help="column of the images")
    group.add_argument("--max_reference_images", type=int, help="take this many only, drawn with seed 0")

    group = parser.add_argument_group("measures")
    group.add_argument(
        "--extractors",
        nargs="+",
        default=["facebook/dinov2-base"],
        help="what features come from; the first one decides what is best. Vision models of transformers by id or "
        "path, 'module:function', or 'torch-fidelity' for FID and Inception score",
    )
    group.add_argument("--extractor_output", default="pooler_output", help="field of the transformers models' output")
    group.add_argument("--nearest_k", type=int, default=3, help="neighbour of precision and recall; 0: without them")

    group = parser.add_argument_group("publishing")
    group.add_argument("--push_to_hub", action="store_true", help="publish the best pipeline, with the table")
    group.add_argument("--hub_model_id", help="repository; by default that of the model, or its folder's name")
    group.add_argument("--hub_token", help="better: `hf auth login`, which leaves it out of the process list")
    group.add_argument("--hub_private_repo", action="store_true", help="make the repository private")
    group.add_argument("--hub_license", help="licence of the weights, where a card has to be made")
    return parser


def label(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    sources = [args.reference_dir, args.dataset_name, args.reference_statistics]
    if sum(source is not None for source in sources) != 1:
        parser.error("exactly one of --reference_dir, --dataset_name and --reference_statistics must be given")
    if args.reference_statistics is not None and len(args.reference_statistics) != len(args.extractors):
        parser.error(
            f"--reference_statistics takes one file for each of --extractors ({len(args.extractors)}), got "
            f"{len(args.reference_statistics)}"
        )
    if args.num_samples < 2 or args.num_samples <= args.nearest_k:
        parser.error(f"--num_samples must be at least 2 and more than --nearest_k, got {args.num_samples}")
    if args.batch_size < 1 or args.seed < 0 or args.nearest_k < 0:
        parser.error("--batch_size must be at least 1, --seed and --nearest_k not negative")
    if min(args.num_inference_steps) < 1:
        parser.error(f"--num_inference_steps must be at least 1, got {args.num_inference_steps}")
    if args.heat_map and importlib.util.find_spec("matplotlib") is None:
        parser.error("--heat_map needs matplotlib: `pip install matplotlib`")
    if args.scheduler is not None and not hasattr(diffusers, args.scheduler):
        parser.error(
            f"--scheduler must be a class of diffusers, such as DPMSolverMultistepScheduler: {args.scheduler}"
        )
    return args


def main(args):
    accelerator = start()
    repo_id = None
    if args.push_to_hub and accelerator.is_main_process:
        # Now, not after hours: the token, the right to write, the repository.
        is_local = Path(args.pretrained_model_name_or_path).is_dir()
        source = Path(args.pretrained_model_name_or_path).resolve().name if is_local else None
        repo_id = check_hub_access(
            args.hub_model_id or source or args.pretrained_model_name_or_path,
            token=args.hub_token,
            private=args.hub_private_repo or None,
        )
    folder, snapshots_dir = find_model(args, accelerator)
    check_pipeline(args, folder, snapshots_dir)
    extractors = [
        load_extractor(name, output=args.extractor_output, device=accelerator.device, cache_dir=args.cache_dir)
        for name in args.extractors
    ]
    references = load_references(args, accelerator, extractors, *image_shape(folder, snapshots_dir))
    settings = describe(args, folder, snapshots_dir, extractors, references)
    if accelerator.is_main_process:
        keep_settings(args.output_dir / "settings.json", settings)

    cells = [
        {"ema_std": std, "guidance_scale": scale, "num_inference_steps": steps}
        for std in args.ema_stds or [None]
        for scale in args.guidance_scales
        for steps in args.num_inference_steps
    ]
    (unfinished,) = broadcast_object_list([[cell for cell in cells if not is_finished(args, cell)]])
    for std, of_width in itertools.groupby(unfinished, key=lambda cell: cell["ema_std"]):
        pipe = load_pipeline(args, accelerator, folder, snapshots_dir, std)
        for cell in of_width:
            cell = evaluate_cell(args, accelerator, pipe, cell, settings, extractors, references)
            if accelerator.is_main_process:
                write_json(cell_path(args, cell), cell)
                print(line_of(cell))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(args, folder, snapshots_dir, settings, references, cells, repo_id)
    accelerator.end_training()


def start() -> Accelerator:
    # The main process alone rebuilds averages and computes distances, which takes it minutes.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))
    accelerator = Accelerator(kwargs_handlers=[patience])
    check_processes(accelerator, "generate everything")
    return accelerator


# What is measured, and against what.


def find_model(args, accelerator) -> tuple[Path, Path | None]:
    """The pipeline's folder, and that of the snapshots where widths are asked for."""
    folder = Path(args.pretrained_model_name_or_path)
    if not folder.is_dir():
        with accelerator.main_process_first():
            folder = download_pipeline(
                args.pretrained_model_name_or_path,
                token=args.hub_token,
                revision=args.revision,
                cache_dir=args.cache_dir,
            )
    if args.ema_stds is None:
        files_to_publish(folder)
        return folder, None
    snapshots_dir = folder / "ema_snapshots" if (folder / "ema_snapshots").is_dir() else folder
    snapshots = find_snapshots(snapshots_dir)
    if not snapshots:
        raise FileNotFoundError(
            f"--ema_stds needs the snapshots of a run (--ema_snapshot_steps of the trainer), {folder} has no "
            "ema_snapshots"
        )
    # Once for all widths and processes: a run that still trains adds snapshots meanwhile.
    (args.step,) = broadcast_object_list([snapshots[-1].step if args.step is None else args.step])
    for std in args.ema_stds:
        plan = plan_reconstruction(snapshots, std, args.step)
        accelerator.print(f"Width {std:g}: fit error {plan.fit_error:.2e} of the profile's norm at step {plan.step}")
    return folder, snapshots_dir


def parts_and_transformer(folder: Path, snapshots_dir: Path | None) -> tuple[Path, Path]:
    """Where the pipeline's parts lie, and its transformer."""
    if snapshots_dir is None:
        return folder, folder / "transformer"
    return snapshots_dir, find_snapshots(snapshots_dir)[0].path


def check_pipeline(args, folder: Path, snapshots_dir: Path | None) -> None:
    """Refuse by its configs, without weights, what would be refused once the reference has been measured."""
    parts, transformer = parts_and_transformer(folder, snapshots_dir)
    index = read_json(parts / "model_index.json", {})
    name = index.get("_class_name")
    if name != MPDiTPipeline.__name__:
        raise ValueError(f"--pretrained_model_name_or_path must be an MPDiTPipeline, {parts} holds a {name}")
    if has_component(parts, "guider"):
        raise ValueError(
            "--pretrained_model_name_or_path must be a pipeline without a `guider`, which has a scale of its own, "
            f"{parts} has a {index['guider'][1]}; after `pipe.guider = None` save it to another folder"
        )
    config = read_json(transformer / "config.json", {})
    if config.get("pooled_projection_dim") is not None:
        raise ValueError("the pipeline must be class-conditional or unconditional; this one takes condition vectors")
    _, num_channels = image_shape(folder, snapshots_dir)
    if num_channels not in (1, 3):
        raise ValueError(
            f"the pipeline must generate images of 1 or 3 channels, it has {num_channels}"
            + ("" if has_component(parts, "vae") else " and no VAE")
        )
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(parts, subfolder="scheduler")
    options = {name: index.get(name) for name in ("id2label", "prediction_type")}
    with init_empty_weights():
        if has_component(parts, "guidance_transformer"):
            weak = read_json(parts / "guidance_transformer" / "config.json", {})
            options["guidance_transformer"] = MPDiTTransformer2DModel.from_config(weak)
        pipe = MPDiTPipeline(
            MPDiTTransformer2DModel.from_config(config),
            scheduler if args.scheduler is None else sampler_for(scheduler, args.scheduler),
            **options,
        )
    for scale in args.guidance_scales:
        pipe.check_guidance(scale)
    if args.class_labels is not None:
        pipe.get_label_ids(args.class_labels)


def image_shape(folder: Path, snapshots_dir: Path | None) -> tuple[int, int]:
    """Side in pixels and number of channels of the images that a pipeline generates."""
    parts, transformer = parts_and_transformer(folder, snapshots_dir)
    config = read_json(transformer / "config.json", {})
    if not has_component(parts, "vae"):
        return config["sample_size"], config["in_channels"]
    vae = read_json(parts / "vae" / "config.json", {})
    return config["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1), vae["out_channels"]


def load_references(args, accelerator, extractors, resolution, num_channels) -> list[ReferenceStatistics]:
    """Statistics of the real images for each extractor."""
    if args.reference_statistics is not None:
        references = [ReferenceStatistics.load(path) for path in args.reference_statistics]
    else:
        with accelerator.main_process_first():
            dataset = open_reference(args)
        references = [
            reference_statistics(
                dataset,
                extractor,
                resolution=resolution,
                num_channels=num_channels,
                cache_dir=args.output_dir / "reference",
                image_column=args.image_column,
                batch_size=args.batch_size,
                num_processes=accelerator.num_processes,
                process_index=accelerator.process_index,
                gather=lambda part: gather_object([part]),
            )
            for extractor in extractors
        ]
    for reference, extractor in zip(references, extractors, strict=True):
        reference.check(extractor, resolution, num_channels)
        warnings = [*reference.description["warnings"]]
        warnings.append(rank_warning(args.num_samples, len(reference.mean), "generated images"))
        for warning in filter(None, warnings):
            accelerator.print(f"Warning: {warning}")
        if args.nearest_k >= len(reference.features):
            raise ValueError(
                f"--nearest_k must be less than the number of reference images ({len(reference.features)}), or 0, got "
                f"{args.nearest_k}"
            )
    return references


def open_reference(args):
    try:
        return load_image_dataset(
            args.reference_dir,
            dataset_name=args.dataset_name,
            dataset_config_name=args.dataset_config_name,
            split=args.dataset_split,
            cache_dir=args.cache_dir,
            image_column=args.image_column,
            label_column=None,
            max_train_samples=args.max_reference_images,
        )[0]
    except ValueError as error:
        raise ValueError(str(error).replace("`train_data_dir`", "`reference_dir`")) from error


def describe(args, folder, snapshots_dir, extractors, references) -> dict:
    """All that the numbers of a cell depend on, beside the cell itself."""
    parts, transformer = parts_and_transformer(folder, snapshots_dir)
    if snapshots_dir is None:
        paths = [folder / name for name in files_to_publish(folder) if not name.startswith("transformer_ema_")]
    else:
        snapshots = snapshots_up_to(find_snapshots(snapshots_dir), args.step)
        check_snapshots(snapshots)  # against the hashes of weights in their JSON files, which are hashed here instead
        paths = [path for snapshot in snapshots for path in sorted(snapshot.path.glob("*.json"))]
        for part in pipeline_parts(snapshots_dir):
            paths += sorted(part.glob("*")) if part.is_dir() else [part]
    content = hashlib.sha256()
    for path in paths:
        if path.suffix in (".json", ".safetensors"):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            content.update(path.relative_to(parts).as_posix().encode() + digest)
    index = read_json(parts / "model_index.json", {})
    num_classes = read_json(transformer / "config.json", {}).get("num_classes")
    return {
        "model": args.pretrained_model_name_or_path,
        "model_sha256": content.hexdigest(),
        "step": args.step,
        "scheduler": args.scheduler or index["scheduler"][1],
        "dtype": args.dtype,
        "num_samples": args.num_samples,
        "seed": args.seed,
        "class_labels": None if num_classes is None else args.class_labels or list(range(num_classes)),
        "nearest_k": args.nearest_k,
        "extractors": [extractor.description for extractor in extractors],
        "references": [
            {key: value for key, value in reference.description.items() if key != "extractor"}
            for reference in references
        ],
    }


def keep_settings(path: Path, settings: dict) -> None:
    """Refuse to mix cells that cannot be compared."""
    if path.is_file():
        stored = read_json(path, {})
        # The same model may have moved.
        different = sorted(name for name in settings if name != "model" and stored.get(name) != settings[name])
        if different:
            other_step = "step" in different and stored["step"] is not None
            raise ValueError(
                f"--output_dir must be new or hold cells of the same settings; {path} differs in "
                + "; ".join(
                    f"{name}: {shortened(stored.get(name))} and {shortened(settings[name])}" for name in different
                )
                + (f". `--step {stored['step']}` goes on with its cells" if other_step else "")
            )
    write_json(path, settings)


# Cells.


def load_pipeline(args, accelerator, folder, snapshots_dir, std) -> MPDiTPipeline:
    if std is not None:
        # Of its own: another sweep may share the output folder.
        is_main = accelerator.is_main_process
        (folder,) = broadcast_object_list(
            [tempfile.mkdtemp(prefix="rebuilt-", dir=args.output_dir) if is_main else None]
        )
    try:
        if std is not None and accelerator.is_main_process:
            reconstruct_ema(snapshots_dir, folder, std, args.step)
        accelerator.wait_for_everyone()
        pipe = MPDiTPipeline.from_pretrained(folder, dtype=getattr(torch, args.dtype))
        accelerator.wait_for_everyone()
    finally:
        if std is not None and accelerator.is_main_process:
            shutil.rmtree(folder)
    if args.scheduler is not None:
        pipe.scheduler = sampler_for(pipe.scheduler, args.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(accelerator.device)


def evaluate_cell(args, accelerator, pipe, cell, settings, extractors, references) -> dict:
    """Generate the images of a cell, this process's share, and measure all of them; the same on every process."""
    start = time.perf_counter()
    labels = settings["class_labels"]
    call = {
        "seed": args.seed,
        "class_ids": None if labels is None else pipe.get_label_ids(labels),
        "num_inference_steps": cell["num_inference_steps"],
        "guidance_scale": cell["guidance_scale"],
    }
    own = range(accelerator.process_index, args.num_samples, accelerator.num_processes)
    statistics = [RunningStatistics() for _ in extractors]
    features, logits, digests, shown, error = [{} for _ in extractors], [{} for _ in extractors], {}, {}, None
    batches = tqdm(
        range(0, len(own), args.batch_size), desc=name_of(cell), disable=not accelerator.is_main_process, leave=False
    )
    try:
        for first in batches:
            indices = own[first : first + args.batch_size]
            images = generate_images(pipe, indices, **call)
            # NumPy's rows, here and below: a row of a tensor would travel with the whole batch.
            for index, image in zip(indices, images.cpu().numpy(), strict=True):
                digests[index] = hashlib.sha256(image.tobytes()).digest()
                if index < NUM_SHOWN:
                    shown[index] = image
            for i, extractor in enumerate(extractors):
                rows, scores = extractor(images)
                statistics[i].update(rows)
                features[i] |= {k: row for k, row in zip(indices, rows.numpy(), strict=True) if k < MAX_FEATURES}
                logits[i] |= {} if scores is None else dict(zip(indices, scores.numpy(), strict=True))
    except NonFiniteImageError as found:
        error = str(found)

    parts = gather_object([(statistics, features, logits, digests, shown, error)])
    errors = [part[-1] for part in parts if part[-1] is not None]
    if errors:
        return {**cell, "error": errors[0]}
    if not accelerator.is_main_process:
        return cell
    metrics = []
    for i, (extractor, reference) in enumerate(zip(extractors, references, strict=True)):
        merged = RunningStatistics()
        for part in parts:
            merged.merge(part[0][i])
        rows, scores = in_order(part[1][i] for part in parts), in_order(part[2][i] for part in parts)
        rows = torch.from_numpy(np.stack(rows))
        measured = image_metrics(reference, merged, rows, k=args.nearest_k, device=accelerator.device)
        if scores:
            measured |= inception_score(torch.from_numpy(np.stack(scores)))
        metrics.append({"extractor": extractor.description["id"], **measured})
    shown_images = [
        Image.fromarray(image.squeeze(0) if len(image) == 1 else image.transpose(1, 2, 0))
        for image in in_order(part[4] for part in parts)
    ]
    columns = min(8, len(shown_images))
    shown_images = shown_images[: len(shown_images) // columns * columns]
    grid = make_image_grid(shown_images, rows=len(shown_images) // columns, cols=columns)
    path = cell_path(args, cell).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    return {
        **cell,
        "metrics": metrics,
        "images_sha256": hashlib.sha256(b"".join(in_order(part[3] for part in parts))).hexdigest(),
        "seconds": time.perf_counter() - start,
        "num_processes": accelerator.num_processes,
        "batch_size": args.batch_size,
        "device": accelerator.device.type,
    }


def in_order(parts) -> list:
    """Values of several mappings by image number, in the order of the numbers."""
    together = {}
    for part in parts:
        together |= part
    return [together[index] for index in sorted(together)]


def inception_score(logits: torch.Tensor) -> dict[str, float]:
    from torch_fidelity.metric_isc import isc_features_to_metric

    score = isc_features_to_metric(logits)
    return {"inception_score": score["inception_score_mean"], "inception_score_std": score["inception_score_std"]}


def is_finished(args, cell: dict) -> bool:
    return "metrics" in read_json(cell_path(args, cell), {})


def name_of(cell: dict) -> str:
    width = "" if cell["ema_std"] is None else f"std-{cell['ema_std']!r}_"
    return f"{width}guidance-{cell['guidance_scale']!r}_steps-{cell['num_inference_steps']}"


def cell_path(args, cell: dict) -> Path:
    return args.output_dir / "cells" / f"{name_of(cell)}.json"


def line_of(cell: dict) -> str:
    if "error" in cell:
        return f"{name_of(cell)}: failed: {cell['error']}"
    texts = []
    for metrics in cell["metrics"]:
        numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
        texts.append(", ".join(f"{key} {value:.5g}" for key, value in numbers.items()) + f" ({metrics['extractor']})")
    return f"{name_of(cell)}: {'; '.join(texts)}"


# Results.


def finish(args, folder, snapshots_dir, settings, references, cells, repo_id) -> None:
    """Results of all cells in the folder, also of earlier sweeps with the same settings."""
    finished = [read_json(path, {}) for path in sorted((args.output_dir / "cells").glob("*.json"))]
    finished = [cell for cell in finished if "metrics" in cell]
    failed = [read_json(cell_path(args, cell), {}) for cell in cells if not is_finished(args, cell)]
    if finished:
        best = min(finished, key=lambda cell: cell["metrics"][0]["frechet_distance"])
        warnings = [warning for reference in references for warning in reference.description["warnings"]]
        warnings += [warning for metrics in best["metrics"] for warning in metrics["warnings"]]
        results = {
            "settings": settings,
            "versions": {
                "diffusers_mp": diffusers_mp.__version__,
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
            },
            "warnings": list(dict.fromkeys(warnings)),
            "best": best,
            "cells": finished,
            "failed": failed,
        }
        write_json(args.output_dir / "results.json", results)
        if args.heat_map:
            draw_heat_map(args.output_dir / "heat_map.png", results)
        print(f"Best of {len(finished)}: {line_of(best)}")
        pipeline_dir = pipeline_of_best(args, folder, snapshots_dir, best)
        (pipeline_dir / HEAT_MAP_NAME).unlink(missing_ok=True)
        if args.heat_map:
            shutil.copyfile(args.output_dir / "heat_map.png", pipeline_dir / HEAT_MAP_NAME)
        if not (pipeline_dir / "README.md").is_file():
            grid = cell_path(args, best).with_suffix(".png")
            write_model_card(pipeline_dir, repo_id, license=args.hub_license, sample_grid=grid)
        write_evaluation(pipeline_dir, results)
        print(f"Results: {args.output_dir / 'results.json'}, and in the card of {pipeline_dir}")
        if args.push_to_hub:
            url = publish(
                pipeline_dir,
                repo_id,
                token=args.hub_token,
                private=args.hub_private_repo or None,
                commit_message=f"Evaluation: {name_of(best)}",
            )
            print(f"Published: {url}")
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(cells)} cells failed and are tried again when started again; the others are kept. "
            f"{line_of(failed[0])}"
        )


def pipeline_of_best(args, folder, snapshots_dir, best) -> Path:
    """A folder that may be written to and published: the user's own, a copy of the Hub's, or one rebuilt."""
    if snapshots_dir is None and Path(args.pretrained_model_name_or_path).is_dir():
        return folder
    target = args.output_dir / "best"
    shutil.rmtree(target, ignore_errors=True)
    if snapshots_dir is None:
        return Path(shutil.copytree(folder, target))
    reconstruct_ema(snapshots_dir, target, best["ema_std"], args.step)
    # What the card tells of the training lies in the folder of the run.
    arguments = read_json(snapshots_dir.parent / "training_arguments.json", {})
    if arguments:
        write_json(target / "training_arguments.json", {**arguments, "ema_stds": [best["ema_std"]]})
        for name in (f"{arguments.get('logging_dir') or 'logs'}/metrics.jsonl", "latents/index.json"):
            if (snapshots_dir.parent / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(snapshots_dir.parent / name, target / name)
    return target


def draw_heat_map(path: Path, results: dict) -> None:
    """The first extractor's distances over guidance: by width with a panel for each number of steps, or by steps."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    def values(key):
        return sorted({cell[key] for cell in results["cells"]})

    by_width = len({cell["ema_std"] for cell in results["cells"]}) > 1
    row_key, row_label = ("ema_std", "width of the average") if by_width else ("num_inference_steps", "sampling steps")
    rows, columns = values(row_key), values("guidance_scale")
    panels = values("num_inference_steps") if by_width else [None]
    distances = [cell["metrics"][0]["frechet_distance"] for cell in results["cells"]]
    low, high = min(distances), max(distances)
    norm = LogNorm(low, high) if 0 < 4 * low < high else Normalize(low, high)
    width = len(panels) * (0.8 * len(columns) + 0.4) + 2.2
    figure = Figure(figsize=(max(width, 5), max(0.6 * len(rows) + 1.6, 2.6)), layout="constrained")
    for axes, steps in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        grid = [[math.nan] * len(columns) for _ in rows]
        for cell in results["cells"]:
            if steps is None or cell["num_inference_steps"] == steps:
                row, column = rows.index(cell[row_key]), columns.index(cell["guidance_scale"])
                value = grid[row][column] = cell["metrics"][0]["frechet_distance"]
                is_best = cell == results["best"]
                # Bright is small: black on it, white on dark.
                colour = "black" if norm(value) < 0.5 else "white"
                weight = "bold" if is_best else "normal"
                axes.text(column, row, f"{value:.4g}", ha="center", va="center", color=colour, weight=weight)
                if is_best:
                    frame = {"fill": False, "edgecolor": "tab:red", "linewidth": 3, "clip_on": False}
                    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **frame))
        image = axes.imshow(grid, cmap="viridis_r", norm=norm, aspect="auto")
        axes.set_facecolor("lightgrey")
        axes.set_xticks(range(len(columns)), [f"{scale:g}" for scale in columns])
        axes.set_yticks(range(len(rows)), [f"{row:g}" for row in rows])
        axes.set(xlabel="guidance scale", title=None if steps is None else f"{steps} steps")
    figure.axes[0].set_ylabel(row_label)
    name = results["settings"]["extractors"][0]["id"].rstrip("/").split("/")[-1]
    # Of its own choice matplotlib writes 6 x 10^-1.
    ticks = np.unique((np.geomspace if isinstance(norm, LogNorm) else np.linspace)(low, high, 5))
    bar = figure.colorbar(image, ax=figure.axes, ticks=ticks, format="%.3g", label=f"Fréchet distance\n({name})")
    bar.minorticks_off()
    figure.savefig(path, dpi=150, metadata={"Software": None})


def shortened(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


if __name__ == "__main__":
    main(parse_args())
