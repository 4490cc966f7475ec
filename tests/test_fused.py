"""Functions in few passes: the formula of `functional` has the last word on values and derivatives of every order."""

import math

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers import relative_error, tiny_inputs, tiny_model
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from diffusers_mp import MPLinear, functional, fused, normalize_weights_, trust_rows_


# PyTorch's forward mode imports what it has itself deprecated, and its `vmap` loops over `addcmul_`.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

TOKENS, VECTOR, ANGLE, ANGLES = (2, 3, 8), (2, 1, 8), (2, 1, 4), (2, 3, 4)
PAIRS = {
    # case: (name in both modules, shapes of the tensors, what else is given)
    "unit_norm": ("unit_norm", {"x": TOKENS}, {}),
    "unit_magnitude": ("unit_magnitude", {"x": TOKENS}, {}),
    "rotate": ("rotate", {"x": TOKENS, "angle": (2, 4)}, {}),
    "rotate each token": ("rotate", {"x": TOKENS, "angle": ANGLES}, {}),
    "modulate": ("modulate", {"x": TOKENS, "scale": VECTOR, "shift": VECTOR, "angle": ANGLE}, {}),
    "scale": ("modulate", {"x": TOKENS, "scale": VECTOR}, {}),
    "shift": ("modulate", {"x": TOKENS, "shift": VECTOR}, {}),
    "scale and shift": ("modulate", {"x": TOKENS, "scale": VECTOR, "shift": VECTOR}, {}),
    "scale and turn": ("modulate", {"x": TOKENS, "scale": VECTOR, "angle": ANGLE}, {}),
    "scale and turn each token": ("modulate", {"x": TOKENS, "scale": VECTOR, "angle": ANGLES}, {}),
    "gained_parts": (
        "gained_parts",
        {"projected": (2, 1, 10), "gain": (3,)},
        {"sizes": [4, 2, 4], "constants": [0.0, 0.0, 1.0]},
    ),
    "cap_magnitude": ("cap_magnitude", {"x": TOKENS}, {"max_magnitude": 1.0}),
    "mp_sum": ("mp_sum", {"a": TOKENS, "b": VECTOR}, {"t": 0.3}),
    "gated MP sum": ("gated_sum", {"x": TOKENS, "branch": TOKENS, "gate": VECTOR}, {"t": 0.3}),
    "gated sum": ("gated_sum", {"x": TOKENS, "branch": TOKENS, "gate": VECTOR}, {"t": None}),
    "MP sum of a branch": ("gated_sum", {"x": TOKENS, "branch": TOKENS}, {"gate": None, "t": 0.3}),
    "sum of a branch": ("gated_sum", {"x": TOKENS, "branch": TOKENS}, {"gate": None, "t": None}),
    "capped MP sum": ("gated_sum", {"x": TOKENS, "branch": TOKENS, "gate": VECTOR}, {"t": 0.3, "max_magnitude": 0.8}),
    "capped sum": ("gated_sum", {"x": TOKENS, "branch": TOKENS}, {"gate": None, "t": None, "max_magnitude": 1.0}),
}


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(params=list(PAIRS))
def pair(request):
    """The fused function, the formula, and inputs in float64."""
    name, shapes, more = PAIRS[request.param]

    def with_names(module):
        def function(*inputs):
            output = getattr(module, name)(**dict(zip(shapes, inputs, strict=True)), **more)
            return output if isinstance(output, torch.Tensor) else torch.cat(output, -1)

        return function

    return with_names(fused), with_names(functional), tuple(double(*shape) for shape in shapes.values())


def test_every_function_is_held_against_its_formula():
    names = {name for name, value in vars(fused).items() if getattr(value, "__module__", "") == fused.__name__}
    names = {name for name in names if name[0] != "_"}
    assert names - {"formulas_rule", "is_transformed", "unit_rows"} == {name for name, _, _ in PAIRS.values()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_formula(pair, dtype):
    function, formula, inputs = pair
    rounded = [value.detach().to(dtype).requires_grad_() for value in inputs]
    exact = [value.detach().double().requires_grad_() for value in rounded]
    expected, found = formula(*exact), function(*rounded)
    grad = torch.randn_like(found)
    expected = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    found = [found, *torch.autograd.grad(found, rounded, grad)]
    with torch.no_grad():
        expected.append(expected[0])
        found.append(function(*rounded))
    tolerance = 4 * torch.finfo(dtype).eps
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) < tolerance


