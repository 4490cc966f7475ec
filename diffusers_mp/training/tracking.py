"""A tracker for Accelerate that needs no service and no package: one JSON object a line."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from ..files import UNFINISHED, parse_json, space_for, whole_file
from .arguments import NAMES_OF_RUNS


def tracker_options(args: argparse.Namespace, step: int) -> tuple[str, dict[str, dict[str, Any]]]:
    """Name of the project and `init_kwargs` for `Accelerator.init_trackers`.

    Args:
        args (argparse.Namespace): with `report_to`, `tracker_project_name` and `tracker_run_name`.
        step (int): updates done; what tensorboard has of later ones comes again and is hidden.
    """
    project, name = args.tracker_project_name or "train_mpdit", args.tracker_run_name
    if args.report_to == "tensorboard":
        # Its runs are folders.
        return os.path.join(project, name or ""), {"tensorboard": {"purge_step": step + 1}}
    return project, {args.report_to: {NAMES_OF_RUNS[args.report_to]: name}} if name else {}


class JSONLinesTracker(GeneralTracker):
    """Appends every logged dict with its step to `metrics.jsonl`, so that a run always has its curve.

    Args:
        logging_dir (str or Path): folder of the file, made if missing.
    """

    name = "jsonl"
    requires_logging_directory = True

    def __init__(self, logging_dir: str | Path):
        super().__init__()
        self.path = Path(logging_dir) / "metrics.jsonl"

    @property
    def tracker(self) -> Path:
        """The file that is written."""
        return self.path

    @property
    def last_step(self) -> int:
        """The last step that was logged, 0 if there is none."""
        return max((self._step_of(line) for line in self._whole_lines()), default=0)

    def values_of(self, name: str) -> list[float]:
        """All that was logged under a name, in order."""
        entries = map(json.loads, self._whole_lines())
        return [entry[name] for entry in entries if name in entry]

    def _whole_lines(self) -> list[str]:
        lines = (
            self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            if self.path.is_file()
            else []
        )
        return [line for line in lines if line.endswith("\n")]  # a kill can have cut the last one

    def _step_of(self, line: str) -> int:
        way_out = f"remove the line that begins with {line[:40]!r}"
        return parse_json(line, self.path, keys=["step"], way_out=way_out)["step"] or 0

    @on_main_process
    def discard_after(self, step: int) -> None:
        """Drop what a run logged between its last checkpoint and its end, which a resumed run logs again.

        Args:
            step (int): optimiser updates done at the checkpoint.
        """
        if self.path.is_file():
            kept = [line for line in self._whole_lines() if self._step_of(line) <= step]
            for left_by_a_kill in self.path.parent.glob(f"{self.path.name}.*{UNFINISHED}"):
                left_by_a_kill.unlink()
            # Replaced as a whole: a run killed here must not lose its curve.
            with whole_file(self.path) as unfinished:
                unfinished.write_text("".join(kept), encoding="utf-8")

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs) -> None:
        """Append one line.

        Args:
            values (dict): names to JSON-serialisable values.
            step (int, optional): optimiser updates done.
        """
        with space_for(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
