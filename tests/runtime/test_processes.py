from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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
import multiprocessing, os, signal, time
from tangent_arithmetic.data.loading import BatchPlan, RankBatches, train_loader
from tangent_arithmetic.data.waiting import iterating

class Slow:
    def __len__(self):
        return 64
    def __getitem__(self, index):
        time.sleep(0.05)
        return index, 0

def loader():
    return train_loader(Slow(), None, RankBatches(BatchPlan(64, 1, 1, seed=0), 0, 64, 0, 1), 2)

def leave_early(fail):
    with iterating(loader()) as batches:
        for batch in batches:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGTERM)
            if fail:
                raise ZeroDivisionError
            break

begin = time.monotonic()
leave_early(False)
try:
    leave_early(True)
except ZeroDivisionError:
    print(time.monotonic() - begin, flush=True)
with iterating(loader()) as batches:
    for i, batch in enumerate(batches):
        print(i, flush=True)
"""


def test_deferred_signals_are_recorded_and_handlers_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[int] = []
    with deferred_signals(seen.append) as received:
        assert received() == 0
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
        assert received() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert seen == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is before
    assert Stopped(signal.SIGTERM).code == 143


def test_other_threads_receive_no_signals() -> None:
    with ThreadPoolExecutor(1) as pool, deferred_signals() as received:
        assert pool.submit(lambda: deferred_signals().__enter__()()).result() == received() == 0


@linux
def test_a_starting_process_ignores_ctrl_c() -> None:
    for _ in range(2):  # the first also starts the resource tracker
        process = multiprocessing.get_context("spawn").Process(target=ignore_interrupts)
        with interrupts_blocked():
            process.start()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@linux
def test_data_loading_workers_ignore_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tangent_arithmetic.runtime.processes.die_with_parent", lambda: None)
    before = signal.getsignal(signal.SIGINT)
    try:
        prepare_worker(0)
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@linux
def test_workers_end_with_their_loop_or_parent_and_survive_signals_to_all() -> None:
    command = [sys.executable, "-c", LOADER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as owner:
        assert owner.stdout is not None
        assert float(owner.stdout.readline()) < 30  # less than the 60 s that a worker survives
        assert owner.stdout.readline() == b"0\n"
        workers = children(owner.pid)
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
        lines = [owner.stdout.readline() for _ in range(20)]  # more than was prefetched
        assert lines[-1] == b"20\n" and not any(ended(worker) for worker in workers)
        owner.kill()
        owner.wait()
        wait_for(lambda: all(ended(worker) for worker in workers), seconds=10)
