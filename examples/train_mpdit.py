"""Train a magnitude-preserving diffusion transformer on an image folder or a Hub data set.

    accelerate launch examples/train_mpdit.py --train_data_dir photos --resolution 256 --preset B/2 --output_dir run

The defaults are the recipe of arXiv 2505.19122, but with tokens bounded (configuration F; the paper's is
`--configuration E`): S/2 with scale, rotation and gate, Adam at 1e-2 with warm-up and inverse-square-root decay,
400 000 updates of 256 samples, learned variance, averages of widths 0.05 and 0.10. The run's folder becomes a
pipeline: `MPDiTPipeline.from_pretrained("run")`.

Every sample's noise, time, posterior draw, flip and label dropout are functions of (seed, epoch, index), so that
the number of processes, workers and micro batches does not change the run.
"""

from diffusers_mp.scripts import command_line, run_script
from diffusers_mp.training.arguments import latents_folder, make_parser, parse_args


if __name__ == "__main__":
    # Before what takes seconds to import: `--help`, wrong flags and paths are answered at once.
    args = command_line(parse_args, make_parser())

import contextlib
import copy
import functools
import warnings

import torch

from diffusers_mp import (
    MagnitudeRecorder,
    MPDiTPipeline,
    NormWatch,
    PowerFunctionEMA,
    normalize_weights_,
    pin_weight_norms_,
    trust_rows_,
)
from diffusers_mp.arguments import check_paths, encoding_of, source_of
from diffusers_mp.averages.snapshots import save_snapshots
from diffusers_mp.data.encoding import encode_dataset, load_vae
from diffusers_mp.data.feeding import to_device
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.data.latents import LatentDataset
from diffusers_mp.data.settings import EncodingSettings
from diffusers_mp.files import space_for
from diffusers_mp.publishing.hub import check_hub_access, mask_places, publish
from diffusers_mp.publishing.model_card import write_model_card
from diffusers_mp.sharding import whole
from diffusers_mp.sources import naming
from diffusers_mp.training import (
    StopRequest,
    StreamBatchSampler,
    TrainingSamples,
    Watchdog,
    conditions_of,
    hold_out,
    load_batches,
    save_checkpoint,
)
from diffusers_mp.training.checks import check_arguments, check_model
from diffusers_mp.training.dry_run import dry_run
from diffusers_mp.training.engine import lock_folder, start
from diffusers_mp.training.model import (
    channels_of,
    load_pretrained,
    make_model,
    make_objective,
    num_known_classes,
    vae_of_pretrained,
)
from diffusers_mp.training.optimizers import learning_rate_schedule, make_optimizer
from diffusers_mp.training.preview import check_classes_of_samples, classes_of_samples, validate
from diffusers_mp.training.progress import Progress
from diffusers_mp.training.resume import (
    checkpoint_to_resume,
    clear_what_comes_again,
    resume,
    resumed_facts,
    run_facts,
)
from diffusers_mp.training.run import Run, run_length
from diffusers_mp.training.summary import DataSummary, start_of_run
from diffusers_mp.training.verdict import verdict
from diffusers_mp.training.watchdog import gradient_norm


