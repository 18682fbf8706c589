"""The pictures of a split: their labels, their content as hashes, and whether they can be decoded.

Large splits are read by several processes.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from tangent_arithmetic.data.base import Pictures
from tangent_arithmetic.data.identity import samples_of
from tangent_arithmetic.runtime.logs import progress

SERIAL = 5_000  # pictures below which starting processes costs more than they gain

Finding = tuple[str, str | None, str | None]  # name, hash of its content, why it cannot be read


def inspect(path: str) -> Finding:
    """The SHA-256 of a picture's file, and why it cannot be decoded, if it cannot."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return path, None, error.strerror
    digest = hashlib.sha256(content).hexdigest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata in pictures that are fine
            with Image.open(io.BytesIO(content)) as image:
                image.load()
    except UnidentifiedImageError:
        return path, digest, "not a picture"
    except Exception as error:  # whatever a decoder says of a damaged file
        return path, digest, str(error) or type(error).__name__
    return path, digest, None


def findings_of(pictures: Pictures, description: str, num_workers: int) -> Iterator[Finding]:
    """The content hash of every picture, or why it cannot be decoded."""
    paths = _paths(pictures)
    if paths is None:
        data = np.asarray(pictures.data)  # type: ignore[attr-defined]
        for i, pixels in enumerate(progress(data, description, len(data))):
            yield f"picture {i}", hashlib.sha256(pixels.tobytes()).hexdigest(), None
    elif num_workers < 2 or len(paths) < SERIAL:
        yield from map(inspect, progress(paths, description, len(paths)))
    else:
        with get_context("spawn").Pool(num_workers) as pool:
            yield from progress(pool.imap(inspect, paths, 64), description, len(paths))


def _paths(pictures: Pictures) -> list[str] | None:
    samples = samples_of(pictures)
    return None if samples is None else [str(path) for path, _ in samples]
