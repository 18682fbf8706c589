r"""Inner products of the inputs of linear maps, \(G = X^\top X / n\), while a module runs.

A linear map is a call of `F.linear` whose weight is one of the module's parameters: every
`nn.Linear`, and the projections of `nn.MultiheadAttention`, which PyTorch keeps out of sight. The
scale of a layer normalisation, a diagonal map of normalised inputs, has the diagonal of G.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.loading import to_device
from tangent_arithmetic.data.texts import tokens_of
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.merging.examples import Examples, batches_of
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.tangent.caches import empty_caches
from tangent_arithmetic.tangent.layers import Composed

if TYPE_CHECKING:
    from jaxtyping import Float


class Inputs(Composed):
    """Passes on the inputs of each linear map and each scale.

    Args:
        module: the module.
        receive: (the weight's name, inputs as rows); those of a scale, whose weight is a vector,
            are normalised.
        names: parameters whose inputs count; None for all.
        scales: whether scales of layer normalisations count.

    Attributes:
        mask: of a batch of texts, the positions that hold tokens; inputs at others are left out.
        biases: the names of the biases or shifts that were used, by the weight's name.
    """

    mask: Tensor | None = None

    def __init__(
        self,
        module: nn.Module,
        receive: Callable[[str, Float[Tensor, "rows inputs"]], object],
        names: Collection[str] | None = None,
        scales: bool = False,
    ) -> None:
        super().__init__()
        self.names = {
            id(p): name for name, p in module.named_parameters() if names is None or name in names
        }
        self.receive, self.scales = receive, scales
        self.biases = dict[str, str]()

    def apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluates a functional, and passes on the inputs of a map or scale."""
        if func is F.linear:
            self._linear(*args, **kwargs)
        if func is F.layer_norm and self.scales:
            self._scale(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.ndim == 2:
            self._pass(input, weight, bias)

    def _scale(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> None:
        if weight is not None and weight.ndim == 1 and id(weight) in self.names:
            self._pass(F.layer_norm(input, normalized_shape, eps=eps), weight, bias)

    def _pass(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if (name := self.names.get(id(weight))) is not None:
            if id(bias) in self.names:
                self.biases[name] = self.names[id(bias)]
            kept = self.mask is not None and input.shape[:-1] == self.mask.shape
            rows = input[self.mask] if kept else input.flatten(0, -2)
            self.receive(name, rows.detach().to(torch.promote_types(rows.dtype, torch.float32)))


@torch.no_grad()
def inner_products(
    encoder: nn.Module, split: Split, names: Collection[str] | None = None, scales: bool = False
) -> dict[str, Float[Tensor, "inputs ..."]]:
    """X^T X of the inputs X of each linear map, per image, by the weight's name.

    Args:
        encoder: the encoder, in evaluation mode.
        split: the images.
        names: weights whose inputs count; None for all.
        scales: adds those of scales, the diagonals alone.
    """
    sums = dict[str, Tensor]()
    scaling = {name for name, p in encoder.named_parameters() if p.ndim == 1}

    def add(name: str, rows: Tensor) -> None:
        gram = rows.square().sum(0) if name in scaling else rows.mT @ rows
        sums[name] = sums[name].add_(gram) if name in sums else gram

    batches, inputs, count = batches_of(split), Inputs(encoder, add, names, scales), 0
    device = next(encoder.parameters()).device
    for batch in progress(batches, f"inner products on {split.name}", len(batches)):
        images, _ = to_device(batch, device)
        inputs.mask = tokens_of(images)
        with inputs:
            encoder(images)
        count += len(images)
    return {name: gram.div_(count) for name, gram in sums.items()}


def of_models(
    examples: Examples,
    encoder: ModuleEncoder,
    count: int,
    seed: int,
    names: Collection[str] | None = None,
    scales: bool = False,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each weight of each model with the inner products of its inputs, one model after the other.

    Args:
        examples: the models and their images.
        encoder: runs them; of each model the named weights are loaded, all if None.
        count: images of each task.
        seed: of the choice of images.
        names: see `inner_products`.
        scales: see `inner_products`.

    Yields:
        The weight's name; the weight, in the type of its inner products; these.
    """
    state = encoder.weights()
    for model in examples.models:
        weights = examples.weights(model)
        with torch.no_grad():
            for name in names or state:
                state[name].copy_(weights[name])
        empty_caches(encoder)
        split = examples.split(encoder, model, count, seed)
        for name, gram in inner_products(encoder, split, names, scales).items():
            yield name, state[name].detach().to(gram), gram
