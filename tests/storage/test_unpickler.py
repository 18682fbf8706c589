"""Hostile files are refused: nothing is executed or imported, and memory stays bounded."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.unpickler import Stub, read_pickle, state_of, tensors_of

ROOT = Path(__file__).resolve().parent.parent.parent


class Call:
    """Pickles as a call of a function that is named."""

    def __init__(self, module: str, name: str, *args: Any) -> None:
        self.module, self.name, self.args = module, name, args


class _Named:
    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


PurePickler: Any = vars(pickle)["_Pickler"]  # the one in Python, whose steps can be replaced


class Writer(PurePickler):
    """Writes calls of functions that it never looks up."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Named):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(_Named(obj.module, obj.name))
            self.save(tuple(obj.args))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def pickled(value: Any, protocol: int = 2) -> bytes:
    import io

    stream = io.BytesIO()
    Writer(stream, protocol).dump(value)
    return stream.getvalue()


def raw(steps: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + steps + b"."


def name(path: str) -> bytes:
    module, _, last = path.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


MARK = "echo pwned > sentinel"
STORAGE = ("storage", _Named("torch", "FloatStorage"), "0", "cpu", 4)


class Pid:
    """Pickles as a persistent id."""

    def __init__(self, value: Any) -> None:
        self.value = value


def tensor(offset: Any = 0, size: Any = (2, 2), stride: Any = (2, 1)) -> Call:
    return Call("torch._utils", "_rebuild_tensor_v2", Pid(STORAGE), offset, size, stride, False, {})


class PidWriter(Writer):
    def persistent_id(self, obj: Any) -> Any:
        return obj.value if isinstance(obj, Pid) else None


def with_pids(value: Any) -> bytes:
    import io

    stream = io.BytesIO()
    PidWriter(stream, 2).dump(value)
    return stream.getvalue()


def archive(path: Path, main: bytes, data: bytes = bytes(16), **options: Any) -> None:
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", main)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", data)


def deep(count: int) -> bytes:
    return raw(b"(" * 0 + b")" + b"\x85" * count)


def doubled(count: int) -> bytes:
    """A list of twice the list before, again and again."""
    steps = b"]q\x00"
    for i in range(count):
        steps += b"]q" + bytes([i + 1]) + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e"
    return raw(steps)


def endless() -> bytes:
    """A tuple of a tuple twice, of a tuple twice ..., which nothing can go through."""
    return b")" + b"2\x86" * 60


def copies() -> bytes:
    """One long list, made a set ten thousand times."""
    steps = b"](" + b"".join(b"J" + struct.pack("<i", i) for i in range(5000)) + b"eq\x000"
    return raw(b"]" + steps + (name("builtins.set") + b"h\x00\x85R0") * 10_000)


def legacy(*parts: Any, tail: bytes = b"") -> bytes:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(p if isinstance(p, bytes) else pickled(p) for p in (*head, *parts)) + tail


