"""Resume states: with them the same command continues an interrupted run exactly.

A state is a checkpoint file with everything that the remaining steps depend on: weights, buffers,
the optimizer's state, the number of steps done. The states of a run are in a separate folder, which
one process at a time may use.
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

from tangent_arithmetic.runtime.atomic import as_json, remove_parts
from tangent_arithmetic.runtime.errors import UnwritableError, UsageError, shown
from tangent_arithmetic.runtime.processes import fcntl
from tangent_arithmetic.storage.checkpoints import STATE, read_checkpoint, save_tensors
from tangent_arithmetic.storage.statedict import copy_into

logger = logging.getLogger(__name__)

KEPT = 2  # states of a run
SHARE = 0.02  # of a run's time that writing states may take
LEAST_SECONDS = 10.0  # between two states, even if writing one is fast
BYTES_A_SECOND = 200e6  # a disk's assumed speed, until a state has been written


@dataclass(frozen=True)
class State:
    """A resume state as read from its file.

    Attributes:
        tensors: by name, see `pack`.
        done: steps, or epochs, done.
        facts: further facts of the run.
    """

    tensors: dict[str, Tensor]
    done: int
    facts: dict[str, Any]


class RunStates:
    """The states of one run.

    Args:
        checkpoint: the file that the run will write; the states are in a folder beside it.
        settings: everything that the run's result depends on, JSON-serialisable; a state with other
            settings is neither continued nor replaced.
        every: steps (or epochs) between two states; 0 or less for none, None for as often as takes
            at most `SHARE` of the time.
        flag: the flag that starts the run anew, if its command has one.
    """

    def __init__(
        self,
        checkpoint: Path,
        settings: Mapping[str, Any],
        every: int | None = None,
        flag: str | None = None,
    ) -> None:
        self.checkpoint, self.every, self.flag = checkpoint, every, flag
        self.folder = checkpoint.with_name(f"{checkpoint.stem}_resume")
        self.settings = _as_written(settings)
        self._lock_path = self.folder / "lock"
        self._kept: list[Path] = []  # of this run, in the order of their steps
        self._cost = 0.0
        self._last = time.monotonic()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the states for the block; the lock ends with this process at the latest.

        Raises:
            UsageError: if another run holds the lock.
        """
        handle = self._lock()
        _HELD.add(handle)
        try:
            yield
        finally:
            if self._owns(handle):
                self._lock_path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds states or does not exist
                self.folder.rmdir()
            _HELD.discard(handle)
            os.close(handle)

    def _owns(self, handle: int) -> bool:
        """Whether a lock is on the current lock file, not on a removed one."""
        try:
            return os.path.samestat(os.fstat(handle), self._lock_path.stat())
        except FileNotFoundError:
            return False

    def _lock(self) -> int:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
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
                logger.warning(
                    "%s cannot be locked (%s); start no second run", self._lock_path, error
                )
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
        """Estimates the cost of a state from its size in bytes, until one is written."""
        self._cost, self._last = size / BYTES_A_SECOND, time.monotonic()

    def save(self, tensors: Mapping[str, Tensor], done: int, facts: Mapping[str, Any]) -> bool:
        """Writes a state and removes all but the newest `KEPT`; warns if the disk is full.

        Returns:
            Whether it was written.
        """
        start = time.monotonic()
        path = self.folder / f"{done:08d}.safetensors"
        info = {"made": self.settings, "done": done, "facts": dict(facts)}
        try:
            save_tensors(path, dict(tensors), STATE, info=info)
        except UnwritableError as error:
            logger.warning("the state of the run was not saved: %s", error)
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
        """The newest readable state of this run, or None.

        Raises:
            UsageError: if its run had other settings, naming what differs. The state is kept.
        """
        for path in sorted(self.folder.glob("*.safetensors"), reverse=True):
            try:
                state = read_checkpoint(path)
                if state is None or state.kind != STATE:
                    raise UsageError(f"{path} is not a resume state")
                if missing := {"made", "done", "facts"} - state.info.keys():
                    raise UsageError(f"{path} lacks {', '.join(sorted(missing))}")
            except UsageError as error:
                logger.warning("%s; trying the state before it", error)
                continue
            if differ := differences(state.info["made"], self.settings):
                raise UsageError(
                    f"{path} is the state of an interrupted run with other settings: "
                    f"{'; '.join(differ)}. Use the same settings to continue it, name another "
                    f"folder, or start anew by deleting {self.folder}"
                    + (f" ({self.flag} does that)" if self.flag else "")
                )
            self._kept = [path]
            return State(state.theta, state.info["done"], state.info["facts"])
        return None

    def clear(self) -> None:
        """Removes the states but not the lock, so that the run starts anew."""
        for path in self.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the states, and the partial files that killed runs left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        remove_parts(self.checkpoint.parent, self.checkpoint.name)

    def clean_up(self) -> None:
        """Removes the files of a run that was killed after writing its checkpoint."""
        remove_parts(self.checkpoint.parent, self.checkpoint.name)
        if self.folder.is_dir():
            with contextlib.suppress(UsageError), self.locked():  # a live run cleans up itself
                self.remove()


