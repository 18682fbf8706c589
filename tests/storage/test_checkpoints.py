from __future__ import annotations

import json
import math
import os
import pickle
import signal
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from tangent_arithmetic.encoders import loading
from tangent_arithmetic.encoders.loading import load_checkpoint, resolve
from tangent_arithmetic.runtime import atomic
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage import checkpoints
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.statedict import FLOAT8, content_hash

LINEAR = "linearized_image_encoder"
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.uint8, torch.bool),
]


@st.composite
def states(draw: st.DrawFn) -> dict[str, Tensor]:
    """A state of any types and shapes, 0-d and empty ones among them."""
    names = st.text("abc.0", min_size=1, max_size=4)
    shapes = array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    kinds = draw(st.dictionaries(names, st.tuples(shapes, st.sampled_from(DTYPES)), max_size=4))
    values = st.floats(0, 100, width=32, allow_subnormal=False)
    return {
        name: torch.from_numpy(draw(arrays(np.float32, shape, elements=values)).copy()).to(dtype)
        for name, (shape, dtype) in kinds.items()
    }


def assert_same(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> None:
    assert found is not None
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def flip(path: Path, name: str) -> None:
    """Changes the lowest bit of a tensor in a safetensors file."""
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    raw[8 + length + header[name]["data_offsets"][0]] ^= 1
    path.write_bytes(raw)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


# --- writing


def test_atomic_shows_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    atomic.write_text(path, "old")
    with atomic.atomic(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
def test_atomic_keeps_the_mode_of_a_file_and_follows_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "store" / "file.txt", tmp_path / "link.txt"
    path.parent.mkdir()
    link.symlink_to(path)
    before = os.umask(0o027)
    try:
        atomic.write_text(link, "new")
    finally:
        os.umask(before)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o640)
    path.chmod(0o600)
    for place in (path, link):
        atomic.check_writable(place)
        atomic.write_text(place, str(place))
        assert (path.read_text(), path.stat().st_mode & 0o777) == (str(place), 0o600)
    assert link.is_symlink() and sorted(tmp_path.rglob("*")) == [link, path.parent, path]


def test_only_our_own_temporary_folders_are_removed(tmp_path: Path) -> None:
    ours = tmp_path / f".model.x1_abcde{atomic.PART}"
    others = [".model-7b.part", ".model.download.part", f".model-7b.x1_abcde{atomic.PART}"]
    folders = [ours, *(tmp_path / name for name in others)]
    for folder in folders:
        folder.mkdir()
    plain = tmp_path / f".model.download{atomic.PART}"
    plain.write_text("x", encoding="utf-8")
    atomic.write_json(tmp_path / "model", {})
    assert sorted(tmp_path.iterdir()) == sorted([*folders[1:], plain, tmp_path / "model"])
    atomic.remove_parts(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*folders[1:3], plain, tmp_path / "model"])


def test_a_save_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "zeroshot.safetensors"
    save_tensors(path, {"w": torch.ones(2)}, "image_encoder")

    def full_disk(tensors: object, filename: str, metadata: object) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_tensors(path, {"w": torch.zeros(2)}, "image_encoder")
    assert list(tmp_path.iterdir()) == [path]
    assert load_checkpoint(path).theta["w"].tolist() == [1.0, 1.0]


