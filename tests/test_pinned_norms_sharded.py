"""Pinned norms in two processes: those of one, with nothing sent for rows, and one all-reduce for all matrices."""

from processes import run_processes


WORKER = """
import copy, os, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from diffusers_mp import load_weight_norms, normalize_weights_, pin_weight_norms_, save_weight_norms

torch.set_num_threads(1)
folder = Path(sys.argv[1])
dist.init_process_group("gloo", timeout=timedelta(seconds=1200))
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))

def network():
    # Rows that two processes do not share evenly, a single one, which one of them has not, and some that are free.
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 5, 2), nn.Linear(6, 7), nn.Embedding(4, 6), nn.Linear(5, 1, bias=False), nn.Linear(3, 4)
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        model[1].weight[[0, 5]] = 0
        model[4].weight.zero_()
    return model

def shard(model):
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def update(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float64)
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                parameter.add_(distribute_tensor(noise, mesh, parameter.placements))
            else:
                parameter.add_(noise)

def whole(model):
    return {name: (p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()).clone()
            for name, p in model.named_parameters()}

def same(ours, theirs, tolerance=1e-14):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() <= tolerance, name

for per in ("row", "matrix"):
    reference = network()
    expected = pin_weight_norms_(reference, per=per)
    before = whole(reference)
    update(reference)
    normalize_weights_(reference)
    after = whole(reference)
    assert any((after[name] - before[name]).abs().max() > 0.1 for name in after)

    early = network()
    pin_weight_norms_(early, per=per)
    shard(normalize_weights_(early))
    late = shard(network())
    report = pin_weight_norms_(late, per=per)
    assert (report.pinned, report.free) == (expected.pinned, expected.free), (report, expected)
    same(report.state_dict(), expected.state_dict())
    path = folder / f"{per}.safetensors"
    save_weight_norms(late, path)
    dist.barrier()
    loaded = shard(network())
    load_weight_norms(loaded, path)
    for name, model in {"before": early, "after": late, "loaded": loaded}.items():
        same(whole(normalize_weights_(model)), before, 0)
        update(model)
        with CommDebugMode() as sent:
            normalize_weights_(model)
        assert sent.get_total_counts() == (per == "matrix"), (name, sent.get_comm_counts())
        assert all(isinstance(p, DTensor) for p in model.parameters())
        same(whole(model), after)
        once = whole(model)
        same(whole(normalize_weights_(model)), once, 0)

    # Replicas, by the wrapper or by what is in it.
    replica = DistributedDataParallel(network())
    report = pin_weight_norms_(replica, per=per)
    assert report.pinned == expected.pinned
    update(replica.module)
    with CommDebugMode() as sent:
        normalize_weights_(replica)
    assert sent.get_total_counts() == 0
    same(whole(replica.module), after, 0)
print("done", rank)
dist.barrier()
sys.stdout.flush()
# gloo's threads now and then abort the process while it is torn down ("terminate called without an active exception").
os._exit(0)
"""


def test_two_processes_keep_the_norms_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    assert run_processes(tmp_path / "worker.py", tmp_path).count("done") == 2
