"""The equations as pure tensor functions: nothing here holds a parameter or knows a module.

Modules call `fused`, which has some of these in fewer passes over memory.

Sources: "the paper" is arXiv 2505.19122 (magnitude preservation and rotation modulation in DiT), EDM2 is arXiv
2312.02696, DiT is arXiv 2212.09748. Magnitude is the root mean square, `M[x] = sqrt(mean(x^2))`.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


# RMS of silu(x) for x ~ N(0, 1) is 0.59647; 0.596 is what EDM2 and the paper publish, so it is the one to keep.
SILU_MAGNITUDE = 0.596
# Weight t of the second summand in an MP sum: of two inputs of equal standing, of a third one beside their sum, and of
# a residual branch.
BALANCED_T = 0.5
THIRD_T = 1 / (1 + math.sqrt(2))
RESIDUAL_T = 0.3
# Below these, squares lose their digits and then are zero. They keep rows of zeros as they are.
SMALLEST_NORMS = {dtype: math.sqrt(torch.finfo(dtype).tiny) for dtype in (torch.float32, torch.float64)}
# Number of cosine and sine features of a timestep together, and the period scale they share with the position table.
NUM_TIME_FEATURES = 256
MAX_PERIOD = 10000


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which norms, features and angles are computed: at least float32, float64 for float64.

    Args:
        dtype (torch.dtype): dtype of the tensor or model.
    Returns:
        torch.dtype: float32 or float64.
    """
    # `torch.promote_types` knows no float8, in which layerwise casting stores weights.
    return torch.float64 if dtype == torch.float64 else torch.float32


def magnitude(x: torch.Tensor) -> torch.Tensor:
    """Root mean square over all entries.

        M[x] = sqrt(mean(x^2))
    Section 3 of the paper.

    Args:
        x (torch.Tensor): any shape.
    Returns:
        torch.Tensor: scalar, in `compute_dtype(x.dtype)`.
    """
    return x.to(compute_dtype(x.dtype)).square().mean().sqrt()


@torch.fx.wrap  # symbolic tracing knows no dtypes
def row_factors(x: torch.Tensor, norm: float) -> torch.Tensor:
    """What scales every row (last dimension) to a norm.

        r = norm / ||x||
    The sum of squares is taken in `compute_dtype(x.dtype)`.

    Args:
        x (torch.Tensor): shape (..., n).
        norm (float): of the scaled rows.
    Returns:
        torch.Tensor: shape (..., 1), in `compute_dtype(x.dtype)`; finite for an exactly zero row.
    """
    dtype = compute_dtype(x.dtype)
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norms.clamp(min=SMALLEST_NORMS[dtype]).reciprocal() * norm


@torch.fx.wrap
def cap_factors(x: torch.Tensor, norm: float) -> torch.Tensor:
    """What scales every row (last dimension) above a norm down to it.

        r = min(1, norm / ||x||)

    Args:
        x (torch.Tensor): shape (..., n).
        norm (float): the largest that rows may have, positive.
    Returns:
        torch.Tensor: shape (..., 1), in `compute_dtype(x.dtype)`; NaN where the sum of squares overflows.
    """
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=compute_dtype(x.dtype))
    # An infinite norm would have the factor 0, which hides that the row is lost.
    return (norms / norm).nan_to_num(nan=math.nan, posinf=math.nan).clamp(min=1).reciprocal()


def unit_norm(x: torch.Tensor) -> torch.Tensor:
    """Scale every row (last dimension) to norm 1; an exactly zero row stays zero.

        y = x / ||x||
    The gradient is the tangent projection `(g - (g.y) y) / ||x||`, orthogonal to the row. Lemma 3 of the paper; no
    epsilon is added to the norm.

    Args:
        x (torch.Tensor): shape (..., n), any norm.
    Returns:
        torch.Tensor: shape (..., n), dtype of `x`.
    """
    return (x * row_factors(x, 1.0)).to(x.dtype)


