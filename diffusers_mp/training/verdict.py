"""What a run says at its end: where its result is, how good it is, and the command that comes next."""

import json
import shlex
from pathlib import Path

from ..pipeline_mpdit import MPDiTPipeline
from .tracking import JSONLinesTracker


def verdict(output_dir: Path, pipeline: MPDiTPipeline, curve: JSONLinesTracker, step: int) -> str:
    """Three lines: losses, the folder, and a command that draws an image.

    Args:
        output_dir (Path): of the run, in which the pipeline is saved.
        pipeline (MPDiTPipeline): that one.
        curve (JSONLinesTracker): the log of the run.
        step (int): updates made.
    """
    losses = []
    if loss := curve.values_of("train/loss"):
        losses.append(f"loss {loss[-1]:.4f}")
    if validation := curve.values_of("validation/loss"):
        first = f" ({validation[0]:.4f} at the first validation)" if len(validation) > 1 else ""
        losses.append(f"of held-out images {validation[-1]:.4f}{first}")
    config, conditions = pipeline.transformer.config, []
    if config.num_classes is not None:
        conditions.append("0")  # an id: a name may stand for several
    if config.pooled_projection_dim is not None:
        conditions.append(f"pooled_projections=torch.randn(1, {config.pooled_projection_dim})")
    imports = "from diffusers_mp import MPDiTPipeline"
    if config.pooled_projection_dim is not None:
        imports = f"import torch; {imports}"
    command = sampling_command(imports, "MPDiTPipeline", output_dir, *conditions)
    return "\n".join(
        [
            f"{step:,} updates: {', '.join(losses) or 'no loss was logged'}",
            f"Saved the pipeline to {output_dir}: MPDiTPipeline.from_pretrained({str(output_dir)!r})",
            f"Next, an image of it: {command}",
        ]
    )


def sampling_command(imports: str, pipeline: str, folder: Path, *conditions: str) -> str:
    """A line for the shell that draws one image with the pipeline in a folder.

    Args:
        imports (str): of that class, and of what its arguments need.
        pipeline (str): name of its class.
        folder (Path): which holds it.
        *conditions (str): arguments of its call, as Python has them.
    """
    call = f"{pipeline}.from_pretrained({json.dumps(str(folder))})({', '.join(conditions)})"
    return shlex.join(["python", "-c", f'{imports}; {call}.images[0].save("sample.png")'])
