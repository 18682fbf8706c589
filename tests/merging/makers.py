"""Small models in memory and in files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.storage.checkpoints import save_tensors

State = dict[str, Tensor]
NAMES = ("_pretrained_", "a", "b")


def layers(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(100, generator=generator) for i in range(4)}


def mixed(seed: int) -> State:
    """Tensors of several dtypes and shapes; `big` is merged in several pieces."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "big": torch.randn(700, 900, generator=generator),
        "half": torch.randn(33, generator=generator).to(torch.bfloat16),
        "double": torch.randn(5, generator=generator, dtype=torch.float64),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 3),
        "steps": torch.tensor([seed]),
        "flag": torch.tensor([True, False]),
    }


def write_files(folder: Path, states: dict[str, State]) -> dict[str, Path]:
    """A safetensors file for each state."""
    folder.mkdir(exist_ok=True)
    paths = {name: folder / f"{name}.safetensors" for name in states}
    for name, path in paths.items():
        save_file(states[name], str(path), metadata={"format": "pt"})
    return paths


def encoder_files(folder: Path, linear: bool = False) -> dict[str, Path]:
    """Checkpoints of ViT-Nano-8: a random one, and two fine-tuned from it."""
    torch.manual_seed(0)
    encoder = ImageEncoder.without_weights("ViT-Nano-8")
    theta0 = {name: value.clone() for name, value in encoder.weights().items()}
    info = {"model": "ViT-Nano-8"}
    paths = {"_pretrained_": folder / "zeroshot.safetensors"}
    start = save_tensors(paths["_pretrained_"], theta0, "image_encoder", info=info)
    kind, expansion = ("linearized_image_encoder", theta0) if linear else ("image_encoder", None)
    for name in ("MNIST", "DTD"):
        theta = {key: value + 0.01 * torch.randn_like(value) for key, value in theta0.items()}
        paths[name] = folder / f"{name}Val" / "finetuned.safetensors"
        save_tensors(paths[name], theta, kind, expansion, start, info)
    return paths
