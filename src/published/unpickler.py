"""Pickles read without executing them: tensors and plain data, and inert stubs for everything else.

A pickle is a program that calls what it names. Here a name never becomes what it stands for: a few
exact names (tensors, storages, plain containers) become functions of this file, names below known
prefixes become stubs that only keep what they are given, all others are refused. Nothing is
imported. The program's steps are checked before it runs, so that no claim in the file (lengths,
sizes, places) takes more memory than the file itself.

Formats: zip archives and legacy files of `torch.save`, and plain `pickle.dump`.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from src.errors import UsageError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's legacy files
PREFIXES = (
    "torch.nn", "torch.optim", "torchvision", "open_clip", "timm", "src", "clip", "functorch",
    "torch._functorch", "__torch__", "transformers",
)  # fmt: skip
NAMES = {
    ("torch._C._nn", "gelu"), ("torch.serialization", "_get_layout"), ("argparse", "Namespace"),
    ("torch", "device"), ("torch", "strided"), ("builtins", "object"), ("__builtin__", "object"),
}  # fmt: skip
REFUSED_STEPS = {
    "EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER", "BYTEARRAY8",
}  # fmt: skip
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
}  # fmt: skip
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
MAX_STEPS = 20_000_000
MAX_DEPTH = 100  # of modules in modules


class Refused(UsageError):
    """The file asks for something that is not allowed, or does not add up."""


def _said(value: Any, inside: bool = False) -> str:
    """A value for a message: numbers and texts as they are, the rest by what it is.

    Written out, a hostile value may be endless.
    """
    if isinstance(value, tuple) and len(value) < 8 and not inside:
        return f"({', '.join(_said(part, inside=True) for part in value)})"
    if value is None or type(value) in (str, bool, float):
        return repr(value)[:60]
    if type(value) is int and value.bit_length() < 128:
        return str(value)
    return f"a {type(value).__name__}"


class _Guarded(type):
    """Stub classes cannot be changed by what a pickle says."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise Refused(f"it sets {name!r} of a class")


class Stub(metaclass=_Guarded):
    """Stands for an object of a class that is not imported.

    Attributes:
        state: what the pickle says the object holds.
    """

    __slots__ = ("state",)
    state: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        """Takes whatever the class would take, and does nothing with it."""
        stub = object.__new__(cls)
        object.__setattr__(stub, "state", {})
        return stub

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:  # a dict of attributes, and one of slots
            state = state[0]
        if isinstance(state, dict):  # kept, not copied: many objects may be given the same one
            object.__setattr__(self, "state", state)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Refused(f"it sets {name!r} of an object")

    @classmethod
    def path(cls) -> str:
        """The name that it stands for, as `module.name`."""
        return f"{cls.__module__}.{cls.__qualname__}"


class _Dict(OrderedDict[Any, Any]):
    """An ordered dict; attributes that the pickle adds to it are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Budget:
    """How many more things may be copied: a list may be named again and again.

    Args:
        size: bytes of the file; a whole one is copied three times at most, with some to spare.
    """

    def __init__(self, size: int) -> None:
        self.left = 4 * size + 1_000_000

    def take(self, count: int) -> None:
        """Uses some of it up.

        Raises:
            Refused: if there is not so much left.
        """
        self.left -= count
        if self.left < 0:
            raise Refused("it makes more copies than it has content")

    def take_key(self, key: Any) -> None:
        """Uses up what it costs to hash a key, whose parts may be named again and again."""
        self.take(1)
        for part in key if isinstance(key, tuple) else ():
            self.take_key(part)


class _Function:
    """One of our own functions, in place of one that the pickle names; it cannot be changed."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "call", call)

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        raise Refused(f"it sets {name!r} of a function")

    def __setstate__(self, state: Any) -> None:
        raise Refused("it changes a function")


class _Dtype(_Function):
    """A kind of storage, or a dtype."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(_not_callable)
        object.__setattr__(self, "dtype", dtype)


def _not_callable(*args: Any) -> Any:
    raise Refused("it calls a storage")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, which must hold all of it."""
    if not isinstance(storage, Tensor) or storage.ndim != 1:
        raise Refused("a tensor without a storage")
    numbers = (offset, *_integers(size), *_integers(stride))
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or len(size) != len(stride):
        raise Refused(f"a tensor of size {_said(size)}, stride {_said(stride)} at {_said(offset)}")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= len(storage) or count > len(storage)):
        raise Refused(
            f"a tensor of size {tuple(size)} and stride {tuple(stride)} at {offset} in a storage "
            f"of {len(storage)} numbers"
        )
    if not count:
        return storage.new_empty(tuple(size))
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _integers(values: Any) -> Sequence[Any]:
    if not isinstance(values, tuple) or len(values) > 64:
        raise Refused(f"a tensor of shape {_said(values)}")
    return values


