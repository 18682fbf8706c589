r"""Fisher merging: the mean of the models, each weight counted by its Fisher information.

\(F_k = E_{x \sim D_k} E_{y \sim p(y|x; \theta_k)} (\partial_\theta \log p(y|x; \theta_k))^2\), the
diagonal of the Fisher information matrix, by the gradients of single images: for each image and
class c, \(J^T (e_c - p)\) is squared and counts \(p_c\). The classes are summed, not drawn.

fusion-bench and MergeLM square the gradient of \(\sum_x \sum_c \sqrt{p_c} \log p_c\), a sum over
classes and the images of a batch, so that products of different images and classes enter and the
result depends on the batches. `tests/merging/test_with_data.py` shows both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.loading import to_device
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.merging.examples import (
    Examples,
    Merged,
    batches_of,
    check_count,
    merged_part,
)
from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.tangent.gradients import ExampleGradients

if TYPE_CHECKING:
    from jaxtyping import Float

MEMORY = 2**27  # bytes of the gradients that are computed together


def root_of_softmax(
    logits: Float[Tensor, " classes"], chosen: Float[Tensor, " classes"]
) -> Float[Tensor, " classes"]:
    r"""\(\sqrt{p_c} (e_c - p)\), for the class c that `chosen` is 1 at."""
    p = logits.softmax(0)
    return (chosen @ p).sqrt() * (chosen - p)


def root_of_sigmoids(
    logits: Float[Tensor, " classes"], chosen: Float[Tensor, " classes"]
) -> Float[Tensor, " classes"]:
    r"""\(\sqrt{p_c (1 - p_c)} e_c\): labels of independent classes have no products."""
    p = logits.sigmoid()
    return (p * (1 - p)).sqrt() * chosen


def diagonal_fisher(encoder: ModuleEncoder, split: Split) -> dict[str, Tensor]:
    """The diagonal Fisher information of an encoder's parameters, a mean over images.

    Args:
        encoder: the encoder, in evaluation mode.
        split: images with their head; labels only say whether an image has several.
    """
    weights = {f"0.{name}": p.requires_grad_() for name, p in encoder.named_parameters()}
    total = {  # at least in float32, in which small squares count
        name: torch.zeros_like(
            p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False
        )
        for name, p in weights.items()
    }
    classifier = nn.Sequential(encoder, split.head).eval()
    rows, count = max(1, MEMORY // sum(p.nbytes for p in weights.values())), 0
    of_images: ExampleGradients | None = None
    for images, several, classes in _batches(classifier, split, rows):
        if of_images is None:
            root = root_of_sigmoids if several else root_of_softmax
            of_images = ExampleGradients(classifier, weights, root)
        every = torch.eye(classes, device=images.device)
        for some in every.split(max(1, rows // len(images))):
            for name, g in of_images(images, some.expand(len(images), -1, -1)).items():
                total[name] += g.square().sum(0)
        count += len(images)
    return {name.removeprefix("0."): value.div_(count) for name, value in total.items()}


def _batches(
    classifier: nn.Module, split: Split, rows: int
) -> Iterator[tuple[Float[Tensor, "batch ..."], bool, int]]:
    """A few images at a time, whether they have several labels each, and the number of classes."""
    batches, classes = batches_of(split), 0
    device = next(classifier.parameters()).device
    for batch in progress(batches, f"Fisher information on {split.name}", len(batches)):
        images, labels = to_device(batch, device)
        if not classes:
            with torch.no_grad():
                classes = classifier(images[:1]).shape[1]
        for part in images.split(max(1, rows // classes)):
            yield part, labels.ndim == 2, classes


def prepare(
    examples: Examples,
    *,
    num_fisher_examples: int,
    normalize_fisher_weight: bool,
    minimal_fisher_weight: float,
    seed: int,
) -> Merged:
    """The merged parameters, from one model after the other."""
    check_count("fisher_merging", "num_fisher_examples", num_fisher_examples)
    if not minimal_fisher_weight > 0:
        raise UsageError(
            f"fisher_merging's minimal_fisher_weight must be above 0, got {minimal_fisher_weight}"
        )
    encoder = examples.encoder()
    above: dict[str, Tensor] = {}
    below: dict[str, Tensor] = {}
    for model in examples.models:
        encoder.load_weights(examples.weights(model))
        split = examples.split(encoder, model, num_fisher_examples, seed)
        fisher = diagonal_fisher(encoder, split)
        norm = torch.stack([value.norm() for value in fisher.values()]).norm()
        for name, p in encoder.named_parameters():
            weight = fisher.pop(name).add_(minimal_fisher_weight)
            if normalize_fisher_weight:
                weight /= norm + minimal_fisher_weight
            part = weight * p.detach()
            above[name] = above[name].add_(part) if name in above else part
            below[name] = below[name].add_(weight) if name in below else weight
    return {name: value.div_(below.pop(name)) for name, value in above.items()}


@merging_method(
    "fisher_merging",
    source="arXiv:2111.09832",
    algorithm="FisherMergingForCLIPVisionModel",
    config="fisher_merging/clip_fisher_merging",
    prepare=prepare,
    passes=2,
    needs_pretrained=False,
    needs_data=True,
)
def fisher_merging(
    piece: Piece,
    *,
    num_fisher_examples: int = 256,
    normalize_fisher_weight: bool = True,
    minimal_fisher_weight: float = 1e-6,
    seed: int = 0,
    statistics: Merged,
) -> Tensor:
    r"""\(\theta = \sum_k F_k \theta_k / \sum_k F_k\), with \(F_k\) as above, plus a floor.

    With \(\epsilon\) the floor, model k counts \((F_k + \epsilon) / (\|F_k\| + \epsilon)\), or
    \(F_k + \epsilon\). Tensors that are no parameters, such as running means, are averaged.

    Args:
        piece: one piece of every model.
        num_fisher_examples: validation images of each task.
        normalize_fisher_weight: divide by the norm of each F, so that a model whose gradients are
            small counts as much as others.
        minimal_fisher_weight: the floor.
        seed: of the choice of images.
        statistics: the result of `prepare`.

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", arXiv:2111.09832,
    sections 3.1 to 3.3; the floor, normalisation and defaults are fusion-bench's.
    """
    return merged_part(piece, statistics)
