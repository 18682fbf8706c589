"""Hostile files are refused: nothing is executed or imported, and memory stays bounded."""

from __future__ import annotations

import datetime
import functools
import gc
import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.hostile_families import number, storage, text, view
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.unpickler import Stub, read_pickle, state_of, tensors_of

ROOT = Path(__file__).resolve().parent.parent.parent
PurePickler: Any = vars(pickle)["_Pickler"]  # the one in Python, whose methods can be overridden


class Name:
    """Pickles as the name of a class or function, which is never looked up."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Call(Name):
    """Pickles as a call of a function by its name."""

    def __init__(self, module: str, name: str, *args: Any) -> None:
        super().__init__(module, name)
        self.args = args


class Pid:
    """Pickles as a persistent id."""

    def __init__(self, *value: Any) -> None:
        self.value = value


class Writer(PurePickler):
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Name):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
            if isinstance(obj, Call):
                self.save(tuple(obj.args))
                self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj: Any) -> Any:
        return obj.value if isinstance(obj, Pid) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    Writer(stream, protocol).dump(value)
    return stream.getvalue()


def raw(steps: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + steps + b"."


def name(path: str) -> bytes:
    module, _, last = path.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def file_of(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def zip_file(path: Path, members: dict[str, bytes], **options: Any) -> None:
    with zipfile.ZipFile(path, "w", **options) as file:
        for member, content in members.items():
            file.writestr(member, content)


def archive(path: Path, main: bytes, data: bytes = bytes(16), **options: Any) -> None:
    """An archive of `torch.save` with one storage."""
    members = {"data.pkl": main, "byteorder": b"little", "data/0": data}
    zip_file(path, {f"archive/{key}": content for key, content in members.items()}, **options)


MARK = "echo pwned > sentinel"
STORAGE = ("storage", Name("torch", "FloatStorage"), "0", "cpu", 4)
STORED = (*STORAGE, None)  # of legacy files
ENDLESS = b")" + b"2\x86" * 60  # a tuple of a tuple twice, of a tuple twice ...


def tensor(offset: Any = 0, size: Any = (2, 2), stride: Any = (2, 1)) -> bytes:
    args: tuple[Any, ...] = (Pid(*STORAGE), offset, size, stride, False, {})
    return pickled(Call("torch._utils", "_rebuild_tensor_v2", *args))


def doubled(count: int) -> bytes:
    """A list that holds another list twice, which holds another list twice ..."""
    steps = b"]q\x00"
    for i in range(count):
        steps += b"]q" + bytes([i + 1]) + (b"(h" + bytes([i])) + (b"h" + bytes([i])) + b"e"
    return raw(steps)


def sets_of_one_list() -> bytes:
    items = b"](" + b"".join(b"J" + struct.pack("<i", i) for i in range(5000)) + b"eq\x000"
    return raw(b"]" + items + (name("builtins.set") + b"h\x00\x85R0") * 10_000)


def legacy(*parts: Any, tail: bytes = b"") -> bytes:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(p if isinstance(p, bytes) else pickled(p) for p in (*head, *parts)) + tail


CODE = f"__import__('os').system({MARK!r})"
CALLS: list[tuple[Any, ...]] = [
    ("os", "system", MARK),
    ("posix", "system", MARK),
    ("subprocess", "Popen", MARK),
    ("subprocess", "check_output", MARK),
    ("builtins", "eval", CODE),
    ("builtins", "exec", CODE),
    ("__builtin__", "eval", CODE),
    ("builtins", "getattr", 1, "real"),
    ("builtins", "getattr", Name("torch", "Size"), "call"),
    ("builtins", "__import__", "antigravity"),
    ("builtins", "open", "sentinel", "w"),
    ("builtins", "bytearray", 10**12),
    ("runpy", "run_path", "x.py"),
    ("webbrowser", "open", "http://localhost"),
    ("operator", "attrgetter", "system"),
    ("functools", "partial", print),
    ("types", "CodeType", 1),
    ("pickle", "loads", b"cos\nsystem\n."),
    ("dill._dill", "_create_function", 1),
    ("cloudpickle.cloudpickle", "_make_function", 1),
    ("torch", "load", "x.pt"),
    ("torch.hub", "load", "a/b", "c"),
    ("torch.jit", "load", "x.pt"),
    ("torch.serialization", "load", "x.pt"),
    ("torch._dynamo", "run", 1),
    ("numpy.core.multiarray", "_reconstruct", 1, (0,), b"O"),
    ("numpy", "load", "x.npy"),
    ("copyreg", "_reconstructor", 1, 2, None),
    ("numpy", "fromfile", "x"),
    ("numpy.testing._private.utils", "runstring", CODE, {}),
    ("datetime", "sys"),
    ("torch._tensor", "_rebuild_from_type_v2", Name("os", "system"), 1, (MARK,), None),
    ("torch._tensor", "_rebuild_from_type_v2", Name("torch", "Tensor"), 1, (MARK,), None),
    ("torch._utils", "_rebuild_tensor_v3", 1, 0, (1,), (1,), False, {}, 1),
    ("shutil", "rmtree", "sentinel"),
    ("importlib", "import_module", "antigravity"),
    ("srcs.modeling", "ImageEncoder"),  # a name like ours
    ("torch.nnx", "Module"),  # a module like torch's
    ("torch", "FloatStorage", 10**12),
    ("torch._utils", "_rebuild_parameter", 1),
    ("torch._utils", "_rebuild_tensor_v2", 1, 0, (1,), (1,), False, {}),
    ("collections", "Counter", 5),
    ("collections", "defaultdict", None, 5),
    ("builtins", "compile", "list", "", "eval"),
]
MULTIPLES = ((i * (2**61 - 1)).to_bytes(10, "little") for i in range(2, 20_000))
PICKLES: dict[str, bytes] = {
    **{f"{number} {call[0]}.{call[1]}": pickled(Call(*call)) for number, call in enumerate(CALLS)},
    "protocol 4": raw(text("os") + text("system") + b"\x93" + text(MARK) + b"\x85R", 4),
    "extension": raw(b"\x82\x01"),
    "INST": raw(b"(ios\nsystem\n"),
    "OBJ": raw(b"(" + name("os.system") + text(MARK) + b"o"),
    "PERSID": raw(b"Pid\n"),
    "odd id": raw(text("x") + b"Q"),
    "endless id": raw(ENDLESS + b"Q"),
    "endless key": raw(b"}" + ENDLESS + b"Ns"),
    "endless keys": raw(b"}(" + ENDLESS + b"N" + ENDLESS + b"Nu"),
    "endless item": raw(b"\x8f(" + ENDLESS + b"\x90", 4),
    "endless set": raw(b"(" + ENDLESS + b"\x91", 4),
    "endless list as a set": raw(name("builtins.frozenset") + b"](" + ENDLESS + b"e\x85R"),
    "numbers of one hash": raw(b"}(" + b"".join(b"\x8a\x0a" + n + b"N" for n in MULTIPLES) + b"u"),
    "more pops than pushes": raw(b"0000N"),
    "id of a module": raw(b"(" + text("module") + name("os.path") + b"NNtQ"),
    **{
        f"{path} with an attribute set": raw(name(path) + b"}" + text("__init__") + b"Nsb")
        for path in (
            "src.modeling.ImageEncoder",
            "torch._utils._rebuild_tensor_v2",
            "collections.OrderedDict",
        )
    },
    "slot set": raw(name("torch._utils._rebuild_parameter") + b"N}" + text("call") + b"Ns\x86b"),
    "storage in bytes": pickled(
        Call("torch.storage", "_load_from_bytes", pickled(Call("os", "system", MARK))), 3
    ),
    "long integer's length": raw(b"\x8b" + struct.pack("<i", 2**31 - 1) + b"1"),
    "text of 2**60 letters": raw(b"\x8d" + struct.pack("<Q", 2**60) + b"x", 4),
    "memo entry 2**31": raw(b"Nr" + struct.pack("<I", 2**31)),
    "sets of one list": sets_of_one_list(),
    "half a pickle": pickled({"weight": list(range(100))})[:-40],
    "decimal of a million digits": raw(b"I" + b"9" * 1_000_000 + b"\n"),
    "protocol 0": b"cos\nsystem\n(S'true'\ntR.",
    "no pickle": b"hello, world",
    "empty": b"",
}
MAINS: dict[str, bytes] = {  # of archives whose storage holds four numbers
    "tensor beyond the storage": tensor(offset=1),
    "stride beyond the storage": tensor(stride=(4, 1)),
    "huge size": tensor(size=(2**40, 2**40), stride=(0, 0)),
    "expanded tensor": tensor(size=(10**9,), stride=(0,)),
    "negative offset": tensor(offset=-1),
    "negative size": tensor(size=(-1, 2)),
    "negative stride": tensor(stride=(-2, 1)),
    "stride of another rank": tensor(stride=(1,)),
    "size of text": tensor(size="22"),
    "key outside": pickled(Pid("storage", STORAGE[1], "../data.pkl", "cpu", 4)),
    "missing storage": pickled(Pid("storage", STORAGE[1], "7", "cpu", 4)),
    "negative storage": pickled(Pid("storage", STORAGE[1], "0", "cpu", -4)),
    **{label: content for label, content in PICKLES.items() if content[:1] == b"\x80"},
}
LEGACY: dict[str, bytes] = {
    "call": legacy(Call("os", "system", MARK)),
    "another version": b"".join(map(pickled, (0x1950A86A20F9469CFC6C, 7, {"little_endian": True}))),
    "no storages": legacy(Pid(*STORED), ["0"]),
    "short storage": legacy(Pid(*STORED), ["0"], tail=struct.pack("<q", 4) + b"1234"),
    "another length": legacy(Pid(*STORED), ["0"], tail=struct.pack("<q", 9) + bytes(64)),
    "other keys": legacy(Pid(*STORED), ["1"], tail=struct.pack("<q", 4) + bytes(16)),
    "huge storage": legacy(Pid(*STORED[:4], 2**40, None), ["0"]),
    "view beyond": legacy(
        Pid(*STORED[:5], ("v", 2, 9)), ["0"], tail=struct.pack("<q", 4) + bytes(16)
    ),
    "class with source": legacy(Pid("module", Name("os", "system"), "x.py", "import os"), []),
}
DEFLATED: dict[str, Any] = {"compression": zipfile.ZIP_DEFLATED}
EMPTY = pickled({})
HOSTILE: dict[str, Callable[[Path], object]] = {
    **{label: file_of(content) for label, content in PICKLES.items()},
    **{f"legacy: {label}": file_of(content) for label, content in LEGACY.items()},
    **{f"archive: {label}": partial(archive, main=main) for label, main in MAINS.items()},
    "archive: short storage": partial(archive, main=tensor(), data=bytes(8)),
    "archive: bomb": partial(archive, main=tensor(), data=bytes(50_000_000), **DEFLATED),
    "archive: big-endian": partial(zip_file, members={"a/data.pkl": EMPTY, "a/byteorder": b"big"}),
    "archive: two pickles": partial(zip_file, members={"a/data.pkl": EMPTY, "b/data.pkl": EMPTY}),
    "archive: other": partial(zip_file, members={"readme.txt": b"hello"}),
}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "x.pt"


def refuses(path: Path) -> None:
    before = set(sys.modules)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match=r"x\.pt is refused: .*nothing in it was executed"):
        read_pickle(path)
    assert not (path.parent / "sentinel").exists()
    new = {module.partition(".")[0] for module in set(sys.modules) - before}
    assert not new & {"antigravity", "webbrowser", "dill", "cloudpickle", "runpy"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400_000  # KiB


@pytest.mark.parametrize("label", HOSTILE)
def test_hostile_files_are_refused(label: str, path: Path) -> None:
    HOSTILE[label](path)
    refuses(path)


def test_pickle_itself_would_execute_them(path: Path) -> None:
    pickle.loads(PICKLES["0 os.system"])
    assert (path.parent / "sentinel").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_are_refused(zipped: bool, path: Path) -> None:
    content = {"a": torch.arange(6.0), "b": torch.ones(2, 3).half()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for cut in range(1, 40):
        path.write_bytes(whole[: len(whole) * cut // 40])
        refuses(path)


# --- memory and time in proportion to the size of a file

MILLION = storage("0", "HalfStorage", 1_000_000) + b"q\x000"
VIEW = view(b"h\x00", (1_000_000,), (1,))
MODULE = name("torch.nn.Module") + b")\x81"
LONG = number(1 << 8_000_000) + b"q\x000"


def million(steps: bytes) -> Callable[[Path], object]:
    """An archive of a million numbers."""
    return partial(archive, main=raw(MILLION + steps), data=bytes(2_000_000))


def entries(count: int, value: bytes) -> bytes:
    return b"}(" + b"".join(text(f"model.visual.{i}") + value for i in range(count)) + b"u"


def overlapping(path: Path) -> None:
    """900 members that are the same 2 MB."""
    archive(path, raw(b"}"), bytes(2_000_000))
    content = path.read_bytes()
    start, end = content.rindex(b"PK\x01\x02"), content.rindex(b"PK\x05\x06")
    last = content[start:end]
    copies = b"".join(last.replace(b"archive/data/0", b"archive/%06d" % i) for i in range(900))
    tail = bytearray(content[end:])
    struct.pack_into("<I", tail, 12, struct.unpack_from("<I", tail, 12)[0] + len(copies))
    path.write_bytes(content[:end] + copies + tail)


def graph(wide: int, named: str) -> bytes:
    """40 modules, each of which holds the next one under several names."""
    steps = MODULE + b"q\x00"
    for _ in range(40):
        inner = b"".join(text(f"{named}{i}") + b"h\x00" for i in range(wide))
        steps += b"0" + MODULE + b"}" + text("_modules") + b"}(" + inner + b"usbq\x00"
    return raw(steps)


def collisions() -> bytes:
    """Integers that are equal in all the bits that a table looks at first."""
    keys = b"".join(b"\x8a\x08" + (i << 44).to_bytes(8, "little") + b"N" for i in range(20_000))
    return raw(b"}(" + keys + b"u")


def tuples_of_one_hash() -> bytes:
    """Tuples of -1 and of -2, which have one hash, in all combinations."""
    either = {"0": number(-1), "1": number(-2)}
    keys = (b"".join(either[bit] for bit in format(i, "014b")) for i in range(2**14))
    return raw(b"}(" + b"".join(b"(" + key + b"tN" for key in keys) + b"u")


def copies_of_a_dict() -> bytes:
    items = b"}(" + b"".join(number(i) + b"N" for i in range(20_000)) + b"uq\x000"
    return raw(items + (name("collections.OrderedDict") + b"h\x00\x85R") * 8000)


def empty_members(count: int) -> bytes:
    """A zip archive of empty members."""
    head = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0)
    members = b"".join(head + b"%06d" % i for i in range(count))
    return members + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(members), 0, 0)


COSTLY: dict[str, Callable[[Path], object]] = {
    "a storage under 2,000 names": million(entries(2000, VIEW)),
    "a tensor under 2,000 names": million(VIEW + b"q\x010" + entries(2000, b"h\x01")),
    "a module in 2,000 places": million(
        (MODULE + b"}" + text("_parameters") + b"}" + text("w") + VIEW + b"ssbq\x010")
        + (MODULE + b"}" + text("_modules") + entries(2000, b"h\x01") + b"sb")
    ),
    "overlapping members": overlapping,
    "modules with long names": lambda path: path.write_bytes(graph(3, "m" * 100_000)),
    "copies of a dict": lambda path: path.write_bytes(copies_of_a_dict()),
    "colliding integers": lambda path: path.write_bytes(collisions()),
    "a long integer as a key": file_of(raw(LONG + b"}h\x00Ns0" * 100_000 + b"N")),
    "a long integer in keys": file_of(raw(LONG + b"}h\x00\x85Ns0" * 100_000 + b"N")),
    "a letter of four bytes": lambda path: path.write_bytes(
        raw(text("a" * 8_000_000 + "\U0001f600"))
    ),
    "empty members": lambda path: path.write_bytes(empty_members(200_000)),
}
COSTLY_AND_SLOW: dict[str, Callable[[Path], object]] = {
    "modules on 2**40 paths": lambda path: path.write_bytes(graph(2, "m")),
    "tuples of one hash": lambda path: path.write_bytes(tuples_of_one_hash()),
    "names of classes": lambda path: path.write_bytes(
        raw(b"".join(name(f"torch.nn.A{i}") + b"0" for i in range(150_000)) + b"N")
    ),
    "long keys in pairs": file_of(
        raw(LONG + name("collections.OrderedDict") + b"](" + b"(h\x00Nt" * 100_000 + b"e\x85R")
    ),
    "memo entries": file_of(raw(b"N" + b"\x94" * 1_000_000, 4)),
    "sets": file_of(raw(b"\x8f" * 1_000_000, 4)),
    "tensors of nothing": million(entries(50_000, view(b"h\x00", (0,), (1,)))),
}


def peak() -> int:
    """The most memory of this process since the last call, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory")
