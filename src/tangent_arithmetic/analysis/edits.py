r"""What a model predicts where several task vectors have been added, for any coefficients.

One `Edits` is the pre-trained encoder with the task vectors of one mode:
\(\theta_0 + \sum_t a_t \tau_t\). Linear and post-hoc models follow from one pass over the images,
standard ones are evaluated at each point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.logits import Logits, linear_logits
from tangent_arithmetic.arithmetic.sweeps import logits_at
from tangent_arithmetic.encoders.base import Encoder, is_linear
from tangent_arithmetic.run.models import base_encoder, split_of, task_vector, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.storage.statedict import State

Point = Mapping[str, float]  # coefficients by name of the vector; those left out are 0


class Edits:
    """The pre-trained encoder, and task vectors to add to it.

    Args:
        run: the run.
        mode: "standard", "posthoc" or "linear".
        tasks: whose vectors.
        more: further vectors by name, see `task_vectors.TaskVector.vector`.
    """

    def __init__(
        self, run: Run, mode: str, tasks: Sequence[str], more: Mapping[str, State] | None = None
    ) -> None:
        self.run, self.mode = run, mode
        self.encoder, self.theta0_hash = zeroshot_encoder(run)
        self.vectors: dict[str, State] = {
            task: task_vector(run, task, mode, self.encoder, self.theta0_hash).vector
            for task in tasks
        }
        self.vectors |= more or {}
        self._logits: dict[str, Logits] = {}

    @cached_property
    def base(self) -> Encoder:
        """The encoder at theta0, linearised or not."""
        return base_encoder(self.encoder, self.mode)

    def logits(self, dataset: str) -> Logits:
        """Logits of a linear model on a split, for all vectors; this rank's share."""
        if dataset not in self._logits:
            assert is_linear(self.base)
            split = split_of(self.run, self.base, dataset)
            whole = len(self.run.data.dataset(dataset).test)
            self._logits[dataset] = linear_logits(self.base, self.vectors, split, whole)
        return self._logits[dataset]

    def predictions(self, dataset: str, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        """Classes that the edited models give the images of a split; this rank's share.

        Args:
            dataset: X for the test split, XVal for the validation split.
            points: coefficients of each model.

        Returns:
            Classes, int64 (points, images), and the labels, int64 (images,).
        """
        for point in points:
            if unknown := set(point) - set(self.vectors):
                raise KeyError(f"no vectors {sorted(unknown)}; there are {sorted(self.vectors)}")
        if not is_linear(self.base):
            return self._by_passes(dataset, points)
        found = self.logits(dataset)
        rows = [[point.get(name, 0.0) for name in found.vectors] for point in points]
        return torch.stack([found.predictions(row) for row in rows]), found.labels

    def accuracies(self, dataset: str, points: Sequence[Point]) -> list[float]:
        """Top-1 accuracies of the edited models on a split, over all ranks."""
        classes, labels = self.predictions(dataset, points)
        return shares(classes == labels, self.run.device)

    @torch.no_grad()
    def _by_passes(self, dataset: str, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        split = split_of(self.run, self.base, dataset)
        terms = [[(coef, self.vectors[name]) for name, coef in point.items()] for point in points]
        found: list[list[Tensor]] = [[] for _ in points]
        labels: list[Tensor] = []
        for i, logits, truth in logits_at(
            self.base, terms, split.head, split.batches, self.run.compute
        ):
            found[i].append(logits.argmax(dim=1).cpu())
            if i == 0:
                labels.append(truth.cpu())
        if not labels:  # fewer images than ranks
            return torch.zeros(len(points), 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        return torch.stack([torch.cat(row) for row in found]), torch.cat(labels)


def shares(flags: Tensor, device: torch.device) -> list[float]:
    """Share of the images for which each row is true, over all ranks.

    Args:
        flags: bool (rows, images of this rank).
        device: of the model; nccl talks on it alone.
    """
    counts = torch.tensor([*flags.sum(dim=1).tolist(), flags.shape[1]], device=device)
    *hits, total = ddp.all_sum(counts).tolist()
    return [hit / total for hit in hits]
