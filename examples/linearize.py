"""Linearise a module of your own, train it in its tangent space, and look at what that means."""

# ruff: noqa: T201 - an example talks to its reader

import torch
from torch import nn
from torch.nn import functional as F

from tangent_arithmetic import LinearizedModel, TaskVector


def main() -> None:
    """Trains the first-order expansion of a convolutional network on random images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    )
    linear = LinearizedModel(model)  # the module is copied and never changed
    x, y = torch.randn(64, 3, 16, 16), torch.randint(0, 5, (64,))
    print(f"at theta0 the outputs differ by {(linear(x) - model(x)).abs().max():.1e}")

    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(linear(x), y).backward()
        optimizer.step()
    tau = TaskVector(model, linear)

    with torch.no_grad():  # affine in the coefficient, as a standard model is not
        start, end = linear(x), None
        half = tau.apply_to_linear(model, scaling_coef=0.5)(x)
        end, start = tau.apply_to_linear(model)(x), model(x)
        standard = tau.apply_to(model, scaling_coef=0.5)(x)
    middle = (start + end) / 2
    print(f"half of tau, linear: off the middle by {(half - middle).abs().max():.1e}")
    print(f"half of tau, standard: off by {(standard - middle).abs().max():.1e}")
    print(tau)


if __name__ == "__main__":
    main()
