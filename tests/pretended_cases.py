"""What runs on the CPU and on the pretended device alike, the values to compare, and how often the host may wait.

A function takes a device, makes everything on the CPU from a seed and moves it, calls `mark` before its first unit (an
update, a sampling step, or all of it) and after each, and returns values by name.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiTTransformer2DModel
from helpers import encode, means_of_blocks, tiny_inputs, tiny_model, tiny_vae
from pretended_device import mark
from safetensors.torch import load_file
from test_guidance_guiders import GUIDERS
from test_schedulers import FLOW, FLOW_SOLVERS, NAMES, scheduler_of

from diffusers_mp import (
    MagnitudeRecorder,
    MPDiTPipeline,
    NormWatch,
    PowerFunctionEMA,
    normalize_weights_,
    parameter_groups,
    pin_weight_norms_,
    set_shift_scale,
    swap_adaln_for_rotation,
    trust_rows_,
)
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.evaluation.features import load_extractor
from diffusers_mp.evaluation.frechet import RunningStatistics, frechet_distance
from diffusers_mp.evaluation.generation import generate_images
from diffusers_mp.evaluation.precision_recall import precision_recall
from diffusers_mp.optimization import MuonWithAdam
from diffusers_mp.rotation_swap.swap import drop_shift_
from diffusers_mp.training import DDPMObjective, FlowMatchObjective, Watchdog
from diffusers_mp.training.watchdog import gradient_norm


def update(
    device,
    configuration="E",
    modulation=("scale", "rotate", "gate"),
    objective=(),
    num_micro_batches=1,
    max_grad_norm=None,
    precision=None,
    pinned=None,
    trusted=True,
    muon=False,
    fused=None,
    checkpointing=False,
    observer=None,
    spoiled=None,
    num_updates=2,
    **config,
):
    """Updates as the trainer makes them: weights, averages, and the last loss and norm of gradients."""
    options = {"prediction_type": "epsilon", **dict(objective)}
    is_flow = options["prediction_type"].startswith("flow_")
    objective = (FlowMatchObjective if is_flow else DDPMObjective).of_recipe(**options)
    config = {"num_layers": 1, "out_channels": 8 if objective.learns_variance else 4, **config}
    model = tiny_model(configuration, modulation, **config).train()
    model = (model if precision else model.double()).to(device)
    if checkpointing:
        model.enable_gradient_checkpointing()
    if pinned is not None:
        pin_weight_norms_(model, per=pinned)
    if trusted:
        trust_rows_(model)
    # Adam divides by the root of a square: without an epsilon of some size rounding counts where gradients are none.
    groups = parameter_groups(model, lr=1e-2, eps=1e-4, muon=muon)
    optimizer = MuonWithAdam(groups) if muon else torch.optim.Adam(groups, fused=fused)
    ema = PowerFunctionEMA(model, (0.05, 0.10))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10) if precision == torch.float16 else None
    observer = observer and observer(model, optimizer)

    def compute_loss(batch):
        clean, noise, timesteps = batch["latents"], batch["noise"], batch["timestep"]
        noisy = objective.add_noise(clean, noise, timesteps)
        conditions = {key: batch[key] for key in ("class_labels", "pooled_projections") if key in batch}
        with torch.autocast(device, precision) if precision else contextlib.nullcontext():
            prediction = model(noisy, timestep=timesteps, **conditions).sample
        prediction = prediction.float() if precision else prediction
        return objective.loss(prediction, clean, noise, timesteps)["loss"].mean() / num_micro_batches

    values, dtypes = {}, set()
    # What autocast is for; values alone would not tell, as both devices round.
    model.transformer_blocks[0].ff.linear_1.register_forward_hook(lambda _, args, y: dtypes.add(str(y.dtype)))
    with tempfile.TemporaryDirectory() as folder:
        watchdog = Watchdog(model, folder, compute_loss, action="skip", scaler=scaler, optimizer=optimizer)
        mark()
        for step in range(1, num_updates + 1):
            for number in range(num_micro_batches):
                batch = batch_of(10 * step + number, objective, model.dtype, config)
                if step == spoiled:
                    batch["latents"][0, 0, 0, 0] = math.nan
                batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
                loss = compute_loss(batch)
                (loss if scaler is None else scaler.scale(loss)).backward()
                watchdog.record(batch, loss)
            if scaler is not None:
                scaler.unscale_(optimizer)
            if max_grad_norm is not None:
                grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            else:
                grad_norm = gradient_norm(model)
            if watchdog.check(step, grad_norm):
                (optimizer if scaler is None else scaler).step(*(() if scaler is None else (optimizer,)))
                values = values if step == spoiled else {"loss": loss, "grad_norm": grad_norm}
            if scaler is not None:
                scaler.update()
            optimizer.zero_grad()
            normalize_weights_(model)
            ema.update(step)
            if observer is not None:
                observer.step()
            mark()
        watchdog.settle()
        for path in Path(folder).rglob("report.json"):
            values["first"] = str(json.loads(path.read_text())["processes"][0]["first"])
    assert ("first" in values) == (spoiled is not None)
    values |= {"dtypes": f"{dtypes}", **model.state_dict()}
    for std, average in zip(ema.stds, ema.state_dict()["averages"], strict=True):
        values |= {f"{std} {key}": value for key, value in average.items()}
    if observer is not None:
        observer.close()
        values |= {f"observed {key}": value for key, value in observer.values().items()}
    return values


def batch_of(seed, objective, dtype, config):
    inputs, generator = tiny_inputs(seed=seed, dtype=dtype), torch.Generator().manual_seed(seed)
    noise = torch.randn(inputs["hidden_states"].shape, generator=generator, dtype=dtype)
    timesteps = objective.timesteps(torch.rand(3, generator=generator, dtype=torch.float64))
    batch = {"latents": inputs["hidden_states"], "noise": noise, "timestep": timesteps}
    if config.get("num_classes", 10) is not None:
        batch["class_labels"] = inputs["class_labels"]
    if "pooled_projection_dim" in config:
        batch["pooled_projections"] = torch.randn(3, config["pooled_projection_dim"], generator=generator, dtype=dtype)
    return batch


def pipeline(device, scheduler="DDIMScheduler", kind="epsilon", guider=None, weak=False, vae=False, pooled=False):
    config = {"num_layers": 1, "out_channels": 4, "pooled_projection_dim": 6 if pooled else None}
    parts = {"vae": tiny_vae() if vae else None, "guider": guider and GUIDERS[guider][0]()}
    parts["guidance_transformer"] = tiny_model(seed=7, **config).eval() if weak else None
    pipe = MPDiTPipeline(tiny_model(**config).eval(), scheduler_of(scheduler, kind), **parts).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(device, call=(), **components):
    """Images from noise of the CPU's generators, with guidance unless it is switched off."""
    pipe, call = pipeline(device, **components), dict(call)
    if components.get("pooled"):
        call["pooled_projections"] = torch.randn(2, 6, generator=torch.Generator().manual_seed(5))
    mark()
    images = pipe(
        [2, 5],
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="pt" if pipe.vae is not None else "latent",
        callback_on_step_end=lambda *_: mark() or {},
        **call,
    ).images
    mark()
    return {"images": images}


