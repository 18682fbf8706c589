r"""Accuracy of the models \(\theta_0 + \sum_t c_t \tau_t\), for any coefficients.

A sum is c_t = lambda for its tasks, a negation c_t = -lambda, an interpolation c = (1 - a, a).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.artificial_data.evaluation import accuracy, features
from tangent_arithmetic.artificial_data.workspace import Data
from tangent_arithmetic.tangent.linearized import LinearizedModel


class Edits:
    r"""The models around a backbone, standard or linear, and their accuracy.

    Linear models pass over a split once for all coefficients: their features are
    \(f_0(x) + \sum_t c_t J(x) \tau_t\).

    Args:
        backbone: theta_0.
        vectors: name -> tau_t.
        linear: whether the models are linearised at theta_0.
        head: returns the head of a data set.
        data: returns x and y of a data set and a split.
    """

    def __init__(
        self,
        backbone: nn.Module,
        vectors: Mapping[str, TaskVector],
        linear: bool,
        head: Callable[[str], nn.Module],
        data: Callable[[str, str], Data],
    ) -> None:
        self.backbone = backbone
        self.vectors = dict(vectors)
        self.linearized = LinearizedModel(backbone) if linear else None
        self.head = head
        self.data = data
        self._kept: dict[tuple[str, str], tuple[Tensor, list[Tensor]]] = {}

    @torch.no_grad()
    def accuracies(
        self, coefs: Mapping[str, float], datasets: Sequence[str], splits: Sequence[str]
    ) -> dict[tuple[str, str], float]:
        """Accuracy by data set and split, of the model with these coefficients.

        Args:
            coefs: name of a vector -> c_t; 0 where missing.
            datasets: data sets to evaluate on, each under its own head.
            splits: their splits to evaluate on.
        """
        wanted = [(dataset, split) for dataset in datasets for split in splits]
        if self.linearized is not None:
            outputs = {key: self._linear(self.linearized, coefs, key) for key in wanted}
        else:
            moved = self._standard(coefs)
            outputs = {key: features(moved, self.data(*key)[0]) for key in wanted}
        return {
            key: accuracy(self.head(key[0])(value), self.data(*key)[1])
            for key, value in outputs.items()
        }

    def _standard(self, coefs: Mapping[str, float]) -> nn.Module:
        scaled = [coef * self.vectors[name] for name, coef in coefs.items()]
        if not scaled:
            return self.backbone
        moved: nn.Module = sum(scaled[1:], start=scaled[0]).apply_to_nonlinear(self.backbone)
        return moved

    def _linear(
        self, model: LinearizedModel, coefs: Mapping[str, float], key: tuple[str, str]
    ) -> Tensor:
        if key not in self._kept:
            taus = [tau.vector for tau in self.vectors.values()]
            self._kept[key] = model.tangents(self.data(*key)[0], taus)
        out, tangents = self._kept[key]
        for name, tangent in zip(self.vectors, tangents, strict=True):
            if coefs.get(name):
                out = out + coefs[name] * tangent
        return out
