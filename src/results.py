"""Results on disk: JSON with provenance; tables of them."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import src
from src import ddp
from src.checkpoints import write_text
from src.errors import MissingFileError, UsageError
from src.logs import append_result
from src.processes import one_at_a_time
from src.settings import PREFIX, device_of, results_dir, seed_of, setting, suite_of, tasks_of

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow")


def git_commit() -> str | None:
    """The checkout's commit, with "+changes" if files differ from it; None outside of git."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "scripts")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance(args: Any, seconds: float, **facts: Any) -> dict[str, Any]:
    """What it takes to know where a result comes from."""
    config = {
        name: _without_home(value)
        for name, value in sorted(vars(args).items())
        if name != "finetuning_accuracies"
    }
    return {
        "argv": [Path(sys.argv[0]).name, *map(_without_home, sys.argv[1:])],
        "config": config,
        "model": setting(args, "model"),
        "suite": suite_of(args).name,
        "seed": seed_of(args),
        "commit": git_commit(),
        "source": _relative(Path(src.__file__)),
        "versions": versions(),
        "device": str(device_of(args)),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count() or 1} cores",
        "world_size": ddp.world_size(),
        "seconds": round(seconds, 1),
        **facts,
    }


def _without_home(value: Any) -> Any:
    """A path below the home folder as `~/...`; results are shared, home folders are not."""
    return value.replace(str(Path.home()), "~") if isinstance(value, str) else value


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that results depend on."""
    found = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def accuracies_path(args: Any, mode: str) -> Path:
    """The file of the single-task accuracies of a mode."""
    name = "zeroshot" if mode == "none" else f"{PREFIX[mode]}ft"
    return results_dir(args) / f"{name}_accuracies.json"


def arithmetic_path(args: Any, mode: str, operation: str) -> Path:
    """The file of a mode's "additions" or "negations".

    A sum of a part of the suite's tasks has a file of its own, with the tasks in its name.
    """
    tasks = tasks_of(args)
    if operation == "additions" and tasks != list(suite_of(args).tasks):
        operation += f"-{'+'.join(tasks)}"
    return results_dir(args) / f"{PREFIX[mode]}{operation}.json"


def write_results(path: Path, results: Mapping[str, Any], args: Any) -> None:
    """Writes results atomically, and appends them to `--results-db`; on the first rank only."""
    if ddp.is_main_process():
        write_text(path, json.dumps(results, indent=2) + "\n")
        append_result(args, {"file": str(path), "exp_name": setting(args, "exp_name"), **results})


def write_merged(path: Path, results: dict[str, Any], args: Any) -> None:
    """Writes results together with those of other tasks that the file has, see `merge`.

    Runs that evaluate other tasks at the same time lose nothing of each other's.
    """
    if ddp.is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(path.parent):
            write_results(path, merge(path, results), args)


def merge(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The results, with those of other tasks that the file already has from the same run.

    Evaluating a part of the tasks must not lose the others; results of other pre-trained weights,
    another seed, suite, model or precision are dropped. Whose checkpoints each is of, and which
    pictures it was evaluated on, is kept beside it.
    """
    if not path.is_file():
        return results
    old, new = load_results(path), results["provenance"]
    origin = old.pop("provenance", {})
    same = all(origin.get(k) == new[k] for k in ("theta0_hash", "seed", "suite", "model"))
    if not same or _precision(origin) != _precision(new):
        return results
    merged = {**{k: v for k, v in old.items() if k not in results}, **results}
    kept = {
        kind: {**origin.get(kind, {}), **new.get(kind, {})}
        for kind in ("checkpoints", "splits")
        if kind in origin or kind in new
    }
    merged["provenance"] = {**new, **kept}
    return merged


def _precision(origin: Mapping[str, Any]) -> str:
    """The precision that results were computed in; float32 before there was a choice."""
    return str(origin.get("config", {}).get("precision", "fp32"))


def _short(key: str) -> str:
    """A coefficient as a short decimal, whatever its spelling; other keys as they are."""
    try:
        return str(round(float(key), 10))
    except ValueError:
        return key


def load_results(path: str | Path) -> dict[str, Any]:
    """Reads a results file of ours or of the public projects.

    Coefficients such as "0.15000000000000002" are spelt "0.15".
    """

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {_short(key): shorten(inner) for key, inner in value.items()}
        return value

    loaded: dict[str, Any] = shorten(json.loads(Path(path).read_text(encoding="utf-8")))
    return loaded


def results_if_any(path: Path) -> dict[str, Any]:
    """The results in a file, for a page that is made all the same where there are none.

    Nothing if it is not there, or, with a warning, if it holds none.
    """
    try:
        return dict(load_results(path)) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        logger.warning("%s is left out of the report: %s", path, error)
        return {}


def found_results(path: Path, made_by: str) -> dict[str, Any]:
    """The results in a file.

    Raises:
        MissingFileError: if it is not there, naming the command that makes it.
    """
    if not path.is_file():
        raise MissingFileError(f"no results at {path}. Make them with: {made_by}")
    return load_results(path)


def require_results(
    path: Path,
    args: Any,
    theta0_hash: str,
    made_by: str,
    checkpoints: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Reads results that another script has made, if they belong to this run.

    Args:
        path: the file.
        args: this run's settings.
        theta0_hash: hash of this run's pre-trained weights.
        made_by: the command that makes the file.
        checkpoints: hashes of the fine-tuned checkpoints that the results must be of.

    Raises:
        MissingFileError: if the file is not there.
        UsageError: if it belongs to other weights, another seed, suite or precision.
    """
    results = found_results(path, made_by)
    origin = results.get("provenance", {})
    expected = {"theta0_hash": theta0_hash, "seed": seed_of(args), "suite": suite_of(args).name}
    wrong = [
        f"{name} is {str(origin.get(name))[:12]}, expected {str(value)[:12]}"
        for name, value in expected.items()
        if origin.get(name) != value
    ]
    if _precision(origin) != setting(args, "precision"):
        wrong.append(f"precision is {_precision(origin)}, expected {setting(args, 'precision')}")
    of = origin.get("checkpoints", {})
    wrong += [
        f"checkpoint of {task} is {str(of.get(task))[:12]}, expected {value[:12]}"
        for task, value in (checkpoints or {}).items()
        if of.get(task) != value
    ]
    if wrong:
        raise UsageError(
            f"{path} is of another run ({'; '.join(wrong)}). Make it again with: {made_by}"
        )
    return results


def percent(value: float | None) -> str:
    """An accuracy in percent with one decimal."""
    return "-" if value is None else f"{100 * value:.1f}"


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if there are no values, or if one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) and known else None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        numbers = [cell.strip().rjust(w) for cell, w in zip(rest, widths[1:], strict=True)]
        return "| " + " | ".join([first, *numbers]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def accuracy_table(tasks: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> str:
    """A table of accuracies in percent: a column a task, and their mean."""
    lines = []
    for name, values in rows.items():
        lines.append([name, *map(percent, values), percent(mean(values))])
    return markdown_table(["%", *tasks, "mean"], lines)
