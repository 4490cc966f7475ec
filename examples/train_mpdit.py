"""Train a magnitude-preserving diffusion transformer on an image folder or a Hub data set.

    accelerate launch examples/train_mpdit.py --train_data_dir photos --resolution 256 --preset B/2 --output_dir run

The defaults are the recipe of arXiv 2505.19122: S/2 in configuration E with scale, rotation and gate, Adam at 1e-2
with warm-up and inverse-square-root decay, 400 000 updates of 256 samples, learned variance, averages of widths 0.05
and 0.10. The run's folder becomes a pipeline: `MPDiTPipeline.from_pretrained("run")`.

Every sample's noise, time, posterior draw, flip and label dropout are functions of (seed, epoch, index), so that
the number of processes, workers and micro batches does not change the run.
"""

import contextlib
import copy
import datetime
import hashlib
import json
import math
import shutil
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from training_arguments import DEFAULT_VAE, OBJECTIVE_FLAGS, latents_folder, model_config, parse_args

from diffusers_mp import (
    MagnitudeRecorder,
    MPDiTPipeline,
    MPDiTTransformer2DModel,
    PowerFunctionEMA,
    normalize_weights_,
    parameter_groups,
    resize_class_embeddings_,
    trust_rows_,
)
from diffusers_mp.arguments import encoding_of, source_of
from diffusers_mp.averages.snapshots import discard_snapshots_after, save_snapshots
from diffusers_mp.data.encoding import encode_dataset, load_vae
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.data.latents import LatentDataset, vae_fingerprint
from diffusers_mp.data.settings import EncodingSettings
from diffusers_mp.files import sha256_of_weights
from diffusers_mp.publishing.hub import check_hub_access, public_arguments, publish
from diffusers_mp.publishing.model_card import write_model_card
from diffusers_mp.training import (
    DDPMObjective,
    FlowMatchObjective,
    JSONLinesTracker,
    StopRequest,
    StreamBatchSampler,
    TrainingSamples,
    Watchdog,
    check_optimizer,
    conditions_of,
    find_checkpoints,
    inverse_sqrt_schedule,
    leave_signals_to_main_process,
    load_checkpoint,
    read_state,
    resolve_checkpoint,
    save_checkpoint,
    split_validation,
    validation_losses,
    validation_timesteps,
)
from diffusers_mp.training.engine import check_engine, lock_folder


logger = get_logger(__name__)


@dataclass
class Run:
    """What the parts below share."""

    accelerator: Accelerator
    curve: JSONLinesTracker
    samples: TrainingSamples
    held_out: TrainingSamples
    objective: DDPMObjective | FlowMatchObjective
    model: torch.nn.Module  # as the engine wants it called
    transformer: torch.nn.Module  # the same without wrappers; its parameters may be shards
    optimizer: AcceleratedOptimizer
    lr_scheduler: LRScheduler
    ema: PowerFunctionEMA
    pipeline: MPDiTPipeline  # with a whole model for the averages, which only the main process has
    facts: dict  # what makes this run this run
    total_batch_size: int
    max_train_steps: int
    step: int = 0


def main(args):
    accelerator, curve = start(args)
    repo_id = None
    if args.push_to_hub and accelerator.is_main_process:
        # Now, not after weeks: the token, the right to write, the repository.
        repo_id = check_hub_access(
            args.hub_model_id or args.output_dir.name, token=args.hub_token, private=args.hub_private_repo or None
        )
    if args.vae is None:
        args.vae = vae_of_pretrained(args)
    vae = load_vae(args.vae, args.cache_dir)
    pretrained = None if args.pretrained_model_name_or_path is None else load_pretrained(args, vae)
    with lock_folder(args.output_dir, accelerator):
        checkpoint = checkpoint_to_resume(args, accelerator, curve)
        latents = load_latents(args, vae, accelerator, pretrained)
        run = set_up(args, accelerator, curve, vae, latents, pretrained, checkpoint)
        if checkpoint is not None:
            resume(args, run, checkpoint)
        clear_what_comes_again(args, run)
        accelerator.print(
            f"{sum(p.numel() for p in run.transformer.parameters()):,} parameters, {len(run.samples):,} training "
            f"images, {len(run.held_out):,} held out, {run.max_train_steps:,} updates of {run.total_batch_size} from "
            f"update {run.step:,}"
        )
        with StopRequest() as stop, contextlib.ExitStack() as at_end:
            train(args, run, stop, at_end)
        if run.step < run.max_train_steps:
            accelerator.print(
                f"{stop.received or 'A signal'}: stopped after update {run.step:,}; "
                "--resume_from_checkpoint latest goes on"
            )
        else:
            finish(args, run, repo_id)
        accelerator.end_training()


