"""Train a magnitude-preserving diffusion transformer on an image folder or a Hub data set.

    accelerate launch examples/train_mpdit.py --train_data_dir photos --resolution 256 --preset B/2 --output_dir run

The defaults are the recipe of arXiv 2505.19122: S/2 in configuration E with scale, rotation and gate, Adam at 1e-2
with warm-up and inverse-square-root decay, 400 000 updates of 256 samples, learned variance, averages of widths 0.05
and 0.10. The run's folder becomes a pipeline: `MPDiTPipeline.from_pretrained("run")`.

Every sample's noise, time, posterior draw, flip and label dropout are functions of (seed, epoch, index), so that
the number of processes, workers and micro batches does not change the run.
"""

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from training_arguments import OBJECTIVE_FLAGS, latents_folder, model_config, parse_args

from diffusers_mp import (
    MPDiTPipeline,
    MPDiTTransformer2DModel,
    PowerFunctionEMA,
    normalize_weights_,
    parameter_groups,
)
from diffusers_mp.encoding import encode_dataset
from diffusers_mp.hub import check_hub_access, public_arguments, publish
from diffusers_mp.images import load_image_dataset
from diffusers_mp.latents import LatentDataset
from diffusers_mp.model_card import write_model_card
from diffusers_mp.snapshots import discard_snapshots_after, save_snapshots
from diffusers_mp.training import (
    DDPMObjective,
    FlowMatchObjective,
    JSONLinesTracker,
    NonFiniteError,
    StopRequest,
    StreamBatchSampler,
    TrainingSamples,
    Watchdog,
    check_optimizer,
    inverse_sqrt_schedule,
    load_checkpoint,
    read_state,
    register_model_hooks,
    resolve_checkpoint,
    save_checkpoint,
    split_validation,
    validation_losses,
    validation_timesteps,
)


logger = get_logger(__name__)


