"""How Sphinx makes the site: `python -m sphinx -W -b html docs docs/_build`."""

import os

import weyl_optax

project = "weyl-optax"
author = "The weyl-optax authors"
copyright = "The weyl-optax authors"
version = release = weyl_optax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
templates_path = []

# Links into the pages of JAX and Optax need the network, and a build must not fail without one:
# the workflow that publishes the site asks for them.
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

# The notebook is kept without its results: a build runs it, and an error in it ends the build.
nb_execution_timeout = 600
nb_execution_raise_on_error = True

autodoc_typehints = "none"  # unions of arrays and schedules: longer than what they annotate
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

html_theme = "sphinx_book_theme"
html_title = "weyl-optax"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
