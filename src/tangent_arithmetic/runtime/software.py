"""Identifies the software that results depend on: our sources and library versions."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

SOURCES = (
    "tangent", "encoders/base.py", "encoders/clip.py", "encoders/images.py",
    "encoders/linearized.py", "arithmetic/features.py", "training", "data/*.py", "data/clip8",
)  # fmt: skip
PACKAGES = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow", "timm")


@functools.cache
def sources_hash(patterns: tuple[str, ...] = SOURCES) -> str:
    """SHA-256 of source files of this project.

    The default set determines numerical results: engine, models, images, training. A change of
    commands, tables or pages does not alter the hash.

    Args:
        patterns: files and folders of the package; a folder stands for all its Python files.
    """
    root = Path(__file__).parent.parent
    files = {
        file
        for pattern in patterns
        for path in root.glob(pattern)
        for file in (path.rglob("*.py") if path.is_dir() else [path])
    }
    digest = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        name = file.relative_to(root).as_posix()
        digest.update(f"{name}|{len(content)}|".encode())
        digest.update(content)
    return digest.hexdigest()


def software(patterns: tuple[str, ...] = SOURCES) -> dict[str, Any]:
    """A JSON-serialisable record that is equal for equal software.

    Args:
        patterns: the source files to include, see `sources_hash`.
    """
    return {"sources": sources_hash(patterns), "libraries": libraries()}


def libraries() -> dict[str, str]:
    """Versions of the installed libraries that results depend on."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
