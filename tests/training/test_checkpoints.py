"""Checkpoints with every kind of optimiser; runs that are killed and resumed are those of test_resume_kills.py."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import NOT_IN_DEV, reset_accelerate

from diffusers_mp import MPLinear, PowerFunctionEMA, normalize_weights_, pin_weight_norms_
from diffusers_mp.optimization import MuonWithAdam, inverse_sqrt_schedule
from diffusers_mp.training import (
    TrainingState,
    checkpoints,
    find_checkpoints,
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
)


def muon_with_adam(parameters, lr):
    hidden, ends = list(parameters)[:1], list(parameters)[1:]
    return MuonWithAdam([{"params": hidden, "muon": True}, {"params": ends, "muon": False}], lr)


def eight_bits(parameters, lr):
    return pytest.importorskip("bitsandbytes.optim", reason=NOT_IN_DEV).AdamW8bit(parameters, lr, min_8bit_size=1)


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
    "SGD, momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
    "Muon": torch.optim.Muon,
    "MuonWithAdam": muon_with_adam,
    "NAdam": torch.optim.NAdam,
}


class Run:
    def __init__(self, make_optimizer):
        self.accelerator = Accelerator(cpu=True)
        model = torch.nn.Sequential(MPLinear(8, 8), MPLinear(8, 4))
        optimizer = make_optimizer([layer.weight for layer in model], lr=0.1)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(
            model, optimizer, inverse_sqrt_schedule(optimizer, 2, 4)
        )
        self.ema = PowerFunctionEMA(self.model)

    @property
    def state(self):
        return TrainingState(self.model, self.optimizer, self.schedule, self.ema)

    def train(self, start, stop):
        for step in range(start, stop):
            inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(step))
            self.model(inputs).tanh().square().sum().backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            normalize_weights_(self.model)
            self.ema.update(step + 1)


@pytest.fixture(autouse=True)
def _new_accelerate():
    yield
    reset_accelerate()


@pytest.mark.parametrize("name", [*OPTIMIZERS, pytest.param("AdamW8bit", marks=pytest.mark.filterwarnings("ignore"))])
@pytest.mark.parametrize("saved_at", [0, 3])
def test_a_run_goes_on_as_if_it_had_not_stopped(name, saved_at, tmp_path):
    make_optimizer = OPTIMIZERS.get(name, eight_bits)
    straight, first = Run(make_optimizer), Run(make_optimizer)
    first.model.load_state_dict(straight.model.state_dict())
    first.ema = PowerFunctionEMA(first.model)
    straight.train(0, 6)
    first.train(0, saved_at)
    checkpoint = save_checkpoint(first.accelerator, tmp_path, saved_at, first.state, facts={})
    second = Run(make_optimizer)
    assert not torch.equal(second.model[0].weight, first.model[0].weight)
    load_checkpoint(second.accelerator, checkpoint, second.state)
    second.train(saved_at, 6)
    for name, weight in straight.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weight), name
    for std in straight.ema.stds:
        averages = [run.ema.state_dict()["averages"][run.ema.stds.index(std)] for run in (second, straight)]
        for name in straight.model.state_dict():
            assert torch.equal(*(average[name] for average in averages)), name


class PinnedRun(Run):
    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4, bias=False))
        self.report = pin_weight_norms_(self.model)
        optimizer = make_optimizer(self.model.parameters(), lr=0.1)
        self.optimizer, self.schedule = self.accelerator.prepare(optimizer, inverse_sqrt_schedule(optimizer, 2, 4))
        self.ema = PowerFunctionEMA(self.model)


def test_pinned_norms_are_those_of_the_checkpoint(tmp_path):
    straight = PinnedRun(torch.optim.Adam)
    norms = straight.report.state_dict()
    straight.train(0, 3)
    checkpoint = save_checkpoint(straight.accelerator, tmp_path, 3, straight.state, facts={})
    straight.train(3, 6)
    # Weights that are drawn anew, and norms of theirs.
    second = PinnedRun(torch.optim.Adam)
    load_checkpoint(second.accelerator, checkpoint, second.state)
    second.train(3, 6)
    for name, weight in straight.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weight), name
    for name, of_weight in norms.items():
        torch.testing.assert_close(straight.model.get_parameter(name).norm(dim=1), of_weight, rtol=4e-6, atol=0)


@pytest.mark.parametrize("total_limit, left", [(1, [25]), (2, [25, 30]), (3, [20, 25, 30]), (None, [10, 20, 25, 30])])
def test_the_new_checkpoint_stays_among_later_ones(total_limit, left, tmp_path):
    run = Run(torch.optim.SGD)
    for step in (10, 20, 30):
        save_checkpoint(run.accelerator, tmp_path, step, run.state, facts={})
    # As of a run that was resumed from step 20.
    saved = save_checkpoint(run.accelerator, tmp_path, 25, run.state, facts={}, total_limit=total_limit)
    assert saved.name == "checkpoint-25"
    assert [path.name for path in find_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_before_older_ones_go(tmp_path, monkeypatch):
    run, events = Run(torch.optim.Adam), []
    save_checkpoint(run.accelerator, tmp_path, 1, run.state, facts={})
    sync, rename, rmtree = checkpoints.sync, Path.rename, shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "sync", lambda path: (sync(path), events.append(("sync", path))))
        patch.setattr(Path, "rename", lambda path, to: (events.append(("rename", path)), rename(path, to))[1])
        patch.setattr(shutil, "rmtree", lambda path: (events.append(("rmtree", path)), rmtree(path)))
        saved = save_checkpoint(run.accelerator, tmp_path, 2, run.state, facts={}, total_limit=1)
    unfinished = tmp_path / "checkpoint-2.unfinished"
    renamed = events.index(("rename", unfinished))
    synced = {path for what, path in events[:renamed] if what == "sync"}
    assert {unfinished / path.relative_to(saved) for path in (saved, *saved.rglob("*"))} == synced
    assert events[renamed + 1 :] == [("sync", tmp_path), ("rmtree", tmp_path / "checkpoint-1")]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("sha256", "sha257", 1),
        lambda text: text.replace("num_bytes", "num_bxtes", 1),
        lambda text: "[]",
        lambda text: "null",
        lambda text: '{"training_state.json": null}',
        lambda text: "{}",
    ],
    ids=["sha256", "num_bytes", "list", "null", "null of a file", "empty"],
)
def test_a_damaged_manifest_is_passed_over(damage, tmp_path, caplog):
    run = Run(torch.optim.SGD)
    good, bad = (save_checkpoint(run.accelerator, tmp_path, step, run.state, facts={}) for step in (1, 2))
    manifest = bad / "manifest.json"
    manifest.write_text(damage(manifest.read_text()))
    assert resolve_checkpoint("latest", tmp_path) == good
    assert "checkpoint-2 is damaged, going back to the one before it: manifest.json" in caplog.text
    with pytest.raises(ValueError, match=r"`--resume_from_checkpoint checkpoint-2` is damaged: manifest\.json"):
        resolve_checkpoint("checkpoint-2", tmp_path)
    # Before Accelerate is initialised, as ablate.py looks for checkpoints.
    reset_accelerate()
    assert resolve_checkpoint("latest", tmp_path) == good
