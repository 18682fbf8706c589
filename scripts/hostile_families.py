"""Files that are hostile by design: small ones that ask for much memory, time or other places.

One function a family, which writes a file of random size and shape into an empty folder.
`hostile_files.py` reads them.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Family = Callable[[random.Random, Path], Path]
FAMILIES: dict[str, Family] = {}
MODULUS = 2**61 - 1  # integers are hashed modulo this
KINDS = {"HalfStorage": 2, "FloatStorage": 4, "ByteStorage": 1, "DoubleStorage": 8}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".tar": bytes,
    ".tgz": lambda content: gzip.compress(content, 1),
    ".tar.gz": lambda content: gzip.compress(content, 6),
    ".tar.bz2": bz2.compress,
    ".tar.xz": lambda content: lzma.compress(content, preset=0),
}


def family(write: Family) -> Family:
    """Decorates a function that writes files of one family."""
    FAMILIES[write.__name__] = write
    return write


def pick(draw: random.Random, *options: Callable[[], Any]) -> Any:
    """One of several things, of which the others are not made."""
    return draw.choice(options)()


def some(draw: random.Random, most: int = 1 << 14) -> int:
    """A count between 4 and `most`, of any order of magnitude."""
    return int(most ** draw.uniform(0, 1)) + 3


# --- steps of pickles


def text(value: str) -> bytes:
    """A text on the stack."""
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    """An integer on the stack."""
    size = value.bit_length() // 8 + 1
    content = value.to_bytes(size, "little", signed=True)
    return (b"\x8a" + bytes([size]) if size < 256 else b"\x8b" + struct.pack("<i", size)) + content


def name(module: str, last: str) -> bytes:
    """What a name stands for, on the stack."""
    return f"c{module}\n{last}\n".encode()


def kept(place: int) -> bytes:
    """Keeps the top of the stack in a place of the table."""
    return b"r" + struct.pack("<I", place)


def got(place: int) -> bytes:
    """What is kept in a place of the table, on the stack."""
    return b"j" + struct.pack("<I", place)


def storage(key: str, kind: str, count: int) -> bytes:
    """A storage on the stack."""
    named = text("storage") + name("torch", kind) + text(key) + text("cpu") + number(count)
    return b"(" + named + b"tQ"


def view(held: bytes, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A tensor on the stack."""
    shape, steps = (b"(" + b"".join(map(number, part)) + b"t" for part in (size, stride))
    given = held + number(offset) + shape + steps + b"\x89N"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + given + b"tR"


def module(state: Iterable[tuple[str, bytes]]) -> bytes:
    """An object of a class of torch, with the attributes, on the stack."""
    entries = b"".join(text(key) + value for key, value in state)
    return name("torch.nn", "Module") + b")\x81}(" + entries + b"ub"


