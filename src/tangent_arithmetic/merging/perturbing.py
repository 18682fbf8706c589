r"""Perturbations of task vectors, as they occur in practice: what a robust merge must survive.

A perturbed pool reads its models through the perturbation, one tensor at a time. Norms are those of
whole task vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tangent_arithmetic.merging.pool import ModelPool
from tangent_arithmetic.merging.registry import PRETRAINED
from tangent_arithmetic.merging.seeds import generator_of
from tangent_arithmetic.merging.weights import Weights
from tangent_arithmetic.storage.statedict import is_real_float

NEAR = 0.1  # norm of the noise in a near-duplicate, relative to that of the vector
OUTLIER, COPY = "random outlier", "near-duplicate"  # names of the models that are added
COUNTS = {"1 vector": 1, **{f"{number} vectors": number for number in (2, 4, 8, 16)}}


@dataclass(frozen=True)
class Subject:
    """What is perturbed.

    Attributes:
        pool: the models, with the pre-trained one.
        task: the model whose task vector is perturbed, where it is a single one.
        lengths: the lengths of its task vector, in multiples of its own, at which the model is
            over- and under-confident; see `stress.confident_lengths`.
        seed: of random vectors.
    """

    pool: ModelPool
    task: str
    lengths: Mapping[str, float]
    seed: int = 0

    @property
    def base(self) -> Weights:
        """The pre-trained weights."""
        return self.pool.base

    def models(self) -> dict[str, Weights]:
        """The weights of all models, by name."""
        return {name: self.pool.weights(name) for name in self.pool.models}

    def floating(self) -> list[str]:
        """The tensors that are merged, each under its first name."""
        outline, ties = self.base.outline, self.base.ties
        return [name for name, v in outline.items() if is_real_float(v) and name not in ties]

    def tau(self, model: str, name: str) -> Tensor:
        """One tensor of a task vector, in float64."""
        return self.pool.weights(model).read(name).double() - self.base.read(name).double()

    def norm(self, model: str) -> float:
        """The norm of a task vector."""
        return math.sqrt(sum(float(self.tau(model, n).square().sum()) for n in self.floating()))

    def noise(self, label: str, name: str) -> Tensor:
        """Standard normal numbers in the shape of a tensor, which follow from seed and label."""
        first = self.base.ties.get(name, name)
        generator = generator_of(self.seed, label, first)
        return torch.randn(self.base.outline[name].shape, generator=generator, dtype=torch.float64)

    def with_taus(self, like: str, tau: Callable[[str], Tensor]) -> Weights:
        """A model as one of the pool, with another task vector.

        Args:
            like: the model.
            tau: (name of a tensor) -> the task vector there, in float64.
        """
        weights = self.pool.weights(like)

        def read(name: str) -> Tensor:
            theta0 = self.base.read(name)
            if not is_real_float(theta0):
                return weights.read(name)
            return (theta0.double() + tau(name).to(theta0.device)).to(theta0.dtype)

        return replace(weights, read=read, low_rank=None)

    def random(self, label: str, norm: float) -> Callable[[str], Tensor]:
        """A random vector of a norm, tensor by tensor: the same direction for the same label."""
        squares = sum(float(self.noise(label, n).square().sum()) for n in self.floating())
        return lambda name: self.noise(label, name) * (norm / math.sqrt(squares))


Perturbation = Callable[[Subject], Mapping[str, Weights]]


def scaled(subject: Subject, factor: float) -> dict[str, Weights]:
    """One task vector, times a factor."""
    task = subject.task
    changed = subject.with_taus(task, lambda name: factor * subject.tau(task, name))
    return {**subject.models(), task: changed}


def confident(subject: Subject, kind: str) -> dict[str, Weights]:
    """One task vector at the length at which its model is "over"- or "under"-confident."""
    return scaled(subject, subject.lengths[kind])


def outlier(subject: Subject) -> dict[str, Weights]:
    """One more model: a random vector whose norm is the mean of those of the others."""
    names = subject.pool.model_names
    vector = subject.random(OUTLIER, sum(map(subject.norm, names)) / len(names))
    return {**subject.models(), OUTLIER: subject.with_taus(subject.task, vector)}


def near_duplicate(subject: Subject) -> dict[str, Weights]:
    """One more model: a task vector again, with noise of `NEAR` times its norm."""
    task = subject.task
    noise = subject.random(COPY, NEAR * subject.norm(task))
    copy = subject.with_taus(task, lambda name: subject.tau(task, name) + noise(name))
    return {**subject.models(), COPY: copy}


def rounded(subject: Subject, dtype: torch.dtype) -> dict[str, Weights]:
    """All fine-tuned models after storage in half precision; the pre-trained one as it was."""

    def of(weights: Weights) -> Weights:
        def read(name: str) -> Tensor:
            value = weights.read(name)
            return value.to(dtype).to(value.dtype) if is_real_float(value) else value

        return replace(weights, read=read, low_rank=None)

    models = subject.models()
    return {name: w if name == PRETRAINED else of(w) for name, w in models.items()}


def some(subject: Subject, number: int) -> dict[str, Weights]:
    """The first models only."""
    kept = (PRETRAINED, *subject.pool.model_names[:number])
    return {name: weights for name, weights in subject.models().items() if name in kept}


def without_tensor(subject: Subject) -> dict[str, Weights]:
    """One model lacks its last tensor, in the order of names."""
    weights = subject.pool.weights(subject.task)
    lacking = max(weights.outline)
    outline = {name: value for name, value in weights.outline.items() if name != lacking}
    return {**subject.models(), subject.task: replace(weights, outline=outline)}


PERTURBATIONS: dict[str, Perturbation] = {
    **{f"norm x{factor}": partial(scaled, factor=factor) for factor in (2, 5, 10)},
    "over-confident": partial(confident, kind="over"),
    "under-confident": partial(confident, kind="under"),
    "outlier": outlier,
    "near-duplicate": near_duplicate,
    "bf16": partial(rounded, dtype=torch.bfloat16),
    "fp16": partial(rounded, dtype=torch.float16),
    **{label: partial(some, number=number) for label, number in COUNTS.items()},
    "missing tensor": without_tensor,
}


def perturbations(num_models: int) -> dict[str, Perturbation]:
    """The perturbations of a pool, by label: fewer vectors are those than it has.

    Args:
        num_models: the number of its models, without the pre-trained one.
    """
    return {
        label: change
        for label, change in PERTURBATIONS.items()
        if COUNTS.get(label, 0) < num_models
    }
