"""Linearised models. Names of the public projects; see `tangent_arithmetic.tangent.linearized`."""

from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.tangent.linearized import LinearizedModel, linearize

__all__ = ["LinearizedImageEncoder", "LinearizedModel", "linearize"]
