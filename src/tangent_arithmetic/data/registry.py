"""Data sets by name, and their validation splits `<Dataset>Val`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import DataLoader

from tangent_arithmetic.data.base import Pictures, Splits, SubsetPictures
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.data.files import LazyPictures
from tangent_arithmetic.data.identity import labels_of, pictures_hash, split_hash
from tangent_arithmetic.data.leaks import refuse_shared
from tangent_arithmetic.data.loading import (
    BatchPlan,
    EvalBatches,
    RankBatches,
    Transform,
    train_loader,
)
from tangent_arithmetic.data.sampling import stratified
from tangent_arithmetic.data.sources import load_public
from tangent_arithmetic.data.splitting import originals_of
from tangent_arithmetic.data.suites import (
    DATASETS,
    DEFAULT_CACHE,
    PUBLIC,
    RegisteredSet,
    Suite,
    get_suite,
)
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, unknown
from tangent_arithmetic.runtime.private import expanded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageDataset:
    """A data set with its loaders.

    Attributes:
        name: as requested; with the suffix Val, `test` is the validation split.
        train: untransformed training images, disjoint from `test`.
        test: untransformed images to evaluate on.
        classnames: one phrase per class.
        preprocess: the loaders' transform.
        batch_size: images per batch.
        num_workers: data-loading processes.
        source: where it was read from, see `Splits`.
        multilabel: whether an image has several labels, see `Splits`.
    """

    name: str
    train: Pictures
    test: Pictures
    classnames: tuple[str, ...]
    preprocess: Transform | None
    batch_size: int
    num_workers: int
    source: str = "folder"
    multilabel: bool = False

    @cached_property
    def content(self) -> str:
        """The `pictures_hash` of the training images."""
        return pictures_hash(self.train)

    @property
    def train_loader(self) -> DataLoader[Any]:
        """One epoch of shuffled training batches (seed 0)."""
        plan = BatchPlan.of(self.train, self.preprocess, self.batch_size)
        batches = RankBatches(plan, 0, plan.steps_per_epoch, 0, 1)
        return train_loader(self.train, self.preprocess, batches, self.num_workers)

    @property
    def test_loader(self) -> DataLoader[Any]:
        """The test batches, in order; texts by length."""
        return EvalBatches(self.test, self.preprocess, self.batch_size, self.num_workers).loader


def known_datasets(suite: str | None = None) -> dict[str, str]:
    """Name -> suite of all data sets, or of those of one suite.

    Where several suites have a name, clip8 wins over embedded, embedded over clip14 and clip20, and
    these over registered ones. So FashionMNIST is the public one in suite clip20 only.
    """
    from tangent_arithmetic.data.clip20 import PUBLIC_SETS

    first, *others = PUBLIC
    sets = [
        *DATASETS,
        *((home, name) for home in reversed(others) for name in get_suite(home).names),
    ]
    sets += [*(("embedded", name) for name in EMBEDDED_SETS)]
    sets += [(first, name) for name in get_suite(first).names if name in PUBLIC_SETS]
    return {name: home for home, name in sets if suite in (None, home)}


def _home(dataset_name: str, suite: str | Suite | None) -> tuple[str, str, RegisteredSet | None]:
    """The suite of a data set, its name there, and its entry if it is not built in.

    Args:
        dataset_name: the data set, X or XVal.
        suite: the suite, its name, or None for all.

    Raises:
        UsageError: if the name is unknown; the message lists the choices, nearest first.
    """
    name = dataset_name.removesuffix("Val")
    if isinstance(suite, Suite):
        if name in suite.sets:
            return suite.name, name, suite.sets[name]
        if name in suite.borrowed:
            home, name = suite.borrowed[name]
            return home, name, DATASETS.get((home, name))
        suite.check(dataset_name)
        suite = suite.name
    names = known_datasets(suite)
    if name not in names:
        raise unknown("data set", dataset_name, names)
    return names[name], name, DATASETS.get((names[name], name))


@lru_cache(maxsize=24)  # about one suite; listing folders again would be slow
def _load(name: str, suite: str, location: Path, cache: Path, data_source: str) -> Splits:
    if suite == "embedded":
        from tangent_arithmetic.data.embedded.rendering import load_embedded

        return replace(load_embedded(name, cache), source="embedded")
    from tangent_arithmetic.data.public import ALL_SETS

    return load_public(name, ALL_SETS[name], location, data_source)


@lru_cache(maxsize=32)
def _load_own(load: Callable[[Path], Splits], location: Path, _changed: int | None) -> Splits:
    splits = refuse_shared(load(location))  # copies are sought where validation is asked for, once
    return replace(splits, copies=cache(partial(originals_of, splits.train)))


def hold_out(splits: Splits, val_fraction: float, max_val_samples: int) -> Splits:
    """Holds out a seeded part of `train` as `val`, unless the data set has a validation split.

    It has `min(int(val_fraction * n), max_val_samples)` images, drawn as in the public projects
    (`torch.utils.data.random_split`, seed 0), whose checkpoints have not been trained on them. If
    the fraction is less than one of two or more images, one is held out. Images of the same
    content, see `Splits.copies`, count as one and are held out together.

    Raises:
        UsageError: if the fraction is not in (0, 1) or the maximum below 1.
    """
    if not 0 < val_fraction < 1 or max_val_samples < 1:
        raise UsageError(
            "expected val_fraction between 0 and 1 and max_val_samples of at least 1, got "
            f"val_fraction={val_fraction} and max_val_samples={max_val_samples}"
        )
    if splits.val is not None:
        return splits
    train, val = held_out(len(splits.train), val_fraction, max_val_samples, splits.copies())
    return replace(
        splits, train=SubsetPictures(splits.train, train), val=SubsetPictures(splits.train, val)
    )


def held_out(
    count: int,
    val_fraction: float = 0.1,
    max_val_samples: int = 5000,
    copies: Mapping[int, int] = MappingProxyType({}),
) -> tuple[list[int], list[int]]:
    """The indices of `count` examples to train on, and of those held out, see `hold_out`."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    originals = [index for index in order if index not in copies]
    least = 1 if len(originals) > 1 else 0
    size = min(max(int(val_fraction * len(originals)), least), max_val_samples)
    held = set(originals[len(originals) - size :])
    parts: tuple[list[int], list[int]] = ([], [])
    for index in order:
        parts[copies.get(index, index) in held].append(index)
    return parts


