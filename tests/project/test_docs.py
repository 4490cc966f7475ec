"""Every page of the documentation: its Python blocks run, its commands are understood, its links lead somewhere."""

import argparse
import importlib.util
import re
import runpy
import shlex

import pytest
from helpers import ROOT
from processes import run_python

import diffusers_mp


PAGES = sorted(
    page for page in (*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")) if page.parent != ROOT / "docs" / "api"
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
# Run by a test of their own, which knows what they need.
RUN_ELSEWHERE = ("README.md", "scale_out.md", "layers_in_your_model.md")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


# PyTorch's forward mode imports what it has itself deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in RUN_ELSEWHERE and PYTHON.search(page.read_text())],
    ids=name_of,
)
def test_blocks_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # for the model in docs/tiny
    names = {}
    exec("\n".join(PYTHON.findall(page.read_text())), names)
    modules = [getattr(value, "__module__", None) or "" for value in names.values()]
    assert any(module.startswith("diffusers_mp") for module in modules), "no block of this page uses the package"


def commands():
    """Script and arguments of each command line with an example in it, by its page."""
    for page in PAGES:
        for language, block in FENCED.findall(page.read_text()):
            for line in block.splitlines() if language in ("", "bash") else ():
                if script := re.search(r"examples/(\w+)\.py", line):
                    words = shlex.split(line, comments=True)
                    yield name_of(page), script[1], words[words.index(script[0]) + 1 :]


class _ParserIsMade(Exception):
    pass


@pytest.mark.parametrize("script", sorted({script for _, script, _ in commands()}))
def test_commands_are_understood(script, monkeypatch):
    file, parse_args = ROOT / "examples" / f"{script}.py", argparse.ArgumentParser.parse_args

    def stop(parser, *args, **kwargs):
        raise _ParserIsMade(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.syspath_prepend(file.parent)
    with pytest.raises(_ParserIsMade) as caught:
        runpy.run_path(str(file), run_name="__main__")
    for page, name, arguments in commands():
        if name == script:
            try:
                parse_args(caught.value.args[0], arguments)
            except SystemExit:
                pytest.fail(f"{page}: {arguments}")


def test_pages_have_commands_and_blocks():
    # Nothing to run would be no failure of the tests above.
    scripts = {script for _, script, _ in commands()}
    assert {"train_mpdit", "evaluate", "encode_latents", "reconstruct_ema", "convert_dit"} <= scripts
    assert sum(PYTHON.search(page.read_text()) is not None for page in PAGES) >= 10


def test_the_site_is_built_without_a_warning(tmp_path):
    build = "import sys; from sphinx.cmd.build import main; sys.exit(main(sys.argv[1:]))"
    run_python(build, "--quiet", "--fail-on-warning", "--keep-going", ROOT / "docs", tmp_path)
    assert (tmp_path / "index.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def write_api():
    spec = importlib.util.spec_from_file_location("write_api", ROOT / "docs" / "write_api.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_api_pages_have_the_public_names_and_links_that_lead_somewhere(write_api):
    texts = write_api.pages()
    headings = {name: re.findall(r"^##+ (.*)$", text, re.MULTILINE) for name, text in texts.items()}
    anchors = {
        f"{name}#{write_api.anchor(heading.strip('`'))}" for name, found in headings.items() for heading in found
    }
    # Names of the package are those called without a module.
    called = {call for text in texts.values() for call in re.findall(r"^diffusers_mp\.(\w+)\(", text, re.MULTILINE)}
    assert called == {*diffusers_mp.__all__} - {"__version__"}
    assert called <= {heading.strip("`") for found in headings.values() for heading in found}
    links = [link for text in texts.values() for link in re.findall(r"\]\(([\w.-]+#[^)]*)\)", text)]
    assert len(links) > 100
    assert {*links} <= anchors


def test_api_pages_have_what_the_documentation_and_the_examples_use(write_api):
    text = "\n".join(write_api.pages().values())
    called = set(re.findall(r"^diffusers_mp\.([\w.]+)\(", text, re.MULTILINE))
    # Constants have no docstring, and modules are shown by their names.
    shown = {f"{module}.{name}" for module, name in write_api.shown_names() if module and not name.isupper()}
    shown -= {module for modules in write_api.SECTIONS.values() for module in modules}
    assert len(shown) > 40
    assert {path for path in shown if path.rpartition(".")[2] not in diffusers_mp.__all__} <= called


def test_tests_that_pages_name_exist():
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)::(test_\w+)`", page.read_text())}
    assert len(named) > 40
    texts = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for module, name in named:
        assert re.search(rf"^ *def {name}\(", texts[module], re.MULTILINE), name
