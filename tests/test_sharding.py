"""Rows under `fully_shard`: two processes on the CPU hold shards, nothing is gathered, and the run is that of one.

Also the figures of docs/scale_out.md, which are computed here.
"""

import re
import shlex

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT, tiny_model
from processes import run_processes, run_python
from torch.distributed.run import get_args_parser as torchrun_parser

from diffusers_mp import MPDiTTransformer2DModel, MPLinear, get_preset, sharding, trust_rows_
from diffusers_mp.presets import SIZES


# What both runs do. In float64, so that the order of sums, all that differs, is 1e-16 of a number; through Adam's
# square roots and six updates that grows to TOLERANCE at most.
TOLERANCE = 1e-11
RUN = """
import os, sys, torch
import torch.distributed as dist
from helpers import tiny_inputs, tiny_model
from diffusers_mp import PowerFunctionEMA, normalize_weights_, parameter_groups
from diffusers_mp.layers import MPEmbedding, MPLinear

torch.set_num_threads(1)
STDS = (0.05, 0.1)

def batches(step, rank=None):
    inputs = tiny_inputs(batch_size=4, seed=step, dtype=torch.float64)
    return inputs if rank is None else {name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items()}

def start(model):
    # eps as large as the gradient: the sign of a gradient of rounding errors must not decide.
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2, eps=1e-3), betas=(0.9, 0.99))
    return optimizer, PowerFunctionEMA(model, STDS)

def update(model, optimizer, ema, step, rank=None):
    inputs = batches(step, rank)
    (model(**inputs).sample - inputs["hidden_states"]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    normalize_weights_(model)
    ema.update(step)

def rescale(model):
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (MPLinear, MPEmbedding)):
                layer.weight.mul_(1.04)
"""
SHARDED = (
    RUN
    + """
from datetime import timedelta
from pathlib import Path
import warnings
import torch.distributed.checkpoint as dcp
from diffusers import DDPMScheduler
from diffusers_mp import MPDiTPipeline
from diffusers_mp.averages.snapshots import save_snapshots
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

# PyTorch's own, about the API that it checkpoints through.
warnings.simplefilter("ignore")
folder, tolerance = Path(sys.argv[1]), float(sys.argv[2])
dist.init_process_group("gloo", timeout=timedelta(seconds=1200))
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))

class NothingIsSent:
    # Neither by functional collectives, which CommDebugMode counts, nor by those of c10d.
    names = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter_tensor", "barrier")

    def __enter__(self):
        self.kept = {name: getattr(dist, name) for name in self.names}
        def refuse(*args, **kwargs):
            raise AssertionError("sent something")
        for name in self.names:
            setattr(dist, name, refuse)
        self.mode = CommDebugMode()
        self.mode.__enter__()

    def __exit__(self, *error):
        self.mode.__exit__(*error)
        for name, function in self.kept.items():
            setattr(dist, name, function)
        assert self.mode.get_total_counts() == 0, self.mode.get_comm_counts()

def shard(model):
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def sharded():
    return shard(tiny_model().double().train())

def assert_sharded(model):
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.placements == (Shard(0),), name
        assert parameter.to_local().numel() < parameter.numel() or parameter.shape[0] == 1, name

def same(ours, theirs, tolerance=tolerance):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert isinstance(tensor, DTensor), name
        difference = (tensor.detach().full_tensor() - theirs[name].detach()).abs().max().item()
        assert difference <= tolerance, (name, difference)

def parameters(model):
    return dict(model.named_parameters())

# One process, in both of them.
reference = tiny_model().double().train()
their_optimizer, their_ema = start(reference)
model = sharded()
optimizer, ema = start(model)
assert_sharded(model)
assert [(g["name"], g["lr"], g["eps"], len(g["params"])) for g in optimizer.param_groups] == [
    (g["name"], g["lr"], g["eps"], len(g["params"])) for g in their_optimizer.param_groups]
assert all(isinstance(a, DTensor) for averages in ema.state_dict()["averages"] for a in averages.values())
for step in range(1, 4):
    update(model, optimizer, ema, step, rank)
    update(reference, their_optimizer, their_ema, step)
assert_sharded(model)
same(parameters(model), parameters(reference))
for ours, theirs in zip(ema.state_dict()["averages"], their_ema.state_dict()["averages"]):
    same(ours, theirs)

# Rows: forced normalisation, leaving training mode, saving. Each process does its own.
rescale(reference); normalize_weights_(reference)
for read in (normalize_weights_, lambda m: m.eval(), lambda m: m.state_dict()):
    model.train()
    rescale(model)
    with NothingIsSent():
        read(model)
    same(parameters(model), parameters(reference))
model.train()

# More processes than rows: this one may hold none.
narrow = MPLinear(3, 1)
narrow.weight = torch.nn.Parameter(distribute_tensor(narrow.weight.detach() * 1.04, mesh, [Shard(0)]))
with NothingIsSent():
    normalize_weights_(narrow).eval()
assert abs(narrow.weight.full_tensor().norm().item() - 1) < 1e-6

# Drift is told, on a process whose rows have drifted.
with torch.no_grad():
    model.patch_embed.proj.weight.mul_(1.5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.eval()
assert "have drifted 50%" in str(caught[0].message)
model.train()

# Rows cut in two are refused.
cut = MPLinear(4, 6)
cut.weight = torch.nn.Parameter(distribute_tensor(cut.weight.detach(), mesh, [Shard(1)]))
for call in (normalize_weights_, lambda m: m.eval(), lambda m: m.state_dict()):
    try:
        call(cut)
    except ValueError as error:
        assert "must be sharded on dimension 0" in str(error)
    else:
        raise AssertionError("not refused")
# Nor are rows of others touched before they are refused.
beside = MPLinear(4, 6)
with torch.no_grad():
    beside.weight.mul_(1.04)
was = beside.weight.detach().clone()
try:
    normalize_weights_(torch.nn.ModuleList([beside, cut]))
except ValueError:
    assert torch.equal(beside.weight, was)
else:
    raise AssertionError("not refused")

# Averages: in the model for a while, with a forward pass, which leaves gathered parameters behind; then raw weights.
raw = {name: p.detach().clone() for name, p in model.named_parameters()}
inputs = batches(9)
with torch.no_grad():
    before = model(**inputs).sample
with ema.averaged(model, 0.1), their_ema.averaged(reference, 0.1):
    same(parameters(model), parameters(reference))
    with torch.no_grad():
        during, expected = model(**inputs).sample, reference(**inputs).sample
    assert (during - expected).abs().max() < tolerance * 100
for name, parameter in model.named_parameters():
    assert isinstance(parameter, DTensor) and torch.equal(parameter.to_local(), raw[name].to_local()), name
with torch.no_grad():
    assert torch.equal(model(**inputs).sample, before)
    assert (during - before).abs().max() > 1e-6

# The same trap for forced normalisation: the gathered copy is not what is to be normalised.
rescale_shards = {name: p for name, p in model.named_parameters()}
model.reshard()
rescale(model)
with torch.no_grad():
    model(**inputs)
assert not isinstance(model.patch_embed.proj.weight, DTensor)
normalize_weights_(model)
assert abs(model.patch_embed.proj.weight.full_tensor().norm(dim=-1) - 1).max() < 1e-12
same(parameters(model), {name: p.full_tensor() for name, p in raw.items()}, 1e-14)

# Averages in a whole model: gathered on both processes, kept by the first.
with torch.device("cpu" if rank == 0 else "meta"):
    whole = tiny_model(open_gains=False).double().eval()
expected = tiny_model().double().eval()
ema.copy_to(whole, 0.1)
their_ema.copy_to(expected, 0.1)
assert type(whole) is type(expected)
for name, parameter in whole.named_parameters():
    assert parameter.is_meta if rank else (parameter - expected.get_parameter(name)).abs().max() <= tolerance, name

# Snapshots tell the class of the model, which sharding renames.
try:
    save_snapshots(ema, folder / "snapshots", MPDiTPipeline(model, DDPMScheduler()))
except ValueError as error:
    assert "must have a whole transformer" in str(error)
else:
    raise AssertionError("not refused")

# A distributed checkpoint.
model_state, optimizer_state = get_state_dict(model, optimizer)
dcp.save({"model": model_state, "optimizer": optimizer_state, "ema": ema.state_dict()}, checkpoint_id=folder / "dcp")
torch.manual_seed(1)
resumed = sharded()
with torch.no_grad():
    for parameter in resumed.parameters():
        parameter.mul_(-1)
their_optimizer, resumed_ema = None, PowerFunctionEMA(resumed, STDS)
resumed_optimizer = torch.optim.Adam(parameter_groups(resumed, lr=5e-2), betas=(0.9, 0.99))
model_state, optimizer_state = get_state_dict(resumed, resumed_optimizer)
state = {"model": model_state, "optimizer": optimizer_state, "ema": resumed_ema.state_dict()}
dcp.load(state, checkpoint_id=folder / "dcp")
set_state_dict(resumed, resumed_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
resumed_ema.load_state_dict(state["ema"])
assert resumed_ema.step == 3
assert_sharded(resumed)
for step in range(4, 7):
    update(model, optimizer, ema, step, rank)
    update(resumed, resumed_optimizer, resumed_ema, step, rank)
same(parameters(resumed), {name: p.full_tensor() for name, p in parameters(model).items()}, 0)
for ours, theirs in zip(resumed_ema.state_dict()["averages"], ema.state_dict()["averages"]):
    same(ours, {name: average.full_tensor() for name, average in theirs.items()}, 0)
final = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
if rank == 0:
    torch.save(final, folder / "final.pt")
print("done", rank)
dist.barrier()
sys.stdout.flush()
# gloo's threads now and then abort the process while it is torn down ("terminate called without an active exception").
os._exit(0)
"""
)
# Another number of processes reads the checkpoint: one, without shards.
ALONE = (
    RUN
    + """
from pathlib import Path
import warnings
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

warnings.simplefilter("ignore")
folder, tolerance = Path(sys.argv[1]), float(sys.argv[2])
model = tiny_model(seed=5).double().train()
optimizer, ema = start(model)
model_state, optimizer_state = get_state_dict(model, optimizer)
state = {"model": model_state, "optimizer": optimizer_state, "ema": ema.state_dict()}
dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
ema.load_state_dict(state["ema"])
for step in range(4, 7):
    update(model, optimizer, ema, step)
final = torch.load(folder / "final.pt", weights_only=True)
for name, parameter in model.named_parameters():
    difference = (parameter.detach() - final[name]).abs().max().item()
    assert difference <= tolerance, (name, difference)
print("done")
"""
)


