r"""What determines the logits of images at every point of a set of directions.

\[ \ell(a) = \frac{W f_0 + \sum_k a_k W d_k}{\|R (1, a)\|} + b \]

For an image this is \(W f_0\), \(W d_k\) (C numbers a direction), and a root \(R\) of the Gram
matrix of \(f_0, d_1, ..., d_K\): the features themselves, or their triangular factor where that is
smaller. Features are reduced a batch at a time, so that images x directions x features are never
held; what is held is memory-mapped where it is large. With the norms held fixed at some point,
logits are affine in \(a\). Numbers are stored in float32, and computed with in float64.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.features import few_at_a_time
from tangent_arithmetic.arithmetic.metrics import main_of
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.arithmetic.tally import measured
from tangent_arithmetic.data.loading import EvalBatches, to_device
from tangent_arithmetic.encoders.base import LinearEncoder
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage.statedict import State
from tangent_arithmetic.tangent.functional import evaluating
from tangent_arithmetic.tangent.memory import freed_memory_kept

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Float64, Int64, UInt8

LARGE = 2**30  # bytes of a split beyond which it is memory-mapped
CHUNK = 2**19  # numbers that are converted to float64 at a time: what a processor's cache holds


@dataclass(frozen=True)
class Reduced:
    """What determines the logits of a split's images at every point.

    Attributes:
        name: of the split.
        base: W f_0.
        steps: W d_k for each direction.
        root: R of each image; None if the head does not normalise.
        labels: the true classes; uint8 (images, classes) where an image has several.
        bias: b; None if zero.
    """

    name: str
    base: Float32[Tensor, "images classes"]
    steps: Float32[Tensor, "directions images classes"]
    root: Float32[Tensor, "images rank 1+directions"] | None
    labels: Int64[Tensor, " images"] | UInt8[Tensor, "images classes"]
    bias: Float32[Tensor, " classes"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, images: slice | Sequence[int] | Int64[Tensor, " images"]) -> Reduced:
        """Some of the images."""
        return replace(
            self,
            base=self.base[images],
            steps=self.steps[:, images],
            root=None if self.root is None else self.root[images],
            labels=self.labels[images],
        )

    def along(self, sums: Float64[np.ndarray, "directions groups"]) -> Reduced:
        """The images along sums of the directions, such as whole task vectors of their layers."""
        mixed = torch.from_numpy(sums).float()
        root = self.root
        if root is not None:
            root = torch.cat([root[:, :, :1], root[:, :, 1:] @ mixed], dim=2)
        return replace(self, steps=torch.einsum("kg,knc->gnc", mixed, self.steps), root=root)

    def chunks(self, width: int) -> Iterator[slice]:
        """Slices of the images, `CHUNK` numbers each, `width` an image."""
        size = max(1, CHUNK // max(1, width))
        return (slice(i, min(i + size, len(self))) for i in range(0, len(self), size))

    def norms(self, a: Float64[np.ndarray, " directions"]) -> Float64[Tensor, " images"]:
        """The norm of each image's features at a point; 1 if the head does not normalise."""
        if self.root is None:
            return torch.ones(len(self), dtype=torch.float64)
        point = torch.from_numpy(np.concatenate([[1.0], a]))
        parts = [
            (self.root[s].double() @ point).norm(dim=1) for s in self.chunks(self.root[0].numel())
        ]
        return torch.cat(parts).clamp_min(1e-12)

    def affine(self, a: Float64[np.ndarray, " directions"]) -> Float64[Tensor, "images classes"]:
        """Logits at a point, without division by the norm, and without the bias."""
        point = torch.from_numpy(np.asarray(a, dtype=np.float64))
        parts = []
        for s in self.chunks(self.steps.shape[0] * self.base.shape[1]):
            steps = self.steps[:, s].double()
            moved = torch.einsum("k,knc->nc", point, steps)
            parts.append(self.base[s].double() + moved)
        return torch.cat(parts)

    def logits(
        self, a: Float64[np.ndarray, " directions"], norms: Float64[Tensor, " images"] | None = None
    ) -> Float64[Tensor, "images classes"]:
        """Logits at a point.

        Args:
            a: the coefficients.
            norms: to divide by; None for those at this point.
        """
        norms = self.norms(a) if norms is None else norms
        logits = self.affine(a) / norms[:, None]
        return logits if self.bias is None else logits + self.bias.double()

    def pull(self, pulled: Float64[Tensor, "images classes"]) -> Float64[np.ndarray, " directions"]:
        """The sum over images and classes of `pulled` times W d_k, for each direction."""
        total = torch.zeros(len(self.steps), dtype=torch.float64)
        for s in self.chunks(self.steps.shape[0] * self.base.shape[1]):
            total += self.steps[:, s].double().reshape(len(total), -1) @ pulled[s].reshape(-1)
        return np.asarray(total)

    def norm_gradient(
        self, a: Float64[np.ndarray, " directions"], weights: Float64[Tensor, " images"]
    ) -> Float64[np.ndarray, " directions"]:
        """The gradient of the weighted sum of the norms of the images' features."""
        total = torch.zeros(len(self.steps), dtype=torch.float64)
        if self.root is None:
            return np.asarray(total)
        point = torch.from_numpy(np.concatenate([[1.0], a]))
        for s in self.chunks(self.root[0].numel()):
            root = self.root[s].double()
            moved = root @ point  # (images, rank)
            unit = moved / moved.norm(dim=1, keepdim=True).clamp_min(1e-12)
            total += torch.einsum("n,nr,nrk->k", weights[s], unit, root)[1:]
        return np.asarray(total)

    def accuracy(self, a: Float64[np.ndarray, " directions"]) -> float:
        """The main metric at a point: top-1 accuracy, mAP where an image has several labels."""
        return main_of(measured(self.logits(a), self.labels))


