"""Kills, breaks and disturbs runs on purpose, and counts what is lost: nothing should be.

    python scripts/fault_injection.py            all of it: results/reliability/faults.json, and the
                                                 table in docs/reliability.md
    python scripts/fault_injection.py --quick    a short form, which writes neither
    python scripts/fault_injection.py hostile    one part anew (runs, writes, world_sizes,
                                                 full_disk, damaged, hostile); the others stay

Fine-tuning of the embedded model is killed at random moments and started again until it ends; its
weights are compared with those of a run that was left alone. Most runs are forked from this process
(which has imported everything and made a model) and train on a part of the pictures; others are
started by the command of the README. Then writers are killed while they write, files are damaged,
hostile files read (`hostile_files.py`), and gradients of one process compared with those of two.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import logging
import operator
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from hostile_files import read_all, write_seeds
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from tangent_arithmetic.arithmetic import features
from tangent_arithmetic.commands import finetune
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.data.embedded.base import Arrays, Split
from tangent_arithmetic.data.loading import BatchPlan, RankBatches, train_loader
from tangent_arithmetic.data.prepare.unpack import unpack
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts
from tangent_arithmetic.merging import TaskArithmeticAlgorithm
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.models import classification_head, zeroshot_encoder
from tangent_arithmetic.run.provenance import git_commit, versions
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.atomic import write_text
from tangent_arithmetic.runtime.errors import UnwritableError, UsageError
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.states import RunStates
from tangent_arithmetic.training.loop import step_gradients, wrap_ddp

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "reliability.md", ROOT / "results" / "reliability" / "faults.json"
START, END = "<!-- faults: begin -->", "<!-- faults: end -->"
MODES = ("standard", "linear")
TASK = "Emoji"
PICTURES = 256  # of the task, in forked runs, which are many
MINUTE = 60.0  # in which a run must end once a process of it has died
How = Literal["forked", "command"]
REFUSALS = (UsageError, ValueError, KeyError, SafetensorError)  # the last three: of features._read


@dataclass(frozen=True)
class Amounts:
    """How much of each is tried."""

    kills: int = 228  # of forked runs, for each mode and world size
    command_kills: int = 2  # of runs that the command starts, for each mode and world size
    ends: int = 20  # kills between the checkpoint and the end, for each mode and world size
    signals: int = 3  # SIGTERMs, for each mode and world size
    writes: int = 150  # kills inside writes, for each kind of file
    full: int = 100  # writes to a full disk
    damages: int = 2000  # of checkpoints
    other_damages: int = 500  # of each other kind of file
    hostile: int = 100_000
    epochs: int = 1
    tasks: int = 8  # whose gradients are compared
    groups: tuple[tuple[str, int], ...] = tuple(product(MODES, (1, 2)))  # modes, world sizes


QUICK = Amounts(
    kills=2,
    command_kills=0,
    ends=2,
    signals=1,
    writes=15,
    full=10,
    damages=100,
    other_damages=20,
    hostile=500,
    epochs=1,
    tasks=1,
    groups=(("standard", 1), ("linear", 2)),
)


def fork(work: Callable[[], object], log: Path) -> int:
    """Calls `work` in a child, as an entry point; what it prints goes to a file."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = int(bool(work()))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        logging.exception("in a child")
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def fork_group(work: Callable[[], object], world_size: int, log: Path) -> list[int]:
    """Calls `work` in each process of a group, whose environment is that of a launcher."""
    if world_size == 1:
        return [fork(work, log)]
    port = ddp.free_port(0)

    def member(rank: int) -> Callable[[], object]:
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }

        def joined() -> object:
            os.environ.update(environment)
            return work()

        return joined

    return [fork(member(rank), log) for rank in range(world_size)]


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits to be noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def descendants(pid: int) -> list[int]:
    """The living processes below a process."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, file.read_text().split()):
                found += [child, *descendants(child)]
    return found


def all_ended(pids: Sequence[int], seconds: float) -> float | None:
    """Seconds until all have ended; None if they have not in that time."""
    start = time.monotonic()
    while not all(map(ended, pids)):
        if time.monotonic() - start > seconds:
            return None
        time.sleep(0.005)
    return time.monotonic() - start


def reap(pids: Sequence[int]) -> list[int]:
    """Exit codes of children that have ended."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


