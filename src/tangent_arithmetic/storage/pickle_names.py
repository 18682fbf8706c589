"""The names a pickle may use, and what stands for each: our own functions, dtypes or inert stubs.

Nothing named in a pickle is imported. Exact names (tensors, storages, plain containers) map to
functions of this module, names below known prefixes become stubs that only hold a state, and all
others are refused. Every object is charged to the `Budget` of its file.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.runtime.errors import UsageError

OF_TORCH = ("torch.nn", "torch.optim", "torch._functorch", "__torch__", "functorch", "torchvision")
PREFIXES = (*OF_TORCH, "open_clip", "timm", "src", "clip", "transformers")
FACTORIES = ("dict", "float", "int", "list", "long")  # of a defaultdict; protocol 2 has `long`
STUBS = {  # by module
    "torch": ("Tensor", "device", "strided"),
    "torch._C._nn": ("gelu",),
    "torch.serialization": ("_get_layout",),
    "argparse": ("Namespace",),
    "builtins": ("object", "complex", "range", *FACTORIES),
    "__builtin__": ("object", "complex", "xrange", *FACTORIES),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "functools": ("partial",),
    "types": ("SimpleNamespace",),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("scalar",),
    "numpy._core.multiarray": ("scalar",),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath",),
}
DTYPES = {  # storage classes and dtypes by the names they have in `torch`
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
FLOAT8 = tuple(f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu"))
UNTYPED = ("uint16", "uint32", "uint64", *FLOAT8)  # dtypes without a storage class

# the budget: bytes of objects and of copies, steps of the machine (about 1 microsecond each)
TIMES_SIZE, SPARE_BYTES = 6, 32 << 20
MOST_STEPS, SPARE_STEPS = 20_000_000, 500_000
MOST_TIMES_STORED, SPARE_NAMED = 4, 16 << 20  # bytes of tensors by name, relative to those stored
TENSOR, OBJECT, ENTRY = 2000, 250, 200  # bytes charged; an entry as in a table that has just grown
PROBES, COMPARED = 512, 64  # table slots, and keys of equal hash, that one step may visit
MODULUS = 2**61 - 1  # integers from here on share their hashes


class Refused(UsageError):
    """The file asks for something that is not allowed, or is inconsistent."""


def quoted(value: object, inside: bool = False) -> str:
    """A value for a message; a container, whose full text may be endless, by its type."""
    if isinstance(value, tuple) and len(value) < 8 and not inside:
        return f"({', '.join(quoted(part, inside=True) for part in value)})"
    if value is None or type(value) in (str, bool, float):
        return repr(value)[:60]
    if type(value) is int and value.bit_length() < 128:
        return str(value)
    return f"a {type(value).__name__}"


@dataclass(frozen=True, eq=False)
class StubClass:
    """Stands for a class that is not imported.

    Attributes:
        path: its name, as `module.name`.
    """

    __slots__ = ("path",)
    path: str


class Stub:
    """Stands for an instance of a class that is not imported.

    Args:
        of: its class.

    Attributes:
        state: the attributes that the pickle gives it.
    """

    __slots__ = ("of", "state")

    def __init__(self, of: StubClass) -> None:
        self.of, self.state = of, dict[Any, Any]()

    def path(self) -> str:
        """The name of its class, as `module.name`."""
        return self.of.path


@dataclass(frozen=True, eq=False)
class Dtype:
    """Stands for a storage class or a dtype."""

    dtype: torch.dtype


ARGUMENTS = "arguments"  # in the state of a stub that was called with strings
KEYS = (int, float, type(None), Stub, StubClass, Dtype, FunctionType, Tensor)


class Budget:
    """The memory and time that one file may still use; each method raises `Refused` beyond them.

    Nothing is credited back: creating an object and dropping it takes time, too.

    Args:
        size: bytes of the file.
    """

    def __init__(self, size: int) -> None:
        self.bytes_left = TIMES_SIZE * size + SPARE_BYTES
        self.steps_left = min(size, MOST_STEPS) + SPARE_STEPS
        self.named_left = MOST_TIMES_STORED * size + SPARE_NAMED

    def keep(self, count: int) -> None:
        """Charges bytes."""
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise Refused("it takes more memory than a file of its size may")

    def work(self, count: int = 1) -> None:
        """Charges steps."""
        self.steps_left -= count
        if self.steps_left < 0:
            raise Refused("it takes more steps than a file of its size may")

    def name(self, value: object) -> None:
        """Charges a tensor in a dict, since readers may copy it, for instance to cast it."""
        if type(value) is Tensor:
            self.named_left -= value.nbytes
            if self.named_left < 0:
                raise Refused(
                    f"its tensors are more than {MOST_TIMES_STORED} times as large as the file, "
                    "because many names share the same numbers; save a copy of each"
                )

    def key(self, key: object, count: int) -> None:
        """Charges a dict key or set item: its hash, its entry and the keys it is compared with.

        Hashes of strings and bytes are randomised; whoever writes the file can make all hashes of
        numbers collide.

        Args:
            key: the key.
            count: how many keys the container already has.
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


