"""Pickled checkpoints, read without executing them: tensors, plain data, and inert stubs.

This module knows the file formats: zip archives and legacy files of `torch.save`, and plain
pickles. `pickle_names` lists the names that a pickle may use, `pickle_machine` runs its opcodes.
"""

from __future__ import annotations

import functools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.pickle_machine import run_pickle
from tangent_arithmetic.storage.pickle_names import (
    KNOWN,
    MOST_TIMES_STORED,
    OBJECT,
    SPARE_NAMED,
    Budget,
    Dtype,
    Refused,
    Stub,
    quoted,
)
from tangent_arithmetic.storage.reading import readable, refuse_pointer
from tangent_arithmetic.storage.zips import open_zip

__all__ = ["Stub", "read_pickle", "state_of", "tensors_of", "within_storage"]

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's legacy files
MAX_DEPTH = 100  # of modules in modules
MOST_NAMES = 20_000_000  # characters of the names in a module, and 100 for each


def read_pickle(path: Path) -> Any:
    """Reads the object in a file of `torch.save` or `pickle.dump`; its classes become stubs.

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it is damaged, asks for anything but data, or for more memory or time than
            its size allows. Nothing in it has been executed.
    """
    refuse_pointer(path)
    with readable(path, "a checkpoint of tensors"):
        try:
            if zipfile.is_zipfile(path):
                return _read_zip(path)
            content = path.read_bytes()
            return _read_legacy(content, Budget(len(content)))
        except Refused as error:
            raise UsageError(
                f"{path} is refused: {error}. Expected a checkpoint of tensors; nothing in it was "
                "executed"
            ) from error


def _read_zip(path: Path) -> Any:
    """Reads an archive of `torch.save` or TorchScript: a pickle, and one member per storage."""
    try:
        with open_zip(path) as archive:
            names = archive.namelist()
            if len(set(names)) != len(names):
                raise Refused("two members of the archive have the same name")
            main = [name for name in names if name.endswith("/data.pkl")]
            if len(main) != 1:
                raise Refused(f"the archive has {len(main)} members data.pkl, expected one")
            root = main[0].removesuffix("data.pkl")

            def member(name: str) -> bytes:
                info = archive.getinfo(f"{root}{name}")
                stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
                if not stored or info.file_size != info.compress_size:
                    raise Refused(f"member {name} is compressed or encrypted; torch never does so")
                return archive.read(info)

            if f"{root}byteorder" in names and member("byteorder") != b"little":
                raise Refused("its numbers are big-endian")
            storages: dict[str, Tensor] = {}

            def storage(pid: Any) -> Tensor:
                dtype, key, count = _storage_id(pid)
                if key not in storages:
                    storages[key] = _numbers(member(f"data/{key}"), dtype, count)
                return storages[key]

            return _run(member("data.pkl"), storage, Budget(path.stat().st_size))[0]
    except UsageError:
        raise
    except Exception as error:  # a damaged archive can raise almost anything in zipfile
        raise Refused(f"the archive is damaged ({type(error).__name__}: {shown(error)})") from error


def _storage_id(pid: Any) -> tuple[torch.dtype, str, int]:
    """The dtype, key and length in ("storage", kind, key, location, count)."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise Refused(f"a persistent id {quoted(pid)}")
    _, kind, key, _, count = pid[:5]
    if not isinstance(kind, Dtype) or not isinstance(key, str) or not key.isalnum():
        raise Refused(f"a storage {quoted(pid)}")
    if type(count) is not int or not 0 <= count < 2**48:
        raise Refused(f"a storage of {quoted(count)} numbers")
    return kind.dtype, key, count


def _numbers(content: bytes | memoryview, dtype: torch.dtype, count: int) -> Tensor:
    if len(content) != count * dtype.itemsize:
        raise Refused(f"a storage of {count} {dtype} numbers in {len(content)} bytes")
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype)


def _read_legacy(content: bytes, budget: Budget) -> Any:
    """Reads a legacy file of `torch.save` (five pickles, then the storages) or a plain pickle."""
    if content[:1] != b"\x80" or len(content) < 2 or not 2 <= content[1] <= 5:
        raise Refused("it is not a pickle of protocol 2 to 5")
    first, end = _run(content, _no_storage, budget)
    if not (type(first) is int and first == MAGIC):
        return first
    protocol, end = _run(content, _no_storage, budget, end)
    system, end = _run(content, _no_storage, budget, end)
    little = isinstance(system, dict) and system.get("little_endian") is True
    if type(protocol) is not int or protocol != PROTOCOL or not little:
        raise Refused(f"version {quoted(protocol)} of torch's legacy format, or big-endian numbers")
    storages = _LegacyStorages(len(content))
    result, end = _run(content, storages, budget, end)
    keys, end = _run(content, _no_storage, budget, end)
    storages.fill(keys, content, end)
    return result


class _LegacyStorages:
    """The storages of a legacy file of `size` bytes, which follow the pickle that uses them."""

    def __init__(self, size: int) -> None:
        self.left, self.storages = size, dict[str, Tensor]()

    def __call__(self, pid: Any) -> Any:
        """The storage of a persistent id, or a part of it; not yet filled."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # a class, stored with its source code
        dtype, key, count = _storage_id(pid)
        if key not in self.storages:
            self.left -= count * dtype.itemsize
            if self.left < 0:
                raise Refused("its storages are larger than the file")
            self.storages[key] = torch.empty(count, dtype=dtype)
        whole, view = self.storages[key], pid[5] if len(pid) > 5 else None
        if view is None:
            return whole
        numbers = view[1:] if isinstance(view, tuple) and len(view) == 3 else (-1, -1)
        if not all(type(n) is int and n >= 0 for n in numbers) or sum(numbers) > len(whole):
            raise Refused(f"a view {quoted(view)} of a storage of {len(whole)} numbers")
        return whole[numbers[0] : sum(numbers)]

    def fill(self, keys: Any, content: bytes, start: int) -> None:
        """Reads the storages from `start` on, in the order of `keys`; each follows its length."""
        valid = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not valid or sorted(keys) != sorted(self.storages):
            raise Refused("its list of storages does not match those it uses")
        whole = memoryview(content)
        for key in keys:
            tensor = self.storages[key]
            end = start + 8 + tensor.numel() * tensor.dtype.itemsize
            if end > len(content) or struct.unpack_from("<q", content, start)[0] != tensor.numel():
                raise Refused(f"storage {shown(key)} is truncated")
            tensor.copy_(_numbers(whole[start + 8 : end], tensor.dtype, tensor.numel()))
            start = end


