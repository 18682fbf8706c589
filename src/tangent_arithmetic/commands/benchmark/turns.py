"""Takes turns between variants, each in a process of its own, and times every turn."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tangent_arithmetic.commands.benchmark.subjects import SUBJECTS, Settings
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.peaks import forget_peak, peak_bytes


def _peak_bytes(device: str) -> int:
    """Peak memory: of the device if it has its own, else of this process."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return peak_bytes()


def _synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def _serve(pipe: Connection, subject: str, variant: str, settings: Settings, folder: Path) -> None:
    """Runs turns on request and sends back the seconds they took."""
    turns = SUBJECTS[subject].variants[variant](settings, folder)
    forget_peak()
    pipe.send(list(turns))
    while (name := pipe.recv()) is not None:
        if name == "memory":
            pipe.send(_peak_bytes(settings.device))
            continue
        _synchronize(settings.device)
        start = time.perf_counter()
        turns[name]()
        _synchronize(settings.device)
        pipe.send(time.perf_counter() - start)


def _receive(pipe: Connection, name: str) -> Any:
    """An answer of a variant's process."""
    try:
        return pipe.recv()
    except EOFError as error:
        raise UsageError(f"{name}: its process has ended, see its message above") from error


def measure(
    subject: str, variants: list[str], settings: Settings, rounds: int, folder: Path
) -> dict[str, dict[str, list[float]]]:
    """Measures all variants; returns variant -> measure -> one value per round.

    Args:
        subject: step, sweep, directions, startup or data.
        variants: which of its variants.
        settings: the model and machine.
        rounds: turns of each variant after the warm-up.
        folder: for files.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
    try:
        measures: dict[str, list[str]] = {}
        for name in variants:
            pipes[name], theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, subject, name, settings, folder), daemon=False
            )
            process.start()
            theirs.close()
            processes.append(process)
            measures[name] = _receive(pipes[name], name)  # builds one at a time
        for what in dict.fromkeys(itertools.chain(*measures.values())):
            order = [name for name in variants if what in measures[name]]
            for turn in range(rounds + 1):
                first = turn % len(order)
                for name in order[first:] + order[:first]:
                    pipes[name].send(what)
                    seconds = _receive(pipes[name], name)
                    if turn > 0:
                        figures[name].setdefault(what, []).append(seconds)
                    label = f"round {turn} of {rounds}" if turn else "warm-up"
                    print(f"{name}, {what}, {label}: {seconds:.2f} s", file=sys.stderr, flush=True)
            for name in order if what in ("step", "blocks") else ():
                pipes[name].send("memory")
                figures[name]["memory"] = [_receive(pipes[name], name) / 2**30]
    finally:
        for pipe in pipes.values():
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()
    return figures
