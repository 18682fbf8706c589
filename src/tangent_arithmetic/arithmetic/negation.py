"""Task negation: the model forgets a task but keeps its accuracy on a control set.

Source: arXiv:2212.04089, section 3; arXiv:2305.12827, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tangent_arithmetic.arithmetic.coefficients import find_optimal_coef
from tangent_arithmetic.arithmetic.metrics import main_key
from tangent_arithmetic.arithmetic.sweeps import Split, sweep_splits
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
    """Negates one task vector; accuracies are main metrics, see `arithmetic.metrics`.

    The coefficient is the smallest one with the lowest validation accuracy on the task, among those
    that keep the control set's validation accuracy at `least` or more.

    Args:
        encoder: at theta0, standard or linear.
        tau: the task vector, by name; its negative is added.
        val: validation splits of the task and of the control set.
        test: test splits of the two.
        least: lowest acceptable accuracy on the control set's validation split.
        coefs: coefficients to try.

    Returns:
        {"test", "test_control", "val": {coefficient: metrics}, "coefficient", "qualified"}; the
        last is whether any coefficient keeps the control set.
    """
    negated = statedict.scale(tau, -1.0)
    swept = sweep_splits(encoder, negated, coefs, val)
    on_val = {str(coef): metrics for coef, metrics in swept.items()}
    target, control = (main_key(swept[coefs[0]], split.name) for split in val)
    coef = find_optimal_coef(
        on_val,
        metric=target,
        minimize=True,
        control_metric=control,
        control_metric_threshold=least,
        num_images=val[0].num_images,
    )
    on_test = sweep_splits(encoder, negated, [coef], test)[coef]
    return {
        "test": on_test[main_key(on_test, test[0].name)],
        "test_control": on_test[main_key(on_test, test[1].name)],
        "val": on_val,
        "coefficient": coef,
        "qualified": on_val[str(coef)][control] >= least,
    }
