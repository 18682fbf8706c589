"""Choose a coefficient: a whole sweep of a linear model is one pass over the data."""

# ruff: noqa: T201 - an example talks to its reader

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic import ClassificationHead, TaskVector
from tangent_arithmetic.arithmetic.logits import linear_logits
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.linearized import linearized

CLASSES, INPUTS, FEATURES = 10, 64, 32


class Encoder(ModuleEncoder):
    """An encoder of your own: a forward pass and a name for its checkpoints."""

    kind = "example_encoder"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(INPUTS, 128), nn.GELU(), nn.Linear(128, FEATURES))

    def forward(self, inputs: Tensor) -> Tensor:
        """Features of a batch."""
        features: Tensor = self.layers(inputs)
        return features


def batches(centres: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Noisy points around the centre of their class."""
    labels = torch.arange(count * 50) % CLASSES
    points = centres[labels] + 1.5 * torch.randn(len(labels), INPUTS)
    return list(zip(points.split(50), labels.split(50), strict=True))


def main() -> None:
    """Fine-tunes linearly, sweeps on validation, and reads the logits for any coefficient."""
    torch.manual_seed(0)
    encoder, head = Encoder(), ClassificationHead(True, 10 * torch.randn(CLASSES, FEATURES))
    centres = torch.randn(CLASSES, INPUTS)
    linear = linearized(encoder)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=3e-3)
    for x, y in batches(centres, 40):
        optimizer.zero_grad()
        F.cross_entropy(head(linear(x)), y).backward()
        optimizer.step()
    tau = TaskVector(encoder, linear)

    validation = Split("validation", head, batches(centres, 10))
    coefs = [i / 10 for i in range(16)]
    accuracies = validation.sweep(linearized(encoder), tau.vector, coefs)
    best = max(range(len(coefs)), key=lambda i: accuracies[i])
    for coef, accuracy in zip(coefs, accuracies, strict=True):
        print(f"{coef:.1f} {100 * accuracy:5.1f} %{'  <- best' if coef == coefs[best] else ''}")

    logits = linear_logits(linearized(encoder), {"tau": tau.vector}, validation)
    shapes = tuple(logits.base.shape), tuple(logits.steps.shape)
    print("logits of f(x) and of J tau, from which any coefficient follows:", *shapes)


if __name__ == "__main__":
    main()
