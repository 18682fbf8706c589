"""Merge files: TIES over three fine-tuned models, in Python and from file to file."""

# ruff: noqa: T201 - an example talks to its reader

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tangent_arithmetic.merging import TaskArithmeticAlgorithm, TiesMergingAlgorithm


def main() -> None:
    """Writes four files of weights, merges them, and reads the result."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {"_pretrained_": folder / "base.safetensors"}
        save_file(start.state_dict(), paths["_pretrained_"])
        for model in ("a", "b", "c"):  # stands for three fine-tuned models
            theta = {n: v + 0.1 * torch.randn_like(v) for n, v in start.state_dict().items()}
            paths[model] = folder / f"{model}.safetensors"
            save_file(theta, paths[model])

        ties = TiesMergingAlgorithm(scaling_factor=0.5, threshold=20)
        ties.run_to(paths, folder / "merged.safetensors")  # a tensor at a time
        merged = load_file(folder / "merged.safetensors")
        moved = sum(float((merged[n] - v).norm() ** 2) for n, v in start.state_dict().items())
        print(f"TIES moved the weights by {moved**0.5:.3f}")

        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        model.load_state_dict(merged)
        print("logits of the merged model:", tuple(model(torch.randn(2, 16)).shape))

        states = {n: load_file(path) for n, path in paths.items()}
        total = TaskArithmeticAlgorithm(scaling_factor=0.3).run(states)
        print("task arithmetic, a state dict of", len(total), "tensors")


if __name__ == "__main__":
    main()
