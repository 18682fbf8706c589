"""The merging methods as classes, in the form of FusionBench: options first, models later.

merged = TaskArithmeticAlgorithm(scaling_factor=0.5).run(models)

Each registered method has a class, made from its registration; see `algorithm_class`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tangent_arithmetic.merging.methods import METHODS, get_method
from tangent_arithmetic.merging.pool import Model, ModelPool, as_pool
from tangent_arithmetic.merging.registry import OWN, Method
from tangent_arithmetic.merging.saving import SHARD, save_merged
from tangent_arithmetic.merging.stream import Merge, merged_state
from tangent_arithmetic.runtime.errors import UsageError, unknown


class Algorithm:
    """A merging method with its options.

    Args:
        *values: options in the method's order.
        inplace: accepted for compatibility with FusionBench; the result is always a new model.
        **options: options by name, see the method's function.

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
        for name, value in method.options(self.options).items():
            setattr(self, name, value)

    def merge(self, modelpool: ModelPool | Mapping[str, Model], show: bool = False) -> Merge:
        """The merge of these models, not yet computed."""
        return Merge(as_pool(modelpool), get_method(self.method), self.options, show)

    def run(self, modelpool: ModelPool | Mapping[str, Model]) -> Any:
        """Merges the models into a new one and leaves them unchanged.

        Args:
            modelpool: name -> module, state dict or path, with the pre-trained model under
                `_pretrained_`; or a `ModelPool` of them.

        Returns:
            A module for modules, a state dict for state dicts and files of weights, an encoder for
            checkpoints of encoders.

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


def algorithm_class(name: str) -> type[Algorithm]:
    """The class of a registered method.

    Args:
        name: the name of the class, such as "TaskArithmeticAlgorithm".

    Raises:
        UsageError: if no method has a class of this name.
    """
    for method in METHODS.values():
        if method.algorithm == name:
            return _class_of(method)
    raise unknown("merging algorithm", name, (method.algorithm for method in METHODS.values()))


@functools.cache
def _class_of(method: Method) -> type[Algorithm]:
    facts = {
        "method": method.name,
        "__module__": OWN.rstrip("."),
        "__doc__": inspect.getdoc(method.function),
    }
    return type(method.algorithm, (Algorithm,), facts)
