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
    evaluation/best/                        the pipeline of the best cell, for sweeps over widths and for Hub models
"""

import argparse
import importlib.util
from pathlib import Path

from diffusers_mp.arguments import (
    HelpFormatter,
    add_hub_arguments,
    at_least,
    check_effects,
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

    add = parser.add_argument_group("images").add_argument
    add("--num_samples", type=at_least(2), default=50_000, help="generated images for each cell")
    add("--batch_size", type=at_least(1), default=32, help="images that a process generates at once")
    add("--seed", type=seed, default=0, help="image i depends on this and i alone")
    add("--class_labels", type=label, nargs="+", help="ids or names, taken in turn; all classes by default")

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
    add("--dataset_split", default="train", help="its split")
    add("--image_column", default="image", help="column of the images")
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


def label(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


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
        names = ["dataset_split", "image_column", "max_reference_images"]
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
    for name in ("ema_stds", "guidance_scales", "num_inference_steps"):
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            parser.error(f"--{name} must differ from each other, each is a cell, got {values}")
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
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from diffusers.schedulers import SchedulerMixin

import diffusers_mp
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.evaluation.cells import evaluate_cell, line_of, name_of
from diffusers_mp.evaluation.features import load_extractor
from diffusers_mp.evaluation.frechet import rank_warning
from diffusers_mp.evaluation.heat_map import draw_heat_map
from diffusers_mp.evaluation.model import EvaluatedModel
from diffusers_mp.evaluation.reference import Processes, ReferenceStatistics, reference_statistics
from diffusers_mp.files import read_json, write_json
from diffusers_mp.publishing.evaluation_card import write_evaluation
from diffusers_mp.publishing.hub import HEAT_MAP_NAME, check_hub_access, publish
from diffusers_mp.publishing.model_card import write_model_card
from diffusers_mp.sources import naming
from diffusers_mp.training.engine import check_processes


def main(args):
    check_paths(args)
    check_sampler(args.scheduler)
    # The main process alone rebuilds averages and computes distances, which takes it minutes.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))
    accelerator = Accelerator(kwargs_handlers=[patience])
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
        model.check(args.guidance_scales, args.class_labels, args.scheduler)
    extractors = []
    for name in args.extractors:
        options = {"output": args.extractor_output, "device": accelerator.device, "cache_dir": args.cache_dir}
        with naming("extractors", name):
            extractors.append(load_extractor(name, **options))
    references = load_references(args, accelerator, extractors, *model.image_shape())
    settings = describe(args, model, extractors, references)
    if accelerator.is_main_process:
        keep_settings(args.output_dir / "settings.json", settings)

    # The cells, of one width after another
    cells = [
        {"ema_std": std, "guidance_scale": scale, "num_inference_steps": steps}
        for std in args.ema_stds or [None]
        for scale in args.guidance_scales
        for steps in args.num_inference_steps
    ]
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
                extractors,
                references,
                accelerator,
                batch_size=args.batch_size,
                sample_grid=path.with_suffix(".png"),
            )
            if accelerator.is_main_process:
                write_json(path, cell)
                print(line_of(cell))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(args, model, settings, references, cells, repo_id)
    accelerator.end_training()


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
            dataset = open_reference(args)
        processes = Processes(
            accelerator.num_processes, accelerator.process_index, gather=lambda part: gather_object([part])
        )
        argument = "dataset_name" if args.reference_dir is None else "reference_dir"
        with naming(argument, getattr(args, argument)):
            references = [
                reference_statistics(
                    dataset,
                    extractor,
                    resolution=resolution,
                    num_channels=num_channels,
                    cache_dir=args.output_dir / "reference",
                    image_column=args.image_column,
                    batch_size=args.batch_size,
                    processes=processes,
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


def describe(args, model, extractors, references) -> dict:
    """All that the numbers of a cell depend on, beside the cell itself."""
    num_classes = model.transformer_config.get("num_classes")
    return {
        "model": args.pretrained_model_name_or_path,
        "model_sha256": model.sha256(),
        "step": model.step,
        "scheduler": args.scheduler or model.scheduler_name,
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
        stored = read_json(path, {}, way_out="take another --output_dir, or remove this one")
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


def cell_path(args, cell: dict) -> Path:
    return args.output_dir / "cells" / f"{name_of(cell)}.json"


def is_finished(args, cell: dict) -> bool:
    return "metrics" in read_cell(cell_path(args, cell))


def read_cell(path: Path) -> dict:
    """What a cell's file holds, nothing if there is none; refuses a damaged one, which could pass for the best."""
    way_out = "remove it, and the cell is measured again"
    cell = read_json(path, {}, way_out=way_out)
    metrics = cell.get("metrics", [{"frechet_distance": 0.0}])
    is_whole = isinstance(metrics, list) and metrics and all(isinstance(each, dict) for each in metrics)
    if not is_whole or not isinstance(metrics[0].get("frechet_distance"), float):
        raise ValueError(f"{path} is damaged, its `metrics` are none: {way_out}.")
    return cell


def finish(args, model, settings, references, cells, repo_id) -> None:
    """Results of all cells in the folder, also of earlier sweeps with the same settings."""
    finished = [read_cell(path) for path in sorted((args.output_dir / "cells").glob("*.json"))]
    finished = [cell for cell in finished if "metrics" in cell]
    failed = [read_cell(cell_path(args, cell)) for cell in cells if not is_finished(args, cell)]
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
        pipeline_dir = model.folder
        if model.snapshots_dir is not None or not Path(args.pretrained_model_name_or_path).is_dir():
            pipeline_dir = args.output_dir / "best"  # neither the Hub client's files nor a run's are to be written to
            model.save_best(best["ema_std"], pipeline_dir)
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
        raise RunFailedError(
            f"{len(failed)} of {len(cells)} cells failed and are tried again when started again; the others are kept. "
            f"{line_of(failed[0])}"
        )


def shortened(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


if __name__ == "__main__":
    run_script(main, args, make_parser())
