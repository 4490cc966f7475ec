"""Measure a pipeline's images against real ones: Fréchet distance, precision, recall; FID with torch-fidelity.

    accelerate launch examples/evaluate.py --pretrained_model_name_or_path run --reference_dir photos
    accelerate launch examples/evaluate.py --pretrained_model_name_or_path run --reference_dir photos
        --ema_stds 0.03 0.05 0.075 0.10 --guidance_scales 1 1.25 1.5 2 --num_inference_steps 25 50 --heat_map

The second line sweeps: it measures each combination (widths are rebuilt from the snapshots of the run). Images go
straight to the measures. Each has its own seed, so that any number of processes and any batch size give the same
ones (without accelerators: `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2`); the output folder must be one that all
processes see. Killed, it goes on after the last finished cell when started again with the same arguments.

    evaluation/results.json, heat_map.png   everything measured, and how
    evaluation/cells/*.json, *.png          each cell, when it is finished, and its first images
    evaluation/reference/                   statistics of the real images, by content hash
    evaluation/best/                        the pipeline of the best cell with its card, for sweeps over widths, for
                                            Hub models, and where it is published

Nothing else is written, replaced or deleted; --write_card puts the table into the card of the model's own folder.
"""

import argparse
import importlib.util
from pathlib import Path

from diffusers_mp.arguments import (
    HelpFormatter,
    add_hub_arguments,
    at_least,
    check_effects,
    check_ema_stds,
    check_paths,
    check_source_effects,
    ema_width,
    finite,
    seed,
)
from diffusers_mp.scripts import RunFailedError, ScriptParser, command_line, run_script


def make_parser() -> ScriptParser:
    parser = ScriptParser(description="Measure generated images against real ones.", formatter_class=HelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="pipeline by path or Hub id, or output_dir of a run")
    add("--revision", help="of a pipeline on the Hub")
    add("--cache_dir", help="where the Hub client and `datasets` keep their files")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the pipeline")
    add("--scheduler", help="sampler, by its name in diffusers, instead of the pipeline's own")
    add("--output_dir", type=Path, default=Path("evaluation"), help="folder for everything")
    add("--write_card", action="store_true", help="put the table into the card of the model's own folder")

    add = parser.add_argument_group("images").add_argument
    add("--num_samples", type=at_least(2), default=50_000, help="generated images for each cell")
    add("--batch_size", type=at_least(1), default=32, help="images that a process generates at once")
    add("--seed", type=seed, default=0, help="image i depends on this and i alone")
    add(
        "--class_labels",
        nargs="+",
        help="names, or ids where no class has that name [all]; drawn as often as the reference has them, or in turn",
    )

    add = parser.add_argument_group("sweep (each combination is a cell)").add_argument
    add("--ema_stds", type=ema_width, nargs="+", help="widths, rebuilt from the run's ema_snapshots")
    add("--step", type=at_least(1), help="step of these averages, by default that of the last snapshot")
    add("--guidance_scales", type=finite, nargs="+", default=[1.0], help="1 is without guidance")
    add("--num_inference_steps", type=at_least(1), nargs="+", default=[50], help="sampling steps")
    add("--heat_map", action="store_true", help="draw the distances; needs matplotlib")

    add = parser.add_argument_group("reference (one of the first three)").add_argument
    add("--reference_dir", help="folder of real images")
    add("--dataset_name", help="data set on the Hub, or a path `datasets.load_dataset` understands")
    add("--reference_statistics", nargs="+", help="files from an earlier `reference/`, one for each extractor")
    add("--dataset_config_name", help="configuration of the data set")
    add("--split", help="its split [train], or the name of the folders to take images from")
    add("--image_column", default="image", help="column of the images")
    add("--label_column", default="label", help="column of their classes; none: the pipeline's classes in turn")
    add("--max_reference_images", type=at_least(2), help="take this many only, drawn with seed 0")

    add = parser.add_argument_group("measures").add_argument
    add(
        "--extractors",
        nargs="+",
        default=["facebook/dinov2-base"],
        help="what features come from; the first one decides what is best. Vision models of transformers by id or "
        "path, 'module:function', or 'torch-fidelity' for FID and Inception score",
    )
    add("--extractor_output", default="pooler_output", help="field of the transformers models' output")
    add("--nearest_k", type=at_least(0), default=3, help="neighbour of precision and recall; 0: without them")

    add = parser.add_argument_group("publishing (the best pipeline, with the table)").add_argument
    add_hub_arguments(add, default_id="that of the model, or its folder's name")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    sources = [args.reference_dir, args.dataset_name, args.reference_statistics]
    if sum(source is not None for source in sources) != 1:
        parser.error("exactly one of --reference_dir, --dataset_name and --reference_statistics must be given")
    check_source_effects(args, parser)
    if Path(args.pretrained_model_name_or_path).is_dir():
        check_effects(parser, ["revision"], "with a folder, which has no revisions")
    if args.ema_stds is None:
        check_effects(parser, ["step"], "without --ema_stds")
    if args.reference_statistics is not None:
        names = ["split", "image_column", "label_column", "max_reference_images"]
        check_effects(parser, names, "with --reference_statistics, which are measured already")
    if all(name == "torch-fidelity" or ":" in name for name in args.extractors):
        check_effects(parser, ["extractor_output"], "without a model of transformers in --extractors")
    if args.reference_statistics is not None and len(args.reference_statistics) != len(args.extractors):
        parser.error(
            f"--reference_statistics takes one file for each of --extractors ({len(args.extractors)}), got "
            f"{len(args.reference_statistics)}"
        )
    if args.num_samples <= args.nearest_k:
        parser.error(f"--num_samples must be more than --nearest_k ({args.nearest_k}), got {args.num_samples}")
    check_ema_stds(args.ema_stds or [], parser)
    for name in ("guidance_scales", "num_inference_steps"):
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            parser.error(f"--{name} must differ from each other, each is a cell, got {values}")
    if args.write_card and (args.ema_stds is not None or not Path(args.pretrained_model_name_or_path).is_dir()):
        parser.error(
            "--write_card needs the folder of one pipeline; of a sweep over --ema_stds and of a model of the Hub the "
            "best has its card in the folder best of --output_dir"
        )
    if args.heat_map and importlib.util.find_spec("matplotlib") is None:
        parser.error("--heat_map needs matplotlib: `pip install matplotlib`")
    return args


