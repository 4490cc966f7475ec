"""The start block of an evaluation: what is generated, by what, and what it is compared with."""

import argparse
from collections.abc import Sequence

from accelerate import Accelerator

from ..start_block import device_warnings, device_words, start_block
from .reference import ReferenceStatistics


def start_of_evaluation(
    args: argparse.Namespace, accelerator: Accelerator, references: Sequence[ReferenceStatistics], num_cells: int
) -> str:
    """The start block.

    Args:
        args (argparse.Namespace): the command line of `examples/evaluate.py`.
        accelerator (Accelerator): of the run.
        references (sequence of ReferenceStatistics): of each extractor.
        num_cells (int): combinations of width, guidance and steps.
    """
    reference = references[0].description
    source = args.reference_dir or args.dataset_name or ", ".join(args.reference_statistics or [])
    classes = "" if reference["class_counts"] is None else f" of {len(reference['class_counts']):,} classes"
    rows = {
        "device": f"{device_words(accelerator)}; weights in {args.dtype}",
        "data": f"{source}: {reference['num_images']:,} real images{classes} at {reference['resolution']} pixels",
        "model": f"{args.pretrained_model_name_or_path}, sampled by {args.scheduler or 'its own scheduler'}",
        "images": f"{args.num_samples:,} for each of {num_cells:,} cell{'s' if num_cells > 1 else ''}, "
        f"{args.batch_size} of a process at once",
        "measures": ", ".join(args.extractors),
        "output": f"{args.output_dir}: results.json, cells/ as they are finished",
    }
    return start_block(rows, device_warnings(accelerator))
