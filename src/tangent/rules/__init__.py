"""The derivatives of functionals, one rule each; importing this registers them all."""

from src.tangent.rules import attention, elementwise, normalization, products
from src.tangent.rules.registry import COMPOSITES, RULES, composite, keywords, rule

__all__ = [
    "COMPOSITES",
    "RULES",
    "attention",
    "composite",
    "elementwise",
    "keywords",
    "normalization",
    "products",
    "rule",
]