@settings(deadline=None, max_examples=20)
@given(states())
def test_save_and_load_return_the_same_weights(theta: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "finetuned.pt"
        digest = save_tensors(
            path, theta, "image_encoder", theta0_hash="0f", info={"task": "MNIST", "steps": [1, 2]}
        )
        found = load_checkpoint(path)
        written = load_file(path.with_suffix(".safetensors"))
    assert_same(found.theta, theta)
    assert_same(written, theta)
    assert found.kind == "image_encoder"
    assert found.hash == digest == content_hash(theta)
    assert found.theta0 is None
    assert found.theta0_hash == "0f"
    assert found.info == {"task": "MNIST", "steps": [1, 2]}


@pytest.mark.parametrize("part", ["imag", "conj", "neg"])
def test_negated_and_conjugated_weights_are_saved(part: str, tmp_path: Path) -> None:
    conj = torch.tensor([1 + 2j, 3 - 4j]).conj()
    neg = torch._neg_view(torch.tensor([2.0, -4.0]))
    value = {"imag": conj.imag, "conj": conj, "neg": neg}[part]
    assert value.is_neg() or value.is_conj()
    save_tensors(tmp_path / "w", {"w": value}, "head")
    assert_same(load_checkpoint(tmp_path / "w.safetensors").theta, {"w": value})
    assert content_hash({"w": value}) == content_hash({"w": value.resolve_neg().resolve_conj()})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        *((torch.tensor([math.nan]).to(f8), "1 of 1 tensors are not finite") for f8 in FLOAT8),
        (torch.eye(2).to_sparse(), r"must hold dense tensors by name, got\n  w: .*sparse_coo"),
        (torch.ones(2, device="meta"), "w is on the meta device, which holds no numbers"),
    ],
)
@pytest.mark.parametrize("kind", ["head", checkpoints.STATE])
def test_weights_without_finite_numbers_are_refused(
    value: Tensor, message: str, kind: str, tmp_path: Path
) -> None:
    if kind == checkpoints.STATE and "finite" in message:
        save_tensors(tmp_path / "w", {"w": value}, kind)  # a state may hold them
        return
    with pytest.raises(UsageError, match=message):
        save_tensors(tmp_path / "w", {"w": value}, kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_weights_are_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.tensor([1.0, -2.0]).to(dtype)
    save_tensors(tmp_path / "w", {"w": value}, "head")
    found = load_checkpoint(tmp_path / "w.safetensors").theta["w"]
    assert found.dtype == dtype and torch.equal(found.float(), value.float())


def test_tied_transposed_and_trainable_weights_are_saved(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    theta: dict[str, Tensor] = {"a": weight, "b": weight, "c": weight.T}
    save_tensors(tmp_path / "tied", theta, "image_encoder")
    found = load_checkpoint(tmp_path / "tied").theta
    assert_same(found, {name: value.detach() for name, value in theta.items()})


def test_a_part_of_a_larger_tensor_is_saved_alone(tmp_path: Path) -> None:
    whole = torch.arange(1000.0)
    save_tensors(tmp_path / "part", {"w": whole[5:7]}, "image_encoder")
    assert load_checkpoint(tmp_path / "part").theta["w"].tolist() == [5.0, 6.0]
    assert (tmp_path / "part.safetensors").stat().st_size < 1000


def test_facts_are_read_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "head_MNIST.safetensors"
    digest = save_tensors(path, {"weight": torch.ones(2)}, "head", info={"classes": 10})
    flip(path, "weight")  # so that reading the weights would raise
    facts = {"kind": "head", "hash": digest, "theta0_hash": "", "info": {"classes": 10}}
    assert loading.read_facts(path) == {"format": "tangent-arithmetic/1", **facts}


# --- damaged and hostile files


@pytest.mark.parametrize(("name", "part"), [("w", "its"), ("theta0/w", "theta0's")])
def test_a_flipped_bit_of_the_weights_is_noticed(tmp_path: Path, name: str, part: str) -> None:
    path = tmp_path / "linear_finetuned.safetensors"
    save_tensors(path, {"w": torch.ones(3)}, LINEAR, theta0={"w": torch.zeros(3)})
    flip(path, name)
    with pytest.raises(UsageError, match=rf"linear_finetuned\.safetensors is damaged \({part} ch"):
        load_checkpoint(path)


@pytest.mark.parametrize("size", [0, 4, 60, -1], ids=["empty", "length", "header", "data"])
def test_a_cut_file_is_damaged(tmp_path: Path, size: int) -> None:
    path = tmp_path / "finetuned.safetensors"
    save_tensors(path, {"w": torch.ones(3)}, "image_encoder")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UsageError, match=r"is damaged .*; delete it and create it again"):
        load_checkpoint(path)


def test_a_file_of_another_project_or_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"w": torch.ones(3)}, path)
    with pytest.raises(UsageError, match=r"expected tensors of an image encoder .*, got w"):
        load_checkpoint(path)
    save_file({"w": torch.ones(3)}, path, metadata={"format": "tangent-arithmetic/9"})
    with pytest.raises(UsageError, match=r"format 'tangent-arithmetic/9', expected 'tangent-.*/1'"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("finetuned.pt", r"\.pt is refused: it names posix\.mkdir.* nothing in it was exec"),
        ("finetuned.safetensors", r"finetuned\.safetensors is damaged"),
    ],
)
def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, name: str, message: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / name
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(UsageError, match=message):
        load_checkpoint(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # it was armed


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    looked = r"no checkpoint at .*MNIST.finetuned\.pt \(looked for .*MNISTVal.finetuned\.s"
    with pytest.raises(MissingFileError, match=rf"{looked}.*\)\. Make it with: python x\.py$"):
        load_checkpoint(tmp_path / "MNIST" / "finetuned.pt", made_by="python x.py")


# --- names


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a/finetuned.pt", "a/finetuned.safetensors"),
        ("a/finetuned.pth", "a/finetuned.safetensors"),
        ("a/finetuned.safetensors", "a/finetuned.safetensors"),
        ("a/checkpoint_10", "a/checkpoint_10.safetensors"),
        ("a/ViT-B.32", "a/ViT-B.32.safetensors"),
    ],
)
def test_as_safetensors(name: str, written: str) -> None:
    assert checkpoints.as_safetensors(name) == Path(written)


