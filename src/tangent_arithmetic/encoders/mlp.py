r"""The study's models: an MLP of ten hidden layers and a transition, and a head of three layers.

Names of parameters are those of the public project (`block1.block.0.weight`, ...).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.storage.checkpoints import BACKBONE, save_tensors
from tangent_arithmetic.storage.reading import readable

HEAD = "mlp_head"
Saved = TypeVar("Saved", bound="_Saved")


class _Saved(nn.Module):
    """A module that writes itself to a file and is read from one."""

    kind: str

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.sizes = sizes

    def save(self, filename: str | Path, theta0_hash: str | None = None, **info: Any) -> str:
        """Writes the weights, and returns their content hash.

        Args:
            filename: file to write; `.pth` becomes `.safetensors`.
            theta0_hash: content hash of the weights that they were fine-tuned from.
            **info: facts to keep with them.
        """
        facts = {**self.sizes, **info}
        state = dict(self.state_dict())
        return save_tensors(filename, state, self.kind, theta0_hash=theta0_hash, info=facts)

    @classmethod
    def load(cls: type[Saved], filename: str | Path, made_by: str | None = None) -> Saved:
        """Reads what `save` wrote.

        Args:
            filename: the file.
            made_by: the command that makes it, for the message if it is missing.

        Raises:
            MissingFileError: if it is not there.
            UsageError: if it is damaged or holds something else, or if a weight is missing, unknown
                or of another shape, listing all.
        """
        found = load_checkpoint(filename, made_by, kinds=(cls.kind,))
        sizes = {n: found.info[n] for n in ("input_dim", "output_dim") if n in found.info}
        what = f"{cls.__name__} and {filename}"
        with readable(filename, f"a {cls.kind}"):
            if not all(type(size) is int and size > 0 for size in sizes.values()):
                raise ValueError(f"its sizes are {sizes}")
            with torch.device("meta"):  # the file's word is compared with its shapes first
                statedict.check_same(cls(**sizes).state_dict(), found.theta, what)
            module = cls(**sizes)
        statedict.copy_into(module.state_dict(), found.theta, what)
        return module


class MLPBlock(nn.Module):
    """`num_layers` times a linear layer and ReLU.

    Args:
        input_dim: features that come in.
        output_dim: features of every layer.
        num_layers: number of linear layers.
    """

    def __init__(self, input_dim: int, output_dim: int, num_layers: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(num_layers):
            layers += [nn.Linear(input_dim if i == 0 else output_dim, output_dim), nn.ReLU()]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, input_dim) -> (batch, output_dim)."""
        out: Tensor = self.block(x)
        return out


class BackBone(_Saved):
    """The feature extractor: five layers d -> d, a transition d -> d/2, five layers d/2 -> d/2.

    Args:
        input_dim: d, the number of features of the data.
    """

    kind = BACKBONE

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim=input_dim)
        half = input_dim // 2
        self.block1 = MLPBlock(input_dim, input_dim, num_layers=5)
        self.transition = nn.Linear(input_dim, half)
        self.block2 = MLPBlock(half, half, num_layers=5)
        initialize(self)

    def get_output_dim(self) -> int:
        """The number of features that come out, d/2."""
        return self.transition.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(batch, d) -> (batch, d/2)."""
        out: Tensor = self.block2(self.transition(self.block1(x)))
        return out


class Head(_Saved):
    """The classifier: three linear layers with ReLU between them.

    Args:
        input_dim: features of the backbone.
        output_dim: number of classes.
    """

    kind = HEAD

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__(input_dim=input_dim, output_dim=output_dim)
        hidden = max(input_dim // 2, 1)
        self.layers = nn.Sequential(
            nn.Linear(input_dim, hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, output_dim),
        )  # fmt: skip
        initialize(self)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, features) -> logits (batch, classes)."""
        logits: Tensor = self.layers(features)
        return logits


class ClassificationModel(nn.Module):
    """A backbone, standard or linearised, and a head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """(batch, d) -> logits (batch, classes)."""
        logits: Tensor = self.head(self.backbone(x))
        return logits


def initialize(module: nn.Module) -> None:
    r"""Draws the weights of all linear layers from \(N(0, 2 / fan_{in})\), biases 0.

    PyTorch's default would shrink the signal by about \(\sqrt{6}\) at each of thirteen layers with
    ReLU, until the classes cannot be told apart; this keeps its size.

    Source: He et al., "Delving Deep into Rectifiers", arXiv:1502.01852, equation (10).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
