"""Reads thousands of damaged and hostile files, each of which must be a clear error.

    python scripts/hostile_files.py --count=20000 --jobs=2

Files of every format that we read are mutated (bits, bytes, slices, numbers, headers, steps of
pickles, calls of `os.system` among them); a share is of the families of `hostile_families.py`,
which ask for much memory, time or other places. Checkpoints are read as such and as a model to
merge, archives are unpacked, in processes with little memory and time. What reading a file may take
follows from its size as docs/reliability.md promises; whatever takes more is a problem that is
reported. File number I of a run is always the same; `--only=I` makes it again, to look at.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import types
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import hostile_families
import torch
from safetensors.torch import save_file
from torch import nn

from tangent_arithmetic.data.prepare.unpack import gunzip, unpack
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.merging.weights import open_weights
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.peaks import forget_peak, peak_bytes
from tangent_arithmetic.storage.checkpoints import save_tensors

SECONDS, MEMORY = 30, 1 << 30  # of the clock, and of address space: then the process is stopped
# what is promised: bytes of memory and seconds of a processor that reading a file may take
TIMES_SIZE, SPARE_BYTES = 8, 96 << 20
SECONDS_A_BYTE, SPARE_SECONDS = 4e-6, 2.0
SHARE = 0.06  # of files that are of a family
MUTATED = "mutated"
CANARY = "executed"
BATCH = 500
FORBIDDEN = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "exec",
    "compile",
    "import",
    "pickle.find_class",
    "shutil.rmtree",
    "ctypes.dlopen",
}
Bytes = Callable[[bytes, random.Random], bytes]
Made = TypeVar("Made", bound=nn.Module | dict[str, torch.Tensor])


@dataclass
class Outcome:
    """What became of the files.

    Attributes:
        counts: "read", "refused", "other error", "executed", "crashed", "beyond bounds".
        problems: number and kind of each file that was neither read nor refused, within bounds.
        seconds: the longest that reading one took, of a processor.
        memory: most bytes by which reading grew a process.
        families: the same by family: files, seconds, bytes.
    """

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0
    families: dict[str, list[float]] = field(default_factory=dict)

    def add(self, other: Outcome) -> None:
        """Adds what another process found."""
        self.counts += other.counts
        self.problems += other.problems
        for family, (count, seconds, memory) in other.families.items():
            self.took(family, seconds, int(memory), int(count))

    def took(self, family: str, seconds: float, memory: int, count: int = 1) -> None:
        """Adds what reading a file of a family took."""
        before = self.families.get(family, [0, 0.0, 0])
        highest = (max(before[1], seconds), max(before[2], memory))
        self.families[family] = [before[0] + count, *highest]
        self.seconds, self.memory = max(self.seconds, seconds), max(self.memory, memory)


# --- good files


class _Head(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.normalize = True


class _Affine(nn.Module):
    """Of TorchScript, without constants, whose order would be random."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


