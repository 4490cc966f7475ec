"""The equations. Expected values are closed forms written out here, in float64 unless a dtype is what is tested."""

import math

import pytest
import torch
from helpers import assert_magnitude, relative_error

from diffusers_mp import functional


NUM_SAMPLES = 200_000


def _double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _rotated(x, angle):
    """The rotation as a product of complex numbers, which is how Equation 6 of the paper can be read."""
    first, second = x.chunk(2, dim=-1)
    product = torch.complex(first, second) * torch.exp(1j * angle).unsqueeze(1)
    return torch.cat([product.real, product.imag], dim=-1)


# Magnitude and dtypes


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.float8_e4m3fn, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_compute_dtype_is_at_least_float32(dtype, expected):
    assert functional.compute_dtype(dtype) == expected
    assert functional.magnitude(torch.ones(3, dtype=dtype)).dtype == expected


def test_magnitude_is_the_root_mean_square():
    assert functional.magnitude(torch.tensor([[1.0, -7.0], [5.0, 5.0]])).item() == 5.0
    assert_magnitude(3 * _double(NUM_SAMPLES), expected=functional.magnitude(3 * torch.ones(1)).item())
    # 300^2 is beyond float16: the squares are taken in float32.
    assert functional.magnitude(torch.full((4,), 300.0, dtype=torch.float16)).item() == 300.0


# Rows


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("size", [1, 7, 384])
def test_unit_norm_and_unit_magnitude_at_any_input_norm(scale, size):
    x = _double(50, size) * scale
    norms = torch.linalg.vector_norm(functional.unit_norm(x), dim=-1)
    torch.testing.assert_close(norms, torch.ones(50, dtype=torch.float64), rtol=1e-14, atol=0)
    magnitudes = functional.unit_magnitude(x).square().mean(dim=-1).sqrt()
    torch.testing.assert_close(magnitudes, torch.ones(50, dtype=torch.float64), rtol=1e-14, atol=0)
    # Nothing but the length changes.
    cosine = torch.nn.functional.cosine_similarity(functional.unit_norm(x), x, dim=-1, eps=1e-300)
    torch.testing.assert_close(cosine, torch.ones(50, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("function", [functional.unit_norm, functional.unit_magnitude])
def test_a_zero_row_stays_zero_with_a_finite_gradient(function):
    x = torch.cat([torch.zeros(1, 5), torch.randn(2, 5)]).requires_grad_()
    y = function(x)
    (y * torch.randn_like(y)).sum().backward()
    assert torch.equal(y[0], torch.zeros(5))
    assert y[1:].any(dim=-1).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("norm", [0.1, 1.0, 30.0])
def test_gradient_of_unit_norm_is_the_tangent_projection(norm):
    x = (functional.unit_norm(_double(8, 33)) * norm).requires_grad_()
    g = _double(8, 33)
    functional.unit_norm(x).backward(g)
    unit = x.detach() / norm
    expected = (g - (g * unit).sum(dim=-1, keepdim=True) * unit) / norm
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-13)
    # Orthogonal to its row; the incoming gradient is not.
    assert (x.grad * unit).sum(dim=-1).abs().max() < 1e-13 / norm
    assert (g * unit).sum(dim=-1).abs().max() > 0.1


@pytest.mark.parametrize("function", [functional.unit_norm, functional.unit_magnitude])
def test_unit_rows_pass_gradcheck(function):
    assert torch.autograd.gradcheck(function, (_double(3, 5).requires_grad_(),))


@pytest.mark.parametrize("function", [functional.unit_norm, functional.unit_magnitude])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_half_precision_are_computed_in_float32(function, dtype):
    # Entries of 300 overflow float16 when squared, and thousands of them lose every digit when summed in bfloat16.
    x = (300 * torch.randn(16, 5000)).to(dtype)
    assert function(x).dtype == dtype
    assert torch.equal(function(x), function(x.float()).to(dtype))


# Activations and sum


def test_silu_magnitude_is_the_published_constant_near_the_exact_one():
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    exact = torch.trapezoid(torch.nn.functional.silu(x).square() * density, x).sqrt().item()
    assert abs(exact - 0.59647) < 5e-6
    assert functional.SILU_MAGNITUDE == 0.596


def test_mp_silu_keeps_magnitude_one_and_no_other():
    x = _double(NUM_SAMPLES)
    torch.testing.assert_close(functional.mp_silu(x), x * torch.sigmoid(x) / 0.596, rtol=1e-14, atol=0)
    assert_magnitude(functional.mp_silu(x), expected=0.59647 / 0.596)
    with pytest.raises(AssertionError):
        assert_magnitude(torch.nn.functional.silu(x))
    with pytest.raises(AssertionError):
        assert_magnitude(functional.mp_silu(10 * x), expected=10)


@pytest.mark.parametrize("negative_slope", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 50.0])
def test_mp_leaky_relu_keeps_any_magnitude(negative_slope, magnitude):
    x = magnitude * _double(NUM_SAMPLES)
    assert_magnitude(functional.mp_leaky_relu(x, negative_slope), expected=magnitude)
    with pytest.raises(AssertionError):
        assert_magnitude(torch.nn.functional.leaky_relu(x, negative_slope), expected=magnitude)