def test_first_and_second_derivatives(pair):
    function, _, inputs = pair
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradients_that_can_be_differentiated_are_the_same_where_inputs_depend_on_each_other(pair):
    function, _, inputs = pair
    source = inputs[0].detach().clone().requires_grad_()
    # Every input is made of the first one, as by a conditioning that is the mean of the tokens.
    made = [source, *(value.detach() * (2 + source.mean()) for value in inputs[1:])]
    output = function(*made)
    grad = torch.randn_like(output)
    (plain,) = torch.autograd.grad(output, source, grad, retain_graph=True)
    (differentiable,) = torch.autograd.grad(output, source, grad, create_graph=True)
    torch.testing.assert_close(differentiable, plain)


# Where formulas rule


def forward_mode(function, x):
    with torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(x, x))


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


ONLOOKERS = {
    "torch.compile": lambda function, x: torch.compile(function, backend="eager", fullgraph=True)(x),
    "torch.export": lambda function, x: torch.export.export(Call(function), (x,)),
    "torch.jit.trace": lambda function, x: torch.jit.trace(function, x, check_trace=False),
    "torch.fx.symbolic_trace": lambda function, x: torch.fx.symbolic_trace(function),
    "make_fx": lambda function, x: make_fx(function)(x),
    "torch.func.vmap": lambda function, x: torch.func.vmap(function)(x),
    "torch.func.grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "torch.func.jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "forward mode": forward_mode,
}


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("onlooker", ONLOOKERS)
def test_formulas_rule_where_something_looks_on(onlooker):
    rule = []

    def function(x):
        rule.append(fused.formulas_rule())
        return x * 2

    function(torch.ones(3))
    assert rule == [False]
    ONLOOKERS[onlooker](function, torch.ones(3))
    assert len(rule) > 1
    assert all(rule[1:])
    function(torch.ones(3))
    assert rule[-1] is False


def test_each_function_gives_way_to_its_formula(pair):
    function, formula, inputs = pair
    assert make_fx(function)(*inputs).code == make_fx(formula)(*inputs).code
    inputs = tuple(value.detach() for value in inputs)
    assert make_fx(function)(*inputs).code == make_fx(formula)(*inputs).code


GRAPHS = {
    "torch.fx.symbolic_trace": lambda layer, x: torch.fx.symbolic_trace(layer),
    "torch.export": lambda layer, x: torch.export.export(layer, (x,)).module(),
    "torch.export, strict": lambda layer, x: torch.export.export(layer, (x,), strict=True).module(),
    "torch.jit.trace": lambda layer, x: torch.jit.trace(layer, x, check_trace=False),
}


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("make_graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("trusted", [False, True])
def test_a_graph_of_a_linear_map_has_its_gradients(trusted, make_graph):
    layer, x = MPLinear(8, 5), torch.randn(3, 8)
    if trusted:
        trust_rows_(layer)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    graph = make_graph(layer, x)
    torch.testing.assert_close(torch.autograd.grad(graph(x).square().sum(), graph.weight), expected)


@pytest.mark.parametrize("operator", fused.PRIVATE_OPERATORS, ids=str)
def test_private_operators_are_what_their_formulas_say(operator):
    grad, rows, lengths = double(6, 5), double(6, 5), double(6, 1).exp()
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    with torch.no_grad():
        found = operator(grad, rows, lengths, norms, 0)
        expected = fused.PRIVATE_OPERATORS[operator](grad, rows, lengths, norms, 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    # The formula is the derivative of rows scaled to these lengths.
    scaled = lengths * functional.unit_norm(rows)
    torch.testing.assert_close(torch.autograd.grad(scaled, [rows, lengths], grad), expected, rtol=1e-12, atol=1e-13)


# Kernels and what they are given


@pytest.mark.parametrize("wanted", range(3))
def test_only_the_gradients_that_are_asked_for(wanted):
    x, scale, angle = inputs = [double(2, 3, 8), double(2, 1, 8), double(2, 1, 4)]
    output = functional.modulate(x, scale=scale, angle=angle)
    (expected,) = torch.autograd.grad(output.square().sum(), inputs[wanted])
    x, scale, angle = [value if number == wanted else value.detach() for number, value in enumerate(inputs)]
    output = fused.modulate(x, scale=scale, angle=angle)
    (grad,) = torch.autograd.grad(output.square().sum(), inputs[wanted])
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-13)


def test_rows_of_zeros_stay_and_small_ones_do_not():
    x = torch.zeros(3, 4, requires_grad=True)
    y = fused.unit_magnitude(x)
    assert torch.equal(y, torch.zeros(3, 4))
    y.sum().backward()
    assert x.grad.isfinite().all()
    small = torch.randn(3, 4) * 1e-18
    expected = 2 * F.normalize(small.double(), dim=-1, eps=0)
    torch.testing.assert_close(fused.unit_magnitude(small).double(), expected, rtol=1e-5, atol=1e-6)
    # Where squares vanish nothing is blown up.
    assert fused.unit_magnitude(small * 1e-12).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("function, norm", [(fused.unit_rows, 1.0), (fused.unit_magnitude, math.sqrt(5))])
def test_gradients_of_any_strides(function, norm, dtype):
    rows = F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=-1).to(dtype)
    transposed, strided = torch.randn(5, 6).T.to(dtype), torch.randn(6, 10)[:, ::2].to(dtype)
    for grad in (torch.randn(5).to(dtype).expand(6, 5), torch.randn(6, 1).to(dtype).expand(6, 5), transposed, strided):
        leaf = rows.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(leaf), leaf, grad)
        exact_grad, exact_rows = grad.double(), rows.double()
        expected = exact_grad - exact_rows * (exact_grad * exact_rows).sum(-1, keepdim=True)
        expected = expected * norm
        tolerance = 20 * torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precision_are_summed_in_float32(dtype):
    x = torch.full((2, 4096), 200.0, dtype=dtype)  # squares sum to 1.6e8, which float16 has no number for
    torch.testing.assert_close(fused.unit_magnitude(x), torch.ones_like(x))
    assert fused.unit_magnitude(x).dtype == dtype


