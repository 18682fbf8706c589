"""The report of a run: one offline page with tables, figures, provenance and explorer.

It is built from the files in the run's results folder, after each evaluation. The tangent explorer
needs a pass over the images, and is reused until the results change.
"""

from __future__ import annotations

import base64
import io
import logging
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tangent_arithmetic.analysis.tables import analysis_of
from tangent_arithmetic.analysis.takeaways import takeaway
from tangent_arithmetic.report import explorer
from tangent_arithmetic.report.table import UNVERIFIED, Table
from tangent_arithmetic.report.tables import EXACT, tables_of
from tangent_arithmetic.report.templates import asset, text
from tangent_arithmetic.run.models import command
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.present import with_results
from tangent_arithmetic.run.results import optional_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import AT_ONE
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.atomic import disk_errors, write_text
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.runtime.private import without_home
from tangent_arithmetic.runtime.processes import one_at_a_time
from tangent_arithmetic.storage.reading import read_text

logger = logging.getLogger(__name__)

TYPES = {
    "csv": "text/csv;charset=utf-8",
    "tex": "application/x-tex",
    "png": "image/png",
    "webp": "image/webp",
    "svg": "image/svg+xml",
    "pdf": "application/pdf",
}

CAPTIONS = {
    "single": "Single tasks: standard fine-tuning, its post-hoc linearisation, linear fine-tuning",
    "subsets": "Sums of task vectors over subsets of the tasks, by their number",
    "interference": "Interference: the size of J\u03c4 on the examples of each task, relative to "
    "the pre-trained features",
    "disentanglement": "Disentanglement error of pairs of tasks; frame: coefficients from 0 to 1",
    "similarity": "Cosine similarity of the task vectors, without each vector's own",
    "layers": "Share of the task vectors' squared norm by layer",
    "negation": "The cost of forgetting: the task and the control set along negation",
    "negation_random": "Negation against random vectors of the same norm in each weight, the other "
    "tasks' vectors, and gradient ascent",
    "xi": "The disentanglement error as one number, with a 95 % interval over examples",
    "kernel": "Eigenfunctions of the linear model's kernel: the spectrum, their use by task "
    "vectors, and the share of it on the own task's examples",
    "cka": "Similarity of the features to the pre-trained ones (CKA)",
    "ensembles": "Ensembles of the tasks' models, and sums of their weights",
    "seeds": "All seeds together: the spread over seeds, and the error of the examples",
    "fronts": "Fronts: what is given up on one task for another, with coefficients solved for "
    "weights of the tasks",
    "analogies": "Analogies: a task from three others, without its data",
    "analogies_few": "Analogies as a starting point for few-shot fine-tuning",
}


DEFINITIONS = {
    "zero-shot": "the pre-trained model, \u03b8\u2080, without any fine-tuning.",
    "standard, linear": "fine-tuned from \u03b8\u2080: the model itself, or its first-order Taylor "
    "expansion at \u03b8\u2080 (in the tangent space).",
    "post-hoc": "the standard model's task vector, used in the linear expansion.",
    "task vector": "\u03c4 = \u03b8 \u2212 \u03b8\u2080 of a task; sums and negations of them "
    "edit the model.",
    "coefficient": "the factor of the summed or negated task vectors, chosen on the validation "
    "splits.",
    "normalised": "accuracy divided by that of the same mode's model of this task alone, "
    "then averaged; 100 means nothing was lost.",
    "control": "a data set whose accuracy negation must preserve, and on which every edit should "
    "cost little.",
    "accuracy": "top-1 on the test split, in percent; mean average precision for data sets with "
    "several labels an example.",
}
SOLVED = " solved: "  # in the label of a sum with solved coefficients
WHERE_SHOWN = {  # further definitions, by what a label or a column must have
    ", ": (
        "linear, \u03c4Jp",
        "after the comma: what training adds to the loss, or the parameters that it trains.",
    ),
    AT_ONE: (AT_ONE, "the sum of the task vectors as they are: coefficient 1, without a search."),
    SOLVED: (
        "solved",
        "a coefficient for each task, layer or both, that minimises the cross-entropy on "
        "validation examples, beside the tuned single one.",
    ),
    EXACT[0]: (
        ", ".join(EXACT),
        "test accuracies where the task's validation accuracy is truly least, over all "
        "coefficients from 0 that keep the control set, not only a grid; means of the tasks.",
    ),
}


def report_path(run: Run) -> Path:
    """The path of a run's page."""
    return run.results / "report.html"


def write_report(run: Run, explored: str | None = None) -> Path:
    """Writes the page, on rank 0.

    Args:
        run: the run.
        explored: the tangent explorer, see `report.explorer.explore`; None to reuse the one in the
            existing page if it belongs to the current results.
    """
    path = report_path(run)
    if ddp.is_main_process():
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(path.parent):
                write_text(path, page_of(run, explored or _kept(run, path)))
    return path


