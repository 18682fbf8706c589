"""Records of a run outside of its results: W&B, and the file of `--results-db`."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.atomic import as_json, disk_errors
from tangent_arithmetic.runtime.errors import UnwritableError, UsageError
from tangent_arithmetic.runtime.logs import Tracker
from tangent_arithmetic.runtime.private import without_home
from tangent_arithmetic.runtime.processes import one_at_a_time


@contextmanager
def tracked(run: Run, job: str) -> Iterator[Tracker]:
    """The W&B run of a job, with `--exp_name` as its group; W&B is imported only if asked for.

    Home folders are removed from all that we pass to W&B.

    Args:
        run: the run; `wandb` switches it on, `exp_name` names group and run.
        job: what the run does, for instance "finetune-linear-MNIST".

    Raises:
        UsageError: if W&B is asked for and not installed, or cannot be imported.
    """
    if not run.config.wandb or not ddp.is_main_process():
        yield Tracker()
        return
    wandb = _wandb()
    name = run.config.exp_name
    wandb_run = wandb.init(
        project="tangent-arithmetic",
        group=without_home(name or run.config.model),
        name=without_home(f"{name}-{job}" if name else job),
        job_type=job,
        config=without_home(vars(run.config)),
        reinit="finish_previous",
    )
    try:
        yield Tracker(wandb_run.log, functools.partial(_show, wandb, wandb_run))
    except BaseException:
        wandb_run.finish(exit_code=1)
        raise
    wandb_run.finish()


def _wandb() -> Any:
    """The module wandb.

    Raises:
        UsageError: naming the module that is missing: wandb, or one that it needs.
    """
    try:
        import wandb
    except ImportError as error:
        missing = error.name or "wandb"
        if missing == "wandb":
            raise UsageError("--wandb needs the package wandb: pip install wandb") from error
        raise UsageError(
            f"--wandb: the package wandb is installed, but cannot be imported ({error}); it needs "
            f"{missing}: pip install {missing.partition('.')[0]}"
        ) from error
    return wandb


def _show(wandb: Any, wandb_run: Any, name: str, path: Path) -> None:
    """Logs a page or a figure to a W&B run, which shows it in the browser."""
    page = path.suffix == ".html"
    media = wandb.Html(path.read_text(encoding="utf-8"), inject=False) if page else None
    wandb_run.log({name: media if page else wandb.Image(str(path))})


def check_database(run: Run) -> None:
    """Checks that `--results-db`, if set, can be appended to, and creates it.

    Raises:
        UnwritableError: if it cannot, or something else than a file is there.
    """
    if not (name := run.config.results_db):
        return
    path = Path(name)
    with disk_errors(path):
        if path.exists() and not path.is_file():
            raise UnwritableError(path, "it exists and is not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b"):
            pass


def append_result(run: Run, record: dict[str, Any]) -> None:
    """Appends one JSON line to `--results-db`, if set, without home folders.

    Safe for many runs at once; a partial line of a killed run is ended first.

    Raises:
        UnwritableError: if it cannot be appended to.
    """
    if not (name := run.config.results_db) or not ddp.is_main_process():
        return
    path = Path(name)
    line = json.dumps(as_json(record), sort_keys=True).encode() + b"\n"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file, one_at_a_time(path):
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            whole = size == 0 or file.read() == b"\n"
            file.write(line if whole else b"\n" + line)
            file.flush()
