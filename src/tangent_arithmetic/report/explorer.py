r"""The tangent explorer: an HTML page with one slider per task vector.

The page contains \(W f_0\) and \(W d_1, ..., W d_T\) of each image (see `arithmetic.logits`), from
which it computes the exact accuracy of the linear model at \(\theta_0 + \sum_t a_t \tau_t\) for any
coefficients a. It works offline.
"""

from __future__ import annotations

import base64
import bisect
import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import torch

from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.arithmetic.logits import Logits, gathered
from tangent_arithmetic.run.models import classification_head
from tangent_arithmetic.run.results import accuracies_path, arithmetic_path, optional_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.reading import readable

logger = logging.getLogger(__name__)

START, END = "<!-- tangent explorer: {} -->", "<!-- end of the tangent explorer -->"
DATA = re.compile(r'<script type="application/json" id="explorer-data">(.*?)</script>', re.DOTALL)
FORMAT = 1  # version of the data; explorers of other versions are not reused
KINDS = {"base": "<f4", "steps": "<f4", "labels": "<i2", "bias": "<f4", "gram": "<f8"}
Presets = Mapping[str, Mapping[str, float]]


def build(
    logits: Mapping[str, Logits],
    singles: Mapping[str, float] | None = None,
    presets: Presets | None = None,
    control: str | None = None,
    mode: str = "linear",
    key: str = "",
) -> str:
    """The explorer as an HTML fragment for any page or notebook.

    Args:
        logits: by data set (X for the test split, XVal for the validation split), all of the same
            task vectors.
        singles: reference accuracies for the normalisation, by data set.
        presets: name -> coefficients by name of the vector; missing ones are 0.
        control: the control set, which is excluded from means.
        mode: "linear" or "posthoc".
        key: identifies the data, see `key_of`.
    """
    (vectors,) = {each.vectors for each in logits.values()}
    data = {
        "vectors": vectors,
        "splits": [_packed(name, each) for name, each in logits.items()],
        "singles": dict(singles or {}),
        "presets": {
            name: [float(point.get(vector, 0.0)) for vector in vectors]
            for name, point in (presets or {"Zero-shot": {}}).items()
        },
        "control": control,
    }
    return _framed(data, mode, key)


def _framed(data: Any, mode: str, key: str) -> str:
    """The HTML fragment of an explorer's data."""
    page = asset("explorer.html.j2").render(
        data=json_in_page(data), style=text("explorer.css"), script=text("explorer.js"), mode=mode
    )
    return f"{START.format(key)}\n{page}\n{END}"


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
        return {s["name"]: _unpacked(s, data["vectors"]).accuracy(row) for s in data["splits"]}


def part_of(page: str, key: str, mode: str = "linear") -> str | None:
    """The explorer with this key in a page, if there is one, with the current script."""
    start = page.find(START.format(key)) if key else -1
    match = DATA.search(page, start) if start >= 0 else None
    try:
        return None if match is None else _framed(json.loads(match[1]), mode, key)
    except (ValueError, RecursionError):
        logger.warning("the page's tangent explorer is damaged and left out")
        return None