@pytest.mark.parametrize("compiled", [False, True])
def test_scaled_rows_keep_their_result_and_not_their_input(compiled):
    x, function = torch.randn(8, 64, requires_grad=True), fused.unit_magnitude
    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = function(x)
    assert sum(tensor.numel() for tensor in kept) == y.numel() + 8
    assert x.data_ptr() not in [tensor.data_ptr() for tensor in kept]


# Trusted rows


def test_trusted_rows_train_like_normalised_ones():
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
    layer = MPLinear(8, 5, dtype=torch.float64)
    x, along = double(3, 8), torch.randn(5, 8, dtype=torch.float64)
    results = []
    for _ in range(2):
        (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
        results.append(torch.autograd.grad((grad * along).sum(), [x, layer.weight]))
        trust_rows_(layer)
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


def test_transforms_of_trusted_rows():
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
        return self.second(functional.mp_silu(fused.unit_magnitude(self.first(x)))).pow(3).sum()


def test_compiled_transforms_are_those_of_eager_mode():
    net, x = Net(), double(5, 6)
    trust_rows_(net.first)  # and not the second

    def penalty(x):
        return torch.func.grad(net)(x).square().sum()

    def gradients(parameters, x):
        return torch.func.grad(lambda parameters: torch.func.functional_call(net, parameters, (x,)))(parameters)

    def together_and_of_each(parameters, x):
        return gradients(parameters, x), torch.func.vmap(gradients, in_dims=(None, 0))(parameters, x)

    def compiled(function):
        torch._dynamo.reset()  # graphs made without gradients are not to be taken for those with
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    parameters = list(net.parameters())
    expected = torch.autograd.grad(penalty(x), parameters)
    torch.testing.assert_close(torch.autograd.grad(compiled(penalty)(x), parameters), expected)
    for with_gradients in (False, True):
        given = {name: value if with_gradients else value.detach() for name, value in net.named_parameters()}
        expected = together_and_of_each(given, x)
        torch.testing.assert_close(compiled(together_and_of_each)(given, x), expected)
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


def test_compiled_gradients_are_eager_ones_made_of_operators_that_fuse():
    targets = set()

    def keep(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    model = tiny_model(num_layers=1).train()
    trust_rows_(model.transformer_blocks)  # and no others
    inputs, parameters = tiny_inputs(), list(model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    gradients = [
        torch.autograd.grad(function(**inputs).sample.square().mean(), parameters) for function in (model, compiled)
    ]
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-6)
    assert "aten.addcmul.default" in targets
    assert not [target for target in targets if "weight_norm" in target]
    # Nor is a gradient of zeros followed through the factors of rows.
    assert "aten.zeros.default" not in targets


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
