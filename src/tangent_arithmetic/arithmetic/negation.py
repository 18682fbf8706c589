"""Task negation: the model forgets a task but keeps its accuracy on a control set.

Source: arXiv:2212.04089, section 3; arXiv:2305.12827, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tangent_arithmetic.arithmetic.coefficients import find_optimal_coef
from tangent_arithmetic.arithmetic.line import lines
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
        last is whether any coefficient keeps the control set. For linear encoders also "exact", see
        `exact_optimum`, with "test" and "test_control" there.
    """
    negated, coefs = statedict.scale(tau, -1.0), [float(coef) for coef in coefs]
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
    exact = exact_optimum(encoder, negated, val, least)
    further = [exact["coefficient"]] if exact else []
    swept_on_test = sweep_splits(encoder, negated, [coef, *further], test)

    def tested(at: float) -> dict[str, float]:
        keys = ("test", "test_control")
        metrics = swept_on_test[at]
        return {k: metrics[main_key(metrics, s.name)] for k, s in zip(keys, test, strict=True)}

    return {
        **tested(coef),
        "val": on_val,
        "coefficient": coef,
        "qualified": any(metrics[control] >= least for metrics in on_val.values()),
        **({"exact": {**exact, **tested(exact["coefficient"])}} if exact else {}),
    }


def exact_optimum(
    encoder: Encoder, negated: State, val: tuple[Split, Split], least: float
) -> dict[str, Any] | None:
    """The true minimum of the task's accuracy over all coefficients >= 0 that keep the control set.

    Args:
        encoder: at theta0.
        negated: -tau, by name.
        val: validation splits of the task and of the control set.
        least: lowest acceptable accuracy on the latter.

    Returns:
        {"coefficient", "value", "plateau": [low, high]}: the middle of the range with the lowest
        accuracy, and of equal ones with the largest on the control set; that accuracy; the range,
        whose end is None where it is unbounded. None if a split has no exact line, see
        `line.lines`, or if no coefficient keeps the control set.
    """
    found = lines(encoder, negated, val)
    if found is None:
        return None
    task, control = found
    best = task.least(control, least, low=0.0)
    if best is None:
        return None
    return {"coefficient": best.coefficient, "value": best.value, "plateau": best.ends()}
