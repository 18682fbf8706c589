"""Optimizers by name: factories over named parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from tangent_arithmetic.runtime.registry import Registry
from tangent_arithmetic.training.recipe import Recipe

OptimizerFactory = Callable[[Mapping[str, nn.Parameter], Recipe], Optimizer]
OPTIMIZERS: Registry[OptimizerFactory] = Registry("optimizer")


@OPTIMIZERS.register("adamw")
def adamw(parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> Optimizer:
    """AdamW over all parameters in one group (arXiv:1711.05101)."""
    return AdamW(parameters.values(), lr=recipe.lr, weight_decay=recipe.wd)


@OPTIMIZERS.register("sgd")
def sgd(parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> Optimizer:
    """Gradient descent with Nesterov momentum 0.9: a copy of the parameters less than AdamW."""
    return SGD(
        parameters.values(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.wd
    )
