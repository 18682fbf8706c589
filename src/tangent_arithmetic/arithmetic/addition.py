"""Task addition: the sum of task vectors, its coefficient chosen on validation splits.

Source: arXiv:2212.04089, section 4; arXiv:2305.12827, section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tangent_arithmetic.arithmetic.coefficients import find_optimal_coef
from tangent_arithmetic.arithmetic.metrics import normalized
from tangent_arithmetic.arithmetic.sweeps import Split, by_text, smallest, sweep_splits
from tangent_arithmetic.encoders.base import Encoder
from tangent_arithmetic.storage.statedict import State


def add(
    encoder: Encoder,
    tau: State,
    val: Sequence[Split],
    test: Sequence[Split],
    references: Mapping[str, float],
    coefs: Sequence[float],
) -> dict[str, Any]:
    """Evaluates the sum of task vectors on every task.

    The coefficient is the smallest one with the best mean normalised accuracy on the validation
    splits.

    Args:
        encoder: at theta0, standard or linear.
        tau: the sum of the task vectors, by name.
        val: validation splits of the tasks.
        test: test splits of the tasks.
        references: accuracies of the single-task models, by split, that accuracies are divided by.
        coefs: coefficients to try.

    Returns:
        {"test": metrics, "val": {coefficient: metrics}, "coefficient", "zeroshot": metrics}.
    """

    def swept(splits: Sequence[Split], at: Sequence[float]) -> dict[float, dict[str, float]]:
        own = {split.name: references[split.name] for split in splits}
        found = sweep_splits(encoder, tau, at, splits)
        return {coef: normalized(metrics, own) for coef, metrics in found.items()}

    tried = by_text(swept(val, coefs))
    coef = find_optimal_coef(tried, num_images=smallest(val))
    tested = swept(test, [0.0, coef])
    return {"test": tested[coef], "val": tried, "coefficient": coef, "zeroshot": tested[0.0]}