def write_seeds(folder: Path) -> list[Path]:
    """Small files, and a folder, of the formats that `load_checkpoint` reads; always the same.

    They are read once, so that all that is imported at first use is imported when processes fork.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    theta = {"model.visual.proj": torch.randn(4, 3), "model.visual.bias": torch.randn(3).half()}
    theta0 = {name: value + 1 for name, value in theta.items()}
    save_tensors(folder / "ours.safetensors", theta, "image_encoder", info={"model": "ViT-Nano-8"})
    linear = folder / "linear.safetensors"
    save_tensors(linear, theta, "linearized_image_encoder", theta0, info={"model": "ViT-Nano-8"})
    save_file(theta, folder / "theirs.safetensors", metadata={"format": "pt"})
    state = OrderedDict(theta)
    torch.save(state, folder / "state.pt")
    copy = _settled(lambda: OrderedDict((name, value.clone()) for name, value in theta.items()))
    torch.save(copy, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    layers = {f"block1.block.{i}.weight": torch.randn(4, 4) for i in range(3)}
    torch.save(OrderedDict(layers), folder / "backbone.pth")
    _Head.__module__, _Head.__qualname__ = "src.modeling", "ClassificationHead"
    theirs = types.ModuleType("src.modeling")
    theirs.ClassificationHead = _Head  # type: ignore[attr-defined]
    modules = {"src": types.ModuleType("src"), "src.modeling": theirs}
    with patch.dict(sys.modules, modules), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its source code cannot be stored
        torch.save(_Head(), folder / "head.pt")
        head = _settled(_Head)
        torch.save(head, folder / "head_legacy.pt", _use_new_zipfile_serialization=False)
        for protocol in (2, 4):
            (folder / f"head_{protocol}.pt").write_bytes(pickle.dumps(_Head(), protocol))
    for path in folder.glob("*.pt"):
        if not zipfile.is_zipfile(path):
            path.write_bytes(_without_addresses(path.read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is old; OpenAI's weights are
        torch.jit.save(torch.jit.script(_Affine()), str(folder / "script.pt"))
    hub = folder / "hub"
    hub.mkdir(exist_ok=True)
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": 4,
        "architectures": ["X"],
        "vision_config": {"hidden_size": 4, "num_hidden_layers": 1},
    }
    (hub / "config.json").write_text(json.dumps(config))
    save_file({"vision_model.a": torch.ones(2)}, hub / "model-00001-of-00001.safetensors")
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(_in_order(path.read_bytes()))
    index = {"weight_map": {"vision_model.a": "model-00001-of-00001.safetensors"}}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    seeds = sorted(folder.iterdir())
    for seed in seeds:
        for reader in READERS:
            with contextlib.suppress(UsageError):
                reader(seed)
    return seeds


def _settled(make: Callable[[], Made]) -> Made:
    """What is made, once its tensors lie in the order of their names; legacy files sort them so."""
    tried: list[Made] = []  # kept, so that the next one lies elsewhere
    while True:
        torch.manual_seed(1)
        tried.append(make())
        held = tried[-1]
        tensors = held.values() if isinstance(held, dict) else held.parameters()
        addresses = [str(value.untyped_storage()._cdata) for value in tensors]
        if addresses == sorted(addresses):
            return held


def _without_addresses(content: bytes) -> bytes:
    """A legacy file whose storages have the same names each time; torch names them by address."""
    found = dict.fromkeys(re.findall(rb"(?<!\d)\d{14,15}(?!\d)", content))
    for number, address in enumerate(found):
        content = content.replace(address, b"%0*d" % (len(address), number))
    return content


def _in_order(content: bytes) -> bytes:
    """A file of safetensors whose header is in one order each time; the library's is random."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":"))
    return content[:8] + header.encode().ljust(size) + content[8 + size :]


# --- bad ones

NUMBERS = [0, 1, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**64 - 1]
JSONS = [
    "null",
    "true",
    "-1",
    "1e308",
    str(2**63),
    '"x"',
    '"F64"',
    '"../../x"',
    '"/etc/passwd"',
    "{}",
    "[]",
    "[[[]]]",
    "[0, 0]",
    "[-1]",
    f"[{2**40}, {2**40}]",
    "[" * 5000 + "]" * 5000,
]


