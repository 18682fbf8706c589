"""Pickles read without executing them: tensors and plain data, inert stubs for everything else.

A pickle is a program that calls what it names. Here its steps are run by a machine of our own that
knows plain data only: a few exact names (tensors, storages, plain containers) stand for functions
of this file, names below known prefixes become stubs that only keep what they are given, all others
are refused. Nothing is imported. Every object is charged to one budget a file, in bytes and in
steps, by what it costs to make, to keep and to hash, so that memory and time stay in proportion to
the file's size.

Formats: zip archives and legacy files of `torch.save`, and plain `pickle.dump`.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.reading import readable, refuse_pointer
from tangent_arithmetic.storage.zips import open_zip

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's legacy files
PREFIXES = (
    "torch.nn", "torch.optim", "torchvision", "open_clip", "timm", "src", "clip", "functorch",
    "torch._functorch", "__torch__", "transformers",
)  # fmt: skip
NAMES = {
    ("torch._C._nn", "gelu"), ("torch.serialization", "_get_layout"), ("argparse", "Namespace"),
    ("torch", "device"), ("torch", "strided"), ("builtins", "object"), ("__builtin__", "object"),
    ("numpy", "dtype"), ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
}  # fmt: skip
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")

# the budget: bytes of objects and of copies, steps of the machine (about 1 microsecond each)
TIMES_SIZE, SPARE_BYTES = 6, 32 << 20
MOST_STEPS, SPARE_STEPS = 20_000_000, 500_000
# what a thing costs, in bytes; places in tables right after they have grown
TENSOR, OBJECT, ENTRY, MEMO = 2000, 250, 200, 130
PROBES = 512  # places of a table that a step looks at; COMPARED keys of one hash
COMPARED = 64
MODULUS = 2**61 - 1  # integers from here on share their hashes

MOST_TIMES_STORED, SPARE_NAMED = 4, 16 << 20  # bytes of tensors by name, against those stored
MAX_DEPTH = 100  # of modules in modules
MOST_NAMES = 20_000_000  # characters of the names in a module, and 100 for each


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


class _Budget:
    """What a file may still cost.

    Charges are never returned: what was made and dropped again took time, too.

    Args:
        size: bytes of the file.
    """

    def __init__(self, size: int) -> None:
        self.bytes_left = TIMES_SIZE * size + SPARE_BYTES
        self.steps_left = min(size, MOST_STEPS) + SPARE_STEPS
        self.named_left = MOST_TIMES_STORED * size + SPARE_NAMED

    def keep(self, count: int) -> None:
        """Charges bytes.

        Raises:
            Refused: if fewer are left.
        """
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise Refused("it takes more memory than a file of its size may")

    def work(self, count: int = 1) -> None:
        """Charges steps.

        Raises:
            Refused: if fewer are left.
        """
        self.steps_left -= count
        if self.steps_left < 0:
            raise Refused("it takes more steps than a file of its size may")

    def name(self, value: Any) -> None:
        """Charges what a dict names, if it is a tensor: readers copy each, for another type say.

        Raises:
            Refused: if the same numbers are named again and again.
        """
        if type(value) is Tensor:
            self.named_left -= value.nbytes
            if self.named_left < 0:
                raise Refused(
                    f"its tensors are more than {MOST_TIMES_STORED} times as large as the file, "
                    "since they name the same numbers again and again; save a copy of each"
                )

    def key(self, key: Any, count: int) -> None:
        """Charges a key, or an item of a set: its hash, its place, those it may be compared with.

        Hashes of texts and bytes are random; those of numbers are chosen by who writes the file,
        all alike for instance.

        Args:
            key: the key.
            count: how many the container has.

        Raises:
            Refused: if that is too much, or it cannot be a key.
        """
        self.keep(ENTRY)
        if type(key) not in (str, bytes):
            self.work(1 + count // (PROBES if type(key) is int else COMPARED))
            if type(key) is int and abs(key) >= MODULUS:
                raise Refused(f"it has a key of {key.bit_length()} bits")
            if type(key) is tuple:
                for part in key:
                    self.key(part, count)
            elif not isinstance(key, KEYS):
                raise Refused(f"it has a key that is a {type(key).__name__}")


@dataclass(frozen=True, eq=False)
class StubClass:
    """Stands for a class that is not imported.

    Attributes:
        path: its name, as `module.name`.
    """

    __slots__ = ("path",)
    path: str


class Stub:
    """Stands for an object of a class that is not imported.

    Args:
        of: its class.

    Attributes:
        state: what the pickle says the object holds.
    """

    __slots__ = ("of", "state")

    def __init__(self, of: StubClass) -> None:
        self.of, self.state = of, dict[Any, Any]()

    def path(self) -> str:
        """The name of its class, as `module.name`."""
        return self.of.path


@dataclass(frozen=True, eq=False)
class _Dtype:
    """A kind of storage, or a dtype."""

    dtype: torch.dtype


KEYS = (int, float, type(None), Stub, StubClass, _Dtype, FunctionType, Tensor)
DTYPE_NAMES: dict[tuple[str, str], _Dtype] = {
    **{("torch", name): _Dtype(dtype) for name, dtype in STORAGES.items()},
    **{("torch.storage", name): _Dtype(dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): _Dtype(getattr(torch, name)) for name in DTYPES},
}


def _integers(values: Any) -> tuple[Any, ...]:
    if not isinstance(values, tuple) or len(values) > 64:
        raise Refused(f"a tensor of shape {_said(values)}")
    return values


# What the functions that a pickle may call are here


def _rebuild_tensor(
    budget: _Budget, storage: Any, offset: Any, size: Any, stride: Any, *_: Any
) -> Tensor:
    """A view of a storage, which must hold all of it."""
    budget.keep(TENSOR)
    if not isinstance(storage, Tensor) or storage.ndim != 1:
        raise Refused("a tensor without a storage")
    numbers = (offset, *_integers(size), *_integers(stride))
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or len(size) != len(stride):
        raise Refused(f"a tensor of size {_said(size)}, stride {_said(stride)} at {_said(offset)}")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= len(storage) or count > len(storage)):
        raise Refused(
            f"a tensor of size {size} and stride {stride} at {offset} in a storage of "
            f"{len(storage)} numbers"
        )
    if not count:
        return storage.new_empty(size)
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(budget: _Budget, data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("a parameter that is no tensor")
    return data


def _size(budget: _Budget, values: Any = ()) -> tuple[Any, ...]:
    return _integers(values)


def _first(budget: _Budget, value: Any = None, *_: Any) -> Any:
    return value


def _attribute(budget: _Budget, of: Any, name: Any) -> Stub:
    """An attribute of a stub, a stub itself: so Python 3.11.0 to 3.11.3 pickle members of enums."""
    if not isinstance(of, StubClass) or not isinstance(name, str):
        raise Refused(f"it asks for attribute {_said(name)} of a {type(of).__name__}")
    budget.keep(OBJECT)
    return Stub(of)


def _collection(kind: type[set[Any]] | type[frozenset[Any]]) -> Callable[..., Any]:
    def make(budget: _Budget, items: Any = ()) -> Any:
        if not isinstance(items, list | tuple | set | dict):
            raise Refused(f"a {kind.__name__} of a {type(items).__name__}")
        budget.keep(OBJECT)
        for count, item in enumerate(items):
            budget.key(item, count)
        return kind(items)

    return make


def _ordered_dict(budget: _Budget, items: Any = ()) -> OrderedDict[Any, Any]:
    if not isinstance(items, list | tuple | dict):
        raise Refused(f"an OrderedDict of a {type(items).__name__}")
    budget.keep(2 * OBJECT)
    pairs = list(items.items() if isinstance(items, dict) else items)
    for count, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Refused("an OrderedDict of other things than pairs")
        budget.key(pair[0], count)
        budget.name(pair[1])
    return OrderedDict(pairs)


def _load_from_bytes(budget: _Budget, content: Any) -> Any:
    """A storage alone, as a legacy file in the file."""
    if not isinstance(content, bytes):
        raise Refused("a storage that is not bytes")
    budget.keep(OBJECT + 2 * len(content))
    return _read_legacy(content, budget)


def _encode(budget: _Budget, text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes, as protocol 2 writes them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused(f"bytes of a {type(text).__name__} in {_said(encoding)}")
    budget.keep(OBJECT + len(text))
    return text.encode("latin1")


FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "getattr"): _attribute,
    ("__builtin__", "getattr"): _attribute,
    ("builtins", "set"): (_set := _collection(set)),
    ("__builtin__", "set"): _set,
    ("builtins", "frozenset"): (_frozenset := _collection(frozenset)),
    ("__builtin__", "frozenset"): _frozenset,
    ("collections", "OrderedDict"): _ordered_dict,
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): _size,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}


class _Machine:
    """Runs the steps of one pickle, each of which it charges before or as it makes something.

    Args:
        storage: gives the storage of a persistent id.
        budget: that of the file.
    """

    def __init__(self, storage: Callable[[Any], Any], budget: _Budget) -> None:
        self._storage, self._budget = storage, budget
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._names: dict[tuple[str, str], StubClass] = {}

    def run(self, stream: BinaryIO) -> Any:
        """The object that the pickle makes.

        Raises:
            Refused: for a step that is not allowed, or that costs too much.
        """
        for step, arg, position in pickletools.genops(stream):
            self._budget.work()
            if step.name in LITERALS:
                self._push(arg, sys.getsizeof(arg))
            elif step.name in ACTS:
                ACTS[step.name](self, arg)
            else:
                raise Refused(f"it has the step {step.name} at byte {position}")
        return self._stack.pop()

    def _push(self, value: Any, cost: int = 0) -> None:
        self._budget.keep(cost + 16)  # and its place on the stack
        self._stack.append(value)

    def _marked(self) -> list[Any]:
        """Takes what lies above the last mark."""
        start = self._marks.pop()
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _taken(self, count: int) -> list[Any]:
        """Takes so many things from the stack."""
        if count > len(self._stack):
            raise Refused("it takes more from its stack than is there")
        return [self._stack.pop() for _ in range(count)][::-1]

    def _ignore(self, arg: Any) -> None:
        pass

    def _mark(self, arg: Any) -> None:
        self._budget.keep(40)
        self._marks.append(len(self._stack))

    def _pop(self, arg: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _pop_mark(self, arg: Any) -> None:
        self._marked()

    def _dup(self, arg: Any) -> None:
        self._push(self._stack[-1])

    def _get(self, arg: int) -> None:
        self._push(self._memo[arg])

    def _put(self, arg: int | None) -> None:
        self._budget.keep(MEMO)
        place = len(self._memo) if arg is None else arg
        if place > 4 * len(self._memo) + 4096:
            raise Refused(f"it keeps something in place {place} of {len(self._memo)}")
        self._memo[place] = self._stack[-1]

    def _text(self, arg: str) -> None:
        """A text of Python 2, which may be any bytes."""
        found = arg.encode("latin1").decode("utf-8", errors="replace")
        self._push(found, sys.getsizeof(found))

    def _persistent(self, arg: Any) -> None:
        self._budget.keep(TENSOR)
        self._push(self._storage(self._stack.pop()))

    def _tuple(self, items: Iterable[Any]) -> None:
        made = tuple(items)
        self._push(made, sys.getsizeof(made))

    def _empty_list(self, arg: Any) -> None:
        self._push([], OBJECT)

    def _empty_dict(self, arg: Any) -> None:
        self._push({}, OBJECT)

    def _empty_set(self, arg: Any) -> None:
        self._push(set(), OBJECT)

    def _list(self, arg: Any) -> None:
        made = self._marked()
        self._push(made, sys.getsizeof(made))

    def _dict(self, arg: Any) -> None:
        items = self._marked()
        self._push({}, OBJECT)
        self._set(items)

    def _frozenset(self, arg: Any) -> None:
        self._push(FUNCTIONS["builtins", "frozenset"](self._budget, self._marked()))

    def _append(self, items: list[Any]) -> None:
        self._budget.keep(24 * len(items))
        target = self._top(list, "appends to")
        target += items

    def _set(self, items: list[Any]) -> None:
        target = self._top(dict, "sets an item of")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._budget.key(key, len(target))
            self._budget.name(value)
            target[key] = value

    def _add(self, arg: Any) -> None:
        items = self._marked()
        target = self._top(set, "adds to")
        for item in items:
            self._budget.key(item, len(target))
            target.add(item)

    def _top(self, kind: type, said: str) -> Any:
        target = self._stack[-1]
        if not isinstance(target, kind):
            raise Refused(f"it {said} a {type(target).__name__}")
        return target

    def _global(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self._push(self._named(module, name))

    def _stack_global(self, arg: Any) -> None:
        self._push(self._named(*self._taken(2)))

    def _named(self, module: Any, name: Any) -> Any:
        """What stands for a name."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused(f"it names {_said(module)}, {_said(name)}")
        key = (module, name)
        if found := FUNCTIONS.get(key) or DTYPE_NAMES.get(key) or self._names.get(key):
            return found
        if not any(module == p or module.startswith(f"{p}.") for p in PREFIXES) and (
            key not in NAMES
        ):
            raise Refused(f"it names {shown(f'{module}.{name}')}")
        self._budget.keep(2 * OBJECT + 2 * (len(module) + len(name)))
        return self._names.setdefault(key, StubClass(f"{module}.{name}"))

    def _reduce(self, arg: Any) -> None:
        of, given = self._taken(2)
        if not isinstance(given, tuple):
            raise Refused(f"it calls something with a {type(given).__name__}")
        if isinstance(of, FunctionType):  # there are no others than ours
            self._push(of(self._budget, *given))
        else:
            self._push(self._made(of), OBJECT)

    def _new(self, count: int) -> None:
        """An object without a call of its class; whatever else the class would take is dropped."""
        self._push(self._made(self._taken(count)[0]), OBJECT)

    def _made(self, of: Any) -> Stub:
        if not isinstance(of, StubClass):
            raise Refused(f"it makes an object of a {type(of).__name__}")
        return Stub(of)

    def _build(self, arg: Any) -> None:
        """Gives a stub its state; attributes of an ordered dict are dropped."""
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(state, tuple) and len(state) == 2:  # a dict of attributes, and one of slots
            state = state[0]
        if isinstance(target, Stub):
            if isinstance(state, dict):  # kept, not copied: many objects may be given the same one
                target.state = state
        elif not isinstance(target, OrderedDict):
            raise Refused(f"it sets attributes of a {type(target).__name__}")


