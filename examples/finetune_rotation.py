"""Swap the AdaLN shifts of a pretrained DiT for rotations, fine-tune it, and say what that cost and saved.

    accelerate launch examples/finetune_rotation.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 \
        --train_data_dir photos --swap mean --output_dir dit-rotation

The base is a folder or Hub id of a diffusers `DiTPipeline`. `--swap` says what takes the place of the shifts:

    none      nothing is swapped: plain fine-tuning, to compare with
    drop      nothing beside the rotations, which start at zero
    mean      a constant for each site, the mean shift over training batches
    anneal    the shifts themselves, faded into that constant over `--anneal_steps`, and cut out at the end

Held-out images are evaluated before the swap, right after it, and at the end: the loss at fixed noise levels, and the
squared error of the predicted noise relative to the untouched model's. `evaluation.json` has these, and
`logs/metrics.jsonl` the curve. The folder becomes a pipeline,

    from diffusers_mp import RotationDiTTransformer2DModel  # known to diffusers from here on
    pipeline = DiTPipeline.from_pretrained("dit-rotation")

or with `--save adapter` an adapter for `load_rotation_adapter`. `--max_train_steps 0` swaps and saves only.

Latents are `vae.config.scaling_factor` times those of the VAE, as the pipeline expects. Labels, the numbers of the
data's classes, are dropped once for each sample; in training mode diffusers' blocks would each drop their own. The
untouched model stays in memory beside the trained one. There is no resuming: a run that was killed is lost.
"""

import copy
import json
import math
from pathlib import Path

from diffusers_mp.arguments import (
    LR_SCHEDULERS,
    NUM_WORKERS_HELP,
    HelpFormatter,
    add_hub_arguments,
    add_schedule_arguments,
    add_source_arguments,
    at_least,
    check_effects,
    check_paths,
    check_schedule,
    check_source_effects,
    encoding_of,
    positive,
    seed,
    share,
    source_of,
)
from diffusers_mp.scripts import ScriptParser, command_line, run_script
from diffusers_mp.training.batch_size import add_batch_arguments, check_batch_arguments


SUBLAYERS = ("attention", "mlp", "final")
BATCH_SIZE = 16


def make_parser():
    parser = ScriptParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="folder or Hub id of a DiTPipeline")
    add("--revision", help="branch, tag or commit of it")
    add("--swap", choices=("none", "drop", "mean", "anneal"), default="mean", help="what takes the shifts' places")
    add("--anneal_steps", type=at_least(1), help="updates until the shifts are gone [half of max_train_steps]")
    add("--distillation", action="store_true", help="learn the untouched model's predictions instead of the data")
    add("--train", choices=("all", "modulation", "rotation"), default="all", help="which parameters are trained")
    add("--rank", type=at_least(1), help="rotation heads through a bottleneck of this width [full]")
    add("--sublayers", nargs="+", choices=SUBLAYERS, default=list(SUBLAYERS), help="whose shifts are swapped")
    add("--num_calibration_samples", type=at_least(1), default=512, help="training samples for the mean of the shifts")
    add("--save", choices=("model", "adapter"), default="model", help="a whole pipeline, or what the swap added")
    add_source_arguments(add)
    add("--latents_dir", help="where encoded images are kept and found again [OUTPUT_DIR/latents]")
    add("--random_flip", action="store_true", help="mirror half of the samples")
    add("--encode_batch_size", type=at_least(1), default=32, help="images per forward pass of the VAE")
    add("--dataloader_num_workers", type=at_least(0), help=NUM_WORKERS_HELP)
    add("--output_dir", type=Path, default=Path("dit-rotation"), help="new or empty folder for the result")
    add("--seed", type=seed, default=0, help="seed of every training sample")
    add("--class_dropout_prob", type=share, default=0.1, help="share of labels replaced by the null class")
    add_batch_arguments(add, BATCH_SIZE)
    add("--gradient_checkpointing", action="store_true", help="recompute activations in backward")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="[as `accelerate config` says]")
    add("--max_train_steps", type=at_least(0), default=1000, help="number of updates")
    add("--learning_rate", type=at_least(0, float), default=1e-4, help="of AdamW, after warm-up")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant_with_warmup", help="how the rate goes on after it")
    add("--lr_warmup_steps", type=at_least(0), default=0, help="updates of linear warm-up")
    add_schedule_arguments(add)
    add(
        "--adam_weight_decay", type=at_least(0, float), default=0.0, help="AdamW's weight decay, not of pinned weights"
    )
    add("--pin_weight_norms", choices=("row", "matrix"), help="weights keep the norms they have after the swap [none]")
    add("--max_grad_norm", type=positive, default=1.0, help="clip gradients to this norm")
    add("--validation_steps", type=at_least(0), default=100, help="updates between validations; 0 for none")
    add("--num_validation_images", type=at_least(1), help="images held out of training [256, at most one in 20]")
    add("--num_validation_levels", type=at_least(1), default=8, help="noise levels of the validation loss")
    add("--logging_steps", type=at_least(1), default=10, help="updates between log entries")
    add("--report_to", default="none", help="tensorboard, wandb, … or none; metrics.jsonl is always kept")
    add_hub_arguments(add)
    return parser


