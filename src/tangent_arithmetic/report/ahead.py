"""What later stages of a benchmark read: features of a linear mode, from one pass over each split.

Single tasks, sums, negations and the page's explorer each need directions J(x; theta0) tau of other
vectors on the same splits. Computed stage by stage, f0 and its activations are computed again for
each of them. Here the vectors of all stages share a pass, and the stages find them in the cache.
Where all vectors are needed, the direction of their sum is the sum of theirs.
"""

from __future__ import annotations

import functools
import operator

from tangent_arithmetic.arithmetic.features import linear_features
from tangent_arithmetic.encoders.base import is_linear
from tangent_arithmetic.report.sizes import sample_size
from tangent_arithmetic.run.models import base_encoder, split_of, task_vector, zeroshot_encoder
from tangent_arithmetic.run.run import Run


def compute_ahead(run: Run, page: bool) -> None:
    """Caches the features of a run's linear mode that single tasks, sums and negations read.

    On a task's splits these are the directions of its own vector and of the sum, on the control
    set's those of each vector. Standard modes have none, and without a cache nothing is computed.

    Args:
        run: the run.
        page: whether the explorer of the mode will be made, which reads all vectors on all splits;
            where it shows a sample of these, they are left to it.
    """
    mode = run.mode.name
    if run.feature_cache is None or not run.mode.linear:
        return
    encoder, theta0_hash = zeroshot_encoder(run)
    base = base_encoder(encoder, mode)
    assert is_linear(base)
    tasks, control = run.tasks, [] if run.control_set is None else [run.control_set]
    names = [f"{name}{end}" for name in dict.fromkeys([*tasks, *control]) for end in ("Val", "")]
    page = page and sample_size(run, names, len(tasks)) in (None, run.config.sample)
    taus = {task: task_vector(run, task, mode, encoder, theta0_hash) for task in tasks}
    total = functools.reduce(operator.add, taus.values()).vector
    vectors = {task: tau.vector for task, tau in taus.items()}
    for name in names:
        task = name.removesuffix("Val")
        split = split_of(run, base, name)
        place = (split.batches, split.compute, split.cache)
        if page or task in control:
            linear_features(base, list(vectors.values()), *place, total=total)
        else:
            linear_features(base, [vectors[task], total], *place)
