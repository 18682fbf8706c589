r"""Predictions and accuracies of a model to which several task vectors are added.

The model is \(\theta_0 + \sum_t a_t \tau_t\), for any coefficients a. Linear and post-hoc models
need one pass over the images for all coefficients, standard models one for each point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.logits import Logits, linear_logits
from tangent_arithmetic.arithmetic.metrics import main_of
from tangent_arithmetic.arithmetic.sweeps import Split, logits_at
from tangent_arithmetic.arithmetic.tally import Tally, scores
from tangent_arithmetic.encoders.base import Encoder, is_linear
from tangent_arithmetic.run.models import base_encoder, split_of, task_vector, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.storage.statedict import State

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64

Point = Mapping[str, float]  # coefficients by name of the vector; missing ones are 0


class EditedEncoder:
    """An encoder with task vectors to add to it.

    Args:
        base: the encoder at theta0, standard or linearised.
        vectors: task vectors by name.
        split: returns the split with a name.
        device: device for communication between ranks; None for the encoder's.
    """

    def __init__(
        self,
        base: Encoder,
        vectors: Mapping[str, State],
        split: Callable[[str], Split],
        device: torch.device | None = None,
    ) -> None:
        self.base, self.vectors, self.split = base, dict(vectors), split
        self.device = device or Compute.of(base.weights()).device
        self._logits: dict[str, Logits] = {}

    def logits(self, name: str) -> Logits:
        """Logits of a linear model on a split, for all vectors; this rank's share."""
        if name not in self._logits:
            assert is_linear(self.base)
            self._logits[name] = linear_logits(self.base, self.vectors, self.split(name))
        return self._logits[name]

    def predictions(
        self, name: str, points: Sequence[Point]
    ) -> tuple[Int64[Tensor, "points images"], Int64[Tensor, " images"]]:
        """Classes that the edited models predict on a split; this rank's share.

        Args:
            name: the split.
            points: the coefficients of each model.

        Returns:
            The predicted classes, and the labels. Where an image has several labels, the class with
            the highest logit is predicted.
        """
        self._check(points)
        if not is_linear(self.base):
            return self._by_passes(name, points)
        logits = self.logits(name)
        rows = [logits.predictions(logits.row(point)) for point in points]
        return torch.stack(rows), logits.labels

    def accuracies(self, name: str, points: Sequence[Point]) -> list[float]:
        """The main metric of the edited models on a split, over all ranks."""
        self._check(points)
        if not is_linear(self.base):
            split, tallies = self.split(name), [Tally() for _ in points]
            for i, values, labels in self._passes(split, points):
                tallies[i].add(values, labels)
            return [main_of(found) for found in scores(tallies)]
        logits = self.logits(name)
        found = []
        for point in points:  # one at a time: the scores of all may need much memory
            tally = Tally()
            tally.add(logits.at(logits.row(point)), logits.labels)
            found += scores([tally])
        return [main_of(one) for one in found]

    def _check(self, points: Sequence[Point]) -> None:
        for point in points:
            if unknown := set(point) - set(self.vectors):
                raise KeyError(f"no vectors {sorted(unknown)}; there are {sorted(self.vectors)}")

    def rates(self, flags: Bool[Tensor, "rows images"]) -> list[float]:
        """The fraction of true flags in each row, over the images of all ranks."""
        counts = torch.tensor([*flags.sum(dim=1).tolist(), flags.shape[1]], device=self.device)
        *hits, total = ddp.all_sum(counts).tolist()
        return [hit / total for hit in hits]

    @torch.no_grad()
    def _by_passes(self, name: str, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        split = self.split(name)
        classes: list[list[Tensor]] = [[] for _ in points]
        labels: list[Tensor] = []
        for i, logits, truth in self._passes(split, points):
            classes[i].append(logits.argmax(dim=1).cpu())
            if i == 0:
                labels.append(truth.cpu())
        if not labels:  # fewer images than ranks
            return torch.zeros(len(points), 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        return torch.stack([torch.cat(row) for row in classes]), torch.cat(labels)

    def _passes(
        self, split: Split, points: Sequence[Point]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Logits and labels at each point, from forward passes of a standard encoder."""
        terms = [[(coef, self.vectors[vector]) for vector, coef in p.items()] for p in points]
        return logits_at(self.base, terms, split.head, split.batches, split.compute)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all batches of all ranks, by rank, on every rank."""
    shares = ddp.gather(list(parts))  # a rank without images has parts of no width
    return torch.cat([part for share in shares for part in share if len(part)])


class Edits(EditedEncoder):
    """The pre-trained encoder of a run, with the task vectors of one mode.

    Args:
        run: the run; its data sets are the splits, X for test and XVal for validation.
        mode: name of a mode with task vectors.
        tasks: the tasks whose vectors to load.
    """

    def __init__(self, run: Run, mode: str, tasks: Sequence[str]) -> None:
        self.encoder, self.theta0_hash = zeroshot_encoder(run)
        start = self.encoder, self.theta0_hash
        vectors = {task: task_vector(run, task, mode, *start).vector for task in tasks}
        base = base_encoder(self.encoder, mode)
        super().__init__(base, vectors, lambda name: split_of(run, base, name), run.device)
