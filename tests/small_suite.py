"""A cut-down embedded suite for tests that train: a few real pictures and a small control set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tangent_arithmetic.data import registry
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.data.embedded.base import Arrays, EmbeddedSet, Split, render_split
from tangent_arithmetic.data.embedded.shapes import draw_control
from tangent_arithmetic.run.args import Config, parse_arguments

SIZES: dict[Split, int] = {"train": 70, "val": 40, "test": 48}
TASKS = ("Emoji", "FashionMNIST")
OWN = 1000  # added to versions, so that no cache holds small sets under the names of the true ones


def shortened(embedded: EmbeddedSet) -> EmbeddedSet:
    """The first pictures of each split."""

    def build(split: Split) -> Arrays:
        images, labels = embedded.build(split)
        return images[: SIZES[split]], labels[: SIZES[split]]

    return replace(embedded, build=build, version=embedded.version + OWN)


@contextmanager
def small_suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replaces the sets of `TASKS` and the control set by small ones."""
    for name in TASKS:
        monkeypatch.setitem(EMBEDDED_SETS, name, shortened(EMBEDDED_SETS[name]))
    shapes = EMBEDDED_SETS["Shapes"]
    control = replace(
        shapes, build=render_split(draw_control, 64, 306, SIZES), version=shapes.version + OWN
    )
    monkeypatch.setitem(EMBEDDED_SETS, "Shapes", control)
    registry._load.cache_clear()
    yield
    registry._load.cache_clear()


def flags(root: Path, results: Path | str | None = None) -> list[str]:
    """Flags of a small run below `root`, with its results there or in a folder of their own."""
    return [
        f"--tasks={','.join(TASKS)}",
        "--epochs=1",
        "--batch-size=32",
        "--n-eval-points=3",
        "--device=cpu",
        f"--save={root / 'checkpoints'}",
        f"--results={results or root / 'results'}",
        f"--cache-dir={root / 'cache'}",
    ]


def small_config(root: Path) -> Config:
    """The same as settings."""
    return parse_arguments(flags(root))


def random_vector(
    theta: Mapping[str, Tensor], size: float = 0.3, seed: int = 0
) -> dict[str, Tensor]:
    """A random task vector whose steps are `size` of the weights' own size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * value.abs().mean() * torch.randn(value.shape, generator=generator)
        for name, value in theta.items()
        if value.is_floating_point()
    }