RESOLVED = [  # the name asked for, the existing files, the one that it means
    ("MNISTVal/finetuned.pt", "MNISTVal/finetuned.safetensors", 0),
    ("MNIST/finetuned.pt", "MNISTVal/finetuned.safetensors", 0),
    ("MNISTVal/linear_finetuned.pt", "MNIST/linear_finetuned.safetensors", 0),
    ("MNISTVal/checkpoint_10", "MNISTVal/checkpoint_10.safetensors", 0),
    ("MNISTVal/linear_zeroshot.pt", "MNISTVal/zeroshot.safetensors", 0),
    ("MNISTVal/linear_zeroshot.pt", "zeroshot.safetensors", 0),
    ("MNIST/zeroshot.pt", "zeroshot.safetensors", 0),
    ("zeroshot.pt", "zeroshot.safetensors", 0),
    ("head_MNISTVal.pt", "head_MNIST.safetensors", 0),
    ("head_MNIST.pt", "head_MNISTVal.safetensors", 0),
    ("MNISTVal/finetuned.safetensors", "MNISTVal/finetuned.pt", 0),
    ("MNISTVal/finetuned.safetensors", "MNIST/finetuned.pt", 0),
    ("MNISTVal/finetuned.safetensors", "MNISTVal/nonlinear_finetuned.pt", 0),
    ("A/finetuned.safetensors", "A/finetuned.pt A/finetuned.safetensors", 1),
    ("A/zeroshot.pt", "zeroshot.safetensors AVal/zeroshot.safetensors A/zeroshot.safetensors", 2),
    ("MNISTVal/linear_finetuned.pt", "MNISTVal/finetuned.safetensors", None),
    ("MNISTVal/finetuned.pt", "finetuned.safetensors", None),
    ("MNISTVal/finetuned.pt", "SVHNVal/finetuned.safetensors", None),
]


@pytest.mark.parametrize(("named", "present", "expected"), RESOLVED)
def test_resolve_knows_the_names_of_the_public_projects(
    tmp_path: Path, named: str, present: str, expected: int | None
) -> None:
    paths = [tmp_path / "run" / name for name in present.split()]
    for path in paths:
        atomic.write_text(path, "")
    if expected is None:
        with pytest.raises(MissingFileError, match="no checkpoint at "):
            resolve(tmp_path / "run" / named)
    else:
        assert resolve(tmp_path / "run" / named) == paths[expected]


# --- the point of expansion

THETA, THETA0 = {"w": torch.ones(3)}, {"w": torch.zeros(3)}
BESIDE_OR_ABOVE = pytest.mark.parametrize("place", ["run/MNISTVal", "run"])


def save_linear(folder: Path) -> Path:
    path = folder / "run" / "MNISTVal" / "linear_finetuned.safetensors"
    save_tensors(path, THETA, LINEAR, theta0=THETA0)
    return path


@pytest.mark.parametrize("place", ["run/MNISTVal", "run", None])
def test_the_expansion_point_is_in_the_zeroshot_file_or_embedded(
    tmp_path: Path, place: str | None
) -> None:
    if place is not None:
        save_tensors(tmp_path / place / "zeroshot", THETA0, "image_encoder")
    path = save_linear(tmp_path)
    assert_same(load_file(path), THETA if place else {**THETA, "theta0/w": THETA0["w"]})
    found = load_checkpoint(path)
    assert_same(found.theta, THETA)
    assert_same(found.theta0, THETA0)
    assert found.theta0_hash == content_hash(THETA0)


@BESIDE_OR_ABOVE
@pytest.mark.parametrize("content", ["other weights", "not a checkpoint"])
def test_the_expansion_point_is_embedded_beside_other_zeroshot_files(
    tmp_path: Path, place: str, content: str
) -> None:
    zeroshot = tmp_path / place / "zeroshot.safetensors"
    if content == "other weights":
        save_tensors(zeroshot, {"w": torch.full((3,), 9.0)}, "image_encoder")
    else:
        atomic.write_text(zeroshot, content)
    path = save_linear(tmp_path)
    assert_same(load_checkpoint(path).theta0, THETA0)