# --- the functions a pickle may call


def _shape(values: Any) -> tuple[Any, ...]:
    if not isinstance(values, tuple) or len(values) > 64:
        raise Refused(f"a tensor of shape {quoted(values)}")
    return values


def _rebuild_tensor(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *further: Any
) -> Tensor:
    """A view of a storage, which must contain all of it.

    Args:
        budget: of the file.
        storage: a tensor of one dimension.
        offset: of the first number.
        size: the shape.
        stride: steps in the storage.
        *further: whether it has a gradient, hooks, and the bits "conj" and "neg" that are set.
    """
    budget.keep(TENSOR)
    if not isinstance(storage, Tensor) or storage.ndim != 1:
        raise Refused("a tensor without a storage")
    numbers = (offset, *_shape(size), *_shape(stride))
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or len(size) != len(stride):
        raise Refused(
            f"a tensor of size {quoted(size)}, stride {quoted(stride)} at {quoted(offset)}"
        )
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= len(storage) or count > len(storage)):
        raise Refused(
            f"a tensor of size {size} and stride {stride} at {offset} in a storage of "
            f"{len(storage)} numbers"
        )
    if not count:
        return storage.new_empty(size)
    view = storage.as_strided(size, stride, offset)
    bits = further[2] if len(further) > 2 and isinstance(further[2], dict) else {}
    if bits.get("conj") or bits.get("neg"):
        if bits.get("conj") or not view.is_floating_point():
            raise Refused(f"a negated or conjugated tensor of {view.dtype}")
        return torch._neg_view(view)
    return view


def _rebuild_untyped(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *further: Any
) -> Tensor:
    """A view of a storage of bytes; `further` has the dtype in the third place."""
    dtype = further[2] if len(further) > 2 else None
    if not isinstance(storage, Tensor) or not isinstance(dtype, Dtype):
        raise Refused("a tensor without a storage or a dtype")
    return _rebuild_tensor(budget, storage.view(dtype.dtype), offset, size, stride)


