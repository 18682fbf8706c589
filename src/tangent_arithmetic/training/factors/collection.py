r"""Collection: factors of a module from the gradients of single examples.

\(G = E_x J^\top J / \|f_0\|^2 = E_x E_v\, g g^\top\) with \(g = J^\top v / \|f_0(x)\|\) and
\(v \sim N(0, I)\). One backward pass an example gives g in all parameters, terms between tokens
included, whatever the module is made of; as many examples as memory allows are taken together. A
first pass over the images finds the bases, a second one the moments in them. The gradients of dense
layers stay in their factors, inputs and cotangents.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tangent_arithmetic.tangent.gradients import ExampleGradients
from tangent_arithmetic.tangent.layers import Outer
from tangent_arithmetic.training.factors.bases import compress, leading_of_root
from tangent_arithmetic.training.factors.blocks import LARGEST_SIDE, Block, blocks_of, logger
from tangent_arithmetic.training.factors.factor import Factor
from tangent_arithmetic.training.factors.whole import CORNER, SHRINKAGE, Factors

if TYPE_CHECKING:
    from jaxtyping import Float

Kind = Literal["diag", "kfac", "ekfac"]
Bases = dict[str, tuple[Tensor, Tensor]]
Watch = Callable[[Iterable[Any]], Iterable[Any]]
RANK = 128  # of the bases
DIRECTIONS = 64  # through all layers
EXACT = 2**14  # entries of a matrix up to which second moments are not sketched
SKETCH = 1024  # random vectors of all examples, for larger ones
TOGETHER = 32  # examples at most
MEMORY = 2**29  # bytes of the gradients of examples taken together


class Images(Protocol):
    """Inputs of which the number is known."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Settings:
    """How factors are collected.

    Attributes:
        kind: see `factor.py`; "diag" keeps the diagonal of G alone.
        rank: of the bases of each block.
        directions: leading directions through all layers; 0 for independent layers.
        probes: random v an example; 0 takes each output in turn, which is exact.
        seed: of the probes.
        shrinkage: share of independent layers, see `whole.py`.
    """

    kind: Kind = "ekfac"
    rank: int = RANK
    directions: int = DIRECTIONS
    probes: int = 1
    seed: int = 0
    shrinkage: float = SHRINKAGE


def collect(
    module: nn.Module, images: Images, settings: Settings = Settings(), watch: Watch = iter
) -> Factors:
    """The factors of a module at its weights, which are not changed.

    Args:
        module: maps a batch to features, shape (batch, features); run in eval mode.
        images: inputs, without the batch's dimension; iterated over twice.
        settings: kind, rank and so on.
        watch: wraps the iteration over images of both passes, such as in a progress bar.
    """
    if not len(images):
        raise ValueError("expected images to collect factors from, got none")
    probe = _Probe(module, settings)
    blocks = probe.blocks
    bases: Bases = {} if settings.kind == "diag" else _bases(probe, images, settings, watch)
    sums = _Moments(blocks, bases, settings)
    count = 0
    for gradients in probe.gradients(watch(images)):
        count += sums.add(gradients)
    return sums.factors(count)


def _relative(f0: Tensor, v: Tensor) -> Tensor:
    """The cotangent v / |f0|; 0 for an image without features."""
    size: Tensor = torch.linalg.vector_norm(f0)
    return v / size.where(size > 0, torch.inf)