def test_a_sharded_run_is_that_of_one_process_and_resumes_on_one(tmp_path):
    (tmp_path / "worker.py").write_text(SHARDED)
    assert run_processes(tmp_path / "worker.py", tmp_path, TOLERANCE).count("done") == 2
    see_the_tests = f"import sys; sys.path.append({str(ROOT / 'tests')!r})\n"
    assert "done" in run_python(see_the_tests + ALONE, tmp_path, TOLERANCE)


def test_a_weight_that_is_not_sharded_is_used_as_it_is():
    layer = MPLinear(4, 3)
    assert sharding.local_rows(layer.weight) is layer.weight


# The figures of docs/scale_out.md

DOCS = (ROOT / "docs" / "scale_out.md").read_text()
GIB = 2**30
# Bytes for each parameter in float32: weights, gradients, Adam's two moments, two averages.
STATE_BYTES = {"weights": 4, "gradients": 4, "Adam": 8, "two averages": 8}
# What a block of E with scale, rotation and gate keeps for its backward pass, in tensors of the size of its tokens;
# and 3 numbers for each token and head (a softmax's sum, norms of queries and keys).
TOKEN_TENSORS = 18


def num_parameters(size, patch_size=2, channels=4):
    channels = {"in_channels": channels, "out_channels": 2 * channels}
    with torch.device("meta"):
        model = MPDiTTransformer2DModel(**get_preset(f"{size}/{patch_size}", **channels, sample_size=32))
    return sum(parameter.numel() for parameter in model.parameters())


