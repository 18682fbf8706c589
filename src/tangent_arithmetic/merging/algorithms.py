"""The methods as objects: options first, models later, as users of FusionBench know them.

merged = TaskArithmeticAlgorithm(scaling_factor=0.5).run(models)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tangent_arithmetic.merging.pool import Model, ModelPool, as_pool
from tangent_arithmetic.merging.registry import get_method
from tangent_arithmetic.merging.saving import SHARD, save_merged
from tangent_arithmetic.merging.stream import Merge, merged_state
from tangent_arithmetic.runtime.errors import UsageError


class Algorithm:
    """A merging method with its options.

    Args:
        *values: options in the method's order.
        inplace: only for FusionBench's signature; a new model is made in any case.
        **options: options by name; see the method's function for what they are.

    Raises:
        UsageError: for an option that the method does not have.
    """

    method: ClassVar[str]

    def __init__(self, *values: Any, inplace: bool = False, **options: Any) -> None:
        method = get_method(self.method)
        names = list(method.defaults)
        if len(values) > len(names):
            raise UsageError(f"{self.method} takes {len(names)} options, got {len(values)}")
        given = dict(zip(names, values, strict=False))
        if twice := given.keys() & options.keys():
            raise UsageError(f"{', '.join(sorted(twice))} given twice")
        self.options = {**given, **options}
        empty = inspect.Parameter.empty
        for name, value in method.options(self.options).items():
            if value is not empty:
                setattr(self, name, value)

    def merge(self, modelpool: ModelPool | Mapping[str, Model], show: bool = False) -> Merge:
        """The merging of these models, not begun."""
        return Merge(as_pool(modelpool), get_method(self.method), self.options, show)

    def run(self, modelpool: ModelPool | Mapping[str, Model]) -> Any:
        """Merges and returns a new model; the models are left as they are.

        Args:
            modelpool: name -> module, state dict or path, the pre-trained model under
                `_pretrained_`; or a `ModelPool` of them.

        Returns:
            What the models are: a module, a dict of tensors, or for paths of encoders an encoder.

        Raises:
            UsageError: if names, shapes or kinds differ, or weights are not finite.
        """
        merge = self.merge(modelpool)
        return merge.pool.build(merged_state(merge))

    def run_to(
        self,
        modelpool: ModelPool | Mapping[str, Model],
        path: str | Path,
        max_shard_size: str | int = SHARD,
        fsync: bool = True,
        show: bool = False,
    ) -> Path:
        """Merges into a file or folder without holding the result, see `save_merged`."""
        return save_merged(self.merge(modelpool, show), path, max_shard_size, fsync)

    def __repr__(self) -> str:
        """Name and options."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({options})"


class SimpleAverageAlgorithm(Algorithm):
    """`tangent_arithmetic.merging.simple_average`."""

    method = "simple_average"


class WeightedAverageAlgorithm(Algorithm):
    """`tangent_arithmetic.merging.weighted_average`."""

    method = "weighted_average"


class TaskArithmeticAlgorithm(Algorithm):
    """`tangent_arithmetic.merging.task_arithmetic`."""

    method = "task_arithmetic"


class TiesMergingAlgorithm(Algorithm):
    """`tangent_arithmetic.merging.ties`."""

    method = "ties"


class DareTaskArithmetic(Algorithm):
    """`tangent_arithmetic.merging.dare.dare_task_arithmetic`."""

    method = "dare_task_arithmetic"


class DareTiesMerging(Algorithm):
    """`tangent_arithmetic.merging.dare.dare_ties`."""

    method = "dare_ties"


class SlerpMergeAlgorithm(Algorithm):
    """`tangent_arithmetic.merging.slerp`."""

    method = "slerp"


class DummyAlgorithm(Algorithm):
    """`tangent_arithmetic.merging.dummy`."""

    method = "dummy"
