"""Task addition: the sum of task vectors, with the coefficient chosen on validation splits.

Source: arXiv:2212.04089, section 4; arXiv:2305.12827, section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tangent_arithmetic.arithmetic.coefficients import find_optimal_coef
from tangent_arithmetic.arithmetic.metrics import normalized
from tangent_arithmetic.arithmetic.sweeps import Split, smallest, sweep_splits
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
        references: accuracies of the single-task models by split, for the normalisation.
        coefs: coefficients to try.

    Returns:
        {"test": metrics, "val": {coefficient: metrics}, "coefficient", "zeroshot": metrics}.
    """

    def swept(splits: Sequence[Split], at: Sequence[float]) -> dict[float, dict[str, float]]:
        single = {split.name: references[split.name] for split in splits}
        metrics = sweep_splits(encoder, tau, at, splits)
        return {coef: normalized(metrics[coef], single) for coef in metrics}

    on_val = {str(coef): metrics for coef, metrics in swept(val, coefs).items()}
    coef = find_optimal_coef(on_val, num_images=smallest(val))
    on_test = swept(test, [0.0, coef])
    return {"test": on_test[coef], "val": on_val, "coefficient": coef, "zeroshot": on_test[0.0]}