def archive(path: Path, steps: bytes, storages: dict[str, bytes]) -> Path:
    """Writes a file as `torch.save` does."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + steps + b".")
        for key, content in storages.items():
            file.writestr(f"archive/data/{key}", content)
    return path


def written(draw: random.Random, folder: Path, steps: bytes) -> Path:
    """Writes a pickle in one of the forms that are read."""
    path, content = folder / "x.pt", b"\x80\x02" + steps + b"."
    form = draw.randrange(4)
    if form == 0:
        return archive(path, steps, {})
    if form == 1:  # torch's legacy form
        head = (
            number(0x1950A86A20F9469CFC6C),
            number(1001),
            b"}" + text("little_endian") + b"\x88s",
        )
        content = b"".join(b"\x80\x02" + part + b"." for part in head) + content + b"\x80\x02]."
    elif form == 2:  # as a storage in a pickle
        inner = b"B" + struct.pack("<I", len(content)) + content
        content = b"\x80\x03" + name("torch.storage", "_load_from_bytes") + inner + b"\x85R."
    path.write_bytes(content)
    return path


# --- pickles


@family
def shared_storages(draw: random.Random, folder: Path) -> Path:
    """Many names for the numbers of one storage, or of a few."""
    kind = draw.choice(list(KINDS))
    count, names = some(draw, 1 << 18), some(draw, 1 << 12)
    prefix = draw.choice(("model.visual.", "visual.", "", "vision_model.", "model.params."))
    steps = storage("0", kind, count) + kept(0) + b"0}("
    for i in range(names):
        length = draw.choice((count, count - draw.randrange(4)))
        stride = draw.choice((1, 1, 0))
        steps += text(f"{prefix}{i}") + view(got(0), (length,), (stride,))
    return archive(folder / "x.pt", steps + b"u", {"0": bytes(count * KINDS[kind])})


@family
def overlapping_members(draw: random.Random, folder: Path) -> Path:
    """A zip archive whose members hold those after them, or one another's middle."""
    count, size = some(draw, 1 << 9), some(draw, 1 << 17)
    local, names = [], [f"archive/data/{i}" for i in range(count)]
    for key in names:
        local.append(struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, len(key), 0))
        local[-1] += key.encode()
    offsets, body = [], b""
    for header in local:
        offsets.append(len(body))
        body += header
    body += bytes(size)
    if draw.random() < 0.3:
        offsets = [draw.randrange(len(body)) for _ in names]
    lengths = [max(0, len(body) - at - len(one)) for at, one in zip(offsets, local, strict=True)]
    steps = b"}(" + b"".join(
        text(f"visual.{i}") + view(storage(str(i), "ByteStorage", n), (n,), (1,))
        for i, n in enumerate(lengths)
    )
    pickled = b"\x80\x02" + steps + b"u."
    main = (
        struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, 16, 0) + b"archive/data.pkl"
    )
    members = [(key, at, n) for key, at, n in zip(names, offsets, lengths, strict=True)]
    members.append(("archive/data.pkl", len(body), len(pickled)))
    path = folder / "x.pt"
    path.write_bytes(_directory(body + main + pickled, members, draw.choice((0, 0, 1))))
    return path


def _directory(body: bytes, members: Iterable[tuple[str, int, int]], lie: int = 0) -> bytes:
    """The body of a zip archive with its directory; a lie is added to its length."""
    whole = memoryview(body)
    entries = b"".join(
        struct.pack(
            "<4s6H3I5H2I",
            b"PK\1\2",
            20,
            20,
            0,
            0,
            0,
            33,
            zlib.crc32(whole[offset + 30 + len(key) :][:size]),
            size,
            size,
            len(key),
            0,
            0,
            0,
            0,
            0,
            offset,
        )
        + key.encode()
        for key, offset, size in members
    )
    return (
        body
        + entries
        + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entries) + lie, len(body), 0)
    )


@family
def zip_directories(draw: random.Random, folder: Path) -> Path:
    """Many members of nothing, or a directory that says what is not so."""
    count = some(draw, 1 << 14)
    members = [(f"{draw.choice(('', 'a/'))}{i}", 0, 0) for i in range(count)]
    content = bytearray(_directory(b"", members, draw.choice((0, 0, 1, 2**31))))
    for _ in range(draw.choice((0, 0, 1, 5))):
        at = draw.randrange(len(content) - 8)
        content[at : at + 4] = draw.choice((b"\xff" * 4, bytes(4), struct.pack("<I", 2**31)))
    if draw.random() < 0.3:  # the record of a large archive before its end
        size = draw.choice((2**40, 2**63, 2**64 - 1, len(content)))
        large = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, 0)
        where = struct.pack("<4sIQI", b"PK\6\7", 0, draw.choice((len(content) - 22, size)), 1)
        content[-22:-22] = large + where
        content[-10:] = b"\xff" * 8 + bytes(2)
    path = folder / draw.choice(("x.pt", "x.zip"))
    path.write_bytes(content)
    return path


@family
def stub_classes(draw: random.Random, folder: Path) -> Path:
    """Many names of classes that are not there, and objects of them."""
    made = draw.choice((b"0", b"", b")\x81", b")\x81}b", b")R"))
    steps = b"".join(
        name(draw.choice(("torch.nn", "src.modeling")), f"A{i}") + made for i in range(some(draw))
    )
    return written(draw, folder, steps + b"N")


