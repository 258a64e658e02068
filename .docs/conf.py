"""Settings of the site, for Sphinx. `build.py` runs it: pages are made first, then built with these settings."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import mergeguard  # noqa: E402 - of this checkout, whether it is installed or not

project = "mergeguard"
author = "the mergeguard authors"
project_copyright = author
version = release = mergeguard.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "references"]
html_theme = "furo"
html_title = f"mergeguard {release}"
html_copy_source = False
html_show_sourcelink = False

nitpicky = True
default_role = "known"  # `name` links to what has that name, and else is code; see references.py

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
    "ignore-module-all": True,
}
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
toc_object_entries = False
python_maximum_signature_line_length = 100

myst_heading_anchors = 4

linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors = False  # pages of others name their anchors by script
