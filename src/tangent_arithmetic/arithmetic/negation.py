"""Task negation: a model forgets a task and keeps a control set.

Source: arXiv:2212.04089, section 3; arXiv:2305.12827, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tangent_arithmetic.arithmetic.coefficients import find_optimal_coef
from tangent_arithmetic.arithmetic.sweeps import Split, by_text, smallest, sweep_splits
from tangent_arithmetic.encoders.base import Encoder
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.storage.statedict import State


def negate(
    encoder: Encoder,
    tau: State,
    val: tuple[Split, Split],
    test: tuple[Split, Split],
    least: float,
    coefs: Sequence[float],
) -> dict[str, Any]:
    """Negates one task vector.

    The coefficient is the smallest one with the lowest validation accuracy on the task, among those
    at which the control set keeps an accuracy of `least`.

    Args:
        encoder: at theta0, standard or linear.
        tau: the task vector, by name; its negative is added.
        val: validation splits of the task and of the control set.
        test: test splits of the two.
        least: the least accuracy of the control set's validation split.
        coefs: coefficients to try.

    Returns:
        {"test", "test_control", "val": {coefficient: metrics}, "coefficient", "qualified"}; the
        last says whether any coefficient kept the control set.
    """
    negated = statedict.scale(tau, -1.0)
    task, control = val
    tried = by_text(sweep_splits(encoder, negated, coefs, val))
    coef = find_optimal_coef(
        tried,
        metric=f"{task.name}:top1",
        minimize=True,
        control_metric=f"{control.name}:top1",
        control_metric_threshold=least,
        num_images=smallest([task]),
    )
    tested = sweep_splits(encoder, negated, [coef], test)[coef]
    return {
        "test": tested[f"{test[0].name}:top1"],
        "test_control": tested[f"{test[1].name}:top1"],
        "val": tried,
        "coefficient": coef,
        "qualified": tried[str(coef)][f"{control.name}:top1"] >= least,
    }
