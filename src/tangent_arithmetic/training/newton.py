r"""Newton's method for models that are affine in their weights, on all images at once.

With features \(\phi(\tau) = f_0 + J \tau\), a head h and a loss \(\ell\) that is convex in the
logits, it minimises

\[ F(\tau) = \frac1n \sum_i \ell(h(\phi_i(\tau)), y_i) + \frac r2 \|\tau - \tau_0\|^2 \]

by steps \(p\) of the Gauss-Newton system \((J^\top B J + r) p = -\nabla F\), where
\(B = J_h^\top \nabla^2 \ell\, J_h / n\) at the current features; with a head that is affine it is
the Hessian. Conjugate gradients solve it to a part of the gradient's norm. J never changes, so that

- a product with the matrix is one forward and one backward pass, as of a training step;
- the features along p are the sum of those that the products gave, and the best multiple of p,
  through the head as it is, costs no pass at all.

Source: Martens, "Deep learning via Hessian-free optimization", 2010 (truncated conjugate gradients,
Gauss-Newton products); for a linear model there is no backtracking and no change of J.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.func import grad, jvp, vjp

from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import dot, norm

if TYPE_CHECKING:
    from jaxtyping import Float

Vector = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]  # logits, labels -> the loss of each image
DOUBLINGS = 6  # of the largest multiple of a step that the line search looks at
TIGHTEST = 1e-10  # relative residual of conjugate gradients


NONE = "expected images to minimise the loss on, got none"
FROZEN = (
    "expected features that depend on parameters that require grad, got others: all that the model "
    "uses are frozen, or its forward pass is without gradients (torch.no_grad, detach)"
)
CHANGING = (
    "expected the same images in the same order in every pass, got others; a loader must not "
    "shuffle, and a generator must be made a list"
)
FLAT = (
    "expected a loss with curvature, got one without along its gradient, such as the absolute "
    "error, for which Newton's method has no step; set a ridge above 0, or take another loss"
)


@dataclass(frozen=True)
class NewtonSettings:
    """How far to go.

    Attributes:
        ridge: r.
        steps: of Newton's method, at most.
        products: of the matrix with a vector in a step, at most.
        precision: norm of the gradient at which to stop.
    """

    ridge: float = 0.0
    steps: int = 10
    products: int = 20
    precision: float = 1e-6


@dataclass(frozen=True)
class NewtonStep:
    """A step that was taken.

    Attributes:
        objective: F before it.
        gradient: norm of the gradient of F before it.
        products: passes over the images that conjugate gradients took.
        multiple: of the solution that the line search chose.
    """

    objective: float
    gradient: float
    products: int
    multiple: float


def newton_cg(
    model: nn.Module,
    head: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    settings: NewtonSettings = NewtonSettings(),
) -> list[NewtonStep]:
    """Moves the parameters of a model that require grad to the minimum, in place.

    Args:
        model: maps images to features, shape (images, features), affine in these parameters; on the
            device of the images. tau_0 is where it starts.
        head: maps features to logits; not changed.
        batches: images and labels; iterated over once for each product and each step, each time
            the same in the same order.
        loss: of each image's logits, shape (images,).
        settings: how far to go.

    Returns:
        The steps; a last record has the objective and the gradient at the end.

    Raises:
        UsageError: if there are no images, or they or their order change, if no parameter that
            requires grad is used, or if the loss has no curvature and the ridge is 0.
    """
    problem = _Problem(model, head, batches, loss, settings.ridge)
    steps = list[NewtonStep]()
    while True:
        gradient = problem.gradient()
        size = float(norm(gradient))
        if size <= settings.precision or len(steps) == settings.steps:
            steps.append(NewtonStep(problem.value(), size, 0, 0.0))
            break
        first = steps[0].gradient if steps else size
        residual = max(TIGHTEST, min(0.1, (size / first) ** 0.5 / 10)) * size
        p, ahead, products = _solved(problem, gradient, residual, settings.products)
        multiple = problem.line_search(p, ahead)
        steps.append(NewtonStep(problem.value(), size, products, multiple))
        problem.move(p, ahead, multiple)
    problem.place(problem.tau)
    return steps


def _solved(
    problem: _Problem, gradient: Vector, residual: float, limit: int
) -> tuple[Vector, Float[Tensor, "images features"], int]:
    """The step by conjugate gradients, the features along it, and the number of products."""
    p = {name: torch.zeros_like(value) for name, value in gradient.items()}
    ahead = torch.zeros_like(problem.features)
    r = {name: -value for name, value in gradient.items()}
    d, rr = dict(r), float(dot(r, r))
    for count in range(1, limit + 1):
        along, product = problem.product(d)
        bent = float(dot(d, product))
        if bent <= 0:  # no curvature along d: the step so far
            if count == 1:
                raise UsageError(FLAT)
            break
        share = rr / bent
        for name, value in p.items():
            value.add_(d[name], alpha=share)
            r[name] = r[name] - share * product[name]
        ahead = ahead + share * along
        before, rr = rr, float(dot(r, r))
        if rr**0.5 <= residual:
            break
        d = {name: r[name] + rr / before * value for name, value in d.items()}
    return p, ahead, count


class _Problem:
    """The objective at a point, whose features are kept; the model's weights are its own."""

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        loss: Loss,
        ridge: float,
    ) -> None:
        self.model, self.head, self.batches = model, head, batches
        self.loss, self.ridge = loss, ridge
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.origin = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.size = float(norm(self.origin)) or 1.0
        self.tau = {name: torch.zeros_like(value) for name, value in self.origin.items()}
        with torch.no_grad():
            pairs = [(model(images), labels) for images, labels in batches]
        if not pairs:
            raise UsageError(NONE)
        self.base, self.labels = (torch.cat(column) for column in zip(*pairs, strict=True))
        self.features = self.base.clone()

    @torch.no_grad()
    def place(self, tau: Mapping[str, Tensor]) -> None:
        """Sets the model's parameters to tau_0 and a vector."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.origin[name] + tau[name])
            parameter.grad = None

    def value(self) -> float:
        """F."""
        losses = self.loss(self.head(self.features), self.labels)
        return float(losses.mean()) + self.ridge / 2 * float(dot(self.tau, self.tau))

    def gradient(self) -> Vector:
        """The gradient of F; one pass."""
        slopes = self._slopes(self.features) / len(self.labels)
        self.place(self.tau)
        _, pulled = self._pass(lambda rows, _: slopes[rows])
        return {name: g + self.ridge * self.tau[name] for name, g in pulled.items()}

    def product(self, d: Vector) -> tuple[Float[Tensor, "images features"], Vector]:
        """J d, and the product of the Gauss-Newton matrix and d; one pass."""
        scale = self.size / float(norm(d))  # as large as the weights, against rounding
        self.place({name: scale * value for name, value in d.items()})

        def curved(rows: slice, outputs: Tensor) -> Tensor:
            return self._curved(rows, (outputs - self.base[rows]) / scale)

        outputs, pulled = self._pass(curved)
        along = (outputs - self.base) / scale
        return along, {name: g + self.ridge * d[name] for name, g in pulled.items()}

    def line_search(self, p: Vector, ahead: Float[Tensor, "images features"]) -> float:
        """The multiple of a step at which F stops falling."""
        straight, bent = float(dot(self.tau, p)), float(dot(p, p))

        def slope(t: float) -> float:
            inner = (self._slopes(self.features + t * ahead).double() * ahead.double()).sum()
            return float(inner) / len(self.labels) + self.ridge * (straight + t * bent)

        for end in (2.0**power for power in range(DOUBLINGS + 1)):
            if slope(end) > 0:
                return float(brentq(slope, 0.0, end)) if slope(0.0) < 0 else 0.0
        return end

    def move(self, p: Vector, ahead: Float[Tensor, "images features"], multiple: float) -> None:
        """Takes a step."""
        for name, value in self.tau.items():
            value.add_(p[name], alpha=multiple)
        self.features = self.features + multiple * ahead

    def _slopes(self, features: Tensor) -> Tensor:
        """The gradient of the sum of the losses in the features."""
        slopes: Tensor = grad(lambda f: self.loss(self.head(f), self.labels).sum())(features)
        return slopes

    def _curved(self, rows: slice, along: Tensor) -> Tensor:
        """B for some images, times a direction of their features."""
        features, labels = self.features[rows], self.labels[rows]

        def slopes(logits: Tensor) -> Tensor:
            found: Tensor = grad(lambda z: self.loss(z, labels).sum())(logits)
            return found

        logits, moved = jvp(self.head, (features,), (along,))[:2]
        bent = jvp(slopes, (logits,), (moved,))[1]
        pulled: Tensor = vjp(self.head, features)[1](bent)[0]
        return pulled / len(self.labels)

    def _pass(self, cotangents: Callable[[slice, Tensor], Tensor]) -> tuple[Tensor, Vector]:
        """The outputs of all images at the placed weights, and J^T of cotangents made of them."""
        found, begin = list[Tensor](), 0
        with torch.enable_grad():
            for images, labels in self.batches:
                outputs = self.model(images)
                if not outputs.requires_grad:
                    raise UsageError(FROZEN)
                rows = slice(begin, begin := begin + len(outputs))
                if not torch.equal(labels, self.labels[rows]):
                    raise UsageError(CHANGING)
                found.append(outputs.detach())
                outputs.backward(cotangents(rows, found[-1]))
        if begin != len(self.labels):
            raise UsageError(CHANGING)
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in self.parameters.items()
        }
        for parameter in self.parameters.values():
            parameter.grad = None
        return torch.cat(found), gradients