# --- runs of fine-tuning

ENDS = ("checkpoint moved", "before removing", "half removed", "removed", "recorded")


def kill_at_end(end: str) -> None:
    """Makes this process kill itself at a moment after it has written its checkpoint.

    Args:
        end: one of `ENDS`.
    """

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_within(self: RunStates) -> None:
        if end != "before removing":
            for path in list(self.folder.iterdir())[: 1 if end == "half removed" else None]:
                path.unlink()
        die()

    def die_once_moved(self: Path, target: Path) -> Path:
        moved = move(self, target)
        if target.name.endswith("finetuned.safetensors"):
            die()
        return moved

    move = Path.replace
    if end == "checkpoint moved":
        Path.replace = die_once_moved  # type: ignore[method-assign,assignment]
    elif end == "recorded":
        finetune.append_result = die
    else:
        RunStates.remove = die_within  # type: ignore[method-assign]


@dataclass
class Runs:
    """Runs of one mode and world size, all with the same settings, each in its own folder.

    Args:
        mode: standard or linear.
        world_size: processes.
        how: forked from here, or started by the command.
        place: folder for all of them.
        epochs: of training.
    """

    mode: str
    world_size: int
    how: How
    place: Path
    epochs: int
    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0  # seconds from the death of a process to the end of the last
    seconds: float = 0.0  # of a run that is left alone
    expected: str = ""
    number: int = 0

    def flags(self, save: Path) -> list[str]:
        """The flags of a run."""
        return [
            f"--finetuning-mode={self.mode}",
            f"--train-dataset={TASK}",
            f"--epochs={self.epochs}",
            f"--batch-size={32 if self.how == 'forked' else 64}",
            "--state-every=2",
            "--seed=0",
            f"--save={save}",
            f"--cache-dir={self.place / 'cache'}",
            f"--results={save / 'results'}",
            f"--num-workers={int(self.how == 'command')}",
        ]

    @property
    def save(self) -> Path:
        """The folder of the run that is under way."""
        return self.place / f"{self.mode}-{self.world_size}-{self.how}-{self.number}"

    def start(self, end: str | None = None) -> list[int]:
        """Starts the run, or starts it again; its processes here.

        Args:
            end: one of `ENDS`, where it kills itself; only of a forked run.
        """
        flags, log = self.flags(self.save), self.place / "log"
        if self.how == "forked":

            def work() -> object:
                if end is not None:
                    kill_at_end(end)
                return finetune.main(flags)

            return fork_group(work, self.world_size, log)
        script = [sys.executable, str(ROOT / "src" / "finetune.py"), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("a") as file:
            process = subprocess.Popen(
                [*script, f"--world-size={self.world_size}"],
                stdout=file,
                stderr=file,
                env=environment,
            )
        process.returncode = 0  # it is waited for here
        return [process.pid]

    def left_alone(self) -> None:
        """Takes the weights, and the time, of a run that nothing happens to.

        The first of two draws the pictures, which takes longer.
        """
        for _ in range(2):
            self.number += 1
            start = time.monotonic()
            codes = reap(self.start())
            if any(codes):
                raise RuntimeError(f"a run failed ({codes}):\n{(self.place / 'log').read_text()}")
            self.seconds, self.expected = time.monotonic() - start, self.weights()

    def weights(self) -> str:
        """Content hash of the checkpoint that the run ended in."""
        return str(read_facts(Run.of(self._args()).finetuned_path(TASK, self.mode))["hash"])

    def _args(self) -> Config:
        return Config(save=str(self.save))

    def trial(self, draw: random.Random, kills: int, signum: int = signal.SIGKILL) -> None:
        """Hits a run again and again while it is at work, then lets it end, and compares."""
        self.number += 1
        for _ in range(kills):
            pids = self.start()
            moment = draw.uniform(0.02, 0.95) * self.seconds
            if all_ended(pids, moment) is not None:  # what was left took less
                if any(reap(pids)):
                    self.counts["failed"] += 1
                break
            self.counts["hits"] += 1
            self.counts["continued"] += any(self.save.rglob("*_resume/0*.safetensors"))
            self._hit(pids, draw, signum)
        else:
            if any(reap(self.start())):
                self.counts["failed"] += 1
        self._compare()

    def end_trial(self, end: str) -> None:
        """Kills a run between its checkpoint and its end, and starts it again."""
        self.number += 1
        pids = self.start(end)
        while not any(map(ended, pids)):
            time.sleep(0.005)
        took = all_ended(pids, MINUTE)
        self.counts["hits"] += -signal.SIGKILL in reap(pids)
        self.counts["outlived"] += took is None
        self.slowest = max(self.slowest, took or MINUTE)
        self.counts["continued"] += Run.of(self._args()).finetuned_path(TASK, self.mode).is_file()
        if any(reap(self.start())):
            self.counts["failed"] += 1
        self._compare()

    def _compare(self) -> None:
        """Compares the weights of a run that has ended, and looks for what it left."""
        self.counts["trials"] += 1
        with contextlib.suppress(UsageError):
            self.counts["identical"] += self.weights() == self.expected
        names = [p.name for p in self.save.rglob("*")]
        if [n for n in names if n.endswith(("_resume", ".part", "lock"))]:
            self.counts["leftovers"] += 1
        shutil.rmtree(self.save)

    def _hit(self, pids: list[int], draw: random.Random, signum: int) -> None:
        """Sends a signal to one process of the run, or, SIGTERM, to all; then all must end."""
        below = [child for pid in pids for child in descendants(pid)]
        everyone = [*pids, *below]
        for pid in everyone if signum == signal.SIGTERM else [draw.choice(everyone)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        took = all_ended(everyone, MINUTE)
        if took is None:
            self.counts["outlived"] += 1
            for pid in everyone:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.slowest = max(self.slowest, took or MINUTE)
        self.counts["asked and ended so"] += signal.SIGTERM + 128 in reap(pids)

    def facts(self) -> dict[str, Any]:
        """What was found."""
        names = ("hits", "continued", "trials", "identical", "failed", "leftovers", "outlived")
        counts = {name: self.counts[name] for name in names}
        return {
            "mode": self.mode,
            "world_size": self.world_size,
            "how": self.how,
            **counts,
            "slowest_end_seconds": round(self.slowest, 1),
        }


def shorten(task: str) -> None:
    """Leaves a task `PICTURES` training pictures, in this process and those forked from it."""
    whole = EMBEDDED_SETS[task]

    def build(split: Split) -> Arrays:
        images, labels = whole.build(split)
        return images[:PICTURES], labels[:PICTURES]

    # a version of its own, so that no cache holds these pictures under the name of all
    EMBEDDED_SETS[task] = replace(whole, build=build, version=whole.version + 1000)


def interrupted(amounts: Amounts, place: Path) -> dict[str, list[dict[str, Any]]]:
    """Kills, and signals, of runs of each mode and world size."""
    found: dict[str, list[dict[str, Any]]] = {"kills": [], "signals": [], "ends": []}
    draw = random.Random("faults")
    shorten(TASK)
    ready = Config(save=str(place / "ready"), cache_dir=str(place / "cache"))
    classification_head(Run.of(ready), TASK)
    hows: list[How] = ["forked", "command"] if amounts.command_kills else ["forked"]
    todo = [(*group, how) for group in amounts.groups for how in hows]
    for mode, world_size, how in progress(todo, "killed runs"):
        runs = Runs(mode, world_size, how, place, amounts.epochs)
        runs.left_alone()
        wanted = amounts.kills if how == "forked" else amounts.command_kills
        while runs.counts["hits"] < wanted:
            runs.trial(draw, min(3, wanted - runs.counts["hits"]))
        found["kills"].append(runs.facts())
        if how == "forked":
            asked = Runs(mode, world_size, how, place, amounts.epochs, number=runs.number)
            asked.seconds, asked.expected = runs.seconds, runs.expected
            while asked.counts["hits"] < amounts.signals:
                asked.trial(draw, 1, signal.SIGTERM)
            found["signals"].append(asked.facts())
            last = Runs(mode, world_size, how, place, amounts.epochs, number=asked.number)
            last.seconds, last.expected = runs.seconds, runs.expected
            for i in range(amounts.ends):
                last.end_trial(ENDS[i % len(ENDS)])
            found["ends"].append(last.facts())
    return found


# --- writes


@cache
def contents(seed: int) -> dict[str, Tensor]:
    """Weights, of which there are two."""
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(256, 256, generator=generator) for i in range(4)}


def write_checkpoint(path: Path, seed: int) -> None:
    """A linear checkpoint with its point of expansion."""
    save_tensors(path, contents(seed), "linearized_image_encoder", contents(9))


@cache
def results(seed: int) -> str:
    """A long text, of which there are two."""
    return json.dumps({"seed": seed, "accuracies": [seed / 7] * 200_000})


def write_json(path: Path, seed: int) -> None:
    """A file of results."""
    write_text(path, results(seed))


def write_merged(path: Path, seed: int) -> None:
    """A folder in several files."""
    models = {"_pretrained_": contents(9), "a": contents(seed)}
    TaskArithmeticAlgorithm(1.0).run_to(models, path, max_shard_size="400KB")


def digest(path: Path) -> str:
    """Of all that a file, or a folder, holds; "" for a checkpoint that cannot be read."""
    if path.suffix == ".safetensors":  # the order of its header is not always the same
        try:
            checkpoint = load_checkpoint(path)
        except UsageError:
            return ""
        return f"{checkpoint.hash} {checkpoint.theta0_hash}"
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


WRITERS: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "checkpoints": ("x.safetensors", write_checkpoint),
    "results": ("x.json", write_json),
    "merged folders": ("merged", write_merged),
}


