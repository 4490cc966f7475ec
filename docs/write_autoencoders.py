"""Write the tables of docs/autoencoders.md from the package's own table of autoencoders.

python docs/write_autoencoders.py
"""

import inspect
from pathlib import Path

import diffusers

from diffusers_mp.autoencoders import IMAGE_AUTOENCODERS, REFUSED, geometry


FILE = Path(__file__).with_name("autoencoders.md")
BEGIN, END = "<!-- written by docs/write_autoencoders.py -->\n", "<!-- end of what is written -->\n"

# As published, where the class's defaults are no autoencoder that anybody uses.
_FOUR_LEVELS = {"block_out_channels": [128, 256, 512, 512]}
CONFIGS = {
    "AsymmetricAutoencoderKL": {"down_block_out_channels": [128, 256, 512, 512]},
    "AutoencoderKL": _FOUR_LEVELS,
    "AutoencoderKLHunyuanImage": {
        **{"in_channels": 3, "out_channels": 3, "latent_channels": 64, "spatial_compression_ratio": 32},
    },
    "VQModel": {"block_out_channels": [128, 256, 512]},
}


def shape_of(name: str) -> str:
    """Latents of an image of 256 x 256, or of the only size there is."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    config = {key: parameter.default for key, parameter in parameters.items()}
    of_class = geometry({**config, **CONFIGS.get(name, {}), "_class_name": name})
    size = (of_class.image_size or 256) // of_class.factor
    return f"{of_class.latent_channels} x {size} x {size}"


def statistics_of(row) -> str:
    """What an autoencoder brings, and what is measured."""
    if row.is_packed:
        return "its batch norm, each channel, after packing 2 x 2"
    return "its own config, each position" if row.standardises else "your data, each channel"


def notes_of(row) -> str:
    """What else differs from `vae.decode(latents)`."""
    notes = ["one frame"] * row.frames + ["decoding draws noise"] * row.draws
    if row.value_range == (0, 1):
        notes.append("images in [0, 1]")
    if row.image_size is not None:
        notes.append("one size of images")
    return ", ".join(notes)


def table() -> str:
    """The part of the page that is written."""
    columns = ("class", "encoding returns", "latents of 256 x 256", "standardised by the statistics of", "")
    lines = [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|---" * len(columns) + "|"]
    for name, row in IMAGE_AUTOENCODERS.items():
        kind = "posterior" if row.output == "latent_dist" else "point"
        lines.append(f"| {name} | {kind} | {shape_of(name)} | {statistics_of(row)} | {notes_of(row)} |")
    lines += ["", "Refused, as diffusers " + diffusers.__version__ + " has them:", "", "| class | why |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in sorted(REFUSED.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    before, rest = FILE.read_text().split(BEGIN)
    FILE.write_text(before + BEGIN + table() + END + rest.split(END)[1])