def swap(device, calibrated=False, **options):
    """A swap on the device, updates of what came of it, and a shift that is annealed and dropped if it was kept."""
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
    model = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, num_embeds_ada_norm=10).double().to(device)
    batches = [
        {key: value.to(device) for key, value in tiny_inputs(dtype=torch.float64, seed=n).items()} for n in (1, 2)
    ]
    swap_adaln_for_rotation(model.eval(), calibration=batches if calibrated else None, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    mark()
    for number, batch in enumerate(batches):
        loss = model(**batch).sample.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.get("keep_shift"):
            set_shift_scale(model, 0.5 - 0.5 * number)
        mark()
    if options.get("keep_shift"):
        drop_shift_(model)
    return {"loss": loss, "sample": model(**batches[0]).sample, **model.state_dict()}


def evaluation(device, dinov2):
    """Generated images, their features by a network and by a function, and what is computed of these."""
    pipe, values = pipeline(device, vae=True), {}
    mark()
    call = {"class_ids": [0, 4], "num_inference_steps": 2, "guidance_scale": 2.0}
    images = [generate_images(pipe, range(4), seed=seed, **call) for seed in (3, 4)]
    for name in (dinov2, f"{means_of_blocks.__module__}:{means_of_blocks.__name__}"):
        extractor = load_extractor(name, device=device)
        (features, _), (others, _) = map(extractor, images)
        ours, theirs = (RunningStatistics().update(rows.to(device)) for rows in (features, others))
        distance = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
        measured = distance, *precision_recall(features, others, k=1, device=device)
        values |= {f"{name} features": features, f"{name} measured": torch.tensor(measured)}
    mark()
    return values | {"images": images[0].float()}


def encoding(device, images):
    """Shards of latents, mirrored too."""
    dataset, id2label, _ = load_image_dataset(images)
    with tempfile.TemporaryDirectory() as folder:
        vae = tiny_vae().to(device)
        mark()
        encode(dataset, folder, vae=vae, id2label=id2label, random_flip=True, batch_size=4, shard_size=6)
        mark()
        shards = sorted(Path(folder).glob("*.safetensors"))
        return {f"{path.name} {key}": value for path in shards for key, value in load_file(path).items()}


class Case(NamedTuple):
    """A row of the table: what is run, and the waits of the host that are known, by what and where."""

    function: Callable
    options: dict
    each: dict | None  # how often at most in a unit, once the first is over; None where none of them are counted
    more: dict  # how often beside these in the first unit, which is all of it where there is only one
    tolerance: float = 1e-12  # of the largest entry


# Of an update, unless its optimiser is fused: whether it may be made; all numbers of a record, or of a look; how the
# scale of float16 goes on.
UPDATE = {"read diffusers_mp/training/watchdog.py:_judge": 1}
RECORD = {**UPDATE, "read diffusers_mp/diagnostics/magnitudes.py:fetch": 1}
SCALED = {**UPDATE, "read tests/pretended_cases.py:update > torch/amp/grad_scaler.py:_maybe_opt_step": 1}
# Of the first one: tables of the noise levels come to the device.
TABLES = {
    "copy diffusers_mp/training/objectives.py:add_noise > diffusers/schedulers/scheduling_ddpm.py:add_noise": 1,
    "copy diffusers_mp/training/objectives.py:_table_rows": 1,
}
FLOW_OBJECTIVE = {"objective": {"prediction_type": "flow_prediction"}}
FLOW_OF_SAMPLES = {"objective": {"prediction_type": "flow_sample", "loss_space": "velocity"}}
SAMPLES = {"prediction_type": "sample", "variance_type": "fixed_small", "loss_space": "velocity"}
UPDATES = {
    **{f"configuration {name}": {"configuration": name} for name in "ABCDEF"},
    **{f"{kind} alone": {"modulation": (kind,)} for kind in ("scale", "shift", "rotate", "gate")},
    "AdaLN with rotation": {"configuration": "A", "modulation": ("scale", "shift", "rotate", "gate")},
    "v with min-SNR": {"objective": {"prediction_type": "v_prediction", "snr_gamma": 5.0}},
    "samples, loss of v": {"objective": SAMPLES},
    "a fixed variance": {"objective": {"variance_type": "fixed_small"}},
    "accumulated and clipped": {"num_micro_batches": 2, "max_grad_norm": 0.1},
    "rows not trusted": {"trusted": False},
    "rows pinned": {"configuration": "A", "pinned": "row"},
    "matrices pinned": {"configuration": "B", "pinned": "matrix"},
    "Muon": {"muon": True},
    "a vector of conditions": {"pooled_projection_dim": 6},
    "no classes": {"num_classes": None, "class_dropout_prob": 0.0},
    "checkpointing": {"checkpointing": True},
}
RECORDED = {
    "recorder": {"observer": lambda *of_run: MagnitudeRecorder(*of_run, stride=2), "num_updates": 3},
    "watch": {"observer": lambda model, _: NormWatch(model, every=2, warn=False), "num_updates": 3},
}

# Of a call: conditions and noise come to the device, the latter by way of diffusers.
INPUTS, PIPELINE = "diffusers_mp/call_inputs.py", "diffusers_mp/pipeline_mpdit.py"
RANDN = "diffusers/utils/torch_utils.py:randn_tensor"
CALL = {f"copy {INPUTS}:conditions": 1, f"copy {PIPELINE}:prepare_latents > {RANDN}": 1}
VECTORS = {**CALL, f"copy {INPUTS}:conditions": 2, "copy diffusers_mp/guidance.py:__init__": 1}
# Of a step, where noise is drawn, from generators that are here those of the CPU; where diffusers makes small tensors
# of its coefficients and solves for them on the device; where a guider takes a singular value decomposition.
DRAWN = {f"copy {PIPELINE}:__call__ > {RANDN}": 1}
SOLVER = f"{PIPELINE}:__call__ > diffusers/schedulers/scheduling_unipc_multistep.py:multistep_uni"
SOLVED = {f"copy {SOLVER}_p_bh_update": 3, f"copy {SOLVER}_c_bh_update": 3, f"read {SOLVER}_c_bh_update": 1}
TANGENTIAL = "diffusers_mp/guidance.py:__call__ > diffusers/guiders/tangential_classifier_free_guidance.py"
STEPS = dict.fromkeys(("DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), DRAWN)
STEPS |= {"UniPCMultistepScheduler": SOLVED, "tangential": {f"read {TANGENTIAL}:normalized_guidance": 1}}
# The one left out draws its noise on the device, by generators that this one has not.
SAMPLERS = [(name, "epsilon") for name in NAMES if name not in ("EDMEulerScheduler", "DPMSolverSDEScheduler")]
SAMPLERS += [("EDMEulerScheduler", "edm"), *((name, "flow") for name in (*FLOW, *FLOW_SOLVERS))]
GUIDED = {
    "prediction of v": {"kind": "v_prediction"},
    "no guidance": {"call": {"guidance_scale": 1.0}},
    "an interval of guidance": {"call": {"guidance_interval": (0.2, 5.0)}},
    "a weaker model": {"weak": True},
    "a VAE": {"vae": True},
}
NEGATIVE = {"pooled": True, "call": {"negative_pooled_projections": torch.ones(1, 6)}}

# Of a whole evaluation of two sets of images, by an extractor of transformers and by a function; sums are the CPU's.
EVALUATION = {
    f"copy {INPUTS}:conditions": 2,
    f"copy {PIPELINE}:prepare_latents > {RANDN}": 2,
    "copy tests/pretended_cases.py:evaluation": 4,
    "copy diffusers_mp/evaluation/features.py:transformers_extractor > torch/nn/modules/module.py:convert": 43,
    "copy diffusers_mp/evaluation/precision_recall.py:precision_recall": 4,
    "read diffusers_mp/evaluation/generation.py:generate_images": 4,
    "read diffusers_mp/evaluation/features.py:prepare_pixels": 2,
    "read diffusers_mp/evaluation/features.py:__call__": 8,
    "read diffusers_mp/evaluation/frechet.py:update": 8,
    "read diffusers_mp/evaluation/precision_recall.py:_coverage": 4,
}
# The hash of the VAE's 148 tensors, then of each batch: in with it, out with means and deviations; all of it mirrored.
ENCODING = {
    "read diffusers_mp/files.py:sha256_of_weights": 148,
    "read diffusers_mp/data/shards.py:_fetched": 4 * 3,
}

CASES = {
    **{name: Case(update, options, UPDATE, TABLES) for name, options in UPDATES.items()},
    **{name: Case(update, options, RECORD, TABLES) for name, options in RECORDED.items()},
    "flow": Case(update, FLOW_OBJECTIVE, UPDATE, {}),
    "flow of samples, loss of the velocity": Case(update, FLOW_OF_SAMPLES, UPDATE, {}),
    "fused Adam": Case(update, {"fused": True}, {}, TABLES),
    # It is run again, and each tensor is looked at.
    "a batch that is not finite": Case(update, {"spoiled": 2}, None, TABLES),
    "a batch that is not finite, fused Adam": Case(
        update, {"spoiled": 2, "fused": True, "num_updates": 4}, None, TABLES
    ),
    "the last batch is not finite, fused Adam": Case(update, {"spoiled": 2, "fused": True}, None, TABLES),
    # Rounded elsewhere: the CPU takes derivatives of rows by a kernel that no other device has.
    "bfloat16": Case(update, {"precision": torch.bfloat16}, UPDATE, TABLES, 5e-3),
    "float16": Case(update, {"precision": torch.float16}, SCALED, TABLES, 1e-3),
    "float16, fused Adam": Case(update, {"precision": torch.float16, "fused": True}, UPDATE, TABLES, 1e-3),
    **{
        f"{name}, {kind}": Case(sample, {"scheduler": name, "kind": kind}, STEPS.get(name, {}), CALL, 2e-5)
        for name, kind in SAMPLERS
    },
    **{f"guider, {name}": Case(sample, {"guider": name}, STEPS.get(name, {}), CALL, 2e-5) for name in GUIDERS},
    **{name: Case(sample, options, {}, CALL, 2e-5) for name, options in GUIDED.items()},
    "vectors of conditions": Case(sample, NEGATIVE, {}, VECTORS, 2e-5),
    "swap, calibrated": Case(swap, {"calibrated": True}, {}, {}),
    "swap, annealed": Case(swap, {"keep_shift": True, "rank": 2}, {}, {}),
    "evaluation": Case(evaluation, {}, {}, EVALUATION, 1e-6),
    "encoding": Case(encoding, {}, {}, ENCODING, 1e-6),
}