def write_for_ever(write: Callable[[Path, int], None], path: Path) -> None:
    """Writes the two contents in turn."""
    while True:
        write(path, 1)
        write(path, 2)


def killed_writes(amounts: Amounts, place: Path) -> list[dict[str, Any]]:
    """Kills a process that writes two contents in turn; one of them must be there, whole."""
    found, draw = [], random.Random("writes")
    for label, (name, write) in WRITERS.items():
        whole, path = set[str](), place / label / name
        for seed in (1, 2):
            contents(seed), contents(9), results(seed)  # made here, not in each child
            reap([fork(partial(write, path, seed), place / "log")])
            whole.add(digest(path))
        counts: Counter[str] = Counter()

        for _ in progress(range(amounts.writes), f"killed writers of {label}"):
            pid = fork(partial(write_for_ever, write, path), place / "log")
            time.sleep(draw.uniform(0.02, 0.2))
            os.kill(pid, signal.SIGKILL)
            reap([pid])
            counts["intact"] += digest(path) in whole
            halves = [p for p in path.parent.iterdir() if p.name != name]
            counts["inside"] += bool(halves)
            for half in halves:
                shutil.rmtree(half) if half.is_dir() else half.unlink()
        found.append({"what": label, "kills": amounts.writes, **counts})
    return found


