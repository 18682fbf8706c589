"""Gradients of projections of a module's outputs, example by example."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger(__name__)
Gradients = Mapping[str, Tensor]
Cotangent = Callable[[Tensor, Tensor], Tensor]  # an example's outputs, a probe -> their cotangent


class ExampleGradients:
    """J^T u by name, a row for each example and probe.

    Examples are taken together where `torch.func` can transform the module, else one by one.

    Args:
        module: maps a batch to outputs (batch, outputs); in evaluation mode.
        weights: the parameters to differentiate, by name; they require gradients.
        cotangent: maps an example's outputs and a probe, both (outputs,), to u.
    """

    def __init__(self, module: nn.Module, weights: Gradients, cotangent: Cotangent) -> None:
        self.module, self.weights, self.cotangent = module, dict(weights), cotangent
        self.can_batch = True  # until it fails

    def __call__(
        self, batch: Float[Tensor, "batch ..."], probes: Float[Tensor, "batch probes outputs"]
    ) -> Gradients:
        """The gradients, of shape (batch * probes, *parameter) each."""
        probes = probes.to(next(iter(self.weights.values())))
        if self.can_batch:
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the others have no rule for `vmap`
                    found = vmap(self._together)(batch, probes)
                return {name: value.flatten(0, 1) for name, value in found.items()}
            except (RuntimeError, ValueError, NotImplementedError) as error:
                self.can_batch = False
                logger.info("examples are taken one by one: %s", str(error).partition("\n")[0])
        each = [self._alone(image, v) for image, vs in zip(batch, probes, strict=True) for v in vs]
        return {name: torch.stack([one[name] for one in each]) for name in self.weights}

    def _together(self, image: Tensor, probes: Float[Tensor, "probes outputs"]) -> Gradients:
        def outputs(weights: dict[str, Tensor]) -> Float[Tensor, " outputs"]:
            found: Tensor = functional_call(self.module, weights, (image[None],))[0]
            return found

        value, pull = vjp(outputs, self.weights)[:2]
        found: dict[str, Tensor] = vmap(lambda v: pull(self.cotangent(value, v))[0])(probes)
        return {name: gradient.detach() for name, gradient in found.items()}

    def _alone(self, image: Tensor, v: Float[Tensor, " outputs"]) -> Gradients:
        """The same by autograd, for modules that `torch.func` cannot transform."""
        with torch.enable_grad():
            value = self.module(image[None])[0]
        found = torch.autograd.grad(
            value,
            list(self.weights.values()),
            self.cotangent(value.detach(), v),
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(self.weights, found, strict=True))
