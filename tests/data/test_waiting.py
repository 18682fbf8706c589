"""What is said of the time that training waits for its data."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from torch import nn

from tangent_arithmetic.data import waiting
from tangent_arithmetic.training.loop import TrainingData, train
from tangent_arithmetic.training.recipe import Recipe


class Slow:
    """Examples that take their time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Any, int]:
        time.sleep(self.seconds)
        return torch.randn(4), index % 2


@pytest.mark.parametrize(("seconds", "told"), [(0.05, True), (0.0, False)])
def test_training_that_waits_for_its_data_most_of_the_time_says_so(
    seconds: float, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "A_MOMENT", 0.2)
    recipe = Recipe(1e-3, 1, 4, 1, 0, 0.1, 0.0)
    with caplog.at_level(logging.WARNING):
        train(nn.Linear(4, 2), TrainingData(Slow(seconds), None, 0), recipe, description="mine")
    said = [r.getMessage() for r in caplog.records if "waiting for data" in r.getMessage()]
    assert len(said) == told
    if told:
        assert said[0].startswith("mine: ") and "take more than --num-workers=0" in said[0]
