"""Process groups: one process, processes started here (`--world-size`), or torchrun's."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import logging
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tangent_arithmetic.runtime.errors import RunError, UsageError, shown, system_failure
from tangent_arithmetic.runtime.processes import (
    Stopped,
    deferred_signals,
    die_with_parent,
    ignore_interrupts,
    interrupts_blocked,
)
from tangent_arithmetic.runtime.ranges import number

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

TIMEOUT = datetime.timedelta(hours=2)  # other ranks wait while rank 0 generates data or writes
MEETING = datetime.timedelta(minutes=10)  # for all ranks to join
GRACE = 10.0  # seconds for the other processes to end after one has failed
TEXT = 15_000  # characters of an error that fit into a pipe without a reader


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes in the group; 1 without a group."""
    return dist.get_world_size() if _in_group() else 1


def rank() -> int:
    """Rank of this process; 0 without a group."""
    return dist.get_rank() if _in_group() else 0


def local_rank() -> int:
    """Rank of this process on its machine."""
    return _variable("LOCAL_RANK", 0, None, rank())


def local_world_size() -> int:
    """Number of processes in the group on this machine."""
    return _variable("LOCAL_WORLD_SIZE", 1, None, world_size())


def _variable(name: str, least: int, most: int | None, default: int | None = None) -> int:
    """The integer value of an environment variable that torchrun sets.

    Raises:
        UsageError: if it is not an integer in the range, or not set and without a default.
    """
    text = os.environ.get(name)
    try:
        if text is not None:
            return int(number(int, least, most)(text))
        reason = "it is not set"
    except argparse.ArgumentTypeError as error:
        reason = str(error)
    if text is None and default is not None:
        return default
    raise UsageError(
        f"environment variable {name}: {reason}; start with torchrun, or unset RANK and WORLD_SIZE "
        "to run without it"
    )


def is_main_process() -> bool:
    """Whether this process is rank 0, the one that writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Waits for all processes."""
    if world_size() > 1:
        dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """The sum over all processes, on every process; in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(value: Value) -> list[Value]:
    """The values of all processes, by rank, on every process; any picklable CPU object."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def any_of(*flags: bool, device: torch.device | None = None) -> list[bool]:
    """For each flag, whether it is set on any process; on every process.

    Args:
        *flags: the flags of this process.
        device: the model's device; nccl requires it.
    """
    if world_size() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def broadcast(value: Value) -> Value:
    """The value of rank 0, on every process; any picklable CPU object."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def setup_ddp(rank: int, world_size: int, port: int = 12357) -> None:
    """Joins a process group on this machine: nccl if each rank has a CUDA device, else gloo.

    Args:
        rank: rank of this process.
        world_size: number of processes.
        port: TCP port of rank 0.
    """
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    _join(rank, world_size)


def _join(rank: int | None = None, world_size: int | None = None) -> None:
    if rank is None or world_size is None:  # set by torchrun
        world_size = _variable("WORLD_SIZE", 1, None)
        rank = _variable("RANK", 0, world_size - 1)
    host, port = os.environ.get("MASTER_ADDR", ""), _variable("MASTER_PORT", 1, 65_535)
    if not host:
        raise UsageError("environment variable MASTER_ADDR: it is not set; start with torchrun")
    local = _variable("LOCAL_RANK", 0, None, 0)
    needed = max(local + 1, _variable("LOCAL_WORLD_SIZE", 1, None, 1))  # devices; all ranks agree
    backend = "gloo"
    if torch.cuda.is_available() and torch.cuda.device_count() >= needed:
        backend = "nccl"
        torch.cuda.set_device(local)
    else:  # divide the cores among the processes on this machine
        on_this_machine = _variable("LOCAL_WORLD_SIZE", 1, None, world_size)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_this_machine))
    try:
        store, rank, world_size = next(dist.rendezvous("env://", rank, world_size, timeout=MEETING))
        store.set_timeout(TIMEOUT)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(
            f"rank {rank} of {world_size} could not connect to the other processes at "
            f"{shown(host)}:{port} ({shown(error, 300)}); check MASTER_ADDR, MASTER_PORT, RANK and "
            "WORLD_SIZE, and that each rank is one process"
        ) from error


def cleanup_ddp() -> None:
    """Leaves the process group."""
    if _in_group():
        dist.destroy_process_group()


def free_port(wanted: int) -> int:
    """The port `wanted` if it is free, else another free port; 0 for any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    if wanted not in (0, port):
        logger.warning("port %d is in use; using port %d", wanted, port)
    return port


