"""Own data from Python: plain data sets, functions of the user's, torchvision, the hub."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import ImageFolder

from tangent_arithmetic.data.base import SubsetPictures
from tangent_arithmetic.data.identity import fingerprint, labels_of, pictures_hash, split_ids
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.data.own.hubs import HubSource
from tangent_arithmetic.data.own.torch_sets import PythonSource, TorchvisionSource
from tangent_arithmetic.data.plain import plain_splits, to_image
from tangent_arithmetic.data.splitting import copies_of
from tangent_arithmetic.runtime.errors import MissingFileError, PictureError, UsageError
from tests.data.own.conftest import Fill, picture

HERE = Path()


class Items(Dataset[Any]):
    """A list of items."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def _images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)) for _ in range(count)]


# --- plain data sets


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(3, 4, 5, dtype=torch.uint8), (5, 4)),
        (torch.ones(3, 4, 5), (5, 4)),
        (torch.rand(1, 4, 5), (5, 4)),
        (torch.rand(4, 5), (5, 4)),
        (np.zeros((4, 5, 3), np.uint8), (5, 4)),
        (np.zeros((4, 5), np.uint8), (5, 4)),
        (np.ones((4, 5, 4)), (5, 4)),
        (Image.new("RGBA", (5, 4)), (5, 4)),
    ],
)
def test_items_become_images(value: Any, expected: tuple[int, int]) -> None:
    assert to_image(value, "x").size == expected


