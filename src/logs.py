"""Logging, progress bars, W&B."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from src import ddp
from src.errors import UnwritableError, UsageError, printable, shown
from src.private import without_home
from src.processes import one_at_a_time

Item = TypeVar("Item")


class _Printable(logging.Formatter):
    """Messages as a terminal can safely show them: names from files may hold anything.

    A log may be kept in a file and shared, so that home folders are not named.
    """

    def format(self, record: logging.LogRecord) -> str:
        return printable(str(without_home(super().format(record))))


def setup_logging() -> None:
    """Sends this project's messages to stderr; other ranks than the first only warn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler])
    level = logging.INFO if ddp.is_main_process() else logging.WARNING
    for name in ("src", "__main__"):  # a script's own logger is named __main__
        logging.getLogger(name).setLevel(level)


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yields the items under a bar with ETA; no bar on other ranks or where stderr is a file."""
    quiet = not ddp.is_main_process() or not sys.stderr.isatty()
    with logging_redirect_tqdm():
        yield from tqdm(
            items, desc=shown(description), total=total, disable=quiet, dynamic_ncols=True
        )


@contextmanager
def byte_progress(description: str, total: int) -> Iterator[Callable[[int], Any]]:
    """Gives a function to call with the bytes done; shows a bar with bytes a second, as above."""
    quiet = not ddp.is_main_process() or not sys.stderr.isatty()
    with tqdm(desc=shown(description), total=total, unit="B", unit_scale=True, unit_divisor=1024,
              disable=quiet, dynamic_ncols=True) as bar:  # fmt: skip
        yield bar.update


def check_database(args: Any) -> None:
    """Checks that `--results-db`, if given, can be appended to; it is there afterwards.

    Raises:
        UnwritableError: if it cannot, or something else than a file is there.
    """
    from src.checkpoints import disk_errors
    from src.settings import setting

    if not (name := setting(args, "results_db")):
        return
    path = Path(name)
    with disk_errors(path):
        if path.exists() and not path.is_file():
            raise UnwritableError(path, "it exists and is no file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b"):
            pass


def append_result(args: Any, record: dict[str, Any]) -> None:
    """Appends one JSON line to `--results-db`, if given, without home folders.

    Many runs may do so at once. What a killed one left of a line ends there.

    Raises:
        UnwritableError: if it cannot be appended to.
    """
    from src.checkpoints import disk_errors
    from src.settings import setting

    if not (name := setting(args, "results_db")) or not ddp.is_main_process():
        return
    path = Path(name)
    line = json.dumps(without_home(record), sort_keys=True).encode() + b"\n"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file, one_at_a_time(path):
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            whole = size == 0 or file.read() == b"\n"
            file.write(line if whole else b"\n" + line)
            file.flush()


class Run:
    """A W&B run, or nothing: `log` does nothing where `--wandb` is not given."""

    def __init__(self, wandb_run: Any = None) -> None:
        self._run = wandb_run

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Logs numbers, optionally at a step."""
        if self._run is not None:
            self._run.log(values, step=step)


@contextmanager
def wandb_run(args: Any, job: str) -> Iterator[Run]:
    """The W&B run of a job, with `--exp_name` as its group; W&B is imported only if asked for.

    We tell W&B no home folder; what it finds out of the machine by itself is its own.

    Args:
        args: settings; `wandb` switches it on, `exp_name` names group and run.
        job: what the run does, for instance "finetune-linear-MNIST".

    Raises:
        UsageError: if W&B is asked for and not installed.
    """
    from src.settings import setting

    if not setting(args, "wandb") or not ddp.is_main_process():
        yield Run()
        return
    try:
        import wandb
    except ImportError as error:
        raise UsageError("--wandb needs the package wandb: pip install wandb") from error
    name = setting(args, "exp_name")
    run = wandb.init(
        project="tangent-arithmetic",
        group=without_home(name or setting(args, "model")),
        name=without_home(f"{name}-{job}" if name else job),
        job_type=job,
        config=without_home(vars(args)),
        reinit="finish_previous",
    )
    try:
        yield Run(run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
