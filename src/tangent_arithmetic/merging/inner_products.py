r"""Inner products of the inputs of linear maps, \(G = X^\top X / n\), while a module runs.

A linear map is a call of `F.linear` whose weight is one of the module's parameters: every
`nn.Linear`, and the projections of `nn.MultiheadAttention`, which PyTorch keeps out of sight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.loading import to_device
from tangent_arithmetic.merging.examples import batches_of
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.tangent.rules import COMPOSITES

if TYPE_CHECKING:
    from jaxtyping import Float


class InputsOfLinear(TorchFunctionMode):
    """Sums X^T X of the inputs X of each linear map.

    Args:
        module: the module.
        names: parameters whose inputs count; None for all.
    """

    def __init__(self, module: nn.Module, names: Collection[str] | None = None) -> None:
        super().__init__()
        self.names = {
            id(p): name for name, p in module.named_parameters() if names is None or name in names
        }
        self.sums = dict[str, Tensor]()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # as calls of F.linear and others
            with self:
                out = COMPOSITES[func](*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        if func is F.linear:
            self._add(*args, **kwargs)
        return func(*args, **kwargs)

    def _add(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if (name := self.names.get(id(weight))) is not None:
            rows = input.detach().flatten(0, -2)
            gram = rows.mT @ rows
            self.sums[name] = self.sums[name].add_(gram) if name in self.sums else gram


@torch.no_grad()
def inner_products(
    encoder: nn.Module, split: Split, names: Collection[str] | None = None
) -> dict[str, Float[Tensor, "inputs inputs"]]:
    """X^T X of the inputs X of each linear map, per image, by the weight's name.

    Args:
        encoder: the encoder, in evaluation mode.
        split: the images.
        names: weights whose inputs count; None for all.
    """
    batches, inputs, count = batches_of(split), InputsOfLinear(encoder, names), 0
    device = next(encoder.parameters()).device
    for batch in progress(batches, f"inner products on {split.name}", len(batches)):
        images, _ = to_device(batch, device)
        with inputs:
            encoder(images)
        count += len(images)
    return {name: gram.div_(count) for name, gram in inputs.sums.items()}
