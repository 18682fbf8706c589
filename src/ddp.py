"""Process groups: one process, processes that we start (`--world-size`), or torchrun's."""

from __future__ import annotations

import datetime
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from src.errors import UsageError

logger = logging.getLogger(__name__)

TIMEOUT = datetime.timedelta(hours=2)  # other ranks wait while the first draws data or writes


def world_size() -> int:
    """Number of processes of the group, 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process, 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_rank() -> int:
    """Rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def local_world_size() -> int:
    """Number of processes of the group on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main_process() -> bool:
    """Whether this process writes files and talks."""
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


def all_agree(value: bool) -> bool:
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
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    os.environ["LOCAL_RANK"] = str(rank)
    _join(rank, world_size)


def _join(rank: int | None = None, world_size: int | None = None) -> None:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    nccl = torch.cuda.is_available() and torch.cuda.device_count() > local
    backend = "nccl" if nccl else "gloo"
    if nccl:
        torch.cuda.set_device(local)
    else:  # processes that share a machine's cores share its threads
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size or 1))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_this_machine))
    if rank is None or world_size is None:  # torchrun's variables say both
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT, rank=rank, world_size=world_size)


def cleanup_ddp() -> None:
    """Leaves the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def free_port(wanted: int) -> int:
    """`wanted` if nobody listens there, else another free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
            found: int = probe.getsockname()[1]
            logger.warning("port %d is taken; the processes meet at %d", wanted, found)
            return found
    return wanted


def _member(work: Callable[[Any], None], args: Any) -> None:
    """What each process of a group does once it has joined."""
    from src.logs import setup_logging

    setup_logging()
    try:
        work(args)
        barrier()
    finally:
        cleanup_ddp()


def _spawned(rank: int, work: Callable[[Any], None], args: Any, port: int, mistakes: Any) -> None:
    setup_ddp(rank, args.world_size, port)
    try:
        _member(work, args)
    except UsageError as error:  # the parent says it, once and without a trace
        mistakes.put(str(error))
        raise SystemExit(2) from error


def run(work: Callable[[Any], None], args: Any) -> None:
    """Calls `work(args)` in every process of the run.

    Under torchrun this process is one of them; with `args.world_size > 1` they are started here;
    otherwise this process is all there is.

    Args:
        work: a function at the top level of a module (other processes import it).
        args: settings.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or ("RANK" in os.environ and "WORLD_SIZE" in os.environ):
        _join()
        _member(work, args)
    elif args.world_size > 1:
        check_world_size(args)
        port = free_port(args.port)
        mistakes = torch.multiprocessing.get_context("spawn").SimpleQueue()
        try:
            torch.multiprocessing.spawn(
                _spawned, (work, args, port, mistakes), nprocs=args.world_size
            )
        except torch.multiprocessing.ProcessExitedException:
            if mistakes.empty():
                raise
            raise UsageError(mistakes.get()) from None
    else:
        work(args)


def check_world_size(args: Any) -> None:
    """Warns where processes share a device."""
    devices = torch.cuda.device_count()
    if 0 < devices < args.world_size:
        logger.warning("%d processes share %d CUDA devices", args.world_size, devices)
