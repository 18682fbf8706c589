r"""Merging methods: their form, and the table of them.

A method is a pure function of one *piece*: the same part of one tensor in every model. The caller
(`merging/stream.py`) cuts tensors into pieces and joins the results, so that a method never holds a
model and knows nothing about files. The pieces of a method registered with `whole=True` are whole
tensors.

    @merging_method("simple_average", source="arXiv:2203.05482")
    def simple_average(piece: Piece) -> Tensor:
        return sum(piece.thetas) / len(piece.thetas)

Its keyword arguments are its options: names, defaults and types are read from the signature, and so
are the class in `tangent_arithmetic.merging` and the configuration in the group `method`.

A method that needs more than a piece (a threshold over the whole vector) has a `prepare`, which
reads the weights beforehand; the function gets its result as `statistics`. With `needs_data`,
`prepare` runs whole models on images instead, see `merging/examples.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from tangent_arithmetic.merging.options import Registered, signature
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

PRETRAINED = "_pretrained_"
SCALE = "scaling_factor"
NAMES = ("exclude_keys", "remove_keys", "ignore_keys")  # options that list names of tensors
OWN = "tangent_arithmetic.merging."  # where the classes of the methods are found
Function = TypeVar("Function", bound="Callable[..., Tensor]")
Change = TypeVar("Change", bound="Callable[..., Iterator[Tensor]]")


@dataclass(frozen=True)
class Piece:
    """The same part of one tensor in every model, as vectors of one floating-point type.

    Attributes:
        name: the tensor's name.
        shape: the shape of the whole tensor.
        start: the index in the flattened tensor at which the piece starts.
        theta0: the piece of the pre-trained model, or None.
        thetas: the pieces of the models to merge, in order. They must not be modified.
        models: the names of the models.
        changed: the pieces of the task vectors where these are known better than from `thetas`,
            which hold them to the precision of the weights: after plug-ins, and of adapters; else
            None.
        factors: two factors of each task vector, a whole matrix, if all models are adapters and no
            plug-in has changed them; else None.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    theta0: Tensor | None
    thetas: tuple[Tensor, ...]
    models: tuple[str, ...]
    changed: tuple[Tensor, ...] | None = None
    factors: tuple[tuple[Tensor, Tensor], ...] | None = None

    @property
    def base(self) -> Tensor:
        """theta0, for methods that need it."""
        assert self.theta0 is not None, "the method is registered as one that needs theta0"
        return self.theta0

    def tau(self, index: int) -> Tensor:
        """The piece of one task vector, theta - theta0, as a new tensor."""
        if self.changed is not None:
            return self.changed[index].clone()
        return self.thetas[index] - self.base

    def taus(self) -> Iterator[Tensor]:
        """The pieces of the task vectors, one after the other, each a new tensor."""
        return (self.tau(index) for index in range(len(self.thetas)))

    def with_taus(self, taus: Iterable[Tensor]) -> Piece:
        """The same piece with other task vectors."""
        changed = tuple(taus)
        thetas = tuple(self.base + tau for tau in changed)
        return replace(self, thetas=thetas, changed=changed, factors=None)

    def by_model(self) -> dict[str, Tensor]:
        """The pieces of all models, by the models' names."""
        pieces = dict(zip(self.models, self.thetas, strict=True))
        return pieces if self.theta0 is None else {**pieces, PRETRAINED: self.theta0}


Pieces = Callable[[], Iterator[Piece]]


def per_model(value: float | Sequence[float], num_models: int) -> list[float]:
    """An option that is one number for all models, or a list of one per model, as a list."""
    return [value] * num_models if isinstance(value, int | float) else list(value)


def one_per_model(value: float | Sequence[float], models: Sequence[str], what: str) -> list[float]:
    """A number for each model.

    Args:
        value: one number for all, or a list.
        models: the names of the models.
        what: the option, for the message.

    Raises:
        UsageError: if there is a list whose length is not the number of models.
    """
    values = per_model(value, len(models))
    if len(values) != len(models):
        raise UsageError(
            f"{what} must be one number, or {len(models)} of them, one for each of "
            f"{', '.join(models)}; got {len(values)}"
        )
    return values


