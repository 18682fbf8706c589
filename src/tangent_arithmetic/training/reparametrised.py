r"""Encoders whose weights are functions of fewer trained parameters, \(W = g(W_0, \phi)\).

The encoder itself is frozen; for each weight that is edited a `Part` maps its initial value to the
current one. Everything that reads weights (checkpoints, penalties, task vectors) sees the dense
ones, under the encoder's own names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.linearized import LinearizedEncoder
from tangent_arithmetic.storage.statedict import ties
from tangent_arithmetic.tangent.functional import functional_call
from tangent_arithmetic.tangent.linearized import LinearizedModel

if TYPE_CHECKING:
    from jaxtyping import Float


class Part(nn.Module):
    """A weight as a function of its initial value; subclasses define `value`."""

    def value(self, start: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The weight, of the shape and dtype of its initial value."""
        raise NotImplementedError

    def forward(self, start: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The weight, computed in full precision also under autocast."""
        with torch.autocast(start.device.type, enabled=False):
            return self.value(start)


class Parts(nn.Module):
    """The parts of a model by the names of its weights.

    Args:
        parts: name -> part.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self.names = list(parts)
        self.items = nn.ModuleList(parts.values())

    def by_name(self) -> dict[str, Part]:
        """Name -> part."""
        return dict(zip(self.names, self.items, strict=True))  # type: ignore[arg-type]

    def forward(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The edited weights by name."""
        return {name: part(start[name]) for name, part in self.by_name().items()}


class Reparametrised(ModuleEncoder):
    """A standard encoder whose weights are those of its parts.

    Args:
        encoder: the encoder; frozen, in place.
        parts: name of a weight -> its part.
    """

    def __init__(self, encoder: ModuleEncoder, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self.kind = encoder.kind  # type: ignore[misc]
        self.train_preprocess = encoder.train_preprocess
        self.val_preprocess = encoder.val_preprocess
        self.encoder = encoder.requires_grad_(False)
        self.parts = Parts(parts)

    def start(self) -> nn.Module:
        """The encoder at its initial weights (not copied)."""
        return self.encoder

    def theta(self) -> dict[str, Tensor]:
        """The encoder's parameters by name, edited ones as functions of the trained ones."""
        own: dict[str, Tensor] = dict(self.encoder.named_parameters())
        return {**own, **self.parts(own)}

    def forward(self, inputs: Tensor) -> Float[Tensor, "batch features"]:
        """Features of a batch."""
        edited = self.parts(dict(self.encoder.named_parameters()))
        features: Tensor = functional_call(self.encoder, edited, (inputs,))
        return features

    def weights(self) -> dict[str, Tensor]:
        """The dense weights under the encoder's names; a copy where they are edited."""
        own = self.encoder.weights()
        with torch.no_grad():
            edited = self.parts(own)
        further = {n: edited[first] for n, first in ties(own).items() if first in edited}
        return {**own, **edited, **further}

    def identity(self) -> str:
        """That of the encoder."""
        return self.encoder.identity()

    def built(self) -> dict[str, Any]:
        """Those of the encoder."""
        return self.encoder.built()


class ReparametrisedLinear(LinearizedModel):
    """A linearised module whose theta is that of its parts.

    A weight without a part is frozen at theta0 and costs no tangent.

    Args:
        linear: the linearised module, at theta0; left as it is.
        parts: name of a weight -> its part.

    Raises:
        ValueError: if theta is not theta0.
    """

    def __init__(self, linear: LinearizedModel, parts: Mapping[str, Part]) -> None:
        super().__init__(linear.module0())
        theta, theta0 = linear.theta(), linear.theta0()
        if moved := [name for name in theta if not torch.equal(theta[name], theta0[name])]:
            raise ValueError(f"expected a linearised module at theta0, got another {moved[0]}")
        self.requires_grad_(False)
        self.reparametrised = Parts(parts)

    def start(self) -> nn.Module:
        """The module at theta0 (not copied)."""
        return self.module0()

    def theta(self) -> dict[str, Tensor]:
        """Theta by name, edited weights as functions of the trained parameters."""
        own = super().theta()
        return {**own, **self.reparametrised(own)}

    @property
    def params(self) -> list[Tensor]:
        """Theta, in the order of the module's parameters."""
        return list(self.theta().values())


def reparametrise(encoder: ModuleEncoder, parts: Mapping[str, Part]) -> ModuleEncoder:
    """The encoder to train in place of one, with the same features before the first step.

    Args:
        encoder: a standard encoder, or a linearised one at theta0.
        parts: name of a weight, as in the standard encoder -> its part.

    Raises:
        ValueError: for a weight that the encoder lacks.
    """
    if isinstance(encoder, LinearizedEncoder):
        _check(parts, encoder.theta0())
        trained = copy.copy(encoder)
        trained._modules = {**encoder._modules, "model": ReparametrisedLinear(encoder.model, parts)}
        return trained
    _check(parts, dict(encoder.named_parameters()))
    return Reparametrised(encoder, parts)


def _check(parts: Mapping[str, Part], weights: Mapping[str, Tensor]) -> None:
    if wrong := sorted(parts.keys() - weights.keys()):
        raise ValueError(f"expected weights of the encoder, got {', '.join(wrong)}")


def parts_of(encoder: nn.Module) -> tuple[nn.Module, dict[str, Part]]:
    """The module at its initial weights, and its parts by name; no parts for other encoders."""
    inner = encoder.model if isinstance(encoder, LinearizedEncoder) else encoder
    if isinstance(inner, ReparametrisedLinear):
        return inner.start(), inner.reparametrised.by_name()
    if isinstance(inner, Reparametrised):
        return inner.start(), inner.parts.by_name()
    return inner, {}


def theta_of(encoder: nn.Module) -> dict[str, Tensor]:
    """The parameters of an encoder by the names of the standard one, differentiable.

    What is trained requires gradients; what is frozen does not.
    """
    inner = encoder.model if isinstance(encoder, LinearizedEncoder) else encoder
    if isinstance(inner, LinearizedModel | Reparametrised):
        return inner.theta()
    return dict(inner.named_parameters())