CALLS: dict[str, tuple[Any, ...]] = {
    "os.system": ("os", "system", MARK),
    "posix.system": ("posix", "system", MARK),
    "subprocess.Popen": ("subprocess", "Popen", MARK),
    "subprocess.check_output": ("subprocess", "check_output", MARK),
    "eval": ("builtins", "eval", f"__import__('os').system({MARK!r})"),
    "exec": ("builtins", "exec", f"__import__('os').system({MARK!r})"),
    "eval of Python 2": ("__builtin__", "eval", f"__import__('os').system({MARK!r})"),
    "getattr": ("builtins", "getattr", 1, "real"),
    "getattr of a function": ("builtins", "getattr", _Named("torch", "Size"), "call"),
    "__import__": ("builtins", "__import__", "antigravity"),
    "open": ("builtins", "open", "sentinel", "w"),
    "bytearray": ("builtins", "bytearray", 10**12),
    "runpy": ("runpy", "run_path", "x.py"),
    "webbrowser.open": ("webbrowser", "open", "http://localhost"),
    "operator.attrgetter": ("operator", "attrgetter", "system"),
    "functools.partial": ("functools", "partial", print),
    "types.CodeType": ("types", "CodeType", 1),
    "pickle.loads": ("pickle", "loads", b"cos\nsystem\n."),
    "dill": ("dill._dill", "_create_function", 1),
    "cloudpickle": ("cloudpickle.cloudpickle", "_make_function", 1),
    "torch.load": ("torch", "load", "x.pt"),
    "torch.hub.load": ("torch.hub", "load", "a/b", "c"),
    "torch.jit.load": ("torch.jit", "load", "x.pt"),
    "torch.serialization.load": ("torch.serialization", "load", "x.pt"),
    "torch._dynamo": ("torch._dynamo", "run", 1),
    "numpy objects": ("numpy.core.multiarray", "_reconstruct", 1, (0,), b"O"),
    "numpy.load": ("numpy", "load", "x.npy"),
    "copyreg": ("copyreg", "_reconstructor", 1, 2, None),
    "shutil.rmtree": ("shutil", "rmtree", "sentinel"),
    "importlib": ("importlib", "import_module", "antigravity"),
    "a name like ours": ("srcs.modeling", "ImageEncoder"),
    "a module like torch's": ("torch.nnx", "Module"),
}
PICKLES: dict[str, bytes] = {
    **{label: pickled(Call(*call)) for label, call in CALLS.items()},
    "protocol 4": raw(text("os") + text("system") + b"\x93" + text(MARK) + b"\x85R", 4),
    "an extension": raw(b"\x82\x01"),
    "an old instance": raw(b"(ios\nsystem\n"),
    "an old object": raw(b"(" + name("os.system") + text(MARK) + b"o"),
    "a text id": raw(b"Pid\n"),
    "an odd id": raw(text("x") + b"Q"),
    "an endless id": raw(endless() + b"Q"),
    "an endless key": raw(b"}" + endless() + b"Ns"),
    "endless keys": raw(b"}(" + endless() + b"N" + endless() + b"Nu"),
    "an endless item": raw(b"\x8f(" + endless() + b"\x90", 4),
    "an endless set": raw(b"(" + endless() + b"\x91", 4),
    "an endless list as a set": raw(name("builtins.frozenset") + b"](" + endless() + b"e\x85R"),
    "numbers of one hash": raw(
        b"}("
        + b"".join(
            b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(2, 20_000)
        )
        + b"u"
    ),
    "more ends than beginnings": raw(b"0000N"),
    "an id of a module": raw(b"(" + text("module") + name("os.path") + b"NNtQ"),
    "a class that is changed": raw(
        name("src.modeling.ImageEncoder") + b"}" + text("__init__") + b"Nsb"
    ),
    "a function that is changed": raw(
        name("torch._utils._rebuild_tensor_v2") + b"}" + text("call") + b"Nsb"
    ),
    "a slot that is set": raw(
        name("torch._utils._rebuild_parameter") + b"N}" + text("call") + b"Ns\x86b"
    ),
    "ordered dicts that are changed": raw(
        name("collections.OrderedDict") + b"}" + text("__init__") + b"Nsb"
    ),
    "a call of a storage": pickled(Call("torch", "FloatStorage", 10**12)),
    "a parameter of nothing": pickled(Call("torch._utils", "_rebuild_parameter", 1)),
    "a tensor of nothing": pickled(
        Call("torch._utils", "_rebuild_tensor_v2", 1, 0, (1,), (1,), False, {})
    ),
    "a storage in bytes": pickled(
        Call("torch.storage", "_load_from_bytes", pickled(Call("os", "system", MARK))), 3
    ),
    "a long claim": raw(b"\x8b" + struct.pack("<i", 2**31 - 1) + b"1"),
    "a text of 2**60 letters": raw(b"\x8d" + struct.pack("<Q", 2**60) + b"x", 4),
    "a place of 2**31": raw(b"Nr" + struct.pack("<I", 2**31)),
    "copies without end": copies(),
    "half a pickle": pickled({"weight": list(range(100))})[:-40],
    "a decimal of a million digits": raw(b"I" + b"9" * 1_000_000 + b"\n"),
    "protocol 0": b"cos\nsystem\n(S'true'\ntR.",
    "no pickle": b"hello, world",
    "nothing": b"",
}
ARCHIVES: dict[str, Callable[[Path], None]] = {
    "a call": lambda p: archive(p, pickled(Call("os", "system", MARK))),
    "beyond the storage": lambda p: archive(p, with_pids(tensor(offset=1))),
    "a stride beyond it": lambda p: archive(p, with_pids(tensor(stride=(4, 1)))),
    "a huge size": lambda p: archive(p, with_pids(tensor(size=(2**40, 2**40), stride=(0, 0)))),
    "expanded": lambda p: archive(p, with_pids(tensor(size=(10**9,), stride=(0,)))),
    "a negative offset": lambda p: archive(p, with_pids(tensor(offset=-1))),
    "a negative size": lambda p: archive(p, with_pids(tensor(size=(-1, 2)))),
    "a negative stride": lambda p: archive(p, with_pids(tensor(stride=(-2, 1)))),
    "other numbers of axes": lambda p: archive(p, with_pids(tensor(stride=(1,)))),
    "a size of text": lambda p: archive(p, with_pids(tensor(size="22"))),
    "a short storage": lambda p: archive(p, with_pids(tensor()), bytes(8)),
    "a key that leaves": lambda p: archive(
        p, with_pids(Pid(("storage", STORAGE[1], "../data.pkl", "cpu", 4)))
    ),
    "no such storage": lambda p: archive(p, with_pids(Pid(("storage", STORAGE[1], "7", "cpu", 4)))),
    "a negative storage": lambda p: archive(
        p, with_pids(Pid(("storage", STORAGE[1], "0", "cpu", -4)))
    ),
    "a bomb": lambda p: archive(
        p, with_pids(tensor()), bytes(50_000_000), compression=zipfile.ZIP_DEFLATED
    ),
    "big-endian": lambda p: _big_endian(p),
    "two pickles": lambda p: _two(p),
    "another archive": lambda p: _other(p),
}


