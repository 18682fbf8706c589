from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tangent_arithmetic.runtime.processes import (
    Stopped,
    deferred_signals,
    ignore_interrupts,
    interrupts_blocked,
    prepare_worker,
)
from tests.processes import children, ended, wait_for

linux = pytest.mark.skipif(sys.platform != "linux", reason="prctl and /proc are Linux's")

LOADER = """
import sys, time
from tangent_arithmetic.data.loading import BatchPlan, RankBatches, iterating, train_loader

class Slow:
    def __len__(self):
        return 64
    def __getitem__(self, index):
        time.sleep(0.05)
        return index, 0

plan = BatchPlan(64, 1, 1, seed=0)
loader = train_loader(Slow(), None, RankBatches(plan, 0, 64, 0, 1), 2)
with iterating(loader) as batches:
    for i, batch in enumerate(batches):
        print(i, flush=True)
"""


def test_signals_are_noted_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    told: list[int] = []
    with deferred_signals(told.append) as asked:
        assert asked() == 0
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
        assert asked() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert told == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is before
    assert Stopped(signal.SIGTERM).code == 143


def test_other_threads_are_left_alone() -> None:
    found: list[int] = []

    def work() -> None:
        with deferred_signals() as asked:
            found.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0]


@linux
def test_a_process_that_starts_does_not_hear_ctrl_c() -> None:
    for _ in range(2):  # the first starts the tracker of resources, too
        process = multiprocessing.get_context("spawn").Process(target=ignore_interrupts)
        with interrupts_blocked():
            process.start()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@linux
def test_a_worker_of_an_evaluation_leaves_ctrl_c_to_its_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tangent_arithmetic.runtime.processes.die_with_parent", lambda: None)
    before = signal.getsignal(signal.SIGINT)
    try:
        prepare_worker(0)
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@linux
def test_workers_die_with_their_parent_but_not_of_signals_to_all(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"0\n"
        workers = children(owner.pid)
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
        lines = [owner.stdout.readline() for _ in range(20)]  # beyond what was fetched ahead
        assert lines[-1] == b"20\n" and not any(ended(worker) for worker in workers)
        owner.kill()
        owner.wait()
        wait_for(lambda: all(ended(worker) for worker in workers), seconds=10)


@linux
@pytest.mark.parametrize("end", ["break", "raise ZeroDivisionError"])
def test_workers_end_at_once_with_a_loop_that_is_left_early(end: str) -> None:
    code = LOADER.replace(
        "import sys, time", "import multiprocessing, os, signal, sys, time"
    ).replace(
        "        print(i, flush=True)",
        f"""        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
        {end}""",
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert (done.returncode, b"ZeroDivisionError" in done.stderr) == (
        (0, False) if end == "break" else (1, True)
    )
    assert time.monotonic() - start < 50  # of which nearly all is the import
