"""Files of analysis tables: tidy CSV, with LaTeX and provenance as JSON beside it.

A table may be written a few modes at a time. Its provenance is that of the last call, with the
hashes of all modes' checkpoints by their file in the run's folder, and in "earlier" the provenance
of each mode that another call made.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis.baselines import ascent_of
from tangent_arithmetic.analysis.disentanglement import pairs_of
from tangent_arithmetic.analysis.fronts import sets_of
from tangent_arithmetic.analysis.single import ADVANTAGE
from tangent_arithmetic.analysis.typeset import latex
from tangent_arithmetic.data.own.sources import plain_name
from tangent_arithmetic.run.analogies import names_of_analogy
from tangent_arithmetic.run.models import command, stored_hash
from tangent_arithmetic.run.modes import in_order
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.results import differences, optional_results, some_tasks, warn_once
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.atomic import as_json, disk_errors, write_json, write_text
from tangent_arithmetic.runtime.digests import json_hash
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.runtime.processes import one_at_a_time
from tangent_arithmetic.storage.reading import readable

logger = logging.getLogger(__name__)

LONGEST = 100  # rows of a table in LaTeX
LONGEST_NAME = 100  # bytes of a table's name that say what it is of
# columns that hold names, which may look like numbers or missing values
NAMES = ("task", "task1", "task2", "tasks", "images of", "layer", "row")
SETS = ("target", "c", "b", "a", "w")  # columns of these tables that hold names too
TARGETS = ("analogies", "analogies_few")
OF_MODES = ("mode", "mode1", "mode2")  # columns that hold modes
AT_ONCE = ("single", "seeds")  # tables that compare modes, and are made of files in seconds
# flags that every table depends on, and those of single tables
COMMON = ("tasks", "sample", "precision", "head", "template")
FLAGS = {
    "disentanglement": ("pairs", "grid_points"),
    "xi": ("pairs", "grid_points"),
    "interference": ("interference_split",),
    "fronts": ("pairs",),
    "negation": ("control_dataset", "n_eval_points"),
    "negation_random": ("control_dataset", "control_threshold", "n_eval_points"),
    "subsets": ("n_eval_points", "subset_sample"),
    "analogies": ("analogies", "n_eval_points"),
    "analogies_few": ("analogies", "n_eval_points", "shots"),
    "kernel": ("kernel_images", "kernel_directions"),
}
MADE_BY = {  # the analyses of tables with another name
    "layers": "similarity",
    "xi": "disentanglement",
    "negation_random": "negation",
    "analogies_few": "few",
}


def table_path(run: Run, name: str) -> Path:
    """The CSV file of an analysis.

    Tasks that are not all of the suite's, and `--pairs` or `--analogies`, are in its name, so that
    no table replaces one of other data sets.
    """
    return run.results / "analysis" / f"{name}{_of_sets(run, name)}.csv"


def analysis_of(path: Path) -> str:
    """The analysis that a table, or its figure, is of."""
    return path.stem.partition("-")[0]


def _of_sets(run: Run, name: str) -> str:
    """What a table's name says of its data sets: "-A+B"; nothing for those of the suite."""
    parts, flags = [some_tasks(run)], FLAGS.get(name, ())
    if "pairs" in flags and run.config.pairs:
        parts.append(",".join("+".join(pair) for pair in pairs_of(run)))
    if "analogies" in flags and run.config.analogies:
        parts.append(",".join("".join(text.split()) for text in run.config.analogies))
    text = "".join(f"-{part}" for part in parts if part)
    if len(text.encode()) <= LONGEST_NAME and "/" not in text:
        return text
    return f"{text[:40].replace('/', '-')}-{zlib.crc32(text.encode()):08x}"


def write_table(run: Run, name: str, table: pd.DataFrame, seconds: float) -> Path:
    """Writes a table, and beside it LaTeX and its provenance; returns the table's path.

    Rows of other modes that are there are kept where `read_own` gives them, and are dropped with a
    warning otherwise.
    """
    path, modes = table_path(run, name), modes_of(table)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(path.parent):
            checkpoints = _hashes(run, name, modes)
            facts = provenance(run, seconds, theta0_hash=stored_hash(run.zeroshot_path))
            kept = _kept(run, name, table)
            if not kept.empty:
                origin, table = _recorded(path), _together(kept, table)
                earlier, known = origin.pop("earlier", {}), origin.pop("checkpoints")
                others = [mode for mode in modes_of(kept) if mode not in modes]
                facts["earlier"] = {mode: earlier.get(mode, origin) for mode in others}
                checkpoints = {**known, **checkpoints}
            write_text(path, table.to_csv(index=False))
            write_json(path.with_suffix(".json"), {**facts, "checkpoints": checkpoints})
            write_latex(run, name, table)
    return path


