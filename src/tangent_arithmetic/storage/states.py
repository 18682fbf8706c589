"""The state of a run under way, kept so that the same command continues it exactly.

A state is a checkpoint file (see `storage/checkpoints.py`) with everything that the steps to come
depend on: weights, buffers, what the optimizer remembers, the number of steps done. The states of
one run lie in a folder of their own, which one process at a time may use.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tangent_arithmetic.runtime.atomic import remove_parts
from tangent_arithmetic.runtime.errors import UnwritableError, UsageError, shown
from tangent_arithmetic.runtime.processes import fcntl
from tangent_arithmetic.storage.checkpoints import STATE, read_checkpoint, save_tensors
from tangent_arithmetic.storage.statedict import copy_into

logger = logging.getLogger(__name__)

KEPT = 2
SHARE = 0.02  # of a run's time that keeping states may take
LEAST_SECONDS = 10.0  # between two states, however little one costs
BYTES_A_SECOND = 200e6  # what a disk is taken to write, until it has been seen


@dataclass(frozen=True)
class State:
    """A state as it was read.

    Attributes:
        tensors: by name, see `pack`.
        done: steps, or epochs, that are behind it.
        facts: what else the run wanted to keep.
    """

    tensors: dict[str, Tensor]
    done: int
    facts: dict[str, Any]


class RunStates:
    """The states of one run.

    Args:
        checkpoint: the file that the run will end in; the states are in a folder beside it.
        made: everything that the run's result depends on, JSON-serialisable; the state of a run
            that depends on something else is neither continued nor replaced.
        every: steps (or epochs) between two states; 0 or less for none, None for as often as takes
            at most `SHARE` of the time.
        flag: the flag that starts the run anew, if its command has one.
    """

    def __init__(
        self,
        checkpoint: Path,
        made: Mapping[str, Any],
        every: int | None = None,
        flag: str | None = None,
    ) -> None:
        self.checkpoint, self.every = checkpoint, every
        self.folder = checkpoint.with_name(f"{checkpoint.stem}_resume")
        self.made = json.loads(json.dumps(made))
        self.anew = f"deleting {self.folder}" + (f" ({flag} does that)" if flag else "")
        self._kept: list[Path] = []  # of this run, in the order of their steps
        self._cost = 0.0
        self._last = time.monotonic()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out during the block; the lock ends with this process at the latest.

        Raises:
            UsageError: if another run is at work here.
        """
        handle = self._lock()
        _HELD.add(handle)
        try:
            yield
        finally:
            if self._owns(handle):
                self._lock_path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there are states in it, or it is gone
                self.folder.rmdir()
            _HELD.discard(handle)
            os.close(handle)

    @property
    def _lock_path(self) -> Path:
        return self.folder / "lock"

    def _owns(self, handle: int) -> bool:
        """Whether a lock is on the file that is there, not on one that was removed."""
        try:
            return os.path.samestat(os.fstat(handle), self._lock_path.stat())
        except FileNotFoundError:
            return False

    def _lock(self) -> int:
        path = self._lock_path
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # its owner has just removed the folder
                continue
            if fcntl is None:
                return handle
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(handle, 200).decode(errors="replace")
                os.close(handle)
                raise UsageError(
                    f"another run ({owner or 'just started'}) is making {self.checkpoint}; wait "
                    "for it, or name another folder with --save"
                ) from None
            except OSError as error:  # a file system without locks
                logger.warning("%s cannot be locked (%s); start no second run", path, error)
                return handle
            if self._owns(handle):
                os.truncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
            os.close(handle)

    def due(self, done: int) -> bool:
        """Whether it is time for a state after `done` steps."""
        if self.every is not None:
            return self.every > 0 and done % self.every == 0
        pause = max(LEAST_SECONDS, self._cost / SHARE)
        return time.monotonic() - self._last >= pause

    def expect(self, size: int) -> None:
        """Tells the size of a state in bytes: its cost is estimated until one is written."""
        self._cost, self._last = size / BYTES_A_SECOND, time.monotonic()

    def save(self, tensors: Mapping[str, Tensor], done: int, facts: Mapping[str, Any]) -> bool:
        """Writes a state; the newest `KEPT` stay. A disk that is full is warned of, no more.

        Returns:
            Whether it was written.
        """
        start = time.monotonic()
        path = self.folder / f"{done:08d}.safetensors"
        info = {"made": self.made, "done": done, "facts": dict(facts)}
        try:
            save_tensors(path, dict(tensors), STATE, info=info)
        except UnwritableError as error:
            logger.warning("the state of the run is not kept: %s", error)
            self._last = time.monotonic()
            return False
        self._kept = [*(p for p in self._kept if p != path), path][-KEPT:]
        for other in self.folder.glob("*.safetensors"):
            if other not in self._kept:
                other.unlink(missing_ok=True)
        remove_parts(self.folder)
        self._last = time.monotonic()
        self._cost = self._last - start
        return True

    def newest(self) -> State | None:
        """The newest state of this run that can be read; None if there is none.

        Raises:
            UsageError: if it is of a run with other settings, naming what differs. It is kept.
        """
        for path in sorted(self.folder.glob("*.safetensors"), reverse=True):
            try:
                found = read_checkpoint(path)
                if found is None or found.kind != STATE:
                    raise UsageError(f"{path} is not a resume state")
                made, done, facts = (found.info[key] for key in ("made", "done", "facts"))
            except UsageError as error:
                logger.warning("%s; the state before it is taken", error)
                continue
            except KeyError as error:
                logger.warning("%s lacks %s; the state before it is taken", path, error)
                continue
            if differ := differences(made, self.made):
                raise UsageError(
                    f"{path} is the state of an interrupted run that was started otherwise: "
                    f"{'; '.join(differ)}. Run it again as it was started to continue it, name "
                    f"another folder, or start anew by {self.anew}"
                )
            self._kept = [path]
            return State(found.theta, done, facts)
        return None

    def clear(self) -> None:
        """Removes the states, so that the run starts anew; a lock on them stays."""
        for path in self.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the states, and what killed runs left half written of them and their result."""
        shutil.rmtree(self.folder, ignore_errors=True)
        remove_parts(self.checkpoint.parent, self.checkpoint.name)

    def clean_up(self) -> None:
        """Removes what a run left that was killed after it had written its checkpoint."""
        remove_parts(self.checkpoint.parent, self.checkpoint.name)
        if self.folder.is_dir():
            with contextlib.suppress(UsageError), self.locked():  # else that run is about to
                self.remove()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two records of how something was made, in words.

    Args:
        found: how it was made.
        wanted: how it would be made now.
    """
    differ = []
    for name in sorted(found.keys() | wanted.keys()):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            differ += [f"{name} {inner}" for inner in differences(old, new)]
        elif old != new:
            differ.append(f"{name} was {_brief(old)}, is now {_brief(new)}")
    return differ


