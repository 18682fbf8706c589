"""The merging methods as classes, as in FusionBench: options first, models later.

merged = TaskArithmeticAlgorithm(scaling_factor=0.5).run(models)

The classes have no code of their own: `algorithm_class` names a subclass of `Algorithm` after each
registered method.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from tangent_arithmetic.merging.examples import Examples
from tangent_arithmetic.merging.methods import METHODS, get_method
from tangent_arithmetic.merging.plugins import Specification, chosen_plugins, written_plugins
from tangent_arithmetic.merging.pool import Model, ModelPool
from tangent_arithmetic.merging.registry import OWN
from tangent_arithmetic.merging.saving import SHARD, save_merged
from tangent_arithmetic.merging.stream import Merge, merged_state
from tangent_arithmetic.runtime.errors import UsageError, unknown


class Algorithm:
    """A merging method with its options.

    Args:
        *values: options in the method's order.
        inplace: accepted for compatibility with FusionBench; the result is always a new model.
        plugins: plug-ins that change the task vectors before the method, in order, see
            `merging.plugins`: names, or {name: {option: value}}.
        **options: options by name, see the method's function.

    Raises:
        UsageError: for an option that the method does not have, or an unknown plug-in.
    """

    method: ClassVar[str]

    def __init__(
        self,
        *values: Any,
        inplace: bool = False,
        plugins: Sequence[Specification] = (),
        **options: Any,
    ) -> None:
        method = get_method(self.method)
        names = list(method.defaults)
        if len(values) > len(names):
            raise UsageError(
                f"{self.method} takes {len(names)} options, got {len(values)} by position; name "
                "others, such as inplace=True"
            )
        positional = dict(zip(names, values, strict=False))
        if twice := positional.keys() & options.keys():
            raise UsageError(f"{', '.join(sorted(twice))} given twice")
        self.options = {**positional, **options}
        self.plugins = written_plugins(chosen_plugins(plugins))
        for name, value in method.options(self.options).items():
            setattr(self, name, value)

    def merge(
        self,
        modelpool: ModelPool | Mapping[str, Model],
        show: bool = False,
        examples: Examples | None = None,
    ) -> Merge:
        """The merge of these models, not yet computed."""
        pool, method = ModelPool.of(modelpool), get_method(self.method)
        return Merge(pool, method, self.options, show, examples, self.plugins)

    def with_options(self, **options: Any) -> Self:
        """The same algorithm with some options changed."""
        return type(self)(**{**self.options, **options}, plugins=self.plugins)

    def run(
        self, modelpool: ModelPool | Mapping[str, Model], examples: Examples | None = None
    ) -> Any:
        """Merges the models into a new one and leaves them unchanged.

        Args:
            modelpool: name -> module, state dict or path, with the pre-trained model under
                `_pretrained_`; or a `ModelPool` of them.
            examples: the models on images of their tasks, for methods that need data: the result
                of a task pool's `examples(modelpool)`.

        Returns:
            A module for modules, a state dict for state dicts and files of weights, an encoder for
            checkpoints of encoders.

        Raises:
            UsageError: if names, shapes or kinds differ, or weights are not finite.
        """
        merge = self.merge(modelpool, examples=examples)
        return merge.pool.build(merged_state(merge))

    def run_to(
        self,
        modelpool: ModelPool | Mapping[str, Model],
        path: str | Path,
        max_shard_size: str | int = SHARD,
        fsync: bool = True,
        show: bool = False,
        examples: Examples | None = None,
    ) -> Path:
        """Merges into a file or folder without holding the result, see `save_merged`."""
        return save_merged(self.merge(modelpool, show, examples), path, max_shard_size, fsync)

    def __repr__(self) -> str:
        """Name and options."""
        facts = {**self.options, **({"plugins": self.plugins} if self.plugins else {})}
        options = ", ".join(f"{name}={value!r}" for name, value in facts.items())
        return f"{type(self).__name__}({options})"


@functools.cache
def algorithm_class(name: str) -> type[Algorithm]:
    """The class of a registered method.

    Args:
        name: the name of the class, such as "TaskArithmeticAlgorithm".

    Raises:
        UsageError: if no method has a class of this name.
    """
    methods = {method.algorithm: method for method in METHODS.values()}
    if name not in methods:
        raise unknown("merging algorithm", name, methods)
    doc = inspect.getdoc(methods[name].function)
    facts = {"method": methods[name].name, "__module__": OWN.rstrip("."), "__doc__": doc}
    return type(name, (Algorithm,), facts)