def _no_storage(pid: Any) -> Any:
    raise Refused(f"a persistent id {quoted(pid)} where there are no storages")


def _load_from_bytes(budget: Budget, content: Any) -> Any:
    """A single storage, pickled as a legacy file within the file."""
    if not isinstance(content, bytes):
        raise Refused("a storage that is not bytes")
    budget.keep(OBJECT + 2 * len(content))
    return _read_legacy(content, budget)


NAMES = {**KNOWN, ("torch.storage", "_load_from_bytes"): _load_from_bytes}
_run = functools.partial(run_pickle, known=NAMES)


def tensors_of(content: object) -> dict[str, Tensor]:
    """The named tensors of a dict, without its other entries; empty for anything but a dict."""
    items = content.items() if isinstance(content, Mapping) else ()
    named = {n: v for n, v in items if isinstance(n, str) and isinstance(v, Tensor)}
    return {name: value.resolve_neg() for name, value in named.items()}


def within_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors, which may share memory as tied weights do.

    Raises:
        UsageError: if a copy of each, for instance to cast it, would take far more memory.
    """
    storages = [value.untyped_storage() for value in tensors.values()]
    stored = sum({one.data_ptr(): one.nbytes() for one in storages}.values())
    total = sum(value.nbytes for value in tensors.values())
    if total > MOST_TIMES_STORED * stored + SPARE_NAMED:
        raise UsageError(
            f"{len(tensors):,} tensors of {total:,} bytes share the same {stored:,} bytes, "
            f"expected at most {MOST_TIMES_STORED} times as much; save a copy of each"
        )
    return tensors


def state_of(module: Stub) -> OrderedDict[str, Tensor]:
    """The state dict of a pickled module: parameters and persistent buffers by name.

    Raises:
        UsageError: if it contains itself, is nested too deeply, or repeats submodules so often that
            their names take more memory than those of any real model.
    """
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    left = MOST_NAMES

    def entries(mapping: Any, prefix: str) -> Iterator[tuple[str, str, Any]]:
        """The entries of a dict as (name, full name, value); their names are charged."""
        nonlocal left
        for name, value in mapping.items() if isinstance(mapping, dict) else ():
            left -= 100 + len(prefix) + (len(name) if isinstance(name, str) else 0)
            if left < 0:
                raise UsageError("its submodules are repeated more often than in any real model")
            if isinstance(name, str):
                yield name, f"{prefix}{name}", value

    def walk(stub: Stub, prefix: str, above: tuple[int, ...]) -> None:
        if id(stub) in above or len(above) > MAX_DEPTH:
            raise UsageError(
                f"module {shown(prefix) or '-'} contains itself or is nested too deeply"
            )
        state = stub.state
        script = stub.path().startswith("__torch__.")  # TorchScript stores all attributes alike
        transient = state.get("_non_persistent_buffers_set")
        for _, full, value in entries(state if script else state.get("_parameters"), prefix):
            if isinstance(value, Tensor):
                tensors[full] = value
        for name, full, value in () if script else entries(state.get("_buffers"), prefix):
            dropped = isinstance(transient, set | frozenset) and name in transient
            if isinstance(value, Tensor) and not dropped:
                tensors[full] = value
        for _, full, value in entries(state if script else state.get("_modules"), prefix):
            if isinstance(value, Stub):
                walk(value, f"{full}.", (*above, id(stub)))

    walk(module, "", ())
    return OrderedDict(tensors_of(within_storage(tensors)))
