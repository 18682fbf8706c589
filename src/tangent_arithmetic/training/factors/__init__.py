"""Factors of the Gauss-Newton matrix of the squared loss on features, without images."""

from tangent_arithmetic.training.factors.blocks import Block, blocks_of
from tangent_arithmetic.training.factors.collection import Kind, Settings, collect
from tangent_arithmetic.training.factors.factor import Factor
from tangent_arithmetic.training.factors.files import load_factors, save_factors
from tangent_arithmetic.training.factors.merging import merge
from tangent_arithmetic.training.factors.whole import Factors

__all__ = [
    "Block",
    "Factor",
    "Factors",
    "Kind",
    "Settings",
    "blocks_of",
    "collect",
    "load_factors",
    "merge",
    "save_factors",
]
