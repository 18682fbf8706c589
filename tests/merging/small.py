"""A small encoder and models of it on images of their tasks, for methods that use images."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.base import ArrayPictures, SubsetPictures
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.merging import get_method
from tangent_arithmetic.merging.algorithms import algorithm_class
from tangent_arithmetic.merging.examples import Part

CLASSES = {"a": 4, "b": 3}
FEATURES, WIDTH = 5, 6
State = dict[str, Tensor]


def pixels(picture: Any) -> Tensor:
    return torch.from_numpy(np.array(picture)).double().flatten() / 255


class Block(nn.Module):
    """A residual block of attention and a linear map over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.hidden = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + torch.tanh(self.hidden(x))


class Small(ModuleEncoder):
    """Images of 2 x 4 pixels, four tokens of two pixels, to features, with a buffer."""

    kind = "small"

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj = nn.Parameter(torch.randn(WIDTH, FEATURES))
        self.register_buffer("mean", torch.randn(FEATURES))
        self.val_preprocess = pixels

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.unflatten(1, (4, 6)))
        for block in self.blocks:
            x = block(x)
        return x.mean(1) @ self.proj + self.mean


@dataclass
class Data:
    """Encoders, and images of their tasks; every weight that is read is a new tensor."""

    encoders: dict[str, Any]
    heads: dict[str, nn.Module]
    pictures: dict[str, ArrayPictures]
    batch_size: int = 5
    alive: int = 0
    most: int = 0
    splits: list[Any] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        return list(self.heads)

    @property
    def pool(self) -> dict[str, State]:
        return {name: encoder.weights() for name, encoder in self.encoders.items()}

    def encoder(self) -> ModuleEncoder:
        return copy.deepcopy(self.encoders["_pretrained_"]).eval()

    def weights(self, model: str) -> Mapping[str, Tensor]:
        data, state = self, self.encoders[model].weights()

        class Read(dict[str, Tensor]):
            def __getitem__(self, name: str) -> Tensor:
                return data._counted(state[name].clone())

        return Read(state)

    def _counted(self, value: Tensor) -> Tensor:
        self.alive += value.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(value, self._freed, value.nbytes)
        return value

    def _freed(self, size: int) -> None:
        self.alive -= size

    def split(
        self,
        encoder: ModuleEncoder,
        model: str,
        count: int | None = None,
        seed: int = 0,
        part: Part = "validation",
    ) -> Split:
        self.splits.append((model, count, part))
        pictures: Any = self.pictures[model]
        if count is not None:
            pictures = SubsetPictures(pictures, range(min(count, len(pictures))))
        batches = EvalBatches(pictures, encoder.val_preprocess, self.batch_size)
        return Split(model, self.heads[model], batches)

    def images(self, model: str) -> Tensor:
        own, transform = self.pictures[model], self.encoders["_pretrained_"].val_preprocess
        return torch.stack([transform(own[i][0]) for i in range(len(own))])


def small_data() -> Data:
    """Two models of `Small`, with 8 and 7 images."""
    torch.manual_seed(0)
    base = Small().double().eval()
    encoders = {"_pretrained_": base}
    rng = np.random.default_rng(0)
    heads, pictures = dict[str, nn.Module](), dict[str, ArrayPictures]()
    for name, classes in CLASSES.items():
        encoders[name] = copy.deepcopy(base)
        for value in encoders[name].weights().values():
            value.add_(0.3 * torch.randn_like(value))
        heads[name] = nn.Linear(FEATURES, classes).double()
        number = 8 if name == "a" else 7
        shades = rng.integers(0, 256, (number, 2, 4, 3), np.uint8)
        pictures[name] = ArrayPictures(shades, np.arange(number) % classes)
    return Data(encoders, heads, pictures)


def merged(name: str, data: Data, **options: Any) -> State:
    algorithm = algorithm_class(get_method(name).algorithm)(**options)
    found: State = algorithm.run(data.pool, data)
    return found


def inputs_of_maps(encoder: Small, x: Tensor) -> dict[str, Tensor]:
    """The inputs of all linear maps, by hand; rows are tokens of all images."""
    x = x.unflatten(1, (4, 6))
    found = {"embed.weight": x}
    x = encoder.embed(x)
    blocks: Any = encoder.blocks
    for i, block in enumerate(blocks):
        y = block.norm(x)
        within = copy.deepcopy(block.attention)
        within.out_proj.weight.copy_(torch.eye(WIDTH))
        within.out_proj.bias.zero_()
        found[f"blocks.{i}.attention.in_proj_weight"] = y
        found[f"blocks.{i}.attention.out_proj.weight"] = within(y, y, y)[0]
        x = x + block.attention(y, y, y)[0]
        found[f"blocks.{i}.hidden.weight"] = x
        x = x + torch.tanh(block.hidden(x))
    return {name: value.flatten(0, 1) for name, value in found.items()}
