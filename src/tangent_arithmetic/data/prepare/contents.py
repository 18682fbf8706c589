"""Hashes of all images of a split, and a check that they can be decoded, in several processes."""

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
from tangent_arithmetic.data.files import samples_of
from tangent_arithmetic.runtime.logs import progress

SERIAL = 5_000  # images; below, starting processes takes longer than it saves

Finding = tuple[str, str | None, str | None]  # name, content hash, reason why it cannot be read


def inspect(path: str) -> Finding:
    """The SHA-256 of an image file, and the reason if it cannot be decoded."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return path, None, error.strerror
    digest = hashlib.sha256(content).hexdigest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata in intact images
            with Image.open(io.BytesIO(content)) as image:
                image.load()
    except UnidentifiedImageError:
        return path, digest, "not an image"
    except Exception as error:  # decoders raise almost anything for a damaged file
        return path, digest, str(error) or type(error).__name__
    return path, digest, None


def _pixels(pictures: Pictures, index: int) -> Finding:
    """The SHA-256 of an image's pixels, and the reason if it cannot be read."""
    try:
        pixels = np.asarray(pictures[index][0])
    except Exception as error:  # h5py raises several types for a damaged file
        return f"image {index}", None, str(error) or type(error).__name__
    return f"image {index}", hashlib.sha256(pixels.tobytes()).hexdigest(), None


def findings_of(pictures: Pictures, description: str, num_workers: int) -> Iterator[Finding]:
    """Yields the content hash of every image, or the reason why it cannot be decoded."""
    samples = samples_of(pictures)
    if samples is None:
        indices = range(len(pictures))
        yield from (_pixels(pictures, i) for i in progress(indices, description, len(indices)))
        return
    paths = [str(path) for path, _ in samples]
    if num_workers < 2 or len(paths) < SERIAL:
        yield from map(inspect, progress(paths, description, len(paths)))
    else:
        with get_context("spawn").Pool(num_workers) as pool:
            yield from progress(pool.imap(inspect, paths, 64), description, len(paths))
