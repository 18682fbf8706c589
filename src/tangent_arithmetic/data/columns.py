"""The columns of own data: names that say what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img"),
    "text": ("text", "sentence", "review", "content", "body", "comment", "message", "document"),
    "label": ("label", "labels", "class", "classes", "category", "target", "tags", "species"),
    "split": ("split", "subset", "partition", "fold"),
}


def known_columns(kind: str, names: Iterable[object]) -> list[str]:
    """The columns whose names say what they hold, the usual names first.

    Args:
        kind: a key of `COLUMNS`.
        names: of all columns; case does not matter.
    """
    lower = {name.lower().strip(): name for name in names if isinstance(name, str)}
    return [lower[name] for name in COLUMNS[kind] if name in lower]