def _rebuild_parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("a parameter that is no tensor")
    return data


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(_integers(values))


def _first(value: Any = None, *_: Any) -> Any:
    return value


def _attribute(of: Any, name: Any) -> Stub:
    """An attribute of a stub, a stub itself: so Python 3.11.0 to 3.11.3 pickle members of enums."""
    if not isinstance(of, _Guarded) or not isinstance(name, str):
        raise Refused(f"it asks for attribute {_said(name)} of a {type(of).__name__}")
    return Stub()


FUNCTIONS: dict[tuple[str, str], Any] = {
    ("builtins", "getattr"): _Function(_attribute),
    ("__builtin__", "getattr"): _Function(_attribute),
    ("torch.jit._pickle", "restore_type_tag"): _Function(_first),
    ("torch", "Size"): _Function(_size),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_rebuild_parameter),
    **{("torch", name): _Dtype(dtype) for name, dtype in STORAGES.items()},
    **{("torch.storage", name): _Dtype(dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): _Dtype(getattr(torch, name)) for name in DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """Builds plain data, tensors and stubs, and nothing else.

    Args:
        file: the pickle.
        storage: gives the storage of a persistent id.
        budget: bytes and items that may be copied.
    """

    def __init__(self, file: BinaryIO, storage: Callable[[Any], Any], budget: _Budget) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self._storage = storage
        self._stubs: dict[tuple[str, str], type[Stub]] = {}

        def container(kind: type) -> _Function:
            def make(items: Any = ()) -> Any:
                if not isinstance(items, list | tuple | set | dict):
                    raise Refused(f"a {kind.__name__} of a {type(items).__name__}")
                for item in items:
                    budget.take_key(item)
                return kind(items)

            return _Function(make)

        def load_from_bytes(content: Any) -> Any:  # a storage alone, as a legacy file in the file
            if not isinstance(content, bytes):
                raise Refused("a storage that is not bytes")
            budget.take(len(content))
            return _read_legacy(content, budget)

        def encode(text: Any, encoding: Any = "latin1") -> bytes:  # how protocol 2 writes bytes
            if not isinstance(text, str) or encoding != "latin1":
                raise Refused(f"bytes of a {type(text).__name__} in {_said(encoding)}")
            budget.take(len(text))
            return text.encode("latin1")

        self._own = {
            ("_codecs", "encode"): _Function(encode),
            ("collections", "OrderedDict"): container(_Dict),
            ("torch.storage", "_load_from_bytes"): _Function(load_from_bytes),
            **{(m, "set"): container(set) for m in ("builtins", "__builtin__")},
            **{(m, "frozenset"): container(frozenset) for m in ("builtins", "__builtin__")},
        }

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        key = (module, name)
        if key in self._own or key in FUNCTIONS:
            return self._own.get(key) or FUNCTIONS[key]
        known = any(module == p or module.startswith(f"{p}.") for p in PREFIXES)
        if not known and key not in NAMES:
            raise Refused(f"it names {module}.{name}")
        if key not in self._stubs:
            body = {"__slots__": (), "__module__": module, "__qualname__": name}
            self._stubs[key] = cast(type[Stub], _Guarded(name, (Stub,), body))
        return self._stubs[key]

    def persistent_load(self, pid: Any) -> Any:
        """The storage, or the class, that a persistent id names."""
        return self._storage(pid)


class _Keys:
    """What it costs to hash the keys that a pickle makes, found without making them.

    A few bytes make a tuple of two tuples of two tuples ..., which takes forever to hash. So each
    thing on the stack is followed as a number, its count of parts if it were written out.

    Args:
        size: bytes of the file; what keys may cost grows with it.
    """

    MARKED = pickletools.markobject
    HASHED = ("SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET")
    JOINED = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "REDUCE")
    WIDE = 2**61 - 2  # from here on, many numbers have the same hash

    def __init__(self, size: int) -> None:
        self.left = 16 * size + 1_000_000
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[int, int] = {}

    def follow(self, step: pickletools.OpcodeInfo, arg: Any) -> None:
        """Takes one step of the pickle.

        Raises:
            Refused: if its keys cost too much, or there is nothing on the stack.
        """
        name = step.name
        if name == "MARK":
            self.marks.append(len(self.stack))
        elif name == "POP" and self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else arg] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[arg])
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        else:
            taken = self._take(step.stack_before)
            weight = 1
            if name in self.JOINED:
                weight += sum(taken)
            elif isinstance(arg, int) and abs(arg) > self.WIDE:
                weight = 1000
            elif name == "BUILD":
                weight = taken[0]
            self.left -= sum(taken) if name in self.HASHED else 0
            if weight > self.left or self.left < 0:
                raise Refused("it has keys that cost too much")
            self.stack += [weight] * len(step.stack_after)

    def _take(self, before: list[Any]) -> list[int]:
        start = len(self.stack) - len(before)
        if self.MARKED in before:
            start = self.marks.pop() - before.index(self.MARKED)
        taken = self.stack[start:]
        del self.stack[start:]
        return taken


