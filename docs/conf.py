"""Sphinx: `make docs` builds the pages of this folder, every warning an error."""

import sys
from pathlib import Path

import diffusers_mp


sys.path.insert(0, str(Path(__file__).parent))
import write_api


write_api.write()

project = "diffusers-mp"
version = release = diffusers_mp.__version__
extensions = ["myst_parser"]
# Links to headings, as GitHub names them.
myst_heading_anchors = 4
nitpicky = True
html_theme = "furo"
html_title = f"diffusers-mp {version}"
html_show_copyright = False