def unit_magnitude(x: torch.Tensor) -> torch.Tensor:
    """Scale every row (last dimension) to RMS 1; an exactly zero row stays zero.

        y = sqrt(n) x / ||x||
    Used for label rows, position rows and, in cosine attention, queries and keys (section 4 of the paper).

    Args:
        x (torch.Tensor): shape (..., n), any norm.
    Returns:
        torch.Tensor: shape (..., n), dtype of `x`.
    """
    return (x * row_factors(x, math.sqrt(x.shape[-1]))).to(x.dtype)


def cap_magnitude(x: torch.Tensor, max_magnitude: float) -> torch.Tensor:
    """Scale every row (last dimension) whose RMS is above a limit down to it; leave the others alone.

        y = x min(1, c / M[x])
    The gradient of a row above the limit is `(g - (g.y) y / (n c^2)) c / M[x]`, orthogonal to the row; that of the
    others is g. Not in the paper, whose unit rows keep magnitudes for uncorrelated inputs only.

    Args:
        x (torch.Tensor): shape (..., n).
        max_magnitude (float): the limit c, positive.
    Returns:
        torch.Tensor: shape (..., n), dtype of `x`. A row whose squares overflow float32 becomes NaN, not 0.
    """
    return (x * cap_factors(x, max_magnitude * math.sqrt(x.shape[-1]))).to(x.dtype)


def mp_silu(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """SiLU that keeps RMS 1 on standard normal input.

        y = silu(x) / 0.596
    Equation 81 of EDM2.

    Args:
        x (torch.Tensor): any shape, RMS about 1.
        inplace (bool): overwrite `x`.
    Returns:
        torch.Tensor: same shape and dtype.
    """
    return F.silu(x, inplace=inplace).mul_(1 / SILU_MAGNITUDE)


def mp_leaky_relu(x: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False) -> torch.Tensor:
    """Leaky ReLU that keeps any magnitude of symmetric input, not only 1.

        y = leaky_relu(x) sqrt(2 / (1 + negative_slope^2))
    Lemma 6 of the paper.

    Args:
        x (torch.Tensor): any shape.
        negative_slope (float): slope for negative inputs.
        inplace (bool): overwrite `x`.
    Returns:
        torch.Tensor: same shape and dtype.
    """
    # Scaled first, which is the same: the derivative in place needs the result.
    scale = math.sqrt(2 / (1 + negative_slope**2))
    return F.leaky_relu(x.mul_(scale) if inplace else x * scale, negative_slope, inplace=True)


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Weighted sum that keeps RMS 1 for uncorrelated summands of RMS 1.

        y = ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)
    Equation 88 of EDM2; the paper writes `sqrt(alpha) a + sqrt(1 - alpha) b`.

    Args:
        a (torch.Tensor): any shape.
        b (torch.Tensor): shape broadcastable to that of `a`.
        t (float): weight of `b`, in [0, 1].
    Returns:
        torch.Tensor: shape and dtype of `a + b`.
    """
    scale = 1 / math.sqrt((1 - t) ** 2 + t**2)
    return a * ((1 - t) * scale) + b * (t * scale)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of all tokens to all, in operators that have derivatives of every order and direction.

        y = softmax(q k^T / sqrt(d)) v
    Equation 1 of arXiv 1706.03762. PyTorch's kernels for it have no derivative forwards and no second one.

    Args:
        query (torch.Tensor): shape (B, N, H, d).
        key (torch.Tensor): shape (B, N, H, d).
        value (torch.Tensor): shape (B, N, H, d).
    Returns:
        torch.Tensor: shape (B, N, H, d), dtype of `value`.
    """
    query, key, value = (heads.transpose(-3, -2) for heads in (query, key, value))
    weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(dim=-1)
    return (weights.to(value.dtype) @ value).transpose(-3, -2)


