"""Piecewise merging: memory is one piece of each model, whatever their size.

A piece is a part of a tensor, or a whole one for methods that say so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.merging import spectral
from tangent_arithmetic.merging.examples import Examples
from tangent_arithmetic.merging.plugins import Specification, chosen_plugins, written_plugins
from tangent_arithmetic.merging.pool import ModelPool
from tangent_arithmetic.merging.registry import (
    METHODS,
    NAMES,
    PRETRAINED,
    Method,
    Piece,
    Pieces,
    Plugin,
)
from tangent_arithmetic.runtime.errors import UsageError, closest, shown
from tangent_arithmetic.runtime.logs import byte_progress
from tangent_arithmetic.storage import statedict

logger = logging.getLogger(__name__)
PIECE = 2**18  # numbers; affects speed only
VARIANCE = "running_var"  # ends the names of the variances of batch norms
Step = Callable[[Piece], Piece]  # the change of a plug-in
Steps = tuple[Step, ...]


@dataclass(frozen=True)
class Part:
    """A part of a merged tensor, from index `start`, with dtype and device of the base model."""

    name: str
    start: int
    values: Tensor


def is_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are finite."""
    return all(bool(t.sum().isfinite()) or bool(t.isfinite().all()) for t in tensors)


def _checked(plugin: Plugin, step: Step, options: Mapping[str, Any]) -> Step:
    """The change of a plug-in, with an error where its task vectors are not finite."""

    def checked(piece: Piece) -> Piece:
        changed = step(piece)
        if not is_finite(*(changed.changed or ())):
            raise UsageError(
                f"the plug-in {plugin.name} gives task vectors that are not finite in "
                f"{shown(piece.name)}; check its options: {dict(options)}"
            )
        return changed

    return checked


def _changed(piece: Piece, steps: Steps) -> Piece:
    """A piece after the changes of plug-ins, in order."""
    return reduce(lambda before, step: step(before), steps, piece)


