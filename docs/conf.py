"""How the site is built, by Sphinx: the pages are Markdown, the reference is the docstrings.

Rules:
- the build asks nothing of the network, so names of other packages cannot be looked up; they are listed below, and all
  others must resolve.
- pages link to each other as they do on GitHub: relative paths, headings by their slugs.
"""

from __future__ import annotations

import importlib
import logging
import re
from typing import TYPE_CHECKING, Any

import anyio_channels

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "anyio_channels"
author = project_copyright = "The anyio_channels maintainers"
version = release = anyio_channels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["benchmarks/*"]

# References

nitpicky = True
nitpick_ignore_regex = [
    # The standard library, anyio, Hypothesis and OpenTelemetry: their pages are elsewhere, and the build needs no network.
    ("py:.*", r"(builtins|collections|contextlib|re|types|typing|anyio|hypothesis|opentelemetry)(\..*)?"),
    ("py:class", r"(bool|bytes|dict|float|frozenset|int|list|object|set|str|tuple|type|Any|Self|Pattern|Callable)"),
]

# The table of contents has patterns, of which some may have no pages; Sphinx 9.0 gives this warning no type to suppress it by.
logging.getLogger("sphinx.sphinx.directives.other").addFilter(lambda record: "glob pattern" not in str(record.msg))

# Markdown

myst_heading_anchors = 4
myst_enable_extensions = ["attrs_block", "attrs_inline"]

# Docstrings

autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

# The site

html_theme = "furo"
html_title = f"anyio_channels {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

# Docstrings are plain text: public names in double backquotes become links.

PUBLIC = {
    name: module
    for module in (
        "anyio_channels",
        "anyio_channels.hub",
        "anyio_channels.sync",
        "anyio_channels.testing",
        "anyio_channels.wsgi",
    )
    for name in importlib.import_module(module).__all__
}
NAME = re.compile(rf"``({'|'.join(sorted(PUBLIC))})((?:\.\w+)?)``")


def link_names(*event: Any) -> None:
    """Called by autodoc for each docstring, whose lines come last."""
    lines: list[str] = event[-1]
    lines[:] = [
        NAME.sub(lambda found: f":py:obj:`{found[1]}{found[2]} <{PUBLIC[found[1]]}.{found[1]}{found[2]}>`", line)
        for line in lines
    ]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", link_names)
