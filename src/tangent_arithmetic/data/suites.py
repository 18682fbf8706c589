"""The one table of suites: tasks and their order, control set, epochs, classes, recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tangent_arithmetic.runtime.errors import unknown

EMBEDDED_MODEL = "ViT-Nano-8"


@dataclass(frozen=True)
class Task:
    """One task: how long it is fine-tuned (epochs) and how many classes it has."""

    epochs: int
    num_classes: int


@dataclass(frozen=True)
class Suite:
    """A set of tasks that share a control set and a fine-tuning recipe.

    Attributes:
        name: as `--suite` spells it.
        tasks: name -> task, in the order of tables and sums.
        control: the data set that negation must leave alone, and its number of classes.
        lr: peak learning rate.
        warmup_length: optimizer steps of linear warm-up.
        batch_size: images of a micro-step, over all processes, by model ("" is every other model).
        num_grad_accumulation: micro-steps of an optimizer step, by model as above.
        num_workers: data-loading processes of each process; None for one a core.
        related: further data sets, to be trained on and evaluated when they are named.
    """

    name: str
    tasks: Mapping[str, Task]
    control: str
    lr: float
    warmup_length: int
    batch_size: Mapping[str, int]
    num_grad_accumulation: Mapping[str, int]
    num_workers: int | None
    related: Mapping[str, Task] = field(default_factory=dict)

    def check(self, name: str) -> str:
        """Returns `name` if the suite has this data set (or its Val split).

        Raises:
            UsageError: otherwise; the message lists the choices, nearest first.
        """
        known = (*self.tasks, self.control, *self.related)
        if name.removesuffix("Val") in known:
            return name
        raise unknown(f"data set of suite {self.name}", name, known)


SUITES: dict[str, Suite] = {
    # epochs: interfaces of the public projects; about 2,000 steps of 128 each
    "clip8": Suite(
        name="clip8",
        tasks={
            "Cars": Task(35, 196),
            "DTD": Task(76, 47),
            "EuroSAT": Task(12, 10),
            "GTSRB": Task(11, 43),
            "MNIST": Task(5, 10),
            "RESISC45": Task(15, 45),
            "SUN397": Task(14, 397),
            "SVHN": Task(4, 10),
        },
        control="ImageNet",
        lr=1e-5,
        warmup_length=500,
        batch_size={"": 128, "ViT-L-14": 64},
        num_grad_accumulation={"": 1, "ViT-L-14": 2},
        num_workers=None,
        # not of the papers' eight, by the same rule of about 2,000 steps
        related={"CIFAR10": Task(6, 10), "CIFAR100": Task(6, 100), "STL10": Task(60, 10)},
    ),
    # epochs: 50 to 75 steps of 64 each
    "embedded": Suite(
        name="embedded",
        tasks={
            "Emoji": Task(5, 9),
            "FashionMNIST": Task(1, 10),
            "LandCover": Task(1, 8),
            "Letters": Task(1, 26),
            "MNIST": Task(1, 10),
            "Signs": Task(1, 20),
            "StreetDigits": Task(1, 10),
            "Textures": Task(1, 16),
        },
        control="Shapes",
        lr=3e-4,
        warmup_length=8,
        batch_size={"": 64},
        num_grad_accumulation={"": 1},
        num_workers=0,
        # with StreetDigits and Letters: two looks by two label sets, for analogies
        related={"Digits": Task(1, 10), "StreetLetters": Task(1, 26)},
    ),
}


def get_suite(name: str) -> Suite:
    """The suite of this name; an unknown one raises a `UsageError` with the choices."""
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    return SUITES[name]


def suite_of_model(model: str) -> str:
    """The suite that a model is evaluated on unless `--suite` says otherwise."""
    return "embedded" if model.partition("__")[0] == EMBEDDED_MODEL else "clip8"
