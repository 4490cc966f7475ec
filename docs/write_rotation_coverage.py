"""Write docs/rotation_swap_coverage.md, the state of every transformer of diffusers in the rotation swap.

python docs/write_rotation_coverage.py
"""

from pathlib import Path

import diffusers
import torch

from diffusers_mp.rotation_swap.coverage import COVERAGE, SUPPORTED
from diffusers_mp.rotation_swap.linear import make_rotation_linears
from diffusers_mp.rotation_swap.sites import ROWS, find_sites
from diffusers_mp.rotation_swap.swap import num_parameters


FILE = Path(__file__).with_name("rotation_swap_coverage.md")

# What the classes have no default for, or none that works, as in published configs.
CONFIGS = {
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "caption_channels": [4096, 4096],
        "llama_layers": list(range(48)),
    },
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 40},
    "PRXTransformer2DModel": {"axes_dim": [32, 32]},
    "Transformer2DModel": {
        "in_channels": 4,
        "sample_size": 32,
        "patch_size": 2,
        "num_layers": 28,
        "attention_head_dim": 72,
        "attention_bias": True,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    },
}

HEAD = """# Which transformers can be swapped

Every transformer of diffusers {version} and its state in `swap_adaln_for_rotation`, written by
`python docs/write_rotation_coverage.py`. Beside these, `MPDiTTransformer2DModel` of this package is supported.

Sizes are those of the class's default config (for a few, of published values). "Saved" is what a swap takes off
when the shift rows go and heads of full rank come: half of the shift rows. Heads of a low rank take nearly all of the
shift rows off, twice as much.

| transformer | state | modulated by | parameters | saved |
|---|---|---|---|---|
"""


def supported_row(name: str) -> str:
    """A line of the table, counted on the meta device."""
    with torch.device("meta"):
        model = getattr(diffusers, name)(**CONFIGS.get(name, {}))
    sites = find_sites(model)
    linears = make_rotation_linears(sites, {"keep_shift": False, "mean_shift": False, "rank": None})
    saved = sum(num_parameters(site.linear) - num_parameters(linears[site.name]) for site in sites)
    owners = {type(module).__name__: None for module in model.modules() if type(module) in ROWS}
    total = num_parameters(model)
    cells = [
        name,
        SUPPORTED,
        ", ".join(owners),
        f"{total / 1e6:,.0f} M",
        f"{saved / 1e6:,.0f} M ({saved / total:.1%})",
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The whole text."""
    rows = [
        supported_row(name) if state == SUPPORTED else f"| {name} | {state} | | | |"
        for name, state in sorted(COVERAGE.items(), key=lambda item: (item[1] != SUPPORTED, item[0]))
    ]
    return HEAD.format(version=diffusers.__version__) + "\n".join(rows) + "\n"


if __name__ == "__main__":
    FILE.write_text(table())