def _member(
    work: Callable[[], None], join: Callable[[], None], errors: Connection | None = None
) -> None:
    """Joins a group with `join()`, then calls `work()`.

    An error is sent through the pipe `errors` before the other processes notice this one's end.
    """
    try:
        join()
        work()
        barrier()
    except Exception as error:
        if errors is not None:
            if isinstance(error, OSError) and not isinstance(error, UsageError):
                error = system_failure(error)
            mistake = isinstance(error, UsageError)
            known = mistake or isinstance(error, RunError)
            text = str(error) if known else traceback.format_exc()
            errors.send((time.time(), mistake, text[-TEXT:]))
            raise SystemExit(2 if mistake else 1) from None
        raise
    except KeyboardInterrupt:
        if errors is not None:
            raise SystemExit(128 + signal.SIGINT) from None
        raise
    finally:
        cleanup_ddp()


def _spawned(
    work: Callable[[], None], rank: int, world_size: int, port: int, errors: Connection
) -> None:
    ignore_interrupts()
    die_with_parent()
    _member(work, functools.partial(setup_ddp, rank, world_size, port), errors)


def run(work: Callable[[], None], world_size: int = 1, port: int = 12355) -> None:
    """Calls `work()` in every process of a run.

    Under torchrun this process is one of several; with a `world_size` above 1 they are started
    here; otherwise this process is the only one.

    Args:
        work: a picklable function, such as a module-level function or a `functools.partial` of one.
        world_size: number of processes to start on this machine.
        port: TCP port of rank 0.

    Raises:
        UsageError: if one of the processes raised it.
        RunError: if a process failed or was killed; all others have been ended.
        Stopped: if a signal stopped the run.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or ("RANK" in os.environ and "WORLD_SIZE" in os.environ):
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_parent()
        _member(work, _join)
    elif world_size > 1:
        if 0 < (devices := torch.cuda.device_count()) < world_size:
            logger.warning("%d processes share %d CUDA devices", world_size, devices)
        _spawn(work, world_size, port)
    else:
        work()


def _spawn(work: Callable[[], None], world_size: int, port: int) -> None:
    context, port = multiprocessing.get_context("spawn"), free_port(port)
    ranks: list[BaseProcess] = []
    pipes: list[Connection] = []

    def terminate(signum: int) -> None:
        for process in ranks:
            process.terminate()

    with deferred_signals(terminate) as stop_signal:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_spawned, args=(work, rank, world_size, port, theirs))
            with interrupts_blocked():
                process.start()
            theirs.close()
            ranks.append(process)
            pipes.append(ours)
        if stop_signal():
            terminate(stop_signal())
        try:
            failed = _wait(ranks)
        except KeyboardInterrupt:  # a second Ctrl-C
            for member in ranks:
                member.kill()
            raise
        if failed and stop_signal():
            raise Stopped(stop_signal())
    if failed:
        raise _cause(failed, pipes)


def _wait(processes: Sequence[BaseProcess]) -> dict[int, int]:
    """Waits for all processes; after one has failed, ends the others within `GRACE` seconds.

    Returns:
        The exit codes of the processes that failed by themselves, by rank.
    """
    alive = list(processes)
    while alive and not any(process.exitcode for process in processes):
        wait([process.sentinel for process in alive])
        alive = [process for process in alive if process.is_alive()]
    failed: dict[int, int] = {}
    for measure in (BaseProcess.terminate, BaseProcess.kill):
        deadline = time.monotonic() + GRACE
        for process in alive:
            process.join(max(0.0, deadline - time.monotonic()))
        if not failed:
            failed = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode}
        alive = [process for process in alive if process.is_alive()]
        for process in alive:
            measure(process)
    for process in alive:
        process.join()
    return failed


def _cause(failed: dict[int, int], pipes: Sequence[Connection]) -> BaseException:
    """The cause of a failed run: a process that was killed, else the first to fail."""
    for rank, code in failed.items():
        if code < 0:
            memory = ", possibly out of memory" if code == -signal.SIGKILL else ""
            return RunError(
                f"the process of rank {rank} was killed ({signal.Signals(-code).name}{memory}), "
                "which ended the run; the same command resumes it"
            )
    reports: list[tuple[float, int, bool, str]] = []
    for rank, pipe in enumerate(pipes):
        with contextlib.suppress(EOFError, OSError):
            if pipe.poll():
                when, mistake, text = pipe.recv()
                reports.append((when, rank, mistake, text))
    if reports:
        _, rank, mistake, text = min(reports)
        failure = f"the process of rank {rank} failed:\n{text}"
        return UsageError(text) if mistake else RunError(failure)
    rank, code = next(iter(failed.items()))
    if code > 128:  # see Stopped
        return Stopped(code - 128)
    return RunError(f"the process of rank {rank} exited with code {code}")
