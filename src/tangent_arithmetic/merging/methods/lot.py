r"""LOT Merging: layer by layer, the task vector of least feature drift.

\[ T = \arg\min_T \sum_k \|X_k (T - T_k)^\top\|^2
     = \Big(\sum_k T_k G_k\Big) \Big(\sum_k G_k\Big)^+ \]

with \(G_k = X_k^\top X_k\) of the inputs of the layer in model k on images of its task, and the
pseudoinverse of Moore and Penrose. Weights are (outputs, inputs), as in PyTorch. The scale of a
layer normalisation is a diagonal map of the normalised inputs x, so that in each dimension d
\(T_d = \sum_k |x_{k,d}|^2 T_{k,d} / \sum_k |x_{k,d}|^2\); a bias or shift is the map of a constant,
whose drift the mean minimises.

The inputs are those of RegMean with the ratio 1, from which this differs in the scales, and in the
directions that no input has: they stay at theta0 here, at the mean of the models there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tangent_arithmetic.merging.examples import Examples, Merged, check_count, merged_part
from tangent_arithmetic.merging.inner_products import of_models
from tangent_arithmetic.merging.registry import PRETRAINED, Piece, merging_method


class Drift:
    """The task vector of least drift of a linear map or scale, of which a model at a time is seen.

    Attributes:
        grams: the sum of the inner products, or of their diagonals for a scale.
        products: the sum of their products with the task vectors.
    """

    def __init__(self) -> None:
        self.grams = self.products = torch.zeros(0)

    def add(self, tau: Tensor, gram: Tensor) -> None:
        """Adds a model's task vector and the inner products of its inputs."""
        product = tau @ gram if gram.ndim == 2 else tau * gram
        if self.grams.numel():
            gram, product = self.grams + gram, self.products + product
        self.grams, self.products = gram, product

    def solution(self) -> Tensor:
        """T, in float64; eigenvalues below the rounding error of the products are 0."""
        rtol = len(self.grams) * torch.finfo(self.grams.dtype).eps
        grams, products = self.grams.double(), self.products.double()
        if grams.ndim == 1:
            return torch.where(grams > 0, products / grams, 0.0)
        inverse: Tensor = torch.linalg.pinv(grams, rtol=rtol, hermitian=True)
        return products @ inverse


def prepare(examples: Examples, *, num_examples: int, seed: int) -> Merged:
    """The merged linear maps and scales, from one pass of each model over its images."""
    check_count("lot", "num_examples", num_examples)
    encoder, theta0 = examples.encoder(), examples.weights(PRETRAINED)
    drifts: dict[str, Drift] = {}
    for name, weight, gram in of_models(examples, encoder, num_examples, seed, scales=True):
        tau = weight - theta0[name].to(weight)
        drifts.setdefault(name, Drift()).add(tau, gram)
    merged = dict[str, Tensor]()
    for name in list(drifts):
        drift = drifts.pop(name)
        start = theta0[name].to(drift.products)
        merged[name] = start + drift.solution().to(start)
    return merged


@merging_method(
    "lot",
    source="arXiv:2505.23859",
    algorithm="LOTAlgorithm",
    prepare=prepare,
    passes=2,
    needs_data=True,
)
def lot(piece: Piece, *, num_examples: int = 64, seed: int = 0, statistics: Merged) -> Tensor:
    r"""\(\theta_0 + T\) of least feature drift; the mean of other tensors.

    Args:
        piece: one piece of every model.
        num_examples: validation images of each task, 16 to 64 in the paper.
        seed: of the choice of images.
        statistics: the result of `prepare`.

    Source: Sun et al., "Towards Minimizing Feature Drift in Model Merging: Layer-wise Task Vector
    Fusion for Adaptive Knowledge Integration", arXiv:2505.23859, equations 9 and 12.
    """
    return merged_part(piece, statistics)
