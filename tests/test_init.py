"""The public face: lazy, complete, and light to import."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_mp
from diffusers_mp import training


def test_importing_the_package_and_its_layers_is_light():
    code = """
import sys
import diffusers_mp
assert "torch" not in sys.modules
from diffusers_mp import MPEmbedding, MPLinear, get_preset, normalize_weights_
MPLinear(4, 4)
heavy = {"diffusers", "transformers", "accelerate", "datasets"} & set(sys.modules)
assert not heavy, heavy
print(diffusers_mp.__file__)
"""
    printed = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True).stdout
    assert Path(printed.strip()) == Path(diffusers_mp.__file__)


@pytest.mark.parametrize("name", diffusers_mp.__all__)
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(diffusers_mp, name) is not None
    assert name in dir(diffusers_mp)


@pytest.mark.parametrize("name", [name for name in diffusers_mp.__all__ if name != "__version__"])
def test_every_public_name_has_a_docstring(name):
    assert len(inspect.getdoc(getattr(diffusers_mp, name))) > 20


def test_all_is_sorted_without_repeats():
    names = diffusers_mp.__all__[1:]
    assert names == sorted(set(names))


@pytest.mark.parametrize("package", [diffusers_mp, training], ids=["diffusers_mp", "training"])
def test_type_checkers_see_exactly_the_public_names(package):
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: statement.module for statement in block.body for alias in statement.names}
    assert seen == package._MODULE_OF


def test_every_name_of_training_resolves():
    assert all(getattr(training, name) is not None for name in training._MODULE_OF)
    with pytest.raises(AttributeError, match="module 'diffusers_mp.training' has no attribute 'EDMObjective'"):
        training.EDMObjective  # noqa: B018


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'diffusers_mp' has no attribute 'MPConv'"):
        diffusers_mp.MPConv  # noqa: B018
    with pytest.raises(ImportError, match="MPConv"):
        from diffusers_mp import MPConv  # noqa: F401


def test_the_loader_finds_its_base_class_here_but_users_do_not():
    import diffusers

    assert diffusers_mp.ModelMixin is diffusers.ModelMixin
    assert "ModelMixin" not in diffusers_mp.__all__


@pytest.mark.parametrize(
    "name", ["MPDiTTransformer2DModel", "RotationModulation", "ScaleModulation", "ShiftModulation", "GateModulation"]
)
def test_public_models_live_in_the_package_whatever_their_file(name):
    assert getattr(diffusers_mp, name).__module__ == "diffusers_mp"