LITERALS = {
    "NONE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4",
    "FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
Act = Callable[[_Machine, Any], None]
ACTS: dict[str, Act] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _Machine._ignore),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _Machine._text),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    "NEWTRUE": lambda machine, arg: machine._push(True),
    "NEWFALSE": lambda machine, arg: machine._push(False),
    "MARK": _Machine._mark,
    "POP": _Machine._pop,
    "POP_MARK": _Machine._pop_mark,
    "DUP": _Machine._dup,
    "BINPERSID": _Machine._persistent,
    "EMPTY_TUPLE": lambda machine, arg: machine._tuple(()),
    "TUPLE1": lambda machine, arg: machine._tuple(machine._taken(1)),
    "TUPLE2": lambda machine, arg: machine._tuple(machine._taken(2)),
    "TUPLE3": lambda machine, arg: machine._tuple(machine._taken(3)),
    "TUPLE": lambda machine, arg: machine._tuple(machine._marked()),
    "EMPTY_LIST": _Machine._empty_list,
    "LIST": _Machine._list,
    "APPEND": lambda machine, arg: machine._append(machine._taken(1)),
    "APPENDS": lambda machine, arg: machine._append(machine._marked()),
    "EMPTY_DICT": _Machine._empty_dict,
    "DICT": _Machine._dict,
    "SETITEM": lambda machine, arg: machine._set(machine._taken(2)),
    "SETITEMS": lambda machine, arg: machine._set(machine._marked()),
    "EMPTY_SET": _Machine._empty_set,
    "ADDITEMS": _Machine._add,
    "FROZENSET": _Machine._frozenset,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": lambda machine, arg: machine._new(2),
    "NEWOBJ_EX": lambda machine, arg: machine._new(3),
    "BUILD": _Machine._build,
}