def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x_j, x_{j + D/2}) of every token; the norm of each token is unchanged.

        y_j       = x_j cos(angle_j) - x_{j + D/2} sin(angle_j)
        y_{j+D/2} = x_j sin(angle_j) + x_{j + D/2} cos(angle_j)
    Equation 6 and Lemma 2 of the paper.

    Args:
        x (torch.Tensor): tokens, shape (B, N, D).
        angle (torch.Tensor): radians, shape (B, D/2), or (B, N, D/2) if each token has its own.
    Returns:
        torch.Tensor: shape (B, N, D), dtype of `x`.
    """
    if angle.ndim < x.ndim:
        angle = angle.unsqueeze(-2)
    return _scale_rotate(x, None, angle)


def _scale_rotate(x: torch.Tensor, scale: torch.Tensor | None, angle: torch.Tensor) -> torch.Tensor:
    # One loop over the tokens that vectorises when compiled: they by one factor, their halves exchanged by another.
    angle = angle.to(compute_dtype(angle.dtype))
    cos, sin = angle.cos(), angle.sin()
    first, second = (1, 1) if scale is None else (1 + scale).chunk(2, -1)
    direct = torch.cat([first * cos, second * cos], -1).to(x.dtype)
    cross = torch.stack([-second * sin, first * sin], -2).to(x.dtype)
    return x * direct + (x.unflatten(-1, (2, -1)).flip(-2) * cross).flatten(-2)


def gained_parts(
    projected: torch.Tensor, gain: torch.Tensor, sizes: Sequence[int], constants: Sequence[float]
) -> list[torch.Tensor]:
    """The parts of a map, each times its gain and plus its constant.

        y_k = c_k + gain_k x_k
    Section 4 of the paper, where a gate is 1 plus what its map says.

    Args:
        projected (torch.Tensor): the parts beside each other, shape (..., sum(sizes)).
        gain (torch.Tensor): one for each part, shape (len(sizes),).
        sizes (sequence of int): channels of each part.
        constants (sequence of float): one for each part.
    Returns:
        list of torch.Tensor: shapes (..., size), dtype of `projected`.
    """
    parts = zip(projected.split(sizes, dim=-1), gain.to(projected.dtype).unbind(), constants, strict=True)
    return [part * of_part + constant if constant else part * of_part for part, of_part, constant in parts]


def modulate(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    angle: torch.Tensor | None = None,
) -> torch.Tensor:
    """Condition tokens by scale, then shift, then rotation, whichever are given.

        y = R(angle) (x (1 + scale) + shift)
    Section 4 of the paper; scale and shift are those of DiT's AdaLN.

    Args:
        x (torch.Tensor): tokens, shape (B, N, D).
        scale (torch.Tensor, optional): shape (B, 1, D).
        shift (torch.Tensor, optional): shape (B, 1, D).
        angle (torch.Tensor, optional): radians, shape (B, 1, D/2).
    Returns:
        torch.Tensor: shape (B, N, D), dtype of `x`.
    """
    if angle is not None:
        x = _scale_rotate(x, scale, angle)
        shift = None if shift is None else _scale_rotate(shift, None, angle)
    elif scale is not None:
        x = x * (1 + scale).to(x.dtype)
    return x if shift is None else x + shift.to(x.dtype)


def gated_sum(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    t: float | None,
    max_magnitude: float | None = None,
) -> torch.Tensor:
    """Residual stream and gated branch, as an MP sum or a plain one.

        y = ((1 - t) x + t gate branch) / sqrt((1 - t)^2 + t^2),   y = x + gate branch for t = None
    Section 4 of the paper. With `max_magnitude`, `cap_magnitude` acts on `gate branch` and on y.

    Args:
        x (torch.Tensor): the residual stream, shape (B, N, D).
        branch (torch.Tensor): what is added, shape (B, N, D).
        gate (torch.Tensor, optional): factor of the branch, shape (B, 1, D).
        t (float, optional): weight of the branch, in (0, 1).
        max_magnitude (float, optional): largest RMS of a token of the gated branch, and of the sum.
    Returns:
        torch.Tensor: shape (B, N, D).
    """
    if gate is not None:
        branch = branch * gate
    if max_magnitude is not None:
        branch = cap_magnitude(branch, max_magnitude)
    x = x + branch if t is None else mp_sum(x, branch, t)
    return x if max_magnitude is None else cap_magnitude(x, max_magnitude)


def timestep_features(timestep: torch.Tensor, dtype: torch.dtype, magnitude_preserving: bool = True) -> torch.Tensor:
    """Cosines, then sines, of the timestep at geometrically spaced frequencies.

        [cos(timestep 10000^(-i/128)), sin(timestep 10000^(-i/128))] sqrt(2),   i = 0..127
    DiT's features; the factor sqrt(2), for `magnitude_preserving` only, makes their RMS exactly 1.

    Args:
        timestep (torch.Tensor): shape (B,), integer or at least float32: fractional timesteps are meaningful.
        dtype (torch.dtype): dtype of the result; computed in `compute_dtype(dtype)`.
        magnitude_preserving (bool): multiply by sqrt(2).
    Returns:
        torch.Tensor: shape (B, 256).
    """
    half = NUM_TIME_FEATURES // 2
    index = torch.arange(half, device=timestep.device, dtype=compute_dtype(dtype))
    frequency = torch.exp(index * (-math.log(MAX_PERIOD) / half))
    angle = timestep.to(compute_dtype(dtype)).unsqueeze(-1) * frequency
    features = torch.cat([angle.cos(), angle.sin()], dim=-1)
    if magnitude_preserving:
        features = features * math.sqrt(2)
    return features.to(dtype)


def position_table(
    height: int, width: int, dim: int, device: torch.device, dtype: torch.dtype, magnitude_preserving: bool = True
) -> torch.Tensor:
    """2-D sine and cosine table, one row per token in row-major order.

        [sin(column w), cos(column w), sin(row w), cos(row w)],   w_j = 10000^(-j/(D/4)), j = 0..D/4-1
    DiT's table. For `magnitude_preserving` each token's row is then mean-centred and scaled to RMS 1 (the paper).

    Args:
        height (int): number of token rows.
        width (int): number of token columns.
        dim (int): width D of a token, divisible by 4.
        device (torch.device): device of the result.
        dtype (torch.dtype): dtype of the result; computed in `compute_dtype(dtype)`.
        magnitude_preserving (bool): centre and scale the rows.
    Returns:
        torch.Tensor: shape (height * width, D).
    Raises:
        ValueError: if `dim` is not divisible by 4.
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"`dim` must be divisible by 4, got {dim}.")
    quarter = dim // 4
    index = torch.arange(quarter, device=device, dtype=compute_dtype(dtype))
    frequency = torch.exp(index * (-math.log(MAX_PERIOD) / quarter))

    def waves(length):
        angle = torch.arange(length, device=device, dtype=compute_dtype(dtype)).unsqueeze(-1) * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    columns = waves(width).unsqueeze(0).expand(height, width, 2 * quarter)
    rows = waves(height).unsqueeze(1).expand(height, width, 2 * quarter)
    table = torch.cat([columns, rows], dim=-1).reshape(height * width, dim)
    if magnitude_preserving:
        table = unit_magnitude(table - table.mean(dim=-1, keepdim=True))
    return table.to(dtype)


def patchify(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut an image into patches, each flattened as (row in patch, column in patch, channel).

    Args:
        x (torch.Tensor): shape (B, C, H, W), H and W divisible by `patch_size`.
        patch_size (int): side p of a patch.
    Returns:
        torch.Tensor: shape (B, (H/p) (W/p), p p C), tokens in row-major order.
    """
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(x: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """Put patches back together; the inverse of `patchify`.

    Args:
        x (torch.Tensor): shape (B, height * width, p p C).
        patch_size (int): side p of a patch.
        height (int): number of patch rows.
        width (int): number of patch columns.
    Returns:
        torch.Tensor: shape (B, C, height p, width p).
    """
    batch, _, size = x.shape
    channels = size // patch_size**2  # not -1, of which an empty batch cannot tell what it is
    x = x.reshape(batch, height, width, patch_size, patch_size, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height * patch_size, width * patch_size)
