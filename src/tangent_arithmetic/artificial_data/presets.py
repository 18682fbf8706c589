"""Data sets and recipes of the study, and presets of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tangent_arithmetic.runtime.errors import UsageError, unknown

BASE = "dataset1"  # the base model's
SEED_STEP = 1000  # between the random states of two seeds
Mode = Literal["standard", "linear", "taujp", "scratch"]
MODES: tuple[Mode, ...] = ("standard", "linear", "taujp", "scratch")
LINEAR = ("linear", "taujp")  # modes that train the linearised backbone


@dataclass(frozen=True)
class DatasetSpec:
    """Arguments of `sklearn.datasets.make_classification`, under its names and with its meaning.

    With `shuffle=False` the informative features are the first columns, so data sets with different
    `random_state` share them.
    """

    n_samples: int = 10_000
    n_features: int = 512
    n_classes: int = 10
    n_informative: int = 50
    random_state: int = 42
    n_redundant: int = 2
    n_clusters_per_class: int = 2
    class_sep: float = 1.0
    flip_y: float = 0.01
    shuffle: bool = True


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of Adam at a constant learning rate.

    Raises:
        UsageError: if a number is out of range.
    """

    lr: float
    batch_size: int
    epochs: int

    def __post_init__(self) -> None:
        if not (0 <= self.lr < math.inf and self.batch_size >= 1 and self.epochs >= 0):
            raise UsageError(f"expected lr >= 0, batch_size >= 1, epochs >= 0, got {self}")


@dataclass(frozen=True)
class Preset:
    """A whole study.

    Attributes:
        datasets: name -> data set; `dataset1` is the base model's, each other one is a task.
        base: recipe of the base model, and of models trained from scratch.
        probe: recipe of a task's head on the frozen pre-trained backbone; fine-tuning the backbone
            then keeps that head. None: the head is trained along with the backbone.
        standard: recipe for fine-tuning the backbone.
        linear: recipe for fine-tuning its linearisation, with and without τJp's penalty.
        penalty: weight of the penalty of τJp.
    """

    datasets: Mapping[str, DatasetSpec]
    base: Recipe
    probe: Recipe | None
    standard: Recipe
    linear: Recipe
    penalty: float = 1.0  # of 0.3, 1, 3 and 10 best for sums on validation: default, seed 0

    @property
    def tasks(self) -> list[str]:
        """The data sets that the base model is fine-tuned on."""
        return [name for name in self.datasets if name != BASE]

    def at(self, seed: int) -> Preset:
        """The preset with the data of a seed: the same but for the random states."""
        moved = {
            name: replace(spec, random_state=spec.random_state + SEED_STEP * seed)
            for name, spec in self.datasets.items()
        }
        return replace(self, datasets=moved)

    def spec(self, name: str) -> DatasetSpec:
        """One of the data sets.

        Raises:
            UsageError: if the name is unknown.
        """
        if name not in self.datasets:
            raise unknown("data set", name, self.datasets)
        return self.datasets[name]

    def recipe(self, mode: str) -> Recipe:
        """The recipe for fine-tuning the backbone in a mode."""
        recipes = {**dict.fromkeys(LINEAR, self.linear), "scratch": self.base}
        return recipes.get(mode, self.standard)


def _related(
    samples: int, features: int, informative: int, separation: float
) -> dict[str, DatasetSpec]:
    """Four data sets with the same informative columns and one cluster a class."""
    base = DatasetSpec(
        n_samples=samples,
        n_features=features,
        n_classes=10,
        n_informative=informative,
        n_redundant=0,
        n_clusters_per_class=1,
        class_sep=separation,
        shuffle=False,
    )
    states = {"dataset2": 123, "dataset3": 7, "dataset4": 99}
    tasks = {name: replace(base, n_classes=8, random_state=states[name]) for name in states}
    return {BASE: base, **tasks}


def _probed(datasets: Mapping[str, DatasetSpec]) -> Preset:
    """A study whose heads are trained on the frozen pre-trained backbone."""
    base = Recipe(lr=1e-3, batch_size=64, epochs=20)
    standard, linear = replace(base, lr=3e-4, epochs=10), replace(base, epochs=10)
    return Preset(datasets, base=base, probe=base, standard=standard, linear=linear)


PRESETS: dict[str, Preset] = {
    "default": _probed(_related(samples=8000, features=64, informative=16, separation=2.5)),
    "quick": _probed(_related(samples=2000, features=32, informative=12, separation=2.5)),
    # parameters of the public README; dataset3, which it does not give, is that of the public code
    "readme": Preset(
        datasets={
            BASE: DatasetSpec(n_samples=10_000, n_classes=10, n_informative=50, random_state=42),
            "dataset2": DatasetSpec(
                n_samples=8000, n_classes=15, n_informative=60, random_state=123
            ),
            "dataset3": DatasetSpec(n_samples=8000, n_classes=20, n_informative=10),
        },
        base=Recipe(lr=1e-3, batch_size=32, epochs=100),
        probe=None,
        standard=Recipe(lr=1e-4, batch_size=32, epochs=50),
        linear=Recipe(lr=1e-4, batch_size=32, epochs=50),
    ),
}


def get_preset(name: str, seed: int = 0) -> Preset:
    """A preset by name, with the data of a seed.

    Raises:
        UsageError: if the name is unknown.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name].at(seed)
