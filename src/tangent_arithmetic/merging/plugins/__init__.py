"""Plug-ins, one per file: they change the task vectors before any method merges them.

All modules of this folder are imported, and so registered. A plug-in sees pieces, as a method does:

    @plugin("halve", source="none")
    def halve(piece: Piece) -> Iterator[Tensor]:
        return (tau / 2 for tau in piece.taus())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tangent_arithmetic.merging.registry import PLUGINS, Plugin
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.registry import import_modules

__all__ = ["PLUGINS", "Chosen", "Specification", "chosen_plugins", "written_plugins"]

Specification = str | Mapping[str, Mapping[str, Any]]
Chosen = tuple[tuple[Plugin, dict[str, Any]], ...]

import_modules(__name__, __path__)


def chosen_plugins(plugins: Sequence[Specification]) -> Chosen:
    """Plug-ins with all their options, in the order in which they are applied.

    Args:
        plugins: for each its name, or {name: {option: value}}.

    Raises:
        UsageError: for anything else, an unknown plug-in, or an option that it does not have.
    """
    if isinstance(plugins, str | Mapping) or not isinstance(plugins, Sequence):
        raise _malformed(plugins)
    return tuple(map(_chosen, plugins))


def written_plugins(chosen: Chosen) -> list[dict[str, dict[str, Any]]]:
    """The form of `chosen_plugins` that a recipe holds, with all options."""
    return [{plugin.name: options} for plugin, options in chosen]


def _chosen(plugin: Specification) -> tuple[Plugin, dict[str, Any]]:
    named = {plugin: {}} if isinstance(plugin, str) else plugin
    if not isinstance(named, Mapping) or len(named) != 1:
        raise _malformed(plugin)
    ((name, options),) = named.items()
    chosen = PLUGINS[str(name)]
    if not isinstance(options, Mapping):
        raise _malformed(plugin)
    return chosen, chosen.options(options)


def _malformed(got: object) -> UsageError:
    return UsageError(
        f"plugins must be a list, each a name or {{NAME: {{OPTION: VALUE}}}}, got {got!r}; such as "
        "plugins=[normalise,{lines:{beta:0.5}}]"
    )