def _brief(value: Any) -> str:
    """A value for a message; of a hash its first digits."""
    digits = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if digits else "not recorded" if value is None else shown(value)


_HELD: set[int] = set()  # locks of this process; its children, workers for instance, own none


def _close_in_child() -> None:
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def pack(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What training changes: trainable parameters, buffers, what the optimizer keeps of each."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found: dict[str, Tensor] = {f"params/{name}": p.detach() for name, p in trained.items()}
    found |= {f"buffers/{name}": b for name, b in model.named_buffers()}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    return found


def unpack(tensors: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    """Puts back what `pack` gave, in place.

    Args:
        tensors: of a model and an optimizer made in the same way.
        model: gets its parameters and buffers.
        optimizer: gets its memory; its settings stay.
    """
    own: dict[str, Tensor] = {}
    own |= {f"params/{n}": p for n, p in model.named_parameters() if p.requires_grad}
    own |= {f"buffers/{n}": b for n, b in model.named_buffers()}
    copy_into(own, {n: v for n, v in tensors.items() if not n.startswith("optimizer/")}, "state")
    memory: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, key, parameter = name.split("/", 2)
            memory.setdefault(f"params/{parameter}", {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    order = {id(p): name for name, p in own.items()}
    names = [order[id(p)] for group in optimizer.param_groups for p in group["params"]]
    kept = {i: memory[name] for i, name in enumerate(names) if name in memory}
    optimizer.load_state_dict({"state": kept, "param_groups": groups})
