r"""The tangent explorer: an HTML page with one slider per task vector.

The page contains \(W f_0\) and \(W d_1, ..., W d_T\) of each image (see `arithmetic.logits`), from
which it computes the exact accuracy of the linear model at \(\theta_0 + \sum_t a_t \tau_t\) for any
coefficients a. It works offline.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.arithmetic.logits import Logits, gathered
from tangent_arithmetic.report.norms import logits_and_inner
from tangent_arithmetic.report.packing import packed, packed_inner, unpacked
from tangent_arithmetic.report.sizes import sample_size
from tangent_arithmetic.report.solved import numbers
from tangent_arithmetic.report.templates import asset, text
from tangent_arithmetic.run.modes import get_mode
from tangent_arithmetic.run.present import current_results
from tangent_arithmetic.run.results import accuracies_path, arithmetic_path, optional_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.private import without_home
from tangent_arithmetic.storage.reading import readable

logger = logging.getLogger(__name__)

START, END = "<!-- tangent explorer: {} -->", "<!-- end of the tangent explorer -->"
DATA = re.compile(r'<script type="application/json" id="explorer-data">(.*?)</script>', re.DOTALL)
SCRIPTS = [f"explorer{part}.js" for part in ("-model", "-line", "-solve", "", "-chooser", "-start")]
FORMAT = 1  # version of the data; explorers of other versions are not reused
Presets = Mapping[str, Mapping[str, float]]


def build(
    logits: Mapping[str, Logits],
    singles: Mapping[str, float] | None = None,
    presets: Presets | None = None,
    control: str | None = None,
    mode: str = "linear",
    key: str = "",
    origin: Mapping[str, str] | None = None,
    inner: Mapping[str, Tensor | None] | None = None,
) -> str:
    """The explorer as an HTML fragment for any page or notebook.

    Args:
        logits: by data set (X for the test split, XVal for the validation split), all of the same
            task vectors.
        singles: reference accuracies for the normalisation, by data set.
        presets: name -> coefficients by name of the vector; missing ones are 0.
        control: the control set, which is excluded from means.
        mode: a linear mode.
        key: identifies the data, see `key_of`.
        origin: where the task vectors come from, for code to copy, see `origin_of`.
        inner: inner products of the features of some data sets, see `norms.logits_and_inner`; with
            those of all validation splits the page solves for coefficients.
    """
    (vectors,) = {each.vectors for each in logits.values()}
    data = {
        "vectors": vectors,
        "splits": [
            packed(name, each)
            | ({"inner": packed_inner(inner[name])} if inner and name in inner else {})
            for name, each in logits.items()
        ],
        "singles": dict(singles or {}),
        "presets": {
            name: [float(point.get(vector, 0.0)) for vector in vectors]
            for name, point in (presets or {"Zero-shot": {}}).items()
        },
        "control": control,
        "origin": None if origin is None else dict(origin),
    }
    return _framed(data, mode, key)


def _framed(data: Any, mode: str, key: str) -> str:
    """The HTML fragment of an explorer's data."""
    script = "".join(map(text, SCRIPTS))
    page = asset("explorer.html.j2").render(
        data=json_in_page(data),
        style=text("explorer.css"),
        script=script,
        mode=mode,
        model=_described(mode),
        colour=None if mode in ("linear", "posthoc") else get_mode(mode).colour,
    )
    return f"{START.format(key)}\n{page}\n{END}"


def _described(mode: str) -> str:
    """A mode as an adjective: "linear", "post-hoc linearised", "linear (\u03c4Jp)"."""
    label, _, variant = get_mode(mode).label.partition(", ")
    if get_mode(mode).trained_by is not None:
        label = f"{label} linearised"
    return f"{label} ({variant})" if variant else label