@torch.no_grad()
def reduce(
    encoder: LinearEncoder, vectors: Sequence[State], split: Split, folder: Path | None = None
) -> Reduced:
    """Reduces the features of a split along directions, in one pass.

    Args:
        encoder: provides f and theta0; its theta is ignored.
        vectors: the directions by name; buffers are ignored.
        split: the images and the head.
        folder: where files of more than `LARGE` bytes are mapped; None to hold all in memory.

    Raises:
        UsageError: if the head is no `ClassificationHead`.
    """
    if not isinstance(split.head, ClassificationHead):
        raise UsageError(
            f"coefficients are solved for heads W phi + b (ClassificationHead), got "
            f"{type(split.head).__name__}"
        )
    compute = split.compute or Compute.of(encoder.weights())
    encoder.to(compute.device)
    names, head, batches = encoder.theta0(), split.head.to(compute.device), split.batches
    taus = [{n: v.to(compute.device) for n, v in tau.items() if n in names} for tau in vectors]
    known = isinstance(batches, EvalBatches)
    count = len(batches.pictures) if known else sum(len(labels) for _, labels in batches)  # type: ignore[union-attr]
    total = len(batches) if known else None  # type: ignore[arg-type]
    bar = progress(batches, f"directions of {split.name}", total)
    labels, done = list[Tensor](), 0
    store: _Store | None = None
    with evaluating(encoder), freed_memory_kept():
        for batch in bar:
            images, truth = to_device(batch, compute.device)
            with compute.autocast():
                f0, steps = few_at_a_time(encoder, images, taus)
            wide = torch.stack([f0.float(), *(step.float() for step in steps)])  # (1+K, b, D)
            store = store or _Store(count, wide, head, folder)
            store.put(done, wide, head)
            done += len(images)
            labels.append(truth.cpu())
            bar.note(len(images))
    if store is None:
        raise UsageError(f"{split.name} has no images to solve for coefficients on")
    bias = head.bias.detach().cpu() if bool(head.bias.any()) else None
    return Reduced(split.name, store.base, store.steps, store.root, torch.cat(labels), bias)


class _Store:
    """The arrays of a `Reduced`, filled a batch at a time."""

    def __init__(
        self,
        count: int,
        wide: Float[Tensor, "parts batch features"],
        head: ClassificationHead,
        folder: Path | None,
    ) -> None:
        parts, _, width = wide.shape
        classes, rank = head.weight.shape[0], min(parts, width)
        shape = (count, rank, parts)
        size = 4 * count * (parts * classes + (rank * parts if head.normalize else 0))
        place = folder if size > LARGE else None
        self.root: Tensor | None = None
        self.base = torch.empty(count, classes)
        self.steps = _empty((parts - 1, count, classes), place)
        if head.normalize:
            self.root = _empty(shape, place)

    def put(
        self, at: int, wide: Float[Tensor, "parts batch features"], head: ClassificationHead
    ) -> None:
        """Writes the images of a batch."""
        here = slice(at, at + wide.shape[1])
        logits = (wide @ head.weight.T).cpu()
        self.base[here], self.steps[:, here] = logits[0], logits[1:]
        if self.root is not None:
            columns = wide.permute(1, 2, 0)  # (b, D, 1+K)
            if columns.shape[1] > columns.shape[2]:
                columns = torch.linalg.qr(columns, mode="r").R
            self.root[here] = columns.cpu()


def _empty(shape: tuple[int, ...], folder: Path | None) -> Tensor:
    """An array that is not initialised, in memory or in a new file of a folder."""
    if folder is None:
        return torch.empty(shape)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".float32", delete=False) as file:
        path = file.name
    size = int(np.prod(shape))
    return torch.from_file(path, shared=True, size=size, dtype=torch.float32).reshape(shape)
