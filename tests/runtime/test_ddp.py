from __future__ import annotations

import datetime
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import RunError, UsageError
from tests.processes import children, ended, wait_for

SPAWN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells disable it in background jobs
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.runtime.ddp import free_port
from tangent_arithmetic.runtime.errors import entry_point
from tests.runtime.test_ddp import wait_long

@entry_point
def main(argv=None):
    start(wait_long, Config(save=sys.argv[1], world_size=int(sys.argv[2]), port=free_port(0)))
    return 0

raise SystemExit(main())
"""
GROUP = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}  # set by torchrun


def slow(*values: Any) -> Any:
    """A case that only CI runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def _note(args: Any) -> None:
    (Path(args.config.save) / str(ddp.rank())).write_text(str(os.getpid()))
    ddp.barrier()


def pids(folder: Path) -> list[int]:
    return [int((folder / name).read_text()) for name in ("0", "1")]


def killed(args: Any) -> None:
    """Rank 1 is killed while rank 0 waits for it; before, the ranks exchange values."""
    assert ddp.any_of(ddp.rank() == 1, False, True) == [True, False, True]
    assert ddp.broadcast(f"rank {ddp.rank()}") == "rank 0"
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
    """Rank 1 fails while rank 0 ignores SIGTERM."""
    _note(args)
    if ddp.rank() == 1:
        raise UsageError("no such thing")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def leaving(args: Any) -> None:
    """Rank 1 exits with code 3."""
    _note(args)
    if ddp.rank() == 1:
        os._exit(3)
    ddp.barrier()


def wait_long(args: Any) -> None:
    """Waits until it is terminated."""
    _note(args)
    time.sleep(600)


def test_a_single_process_agrees_with_itself() -> None:
    assert ddp.any_of(True, False) == [True, False] and ddp.broadcast(7) == 7


@pytest.mark.parametrize(
    ("work", "kind", "message"),
    [
        (killed, RunError, r"rank 1 was killed \(SIGKILL, possibly out of memory\).*resumes it"),
        slow(failing, RunError, r"rank 1 failed:(.|\n)*ZeroDivisionError: of all things"),
        slow(leaving, RunError, r"exited with code 3|rank 0 failed"),
        slow(deaf, UsageError, r"^no such thing$"),
    ],
)
def test_a_failed_process_ends_the_run_with_its_cause(
    work: Any, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ddp, "GRACE", 2.0)
    begin = time.monotonic()
    with pytest.raises(kind, match=message):
        start(work, Config(save=str(tmp_path), world_size=2, port=12422))
    assert time.monotonic() - begin < 60
    assert all(ended(pid) for pid in pids(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_processes_end_with_their_parent(signum: int, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SPAWN, str(tmp_path), "2"]
    with subprocess.Popen(command, start_new_session=True) as starter:
        wait_for(lambda: all((tmp_path / name).is_file() for name in ("0", "1")))
        wait_for(lambda: all((tmp_path / name).read_text() for name in ("0", "1")))
        assert set(pids(tmp_path)) <= set(children(starter.pid))
        starter.send_signal(signum)
        assert starter.wait(timeout=60) == code
    wait_for(lambda: all(ended(pid) for pid in pids(tmp_path)), seconds=10)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize(
    ("size", "when", "message"),
    [
        (1, "at work", "interrupted"),
        (2, "at work", "stopped by SIGINT"),
        (2, "importing", "stopped by SIGINT"),
        ("torchrun", "at work", "interrupted"),
    ],
)
def test_ctrl_c_prints_one_line_and_exits_with_130(
    size: int | str, when: str, message: str, tmp_path: Path
) -> None:
    group = {**GROUP, "MASTER_PORT": str(ddp.free_port(0))} if size == "torchrun" else {}
    count = 2 if size == 2 else 1
    started = subprocess.Popen(
        [sys.executable, "-c", SPAWN, str(tmp_path), str(count)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **group},
    )
    with started as starter:
        if when == "at work":
            files = [tmp_path / str(rank) for rank in range(count)]
            wait_for(lambda: all(file.is_file() and file.read_text() for file in files))
        else:  # the tracker of resources, and both
            wait_for(lambda: len(children(starter.pid)) == 3)
            time.sleep(1)  # of several that they import for
        os.killpg(starter.pid, signal.SIGINT)  # as a terminal does: to all
        told = starter.communicate(timeout=60)[1]
        assert (starter.returncode, told) == (130, f"{message}\n")


IMPORTING = """
import importlib.abc, runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
class Waits(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == 'torch':
            print('importing', flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Waits())
sys.argv = ['src/finetune.py', '--finetuning-mode=linear']
runpy.run_path('src/finetune.py', run_name='__main__')
"""


@pytest.mark.parametrize("when", [0.0, 0.2])
def test_ctrl_c_during_imports_prints_one_line(when: float) -> None:
    script = subprocess.Popen(
        [sys.executable, "-c", IMPORTING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    with script:
        assert script.stdout is not None and script.stdout.readline() == "importing\n"
        time.sleep(when)
        script.send_signal(signal.SIGINT)
        stderr = script.communicate(timeout=60)[1]
        assert (script.returncode, stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("RANK", "x", "expected a whole number, got 'x'"),
        ("RANK", "-1", "expected at least 0, got -1"),
        ("RANK", "1", "expected at most 0, got 1"),
        ("WORLD_SIZE", "0", "expected at least 1, got 0"),
        ("WORLD_SIZE", "", "expected a whole number, got ''"),
        ("MASTER_PORT", "99999999", "expected at most 65535, got 99999999"),
        ("MASTER_PORT", None, "it is not set"),
        ("MASTER_ADDR", None, "it is not set"),
        ("LOCAL_RANK", "\x1b[31m", r"expected a whole number, got '\x1b[31m'"),
        ("LOCAL_WORLD_SIZE", "0", "expected at least 1, got 0"),
    ],
)
def test_invalid_environment_variables_are_named(
    name: str, text: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {**GROUP, "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(variable, value)
    if text is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match=re.escape(f"variable {name}: {message}")):
        start(_note, Config())
    assert not torch.distributed.is_initialized()


def test_a_failed_rendezvous_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddp, "MEETING", datetime.timedelta(seconds=1))
    port, threads = str(ddp.free_port(0)), torch.get_num_threads()
    for variable, value in {**GROUP, "RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": port}.items():
        monkeypatch.setenv(variable, value)
    try:
        with pytest.raises(RunError, match=f"rank 1 of 2 could not connect .* 127.0.0.1:{port} "):
            start(_note, Config())
    finally:
        torch.set_num_threads(threads)


def test_settings_are_checked_before_processes_are_started() -> None:
    for wrong in (Config(port=99_999_999, world_size=2), Config(world_size=0), Config(seed=-1)):
        with pytest.raises(UsageError, match=r"^--(port|world-size|seed): expected at"):
            start(_note, wrong)
