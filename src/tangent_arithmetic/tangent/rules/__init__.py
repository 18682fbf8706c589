"""The derivatives of functionals, one rule each; importing this package registers them."""

from tangent_arithmetic.tangent.rules import (
    attention,
    elementwise,
    groups,
    libraries,
    linear,
    normalization,
    products,
    recurrent,
)
from tangent_arithmetic.tangent.rules.registry import (
    COMPOSITES,
    RULES,
    STACKED,
    VIEWS,
    Pushes,
    along,
    composite,
    keywords,
    rule,
)

__all__ = [
    "COMPOSITES",
    "RULES",
    "STACKED",
    "VIEWS",
    "Pushes",
    "along",
    "attention",
    "composite",
    "elementwise",
    "groups",
    "keywords",
    "libraries",
    "linear",
    "normalization",
    "products",
    "recurrent",
    "rule",
]
