from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from src import ddp
from src.args import Config
from src.errors import RunError, UsageError
from tests.processes import children, ended, wait_for

SPAWN = """
import sys
from src import ddp
from src.args import Config
from tests.test_ddp import wait_long
ddp.run(wait_long, Config(save=sys.argv[1], world_size=2, port=12431))
"""


def _note(args: Any) -> None:
    (Path(args.save) / str(ddp.rank())).write_text(str(os.getpid()))
    ddp.barrier()


def pids(folder: Path) -> list[int]:
    return [int((folder / name).read_text()) for name in ("0", "1")]


def killed(args: Any) -> None:
    """Rank 1 is killed while rank 0 waits for it."""
    _note(args)
    if ddp.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ddp.barrier()


def failing(args: Any) -> None:
    """Rank 1 fails while rank 0 waits for it."""
    _note(args)
    if ddp.rank() == 1:
        raise ZeroDivisionError("of all things")
    ddp.barrier()


def deaf(args: Any) -> None:
    """Rank 1 fails while rank 0 does not hear SIGTERM."""
    _note(args)
    if ddp.rank() == 1:
        raise UsageError("no such thing")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def leaving(args: Any) -> None:
    """Rank 1 ends with a code of its own."""
    _note(args)
    if ddp.rank() == 1:
        os._exit(3)
    ddp.barrier()


def wait_long(args: Any) -> None:
    """Waits until it is ended."""
    _note(args)
    time.sleep(600)


def agreeing(args: Any) -> None:
    """What the processes tell one another."""
    assert ddp.any_of(ddp.rank() == 1, False, True) == [True, False, True]
    assert ddp.all_agree(f"rank {ddp.rank()}") == "rank 0"


def test_processes_tell_one_another() -> None:
    assert ddp.any_of(True, False) == [True, False] and ddp.all_agree(7) == 7
    ddp.run(agreeing, Config(world_size=2, port=12421))


@pytest.mark.parametrize(
    ("work", "kind", "message"),
    [
        (killed, RunError, r"rank 1 was killed \(SIGKILL, out of memory perhaps\).*continues it"),
        pytest.param(
            failing,
            RunError,
            r"rank 1 failed:(.|\n)*ZeroDivisionError: of all things",
            marks=pytest.mark.slow,
        ),
        pytest.param(leaving, RunError, r"ended with code 3|rank 0 failed", marks=pytest.mark.slow),
        pytest.param(deaf, UsageError, r"^no such thing$", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_ends_early_ends_the_run_and_its_cause_is_told(
    work: Any, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ddp, "GRACE", 2.0)
    start = time.monotonic()
    with pytest.raises(kind, match=message):
        ddp.run(work, Config(save=str(tmp_path), world_size=2, port=12422))
    assert time.monotonic() - start < 60
    assert all(ended(pid) for pid in pids(tmp_path))


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_processes_end_with_the_one_that_started_them(
    signum: int, code: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SPAWN, str(tmp_path)]
    with subprocess.Popen(command, start_new_session=True) as starter:
        wait_for(lambda: all((tmp_path / name).is_file() for name in ("0", "1")))
        wait_for(lambda: all((tmp_path / name).read_text() for name in ("0", "1")))
        assert set(pids(tmp_path)) <= set(children(starter.pid))
        starter.send_signal(signum)
        assert starter.wait(timeout=60) == code
    wait_for(lambda: all(ended(pid) for pid in pids(tmp_path)), seconds=10)
