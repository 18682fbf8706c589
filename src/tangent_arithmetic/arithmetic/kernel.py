r"""The kernel of a linear model, the neural tangent kernel: inner products of Jacobians.

\[ k(x, x') = \frac{1}{d} \operatorname{tr} J(x; \theta_0)\, J(x'; \theta_0)^\top
   = \frac{1}{d} \sum_o \langle \nabla f_o(x), \nabla f_o(x') \rangle \]

with d features: exactly, from the gradients of single images, or as a mean over random directions
of the parameters, which has a standard error and needs forward passes alone.

Source: arXiv:2305.12827, section 6, where its eigenfunctions explain disentanglement.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.features import few_at_a_time
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.tangent.gradients import ExampleGradients
from tangent_arithmetic.tangent.linearized import LinearizedModel

if TYPE_CHECKING:
    from jaxtyping import Float, Float64

MEMORY = 2**29  # bytes of random directions that share a pass
BLOCK = 2**31  # bytes of the gradients in a block of parameters
TOGETHER = 16  # images whose gradients are computed together


@dataclass(frozen=True)
class Kernel:
    """Inner products of the Jacobians of images.

    Attributes:
        values: k(x_i, x'_j).
        error: the standard error of each; None if they are exact.
        halves: the same from either half of the random directions; none if they are exact.
    """

    values: Float64[Tensor, "images others"]
    error: Float64[Tensor, "images others"] | None = None
    halves: tuple[Float64[Tensor, "images others"], ...] = ()

    @property
    def relative_error(self) -> float:
        """The standard error of all values, relative to their size (Frobenius norms)."""
        return 0.0 if self.error is None else float(self.error.norm() / self.values.norm())


def exact(
    model: nn.Module,
    images: Float[Tensor, "images ..."],
    others: Float[Tensor, "others ..."] | None = None,
    block: int = BLOCK,
) -> Kernel:
    """The kernel from gradients of single images, a block of parameters at a time.

    It costs so many backward passes as `passes` says.

    Args:
        model: maps a batch to features, at theta0; left unchanged.
        images: on the model's device.
        others: the images of the columns; `images` if None.
        block: bytes of the gradients of a block, if it has more than one tensor.
    """
    module = copy.deepcopy(model).eval()
    parameters = _parameters(module)
    for value in parameters.values():
        value.requires_grad_()
    rows = len(images) + (0 if others is None else len(others))
    with torch.no_grad():
        example = module(images[:1])
    features = example.shape[1]
    total = torch.zeros(len(images), len(images if others is None else others)).double()
    for some in _blocks(parameters, block // rows):
        for u in torch.eye(features).to(example):
            here = _gradients(module, some, images, u)
            there = here if others is None else _gradients(module, some, others, u)
            total += (here @ there.T).double().cpu()
    return Kernel(total / features)


def passes(model: nn.Module, images: Float[Tensor, "images ..."], block: int = BLOCK) -> int:
    """The backward passes of `exact`: one for each image, feature and block of parameters."""
    with torch.no_grad():
        features = int(copy.deepcopy(model).eval()(images[:1]).shape[1])
    blocks = sum(1 for _ in _blocks(_parameters(model), block // len(images)))
    return len(images) * features * blocks


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in module.named_parameters() if p.is_floating_point()}


def _blocks(parameters: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Parameters that follow each other, of at most `size` bytes together or a single one."""
    block: dict[str, Tensor] = {}
    for name, value in parameters.items():
        if block and sum(v.nbytes for v in block.values()) + value.nbytes > size:
            yield block
            block = {}
        block[name] = value
    yield block


def _gradients(
    module: nn.Module, block: dict[str, Tensor], images: Tensor, u: Float[Tensor, " features"]
) -> Float[Tensor, "images parameters"]:
    """J^T u of each image in a block of parameters."""
    of_examples = ExampleGradients(module, block, lambda _, probe: probe)
    parts = []
    for some in images.split(TOGETHER):
        found = of_examples(some, u.expand(len(some), 1, -1))
        parts.append(torch.cat([found[name].reshape(len(some), -1) for name in block], dim=1))
    return torch.cat(parts)


def sketched(
    model: nn.Module,
    images: Float[Tensor, "images ..."],
    others: Float[Tensor, "others ..."] | None = None,
    directions: int = 128,
    seed: int = 0,
) -> Kernel:
    r"""The kernel by \(J \omega\) for random directions \(\omega \sim N(0, I)\) of the parameters.

    \(E\, (J \omega)^\top (J' \omega) = \operatorname{tr} J J'^\top\), with a relative standard
    error of at most \(\sqrt{2 / \text{directions}}\) on the diagonal, and less the more features
    there are. As many directions share a pass as fit into `MEMORY`.

    Args:
        model: maps a batch to features, at theta0; left unchanged.
        images: on the model's device.
        others: the images of the columns; `images` if None.
        directions: how many, at least two.
        seed: of the directions.

    Raises:
        UsageError: for fewer, which have no standard error.
    """
    if directions < 2:
        raise UsageError(f"expected at least two directions of the kernel, got {directions}")
    base = LinearizedModel(model)
    theta0 = {n: v for n, v in base.theta0().items() if v.is_floating_point()}
    generator = torch.Generator().manual_seed(seed)
    together = max(1, MEMORY // sum(value.nbytes for value in theta0.values()))
    draws, halves = _Draws(), (_Draws(), _Draws())
    for first in range(0, directions, together):
        vectors = [
            {n: torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v.device)
             for n, v in theta0.items()}
            for _ in range(min(together, directions - first))
        ]  # fmt: skip
        here = few_at_a_time(base, images, vectors)[1]
        there = here if others is None else few_at_a_time(base, others, vectors)[1]
        for one, other in zip(here, there, strict=True):
            draw = (one.double() @ other.double().T).cpu() / one.shape[1]
            for mean in (draws, halves[draws.count % 2]):
                mean.add(draw)
    return Kernel(draws.mean, draws.error(), tuple(half.mean for half in halves))


class _Draws:
    """The running mean of draws, and its standard error."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, draw: Float64[Tensor, "images others"]) -> None:
        if not self.count:
            self.mean, self.squares = torch.zeros_like(draw), torch.zeros_like(draw)
        self.count += 1
        step = draw - self.mean
        self.mean += step / self.count
        self.squares += step * (draw - self.mean)

    def error(self) -> Float64[Tensor, "images others"]:
        return (self.squares / (self.count - 1) / self.count).sqrt()