if __name__ == "__main__":
    args = command_line(parse_args, make_parser())  # before the imports below, which take seconds

import datetime
import itertools
import json
import shutil

import diffusers
import numpy as np
import PIL
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from diffusers.schedulers import SchedulerMixin

import diffusers_mp
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.evaluation.cells import evaluate_cell, line_of, name_of
from diffusers_mp.evaluation.classes import draw_classes
from diffusers_mp.evaluation.features import load_extractor
from diffusers_mp.evaluation.frechet import rank_warning
from diffusers_mp.evaluation.heat_map import draw_heat_map
from diffusers_mp.evaluation.model import EvaluatedModel, sampler_options
from diffusers_mp.evaluation.outputs import (
    check_card,
    check_outputs,
    keep_settings,
    read_cell,
    whole_pipeline,
    write_own,
)
from diffusers_mp.evaluation.reference import Processes, RealImages, ReferenceStatistics, reference_statistics
from diffusers_mp.evaluation.summary import start_of_evaluation
from diffusers_mp.masking import masked
from diffusers_mp.publishing.evaluation_card import write_evaluation
from diffusers_mp.publishing.hub import CARD_NAME, HEAT_MAP_NAME, check_hub_access, publish
from diffusers_mp.publishing.model_card import write_model_card
from diffusers_mp.sources import naming
from diffusers_mp.training.engine import check_processes


def main(args):
    check_paths(args)
    check_sampler(args.scheduler)
    check_folders(args)
    # The main process alone rebuilds averages and computes distances, which takes it minutes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))])
    check_processes(accelerator, "generate everything")
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

    # What is measured, and against what
    with naming("pretrained_model_name_or_path", args.pretrained_model_name_or_path):
        model = EvaluatedModel.find(
            args.pretrained_model_name_or_path,
            accelerator,
            ema_stds=args.ema_stds,
            step=args.step,
            token=args.hub_token,
            revision=args.revision,
            cache_dir=args.cache_dir,
        )
        pipe = model.without_weights(args.scheduler)
    for scale in args.guidance_scales:
        pipe.check_guidance(scale)
    draw_classes(pipe, args.class_labels, None, args.num_samples)  # refuses labels before the reference is measured
    extractors = []
    for name in args.extractors:
        device, cache_dir = accelerator.device, args.cache_dir
        with naming("extractors", name):
            extractors.append(load_extractor(name, output=args.extractor_output, device=device, cache_dir=cache_dir))
    references = load_references(args, accelerator, extractors, *model.image_shape())
    draw = draw_classes(pipe, args.class_labels, references[0].description["class_counts"], args.num_samples)
    settings = describe(args, model, pipe, draw, extractors, references)
    warnings = warnings_of(args, draw, references)
    accelerator.print(start_of_evaluation(args, accelerator, references, len(cells_of(args))))
    for line in (*([] if draw is None else [draw.line()]), *(f"Warning: {text}" for text in warnings)):
        accelerator.print(line)
    if accelerator.is_main_process:
        keep_settings(args.output_dir / "settings.json", settings)

    # The cells, of one width after another
    cells = cells_of(args)
    (unfinished,) = broadcast_object_list([[cell for cell in cells if not is_finished(args, cell)]])
    options = {"sampler": args.scheduler, "dtype": getattr(torch, args.dtype), "work_dir": args.output_dir}
    for std, of_width in itertools.groupby(unfinished, key=lambda cell: cell["ema_std"]):
        pipe = model.load(std, accelerator, **options)
        for cell in of_width:
            path = cell_path(args, cell)
            cell = evaluate_cell(
                cell,
                pipe,
                settings,
                None if draw is None else draw.class_ids(),
                [*zip(extractors, references, strict=True)],
                accelerator,
                batch_size=args.batch_size,
                sample_grid=path.with_suffix(".png"),
            )
            if accelerator.is_main_process:
                write_own(path, cell)
                print(line_of(cell))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(args, model, settings, warnings, repo_id)
    accelerator.end_training()


