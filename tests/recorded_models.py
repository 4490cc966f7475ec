"""Models whose magnitudes are known, and a few updates of a tiny MPDiT with a recorder."""

import torch
from helpers import tiny_inputs
from torch import nn

from diffusers_mp import (
    MagnitudeRecorder,
    normalize_weights_,
    parameter_groups,
)
from diffusers_mp.modulation import Modulation


DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}


class Times(nn.Module):
    """A factor, and a count of calls."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([float(factor)]))
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        return x * self.factor


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Conditioned(nn.Module):
    def __init__(self, site):
        super().__init__()
        self.site = site

    def forward(self, hidden_states, conditioning):
        return self.site(hidden_states, conditioning=conditioning)


def site(kinds, rows, gains, **options):
    """A modulation whose maps of a one-hot conditioning vector are known: `rows` times its gains."""
    modulation = Modulation(4, 3, kinds, forced_weight_normalization=False, **options)
    with torch.no_grad():
        modulation.proj.weight.copy_(torch.as_tensor(rows))
        if modulation.gain is not None:
            modulation.gain.copy_(torch.as_tensor(gains))
    return modulation


def num_hooks(model, *optimizers):
    of_modules = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in of_modules) + sum(
        len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
        for optimizer in optimizers
    )


def train(model, num_updates, recorder_options=None, start=0, optimizer=None, watch=None):
    """Updates of a tiny MPDiT, with a recorder or a watch; its losses, and the recorder."""
    optimizer = optimizer or torch.optim.Adam(parameter_groups(model, lr=1e-2))
    recorder = MagnitudeRecorder(model, optimizer, **recorder_options) if recorder_options is not None else None
    losses = []
    for update in range(start + 1, start + num_updates + 1):
        inputs = tiny_inputs(seed=update)
        loss = (model(**inputs).sample - inputs["hidden_states"]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        normalize_weights_(model)
        losses.append(loss.item())
        for each in (recorder, watch):
            if each is not None:
                each.step()
    return losses, recorder


def floats(entry):
    return {name: value for name, value in entry.items() if "histogram" not in name}
