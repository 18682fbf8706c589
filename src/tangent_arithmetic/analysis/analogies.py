r"""Analogies: "a is to b as c is to d", hence \(\tau_d \approx \tau_c + (\tau_b - \tau_a)\).

The coefficient of that vector is chosen without pictures of the target d (by the mean normalised
accuracy on the validation splits of b and c), or with its validation split. With few pictures of
the target, fine-tuning starts from the pre-trained model or from the one that the analogy gives.

Source: arXiv:2212.04089, section on task analogies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tangent_arithmetic.analysis.edits import Edits, Point
from tangent_arithmetic.analysis.fewshot import few_shot
from tangent_arithmetic.analysis.figures import panels
from tangent_arithmetic.analysis.tables import of_table, read_table
from tangent_arithmetic.arithmetic.coefficients import best_coefs, coefficients, warn_of_ties
from tangent_arithmetic.run.modes import MODES, in_order
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError

EMBEDDED = (
    "Letters+StreetDigits-Digits=StreetLetters",
    "Digits+StreetLetters-Letters=StreetDigits",
    "StreetLetters+Digits-StreetDigits=Letters",
    "StreetDigits+Letters-StreetLetters=Digits",
)
FORM = re.compile(r"(\w+)\+(\w+)-(\w+)=(\w+)")


@dataclass(frozen=True)
class Analogy:
    """c + (b - a) = d, by names of data sets."""

    c: str
    b: str
    a: str
    d: str

    @property
    def point(self) -> dict[str, float]:
        """The vector's coefficients."""
        point: dict[str, float] = {}
        for name, coef in ((self.c, 1.0), (self.b, 1.0), (self.a, -1.0)):  # one may come twice
            point[name] = point.get(name, 0.0) + coef
        return point

    @property
    def sets(self) -> tuple[str, ...]:
        """The data sets whose vectors are taken."""
        return (self.c, self.b, self.a)


def analogies_of(run: Run) -> list[Analogy]:
    """The analogies: `--analogies`, or the embedded suite's.

    Raises:
        UsageError: for a text that is none, or where there are none.
    """
    suite, named = run.suite, run.config.analogies
    texts = named or (EMBEDDED if suite.name == "embedded" else ())
    if not texts:
        raise UsageError(
            f"suite {suite.name} has no analogies of its own; name some: --analogies=C+B-A=D"
        )
    found = []
    for text in texts:
        form = FORM.fullmatch(text.replace(" ", ""))
        if form is None:
            raise UsageError(f"expected an analogy such as C+B-A=D, got {text!r}")
        named_sets = (suite.check(name).removesuffix("Val") for name in form.groups())
        analogy = Analogy(*named_sets)
        if analogy in found:
            raise UsageError(f"--analogies names {text} twice; expected each analogy once")
        found.append(analogy)
    return found