def check_folders(args) -> None:
    """Refuse, before any work, what could not be written at its end or only in the place of something else."""
    model_dir = Path(args.pretrained_model_name_or_path)
    if model_dir.is_dir() and args.output_dir.resolve() == model_dir.resolve():
        raise ValueError(f"`output_dir` must not be the model's own folder, got {args.output_dir}; one in it will do.")
    cells = [cell_path(args, cell) for cell in cells_of(args)]
    check_outputs(args.output_dir, cells, heat_map=args.heat_map, best=makes_best(args))
    if args.write_card:
        check_card(model_dir)


def makes_best(args) -> bool:
    """Whether the best becomes a folder: where there is none yet, or one that is not to be written to is published."""
    is_local = Path(args.pretrained_model_name_or_path).is_dir()
    return args.ema_stds is not None or not is_local or args.push_to_hub and not args.write_card


def cells_of(args) -> list[dict]:
    return [
        {"ema_std": std, "guidance_scale": scale, "num_inference_steps": steps}
        for std in args.ema_stds or [None]
        for scale in args.guidance_scales
        for steps in args.num_inference_steps
    ]


def check_sampler(name: str | None) -> None:
    found = SchedulerMixin if name is None else getattr(diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, SchedulerMixin):
        make_parser().error(
            "--scheduler must be a scheduler of diffusers, installed with what it needs, such as "
            f"DPMSolverMultistepScheduler, got {name}"
        )


def load_references(args, accelerator, extractors, resolution, num_channels) -> list[ReferenceStatistics]:
    """Statistics of the real images for each extractor."""
    if args.reference_statistics is not None:
        references = [ReferenceStatistics.load(path) for path in args.reference_statistics]
    else:
        with accelerator.main_process_first():
            source = open_reference(args)
        report = source.report
        accelerator.print("Reference: " + "\n    ".join(report.lines()))
        images = RealImages(
            source.dataset,
            args.image_column,
            None if report.counts is None else {name: count for name, count in report.counts.items() if count},
            {reason: len(names) for reason, names in report.left_out.items()},
        )
        processes = Processes(
            accelerator.num_processes, accelerator.process_index, gather=lambda part: gather_object([part])
        )
        argument = "dataset_name" if args.reference_dir is None else "reference_dir"
        with naming(argument, getattr(args, argument)):
            options = {"cache_dir": args.output_dir / "reference", "batch_size": args.batch_size}
            options |= {"resolution": resolution, "num_channels": num_channels, "processes": processes}
            references = [reference_statistics(images, extractor, **options) for extractor in extractors]
    for reference, extractor in zip(references, extractors, strict=True):
        reference.check(extractor, resolution, num_channels)
        if args.nearest_k >= len(reference.features):
            raise ValueError(
                f"--nearest_k must be less than the number of reference images ({len(reference.features)}), or 0, got "
                f"{args.nearest_k}"
            )
    return references


def open_reference(args):
    """The real images, with their classes where they tell them: none is refused for lack of those."""
    names = ("dataset_name", "dataset_config_name", "split", "cache_dir", "image_column")
    options = {name: getattr(args, name) for name in names} | {"max_train_samples": args.max_reference_images}
    label_column = None if args.label_column == "none" else args.label_column
    try:
        try:
            return load_image_dataset(args.reference_dir, label_column=label_column, **options)
        except ValueError as error:
            if args.label_column != "label":
                raise
            source = load_image_dataset(args.reference_dir, label_column=None, **options)
            source.report.warnings.append(f"taken without classes: {error}")
            return source
    except ValueError as error:
        raise ValueError(str(error).replace("`train_data_dir`", "`reference_dir`")) from error


