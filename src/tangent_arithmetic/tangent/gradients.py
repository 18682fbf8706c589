"""Gradients of projections of a module's outputs, example by example."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_arithmetic.tangent.functional import functional_call
from tangent_arithmetic.tangent.layers import DenseLayers, Names, Outer

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
        layers: dense layers, whose gradients `factored` need not multiply out.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Gradients,
        cotangent: Cotangent,
        layers: Sequence[Names] = (),
    ) -> None:
        self.module, self.weights, self.cotangent = module, dict(weights), cotangent
        self.layers, self._shape = DenseLayers(module, layers), torch.Size()
        self.can_batch = True  # until it fails

    def __call__(
        self, batch: Float[Tensor, "batch ..."], probes: Float[Tensor, "batch probes outputs"]
    ) -> Gradients:
        """The gradients, of shape (batch * probes, *parameter) each."""
        found = dict[str, Tensor]()
        for name, value in self.factored(batch, probes).items():
            found |= self.layers.parts(name, value) if isinstance(value, Outer) else {name: value}
        return found

    def factored(
        self, batch: Float[Tensor, "batch ..."], probes: Float[Tensor, "batch probes outputs"]
    ) -> Mapping[str, Tensor | Outer]:
        """The same, but of a dense layer and its bias `Outer` under the weight's name.

        That is where the layer is used as one, and its factors are smaller than its weights.
        """
        probes = probes.to(next(iter(self.weights.values())))
        if self.can_batch:
            try:
                # the other kernels have no rule for `vmap`
                with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                    self._find(batch[:1])
                    found, inputs = vmap(self._together)(batch, probes)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                self.can_batch = False
                self.layers = DenseLayers(self.module, ())
                logger.info("examples are taken one by one: %s", str(error).partition("\n")[0])
            else:
                rows = {name: value.flatten(0, 1) for name, value in found.items()}
                count = probes.shape[1]
                return rows | {
                    name: self.layers.outer(name, rows[name], a.repeat_interleave(count, 0))
                    for name, a in inputs.items()
                }
        each = [self._alone(image, v) for image, vs in zip(batch, probes, strict=True) for v in vs]
        return {name: torch.stack([one[name] for one in each]) for name in self.weights}

    def bytes_of(self, example: Float[Tensor, "1 ..."]) -> int:
        """Memory that `factored` takes for an example and a probe."""
        if self.can_batch:
            with torch.no_grad():
                probe = torch.zeros_like(self.module(example))[:, None]
            self.factored(example, probe)  # finds the layers, and whether examples go together
        return self.layers.nbytes() + sum(value.nbytes for value in self._whole().values())

    def _find(self, example: Float[Tensor, "1 ..."]) -> None:
        """Looks at the layers for examples of a shape; at first, checks their gradients."""
        if example.shape == self._shape:
            return
        first, self._shape = not self._shape, example.shape
        self.layers.find(example)
        if first and self.layers.zeros:
            value = self.module(example)[0].detach()
            v = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
            found, inputs = vmap(self._together)(example, v[None, None])
            rows = {name: gradient.flatten(0, 1) for name, gradient in found.items()}
            parts = [self.layers.outer(n, rows[n], a) for n, a in inputs.items()]
            true = self._alone(example[0], v)
            for name, outer in zip(inputs, parts, strict=True):
                for own, gradient in self.layers.parts(name, outer).items():
                    if not _close(gradient[0], true[own]):
                        raise RuntimeError(f"{own} is used in a way that cannot be seen")

    def _whole(self) -> dict[str, Tensor]:
        """The weights whose gradients are not factored."""
        covered = self.layers.covered()
        return {name: value for name, value in self.weights.items() if name not in covered}

    def _together(
        self, image: Tensor, probes: Float[Tensor, "probes outputs"]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients, or cotangents of the outputs of dense layers, and the inputs of these."""

        def outputs(
            weights: dict[str, Tensor], shifts: dict[str, Tensor]
        ) -> tuple[Float[Tensor, " outputs"], dict[str, Tensor]]:
            with self.layers.shifted(shifts) as inputs:
                found: Tensor = functional_call(self.module, weights, (image[None],))[0]
            return found, inputs

        value, pull, inputs = cast(
            Any, vjp(outputs, self._whole(), self.layers.zeros, has_aux=True)
        )
        whole, cotangents = vmap(lambda v: pull(self.cotangent(value, v)))(probes)
        found = {name: gradient.detach() for name, gradient in {**whole, **cotangents}.items()}
        return found, {name: a.detach() for name, a in inputs.items()}

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


def _close(found: Tensor, true: Tensor) -> bool:
    """Whether two gradients agree up to the rounding of another order of sums."""
    tolerance = torch.finfo(true.dtype).eps ** 0.5
    error = torch.linalg.vector_norm(found - true)
    return bool(error <= tolerance * torch.linalg.vector_norm(true) + torch.finfo(true.dtype).tiny)