def activation_bytes(size, patch_size=2, sample_size=32, itemsize=4):
    """Bytes that all blocks keep for each image, weights left out."""
    num_layers, width, num_heads = SIZES[size]
    num_tokens = (sample_size // patch_size) ** 2
    return num_layers * num_tokens * (TOKEN_TENSORS * width + 3 * num_heads) * itemsize


def checkpointed_bytes(size, patch_size=2, sample_size=32, itemsize=4):
    """The same with gradient checkpointing: the input of each block, and everything within one."""
    num_layers, width, _ = SIZES[size]
    num_tokens = (sample_size // patch_size) ** 2
    return num_layers * num_tokens * width * itemsize + activation_bytes(size, patch_size, sample_size) // num_layers


def memory_table(patch_size=2, sample_size=32, channels=4):
    lines, of_latents = [], (patch_size, sample_size)
    for size in SIZES:
        parameters = num_parameters(size, patch_size, channels)
        state = parameters * sum(STATE_BYTES.values())
        cells = (
            f"{size}/{patch_size}",
            f"{parameters / 1e6:.1f} M",
            *(f"{state / processes / GIB:.2f}" for processes in (1, 8)),
            *(f"{count(size, *of_latents) / 2**20:.0f}" for count in (activation_bytes, checkpointed_bytes)),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@pytest.mark.parametrize("latents", [(2, 32, 4), (1, 16, 128)], ids=["4 x 32 x 32", "128 x 16 x 16"])
def test_the_memory_table_is_the_arithmetic(latents):
    assert memory_table(*latents) in DOCS, "docs/scale_out.md should have:\n" + memory_table(*latents)
    assert f"{sum(STATE_BYTES.values())} bytes" in DOCS


def saved_for_backward(function, parameters):
    """Bytes that a function keeps for its backward pass, parameters left out; of tokens and of anything else."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    del output
    return sum(storages.values())


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("num_heads, head_dim", [(4, 16), (8, 16), (2, 64)])
def test_the_formula_of_activations_counts_what_a_block_saves(num_heads, head_dim, trusted):
    model = tiny_model(num_attention_heads=num_heads, attention_head_dim=head_dim).train()
    if trusted:
        trust_rows_(model)
    block, width = model.transformer_blocks[0], num_heads * head_dim
    saved = {}
    for batch_size, num_tokens in ((2, 64), (4, 64), (2, 128)):
        tokens = torch.randn(batch_size, num_tokens, width, requires_grad=True)
        conditioning = torch.randn(batch_size, width, requires_grad=True)
        saved[batch_size, num_tokens] = saved_for_backward(lambda: block(tokens, conditioning), block.parameters())  # noqa: B023
    # Weights' unit rows do not depend on the batch, the conditioning not on the tokens: differences leave the tokens.
    per_token = (saved[2, 128] - saved[2, 64]) / (2 * 64)
    assert per_token == 4 * (TOKEN_TENSORS * width + 3 * num_heads)
    # What does not grow with the batch: unit rows, one float32 for each weight, and their norms; none when trusted.
    # Which channels have which gain takes some hundred bytes.
    fixed = saved[2, 64] - (saved[4, 64] - saved[2, 64])
    num_weights = sum(parameter.numel() for parameter in block.parameters())
    assert fixed == pytest.approx(0 if trusted else 4 * num_weights, rel=0.1, abs=1000)


def test_the_example_of_the_docs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    (tmp_path / "worker.py").write_text(f"{code}print('done')")
    assert "done" in run_processes(tmp_path / "worker.py", num_processes=1)


def test_every_option_that_the_launch_commands_use_exists():
    parsers = {"accelerate launch ": launch_command_parser(), "torchrun ": torchrun_parser()}
    commands = [line for block in re.findall(r"```bash\n(.*?)```", DOCS, re.S) for line in block.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        ((launcher, parser),) = [item for item in parsers.items() if item[0] in command]
        arguments = parser.parse_args(shlex.split(command.partition(launcher)[2]))
        assert arguments.training_script == "examples/train_mpdit.py"
