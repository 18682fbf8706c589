"""The software that numbers depend on: this project's sources and the libraries below them."""

from __future__ import annotations

import functools
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

SOURCES = (
    "tangent", "encoders/clip.py", "encoders/images.py", "encoders/linearized.py",
    "arithmetic/features.py", "training", "data/*.py", "data/clip8",
)  # fmt: skip
PACKAGES = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow", "timm")


@functools.cache
def sources_hash(patterns: tuple[str, ...] = SOURCES) -> str:
    """SHA-256 of sources of this project.

    By default of those that decide what is computed: engine, models, pictures, training. Commands,
    tables and pages are not among them, so that a change there invalidates nothing.

    Args:
        patterns: files and folders of the package; of a folder all Python files count.
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
    """What tells whether numbers were computed by the same software, as JSON.

    Args:
        patterns: the sources that count, see `sources_hash`.
    """
    return {"sources": sources_hash(patterns), "libraries": libraries()}


def libraries() -> dict[str, str]:
    """The versions of the libraries that numbers depend on, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