def _flip(content: bytes, draw: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


def _overwrite(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    new = draw.choice((bytes([draw.randrange(256)]), b"\x00" * 8, b"\xff" * 8, draw.randbytes(16)))
    return content[:start] + new + content[start + len(new) :]


def _number(content: bytes, draw: random.Random) -> bytes:
    start, form = draw.randrange(len(content)), draw.choice(("<I", "<Q", ">I", "<H"))
    size = struct.calcsize(form)
    value = draw.choice(NUMBERS) % 256**size
    return content[:start] + struct.pack(form, value) + content[start + size :]


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _slice(content: bytes, draw: random.Random) -> bytes:
    a, b, c = sorted(draw.randrange(len(content) + 1) for _ in range(3))
    return draw.choice(
        (
            content[:a] + content[b:],  # without a part
            content[:b] + content[a:b] * draw.choice((1, 50)) + content[b:],  # with one more often
            content[:a] + content[b:c] + content[a:b] + content[c:],  # with two exchanged
            content + draw.randbytes(draw.randrange(1, 200)),
        )
    )


ANYWHERE: list[Bytes] = [_flip, _flip, _overwrite, _number, _cut, _slice]


def payload(draw: random.Random) -> bytes:
    """Steps of a pickle that call something, if they are run, and leave the stack as it was."""
    command = f"touch {CANARY}"
    code = f"__import__('os').system({command!r})"
    calls = [
        ("os", "system", command),
        ("posix", "system", command),
        ("builtins", "eval", code),
        ("builtins", "exec", code),
        ("__builtin__", "eval", code),
        ("runpy", "run_path", "x.py"),
        ("subprocess", "getoutput", command),
        ("importlib", "import_module", "antigravity"),
        ("torch.serialization", "load", "x.pt"),
        ("nt", "system", command),
    ]
    module, name, argument = draw.choice(calls)
    text = argument.encode()
    said = b"X" + struct.pack("<I", len(text)) + text
    named = f"c{module}\n{name}\n".encode()
    if draw.random() < 0.3:  # by name on the stack
        parts = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)]
        named = b"".join(parts) + b"\x93"
    return draw.choice(
        (
            named + said + b"\x85R0",
            named + b"(" + said + b"tR0",
            b"(" + said + f"i{module}\n{name}\n".encode() + b"0",
            b"(" + named + said + b"o0",
            named + b")\x81" + said + b"b0",
            b"(" * 3000 + named + said + b"\x85R" + b"t" * 3000 + b"0",
        )
    )


def _steps(content: bytes) -> list[int]:
    """Where the steps of the pickles in a file begin."""
    places: list[int] = []
    start = 0
    with contextlib.suppress(Exception):  # what follows the pickles of a legacy file is none
        while start < len(content):
            stream = io.BytesIO(content[start:])
            places += [start + (place or 0) for _, _, place in pickletools.genops(stream)][1:]
            start += stream.tell()
    return places


def _inject(content: bytes, draw: random.Random) -> bytes:
    places = _steps(content)
    if not places:
        return _flip(content, draw)
    at = draw.choice(places)
    return content[:at] + payload(draw) + content[at:]


def _opcode(content: bytes, draw: random.Random) -> bytes:
    """Another step in place of one."""
    places = _steps(content)
    if not places:
        return _overwrite(content, draw)
    at = draw.choice(places)
    code = draw.choice(pickletools.opcodes).code.encode("latin1")
    return content[:at] + code + content[at + draw.choice((0, 1)) :]


def _archive(content: bytes, draw: random.Random) -> bytes:
    """One member of an archive changed, its checksum in order."""
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    names = source.namelist()
    pickles = [name for name in names if name.endswith(".pkl")]
    chosen = draw.choice(pickles if draw.random() < 0.8 else names)
    change = draw.choice((_inject, _opcode, *ANYWHERE))
    with zipfile.ZipFile(target, "w", draw.choice((0, 0, 0, 8))) as archive:
        for name in names:
            data = source.read(name)
            if name == chosen and data:
                data = change(data, draw)
            renamed = draw.random() < 0.05
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # two members of one name
                archive.writestr(draw.choice((*names, "../x", "/x")) if renamed else name, data)
    return target.getvalue()


def _json(content: bytes, draw: random.Random) -> bytes:
    """A value, or a key, of a JSON text replaced by something else."""
    found = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(found)
    holder, key = draw.choice(places)
    if isinstance(holder, dict) and draw.random() < 0.2:
        holder[draw.choice(("", "x", "../x", "__proto__", "theta0/", "a" * 5000))] = holder.pop(key)
        return json.dumps(found).encode()
    holder[key] = "\x00"
    return json.dumps(found).replace('"\\u0000"', draw.choice(JSONS), 1).encode()


def _header(content: bytes, draw: random.Random) -> bytes:
    """The JSON in the header of safetensors changed, its length in order."""
    size = struct.unpack("<Q", content[:8])[0]
    changed = _json(content[8 : 8 + size], draw)
    return struct.pack("<Q", len(changed)) + changed + content[8 + size :]


