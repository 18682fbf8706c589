"""Identifies the software that results depend on: our sources and library versions."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

_ENCODERS = tuple(f"encoders/{name}.py" for name in ("base", "clip", "images", "linearized"))
_ENCODERS += ("encoders/backbones",)
_DATA = ("data/*.py", "data/clip8", "data/clip20")
SOURCES = ("tangent", *_ENCODERS, "arithmetic/features.py", "training", *_DATA)
PACKAGES: tuple[str, ...] = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow", "timm")
PACKAGES += ("transformers", "tokenizers")


@functools.cache
def sources_hash(patterns: tuple[str, ...] = SOURCES) -> str:
    """SHA-256 of source files of this project.

    Args:
        patterns: files and folders of the package; a folder stands for all its Python files. The
            default is what determines numerical results: engine, models, images, training.
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
        digest.update(f"{file.relative_to(root).as_posix()}|{len(content)}|".encode() + content)
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