def get_dataset(
    dataset_name: str,
    preprocess: Transform | None,
    location: str | Path,
    batch_size: int = 128,
    num_workers: int = 0,
    val_fraction: float = 0.1,
    max_val_samples: int = 5000,
    suite: str | Suite | None = None,
    cache_dir: str | Path | None = None,
    data_source: str = "auto",
) -> ImageDataset:
    """A data set by name.

    `X` trains on all training images and evaluates on the test split; `XVal` trains on the training
    images without the validation split, and evaluates on that.

    Args:
        dataset_name: for instance "DTD" or "DTDVal".
        preprocess: transform of a PIL image; None yields PIL images.
        location: data root.
        batch_size: images per batch.
        num_workers: data-loading processes.
        val_fraction: fraction of the training images to hold out.
        max_val_samples: maximum number of images to hold out.
        suite: the suite, or its name, in which to look up the name; None for all, see
            `known_datasets`.
        cache_dir: where rendered images are cached.
        data_source: "folder", "torchvision" or "hub", or "auto" for the first of these that has
            it; public data sets only.

    Raises:
        UsageError: if the name is unknown (the message lists the choices, nearest first) or a
            requested split is empty.
        MissingFileError: if no source has it; the message says where each looked.
    """
    base = dataset_name.removesuffix("Val")
    splits = _splits(dataset_name, location, suite, cache_dir, data_source)
    _refuse_empty(base, "training", splits.train)
    train, test = splits.train, splits.test
    if dataset_name == base:
        _refuse_empty(base, "test", test)
    else:
        held = hold_out(splits, val_fraction, max_val_samples)
        assert held.val is not None
        reason = ""
        if splits.val is None:
            _log_least(base, val_fraction, len(train))
            _log_copies(base, len(splits.copies()))
            reason = ": there is only one training image"
            reason += ", not counting copies" if splits.copies() else ""
        train, test = held.train, held.val
        _refuse_empty(base, "validation", test, reason)
    loaders = (preprocess, batch_size, num_workers)
    facts = (splits.source, splits.multilabel)
    return ImageDataset(dataset_name, train, test, splits.classnames, *loaders, *facts)


