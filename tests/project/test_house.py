"""Who may import whom: the order of the package's files, from the ground up, and no circle."""

import ast
from pathlib import Path

import pytest
from helpers import EXAMPLES

import diffusers_mp


PACKAGE = Path(diffusers_mp.__file__).parent
# Each may import those on floors below its own, and within a wing its neighbours.
FLOORS = (
    {"masking"},
    {
        "arguments",
        "files",
        "offloading",
        "sharding",
        "sources",
        "class_labels",
        "predictions",
        "presets",
        "functional",
        "sheets",
        "start_block",
        "_registration",
    },
    {"fused", "scripts", "projection"},
    {"rows"},
    {"layers", "pinned_norms"},
    {"modulation", "optimization"},
    {"configuration"},
    {"blocks"},
    {"transformer_mpdit", "original_dit"},
    {"autoencoders", "class_embeddings", "schedulers", "lora"},
    {"guidance"},
    {"call_inputs"},
    {"pipeline_mpdit"},
    {"data", "averages", "publishing", "diagnostics"},
    {"training", "evaluation", "rotation_swap"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def imports_of(module):
    """Modules of the package that a module imports, in functions and for type checkers too."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = ".".join(part for part in base if part)
            for alias in node.names:
                full = f"{base}.{alias.name}".strip(".")
                target = full if full in MODULES else base
                if target:  # the version is the package's own
                    yield target


def test_every_file_has_a_room():
    assert {module.partition(".")[0] for module in MODULES} == {*FLOOR_OF}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_from_floors_below_or_from_its_own_wing(module):
    own = module.partition(".")[0]
    for target in imports_of(module):
        room = target.partition(".")[0]
        assert room == own or FLOOR_OF[room] < FLOOR_OF[own], f"{module} imports {target}"


def test_there_is_no_circle():
    finished, path = set(), []

    def visit(module):
        assert module not in path, [*path, module]
        if module not in finished:
            path.append(module)
            for target in imports_of(module):
                if target in MODULES and target != module:
                    visit(target)
            finished.add(path.pop())

    for module in MODULES:
        visit(module)
    assert finished == {*MODULES}


def test_imports_are_found():
    # Nothing found would pass all of the above.
    assert {"layers", "rows", "blocks"} <= {*imports_of("transformer_mpdit"), *imports_of("layers")}
    assert "files" in set(imports_of("data.encoding"))
    assert sum(len(set(imports_of(module))) for module in MODULES) > 60


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_imports_no_other(script):
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    for node in ast.walk(ast.parse(script.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert scripts.isdisjoint(name.partition(".")[0] for name in names), names
