"""Equations of `functional` in few passes over memory, for eager mode: the same names, arguments and results.

PyTorch's operators would cut the formulas into many passes. Each function here reads and writes its big tensor as few
times as they allow, and keeps for backward only what is kept anyway. All can be differentiated twice. Where something
looks on that needs formulas, such as a compiler, those of `functional` are run, but for the gradients of rows in
compiled training. docs/design/performance.md has the numbers.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd import Function, forward_ad

from . import functional
from .functional import compute_dtype


# PyTorch's operators without a public name, each with the formula that it stands for.
PRIVATE_OPERATORS = {
    # Derivative of `norm rows / ||rows||` by rows of these lengths: in one operator what `_across` does in four.
    torch.ops.aten._weight_norm_interface_backward.default: lambda grad, rows, norm, lengths, dim: (
        (grad - rows * (grad * rows).sum(-1, keepdim=True) / lengths**2) * norm / lengths,
        (grad * rows).sum(-1, keepdim=True) / lengths,
    ),
}
(_derivative_of_weight_norm,) = PRIVATE_OPERATORS
# Where the operators above have a kernel; and where RMS norms have one that takes less time than the formula does.
KERNELS_OF_ROWS, KERNELS_OF_NORMS = {"cpu", "cuda"}, {"cuda"}


def is_transformed() -> bool:
    """Whether derivatives are taken forwards, or by a transform of `torch.func`, whatever else is done."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def formulas_rule() -> bool:
    """Whether to run plain formulas: they are compiled, exported, traced, differentiated forwards or transformed."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or is_transformed()
    )


def _differentiable(formula, inputs, grad, ctx):
    # Gradients that can be differentiated. Other names for the same values: a scale that is made of the tokens is not
    # to be followed back to them.
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    wanted = [tensor for tensor in aliases if tensor is not None and tensor.requires_grad]
    grads = iter(torch.autograd.grad(formula(*aliases), wanted, grad, create_graph=True))
    return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Rounded in the operator that multiplies; a compiler does so by itself.
    if torch.compiler.is_compiling() or torch.result_type(a, b) is dtype:
        return (a * b).to(dtype)
    return torch.mul(a, b, out=torch.empty(torch.broadcast_shapes(a.shape, b.shape), dtype=dtype, device=a.device))


# Rows


def _across(grad: torch.Tensor, rows: torch.Tensor, norm: float, where: torch.Tensor | None = None) -> torch.Tensor:
    # The part of a gradient that is orthogonal to rows of that norm: grad - rows (rows.grad) / norm^2; of others, all.
    along = (grad * rows).sum(dim=-1, keepdim=True, dtype=compute_dtype(rows.dtype))
    along = along if where is None else along * where
    return torch.addcmul(grad, rows, along.to(rows.dtype), value=-1 / norm**2)


def _has_kernel(grad: torch.Tensor, rows: torch.Tensor) -> bool:
    # It has no derivative and no rules for subclasses, takes factors of half-precision rows in half precision, does
    # not look at strides, and cannot be fused with what surrounds it.
    return (
        not torch.compiler.is_compiling()
        and grad.device.type in KERNELS_OF_ROWS
        and grad.dtype in functional.SMALLEST_NORMS
        and type(grad) is torch.Tensor
        and rows.is_contiguous()
        and not torch.is_grad_enabled()
    )


def _by_hand() -> bool:
    """Whether rows take the derivatives below: in eager mode, and in compiled training.

    Compiled formulas would keep what is scaled beside what comes of it, and normalise trusted rows.
    """
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # Within a transform, Dynamo holds what a function has saved for constants, or drops its backward.
        return not torch._C._are_functorch_transforms_active()
    return not formulas_rule()


class _ScaleRows(Function):
    # y = r x with r = norm / ||x||, by row, and r = 1 for smaller rows if they are `capped`; keeps y, which attention
    # keeps too, rather than x.

    @staticmethod
    def forward(ctx, x, norm, capped):
        factor = (functional.cap_factors if capped else functional.row_factors)(x, norm)
        y = _product(x, factor, x.dtype)
        ctx.norm, ctx.capped = norm, capped
        ctx.save_for_backward(y, factor)
        ctx.set_materialize_grads(False)
        return y, factor

    @staticmethod
    def backward(ctx, grad, grad_factor):
        # dy = r (dx - y (y.dx) / norm^2),   dr = -r^2 (y.dx) / norm^2; both are symmetric. Rows left alone: dy = dx.
        y, factor = ctx.saved_tensors
        grad_x, scaled = None, factor < 1 if ctx.capped else None
        if grad is not None:
            if scaled is None and _has_kernel(grad, y):
                # What it takes for the length of a row is that of y, and for its factor, r times that.
                rows, factors = y.view(-1, y.shape[-1]), factor.view(-1, 1)
                norms, grad = torch.full_like(factors, ctx.norm), grad.contiguous().view(rows.shape)
                grad_x = _derivative_of_weight_norm(grad, rows, factors * ctx.norm, norms, 0)[0]
                grad_x = grad_x.view_as(y)
            else:
                grad_x = _product(_across(grad, y, ctx.norm, scaled), factor, y.dtype)
        # Of a second derivative; a compiled backward is given zeros.
        if grad_factor is not None and not torch.compiler.is_compiling():
            grad_factor = grad_factor * factor.square() / -(ctx.norm**2)
            through_factor = (y * (grad_factor if scaled is None else grad_factor * scaled)).to(y.dtype)
            grad_x = through_factor if grad_x is None else grad_x + through_factor
        return grad_x, None, None


def cap_magnitude(x: torch.Tensor, max_magnitude: float) -> torch.Tensor:
    """`functional.cap_magnitude`."""
    if _by_hand():
        return _ScaleRows.apply(x, max_magnitude * math.sqrt(x.shape[-1]), True)[0]
    return functional.cap_magnitude(x, max_magnitude)


def unit_norm(x: torch.Tensor) -> torch.Tensor:
    """`functional.unit_norm`."""
    return _ScaleRows.apply(x, 1.0, False)[0] if _by_hand() else functional.unit_norm(x)


def unit_magnitude(x: torch.Tensor) -> torch.Tensor:
    """`functional.unit_magnitude`."""
    if x.device.type in KERNELS_OF_NORMS and not formulas_rule():
        # Autocast would make it float32.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, x.shape[-1:], eps=torch.finfo(compute_dtype(x.dtype)).tiny)
    return _ScaleRows.apply(x, math.sqrt(x.shape[-1]), False)[0] if _by_hand() else functional.unit_magnitude(x)


@functools.cache
def _ones(rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.ones(rows, 1, dtype=dtype, device=device)


class _UnitRows(Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        if _has_kernel(grad, weight):
            ones = _ones(len(weight), weight.dtype, weight.device)
            return _derivative_of_weight_norm(grad.contiguous(), weight, ones, ones, 0)[0]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return _across(grad, weight, 1.0)
        # A second derivative needs the norm that is taken for granted here.
        along_rows = _across(grad, functional.unit_norm(weight), 1.0)
        return (along_rows * functional.row_factors(weight, 1.0)).to(weight.dtype)


def unit_rows(weight: torch.Tensor) -> torch.Tensor:
    """`functional.unit_norm` of rows that are known to have norm 1: the weight as it is, with the same derivatives.

        y = w,   gradient g - (g.w) w

    Args:
        weight (torch.Tensor): rows of norm 1, shape (m, n).
    Returns:
        torch.Tensor: the same values; to rounding where the formula is run.
    """
    if not torch.is_grad_enabled():
        return weight
    return _UnitRows.apply(weight) if _by_hand() else functional.unit_norm(weight)


# Modulation


@functools.lru_cache(maxsize=64)
def _layout(sizes, constants, device, dtype, fake_mode):
    # Parts as blocks of one width: constant and number of the part of each block, and which blocks make a part. By
    # mode too, since a fake tensor is of no use outside the mode that made it.
    width = math.gcd(*sizes)
    parts = [part for part, size in enumerate(sizes) for _ in range(size // width)]
    constant = torch.tensor([[constants[part]] for part in parts], dtype=dtype, device="cpu")
    number = torch.tensor(parts, device="cpu")
    makes = (number == torch.arange(len(sizes), device="cpu").unsqueeze(-1)).to(compute_dtype(dtype))
    return width, *(each.to(device, non_blocking=True) for each in (constant, number, makes))


class _GainedParts(Function):
    # All parts in one operator each way.

    @staticmethod
    def forward(ctx, projected, gain, sizes, constants):
        width, constant, number, makes = _layout(
            sizes, constants, gain.device, gain.dtype, getattr(gain, "fake_mode", None)
        )
        of_blocks = gain.index_select(0, number).unsqueeze(-1)
        ctx.sizes, ctx.constants = sizes, constants
        ctx.save_for_backward(projected, gain, of_blocks, makes)
        blocks = projected.unflatten(-1, (-1, width))
        return torch.addcmul(constant, blocks, of_blocks).reshape(projected.shape)

    @staticmethod
    def backward(ctx, grad):
        projected, gain, of_blocks, makes = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(
                lambda projected, gain, *_: torch.cat(
                    functional.gained_parts(projected, gain, ctx.sizes, ctx.constants), -1
                ),
                (projected, gain, None, None),
                grad,
                ctx,
            )
        needs_projected, needs_gain, *_ = ctx.needs_input_grad
        grad_projected = grad_gain = None
        shape = *grad.shape[:-1], len(of_blocks), grad.shape[-1] // len(of_blocks)
        grad, blocks = grad.reshape(shape), projected.reshape(shape)
        if needs_projected:
            grad_projected = _product(grad, of_blocks, projected.dtype).reshape(projected.shape)
        if needs_gain:
            sums = _sum_to(grad * blocks, of_blocks.shape, makes.dtype).squeeze(-1)
            grad_gain = torch.mv(makes, sums).to(gain.dtype)
        return grad_projected, grad_gain, None, None


def gained_parts(
    projected: torch.Tensor, gain: torch.Tensor, sizes: Sequence[int], constants: Sequence[float]
) -> Sequence[torch.Tensor]:
    """`functional.gained_parts`; under autocast in the dtype of the gains."""
    if formulas_rule():
        return functional.gained_parts(projected, gain, sizes, constants)
    if gain.dtype.itemsize == 1:  # float8 of layerwise casting
        gain = gain.to(projected.dtype)
    return _GainedParts.apply(projected, gain, tuple(sizes), tuple(constants)).split(sizes, -1)


def _sum_to(x, shape, dtype):
    # Summed in float32 however long the sum is.
    padded = [1] * (x.ndim - len(shape)) + list(shape)
    dims = [dim for dim, size in enumerate(padded) if size == 1 != x.shape[dim]]
    return (x.sum(dims, keepdim=True, dtype=dtype) if dims else x.to(dtype)).reshape(shape)


def _factors(scale, angle, dtype):
    # 1 + scale, cosines and sines, as wide as half a token; both times the scale, as wide as one and in its dtype.
    angle = angle.to(compute_dtype(angle.dtype)).unsqueeze(-2)
    cos, sin = angle.cos(), angle.sin()
    if scale is None:
        scale = angle.new_ones(2, 1)
    else:
        scale = (1 + scale).to(angle.dtype).unflatten(-1, (2, -1))
    return scale, cos, sin, *(_product(scale, each, dtype).flatten(-2) for each in (cos, sin))


def _turn(x, direct, first_sin, second_sin, sign):
    y, (x_first, x_second) = x * direct, x.chunk(2, -1)
    y_first, y_second = y.chunk(2, -1)
    y_first.addcmul_(x_second, second_sin, value=-sign)
    y_second.addcmul_(x_first, first_sin, value=sign)
    return y


class _ScaleRotate(Function):
    # y_first  = first  (s_first  cos) - second (s_second sin),   s = 1 + scale
    # y_second = second (s_second cos) + first  (s_first  sin)

    @staticmethod
    def forward(ctx, x, scale, angle):
        factors = _factors(scale, angle, x.dtype)
        ctx.save_for_backward(x, scale, angle, *factors)
        *_, direct, cross = factors
        return _turn(x, direct, *cross.chunk(2, -1), 1)

    @staticmethod
    def backward(ctx, grad):
        x, scale, angle, one_plus_scale, cos, sin, direct, cross = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(
                lambda x, scale, angle: functional.modulate(x, scale=scale, angle=angle), (x, scale, angle), grad, ctx
            )
        needs_x, needs_scale, needs_angle = ctx.needs_input_grad
        grad_x = grad_scale = grad_angle = None
        if needs_x:
            # The rotation back, then the scale.
            grad_x = _turn(grad, direct, *reversed(cross.chunk(2, -1)), -1)
        if needs_scale or needs_angle:
            # Sums over tokens of the products g_a x_b of halves, shape (..., 2, 2, D/2), then of R^T g in place of g.
            half = cos.shape[-1]
            products = grad.reshape(*grad.shape[:-1], 2, 1, half) * x.reshape(*x.shape[:-1], 1, 2, half)
            sums = _sum_to(products, (*cos.shape[:-2], 2, 2, half), cos.dtype)
            (first, across), (back, second) = (
                (sums[..., a, :, :] * cos).addcmul_(sums[..., 1 - a, :, :], sin, value=1 - 2 * a).unbind(-2)
                for a in (0, 1)
            )
            if needs_scale:
                grad_scale = torch.cat([first, second], -1).sum_to_size(scale.shape).to(scale.dtype)
            if needs_angle:
                s_first, s_second = one_plus_scale.unbind(-2)
                grad_angle = (s_first * back).addcmul_(s_second, across, value=-1)
                grad_angle = grad_angle.sum_to_size(angle.shape).to(angle.dtype)
        return grad_x, grad_scale, grad_angle


def _scale_rotate(x, scale, angle):
    if torch.is_grad_enabled():
        return _ScaleRotate.apply(x, scale, angle)
    *_, direct, cross = _factors(scale, angle, x.dtype)
    return _turn(x, direct, *cross.chunk(2, -1), 1)


def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """`functional.rotate`."""
    if formulas_rule():
        return functional.rotate(x, angle)
    return _scale_rotate(x, None, angle.unsqueeze(-2) if angle.ndim < x.ndim else angle)


def modulate(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    angle: torch.Tensor | None = None,
) -> torch.Tensor:
    """`functional.modulate`."""
    if formulas_rule():
        return functional.modulate(x, scale, shift, angle)
    if angle is not None:
        x = _scale_rotate(x, scale, angle)
        # A rotation of the few shifts instead of the many tokens.
        return x if shift is None else x.add_(_scale_rotate(shift, None, angle))
    if scale is None:
        return x if shift is None else x + shift.to(x.dtype)
    x = x * (1 + scale).to(x.dtype)
    return x if shift is None else x.add_(shift)


# Sums


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """`functional.mp_sum`."""
    if formulas_rule():
        return functional.mp_sum(a, b, t)
    scale = 1 / math.sqrt((1 - t) ** 2 + t**2)
    return torch.add(a * ((1 - t) * scale), b, alpha=t * scale)


class _CapGated(Function):
    # y = r (gate branch) with r = min(1, c / M[gate branch]); keeps the two, which are kept anyway, rather than y.

    @staticmethod
    def forward(ctx, branch, gate, max_magnitude):
        y = branch * gate
        ctx.max_magnitude, ctx.norm = max_magnitude, max_magnitude * math.sqrt(y.shape[-1])
        factor = functional.cap_factors(y, ctx.norm)
        ctx.save_for_backward(branch, gate, factor)
        return y.mul_(factor)

    @staticmethod
    def backward(ctx, grad):
        branch, gate, factor = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(
                lambda branch, gate, _: functional.cap_magnitude(branch * gate, ctx.max_magnitude),
                (branch, gate, None),
                grad,
                ctx,
            )
        y = (branch * gate).mul_(factor)
        grad = _across(grad, y, ctx.norm, factor < 1).mul_(factor)
        needs_branch, needs_gate, _ = ctx.needs_input_grad
        grad_gate = (grad * branch).sum_to_size(gate.shape).to(gate.dtype) if needs_gate else None
        return grad.mul_(gate).to(branch.dtype) if needs_branch else None, grad_gate, None


def gated_sum(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    t: float | None,
    max_magnitude: float | None = None,
) -> torch.Tensor:
    """`functional.gated_sum`."""
    if formulas_rule():
        return functional.gated_sum(x, branch, gate, t, max_magnitude)
    if gate is not None and gate.dtype is not branch.dtype:
        gate = gate.to(branch.dtype)
    if max_magnitude is not None:
        capped = cap_magnitude(branch, max_magnitude) if gate is None else _CapGated.apply(branch, gate, max_magnitude)
        return cap_magnitude(gated_sum(x, capped, None, t), max_magnitude)
    if gate is None:
        return x + branch if t is None else mp_sum(x, branch, t)
    if t is None:
        return (branch * gate).add_(x)
    scale = 1 / math.sqrt((1 - t) ** 2 + t**2)
    return (branch * (gate * (t * scale))).add_(x, alpha=(1 - t) * scale)
