"""Settings of Sphinx; `make docs` builds with warnings as errors and every reference checked."""

import re

import unisono

project = "unisono"
author = "unisono contributors"
copyright = "2026, unisono contributors"
version = release = unisono.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"unisono {version}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]

# Links into other projects would need their inventories from the network at every build, and the
# build has to work without. Their names are shown unlinked, and so are the private types in our
# signatures; all other names of ours have to resolve.
nitpick_ignore_regex = [
    (r"py:.*", r"unisono\.engine\..*"),
    (r"py:.*", r"unisono\.training\.schedule\.Scheduler"),
    (r"py:.*", r"(torch|numpy|np|nn|collections|pathlib|typing|os|io)\..*"),
    (r"py:.*", r"(Tensor|Module|Callable|Iterable|Iterator|Mapping|Sequence|Any|Literal|Path)"),
    (r"py:.*", r"(Array|Axes|Combine|DeviceMesh|Figure|Mask|Metric|Task|Values)"),
]


def set_shapes(app, what, name, obj, options, lines):
    """Set a shape like (N, *) as code: to reStructuredText its star begins emphasis."""
    for number, line in enumerate(lines):
        lines[number] = re.sub(r"(?<!`)\([\w, ]*\*[\w, ]*\)(?!`)", r"``\g<0>``", line)


def setup(app):
    """Hook into autodoc."""
    app.connect("autodoc-process-docstring", set_shapes)
