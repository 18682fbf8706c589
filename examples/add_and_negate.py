"""Add two task vectors, negate one: an MLP, and two tasks on different parts of its input."""

# ruff: noqa: T201 - an example talks to its reader

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic import LinearizedModel, TaskVector


def task(part: slice, seed: int) -> tuple[Tensor, Tensor]:
    """Points that differ in a part of 32 coordinates; the label is a parity of two of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(512, 32)
    x[:, part] = torch.randn(512, 16, generator=generator)
    first = part.start
    return x, (x[:, first] * x[:, first + 1] > 0).long()


def trained(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """The model after 200 steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def main() -> None:
    """Prints accuracies of the pre-trained, the edited and the forgetful models."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(32, 256, bias=False), nn.GELU(), nn.Linear(256, 2))
    tasks = {"A": task(slice(0, 16), 1), "B": task(slice(16, 32), 2)}

    def show(name: str, model: nn.Module) -> None:
        with torch.no_grad():
            share = {t: (model(x).argmax(1) == y).float().mean() for t, (x, y) in tasks.items()}
        print(f"{name:12}" + "".join(f"  {t} {100 * value:5.1f} %" for t, value in share.items()))

    show("start", start)
    for mode in ("standard", "linear"):
        vectors = {}
        for name, (x, y) in tasks.items():
            model = LinearizedModel(start) if mode == "linear" else copy.deepcopy(start)
            vectors[name] = TaskVector(start, trained(model, x, y))
        total = sum(vectors.values(), start=0 * vectors["A"])
        apply = "apply_to_linear" if mode == "linear" else "apply_to"
        show(f"{mode} A+B", getattr(total, apply)(start))
        show(f"{mode} -A", getattr(-vectors["A"], apply)(start))
        print(f"cosine of A and B: {vectors['A'].cosine_similarity(vectors['B']):.3f}")


if __name__ == "__main__":
    main()