def _splits(
    dataset_name: str,
    location: str | Path,
    suite: str | Suite | None,
    cache_dir: str | Path | None,
    data_source: str,
) -> Splits:
    """The splits of a data set as its source has them; arguments as for `get_dataset`."""
    home, name, entry = _home(dataset_name, suite)
    if entry is not None:
        load = _load_own if isinstance(entry.load, Hashable) else _load_own.__wrapped__
        file = getattr(entry.load, "path", None)  # a table that was edited is read again
        changed = file.stat().st_mtime_ns if isinstance(file, Path) and file.is_file() else None
        return load(entry.load, expanded(location), changed)
    cache = expanded(cache_dir or DEFAULT_CACHE)
    return _load(name, home, expanded(location), cache, data_source)


@lru_cache  # logs each case once
def _log_least(name: str, val_fraction: float, count: int) -> None:
    if count > 1 and val_fraction * count < 1:
        logger.info(
            "%s: %g of %d training images is less than one; one image is for validation",
            name,
            val_fraction,
            count,
        )


@lru_cache  # logs each case once
def _log_copies(name: str, count: int) -> None:
    if count:
        logger.info(
            "%s: %d training images are copies of others; validation has none of the same content",
            name,
            count,
        )


def _refuse_empty(name: str, split: str, pictures: Pictures, reason: str = "") -> None:
    lazy = isinstance(pictures, LazyPictures)  # never empty: listing it raises an error instead
    if not lazy and not len(pictures):
        raise UsageError(
            f"data set {name}: its {split} split is empty{reason}. Add images, or leave {name} out"
        )


def get_classnames(
    dataset_name: str,
    location: str | Path,
    suite: str | Suite | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[str, ...]:
    """The class names of a data set, in the order of the labels; arguments as for `get_dataset`.

    Images are neither listed nor rendered where the names are known without. For a public set that
    is not on disk these are the published names, so that its head can be built before it is
    downloaded.
    """
    home, name, entry = _home(dataset_name, suite)
    if entry is not None and entry.classnames is not None:
        return entry.classnames(expanded(location))
    if entry is None and home == "embedded":
        return EMBEDDED_SETS[name].classnames
    try:
        return _splits(dataset_name, location, suite, cache_dir, "folder").classnames
    except MissingFileError:
        from tangent_arithmetic.data.public import ALL_SETS, classnames

        if entry is not None or home not in PUBLIC or name not in ALL_SETS:
            raise  # a registered set
        return classnames(name)


def split_record(data: ImageDataset) -> dict[str, str | None]:
    """A checkpoint's record of its training images.

    Args:
        data: the `XVal` of the training run.

    Returns:
        The data set, its source, and the `split_hash` of the training and the validation images.
    """
    return {
        "dataset": data.name.removesuffix("Val"),
        "source": data.source,
        "train": split_hash(data.train),
        "val": split_hash(data.test),
    }


@dataclass(frozen=True)
class SuiteData:
    """The data sets of a suite with the settings of a run.

    Attributes:
        suite: the suite in which names are looked up.
        location: data root.
        cache: folder of rendered images.
        source: see `get_dataset`.
        sample: number of images of each split to evaluate on; None for all.
        batch_size: images per evaluation batch.
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
            UsageError: if the suite has no such data set; the message lists the choices.
        """
        return get_dataset(
            self.suite.check(name),
            None,
            self.location,
            suite=self.suite,
            cache_dir=self.cache,
            data_source=self.source,
        )

    def classnames(self, name: str) -> tuple[str, ...]:
        """The class names of a data set, see `get_classnames`."""
        return get_classnames(name, self.location, self.suite, self.cache)

    def evaluated(self, name: str) -> ImageDataset:
        """The data set of this name with the images to evaluate on: all, or a sample."""
        data, count = self.dataset(name), self.sample
        if count is None:
            return data
        if count >= len(data.test):
            _log_sample_is_all(name, count, len(data.test))
            return data
        indices = stratified(labels_of(data.test), count).tolist()
        return replace(data, test=SubsetPictures(data.test, indices))

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

    def split_hashes(self, names: Iterable[str]) -> dict[str, str | None]:
        """The `split_hash` of the images that each data set is evaluated on, by name."""
        return {name: split_hash(self.evaluated(name).test) for name in names}


@lru_cache  # logs each case once
def _log_sample_is_all(name: str, count: int, size: int) -> None:
    logger.info("--sample=%d: %s has %d examples, all of them are evaluated", count, name, size)
