"""Which module is named as the first that is not finite, and that looking for it changes nothing."""

import copy
import math
import warnings

import pytest
import torch
from breaking import make, report_of, update
from helpers import tiny_inputs, tiny_model
from torch import nn

from diffusers_mp.training.watchdog import NonFiniteError, Watchdog


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "breaking, value, stage, named, words",
    [
        (lambda n: n.blocks[0][1], True, "forward", ("blocks.0.1", "output"), "not finite is 'blocks.0.1'"),
        (lambda n: n.blocks[1][1], True, "forward", ("blocks.1.1", "output"), r"\(BreaksForward\)"),
        (lambda n: n.blocks[1][2], True, "backward", ("blocks.1.2", "input"), "input of 'blocks.1.2'.* whose"),
        (lambda n: n.blocks[0][2], True, "backward", ("blocks.0.2", "input"), r"\(BreaksBackward\)"),
        # The arithmetic of a module itself: the next module starts with it, or the gradient of the one before does.
        (lambda n: n.blocks[0][3], "forward", "forward", ("blocks.0.3.second", "output"), "was not finite already"),
        (lambda n: n.blocks[0][3], "backward", "backward", ("blocks.0.3.first", "output"), "made by what follows"),
    ],
)  # fmt: skip
def test_the_first_module_is_named(tmp_path, breaking, value, stage, named, words, checkpointing):
    network, batch, watchdog = make(tmp_path, checkpointing)
    assert update(watchdog, batch)
    breaking(network).broken = value
    with pytest.raises(NonFiniteError, match=rf"update 7: .*{words}.*process 0, micro batch 0.*evidence in"):
        update(watchdog, batch)
    (process,) = report_of(tmp_path)["processes"]
    first = process["first"]
    assert (first["stage"], first["module"], first["value"]) == (stage, *named)
    if "already" in words:
        assert (first["input_was_finite"], first["called_by"]) == (False, "blocks.0.3")
    elif stage == "forward":
        assert (first["input_was_finite"], first["called_by"]) == (True, named[0][: len("blocks.0")])


def test_a_loss_that_no_module_spoiled(tmp_path):
    network, batch, watchdog = make(tmp_path)
    batch["y"][1] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"loss is not finite, though the output of every module is; the batch .* \['y'\]"
    ):
        update(watchdog, batch)
    assert report_of(tmp_path)["processes"][0]["losses"] == ["nan"]


def test_a_batch_that_is_not_finite(tmp_path):
    network, batch, watchdog = make(tmp_path)
    batch["x"][1, 2] = math.inf
    with pytest.raises(
        NonFiniteError, match=r"'enter' \(Linear\), whose input was not finite already; the batch itself .* \['x'\]"
    ):
        update(watchdog, batch)


def test_a_gradient_of_a_parameter_alone(tmp_path):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x + self.scale.sqrt() * 0

    network = nn.Sequential(nn.Linear(4, 4), Scale(), nn.Linear(4, 1))
    watchdog = Watchdog(network, tmp_path, lambda x: network(x).square().mean())
    with pytest.raises(NonFiniteError, match=r"that of the parameter '1.scale' of '1' \(Scale\)"):
        update(watchdog, torch.randn(3, 4))


def test_a_norm_that_overflows(tmp_path):
    network = nn.Linear(4, 1)
    watchdog = Watchdog(network, tmp_path, lambda x: network(x).mean() * 1e38)
    with pytest.raises(NonFiniteError, match="norm of the gradients is inf, though each of them is finite"):
        update(watchdog, torch.full((3, 4), 3.0))


def test_a_failure_that_does_not_come_again(tmp_path):
    network, batch, watchdog = make(tmp_path)
    network.blocks[0][1].broken = True
    loss = watchdog.compute_loss(batch)
    loss.backward()
    watchdog.record(batch, loss)
    network.blocks[0][1].broken = False
    with pytest.raises(NonFiniteError, match="loss is nan and .* running the batch again did not reproduce"):
        watchdog.check(7)


def test_modules_of_this_package(tmp_path):
    model, inputs = tiny_model().train(), tiny_inputs()
    watchdog = Watchdog(model, tmp_path, lambda batch: model(**batch).sample.square().mean())
    assert update(watchdog, inputs)
    model.transformer_blocks[1].ff.act.forward = lambda x: x * math.nan
    with pytest.raises(NonFiniteError, match=r"is 'transformer_blocks.1.ff.act' \(MPSiLU\)"):
        update(watchdog, inputs)


def test_sparse_gradients_and_a_compiled_model(tmp_path):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.map = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 1)

        def forward(self, ids):
            return self.map(self.table(ids))

    network = Table()
    with warnings.catch_warnings():
        # PyTorch's own, on importing its compiler.
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(network, backend="eager")
        ids = torch.tensor([0, 1, 1])
        watchdog = Watchdog(compiled, tmp_path, lambda ids: compiled(ids).square().mean())
        assert update(watchdog, ids)
        with torch.no_grad():
            network.table.weight[1] = math.inf
        with pytest.raises(NonFiniteError, match=r"'table' \(Embedding\), as are its parameters \['weight'\]"):
            update(watchdog, ids)


def test_looking_for_the_module_changes_nothing_else(tmp_path):
    """Random state, buffers and hooks are as before, gradients are gone."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.map = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)

        def forward(self, x):
            return self.map(self.drop(self.norm(x)))

    network = Noisy()
    watchdog = Watchdog(network, tmp_path, lambda x: network(x).mean() * math.inf, action="skip")
    x = torch.randn(8, 4)
    loss = watchdog.compute_loss(x)
    loss.backward()
    watchdog.record(x, loss)
    random_state, buffers = torch.get_rng_state(), copy.deepcopy(dict(network.named_buffers()))
    assert not watchdog.check(1)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for parameter in network.parameters():
        assert parameter.grad is None
        assert not parameter._backward_hooks