@BESIDE_OR_ABOVE
@pytest.mark.parametrize("event", ["gone", "replaced"])
def test_a_zeroshot_file_that_is_gone_or_different_is_noticed(
    tmp_path: Path, place: str, event: str
) -> None:
    zeroshot = tmp_path / place / "zeroshot.safetensors"
    save_tensors(zeroshot, THETA0, "image_encoder")
    path = save_linear(tmp_path)
    if event == "gone":
        zeroshot.unlink()
    else:
        save_tensors(zeroshot, THETA, "image_encoder")
    with pytest.raises(
        MissingFileError,
        match=rf"was linearised at weights {content_hash(THETA0)[:12]}.* put that file back",
    ):
        load_checkpoint(path)


# --- damage, kills and full disks


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, step: int) -> None:
    path = tmp_path / "head.safetensors"
    save_tensors(path, {"w": torch.tensor([1.0, -2.0])}, "head", info={"steps": 7})
    good, whole = load_checkpoint(path), path.read_bytes()
    noticed, bits = 0, range(0, 8 * len(whole), step)
    for bit in bits:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            state = load_checkpoint(path)
        except UsageError as error:
            assert str(path) in str(error)
            noticed += 1
        else:  # a blank of the header, or the name of the checksum itself
            assert (state.hash, state.kind, state.info) == (good.hash, good.kind, good.info)
            assert_same(state.theta, good.theta)
    assert noticed > 0.93 * len(bits)


def test_a_checkpoint_from_before_the_header_had_a_checksum_is_read(tmp_path: Path) -> None:
    path, theta = tmp_path / "old.safetensors", {"w": torch.ones(2)}
    facts = {"format": checkpoints.FORMAT, "kind": "head", "theta0_hash": "", "info": "{}"}
    save_file(theta, path, metadata={**facts, "hash": content_hash(theta)})
    assert_same(load_checkpoint(path).theta, theta)


@pytest.mark.parametrize(
    ("field", "value"),
    [("info", "[1]"), ("info", "{bad"), ("info", "[" * 100_000), ("kind", None), ("hash", None)],
)
def test_invalid_metadata_is_damage(tmp_path: Path, field: str, value: str | None) -> None:
    path, theta = tmp_path / "odd.safetensors", {"w": torch.ones(2)}
    facts = {"format": checkpoints.FORMAT, "kind": "head", "theta0_hash": "", "info": "{}"}
    odd = {**facts, "hash": content_hash(theta), field: value}
    save_file(theta, path, metadata={k: v for k, v in odd.items() if v is not None})
    with pytest.raises(UsageError, match="is damaged"):
        load_checkpoint(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("point", ["tensors", "fsync", "rename", "folder"])
def test_a_kill_inside_a_write_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    old, new = torch.zeros(30_000), torch.ones(30_000)  # few: threads do not outlive a fork
    save_tensors(path, {"w": old}, "head")

    def killed(*args: object, **options: object) -> None:
        if point == "tensors":  # half of them
            Path(str(args[1])).write_bytes(path.read_bytes()[:60_000])
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_at(path: Path) -> None:
        if path.is_dir() == (point == "folder"):
            killed()

    child = os.fork()
    if child == 0:  # never returns
        try:
            places = {"tensors": (checkpoints, "save_file"), "rename": (Path, "replace")}
            place, name = places.get(point, (atomic, "_sync"))
            monkeypatch.setattr(place, name, killed if point in places else killed_at)
            save_tensors(path, {"w": new}, "head")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert_same(load_checkpoint(path).theta, {"w": new if point == "folder" else old})
    left = [file for file in tmp_path.iterdir() if file != path]
    assert len(left) == (point != "folder")
    atomic.remove_parts(tmp_path, path.name)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def limited() -> Iterator[None]:
    """No file may grow beyond 100 kB, as on a disk that is nearly full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("limited")
def test_a_file_that_does_not_fit_is_an_error_and_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"w": torch.zeros(10)}, "head")
    with pytest.raises(UsageError, match=r"cannot write .*w\.safetensors: .*make room there"):
        save_tensors(path, {"w": torch.zeros(100_000)}, "head")
    with pytest.raises(OSError, match="cannot write"):
        atomic.write_text(path, "x" * 200_000)
    assert_same(load_checkpoint(path).theta, {"w": torch.zeros(10)})
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((UsageError, NotADirectoryError, FileExistsError)):
        save_tensors(tmp_path / "file" / "w.safetensors", {"w": torch.zeros(1)}, "head")
