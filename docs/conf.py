"""Sphinx: `make docs` builds the pages of this folder, every warning an error."""

import diffusers_mp


project = "diffusers-mp"
version = release = diffusers_mp.__version__
extensions = ["myst_parser"]
# Links to headings, as GitHub names them.
myst_heading_anchors = 4
nitpicky = True
html_theme = "furo"
html_title = f"diffusers-mp {version}"
html_show_copyright = False