def start(args):
    """Accelerate, checked to be what was asked for, and the curve that every run keeps."""
    logging_dir = args.output_dir / args.logging_dir
    curve = JSONLinesTracker(logging_dir)
    # The main process alone validates, saves and publishes; NCCL by itself waits ten minutes for it.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=[curve] if args.report_to == "none" else [curve, args.report_to],
        project_config=ProjectConfiguration(project_dir=str(args.output_dir), logging_dir=str(logging_dir)),
        kwargs_handlers=[patience],
    )
    check_engine(accelerator, args.gradient_accumulation_steps)
    if accelerator.is_fsdp2:
        # Accelerate's policy rounds weights and timesteps to half precision. Autocast computes as under the other
        # engines: rows are normalised, and gradients summed, in float32.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    set_seed(args.seed)
    return accelerator, curve


def checkpoint_to_resume(args, accelerator, curve) -> Path | None:
    """What the run is to go on from; None for a new run, which says so where one was to be resumed."""
    if args.resume_from_checkpoint is None:
        return None
    checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if checkpoint is None:
        if (args.output_dir / "model_index.json").is_file():
            raise ValueError(
                f"`--resume_from_checkpoint latest` must find a checkpoint where a run has ended: {args.output_dir} "
                "has its pipeline (model_index.json) but no checkpoint, and a new run would delete its log and its "
                "snapshots. Give another `--output_dir`."
            )
        # As the former try was called: this one may want them more often.
        former = args.output_dir / "training_arguments.json"
        due = json.loads(former.read_text())["checkpointing_steps"] if former.is_file() else args.checkpointing_steps
        if curve.last_step > due:
            raise ValueError(
                f"`--resume_from_checkpoint latest` must find a checkpoint where a run has come to update "
                f"{curve.last_step:,}: {args.output_dir} has its log, but no checkpoint, and a new run would delete "
                "log and snapshots. Bring the checkpoints back, or give another `--output_dir`."
            )
        accelerator.print(f"No checkpoint in {args.output_dir} yet, starting from the beginning")
    return checkpoint


@dataclass
class Pretrained:
    """What a run starts from that does not start from random weights; of a transformer alone the first two only."""

    transformer: MPDiTTransformer2DModel
    # Of the weights as they lie there: what is made of them depends, in the last bit, on processor and threads.
    weights_sha256: str
    id2label: dict[int, str] | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None


def vae_of_pretrained(args) -> str:
    """What `--vae` is by default: the autoencoder of the checkpoint, whose latents the transformer knows."""
    source = args.pretrained_model_name_or_path
    try:
        components = MPDiTPipeline.load_config(source, cache_dir=args.cache_dir)
    except OSError:  # no model_index.json: a transformer alone, or nothing, which is an error
        MPDiTTransformer2DModel.load_config(source, cache_dir=args.cache_dir)
        return DEFAULT_VAE
    return source if components.get("vae", [None])[0] is not None else "none"


def load_pretrained(args, vae) -> Pretrained:
    """A pipeline or a transformer, refused where the VAE or the objective is another, before images are encoded."""
    source = args.pretrained_model_name_or_path
    try:
        MPDiTPipeline.load_config(source, cache_dir=args.cache_dir)
    except OSError:  # no model_index.json
        transformer = MPDiTTransformer2DModel.from_pretrained(source, cache_dir=args.cache_dir)
        return Pretrained(transformer, sha256_of_weights(transformer.state_dict()))
    pipeline = MPDiTPipeline.from_pretrained(source, cache_dir=args.cache_dir)
    if (pipeline.vae is None) != (vae is None) or (
        vae is not None and vae_fingerprint(pipeline.vae) != vae_fingerprint(vae)
    ):
        raise ValueError(
            f"`--vae` must be the VAE of {source}, whose latents the transformer knows "
            f"({'none: it works on pixels' if pipeline.vae is None else 'its folder is vae/'}), got {args.vae}."
        )
    wanted, stored = training_objective(args).scheduler.config, pipeline.scheduler.config
    for name in ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "shift"):
        if stored.get(name) != wanted.get(name):
            raise ValueError(
                f"{source} must have been trained as `--prediction_type {args.prediction_type}` trains here, with "
                f"{name} {wanted.get(name)} of the scheduler, got {stored.get(name)}."
            )
    transformer, config = pipeline.transformer, pipeline.config
    sha256 = sha256_of_weights(transformer.state_dict())
    return Pretrained(transformer, sha256, pipeline.id2label, config.latents_mean, config.latents_std)


