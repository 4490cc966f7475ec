"""A loss or gradient that is not finite: what is said and saved, and what a skipped update leaves."""

import copy
import json
import math
import textwrap

import pytest
import torch
import torch.nn.functional as F
from breaking import make, report_of, update
from helpers import tiny_inputs, tiny_model
from processes import run_processes
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_mp import PowerFunctionEMA, normalize_weights_, parameter_groups
from diffusers_mp.training import trace
from diffusers_mp.training import watchdog as watchdog_module
from diffusers_mp.training.watchdog import NonFiniteError, Watchdog, gradient_norm


def test_weights_that_are_not_finite_cannot_be_skipped(tmp_path):
    network, batch, watchdog = make(tmp_path, action="skip")
    with torch.no_grad():
        network.blocks[1][0].bias[2] = math.nan
    message = r"'blocks.1.0' \(Linear\), as are its parameters \['bias'\].*weights are not finite.*resume from"
    with pytest.raises(NonFiniteError, match=message):
        update(watchdog, batch)
    assert report_of(tmp_path)["processes"][0]["parameters_not_finite"] == ["blocks.1.0.bias"]


# What is saved


def test_evidence(tmp_path):
    network, batch, watchdog = make(tmp_path, save_weights=True)
    good = {**batch, "x": batch["x"] + 1}
    network.blocks[0][1].broken = True
    for part in (good, batch):
        watchdog.record(part, watchdog.compute_loss(part))
    with pytest.raises(NonFiniteError):
        watchdog.check(12)
    folder = tmp_path / "evidence" / "step-0000012"
    assert sorted(path.name for path in folder.iterdir()) == [
        "batch-process0-0.safetensors",
        "batch-process0-1.safetensors",
        "report.json",
        "weights.safetensors",
    ]
    for number, expected in enumerate((good, batch)):
        stored = load_file(folder / f"batch-process0-{number}.safetensors")
        assert stored.keys() == {"x", "y", "labels"}
        for name, tensor in stored.items():
            assert torch.equal(tensor, expected[name])
    with safe_open(folder / "batch-process0-0.safetensors", "pt") as file:
        assert file.metadata() == {"name": '"a"'}
    stored = load_file(folder / "weights.safetensors")
    assert stored.keys() == network.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in network.state_dict().items())
    report = report_of(tmp_path, 12)
    assert (report["step"], report["action"]) == (12, "stop")
    assert len(report["processes"][0]["losses"]) == 2


def test_evidence_that_cannot_be_written_hides_nothing(tmp_path):
    network, batch, watchdog = make(tmp_path)
    (tmp_path / "evidence").write_text("in the way")
    network.blocks[0][1].broken = True
    with pytest.raises(NonFiniteError, match="'blocks.0.1'.*could not be written"):
        update(watchdog, batch)


def test_evidence_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog_module, "MAX_REPORTS", 2)
    network, batch, watchdog = make(tmp_path, action="skip")
    network.blocks[0][1].broken = True
    assert not any(update(watchdog, batch, step) for step in range(1, 5))
    assert len(list((tmp_path / "evidence").iterdir())) == 2


# Skipping


def test_a_skipped_update_is_an_update_by_zero(tmp_path):
    model, inputs = tiny_model().train(), tiny_inputs()
    optimizer = torch.optim.Adam(parameter_groups(model))
    ema = PowerFunctionEMA(model)

    def compute_loss(batch):
        return model(**batch).sample.square().mean()

    watchdog = Watchdog(model, tmp_path, compute_loss, action="skip")
    bad = {**inputs, "hidden_states": inputs["hidden_states"] * math.nan}
    decisions, states = [], []
    for step, batch in enumerate((inputs, bad, inputs), start=1):
        if decided := update(watchdog, batch, step):
            optimizer.step()
        optimizer.zero_grad()
        normalize_weights_(model)
        ema.update(step)
        decisions.append(decided)
        states.append(copy.deepcopy([list(model.parameters()), optimizer.state_dict()["state"]]))
    assert decisions == [True, False, True]
    assert watchdog.num_skipped == 1
    for before, after in zip(states[0][0], states[1][0], strict=True):
        assert torch.equal(before, after)
    for index, state in states[0][1].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][1][index][name])
    assert [state[1][0]["step"].item() for state in states] == [1, 1, 2]
    for average in ema.state_dict()["averages"]:
        assert all(tensor.isfinite().all() for tensor in average.values())


def test_so_many_skips_in_a_row_stop(tmp_path):
    network, batch, watchdog = make(tmp_path, action="skip", max_skips=3)
    bad = {**batch, "x": batch["x"] * math.inf}
    decisions = [update(watchdog, part, step) for step, part in enumerate((bad, bad, batch, bad, bad))]
    assert decisions == [False, False, True, False, False]
    with pytest.raises(NonFiniteError, match="3 updates in a row have failed"):
        update(watchdog, bad)
    assert watchdog.num_skipped == 4


# A finite explosion


