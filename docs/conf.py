"""Sphinx configuration."""

import importlib.util
import re
import sys
from pathlib import Path

from sphinx.util.inspect import TypeAliasForwardRef

import bayes_kfac

sys.path.append(str(Path(__file__).parent / "_extensions"))

project = "bayes_kfac"
author = "The bayes_kfac developers"
copyright = "2026, the bayes_kfac developers"
release = bayes_kfac.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "bayes_kfac"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_type_aliases = {name: name for name in ("ArrayLike", "TensorLike")}  # not all that they stand for
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
exclude_patterns = ["_build"]
if importlib.util.find_spec("latex2mathml"):  # without it formulas are drawn by MathJax, from the network
    extensions.append("mathml")
    html_math_renderer = "mathml"
# The notebooks are committed with the outputs of their full run; tests run them in smoke mode.
nb_execution_mode = "off"
copybutton_exclude = ".linenos, .gp, .go"
nitpicky = False
html_static_path = ["_static"]
html_css_files = ["custom.css"]


def _keep_trailing_underscores(app, what, name, obj, options, lines):
    """Napoleon escapes ``posterior_`` in lists of parameters, not of attributes: there it would be a link."""
    lines[:] = [re.sub(r"^(:(?:ivar|vartype) \w*[^\W_])_:", r"\1\\_:", line) for line in lines]


# in a union, Sphinx shows an alias by its representation
TypeAliasForwardRef.__repr__ = lambda alias: alias.name


def setup(app):
    """Called by Sphinx; napoleon has the default priority of 500."""
    app.connect("autodoc-process-docstring", _keep_trailing_underscores, priority=600)
