"""Metrics of edited models: normalised accuracies and the non-linear advantage."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

import numpy as np

logger = logging.getLogger(__name__)


def normalized(results: Mapping[str, float], references: Mapping[str, float]) -> dict[str, float]:
    """Adds top-1 divided by the fine-tuned accuracy, and the means of both.

    Means exclude data sets without a fine-tuned accuracy, such as the control set. If it is 0, the
    quotient is undefined, and left out with a warning.

    Args:
        results: {"<data set>:top1": accuracy}.
        references: fine-tuned accuracies by data set.

    Returns:
        The results, with "<data set>:normalized_top1", "avg_top1" and "avg_normalized_top1".
    """
    tasks = [name for name in references if f"{name}:top1" in results]
    learned = [name for name in tasks if references[name]]
    if tasks != learned:
        _warn_of_zero(", ".join(name for name in tasks if not references[name]))
    extended = dict(results)
    for name in learned:
        extended[f"{name}:normalized_top1"] = results[f"{name}:top1"] / references[name]
    for kind, names in (("top1", tasks), ("normalized_top1", learned)):
        if tasks:
            values = [extended[f"{name}:{kind}"] for name in names]
            extended[f"avg_{kind}"] = float(np.mean(values)) if values else 0.0
    return extended


@functools.cache  # once, not for each coefficient
def _warn_of_zero(names: str) -> None:
    logger.warning("no normalised accuracy where the fine-tuned accuracy is 0: %s", names)


def nonlinear_advantage(acc_linear: float, acc_nonlinear: float, num_classes: int) -> float:
    r"""Normalised gap between the error rates of linear and standard fine-tuning.

    \[ \frac{e_{lin} - e_{nl}}{1 - 1/C} \]

    with error rates \(e = 1 - acc\), divided by the error rate of guessing among C classes.

    Args:
        acc_linear: accuracy of linear fine-tuning, in [0, 1].
        acc_nonlinear: accuracy of standard fine-tuning, in [0, 1].
        num_classes: C.

    Source: the definition used by the code of arXiv:2305.12827.
    """
    return (acc_nonlinear - acc_linear) / (1.0 - 1.0 / num_classes)