def warnings_of(args, draw, references) -> list[str]:
    """What the numbers of all cells suffer from."""
    warnings = [text for reference in references for text in reference.description["warnings"]]
    warnings += [rank_warning(args.num_samples, len(reference.mean), "generated images") for reference in references]
    if draw is not None and draw.mismatch:
        warnings.append(f"{draw.mismatch}: classes come in turn, and the distance counts what that changes.")
    return list(dict.fromkeys(filter(None, warnings)))


def describe(args, model, pipe, draw, extractors, references) -> dict:
    """All that the numbers of a cell depend on, beside the cell itself, as JSON has it."""
    settings = {
        "model": args.pretrained_model_name_or_path,
        "commit": model.commit,
        "model_sha256": model.sha256(),
        "step": model.step,
        "sampler": sampler_options(pipe),
        "guided_by": "transformer" if pipe.guidance_transformer is None else "guidance_transformer",
        "dtype": args.dtype,
        "num_samples": args.num_samples,
        "seed": args.seed,
        "classes": None if draw is None else draw.description(),
        "nearest_k": args.nearest_k,
        "extractors": [extractor.description for extractor in extractors],
        "references": [
            {key: value for key, value in reference.description.items() if key not in ("extractor", "warnings")}
            for reference in references
        ],
    }
    return json.loads(json.dumps(masked(settings)))


def cell_path(args, cell: dict) -> Path:
    return args.output_dir / "cells" / f"{name_of(cell)}.json"


def is_finished(args, cell: dict) -> bool:
    return "metrics" in read_cell(cell_path(args, cell))


def finish(args, model, settings, warnings, repo_id) -> None:
    """Results of all cells in the folder, also of earlier sweeps with the same settings."""
    cells = cells_of(args)
    # Other files in the folder are not ours to read.
    stored = {path: read_cell(path) for path in sorted((args.output_dir / "cells").glob("*.json"))}
    finished = {path: cell for path, cell in stored.items() if "metrics" in cell}
    failed = [read_cell(cell_path(args, cell)) for cell in cells if not is_finished(args, cell)]
    if finished:
        path = min(finished, key=lambda path: finished[path]["metrics"][0]["frechet_distance"])
        best = finished[path]
        modules = {module.__name__: module.__version__ for module in (diffusers_mp, torch, diffusers, transformers)}
        results = {
            "settings": settings,
            "versions": modules | {"numpy": np.__version__, "pillow": PIL.__version__},
            "warnings": warnings,
            "best": best,
            "cells": [*finished.values()],
            "failed": failed,
        }
        write_own(args.output_dir / "results.json", results)
        if args.heat_map:
            draw_heat_map(args.output_dir / "heat_map.png", results)
        print(f"Best of {len(finished)}: {line_of(best)}")
        print(f"Results: {args.output_dir / 'results.json'}")
        publish_best(args, model, results, path.with_suffix(".png"), repo_id)
    if failed:
        raise RunFailedError(
            f"{len(failed)} of {len(cells)} cells failed and are tried again when started again; the others are kept. "
            f"{line_of(failed[0])}"
        )


def publish_best(args, model, results, sample_grid, repo_id) -> None:
    """The card, as far as one is to be written, and the upload."""
    best, folder = results["best"], model.folder
    if makes_best(args):
        folder = args.output_dir / "best"
        record = {"model_sha256": results["settings"]["model_sha256"], "ema_std": best["ema_std"]}
        with whole_pipeline(folder, record) as unfinished:
            model.save_copy(best["ema_std"], unfinished)
            write_card(args, unfinished, results, sample_grid, repo_id)
    elif args.write_card:
        write_card(args, folder, results, sample_grid, repo_id)
    else:
        return
    print(f"Card: {folder / CARD_NAME}")
    if args.push_to_hub:
        url = publish(
            folder,
            repo_id,
            token=args.hub_token,
            private=args.hub_private_repo or None,
            commit_message=f"Evaluation: {name_of(best)}",
        )
        print(f"Published: {url}")


def write_card(args, folder, results, sample_grid, repo_id) -> None:
    (folder / HEAT_MAP_NAME).unlink(missing_ok=True)  # of the table that is replaced
    if args.heat_map:
        shutil.copyfile(args.output_dir / "heat_map.png", folder / HEAT_MAP_NAME)
    if not (folder / CARD_NAME).is_file():
        write_model_card(folder, repo_id, license=args.hub_license, sample_grid=sample_grid)
    write_evaluation(folder, results)


if __name__ == "__main__":
    run_script(main, args, make_parser())