def page_of(run: Run, explored: str | None) -> str:
    """The HTML of the page."""
    seed = "" if run.config.seed is None else f", seed {run.seed}"
    figures, tables = list(_figures(run)), tables_of(run)
    return asset("report.html.j2").render(
        title=without_home(f"{run.config.model}, suite {run.suite.name}{seed}"),
        sample=run.config.sample,
        style=text("report.css"),
        tables=[
            (table, *map(_link, ("csv", "tex"), (table.csv(), table.latex()))) for table in tables
        ],
        definitions={**DEFINITIONS, **dict(_further(tables))},
        explorer=explored,
        explorer_command=without_home(command("analyze", run, name="report")),
        figures=figures,
        origins=without_home(list(_origins(run.results))),
        unverified=UNVERIFIED.strip(),
    )


def _further(tables: Sequence[Table]) -> Iterable[tuple[str, str]]:
    """Definitions of what only some pages show."""
    modes = {MODES[name].label for name in MODES.composed}
    words = {line.label for table in tables for line in table.lines if line.own}
    shown = {", "} if words & modes else set()
    shown |= {SOLVED} if any(SOLVED in word for word in words) else set()
    shown |= {column for table in tables for column in table.columns}
    return [entry for what, entry in WHERE_SHOWN.items() if what in shown]


def _kept(run: Run, path: Path) -> str | None:
    try:
        page = read_text(path)
    except MissingFileError:
        return None
    except UsageError as error:
        logger.warning("its tangent explorer is not reused: %s", error)
        return None
    parts = (
        explorer.part_of(
            page, explorer.key_of(run, mode, limit), mode, explorer.origin_of(run, mode)
        )
        for mode in with_results(run.results)
        if MODES[mode].linear
        for limit in (None, run.config.explorer_megabytes)
    )
    return next((part for part in parts if part), None)


def _link(kind: str, content: str | bytes) -> str:
    """A file as a URL that holds all of it."""
    data = content.encode() if isinstance(content, str) else content
    return f"data:{TYPES[kind]};base64,{base64.b64encode(data).decode()}"


def _figures(run: Run) -> Iterable[dict[str, Any]]:
    """The figures of a run with their files, in the order of `CAPTIONS`, then others by name."""
    places, folder = {name: i for i, name in enumerate(CAPTIONS)}, run.results / "analysis"
    paths = sorted((run.results / "figures").glob("*.png"))
    for path in sorted(paths, key=lambda path: places.get(analysis_of(path), len(places))):
        if (image := _content(path)) is None:
            continue
        files = {kind: _content(path.with_suffix(f".{kind}")) for kind in ("svg", "pdf")}
        yield {
            "name": path.stem,
            "caption": _caption(path),
            "takeaway": takeaway(folder, path.stem, run),
            "source": _link(*_smaller(image)),
            "files": {kind: _link(kind, data) for kind, data in files.items() if data is not None},
        }


def _caption(path: Path) -> str:
    """The caption of a figure, with the tasks in its name."""
    name = analysis_of(path)
    some = path.stem.removeprefix(name).replace("-", ", ", 1)
    return f"{CAPTIONS[name]}{some}" if name in CAPTIONS else path.stem


def _smaller(image: bytes) -> tuple[str, bytes]:
    """A PNG as lossless WebP, a third of its size for our figures; as it is if that is larger."""
    from PIL import Image, UnidentifiedImageError

    damaged = (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError)
    file = io.BytesIO()
    try:
        with Image.open(io.BytesIO(image), formats=["PNG"]) as picture:
            picture.save(file, "WEBP", lossless=True, quality=50, method=2)
    except (*damaged, Image.DecompressionBombError) as error:  # or too large for WebP
        logger.debug("a figure stays PNG: %s", error)
        return "png", image
    found = file.getvalue()
    return ("webp", found) if len(found) < len(image) else ("png", image)


def _content(path: Path) -> bytes | None:
    """A file's bytes; None if it is not there, or with a warning if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s is left out of the report: %s", path, error.strerror)
        return None


def _origins(folder: Path) -> Iterable[dict[str, str]]:
    """The provenance of each file of results."""
    for path in sorted([*folder.glob("*.json"), *folder.glob("analysis/*.json")]):
        results = optional_results(path)
        origin = results.get("provenance", results)
        versions = origin.get("versions", {})
        yield {
            "file": path.relative_to(folder).as_posix(),
            "command": shlex.join(map(str, origin.get("argv", ()))),
            "commit": (origin.get("commit") or "unknown")[:12],
            "machine": f"{origin.get('machine', 'unknown')}, {origin.get('device', '')}",
            "seconds": f"{origin.get('seconds', '')}",
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        }
