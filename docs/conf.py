"""Sphinx configuration."""

import importlib.util
import sys
from pathlib import Path

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