def key_of(run: Run, mode: str) -> str:
    """A hash of what determines an explorer's data: weights, images, presets.

    Empty if the mode's single tasks have not been evaluated.
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
    limit, tasks = run.config.explorer_megabytes, run.tasks
    digest.update(f"{FORMAT} {limit} {mode} {tasks}".encode())
    return digest.hexdigest()[:16]


def explore(run: Run, mode: str) -> str:
    """The explorer of a run: its task vectors on its tasks and control set, validation and test.

    If not all images fit into `--explorer-megabytes`, it uses the largest sample of each split that
    does, the same images as `--sample` with this size.

    Args:
        run: the run.
        mode: "linear" or "posthoc".
    """
    tasks, control = run.tasks, run.control
    names = [f"{name}{end}" for end in ("Val", "") for name in dict.fromkeys([*tasks, control])]
    sample = sample_size(run, names, len(tasks))
    if sample is not None:
        logger.info("explorer: %d images of each split", sample)
    edits = Edits(run.with_(sample=sample), mode, tasks)
    logits = {name: gathered(edits.logits(name)) for name in names}
    results = optional_results(accuracies_path(run, mode))
    singles = {name: results[name] for name in names if name in results}
    return build(logits, singles, presets_of(run, mode), control, mode, key_of(run, mode))


def presets_of(run: Run, mode: str) -> dict[str, dict[str, float]]:
    """Named positions of the sliders, including the best ones according to the results."""
    tasks = run.tasks
    presets: dict[str, dict[str, float]] = {"Zero-shot": {}}
    added = optional_results(arithmetic_path(run, mode, "additions"))
    if "coefficient" in added:
        coef = added["coefficient"]
        presets[f"Best sum on validation ({coef:g})"] = dict.fromkeys(tasks, coef)
    presets["Sum of all"] = dict.fromkeys(tasks, 1.0)
    presets |= {f"Only {task}": {task: 1.0} for task in tasks}
    negated = optional_results(arithmetic_path(run, mode, "negations"))
    for task in tasks:
        if "coefficient" in negated.get(task, {}):
            coef = negated[task]["coefficient"]
            presets[f"Forget {task} ({coef:g})"] = {task: -coef}
    return presets


def sample_size(run: Run, names: Iterable[str], vectors: int) -> int | None:
    """The largest number of images per split that fits into the page; None if all images do."""
    sizes: list[tuple[int, int]] = []  # number of images, bytes per image
    for name in names:
        head = classification_head(run, name)
        gram = 8 * (1 + vectors) ** 2 if head.normalize and bool(head.bias.any()) else 0
        each = 4 * (1 + vectors) * head.weight.shape[0] + 2 + gram
        sizes.append((len(run.data.dataset(name).test), each))
    limit = int(run.config.explorer_megabytes * 1e6 * 3 / 4)  # base64 turns 3 bytes into 4
    sample = run.config.sample
    most = max(images for images, _ in sizes)
    most = most if sample is None else min(sample, most)

    def excess(count: int) -> int:
        return sum(min(count, images) * each for images, each in sizes) - limit

    if excess(most) <= 0:
        return None if sample is None else most
    return max(1, bisect.bisect_right(range(most), 0, key=excess) - 1)


def _packed(name: str, logits: Logits) -> dict[str, Any]:
    """The logits of a split, in the format of the page's script."""
    return {
        "name": name,
        "task": name.removesuffix("Val"),
        "split": "validation" if name.endswith("Val") else "test",
        "images": len(logits.labels),
        "of": logits.of,
        "classes": logits.base.shape[1],
        **{kind: _written(getattr(logits, kind), dtype) for kind, dtype in KINDS.items()},
    }


def _written(value: torch.Tensor | None, dtype: str) -> str | None:
    if value is None:
        return None
    return base64.b64encode(value.numpy().astype(dtype).tobytes()).decode()


def _unpacked(split: Mapping[str, Any], vectors: Sequence[str]) -> Logits:
    """The inverse of `_packed`."""
    n, classes, t = split["images"], split["classes"], len(vectors)
    shapes = {
        "base": (n, classes),
        "steps": (t, n, classes),
        "labels": (n,),
        "bias": (classes,),
        "gram": (n, 1 + t, 1 + t),
    }
    parts: dict[str, Any] = dict.fromkeys(KINDS)
    for kind, shape in shapes.items():
        if split[kind] is not None:
            array = np.frombuffer(base64.b64decode(split[kind]), KINDS[kind]).reshape(shape)
            parts[kind] = torch.from_numpy(array.copy())
    parts["labels"] = parts["labels"].long()
    return Logits(dataset=split["name"], vectors=tuple(vectors), of=split["of"], **parts)


def text(name: str) -> str:
    """The text of a file in `assets`."""
    folder = resources.files("tangent_arithmetic.report")
    return folder.joinpath("assets", name).read_text(encoding="utf-8")


@functools.cache
def asset(name: str) -> jinja2.Template:
    """A template in `assets`; values are escaped unless marked safe."""
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    strict = jinja2.StrictUndefined
    return jinja2.Environment(autoescape=True, undefined=strict, **options).from_string(text(name))
