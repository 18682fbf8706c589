"""Process groups: one process, processes that we start (`--world-size`), or torchrun's."""

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
    starting_deaf,
)
from tangent_arithmetic.runtime.ranges import number

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

TIMEOUT = datetime.timedelta(hours=2)  # other ranks wait while the first draws data or writes
MEETING = datetime.timedelta(minutes=10)  # until all have joined; they are started together
GRACE = 10.0  # seconds that the other processes have to end once one has failed
TEXT = 15_000  # characters of an error, which a pipe takes in without a reader


def world_size() -> int:
    """Number of processes of the group, 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process, 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_rank() -> int:
    """Rank of this process on its machine."""
    return _variable("LOCAL_RANK", 0, None, rank())


def local_world_size() -> int:
    """Number of processes of the group on this machine."""
    return _variable("LOCAL_WORLD_SIZE", 1, None, world_size())


def _variable(name: str, least: int, most: int | None, default: int | None = None) -> int:
    """An environment variable of a process group, which torchrun sets.

    Raises:
        UsageError: if it is not a whole number of the range, or not set and without a default.
    """
    text = os.environ.get(name)
    try:
        if text is not None:
            return int(number(int, least, most)(text))
        reason = "it is not set"
    except argparse.ArgumentTypeError as error:
        reason = str(error)
    except ValueError:
        reason = f"expected a whole number, got '{shown(text)}'"
    if text is None and default is not None:
        return default
    raise UsageError(
        f"environment variable {name}: {reason}; start with torchrun, or unset RANK and WORLD_SIZE "
        "for a run without it"
    )


def is_main_process() -> bool:
    """Whether this process is rank 0, which writes files, logs and prints."""
    return rank() == 0


def barrier() -> None:
    """Waits for all processes."""
    if world_size() > 1:
        dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """The sum over all processes, on every process."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(value: Answer) -> list[Answer]:
    """Every process's value, by rank, on every process; a CPU object of any kind."""
    found: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value)
    return found


def any_of(*questions: bool, device: torch.device | None = None) -> list[bool]:
    """For each question whether any process says yes, on every process.

    Args:
        *questions: the answers of this process.
        device: of the model; nccl talks on it alone.
    """
    if world_size() == 1:
        return list(questions)
    answers = torch.tensor(questions, dtype=torch.float32, device=device)
    dist.all_reduce(answers, op=dist.ReduceOp.MAX)
    return [bool(answer) for answer in answers.tolist()]


def all_agree(value: Answer) -> Answer:
    """The first process's answer, on every process."""
    if world_size() == 1:
        return value
    answer = [value]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def setup_ddp(rank: int, world_size: int, port: int = 12357) -> None:
    """Joins a process group on this machine: nccl where CUDA has a device a rank, else gloo.

    Args:
        rank: of this process.
        world_size: number of processes.
        port: where they meet.
    """
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    os.environ["LOCAL_RANK"] = str(rank)
    _join(rank, world_size)


def _join(rank: int | None = None, world_size: int | None = None) -> None:
    if rank is None or world_size is None:  # torchrun's variables say both
        world_size = _variable("WORLD_SIZE", 1, None)
        rank = _variable("RANK", 0, world_size - 1)
    host, port = os.environ.get("MASTER_ADDR", ""), _variable("MASTER_PORT", 1, 65_535)
    if not host:
        raise UsageError("environment variable MASTER_ADDR: it is not set; start with torchrun")
    local = _variable("LOCAL_RANK", 0, None, 0)
    nccl = torch.cuda.is_available() and torch.cuda.device_count() > local
    backend = "nccl" if nccl else "gloo"
    if nccl:
        torch.cuda.set_device(local)
    else:  # processes that share a machine's cores share its threads
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
            f"rank {rank} of {world_size} processes did not meet the others at "
            f"{shown(host)}:{port} ({shown(error, 300)}); see MASTER_ADDR, MASTER_PORT, RANK and "
            "WORLD_SIZE, each rank being one process"
        ) from error


def cleanup_ddp() -> None:
    """Leaves the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def free_port(wanted: int) -> int:
    """`wanted` if nobody listens there, else another free port; 0 wants any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
    if wanted not in (0, found):
        logger.warning("port %d is taken; the processes meet at %d", wanted, found)
    return found