@pytest.mark.parametrize(
    "label", [*COSTLY, *(pytest.param(each, marks=pytest.mark.slow) for each in COSTLY_AND_SLOW)]
)
def test_memory_and_time_follow_from_the_size(label: str, path: Path) -> None:
    """As docs/reliability.md promises."""
    (COSTLY | COSTLY_AND_SLOW)[label](path)
    size = path.stat().st_size
    gc.collect()
    peak()
    before, start = peak(), time.process_time()
    with pytest.raises(UsageError):
        load_checkpoint(path)
    assert time.process_time() - start < 2 + 4e-6 * size
    assert peak() - before < 8 * size + (96 << 20)


def test_modules_in_themselves_are_refused(path: Path) -> None:
    state = b"}" + text("_modules") + b"}" + text("a") + b"h\x00ss"
    path.write_bytes(raw(MODULE + b"q\x00" + state + b"b"))
    with pytest.raises(UsageError, match="contains itself"):
        state_of(read_pickle(path))


# --- harmless files


@pytest.mark.parametrize("content", [raw(b")" + b"\x85" * 20_000), doubled(200)])
def test_nested_data_is_harmless(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    read_pickle(path)


def test_tied_weights_are_read(path: Path) -> None:
    tied = torch.randn(1000, 100)
    state = {f"{i}.weight": tied for i in range(4)} | {"own": torch.randn(3)}
    torch.save(state, path)
    assert tensors_of(read_pickle(path)).keys() == state.keys()


def test_modules_in_two_places_have_two_names(path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    module = torch.nn.Sequential(layer, torch.nn.ReLU(), layer)
    torch.save(module, path)
    assert list(state_of(read_pickle(path))) == list(module.state_dict())


NUMBERS = "float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
UNTYPED = "uint16 uint32 uint64 float8_e4m3fn float8_e5m2"
CONTENT: dict[str, Any] = {
    "ordered": OrderedDict(a=torch.randn(3, 4), b=torch.randn(5)[1:4]),
    "transposed": torch.randn(3, 4).T,
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "shared": (lambda t: [t, t[1:]])(torch.randn(4)),
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "dtypes": {dtype: torch.ones(3).to(getattr(torch, dtype)) for dtype in NUMBERS.split()},
    "plain": {"set": {1, 2}, "none": None, "tuple": (1.5, "text", b"bytes"), "big": 2**70},
    "size": torch.Size([2, 3]),
    "negated": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "of schedules": {"milestones": Counter({30: 1}), "lists": defaultdict(list, a=[1])},
    "default dicts": [defaultdict(None, {1: 2}), *map(defaultdict, (int, float, dict, set))],
    "many integers as keys": {i: f"class {i}" for i in range(21_841)},
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.tolist() == other.tolist()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("label", CONTENT)
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_data_is_read_as_torch_reads_it(label: str, how: str, path: Path) -> None:
    value = CONTENT[label]
    if how == "pickle":
        path.write_bytes(pickle.dumps(value))
        assert same(read_pickle(path), value)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=how == "zip")
        assert same(read_pickle(path), torch.load(path, weights_only=False))


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_numbers_without_a_class_of_storages_are_read(how: str, path: Path) -> None:
    """In its legacy format torch writes them, and cannot read them."""
    value = {dtype: torch.arange(4).to(getattr(torch, dtype))[1:] for dtype in UNTYPED.split()}
    if how == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=how == "zip")
    assert same(read_pickle(path), value)


def test_negated_weights_of_modules_and_dicts_are_plain(path: Path) -> None:
    module, value = torch.nn.Linear(2, 2), torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    module.register_buffer("shift", value)
    torch.save(module, path)
    named = state_of(read_pickle(path))["shift"]
    torch.save({"shift": value}, path)
    for found in (named, tensors_of(read_pickle(path))["shift"]):
        assert found.numpy().tolist() == [-2.0, 4.0]


KEPT = [1.5, "text"]
OTHERS: dict[str, Any] = {
    "array": np.arange(3.0),
    "numbers": np.random.get_state(),  # noqa: NPY002 - as checkpoints have it
    "objects": np.array([{}, None], dtype=object),
    "datetime": datetime.datetime(2026, 1, 1, 12),
    "timedelta": datetime.timedelta(3),
    "partial": functools.partial(torch.nn.LayerNorm, eps=1e-6),
    "namespace": types.SimpleNamespace(a=1),
    "complex": 1j,
    "range": range(3),
}


@pytest.mark.parametrize("label", OTHERS)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_entries_beside_weights_are_inert(label: str, protocol: int, path: Path) -> None:
    content = {"state_dict": {"w": torch.ones(2)}, "other": OTHERS[label], "kept": KEPT}
    if protocol:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        torch.save(content, path)
    found = read_pickle(path)
    assert torch.equal(found["state_dict"]["w"], torch.ones(2)) and found["kept"] == KEPT
    assert not isinstance(found["other"], type(OTHERS[label])) or label == "numbers"


@pytest.mark.parametrize("protocol", [2, 5])
def test_deques_and_bytearrays_are_plain_data(protocol: int, path: Path) -> None:
    content = [deque([1, 2], 5), bytearray(b"xyz"), bytearray()]
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert read_pickle(path) == [[1, 2], b"xyz", b""]


def test_tensors_with_attributes_are_read_without_them(path: Path) -> None:
    """As in modules of transformers, whose tensors are marked as initialised."""
    module = torch.nn.BatchNorm1d(2)
    parts: Any = [module.weight, module.running_mean]
    for tensor in parts:
        tensor.marked = True
    torch.save(module, path)
    found = state_of(read_pickle(path))
    assert same(dict(found), dict(module.state_dict())) and not hasattr(found["weight"], "marked")


def test_enum_members_as_python_3_11_0_writes_them(path: Path) -> None:
    kind = Name("torchvision.transforms.functional", "InterpolationMode")
    path.write_bytes(pickled([Call("builtins", "getattr", kind, "BICUBIC")]))
    (member,) = read_pickle(path)
    assert type(member) is Stub and member.state == {}


def test_classes_become_stubs_that_keep_their_state(path: Path) -> None:
    class Thing:
        pass

    Thing.__module__, Thing.__qualname__ = "src.gone", "Thing"
    module = type(sys)("src.gone")
    module.Thing = Thing  # type: ignore[attr-defined]
    thing = Thing()
    thing.__dict__.update(a=1, b=np.pi)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "src.gone", module)
        path.write_bytes(pickle.dumps(thing))
    stub = read_pickle(path)
    assert isinstance(stub, Stub) and stub.path() == "src.gone.Thing"
    assert stub.state == {"a": 1, "b": np.pi}


@pytest.mark.slow
def test_reading_imports_nothing(path: Path) -> None:
    import open_clip
    import timm

    torch.save([open_clip.CLIP, timm.models.VisionTransformer], path)
    code = (
        "import sys; from pathlib import Path;"
        "from tangent_arithmetic.storage.unpickler import read_pickle;"
        "print(read_pickle(Path(sys.argv[1])));"
        "assert not {'open_clip', 'timm', 'torchvision'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
