r"""RegMean and RegMean++: each linear map is the least-squares fit to those of the models.

\[ W = \Big(\sum_k W_k G_k\Big) \Big(\sum_k G_k\Big)^{-1}
     = \arg\min_W \sum_k \tfrac{1}{n_k} \|X_k W^\top - X_k W_k^\top\|^2 \]

with \(G_k = X_k^\top X_k / n_k\) of the inputs of the map on n_k images of task k, and its
off-diagonal entries reduced. Weights are (outputs, inputs), as in PyTorch. Each task counts the
same, whatever its number of images.

RegMean takes X_k from model k; RegMean++ takes the inputs of a block from the merged blocks before
it, and those of the maps within the block from model k's block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.solving.groups import by_layer
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.merging.examples import Examples, Merged, check_count, merged_part
from tangent_arithmetic.merging.inner_products import of_models
from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import is_real_float, ties
from tangent_arithmetic.tangent.caches import empty_caches


@dataclass(frozen=True)
class Settings:
    """How linear maps are fitted.

    Attributes:
        count: images of each task.
        ratio: off-diagonal entries of the inner products are multiplied by it.
        seed: of the choice of images.
    """

    count: int
    ratio: float
    seed: int

    def check(self, method: str) -> None:
        """Checks the settings; a `UsageError` if they are out of range."""
        check_count(method, "num_regmean_examples", self.count)
        if not 0 <= self.ratio <= 1:
            raise UsageError(
                f"{method}'s reduce_non_diagonal_ratio must be from 0 to 1, got {self.ratio}"
            )


class Regression:
    """The least-squares fit of one linear map, of which a model at a time is seen.

    Args:
        ratio: off-diagonal entries of the inner products are multiplied by it.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio, self.count = ratio, 0
        self.grams = self.products = self.weights = torch.zeros(0)

    def add(self, weight: Tensor, gram: Tensor) -> None:
        """Adds a model's map and the inner products of its inputs."""
        reduced = gram * self.ratio
        reduced.diagonal().copy_(gram.diagonal())
        values = reduced, weight @ reduced, weight.clone()
        if self.count:
            values = self.grams + values[0], self.products + values[1], self.weights + values[2]
        self.grams, self.products, self.weights = values
        self.count += 1

    def solution(self) -> Tensor:
        r"""W, solved for in float64 as a step from the mean of the maps.

        \(\sum_k G_k\) is raised by its rounding error, relative to its mean eigenvalue, so that the
        mean stays where the inputs say nothing.
        """
        eps = torch.finfo(self.grams.dtype).eps
        mean, raised = self.weights.double() / self.count, self.grams.double()
        level = raised.diagonal().mean()
        if level == 0:
            return mean
        residual = self.products.double() - mean @ raised
        raised.diagonal().add_(eps * level)
        step: Tensor = torch.linalg.solve(raised, residual, left=False)
        return mean + step


def fitted(
    examples: Examples, encoder: ModuleEncoder, names: Sequence[str] | None, settings: Settings
) -> dict[str, Tensor]:
    """The fits of the linear maps whose weights are named.

    Args:
        examples: the models and their images.
        encoder: runs them; of each model the named weights are loaded, all if None.
        names: names of weights, or None.
        settings: how.
    """
    fits: dict[str, Regression] = {}
    found = of_models(examples, encoder, settings.count, settings.seed, names)
    for name, weight, gram in found:
        fits.setdefault(name, Regression(settings.ratio)).add(weight, gram)
    state = encoder.weights()
    return {name: fits.pop(name).solution().to(state[name]) for name in list(fits)}


def prepare(
    examples: Examples, *, num_regmean_examples: int, reduce_non_diagonal_ratio: float, seed: int
) -> Merged:
    """The merged linear maps, from one pass of each model over its images."""
    settings = Settings(num_regmean_examples, reduce_non_diagonal_ratio, seed)
    settings.check("regmean")
    return fitted(examples, examples.encoder(), None, settings)


@merging_method(
    "regmean",
    source="arXiv:2212.09849",
    algorithm="RegMeanAlgorithmForCLIP",
    config="regmean/clip_regmean",
    prepare=prepare,
    passes=2,
    needs_pretrained=False,
    needs_data=True,
)
def regmean(
    piece: Piece,
    *,
    num_regmean_examples: int = 256,
    reduce_non_diagonal_ratio: float = 0.95,
    seed: int = 0,
    statistics: Merged,
) -> Tensor:
    r"""\(W = (\sum_k W_k G_k) (\sum_k G_k)^{-1}\) of linear maps, the mean of other tensors.

    Args:
        piece: one piece of every model.
        num_regmean_examples: validation images of each task.
        reduce_non_diagonal_ratio: off-diagonal entries of G are multiplied by it; the default is
            that of fusion-bench's configuration for CLIP.
        seed: of the choice of images.
        statistics: the result of `prepare`.

    Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models",
    arXiv:2212.09849, section 3 and algorithm 1.
    """
    return merged_part(piece, statistics)


def prepare_plusplus(
    examples: Examples, *, num_regmean_examples: int, reduce_non_diagonal_ratio: float, seed: int
) -> Merged:
    """The merged linear maps, block by block, each on the outputs of the merged ones before it."""
    settings = Settings(num_regmean_examples, reduce_non_diagonal_ratio, seed)
    settings.check("regmean_plusplus")
    encoder = examples.encoder()
    state, merged = encoder.weights(), dict[str, Tensor]()
    tied = ties(state)
    for names in by_layer([name for name in state if name not in tied]).values():
        fits = fitted(examples, encoder, names, settings)
        merged |= fits
        with torch.no_grad():
            for name in names:
                state[name].copy_(fits[name] if name in fits else _mean(examples, name))
        empty_caches(encoder)
    return merged


def _mean(examples: Examples, name: str) -> Tensor:
    """The mean of one tensor of the models; the first one's if it holds no real numbers."""
    first, *others = (examples.weights(model)[name] for model in examples.models)
    if not is_real_float(first):
        return first
    return sum((other.float() for other in others), first.float()) / (1 + len(others))


@merging_method(
    "regmean_plusplus",
    source="arXiv:2508.03121",
    algorithm="RegMeanAlgorithmForCLIPPlusPlus",
    config="regmean_plusplus/clip_regmean_plusplus",
    prepare=prepare_plusplus,
    passes=2,
    needs_pretrained=False,
    needs_data=True,
)
def regmean_plusplus(
    piece: Piece,
    *,
    num_regmean_examples: int = 256,
    reduce_non_diagonal_ratio: float = 0.95,
    seed: int = 0,
    statistics: Merged,
) -> Tensor:
    r"""\(W\) as in `regmean`, with the inputs of each block from the merged blocks before it.

    Blocks follow from the names of the weights, see `arithmetic.solving.groups`. The images pass
    the model once for each block and task.

    Args:
        piece: one piece of every model.
        num_regmean_examples: validation images of each task.
        reduce_non_diagonal_ratio: off-diagonal entries of G are multiplied by it; the default is
            that of fusion-bench's configuration for CLIP.
        seed: of the choice of images.
        statistics: the result of `prepare_plusplus`.

    Source: "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model
    Merging", arXiv:2508.03121.
    """
    return merged_part(piece, statistics)
