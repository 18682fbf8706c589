"""The derivatives of functionals, one rule each; importing this package registers them."""

from tangent_arithmetic.tangent.rules import (
    attention,
    elementwise,
    groups,
    libraries,
    normalization,
    products,
    recurrent,
)
from tangent_arithmetic.tangent.rules.registry import COMPOSITES, RULES, composite, keywords, rule

__all__ = [
    "COMPOSITES",
    "RULES",
    "attention",
    "composite",
    "elementwise",
    "groups",
    "keywords",
    "libraries",
    "normalization",
    "products",
    "recurrent",
    "rule",
]