def losses_of(watchdog, batch, factors):
    """Whether each update may be made, of losses that are multiplied by these factors."""
    decisions = []
    for step, factor in enumerate(factors, start=1):
        loss = watchdog.compute_loss(batch) * factor
        loss.backward()
        watchdog.record(batch, loss)
        decisions.append(watchdog.check(step))
    return decisions


EXPLOSION = [1.0] * 100 + [20.0] * 20


def test_an_explosion_stops_the_run_and_leaves_evidence(tmp_path):
    network, batch, watchdog = make(tmp_path, save_weights=True)
    loss = watchdog.compute_loss(batch).item()
    assert all(losses_of(watchdog, batch, EXPLOSION[:-1]))
    message = (
        rf"update 1: the loss is {20 * loss:.4g}, and has been above 10 times its median of 100 updates "
        rf"\({loss:.4g}\) for 20 updates; the usual cause is a learning rate that is too high: .* try a third of it; "
        r"evidence in .*step-0000001"
    )
    with pytest.raises(NonFiniteError, match=message):
        losses_of(watchdog, batch, [20.0])
    report = report_of(tmp_path, 1)
    assert report["action"] == "stop"
    assert report["losses"] == pytest.approx([loss] * 80 + [20 * loss] * 20)
    stored = load_file(tmp_path / "evidence" / "step-0000001" / "weights.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in network.state_dict().items())
    assert (tmp_path / "evidence" / "step-0000001" / "batch-process0-0.safetensors").is_file()


def test_an_explosion_is_warned_of_once_and_the_updates_are_made(tmp_path):
    _, batch, watchdog = make(tmp_path, action="skip")
    with pytest.warns(UserWarning, match="update 120: the loss is .* try a third of it") as warned:
        assert all(losses_of(watchdog, batch, [*EXPLOSION, *[20.0] * 40]))
    assert len(warned) == 1
    assert watchdog.num_skipped == 0
    assert report_of(tmp_path, 120)["action"] == "skip"


def test_the_loss_of_an_update_is_the_mean_of_its_micro_batches(tmp_path):
    """One of two is 15 times as large, so that both together are 8 times."""
    _, batch, watchdog = make(tmp_path)
    for step in range(1, 150):
        for factor in (1.0, 15.0 if step > 100 else 1.0):
            watchdog.record(batch, watchdog.compute_loss(batch) * factor)
        assert watchdog.check(step)


def test_updates_that_failed_are_no_part_of_an_explosion(tmp_path):
    _, batch, watchdog = make(tmp_path, action="skip", max_skips=100)
    factors = [1.0] * 100 + [math.inf, 20.0] * 19
    assert losses_of(watchdog, batch, factors) == [math.isfinite(factor) for factor in factors]
    with pytest.warns(UserWarning, match="for 20 updates"):
        losses_of(watchdog, batch, [20.0])


# Cost while all is finite


class CountsHostReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.count += "_local_scalar_dense" in name or "is_nonzero" in name
        return func(*args, **(kwargs or {}))


def test_one_host_read_for_each_update_and_no_hooks(tmp_path, monkeypatch):
    network, batch, watchdog = make(tmp_path)
    monkeypatch.setattr(trace, "Trace", None)
    with CountsHostReads() as reads:
        for _ in range(3):
            loss = watchdog.compute_loss(batch)
            loss.backward()
            watchdog.record(batch, loss)
    assert reads.count == 0
    tolists = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: tolists.append(self.shape) or [0.0, 0.0])
    with CountsHostReads() as reads:
        assert watchdog.check(1)
    assert reads.count == 0
    assert tolists == [(2,)]
    assert not (tmp_path / "evidence").exists()


def test_a_norm_that_clipping_computed_is_used(tmp_path):
    network, batch, watchdog = make(tmp_path, action="skip")
    assert not update(watchdog, batch, grad_norm=torch.tensor(math.nan))
    loss = watchdog.compute_loss(batch)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), 1e9)
    torch.testing.assert_close(gradient_norm(network), norm)
    torch.testing.assert_close(norm, torch.cat([p.grad.flatten() for p in network.parameters()]).norm())
    watchdog.record(batch, loss)
    assert watchdog.check(1, grad_norm=norm)


# Mixed precision


def test_infinite_gradients_are_left_to_the_scaler_until_its_scale_is_down(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, backoff_factor=0.5)
    network, batch, watchdog = make(tmp_path, scaler=scaler)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network.blocks[1][2].broken = True
    before = copy.deepcopy(network.state_dict())

    def scaled_update(step):
        loss = watchdog.compute_loss(batch)
        scaler.scale(loss).backward()
        watchdog.record(batch, loss)
        assert watchdog.check(step)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    scaled_update(1)
    scaled_update(2)
    assert scaler.get_scale() == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(NonFiniteError, match="input of 'blocks.1.2'"):
        scaled_update(3)


