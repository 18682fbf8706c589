r"""Logits of linear models, image by image, which are exact at every coefficient.

A head that normalises gives \(W \phi / \|\phi\| + b\), and the features of a linear model are
\(\phi = f_0 + \sum_t a_t d_t\). So \(W f_0\) and \(W d_1, ..., W d_T\) of each image, with the
inner products of \(f_0, d_1, ..., d_T\) where \(b\) is not zero, tell its logits for any
coefficients \(a\): no image has to go through the model again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.features import Features, linear_features
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.encoders.base import LinearEncoder
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.storage.statedict import State


@dataclass(frozen=True)
class Logits:
    r"""The images of a split, seen by a linear model.

    Attributes:
        dataset: X for the test split, XVal for the validation split.
        vectors: names of the task vectors.
        base: float32 (images, classes), \(W f_0\).
        steps: float32 (vectors, images, classes), \(W d_t\).
        labels: int64 (images,).
        bias: float32 (classes,) if it is not zero.
        gram: float64 (images, 1 + vectors, 1 + vectors), inner products of
            \(f_0, d_1, ..., d_T\), where the head has a bias and normalises.
        of: number of images in the split, of which these may be a sample or a rank's share.
    """

    dataset: str
    vectors: tuple[str, ...]
    base: Tensor
    steps: Tensor
    labels: Tensor
    bias: Tensor | None
    gram: Tensor | None
    of: int

    def at(self, coefs: Sequence[float]) -> Tensor:
        """Logits, float64 (images, classes), at theta0 + sum of coefs[t] * tau_t.

        Without a bias the norm of the features is left out, which changes no order of classes.
        """
        a = torch.tensor([1.0, *coefs], dtype=torch.float64)
        found = self.base.double()
        for coef, step in zip(coefs, self.steps, strict=True):
            if coef != 0:
                found = found + coef * step.double()
        if self.gram is not None:
            square = torch.einsum("s,nst,t->n", a, self.gram, a)
            found = found / square.clamp_min(1e-24).sqrt()[:, None]
        return found if self.bias is None else found + self.bias.double()

    def predictions(self, coefs: Sequence[float]) -> Tensor:
        """The class of each image, int64 (images,)."""
        return self.at(coefs).argmax(dim=1)

    def accuracy(self, coefs: Sequence[float]) -> float:
        """Share of the images that get their label."""
        return float((self.predictions(coefs) == self.labels).double().mean())

    def part(self, chosen: Tensor) -> Logits:
        """Some of the images, by index."""
        return replace(
            self,
            base=self.base[chosen],
            steps=self.steps[:, chosen],
            labels=self.labels[chosen],
            gram=None if self.gram is None else self.gram[chosen],
        )


def of_features(
    found: Features, head: ClassificationHead, dataset: str, vectors: Sequence[str]
) -> Logits:
    """The logits that a head gives, of features."""
    with torch.no_grad():
        weight = head.weight.detach().cpu()
        bias = head.bias.detach().cpu()
        shape = len(found.labels), weight.shape[1]  # a rank without images has no features either
        f0, *directions = (part.reshape(shape) for part in (found.f0, *found.directions))
        base = f0 @ weight.T
        steps = torch.stack([d @ weight.T for d in directions])
        gram = None
        if bool(bias.any()) and head.normalize:
            parts = torch.stack([f0, *directions], dim=1).double()
            gram = parts @ parts.transpose(1, 2)
    return Logits(
        dataset,
        tuple(vectors),
        base,
        steps,
        found.labels,
        bias if bool(bias.any()) else None,
        gram,
        len(found.labels),
    )


def linear_logits(encoder: LinearEncoder, vectors: Mapping[str, State], split: Split) -> Logits:
    """The logits of a linear encoder along task vectors, on one split.

    Args:
        encoder: gives f and theta0.
        vectors: task vectors by name.
        split: the images, and the head.
    """
    assert isinstance(split.head, ClassificationHead)
    taus = list(vectors.values())
    found = linear_features(encoder, taus, split.batches, split.compute, split.cache)
    logits = of_features(found, split.head, split.name, list(vectors))
    return replace(logits, of=split.whole or split.num_images or logits.of)


def gathered(found: Logits) -> Logits:
    """The logits of all ranks' shares, in the order of the split, on every rank."""
    parts = ddp.gather(found)
    if len(parts) == 1:
        return found
    places = [torch.arange(len(part.labels)) * len(parts) + r for r, part in enumerate(parts)]
    whole = replace(
        found,
        base=torch.cat([part.base for part in parts]),
        steps=torch.cat([part.steps for part in parts], dim=1),
        labels=torch.cat([part.labels for part in parts]),
        gram=None if found.gram is None else torch.cat([_gram(part) for part in parts]),
    )
    return whole.part(torch.cat(places).argsort())


def _gram(part: Logits) -> Tensor:
    assert part.gram is not None
    return part.gram