def _big_endian(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled({}))
        file.writestr("archive/byteorder", "big")


def _two(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickled({}))
        file.writestr("b/data.pkl", pickled({}))


def _other(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


STORED = (STORAGE[0], STORAGE[1], "0", "cpu", 4, None)
LEGACY: dict[str, bytes] = {
    "a call": legacy(Call("os", "system", MARK)),
    "another version": b"".join(map(pickled, (0x1950A86A20F9469CFC6C, 7, {"little_endian": True}))),
    "no storages": legacy(with_pids(Pid(STORED)), ["0"]),
    "a short storage": legacy(with_pids(Pid(STORED)), ["0"], tail=struct.pack("<q", 4) + b"1234"),
    "another length": legacy(with_pids(Pid(STORED)), ["0"], tail=struct.pack("<q", 9) + bytes(64)),
    "other keys": legacy(with_pids(Pid(STORED)), ["1"], tail=struct.pack("<q", 4) + bytes(16)),
    "a huge storage": legacy(with_pids(Pid((*STORED[:4], 2**40, None))), ["0"]),
    "a view beyond": legacy(
        with_pids(Pid((*STORED[:5], ("v", 2, 9)))), ["0"], tail=struct.pack("<q", 4) + bytes(16)
    ),
    "a class with source": legacy(
        with_pids(Pid(("module", _Named("os", "system"), "x.py", "import os"))), []
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuses(path: Path) -> None:
    before = set(sys.modules)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match=r"hostile\.pt is refused: .*nothing in it was executed"):
        read_pickle(path)
    assert not (path.parent / "sentinel").exists()
    new = {module.partition(".")[0] for module in set(sys.modules) - before}
    assert not new & {"antigravity", "webbrowser", "dill", "cloudpickle", "runpy"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400_000  # KiB


def test_the_corpus_is_large() -> None:
    assert len(PICKLES) + len(ARCHIVES) + len(LEGACY) >= 60


@pytest.mark.parametrize("label", PICKLES)
def test_hostile_pickles(label: str, folder: Path) -> None:
    (folder / "hostile.pt").write_bytes(PICKLES[label])
    refuses(folder / "hostile.pt")


@pytest.mark.parametrize("label", [name for name in PICKLES if PICKLES[name][:1] == b"\x80"])
def test_hostile_pickles_in_archives(label: str, folder: Path) -> None:
    archive(folder / "hostile.pt", PICKLES[label])
    refuses(folder / "hostile.pt")


@pytest.mark.parametrize("label", ARCHIVES)
def test_hostile_archives(label: str, folder: Path) -> None:
    ARCHIVES[label](folder / "hostile.pt")
    refuses(folder / "hostile.pt")


@pytest.mark.parametrize("label", LEGACY)
def test_hostile_legacy_files(label: str, folder: Path) -> None:
    (folder / "hostile.pt").write_bytes(LEGACY[label])
    refuses(folder / "hostile.pt")


def test_the_same_files_are_dangerous_otherwise(folder: Path) -> None:
    """The corpus does what it says where pickle is used as it is."""
    (folder / "hostile.pt").write_bytes(PICKLES["os.system"])
    with (folder / "hostile.pt").open("rb") as file:
        pickle.load(file)
    assert (folder / "sentinel").exists()


# --- what memory and time follow from the size of a file


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8b" + struct.pack("<i", size) + value.to_bytes(size, "little", signed=True)


def view(count: int) -> bytes:
    """A tensor of so many numbers of the storage in place 0."""
    shape = number(count) + b"\x85K\x01\x85"
    return name("torch._utils._rebuild_tensor_v2") + b"(h\x00K\x00" + shape + b"\x89NtR"


def half_storage(count: int) -> bytes:
    named = text("storage") + name("torch.HalfStorage") + text("0") + text("cpu") + number(count)
    return b"(" + named + b"tQq\x00"


def shared(path: Path) -> None:
    """2,000 names of one storage, in half precision."""
    names = b"".join(text(f"model.visual.{i}") + view(1_000_000) for i in range(2000))
    archive(path, raw(half_storage(1_000_000) + b"0}(" + names + b"u"), bytes(2_000_000))


def one_tensor(path: Path) -> None:
    """2,000 names of one tensor."""
    names = b"".join(text(f"model.visual.{i}") + b"h\x01" for i in range(2000))
    held = half_storage(1_000_000) + view(1_000_000) + b"q\x010"
    archive(path, raw(held + b"0}(" + names + b"u"), bytes(2_000_000))


def one_module(path: Path) -> None:
    """A module in 2,000 places."""
    state = b"}" + text("_parameters") + b"}" + text("w") + view(1_000_000) + b"ss"
    inner = name("torch.nn.Module") + b")\x81" + state + b"bq\x010"
    held = half_storage(1_000_000) + b"0" + inner
    places = b"}(" + b"".join(text(f"{i}") + b"h\x01" for i in range(2000)) + b"u"
    outer = name("torch.nn.Module") + b")\x81}" + text("_modules") + places + b"sb"
    archive(path, raw(held + outer), bytes(2_000_000))


def overlapping(path: Path) -> None:
    """900 members that are the same 2 MB."""
    archive(path, raw(b"}"), bytes(2_000_000))
    content = path.read_bytes()
    start, end = content.rindex(b"PK\x01\x02"), content.rindex(b"PK\x05\x06")
    entries = b"".join(
        content[start:end].replace(b"archive/data/0", b"archive/%06d" % i) for i in range(900)
    )
    tail = bytearray(content[end:])
    struct.pack_into("<I", tail, 12, struct.unpack_from("<I", tail, 12)[0] + len(entries))
    path.write_bytes(content[:end] + entries + tail)


def graph(path: Path, wide: int = 2, named: str = "m") -> None:
    """40 modules, each of which holds the next one under two names."""
    steps = name("torch.nn.Module") + b")\x81q\x00"
    for _ in range(40):
        inner = b"".join(text(f"{named}{i}") + b"h\x00" for i in range(wide))
        steps += b"0" + name("torch.nn.Module") + b")\x81}" + text("_modules") + b"}(" + inner
        steps += b"usbq\x00"
    path.write_bytes(raw(steps))


def collisions(path: Path) -> None:
    """Integers that are equal in all the bits that a table looks at first."""
    keys = b"".join(b"\x8a\x08" + (i << 44).to_bytes(8, "little") + b"N" for i in range(20_000))
    path.write_bytes(raw(b"}(" + keys + b"u"))


def pairs(path: Path) -> None:
    """Tuples of -1 and of -2, which have one hash, in all combinations."""
    draws = [format(i, "014b") for i in range(2**14)]
    keys = b"".join(
        b"(" + b"".join(number(-1 - int(bit)) for bit in bits) + b"tN" for bits in draws
    )
    path.write_bytes(raw(b"}(" + keys + b"u"))


COSTLY: dict[str, Callable[[Path], object]] = {
    "one storage under many names": shared,
    "one tensor under many names": one_tensor,
    "one module in many places": one_module,
    "overlapping members": overlapping,
    "modules on 2**40 paths": graph,
    "modules with long names": lambda p: graph(p, 3, "m" * 100_000),
    "names of classes": lambda p: p.write_bytes(
        raw(b"".join(name(f"torch.nn.A{i}") + b"0" for i in range(150_000)) + b"N")
    ),
    "copies of a dict": lambda p: p.write_bytes(
        raw(
            b"}("
            + b"".join(number(i) + b"N" for i in range(20_000))
            + b"uq\x000"
            + (name("collections.OrderedDict") + b"h\x00\x85R") * 8000
        )
    ),
    "keys that meet": collisions,
    "tuples of one hash": pairs,
    "a long integer as a key": lambda p: p.write_bytes(
        raw(number(1 << 8_000_000) + b"q\x000" + b"}h\x00Ns0" * 100_000 + b"N")
    ),
    "a long integer in keys": lambda p: p.write_bytes(
        raw(number(1 << 8_000_000) + b"q\x000" + b"}h\x00\x85Ns0" * 100_000 + b"N")
    ),
    "keys in pairs": lambda p: p.write_bytes(
        raw(
            number(1 << 8_000_000) + b"q\x000" + name("collections.OrderedDict") + b"]("
            + b"(h\x00Nt" * 100_000 + b"e\x85R"
        )
    ),
    "places": lambda p: p.write_bytes(raw(b"N" + b"\x94" * 1_000_000, 4)),
    "sets": lambda p: p.write_bytes(raw(b"\x8f" * 1_000_000, 4)),
    "a letter of four bytes": lambda p: p.write_bytes(raw(text("a" * 8_000_000 + "\U0001f600"))),
    "members of nothing": lambda p: p.write_bytes(nothing(200_000)),
    "tensors of nothing": lambda p: archive(
        p,
        raw(half_storage(8) + b"0}(" + b"".join(text("x") + view(0) for _ in range(50_000)) + b"u"),
    ),
}  # fmt: skip


def nothing(count: int) -> bytes:
    """A zip archive of so many empty members."""
    entries = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0)
        + b"%06d" % i
        for i in range(count)
    )
    return entries + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entries), 0, 0)


