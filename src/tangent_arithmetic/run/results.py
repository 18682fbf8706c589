"""Results on disk: where they are, how they are written, merged, read and checked."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tangent_arithmetic.run import results_schema
from tangent_arithmetic.run.modes import get_mode
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tracking import append_result, check_database
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.atomic import as_json, check_writable, disk_errors, write_json
from tangent_arithmetic.runtime.errors import MissingFileError, UnwritableError, UsageError
from tangent_arithmetic.runtime.processes import one_at_a_time

logger = logging.getLogger(__name__)

GROUPING, SHOTS = "task-layer", 4  # of the sum that a benchmark solves for
SOLVED = (f"--coefficients={GROUPING}", f"--shots={SHOTS}")
SAME = ("theta0_hash", "seed", "suite", "model", "control")  # of results in one file


def accuracies_path(run: Run, mode: str) -> Path:
    """The file of the single-task accuracies of a mode."""
    return run.results / f"{get_mode(mode).accuracies}.json"


def arithmetic_path(run: Run, mode: str, operation: str) -> Path:
    """The file of a mode's "additions" or "negations".

    A sum of a part of the suite's tasks, or its certificates, have a file of their own, with the
    tasks in its name.
    """
    if operation != "negations" and (some := some_tasks(run)):
        operation += f"-{some}"
    return run.results / f"{get_mode(mode).prefix}{operation}.json"


def solved_path(run: Run, mode: str) -> Path:
    """The file of a mode's sum with the coefficients of `SOLVED`."""
    return (
        run.results / f"{get_mode(mode).prefix}combined_{solution_name(run, GROUPING, SHOTS)}.json"
    )


def solution_name(run: Run, grouping: str, shots: int | None) -> str:
    """What identifies solved coefficients in names of files: the flags that are not the default.

    Args:
        run: the run; its tasks are named if they are not all of the suite's, but for negations,
            which share a file.
        grouping: what has a coefficient of its own.
        shots: labelled examples a class; None for all.
    """
    config = run.config
    plain = re.sub(r"\W+", "-", grouping)[:40].strip("-")
    parts = [plain if plain == grouping else f"{plain}-{zlib.crc32(grouping.encode()):08x}"]
    parts += [] if shots is None else [f"{shots}shot"]
    parts += [config.unlabelled] if config.unlabelled else []
    parts += [] if config.ridge is None else [f"ridge{config.ridge:g}"]
    parts += ["bounds" + ",".join(config.coefficient_bounds)] if config.coefficient_bounds else []
    parts += [] if config.solver == "auto" else [f"solver{config.solver}"]
    if not config.negate and (some := some_tasks(run)):
        parts.append(f"tasks{some}")
    return "_".join(parts)


def some_tasks(run: Run) -> str:
    """The run's tasks, A+B, if they are not all of the suite's in its order; else nothing."""
    return "" if run.tasks == list(run.suite.tasks) else "+".join(run.tasks)


def check_targets(run: Run, *paths: Path) -> None:
    """Checks, before the work, that results can be written; on the first rank.

    Args:
        run: the run; `results_db` is checked as well.
        *paths: the files.

    Raises:
        UsageError: on every rank, if one of them cannot be written.
    """
    refused = None
    if ddp.is_main_process():
        try:
            for path in paths:
                check_writable(path)
            check_database(run)
        except UsageError as error:
            refused = str(error)
    if (reason := ddp.broadcast(refused)) is not None:
        raise UsageError(reason)


def write_results(path: Path, results: Mapping[str, Any], run: Run) -> None:
    """Writes results atomically, and appends them to `--results-db`; on the first rank only.

    A damaged file of that name is kept beside it, see `set_aside`.
    """
    if ddp.is_main_process():
        with _never_lost(results):
            _write(path, results, run)


def _write(path: Path, results: Mapping[str, Any], run: Run) -> None:
    if _is_damaged(path):
        set_aside(path)
    write_json(path, results)
    append_result(run, {"file": str(path), "exp_name": run.config.exp_name, **results})


@contextlib.contextmanager
def _never_lost(results: Mapping[str, Any]) -> Iterator[None]:
    """Prints results that cannot be written, for instance because the disk is full."""
    try:
        yield
    except UnwritableError:
        print(json.dumps(as_json(results)))  # noqa: T201 - a script's own result
        raise


def _is_damaged(path: Path) -> bool:
    """Whether a results file exists and some of it cannot be read."""
    try:
        return bool(results_schema.read(path)[1])
    except MissingFileError:
        return False
    except UsageError:
        return True


def set_aside(path: Path) -> Path:
    """Keeps a file as `NAME.damaged`, or with a number where that is taken; gives its new path."""
    for number in itertools.count(1):
        kept = path.with_name(f"{path.name}.damaged{'' if number == 1 else number}")
        if not kept.exists():
            break
    with disk_errors(kept):
        path.rename(kept)
    logger.warning("%s is damaged and kept as %s", path, kept.name)
    return kept


def write_merged(path: Path, results: dict[str, Any], run: Run) -> None:
    """Writes results and keeps those of other tasks in the file, see `merge`.

    Safe for runs that write other tasks to the same file at the same time.
    """
    if ddp.is_main_process():
        with _never_lost(results), disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(path.parent):
                _write(path, merge(path, results), run)


