"""Equations of `functional` that eager mode would cut into many passes over memory, forward and backward by hand.

Each function here reads and writes its big tensor as few times as PyTorch's operators allow and keeps for backward
only what is kept anyway. All can be differentiated twice, and by `torch.func`, which is given the plain formulas.
Between two products of a model the caches are cold and a line of Python costs several times what it does in a loop of
its own: hence few calls, few questions, and functions of the older style, without `setup_context`.
docs/design/performance.md has the numbers.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch.autograd import Function, forward_ad


# Below these, squares lose their digits and then are zero. They keep rows of zeros as they are.
SMALLEST_NORMS = {dtype: math.sqrt(torch.finfo(dtype).tiny) for dtype in (torch.float32, torch.float64)}

_derivative_of_weight_norm = torch.ops.aten._weight_norm_interface_backward.default


def is_transformed() -> bool:
    """Whether `torch.func`, forward mode or a tracer looks on: they need formulas, without writes into views."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and (forward_ad._current_level >= 0 or torch.jit.is_tracing())


def _has_backward() -> bool:
    """Whether a derivative made by hand may be asked for, by `backward` alone."""
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        # Within a transform, Dynamo holds what a function has saved for constants, or drops its backward.
        return not torch._C._are_functorch_transforms_active()
    return not is_transformed()


def _eager(function: type[Function]):
    # Each without a layer of Python: forward looks for transforms, as the callers below have done; backward looks for
    # another form of itself.
    function._backward_cls.apply = function.backward
    return super(Function, function).apply


