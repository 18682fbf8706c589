"""Piecewise writing of safetensors, header first, to one file or several.

Formats: https://github.com/huggingface/safetensors (8 bytes of length; a JSON header of dtypes,
shapes and offsets; the numbers); the index of several files is that of `transformers`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.merging.stream import Part
from tangent_arithmetic.merging.weights import CODES, Weights
from tangent_arithmetic.runtime.atomic import atomic, part_folder, write_text
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.checkpoints import checksum

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
INSIDE = "merged"  # names the temporary folder in an existing one
LIKE_BASE = "base"  # as a size of files: those of the base model
Outline = Mapping[str, Tensor]


def size_of(text: str | int) -> int:
    """The number of bytes of a size such as "5GB" or "200MB".

    Raises:
        UsageError: for an invalid size.
    """
    if isinstance(text, int) and text > 0 and not isinstance(text, bool):
        return text
    number, unit = str(text).strip()[:-2].strip(), str(text).strip()[-2:].upper()
    with contextlib.suppress(ValueError, OverflowError):
        if unit in UNITS and float(number) > 0:
            return int(float(number) * UNITS[unit])
    raise UsageError(
        f"expected a size such as 5GB or 200MB, or {LIKE_BASE} for the base model's files, got "
        f"{text!r}"
    )


class TensorFile:
    """A safetensors file that is being written: header first, then the numbers.

    Args:
        path: an existing file, which is overwritten.
        outline: the tensors.
        metadata: metadata of the header.
    """

    def __init__(self, path: Path, outline: Outline, metadata: Mapping[str, str]) -> None:
        self.metadata, self.offsets = dict(metadata), dict[str, int]()
        self.entries: dict[str, Any] = {}
        end = 0
        # wide dtypes first, so that all are aligned
        for name, value in sorted(outline.items(), key=lambda n: (-n[1].dtype.itemsize, n[0])):
            if value.dtype not in CODES:
                raise UsageError(
                    f"{shown(name)} has dtype {value.dtype}, which safetensors files cannot hold"
                )
            start, end = end, end + value.nbytes
            entry = {"dtype": CODES[value.dtype], "shape": list(value.shape)}
            self.entries[name], self.offsets[name] = {**entry, "data_offsets": [start, end]}, start
        header = self._header()
        self.start, self.path = len(header), path
        self._reserve(self.start + end)
        self._put(0, header)

    def _header(self) -> bytes:
        entries = {"__metadata__": self.metadata, **self.entries}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _reserve(self, length: int) -> None:
        """Allocates the whole file at once, so that a full disk is noticed before the work."""
        with self._opened() as handle:
            try:
                os.posix_fallocate(handle, 0, length)
            except AttributeError:  # not on macOS
                pass
            except OSError as error:
                if error.errno in FULL:
                    raise
            os.ftruncate(handle, length)

    def _put(self, offset: int, data: Any) -> None:
        view = memoryview(data)
        with self._opened() as handle:
            while len(view):
                done = os.pwrite(handle, view, offset)
                view, offset = view[done:], offset + done

    def sync(self) -> None:
        """Waits until the file is on the disk."""
        with self._opened() as handle:
            os.fsync(handle)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The handle of the file, open for one write only: a model may have thousands of files."""
        handle = os.open(self.path, os.O_WRONLY)
        try:
            yield handle
        finally:
            os.close(handle)

    def write(self, part: Part) -> memoryview:
        """Writes a part at its offset and returns its bytes."""
        values = part.values.detach().cpu().contiguous()
        data = values.view(torch.uint8).numpy().data if len(values) else memoryview(b"")
        at = self.start + self.offsets[part.name] + part.start * values.itemsize
        self._put(at, data)
        return data

    def complete(self, facts: Mapping[str, str]) -> None:
        """Replaces placeholders in the metadata by late facts of the same length."""
        self.metadata |= facts
        header = self._header()
        assert len(header) == self.start, "a placeholder has another length"
        self._put(0, header)


def write_file(
    path: Path,
    outline: Outline,
    parts: Iterable[Part],
    metadata: Mapping[str, str],
    hashed: bool = False,
    fsync: bool = True,
) -> None:
    """Writes one file atomically.

    Args:
        path: the file.
        outline: all its tensors.
        parts: the parts to write; hashed ones come first, in the order of their names.
        metadata: metadata of the header.
        hashed: store the content hash of the tensors as "hash", see
            `storage.statedict.content_hash`. Names with "/" are not hashed.
        fsync: wait until the file is on the disk.
    """
    digest = hashlib.sha256()
    placeholders = {"hash": "0" * 64, "check": "0" * 64} if hashed else {}
    with atomic(path, fsync) as temporary:
        file = TensorFile(temporary, outline, {**metadata, **placeholders})
        for part in parts:
            data = file.write(part)
            if hashed and "/" not in part.name:
                if part.start == 0:
                    value = outline[part.name]
                    head = f"{part.name}|{value.dtype}|{tuple(value.shape)}|"
                    digest.update(head.encode())
                digest.update(data)
        if hashed:
            facts = {**metadata, "hash": digest.hexdigest()}
            file.complete({**facts, "check": checksum(facts)})


