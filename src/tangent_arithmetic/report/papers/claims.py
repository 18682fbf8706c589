"""Claims of the two papers about vision, each with a measurement that decides it here.

A claim's margin is positive where it holds, and zero where a seed decides nothing. Over several
seeds it holds, or does not, if the 95 % confidence interval of the mean margin (Student's t) leaves
out zero; otherwise it cannot be said here. With one seed the sign decides, and the verdict says so.
Thresholds are ours: the papers state none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

from tangent_arithmetic.analysis.kernel import localisation
from tangent_arithmetic.analysis.subsets import pairs
from tangent_arithmetic.report.papers.evidence import Evidence
from tangent_arithmetic.runtime.errors import UsageError

HOLDS, FAILS, OPEN = "holds", "does not", "cannot be said here"
Measure = Callable[[Evidence], tuple[float, ...]]  # values to show, the margin last


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
        paper: a key of `PAPERS`.
        place: where it is made, with a dagger if that was recalled.
        text: the claim, in our words.
        published: the figures behind it, for OpenAI's CLIP; with a dagger if recalled.
        ours: how our values are shown, a format of as many values as `measure` gives.
        measure: our values, in percent where they are accuracies, and the margin.
    """

    paper: str
    place: str
    text: str
    published: str
    ours: str
    measure: Measure


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: the claim.
        verdict: "holds", "does not" or "cannot be said here".
        measured: our values, or why there are none; of the first seed where the reasons differ.
        seeds: number of runs with a measurement.
        margins: of each of them.
    """

    claim: Claim
    verdict: str
    measured: str
    seeds: int
    margins: tuple[float, ...]


def verdict(claim: Claim, evidence: Sequence[Evidence]) -> Verdict:
    """The verdict on a claim from the runs of several seeds."""
    found, missing = list[tuple[float, ...]](), dict[str, int]()
    for one in evidence:
        try:
            found.append(_defined(claim.measure(one)))
        except (LookupError, UsageError) as error:
            missing.setdefault(str(error), one.run.seed)
    if not found:
        why, seed = next(iter(missing.items()))
        return Verdict(claim, OPEN, f"seed {seed}: {why}" if len(missing) > 1 else why, 0, ())
    *values, margins = zip(*found, strict=True)
    measured = claim.ours.format(*(_shown(column) for column in values))
    return Verdict(claim, _decided(margins), measured, len(found), margins)


def _defined(values: tuple[float, ...]) -> tuple[float, ...]:
    if not all(map(math.isfinite, values)):
        raise LookupError("not defined for these tasks")
    return values


def _decided(margins: Sequence[float]) -> str:
    mean = statistics.fmean(margins)
    error = 0.0
    if len(margins) > 1:
        quantile = float(student.ppf(0.975, len(margins) - 1))
        error = quantile * statistics.stdev(margins) / math.sqrt(len(margins))
    if abs(mean) <= error or mean == 0:
        return OPEN
    return (HOLDS if mean > 0 else FAILS) + (" (one seed)" if len(margins) == 1 else "")


def _shown(values: Sequence[float]) -> str:
    """The mean with three digits, and the standard deviation with as many decimals."""
    mean = statistics.fmean(values)
    decimals = max(0, 2 - math.floor(math.log10(abs(mean)))) if mean else 1
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{mean:.{decimals}f}{spread}"


def _negation(found: Evidence) -> tuple[float, ...]:
    target, before = (found.figure("negation", "standard", k) for k in ("target", "zero-shot"))
    control = found.figure("negation", "standard", "control")
    start = found.figure("negation", "standard", "zero-shot control")
    margin = min(0.75 * before - target, control - 0.93 * start)
    return 100 * before, 100 * target, 100 * start, 100 * control, margin


def _random(found: Evidence) -> tuple[float, ...]:
    own, random = (found.table("negation_random", mode="standard", vector=v)["target"].mean()
                   for v in ("task", "random"))  # fmt: skip
    before = found.table("negation_random", mode="standard", vector="random")["zeroshot"].mean()
    return 100 * random, 100 * own, 0.25 * (before - own) - (before - random)


def _ascent(found: Evidence) -> tuple[float, ...]:
    own, ascent = (found.table("negation_random", mode="standard", vector=v)["control"].mean()
                   for v in ("task", "ascent, whole"))  # fmt: skip
    return 100 * ascent, 100 * own, 0.9 * own - ascent


def _pairs(found: Evidence) -> tuple[float, ...]:
    kept = pairs(found.table("subsets", mode="standard"))["own_normalised"].mean()
    return 100 * kept, kept - 0.95


def _more(found: Evidence) -> tuple[float, ...]:
    means = found.table("subsets", mode="standard").groupby("num_vectors")["normalised"].mean()
    first, last = float(means.iloc[0]), float(means.iloc[-1])
    return 100 * first, 100 * last, last - first


def _orthogonal(found: Evidence) -> tuple[float, ...]:
    table = found.table("similarity", mode1="standard", mode2="standard")
    cosine = table[table["task1"] != table["task2"]]["cosine"].abs().mean()
    return cosine, 0.1 - cosine


def _analogy(found: Evidence) -> tuple[float, ...]:
    table = found.table("analogies", mode="standard")
    before = table[table["vector"] == "zero-shot"]["accuracy"].mean()
    chosen = (table["vector"] == "c + b - a") & (table["chosen"] == "without target")
    after = table[chosen]["accuracy"].mean()
    return 100 * before, 100 * after, after - before


def _single(found: Evidence) -> tuple[float, ...]:
    values = [found.figure("single", mode, "mean") for mode in ("standard", "posthoc", "linear")]
    return *(100 * value for value in values), values[0] - values[1]


def _closes(found: Evidence) -> tuple[float, ...]:
    standard, posthoc, linear = (
        found.figure("single", mode, "mean") for mode in ("standard", "posthoc", "linear")
    )
    if standard <= posthoc:
        raise LookupError("no gap between standard and post-hoc models to close")
    closed = (linear - posthoc) / (standard - posthoc)
    return 100 * closed, closed - 0.5


def _better(kind: str, key: str, mode: str, than: str) -> Measure:
    def measure(found: Evidence) -> tuple[float, ...]:
        one, other = (found.figure(kind, name, key) for name in (mode, than))
        return 100 * one, 100 * other, one - other

    return measure


def _forgets(found: Evidence) -> tuple[float, ...]:
    """At the control accuracy to keep, or the lowest that both reach, between coefficients too."""
    swept = [found.negated(mode) for mode in ("linear", "standard")]
    start = found.run.config.control_threshold * swept[0]["control"].loc[0.0]
    level = max(start, *(curve["control"].min() for curve in swept))
    target, other = (_lowest(curve, level) for curve in swept)
    return 100 * target, 100 * other, 100 * level, other - target


def _lowest(curve: pd.DataFrame, level: float) -> float:
    """The lowest target accuracy of a curve by coefficient that keeps the control accuracy."""
    coefs = np.union1d(curve.index, np.linspace(curve.index.min(), curve.index.max(), 2001))
    target, control = (np.interp(coefs, curve.index, curve[k]) for k in ("target", "control"))
    return float(target[control >= level].min())


def _disentangled(found: Evidence) -> tuple[float, ...]:
    one, other = (found.table("xi", mode=m)["xi"].mean() for m in ("linear", "standard"))
    return one, other, other - one


def _localised(found: Evidence) -> tuple[float, ...]:
    table = found.table("kernel", mode="linear")
    if table["task"].nunique() == 1:
        raise LookupError("one task alone, and no other's examples")
    share, chance, error = localisation(table)[["share", "even", "error"]].mean()
    if error > 0:
        raise LookupError(
            f"{100 * share:.3g} % for an estimated kernel, which moves it towards an even spread; "
            "set --kernel-directions=0, and fewer --kernel-images where that takes too long"
        )
    return 100 * share, 100 * chance, share - (1 + chance) / 2


CLAIMS = (
    Claim(
        "arithmetic", "table 1",
        "Negating a task vector lowers the task's accuracy far and the control set's little.",
        "ViT-B-32: 48.1 to 24.0, control 63.4 to 60.9",
        "{0} to {1}, control {2} to {3}; holds if at most 3/4 are left, and 93 % of the control",
        _negation,
    ),
    Claim(
        "arithmetic", "table 1",
        "A random vector of the same norm by layer has little effect.",
        "ViT-B-32: 45.7 † against 24.0",
        "{0} against {1} for the task vector; holds if at most 1/4 of the fall",
        _random,
    ),
    Claim(
        "arithmetic", "table 1",
        "Gradient ascent destroys the control accuracy, negation does not.",
        "ViT-B-32: control 0.25 † against 60.9",
        "control {0} against {1} for negation; holds if at least a tenth lower",
        _ascent,
    ),
    Claim(
        "arithmetic", "section 4.1",
        "A sum of two task vectors is close to both single-task models.",
        "98.9 % normalised",
        "{0} % normalised; holds from 95 %",
        _pairs,
    ),
    Claim(
        "arithmetic", "figure 3",
        "The more task vectors are added, the better the model on all tasks.",
        "ViT-L-14: 91.2 % normalised with all eight",
        "{0} % normalised with one, {1} % with all",
        _more,
    ),
    Claim(
        "arithmetic", "figure 5",
        "Vectors of different tasks are close to orthogonal.",
        "cosines from 0.01 to 0.06, and 0.18 of MNIST and SVHN",
        "mean absolute cosine {0}; holds below 0.1",
        _orthogonal,
    ),
    Claim(
        "arithmetic", "section 5 †",
        "An analogy of three other tasks improves a task without its data.",
        "about 3.4 points over zero-shot †",
        "{0} to {1}",
        _analogy,
    ),
    Claim(
        "tangent", "figure 2 †",
        "The linearisation of a standard fine-tuned model is worse than the model.",
        "a gap at each task and model",
        "standard {0}, post-hoc {1}, linear {2}",
        _single,
    ),
    Claim(
        "tangent", "section 5 †",
        "Fine-tuning the linearised model closes most of that gap.",
        "most of the gap",
        "{0} % of the gap; holds from half",
        _closes,
    ),
    Claim(
        "tangent", "table 1 †",
        "Post-hoc linearisation raises the normalised accuracy of the sum.",
        "ViT-B-32: 81.9 † against 76.5 †",
        "{0} against {1} % normalised",
        _better("addition", "normalised", "posthoc", "standard"),
    ),
    Claim(
        "tangent", "table 1 †",
        "The sum of linear task vectors is better than that of standard ones.",
        "ViT-B-32: 76.5 † against 71.4 †",
        "{0} against {1}",
        _better("addition", "absolute", "linear", "standard"),
    ),
    Claim(
        "tangent", "table 2 †",
        "Negating a linear task vector forgets more at the same control accuracy.",
        "ViT-B-32: 10.9 against 24.0 †",
        "{0} against {1} on validation images, both with {2} on the control set",
        _forgets,
    ),
    Claim(
        "tangent", "section 5 †",
        "Linear task vectors are better disentangled.",
        "a larger region of low error",
        "mean error {0} against {1}",
        _disentangled,
    ),
    Claim(
        "tangent", "section 6 †",
        "Eigenfunctions of the kernel that a task uses are localised on its data.",
        "most of their energy",
        "{0} % on the own task's examples, {1} % if spread evenly; holds from halfway to 100 %",
        _localised,
    ),
)  # fmt: skip
