r"""Task vectors, \(\tau = \theta - \theta_0\), and their arithmetic.

Source: Ilharco et al., "Editing Models with Task Arithmetic", arXiv:2212.04089;
Ortiz-Jimenez et al., "Task Arithmetic in the Tangent Space", arXiv:2305.12827.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from src import statedict
from src.checkpoints import ENCODERS, load_checkpoint
from src.linearize import LinearizedImageEncoder
from src.modeling import ImageEncoder

Encoder = ImageEncoder | LinearizedImageEncoder
Source = str | Path | Encoder | nn.Module


def weights_of(source: Source) -> dict[str, Tensor]:
    """The weights theta of a checkpoint file, an encoder, or any module, by name."""
    if isinstance(source, ImageEncoder | LinearizedImageEncoder):
        return source.weights()
    if isinstance(source, nn.Module):
        return dict(source.state_dict())
    return load_checkpoint(source, kinds=ENCODERS).theta


class TaskVector:
    r"""\(\tau = \theta - \theta_0\): the floating-point weights' differences, by name.

    A value: operators give new task vectors and leave their operands alone. Standard and linear
    weights have the same names, so vectors of both kinds mix; the left operand's kind wins.

    Args:
        pretrained_checkpoint: theta0: a checkpoint file, an encoder or any module.
        finetuned_checkpoint: theta: likewise.
        vector: tau itself, instead of the two.

    Attributes:
        vector: name -> difference, at least float32.

    Raises:
        ValueError: if neither or both ways are given, or names or shapes differ.
        MissingFileError: if a checkpoint is not there.
    """

    def __init__(
        self,
        pretrained_checkpoint: Source | None = None,
        finetuned_checkpoint: Source | None = None,
        vector: Mapping[str, Tensor] | None = None,
    ) -> None:
        checkpoints = (pretrained_checkpoint, finetuned_checkpoint)
        if vector is not None:
            if checkpoints != (None, None):
                raise ValueError("expected a vector or two checkpoints, got both")
            self.vector = dict(vector)
            return
        if pretrained_checkpoint is None or finetuned_checkpoint is None:
            raise ValueError(
                "expected pretrained_checkpoint and finetuned_checkpoint, or vector; got "
                f"{pretrained_checkpoint!r}, {finetuned_checkpoint!r}, {vector!r}"
            )
        with torch.no_grad():
            theta, theta0 = weights_of(finetuned_checkpoint), weights_of(pretrained_checkpoint)
            self.vector = statedict.difference(theta, theta0)

    def _new(self, vector: dict[str, Tensor]) -> Self:
        return type(self)(vector=vector)

    def __add__(self, other: TaskVector | int) -> Self:
        """tau_1 + tau_2; adding the number 0 is for `sum`."""
        if isinstance(other, TaskVector):
            return self._new(statedict.add(self.vector, other.vector))
        return self._new(dict(self.vector)) if other == 0 else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: TaskVector) -> Self:
        """tau_1 - tau_2."""
        if not isinstance(other, TaskVector):
            return NotImplemented
        return self._new(statedict.subtract(self.vector, other.vector))

    def __neg__(self) -> Self:
        """-tau."""
        return self._new(statedict.scale(self.vector, -1.0))

    def __mul__(self, factor: float) -> Self:
        """`factor * tau`, for a number or a tensor of one element."""
        if isinstance(factor, TaskVector):
            return NotImplemented
        return self._new(statedict.scale(self.vector, factor))

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> Self:
        """`tau / factor`."""
        return self * (1.0 / factor)

    def __pow__(self, exponent: float) -> Self:
        """`tau ** exponent`, by element."""
        return self._new(statedict.power(self.vector, exponent))

    def __repr__(self) -> str:
        """Kind, size and norm."""
        size = sum(value.numel() for value in self.vector.values())
        return f"{type(self).__name__}({size:,} weights, norm {self.norm().item():.4g})"

    def dot(self, other: TaskVector) -> Tensor:
        """The inner product of two task vectors over all weights, a scalar."""
        return statedict.dot(self.vector, other.vector)

    def norm(self) -> Tensor:
        """The Euclidean norm over all weights, a scalar."""
        return statedict.norm(self.vector)

    def cosine(self, other: TaskVector) -> Tensor:
        """The cosine of the angle between two task vectors, a scalar."""
        return self.dot(other) / (self.norm() * other.norm())

    def apply_to(self, pretrained_checkpoint: Source, scaling_coef: float = 1.0) -> Any:
        """The model at theta_0 + scaling_coef * tau, in the world that the vector comes from.

        Args:
            pretrained_checkpoint: a checkpoint file or an encoder; untouched. A plain module gives
                a module of its class.
            scaling_coef: the coefficient.
        """
        return self.apply_to_nonlinear(pretrained_checkpoint, scaling_coef=scaling_coef)

    def apply_to_nonlinear(
        self,
        pretrained_checkpoint: Source,
        param_names: Any = None,
        scaling_coef: float = 1.0,
    ) -> Any:
        """The standard model at theta_0 + scaling_coef * tau.

        Args:
            pretrained_checkpoint: a checkpoint file, an encoder or a plain module; untouched.
            param_names: ignored; the public projects needed it to pair weights by position.
            scaling_coef: the coefficient; also taken as the second positional argument.
        """
        with contextlib.suppress(TypeError, ValueError):  # names are no number
            scaling_coef = float(param_names)
        if isinstance(pretrained_checkpoint, LinearizedImageEncoder):
            encoder = ImageEncoder.without_weights(pretrained_checkpoint.model_name)
            encoder.load_weights(pretrained_checkpoint.weights())
        elif isinstance(pretrained_checkpoint, ImageEncoder):
            encoder = copy.deepcopy(pretrained_checkpoint)
        elif isinstance(pretrained_checkpoint, nn.Module):
            module = copy.deepcopy(pretrained_checkpoint)
            with torch.no_grad():
                module.load_state_dict(
                    statedict.move(module.state_dict(), self.vector, scaling_coef)
                )
            return module
        else:
            encoder = ImageEncoder.load(pretrained_checkpoint)
        return self._moved(encoder, scaling_coef)

    def apply_to_linear(
        self, pretrained_checkpoint: Source, scaling_coef: float = 1.0
    ) -> LinearizedImageEncoder:
        """The linearised encoder at theta = theta_0 + scaling_coef * tau, expanded at theta_0.

        Applied to a standard vector this is post-hoc linearisation.

        Args:
            pretrained_checkpoint: a checkpoint file or an encoder, standard or linear; untouched.
            scaling_coef: the coefficient.
        """
        if isinstance(pretrained_checkpoint, LinearizedImageEncoder):
            encoder = copy.deepcopy(pretrained_checkpoint)
        elif isinstance(pretrained_checkpoint, ImageEncoder):
            encoder = LinearizedImageEncoder(image_encoder=pretrained_checkpoint)
        elif isinstance(pretrained_checkpoint, nn.Module):
            raise TypeError(
                f"expected an image encoder or its checkpoint, got {type(pretrained_checkpoint)}; "
                "linearise other modules with src.linearize.LinearizedModel"
            )
        else:
            encoder = LinearizedImageEncoder.load(pretrained_checkpoint)
        return self._moved(encoder, scaling_coef)

    def _moved(self, encoder: Any, scaling_coef: float) -> Any:
        with torch.no_grad():
            encoder.load_weights(statedict.move(encoder.weights(), self.vector, scaling_coef))
        return encoder


class NonLinearTaskVector(TaskVector):
    """A task vector of standard fine-tuning; `apply_to` gives an `ImageEncoder`."""


class LinearizedTaskVector(TaskVector):
    """A task vector of linear fine-tuning; `apply_to` gives a `LinearizedImageEncoder`."""

    def apply_to(
        self, pretrained_checkpoint: Source, scaling_coef: float = 1.0
    ) -> LinearizedImageEncoder:
        """The linearised encoder at theta_0 + scaling_coef * tau."""
        return self.apply_to_linear(pretrained_checkpoint, scaling_coef)

    def get_named_parameters(self, param_names: Any = None) -> dict[str, Tensor]:
        """`vector`, tau by name; `param_names` is ignored, the vector knows its names."""
        return dict(self.vector)


def nonlinear_to_linear(task_vector: TaskVector) -> LinearizedTaskVector:
    """The same tau as a vector of the linear world."""
    return LinearizedTaskVector(vector=task_vector.vector)


def linear_to_nonlinear(task_vector: TaskVector, param_names: Any = None) -> NonLinearTaskVector:
    """The same tau as a vector of the standard world; `param_names` is ignored."""
    return NonLinearTaskVector(vector=task_vector.vector)


TASK_VECTORS: dict[str, Callable[..., TaskVector]] = {
    "standard": NonLinearTaskVector,
    "posthoc": NonLinearTaskVector,
    "linear": LinearizedTaskVector,
}