class Merge:
    """The merge of a pool of models by a method.

    Args:
        pool: the models.
        method: the method.
        options: options of the method; the others have their defaults.
        show: show progress in bytes per second.
        examples: the models on images of their tasks, for methods with `needs_data`.
        plugins: plug-ins that change the task vectors before the method, see `chosen_plugins`.

    Raises:
        UsageError: if the models do not match each other or the method, an option is unknown, or
            the method needs images and there are none.
    """

    def __init__(
        self,
        pool: ModelPool,
        method: Method,
        options: Mapping[str, Any],
        show: bool = False,
        examples: Examples | None = None,
        plugins: Sequence[Specification] = (),
    ) -> None:
        self.pool, self.method, self.show, self.examples = pool, method, show, examples
        self.options, self.plugins = method.options(options), chosen_plugins(plugins)
        if self.plugins and not pool.has_pretrained:
            raise UsageError(
                f"plug-ins change task vectors and need the pre-trained model, named {PRETRAINED}"
            )
        if self.plugins and method.needs_data:
            raise UsageError(
                f"{method.name} runs the models as they are and takes no plug-ins, got "
                f"{', '.join(plugin.name for plugin, _ in self.plugins)}; leave them out"
            )
        if method.needs_pretrained and not pool.has_pretrained:
            raise UsageError(f"{method.name} needs the pre-trained model, named {PRETRAINED}")
        self.models = list(pool.model_names)
        if method.ordered and pool.has_pretrained:
            self.models.insert(0, PRETRAINED)
        if method.num_models is not None and len(self.models) != method.num_models:
            raise UsageError(
                f"{method.name} merges {method.num_models} models, got {len(self.models)}: "
                f"{', '.join(self.models)}"
            )
        if method.needs_data and examples is None:
            raise UsageError(
                f"{method.name} runs the models on images of their tasks, and got none; add a task "
                "pool with these tasks, such as taskpool=embedded, or in Python "
                "run(models, task_pool.examples(models))"
            )
        pool.check()
        self.theta0 = pool.base if pool.has_pretrained else None
        self.thetas = [pool.weights(name) for name in self.models]
        extra = [self.theta0] if self.theta0 and PRETRAINED not in self.models else []
        self.inputs = [*extra, *self.thetas]  # read in one pass
        self.names = sorted(pool.base.outline)
        self.floating = [
            name
            for name in self.names
            if all(statedict.is_real_float(weights.outline[name]) for weights in self.inputs)
        ]
        ties = statedict.merge_ties(*(weights.ties for weights in (pool.base, *self.inputs)))
        self.ties = statedict.consistent_ties(ties, *(weights.tensors for weights in self.inputs))
        self.bytes = sum(weights.nbytes for weights in self.inputs)
        self.arguments = self._named(self.options)
        self._warn_of_rows()

    def _warn_of_rows(self) -> None:
        """Warns where the method takes rows for outputs, and the weights have inputs there."""
        used = (self.method, METHODS.get(str(self.options.get("inner"))))
        names = [method.name for method in used if method is not None and method.of_outputs]
        if names and spectral.has_rows_of_inputs(self.pool.base.outline):
            logger.warning(
                "%s takes the rows of a matrix for outputs, but the layers of GPT-2 store inputs "
                "there, so that it merges their transposes differently; docs/merging.md says how "
                "much, and which methods do not mind",
                " with ".join(names),
            )

    def _named(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, inner ones included, with tied tensors under the names of their pieces."""
        named = dict(options)
        for option, value in options.items():
            if option in NAMES and value is not None:
                named[option] = [self._first(name, option) for name in value]
            elif isinstance(value, Mapping):
                named[option] = self._named(value)
        return named

    def _first(self, name: str, option: str) -> str:
        if name not in self.pool.base.outline:
            raise UsageError(
                f"{option} names {shown(name)!r}, which is no tensor of these models; the nearest "
                f"are {', '.join(map(shown, closest(name, self.names)[:3]))}"
            )
        return self.ties.get(name, name)

    def parts(self, any_variance: bool = False) -> Iterator[Part]:
        """The merged tensors in the order of their names, each in one or several parts.

        A tied parameter is merged under its first name and yielded under all. Tensors that are not
        real floating-point numbers are copied from the base model; if they differ between models,
        the log names them.

        Args:
            any_variance: accept negative variances of batch norms, for points on the way to others.

        Raises:
            UsageError: if weights are NaN or infinite, in a model or after merging, or out of the
                range of their dtype; or if the variance of a batch norm is negative.
        """
        first, *others = self.inputs
        excluded = [
            name
            for name in self.names
            if name not in self.floating
            and not all(statedict.equal(first.read(name), each.read(name)) for each in others)
        ]
        statedict.warn_excluded("the models", tuple(excluded))
        steps: Steps = ()
        for plugin, options in self.plugins:
            step = plugin.step(partial(self._finite_pieces, steps), options)
            steps = (*steps, _checked(plugin, step, options))
        arguments = dict(self.arguments)
        if self.method.prepare is not None:
            source = self._source(partial(self._finite_pieces, steps))
            arguments["statistics"] = self.method.prepare(source, **self.arguments)
        with self._progress("merging") as advance:
            for name in self.names:
                if name in self.floating and self.pool.base.outline[name].numel():
                    for part in self._merged(name, steps, arguments, advance):
                        if not any_variance and name.endswith(VARIANCE):
                            self._check_variance(part)
                        yield part
                else:
                    yield Part(name, 0, self.pool.base.read(name).reshape(-1))

    def _merged(
        self, name: str, steps: Steps, arguments: dict[str, Any], advance: Callable[[int], Any]
    ) -> Iterator[Part]:
        dtype = self.pool.base.outline[name].dtype
        for piece in self._pieces(name):
            merged = self._merged_piece(piece, steps, arguments)
            if merged.dtype != dtype:
                merged = statedict.round_to(merged, dtype, name, start=piece.start)
            yield Part(name, piece.start, merged)
            advance(len(merged) * dtype.itemsize * len(self.inputs))

    def _merged_piece(self, piece: Piece, steps: Steps, arguments: Mapping[str, Any]) -> Tensor:
        method = self.method
        if not (method.drops or method.whole or method.prepare is not None or steps):
            merged: Tensor = method.function(piece, **arguments)
            if is_finite(merged):  # then the models are
                return merged
        first = next(iter(piece.by_model().values()))
        if (finite := self._finite(piece)) is None:
            return first.clone()
        try:
            merged = method.function(_changed(finite, steps), **arguments)
        except torch.linalg.LinAlgError:  # as numbers overflow within the method
            merged = torch.full_like(first, torch.nan)
        if not is_finite(merged):
            after = f", and those of {written_plugins(self.plugins)}" if self.plugins else ""
            raise UsageError(
                f"{method.name} gives weights that are not finite in {shown(piece.name)}; check "
                f"its options: {self.options}{after}"
            )
        return merged if finite is piece else torch.where(first.isfinite(), merged, first)

    def _check_variance(self, part: Part) -> None:
        """Refuses negative variances, with which a batch norm gives NaN."""
        negative = part.values < 0
        if bool(negative.any()):
            at = int(negative.nonzero()[0])
            raise UsageError(
                f"{self.method.name} gives a variance of {part.values[at].item():.3g} at index "
                f"{part.start + at} of {shown(part.name)}, with which the batch norm gives NaN; "
                "choose smaller coefficients, or a mean of the models, such as simple_average"
            )

    def _source(self, pieces: Pieces) -> Examples | Pieces:
        """What `prepare` reads; models that are run have been checked to be finite."""
        if not self.method.needs_data:
            return pieces
        assert self.examples is not None
        for _ in pieces():
            pass
        return self.examples

    def _finite_pieces(self, steps: Steps) -> Iterator[Piece]:
        """One pass over the weights, as plug-ins leave them, for `prepare`."""
        with self._progress("reading") as advance:
            for name in (name for name in self.floating if name not in self.ties):
                size = self.pool.base.outline[name].dtype.itemsize * len(self.inputs)
                for piece in self._pieces(name):
                    if (finite := self._finite(piece)) is not None:
                        yield _changed(finite, steps)
                    advance(len(piece.thetas[0]) * size)

    def _pieces(self, name: str) -> Iterator[Piece]:
        first = self.ties.get(name, name)
        base = self.pool.base.outline[name]
        base_device = self.pool.base.read(name).device
        factors = [w.low_rank(name) if w.low_rank is not None else None for w in self.thetas]
        steps = [None if pair is None else torch.matmul(*pair).reshape(-1) for pair in factors]
        readers = zip(self.thetas, steps, strict=True)
        whole0 = None if self.theta0 is None else self.theta0.read(name).reshape(-1)
        # an adapter's weights follow from its step, which is not rounded to their precision
        whole = [w.read(name).reshape(-1) if step is None else whole0 for w, step in readers]
        types = {value.dtype for value in (*whole, whole0) if value is not None}
        wide = torch.float64 if torch.float64 in types else torch.float32
        known = tuple(pair for pair in factors if pair is not None)
        complete = self.method.whole and len(known) == len(factors)

        size = max(1, base.numel()) if self.method.whole else PIECE

        def cut(values: Tensor, start: int) -> Tensor:
            return values[start : start + size].to(base_device, wide)

        for start in range(0, base.numel(), size):
            theta0 = None if whole0 is None else cut(whole0, start)
            thetas = tuple(cut(values, start) for values in whole if values is not None)
            piece = Piece(first, tuple(base.shape), start, theta0, thetas, tuple(self.models))
            if known:
                taus = [piece.tau(i) if s is None else cut(s, start) for i, s in enumerate(steps)]
                piece = replace(piece.with_taus(taus), factors=known if complete else None)
            yield piece

    def _finite(self, piece: Piece) -> Piece | None:
        """The piece, with 0 where all models have the same infinity, such as -inf in a mask.

        Returns:
            The piece itself if it is finite; None if it is not, and is the same in all models.

        Raises:
            UsageError: if a model has a number that is not finite, and another model a different
                one.
        """
        named = piece.by_model()
        if is_finite(*named.values()):
            return piece
        other, first = next(iter(named.items()))
        if all(torch.equal(values, first) for values in named.values()):
            return None
        kept = first.isfinite()
        for model, values in named.items():
            wrong = (values != first) & ~(kept & values.isfinite())
            if bool(wrong.any()):
                at = int(wrong.nonzero()[0])
                owner = other if values[at].isfinite() else model
                raise UsageError(
                    f"{owner} has {named[owner][at].item()} at index {piece.start + at} of "
                    f"{shown(piece.name)}, expected finite weights; did the training of this model "
                    "diverge?"
                )

        def zeroed(values: Iterable[Tensor]) -> tuple[Tensor, ...]:
            return tuple(value.masked_fill(~kept, 0) for value in values)

        return replace(
            piece,
            theta0=None if piece.theta0 is None else zeroed([piece.theta0])[0],
            thetas=zeroed(piece.thetas),
            changed=None if piece.changed is None else zeroed(piece.changed),
            factors=None,
        )

    def _progress(self, label: str) -> AbstractContextManager[Callable[[int], Any]]:
        if not self.show:
            return nullcontext(lambda _: None)
        return byte_progress(f"{label} ({self.method.name})", self.bytes)


def merged_state(merge: Merge, any_variance: bool = False) -> dict[str, Tensor]:
    """The merged weights, in memory; see `Merge.parts`."""
    state: dict[str, Tensor] = {}
    for part in merge.parts(any_variance):
        if part.name not in state:
            outline = merge.pool.base.outline[part.name]
            device = merge.pool.base.read(part.name).device
            state[part.name] = torch.empty(outline.shape, dtype=outline.dtype, device=device)
        state[part.name].view(-1)[part.start : part.start + len(part.values)] = part.values
    for name, first in merge.ties.items():
        if name in merge.pool.base.ties:
            state[name] = state[first]
    return state
