r"""TaLoS: training the weights that the pre-trained model is least sensitive to.

\[ s_i = \sum_x \left(\partial_{\theta_i} \log p(y|x; \theta_0)\right)^2, \quad y \sim p(\cdot|x) \]

The weights with the lowest scores are trained, the others stay as they are, bit by bit. In each
round new labels are drawn, and of the weights left a share is dropped, so that the wanted share is
left after the last one. Scores are those at theta0 in every round, and labels of the data are not
used.

Source: Iurada, Ciccone, Tommasi, "Efficient Model Editing with Task-Localized Sparse Fine-tuning",
ICLR 2025. (The authors' code takes the logit of y for log p, and scales dropped weights down in
later rounds.)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.linearized import LinearizedEncoder
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.logs import Progress
from tangent_arithmetic.storage.checkpoints import read_checkpoint, save_tensors
from tangent_arithmetic.training.reparametrised import Part, reparametrise

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, UInt8

logger = logging.getLogger(__name__)

ROUNDS = 4
IMAGES = 256  # whose scores are summed, at most
STREAM = 23  # of random numbers, apart from those of training
KIND = "mask"

Masks = dict[str, "Bool[Tensor, '...']"]


def sensitivity(
    model: nn.Module, images: Sequence[Tensor], generator: np.random.Generator
) -> dict[str, Float[Tensor, ...]]:
    """The scores of the trained parameters, one backward pass an image.

    Parameters that the output does not depend on have none.

    Args:
        model: maps images to logits; in evaluation mode afterwards.
        images: each of shape (channels, height, width).
        generator: of the labels.
    """
    model.eval()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(named.values())).device
    scores = dict[str, Tensor]()
    for image in Progress(images, "sensitivity", unit="image"):
        log_p = model(image[None].to(device))[0].log_softmax(dim=0)
        chances = log_p.detach().double().exp().cumsum(0)
        drawn = torch.searchsorted(chances, float(generator.random()) * chances[-1])
        gradients = torch.autograd.grad(
            log_p[min(int(drawn), len(chances) - 1)], list(named.values()), allow_unused=True
        )
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                square = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()
                scores[name] = scores[name].add_(square) if name in scores else square
    return scores


def least(scores: Mapping[str, Tensor], among: Mapping[str, Tensor], count: int) -> Masks:
    """Marks the weights with the lowest scores over all tensors; of equal ones, the first.

    Args:
        scores: by name.
        among: marks the weights to choose from.
        count: how many to mark.
    """
    flat = torch.cat(
        [scores[n].where(among[n], torch.inf).flatten().cpu() for n in scores]
    )  # in the order of names
    if count >= len(flat):
        chosen = torch.ones_like(flat, dtype=torch.bool)
    else:
        threshold = flat.kthvalue(count).values
        chosen = flat < threshold
        equal = torch.nonzero(flat == threshold).flatten()
        chosen[equal[: count - int(chosen.sum())]] = True
    parts = chosen.split([value.numel() for value in scores.values()])
    shapes = (value.shape for value in scores.values())
    return {n: p.view(shape) for n, p, shape in zip(scores, parts, shapes, strict=True)}


def used(scores: Float[Tensor, ...]) -> Bool[Tensor, ...]:
    """Marks the weights of a tensor that may be trained: not the rows that no example has used.

    Such as those of an embedding of words that do not occur: their scores are 0, not low.
    """
    if scores.ndim < 2:
        return scores.any().expand_as(scores).clone()
    rows = scores.flatten(1).any(dim=1)
    return rows.view(-1, *(1 for _ in scores.shape[1:])).expand_as(scores).clone()


def masks_of(
    model: nn.Module, images: Sequence[Tensor], share: float, seed: int = 0, rounds: int = ROUNDS
) -> Masks:
    r"""Marks a share of the weights, \(share^{r/R}\) of them after round r of R.

    Args:
        model: maps images to logits, at theta0.
        images: unlabelled images of the task.
        share: of the weights that the images `used`, above 0 and below 1.
        seed: of the labels.
        rounds: R.

    Raises:
        UsageError: if that is less than one weight.
    """
    masks, total = Masks(), 0
    for done in range(rounds):
        generator = np.random.default_rng(np.random.SeedSequence((seed, STREAM, done)))
        scores = sensitivity(model, images, generator)
        left = [n for n, p in model.named_parameters() if p.requires_grad and n not in scores]
        if left and not done:
            names = ", ".join(left)
            logger.info("not used by %d images, hence not trained: %s", len(images), names)
        masks = masks or {name: used(score) for name, score in scores.items()}
        total = total or sum(int(mask.sum()) for mask in masks.values())
        count = round(total * share ** ((done + 1) / rounds))
        if count == 0:
            raise UsageError(
                f"--trainable=talos:{share}: that is none of {total} weights; choose a larger share"
            )
        masks = least(
            scores, {name: mask.to(scores[name].device) for name, mask in masks.items()}, count
        )
    return masks


class Sparse(Part):
    """A weight of which only marked entries are trained.

    Args:
        mask: marks them.
        start: the initial weight.
    """

    def __init__(self, mask: Bool[Tensor, ...], start: Tensor) -> None:
        super().__init__()
        # no buffer: a resume state would hold it, and the masks have a file
        self.index = torch.nonzero(mask.flatten().to(start.device)).flatten()
        self.entries = nn.Parameter(start.detach().flatten()[self.index].clone())

    def value(self, start: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The weight."""
        self.index = self.index.to(start.device)
        flat = start.detach().flatten().index_copy(0, self.index, self.entries.to(start.dtype))
        return flat.view_as(start)


def restricted(encoder: ModuleEncoder, masks: Mapping[str, Tensor]) -> ModuleEncoder:
    """The encoder to train in place of one, of which only marked weights change.

    Args:
        encoder: a standard encoder, or a linearised one at theta0.
        masks: by name, as in the standard encoder.
    """
    linear = isinstance(encoder, LinearizedEncoder)
    weights = encoder.theta0() if linear else dict(encoder.named_parameters())  # type: ignore[operator]
    return reparametrise(
        encoder, {name: Sparse(mask, weights[name]) for name, mask in masks.items() if mask.any()}
    )


def save_masks(path: Path, masks: Mapping[str, Tensor], made: str) -> None:
    """Writes masks, a bit a weight.

    Args:
        path: the file.
        masks: by name.
        made: a hash of what they depend on.
    """
    bits = {name: _packed(mask) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    save_tensors(path, bits, KIND, info={"shapes": shapes, "made": made})


def load_masks(path: Path, made: str) -> Masks | None:
    """The masks in a file; None if there is none, or it depends on something else.

    Raises:
        UsageError: if the file is damaged.
    """
    checkpoint = read_checkpoint(path) if path.is_file() else None
    if checkpoint is None or checkpoint.kind != KIND or checkpoint.info.get("made") != made:
        return None
    shapes = checkpoint.info["shapes"]
    return {name: _unpacked(checkpoint.theta[name], shape) for name, shape in shapes.items()}


def _packed(mask: Bool[Tensor, ...]) -> UInt8[Tensor, " bytes"]:
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def _unpacked(bits: UInt8[Tensor, " bytes"], shape: Sequence[int]) -> Bool[Tensor, ...]:
    count = int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).view(*shape)
