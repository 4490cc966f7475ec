"""A small network with weights of every kind, and what its norms and weights are by hand."""

import torch
from torch import nn


def network(seed=0, dtype=torch.float32):
    """Maps of every kind, with what the rule leaves alone beside them."""
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {
            "patch": nn.Conv2d(3, 6, 2),
            "frames": nn.Conv3d(2, 4, 2, bias=False),
            "norm": nn.LayerNorm([4, 6]),
            "label": nn.Embedding(5, 6),
            "blocks": nn.ModuleList(
                nn.ModuleDict({"to_q": nn.Linear(6, 8), "to_out": nn.Linear(8, 6)}) for _ in range(2)
            ),
        }
    ).to(dtype)


MAPS = ["patch", "frames", "label", "blocks.0.to_q", "blocks.0.to_out", "blocks.1.to_q", "blocks.1.to_out"]
NAMES = [f"{name}.weight" for name in MAPS]


def norms_of(model, names, per):
    """In float64, by hand."""
    weights = {name: model.get_parameter(name).detach().double() for name in names}
    return {name: w.flatten(1).norm(dim=1) if per == "row" else w.norm() for name, w in weights.items()}


def assert_norms(found, expected, tolerance=4e-6):
    assert found.keys() == expected.keys()
    for name, norms in found.items():
        torch.testing.assert_close(norms, expected[name], rtol=tolerance, atol=0, msg=lambda text: f"{name}: {text}")  # noqa: B023


@torch.no_grad()
def update_(model, std=0.3, seed=7):
    """As an optimiser would, but larger."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_((std * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, state, names=None):
    for name, tensor in model.state_dict().items():
        if names is None or name in names:
            assert torch.equal(tensor, state[name]), name