def main(args):
    check_arguments(args)
    check_paths(args)
    accelerator, curve = start(args, args.output_dir / args.logging_dir)
    repo_id = None
    if args.push_to_hub and accelerator.is_main_process and not args.dry_run:
        # Now, not after weeks: the token, the right to write, the repository.
        repo_id = check_hub_access(
            args.hub_model_id or args.output_dir.name, token=args.hub_token, private=args.hub_private_repo or None
        )
    # A folder is looked at before anything is fetched from the Hub.
    source = None if args.train_data_dir is None else load_image_dataset(**source_of(args))
    if args.vae is None:
        args.vae = vae_of_pretrained(args)
    vae = load_vae(args.vae, args.cache_dir)
    pretrained = None
    if args.pretrained_model_name_or_path is not None:
        pretrained = load_pretrained(args, vae)
    args.image_channels = channels_of(args, vae, pretrained)
    if args.dry_run:
        dry_run(args, accelerator, vae, pretrained, checkpoint_to_resume(args, accelerator, curve), source)
        return
    with space_for(args.output_dir), lock_folder(args.output_dir, accelerator):
        checkpoint = checkpoint_to_resume(args, accelerator, curve)
        latents = load_latents(args, vae, accelerator, pretrained, source)
        run = set_up(args, accelerator, curve, vae, latents, pretrained, checkpoint)
        if checkpoint is not None:
            resume(args, run, checkpoint)
        clear_what_comes_again(args, run)
        known = None if pretrained is None else num_known_classes(pretrained, latents.id2label)
        data = DataSummary.of_latents(latents, len(run.held_out))
        learning_rate, model = run.facts["learning_rate"], run.pipeline.transformer
        lengths = run.max_train_steps, run.step
        accelerator.print(start_of_run(args, accelerator, data, model, learning_rate, *lengths, known))
        when = "this update" if accelerator.num_processes == 1 else "the next multiple of --logging_steps"
        with StopRequest(when) as stop, contextlib.ExitStack() as at_end:
            train(args, run, stop, at_end)
        if run.step < run.max_train_steps:
            accelerator.print(
                f"{stop.received or 'A signal'}: stopped after update {run.step:,}; "
                "--resume_from_checkpoint latest goes on"
            )
        else:
            finish(args, run, repo_id)
        accelerator.end_training()


def load_latents(args, vae, accelerator, pretrained=None, source=None) -> LatentDataset:
    """The encoded data set, checked for alterations; made by all processes together if it is not there yet."""
    folder = latents_folder(args)
    processes = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    if args.train_data_dir is None and args.dataset_name is None:
        latents = LatentDataset(folder)
        latents.validate(vae=vae, resolution=args.resolution, random_flip=args.random_flip)
    else:
        check_model(args, vae, pretrained)
        dataset, id2label, report = source or load_image_dataset(**source_of(args))
        for line in report.notes():
            accelerator.print(line)
        check_classes_of_samples(args.validation_labels, id2label)
        if vae is not None:
            vae.to(accelerator.device).eval()
        # Encodes what is missing, damaged shards that were deleted among it, and refuses a folder of other data. No
        # barriers here: they time out long before a large data set is downloaded and encoded.
        settings = EncodingSettings(**encoding_of(args))
        latents = encode_dataset(dataset, folder, settings, vae=vae, id2label=id2label, **processes)
        if vae is not None:
            vae.to("cpu")  # where the pipeline has it between validations, and other processes never need it
    latents.verify(**processes)
    return latents


def set_up(args, accelerator, curve, vae, latents, pretrained, checkpoint):
    """Everything that a run consists of, before its first update."""
    # 1. The model, what it learns, and the samples in the units that it knows
    num_classes = None if latents.id2label is None else len(latents.id2label)
    model = make_model(args, latents, num_classes, pretrained).train()
    objective = make_objective(args, model.config)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.pin_weight_norms is not None:
        accelerator.print(pin_weight_norms_(model, per=args.pin_weight_norms))
    units = {"latents_mean": latents.latents_mean, "latents_std": latents.latents_std}
    if pretrained is not None and pretrained.latents_mean is not None:
        units = {"latents_mean": pretrained.latents_mean, "latents_std": pretrained.latents_std}
    train_indices, validation_indices = hold_out(latents, args.num_validation_images, args.seed)
    options = {"seed": args.seed, "num_classes": num_classes, **units}
    held_out = TrainingSamples(latents, **options, indices=validation_indices)
    samples = TrainingSamples(
        latents,
        **options,
        class_dropout_prob=model.config.class_dropout_prob,
        random_flip=args.random_flip,
        indices=train_indices,
    )

    # 2. The length of the run, and what must not change when it is resumed
    max_train_steps = run_length(args, len(samples))
    facts = run_facts(args, model, latents, pretrained, len(samples), max_train_steps)
    if checkpoint is not None:
        facts = resumed_facts(checkpoint, facts, args)

    # 3. The optimiser, and its rates over the run
    optimizer = make_optimizer(args, model, facts["learning_rate"])
    lr_scheduler = learning_rate_schedule(args, optimizer, facts, max_train_steps)

    # 4. The pipeline. Averages are looked at in its model, which stays whole when an engine shards the other one. Made
    # before training: parts that do not fit each other stop the run before it costs anything.
    whole_model = copy.deepcopy(model).eval().to("cpu" if accelerator.is_main_process else "meta")
    parts = {"scheduler": objective.scheduler, "prediction_type": objective.prediction_type, "vae": vae}
    pipeline = MPDiTPipeline(transformer=whole_model, id2label=latents.id2label, **parts, **units)
    mask_places(pipeline)
    if args.validation_steps and args.validation_guidance_scale is not None:
        pipeline.check_guidance(args.validation_guidance_scale)
    classes_of_samples(args.validation_labels, pipeline)

    # 5. The engine's wrappers. Rows are normalised after every update: the forward need not do it.
    model, optimizer = accelerator.prepare(model, optimizer)
    transformer = trust_rows_(accelerator.unwrap_model(model, keep_torch_compile=False))
    if args.compile:
        transformer.compile_repeated_blocks(fullgraph=True)
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
        max_train_steps=max_train_steps,
    )