def test_mp_leaky_relu_is_positively_homogeneous():
    x = _double(100)
    torch.testing.assert_close(functional.mp_leaky_relu(7 * x), 7 * functional.mp_leaky_relu(x), rtol=1e-14, atol=0)
    ratio = functional.mp_leaky_relu(torch.tensor([-1.0, 1.0], dtype=torch.float64), 0.2)
    torch.testing.assert_close(ratio, torch.tensor([-0.2, 1.0], dtype=torch.float64) * math.sqrt(2 / 1.04))


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.9])
def test_mp_sum_keeps_magnitude_and_equals_both_published_forms(t):
    a, b = _double(NUM_SAMPLES), _double(NUM_SAMPLES)
    y = functional.mp_sum(a, b, t)
    assert_magnitude(y)
    with pytest.raises(AssertionError):
        assert_magnitude(a + b)
    torch.testing.assert_close(y, ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2), rtol=1e-12, atol=1e-14)
    alpha = (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    torch.testing.assert_close(y, math.sqrt(alpha) * a + math.sqrt(1 - alpha) * b, rtol=1e-12, atol=1e-14)


def test_mp_sum_at_its_ends_and_with_broadcasting():
    a, b = _double(4, 5, 6), _double(5, 6)
    assert torch.equal(functional.mp_sum(a, b, 0.0), a)
    assert torch.equal(functional.mp_sum(a, b, 1.0), b.expand_as(a))
    torch.testing.assert_close(functional.mp_sum(a, b, 0.3)[2], functional.mp_sum(a[2], b, 0.3))


# Rotation and modulation


def test_rotation_is_multiplication_by_a_unit_complex_number():
    x, angle = _double(3, 5, 8), _double(3, 4)
    torch.testing.assert_close(functional.rotate(x, angle), _rotated(x, angle), rtol=1e-13, atol=1e-14)


def test_rotation_keeps_norms_is_undone_and_composes():
    x, angle, other = _double(3, 50, 64), 10 * _double(3, 32), _double(3, 32)
    y = functional.rotate(x, angle)
    assert relative_error(y, x) > 0.5
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
    torch.testing.assert_close(functional.rotate(y, -angle), x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        functional.rotate(y, other), functional.rotate(x, angle + other), rtol=1e-12, atol=1e-13
    )


def test_rotation_pairs_span_the_whole_width():
    x = torch.zeros(1, 1, 8, dtype=torch.float64)
    x[..., 1] = 1
    angle = torch.zeros(1, 4, dtype=torch.float64)
    angle[0, 1] = math.pi / 2
    expected = torch.zeros(8, dtype=torch.float64)
    expected[5] = 1
    torch.testing.assert_close(functional.rotate(x, angle)[0, 0], expected, rtol=0, atol=1e-15)


def test_modulation_applies_scale_then_shift_then_rotation():
    x, scale, shift, angle = _double(2, 3, 8), _double(2, 1, 8), _double(2, 1, 8), _double(2, 1, 4)
    scaled = x * (1 + scale)
    torch.testing.assert_close(functional.modulate(x, scale, shift, angle), _rotated(scaled + shift, angle[:, 0]))
    torch.testing.assert_close(functional.modulate(x, scale=scale), scaled)
    torch.testing.assert_close(functional.modulate(x, shift=shift), x + shift)
    torch.testing.assert_close(functional.modulate(x, angle=angle), _rotated(x, angle[:, 0]))
    assert torch.equal(functional.modulate(x), x)


# Time features and position table


@pytest.mark.parametrize("magnitude_preserving", [True, False])
def test_time_features_by_their_formula(magnitude_preserving):
    timestep = torch.tensor([0, 1, 417, 999])
    features = functional.timestep_features(timestep, torch.float64, magnitude_preserving)
    factor = math.sqrt(2) if magnitude_preserving else 1.0
    for row, t in zip(features, timestep.tolist(), strict=True):
        angles = [t * 10000 ** (-i / 128) for i in range(128)]
        expected = [factor * math.cos(a) for a in angles] + [factor * math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)


def test_time_features_have_magnitude_exactly_one():
    timestep = 1000 * torch.rand(500, dtype=torch.float64)
    rows = functional.timestep_features(timestep, torch.float64)
    torch.testing.assert_close(rows.square().mean(dim=-1), torch.ones(500, dtype=torch.float64), rtol=1e-14, atol=0)
    raw = functional.timestep_features(timestep, torch.float64, magnitude_preserving=False)
    torch.testing.assert_close(
        raw.square().mean(dim=-1), 0.5 * torch.ones(500, dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_time_features_are_smooth_in_fractional_timesteps():
    timestep = 999 * torch.rand(200, dtype=torch.float64)
    features = functional.timestep_features(timestep, torch.float64)
    # No frequency is above 1 radian per step, so that no feature moves faster than sqrt(2) per step.
    moved = functional.timestep_features(timestep + 0.01, torch.float64)
    assert 0 < (moved - features).abs().max() <= 0.01 * math.sqrt(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_time_features_in_half_precision_are_rounded_last(dtype):
    timestep = torch.arange(900, 1000)
    features = functional.timestep_features(timestep, dtype)
    assert features.dtype == dtype
    assert torch.equal(features, functional.timestep_features(timestep, torch.float32).to(dtype))
    assert len(features.unique(dim=0)) == 100


def _position_row(row, column, dim, magnitude_preserving):
    frequencies = [10000 ** (-j / (dim // 4)) for j in range(dim // 4)]
    values = [f(n * w) for n in (column, row) for f in (math.sin, math.cos) for w in frequencies]
    if magnitude_preserving:
        mean = sum(values) / dim
        values = [v - mean for v in values]
        magnitude = math.sqrt(sum(v * v for v in values) / dim)
        values = [v / magnitude for v in values]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("magnitude_preserving", [True, False])
def test_position_table_by_its_formula_on_a_rectangle(magnitude_preserving):
    table = functional.position_table(3, 5, 16, "cpu", torch.float64, magnitude_preserving)
    assert table.shape == (15, 16)
    for row in range(3):
        for column in range(5):
            expected = _position_row(row, column, 16, magnitude_preserving)
            torch.testing.assert_close(table[row * 5 + column], expected, rtol=1e-12, atol=1e-13)


def test_position_rows_are_centred_with_magnitude_one():
    table = functional.position_table(16, 9, 384, "cpu", torch.float64)
    assert table.mean(dim=-1).abs().max() < 1e-14
    torch.testing.assert_close(table.square().mean(dim=-1), torch.ones(144, dtype=torch.float64), rtol=1e-13, atol=0)
    assert len(table.unique(dim=0)) == 144
    raw = functional.position_table(16, 9, 384, "cpu", torch.float64, magnitude_preserving=False)
    assert raw.mean(dim=-1).abs().min() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_position_table_in_half_precision_is_rounded_last(dtype):
    table = functional.position_table(32, 32, 64, "cpu", dtype)
    assert table.dtype == dtype
    assert torch.equal(table, functional.position_table(32, 32, 64, "cpu", torch.float32).to(dtype))


# Patches


def test_patches_are_flattened_as_row_column_channel():
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = functional.patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    for sample in range(2):
        for i in range(2):
            for j in range(3):
                expected = [
                    x[sample, channel, 2 * i + row, 2 * j + column].item()
                    for row in range(2)
                    for column in range(2)
                    for channel in range(3)
                ]
                assert patches[sample, i * 3 + j].tolist() == expected


@pytest.mark.parametrize("patch_size, height, width", [(1, 3, 5), (2, 4, 10), (4, 12, 8), (8, 8, 24)])
def test_unpatchify_undoes_patchify(patch_size, height, width):
    x = torch.randn(2, 5, height, width)
    patches = functional.patchify(x, patch_size)
    y = functional.unpatchify(patches, patch_size, height // patch_size, width // patch_size)
    assert torch.equal(y, x)