def parse_args(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give one of --train_data_dir and --dataset_name")
    check_source_effects(args, parser)
    check_batch_arguments(args, parser, BATCH_SIZE)
    if args.swap == "none":
        check_effects(parser, ["rank", "sublayers"], "with --swap none")
        if args.train == "rotation" or args.save == "adapter":
            parser.error("--swap none has no rotations for --train rotation or --save adapter")
    if args.max_train_steps == 0:
        names = ["distillation", "lr_scheduler", "lr_warmup_steps", "adam_weight_decay", "max_grad_norm"]
        check_effects(parser, [*names, "gradient_checkpointing", "pin_weight_norms"], "with --max_train_steps 0")
    if args.train == "rotation" and args.rank is None:
        check_effects(parser, ["pin_weight_norms"], "with --train rotation, whose heads start at zero and stay free")
    if args.save == "adapter" and args.train == "all":
        parser.error("--save adapter does not hold the whole model: use --train rotation or --train modulation")
    check_schedule(args, parser)
    if args.anneal_steps is not None and args.swap != "anneal":
        parser.error(f"--anneal_steps has no meaning for --swap {args.swap}")
    if args.swap == "anneal":
        args.anneal_steps = max(1, args.max_train_steps // 2) if args.anneal_steps is None else args.anneal_steps
        if args.anneal_steps > max(1, args.max_train_steps):
            parser.error(f"--anneal_steps must be from 1 to --max_train_steps, got {args.anneal_steps}")
    if args.output_dir.is_dir() and {path.name for path in args.output_dir.iterdir()} - {"latents"}:
        parser.error(f"--output_dir must be new or empty, {args.output_dir} is not")
    return args


if __name__ == "__main__":
    args = command_line(parse_args, make_parser())  # before the imports below, which take seconds

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from diffusers import DDPMScheduler, DiTPipeline
from diffusers.models.embeddings import LabelEmbedding
from torch.utils.data import BatchSampler
from tqdm.auto import tqdm

from diffusers_mp import (
    drop_shift_,
    normalize_weights_,
    parameter_groups,
    pin_weight_norms_,
    save_rotation_adapter,
    set_shift_scale,
    swap_adaln_for_rotation,
)
from diffusers_mp.autoencoders import geometry, scaling_for_dit_pipeline
from diffusers_mp.data.encoding import encode_dataset
from diffusers_mp.data.feeding import to_device
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.data.settings import EncodingSettings
from diffusers_mp.files import space_for, write_json
from diffusers_mp.publishing.hub import check_hub_access, mask_places, public_arguments, publish
from diffusers_mp.publishing.rotation_card import write_rotation_card
from diffusers_mp.rotation_swap.checks import check_model, check_sites
from diffusers_mp.rotation_swap.sites import find_sites
from diffusers_mp.sources import check_reachable, naming
from diffusers_mp.training import (
    DDPMObjective,
    NonFiniteError,
    StreamBatchSampler,
    TrainingSamples,
    all_finite,
    hold_out,
    load_batches,
)
from diffusers_mp.training.checks import check_reporting
from diffusers_mp.training.engine import start
from diffusers_mp.training.finetuning import HeldOut, check_blocks, start_of_finetuning, verdict_of_finetuning
from diffusers_mp.training.model import check_finite
from diffusers_mp.training.optimizers import learning_rate_schedule
from diffusers_mp.training.summary import DataSummary


def main(args):
    check_reporting(args, make_parser())
    check_paths(args)
    accelerator, _ = start(args, args.output_dir / "logs")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise RuntimeError(f"this script runs on one process or DDP, got {accelerator.distributed_type.value}.")
    repo_id = None
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = check_hub_access(
            args.hub_model_id or args.output_dir.name, token=args.hub_token, private=args.hub_private_repo or None
        )

    # 1. The base and its data; a folder is looked at before anything is fetched from the Hub
    images = None if args.train_data_dir is None else load_image_dataset(**source_of(args))
    source = {"revision": args.revision, "cache_dir": args.cache_dir}
    base = args.pretrained_model_name_or_path
    check_reachable("pretrained_model_name_or_path", base, ["model_index.json"], **source)
    with naming("pretrained_model_name_or_path", base):
        pipeline = DiTPipeline.from_pretrained(base, **source)
        check_finite(pipeline.transformer, base)
        check_blocks(pipeline.transformer)
        mask_places(pipeline)
        if args.swap != "none":
            # What the swap would refuse, before the work. Annealed shifts are cut out as well, at the end.
            check_model(pipeline.transformer)
            check_sites(pipeline.transformer, find_sites(pipeline.transformer, args.sublayers), keep_shift=False)
        objective = training_objective(pipeline)
    transformer = pipeline.transformer.to(accelerator.device)
    latents = load_latents(args, pipeline, accelerator, images)
    num_held_out = args.num_validation_images
    if num_held_out is None:
        num_held_out = max(1, min(256, len(latents) // 20))
    train_indices, validation_indices = hold_out(latents, num_held_out, args.seed)
    if not len(validation_indices):
        raise ValueError("the data must have two images or more of a class, of which one can be held out.")
    options = {"seed": args.seed, **sample_options(pipeline)}
    held_out = TrainingSamples(latents, **options, indices=validation_indices)
    held_out = HeldOut(args, held_out, objective, accelerator.device)
    options |= {"class_dropout_prob": args.class_dropout_prob, "random_flip": args.random_flip}
    samples = TrainingSamples(latents, **options, indices=train_indices)
    data = DataSummary.of_latents(latents, len(validation_indices))
    accelerator.print(start_of_finetuning(args, accelerator, data, count(transformer)))

    # 2. The swap, between two evaluations
    teacher = copy.deepcopy(transformer).eval().requires_grad_(False)
    evaluation, num_parameters = {"before": held_out.evaluate(transformer, teacher)}, {"before": count(transformer)}
    sites = [site.name for site in find_sites(transformer, args.sublayers)]
    if args.swap != "none":
        calibration = calibration_inputs(args, samples, objective, accelerator.device)
        report = swap_adaln_for_rotation(
            transformer,
            sublayers=args.sublayers,
            rank=args.rank,
            keep_shift=args.swap == "anneal",
            calibration=None if args.swap == "drop" else calibration,
        )
        accelerator.print(report)
    evaluation["after_swap"] = held_out.evaluate(transformer, teacher)

    # 3. Fine-tuning, and what came of it
    arguments = public_arguments(vars(args))
    accelerator.init_trackers("finetune_rotation", {name: str(value) for name, value in arguments.items()})
    accelerator.log({f"validation/{name}": value for name, value in evaluation["after_swap"].items()}, step=0)
    train(args, accelerator, transformer, teacher, trained_parameters(args, transformer, sites), samples, held_out)
    if args.swap == "anneal" and args.max_train_steps:
        drop_shift_(transformer)
    evaluation["final"], num_parameters["after"] = held_out.evaluate(transformer, teacher), count(transformer)
    loss = evaluation["final"]["loss"]
    if not all_finite(transformer) or not math.isfinite(loss):  # held-out images need not use all weights
        raise NonFiniteError(
            f"after update {args.max_train_steps} the weights or the held-out loss ({loss}) are not finite, nothing "
            "is saved: try a lower --learning_rate"
        )
    final = {f"validation/{name}": value for name, value in evaluation["final"].items()}
    accelerator.log(final, step=args.max_train_steps)
    if accelerator.is_main_process:
        record = {"arguments": arguments, "num_parameters": num_parameters, **evaluation}
        plain = json.loads(json.dumps(record, default=str))
        with space_for(args.output_dir):
            write_json(args.output_dir / "evaluation.json", plain)
            save(args, pipeline, latents.id2label, repo_id, record)
    accelerator.end_training()


def train(args, accelerator, transformer, teacher, parameters, samples, held_out):
    """All updates, of the transformer in place."""
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.pin_weight_norms is not None:
        accelerator.print(pin_weight_norms_(transformer, per=args.pin_weight_norms))
    groups = parameter_groups(transformer, lr=args.learning_rate, weight_decay=args.adam_weight_decay)
    optimizer = torch.optim.AdamW(groups)
    lr_scheduler = learning_rate_schedule(args, optimizer, vars(args), args.max_train_steps)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    # Autocast is for updates alone, below: evaluations before and after them have to be of one precision.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    batch_sampler = StreamBatchSampler(
        len(samples),
        seed=args.seed,
        train_batch_size=args.train_batch_size,
        max_train_steps=args.max_train_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )
    batches = load_batches(samples, batch_sampler, accelerator.device, args.dataloader_num_workers)
    progress_bar = tqdm(total=args.max_train_steps, desc="Fine-tuning", disable=not accelerator.is_main_process)
    set_training_mode(model)
    objective, step, losses = held_out.objective, 0, []
    for batch in batches:
        with accelerator.accumulate(model):
            batch["timestep"] = objective.timesteps(batch.pop("time"))
            batch = to_device(batch, accelerator.device)
            clean, noise, timesteps = batch["latents"], batch["noise"], batch["timestep"]
            inputs = (objective.add_noise(clean, noise, timesteps), timesteps, batch["class_label"])
            with accelerator.autocast():
                prediction = model(*inputs).sample.float()
            if args.distillation:
                with torch.no_grad(), accelerator.autocast():
                    target = teacher(*inputs).sample.float()
                loss = F.mse_loss(prediction, target)
            else:
                loss = objective.loss(prediction, clean, noise, timesteps)["loss"].mean()
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        learning_rate = lr_scheduler.get_last_lr()[0]  # of this update, not of the next one
        lr_scheduler.step()
        normalize_weights_(transformer)
        step += 1
        progress_bar.update()
        if args.swap == "anneal":
            # Rows that no longer count get no gradient. They go at the end, when no optimiser holds them.
            set_shift_scale(transformer, max(0.0, 1 - step / args.anneal_steps))
        if step % args.logging_steps == 0 or step == args.max_train_steps:
            loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
            if not math.isfinite(loss):
                progress_bar.close()  # or it is drawn once more after the message
                raise NonFiniteError(f"the loss is {loss} before update {step}: try a lower --learning_rate")
            grad_norm = grad_norm.item()
            entry = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
            progress_bar.set_postfix_str(f"loss={loss:.4f}, lr={learning_rate:.2g}, grad_norm={grad_norm:.3g}")
            accelerator.log({f"train/{name}": value for name, value in entry.items()}, step=step)
            losses = []
        if args.validation_steps and step % args.validation_steps == 0 and step < args.max_train_steps:
            measured = held_out.losses(transformer)
            accelerator.log({f"validation/{name}": value for name, value in measured.items()}, step=step)
            set_training_mode(model)
    progress_bar.close()


def training_objective(pipeline):
    """Noise prediction on the scheduler's noise levels; with a learned variance if the model has channels for it."""
    config = pipeline.transformer.config
    learned = pipeline.transformer.out_channels == 2 * config.in_channels
    variance_type = "learned_range" if learned else "fixed_small"
    return DDPMObjective(DDPMScheduler.from_config(pipeline.scheduler.config, variance_type=variance_type))


def load_latents(args, pipeline, accelerator, images=None):
    """The data, encoded once by the base's VAE."""
    dataset, id2label, report = images or load_image_dataset(**source_of(args))
    for line in report.notes():
        accelerator.print(line)
    if id2label is None:
        flag = "--dataset_name" if args.train_data_dir is None else "--train_data_dir"
        raise ValueError(f"{flag} must have classes, {report.origin} has none: a DiT generates images of a class.")
    vae, config = pipeline.vae.to(accelerator.device).eval(), pipeline.transformer.config
    if max(id2label) >= config.num_embeds_ada_norm:
        raise ValueError(
            f"the data must have labels below {config.num_embeds_ada_norm}, the number of the base's classes, got "
            f"{max(id2label)}."
        )
    processes = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    scaling_for_dit_pipeline(vae, config.in_channels)
    settings = EncodingSettings(config.sample_size * geometry(vae).factor, **encoding_of(args))
    folder = args.latents_dir or args.output_dir / "latents"
    latents = encode_dataset(dataset, folder, settings, vae=vae, id2label=id2label, **processes)
    latents.verify(**processes)
    return latents


def sample_options(pipeline):
    """The base's classes, and the units of latents that it has learned and its pipeline undoes: z · scaling_factor."""
    config = pipeline.transformer.config
    std = 1 / scaling_for_dit_pipeline(pipeline.vae, config.in_channels)  # samples are (z - mean) / std
    units = {"latents_mean": [0.0] * config.in_channels, "latents_std": [std] * config.in_channels}
    return {"num_classes": config.num_embeds_ada_norm, **units}


def set_training_mode(model):
    """Training mode but for the blocks' label embeddings: labels are dropped already, once for all blocks."""
    model.train()
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()


def calibration_inputs(args, samples, objective, device):
    """Inputs of the model for the first samples of the run; the same for any number of processes and micro batches."""
    stream = StreamBatchSampler(
        len(samples), seed=args.seed, train_batch_size=args.num_calibration_samples, max_train_steps=1
    )
    keys = BatchSampler(next(iter(stream)), args.train_batch_size, drop_last=False)
    for batch in load_batches(samples, keys, device):
        timesteps = objective.timesteps(batch["time"])
        inputs = {
            "hidden_states": objective.add_noise(batch["latents"], batch["noise"], timesteps),
            "timestep": timesteps,
            "class_labels": batch["class_label"],
        }
        yield to_device(inputs, device)


def trained_parameters(args, transformer, sites):
    """What `--train` names; everything else is frozen."""
    if args.train == "all":
        return list(transformer.parameters())
    transformer.requires_grad_(False)
    for site in map(transformer.get_submodule, sites):
        site.requires_grad_(args.train == "modulation")
        if args.train == "rotation":
            site.rotation.requires_grad_(True)
            if site.mean_shift is not None:
                site.mean_shift.requires_grad_(True)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def count(model):
    """Number of its parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def save(args, pipeline, id2label, repo_id, record):
    """A pipeline or an adapter, with its card; published if asked."""
    folder, transformer, base = args.output_dir, pipeline.transformer.eval(), args.pretrained_model_name_or_path
    if args.save == "adapter":
        save_rotation_adapter(
            transformer,
            folder,
            # As recorded: a relative path would pass for an id of the Hub elsewhere.
            base_model_name_or_path=record["arguments"]["pretrained_model_name_or_path"],
            base_model_revision=args.revision,
            modulation_rows=args.train == "modulation",
        )
    else:
        # Again, as the class of the transformer is another one now; and names, which `save_pretrained` would forget.
        pipeline.register_modules(transformer=transformer)
        known = DiTPipeline.load_config(base, revision=args.revision, cache_dir=args.cache_dir).get("id2label") or {}
        pipeline.register_to_config(id2label={**{int(id_): name for id_, name in known.items()}, **id2label})
        pipeline.save_pretrained(folder)
    write_rotation_card(folder, repo_id, base_model=base, record=record, license=args.hub_license)
    print(verdict_of_finetuning(args, record))
    if args.push_to_hub:
        options = {"token": args.hub_token, "private": args.hub_private_repo or None}
        url = publish(folder, repo_id, **options, commit_message=f"After {args.max_train_steps:,} updates")
        print(f"Published: {url}")


if __name__ == "__main__":
    run_script(main, args, make_parser())
