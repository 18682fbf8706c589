r"""FeatCal: the merged model calibrated block by block to the features of the models.

It starts at \(\theta_m = \theta_0 + \lambda \sum_k \tau_k\). For each block in turn the student is
the merged model, calibrated up to the block before. On images of task k a linear map of the block
has inputs \(x_s\) in the student and \(x_e\) in model k, and the target
\(x_t = \alpha x_e + (1 - \alpha) x_s\). With \(C_k = E\, x_s x_s^\top\),
\(S_k = E\, x_s x_t^\top\) and \(n_k = \|C_k\|_F\),

\[ W = \Big(\sum_k W_k S_k^\top / n_k + \mu A\Big) \Big(\sum_k C_k / n_k + \mu I\Big)^{-1},
   \quad A = \rho\, \theta_m + (1 - \rho)\, \theta_0 \]

(weights are (outputs, inputs), as in PyTorch), and with \(\bar x\) for means over tokens and
\(a\) for the anchor of the bias

\[ b = \Big(\sum_k (b_k + W_k \bar x_t - W \bar x_s) / n_k + \mu a\Big)
       \Big/ \Big(\sum_k 1 / n_k + \mu\Big). \]

Scale and shift of a layer normalisation are the ridge regression, channel by channel, on
\(\gamma_k z + \beta_k\) of the student's normalised inputs z. All maps of a block see the inputs
from before the block is calibrated.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.solving.groups import EMBEDDING, HEAD, by_layer, places
from tangent_arithmetic.data.loading import to_device
from tangent_arithmetic.data.texts import tokens_of
from tangent_arithmetic.merging.examples import (
    Examples,
    Merged,
    batches_of,
    check_count,
    part_or_sum,
)
from tangent_arithmetic.merging.inner_products import Inputs
from tangent_arithmetic.merging.moving import merged_encoder
from tangent_arithmetic.merging.registry import PRETRAINED, Piece, merging_method
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.logs import progress

FLOOR = 1e-8  # of the norm of the inner products
Terms = tuple[Tensor, ...]


@dataclass(frozen=True)
class Settings:
    """How blocks are calibrated, see `featcal`."""

    num_examples: int
    ridge: float
    anchor_blend: float
    interpolation: float
    seed: int

    def check(self) -> None:
        """Checks the settings; a `UsageError` if they are out of range."""
        check_count("featcal", "num_examples", self.num_examples)
        if not 0 < self.ridge < math.inf:
            raise UsageError(f"featcal's ridge must be above 0, got {self.ridge}")
        if not 0 <= self.interpolation <= 1:
            raise UsageError(
                f"featcal's interpolation must be from 0 to 1, got {self.interpolation}"
            )


def moments(student: Tensor, expert: Tensor | None, interpolation: float) -> Terms:
    """Sums over tokens (n, inputs): of x_s x_s^T, x_s x_t^T, x_s, x_t; of a scale, of z^2 and z.

    Args:
        student: x_s, or z.
        expert: x_e, or None for a scale.
        interpolation: alpha.
    """
    if expert is None:
        return student.square().sum(0), student.sum(0)
    target = torch.lerp(student, expert, interpolation)
    return student.mT @ student, student.mT @ target, student.sum(0), target.sum(0)


def linear_terms(means: Terms, weight: Tensor, bias: Tensor | None) -> Terms:
    """A task's share of the sums of the fit: of C, W S^T, 1, x_s, and b + W x_t, each over n_k."""
    gram, product, student, target = means
    norm = gram.norm().clamp_min(FLOOR)
    output = weight @ target if bias is None else bias + weight @ target
    terms = gram, weight @ product.mT, torch.ones_like(norm), student, output
    return tuple(term / norm for term in terms)


def linear_fit(terms: Terms, ridge: float, anchor: Tensor, shift: Tensor | None) -> Terms:
    """W, and b if there is one, from the sums over tasks and the anchors of both."""
    grams, products, count, student, output = terms
    grams = grams + ridge * torch.eye(len(grams)).to(grams)
    weight: Tensor = torch.linalg.solve(grams, products + ridge * anchor, left=False)
    if shift is None:
        return (weight,)
    return weight, (output - weight @ student + ridge * shift) / (count + ridge)


def scale_terms(means: Terms, scale: Tensor, shift: Tensor | None) -> Terms:
    """A task's share of the sums of the fit: of z^2, z, 1, z y and y = scale z + shift."""
    square, mean = means
    shift = torch.zeros_like(scale) if shift is None else shift
    output = square * scale + mean * shift, mean * scale + shift
    return square, mean, torch.ones_like(mean), *output


def scale_fit(terms: Terms, ridge: float, anchor: Tensor, shift: Tensor | None) -> Terms:
    """Scale, and shift if there is one, from the sums over tasks and the anchors of both."""
    square, mean, count, first, second = terms
    square, first = square + ridge, first + ridge * anchor
    if shift is None:
        return (first / square,)
    count, second = count + ridge, second + ridge * shift
    det = square * count - mean.square()
    return (count * first - mean * second) / det, (square * second - mean * first) / det