def _member(
    work: Callable[[], None],
    join: Callable[[], None],
    told: Connection | None = None,
) -> None:
    """Runs one process of a group.

    Args:
        work: called once the process has joined.
        join: joins the group.
        told: where to tell of an error, before the others notice that this process leaves.
    """
    try:
        join()
        work()
        barrier()
    except Exception as error:
        if told is not None:
            if isinstance(error, OSError) and not isinstance(error, UsageError):
                error = system_failure(error)
            mistake = isinstance(error, UsageError)
            whole = mistake or isinstance(error, RunError)
            text = str(error) if whole else traceback.format_exc()
            told.send((time.time(), mistake, text[-TEXT:]))
            raise SystemExit(2 if mistake else 1) from None
        raise
    except KeyboardInterrupt:
        if told is not None:
            raise SystemExit(128 + signal.SIGINT) from None
        raise
    finally:
        cleanup_ddp()


def _spawned(
    work: Callable[[], None], rank: int, world_size: int, port: int, told: Connection
) -> None:
    ignore_interrupts()
    die_with_parent()
    _member(work, functools.partial(setup_ddp, rank, world_size, port), told)


def run(work: Callable[[], None], world_size: int = 1, port: int = 12355) -> None:
    """Calls `work()` in every process of a run.

    Under torchrun this process is one of them; with a `world_size` above 1 they are started here;
    otherwise this process is all there is.

    Args:
        work: picklable, since other processes import it: a function at the top level of a module,
            or a `functools.partial` of one.
        world_size: processes to start on this machine.
        port: where they meet.

    Raises:
        UsageError: if that is what ended one of the processes.
        RunError: if one of them failed or was killed, with the cause; none is left.
        Stopped: if a signal asked the run to stop.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or ("RANK" in os.environ and "WORLD_SIZE" in os.environ):
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_parent()
        _member(work, _join)
    elif world_size > 1:
        _warn_of_shared_devices(world_size)
        _spawn(work, world_size, port)
    else:
        work()


def _spawn(work: Callable[[], None], world_size: int, port: int) -> None:
    context, port = multiprocessing.get_context("spawn"), free_port(port)
    ranks: list[BaseProcess] = []
    pipes: list[Connection] = []

    def ask(signum: int) -> None:
        for process in ranks:
            process.terminate()

    with deferred_signals(ask) as asked:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_spawned, args=(work, rank, world_size, port, theirs))
            with starting_deaf():
                process.start()
            theirs.close()
            ranks.append(process)
            pipes.append(ours)
        if asked():
            ask(asked())
        try:
            failed = _wait(ranks)
        except KeyboardInterrupt:  # the second
            for member in ranks:
                member.kill()
            raise
        if failed and asked():
            raise Stopped(asked())
    if failed:
        raise _cause(failed, pipes)


def _wait(processes: Sequence[BaseProcess]) -> dict[int, int]:
    """Waits for all. Once one has failed, the others have `GRACE` seconds to end, and are ended.

    Returns:
        The exit codes of those that failed of themselves, by rank.
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
    """What ended a run: a process that was killed, else the first to fail."""
    for rank, code in failed.items():
        if code < 0:
            memory = ", out of memory perhaps" if code == -signal.SIGKILL else ""
            return RunError(
                f"the process of rank {rank} was killed ({signal.Signals(-code).name}{memory}), "
                "and with it the run; the same command continues it"
            )
    told: list[tuple[float, int, bool, str]] = []
    for rank, pipe in enumerate(pipes):
        with contextlib.suppress(EOFError, OSError):
            if pipe.poll():
                when, mistake, text = pipe.recv()
                told.append((when, rank, mistake, text))
    if told:
        _, rank, mistake, text = min(told)
        return (
            UsageError(text) if mistake else RunError(f"the process of rank {rank} failed:\n{text}")
        )
    rank, code = next(iter(failed.items()))
    if code > 128:  # see Stopped
        return Stopped(code - 128)
    return RunError(f"the process of rank {rank} ended with code {code}")


def _warn_of_shared_devices(world_size: int) -> None:
    devices = torch.cuda.device_count()
    if 0 < devices < world_size:
        logger.warning("%d processes share %d CUDA devices", world_size, devices)