def mutate(content: bytes, suffix: str, draw: random.Random) -> bytes:
    """A bad file of a good one."""
    own: list[Bytes] = [_inject, _inject, _opcode]
    if suffix == ".safetensors":
        own = [_header] * 5
    elif suffix == ".json":
        own = [_json] * 8
    elif zipfile.is_zipfile(io.BytesIO(content)):
        own = [_archive] * 8
    found = draw.choice((*own, *ANYWHERE))(content, draw)
    return draw.choice(ANYWHERE)(found, draw) if draw.random() < 0.1 and found else found


def make(
    seeds: Sequence[Path], number: int, folder: Path, share: float = SHARE
) -> tuple[str, Path]:
    """Writes bad file number `number` into an empty folder.

    Args:
        seeds: good files, of which most are mutations.
        number: of the file.
        folder: where to.
        share: of those that are of a family.

    Returns:
        Its family, and the path.
    """
    draw = random.Random(f"hostile {number}")
    if draw.random() < share:
        return hostile_families.write(draw, folder)
    seed = draw.choice(seeds)
    path = folder / f"x{seed.suffix}"
    if seed.is_dir():
        shutil.copytree(seed, path)
        chosen = draw.choice(sorted(path.iterdir()))
        chosen.write_bytes(mutate(chosen.read_bytes(), chosen.suffix, draw))
    else:
        path.write_bytes(mutate(seed.read_bytes(), seed.suffix, draw))
    return MUTATED, path


# --- reading them


def _as_stream(path: Path) -> None:
    """Reads a file as merging does, a tensor at a time."""
    weights = open_weights(path)
    for name in weights.outline:
        weights.read(name)


def _unpacked(path: Path) -> None:
    """Unpacks an archive to a folder beside it."""
    target = path.with_name(UNPACKED)
    target.mkdir()
    if path.name == "x.gz":
        gunzip(path, target / "x")
    else:
        unpack(path, target)


READERS: list[Callable[[Path], object]] = [load_checkpoint, _as_stream]
UNPACKED = "unpacked"


@dataclass
class _Attempt:
    """What came of reading a file in each way.

    Attributes:
        outcome: "read", "refused" or "other error".
        error: the one that is not ours.
        seconds: the longest that a reader took, of a processor.
        memory: most bytes by which one grew the process.
    """

    outcome: str = "refused"
    error: str = ""
    seconds: float = 0.0
    memory: int = 0

    def read(self, path: Path, reader: Callable[[Path], object]) -> None:
        """Reads the file in one way."""
        forget_peak()
        before, start = peak_bytes(), time.process_time()
        try:
            reader(path)
            self.outcome = "read"
        except UsageError:
            pass
        except Exception as error:
            self.outcome, self.error = "other error", f"{type(error).__name__}: {str(error)[:200]}"
        self.seconds = max(self.seconds, time.process_time() - start)
        self.memory = max(self.memory, peak_bytes() - before)


