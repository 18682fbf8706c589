"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tangent_arithmetic.run.args import Config
from tests.towers import known_towers

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is first imported

MakeArgs = Callable[..., Config]

# the same examples on every machine and in every run; a slow machine is no failure
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, max_examples=40
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Random weights and inputs are the same in every run; the global generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of drawn pictures for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def args(tmp_path: Path, cache: Path) -> MakeArgs:
    """Builds settings whose every folder is temporary; keyword arguments override them."""

    def make(**settings: Any) -> Config:
        folders = {
            "data_location": tmp_path / "data",
            "save": tmp_path / "run",
            "results": tmp_path / "results",
            "cache_dir": cache,
            "openclip_cachedir": tmp_path / "open_clip",
        }
        own = {name: str(path) for name, path in folders.items()}
        return Config(**{**own, "device": "cpu", **settings})

    return make


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a tiny CLIP with batch normalisation, known to open_clip for this session."""
    with known_towers(tmp_path_factory.mktemp("open_clip")):
        yield "RN-Tiny__init__"
