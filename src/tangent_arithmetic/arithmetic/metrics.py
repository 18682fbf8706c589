r"""Metrics of classifiers, which follow from the labels, and normalised accuracies.

A set with one label an image has its top-1 accuracy and, beside it, the balanced accuracy; one with
several labels an image has its mean average precision. The first of a set's metrics is its main
one: coefficients are chosen on it, and means over data sets are means of it.

A further metric is one `Metric` in `METRICS`. What it is computed from is a `Statistic`, gathered
over batches and ranks by `arithmetic/tally.py`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.average_precision import mean_average_precision

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

logger = logging.getLogger(__name__)

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Statistic:
    """What metrics are computed from.

    Attributes:
        of: (logits, labels) of some images -> the tensors of the statistic.
        adds_up: whether the tensors of all images are the sums of those of their parts; otherwise
            they are concatenated.
    """

    of: Callable[[Tensor, Tensor], Parts]
    adds_up: bool

    def joined(self, parts: Sequence[Parts]) -> Parts:
        """The tensors of all images, from those of disjoint sets of them."""
        columns = zip(*parts, strict=True)
        if self.adds_up:
            return tuple(torch.stack(column).sum(dim=0) for column in columns)
        return tuple(torch.cat(column) for column in columns)


@dataclass(frozen=True)
class Metric:
    """A measure of a classifier, in [0, 1]; higher is better.

    Attributes:
        name: in the keys of results, "<data set>:<name>".
        title: in tables and on the log.
        statistic: what it is computed from.
        score: the statistic's tensors, on the CPU -> the value.
    """

    name: str
    title: str
    statistic: Statistic
    score: Callable[..., float]


def class_counts(
    logits: Float[Tensor, "images classes"], labels: Int64[Tensor, " images"]
) -> tuple[Int64[Tensor, " classes+1"], Int64[Tensor, " classes+1"]]:
    """Images classified correctly and images, by class; the last entry is of invalid labels."""
    labels, classes = labels.long(), logits.shape[1]
    hits = (logits.argmax(dim=1) == labels).long()
    place = labels.where((labels >= 0) & (labels < classes), classes)
    zeros = torch.zeros(classes + 1, dtype=torch.int64, device=logits.device)
    return zeros.index_add(0, place, hits), zeros.index_add(0, place, torch.ones_like(hits))


def scores_and_labels(logits: Tensor, labels: Tensor) -> Parts:
    """Logits and labels themselves, on the CPU."""
    return logits.cpu(), labels.cpu()


def top1(hits: Int64[Tensor, " classes"], sizes: Int64[Tensor, " classes"]) -> float:
    """The fraction of images classified correctly."""
    return int(hits.sum()) / int(sizes.sum())


def balanced(hits: Int64[Tensor, " classes"], sizes: Int64[Tensor, " classes"]) -> float:
    """The mean recall over the classes that occur.

    Source: Brodersen et al., "The balanced accuracy and its posterior distribution", ICPR 2010.
    """
    occurs = sizes > 0
    return float((hits[occurs].double() / sizes[occurs]).mean())


COUNTS = Statistic(class_counts, adds_up=True)
RANKING = Statistic(scores_and_labels, adds_up=False)
# by the number of dimensions of labels; the first one is the main one
METRICS: dict[int, tuple[Metric, ...]] = {
    1: (
        Metric("top1", "top-1 accuracy", COUNTS, top1),
        Metric("balanced", "balanced accuracy", COUNTS, balanced),
    ),
    2: (Metric("map", "mean average precision", RANKING, mean_average_precision),),
}
MAINS = tuple(metrics[0].name for metrics in METRICS.values())


def main_of(found: Mapping[str, float]) -> float:
    """The main metric among those of one split, see `scores`."""
    return next(found[name] for name in MAINS if name in found)


def beside(found: Mapping[str, float], name: str) -> dict[str, float]:
    """The metrics of a split that "<data set>" alone, taken as top-1 accuracy, does not tell.

    Returns:
        {"<data set>:balanced": value} or {"<data set>:map": value}.
    """
    silent = ("top1", "num_images")
    return {f"{name}:{metric}": value for metric, value in found.items() if metric not in silent}


def main_metric(results: Mapping[str, float], name: str) -> str | None:
    """The name of a data set's main metric in results; None if they have none.

    Args:
        results: {"<data set>:<metric>": value}.
        name: the data set, X or XVal.
    """
    return next((metric for metric in MAINS if f"{name}:{metric}" in results), None)


def main_key(results: Mapping[str, float], name: str) -> str:
    """The key of a data set's main metric in results, which must have one."""
    return f"{name}:{main_metric(results, name)}"


def normalized(results: Mapping[str, float], references: Mapping[str, float]) -> dict[str, float]:
    """Adds main metrics divided by those after fine-tuning, and the means of both.

    Means exclude data sets without a fine-tuned accuracy, such as the control set. If it is 0, the
    quotient is undefined, and left out with a warning.

    Args:
        results: {"<data set>:<metric>": value}.
        references: the main metrics after fine-tuning, by data set.

    Returns:
        The results, with "<data set>:normalized_<metric>" for main metrics, and the means
        "avg_top1" and "avg_normalized_top1" over them, whatever they are.
    """
    mains = {name: main for name in references if (main := main_metric(results, name))}
    normalisable = learned(mains, references)
    extended = dict(results)
    for name in normalisable:
        value = results[f"{name}:{mains[name]}"] / references[name]
        extended[f"{name}:normalized_{mains[name]}"] = value
    for kind, names in (("", list(mains)), ("normalized_", normalisable)):
        if mains:
            values = [extended[f"{name}:{kind}{mains[name]}"] for name in names]
            extended[f"avg_{kind}top1"] = float(np.mean(values)) if values else 0.0
    return extended


def learned(names: Iterable[str], references: Mapping[str, float]) -> list[str]:
    """The data sets whose fine-tuned accuracy is not 0; a warning names the others.

    Args:
        names: the data sets.
        references: the main metrics after fine-tuning, by data set.
    """
    names = list(names)
    found = [name for name in names if references[name]]
    if found != names:
        _warn_of_zero(", ".join(name for name in names if name not in found))
    return found


@functools.cache  # once, not for each coefficient
def _warn_of_zero(names: str) -> None:
    logger.warning("no normalised accuracy where the fine-tuned accuracy is 0: %s", names)


def nonlinear_advantage(acc_linear: float, acc_nonlinear: float, num_classes: int) -> float:
    r"""Normalised gap between the error rates of linear and standard fine-tuning.

    \[ \frac{e_{lin} - e_{nl}}{1 - 1/C} \]

    with error rates \(e = 1 - acc\), divided by the error rate of guessing among C classes; 0 for
    a single class, which both always predict.

    Args:
        acc_linear: accuracy of linear fine-tuning, in [0, 1].
        acc_nonlinear: accuracy of standard fine-tuning, in [0, 1].
        num_classes: C.

    Source: the definition used by the code of arXiv:2305.12827.
    """
    if num_classes == 1:
        return 0.0
    return (acc_nonlinear - acc_linear) / (1.0 - 1.0 / num_classes)
