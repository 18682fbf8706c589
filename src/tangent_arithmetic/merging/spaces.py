"""Merging in the coordinates of another space: any method, on smaller or aligned matrices.

A space maps the task vectors of a matrix to coordinates, and merged coordinates back; the other
tensors are averaged, see `merging.spectral`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from tangent_arithmetic.merging import spectral
from tangent_arithmetic.merging.registry import METHODS, Method, Piece, Pieces
from tangent_arithmetic.runtime.errors import unknown

Lift = Callable[[Tensor], Tensor]
Space = Callable[[Piece], tuple[list[Tensor], Lift] | None]


def method_of(name: str) -> Method:
    """The method that merges the coordinates.

    Raises:
        UsageError: if there is none of this name, or it does not merge any number of task vectors
            without data.
    """
    usable = {
        key: method
        for key, method in METHODS.items()
        if method.num_models is None and not method.ordered and not method.needs_data
    }
    if name not in usable:
        raise unknown("inner method", name, usable)
    return usable[name]


def options_of(
    method: Method, given: Mapping[str, Any] | None, unscaled: bool = True
) -> dict[str, Any]:
    """The options of the inner method.

    Args:
        method: the inner method.
        given: options by name.
        unscaled: whether its scaling factor is 1 unless it is among `given`.

    Raises:
        UsageError: for an option that it does not have.
    """
    scales = unscaled and method.coefficient is not None and method.scales
    unit = {str(method.coefficient): 1.0} if scales else {}
    return method.options({**unit, **(given or {})})


def coordinates(piece: Piece, space: Space) -> tuple[Piece, Lift] | None:
    """The coordinates of a matrix as a piece around zero; None if all task vectors are zero."""
    found = space(piece)
    if found is None:
        return None
    values, lift = found
    flat = tuple(value.reshape(-1).to(piece.base.dtype) for value in values)
    zero = flat[0].new_zeros(flat[0].shape)
    shape = tuple(values[0].shape)
    return Piece(piece.name, shape, 0, zero, flat, piece.models, changed=flat), lift


def prepare_in(
    pieces: Pieces,
    *,
    space: Space,
    inner: str,
    inner_options: Mapping[str, Any] | None,
    exclude_keys: Sequence[str] | None,
    **_others: Any,
) -> Any:
    """What the inner method prepares, from the coordinates of all matrices; None if nothing."""
    merger = method_of(inner)
    if merger.prepare is None:
        return None

    def inside() -> Iterator[Piece]:
        matrices = (piece for piece in pieces() if spectral.is_spectral(piece, exclude_keys))
        found = (coordinates(piece, space) for piece in matrices)
        return (each[0] for each in found if each is not None)

    return merger.prepare(inside, **options_of(merger, inner_options))


def merge_in(
    piece: Piece,
    *,
    space: Space,
    scaling_factor: float,
    inner: str,
    inner_options: Mapping[str, Any] | None,
    exclude_keys: Sequence[str] | None,
    statistics: Any,
) -> Tensor:
    r"""\(\theta_0 + \lambda\) times what the inner method gives, lifted back.

    Args:
        piece: one tensor of every model.
        space: the space.
        scaling_factor: lambda.
        inner: the method that merges the coordinates.
        inner_options: its options.
        exclude_keys: tensors to average.
        statistics: the result of `prepare_in`.
    """
    if not spectral.is_spectral(piece, exclude_keys):
        return spectral.mean_tau(piece).mul_(scaling_factor).add_(piece.base)
    found = coordinates(piece, space)
    if found is None:
        return piece.base.clone()
    merger, (own, lift) = method_of(inner), found
    arguments = options_of(merger, inner_options)
    if merger.prepare is not None:
        arguments["statistics"] = statistics
    merged = merger.function(own, **arguments).view(own.shape).double()
    return lift(merged).mul_(scaling_factor).reshape(-1).to(piece.base.dtype).add_(piece.base)
