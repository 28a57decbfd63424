"""The site: Markdown pages, built offline by `make docs`; tables of methods and options come from code."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from weightsmith import __version__

project = "Weightsmith"
author = "the Weightsmith authors"
copyright = "the Weightsmith authors"
release = version = __version__

extensions = ["myst_parser", "code_tables"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_ext"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"Weightsmith {version}"
html_copy_source = False
html_show_sphinx = False