def _run(
    content: bytes, storage: Callable[[Any], Any], budget: _Budget, start: int = 0
) -> tuple[Any, int]:
    """The object of the pickle at `start`, and where the pickle ends."""
    stream = io.BytesIO(content)
    stream.seek(start)
    try:
        return _Machine(storage, budget).run(stream), stream.tell()
    except UsageError:
        raise
    except Exception as error:  # a hostile program may make anything of plain data fail
        raise Refused(
            f"it is not a whole pickle ({type(error).__name__}: {shown(error)})"
        ) from error


def read_pickle(path: Path) -> Any:
    """The object that a file of `torch.save` or `pickle.dump` holds, its classes as stubs.

    Args:
        path: the file.

    Raises:
        MissingFileError: if it is not there.
        UsageError: if it is damaged, asks for anything but data, or for more memory or time than
            its size allows. Nothing has been executed.
    """
    refuse_pointer(path)
    with readable(path, "a checkpoint of tensors"):
        try:
            if zipfile.is_zipfile(path):
                return _read_zip(path)
            content = path.read_bytes()
            return _read_legacy(content, _Budget(len(content)))
        except Refused as error:
            raise UsageError(
                f"{path} is refused: {error}. Expected a checkpoint of tensors; nothing in it was "
                "executed"
            ) from error