def test_a_loss_that_is_not_finite_is_never_left_to_the_scaler(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    network, batch, watchdog = make(tmp_path, scaler=scaler)
    network.blocks[1][1].broken = True
    with pytest.raises(NonFiniteError, match="'blocks.1.1'"):
        update(watchdog, batch)


# Several processes


WORKER = """
import os, sys, math, torch
import torch.distributed as dist
from datetime import timedelta
from pathlib import Path
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from diffusers_mp.training.watchdog import NonFiniteError, Watchdog

class Breaks(nn.Module):
    how = None
    def forward(self, x):
        if self.how == "forward":
            return x * math.inf
        return x + torch.sqrt(x - x) if self.how == "backward" else x + 0

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=1200))
rank = dist.get_rank()
for engine in ("ddp", "fully_shard"):
    for how in ("forward", "backward", "loss"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 4), Breaks(), nn.Linear(4, 2))
        if engine == "ddp":
            model = DistributedDataParallel(network)
        else:
            model = fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
        # "loss": a term without a gradient, so that only the process that adds it sees anything.
        compute_loss = lambda x: model(x).square().mean() + (math.inf if network[1].how == "loss" else 0)
        folder = Path(sys.argv[1]) / f"{engine}-{how}"
        watchdog = Watchdog(model, folder, compute_loss, action="skip", max_skips=2, save_weights=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(3, 4) + rank
        decisions = []
        for step in range(1, 5):
            # Only the second process breaks, and only in update 2.
            network[1].how = how if rank == 1 and step == 2 else None
            loss = compute_loss(x)
            loss.backward()
            watchdog.record(x, loss)
            decisions.append(watchdog.check(step))
            if decisions[-1]:
                optimizer.step()
            optimizer.zero_grad()
        assert decisions == [True, False, True, True], decisions
        weights = [p.full_tensor() if engine != "ddp" else p for p in network.parameters()]
        assert all(w.isfinite().all() for w in weights)
        total = torch.stack([w.detach().double().sum() for w in weights])
        others = [torch.zeros_like(total) for _ in range(2)]
        dist.all_gather(others, total)
        assert torch.equal(*others)
        # All of them stop, the healthy one too.
        network[1].how = how if rank == 1 else None
        for step in (5, 6):
            loss = compute_loss(x)
            loss.backward()
            watchdog.record(x, loss)
            try:
                assert not watchdog.check(step)
            except NonFiniteError as error:
                assert step == 6, step
                words = "the loss is not finite, though" if how == "loss" else "'1' (Breaks)"
                assert words in str(error) and "process 1" in str(error), error
            else:
                assert step == 5, step
# A loss that explodes on one process stops all.
network = nn.Linear(4, 1)
watchdog = Watchdog(network, Path(sys.argv[1]) / "explosion", lambda x: network(x).square().mean())
x = torch.ones(2, 4)
for step in range(1, 121):
    watchdog.record(x, watchdog.compute_loss(x) * (20 if rank == 1 and step > 100 else 1))
    try:
        assert watchdog.check(step)
    except NonFiniteError as error:
        assert step == 120 and "has been above 10 times" in str(error), error
    else:
        assert step < 120
print("done", rank)
dist.barrier()
sys.stdout.flush()
# gloo's threads now and then abort the process while it is torn down ("terminate called without an active exception").
os._exit(0)
"""


def test_two_processes_decide_together(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    assert run_processes(script, tmp_path).count("done") == 2
    for engine in ("ddp", "fully_shard"):
        folder = tmp_path / f"{engine}-forward" / "step-0000002"
        report = json.loads((folder / "report.json").read_text())
        assert "'1' (Breaks)" in report["message"]
        assert len(report["processes"]) == 2
        assert torch.equal(
            load_file(folder / "weights.safetensors")["0.weight"].isfinite(), torch.ones(4, 4, dtype=torch.bool)
        )
        assert (folder / "batch-process1-0.safetensors").is_file()
    assert {path.name for path in (tmp_path / "explosion" / "step-0000120").iterdir()} == {
        *("report.json", "batch-process0-0.safetensors", "batch-process1-0.safetensors"),
    }
    # Under DDP gradients are not exchanged in the search, so that the healthy process finds nothing.
    assert not (tmp_path / "ddp-backward" / "step-0000002" / "batch-process0-0.safetensors").exists()


# Errors


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="`action` must be 'stop' or 'skip', got 'warn'"):
        make(tmp_path, action="warn")
    with pytest.raises(ValueError, match="`max_skips` must be at least 1, got 0"):
        make(tmp_path, max_skips=0)


def test_a_loss_without_gradient(tmp_path):
    network = nn.Linear(4, 1).requires_grad_(False)
    watchdog = Watchdog(network, tmp_path, lambda x: F.relu(network(x)).mean())
    watchdog.record(torch.ones(2, 4), watchdog.compute_loss(torch.ones(2, 4)))
    assert watchdog.check(1)
    bad = torch.full((2, 4), math.inf)
    watchdog.record(bad, watchdog.compute_loss(bad) * math.nan)
    with pytest.raises(NonFiniteError):
        watchdog.check(2)