@dataclass(frozen=True, eq=False, kw_only=True)
class Method(Registered):
    """A registered merging method.

    Attributes:
        algorithm: the name of its class, such as "TaskArithmeticAlgorithm".
        config: the name of its configuration in the group `method`.
        prepare: (pieces, **options) -> statistics; `pieces()` reads all weights once. With
            `needs_data`: (examples, **options) -> statistics.
        passes: how often the weights are read with the default options, merging included; models
            that are run are read beyond that.
        needs_pretrained: whether the pre-trained model is required.
        num_models: the number of models that it merges, without the pre-trained one unless
            `ordered`; None for any number.
        whole: whether its pieces must be whole tensors.
        coefficient: the option that can be `auto`, "scaling_factor" if there is one; the merged
            weights are an affine function of it.
        scales: whether the coefficient scales the merged task vector, so that 0 gives theta0.
        largest: the largest coefficient that `auto` tries.
        ordered: whether the pre-trained model counts as the first of the models.
        drops: whether weights may be left out, so that a NaN in one need not show in the result.
        needs_data: whether it runs the models on images of their tasks.
        of_outputs: whether rows and columns of a matrix differ, rows belonging to outputs.
    """

    algorithm: str
    config: str
    passes: int = 1
    needs_pretrained: bool = True
    num_models: int | None = None
    whole: bool = False
    coefficient: str | None = None
    scales: bool = True
    largest: float = 1.0
    ordered: bool = False
    drops: bool = False
    needs_data: bool = False
    of_outputs: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Plugin(Registered):
    """A registered plug-in, which changes the task vectors before any method merges them.

    Its function gives the changed task vectors of a piece, one per model, as an iterator.
    """

    def step(self, pieces: Pieces, options: Mapping[str, Any]) -> Callable[[Piece], Piece]:
        """The change of a piece, after a pass over the weights if the plug-in has a `prepare`.

        Args:
            pieces: starts a pass over the weights, as earlier plug-ins leave them.
            options: all options.
        """
        arguments = dict(options)
        if self.prepare is not None:
            arguments["statistics"] = self.prepare(pieces, **options)
        return lambda piece: piece.with_taus(self.function(piece, **arguments))


METHODS: dict[str, Method] = {}
PLUGINS: Registry[Plugin] = Registry("plug-in")


def algorithm_name(method: str) -> str:
    """The default name of a method's class: "task_arithmetic" has `TaskArithmeticAlgorithm`."""
    return "".join(word.capitalize() for word in method.split("_")) + "Algorithm"


def merging_method(
    name: str, *, source: str, algorithm: str | None = None, config: str | None = None, **facts: Any
) -> Callable[[Function], Function]:
    """Registers a function as a merging method; its keyword arguments are its options.

    Args:
        name: the name of the method.
        source: the paper that defines it.
        algorithm: the name of its class, by default `algorithm_name(name)`.
        config: the name of its configuration in the group `method`, by default `name`.
        **facts: the other attributes of `Method`.

    Raises:
        UsageError: if another method has a class or a configuration of this name.
    """
    names = {"algorithm": algorithm or algorithm_name(name), "config": config or name}
    for other in METHODS.values():
        for kind, value in names.items():
            if other.name != name and getattr(other, kind) == value:
                raise UsageError(
                    f"the merging methods {other.name} and {name} share the {kind} name "
                    f"{value!r}; pass {kind}= to merging_method to choose another"
                )

    def register(function: Function) -> Function:
        found = signature(function)
        derived: dict[str, Any] = {**names, **found}
        derived |= {"coefficient": SCALE if SCALE in found["defaults"] else None, **facts}
        METHODS[name] = Method(name=name, function=function, source=source, **derived)
        return function

    return register


def plugin(
    name: str, *, source: str, prepare: Callable[..., Any] | None = None
) -> Callable[[Change], Change]:
    """Registers a function as a plug-in; its keyword arguments are its options.

    Args:
        name: the name of the plug-in.
        source: the paper that defines it.
        prepare: see `Registered`.
    """

    def register(function: Change) -> Change:
        PLUGINS[name] = Plugin(
            name=name, function=function, source=source, prepare=prepare, **signature(function)
        )
        return function

    return register
