"""The model of an evaluation: a pipeline by folder or Hub id, or the snapshots of a run, for averages of any width."""

import contextlib
import hashlib
import inspect
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import broadcast_object_list

from ..autoencoders import geometry
from ..averages.reconstruction import plan_reconstruction, reconstruct_ema, snapshots_up_to
from ..averages.snapshots import check_snapshots, find_snapshots, pipeline_parts
from ..files import read_json, write_json
from ..pipeline_mpdit import MPDiTPipeline
from ..publishing.hub import download_pipeline, files_to_publish, has_component
from ..publishing.training_curve import LOG_NAME, LOGGING_DIR, log_file
from ..schedulers import is_flow, sampler_for, sampler_of
from ..sources import check_reachable, naming
from ..transformer_mpdit import MPDiTTransformer2DModel


@dataclass(frozen=True)
class EvaluatedModel:
    """Where the weights and the other parts of what is measured lie.

    Attributes:
        folder (Path): of the pipeline, or of the run.
        snapshots_dir (Path): of the run's snapshots, of which averages are rebuilt; None for a pipeline as it is.
        step (int): of these averages; None for a pipeline.
        commit (str): of a pipeline on the Hub.
    """

    folder: Path
    snapshots_dir: Path | None = None
    step: int | None = None
    commit: str | None = None

    @classmethod
    def find(
        cls,
        name_or_path: str,
        accelerator: Accelerator,
        *,
        ema_stds: Sequence[float] | None = None,
        step: int | None = None,
        **of_hub: str | None,
    ) -> "EvaluatedModel":
        """What a script was given as `--pretrained_model_name_or_path`; to be called on every process.

        Args:
            name_or_path (str): a pipeline by folder or Hub id, or the folder of a run.
            accelerator (Accelerator): of this process.
            ema_stds (sequence of float, optional): widths that will be rebuilt from the run's snapshots.
            step (int, optional): of these averages; that of the last snapshot if left out.
            of_hub: `token`, `revision` and `cache_dir` of `download_pipeline`.
        Returns:
            EvaluatedModel: the same on every process.
        Raises:
            FileNotFoundError: if there are widths but no snapshots.
        """
        folder, commit = Path(name_or_path), None
        if not folder.is_dir():
            check_reachable("pretrained_model_name_or_path", name_or_path, ["model_index.json"], **of_hub)
            with accelerator.main_process_first():
                folder = download_pipeline(name_or_path, **of_hub)
            commit = folder.name  # as the Hub's client names its folders
        if ema_stds is None:
            files_to_publish(folder)
            return cls(folder, step=step, commit=commit)
        snapshots_dir = folder / "ema_snapshots" if (folder / "ema_snapshots").is_dir() else folder
        snapshots = find_snapshots(snapshots_dir)
        if not snapshots:
            raise FileNotFoundError(
                f"--ema_stds needs the snapshots of a run (--ema_snapshot_steps of the trainer), {folder} has no "
                "ema_snapshots"
            )
        # Once for all widths and processes: a run that still trains adds snapshots meanwhile.
        (step,) = broadcast_object_list([snapshots[-1].step if step is None else step])
        for std in ema_stds:
            plan = plan_reconstruction(snapshots, std, step)
            accelerator.print(
                f"Width {std:g}: fit error {plan.fit_error:.2e} of the profile's norm at step {plan.step}"
            )
        return cls(folder, snapshots_dir, step)

    @property
    def parts(self) -> Path:
        """Where scheduler, VAE and index lie."""
        return self.snapshots_dir or self.folder

    @property
    def transformer_config(self) -> dict:
        """That of the transformer, which all snapshots of a run have."""
        transformer = find_snapshots(self.snapshots_dir)[0].path if self.snapshots_dir else self.folder / "transformer"
        return read_json(transformer / "config.json", {})

    def image_shape(self) -> tuple[int, int]:
        """Side in pixels and number of channels of the images that the pipeline generates."""
        config = self.transformer_config
        if not has_component(self.parts, "vae"):
            return config["sample_size"], config["in_channels"]
        vae = geometry(read_json(self.parts / "vae" / "config.json", {}))
        return config["sample_size"] * vae.factor, vae.out_channels

    def without_weights(self, sampler: str | None) -> MPDiTPipeline:
        """The pipeline as its configs have it, to refuse what does not suit it before the reference is measured.

        Args:
            sampler (str, optional): class of diffusers, instead of the pipeline's own.
        Returns:
            MPDiTPipeline: with transformers on the meta device and without VAE.
        Raises:
            ValueError: if the pipeline is of another kind, or does not take the sampler.
        """
        index, config = read_json(self.parts / "model_index.json", {}), self.transformer_config
        name = index.get("_class_name")
        if name != MPDiTPipeline.__name__:
            raise ValueError(f"--pretrained_model_name_or_path must be an MPDiTPipeline, {self.parts} holds a {name}")
        if has_component(self.parts, "guider"):
            raise ValueError(
                "--pretrained_model_name_or_path must be a pipeline without a `guider`, which has a scale of its own, "
                f"{self.parts} has a {index['guider'][1]}; after `pipe.guider = None` save it to another folder"
            )
        if config.get("pooled_projection_dim") is not None:
            raise ValueError(
                "the pipeline must be class-conditional or unconditional; this one takes condition vectors"
            )
        _, num_channels = self.image_shape()
        if num_channels not in (1, 3):
            raise ValueError(
                f"the pipeline must generate images of 1 or 3 channels, it has {num_channels}"
                + ("" if has_component(self.parts, "vae") else " and no VAE")
            )
        scheduler_name = read_json(self.parts / "model_index.json")["scheduler"][1]
        scheduler = getattr(diffusers, scheduler_name).from_pretrained(self.parts, subfolder="scheduler")
        options = {name: index.get(name) for name in ("id2label", "prediction_type")}
        with init_empty_weights():
            if has_component(self.parts, "guidance_transformer"):
                weak = read_json(self.parts / "guidance_transformer" / "config.json", {})
                options["guidance_transformer"] = MPDiTTransformer2DModel.from_config(weak)
            return MPDiTPipeline(
                MPDiTTransformer2DModel.from_config(config),
                scheduler if sampler is None else sampler_for(scheduler, sampler),
                **options,
            )

    def sha256(self) -> str:
        """Of all files that the images depend on, by their names in the folder."""
        if self.snapshots_dir is None:
            names = [name for name in files_to_publish(self.folder) if not name.startswith("transformer_ema_")]
            paths = [self.folder / name for name in names]
        else:
            snapshots = snapshots_up_to(find_snapshots(self.snapshots_dir), self.step)
            check_snapshots(snapshots)  # against the hashes of weights in their JSON files, which are hashed instead
            paths = [path for snapshot in snapshots for path in sorted(snapshot.path.glob("*.json"))]
            for part in pipeline_parts(self.snapshots_dir):
                paths += sorted(part.glob("*")) if part.is_dir() else [part]
        content = hashlib.sha256()
        for path in paths:
            if path.suffix in (".json", ".safetensors"):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").digest()
                content.update(path.relative_to(self.parts).as_posix().encode() + digest)
        return content.hexdigest()

    def load(
        self, std: float | None, accelerator: Accelerator, *, sampler: str | None, dtype: torch.dtype, work_dir: Path
    ) -> MPDiTPipeline:
        """The pipeline on this process's device; to be called on every process.

        Args:
            std (float, optional): width of the average, which the main process rebuilds.
            accelerator (Accelerator): of this process.
            sampler (str, optional): class of diffusers, instead of the pipeline's own.
            dtype (torch.dtype): of the pipeline.
            work_dir (Path): where averages are rebuilt, and deleted once they are loaded.
        Returns:
            MPDiTPipeline: ready to generate.
        """
        folder, is_main = self.folder, accelerator.is_main_process
        with contextlib.ExitStack() as at_end:
            if std is not None:
                # A folder for this call alone: another sweep may share the output folder.
                made = tempfile.mkdtemp(prefix="rebuilt-", dir=work_dir) if is_main else None
                if is_main:
                    at_end.callback(shutil.rmtree, made)
                (folder,) = broadcast_object_list([made])
                if is_main:
                    reconstruct_ema(self.snapshots_dir, folder, std, self.step)
            accelerator.wait_for_everyone()
            with naming("pretrained_model_name_or_path", folder):
                pipe = MPDiTPipeline.from_pretrained(folder, dtype=dtype)
            accelerator.wait_for_everyone()
        if sampler is not None:
            pipe.scheduler = sampler_for(pipe.scheduler, sampler)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(accelerator.device)

    def save_copy(self, std: float | None, folder: Path) -> None:
        """A pipeline that may be written to and published: a copy, or the average rebuilt, with the run's record.

        Args:
            std (float, optional): width of the average.
            folder (Path): an empty folder.
        """
        run, arguments = self.folder, read_json(self.folder / "training_arguments.json", {})
        if self.snapshots_dir is None:
            for name in files_to_publish(self.folder):
                _copy(self.folder / name, folder / name)
        else:
            reconstruct_ema(self.snapshots_dir, folder, std, self.step)
            run = self.snapshots_dir.parent
            arguments = read_json(run / "training_arguments.json", {})
            arguments |= {"ema_stds": [std]} if arguments else {}
        # What the card tells of the training lies in the folder of the run.
        if arguments:
            write_json(folder / "training_arguments.json", {**arguments, "logging_dir": LOGGING_DIR})
        for source, name in (
            (log_file(run, arguments), f"{LOGGING_DIR}/{LOG_NAME}"),
            (run / "latents/index.json", "latents/index.json"),
        ):
            if source.is_file():
                _copy(source, folder / name)


def sampler_options(pipe: MPDiTPipeline) -> dict[str, Any]:
    """Class and options of the scheduler that a pipeline samples with, and what it predicts, of JSON values."""
    sampler = sampler_of(pipe.scheduler, pipe.transformer)
    # What another sampler had in the config plays no role for this one.
    names = [name for name in inspect.signature(type(sampler)).parameters if name in sampler.config]
    options = {name: sampler.config[name] for name in names}
    if is_flow(sampler):  # whose samplers know of velocities alone
        options["prediction_type"] = pipe.config.prediction_type
    # JSON has no infinity.
    told = {name: str(value) if value in (math.inf, -math.inf) else value for name, value in options.items()}
    return {"class": type(sampler).__name__, **told}


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