@family
def copies(draw: random.Random, folder: Path) -> Path:
    """One long list or dict, made a set or another dict again and again."""
    count = some(draw, 1 << 13)
    called = draw.choice(
        (("builtins", "set"), ("builtins", "frozenset"), ("collections", "OrderedDict"))
    )
    if called[1] == "OrderedDict":
        items = b"}(" + b"".join(number(i + 300) + b"N" for i in range(count)) + b"u"
    else:
        items = b"](" + b"".join(number(i + 300) for i in range(count)) + b"e"
    again = name(*called) + got(0) + b"\x85R" + draw.choice((b"0", b"", kept(1)))
    steps = items + kept(0) + b"0" + again * some(draw, 1 << 11)
    if draw.random() < 0.2:  # and bytes
        steps = text("a" * count) + kept(0) + b"0"
        steps += (name("_codecs", "encode") + got(0) + b"\x85R0") * some(draw, 1 << 11)
    return written(draw, folder, steps + b"N")


@family
def module_graphs(draw: random.Random, folder: Path) -> Path:
    """Modules that hold each other on many paths, with long names, or share one dict."""
    depth, ways, wide = draw.randrange(1, 120), draw.randrange(1, 4), some(draw, 1 << 10)
    named = draw.choice((1, 1, 1, 10_000)) * "m"
    tensor = view(storage("0", "FloatStorage", 1), (1,), (1,))
    one = tensor + kept(0) + b"0"
    parameters = b"}(" + b"".join(text(f"w{i}") + got(0) for i in range(wide)) + b"u"
    steps = one + parameters + kept(1) + b"0" + module([("_parameters", got(1))]) + kept(2) + b"0"
    for _ in range(depth):
        inner = b"}(" + b"".join(text(f"{named}{i}") + got(2) for i in range(ways)) + b"u"
        state = [("_modules", inner)]
        state += [("_parameters", got(1))] if draw.random() < 0.5 else []
        state += [("_buffers", got(1)), ("_non_persistent_buffers_set", got(1))][: 2 * (wide % 2)]
        steps += module(state) + kept(2) + b"0"
    return archive(folder / "x.pt", steps + got(2), {"0": bytes(4)})


