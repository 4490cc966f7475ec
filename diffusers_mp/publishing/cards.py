"""What all cards share: a template filled and written, and values as lines of Markdown."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from huggingface_hub import ModelCard, ModelCardData

from ..files import whole_file
from ..masking import mask, masked
from .hub import CARD_NAME, WEIGHTS


_TEMPLATES = Path(__file__).parent / "templates"


def filled(templates: Sequence[str], parts: Mapping[str, str]) -> str:
    """Templates of `templates/`, one after the other, with their parts; sections without content are left out."""
    text = "".join((_TEMPLATES / f"{name}.md").read_text(encoding="utf-8") for name in templates)
    text = Template(text).substitute(parts)
    text = re.sub(r"^## .*\n\s*(?=## )", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def write_card(folder: Path, card_data: ModelCardData, text: str) -> ModelCard:
    """Put a card of these data and this text, without secrets, into a folder in place of another."""
    # Before they are YAML, in which brackets have a meaning.
    card_data = ModelCardData(**masked(card_data.to_dict()))
    card = ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{mask(text)}\n")
    with whole_file(folder / CARD_NAME) as unfinished:
        card.save(unfinished)
    return card


def licence(license: str | None, license_name: str | None, license_link: str | None) -> str:
    """The licence of the weights by its name, with its address if there is one."""
    if license is None:
        return "None was given: ask the author before you use them."
    name = text_of(license_name or license)
    return f"[{name}]({license_link})" if license_link else name


def told_arguments(arguments: Mapping, names: Sequence[str]) -> str:
    """A table of these arguments, as far as they were given; no others are told."""
    rows = [(name, arguments[name]) for name in names if arguments.get(name) is not None]
    return table(("argument", "value"), rows)


def table(header: tuple[str, ...], rows: Sequence[tuple]) -> str:
    """Lines of Markdown, none without rows."""
    lines = [header, ["---"] * len(header), *(map(text_of, row) for row in rows)] if rows else []
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def text_of(value) -> str:
    """A value on one line of Markdown, escaped where it would be markup."""
    if isinstance(value, float):
        value = f"{value:.5g}"
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]|<>])", r"\\\1", text)


def quoted(value: str | list) -> str:
    """Python source of names or ids, with the quotes that formatters ask for."""
    return json.dumps(value, ensure_ascii=False)


def weights(folder: Path) -> tuple[str, list[Path]]:
    """The variant that counts of a model's folder, and its files: the plain weights, "", if they are there."""
    variants = defaultdict(list)
    for path in sorted(folder.glob(WEIGHTS)):
        # What stands between two dots but for the number of a shard: name.fp16-00001-of-00002.safetensors.
        variants[".".join(re.sub(r"-\d{5}-of-\d{5}", "", path.name).split(".")[1:-1])].append(path)
    variant = min(variants, default="")
    return variant, variants[variant]


def variant_option(folder: Path, names: Sequence[str]) -> str:
    """What `from_pretrained` has to be told where weights of these parts are there in a variant alone."""
    variant = max(weights(folder / name)[0] for name in names)
    return f", variant={quoted(variant)}" if variant else ""