def train(args, run, stop, at_end):
    """Updates until the last one or a signal; what has to be closed, whatever ends them, goes to `at_end`."""
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    compute_loss = functools.partial(loss_of, run)
    watchdog = Watchdog(
        model,
        args.output_dir / "non_finite",
        compute_loss,
        action=args.on_non_finite,
        save_weights=True,
        scaler=accelerator.scaler,
        optimizer=optimizer,
    )
    recorder, magnitudes_file = None, args.output_dir / args.logging_dir / "magnitudes.json"
    if args.record_magnitudes_steps:
        recorder = MagnitudeRecorder(model, optimizer, stride=args.record_magnitudes_steps, num_updates=run.step)
        # It may have stopped all compilation in this process.
        at_end.callback(recorder.close)
        if run.step and magnitudes_file.is_file():
            recorder.load(magnitudes_file)
    watch = None
    if args.norm_watch_steps:
        watch = NormWatch(model, every=args.norm_watch_steps, num_updates=run.step, warn=False)
        at_end.callback(watch.close)
        if run.norm_watch is not None:
            watch.load_state_dict(run.norm_watch)
    # An update that was skipped is one by zero: the schedule goes on, also where it is the first.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    progress, losses = Progress(args, run), []
    at_end.callback(progress.bar.close)

    for batch in training_batches(args, run):
        # 1. A micro batch; the last one of an update changes the weights
        with accelerator.accumulate(model):
            batch["timestep"] = run.objective.timesteps(batch.pop("time"))
            batch = to_device(batch, accelerator.device)
            loss = compute_loss(batch)
            accelerator.backward(loss)
            watchdog.record(batch, loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                progress.add(losses, update_weights(args, run, watchdog))
                losses = []
        if not accelerator.sync_gradients:
            continue

        # 2. What follows from it: rate, norms of rows, averages
        run.lr_scheduler.step()
        normalize_weights_(run.transformer)
        run.step += 1
        if recorder is not None and recorder.step():
            accelerator.log(recorder.values(), step=run.step)
            if accelerator.is_main_process:
                recorder.save(magnitudes_file)
        for alarm in watch.step() if watch is not None else ():
            accelerator.log({f"alarm/{alarm.quantity}/{alarm.name}": alarm.value}, step=run.step)
            if accelerator.is_main_process:
                progress.bar.write(f"Warning: {alarm}")
        if run.step % args.ema_update_steps == 0:
            run.ema.update(run.step)

        # 3. What is due; whether to stop, all processes have to agree
        last, logging_due = run.step == run.max_train_steps, run.step % args.logging_steps == 0
        stopping = stop.received is not None
        if accelerator.num_processes > 1:
            # Asked only where the processes wait for each other anyway.
            stopping = logging_due and accelerator.reduce(torch.tensor(stopping, device=accelerator.device).int()) > 0
        checkpoint_due = last or stopping or run.step % args.checkpointing_steps == 0
        # Logged before each checkpoint as well, so that a resumed run has nothing to remember of the entry under way.
        if checkpoint_due:
            watchdog.settle()
        if logging_due or checkpoint_due:
            progress.log()
        failure = None
        with progress.paused():
            if args.validation_steps and (run.step % args.validation_steps == 0 or last):
                failure = validate(args, run)
            if args.ema_snapshot_steps and (run.step % args.ema_snapshot_steps == 0 or last):
                save_snapshots(run.ema, args.output_dir / "ema_snapshots", run.pipeline)
            # After everything else of this update, which a run resumed from here will not do again.
            if checkpoint_due or failure is not None:
                limit = args.checkpoints_total_limit or None
                facts = run.facts if watch is None else {**run.facts, "norm_watch": watch.state_dict()}
                save_checkpoint(accelerator, args.output_dir, run.step, run.state, facts, limit)
        if failure is not None:
            accelerator.print(
                f"Validation failed after update {run.step:,}, whose checkpoint is saved: --resume_from_checkpoint "
                "latest goes on after it"
            )
            raise failure
        if stopping and not last:
            break


def training_batches(args, run):
    """The micro batches of this process, from the update on that comes next."""
    batch_sampler = StreamBatchSampler(
        len(run.samples),
        seed=args.seed,
        train_batch_size=args.train_batch_size,
        max_train_steps=run.max_train_steps,
        start_step=min(run.step, run.max_train_steps),
        num_processes=run.accelerator.num_processes,
        process_index=run.accelerator.process_index,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )
    return load_batches(run.samples, batch_sampler, run.accelerator.device, args.dataloader_num_workers)


def loss_of(run, batch):
    """Mean loss of a micro batch, whose noise and timesteps come with it."""
    clean, noise, timesteps = batch["latents"], batch["noise"], batch["timestep"]
    noisy = run.objective.add_noise(clean, noise, timesteps)
    with run.accelerator.autocast():
        prediction = run.model(noisy, timestep=timesteps, **conditions_of(batch)).sample
    return run.objective.loss(prediction.float(), clean, noise, timesteps)["loss"].mean()


def update_weights(args, run, watchdog):
    """A step of the optimiser, unless the loss or the gradient is not finite; the norm of its gradient, or None."""
    accelerator, optimizer = run.accelerator, run.optimizer
    if args.max_grad_norm is not None:
        grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
    else:
        accelerator.unscale_gradients()
        grad_norm = gradient_norm(run.model)
    grad_norm = whole(grad_norm)
    is_finite = watchdog.check(run.step + 1, grad_norm)
    if is_finite:
        optimizer.step()
    elif accelerator.scaler is not None:
        # The gradients are unscaled, which the scaler refuses to do twice without an update.
        accelerator.scaler.update()
    optimizer.zero_grad()
    # Updates that float16's scaler leaves out are treated as those that the watchdog does.
    return grad_norm if is_finite and not accelerator.optimizer_step_was_skipped else None


def finish(args, run, repo_id):
    """Save the first average in `transformer`, the others beside it, and a model card; publish them if asked."""
    pipeline, ema = run.pipeline, run.ema
    for std in (*ema.stds[1:], ema.stds[0]):
        ema.copy_to(pipeline.transformer, std)
        if run.accelerator.is_main_process:
            part, folder = pipeline.transformer, args.output_dir / f"transformer_ema_{std:g}"
            if std == ema.stds[0]:
                part, folder = pipeline, args.output_dir
            with naming("output_dir", args.output_dir):
                part.save_pretrained(folder)
    if not run.accelerator.is_main_process:
        return
    num_images_seen = run.step * args.total_batch_size
    write_model_card(args.output_dir, repo_id, license=args.hub_license, num_images_seen=num_images_seen)
    print(verdict(args.output_dir, pipeline, run.curve, run.step))
    if args.push_to_hub:
        url = publish(
            args.output_dir,
            repo_id,
            token=args.hub_token,
            private=args.hub_private_repo or None,
            commit_message=f"After {ema.step:,} updates",
        )
        print(f"Published: {url}")


if __name__ == "__main__":
    run_script(main, args, make_parser())