def _attempt(path: Path) -> _Attempt:
    """Reads a file in each way, up to the first error that is not ours."""
    found = _Attempt()
    archive = path.suffix in (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip")
    for reader in [_unpacked] if archive else READERS:
        if not found.error:
            found.read(path, reader)
    return found


def _beyond(found: _Attempt, path: Path) -> str:
    """What a file took more of than is promised."""
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    seconds, memory = SPARE_SECONDS + SECONDS_A_BYTE * size, SPARE_BYTES + TIMES_SIZE * size
    if found.seconds <= seconds and found.memory <= memory:
        return ""
    return f"{size} bytes took {found.seconds:.2f} s and {found.memory} bytes of memory"


def _child(seeds: Sequence[Path], numbers: Sequence[int], share: float, pipe: int) -> None:
    """Reads some files under limits, and tells through a pipe which one it is at; never returns."""
    events: list[str] = []
    watching: list[Path] = []  # the folder whose file is being read

    def hook(event: str, arguments: Any) -> None:
        if watching and event in FORBIDDEN:
            if event == "shutil.rmtree" and Path(arguments[0]).is_relative_to(watching[0]):
                return  # what was half unpacked
            events.append(event)

    sys.addaudithook(hook)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcome = Outcome()
    gc.freeze()
    with os.fdopen(pipe, "w") as talk, tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for number in numbers:
            talk.write(f"{number}\n")
            talk.flush()
            folder = Path(place) / str(number)
            folder.mkdir()
            family, path = make(seeds, number, folder, share)
            signal.alarm(SECONDS)
            watching[:] = [folder]
            found = _attempt(path)
            watching.clear()
            signal.alarm(0)
            outcome.took(family, found.seconds, found.memory)
            expected = {folder, path, path.with_name(UNPACKED)}
            elsewhere = {*Path(place).iterdir(), *folder.iterdir()} - expected
            if elsewhere or events:
                names = sorted(stray.name for stray in elsewhere)
                found.outcome, said = "executed", f"executed {events}, wrote {names}"
                for stray in elsewhere:
                    shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
                events.clear()
            elif said := found.error or _beyond(found, path):
                found.outcome = found.outcome if found.error else "beyond bounds"
            if said:
                outcome.problems.append(f"{number} ({family}): {said}")
            outcome.counts[found.outcome] += 1
            shutil.rmtree(folder)
        talk.write(json.dumps(vars(outcome)) + "\n")
    os._exit(0)


def read_all(
    numbers: Sequence[int], seeds: Sequence[Path], jobs: int = 1, share: float = SHARE
) -> Outcome:
    """Makes and reads the files of these numbers, in processes of their own.

    Args:
        numbers: of the files.
        seeds: good files, see `write_seeds`.
        jobs: processes at once.
        share: of files that are of a family.
    """
    with ThreadPool(jobs) as pool:  # each of them waits for a process
        parts = pool.map(lambda part: _read_part(part, seeds, share), _parts(numbers, jobs))
    total = Outcome()
    for part in parts:
        total.add(part)
    return total


def _parts(numbers: Sequence[int], jobs: int) -> list[Sequence[int]]:
    return [numbers[start::jobs] for start in range(jobs)]


def _read_part(numbers: Sequence[int], seeds: Sequence[Path], share: float) -> Outcome:
    total, left = Outcome(), list(numbers)
    while left:
        batch = left[:BATCH]
        lines, code = _in_a_process(seeds, batch, share)
        if lines and lines[-1].startswith("{"):
            told = json.loads(lines[-1])
            total.add(Outcome(**{**told, "counts": Counter(told["counts"])}))
            left = left[len(batch) :]
            continue
        at = int(lines[-1])  # the rest of the batch is read by the next process
        slow = code == -signal.SIGALRM
        total.counts["crashed"] += 1
        total.problems.append(f"{at}: {f'more than {SECONDS} s' if slow else f'exit code {code}'}")
        done = batch.index(at)
        left = batch[:done] + left[done + 1 :]  # those before it are told of anew
    return total


def _in_a_process(
    seeds: Sequence[Path], batch: Sequence[int], share: float
) -> tuple[list[str], int]:
    """Reads files in a process; returns what it told, and its exit code."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            _child(seeds, batch, share, theirs)
        finally:
            os._exit(1)
    os.close(theirs)
    with os.fdopen(ours) as listen:
        lines = listen.read().splitlines()
    return lines, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def table(outcome: Outcome) -> str:
    """The worst of each family."""
    header = ["family", "files", "longest, s", "most memory, MiB"]
    rows = [
        [family, f"{count:,.0f}", f"{seconds:.2f}", f"{memory / 2**20:.0f}"]
        for family, (count, seconds, memory) in sorted(outcome.families.items())
    ]
    return markdown_table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000, help="files (default: 20000)")
    parser.add_argument("--only", type=int, help="write this file to the folder hostile_I")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--share",
        type=float,
        default=SHARE,
        help=f"of the files, those that are hostile by design (default: {SHARE})",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        seeds = write_seeds(Path(folder) / "seeds")
        if args.only is not None:
            kept = Path(f"hostile_{args.only}")
            kept.mkdir()
            print(make(seeds, args.only, kept, args.share)[1])
            return 0
        outcome = read_all(range(args.count), seeds, args.jobs, args.share)
    print(json.dumps(vars(outcome), indent=2))
    print(table(outcome), file=sys.stderr)
    return int(bool(outcome.problems))


if __name__ == "__main__":
    raise SystemExit(main())
