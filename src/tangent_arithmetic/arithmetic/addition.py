"""Task addition: the sum of task vectors, with the coefficient chosen on validation splits.

Source: arXiv:2212.04089, section 4; arXiv:2305.12827, section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tangent_arithmetic.arithmetic.coefficients import find_optimal_coef, least_kept
from tangent_arithmetic.arithmetic.line import lines
from tangent_arithmetic.arithmetic.metrics import normalized
from tangent_arithmetic.arithmetic.steps import Plateau, Steps, weighted
from tangent_arithmetic.arithmetic.sweeps import Split, smallest, sweep_splits
from tangent_arithmetic.encoders.base import Encoder
from tangent_arithmetic.storage.statedict import State

NEAR = 0.005  # of the mean normalised accuracy: what a coefficient near the best may cost


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
        {"test": metrics, "test_at_1": metrics at coefficient 1, "val": {coefficient: metrics},
        "coefficient", "zeroshot": metrics}; and for linear encoders "exact", see `exact_optimum`,
        with "test", the metrics there.
    """

    def swept(splits: Sequence[Split], at: Sequence[float]) -> dict[float, dict[str, float]]:
        single = {split.name: references[split.name] for split in splits}
        metrics = sweep_splits(encoder, tau, at, splits)
        return {coef: normalized(metrics[coef], single) for coef in metrics}

    on_val = {str(coef): metrics for coef, metrics in swept(val, coefs).items()}
    coef = find_optimal_coef(on_val, num_images=smallest(val))
    exact = exact_optimum(encoder, tau, val, references)
    further = [exact["coefficient"]] if exact else []
    on_test = swept(test, sorted({0.0, coef, 1.0, *further}))
    results = {
        "test": on_test[coef],
        "test_at_1": on_test[1.0],
        "val": on_val,
        "coefficient": coef,
        "zeroshot": on_test[0.0],
    }
    if exact:
        results["exact"] = {**exact, "test": on_test[exact["coefficient"]]}
    return results


def exact_optimum(
    encoder: Encoder, tau: State, val: Sequence[Split], references: Mapping[str, float]
) -> dict[str, Any] | None:
    """The true maximum of the mean normalised accuracy over all real coefficients.

    Args and their meaning are those of `add`.

    Returns:
        {"coefficient", "value", "plateau": [low, high], "near": [low, high]}: the middle of the
        widest range with the largest value, that range, and the range about it in which at most
        `NEAR` is lost; ends are None where it is unbounded. None if a split has no exact line, see
        `line.lines`.
    """
    found = lines(encoder, tau, val)
    learned = [split.name for split in val if references[split.name]]
    if found is None or not learned:
        return None
    total = _mean({s.name: line for s, line in zip(val, found, strict=True)}, learned, references)
    best = total.best()
    near = total.around(best.coefficient, least_kept(1.0, best.value - NEAR))
    return {
        "coefficient": best.coefficient,
        "value": best.value,
        "plateau": best.ends(),
        "near": Plateau(*(near or (best.low, best.high)), best.value).ends(),
    }


def _mean(
    found: Mapping[str, Steps], names: Sequence[str], references: Mapping[str, float]
) -> Steps:
    """The mean of accuracies, each divided by its reference."""
    weights = [1 / (len(names) * references[name]) for name in names]
    return weighted([found[name] for name in names], weights)
