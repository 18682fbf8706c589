"""What a merging method with `needs_data` gets: the network, the models' weights, a few images.

Its `prepare(examples, **options)` may run whole models; its function stays a pure function of a
piece and of what `prepare` returned. Neither knows about files, suites or heads' origins:
`merging/taskpools.py` gives the examples of a model pool and a task pool, a test those of small
modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from torch import Tensor

from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.merging.registry import Piece
from tangent_arithmetic.runtime.errors import UsageError

Part = Literal["validation", "test"]
Merged = Mapping[str, Tensor]  # merged tensors by name


class Examples(Protocol):
    """Models to merge that can be run on images of their tasks."""

    @property
    def models(self) -> Sequence[str]:
        """The names of the models, in order; each is the name of its task."""

    def encoder(self) -> ModuleEncoder:
        """A new encoder of the models' architecture, in evaluation mode, on the device."""

    def weights(self, model: str) -> Mapping[str, Tensor]:
        """The weights of a model, read on demand, which must not be modified.

        Args:
            model: its name, `_pretrained_` included.
        """

    def split(
        self,
        encoder: ModuleEncoder,
        model: str,
        count: int | None = None,
        seed: int = 0,
        part: Part = "validation",
    ) -> Split:
        """Images of a model's task, with its head.

        Args:
            encoder: the encoder, whose preprocessing is used.
            model: its name.
            count: number of images, chosen at random; all if None, or if there are no more.
            seed: of the choice.
            part: the split to take them from.
        """


def batches_of(split: Split) -> EvalBatches:
    """The batches of a split of `Examples.split`, which have a list of pictures."""
    assert isinstance(split.batches, EvalBatches), f"{split.name} has no list of pictures"
    return split.batches


def check_count(method: str, option: str, count: int) -> None:
    """Checks a number of images, steps or the like; a `UsageError` if it is below 1."""
    if count < 1:
        raise UsageError(f"{method}'s {option} must be at least 1, got {count}")


def merged_part(piece: Piece, merged: Merged) -> Tensor:
    """The piece of merged tensors; the mean of the models where they have none."""
    if piece.name in merged:
        return _part(piece, merged)
    total = piece.thetas[0].clone()
    for theta in piece.thetas[1:]:
        total += theta
    return total.div_(len(piece.thetas))


def part_or_sum(piece: Piece, merged: Merged, scaling_factor: float) -> Tensor:
    """The piece of merged tensors; theta0 + scaling_factor * sum of tau where they have none."""
    if piece.name in merged:
        return _part(piece, merged)
    total = piece.base.clone()
    for tau in piece.taus():
        total.add_(tau, alpha=scaling_factor)
    return total


def _part(piece: Piece, merged: Merged) -> Tensor:
    whole, like = merged[piece.name].reshape(-1), piece.thetas[0]
    return whole[piece.start : piece.start + len(like)].to(like, copy=True)