def test_tensors_keep_their_pixels() -> None:
    image = _images(1)[0]
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for value in (array, tensor, tensor / 255, array / 255):
        np.testing.assert_array_equal(np.asarray(to_image(value, "x")), array)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.randn(3, 4, 5), r"has values from -\d.*not normalised"),
        (torch.zeros(2, 4, 5), r"a Tensor of shape \(4, 5, 2\), expected a PIL image"),
        (np.zeros((4, 5), np.int64), r"values of type int64, expected"),
        ("text", r"is a str of shape \(\), expected"),
    ],
)
def test_other_items_are_refused(value: Any, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        to_image(value, "pets[0]")


def test_plain_data_sets_become_splits() -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(20) % 2
    train, test = TensorDataset(images[:14], labels[:14]), TensorDataset(images[14:], labels[14:])
    splits = plain_splits("mine", train, test, None, ("a", "b"))
    assert (len(splits.train), len(splits.test), splits.val) == (14, 6, None)
    assert labels_of(splits.train).tolist() == labels[:14].tolist()
    assert type(splits.train[3][1]) is int and not splits.multilabel
    assert split_ids(splits.test) == [str(i) for i in range(6)]
    assert pictures_hash(splits.train) != pictures_hash(splits.test)
    split = plain_splits("mine", train, None, None, ("a", "b"))
    assert (len(split.train), len(split.test)) == (12, 2)
    batches = [labels.tolist() for _, labels in EvalBatches(train, None, 10)]
    assert batches == [labels[:10].tolist(), labels[10:14].tolist()]


@pytest.mark.parametrize("tested", [("b", "c"), ("c", "b"), ("a",), ("c", "d")])
def test_labels_of_a_split_go_by_its_class_names(
    tested: tuple[str, ...], fill: Fill, tmp_path: Path
) -> None:
    fill(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    train, test = ImageFolder(tmp_path / "train"), ImageFolder(fill(tmp_path / "test", {"x": 1}))
    test.classes, test.targets = list(tested), list(range(len(tested)))
    test.samples = test.imgs = [(test.samples[0][0], label) for label in test.targets]
    if "d" in tested:
        with pytest.raises(UsageError, match=r"has the classes c, d, of which .* lack d; its labe"):
            plain_splits("mine", train, test)
        return
    splits = plain_splits("mine", train, test)
    expected = [("a", "b", "c").index(name) for name in tested]
    assert labels_of(splits.test).tolist() == expected
    assert [splits.test[i][1] for i in range(len(tested))] == expected
    test.target_transform = lambda label: label  # labels are the user's own
    assert labels_of(plain_splits("mine", train, test).test).tolist() == test.targets


@pytest.mark.parametrize(
    "listed", [["cat"] * 9, [0] * 8 + [1], [0] + [1] * 8, 3, torch.zeros(9, dtype=torch.int64)]
)
def test_labels_are_those_of_the_items(listed: Any) -> None:
    items = Items([(image, index % 2) for index, image in enumerate(_images(9))])
    items.labels = listed  # type: ignore[attr-defined]
    splits = plain_splits("mine", items, items, None, ("a", "b"))
    assert labels_of(splits.train).tolist() == [i % 2 for i in range(9)]


def test_vectors_are_several_labels() -> None:
    targets = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    targets[0, 2] = 1
    items = Items(list(zip(_images(4), targets, strict=True)))
    splits = plain_splits("mine", items, items, None, ("a", "b", "c"))
    assert splits.multilabel and splits.train[0][1].tolist() == [1, 0, 1]
    assert labels_of(splits.train).dtype == np.uint8
    np.testing.assert_array_equal(labels_of(splits.train), targets)


@pytest.mark.parametrize(
    ("train", "names", "error", "message"),
    [
        (iter([]), ("a",), UsageError, "expected a map-style data set, with len"),
        (
            Items([1, 2]),
            ("a",),
            UsageError,
            r"items \(image, label\) or \(text, label\), got a int",
        ),
        (Items([(i, 0) for i in _images(2)]), None, UsageError, "expected class names, one phrase"),
        (Items([(i, 0) for i in _images(2)]), "cat", UsageError, "expected class names, one"),
        (Items([(i, 3) for i in _images(2)]), ("a", "b"), PictureError, "label 3, expected an int"),
        (Items([(i, 0.5) for i in _images(2)]), ("a", "b"), PictureError, "label 0.5, expected"),
        (Items([(i, [1, 2]) for i in _images(2)]), ("a", "b"), PictureError, "2 zeros and ones"),
        (Items([]), ("a",), UsageError, "its training split is empty"),
        (Items([(i, 0) for i in _images(2)]), ("a", "a"), UsageError, "have the same name 'a'"),
    ],
)
def test_wrong_plain_data_sets_are_refused(
    train: Any, names: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plain_splits("mine", train, train, None, names)


# --- functions of the user's


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module in the working directory, and gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


FACTORY = """
import torch
from torch.utils.data import TensorDataset
def sets():
    x = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    data = TensorDataset(x, torch.arange(20) % 2)
    return {"train": data, "test": data, "classnames": ["cat", "dog"]}
def rooted(root):
    return sets()["train"], None, [str(root), "dog"]
def wrong():
    return {"trian": 1}
def broken():
    raise KeyError("x")
"""


def test_what_a_function_returns(module: Any) -> None:
    name = module("own_factory", FACTORY)
    splits = PythonSource("mine", f"{name}:sets")(HERE)
    assert splits.classnames == ("cat", "dog") and len(splits.test) == 20
    splits = PythonSource("mine", f"{name}:rooted")(Path("root"))
    assert splits.classnames == ("root", "dog") and (len(splits.train), len(splits.test)) == (16, 4)
    splits = PythonSource("mine", f"{name}:sets", ("x", "y"))(HERE)
    assert splits.classnames == ("x", "y")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wrong", r"to return a mapping with train and .* got \['trian'\]"),
        ("broken", r"own_factory2:broken failed \(KeyError"),
        ("nothing", "own_factory2 has no 'nothing'"),
    ],
)
def test_wrong_functions_are_refused(function: str, message: str, module: Any) -> None:
    name = module("own_factory2", FACTORY)
    with pytest.raises(UsageError, match=message):
        PythonSource("mine", f"{name}:{function}")(HERE)


# --- torchvision


def _mnist(root: Path) -> None:
    """Writes ten training and five test images in MNIST's format."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("t10k", 5)):
        images = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 2049, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def test_a_torchvision_class_with_a_train_argument(tmp_path: Path) -> None:
    _mnist(tmp_path)
    splits = TorchvisionSource("digits", "MNIST")(tmp_path)
    assert (len(splits.train), len(splits.test)) == (10, 5) and len(splits.classnames) == 10
    assert labels_of(splits.train).tolist() == list(range(10))
    assert fingerprint(splits.train) and splits.source == "torchvision"


def test_a_torchvision_class_with_splits(fill: Fill, tmp_path: Path) -> None:
    for split, count in (("train", 3), ("valid", 2), ("test", 4)):
        fill(tmp_path / "country211" / split, {"CH": count, "DE": count})
    splits = TorchvisionSource("lands", "Country211")(tmp_path)
    assert splits.val is not None and splits.classnames == ("CH", "DE")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [6, 4, 8]


def test_a_torchvision_class_without_splits_is_split(fill: Fill, tmp_path: Path) -> None:
    fill(tmp_path / "eurosat" / "2750", {"AnnualCrop": 10, "Forest": 5})
    splits = TorchvisionSource("land", "EuroSAT")(tmp_path)
    assert (len(splits.train), len(splits.test)) == (12, 3)
    assert fingerprint(splits.train) is not None  # by its files
    named = TorchvisionSource("land", "EuroSAT", ("crop", "wood"))(tmp_path)
    assert named.classnames == ("crop", "wood")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("Flowers", UsageError, "unknown class of torchvision.datasets 'Flowers'; choose from Flo"),
        ("FakeData", UsageError, "FakeData reads no images"),
        ("CIFAR10", MissingFileError, r"CIFAR10\(.*, train=True, download=True\)\""),
        ("Flowers102", MissingFileError, r"Flowers102\(.*, split='train', download=True\)\""),
    ],
)
def test_what_torchvision_lacks_is_said(
    kind: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        TorchvisionSource("mine", kind)(tmp_path)


# --- the hub


def _on_hub(root: Path, column: Any, labels: dict[str, list[Any]], image: str = "photo") -> str:
    """Writes a data set that the library `datasets` reads, with the splits of `labels`."""
    import datasets

    features = datasets.Features({image: datasets.Image(), "id": datasets.Value("string")})
    features["kind"] = column
    (root / "data").mkdir(parents=True)
    for split, values in labels.items():
        files = [str(picture(root / "tmp" / f"{split}{i}.png")) for i in range(len(values))]
        rows = {image: files, "id": files, "kind": values}
        data = datasets.Dataset.from_dict(rows, features=features)
        data.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))
    return str(root)


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the cache of the library `datasets` in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub_cache")


def test_columns_and_splits_of_the_hub_are_found(tmp_path: Path) -> None:
    import datasets

    column = datasets.ClassLabel(names=["big_cat", "dog"])
    repo = _on_hub(tmp_path / "repo", column, {"train": [0, 1] * 5, "test": [1, 0]})
    splits = HubSource("mine", repo)(HERE)
    assert splits.classnames == ("big cat", "dog") and splits.source == "hub"
    assert labels_of(splits.train).tolist() == [0, 1] * 5 and len(splits.test) == 2
    assert splits.train[0][0].mode == "RGB" and fingerprint(splits.train)


def test_labels_of_the_hub_can_be_texts(tmp_path: Path) -> None:
    import datasets

    values = {"train": ["dog", "ant"] * 5}
    repo = _on_hub(tmp_path / "repo", datasets.Value("string"), values)
    with pytest.raises(UsageError, match=r"expected one label column in .*\?label=COLUMN"):
        HubSource("mine", repo)(HERE)
    splits = HubSource("mine", repo, (("label", "kind"),))(HERE)
    assert splits.classnames == ("ant", "dog") and (len(splits.train), len(splits.test)) == (8, 2)
    assert sorted(labels_of(splits.test).tolist()) == [0, 1]
    assert [splits.test[i][1] for i in range(2)] == labels_of(splits.test).tolist()


def test_odd_labels_of_the_hub_are_refused(tmp_path: Path) -> None:
    import datasets

    lists, text = datasets.List(datasets.Value("string")), datasets.Value("string")
    repo = _on_hub(tmp_path / "lists", lists, {"train": [["a", "b"], ["b"]]})
    with pytest.raises(UsageError, match=r"column kind of .* is a List, expected an integer or a"):
        HubSource("mine", repo, (("label", "kind"),))(HERE)
    repo = _on_hub(tmp_path / "more", text, {"train": ["a", "b"], "test": ["c"]})
    with pytest.raises(UsageError, match=r"has classes that its training rows lack: c; name"):
        HubSource("mine", repo, (("label", "kind"),))(HERE)


def test_copies_are_for_training(tmp_path: Path) -> None:
    import datasets

    column = datasets.ClassLabel(names=["a", "b"])
    repo = _on_hub(tmp_path / "repo", column, {"train": [0] * 10})
    rows = datasets.load_dataset("parquet", data_dir=f"{repo}/data", split="train")
    kept = [*range(10), *range(10), 3]
    rows.select(kept[:19]).to_parquet(f"{repo}/data/train-00000-of-00001.parquet")
    splits = HubSource("mine", repo)(HERE)
    assert isinstance(splits.test, SubsetPictures) and list(splits.test.indices) == [9]
    _mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    header, images = (raw / "train-images-idx3-ubyte").read_bytes()[:16], b"\0" * 784 * 9
    (raw / "train-images-idx3-ubyte").write_bytes(header + images + b"\1" * 784)
    assert copies_of(TorchvisionSource("digits", "MNIST")(tmp_path).train) == set(range(9))


def test_an_unlabelled_split_of_the_hub_is_refused(tmp_path: Path) -> None:
    import datasets

    column = datasets.ClassLabel(names=["a", "b"])
    labels = {"train": [0, 1] * 3, "validation": [0, 1], "test": [-1, -1]}
    repo = _on_hub(tmp_path / "repo", column, labels)
    with pytest.raises(UsageError, match=r"row 0 .* is no class: this split is unlabelled"):
        HubSource("mine", repo)(HERE)
    splits = HubSource("mine", repo, (("test", "validation"), ("train", "train")))(HERE)
    assert len(splits.test) == 2
    with pytest.raises(UsageError, match="has no split dev for test; it has"):
        HubSource("mine", repo, (("test", "dev"),))(HERE)