def _scan(content: bytes, start: int = 0) -> int:
    """Checks the steps of the pickle at `start`, without running them; returns its end.

    Raises:
        Refused: for steps that are not allowed, or that claim more than there is.
    """
    stream = io.BytesIO(content)
    stream.seek(start)
    places, keys = 0, _Keys(len(content))
    try:
        for steps, (step, arg, position) in enumerate(pickletools.genops(stream)):
            if steps > MAX_STEPS:
                raise Refused(f"it has more than {MAX_STEPS} steps")
            if step.name in REFUSED_STEPS:
                raise Refused(f"it has the step {step.name} at byte {position}")
            if step.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                places += 1
                if arg is None or arg > 4 * places + 4096:  # the table is as long as the number
                    raise Refused(f"it keeps something in place {arg} of {places}")
            keys.follow(step, arg)
    except Refused:
        raise
    except Exception as error:  # pickletools has no error of its own
        raise Refused(f"it is not a whole pickle ({error})") from error
    return stream.tell()


def _run(
    content: bytes, storage: Callable[[Any], Any], budget: _Budget, start: int = 0
) -> tuple[Any, int]:
    """The object of the pickle at `start`, and where the pickle ends."""
    end = _scan(content, start)
    stream = io.BytesIO(content[start:end])
    try:
        return _Unpickler(stream, storage, budget).load(), end
    except UsageError:
        raise
    except Exception as error:  # a hostile program may raise anything; ours never ran
        raise Refused(f"{type(error).__name__}: {error}") from error


def read_pickle(path: Path) -> Any:
    """The object that a file of `torch.save` or `pickle.dump` holds, its classes as stubs.

    Args:
        path: the file.

    Raises:
        UsageError: if it is damaged, or asks for anything but data. Nothing has been executed.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        content = path.read_bytes()
        return _read_legacy(content, _Budget(len(content)))
    except RecursionError as error:
        raise UsageError(f"{path} is refused: it is nested too deeply") from error
    except (Refused, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{path} is refused: {error}. Expected a checkpoint of tensors; nothing in it was "
            "executed"
        ) from error


def _read_zip(path: Path) -> Any:
    """An archive of `torch.save`, or of TorchScript: a pickle, and a member a storage."""
    try:
        with zipfile.ZipFile(path) as archive:
            size, names = path.stat().st_size, archive.namelist()
            if len(set(names)) != len(names):
                raise Refused("two members of the archive have one name")
            main = [name for name in names if name.endswith("/data.pkl")]
            if len(main) != 1:
                raise Refused(f"the archive has {len(main)} files data.pkl, expected one")
            root = main[0].removesuffix("data.pkl")

            def member(name: str) -> bytes:
                info = archive.getinfo(f"{root}{name}")
                stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
                if not stored or info.file_size > size:
                    raise Refused(f"member {name} is compressed or encrypted, as torch's are not")
                return archive.read(info)

            if f"{root}byteorder" in names and member("byteorder") != b"little":
                raise Refused("its numbers are big-endian")
            found: dict[str, Tensor] = {}

            def storage(pid: Any) -> Tensor:
                dtype, key, count = _storage_id(pid)
                if key not in found:
                    found[key] = _numbers(member(f"data/{key}"), dtype, count)
                return found[key]

            return _run(member("data.pkl"), storage, _Budget(size))[0]
    except UsageError:
        raise
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, RuntimeError) as error:
        raise Refused(f"the archive is damaged ({error})") from error


def _storage_id(pid: Any) -> tuple[torch.dtype, str, int]:
    """dtype, key and length of ("storage", kind, key, location, count)."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise Refused(f"a persistent id {_said(pid)}")
    _, kind, key, _, count = pid[:5]
    if not isinstance(kind, _Dtype) or not isinstance(key, str) or not key.isalnum():
        raise Refused(f"a storage {_said(pid)}")
    if type(count) is not int or count < 0:
        raise Refused(f"a storage of {_said(count)} numbers")
    return kind.dtype, key, count  # type: ignore[attr-defined]


def _numbers(content: bytes, dtype: torch.dtype, count: int) -> Tensor:
    if len(content) != count * dtype.itemsize:
        raise Refused(f"a storage of {count} {dtype} numbers in {len(content)} bytes")
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype)


