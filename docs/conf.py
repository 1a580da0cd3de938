"""The site: `sphinx-build -W docs docs/_build`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

import messages  # noqa: E402

import safegrad_optim  # noqa: E402

project = "safegrad_optim"
release = version = safegrad_optim.__version__
copyright = "the authors of safegrad_optim"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"safegrad_optim {version}"
exclude_patterns = ["_build", "evidence/first_adapter/*.csv"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
# Of torch and the standard library, which are not on this site.
nitpicky = False


def setup(app):
    """Write the list of messages before the pages are read."""
    app.connect("builder-inited", lambda _: messages.write(Path(__file__).parent / "messages.md"))