def _read_zip(path: Path) -> Any:
    """An archive of `torch.save`, or of TorchScript: a pickle, and a member a storage."""
    try:
        with open_zip(path) as archive:
            names = archive.namelist()
            if len(set(names)) != len(names):
                raise Refused("two members of the archive have one name")
            main = [name for name in names if name.endswith("/data.pkl")]
            if len(main) != 1:
                raise Refused(f"the archive has {len(main)} files data.pkl, expected one")
            root = main[0].removesuffix("data.pkl")

            def member(name: str) -> bytes:
                info = archive.getinfo(f"{root}{name}")
                stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
                if not stored or info.file_size != info.compress_size:
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

            return _run(member("data.pkl"), storage, _Budget(path.stat().st_size))[0]
    except UsageError:
        raise
    except Exception as error:  # zipfile has no error of its own for all that may be wrong
        raise Refused(f"the archive is damaged ({type(error).__name__}: {shown(error)})") from error


def _storage_id(pid: Any) -> tuple[torch.dtype, str, int]:
    """dtype, key and length of ("storage", kind, key, location, count)."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise Refused(f"a persistent id {_said(pid)}")
    _, kind, key, _, count = pid[:5]
    if not isinstance(kind, _Dtype) or not isinstance(key, str) or not key.isalnum():
        raise Refused(f"a storage {_said(pid)}")
    if type(count) is not int or not 0 <= count < 2**48:
        raise Refused(f"a storage of {_said(count)} numbers")
    return kind.dtype, key, count


def _numbers(content: bytes | memoryview, dtype: torch.dtype, count: int) -> Tensor:
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
    little = isinstance(system, dict) and system.get("little_endian") is True
    if type(protocol) is not int or protocol != PROTOCOL or not little:
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
        whole = memoryview(content)
        for key in keys:
            tensor = self.found[key]
            end = start + 8 + tensor.numel() * tensor.dtype.itemsize
            if end > len(content) or struct.unpack_from("<q", content, start)[0] != tensor.numel():
                raise Refused(f"storage {shown(key)} is cut off")
            tensor.copy_(_numbers(whole[start + 8 : end], tensor.dtype, tensor.numel()))
            start = end


def _no_storage(pid: Any) -> Any:
    raise Refused(f"a persistent id {_said(pid)} where there are no storages")


def tensors_of(content: Any) -> dict[str, Tensor]:
    """The named tensors of a dict, which may hold other things; none of anything else."""
    found = content.items() if isinstance(content, Mapping) else ()
    return {n: v for n, v in found if isinstance(n, str) and isinstance(v, Tensor)}


def within_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, whose numbers may have several names each, as tied weights do.

    Raises:
        UsageError: if they are so many times larger than what is stored that a copy of each, in
            another type for instance, would take far more memory than the file.
    """
    storages = [value.untyped_storage() for value in tensors.values()]
    stored = sum({one.data_ptr(): one.nbytes() for one in storages}.values())
    named = sum(value.nbytes for value in tensors.values())
    if named > MOST_TIMES_STORED * stored + SPARE_NAMED:
        raise UsageError(
            f"{len(tensors):,} tensors of {named:,} bytes name the same {stored:,} bytes again and "
            f"again, expected at most {MOST_TIMES_STORED} times as much; save a copy of each"
        )
    return tensors