def peak() -> int:
    """Most bytes that this process had in memory since the last call."""
    lines = Path("/proc/self/status").read_text().splitlines()
    Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory")
@pytest.mark.parametrize("label", COSTLY)
def test_memory_and_time_follow_from_the_size(label: str, folder: Path) -> None:
    """As docs/reliability.md promises."""
    path = folder / "hostile.pt"
    COSTLY[label](path)
    size = path.stat().st_size
    gc.collect()
    peak()
    before, start = peak(), time.process_time()
    with pytest.raises(UsageError):
        load_checkpoint(path)
    assert time.process_time() - start < 2 + 4e-6 * size
    assert peak() - before < 8 * size + (96 << 20)


def test_tied_weights_are_no_attack(folder: Path) -> None:
    tied = torch.randn(1000, 100)
    state = {f"{i}.weight": tied for i in range(4)} | {"own": torch.randn(3)}
    torch.save(state, folder / "x.pt")
    assert tensors_of(read_pickle(folder / "x.pt")).keys() == state.keys()


def test_modules_in_two_places_have_two_names(folder: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    module = torch.nn.Sequential(layer, torch.nn.ReLU(), layer)
    torch.save(module, folder / "x.pt")
    assert list(state_of(read_pickle(folder / "x.pt"))) == list(module.state_dict())


def test_many_numbers_as_keys_are_no_attack(folder: Path) -> None:
    names = {i: f"class {i}" for i in range(21_841)}
    (folder / "x.pt").write_bytes(pickle.dumps(names, 4))
    assert read_pickle(folder / "x.pt") == names


@pytest.mark.parametrize("cut", range(1, 40))
def test_truncated_files(cut: int, folder: Path) -> None:
    for legacy_file in (False, True):
        torch.save(
            {"a": torch.arange(6.0), "b": torch.ones(2, 3).half()},
            folder / "whole.pt",
            _use_new_zipfile_serialization=not legacy_file,
        )
        content = (folder / "whole.pt").read_bytes()
        (folder / "hostile.pt").write_bytes(content[: len(content) * cut // 40])
        refuses(folder / "hostile.pt")


@pytest.mark.parametrize("content", [deep(200_000), doubled(200)], ids=["deep", "doubled"])
def test_nested_data_is_harmless(content: bytes, folder: Path) -> None:
    (folder / "x.pt").write_bytes(content)
    read_pickle(folder / "x.pt")


def test_modules_in_themselves_are_refused(folder: Path) -> None:
    steps = (
        name("torch.nn.Module") + b")\x81q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb"
    )
    (folder / "x.pt").write_bytes(raw(steps))
    with pytest.raises(UsageError, match="contains itself"):
        state_of(read_pickle(folder / "x.pt"))


# --- what is not hostile

CONTENT: dict[str, Any] = {
    "ordered": OrderedDict(a=torch.randn(3, 4), b=torch.randn(5)[1:4]),
    "transposed": torch.randn(3, 4).T,
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "shared": (lambda t: [t, t[1:]])(torch.randn(4)),
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "dtypes": {
        str(dtype): torch.ones(3).to(dtype)
        for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
            torch.int8, torch.uint8, torch.bool,
        )
    },
    "plain": {"set": {1, 2}, "none": None, "tuple": (1.5, "text", b"bytes"), "big": 2**70},
    "size": torch.Size([2, 3]),
}  # fmt: skip


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("label", CONTENT)
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_data_as_torch_itself_reads_it(label: str, how: str, folder: Path) -> None:
    path, value = folder / "x.pt", CONTENT[label]
    if how == "pickle":
        path.write_bytes(pickle.dumps(value))
        expected = value
    else:
        torch.save(value, path, _use_new_zipfile_serialization=how == "zip")
        expected = torch.load(path, weights_only=False)
    assert same(read_pickle(path), expected)


def test_members_of_enums_as_python_3_11_0_writes_them(folder: Path) -> None:
    kind = _Named("torchvision.transforms.functional", "InterpolationMode")
    (folder / "x.pt").write_bytes(pickled([Call("builtins", "getattr", kind, "BICUBIC")]))
    (found,) = read_pickle(folder / "x.pt")
    assert type(found) is Stub and found.state == {}


def test_classes_become_stubs_that_keep_their_state(folder: Path) -> None:
    class Thing:
        pass

    Thing.__module__, Thing.__qualname__ = "src.gone", "Thing"
    module = type(sys)("src.gone")
    module.Thing = Thing  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "src.gone", module)
        thing = Thing()
        thing.__dict__.update(a=1, b=np.pi)
        (folder / "x.pt").write_bytes(pickle.dumps(thing))
    found = read_pickle(folder / "x.pt")
    assert isinstance(found, Stub) and found.path() == "src.gone.Thing"
    assert found.state == {"a": 1, "b": np.pi}


@pytest.mark.slow
def test_reading_imports_nothing(folder: Path) -> None:
    import open_clip
    import timm

    torch.save([open_clip.CLIP, timm.models.VisionTransformer], folder / "x.pt")
    code = (
        "import sys; from pathlib import Path;"
        "from tangent_arithmetic.storage.unpickler import read_pickle;"
        "print(read_pickle(Path(sys.argv[1])));"
        "assert not {'open_clip', 'timm', 'torchvision'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "x.pt")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
