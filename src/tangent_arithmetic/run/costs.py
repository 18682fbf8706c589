"""What the parts of a whole benchmark cost, for the time left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.runtime.eta import Step

if TYPE_CHECKING:
    from tangent_arithmetic.run.run import Run

SECONDS = {"standard": 21.0, "linear": 36.0}  # to fine-tune a task
FACTORS = {"taujp": 1.7, "tak": 1.15, "orthoreg": 1.05, "delta": 4.0}  # by objective

ANALYSIS = {  # seconds, for eight tasks
    "subsets": 2500.0,
    "disentanglement": 1300.0,
    "negation": 1740.0,
    "analogies": 850.0,
    "few": 250.0,
    "kernel": 670.0,
    "cka": 240.0,
    "ensembles": 240.0,
}
ON_FEW = ("kernel", "ensembles")  # of few images of their own, with `--sample` or without
IMAGES = 1000  # of a test split of the embedded suite
# CLIP's operations of a forward pass, in those of ViT-B-32
CLIP = {"ViT-B-32": 1.0, "ViT-B-16": 4.0, "ViT-L-14": 18.4}
# Seconds of ViT-B-32 on clip8 with one GPU for one of the embedded suite on two cores. A forward
# pass is 138 times the operations, a task has 45 times the training images and, with ImageNet as
# control set, 15 times the test images; the GPU is taken to sustain 40 TFLOP/s, 690 times as many.
ON_GPU = {"training": 138 * 45 / 690, "evaluation": 138 * 15 / 690}


def of_clip(step: Step, model: str, gpus: int = 1) -> float | None:
    """Seconds of a step on clip8 with a CLIP model, from operations alone; None for others."""
    relative = CLIP.get(model.partition("__")[0])
    kind = "training" if step.kind.endswith("training") else "evaluation"
    return None if relative is None else step.cost * ON_GPU[kind] * relative / gpus


@dataclass(frozen=True)
class Costs:
    """Expected costs of stages, in seconds on two cores with the embedded suite.

    Sweeps of standard models cost a pass a coefficient, those of linear ones one pass. Steps of a
    kind have a common pace on another machine, model or suite.

    Attributes:
        tasks: number of tasks.
        points: number of coefficients.
        share: of the time of an evaluation on all images, what one on a sample takes.
    """

    tasks: int
    points: int
    share: float = 1.0

    @classmethod
    def of(cls, run: Run) -> Costs:
        """The costs of a run; a tenth of an evaluation does not depend on the number of images."""
        images = IMAGES * (15 if run.suite.name.startswith("clip") else 1)
        part = min((run.config.sample or images) / images, 1.0)
        return cls(len(run.tasks), run.config.n_eval_points, 0.1 + 0.9 * part)

    def training(self, mode: str) -> Step:
        """Fine-tuning of all tasks."""
        kind = _kind(mode)
        each = SECONDS[kind] * FACTORS.get(MODES[mode].objective, 1.0)
        return Step(f"{kind} training", self.tasks * each)

    @property
    def zeroshot(self) -> Step:
        """The zero-shot evaluation, with the control set."""
        return Step("standard evaluation", self.share * (8 + 3.6 * self.tasks))

    def single(self, mode: str) -> Step:
        """Single-task evaluation."""
        return self._evaluation(mode, 2.5 * self.tasks, 7.5 * self.tasks)

    def addition(self, mode: str) -> Step:
        """Task addition."""
        return self._evaluation(mode, (2.8 + 0.66 * self.points) * self.tasks, 6 * self.tasks)

    def solved(self, mode: str) -> Step:
        """The sum with solved coefficients."""
        return self._evaluation(mode, 6 * self.tasks, 9 * self.tasks)

    def negation(self, mode: str) -> Step:
        """Task negation, with the control set."""
        swept = (5 + 1.2 * self.points) * self.tasks
        return self._evaluation(mode, 15 + swept, 25 + 2.2 * self.tasks)

    def analysis(self, name: str) -> Step:
        """An analysis of the suite in standard, post-hoc and linear modes."""
        share = 1.0 if name in ON_FEW else self.share
        return Step("analysis", share * ANALYSIS.get(name, 60.0) * self.tasks / 8)

    @property
    def report(self) -> Step:
        """The page with its explorer."""
        return Step("linear evaluation", self.share * (10 + 5 * self.tasks))

    def _evaluation(self, mode: str, standard: float, linear: float) -> Step:
        kind = _kind(mode)
        cost = {"standard": standard, "linear": linear}[kind]
        return Step(f"{kind} evaluation", self.share * cost)


def _kind(mode: str) -> str:
    return "linear" if MODES[mode].linear else "standard"