def full_disk(amounts: Amounts, place: Path) -> dict[str, int]:
    """Writes where there is room for a part only; the old file must stay, and be said to."""
    path, log = place / "full" / "x.safetensors", place / "log"
    write_checkpoint(path, 1)
    old, size, draw = digest(path), path.stat().st_size, random.Random("full")
    counts: Counter[str] = Counter(tried=amounts.full)

    def write_in(room: int) -> bool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            write_checkpoint(path, 2)
        except UnwritableError:
            return True
        return False

    for _ in range(amounts.full):
        counts["told"] += reap([fork(partial(write_in, draw.randrange(size)), log)]) == [1]
        counts["intact"] += digest(path) == old and len(list(path.parent.iterdir())) == 1
    return dict(counts)


def damage(content: bytes, draw: random.Random) -> bytes:
    """Content with a flipped bit, often near the start, or cut short."""
    bad = bytearray(content)
    at = draw.randrange(min(2000, len(bad)) if draw.random() < 0.3 else len(bad))
    if draw.random() < 0.8:
        bad[at] ^= 1 << draw.randrange(8)
    else:
        del bad[at:]
    return bytes(bad)


def equal_states(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two states hold the same."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def read_checkpoint(path: Path) -> Any:
    """What a checkpoint holds."""
    found = load_checkpoint(path)
    return found.kind, found.info, found.theta, found.theta0 or {}


def same_checkpoint(ours: Any, theirs: Any) -> bool:
    """Whether two checkpoints hold the same."""
    return ours[:2] == theirs[:2] and all(map(equal_states, ours[2:], theirs[2:]))


def write_features(path: Path) -> None:
    """A file of the cache of features."""
    tensors = {"features": contents(1)["layer0"], "labels": torch.arange(256)}
    features._write(path, tensors)


def write_archive(path: Path) -> None:
    """A packed archive of noise and of text, like those of data sets."""
    draw = random.Random("archive")
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (("set/a.bin", draw.randbytes(20_000)), ("set/b.txt", b"line\n" * 2000)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def read_archive(path: Path) -> dict[str, bytes]:
    """What an archive unpacks to."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, Path(folder))
        return {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in Path(folder).rglob("*")
            if file.is_file()
        }


DAMAGED: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], Any], Any]] = {
    "checkpoints": (
        "x.safetensors",
        partial(write_checkpoint, seed=1),
        read_checkpoint,
        same_checkpoint,
    ),
    "kept features": ("f0.safetensors", write_features, features._read, equal_states),
    ".tgz archives": ("x.tgz", write_archive, read_archive, operator.eq),
}


def damaged(amounts: Amounts, place: Path) -> list[dict[str, Any]]:
    """Flips a bit of a file, or cuts it: it must be refused, or be what it was."""
    rows, draw = [], random.Random("damaged")
    for what, (name, write, read, same) in DAMAGED.items():
        path = place / what / name
        path.parent.mkdir()
        write(path)
        content, good = path.read_bytes(), read(path)
        tried = amounts.damages if what == "checkpoints" else amounts.other_damages
        counts: Counter[str] = Counter({"tried": tried, "refused": 0, "same": 0, "wrong": 0})
        for _ in progress(range(tried), f"damaged {what}"):
            path.write_bytes(damage(content, draw))
            try:
                found = read(path)
            except REFUSALS as error:
                counts["refused"] += what == "kept features" or path.name in str(error)
                continue
            counts["same" if same(good, found) else "wrong"] += 1
        rows.append({"what": what, **counts})
    return rows


def hostile(amounts: Amounts, place: Path) -> dict[str, Any]:
    """Reads hostile files."""
    outcome = read_all(range(amounts.hostile), write_seeds(place / "seeds"), jobs=2)
    counts = {name: outcome.counts[name] for name in ("read", "refused", "executed", "crashed")}
    return {
        "tried": amounts.hostile,
        **counts,
        "other_errors": outcome.counts["other error"],
        "beyond_bounds": outcome.counts["beyond bounds"],
        "families": outcome.families,
        "problems": outcome.problems[:20],
        "slowest_seconds": round(outcome.seconds, 2),
        "most_memory_mib": round(outcome.memory / 2**20),
    }


# --- world sizes


def gradients(args: Config, out: Path) -> None:
    """Writes the gradient of the first step of each task, and which pictures went into it."""
    if "RANK" in os.environ:
        ddp.run(functools.partial(_gradients, args, out))
    else:
        _gradients(args, out)


def _gradients(args: Config, out: Path) -> None:
    for mode, task, dtype in product(MODES, Run.of(args).tasks, (torch.float32, torch.float64)):
        encoder, _ = zeroshot_encoder(Run.of(args))
        tuned = linearized(encoder) if mode == "linear" else encoder
        classifier = ImageClassifier(tuned, classification_head(Run.of(args), task)).to(dtype)
        classifier.freeze_head()
        if mode == "linear":  # where tau is zero, its direction would not show
            with torch.no_grad():
                for parameter in (p for p in classifier.parameters() if p.requires_grad):
                    parameter.add_(torch.sign(parameter), alpha=0.01)
        model = wrap_ddp(classifier, torch.device("cpu"))
        pictures = Run.of(args).data.dataset(f"{task}Val").train
        plan = BatchPlan(len(pictures), 64, 1, 0)
        seen: list[str] = []

        def transform(
            picture: Any, tuned: Any = tuned, dtype: Any = dtype, seen: list[str] = seen
        ) -> Tensor:
            found: Tensor = tuned.train_preprocess(picture).to(dtype)
            seen.append(hashlib.sha256(found.numpy().tobytes()).hexdigest())
            return found

        shares = RankBatches(plan, 0, 1, ddp.rank(), ddp.world_size())
        batches = iter(train_loader(pictures, transform, shares, 0))
        step_gradients(model, plan, 0, batches, torch.device("cpu"))
        found = {n: p.grad for n, p in classifier.named_parameters() if p.grad is not None}
        name = f"{mode}-{task}-{str(dtype)[6:]}-{ddp.rank()}-of-{ddp.world_size()}.pt"
        torch.save({"gradients": found, "seen": seen}, out / name)


def world_sizes(amounts: Amounts, place: Path) -> list[dict[str, Any]]:
    """Compares the gradients, and the pictures, of two processes with those of one."""
    out = place / "gradients"
    out.mkdir()
    tasks = Run.of(Config()).tasks[: amounts.tasks]
    args = Config(tasks=tasks, save=str(place / "world"), cache_dir=str(place / "cache"))
    for world_size in (1, 2):
        codes = reap(fork_group(lambda: gradients(args, out), world_size, place / "log"))
        if any(codes):
            raise RuntimeError(f"gradients failed ({codes}):\n{(place / 'log').read_text()}")
    found = []
    for mode, dtype in product(MODES, ("float32", "float64")):
        worst, same = 0.0, True
        for task in tasks:
            read = {
                (r, n): torch.load(out / f"{mode}-{task}-{dtype}-{r}-of-{n}.pt")
                for r, n in ((0, 1), (0, 2), (1, 2))
            }
            one = read[0, 1]["gradients"]
            for rank in (0, 1):
                two = read[rank, 2]["gradients"]
                same &= one.keys() == two.keys()
                off = sum(float((one[n] - two[n]).double().square().sum()) for n in one)
                size = sum(float(one[n].double().square().sum()) for n in one)
                worst = max(worst, (off / size) ** 0.5)
            both = read[0, 2]["seen"] + read[1, 2]["seen"]
            same &= sorted(both) == sorted(read[0, 1]["seen"]) and len(both) == 64
        found.append(
            {
                "mode": mode,
                "dtype": dtype,
                "tasks": len(tasks),
                "same_pictures": same,
                "worst_relative_distance": worst,
            }
        )
    return found


# --- all of it


def table(facts: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows: list[list[str]] = []
    kinds = {
        "kills": "SIGKILL of a process of a run",
        "ends": "SIGKILL between the checkpoint and the end",
        "signals": "SIGTERM to all",
    }
    for kind, label in kinds.items():
        for run in facts[kind]:
            processes = "process" if run["world_size"] == 1 else "processes"
            how = ", by the command" if run["how"] == "command" else ""
            rows.append(
                [
                    f"{label}, {run['mode']}, {run['world_size']} {processes}{how}",
                    str(run["hits"]),
                    f"{'the checkpoint there' if kind == 'ends' else 'a state to continue'} after "
                    f"{run['continued']}; {run['identical']} of "
                    f"{run['trials']} runs ended in identical weights; "
                    f"{run['leftovers']} left files, {run['outlived']} left processes; "
                    f"all ended within {run['slowest_end_seconds']} s",
                ]
            )
    rows += [
        [
            f"SIGKILL of writers of {w['what']}",
            str(w["kills"]),
            f"old or new whole: {w['intact']} (a half-written copy beside it: {w['inside']})",
        ]
        for w in facts["writes"]
    ]
    full, bad = facts["full_disk"], facts["hostile"]
    rows += [
        [
            f"{w['what']} with a flipped bit, or cut short",
            str(w["tried"]),
            f"refused: {w['refused']}; of no effect: {w['same']}; read wrongly: {w['wrong']}",
        ]
        for w in facts["damaged"]
    ]
    rows += [
        [
            "no room on the disk",
            str(full["tried"]),
            f"told: {full['told']}; old file intact, nothing else there: {full['intact']}",
        ],
        [
            "hostile and mutated files",
            str(bad["tried"]),
            f"executed: {bad['executed']}; crashed: {bad['crashed']}; other errors than ours: "
            f"{bad['other_errors']} (refused: {bad['refused']}; read as data: {bad['read']}); "
            f"at most {bad['slowest_seconds']} s and {bad['most_memory_mib']} MiB",
        ],
    ]
    rows += [
        [
            f"gradients of 2 processes against 1, {w['mode']}, {w['dtype']}",
            f"{w['tasks']} tasks",
            f"{'same' if w['same_pictures'] else 'OTHER'} pictures; distance, relative, at most "
            f"{w['worst_relative_distance']:.1e}",
        ]
        for w in facts["world_sizes"]
    ]
    return markdown_table(["fault", "tried", "outcome"], rows)


PARTS: dict[str, Callable[[Amounts, Path], Any]] = {
    "runs": interrupted,
    "writes": killed_writes,
    "world_sizes": world_sizes,
    "full_disk": full_disk,
    "damaged": damaged,
    "hostile": hostile,
}


def inject(amounts: Amounts, names: Sequence[str]) -> dict[str, Any]:
    """The figures of these parts, and where each comes from."""
    facts: dict[str, Any] = {"provenance": {}}
    for name in names:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            found = PARTS[name](amounts, Path(place))
        facts |= found if name == "runs" else {name: found}
        facts["provenance"][name] = {
            "command": "python scripts/fault_injection.py",
            "commit": git_commit(),
            "versions": versions(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "seconds": round(time.monotonic() - start),
        }
    facts["task"], facts["epochs"] = TASK, amounts.epochs
    return facts


def problems(facts: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found = []
    for run in facts["kills"] + facts["ends"] + facts["signals"]:
        bad = run["failed"] + run["leftovers"] + run["outlived"]
        if bad or run["identical"] != run["trials"]:
            found.append(f"runs: {run}")
    found += [f"writes: {w}" for w in facts["writes"] if w["intact"] != w["kills"]]
    full, bad = facts["full_disk"], facts["hostile"]
    if not full["tried"] == full["told"] == full["intact"]:
        found.append(f"full disk: {full}")
    found += [
        f"damaged: {w}"
        for w in facts["damaged"]
        if w["wrong"] or w["refused"] + w["same"] != w["tried"]
    ]
    if bad["executed"] + bad["crashed"] + bad["other_errors"] + bad.get("beyond_bounds", 0):
        found.append(f"hostile: {bad}")
    for w in facts["world_sizes"]:
        limit = 1e-5 if w["dtype"] == "float32" else 1e-12
        if not (w["same_pictures"] and w["worst_relative_distance"] < limit):
            found.append(f"world sizes: {w}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="a short form, which writes nothing")
    options = parser.parse_args(argv)
    if wrong := set(options.parts) - PARTS.keys():
        parser.error(f"unknown parts {sorted(wrong)}; choose from {', '.join(PARTS)}")
    torch.set_num_threads(1)  # a process with threads cannot be forked
    tqdm.monitor_interval = 0
    facts = inject(QUICK if options.quick else Amounts(), options.parts or list(PARTS))
    if options.parts:
        kept = json.loads(RESULTS.read_text(encoding="utf-8"))
        facts = {**kept, **facts, "provenance": {**kept["provenance"], **facts["provenance"]}}
    text = table(facts)
    print(text)
    if not options.quick:
        write_text(RESULTS, json.dumps(facts, indent=2) + "\n")
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
        write_text(PAGE, f"{before}{START}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
    found = problems(facts)
    print(*found, sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