def make_model(args, accelerator, latents, num_classes, pretrained):
    """The model of the run, with random weights or those it is to start from."""
    pretrained_config = None if pretrained is None else pretrained.transformer.config
    config = model_config(args, latents.latent_shape, num_classes, latents.pooled_projection_dim, pretrained_config)
    if pretrained is None:
        return MPDiTTransformer2DModel(**config)
    model, known = pretrained.transformer, set((pretrained.id2label or {}).values())
    if num_classes is not None:
        generator = torch.Generator().manual_seed(args.seed)
        resize_class_embeddings_(model, pretrained.id2label, latents.id2label, generator)
        num_known = sum(name in known for name in latents.id2label.values())
        source = args.pretrained_model_name_or_path
        accelerator.print(f"{source} knows {num_known:,} of {num_classes:,} classes by name")
    model.register_to_config(class_dropout_prob=config["class_dropout_prob"])
    # Of a snapshot of averages, and of weights that were saved in half precision, rows are shorter than 1.
    return normalize_weights_(model)


def set_up(args, accelerator, curve, vae, latents, pretrained, checkpoint):
    """Everything that a run consists of, before its first update."""
    num_classes = None if latents.id2label is None else len(latents.id2label)
    num_held_out = args.num_validation_images
    if num_held_out is None:
        num_held_out = min(256, len(latents) // 20)
    train_indices, validation_indices = split_validation(len(latents), num_held_out, args.seed)

    model = make_model(args, accelerator, latents, num_classes, pretrained)
    if pretrained is not None and pretrained.latents_mean is not None:
        # The transformer knows latents in these units; those of the classes kept are what they were.
        latents.latents_mean, latents.latents_std = pretrained.latents_mean, pretrained.latents_std
    model.train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    objective = training_objective(args)
    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 1e-2 if model.config.weight_normalization else 1e-4
    optimizer = torch.optim.Adam(
        parameter_groups(model, lr=learning_rate, eps=args.adam_epsilon), betas=(args.adam_beta1, args.adam_beta2)
    )
    check_optimizer(model, optimizer)
    samples = TrainingSamples(
        latents,
        seed=args.seed,
        num_classes=num_classes,
        class_dropout_prob=model.config.class_dropout_prob,
        random_flip=args.random_flip,
        indices=train_indices,
    )
    held_out = TrainingSamples(latents, seed=args.seed, num_classes=num_classes, indices=validation_indices)
    total_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    max_train_steps = 400_000 if args.max_train_steps is None else args.max_train_steps
    if args.num_train_epochs is not None:
        max_train_steps = math.ceil(args.num_train_epochs * len(samples) / total_batch_size)
    if args.ema_update_steps > max_train_steps:
        raise ValueError(
            f"`--ema_update_steps` must be at most the number of updates, {max_train_steps}, or the averages stay at "
            f"the initial weights, and so does the pipeline; got {args.ema_update_steps}."
        )
    facts = run_facts(args, model, learning_rate, len(samples), total_batch_size, max_train_steps)
    # Ids mean other classes in other data, while the label table fits.
    facts["id2label_sha256"] = hashlib.sha256(json.dumps(latents.id2label).encode()).hexdigest()
    facts["pretrained_weights_sha256"] = None if pretrained is None else pretrained.weights_sha256
    if checkpoint is not None:
        facts = resumed_facts(checkpoint, facts, args)
    lr_scheduler = learning_rate_schedule(args, optimizer, facts, max_train_steps)

    # Averages are looked at in a model of their own, which stays whole when an engine shards the other one. Made, with
    # the pipeline around it, before training: parts that do not fit each other stop the run before it costs anything.
    whole_model = copy.deepcopy(model).eval().to("cpu" if accelerator.is_main_process else "meta")
    pipeline = MPDiTPipeline(
        transformer=whole_model,
        scheduler=objective.scheduler,
        vae=vae,
        id2label=latents.id2label,
        latents_mean=latents.latents_mean,
        latents_std=latents.latents_std,
    )
    if args.validation_steps and args.validation_guidance_scale is not None:
        pipeline.check_guidance(args.validation_guidance_scale)

    model, optimizer = accelerator.prepare(model, optimizer)
    # Rows are normalised after every update, below: the forward need not do it.
    transformer = trust_rows_(accelerator.unwrap_model(model, keep_torch_compile=False))
    return Run(
        accelerator=accelerator,
        curve=curve,
        samples=samples,
        held_out=held_out,
        objective=objective,
        model=model,
        transformer=transformer,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        ema=PowerFunctionEMA(transformer, args.ema_stds),
        pipeline=pipeline,
        facts=facts,
        total_batch_size=total_batch_size,
        max_train_steps=max_train_steps,
    )


def resume(args, run, checkpoint):
    """Go on where a checkpoint was left, with another learning rate if one is given."""
    run.accelerator.print(f"Resuming from {checkpoint}")
    load_checkpoint(run.accelerator, checkpoint, run.transformer, run.optimizer, run.lr_scheduler, run.ema)
    run.step = read_state(checkpoint)["step"]
    former = run.facts["learning_rate"]
    if args.learning_rate is not None and args.learning_rate != former:
        run.accelerator.print(f"Learning rate {former:g} of the checkpoint, now {args.learning_rate:g}")
        scale_learning_rate(run.optimizer, run.lr_scheduler, args.learning_rate / former)
        run.facts["learning_rate"] = args.learning_rate


def clear_what_comes_again(args, run):
    """Drop what a former try left of the updates to come, and note how this one was called."""
    run.curve.discard_after(run.step)
    arguments = public_arguments(vars(args))
    if run.accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        discard_snapshots_after(args.output_dir / "ema_snapshots", run.step)
        for later in find_checkpoints(args.output_dir):
            # Of updates that are made again now: `latest` must not go on from them after a kill.
            if int(later.name.partition("-")[2]) > run.step:
                abandoned = later.with_name(f"{later.name}.abandoned")
                shutil.rmtree(abandoned, ignore_errors=True)
                later.rename(abandoned)
                logger.warning("%s is of updates that come again, and is kept as %s", later.name, abandoned.name)
        (args.output_dir / "training_arguments.json").write_text(json.dumps(arguments, indent=2, default=str) + "\n")
    run.accelerator.init_trackers("train_mpdit", config={name: str(value) for name, value in arguments.items()})


def train(args, run, stop, at_end):
    """Updates until the last one or a signal; what has to be closed, whatever ends them, goes to `at_end`."""
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    batch_sampler = StreamBatchSampler(
        len(run.samples),
        seed=args.seed,
        train_batch_size=args.train_batch_size,
        max_train_steps=run.max_train_steps,
        start_step=min(run.step, run.max_train_steps),
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )
    batches = DataLoader(
        run.samples,
        batch_sampler=batch_sampler,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_main_process,
    )

    def compute_loss(batch):
        clean, noise, timesteps = batch["latents"], batch["noise"], batch["timestep"]
        noisy = run.objective.add_noise(clean, noise, timesteps)
        with accelerator.autocast():
            prediction = model(noisy, timestep=timesteps, **conditions_of(batch)).sample
        return run.objective.loss(prediction.float(), clean, noise, timesteps)["loss"].mean()

    watchdog = Watchdog(
        model,
        args.output_dir / "non_finite",
        compute_loss,
        action=args.on_non_finite,
        save_weights=True,
        scaler=accelerator.scaler,
    )
    recorder, magnitudes_file = None, args.output_dir / args.logging_dir / "magnitudes.json"
    if args.record_magnitudes_steps:
        recorder = MagnitudeRecorder(model, optimizer, stride=args.record_magnitudes_steps, num_updates=run.step)
        # It may have stopped all compilation in this process.
        at_end.callback(recorder.close)
        if run.step and magnitudes_file.is_file():
            recorder.load(magnitudes_file)
    # An update that was skipped is one by zero: the schedule goes on, also where it is the first.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    is_quiet = not accelerator.is_local_main_process
    progress_bar = at_end.enter_context(
        tqdm(total=run.max_train_steps, initial=run.step, desc="Training", disable=is_quiet)
    )
    losses, since_log, log_time = [], [], time.perf_counter()
    for batch in batches:
        with accelerator.accumulate(model):
            batch["timestep"] = run.objective.timesteps(batch.pop("time"))
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            loss = compute_loss(batch)
            accelerator.backward(loss)
            watchdog.record(batch, loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                grad_norm = None
                if args.max_grad_norm is not None:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                if watchdog.check(run.step + 1, grad_norm):
                    optimizer.step()
                    # Updates that float16's scaler leaves out are treated as those that the watchdog does.
                    if not accelerator.optimizer_step_was_skipped:
                        since_log += losses
                elif accelerator.scaler is not None and grad_norm is not None:
                    # Clipping has unscaled the gradients, which the scaler refuses to do twice without an update.
                    accelerator.scaler.update()
                losses = []
                optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        run.lr_scheduler.step()
        normalize_weights_(run.transformer)
        run.step += 1
        if recorder is not None and recorder.step():
            accelerator.log(recorder.values(), step=run.step)
            if accelerator.is_main_process:
                recorder.save(magnitudes_file)
        if run.step % args.ema_update_steps == 0:
            run.ema.update(run.step)
        progress_bar.update()

        last, logging_due = run.step == run.max_train_steps, run.step % args.logging_steps == 0
        stopping = stop.received is not None
        if accelerator.num_processes > 1:
            # All have to agree; asked only where the processes wait for each other anyway.
            stopping = logging_due and accelerator.reduce(torch.tensor(stopping, device=accelerator.device).int()) > 0
        checkpoint_due = last or stopping or run.step % args.checkpointing_steps == 0
        # Logged before each checkpoint as well, so that a resumed run has nothing to remember of the entry under way.
        if since_log and (logging_due or checkpoint_due):
            log_training(args, run, progress_bar, since_log, time.perf_counter() - log_time)
            since_log, log_time = [], time.perf_counter()
        pause = time.perf_counter()
        failure = None
        if args.validation_steps and (run.step % args.validation_steps == 0 or last):
            failure = validate(args, run)
        if args.ema_snapshot_steps and (run.step % args.ema_snapshot_steps == 0 or last):
            save_snapshots(run.ema, args.output_dir / "ema_snapshots", run.pipeline)
        # After everything else of this update, which a run resumed from here will not do again.
        if checkpoint_due or failure is not None:
            save_checkpoint(
                *(accelerator, args.output_dir, run.step, run.transformer, run.optimizer, run.lr_scheduler, run.ema),
                *(run.facts, args.checkpoints_total_limit),
            )
        if failure is not None:
            accelerator.print(
                f"Validation failed after update {run.step:,}, whose checkpoint is saved: --resume_from_checkpoint "
                "latest goes on after it"
            )
            raise failure
        log_time += time.perf_counter() - pause
        if stopping and not last:
            break


def log_training(args, run, progress_bar, losses, seconds):
    """Mean loss, learning rate and speed since the last entry."""
    accelerator, lr_scheduler = run.accelerator, run.lr_scheduler
    loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
    images_per_second = len(losses) * args.train_batch_size * accelerator.num_processes / seconds
    progress_bar.set_postfix({"loss": f"{loss:.4f}", "images/s": f"{images_per_second:.0f}"})
    learning_rate_factor = lr_scheduler.get_last_lr()[0] / lr_scheduler.base_lrs[0]
    accelerator.log(
        {
            "train/loss": loss,
            "train/learning_rate": run.facts["learning_rate"] * learning_rate_factor,
            "train/images_per_second": images_per_second,
        },
        step=run.step,
    )


def finish(args, run, repo_id):
    """Save the first average in `transformer`, the others beside it, and a model card; publish them if asked."""
    pipeline, ema = run.pipeline, run.ema
    for std in (*ema.stds[1:], ema.stds[0]):
        ema.copy_to(pipeline.transformer, std)
        if run.accelerator.is_main_process and std != ema.stds[0]:
            pipeline.transformer.save_pretrained(args.output_dir / f"transformer_ema_{std:g}")
    if not run.accelerator.is_main_process:
        return
    pipeline.save_pretrained(args.output_dir)
    num_images_seen = run.step * run.total_batch_size
    write_model_card(args.output_dir, repo_id, license=args.hub_license, num_images_seen=num_images_seen)
    print(f"Saved the pipeline to {args.output_dir}: MPDiTPipeline.from_pretrained({str(args.output_dir)!r})")
    if args.push_to_hub:
        url = publish(
            args.output_dir,
            repo_id,
            token=args.hub_token,
            private=args.hub_private_repo or None,
            commit_message=f"After {ema.step:,} updates",
        )
        print(f"Published: {url}")


def run_facts(args, model, learning_rate, num_train_samples, total_batch_size, max_train_steps):
    """What makes this run this run: kept with its checkpoints, and what a resumed one has to agree with."""
    lr_warmup_steps, lr_constant_steps = args.lr_warmup_steps, args.lr_constant_steps
    return {
        "seed": args.seed,
        "total_batch_size": total_batch_size,
        "num_train_samples": num_train_samples,
        "random_flip": args.random_flip,
        "learning_rate": learning_rate,
        "lr_scheduler": args.lr_scheduler,
        "lr_warmup_steps": max_train_steps // 150 if lr_warmup_steps is None else lr_warmup_steps,
        "lr_constant_steps": max(1, max_train_steps // 10) if lr_constant_steps is None else lr_constant_steps,
        "ema_stds": args.ema_stds,
        "ema_update_steps": args.ema_update_steps,
        **{name: getattr(args, name) for name in ("adam_beta1", "adam_beta2", "adam_epsilon", *OBJECTIVE_FLAGS)},
        **{f"model.{name}": value for name, value in model.config.items() if not name.startswith("_")},
    }


def learning_rate_schedule(args, optimizer, facts, max_train_steps):
    """The paper's schedule, or one of diffusers'."""
    if args.lr_scheduler == "inverse_sqrt":
        return inverse_sqrt_schedule(optimizer, facts["lr_warmup_steps"], facts["lr_constant_steps"])
    return get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=facts["lr_warmup_steps"], num_training_steps=max_train_steps
    )


def scale_learning_rate(optimizer, lr_scheduler, factor):
    """Another learning rate from here on: the schedule multiplies rates that the checkpoint has brought back."""
    for group in optimizer.param_groups:
        group["initial_lr"] *= factor
        group["lr"] *= factor
    lr_scheduler.base_lrs = [rate * factor for rate in lr_scheduler.base_lrs]


def training_objective(args):
    """The objective asked for; its scheduler is saved with the pipeline and says how to sample."""
    if args.prediction_type == "flow_prediction":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
        return FlowMatchObjective(scheduler, logit_mean=args.logit_mean, logit_std=args.logit_std)
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=args.prediction_type,
        variance_type=args.variance_type,
        clip_sample=False,
    )
    return DDPMObjective(scheduler, snr_gamma=args.snr_gamma)


def validate(args, run):
    """Loss of the held-out images at fixed noise levels and a row of samples, with the first average in the model.

    What went wrong, if anything did, is returned on every process: weeks of updates are saved before it is raised.
    """
    accelerator, pipeline, failure = run.accelerator, run.pipeline, None
    run.ema.copy_to(pipeline.transformer, run.ema.stds[0])
    if accelerator.is_main_process:
        try:
            try:
                pipeline.to(accelerator.device)
                validate_pipeline(args, run, pipeline)
            finally:
                pipeline.to("cpu")
        except Exception as error:
            # Its frames hold tensors, and most often memory is what was wanting.
            traceback.clear_frames(error.__traceback__)
            failure = error
    (has_failed,) = broadcast_object_list([failure is not None])
    return failure or (RuntimeError("validation failed on the main process") if has_failed else None)


def validate_pipeline(args, run, pipeline):
    """What the main process does of a validation."""
    accelerator, objective, num_classes = run.accelerator, run.objective, pipeline.transformer.config.num_classes
    if len(run.held_out):
        keys = [(0, position) for position in range(len(run.held_out))]
        batches = DataLoader(run.held_out, sampler=keys, batch_size=args.train_batch_size)
        levels = validation_timesteps(objective, args.num_validation_levels)
        losses = validation_losses(pipeline.transformer, objective, batches, levels, accelerator.device)
        accelerator.log({f"validation/{name}": value for name, value in losses.items()}, step=run.step)
    pipeline.set_progress_bar_config(disable=True)
    conditions = {}
    if num_classes is not None:
        conditions["class_labels"] = list(range(min(10, num_classes)))
    if pipeline.transformer.config.pooled_projection_dim is not None:
        # Those of real samples, with their own labels.
        source = run.held_out if len(run.held_out) else run.samples
        shown = [run.held_out.dataset[int(index)] for index in source.indices[:10]]
        conditions["pooled_projections"] = torch.stack([sample["pooled_projections"] for sample in shown])
        if num_classes is not None:
            conditions["class_labels"] = [sample["label"] for sample in shown]
    training_scheduler = pipeline.scheduler
    pipeline.scheduler = objective.preview_scheduler()
    try:
        images = pipeline(
            **conditions,
            num_images_per_class=1 if conditions else 10,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            generator=torch.Generator().manual_seed(args.seed),
        ).images
    finally:
        # Snapshots are saved with this pipeline's parts, also after a validation that failed.
        pipeline.scheduler = training_scheduler

    (args.output_dir / "samples").mkdir(exist_ok=True)
    make_image_grid(images, rows=1, cols=len(images)).save(args.output_dir / "samples" / f"step-{run.step:07d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pictures = np.stack([np.asarray(image.convert("RGB")) for image in images])
            tracker.log_images({"validation/samples": pictures}, step=run.step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation/samples": images}, step=run.step)


def check_model(args, vae, pretrained):
    """Refuse a model that latents of this size will not fit, before they are downloaded and encoded for hours."""
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    channels, size = args.image_channels if vae is None else vae.config.latent_channels, args.resolution // factor
    known = {"num_classes": None, "pooled_projection_dim": None}  # the data will tell; until then, as the config says
    if pretrained is not None:
        known |= pretrained.transformer.config
    elif args.model_config_name_or_path is not None:
        known |= MPDiTTransformer2DModel.load_config(args.model_config_name_or_path, cache_dir=args.cache_dir)
    conditions = known["num_classes"], known["pooled_projection_dim"]
    source = known if pretrained is not None or args.model_config_name_or_path is not None else None
    try:
        with init_empty_weights():
            MPDiTTransformer2DModel(**model_config(args, (channels, size, size), *conditions, source))
    except ValueError as error:
        raise ValueError(
            f"`--resolution {args.resolution}` with this `--vae` makes latents of {channels} x {size} x {size}, which "
            f"the model must take: {error}"
        ) from error


def load_latents(args, vae, accelerator, pretrained=None) -> LatentDataset:
    """The encoded data set, checked for alterations; made by all processes together if it is not there yet."""
    folder = latents_folder(args)
    processes = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    if args.train_data_dir is None and args.dataset_name is None:
        latents = LatentDataset(folder)
    else:
        check_model(args, vae, pretrained)
        dataset, id2label = load_image_dataset(**source_of(args))
        if vae is not None:
            vae.to(accelerator.device).eval()
        # Encodes what is missing, damaged shards that were deleted among it, and refuses a folder of other data. No
        # barriers here: they time out long before a large data set is downloaded and encoded.
        settings = EncodingSettings(**encoding_of(args))
        latents = encode_dataset(dataset, folder, settings, vae=vae, id2label=id2label, **processes)
        if vae is not None:
            vae.to("cpu")  # where the pipeline has it between validations, and other processes never need it
    latents.validate(vae=vae, resolution=args.resolution, random_flip=args.random_flip)
    latents.verify(**processes)
    return latents


def resumed_facts(checkpoint: Path, facts: dict, args) -> dict:
    """Facts of the run as its checkpoint has them; refuses a command line that would make it another run."""
    state = read_state(checkpoint)
    stored = {name: state.get(name) for name in facts}
    # The lengths that follow from --max_train_steps stay what they were, so that a longer run keeps its rates. Another
    # learning rate is applied once the checkpoint is loaded.
    kept = [name for name in ("lr_warmup_steps", "lr_constant_steps") if getattr(args, name) is None]
    wanted = {**facts, **{name: stored[name] for name in [*kept, "learning_rate"]}}
    differences = [f"{name} {stored[name]} (now {wanted[name]})" for name in facts if stored[name] != wanted[name]]
    if differences:
        raise ValueError(
            f"`--resume_from_checkpoint` must go on with the run of {checkpoint}, which has {', '.join(differences)}."
        )
    return stored


if __name__ == "__main__":
    main(parse_args())
