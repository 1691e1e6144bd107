"""Sphinx builds the documentation: `make docs`. Warnings are errors."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

project = "cifar"
author = "the cifar contributors"
copyright = "2026, the cifar contributors"
try:
    release = metadata.version("cifar")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    release = ""

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "cifar"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
nitpicky = False


def _plain_text_to_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings are plain text with `code` in single backticks: make reStructuredText of them, in place."""
    text = []
    for line in lines:
        if line.startswith("    ") and (not text or not text[-1].strip()):  # an indented example
            text += ["::", ""]
        if line.startswith("    "):
            text.append(line)
            continue
        parts = re.split(r"(`[^`]+`)", line)
        text.append("".join(f"`{part}`" if part.startswith("`") else re.sub(r"([*_|\\])", r"\\\1", part) for part in parts))
    lines[:] = text


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _plain_text_to_rst)