def main(args):
    logging_dir = args.output_dir / args.logging_dir
    curve = JSONLinesTracker(logging_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=[curve] if args.report_to == "none" else [curve, args.report_to],
        project_config=ProjectConfiguration(project_dir=str(args.output_dir), logging_dir=str(logging_dir)),
    )
    check_engine(accelerator)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    set_seed(args.seed)

    repo_id = None
    if args.push_to_hub and accelerator.is_main_process:
        # Now, not after weeks: the token, the right to write, the repository.
        repo_id = check_hub_access(
            args.hub_model_id or args.output_dir.name, token=args.hub_token, private=args.hub_private_repo or None
        )

    # 1. Data: every image encoded once
    vae = None if args.vae == "none" else AutoencoderKL.from_pretrained(args.vae, cache_dir=args.cache_dir)
    latents = load_latents(args, vae, accelerator)
    num_classes = None if latents.id2label is None else len(latents.id2label)
    num_held_out = args.num_validation_images
    if num_held_out is None:
        num_held_out = min(256, len(latents) // 20)
    train_indices, validation_indices = split_validation(len(latents), num_held_out, args.seed)

    # 2. Model, objective, optimiser
    model = MPDiTTransformer2DModel(**model_config(args, latents.latent_shape, num_classes))
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
    total_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    max_train_steps = 400_000 if args.max_train_steps is None else args.max_train_steps
    if args.num_train_epochs is not None:
        max_train_steps = math.ceil(args.num_train_epochs * len(samples) / total_batch_size)

    # 3. Where a checkpoint was left, if one is resumed
    checkpoint = None
    if args.resume_from_checkpoint is not None:
        checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
        if checkpoint is None:
            logger.info("No checkpoint in %s yet, starting from the beginning", args.output_dir)
    facts = run_facts(args, model, learning_rate, len(samples), total_batch_size, max_train_steps)
    first_step = 0
    if checkpoint is not None:
        facts, first_step = resumed_facts(checkpoint, facts, args), read_state(checkpoint)["step"]
    lr_scheduler = learning_rate_schedule(args, optimizer, facts, max_train_steps)

    model, optimizer = accelerator.prepare(model, optimizer)
    transformer = accelerator.unwrap_model(model, keep_torch_compile=False)
    ema = PowerFunctionEMA(transformer, args.ema_stds)
    accelerator.register_for_checkpointing(lr_scheduler)
    register_model_hooks(accelerator)
    if checkpoint is not None:
        accelerator.print(f"Resuming from {checkpoint}")
        load_checkpoint(accelerator, checkpoint, ema)
        if args.learning_rate is not None and args.learning_rate != facts["learning_rate"]:
            accelerator.print(
                f"Learning rate {facts['learning_rate']:g} of the checkpoint, now {args.learning_rate:g}"
            )
            scale_learning_rate(optimizer, lr_scheduler, args.learning_rate / facts["learning_rate"])
            facts["learning_rate"] = args.learning_rate
    learning_rate = facts["learning_rate"]
    curve.discard_after(first_step)
    arguments = public_arguments(vars(args))
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        discard_snapshots_after(args.output_dir / "ema_snapshots", first_step)
        (args.output_dir / "training_arguments.json").write_text(json.dumps(arguments, indent=2, default=str) + "\n")
    accelerator.init_trackers("train_mpdit", config={name: str(value) for name, value in arguments.items()})

    batch_sampler = StreamBatchSampler(
        len(samples),
        seed=args.seed,
        train_batch_size=args.train_batch_size,
        max_train_steps=max_train_steps,
        start_step=min(first_step, max_train_steps),
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )
    batches = DataLoader(
        samples,
        batch_sampler=batch_sampler,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    say = accelerator.print
    say(f"{sum(p.numel() for p in transformer.parameters()):,} parameters, {len(samples):,} training images, ", end="")
    say(f"{num_held_out:,} held out, {max_train_steps:,} updates of {total_batch_size} from update {first_step:,}")

    # Made before training, so that parts that do not fit each other stop the run before it costs anything.
    pipeline = MPDiTPipeline(
        transformer=transformer,
        scheduler=objective.scheduler,
        vae=vae,
        id2label=latents.id2label,
        latents_mean=latents.latents_mean,
        latents_std=latents.latents_std,
    )
    if args.validation_steps and args.validation_guidance_scale is not None:
        pipeline.check_guidance(args.validation_guidance_scale)
    held_out = TrainingSamples(latents, seed=args.seed, num_classes=num_classes, indices=validation_indices)

    # 4. Train
    progress_bar = tqdm(
        total=max_train_steps, initial=first_step, desc="Training", disable=not accelerator.is_local_main_process
    )

    def compute_loss(batch):
        clean, noise, timesteps = batch["latents"], batch["noise"], batch["timestep"]
        noisy = objective.add_noise(clean, noise, timesteps)
        prediction = model(noisy, timestep=timesteps, class_labels=batch.get("class_label")).sample
        return objective.loss(prediction, clean, noise, timesteps)["loss"].mean()

    watchdog = Watchdog(
        model,
        args.output_dir / "non_finite",
        compute_loss,
        action=args.on_non_finite,
        save_weights=True,
        scaler=accelerator.scaler,
    )
    step, losses, since_log, log_time = first_step, [], [], time.perf_counter()
    stop = StopRequest()
    for batch in batches:
        with accelerator.accumulate(model):
            batch["timestep"] = objective.timesteps(batch.pop("time"))
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            loss = compute_loss(batch)
            accelerator.backward(loss)
            watchdog.record(batch, loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                grad_norm = None
                if args.max_grad_norm is not None:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                if watchdog.check(step + 1, grad_norm):
                    optimizer.step()
                    since_log += losses
                losses = []
                optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        lr_scheduler.step()
        normalize_weights_(transformer)
        step += 1
        if step % args.ema_update_steps == 0:
            ema.update(step)
        progress_bar.update()

        last, logging_due = step == max_train_steps, step % args.logging_steps == 0
        stopping = stop.received is not None
        if accelerator.num_processes > 1:
            # All have to agree; asked only where the processes wait for each other anyway.
            stopping = logging_due and accelerator.reduce(torch.tensor(stopping, device=accelerator.device).int()) > 0
        checkpoint_due = last or stopping or step % args.checkpointing_steps == 0
        # Logged before each checkpoint as well, so that a resumed run has nothing to remember of the entry under way.
        if since_log and (logging_due or checkpoint_due):
            mean_loss = accelerator.reduce(torch.stack(since_log).mean(), reduction="mean").item()
            elapsed = time.perf_counter() - log_time
            images_per_second = len(since_log) * args.train_batch_size * accelerator.num_processes / elapsed
            progress_bar.set_postfix({"loss": f"{mean_loss:.4f}", "images/s": f"{images_per_second:.0f}"})
            learning_rate_factor = lr_scheduler.get_last_lr()[0] / lr_scheduler.base_lrs[0]
            accelerator.log(
                {
                    "train/loss": mean_loss,
                    "train/learning_rate": learning_rate * learning_rate_factor,
                    "train/images_per_second": images_per_second,
                },
                step=step,
            )
            since_log, log_time = [], time.perf_counter()
        pause = time.perf_counter()
        if args.validation_steps and (step % args.validation_steps == 0 or last):
            if accelerator.is_main_process:
                validate(args, accelerator, pipeline, ema, objective, held_out, step)
            accelerator.wait_for_everyone()
        if args.ema_snapshot_steps and (step % args.ema_snapshot_steps == 0 or last) and accelerator.is_main_process:
            save_snapshots(ema, args.output_dir / "ema_snapshots", pipeline)
        # After everything else of this update, which a run resumed from here will not do again.
        if checkpoint_due:
            if not all(parameter.isfinite().all() for parameter in transformer.parameters()):
                raise NonFiniteError(f"weights are not finite after update {step}: no checkpoint of them is written")
            save_checkpoint(accelerator, args.output_dir, step, ema, facts, args.checkpoints_total_limit)
        log_time += time.perf_counter() - pause
        if stopping and not last:
            break
    progress_bar.close()
    stop.close()
    if step < max_train_steps:
        say(f"{stop.received or 'A signal'}: stopped after update {step:,}; --resume_from_checkpoint latest goes on")
        accelerator.end_training()
        return

    # 5. The run's folder becomes a pipeline
    if accelerator.is_main_process:
        finish(args, pipeline, ema, repo_id, num_images_seen=max_train_steps * total_batch_size)
    accelerator.end_training()


def finish(args, pipeline, ema, repo_id, num_images_seen):
    """Save the first average in `transformer`, the others beside it, and a model card; publish them if asked."""
    transformer = pipeline.transformer.eval()
    for std in ema.stds[1:]:
        with ema.averaged(transformer, std):
            transformer.save_pretrained(args.output_dir / f"transformer_ema_{std:g}")
    with ema.averaged(transformer, ema.stds[0]):
        pipeline.save_pretrained(args.output_dir)
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


def check_engine(accelerator):
    """Refuse an engine that is not supported, or was asked for and not given: Accelerate says nothing about it."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"launched as {launched} processes, but Accelerate runs {accelerator.num_processes}: each would train a "
            "model of its own in the same folder. Without accelerators, use `ACCELERATE_USE_CPU=1 torchrun`."
        )
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1"):
            raise RuntimeError(
                f"{engine} was asked for, but this trainer runs on one process or DDP (Accelerate chose "
                f"{accelerator.distributed_type.value}): its checkpoints and averages are those of whole parameters. "
                "Launch without it; --gradient_checkpointing and --gradient_accumulation_steps save memory."
            )


def validate(args, accelerator, pipeline, ema, objective, held_out, step):
    """Loss of the held-out images at fixed noise levels and a row of samples, with the first average in the model."""
    transformer, num_classes = pipeline.transformer, pipeline.transformer.config.num_classes
    transformer.eval()
    pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    training_scheduler = pipeline.scheduler
    with ema.averaged(transformer, ema.stds[0]):
        if len(held_out):
            keys = [(0, position) for position in range(len(held_out))]
            batches = DataLoader(held_out, sampler=keys, batch_size=args.train_batch_size)
            levels = validation_timesteps(objective, args.num_validation_levels)
            losses = validation_losses(transformer, objective, batches, levels, accelerator.device)
            accelerator.log({f"validation/{name}": value for name, value in losses.items()}, step=step)
        pipeline.scheduler = objective.preview_scheduler()
        images = pipeline(
            class_labels=None if num_classes is None else list(range(min(10, num_classes))),
            num_images_per_class=10 if num_classes is None else 1,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            generator=torch.Generator().manual_seed(args.seed),
        ).images
    pipeline.scheduler = training_scheduler
    transformer.train()

    (args.output_dir / "samples").mkdir(exist_ok=True)
    make_image_grid(images, rows=1, cols=len(images)).save(args.output_dir / "samples" / f"step-{step:07d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pictures = np.stack([np.asarray(image.convert("RGB")) for image in images])
            tracker.log_images({"validation/samples": pictures}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation/samples": images}, step=step)


def load_latents(args, vae, accelerator) -> LatentDataset:
    """The encoded data set, checked for alterations; made by all processes together if it is not there yet."""
    folder = latents_folder(args)
    processes = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    if (folder / "index.json").is_file():
        LatentDataset(folder).validate(vae=vae, resolution=args.resolution, random_flip=args.random_flip)
    if args.train_data_dir is None and args.dataset_name is None:
        latents = LatentDataset(folder)
    else:
        dataset, id2label = load_image_dataset(
            args.train_data_dir,
            dataset_name=args.dataset_name,
            dataset_config_name=args.dataset_config_name,
            split=args.dataset_split,
            cache_dir=args.cache_dir,
            image_column=args.image_column,
            label_column=args.label_column,
            max_train_samples=args.max_train_samples,
            seed=args.seed,
        )
        if vae is not None:
            vae.to(accelerator.device).eval()
        # Encodes what is missing, and refuses a folder of other data. No barriers here: they time out long before a
        # large data set is downloaded and encoded.
        latents = encode_dataset(
            dataset,
            folder,
            vae=vae,
            resolution=args.resolution,
            id2label=id2label,
            vae_id=args.vae,
            random_flip=args.random_flip,
            num_channels=args.image_channels,
            image_column=args.image_column,
            label_column=args.label_column,
            batch_size=args.encode_batch_size,
            num_workers=args.dataloader_num_workers,
            skip_corrupt=args.skip_corrupt,
            **processes,
        )
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