def plan_shards(weights: Weights, max_shard_size: str | int) -> dict[str, list[str]]:
    """The names of the tensors of each file.

    Args:
        weights: the base model.
        max_shard_size: the largest size of a file, such as "5GB", which only a single large tensor
            exceeds; or `LIKE_BASE` for the base model's files.
    """
    if max_shard_size == LIKE_BASE:
        groups = defaultdict[str, list[str]](list)
        for name in sorted(weights.outline):
            groups[weights.shards.get(name, SINGLE)].append(name)
        shards = [groups[file] for file in sorted(groups)] or [[]]
    else:
        shards = _of_size(weights.outline, size_of(max_shard_size))
    return dict(zip(shard_names(len(shards)), shards, strict=True))


def _of_size(outline: Outline, max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(outline):
        size += outline[name].nbytes
        if shards[-1] and size > max_bytes:
            shards.append([])
            size = outline[name].nbytes
        shards[-1].append(name)
    return shards


def shard_names(count: int) -> list[str]:
    """The names of the files of a model with this number of shards."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


@contextlib.contextmanager
def new_files(path: Path, replaced: Callable[[], Iterable[str]]) -> Iterator[Path]:
    """A temporary folder whose content is moved to `path` if the block succeeds.

    All appears at once, also in an existing folder, where the system can exchange two folders. In a
    mount point and in the working directory, and where it cannot, files are renamed one by one; if
    that fails, all is as before.

    Args:
        path: the folder, or a link to it.
        replaced: lists the names in `path` to remove, after the block; if it raises, nothing
            changes.
    """
    place = Path(os.path.realpath(path))
    with files_beside(place) as around:
        new, old = around / "new", around / "old"
        new.mkdir()
        yield new
        if not place.is_dir():
            new.replace(place)
            return
        names, gone = sorted(entry.name for entry in new.iterdir()), list(replaced())
        if around.parent == place.parent and _exchange(new, place, gone):
            return
        old.mkdir()
        moves = [(place / name, old / name) for name in gone]
        _rename(moves + [(new / name, place / name) for name in names])


@contextlib.contextmanager
def files_beside(path: Path) -> Iterator[Path]:
    """A temporary folder from which files can be moved to the folder `path`.

    It is beside it; inside it for a mount point, the working directory, and where nothing can be
    written beside it.
    """
    place = Path(os.path.realpath(path))
    with part_folder(place if _can_leave(place) else place / INSIDE) as around:
        yield around


def _can_leave(place: Path) -> bool:
    """Whether what is in a folder can be moved to a new folder beside it."""
    if not place.is_dir():
        return True
    if place == Path.cwd():
        return False
    try:
        with part_folder(place) as beside, part_folder(place / INSIDE) as inside:
            inside.replace(beside / inside.name)
    except OSError:
        return False
    return True


def _exchange(new: Path, place: Path, gone: Iterable[str]) -> bool:
    """Exchanges two folders at once, if the system can; returns whether it did.

    Args:
        new: the folder that takes the place; gets the mode of the other.
        place: the folder whose files come along, by hard links if there are such.
        gone: names of those that do not.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28
    if sys.platform != "linux" or call is None:
        return False
    known = {entry.name for entry in place.iterdir()}
    for name in known - {*gone}:
        _keep(place / name, new / name)
    shutil.copymode(place, new)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, bytes(new), here, bytes(place), exchange) != 0:
        return False
    for entry in list(new.iterdir()):
        if entry.name not in known:  # created in the meantime
            entry.replace(place / entry.name)
    return True


def _keep(source: Path, target: Path) -> None:
    """Copies a file or folder, by hard links if the file system has them."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    else:
        _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _rename(moves: Iterable[tuple[Path, Path]]) -> None:
    """Renames files and folders; all or, if one cannot be, none."""
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            source.replace(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.replace(source)
        raise


def write_shards(
    folder: Path,
    shards: Mapping[str, Sequence[str]],
    outline: Outline,
    parts: Iterable[Part],
    metadata: Mapping[str, str],
    fsync: bool = True,
) -> None:
    """Writes `model.safetensors`, or `model-0000i-of-0000n.safetensors` and their index.

    Args:
        folder: an existing folder, which nobody reads yet.
        shards: the names of the tensors of each file, see `plan_shards`.
        outline: all tensors.
        parts: the parts to write.
        metadata: metadata of each header.
        fsync: wait until the files are on the disk.
    """
    file_of = {name: file for file, names in shards.items() for name in names}
    files: dict[str, TensorFile] = {}
    for name, names in shards.items():
        (folder / name).touch()
        files[name] = TensorFile(folder / name, {n: outline[n] for n in names}, metadata)
    for part in parts:
        files[file_of[part.name]].write(part)
    for file in files.values() if fsync else ():
        file.sync()
    if len(shards) > 1:
        size = {"total_size": sum(value.nbytes for value in outline.values())}
        index = {"metadata": size, "weight_map": dict(sorted(file_of.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