def _sums_in(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in SMALLEST_NORMS else torch.float32


def _across(grad: torch.Tensor, rows: torch.Tensor, norm: float) -> torch.Tensor:
    # The part of a gradient that is orthogonal to rows of that norm: grad - rows (rows.grad) / norm^2.
    along = (grad * rows).sum(dim=-1, keepdim=True, dtype=_sums_in(rows.dtype)) / -(norm**2)
    return torch.addcmul(grad, rows, along.to(rows.dtype))


def _has_kernel(grad: torch.Tensor, rows: torch.Tensor) -> bool:
    # PyTorch's derivative of weight normalisation does in one operator what `_across` does in four. It has no
    # derivative of its own and no rules for subclasses, takes factors of half-precision rows in half precision, and
    # does not look at strides.
    return (
        grad.is_cpu
        and grad.dtype in SMALLEST_NORMS
        and type(grad) is torch.Tensor
        and rows.is_contiguous()
        and not torch.is_grad_enabled()
    )


@functools.cache
def _ones(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(rows, 1, dtype=dtype, device="cpu")


def _scale_rows(x: torch.Tensor, norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _sums_in(x.dtype)
    factor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    factor = factor.clamp(min=SMALLEST_NORMS[dtype]).reciprocal_() * norm
    return (x * factor).to(x.dtype), factor


class _ScaleRows(Function):
    # y = r x with r = norm / ||x||, by row; keeps y, which attention keeps too, rather than x.

    @staticmethod
    def forward(ctx, x, norm):
        y, factor = _scale_rows(x, norm)
        ctx.norm = norm
        ctx.save_for_backward(y, factor)
        ctx.set_materialize_grads(False)
        return y, factor

    @staticmethod
    def backward(ctx, grad, grad_factor):
        # dy = r (dx - y (y.dx) / norm^2),   dr = -r^2 (y.dx) / norm^2; both are symmetric.
        y, factor = ctx.saved_tensors
        grad_x = None
        if grad is not None:
            if _has_kernel(grad, y):
                # What it takes for the length of a row is that of y, and for its factor, r times that.
                rows, factors = y.view(-1, y.shape[-1]), factor.view(-1, 1)
                norms, grad = torch.full_like(factors, ctx.norm), grad.contiguous().view(rows.shape)
                grad_x = _derivative_of_weight_norm(grad, rows, factors * ctx.norm, norms, 0)[0]
                grad_x = grad_x.view_as(y)
            else:
                grad_x = (_across(grad, y, ctx.norm) * factor).to(y.dtype)
        if grad_factor is not None:
            through_factor = (y * (grad_factor * factor.square() / -(ctx.norm**2))).to(y.dtype)
            grad_x = through_factor if grad_x is None else grad_x + through_factor
        return grad_x, None


class _CompiledScaleRows(Function):
    # With one result, since a compiled backward would be given zeros for the factor and go on with them; and without
    # the kernel, which cannot be fused with what surrounds it.

    @staticmethod
    def forward(ctx, x, norm):
        y, factor = _scale_rows(x, norm)
        ctx.norm = norm
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, factor = ctx.saved_tensors
        return (_across(grad, y, ctx.norm) * factor).to(y.dtype), None


_eager_scale_rows = _eager(_ScaleRows)


def scale_rows(x: torch.Tensor, norm: float) -> torch.Tensor:
    """Scale every row (last dimension) to a norm; an exactly zero row stays zero.

        y = norm x / ||x||

    Args:
        x (torch.Tensor): shape (..., n).
        norm (float): of the result's rows.
    Returns:
        torch.Tensor: shape and dtype of `x`.
    """
    if not _has_backward():
        return _scale_rows(x, norm)[0]
    return _CompiledScaleRows.apply(x, norm) if torch.compiler.is_compiling() else _eager_scale_rows(x, norm)[0]


class _UnitRows(Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        if _has_kernel(grad, weight):
            ones = _ones(len(weight), weight.dtype)
            return _derivative_of_weight_norm(grad.contiguous(), weight, ones, ones, 0)[0]
        if not torch.is_grad_enabled():
            return _across(grad, weight, 1.0)
        # A second derivative needs the norm that is taken for granted here.
        rows, factor = _ScaleRows.apply(weight, 1.0)
        return (_across(grad, rows, 1.0) * factor).to(weight.dtype)


class _CompiledUnitRows(Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return _across(grad, weight, 1.0)


_eager_unit_rows = _eager(_UnitRows)


def unit_rows(weight: torch.Tensor) -> torch.Tensor:
    """Rows that are known to have norm 1: the weight as it is, with the derivatives of `functional.unit_norm`.

        y = w,   gradient g - (g.w) w

    Args:
        weight (torch.Tensor): rows of norm 1, shape (m, n).
    Returns:
        torch.Tensor: the same values; under `torch.func`'s transforms and in forward mode to rounding.
    """
    if not torch.is_grad_enabled():
        return weight
    if not _has_backward():
        return _scale_rows(weight, 1.0)[0]
    return _CompiledUnitRows.apply(weight) if torch.compiler.is_compiling() else _eager_unit_rows(weight)


def _factors(scale, angle):
    # As wide as a token: cosines, sines, and both times the scale.
    angle = angle.to(_sums_in(angle.dtype))
    angle = torch.cat([angle, angle], -1)
    cos, sin = angle.cos(), angle.sin()
    if scale is None:
        return cos, sin, cos, sin
    scale = 1 + scale
    return cos, sin, scale * cos, scale * sin


def _turn(x, x_halves, direct, first_sin, second_sin, sign):
    if direct.dtype is not x.dtype:
        direct, first_sin, second_sin = direct.to(x.dtype), first_sin.to(x.dtype), second_sin.to(x.dtype)
    y = x * direct
    y_first, y_second = y.chunk(2, -1)
    y_first.addcmul_(x_halves[1], second_sin, value=-sign)
    y_second.addcmul_(x_halves[0], first_sin, value=sign)
    return y


def _scale_rotate(x, scale, angle):
    _, _, direct, cross = _factors(scale, angle)
    return _turn(x, x.chunk(2, -1), direct, *cross.chunk(2, -1), 1)


class _ScaleRotate(Function):
    @staticmethod
    def forward(ctx, x, scale, angle):
        cos, sin, direct, cross = _factors(scale, angle)
        ctx.save_for_backward(x, scale, angle, cos, sin, direct, cross)
        return _turn(x, x.chunk(2, -1), direct, *cross.chunk(2, -1), 1)

    @staticmethod
    def backward(ctx, grad):
        x, scale, angle, cos, sin, direct, cross = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Other names for the same values: a scale that is made of the tokens is not to be followed back to them.
            aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in (x, scale, angle)]
            inputs = [tensor for tensor in aliases if tensor is not None and tensor.requires_grad]
            grads = iter(torch.autograd.grad(_plain_scale_rotate(*aliases), inputs, grad, create_graph=True))
            return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)
        needs_x, needs_scale, needs_angle = ctx.needs_input_grad
        grad_x = grad_scale = grad_angle = None
        first_sin, second_sin = cross.chunk(2, -1)
        g_first, g_second = halves = grad.chunk(2, -1)
        if needs_x:
            # The rotation back, then the scale.
            grad_x = _turn(grad, halves, direct, second_sin, first_sin, -1)
        if needs_scale or needs_angle:
            # Sums over tokens: of g x, and of [g_2 x_1, -g_1 x_2].
            x_first, x_second = x.chunk(2, -1)
            along, half = (grad * x).sum_to_size(direct.shape), first_sin.shape
            across = (g_second * x_first).sum_to_size(half), -(g_first * x_second).sum_to_size(half)
            across = torch.cat(across, -1)
            if along.dtype is not cos.dtype:
                along, across = along.to(cos.dtype), across.to(cos.dtype)
            if needs_scale:
                grad_scale = (cos * along).addcmul_(sin, across)
                grad_scale = grad_scale.sum_to_size(scale.shape).to(scale.dtype)
            if needs_angle:
                first, second = (direct * across).addcmul_(cross, along, value=-1).chunk(2, -1)
                grad_angle = (first + second).sum_to_size(angle.shape).to(angle.dtype)
        return grad_x, grad_scale, grad_angle


_eager_scale_rotate = _eager(_ScaleRotate)


def _plain_scale_rotate(x, scale, angle):
    # One loop that vectorises when compiled: a rotation as x direct + flipped x cross. Cosines and sines of the angles
    # once, not twice as in `_factors`, since the loop may compute them anew for each token.
    angle = angle.to(_sums_in(angle.dtype))
    cos, sin = angle.cos(), angle.sin()
    first, second = (1, 1) if scale is None else (1 + scale).chunk(2, -1)
    direct = torch.cat([first * cos, second * cos], -1).to(x.dtype)
    cross = torch.stack([-second * sin, first * sin], -2).to(x.dtype)
    return x * direct + (x.unflatten(-1, (2, -1)).flip(-2) * cross).flatten(-2)


def scale_rotate(x: torch.Tensor, scale: torch.Tensor | None, angle: torch.Tensor) -> torch.Tensor:
    """Scale tokens, then rotate the pairs (x_j, x_{j + D/2}), in one pass over the tokens.

        y_first  = first  (s_first  cos) - second (s_second sin),   s = 1 + scale
        y_second = second (s_second cos) + first  (s_first  sin)

    Args:
        x (torch.Tensor): tokens, shape (..., D).
        scale (torch.Tensor, optional): shape (..., D), broadcastable to that of `x`.
        angle (torch.Tensor): radians, shape (..., D/2), broadcastable to that of half of `x`.
    Returns:
        torch.Tensor: shape and dtype of `x`.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return _plain_scale_rotate(x, scale, angle)
    return (_eager_scale_rotate if torch.is_grad_enabled() else _scale_rotate)(x, scale, angle)


class _ScaledSiLU(Function):
    # Autograd would divide a gradient as wide as x, in a tensor of its own.

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return F.silu(x).mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            sigmoid = torch.sigmoid(x)
            return grad * (ctx.scale * sigmoid * (1 + x * (1 - sigmoid))), None
        return torch.ops.aten.silu_backward(grad, x).mul_(ctx.scale), None


_eager_scaled_silu = _eager(_ScaledSiLU)


def scaled_silu(x: torch.Tensor, scale: float) -> torch.Tensor:
    """SiLU times a constant.

        y = scale x sigmoid(x)

    Args:
        x (torch.Tensor): any shape.
        scale (float): the constant.
    Returns:
        torch.Tensor: shape and dtype of `x`.
    """
    if not _has_backward():
        return F.silu(x).mul_(scale)
    return (_ScaledSiLU.apply if torch.compiler.is_compiling() else _eager_scaled_silu)(x, scale)
