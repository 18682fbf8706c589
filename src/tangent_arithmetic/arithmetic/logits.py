r"""Logits of linear models for each image, exact at every coefficient.

A normalising head has the logits \(W \phi / \|\phi\| + b\), and the features of a linear model are
\(\phi = f_0 + \sum_t a_t d_t\). So \(W f_0\) and \(W d_1, ..., W d_T\) of each image, with the
inner products of \(f_0, d_1, ..., d_T\), determine its logits at any coefficients \(a\) without
another forward pass. The norm of an image's features leaves the order of its classes unchanged, so
that the inner products are needed only if \(b\) is not zero, or if images are compared with each
other, as by mean average precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.features import Features, linear_features
from tangent_arithmetic.arithmetic.metrics import main_of
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.arithmetic.tally import measured
from tangent_arithmetic.encoders.base import LinearEncoder
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.storage.statedict import State

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, Int64, UInt8


@dataclass(frozen=True)
class Logits:
    r"""What determines the logits of a linear model on the images of a split.

    Attributes:
        dataset: X for the test split, XVal for the validation split.
        vectors: names of the task vectors.
        base: \(W f_0\).
        steps: \(W d_t\) for each task vector.
        labels: the true classes; uint8 (images, classes) where an image has several.
        bias: \(b\); None if zero.
        gram: inner products of \(f_0, d_1, ..., d_T\); None unless the head normalises, and has a
            bias or an image several labels.
        of: number of images in the split, of which these may be a sample or a rank's share.
    """

    dataset: str
    vectors: tuple[str, ...]
    base: Float32[Tensor, "images classes"]
    steps: Float32[Tensor, "vectors images classes"]
    labels: Int64[Tensor, " images"] | UInt8[Tensor, "images classes"]
    bias: Float32[Tensor, " classes"] | None
    gram: Float64[Tensor, "images 1+vectors 1+vectors"] | None
    of: int

    def row(self, point: Mapping[str, float]) -> list[float]:
        """Coefficients in the order of the vectors, from those by name; missing ones are 0."""
        return [point.get(vector, 0.0) for vector in self.vectors]

    def at(self, coefs: Sequence[float]) -> Float64[Tensor, "images classes"]:
        """Logits at theta0 + sum of coefs[t] * tau_t.

        Without `gram` they are not divided by the norm of the features, which leaves the order of
        an image's classes unchanged.
        """
        a = torch.tensor([1.0, *coefs], dtype=torch.float64)
        logits = self.base.double()
        for coef, step in zip(coefs, self.steps, strict=True):
            if coef != 0:
                logits = logits + coef * step.double()
        if self.gram is not None:
            square = torch.einsum("s,nst,t->n", a, self.gram, a)
            logits = logits / square.clamp_min(1e-24).sqrt()[:, None]
        return logits if self.bias is None else logits + self.bias.double()

    def predictions(self, coefs: Sequence[float]) -> Int64[Tensor, " images"]:
        """The predicted class of each image."""
        return self.at(coefs).argmax(dim=1)

    def metrics(self, coefs: Sequence[float]) -> dict[str, float]:
        """The metrics of these images, the main one first, see `arithmetic.metrics`."""
        return measured(self.at(coefs), self.labels)

    def accuracy(self, coefs: Sequence[float]) -> float:
        """The main metric in [0, 1]: top-1 accuracy, or mean average precision."""
        return main_of(self.metrics(coefs))


@torch.no_grad()
def of_features(
    features: Features, head: ClassificationHead, dataset: str, vectors: Sequence[str]
) -> Logits:
    """The logits of a head on features."""
    weight, bias = head.weight.detach().cpu(), head.bias.detach().cpu()
    biased = bool(bias.any())
    shape = len(features.labels), weight.shape[1]  # a rank without images has none, of any width
    parts = [part.reshape(shape) for part in (features.f0, *features.directions)]
    base, *steps = (part @ weight.T for part in parts)
    gram = None
    if head.normalize and (biased or features.labels.ndim == 2):
        wide = torch.stack(parts, dim=1).double()
        gram = wide @ wide.transpose(1, 2)
    return Logits(
        dataset=dataset,
        vectors=tuple(vectors),
        base=base,
        steps=torch.stack(steps) if steps else base.new_empty(0, *base.shape),
        labels=features.labels,
        bias=bias if biased else None,
        gram=gram,
        of=len(features.labels),
    )


def linear_logits(encoder: LinearEncoder, vectors: Mapping[str, State], split: Split) -> Logits:
    """The logits of a linear encoder on a split, for all coefficients; this rank's share.

    Args:
        encoder: provides f and theta0.
        vectors: task vectors by name.
        split: the images and the head.
    """
    assert isinstance(split.head, ClassificationHead)
    taus = list(vectors.values())
    features = linear_features(encoder, taus, split.batches, split.compute, split.cache)
    logits = of_features(features, split.head, split.name, list(vectors))
    return replace(logits, of=split.whole or split.num_images or logits.of)


def gathered(logits: Logits) -> Logits:
    """The logits of all ranks' shares, in the order of the split, on every rank."""
    ranks = ddp.gather(logits)
    shares = {rank: share for rank, share in enumerate(ranks) if len(share.labels)}
    if len(ranks) == 1 or not shares:
        return logits
    indices = [torch.arange(len(s.labels)) * len(ranks) + rank for rank, s in shares.items()]
    order = torch.cat(indices).argsort()

    def whole(kind: str, dim: int = 0) -> Tensor:
        parts = [getattr(share, kind) for share in shares.values()]
        return torch.cat(parts, dim).index_select(dim, order)

    gram = None if next(iter(shares.values())).gram is None else whole("gram")
    base, steps, labels = whole("base"), whole("steps", dim=1), whole("labels")
    return replace(logits, base=base, steps=steps, labels=labels, gram=gram)