class _Probe:
    """Gradients of random projections of a module's features, of each example."""

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.blocks = tuple(blocks_of(self.module))
        self.settings, self.rows = settings, dict[torch.Size, int]()  # that fit, by shape
        weights = dict(self.module.named_parameters())
        names = [name for block in self.blocks for name in block.names]
        self.weights = {name: weights[name].requires_grad_() for name in names}
        self.of_examples = ExampleGradients(
            self.module,
            self.weights,
            _relative,
            [b.names for b in self.decomposed() if len(b.shapes[0]) == 2],
        )

    def decomposed(self) -> list[Block]:
        """The blocks that have bases."""
        small = [block for block in self.blocks if max(block.shape) <= LARGEST_SIDE]
        return [] if self.settings.kind == "diag" else small

    def gradients(self, images: Iterable[Tensor]) -> Iterator[Mapping[str, Tensor | Outer]]:
        """J^T v / |f0| by name, a row for each example and probe, of some examples at a time."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        device = next(iter(self.weights.values())).device

        def rows_of(image: Tensor) -> int:
            if image.shape not in self.rows:
                size = self.of_examples.bytes_of(image[None].to(device))
                self.rows[image.shape] = max(1, MEMORY // size)
            return self.rows[image.shape]

        features = None
        for batch, rows in _batches(images, rows_of):
            examples = batch.to(device)
            if features is None:
                with torch.no_grad():
                    features = self.module(examples[:1]).shape[1]
            probes = self._probes(len(batch), features, generator)
            for some in probes.split(max(1, rows // len(batch)), dim=1):
                yield self.of_examples.factored(examples, some)

    def _probes(
        self, examples: int, features: int, generator: torch.Generator
    ) -> Float[Tensor, "examples probes features"]:
        """Vectors v of each example with mean v v^T = I."""
        if not self.settings.probes:
            every = torch.eye(features, dtype=torch.float64) * math.sqrt(features)
            return every.expand(examples, -1, -1)
        shape = (self.settings.probes, features)
        each = [
            torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(examples)
        ]
        return torch.stack(each)


def _batches(
    images: Iterable[Tensor], rows_of: Callable[[Tensor], int]
) -> Iterator[tuple[Float[Tensor, "batch ..."], int]]:
    """Images of equal shapes that follow each other, and how many rows fit into memory."""
    for _, group in itertools.groupby(images, key=lambda image: image.shape):
        rest = iter(group)
        rows, first = 0, next(rest, None)
        while first is not None:
            rows = rows or rows_of(first)
            more = itertools.islice(rest, min(rows, TOGETHER) - 1)
            yield torch.stack([first, *more]), rows
            first = next(rest, None)


def _bases(probe: _Probe, images: Images, settings: Settings, watch: Watch) -> Bases:
    """Leading eigenvectors of the row and column moments of each block that is not too large."""
    blocks = probe.decomposed()
    for block in set(probe.blocks) - set(blocks):
        logger.warning(
            "%s: %d x %d is too large for Kronecker factors; its diagonal is used",
            block.name,
            *block.shape,
        )
    roots: dict[tuple[str, int], list[Tensor]] = {}
    generator = torch.Generator().manual_seed(settings.seed + 1)
    count = math.ceil(SKETCH / (len(images) * max(1, settings.probes)))
    for gradients in probe.gradients(watch(images)):
        for block in blocks:
            matrices = _matrices(block, gradients)
            for side, rows in enumerate((matrices, matrices.mT)):
                if rows.sides[0] > 1:
                    part = _sketched(rows, count, generator).transpose(0, 1).flatten(1)
                    roots.setdefault((block.name, side), []).append(part)
    bases: Bases = {}
    for block in blocks:
        one = next(iter(probe.weights.values())).new_ones(1, 1)
        left, right = (
            leading_of_root(torch.cat(roots.pop((block.name, side)), 1), settings.rank)
            if size > 1
            else one
            for side, size in enumerate(block.shape)
        )
        bases[block.name] = (left, right)
    return bases


@dataclass(frozen=True)
class _Full:
    """Matrices of examples, with what `Outer` has."""

    rows: Float[Tensor, "batch rows columns"]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mT(self) -> _Full:
        return _Full(self.rows.mT)

    @property
    def sides(self) -> tuple[int, int]:
        return self.rows.shape[1], self.rows.shape[2]

    def dense(self) -> Tensor:
        return self.rows

    def times(self, right: Tensor) -> Tensor:
        return self.rows @ right

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        return left.mT @ (self.rows @ right)

    def energy(self) -> Tensor:
        return self.rows.square().sum()


def _matrices(block: Block, gradients: Mapping[str, Tensor | Outer]) -> _Full | Outer:
    """A block's gradients of some examples."""
    found = gradients[block.name]
    if isinstance(found, Outer):
        return found
    return _Full(block.matrix({n: v for n, v in gradients.items() if isinstance(v, Tensor)}))


def _sketched(
    rows: _Full | Outer, count: int, generator: torch.Generator
) -> Float[Tensor, "batch n s"]:
    """Matrices S with E[S S^T] = M M^T: M itself, or a random projection of each large M."""
    n, m = rows.sides
    if n * m <= EXACT or m <= count:
        return rows.dense()
    projections: Tensor = torch.randn(len(rows), m, count, generator=generator) / count**0.5
    return rows.times(projections.to(next(iter(vars(rows).values()))))


class _Moments:
    """Second moments of examples' gradients in given bases."""

    def __init__(self, blocks: Sequence[Block], bases: Bases, settings: Settings) -> None:
        self.blocks, self.bases, self.settings = tuple(blocks), bases, settings
        self.sums, self.energy = dict[str, Tensor](), dict[str, Tensor]()
        self.rows: dict[str, list[Tensor]] = {name: [] for name in bases}

    def add(self, gradients: Mapping[str, Tensor | Outer]) -> int:
        """Adds examples; returns their number."""
        for block in self.blocks:
            name, matrices = block.name, _matrices(block, gradients)
            if name in self.bases:
                z = matrices.project(*self.bases[name])
                if self.settings.directions:
                    self.rows[name].append(z[:, :CORNER, :CORNER].clone())
            else:
                z = matrices.dense()
            total, energy = z.square().sum(0), matrices.energy()
            self.sums[name] = self.sums[name].add_(total) if name in self.sums else total
            self.energy[name] = self.energy.get(name, 0) + energy
        return len(matrices)

    def factors(self, count: int) -> Factors:
        """The means over `count` examples."""
        found = {block.name: self._factor(block, count) for block in self.blocks}
        directions = dict[str, Tensor]()
        if self.settings.directions and self.bases:
            flat = [torch.cat(rows).flatten(1) / count**0.5 for rows in self.rows.values()]
            kept = compress(flat, flat[0].new_ones(count), self.settings.directions)
            for name, value in zip(self.rows, kept, strict=True):
                directions[name] = value.reshape(-1, *self.rows[name][0].shape[1:])
        return Factors(self.blocks, found, directions, self.settings.shrinkage)

    def _factor(self, block: Block, count: int) -> Factor:
        moments, energy = self.sums[block.name] / count, self.energy[block.name] / count
        if block.name not in self.bases:
            return Factor(moments, energy.new_zeros(()))
        outside = block.shape[0] * block.shape[1] - moments.numel()
        rest = (energy - moments.sum()).clamp(min=0) / max(outside, 1)
        if self.settings.kind == "kfac":
            whole = moments.sum().clamp(min=torch.finfo(moments.dtype).tiny)
            moments = torch.outer(moments.sum(1), moments.sum(0)) / whole
        left, right = self.bases[block.name]
        return Factor(moments, rest if outside else torch.zeros_like(rest), left, right)