def data_sets_of(run: Run, name: str) -> list[str]:
    """The data sets whose checkpoints a table is made of."""
    flags, named = FLAGS.get(name, ()), [*run.tasks]
    if name == "fronts":
        named = [task for tasks in sets_of(run) for task in tasks]
    elif "analogies" in flags:
        texts, known = run.config.analogies or run.suite.analogies, run.suite.names
        parts = [one for text in texts for one in names_of_analogy(known, text) or ()]
        named = [run.suite.check(one).removesuffix("Val") for one in parts]
    elif "pairs" in flags:
        named = [task for pair in pairs_of(run) for task in pair]
    return list(dict.fromkeys(named))


def _hashes(run: Run, name: str, modes: Iterable[str]) -> dict[str, str]:
    """The hashes of the checkpoints that a table is made of, by file in the run's folder."""
    read = dict.fromkeys(one for mode in modes for one in _read_for(name, mode))
    files = [run.finetuned_path(task, mode) for mode in read for task in data_sets_of(run, name)]
    found = {file.relative_to(run.folder).as_posix(): stored_hash(file) for file in files}
    return {file: value for file, value in found.items() if value is not None}


def _read_for(name: str, mode: str) -> list[str]:
    """The modes whose checkpoints what a table has of a mode is made of."""
    ascent = ascent_of(mode) if name == "negation_random" else None
    return [mode, *([ascent] if ascent else [])]


def _kept(run: Run, name: str, table: pd.DataFrame) -> pd.DataFrame:
    """The rows that are there of other modes than a new table's; empty if there are none."""
    path, modes = table_path(run, name), modes_of(table)
    if not path.is_file():
        return table[:0]
    try:
        lost = [mode for mode in modes_of(read_table(run, name)) if mode not in modes]
        if not lost:
            return table[:0]
        if name in AT_ONCE:
            raise UsageError(f"all modes of {name} are compared at once, see --modes")
        if "checkpoints" not in _recorded(path):
            raise UsageError("it does not record its checkpoints")
        found = read_own(run, name)
        if set(found.columns) != set(table.columns):
            raise UsageError("its columns are those of an earlier version")
    except UsageError as error:
        logger.warning("%s loses what it held of other modes: %s", path, error)
        return table[:0]
    return without(found, modes, alone=True)[[*table.columns]]