def json_in_page(data: object) -> str:
    """JSON that is safe to embed in HTML: it cannot start or end a tag, comment or entity."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def accuracies(page: str, coefs: Mapping[str, float]) -> dict[str, float]:
    """The accuracies that a page shows at some coefficients, by data set, from the page's data.

    Args:
        page: HTML that contains an explorer.
        coefs: coefficients by name of the vector; missing ones are 0.
    """
    match = DATA.search(page)
    if match is None:
        raise UsageError("this page has no tangent explorer")
    with readable("the page", "a tangent explorer"):
        data = json.loads(match[1])
        if unknown := set(coefs) - set(data["vectors"]):
            raise UsageError(f"no vectors {sorted(unknown)} in this page; it has {data['vectors']}")
        row = [coefs.get(vector, 0.0) for vector in data["vectors"]]
        return {s["name"]: unpacked(s, data["vectors"]).accuracy(row) for s in data["splits"]}


def part_of(
    page: str, key: str, mode: str = "linear", origin: Mapping[str, str] | None = None
) -> str | None:
    """The explorer with this key in a page, if there is one, with the current script and origin."""
    start = page.find(START.format(key)) if key else -1
    match = DATA.search(page, start) if start >= 0 else None
    try:
        if match is None:
            return None
        data = json.loads(match[1])
        if isinstance(data, dict) and origin is not None:
            data["origin"] = dict(origin)
        return _framed(data, mode, key)
    except (ValueError, RecursionError):
        logger.warning("the page's tangent explorer is damaged and left out")
        return None


def origin_of(run: Run, mode: str) -> dict[str, str]:
    """The folder, file name and class of a run's task vectors."""
    origin = {
        "folder": run.folder.as_posix(),
        "file": run.finetuned_path("", mode).name,
        "kind": get_mode(mode).task_vector.__name__,
    }
    kept: dict[str, str] = without_home(origin)
    return kept


def key_of(run: Run, mode: str, limit: float | None = None) -> str:
    """A hash of what determines an explorer's data, but for a sample: weights, images, presets.

    Empty if the mode's single tasks have not been evaluated.

    Args:
        run: the run.
        mode: the mode.
        limit: `--explorer-megabytes`, for the key that earlier versions wrote; None for ours.
    """
    digest = hashlib.sha256()
    paths = [accuracies_path(run, mode), accuracies_path(run, "none")]
    paths += [arithmetic_path(run, mode, kind) for kind in ("additions", "negations")]
    if not optional_results(paths[0]):
        return ""
    for path in paths:
        results = optional_results(path)
        origin = results.pop("provenance", {})
        facts = [origin.get(name) for name in ("theta0_hash", "checkpoints", "splits")]
        digest.update(json.dumps([results, facts], sort_keys=True).encode())
    former = "" if limit is None else f" {limit}"
    digest.update(f"{FORMAT}{former} {mode} {run.tasks}".encode())
    return digest.hexdigest()[:16]


def explore(run: Run, mode: str) -> str:
    """The explorer of a run: its task vectors on its tasks and control set, validation and test.

    If not all images fit into `--explorer-megabytes`, it uses the largest sample of each split that
    does, the same images as `--sample` with this size.

    Args:
        run: the run.
        mode: a linear mode.
    """
    tasks, control = run.tasks, run.control_set
    sets = dict.fromkeys([*tasks, *([control] if control else [])])
    names = [f"{name}{end}" for end in ("Val", "") for name in sets]
    sample = sample_size(run, names, len(tasks))
    if sample is not None:
        logger.info("explorer: %d images of each split", sample)
    edits = Edits(run.with_(sample=sample), mode, tasks)
    both = {name: logits_and_inner(edits, name) for name in names if name.endswith("Val")}
    inner = {name: products for name, (each, products) in both.items() if each.gram is None}
    logits = {
        name: both[name][0] if name in both else gathered(edits.logits(name)) for name in names
    }
    results = optional_results(accuracies_path(run, mode))
    singles = {name: results[name] for name in names if name in results}
    if sample is not None:  # results may be of all images
        for name in singles:
            own = logits[name].row({name.removesuffix("Val"): 1.0})
            singles[name] = logits[name].accuracy(own)
    presets, key = presets_of(run, mode), key_of(run, mode)
    return build(logits, singles, presets, control, mode, key, origin_of(run, mode), inner)


def presets_of(run: Run, mode: str) -> dict[str, dict[str, float]]:
    """Named positions of the sliders, including the best ones according to the results."""
    tasks = run.tasks
    presets: dict[str, dict[str, float]] = {"Zero-shot": {}}
    added = current_results(arithmetic_path(run, mode, "additions"), mode)
    if "coefficient" in added:
        coef = added["coefficient"]
        presets[f"Best sum on validation ({coef:g})"] = dict.fromkeys(tasks, coef)
    if (exact := numbers(added.get("exact")).get("coefficient")) is not None:
        presets[f"Exact best sum on validation ({exact:.4f})"] = dict.fromkeys(tasks, exact)
    presets["Sum of all"] = dict.fromkeys(tasks, 1.0)
    presets |= {f"Only {task}": {task: 1.0} for task in tasks}
    negated = current_results(arithmetic_path(run, mode, "negations"), mode)
    for task in tasks:
        if "coefficient" in negated.get(task, {}):
            coef = negated[task]["coefficient"]
            presets[f"Forget {task} ({coef:g})"] = {task: -coef}
    return presets