def state_of(module: Stub) -> OrderedDict[str, Tensor]:
    """The state dict of a pickled module: parameters and persistent buffers by name.

    Raises:
        UsageError: if it is nested in itself, or too deeply, or holds the same modules in so many
            places that their names take more memory than those of any model.
    """
    found: OrderedDict[str, Tensor] = OrderedDict()
    left = MOST_NAMES

    def entries(held: Any, prefix: str) -> Iterator[tuple[str, str, Any]]:
        """Each entry of a dict with its own name and its full one, which are charged."""
        nonlocal left
        for name, value in held.items() if isinstance(held, dict) else ():
            left -= 100 + len(prefix) + (len(name) if isinstance(name, str) else 0)
            if left < 0:
                raise UsageError("its modules hold each other in more places than a model has")
            if isinstance(name, str):
                yield name, f"{prefix}{name}", value

    def walk(stub: Stub, prefix: str, above: tuple[int, ...]) -> None:
        if id(stub) in above or len(above) > MAX_DEPTH:
            raise UsageError(f"module {shown(prefix) or '-'} holds itself or is nested too deeply")
        state = stub.state
        script = stub.path().startswith("__torch__.")  # TorchScript keeps all attributes alike
        parameters, modules = (
            state if script else state.get(key) for key in ("_parameters", "_modules")
        )
        buffers, transient = state.get("_buffers"), state.get("_non_persistent_buffers_set")
        for _, full, value in entries(parameters, prefix):
            if isinstance(value, Tensor):
                found[full] = value
        for name, full, value in () if script else entries(buffers, prefix):
            dropped = isinstance(transient, set | frozenset) and name in transient
            if isinstance(value, Tensor) and not dropped:
                found[full] = value
        for _, full, value in entries(modules, prefix):
            if isinstance(value, Stub):
                walk(value, f"{full}.", (*above, id(stub)))

    walk(module, "", ())
    within_storage(found)
    return found