def _rebuild_parameter(budget: Budget, data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("a parameter that is not a tensor")
    return data


def _rebuild_from_type(budget: Budget, function: Any, of: Any, args: Any, *_: Any) -> Tensor:
    """A tensor of a subclass, or with attributes: without these."""
    if not any(function is one for one in REBUILDS.values()) or not isinstance(args, tuple):
        raise Refused(f"it rebuilds a tensor with a {type(function).__name__}")
    rebuilt: Tensor = function(budget, *args)
    return rebuilt


def _attribute(budget: Budget, of: Any, name: Any) -> Stub:
    """An attribute of a stub class, as a stub: how Python 3.11.0 to 3.11.3 pickle enum members."""
    if not isinstance(of, StubClass) or not isinstance(name, str):
        raise Refused(f"it asks for attribute {quoted(name)} of a {type(of).__name__}")
    budget.keep(OBJECT)
    return Stub(of)


def _collection(kind: type[set[Any]] | type[frozenset[Any]]) -> Callable[..., Any]:
    def build(budget: Budget, items: Any = ()) -> Any:
        if not isinstance(items, list | tuple | set | dict):
            raise Refused(f"a {kind.__name__} of a {type(items).__name__}")
        budget.keep(OBJECT)
        for count, item in enumerate(items):
            budget.key(item, count)
        return kind(items)

    return build


def _ordered_dict(budget: Budget, items: Any = ()) -> OrderedDict[Any, Any]:
    if not isinstance(items, list | tuple | dict):
        raise Refused(f"an OrderedDict of a {type(items).__name__}")
    budget.keep(2 * OBJECT)
    pairs = list(items.items() if isinstance(items, dict) else items)
    for count, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Refused("an OrderedDict of something other than pairs")
        budget.key(pair[0], count)
        budget.name(pair[1])
    return OrderedDict(pairs)


def _default_dict(budget: Budget, factory: Any = None, items: Any = ()) -> OrderedDict[Any, Any]:
    """The entries of a defaultdict, which creates no others."""
    return _ordered_dict(budget, items)


def _encode(budget: Budget, text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes, as protocol 2 writes them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused(f"bytes of a {type(text).__name__} in {quoted(encoding)}")
    budget.keep(OBJECT + len(text))
    return text.encode("latin1")


def _bytearray(budget: Budget, content: Any = b"", encoding: Any = "latin1") -> bytes:
    """The content of a bytearray."""
    if isinstance(content, bytes):
        return content
    return _encode(budget, content, "latin1" if encoding == "latin-1" else encoding)


def _deque(budget: Budget, *_: Any) -> list[Any]:
    """A deque, as an empty list: a pickle appends its items later."""
    budget.keep(OBJECT)
    return []


def _array(budget: Budget, of: Any = None, *_: Any) -> Stub:
    """An array of NumPy, as a stub without its numbers."""
    if not isinstance(of, StubClass):
        raise Refused(f"an array of a {type(of).__name__}")
    budget.keep(2 * OBJECT)
    return Stub(of)


build_set, build_frozenset = _collection(set), _collection(frozenset)
BUILTINS = {
    "getattr": _attribute,
    "set": build_set,
    "frozenset": build_frozenset,
    "bytearray": _bytearray,
}
REBUILDS = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_untyped,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
}
MODULES = ("builtins", "__builtin__")
STORAGES = [
    *((f"{name}Storage", Dtype(getattr(torch, dtype))) for name, dtype in DTYPES.items()),
    ("BoolStorage", Dtype(torch.bool)),
    ("UntypedStorage", Dtype(torch.uint8)),
]
Names = dict[tuple[str, str], Any]
KNOWN: Names = {
    **{(module, name): dtype for module in ("torch", "torch.storage") for name, dtype in STORAGES},
    **{
        ("torch", name): Dtype(getattr(torch, name))
        for name in (*DTYPES.values(), *UNTYPED)
        if hasattr(torch, name)  # not in older versions
    },
    **{(module, name): build for module in MODULES for name, build in BUILTINS.items()},
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "Counter"): _ordered_dict,
    ("collections", "defaultdict"): _default_dict,
    ("collections", "deque"): _deque,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): lambda budget, values=(): _shape(values),
    ("torch.jit._pickle", "restore_type_tag"): lambda budget, value=None, *_: value,
    **{("torch._utils", name): rebuild for name, rebuild in REBUILDS.items()},
    ("torch._tensor", "_rebuild_from_type"): _rebuild_from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}


def allows_stub(module: str, name: str) -> bool:
    """Whether a class or function of this name may appear as a stub."""
    below = any(module == prefix or module.startswith(f"{prefix}.") for prefix in PREFIXES)
    return below or name in STUBS.get(module, ())
