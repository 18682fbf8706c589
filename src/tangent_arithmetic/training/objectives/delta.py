r"""DELTA: a standard model, distilled from a linear one at random coefficients.

\[ L(\tau) + \lambda\, \mathbb{E}_{\alpha \sim U(a, b)}\,
\| f(x; \theta_0 + \alpha \tau) - (f_0(x) + \alpha J(x; \theta_0)\, \tau_T) \|^2 \]

\(\tau_T\) is the task vector of the teacher, the linear model of the same task. The student thus
inherits how linear models add, at the cost of a standard model when it is used. The teacher is
affine in alpha, so that one pass gives its features at every coefficient.

Source: DELTA, by the authors of TAK (arXiv:2602.17385): alpha from U(0.5, 1), the mean squared
error of features, and a teacher whose tangent vanishes on other images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tangent_arithmetic.encoders.base import is_linear
from tangent_arithmetic.encoders.linearized import LinearizedEncoder
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.tangent.functional import evaluating, functional_call
from tangent_arithmetic.training.objectives.base import OBJECTIVES, Objective, Penalised, Setting
from tangent_arithmetic.training.objectives.supervised import supervised_of
from tangent_arithmetic.training.objectives.taujp import Norm, tangent_size
from tangent_arithmetic.training.reparametrised import parts_of

if TYPE_CHECKING:
    from jaxtyping import Float

WEIGHT = 10.0
RANGE = (0.5, 1.0)  # of alpha
STREAM = 17  # of random numbers, apart from those of training


def between(
    theta0: Mapping[str, Tensor], module: nn.Module, coef: float
) -> dict[str, Float[Tensor, ...]]:
    r"""\(\theta_0 + \alpha (\theta - \theta_0)\) for what training changes in a module, by name.

    Its gradient with respect to theta is alpha times that with respect to the result. Buffers of
    floating-point numbers move as task vectors move them; others are copies of the module's own.

    Args:
        theta0: the starting point by name, persistent buffers with it.
        module: its trained parameters and its buffers are theta; frozen ones are left out.
        coef: alpha.
    """
    theta: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad}
    buffers = dict(module.named_buffers())
    theta |= {n: b for n, b in buffers.items() if n in theta0 and b.is_floating_point()}
    moved = {name: torch.lerp(theta0[name], value, coef) for name, value in theta.items()}
    return {n: b.clone() for n, b in buffers.items() if n not in moved} | moved


class Delta(Penalised):
    """A supervised loss, and lambda times the distance to a linear teacher at random coefficients.

    Args:
        supervised: the loss on labelled images.
        weight: lambda.
        teacher: the linear model; its theta0 is the student's.
        coefs: the range of alpha.
        draws: values of alpha a step, one in each equal part of the range.
        norm: of the distance, see `tangent_size`; the mean squared error is "squared" divided by
            the number of features.
        seed: of alpha, which is a function of (seed, step).
    """

    def __init__(
        self,
        supervised: Objective,
        weight: float,
        teacher: LinearizedEncoder,
        coefs: tuple[float, float] = RANGE,
        draws: int = 1,
        norm: Norm = "relative",
        seed: int = 0,
    ) -> None:
        super().__init__(supervised, weight)
        self.teacher, self.norm = teacher.eval().requires_grad_(False), norm
        self.range, self.draws, self.seed = coefs, draws, seed
        self.theta0 = teacher.weights0()
        self.tau = {name: step for name, step in teacher.displacement().items() if step.any()}

    def coefs(self, step: int) -> list[float]:
        """The values of alpha in an optimizer step, the same on all ranks."""
        generator = np.random.default_rng(np.random.SeedSequence((self.seed, STREAM, step)))
        parts = (np.arange(self.draws) + generator.random(self.draws)) / self.draws
        low, high = self.range
        return [float(low + (high - low) * part) for part in parts]

    @torch.no_grad()
    def affine(
        self, images: Tensor
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch features"]]:
        r"""\(f_0\) and \(J \tau_T\) of the teacher, in at least float32."""
        f0, tangent = self.teacher.model.primal_and_tangent(images, tangent=self.tau)
        wide = torch.promote_types(f0.dtype, torch.float32)
        return f0.to(wide), tangent.to(wide)

    def distance(self, encoder: nn.Module, images: Tensor, step: int) -> Float[Tensor, " batch"]:
        """The size of student minus teacher for each image, the mean over the step's alphas.

        Args:
            encoder: the student.
            images: the images.
            step: the optimizer step.
        """
        f0, tangent = self.affine(images)
        sizes = []
        with evaluating(encoder):  # as the teacher; batch norms and dropout make a distance
            for coef in self.coefs(step):
                weights = between(self.theta0, encoder, coef)
                features = functional_call(encoder, weights, (images,))
                sizes.append(tangent_size(f0, features - (f0 + coef * tangent), self.norm))
        return torch.stack(sizes).mean(dim=0)

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int
    ) -> Float[Tensor, " batch"] | Float[Tensor, ""]:
        """The supervised loss at alpha = 1 plus lambda times the distance."""
        labelled = self.supervised.loss(model, batch, step)  # first: it prepares the DDP wrapper
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        distance = self.distance(bare.get_submodule("image_encoder"), batch[0], step)
        return labelled + self.weight * (distance if labelled.ndim else distance.mean())


def check_student(encoder: nn.Module, teacher: LinearizedEncoder) -> None:
    """Checks that a student is standard, and that its trained parameters are the teacher's.

    Raises:
        UsageError: otherwise.
    """
    if is_linear(encoder):
        raise UsageError(
            "DELTA distils a linear model into a standard one, got a linear one to train; choose "
            "--finetuning-mode=standard"
        )
    if parts_of(encoder)[1]:
        raise UsageError(
            "DELTA distils into the encoder's own weights; choose --trainable=all or some of them, "
            "not lora or talos"
        )
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    theta0 = {name: value for name, value in teacher.theta0().items() if name in trained}
    statedict.check_same(trained, theta0, "the student's trained parameters and the teacher's")


@OBJECTIVES.register("delta")
def delta(setting: Setting) -> Delta:
    """DELTA with the setting's teacher, weight (default 10), range of alpha, draws and norm."""
    if setting.files is None or setting.model is None:
        raise ValueError("expected a student and the files of its teacher, got none")
    student = setting.model.get_submodule("image_encoder")
    teacher = setting.files("teacher")
    check_student(student, teacher)
    options, recipe = setting.options, setting.recipe
    return Delta(
        supervised_of(recipe, setting.multilabel),
        setting.weight(WEIGHT),
        teacher.to(next(student.parameters()).device),
        (options.get("coef_min", RANGE[0]), options.get("coef_max", RANGE[1])),
        options.get("coefs_per_step", 1),
        options.get("penalty_norm", "relative"),
        options.get("seed", 0),
    )
