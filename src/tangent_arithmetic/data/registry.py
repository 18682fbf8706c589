"""Data sets by name, and the validation split `<Dataset>Val` of each."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from tangent_arithmetic.data.base import Pictures, Splits, SubsetPictures
from tangent_arithmetic.data.clip8.folders import LazyPictures
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.data.identity import labels_of, split_hash
from tangent_arithmetic.data.loading import (
    BatchPlan,
    EvalBatches,
    RankBatches,
    Transform,
    eval_loader,
    train_loader,
)
from tangent_arithmetic.data.sampling import stratified
from tangent_arithmetic.data.sources import load_public
from tangent_arithmetic.data.suites import Suite
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, unknown
from tangent_arithmetic.runtime.private import expanded

logger = logging.getLogger(__name__)

DEFAULT_CACHE = Path("~/.cache/tangent-arithmetic")


@dataclass(frozen=True)
class ImageDataset:
    """A data set as scripts use it.

    Attributes:
        name: as asked for; with the suffix Val, `test` is the validation split.
        train: untransformed pictures to train on, disjoint from `test`.
        test: untransformed pictures to evaluate on.
        classnames: one phrase a class.
        preprocess: the transform of the loaders.
        batch_size: images a batch of the loaders.
        num_workers: processes of the loaders.
        source: where it was found: folder, torchvision, hub or embedded.
    """

    name: str
    train: Pictures
    test: Pictures
    classnames: tuple[str, ...]
    preprocess: Transform | None
    batch_size: int
    num_workers: int
    source: str = "folder"

    @property
    def train_loader(self) -> DataLoader[Any]:
        """One epoch of shuffled training batches (seed 0)."""
        plan = BatchPlan(len(self.train), self.batch_size, 1, seed=0)
        batches = RankBatches(plan, 0, plan.steps_per_epoch, 0, 1)
        return train_loader(self.train, self.preprocess, batches, self.num_workers)

    @property
    def test_loader(self) -> DataLoader[Any]:
        """The test batches, in order."""
        return eval_loader(self.test, self.preprocess, self.batch_size, self.num_workers)


def known_datasets(suite: str | None = None) -> dict[str, str]:
    """Name -> suite of every data set; clip8 comes first where both have a name."""
    from tangent_arithmetic.data.clip8 import CLIP8_SETS

    names = {} if suite == "clip8" else dict.fromkeys(EMBEDDED_SETS, "embedded")
    return names if suite == "embedded" else {**names, **dict.fromkeys(CLIP8_SETS, "clip8")}


@lru_cache(maxsize=16)  # a suite: what is listed once is not listed again
def _load(name: str, suite: str, location: Path, cache: Path, data_source: str) -> Splits:
    if suite == "embedded":
        from tangent_arithmetic.data.embedded.rendering import load_embedded

        return replace(load_embedded(name, cache), source="embedded")
    from tangent_arithmetic.data.clip8 import CLIP8_SETS

    return load_public(name, CLIP8_SETS[name], location, data_source)


def hold_out(splits: Splits, val_fraction: float, max_val_samples: int) -> Splits:
    """The splits with `val` filled: a seeded part of `train` where the data set has none.

    The part has `min(int(val_fraction * n), max_val_samples)` pictures, drawn as the public
    projects draw it (`torch.utils.data.random_split`, seed 0): their checkpoints have not seen it.
    """
    if splits.val is not None:
        return splits
    count = len(splits.train)
    held = min(int(val_fraction * count), max_val_samples)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return replace(
        splits,
        train=SubsetPictures(splits.train, order[: count - held]),
        val=SubsetPictures(splits.train, order[count - held :]),
    )


def get_dataset(
    dataset_name: str,
    preprocess: Transform | None,
    location: str | Path,
    batch_size: int = 128,
    num_workers: int = 0,
    val_fraction: float = 0.1,
    max_val_samples: int = 5000,
    suite: str | None = None,
    cache_dir: str | Path | None = None,
    data_source: str = "auto",
) -> ImageDataset:
    """A data set by name.

    `X` trains on all training pictures and tests on the test split; `XVal` trains on the training
    pictures without the validation split and tests on the latter.

    Args:
        dataset_name: for instance "DTD" or "DTDVal".
        preprocess: transform of a PIL image; None gives PIL images.
        location: root of the data sets' folders.
        batch_size: images a batch.
        num_workers: data-loading processes.
        val_fraction: share of the training pictures to hold out.
        max_val_samples: most pictures to hold out.
        suite: where the name resolves, "clip8" or "embedded"; None takes the one that has it, clip8
            first.
        cache_dir: where drawn pictures are kept.
        data_source: "folder", "torchvision" or "hub", or "auto" for the first that has it, in this
            order; the embedded suite has its own.

    Raises:
        UsageError: for an unknown name, listing the known ones, nearest first; if a split that is
            asked for is empty.
        MissingFileError: if no source has it, saying what each looked for.
    """
    base, names = dataset_name.removesuffix("Val"), known_datasets(suite)
    if base not in names:
        raise unknown("data set", dataset_name, names)
    root = expanded(location)
    cache = expanded(cache_dir or DEFAULT_CACHE)
    splits = _load(base, names[base], root, cache, data_source)
    _refuse_empty(base, "training", splits.train)
    train, test = splits.train, splits.test
    if dataset_name != base:
        _check_fraction(val_fraction, max_val_samples)
        own = splits.val is not None
        splits = hold_out(splits, val_fraction, max_val_samples)
        assert splits.val is not None
        train, test = splits.train, splits.val
        cut = (
            f": {val_fraction:g} of {len(train)} training pictures is less than one, expected at "
            f"least {math.ceil(1 / val_fraction)}"
        )
        _refuse_empty(base, "validation", test, "" if own else cut)
    else:
        _refuse_empty(base, "test", test)
    return ImageDataset(
        dataset_name,
        train,
        test,
        splits.classnames,
        preprocess,
        batch_size,
        num_workers,
        splits.source,
    )


def _refuse_empty(name: str, split: str, pictures: Pictures, reason: str = "") -> None:
    lazy = isinstance(pictures, LazyPictures)  # a folder of classes with pictures, or an error
    if not lazy and not len(pictures):
        raise UsageError(
            f"data set {name}: its {split} split is empty{reason}. Put pictures there, or leave "
            f"{name} out"
        )


def _check_fraction(val_fraction: float, max_val_samples: int) -> None:
    if not 0 < val_fraction < 1 or max_val_samples < 1:
        raise UsageError(
            "expected a share of the training pictures between 0 and 1 to hold out, and at least "
            f"one picture, got val_fraction={val_fraction} and max_val_samples={max_val_samples}"
        )


def get_classnames(
    dataset_name: str,
    location: str | Path,
    suite: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[str, ...]:
    """The classes of a data set, in the order of the labels; arguments as `get_dataset`.

    Without the public projects' folders they are the published ones, which the other sources have
    as well, so that a head can be built for a set that is not there yet.
    """
    try:
        found = get_dataset(
            dataset_name, None, location, suite=suite, cache_dir=cache_dir, data_source="folder"
        )
    except MissingFileError:
        from tangent_arithmetic.data.clip8 import classnames

        return classnames(dataset_name.removesuffix("Val"))
    return found.classnames


def split_record(data: ImageDataset) -> dict[str, str | None]:
    """What a checkpoint tells of the pictures `data` (an `XVal`) that it was trained on.

    Returns:
        The data set, the source, and the `split_hash` of the training and the validation pictures.
    """
    return {
        "dataset": data.name.removesuffix("Val"),
        "source": data.source,
        "train": split_hash(data.train),
        "val": split_hash(data.test),
    }


@dataclass(frozen=True)
class SuiteData:
    """The data sets of a suite, as one run sees them.

    Attributes:
        suite: resolves the names.
        location: root of the data sets' folders.
        cache: folder where drawn pictures are kept.
        source: see `get_dataset`.
        sample: pictures of each split to evaluate on; None for all.
        batch_size: images a batch of an evaluation.
        num_workers: data-loading processes.
    """

    suite: Suite
    location: Path
    cache: Path
    source: str = "auto"
    sample: int | None = None
    batch_size: int = 256
    num_workers: int = 0

    def dataset(self, name: str) -> ImageDataset:
        """The data set of this name, as PIL images; see `get_dataset`.

        Raises:
            UsageError: for a name that the suite does not have, with those it has, nearest first.
        """
        return get_dataset(
            self.suite.check(name),
            None,
            self.location,
            suite=self.suite.name,
            cache_dir=self.cache,
            data_source=self.source,
        )

    def classnames(self, name: str) -> tuple[str, ...]:
        """The classes of a data set, see `get_classnames`."""
        return get_classnames(name, self.location, self.suite.name, self.cache)

    def evaluated(self, name: str) -> ImageDataset:
        """The data set of this name, with the pictures that are evaluated: all, or a sample."""
        data, count = self.dataset(name), self.sample
        if count is None or count >= len(data.test):
            if count is not None:
                _tell_of_all(name, count, len(data.test))
            return data
        chosen = stratified(labels_of(data.test), count).tolist()
        return replace(data, test=SubsetPictures(data.test, chosen))

    def batches(self, name: str, transform: Transform | None) -> EvalBatches:
        """This rank's share of a split, in order."""
        data = self.evaluated(name)
        return EvalBatches(
            data.test,
            transform,
            self.batch_size,
            self.num_workers,
            name,
            ddp.rank(),
            ddp.world_size(),
            len(data.classnames),
        )

    def smallest(self, names: Iterable[str]) -> int:
        """The number of pictures of the smallest of these splits, as they are evaluated."""
        return min(len(self.evaluated(name).test) for name in names)

    def split_hashes(self, names: Iterable[str]) -> dict[str, str | None]:
        """The `split_hash` of the pictures that each data set is evaluated on, by name."""
        return {name: split_hash(self.evaluated(name).test) for name in names}


@lru_cache  # once
def _tell_of_all(name: str, count: int, size: int) -> None:
    logger.info("--sample=%d: %s has %d pictures, all of them are evaluated", count, name, size)