@family
def equal_hashes(draw: random.Random, folder: Path) -> Path:
    """Keys of one hash, or whose hashes meet in the same places of a table."""
    count = some(draw)
    shift = draw.randrange(1, 45)
    keys: Callable[[], Iterable[bytes]] = draw.choice(
        (
            lambda: (number(i * MODULUS) for i in range(count)),
            lambda: (number((i + 1) << shift) for i in range(count)),
            lambda: (
                b"G" + struct.pack(">d", (i % 977 + 1) * 2.0 ** (61 * (i // 977 % 16)))
                for i in range(count)
            ),
            lambda: (number(a) + number(b) + b"\x86" for a, b in _colliding_pairs(count)),
            lambda: (number(draw.choice((-1, -2))) + number(i) + b"\x86" for i in range(count)),
        )
    )
    made = b"".join(keys())
    form = draw.randrange(4)
    if form == 0:
        return written(draw, folder, b"\x8f(" + made + b"\x90")
    if form == 1:
        return written(draw, folder, name("builtins", "set") + b"](" + made + b"e\x85R")
    if form == 2:
        return written(draw, folder, name("builtins", "frozenset") + b"(" + made + b"t\x85R")
    return written(draw, folder, b"}(" + b"".join(key + b"N" for key in keys()) + b"u")


def _colliding_pairs(count: int) -> Iterable[tuple[int, int]]:
    """Pairs of integers whose tuples have one hash: CPython's xxHash, solved for the second."""
    prime1, prime2, prime5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
    inverse, all_bits = pow(prime2, -1, 2**64), 2**64 - 1
    first = 0
    while count:
        first += 1
        total = (prime5 + first * prime2) & all_bits
        total = (total << 31 | total >> 33) & all_bits
        second = (12345 - total * prime1) * inverse & all_bits
        signed = second - 2**64 if second >> 63 else second
        if abs(signed) < MODULUS and signed != -1:
            count -= 1
            yield first, signed


@family
def large_integers(draw: random.Random, folder: Path) -> Path:
    """One long integer, as a key again and again, or among others."""
    digits, count = some(draw, 1 << 16), some(draw)
    steps = number(draw.getrandbits(8 * digits)) + kept(0) + b"0"
    return written(
        draw,
        folder,
        steps
        + pick(
            draw,
            lambda: b"}(" + (got(0) + b"N") * count + b"u",
            lambda: (b"}" + got(0) + b"Ns0") * count + b"N",
            lambda: name("builtins", "set") + b"](" + got(0) * count + b"e\x85R",
            lambda: b"}(" + (got(0) + number(1) + b"\x86N") * count + b"u",
            lambda: b"L" + b"9" * digits + b"L\n",
            lambda: b"F" + b"9" * digits + b"\n",
            lambda: b"](" + got(0) * count + b"e",
            lambda: storage("0", "FloatStorage", draw.getrandbits(8 * digits)),
        ),
    )


@family
def tables(draw: random.Random, folder: Path) -> Path:
    """The table of what is kept, far, long, or read again and again."""
    count = some(draw, 1 << 15)
    return written(
        draw,
        folder,
        pick(
            draw,
            lambda: b"N" + b"\x94" * count,
            lambda: b"N" + b"".join(kept(draw.randrange(2**32)) for _ in range(count // 5)),
            lambda: b"N" + b"".join(kept(i) for i in range(count // 5)),
            lambda: b"]" + kept(0) + got(0) * (count // 5),
            lambda: b"N" + b"2" * count,
            lambda: b"]" + kept(0) + (got(0) + got(0) + b"a0") * (count // 9),
        ),
    )


@family
def nested(draw: random.Random, folder: Path) -> Path:
    """Things in things, as deep as the file is long, or shared so that paths double."""
    count = some(draw, 1 << 14)
    objects, doubled = count // 20 + 1, b")" + b"2\x86" * min(count, 200)
    return written(
        draw,
        folder,
        pick(
            draw,
            lambda: b")" + b"\x85" * count,
            lambda: b"]" * count + b"a" * (count - 1),
            lambda: b"(" * count + b"t" * count,
            lambda: b"(" * count + b"l" * count,
            lambda: (name("torch.nn", "Module") + b")\x81") * objects + b"b" * (objects - 1),
            lambda: b"}" + doubled + b"Ns",
            lambda: name("builtins", "set") + b"](" + doubled + b"e\x85R",
            lambda: doubled + b"Q",
            lambda: b"\x8f" * count,
            lambda: b"}" * count,
        ),
    )


@family
def files_in_files(draw: random.Random, folder: Path) -> Path:
    """Storages in bytes, each in the next, or one of them again and again."""
    content = b"\x80\x03N."
    for _ in range(draw.randrange(1, 300)):
        inner = b"B" + struct.pack("<I", len(content)) + content
        content = b"\x80\x03" + name("torch.storage", "_load_from_bytes") + inner + b"\x85R."
    if draw.random() < 0.5:
        inner = b"B" + struct.pack("<I", len(content)) + content + b"r" + bytes(4)
        again = name("torch.storage", "_load_from_bytes") + got(0) + b"\x85R0"
        content = b"\x80\x03" + inner + again * some(draw, 1 << 10) + b"N."
    path = folder / "x.pt"
    path.write_bytes(content)
    return path


@family
def texts(draw: random.Random, folder: Path) -> Path:
    """Long texts, of wide letters, escaped, of Python 2."""
    count = some(draw, 1 << 18)
    return written(
        draw,
        folder,
        pick(
            draw,
            lambda: text("a" * count + "\U0001f600"),
            lambda: text("\ud800" * (count // 3)),
            lambda: b"S'" + b"\\x41" * (count // 4) + b"'\n",
            lambda: b"V" + b"\\u0041" * (count // 6) + b"\n",
            lambda: b"U\xff" + bytes(255),
            lambda: b"T" + struct.pack("<i", count) + b"\xff" * count,
            lambda: b"}" + text("a" * count) + b"Ns",
            lambda: name("torch.nn", "a" * count) + b")\x81",
            lambda: text("torch.nn" + ".a" * count) + text("b") + b"\x93",
        ),
    )


@family
def many_tensors(draw: random.Random, folder: Path) -> Path:
    """Tensors of nothing, of one number, or of 64 axes, by the thousand."""
    axes = draw.choice((1, 2, 64, 65))
    size = draw.choice(((0,) * axes, (1,) * axes, (0,) + (2**47,) * (axes - 1)))
    steps = storage("0", "FloatStorage", 1) + kept(0) + b"0}("
    for i in range(some(draw, 1 << 11)):
        steps += text(f"{draw.choice(('visual.', ''))}{i}") + view(got(0), size, (1,) * axes)
    return archive(folder / "x.pt", steps + b"u", {"0": bytes(4)})


# --- archives


def _member(named: str, kind: bytes = b"0", content: bytes = b"", size: int | None = None) -> bytes:
    info = tarfile.TarInfo(named)
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def _packed(draw: random.Random, folder: Path, content: bytes) -> Path:
    suffix = draw.choice(list(PACKERS))
    path = folder / f"x{suffix}"
    path.write_bytes(PACKERS[suffix](content + bytes(1024)))
    return path


@family
def tar_headers(draw: random.Random, folder: Path) -> Path:
    """Long names, records of any length, sparse files, headers without end."""
    count = some(draw, 1 << 21)
    kind = draw.choice((b"L", b"K", b"x", b"g", b"S", b"X"))
    content = pick(
        draw,
        lambda: b"a" * count,
        lambda: bytes(count),
        lambda: b"9" * count,
        lambda: f"{count + 20} path=".encode() + b"a" * count,
        lambda: b"25 GNU.sparse.major=1\n25 GNU.sparse.minor=0\n",
        lambda: b"11 size=-1\n",
        lambda: b"13 size=9999\n",
        lambda: b"19 GNU.sparse.map=" + b"0,1," * (count // 4) + b"\n",
        lambda: b"0 a=b\n",
    )
    one = _member("x", kind, content, draw.choice((None, None, None, 2**40, -1)))
    body = one * draw.choice((1, 1, min(1 << 22, some(draw, 1 << 14) * len(one)) // len(one)))
    return _packed(draw, folder, body + _member("x", content=b"1"))


@family
def bombs(draw: random.Random, folder: Path) -> Path:
    """A few bytes that unpack to very many."""
    count = some(draw, 1 << 27) if draw.random() < 0.2 else some(draw, 1 << 22)
    content = bytes(count)
    form = draw.randrange(4)
    path = folder / ("x.gz", "x.zip", "x", "x")[form]
    if form == 0:
        path.write_bytes(gzip.compress(content, 1) * draw.choice((1, 1, 3)))
    elif form == 1:
        how = draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
        with zipfile.ZipFile(path, "w", how, compresslevel=1) as file:
            for i in range(draw.choice((1, 1, 4))):
                file.writestr(f"a/{i}", content[: count // 4])
    elif form == 2:
        return _packed(draw, folder, _member("x", content=content))
    else:
        folders = _member("x", draw.choice((b"5", b"0"))) * some(draw, 1 << 13)
        return _packed(draw, folder, folders)
    return path


@family
def archive_names(draw: random.Random, folder: Path) -> Path:
    """Members with names and kinds that lead elsewhere, or are none."""
    names = [
        "../x",
        "/x",
        "a/../../x",
        "..\\x",
        "C:\\x",
        "",
        ".",
        "..",
        "a/b",
        "a",
        "a/b/c",
        "\0",
        "a" * 300,
        "a/" * 300 + "b",
        "b" * 5000,
        "\ud800",
        "c",
        "c/",
        "nul",
        "\x1b[2J",
        "~/x",
        "-x",
    ]
    chosen = [draw.choice(names) for _ in range(draw.randrange(1, 6))]
    if draw.random() < 0.4:
        path = folder / "x.zip"
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as file:
            for one in dict.fromkeys(chosen):
                info = zipfile.ZipInfo("x")
                info.filename = one.replace("\ud800", "u") or "e"
                info.external_attr = draw.choice((0, 0, 0, 0o120777, 0o020666, 0o100644)) << 16
                file.writestr(info, b"content")
        path.write_bytes(stream.getvalue())
        return path
    body = b""
    for one in chosen:
        content = one.encode("utf-8", "surrogatepass")
        if draw.random() < 0.5:
            body += _member("x", b"L", content + b"\0")
        kind = draw.choice((b"0", b"0", b"0", b"1", b"2", b"3", b"5", b"6", b"7"))
        body += _member(one[:90].replace("\0", "").replace("\ud800", ""), kind)
    return _packed(draw, folder, body)


@family
def damaged_archives(draw: random.Random, folder: Path) -> Path:
    """A good archive with a flipped bit, a cut, or another length."""
    body = b"".join(
        _member(f"a/{i}.txt", content=draw.randbytes(20) * draw.randrange(60))
        for i in range(draw.randrange(1, 9))
    )
    path = _packed(draw, folder, body)
    if draw.random() < 0.3:
        path = path.rename(folder / "x.zip")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for i in range(4):
                file.writestr(f"a/{i}", b"content " * draw.randrange(99))
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 4))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.3:
        del content[draw.randrange(len(content)) :]
    path.write_bytes(content)
    return path


# --- safetensors and JSON


@family
def long_headers(draw: random.Random, folder: Path) -> Path:
    """Headers of safetensors with many tensors, axes, facts, or what is not known there."""
    count = some(draw, 1 << 15)
    nothing = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    inner = pick(
        draw,
        lambda: ",".join(f'"{i}":{nothing}' for i in range(count // 16 + 1)),
        lambda: f'"a":{nothing[:-36]}"shape":[{"1," * count}0],"data_offsets":[0,0]}}',
        lambda: '"__metadata__":{' + ",".join(f'"{i}":""' for i in range(count)) + "}",
        lambda: f'"a":{nothing[:-1]},"b":[{"[]," * count}1]}}',
        lambda: f'"a":{nothing[:-1]},"b":{"[" * count}{"]" * count}}}',
        lambda: ",".join(f'"a":{nothing}' for _ in range(count // 16 + 1)),
        lambda: f'"a":{nothing}' + " " * count,
        lambda: f'"{"a" * count}":{nothing}',
        lambda: (
            '"__metadata__":{"format":"tangent-arithmetic/1","kind":"head","hash":"","info":"'
            + draw.choice(("[" * count, "[]," * count, "{}", "9" * count))
            + '"}'
        ),
    )
    header = f"{{{inner}}}".encode()
    length = draw.choice((len(header),) * 5 + (2**63, 2**32, len(header) + 1))
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header + bytes(draw.choice((0, 0, 8))))
    return path


@family
def long_json(draw: random.Random, folder: Path) -> Path:
    """A folder of Hugging Face whose configuration, or index, is deep, long, or of other types."""
    count = some(draw, 1 << 15)
    filling = pick(
        draw,
        lambda: "[" * count + "]" * count,
        lambda: '{"a":' * count + "1" + "}" * count,
        lambda: f"[{'[],' * count}1]",
        lambda: f"[{'{},' * count}1]",
        lambda: "9" * count,
        lambda: f'"{"a" * count}"',
        lambda: f"1e{'9' * count}",
        lambda: "{" + ",".join(f'"{i}":{i}' for i in range(count)) + "}",
        lambda: draw.choice(("NaN", '"\\ud800"', '"../x"', "{}", "null")),
    )
    key = draw.choice(("model_type", "vision_config", "hidden_act", "weight_map", "other"))
    config = {"model_type": "clip", "vision_config": {}}
    made = json.dumps(config)[:-1] + f', "{key}": {filling}}}'
    hub = folder / "x"
    hub.mkdir()
    (hub / "config.json").write_text(made if draw.random() < 0.5 else json.dumps(config))
    index = draw.choice(
        (f'{{"weight_map": {filling}}}', f'{{"weight_map": {{"a": {filling}}}}}', made)
    )
    (hub / "model.safetensors.index.json").write_text(index)
    return hub


def write(draw: random.Random, folder: Path) -> tuple[str, Path]:
    """Writes a file of some family into an empty folder; returns the family and the path."""
    chosen = draw.choice(list(FAMILIES))
    return chosen, FAMILIES[chosen](draw, folder)
