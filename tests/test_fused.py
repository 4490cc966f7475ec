"""Functions with derivatives by hand: the plain formula has the last word on values and derivatives of every order."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers import tiny_inputs, tiny_model
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_mp import MPLinear, functional, fused, normalize_weights_, trust_rows_


# PyTorch's forward mode imports what it has itself deprecated, and its `vmap` loops over `addcmul_`.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def plain_scale_rows(x):
    return 3 * x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def plain_scale_rotate(x, scale, angle):
    first, second = ((1 + scale) * x).chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos * first - sin * second, sin * first + cos * second], dim=-1)


def plain_rotate(x, angle):
    return plain_scale_rotate(x, torch.zeros(1, dtype=x.dtype), angle)


def plain_scaled_silu(x):
    return 3 * x * torch.sigmoid(x)


FUNCTIONS = {
    "scale_rows": (lambda x: fused.scale_rows(x, 3.0), plain_scale_rows, [(2, 3, 4)]),
    "scale_rotate": (fused.scale_rotate, plain_scale_rotate, [(2, 3, 8), (2, 1, 8), (2, 1, 4)]),
    "scale_rotate_each_token": (fused.scale_rotate, plain_scale_rotate, [(2, 3, 8), (2, 1, 8), (2, 3, 4)]),
    "rotate": (lambda x, angle: fused.scale_rotate(x, None, angle), plain_rotate, [(2, 3, 8), (2, 1, 4)]),
    "scaled_silu": (lambda x: fused.scaled_silu(x, 3.0), plain_scaled_silu, [(2, 5)]),
}


@pytest.fixture(params=list(FUNCTIONS))
def case(request):
    torch.manual_seed(0)
    function, plain, shapes = FUNCTIONS[request.param]
    return function, plain, tuple(double(*shape) for shape in shapes)


def test_values_are_those_of_the_plain_formula(case):
    function, plain, inputs = case
    torch.testing.assert_close(function(*inputs), plain(*inputs), rtol=1e-14, atol=1e-15)
    with torch.no_grad():
        torch.testing.assert_close(function(*inputs), plain(*inputs), rtol=1e-14, atol=1e-15)


def test_first_and_second_derivatives(case):
    function, _, inputs = case
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradients_that_can_be_differentiated_are_the_same_where_inputs_depend_on_each_other(case):
    function, _, inputs = case
    source = inputs[0].detach().clone().requires_grad_()
    # Every input is made of the first one, as by a conditioning that is the mean of the tokens.
    made = [source, *(value.detach() * (2 + source.mean()) for value in inputs[1:])]
    output = function(*made)
    grad = torch.randn_like(output)
    (plain,) = torch.autograd.grad(output, source, grad, retain_graph=True)
    (differentiable,) = torch.autograd.grad(output, source, grad, create_graph=True)
    torch.testing.assert_close(differentiable, plain)


def test_function_transforms(case):
    function, plain, inputs = case
    tangents = tuple(torch.randn_like(value) for value in inputs)
    for ours, theirs in zip(
        torch.func.jvp(function, inputs, tangents), torch.func.jvp(plain, inputs, tangents), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.func.vmap(function)(*inputs), plain(*inputs))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.jvp(function, inputs, tangents)[1], torch.func.jvp(plain, inputs, tangents)[1]
        )


@pytest.mark.parametrize("wanted", range(3))
def test_only_the_gradients_that_are_asked_for(wanted):
    torch.manual_seed(0)
    inputs = [double(2, 3, 8), double(2, 1, 8), double(2, 1, 4)]
    (expected,) = torch.autograd.grad(plain_scale_rotate(*inputs).square().sum(), inputs[wanted])
    inputs = [value if number == wanted else value.detach() for number, value in enumerate(inputs)]
    (grad,) = torch.autograd.grad(fused.scale_rotate(*inputs).square().sum(), inputs[wanted])
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-13)


def test_rows_of_zeros_stay_and_small_ones_do_not():
    x = torch.zeros(3, 4, requires_grad=True)
    y = fused.scale_rows(x, 2.0)
    assert torch.equal(y, torch.zeros(3, 4))
    y.sum().backward()
    assert x.grad.isfinite().all()
    small = torch.randn(3, 4) * 1e-18
    expected = 2 * F.normalize(small.double(), dim=-1, eps=0)
    torch.testing.assert_close(fused.scale_rows(small, 2.0).double(), expected, rtol=1e-5, atol=1e-6)
    # Where squares vanish nothing is blown up.
    assert fused.scale_rows(small * 1e-12, 2.0).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("function", ["unit_rows", "scale_rows"])
def test_gradients_of_any_strides(function, dtype):
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=-1).to(dtype)
    transposed, strided = torch.randn(5, 6).T.to(dtype), torch.randn(6, 10)[:, ::2].to(dtype)
    for grad in (torch.randn(5).to(dtype).expand(6, 5), torch.randn(6, 1).to(dtype).expand(6, 5), transposed, strided):
        leaf = rows.clone().requires_grad_()
        outcome = fused.unit_rows(leaf) if function == "unit_rows" else fused.scale_rows(leaf, 3.0)
        (found,) = torch.autograd.grad(outcome, leaf, grad)
        exact_grad, exact_rows = grad.double(), rows.double()
        expected = exact_grad - exact_rows * (exact_grad * exact_rows).sum(-1, keepdim=True)
        expected = expected * (1.0 if function == "unit_rows" else 3.0)
        tolerance = 20 * torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precision_are_summed_in_float32(dtype):
    x = torch.full((2, 4096), 200.0, dtype=dtype)  # squares sum to 1.6e8, which float16 has no number for
    torch.testing.assert_close(fused.scale_rows(x, 64.0), torch.ones_like(x))
    assert fused.scale_rows(x, 64.0).dtype == dtype


def test_scaled_rows_keep_their_result_and_not_their_input():
    x = torch.randn(8, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = fused.scale_rows(x, 8.0)
    assert sum(tensor.numel() for tensor in kept) == y.numel() + 8
    assert x.data_ptr() not in [tensor.data_ptr() for tensor in kept]


# Trusted rows


def test_trusted_rows_train_like_normalised_ones():
    torch.manual_seed(0)
    layer = MPLinear(8, 5, dtype=torch.float64)
    x, grad = double(3, 8), torch.randn(3, 5, dtype=torch.float64)
    results = []
    for _ in range(2):
        results.append(torch.autograd.grad(layer(x), [x, layer.weight], grad))
        trust_rows_(layer)
    torch.testing.assert_close(results[0], results[1], rtol=1e-13, atol=1e-14)
    along = (results[1][1] * layer.weight).sum(dim=-1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-14)


def test_trusting_normalises_once():
    layer = MPLinear(8, 5)
    with torch.no_grad():
        layer.weight.mul_(3)
    trust_rows_(layer)
    torch.testing.assert_close(layer.weight.norm(dim=-1), torch.ones(5))
    # From here on it is a promise: rows are taken as they are.
    with torch.no_grad():
        layer.weight.mul_(3)
        ones = layer(layer.weight[:1])[0, 0]
    torch.testing.assert_close(ones, torch.tensor(9.0))
    normalize_weights_(layer)
    torch.testing.assert_close(layer.weight.norm(dim=-1), torch.ones(5))


def test_rows_without_forced_normalisation_are_not_trusted():
    layer = MPLinear(8, 5, forced_weight_normalization=False)
    x = torch.randn(2, 8)
    expected = layer(x)
    with torch.no_grad():
        trust_rows_(layer).weight.mul_(3)
    torch.testing.assert_close(layer(x), expected)


def test_second_derivatives_of_trusted_rows_are_those_of_normalised_ones():
    torch.manual_seed(0)
    layer = MPLinear(8, 5, dtype=torch.float64)
    x, along = double(3, 8), torch.randn(5, 8, dtype=torch.float64)
    results = []
    for _ in range(2):
        (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
        results.append(torch.autograd.grad((grad * along).sum(), [x, layer.weight]))
        trust_rows_(layer)
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


def test_transforms_of_trusted_rows():
    torch.manual_seed(0)
    layer, x = MPLinear(8, 5, dtype=torch.float64), double(3, 8)

    def loss(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,)).square().sum()

    expected = torch.func.hessian(loss)(layer.weight.detach())
    trust_rows_(layer)
    torch.testing.assert_close(torch.func.hessian(loss)(layer.weight.detach()), expected)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = MPLinear(6, 8, dtype=torch.float64), MPLinear(8, 4, dtype=torch.float64)

    def forward(self, x):
        return self.second(functional.mp_silu(functional.unit_magnitude(self.first(x)))).pow(3).sum()


@pytest.mark.parametrize("trusted", [False, True])
def test_compiled_transforms_are_those_of_eager_mode(trusted):
    torch.manual_seed(0)
    net, x = Net(), double(5, 6)
    if trusted:
        trust_rows_(net)

    def penalty(x):
        return torch.func.grad(net)(x).square().sum()

    def gradients(parameters, x):
        return torch.func.grad(lambda parameters: torch.func.functional_call(net, parameters, (x,)))(parameters)

    def of_each(parameters, x):
        return torch.func.vmap(gradients, in_dims=(None, 0))(parameters, x)

    torch._dynamo.reset()
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    parameters = list(net.parameters())
    expected = torch.autograd.grad(penalty(x), parameters)
    torch.testing.assert_close(torch.autograd.grad(compiled(penalty)(x), parameters), expected)
    for with_gradients in (False, True):
        given = {name: value if with_gradients else value.detach() for name, value in net.named_parameters()}
        for function in (gradients, of_each):
            torch.testing.assert_close(compiled(function)(given, x), function(given, x))
    torch._dynamo.reset()


def test_a_trusted_run_is_the_run():
    runs = []
    for trusted in (False, True):
        torch.manual_seed(0)
        model = tiny_model().double().train()
        if trusted:
            trust_rows_(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        inputs = tiny_inputs(dtype=torch.float64)
        for _ in range(4):
            model(**inputs).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            normalize_weights_(model)
        runs.append([parameter.detach() for parameter in model.parameters()])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)  # Adam makes much of rounding


@pytest.mark.parametrize("trusted", [False, True])
def test_compiled_gradients_are_eager_ones(trusted):
    torch.manual_seed(0)
    model = tiny_model(num_layers=1).train()
    if trusted:
        trust_rows_(model)
    inputs, parameters = tiny_inputs(), list(model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(function(**inputs).sample.square().mean(), parameters) for function in (model, compiled)
    ]
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-6)


def test_compiled_gradients_are_made_of_operators_that_fuse():
    targets = set()

    def keep(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    model = trust_rows_(tiny_model(num_layers=1).train())
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    compiled(**tiny_inputs()).sample.square().mean().backward()
    assert "aten.addcmul.default" in targets
    assert not [target for target in targets if "weight_norm" in target]


def test_the_model_can_be_differentiated_forwards_and_twice():
    # As consistency and mean-flow training do, in the latents and in time.
    torch.manual_seed(0)
    model = tiny_model().double().train()
    inputs = tiny_inputs(dtype=torch.float64)
    latents, time = inputs.pop("hidden_states"), inputs.pop("timestep").double()

    def velocity(latents, time):
        return model(latents, timestep=time, **inputs).sample

    tangents = torch.randn_like(latents), torch.ones_like(time)
    with sdpa_kernel(SDPBackend.MATH):  # the one kind of attention that PyTorch differentiates forwards
        _, derivative = torch.func.jvp(velocity, (latents, time), tangents)
    step = 1e-6
    ahead = velocity(latents + step * tangents[0], time + step)
    behind = velocity(latents - step * tangents[0], time - step)
    torch.testing.assert_close(derivative, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    derivative.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_rotation_by_pairs_is_the_rotation():
    torch.manual_seed(0)
    x, scale, angle = double(2, 3, 8), double(2, 1, 8), double(2, 1, 4)
    scaled = x * (1 + scale)
    number = torch.complex(scaled[..., :4], scaled[..., 4:]) * torch.exp(1j * angle)
    expected = torch.cat([number.real, number.imag], dim=-1)
    torch.testing.assert_close(functional.modulate(x, scale=scale, angle=angle), expected)
    quarter_turn = functional.rotate(x, torch.full((2, 4), math.pi / 2, dtype=torch.float64))
    torch.testing.assert_close(quarter_turn, torch.cat([-x[..., 4:], x[..., :4]], dim=-1))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("trusted", [False, True])
def test_a_traced_model_has_no_python_and_writes_into_no_view(trusted):
    # ONNX's exporter of traced graphs drops what is written into a view, without an error.
    model = tiny_model().eval()
    if trusted:
        trust_rows_(model)
    inputs = tuple(tiny_inputs().values())

    class Sample(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *inputs):
            return self.model(*inputs, return_dict=False)[0]

    traced = torch.jit.trace(Sample(), inputs, check_trace=False)
    graph = str(traced.inlined_graph)
    assert "PythonOp" not in graph
    assert "addcmul_" not in graph
    torch.testing.assert_close(traced(*inputs), model(*inputs).sample)


@pytest.mark.slow  # compiles a model; that jvp gets plain sums is shown eagerly above
def test_a_compiled_jvp_of_a_model_is_the_eager_one():
    model = tiny_model(num_layers=1).eval()
    inputs = tiny_inputs()
    hidden_states = inputs.pop("hidden_states")

    def jvp(x, tangent):
        return torch.func.jvp(lambda x: model(x, **inputs).sample, (x,), (tangent,))

    tangent = torch.randn_like(hidden_states)
    with sdpa_kernel(SDPBackend.MATH):
        expected = jvp(hidden_states, tangent)
        for value, reference in zip(torch.compile(jvp)(hidden_states, tangent), expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)