def captured(
    encoder: nn.Module, names: Sequence[str], images: Tensor
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The inputs of the named maps and scales as rows, and the names of their biases."""
    rows = defaultdict[str, list[Tensor]](list)
    inputs = Inputs(encoder, lambda name, x: rows[name].append(x), names, scales=True)
    inputs.mask = tokens_of(images)
    with inputs:
        encoder(images)
    return {name: torch.cat(parts) for name, parts in rows.items()}, inputs.biases


def added(before: Terms | None, terms: Terms) -> Terms:
    """The sums of two tuples of tensors."""
    return tuple(map(torch.add, before, terms)) if before else terms


class Calibration:
    """A merged model that is calibrated block by block.

    Args:
        examples: the models and their images.
        scaling_factor: of the merged model that it starts from.
        settings: how.

    Attributes:
        student: the merged model.
    """

    def __init__(self, examples: Examples, scaling_factor: float, settings: Settings) -> None:
        self.examples, self.settings = examples, settings
        self.student, self.expert = merged_encoder(examples, scaling_factor), examples.encoder()
        self.biases = dict[str, str]()  # by the name of the weight

    @torch.no_grad()
    def calibrate(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Calibrates the maps and scales among the named parameters, and returns them."""
        totals, merged = dict[str, Terms](), dict[str, Tensor]()
        for model in self.examples.models:
            for name, terms in self._terms(model, names):
                totals[name] = added(totals.get(name), terms)
        state = self.student.weights()
        for name, terms in totals.items():
            pair = [name, self.biases[name]] if name in self.biases else [name]
            fit = scale_fit if state[name].ndim == 1 else linear_fit
            anchor, *shifts = map(self._anchor, pair)
            values = fit(terms, self.settings.ridge, anchor, shifts[0] if shifts else None)
            for key, value in zip(pair, values, strict=True):
                merged[key] = state[key].copy_(value)
        return merged

    def _anchor(self, name: str) -> Tensor:
        theta, rho = self.student.weights()[name], self.settings.anchor_blend
        theta0 = self.examples.weights(PRETRAINED)[name].to(theta)
        return rho * theta.double() + (1 - rho) * theta0.double()

    def _terms(self, model: str, names: Sequence[str]) -> Iterator[tuple[str, Terms]]:
        """A task's share of the sums, in float64, of each map and scale."""
        self.expert.load_weights(self.examples.weights(model))
        own, sums, count = self.expert.weights(), dict[str, Terms](), Counter[str]()
        settings, device = self.settings, next(self.expert.parameters()).device
        split = self.examples.split(self.expert, model, settings.num_examples, settings.seed)
        batches = batches_of(split)
        for batch in progress(batches, f"features of {model}", len(batches)):
            images, _ = to_device(batch, device)
            student, biases = captured(self.student, names, images)
            expert, _ = captured(self.expert, names, images)
            self.biases |= biases
            for name, x in student.items():
                y = None if own[name].ndim == 1 else expert.pop(name)
                sums[name] = added(sums.get(name), moments(x, y, settings.interpolation))
                count[name] += len(x)
        for name, values in sums.items():
            means = tuple(value.double() / count[name] for value in values)
            bias = own[self.biases[name]].double() if name in self.biases else None
            terms = scale_terms if own[name].ndim == 1 else linear_terms
            yield name, terms(means, own[name].double(), bias)


def prepare(
    examples: Examples,
    *,
    scaling_factor: float,
    num_examples: int,
    ridge: float,
    anchor_blend: float,
    interpolation: float,
    seed: int,
) -> Merged:
    """The calibrated maps and scales of all blocks."""
    settings = Settings(num_examples, ridge, anchor_blend, interpolation, seed)
    settings.check()
    calibration, merged = Calibration(examples, scaling_factor, settings), dict[str, Tensor]()
    every = list(calibration.student.weights())
    left_out = (EMBEDDING, HEAD) if places(every) else ()  # else names of modules
    for layer, names in by_layer(every).items():
        if layer not in left_out:
            merged |= calibration.calibrate(names)
    return merged


@merging_method(
    "featcal",
    source="arXiv:2605.13030",
    algorithm="FeatCalAlgorithm",
    prepare=prepare,
    passes=2,
    coefficient=None,  # the result is not affine in it
    needs_data=True,
)
def featcal(
    piece: Piece,
    *,
    scaling_factor: float = 0.3,
    num_examples: int = 256,
    ridge: float = 0.05,
    anchor_blend: float = 2.0,
    interpolation: float = 0.3,
    seed: int = 0,
    statistics: Merged,
) -> Tensor:
    r"""\(W\), b, scales and shifts as above; \(\theta_m\) of other tensors.

    Blocks follow from the names of the weights, see `arithmetic.solving.groups`. The embedding and
    the head stay at \(\theta_m\), and so do tensors of a block that are of no linear map or layer
    normalisation. The images pass the merged model and one model for each block.

    Args:
        piece: one piece of every model.
        scaling_factor: lambda.
        num_examples: validation images of each task.
        ridge: mu.
        anchor_blend: rho; 1 for the merged model as the anchor.
        interpolation: alpha; 0 for the student's own inputs.
        seed: of the choice of images.
        statistics: the result of `prepare`.

    Source: Gu et al., "FeatCal: Feature Calibration for Post-Merging Models", arXiv:2605.13030; the
    defaults are the paper's, the authors' script has rho = 2.2 and alpha = 0.25.
    """
    return part_or_sum(piece, statistics, scaling_factor)
