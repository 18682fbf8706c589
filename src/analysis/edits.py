r"""What a model predicts where several task vectors have been added, for any coefficients.

One `Edits` is the pre-trained encoder with the task vectors of one mode:
\(\theta_0 + \sum_t a_t \tau_t\). Linear and post-hoc models follow from one pass over the images,
standard ones are evaluated at each point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from src import ddp, statedict
from src.analysis.logits import Logits, linear_logits
from src.data.registry import eval_batches
from src.eval import held_batches, load_base
from src.heads import get_classification_head
from src.linearize import LinearizedImageEncoder
from src.logs import progress
from src.runs import task_vector, zeroshot_encoder
from src.settings import autocast_of, device_of
from src.statedict import State

Point = Mapping[str, float]  # coefficients by name of the vector; those left out are 0
MODES = ("standard", "posthoc", "linear")


class Edits:
    """The pre-trained encoder, and task vectors to add to it.

    Args:
        args: settings of the run.
        mode: "standard", "posthoc" or "linear".
        tasks: whose vectors.
        more: further vectors by name, see `src.task_vectors.TaskVector.vector`.
    """

    def __init__(
        self, args: Any, mode: str, tasks: Sequence[str], more: Mapping[str, State] | None = None
    ) -> None:
        self.args, self.mode = args, mode
        self.encoder, self.theta0_hash = zeroshot_encoder(args)
        self.vectors: dict[str, State] = {
            task: task_vector(args, task, mode, self.encoder, self.theta0_hash).vector
            for task in tasks
        }
        self.vectors |= more or {}
        self._logits: dict[str, Logits] = {}

    @cached_property
    def base(self) -> Any:
        """The encoder at theta0, linearised or not."""
        return load_base(self.encoder, linear=self.mode != "standard")

    def logits(self, dataset: str) -> Logits:
        """Logits of a linear model on a split, for all vectors; this rank's share."""
        if dataset not in self._logits:
            assert isinstance(self.base, LinearizedImageEncoder)
            self._logits[dataset] = linear_logits(self.base, self.vectors, dataset, self.args)
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
        if self.mode == "standard":
            return self._by_passes(dataset, points)
        found = self.logits(dataset)
        rows = [[point.get(name, 0.0) for name in found.vectors] for point in points]
        return torch.stack([found.predictions(row) for row in rows]), found.labels

    def accuracies(self, dataset: str, points: Sequence[Point]) -> list[float]:
        """Top-1 accuracies of the edited models on a split, over all ranks."""
        classes, labels = self.predictions(dataset, points)
        return shares(classes == labels, device_of(self.args))

    @torch.no_grad()
    def _by_passes(self, dataset: str, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        device = device_of(self.args)
        encoder = self.base.eval().to(device)
        head = get_classification_head(self.args, dataset).to(device)
        own = encoder.weights()
        theta = {name: value.clone() for name, value in own.items()}
        loader = eval_batches(self.args, dataset, encoder.val_preprocess)
        found: list[list[Tensor]] = [[] for _ in points]
        labels: list[Tensor] = []
        label = f"{len(points)} models on {dataset}"
        try:
            for batches in held_batches(loader, device):
                labels += [truth.cpu() for _, truth in batches]
                for row, point in zip(progress(found, label), points, strict=True):
                    self._move(own, theta, point, device)
                    for images, _ in batches:
                        with autocast_of(self.args):
                            features = encoder(images)
                        row.append(head(features.float()).argmax(dim=1).cpu())
        finally:
            encoder.load_weights(theta)
        if not labels:  # fewer images than ranks
            return torch.zeros(len(points), 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        return torch.stack([torch.cat(row) for row in found]), torch.cat(labels)

    def _move(self, own: State, theta: State, point: Point, device: torch.device) -> None:
        """Puts theta0 + sum of coefficients times vectors into the encoder."""
        total: dict[str, Tensor] = {}
        for name, coef in point.items():
            for key, value in self.vectors[name].items() if coef else ():
                step = coef * value.to(device)
                total[key] = total[key] + step if key in total else step
        for key in own.keys() - total.keys():
            own[key].copy_(theta[key])
        statedict.move_into(own, theta, total, 1.0)


def shares(flags: Tensor, device: torch.device) -> list[float]:
    """Share of the images for which each row is true, over all ranks.

    Args:
        flags: bool (rows, images of this rank).
        device: of the model; nccl talks on it alone.
    """
    counts = torch.tensor([*flags.sum(dim=1).tolist(), flags.shape[1]], device=device)
    *hits, total = ddp.all_sum(counts).tolist()
    return [hit / total for hit in hits]