def check_settings(
    path: Path,
    recorded: Mapping[str, Any],
    wanted: Mapping[str, Any],
    flag: str,
    how: str = "with other settings",
) -> None:
    """Checks that a finished file was made with the settings of this run.

    Args:
        path: the file.
        recorded: its settings; only the names in `wanted` are compared.
        wanted: the settings of this run.
        flag: the flag that names another folder.
        how: the difference in words, for the message.

    Raises:
        UsageError: naming what differs; the file stays.
    """
    if differ := differences({name: recorded.get(name) for name in wanted}, wanted):
        raise UsageError(
            f"{path} exists and was made {how} ({'; '.join(differ)}). Keep it and name another "
            f"folder with {flag}, or delete it"
        )


def differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The differences between recorded settings and those of this run, in words."""
    recorded, wanted = _as_written(recorded), _as_written(wanted)
    differ = []
    for name in sorted(recorded.keys() | wanted.keys()):
        old, new = recorded.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            differ += [f"{name} {inner}" for inner in differences(old, new)]
        elif old != new:
            differ.append(f"{name} was {_brief(old)}, is now {_brief(new)}")
    return differ


def _as_written(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are read from the file that holds them."""
    read: dict[str, Any] = json.loads(json.dumps(as_json(settings)))
    return read


def _brief(value: Any) -> str:
    """A value for a message; a hash shortened to its first digits."""
    digits = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if digits else "not recorded" if value is None else shown(value)


_HELD: set[int] = set()  # locks of this process; a forked child closes its copies


def _close_in_child() -> None:
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def pack(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything that training changes: trainable parameters, buffers, and the optimizer's state.

    The optimizer's tensors are named `optimizer/KEY/PARAMETER`, its Python numbers
    `number/KEY/PARAMETER`, and the numbers of its groups `group/INDEX/KEY`.

    Raises:
        TypeError: if an optimizer keeps something other than tensors and numbers.
    """
    packed = {name: value.detach() for name, value in _weights(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                packed[f"optimizer/{key}/{name}"] = value
            elif isinstance(value, int | float):
                packed[f"number/{key}/{name}"] = _exact(value)
            elif value is not None:
                raise TypeError(
                    f"expected a {type(optimizer).__name__} with tensors and numbers as its state, "
                    f"got {key}: {type(value).__name__}, which a resume state cannot hold"
                )
    for i, group in enumerate(optimizer.param_groups):
        numbers = {key: value for key, value in group.items() if isinstance(value, int | float)}
        packed |= {f"group/{i}/{key}": _exact(value) for key, value in numbers.items()}
    return packed


def unpack(tensors: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    """Restores a model and an optimizer in place.

    Args:
        tensors: the result of `pack` for a model and an optimizer of the same structure.
        model: gets its parameters and buffers.
        optimizer: gets its state, and the numbers of its groups.
    """
    weights, memory = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    numbers, groups = dict[tuple[str, str], Any](), optimizer.state_dict()["param_groups"]
    for name, value in tensors.items():
        kind, key, *rest = name.split("/", 2)
        if kind == "optimizer":
            memory.setdefault(rest[0], {})[key] = value
        elif kind == "number":
            numbers[rest[0], key] = value.item()
        elif kind == "group":
            groups[int(key)][rest[0]] = value.item()
        else:
            weights[name] = value
    copy_into(_weights(model), weights, "state")
    own = dict(model.named_parameters())
    names = {id(p): name for name, p in own.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {i: memory[name] for i, name in enumerate(order) if name in memory}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for (name, key), number in numbers.items():
        optimizer.state[own[name]][key] = number


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and all buffers, by their names in a state."""
    trained = {f"params/{n}": p for n, p in model.named_parameters() if p.requires_grad}
    return {**trained, **{f"buffers/{n}": b for n, b in model.named_buffers()}}


def _exact(number: float) -> Tensor:
    """A Python number as a tensor whose `item()` is the same number."""
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)
