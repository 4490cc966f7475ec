"""Equations of `functional` that eager mode would cut into many passes over memory, forward and backward by hand.

Each function here reads and writes its big tensor as few times as PyTorch's operators allow and keeps for backward
only what is kept anyway. All but `unit_rows` can be differentiated twice, and by `torch.func`. `torch.compile` fuses
the plain formulas better than it does these, so `functional` uses them in eager mode only. docs/design/performance.md
has the numbers.
"""

import math

import torch
import torch.nn.functional as F


def _apply(function, with_forward_mode, *inputs):
    if not torch.is_grad_enabled():
        return function.forward(*inputs)
    # Dynamo takes no function with a derivative in forward mode.
    return (function if torch.compiler.is_compiling() else with_forward_mode).apply(*inputs)


class _ScaleRows(torch.autograd.Function):
    # y = r x with r = norm / ||x||, by row; keeps y, which attention keeps too, rather than x.

    @staticmethod
    def forward(x, norm):
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        factor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=compute_dtype)
        # For zeros, which it leaves zero: below this bound squares lose their digits and then are zero.
        factor = factor.clamp(min=math.sqrt(torch.finfo(compute_dtype).tiny)).reciprocal_().mul_(norm)
        return (x * factor).to(x.dtype), factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.norm = inputs[1]
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, grad_factor):
        # dy = r (dx - y (y.dx) / norm^2),   dr = -r^2 (y.dx) / norm^2; both are symmetric.
        y, factor = ctx.saved_tensors
        grad_x = None
        if grad is not None:
            along = (grad * y).sum(dim=-1, keepdim=True, dtype=factor.dtype) / -(ctx.norm**2)
            grad_x = (torch.addcmul(grad, y, along.to(y.dtype)) * factor).to(y.dtype)
        if grad_factor is not None:
            through_factor = (y * (grad_factor * factor.square() / -(ctx.norm**2))).to(y.dtype)
            grad_x = through_factor if grad_x is None else grad_x + through_factor
        return grad_x, None


class _ScaleRowsForwardMode(_ScaleRows):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tangent, _):
        y, factor = ctx.saved_tensors
        along = (tangent * y).sum(dim=-1, keepdim=True, dtype=factor.dtype) / -(ctx.norm**2)
        tangent_y = (torch.addcmul(tangent, y, along.to(y.dtype)) * factor).to(y.dtype)
        return tangent_y, along * factor.square()


def scale_rows(x: torch.Tensor, norm: float) -> torch.Tensor:
    """Scale every row (last dimension) to a norm; an exactly zero row stays zero.

        y = norm x / ||x||

    Args:
        x (torch.Tensor): shape (..., n).
        norm (float): of the result's rows.
    Returns:
        torch.Tensor: shape and dtype of `x`.
    """
    return _apply(_ScaleRows, _ScaleRowsForwardMode, x, norm)[0]


class _PairMap(torch.autograd.Function):
    # Bilinear in x and in the two factors, and its own transpose with the cross factors swapped.

    @staticmethod
    def forward(x, direct, cross):
        if torch.compiler.is_compiling():
            return x * direct + x.flip(-2) * cross
        y = x * direct
        y.select(-2, 0).addcmul_(x.select(-2, 1), cross.select(-2, 0))
        y.select(-2, 1).addcmul_(x.select(-2, 0), cross.select(-2, 1))
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, direct, cross = ctx.saved_tensors
        grad_x = grad_direct = grad_cross = None
        if ctx.needs_input_grad[0]:
            grad_x = pair_map(grad, direct, cross.flip(-2))
        if ctx.needs_input_grad[1]:
            grad_direct = (grad * x).sum_to_size(direct.shape)
        if ctx.needs_input_grad[2]:
            of_half = (*cross.shape[:-2], cross.shape[-1])
            halves = ((grad.select(-2, i) * x.select(-2, 1 - i)).sum_to_size(of_half) for i in range(2))
            grad_cross = torch.stack(list(halves), dim=-2)
        return grad_x, grad_direct, grad_cross


class _PairMapForwardMode(_PairMap):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tangent_x, tangent_direct, tangent_cross):
        x, direct, cross = ctx.saved_tensors
        tangent = 0
        if tangent_x is not None:
            tangent = tangent + pair_map(tangent_x, direct, cross)
        if tangent_direct is not None:
            tangent = tangent + x * tangent_direct
        if tangent_cross is not None:
            tangent = tangent + x.flip(-2) * tangent_cross
        return tangent


def pair_map(x: torch.Tensor, direct: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """Mix the two members of every pair.

        y_0 = direct_0 x_0 + cross_0 x_1
        y_1 = direct_1 x_1 + cross_1 x_0
    A rotation after a scale s has direct = s cos(angle) and cross = (-s_1 sin(angle), s_0 sin(angle)).

    Args:
        x (torch.Tensor): shape (..., 2, D/2), the members of a pair along the last dimension but one.
        direct (torch.Tensor): shape (..., 2, D/2), broadcastable to that of `x`.
        cross (torch.Tensor): shape of `direct`.
    Returns:
        torch.Tensor: shape and dtype of `x`.
    """
    return _apply(_PairMap, _PairMapForwardMode, x, direct, cross)


class _ScaledSiLU(torch.autograd.Function):
    # Autograd would divide a gradient as wide as x, in a tensor of its own.

    @staticmethod
    def forward(x, scale):
        return F.silu(x).mul_(scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.scale = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad * _silu_slope(x, ctx.scale), None
        return torch.ops.aten.silu_backward(grad, x).mul_(ctx.scale), None


class _ScaledSiLUForwardMode(_ScaledSiLU):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tangent, _):
        (x,) = ctx.saved_tensors
        return tangent * _silu_slope(x, ctx.scale)


def _silu_slope(x: torch.Tensor, scale: float) -> torch.Tensor:
    sigmoid = torch.sigmoid(x)
    return scale * sigmoid * (1 + x * (1 - sigmoid))


def scaled_silu(x: torch.Tensor, scale: float) -> torch.Tensor:
    """SiLU times a constant.

        y = scale x sigmoid(x)

    Args:
        x (torch.Tensor): any shape.
        scale (float): the constant.
    Returns:
        torch.Tensor: shape and dtype of `x`.
    """
    return _apply(_ScaledSiLU, _ScaledSiLUForwardMode, x, scale)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(weight):
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        along = (grad * weight).sum(dim=-1, keepdim=True, dtype=torch.promote_types(weight.dtype, torch.float32))
        return torch.addcmul(grad, weight, along.to(grad.dtype), value=-1)


def unit_rows(weight: torch.Tensor) -> torch.Tensor:
    """Rows that are known to have norm 1: the weight as it is, with the gradient of `functional.unit_norm`.

        y = w,   gradient g - (g.w) w
    Can be differentiated once: the second derivative would need the norm that is taken for granted here.

    Args:
        weight (torch.Tensor): rows of norm 1, shape (m, n).
    Returns:
        torch.Tensor: the same values.
    """
    return _UnitRows.apply(weight)
