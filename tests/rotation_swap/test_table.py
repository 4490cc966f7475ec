"""A decision on every transformer of diffusers, and on every adaptive norm with a shift."""

import ast
import importlib
import importlib.util
import inspect
import pkgutil

import diffusers
import pytest
from diffusers import ModelMixin
from diffusers.models import attention, normalization, transformers
from helpers import ROOT

from diffusers_mp.rotation_swap.coverage import COVERAGE, NATIVE, SUPPORTED, supported_names
from diffusers_mp.rotation_swap.sites import ROWS


# Classes of supported models or of all that apply a shift, and are no owners of a map to swap.
DECIDED = {
    # They apply the shift that a swapped map of theirs, or of one of their norms, gave them.
    "AuraFlowJointTransformerBlock",
    "AuraFlowSingleTransformerBlock",
    "BriaFiboTransformerBlock",
    "BriaTransformerBlock",
    "CogView3PlusTransformerBlock",
    "CogView4TransformerBlock",
    "FluxTransformerBlock",
    "GlmImageTransformerBlock",
    "HunyuanImageTransformerBlock",
    "HunyuanVideo15TransformerBlock",
    "HunyuanVideoTokenReplaceTransformerBlock",
    "HunyuanVideoTransformerBlock",
    "JointTransformerBlock",
    "LongCatImageTransformerBlock",
    "MotifVideoTransformerBlock",
    "OvisImageTransformerBlock",
    "PRXBlock",
    "SD3SingleTransformerBlock",
    # The same with `ada_norm_zero`; with `ada_norm_single` the shift comes from a table.
    "BasicTransformerBlock",
    # Of convolutional networks.
    "AdaGroupNorm",
}


def modules():
    for info in pkgutil.iter_modules(transformers.__path__):
        yield importlib.import_module(f"{transformers.__name__}.{info.name}")


def models_of(module):
    return {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == module.__name__
    }


def test_every_transformer_of_diffusers_is_decided_on():
    names = set().union(*(models_of(module) for module in modules()))
    assert names == COVERAGE.keys()
    assert all(hasattr(diffusers, name) for name in names)


def adds_one(node):
    """`1 + scale`, maybe in another type or shape: (1 + scale)[:, None], (1 + scale).to(dtype)."""
    while isinstance(node, ast.Subscript) or (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        node = node.value if isinstance(node, ast.Subscript) else node.func.value
    is_sum = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    return is_sum and any(isinstance(side, ast.Constant) and side.value == 1 for side in (node.left, node.right))


def applies_shift(node):
    """`x * (1 + scale) + shift`."""
    is_sum = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    if not is_sum or not isinstance(node.left, ast.BinOp) or not isinstance(node.left.op, ast.Mult):
        return False
    return adds_one(node.left.left) or adds_one(node.left.right)


def shifting(source):
    """Names of the classes and functions of a module that apply a shift."""
    return {
        definition.name
        for definition in ast.parse(source).body
        if isinstance(definition, (ast.ClassDef, ast.FunctionDef))
        and any(applies_shift(node) for node in ast.walk(definition))
    }


@pytest.mark.parametrize(
    "line, found",
    [
        ("x = self.norm(x) * (1 + scale[:, None]) + shift[:, None]", True),
        ("x = self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]", True),
        ("x = (1.0 + scale) * self.norm(x) + shift", True),
        ("x = (self.norm(x.float()) * (scale.float() + 1.0) + shift.float()).type_as(x)", True),
        ("x = self.norm(x) * (1 + scale).unsqueeze(1) + shift", True),
        ("x = self.norm(x) * (1 + scale)", False),
        ("x = x + gate * y", False),
    ],
)
def test_scan(line, found):
    assert shifting(f"class Norm:\n    def forward(self, x):\n        {line}") == ({"Norm"} if found else set())


def test_every_adaptive_norm_with_a_shift_is_decided_on():
    """In a module of models that are all left out, the decision on these covers it."""
    owners = {owner.__name__ for owner in ROWS}
    found = set()
    for module in [*modules(), normalization, attention]:
        models = models_of(module)
        if not models or any(COVERAGE[name] == SUPPORTED for name in models):
            found |= shifting(inspect.getsource(module))
    # These two are not of the shape: a shift alone, and a map whose shift is applied elsewhere.
    assert owners - found == {"AdaLayerNormShift", "Modulation"}
    assert found - owners == DECIDED


def test_supported_names_are_those_of_the_table():
    assert NATIVE in supported_names()
    assert set(supported_names()) - {NATIVE} == {name for name, state in COVERAGE.items() if state == SUPPORTED}
    assert len(supported_names()) == 25


def test_committed_table_is_the_generated_one():
    path = ROOT / "docs" / "write_rotation_coverage.py"
    spec = importlib.util.spec_from_file_location("write_rotation_coverage", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.FILE.read_text() == script.table(), "run `python docs/write_rotation_coverage.py`"