def table(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """Test accuracies on each target, of several vectors.

    Returns:
        Columns mode, target, vector ("zero-shot", "c", "b", "c + b", "c + b - a", "target"),
        chosen ("without target", "with target", "-"), coefficient, accuracy.
    """
    rows: list[dict[str, Any]] = []
    for mode in modes:
        for analogy in analogies_of(run):
            edits = Edits(run, mode, [*analogy.sets, analogy.d])
            rows += [
                {"mode": mode, "target": analogy.d, **row} for row in _rows(edits, analogy, run)
            ]
    return pd.DataFrame(rows)


def _rows(edits: Edits, analogy: Analogy, run: Run) -> list[dict[str, Any]]:
    coefs = coefficients(run.config.n_eval_points)
    c, b = analogy.c, analogy.b
    vectors = {
        "c": {c: 1.0},
        "b": {b: 1.0},
        "c + b": {c: 1.0, b: 1.0},
        "c + b - a": analogy.point,
    }
    tried = {name: [_scaled(v, coef) for coef in coefs] for name, v in vectors.items()}
    alone: list[Point] = [{c: 1.0}, {b: 1.0}]
    flat = [point for points in tried.values() for point in points]
    on_val = {name: edits.accuracies(f"{name}Val", [*flat, *alone]) for name in (c, b, analogy.d)}
    own = {c: on_val[c][-2], b: on_val[b][-1]}
    rows: list[dict[str, Any]] = [
        {"vector": "zero-shot", "chosen": "-", "coefficient": 0.0},
        {"vector": "target", "chosen": "-", "coefficient": 1.0},
    ]
    points: list[Point] = [{}, {analogy.d: 1.0}]
    ties: list[list[float]] = []
    for i, (name, tries) in enumerate(tried.items()):
        span = slice(i * len(coefs), (i + 1) * len(coefs))
        others = np.mean([np.array(on_val[n][span]) / own[n] for n in (c, b)], axis=0)
        for chosen, values in (
            ("without target", others),
            ("with target", on_val[analogy.d][span]),
        ):
            ties.append(_best(coefs, values))
            best = ties[-1][0]
            rows.append({"vector": name, "chosen": chosen, "coefficient": best})
            points.append(tries[coefs.index(best)])
    count = run.data.smallest([f"{name}Val" for name in (c, b, analogy.d)])
    warn_of_ties(ties, count, f"analogy to {analogy.d}, {edits.mode}")
    found = edits.accuracies(analogy.d, points)
    return [{**row, "accuracy": value} for row, value in zip(rows, found, strict=True)]


def _scaled(point: Point, coef: float) -> dict[str, float]:
    return {name: coef * value for name, value in point.items()}


def _best(coefs: Sequence[float], values: Any) -> list[float]:
    by_coef = {c: {"m": float(v)} for c, v in zip(coefs, values, strict=True)}
    return best_coefs(by_coef, "m")


def with_few_pictures(run: Run, modes: Sequence[str] = ()) -> pd.DataFrame:
    """Standard fine-tuning on few pictures of the target, from two starting points.

    The analogy's coefficient is the one chosen without the target, which is read from the table
    that was written.

    Args:
        run: the run; `shots` are the numbers of pictures a class.
        modes: takes no part.

    Returns:
        Columns target, start ("pre-trained model" or "analogy"), shots (pictures a class),
        num_images, accuracy (test).
    """
    found = read_table(run, "analogies")
    rows: list[dict[str, Any]] = []
    for analogy in analogies_of(run):
        edits = Edits(run, "standard", analogy.sets)
        with of_table(run, "analogies"):
            chosen = found[
                (found["mode"] == "standard")
                & (found["target"] == analogy.d)
                & (found["vector"] == "c + b - a")
                & (found["chosen"] == "without target")
            ]
            coef = float(chosen["coefficient"].iloc[0])
        starts: Mapping[str, Point] = {
            "pre-trained model": {},
            "analogy": _scaled(analogy.point, coef),
        }
        for start, point in starts.items():
            for shots in (0, *map(int, run.config.shots)):
                accuracy, images = few_shot(run, edits, point, analogy.d, shots)
                rows.append({
                    "target": analogy.d, "start": start, "shots": shots, "num_images": images,
                    "accuracy": accuracy,
                })  # fmt: skip
    return pd.DataFrame(rows)


def draw(found: pd.DataFrame, run: Run) -> Any:
    """Accuracy on each target by vector; analogies with the coefficient chosen either way."""
    modes = in_order(found["mode"])
    targets = list(dict.fromkeys(found["target"]))
    figure, axes = panels(1, len(targets), width=2.9, height=3.6, sharey=True)
    bars = [
        ("zero-shot", "-"), ("c", "with target"), ("b", "with target"), ("c + b", "with target"),
        ("c + b - a", "without target"), ("c + b - a", "with target"), ("target", "-"),
    ]  # fmt: skip
    for axis, target in zip(axes[0], targets, strict=True):
        for k, mode in enumerate(modes):
            part = found[(found["mode"] == mode) & (found["target"] == target)]
            by = part.set_index(["vector", "chosen"])["accuracy"]
            places = [i + 0.27 * (k - 1) for i in range(len(bars))]
            axis.bar(places, [100 * by[bar] for bar in bars], 0.26, color=MODES[mode].colour,
                     label=MODES[mode].label)  # fmt: skip
        names = [v if chosen != "without target" else f"{v} *" for v, chosen in bars]
        axis.set_xticks(range(len(bars)), names, rotation=60, ha="right")
        axis.set_title(target)
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.supxlabel("* coefficient chosen without pictures of the target", fontsize=8)
    return figure


def draw_few(found: pd.DataFrame, run: Run) -> Any:
    """Accuracy against the number of pictures a class, by starting point."""
    targets = list(dict.fromkeys(found["target"]))
    figure, axes = panels(1, len(targets), width=2.7, height=2.9, sharey=True)
    styles = {"pre-trained model": ("#666666", "o", "--"), "analogy": ("#0072b2", "s", "-")}
    for axis, target in zip(axes[0], targets, strict=True):
        for start, (colour, marker, line) in styles.items():
            part = found[(found["target"] == target) & (found["start"] == start)]
            axis.plot(range(len(part)), 100 * part["accuracy"], line, color=colour, marker=marker,
                      label=f"from the {start}")  # fmt: skip
            axis.set_xticks(range(len(part)), [str(n) for n in part["shots"]])
        axis.set(title=target, xlabel="training pictures a class")
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure
