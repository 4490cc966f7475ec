"""Networks that break when they are told to, and a watchdog on one of them."""

import json
import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_mp.training.watchdog import Watchdog


class BreaksForward(nn.Module):
    """The identity, until it is told to break."""

    broken = False

    def forward(self, x):
        return x / (x - x) if self.broken else x + 0


class BreaksBackward(nn.Module):
    """Output 0, gradient infinity times 0: finite forward, not finite backward."""

    broken = False

    def forward(self, x):
        return x + torch.sqrt(x - x) if self.broken else x + 0


class Between(nn.Module):
    """Two maps with arithmetic of its own between them."""

    broken = None

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        if self.broken == "forward":
            x = x * math.inf
        if self.broken == "backward":
            x = x + torch.sqrt(x - x)
        return self.second(x)


class Network(nn.Module):
    def __init__(self, checkpointing=False):
        super().__init__()
        self.checkpointing = checkpointing
        self.enter = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), BreaksForward(), BreaksBackward(), Between()) for _ in range(2)
        )
        self.leave = nn.Linear(4, 1)

    def forward(self, x, labels=None):
        x = self.act(self.enter(x))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return {"out": (self.leave(x),)}


def make(tmp_path, checkpointing=False, **more):
    torch.manual_seed(0)
    network = Network(checkpointing)

    def compute_loss(batch):
        return (network(batch["x"], labels=batch["labels"])["out"][0] - batch["y"]).square().mean()

    batch = {"x": torch.randn(3, 4), "y": torch.randn(3, 1), "labels": torch.arange(3), "name": "a"}
    return network, batch, Watchdog(network, tmp_path / "evidence", compute_loss, **more)


def update(watchdog, batch, step=7, **more):
    loss = watchdog.compute_loss(batch)
    loss.backward()
    watchdog.record(batch, loss)
    return watchdog.check(step, **more)


def report_of(tmp_path, step=7):
    return json.loads((tmp_path / "evidence" / f"step-{step:07d}" / "report.json").read_text())
