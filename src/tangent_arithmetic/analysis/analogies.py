r"""Analogies: "a is to b as c is to d", hence \(\tau_d \approx \tau_c + (\tau_b - \tau_a)\).

The vector's coefficient is chosen on the validation split of the target d, or without images of d,
by the mean normalised accuracy on the validation splits of b and c. The few-shot experiment
fine-tunes on few images of d, from the pre-trained model and from the analogy's.

Parts of the analogy stand beside it as controls, since one of them may be all that helps: c, b,
c + b, c - a, b - a, and c + w - a for a data set w that has nothing to do with d.

Source: arXiv:2212.04089, section on task analogies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.edits import EditedEncoder, Edits, Point
from tangent_arithmetic.analysis.fewshot import few_shot
from tangent_arithmetic.analysis.figures import over_seeds, panels
from tangent_arithmetic.analysis.subsets import normalisable
from tangent_arithmetic.analysis.tables import of_table, read_own
from tangent_arithmetic.arithmetic.coefficients import coefficients, largest, warn_of_ties
from tangent_arithmetic.arithmetic.sweeps import smallest
from tangent_arithmetic.run.analogies import names_of_analogy
from tangent_arithmetic.run.models import command
from tangent_arithmetic.run.modes import distinct
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError

OUTER = ("zero-shot", "target")  # rows that are no parts of an analogy


@dataclass(frozen=True)
class Analogy:
    """The analogy c + (b - a) = d between data sets; w is the control that takes the place of b."""

    c: str
    b: str
    a: str
    d: str
    w: str | None = None

    @property
    def point(self) -> dict[str, float]:
        """The coefficient of each task vector."""
        return _sum({self.c: 1.0}, {self.b: 1.0}, {self.a: -1.0})

    @property
    def vectors(self) -> dict[str, dict[str, float]]:
        """The analogy, last, and its controls, by name."""
        c, b, less = {self.c: 1.0}, {self.b: 1.0}, {self.a: -1.0}
        vectors = {"c": c, "b": b, "c + b": _sum(c, b), "c - a": _sum(c, less)}
        vectors["b - a"] = _sum(b, less)
        if self.w is not None:
            vectors["c + w - a"] = _sum(c, {self.w: 1.0}, less)
        return {**vectors, "c + b - a": self.point}


def _sum(*points: Point) -> dict[str, float]:
    """Their sum; a data set may be in several."""
    names = dict.fromkeys(name for point in points for name in point)
    return {name: sum(point.get(name, 0.0) for point in points) for name in names}


def analogies_of(run: Run) -> list[Analogy]:
    """The analogies of `--analogies`; by default the suite's.

    Raises:
        UsageError: for an invalid analogy, one whose target is among its parts, or a repeated
            target, or if there are none.
    """
    suite = run.suite
    texts = run.config.analogies or suite.analogies
    if not texts:
        raise UsageError(f"suite {suite.name} has no analogies of its own; set --analogies=C+B-A=D")
    analogies: list[Analogy] = []
    for text in texts:
        named = names_of_analogy(suite.names, text)
        if named is None:
            raise UsageError(
                f"expected an analogy such as C+B-A=D, or C+B-A=D!W with a control, got {text!r}"
            )
        analogy = Analogy(*(suite.check(name).removesuffix("Val") for name in named))
        if analogy.d in (analogy.c, analogy.b, analogy.a, analogy.w):
            raise UsageError(
                f"--analogies names the target {analogy.d} among its own parts in {text!r}; "
                "expected a target that is none of them"
            )
        if analogy.d in (other.d for other in analogies):
            raise UsageError(
                f"--analogies names the target {analogy.d} twice; expected one analogy for each "
                "target, leave the others out"
            )
        analogies.append(analogy)
    return analogies


def table(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """Test accuracies of several vectors on each target.

    Returns:
        Columns mode, target, c, b, a, w (the analogy's data sets; "-" for no w), vector
        ("zero-shot", "target", those of `Analogy.vectors`), chosen ("without target", "with
        target", "-"), coefficient, accuracy.
    """
    coefs = coefficients(run.config.n_eval_points)
    rows: list[dict[str, Any]] = []
    for mode in modes:
        for analogy in analogies_of(run):
            c, b, a, d = analogy.c, analogy.b, analogy.a, analogy.d
            edits = Edits(run, mode, [c, b, a, d, *([analogy.w] if analogy.w else [])])
            num_images = smallest(edits.split(f"{name}Val") for name in (c, b, d))
            for row in evaluate(edits, analogy, coefs, num_images):
                rows.append({"mode": mode, **_sets(analogy), **row})
    return pd.DataFrame(rows)


def _sets(analogy: Analogy) -> dict[str, str]:
    """The data sets of an analogy, as columns."""
    sets = {"target": analogy.d, "c": analogy.c, "b": analogy.b, "a": analogy.a}
    return {**sets, "w": analogy.w or "-"}


def evaluate(
    model: EditedEncoder, analogy: Analogy, coefs: Sequence[float], num_images: int | None = None
) -> list[dict[str, Any]]:
    """Test accuracies on the target of one analogy, as rows of `table`.

    Args:
        model: has the vectors, and the splits X and XVal, of the analogy's data sets.
        analogy: the analogy.
        coefs: coefficients to try.
        num_images: size of the smallest validation split, if known.

    Raises:
        UsageError: if the single-task accuracies on b and c are 0.
    """
    c, b, d = analogy.c, analogy.b, analogy.d
    vectors = analogy.vectors
    tried = {name: [_scaled(v, coef) for coef in coefs] for name, v in vectors.items()}
    points = [*(point for points in tried.values() for point in points), {c: 1.0}, {b: 1.0}]
    on_val = {name: np.array(model.accuracies(f"{name}Val", points)) for name in (c, b, d)}
    singles = {c: float(on_val[c][-2]), b: float(on_val[b][-1])}
    known = normalisable([*singles], singles)
    normalised = np.mean([on_val[name] / singles[name] for name in known], axis=0)
    chosen: list[Point] = [{}, {d: 1.0}]
    rows: list[tuple[str, str, float]] = [("zero-shot", "-", 0.0), ("target", "-", 1.0)]
    ties: list[list[float]] = []
    for i, name in enumerate(tried):
        span = slice(i * len(coefs), (i + 1) * len(coefs))
        for how, values in (("without target", normalised), ("with target", on_val[d])):
            ties.append(largest(dict(zip(coefs, values[span].tolist(), strict=True))))
            coef = ties[-1][0]
            rows.append((name, how, coef))
            chosen.append(tried[name][coefs.index(coef)])
    warn_of_ties(ties, num_images, f"analogy to {d}")
    on_test = model.accuracies(d, chosen)
    return [
        {"vector": name, "chosen": how, "coefficient": coef, "accuracy": accuracy}
        for (name, how, coef), accuracy in zip(rows, on_test, strict=True)
    ]


def _scaled(point: Point, coef: float) -> dict[str, float]:
    return {name: coef * value for name, value in point.items()}


def with_few_images(run: Run, modes: Sequence[str] = ()) -> pd.DataFrame:
    """Few-shot standard fine-tuning on the target, from two starting points.

    The analogy's coefficient is the one chosen without the target, from the table of analogies.

    Args:
        run: the run; `--shots` are the numbers of images per class.
        modes: ignored.

    Returns:
        Columns target, start ("pre-trained model" or "analogy"), shots (images per class),
        num_images, accuracy (test).
    """
    evaluated = read_own(run, "analogies")
    rows = []
    for analogy in analogies_of(run):
        edits = Edits(run, "standard", (analogy.c, analogy.b, analogy.a))
        with of_table(run, "analogies"):
            wanted = {"mode": "standard", **_sets(analogy)}
            wanted |= {"vector": "c + b - a", "chosen": "without target"}
            own = evaluated[(evaluated[list(wanted)] == pd.Series(wanted)).all(axis=1)]
            chosen = list(map(float, own["coefficient"]))
        if not chosen:
            made_by = command("analyze", run.with_(modes=["standard"]), name="analogies")
            raise UsageError(
                f"the table of analogies has no standard model of {analogy.d}. Make it with: "
                f"{made_by}"
            )
        starts: Mapping[str, Point] = {
            "pre-trained model": {},
            "analogy": _scaled(analogy.point, chosen[0]),
        }
        for start, point in starts.items():
            for shots in (0, *map(int, run.config.shots)):
                accuracy, num_images = few_shot(run, edits, point, analogy.d, shots)
                rows.append((analogy.d, start, shots, num_images, accuracy))
    return pd.DataFrame(rows, columns=["target", "start", "shots", "num_images", "accuracy"])


def draw(table: pd.DataFrame, run: Run) -> Any:
    """Accuracy on each target by vector; for analogies with both choices of the coefficient."""
    modes = distinct(table["mode"])
    step = min(0.27, 0.81 / len(modes))
    targets = list(dict.fromkeys(table["target"]))
    figure, axes = panels(1, len(targets), width=2.9, height=3.6, sharey=True)
    used = [name for name in dict.fromkeys(table["vector"]) if name not in OUTER]
    tuned = [(name, "with target") for name in used if name != "c + b - a"]
    both = [("c + b - a", "without target"), ("c + b - a", "with target")]
    bars = [("zero-shot", "-"), *tuned, *both, ("target", "-")]
    for axis, target in zip(axes[0], targets, strict=True):
        for k, mode in enumerate(modes):
            part = table[(table["mode"] == mode.name) & (table["target"] == target)]
            part = part.set_index(["vector", "chosen"]).reindex(bars)
            places = [i + step * (k - (len(modes) - 1) / 2) for i in range(len(bars))]
            style = {"color": mode.colour, "ecolor": palette.INK, "label": mode.label}
            error = over_seeds(part, "accuracy")
            axis.bar(places, 100 * part["accuracy"], step - 0.01, yerr=error, **style)
        names = [v if chosen != "without target" else f"{v} *" for v, chosen in bars]
        axis.set_xticks(range(len(bars)), names, rotation=60, ha="right")
        axis.set_title(target)
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].legend(loc="upper left")
    figure.supxlabel("* coefficient chosen without examples of the target", fontsize="medium")
    return figure


def draw_few(table: pd.DataFrame, run: Run) -> Any:
    """Accuracy against the number of images per class, by starting point."""
    targets = list(dict.fromkeys(table["target"]))
    figure, axes = panels(1, len(targets), width=2.7, height=2.9, sharey=True)
    styles = {"pre-trained model": (palette.ZEROSHOT, "o--"), "analogy": (palette.STANDARD, "s-")}
    for axis, target in zip(axes[0], targets, strict=True):
        for start, (colour, style) in styles.items():
            part = table[(table["target"] == target) & (table["start"] == start)]
            look = {"fmt": style, "color": colour, "label": f"from the {start}"}
            error = over_seeds(part, "accuracy")
            axis.errorbar(range(len(part)), 100 * part["accuracy"], error, **look)
            axis.set_xticks(range(len(part)), [str(n) for n in part["shots"]])
        axis.set(title=target, xlabel="training examples per class")
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].legend()
    return figure
