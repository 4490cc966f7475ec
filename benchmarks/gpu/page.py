"""The page of a run on a GPU, made of its record: a table for each thing that was measured, row by row."""

from collections.abc import Mapping
from typing import Any


TITLE = "# On one GPU"
HOW = """\
One command measures the package on one large GPU, without network, on the torch that is installed there:

```bash
make gpu
```

It writes this page and `benchmarks/records/gpu.json`, a row as soon as it is there: the tests that need a GPU; XL/2 at
256 tokens, where E, F, A and diffusers' DiT take turns, training and inference, eager and compiled; B/2 at 64 tokens,
eager; the data loader's share of an update; FSDP2; sampling with guidance; S/2 on digits for two minutes; B/2
compiled. After `--minutes` (8) it stops, and says what was left out; `--part` picks some. A machine without diffusers
is brought wheels, for its version of Python:

```bash
python benchmarks/gpu/gpu.py --vendor build/wheels --python_version 3.12
make gpu WHEELS=build/wheels PYTHON=python3.12
```
"""
NOT_RUN = "**Not run**: no GPU was at hand. Rehearsed on a CPU with tiny models, of which no figure is shown."
REHEARSAL = "**A rehearsal with tiny models: no figure here is a result.**"
LEGEND = """\
Medians, with quartiles in brackets, of rounds in which each runs once; a ratio is the median of those within a round,
and below 1 the first is faster. E and F rotate, A shifts; all have one depth and width. A training step is
forward and backward under bf16 autocast, fused Adam, forced normalisation and averages of two widths; inference is in
bf16. GiB are what a model holds and the most that a call adds. FLOPs are those of the matrix products, by formula, a
training step three forwards; their rate is shown as a share of the bf16 product's. Compiled is block by block, which
the first call includes.
"""


def text(record: Mapping[str, Any] | None) -> str:
    """The page in Markdown.

    Args:
        record (mapping, optional): `tiny`, whether no figure counts; `facts`, name to text; `rows`, a dict each with
            `part`, `table`, `what` and values; `left_out`, lines; `plots`, file name to caption. None: no run yet.
    Returns:
        str: the page, whose plots lie beside it.
    """
    if record is None:
        return f"{TITLE}\n\n{NOT_RUN}\n\n{HOW}"
    facts = record["facts"]
    lines = [TITLE, ""]
    if record["tiny"]:
        lines += [REHEARSAL, ""]
    lines += [f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in facts.items()]
    lines += [f"- left out: {line}" for line in record["left_out"]]
    lines += ["", LEGEND]
    for name in dict.fromkeys(row["table"] for row in record["rows"]):
        lines += [f"## {name}", "", table([row for row in record["rows"] if row["table"] == name]), ""]
    for plot, caption in record["plots"].items():
        lines += [f"![{caption}]({plot})", ""]
    return "\n".join([*lines, "## How", "", HOW])


def table(rows: list[Mapping[str, Any]]) -> str:
    """Rows as a table, with a column for each value that any of them has, in the order in which they come up."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("part", "table", "what")))
    lines = [["", *(name.replace("_", " ") for name in columns)], ["---"] * (len(columns) + 1)]
    lines += [[row["what"], *(cell(row.get(name, "")) for name in columns)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """A number with three digits, a spread as median and quartiles, text as it is."""
    if isinstance(value, Mapping):
        return f"{number(value['median'])} ({number(value['low'])} – {number(value['high'])})"
    return number(value) if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