def _together(kept: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of both, in the order of their modes."""
    both = pd.concat([kept, table], ignore_index=True)
    columns = [column for column in OF_MODES if column in both]
    place = {mode: i for i, mode in enumerate(in_order(both[columns].to_numpy().ravel()))}
    return both.sort_values(columns, kind="stable", key=lambda m: m.map(place), ignore_index=True)


def modes_of(table: pd.DataFrame) -> list[str]:
    """The modes that a table is of; "standard" where none is named."""
    for column in OF_MODES:
        if column in table:
            return list(dict.fromkeys(table[column]))
    return ["standard", *(c for c in table.columns if f"{ADVANTAGE}{c}" in table)]


def without(table: pd.DataFrame, modes: Collection[str], alone: bool = False) -> pd.DataFrame:
    """A table without what it has of some modes.

    Args:
        table: the table.
        modes: the modes.
        alone: whether rows that compare one of them with another mode stay.
    """
    if columns := [column for column in OF_MODES if column in table]:
        among = table[columns].isin([*modes])
        return table[~(among.all(axis=1) if alone else among.any(axis=1))]
    if "standard" in modes:  # with which the others are compared
        return table[:0]
    return table.drop(columns=[c for m in modes for c in (m, f"{ADVANTAGE}{m}") if c in table])


def rows_hash(path: Path, mode: str) -> str:
    """SHA-256 of what a table has of a mode.

    Raises:
        UsageError: if it is damaged.
    """
    with readable(path, "an analysis table"):
        table = read_csv(path)
    others = [one for one in modes_of(table) if one != mode]
    return json_hash(without(table, others).to_csv(index=False))


def write_latex(run: Run, name: str, table: pd.DataFrame) -> None:
    """Writes a table of at most `LONGEST` rows as LaTeX beside its CSV; longer ones are figures."""
    path = table_path(run, name).with_suffix(".tex")
    if len(table) <= LONGEST:
        write_text(path, latex(table))
    else:
        path.unlink(missing_ok=True)


def read_table(run: Run, name: str) -> pd.DataFrame:
    """Reads a table that `write_table` wrote.

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it is damaged; names the command that makes it.
    """
    path = table_path(run, name)
    if not path.is_file():
        made_by = command("analyze", run, name=MADE_BY.get(name, name))
        raise MissingFileError(f"no table at {path}. Make it with: {made_by}")
    with of_table(run, name):
        return read_csv(path)


def read_csv(path: Path) -> pd.DataFrame:
    """Reads a CSV file of `write_table`: a task may be called 2019 or NA, an empty cell is NaN."""
    names = [*NAMES, *(SETS if analysis_of(path) in TARGETS else [])]
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""], "encoding": "utf-8"}
    return pd.read_csv(path, dtype=dict.fromkeys(names, str), **options)


def read_own(run: Run, name: str) -> pd.DataFrame:
    """Reads a table that was made with this run's settings, see `COMMON` and `FLAGS`.

    What its provenance does not record counts as the same.

    Returns:
        The table; without what it has of modes whose checkpoints have changed, see `current`.

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it is damaged, or all of it is of other settings or checkpoints.
    """
    table, path = read_table(run, name), table_path(run, name)
    with of_table(run, name):
        recorded = _recorded(path).get("config", {})
        differ = other_settings(run, recorded, (*COMMON, *FLAGS.get(name, ())))
    if differ:
        made_by = command("analyze", run, name=MADE_BY.get(name, name))
        raise UsageError(
            f"{path} was made with another {', '.join(differ)}, as its .json says. Set the same, "
            f"or make it again with: {made_by}"
        )
    return current(run, name, table)


def current(run: Run, name: str, table: pd.DataFrame) -> pd.DataFrame:
    """What a table has of modes whose checkpoints are still those that it was made of.

    Raises:
        UsageError: if that is nothing.
    """
    path = table_path(run, name)
    if not (stale := outdated(run, path, modes_of(table))):
        return table
    made_by = command("analyze", run, name=MADE_BY.get(name, name))
    reasons = "; ".join(dict.fromkeys(stale.values()))
    told = f"{path} is of earlier checkpoints ({reasons}). Make it again with: {made_by}"
    if (left := without(table, stale)).empty:
        raise UsageError(told)
    warn_once(f"{', '.join(stale)} is left out: {told}")
    return left


def outdated(run: Run, path: Path, modes: Iterable[str]) -> dict[str, str]:
    """The modes of a table whose checkpoints have changed since, each with the first change.

    Only checkpoints that are there are compared. A table of earlier versions records none, which
    costs a warning.
    """
    name, theta0 = analysis_of(path), run.zeroshot_path.name
    origin, found = _recorded(path), dict[str, str]()
    if "checkpoints" not in origin:
        if path.is_file() and stored_hash(run.zeroshot_path):
            warn_once(f"{path} does not record its checkpoints, and may be of earlier ones")
        return {}
    recorded = {theta0: origin.get("theta0_hash"), **origin["checkpoints"]}
    for mode in modes:
        files = {theta0, *(run.finetuned_path("", one).name for one in _read_for(name, mode))}
        known = {f: value for f, value in recorded.items() if value and Path(f).name in files}
        now = {file: stored_hash(run.folder / file) for file in known}
        wrong = differences(known, {file: value for file, value in now.items() if value})
        found |= {mode: wrong[0]} if wrong else {}
    return found


def _recorded(path: Path) -> dict[str, Any]:
    """The provenance of a table; empty if it is not there or damaged."""
    return optional_results(path.with_suffix(".json"))


def other_settings(run: Run, recorded: Mapping[str, Any], flags: Iterable[str]) -> list[str]:
    """The flags of which a run has another value than results record."""
    now = as_json(vars(run.config))
    known = [flag for flag in flags if flag in recorded]
    differ = [f for f in known if _setting(run, f, recorded[f]) != _setting(run, f, now[f])]
    return [f"--{flag.replace('_', '-')}" for flag in differ]


def _setting(run: Run, flag: str, value: Any) -> Any:
    """A flag's value, or for names of data sets what it stands for."""
    if flag == "tasks":
        return [plain_name(name).removesuffix("Val") for name in value or run.suite.tasks]
    if flag == "control_dataset":
        return plain_name(value).removesuffix("Val") if value else run.suite.control
    return value


def of_table(run: Run, name: str) -> AbstractContextManager[None]:
    """Turns errors caused by a damaged table into a `UsageError` that names its command."""
    made_by = command("analyze", run, name=MADE_BY.get(name, name))
    return readable(table_path(run, name), f"the table that {made_by} makes")