def _read_legacy(content: bytes, budget: _Budget) -> Any:
    """A legacy file of `torch.save`: five pickles, then the storages; or a plain pickle."""
    if content[:1] != b"\x80" or len(content) < 2 or not 2 <= content[1] <= 5:
        raise Refused("it is no pickle of protocol 2 or newer")
    first, end = _run(content, _no_storage, budget)
    if not (type(first) is int and first == MAGIC):
        return first
    protocol, end = _run(content, _no_storage, budget, end)
    system, end = _run(content, _no_storage, budget, end)
    if protocol != PROTOCOL or not (isinstance(system, dict) and system.get("little_endian")):
        raise Refused(f"version {_said(protocol)} of torch's legacy format, or big-endian numbers")
    storages = _LegacyStorages(len(content))
    result, end = _run(content, storages, budget, end)
    keys, end = _run(content, _no_storage, budget, end)
    storages.fill(keys, content, end)
    return result


class _LegacyStorages:
    """The storages of a legacy file, which come after the pickle that names them.

    Args:
        size: bytes of the file, which hold all of them.
    """

    def __init__(self, size: int) -> None:
        self.left, self.found = size, dict[str, Tensor]()

    def __call__(self, pid: Any) -> Any:
        """The storage of a persistent id, or a part of it; not yet filled."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # a class, kept with its source code
        dtype, key, count = _storage_id(pid)
        if key not in self.found:
            self.left -= count * dtype.itemsize
            if self.left < 0:
                raise Refused("its storages are larger than the file")
            self.found[key] = torch.empty(count, dtype=dtype)
        whole, view = self.found[key], pid[5] if len(pid) > 5 else None
        if view is None:
            return whole
        numbers = view[1:] if isinstance(view, tuple) and len(view) == 3 else (-1, -1)
        if not all(type(n) is int and n >= 0 for n in numbers) or sum(numbers) > len(whole):
            raise Refused(f"a view {_said(view)} of a storage of {len(whole)} numbers")
        return whole[numbers[0] : sum(numbers)]

    def fill(self, keys: Any, content: bytes, start: int) -> None:
        """Reads the storages in the order of `keys`, each after its length, from `start` on."""
        named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not named or sorted(keys) != sorted(self.found):
            raise Refused("the list of its storages does not fit")
        for key in keys:
            tensor = self.found[key]
            end = start + 8 + tensor.numel() * tensor.dtype.itemsize
            if end > len(content) or struct.unpack_from("<q", content, start)[0] != tensor.numel():
                raise Refused(f"storage {key} is cut off")
            tensor.copy_(_numbers(content[start + 8 : end], tensor.dtype, tensor.numel()))
            start = end


def _no_storage(pid: Any) -> Any:
    raise Refused(f"a persistent id {_said(pid)} where there are no storages")


def tensors_of(content: Any) -> dict[str, Tensor]:
    """The named tensors of a dict, which may hold other things; none of anything else."""
    found = content.items() if isinstance(content, Mapping) else ()
    return {n: v for n, v in found if isinstance(n, str) and isinstance(v, Tensor)}


def state_of(module: Stub) -> OrderedDict[str, Tensor]:
    """The state dict of a pickled module: parameters and persistent buffers by name.

    Raises:
        UsageError: if it is nested in itself, or too deeply.
    """
    found: OrderedDict[str, Tensor] = OrderedDict()

    def walk(stub: Any, prefix: str, above: tuple[int, ...]) -> None:
        if not isinstance(stub, Stub):
            return
        if id(stub) in above or len(above) > MAX_DEPTH:
            raise UsageError(f"module {prefix or '-'} holds itself or is nested too deeply")
        state = stub.state
        if stub.path().startswith("__torch__."):  # TorchScript keeps all attributes alike
            state = {
                "_parameters": {n: v for n, v in state.items() if isinstance(v, Tensor)},
                "_modules": {n: v for n, v in state.items() if isinstance(v, Stub)},
            }
        transient = state.get("_non_persistent_buffers_set", ())
        for kind in ("_parameters", "_buffers"):
            held = state.get(kind)
            for name, value in held.items() if isinstance(held, dict) else ():
                skipped = kind == "_buffers" and name in transient
                if isinstance(value, Tensor) and not skipped:
                    found[f"{prefix}{name}"] = value
        modules = state.get("_modules")
        for name, child in modules.items() if isinstance(modules, dict) else ():
            if len(found) > 100_000:
                raise UsageError("it has more than 100,000 tensors")
            walk(child, f"{prefix}{name}.", (*above, id(stub)))

    walk(module, "", ())
    return found
