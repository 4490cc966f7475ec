"""The values that a swapped map hands on."""

import pytest
import torch

from diffusers_mp import fused
from diffusers_mp.rotation_swap import ModulationMaps, Rotation


def rotation(batch=2, dim=6, shift=False):
    return Rotation(torch.randn(batch, dim // 2), torch.randn(batch, dim) if shift else None)


@pytest.mark.parametrize("shift", [False, True])
def test_addition_shifts_and_then_rotates(shift):
    value, tokens = rotation(shift=shift), torch.randn(2, 4, 6)
    shifted = tokens + value.shift[:, None] if shift else tokens
    expected = fused.rotate(shifted, value.angle)
    for indexed in (value[:, None], value[:, None, :], value.unsqueeze(1), value.unsqueeze(dim=1)):
        assert torch.equal(tokens + indexed, expected)
        assert torch.equal(tokens.add(indexed), expected)
    assert torch.equal(value[:, None].added_to(tokens), expected)
    if not shift:
        torch.testing.assert_close(expected.norm(dim=-1), tokens.norm(dim=-1))


def test_gradients_flow_through_addition():
    angle, shift = torch.randn(2, 3, requires_grad=True).double(), torch.randn(2, 6, requires_grad=True).double()
    tokens = torch.randn(2, 4, 6, requires_grad=True).double()
    assert torch.autograd.gradcheck(lambda x, a, h: x + Rotation(a, h)[:, None], (tokens, angle, shift))


@pytest.mark.parametrize("shift", [False, True])
def test_samples_and_choices(shift):
    value = rotation(batch=4, shift=shift)
    assert value.size(0) == 4
    first, second = value[:2], value[2:]
    assert torch.equal(second.angle, value.angle[2:])
    index = torch.tensor([[0, 1, 0], [1, 1, 0]])[..., None]
    chosen = torch.where(index == 0, first.unsqueeze(1), second.unsqueeze(1))
    tokens = torch.randn(2, 3, 6)
    result = tokens + chosen
    for batch in range(2):
        for place in range(3):
            one = (first, second)[index[batch, place, 0]][batch]
            expected = one.added_to(tokens[batch, place])
            torch.testing.assert_close(result[batch, place], expected)


@pytest.mark.parametrize(
    "operation, message",
    [
        (lambda x, r: x * r, "unsupported operand"),
        (lambda x, r: x.sub(r), "can only be added to tokens, got it as an argument of `sub`"),
        (lambda x, r: torch.mul(r, x), "can only be added to tokens, got it as an argument of `mul`"),
        (lambda x, r: torch.cat([x, r]), "can only be added to tokens, got it as an argument of `cat`"),
        (lambda x, r: torch.add(x, r, alpha=2), "can only be added to tokens, got it as an argument of `add`"),
        (lambda x, r: torch.where(x > 0, r, r, out=x), "can only be added to tokens"),
        # In the place of a scale.
        (lambda x, r: x * (1 + r), "unsupported operand"),
        (lambda x, r: torch.cat([ModulationMaps([x, r])]), "must be chunked first, got them as an argument of `cat`"),
        (lambda x, r: x + ModulationMaps([x, r]), "unsupported operand"),
    ],
)
def test_anything_else_is_refused(operation, message):
    with pytest.raises(TypeError, match=message):
        operation(torch.randn(2, 4, 6), rotation()[:, None])


def test_maps_chunk_like_a_tensor():
    rows = torch.randn(2, 24)
    maps = list(rows.chunk(6, dim=-1))
    maps[0], maps[3] = rotation(), rotation()
    value = ModulationMaps(maps)
    assert value.chunk(6, dim=1) == tuple(maps)
    assert torch.chunk(value, 6, dim=1) == tuple(maps)
    assert torch.chunk(value, chunks=6, dim=-1) == tuple(maps)
    halves = value.chunk(2, dim=-1)
    assert halves[1].chunk(3, dim=-1) == tuple(maps[3:])
    shift, scale, _ = value[:, None].chunk(6, dim=-1)[:3]
    assert shift.angle.shape == (2, 1, 3)
    assert torch.equal(scale, maps[1][:, None])


@pytest.mark.parametrize("chunks, dim", [(4, 1), (9, 1), (6, 0), (2, 0)])
def test_maps_chunk_into_equal_groups_of_rows_only(chunks, dim):
    with pytest.raises(ValueError, match=f"`chunks` must divide the 6 maps .* got {chunks} and `dim` {dim}"):
        ModulationMaps([rotation()] * 6).chunk(chunks, dim)
