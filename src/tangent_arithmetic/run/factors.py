"""The factors of a run's other data sets: collected where they are missing, read, and merged."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tangent_arithmetic.data.base import Pictures
from tangent_arithmetic.data.identity import pictures_hash
from tangent_arithmetic.data.loading import SeededPictures
from tangent_arithmetic.encoders.base import ModuleEncoder, Transform
from tangent_arithmetic.run.pretrained import zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.digests import json_hash
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.training.factors import (
    Factors,
    Settings,
    collect,
    load_factors,
    merge,
    save_factors,
)

logger = logging.getLogger(__name__)

OF_FACTORS = ("factors", "factor_images", "factor_rank", "factor_directions")
ORDER = 17  # in the seed of the images' order
GROWTH = 2  # of rank and directions when data sets are merged
DIGITS = 10  # of the hash in a file's name


class Sample:
    """The first images of a data set in a random order, transformed when they are read.

    Args:
        pictures: the data set.
        transform: maps a picture to a tensor.
        count: of images; all if there are fewer.
        seed: of the order.
    """

    def __init__(
        self, pictures: Pictures, transform: Transform | None, count: int, seed: int
    ) -> None:
        order = np.random.default_rng((seed, ORDER)).permutation(len(pictures))
        self.indices = [int(index) for index in order[:count]]
        self.examples = SeededPictures(pictures, transform, seed)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Tensor]:
        for index in self.indices:
            yield self.examples[index][0]


def factors_facts(run: Run, task: str) -> dict[str, Any]:
    """What a checkpoint records of the factors that it was trained with."""
    return {"others": run.others(task), **{name: getattr(run.config, name) for name in OF_FACTORS}}


def factors_of(run: Run, task: str) -> Factors:
    """The mean of the factors of the data sets that a task is to leave alone."""
    encoder, theta0_hash = zeroshot_encoder(run)
    parts = [factors_of_set(run, name, encoder, theta0_hash) for name in run.others(task)]
    config = run.config
    return merge(
        parts, rank=GROWTH * config.factor_rank, directions=GROWTH * config.factor_directions
    )


def factors_of_set(run: Run, name: str, encoder: ModuleEncoder, theta0_hash: str) -> Factors:
    """The factors of one data set, from its file; rank 0 collects them if there is none.

    Args:
        run: the run.
        name: the data set, without Val; its training images are used.
        encoder: the pre-trained encoder.
        theta0_hash: its content hash.
    """
    pictures = run.data.dataset(f"{name}Val").train
    made = _provenance(run, name, pictures, encoder, theta0_hash)
    path = run.folder / f"factors_{name}_{_digest(made)}.safetensors"
    if ddp.broadcast(not path.is_file()):
        if ddp.is_main_process():
            _collect(run, name, pictures, encoder, made, path)
        ddp.barrier()
    return load_factors(path, theta0_hash)


def _provenance(
    run: Run, name: str, pictures: Pictures, encoder: ModuleEncoder, theta0_hash: str
) -> dict[str, Any]:
    """All that determines the factors of a data set."""
    return {
        "set": name,
        "content": pictures_hash(pictures),
        "theta0": theta0_hash,
        "preprocess": repr(getattr(encoder.val_preprocess, "recipe", encoder.val_preprocess)),
        "precision": "fp32",
        "seed": run.seed,
        "probes": Settings().probes,
        **{setting: getattr(run.config, setting) for setting in OF_FACTORS},
    }


def _digest(made: Mapping[str, Any]) -> str:
    return json_hash(made)[:DIGITS]


def _collect(
    run: Run,
    name: str,
    pictures: Pictures,
    encoder: ModuleEncoder,
    made: dict[str, Any],
    path: Path,
) -> None:
    """Collects the factors of a data set and writes their file."""
    config = run.config
    settings = Settings(config.factors, config.factor_rank, config.factor_directions, seed=run.seed)
    sample = Sample(pictures, encoder.val_preprocess, config.factor_images, run.seed)
    found = collect(
        encoder.to(run.device), sample, settings, lambda images: progress(images, f"{name} factors")
    )
    info = {**made, "images": len(sample)}
    save_factors(path, replace(found, info=info), made["theta0"])
    logger.info("%s: factors of %d images written to %s", name, len(sample), path)
