"""The templates, styles and scripts of pages, in `assets`."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import jinja2


def text(name: str) -> str:
    """The text of a file in `assets`."""
    folder = resources.files("tangent_arithmetic.report")
    return folder.joinpath("assets", name).read_text(encoding="utf-8")


@functools.cache
def asset(name: str) -> jinja2.Template:
    """A template in `assets`; values are escaped unless marked safe."""
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    strict = jinja2.StrictUndefined
    return jinja2.Environment(autoescape=True, undefined=strict, **options).from_string(text(name))
