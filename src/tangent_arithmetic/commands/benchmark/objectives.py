"""Training steps with an objective, by the functions that fine-tuning calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLASSES = 100
OF_FACTORS = 8  # random images that factors are collected from; a step's cost does not depend on it


def objective_step(
    name: str, encoder_of: Callable[[Any], Any], others: int = 0
) -> Callable[[Any, Path], dict[str, Callable[[], object]]]:
    """Builds a step of fine-tuning a linearised image encoder with AdamW.

    Args:
        name: the objective.
        encoder_of: makes an open_clip image encoder with random weights from the settings.
        others: other images a step, of random values, as are all images.
    """

    def turns(settings: Any, folder: Path) -> dict[str, Callable[[], object]]:
        import torch

        from tangent_arithmetic.data.loading import BatchPlan
        from tangent_arithmetic.data.unlabelled import Unlabelled
        from tangent_arithmetic.encoders.classifiers import ImageClassifier
        from tangent_arithmetic.encoders.linearized import linearized
        from tangent_arithmetic.runtime.compute import Compute
        from tangent_arithmetic.training.factors.collection import collect
        from tangent_arithmetic.training.loop import penalty_gradient, step_gradients
        from tangent_arithmetic.training.objectives import OBJECTIVES, Setting
        from tangent_arithmetic.training.optimizers import adamw
        from tangent_arithmetic.training.recipe import Recipe

        batch, device = settings.batch_size, torch.device(settings.device)
        plain = encoder_of(settings)
        size = plain.model.visual.image_size
        shape = (3, *(size if isinstance(size, tuple) else (size, size)))
        factors = collect(plain, torch.randn(OF_FACTORS, *shape)) if name == "tak" else None
        encoder = linearized(plain)
        with torch.no_grad():
            for value in encoder.parameters():
                value.add_(torch.randn_like(value), alpha=1e-3)
        head = torch.nn.Linear(encoder(torch.randn(1, *shape)).shape[1], CLASSES)
        model = ImageClassifier(encoder, head).to(device).train()
        model.freeze_head()
        unlabelled = [(image, 0) for image in torch.randn(max(others, 1), *shape)]
        recipe = Recipe(1e-6, 1, batch, 1, 0, 0.1, 0.0, settings.precision)
        setting = Setting(
            recipe,
            model=model,
            others=lambda: Unlabelled({"random": unlabelled}, None, len(unlabelled)),
            files=lambda name: factors,
        )
        objective, plan = OBJECTIVES[name](setting), BatchPlan(batch, batch, 1, 0)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = adamw(trained, recipe)
        labelled = (torch.randn(batch, *shape), torch.randint(CLASSES, (batch,)))
        compute, steps = Compute(device, settings.precision), itertools.count()

        def step() -> None:
            step_gradients(model, plan, 0, iter([labelled]), device, objective, settings.precision)
            penalty_gradient(model, next(steps), objective, compute)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return {"step": step}

    return turns
