"""The site: `sphinx-build -W -b html docs <out>`; how, and what it checks: contributing.md."""

import re

project = "wush_jax"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "wush_jax"
html_show_copyright = False

# Notebooks are shown with the output they are committed with; a test runs them.
nb_execution_mode = "off"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

# Docstrings name things in single backticks: links where there is something to link to.
default_role = "py:obj"
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def escape_stars(app, what, name, obj, options, lines):
    """A shape such as ``(*batch, N, K)`` in a docstring is no emphasis."""
    lines[:] = [re.sub(r"(?<!`)\(\*(?=\w)", r"(\\*", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", escape_stars)
