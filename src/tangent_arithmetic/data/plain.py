"""Plain `torch.utils.data.Dataset`s as data sets: texts, or images of any usual type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from tangent_arithmetic.data.base import Splits, distinct, spaced
from tangent_arithmetic.data.columns import known_columns
from tangent_arithmetic.data.splitting import with_test_part
from tangent_arithmetic.data.texts import Texts
from tangent_arithmetic.runtime.errors import PictureError, UsageError, shown

EXPECTED = (
    "expected a PIL image, an array (height, width[, channels]) or a tensor (channels, height, "
    "width), of bytes or of numbers from 0 to 1"
)
COMPARED = 64  # items of a data set whose labels are compared with those that it lists


@dataclass(frozen=True)
class DatasetPictures:
    """The items of a map-style data set.

    Attributes:
        name: the data set, for messages.
        dataset: items (image, label), see `tangent_arithmetic.data.suites.register_dataset`.
        classes: number of classes.
        order: our label for each of the data set's own; None if they are the same.
    """

    name: str
    dataset: Any
    classes: int
    order: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        image, label = _item(self.name, self.dataset, index)
        return to_image(image, f"{self.name}[{index}]"), self._label(label, index)

    @property
    def multilabel(self) -> bool:
        """Whether labels are vectors."""
        return self.targets.ndim == 2

    @cached_property
    def targets(self) -> np.ndarray:
        """The labels: int64 (images,), or uint8 (images, classes)."""
        listed = self._listed()
        if listed is None:
            items = (_item(self.name, self.dataset, i)[1] for i in range(len(self.dataset)))
            listed = [self._label(label, index) for index, label in enumerate(items)]
        vectors = bool(len(listed)) and np.ndim(listed[0]) == 1
        return np.asarray(listed, np.uint8 if vectors else np.int64)

    @property
    def samples(self) -> Any:
        """Path and label of each image, if a torchvision data set lists them; else None."""
        if not self._is_raw():
            return None
        listed = getattr(self.dataset, "samples", None) or getattr(self.dataset, "_samples", None)
        if listed is None or self.order is None:
            return listed
        return [(path, self.order[label]) for path, label in listed]

    @property
    def data(self) -> Any:
        """The images of a torchvision data set in memory; else None."""
        return getattr(self.dataset, "data", None) if self._is_raw() else None

    def _is_raw(self) -> bool:
        """Whether items are what a torchvision data set reads, without transforms of the user's."""
        own = type(self.dataset).__module__.startswith("torchvision.datasets.")
        kinds = ("transform", "target_transform")
        return own and all(getattr(self.dataset, kind, None) is None for kind in kinds)

    def _listed(self) -> Any:
        """The labels that the data set lists beside its items, if its items have the same.

        `COMPARED` items are compared, evenly spaced; the first alone of torchvision's own classes.
        """
        if getattr(self.dataset, "target_transform", None) is not None or not len(self):
            return None
        step = len(self) if self._is_raw() else max(1, len(self) // COMPARED)
        for attribute in ("targets", "labels", "_labels"):
            values: Any = getattr(self.dataset, attribute, None)
            if hasattr(values, "__len__") and len(values) == len(self):
                try:
                    labels = [self._label(value, index) for index, value in enumerate(values)]
                except PictureError:  # of another kind, such as texts
                    return None
                items = {i: _item(self.name, self.dataset, i)[1] for i in range(0, len(self), step)}
                same = (np.array_equal(labels[i], self._label(y, i)) for i, y in items.items())
                return labels if all(same) else None
        return None

    def _label(self, label: Any, index: int) -> Any:
        """The label as an int in range, or as a uint8 vector of zeros and ones."""
        value = np.asarray(label)
        classes = self.classes if self.order is None else len(self.order)
        if value.ndim == 1 and value.shape == (classes,) and np.isin(value, (0, 1)).all():
            if self.order is None:
                return value.astype(np.uint8)
            ours = np.zeros(self.classes, np.uint8)
            ours[list(self.order)] = value
            return ours
        if value.size == 1 and value.ndim <= 1 and value.dtype.kind in "biuf":
            number = float(value.reshape(()))  # True is 1, as in tables
            if 0 <= number < classes and number.is_integer():
                return int(number) if self.order is None else self.order[int(number)]
        raise PictureError(
            f"{self.name}[{index}] has the label {shown(label, 60)}, expected an integer from 0 to "
            f"{classes - 1}, or {classes} zeros and ones where examples have several labels"
        )


@dataclass(frozen=True)
class DatasetRows:
    """The rows of a data set that gives mappings, such as those of the library `datasets`.

    Attributes:
        dataset: its rows hold values by column.
        columns: those of images or texts, and of labels.
    """

    dataset: Any
    columns: tuple[str, str]

    @property
    def classes(self) -> list[str] | None:
        """The class names, if the data set states them."""
        features = getattr(self.dataset, "features", None)
        label = features.get(self.columns[1]) if isinstance(features, Mapping) else None
        return getattr(label, "names", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.dataset[index]
        return row[self.columns[0]], row[self.columns[1]]


def _item(name: str, dataset: Any, index: int) -> tuple[Any, Any]:
    item = dataset[index]
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise UsageError(
            f"data set {name}: expected items (image, label) or (text, label), got a "
            f"{type(item).__name__} for index {index}"
        )
    return item[0], item[1]


def _items(name: str, part: Any) -> Any:
    """A data set whose items are pairs; rows by column become such.

    Raises:
        UsageError: if it is no map-style data set, or its rows lack a column.
    """
    if hasattr(part, "iloc") and hasattr(part, "columns"):  # a table of pandas
        part = part.to_dict("records")
    by_index = hasattr(part, "__len__") and hasattr(part, "__getitem__")
    if not by_index or isinstance(part, Mapping):
        raise UsageError(
            f"data set {name}: expected a map-style data set, with len() and [index], got a "
            f"{type(part).__name__}"
        )
    if not len(part) or not isinstance(row := part[0], Mapping):
        return part
    values = [key for key in known_columns("image", row) if not isinstance(row[key], str)]
    values, labels = values + known_columns("text", row), known_columns("label", row)
    if not values or not labels:
        raise UsageError(
            f"data set {name}: expected rows with the columns text (or image) and label, got "
            f"{', '.join(map(shown, row))}; rename them, or give pairs (text, label)"
        )
    return DatasetRows(part, (values[0], labels[0]))


def to_image(value: Any, name: str) -> Image.Image:
    """An item's image as a PIL image.

    Args:
        value: a PIL image, an array or a tensor.
        name: by which a user can find it, for messages.

    Raises:
        PictureError: for another type, shape or range, such as a normalised tensor.
    """
    if isinstance(value, Image.Image):
        return value
    array = np.asarray(value)
    if hasattr(value, "detach") and array.ndim == 3:  # a tensor: channels first
        array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise PictureError(f"{name} is a {type(value).__name__} of shape {array.shape}, {EXPECTED}")
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # also true for NaN
            raise PictureError(
                f"{name} has values from {array.min():g} to {array.max():g}, {EXPECTED}; hand over "
                "images that are not normalised, the model's own preprocessing does it"
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise PictureError(f"{name} has values of type {array.dtype}, {EXPECTED}")
    return Image.fromarray(np.ascontiguousarray(array))


def plain_splits(
    name: str,
    train: Any,
    test: Any,
    val: Any = None,
    classnames: Sequence[str] | None = None,
    source: str = "python",
) -> Splits:
    """The splits of plain data sets.

    Args:
        name: the data set, for messages.
        train: the training images, see `tangent_arithmetic.data.suites.register_dataset`.
        test: the test images; None for a part of the training images.
        val: the validation images; None for none.
        classnames: one phrase per class; None for `train.classes`.
        source: see `Splits`.

    Raises:
        UsageError: if it is no map-style data set, class names are not given or two are the same,
            or a split has classes that the training images lack.
    """
    train, test, val = (None if part is None else _items(name, part) for part in (train, test, val))
    names = _names(name, train, classnames)
    if not len(train):
        raise UsageError(f"data set {name}: its training split is empty")
    pictures = {
        split: _examples(
            name if split == "train" else f"{name}.{split}",
            part,
            len(names),
            _order(name, train, part),
        )
        for split, part in (("train", train), ("test", test), ("val", val))
        if part is not None
    }
    label = pictures["train"][0][1]
    splits = Splits(
        pictures["train"],
        pictures.get("test", pictures["train"]),
        names,
        pictures.get("val"),
        source,
        np.ndim(label) == 1,
    )
    if test is not None:
        return splits
    whole = pictures["train"]
    labels = whole.labels if isinstance(whole, Texts) else whole.targets
    strata = [None] * len(labels) if labels.ndim == 2 else labels.tolist()
    return with_test_part(name, splits, strata)


def _order(name: str, train: Any, part: Any) -> tuple[int, ...] | None:
    """The label of the training images for each label of a split, by the classes that both list.

    Returns:
        None if the labels are the same, or cannot be compared.
    """
    ours, theirs = (getattr(each, "classes", None) for each in (train, part))
    if not isinstance(ours, list | tuple) or not isinstance(theirs, list | tuple):
        return None
    if any(getattr(each, "target_transform", None) is not None for each in (train, part)):
        return None  # labels are the user's own
    if all(one == other for one, other in zip(ours, theirs, strict=False)):
        return None
    if extra := [each for each in theirs if ours.count(each) != 1]:
        raise UsageError(
            f"data set {name}: a split has the classes {', '.join(map(shown, theirs[:8]))}, of "
            f"which the training images lack {', '.join(map(shown, extra[:8]))}; its labels would "
            "mean other classes. Remove them, or add training images"
        )
    return tuple(ours.index(each) for each in theirs)


def _examples(
    name: str, dataset: Any, classes: int, order: tuple[int, ...] | None
) -> DatasetPictures | Texts:
    """The items of a data set: texts are read at once, images when they are used.

    Raises:
        PictureError: if one of its texts is empty.
    """
    listed = DatasetPictures(name, dataset, classes, order)
    if not len(dataset) or not isinstance(_item(name, dataset, 0)[0], str):
        return listed
    texts = tuple(_item(name, dataset, index)[0] for index in range(len(dataset)))
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise PictureError(f"{name}[{index}] is {shown(repr(text), 60)}, expected a text")
    return Texts(texts, listed.targets, name)


def _names(name: str, train: Any, classnames: Sequence[str] | None) -> tuple[str, ...]:
    given = classnames if classnames is not None else getattr(train, "classes", None)
    if isinstance(given, str) or given is None or not len(given):
        raise UsageError(
            f"data set {name}: expected class names, one phrase per class in the order of the "
            f"labels, got {given!r}; the training set has no attribute classes either"
        )
    if classnames is not None:
        return distinct(name, classnames, classnames)
    first = (each[0] if isinstance(each, tuple | list) else each for each in given)
    return distinct(name, given, [spaced(str(text)) for text in first])
