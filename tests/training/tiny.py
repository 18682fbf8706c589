"""A tiny encoder, its data, and what every objective must hold: exact resume, several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.logs import Tracker
from tangent_arithmetic.storage.states import RunStates
from tangent_arithmetic.training.objectives.taujp import linear_encoder, tangent_size
from tangent_arithmetic.training.recipe import Recipe
from tangent_arithmetic.training.resume import Snapshots

Weights = dict[str, Tensor]
RECIPE = Recipe(
    lr=1e-2, epochs=4, batch_size=4, num_grad_accumulation=1, warmup_length=3, wd=0.1, ls=0.1
)
CPU = Compute(torch.device("cpu"))


class Tiny(ModuleEncoder):
    kind = "tiny_encoder"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.net(inputs)
        return features


def to_tensor(image: Any) -> Tensor:
    """A transform that draws random numbers, as augmentation does."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return x + 0.1 * torch.randn_like(x)


def pictures(seed: int, count: int = 12) -> ArrayPictures:
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return ArrayPictures(images, np.arange(count) % 3)


def classifier(moved: float = 0.0) -> ImageClassifier:
    """A linearised encoder, `moved` away from theta0, with a frozen head."""
    encoder = linearized(Tiny())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    model = ImageClassifier(encoder, ClassificationHead(True, torch.randn(3, 4)))
    model.freeze_head()
    return model


def interference(weights: dict[str, Tensor]) -> float:
    model = classifier()
    model.load_state_dict({**model.state_dict(), **weights})
    images = torch.stack([to_tensor(pictures(5, 6)[i][0]) for i in range(6)])
    f0, d = linear_encoder(model).model.primal_and_tangent(images)
    return tangent_size(f0, d, "relative").mean().item()


class Interrupted(Exception):
    pass


class Recording(Tracker):
    """Keeps what is logged, and interrupts the run after a step."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.stop, self.seen = stop, list[Any]()

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.seen.append((step, values))
        if step == self.stop:
            raise Interrupted


def continues_exactly(trained: Callable[..., Weights], folder: Path) -> Recording:
    """Checks that a run of twelve steps, interrupted after the sixth, ends as an uninterrupted one.

    Args:
        trained: trains with the options of `train`, and returns the weights.
        folder: for the states.

    Returns:
        What the uninterrupted run logs.
    """

    def states() -> Snapshots:
        return Snapshots(RunStates(folder / "finetuned.safetensors", {}, every=1))

    straight, first, second = Recording(), Recording(5), Recording()
    expected = trained(tracker=straight)
    with pytest.raises(Interrupted):
        trained(snapshots=states(), tracker=first)
    found = trained(snapshots=states(), tracker=second)
    assert first.seen[:5] + second.seen == straight.seen and len(straight.seen) == 12
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    return straight


def ranks_equal(folder: Path, alone: Mapping[str, Weights]) -> None:
    """Checks what two ranks wrote: as one process to rounding, weights the same on both.

    Args:
        folder: holds a file RANK.pt of each.
        alone: the tensors of one process by kind, "weights" among them.
    """
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for found in ranks:
        for kind, expected in alone.items():
            for name, value in expected.items():
                torch.testing.assert_close(found[kind][name], value, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(ranks[0]["weights"][n], v) for n, v in ranks[1]["weights"].items())
