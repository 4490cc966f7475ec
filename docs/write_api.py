"""The API pages, from the docstrings: `conf.py` writes them to docs/api when the site is built."""

import abc
import ast
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import diffusers_mp


ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).with_name("api")

# Titles of the pages in their order, and the modules that are on each.
SECTIONS = {
    "Transformer": ["transformer_mpdit"],
    "Pipeline": ["pipeline_mpdit", "guidance", "schedulers", "predictions"],
    "Autoencoders": ["autoencoders"],
    "Sizes and configurations": ["presets"],
    "Layers": ["layers", "rows"],
    "Pinned norms": ["pinned_norms"],
    "Modulations": ["modulation"],
    "Equations as functions": ["functional"],
    "Rotation swap": ["rotation_swap", "rotation_swap.swap", "rotation_swap.checks", "rotation_swap.sites"],
    "Classes of a model": ["class_embeddings", "original_dit"],
    "Optimization": ["optimization"],
    "Training": [
        "training",
        "training.arguments",
        "training.objective_arguments",
        "training.batch_size",
        "training.checks",
        "training.model",
        "training.engine",
        "training.optimizers",
        "training.run",
        "training.resume",
        "training.watchdog",
        "training.preview",
        "training.progress",
        "training.summary",
        "training.dry_run",
        "training.verdict",
        "training.finetuning",
    ],
    "What scripts show": ["start_block", "sheets"],
    "Command lines": ["arguments", "scripts"],
    "Averages of weights": ["averages.ema", "averages.snapshots", "averages.reconstruction"],
    "Diagnostics": ["diagnostics.recorder", "diagnostics.norm_watch", "diagnostics.history", "diagnostics.plots"],
    "Evaluation": [
        "evaluation.frechet",
        "evaluation.precision_recall",
        "evaluation.generation",
        "evaluation.classes",
        "evaluation.model",
        "evaluation.cells",
        "evaluation.reference",
        "evaluation.features",
        "evaluation.heat_map",
        "evaluation.outputs",
        "evaluation.summary",
    ],
    "Data": ["data.images", "data.pixels", "data.settings", "data.encoding", "data.latents", "data.feeding"],
    "Files": ["files", "sources", "masking"],
    "Shards": ["sharding"],
    "Publishing": [
        "publishing.hub",
        "publishing.model_card",
        "publishing.rotation_card",
        "publishing.evaluation_card",
    ],
}
# Modules that are meant to be used as a whole.
WHOLE = ("autoencoders", "functional", "diagnostics.plots", "training")
# What the functions of the page return, take, raise or put into a model, and what docs/equations.md names.
ALSO = {
    ("rotation_swap", "RotationLinear"),
    ("rotation_swap.swap", "SwapReport"),
    ("pinned_norms", "PinnedNorms"),
    ("rotation_swap.sites", "Site"),
    ("diagnostics.history", "load_history"),
    ("publishing.hub", "HubError"),
    ("averages.reconstruction", "Reconstruction"),
    ("averages.reconstruction", "reconstruction_weights"),
    ("averages.snapshots", "Snapshot"),
}
HEAD = """# API

All names of `diffusers_mp`; of its modules, those that code in the README, on these pages and in the examples imports,
with what belongs to them. From the docstrings.

"""
QUOTES = str.maketrans("'", '"')
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Warns|Shapes):$")
ENTRY = re.compile(r"^(\*{0,2}\w[\w*, ]*?)(?: \((.+?)\))?: (.+)$", re.DOTALL)
CODE = re.compile(r"(?<![\[`])`([\w.]+)`(?![\]`])")