def merge(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The results, and those of other tasks that the same run has written to the file before.

    Results of other pre-trained weights, another seed, suite, model, precision or control set are
    dropped, with a warning. Hashes of checkpoints, splits and heads are merged likewise.
    """
    old, new = optional_results(path), results["provenance"]
    origin = old.pop("provenance", {})
    known = [k for k in SAME if k != "control" or k in origin]  # earlier versions recorded none
    same = all(origin.get(k) == new.get(k) for k in known)
    if not same or _precision(origin) != _precision(new):
        if others := [key for key in old if key.partition(":")[0] not in results]:
            logger.warning(
                "%s held results of another run, which are dropped: %s", path, ", ".join(others[:5])
            )
        return results
    kept_keys = [key for key in old if key.partition(":")[0] not in results]
    merged = {**{key: old[key] for key in kept_keys}, **results}
    kept = {
        kind: {**origin.get(kind, {}), **new.get(kind, {})}
        for kind in ("checkpoints", "splits", "heads")
        if kind in origin or kind in new
    }
    merged["provenance"] = {**new, **kept}
    return merged


def _precision(origin: Mapping[str, Any]) -> str:
    """The precision that results were computed in; float32 before there was a choice."""
    return str(origin.get("config", {}).get("precision", "fp32"))


def load_results(path: str | Path) -> dict[str, Any]:
    """Reads a results file of ours or of the public projects, see `results_schema.read`.

    Coefficients such as "0.15000000000000002" are spelt "0.15". What is damaged is left out, with a
    warning.

    Raises:
        MissingFileError: if it is not there.
        UsageError: if it is no JSON object.
    """
    found, faults = results_schema.read(path)
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        warn_once(f"{path} is damaged; left out are {'; '.join(faults[:3])}{more}")
    return found


@functools.cache  # a page reads a file several times
def warn_once(message: str) -> None:
    """Logs a warning, each once."""
    logger.warning("%s", message)


def optional_results(path: Path) -> dict[str, Any]:
    """The results in a file; empty if it does not exist, or, with a warning, if it is no JSON."""
    try:
        return load_results(path)
    except MissingFileError:
        return {}
    except UsageError as error:
        warn_once(f"{path} is left out: {error}")
        return {}


Needed = Sequence[str | tuple[str, ...]]  # keys, and keys in keys


def complete_results(path: Path, made_by: str, needed: Needed = ()) -> dict[str, Any]:
    """The results in a file, checked to hold all that is needed.

    Args:
        path: the file.
        made_by: the command that makes it, for errors.
        needed: keys, or paths of nested keys, that it must have.

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it is damaged or lacks a key.
    """
    try:
        found = load_results(path)
    except MissingFileError as error:
        raise MissingFileError(f"no results at {path}. Make them with: {made_by}") from error
    except UsageError as error:
        raise UsageError(f"{error}. Make it again with: {made_by}") from error
    if lacking := [" > ".join(keys) for keys in map(_keys, needed) if _lacks(found, keys)]:
        raise UsageError(
            f"{path} has no sound {', '.join(lacking[:3])}{' ...' if len(lacking) > 3 else ''}. "
            f"Make it again with: {made_by}"
        )
    return found


def _keys(needed: str | tuple[str, ...]) -> tuple[str, ...]:
    return (needed,) if isinstance(needed, str) else needed


def _lacks(found: Any, keys: tuple[str, ...]) -> bool:
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            return True
        found = found[key]
    return False


def require_results(
    path: Path,
    run: Run,
    theta0_hash: str,
    made_by: str,
    checkpoints: Mapping[str, str] | None = None,
    needed: Needed = (),
) -> dict[str, Any]:
    """Reads results of another command, checked to belong to this run.

    Args:
        path: the file.
        run: the run.
        theta0_hash: hash of this run's pre-trained weights.
        made_by: the command that makes the file.
        checkpoints: hashes of the fine-tuned checkpoints that the results must be of.
        needed: the data sets whose accuracies are needed.

    Raises:
        MissingFileError: if the file is not there.
        UsageError: if it is damaged, or of other weights, another seed, suite, precision, other
            examples or heads.
    """
    from tangent_arithmetic.run.heads import evaluated_on  # with encoders, which tables do without

    results = complete_results(path, made_by, needed)
    origin = results.get("provenance", {})
    expected = {"theta0_hash": theta0_hash, "seed": run.seed, "suite": run.suite.name}
    wrong = differences(origin, expected)
    if _precision(origin) != run.config.precision:
        wrong.append(f"precision is {_precision(origin)}, expected {run.config.precision}")
    of = differences(origin.get("checkpoints", {}), checkpoints or {})
    wrong += [f"checkpoint of {difference}" for difference in of]
    for kind, values in evaluated_on(run, map(str, needed)).items():
        known = origin.get(kind, {})  # results of earlier versions record no heads
        changed = [n for n, value in values.items() if value and known.get(n, value) != value]
        wrong += [f"other {kind} of {', '.join(changed[:3])}"] if changed else []
    if wrong:
        raise UsageError(
            f"{path} is of another run ({'; '.join(wrong)}). Make it again with: {made_by}"
        )
    return results


def weights_of(origin: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of the weights that a provenance records: "theta0", and checkpoints by task."""
    checkpoints = origin.get("checkpoints")
    known = {"theta0": origin.get("theta0_hash")}
    known |= checkpoints if isinstance(checkpoints, dict) else {}
    return {name: value for name, value in known.items() if isinstance(value, str)}


def differences(recorded: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What results record otherwise than expected, in words; hashes are shortened."""
    return [
        f"{name} is {str(recorded.get(name))[:12]}, expected {str(value)[:12]}"
        for name, value in expected.items()
        if recorded.get(name) != value
    ]