def shown_names() -> Iterator[tuple[str, str]]:
    """Module and name of each import from the package in the README, the documentation and the examples."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    sources = [block for page in pages for block in PYTHON.findall(page.read_text())]
    sources += [script.read_text() for script in sorted((ROOT / "examples").glob("*.py"))]
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "diffusers_mp":
                for alias in node.names:
                    yield node.module.removeprefix("diffusers_mp").removeprefix("."), alias.name


def documented_names() -> dict[str, list[str]]:
    """Module → names of the page, in their order; names of the package are with the module that it takes them from."""
    names = {module: set() for modules in SECTIONS.values() for module in modules}
    for name in diffusers_mp.__all__:
        if name != "__version__":
            names[diffusers_mp._MODULE_OF[name]].add(name)
    for module in WHOLE:
        names[module] |= public_names(module)
    for module, name in (*shown_names(), *ALSO):
        path = f"{module}.{name}".removeprefix(".")
        if path in names:  # a module itself
            names[path] |= public_names(path)
        elif module and is_documented(getattr(module_of(module), name)):
            names[module].add(name)
    return {module: sorted(found, key=list(members(module)).index) for module, found in names.items()}


def module_of(name: str):
    return importlib.import_module(f"diffusers_mp.{name}")


def members(module: str) -> dict:
    """What a module of ours knows, in its order, lazy names among it."""
    found = module_of(module)
    return {name: getattr(found, name) for name in getattr(found, "_MODULE_OF", vars(found))}


def is_documented(value) -> bool:
    """Classes and functions are; constants say what they are in a comment."""
    return inspect.isclass(value) or inspect.isfunction(value)


def public_names(module: str) -> set[str]:
    """Classes and functions of a module of ours, or of its parts if it is a package."""
    return {
        name
        for name, value in members(module).items()
        if name[0] != "_" and is_documented(value) and value.__module__.startswith(f"diffusers_mp.{module}")
    }


def signature(value) -> str:
    """Parameters with their defaults; types are in the list of arguments."""
    if inspect.isclass(value) and issubclass(value, Exception) and "__init__" not in vars(value):
        return "message"
    parts, before = [], None
    for name, parameter in inspect.signature(value).parameters.items():
        if name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and before not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            parts.append("*")
        before = parameter.kind
        text = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
        if parameter.default is not parameter.empty:
            default = parameter.default
            if inspect.isclass(default) or inspect.isfunction(default):
                text += f"={default.__name__.replace('<lambda>', '...')}"
            else:
                text += f"={repr(default).translate(QUOTES)}"
        parts.append(text)
    return ", ".join(parts)


def call(path: str, parameters: str) -> str:
    """A signature as a block of code, one parameter per line if it is long."""
    line = f"{path}({parameters})"
    if len(line) > 110:
        line = f"{path}(\n" + "".join(f"    {part},\n" for part in re.split(r", (?![^(\[]*[)\]])", parameters)) + ")"
    return f"```py\n{line}\n```\n"


def to_markdown(docstring: str) -> str:
    """Docstring to Markdown: indented lines as code, sections as lists."""
    text, sections, current = [], [], None
    for line in docstring.splitlines():
        if match := SECTION.match(line):
            current = []
            sections.append((match[1], current))
        elif current is not None and (line.startswith("    ") or not line):
            current.append(line.removeprefix("    "))
        else:
            current = None
            text.append(line)
    parts = [fence_code(text)]
    for title, lines in sections:
        items = list(entries(title, lines))
        is_list = title in ("Args", "Attributes") or len(items) > 1
        parts.append(
            f"{title}:\n\n" + "".join(f"- {item}\n" for item in items) if is_list else f"{title}: {items[0]}\n"
        )
    return "\n".join(parts)


def fence_code(lines: list[str]) -> str:
    """Indented lines between fences, and the other lines as they are."""
    done, is_code = [], False
    for index, line in enumerate(lines):
        if not line and is_code and index + 1 < len(lines) and lines[index + 1].startswith("    "):
            done.append(line)
            continue
        if line.startswith("    ") != is_code:
            if not is_code and done and done[-1]:
                done.append("")
            done.append("```" if is_code else "```text")
            if is_code and line:
                done.append("")
            is_code = not is_code
        done.append(line.removeprefix("    ") if is_code else line)
    if is_code:
        done.append("```")
    return "\n".join(done).strip() + "\n"


def entries(title: str, lines: list[str]) -> Iterable[str]:
    """Entries of a section: name, type and text."""
    joined = []
    for line in filter(None, lines):
        is_new = title in ("Args", "Attributes", "Raises", "Warns") and not line.startswith(" ")
        if joined and not (is_new and ENTRY.match(joined[-1]) and ENTRY.match(f"{line} ")):
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line.strip())
    for entry in joined:
        match = ENTRY.match(entry)
        if title in ("Args", "Attributes") and match:
            name, kind, text = match.groups()
            yield f"`{name}`" + (f" (*{kind}*)" if kind else "") + f": {text}"
        elif title in ("Returns", "Yields") and ": " in entry:
            kind, text = entry.split(": ", 1)
            yield f"*{kind}*: {text}"
        elif title in ("Raises", "Warns") and match:
            yield f"`{match[1]}`: {match[3]}"
        else:
            yield entry


def describe(module: str, name: str) -> str:
    """Heading, signature and docstring of a name, and of its methods."""
    value = getattr(module_of(module), name)
    path = f"diffusers_mp.{name}" if name in diffusers_mp.__all__ else f"diffusers_mp.{module}.{name}"
    parts = [f"## `{name}`\n", call(path, signature(value)), to_markdown(inspect.getdoc(value))]
    if inspect.isclass(value):
        if bases := [f"`{path}`" for path in map(public_path, value.__bases__) if path]:
            parts.insert(2, f"Bases: {', '.join(bases)}\n")
        members = {key: member for key, member in vars(value).items() if key == "__call__" or key[0] != "_"}
        properties = {
            key: member for key, member in members.items() if isinstance(member, property) and member.__doc__
        }
        if properties:
            parts.append(
                "Properties:\n\n"
                + "".join(f"- `{key}`: {' '.join(inspect.getdoc(p).split())}\n" for key, p in properties.items())
            )
        for key, member in members.items():
            function = getattr(member, "__func__", member)
            if inspect.isfunction(function) and function.__doc__:
                bound = function if function is member else getattr(value, key)
                owner = name if isinstance(member, (classmethod, staticmethod)) else ""
                parts.append(f"### `{name}.{key}`\n")
                parts.append(call(f"{owner}.{key}", signature(bound)))
                parts.append(to_markdown(inspect.getdoc(function)))
    return "\n".join(parts)


def public_path(base: type) -> str | None:
    """Where another package has a base class, `torch.nn.Linear`; None for those that tell a user nothing."""
    if base in (object, abc.ABC) or base.__name__[0] == "_":
        return None
    parts = base.__module__.split(".")
    paths = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    path = next(path for path in paths if getattr(importlib.import_module(path), base.__name__, None) is base)
    return None if path.startswith("diffusers_mp.") else f"{path}.{base.__name__}".removeprefix("builtins.")


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def file_name(title: str) -> str:
    return f"{anchor(title)}.md"


def pages() -> dict[str, str]:
    """The text of each page by its file name."""
    names = documented_names()
    place = {name: title for title, modules in SECTIONS.items() for module in modules for name in names[module]}
    texts, index = {}, []
    for title, modules in SECTIONS.items():
        members = [(module, name) for module in modules for name in names[module]]
        links = ", ".join(f"[`{name}`]({file_name(title)}#{anchor(name)})" for _, name in members)
        index.append(f"- [{title}]({file_name(title)}): {links}\n")
        body = [with_links(describe(module, name), name, names, place) for module, name in members]
        head = f"# {title}\n\n{to_markdown(inspect.getdoc(module_of(modules[0])))}"
        texts[file_name(title)] = "\n".join([head, *body])
    contents = "\n".join(file_name(title).removesuffix(".md") for title in SECTIONS)
    texts["index.md"] = f"{HEAD}{''.join(index)}\n```{{toctree}}\n:hidden:\n\n{contents}\n```\n"
    return texts


def with_links(text: str, own_name: str, names: dict[str, list[str]], place: dict[str, str]) -> str:
    """The text with links at names of the package, and at names of modules that are written with their module."""

    def link(match):
        module, _, name = match[1].rpartition(".")
        known = [full for full in names if full.rpartition(".")[2] == module and name in names[full]]
        is_known = known or match[1] in diffusers_mp.__all__
        return f"[{match[0]}]({file_name(place[name])}#{anchor(name)})" if is_known and name != own_name else match[0]

    return CODE.sub(link, text)


def write() -> None:
    """Write the pages, and nothing where they are the same, so that a build that changes nothing does nothing."""
    FOLDER.mkdir(exist_ok=True)
    texts = pages()
    for path in FOLDER.iterdir():
        if path.name not in texts:
            path.unlink()  # of a section that had another name
    for name, text in texts.items():
        if not (FOLDER / name).is_file() or (FOLDER / name).read_text() != text:
            (FOLDER / name).write_text(text)
