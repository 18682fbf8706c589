"""The MLPs of the study on artificial data: a backbone of eleven layers, and a head of three.

Parameter names are those of the public project (`block1.block.0.weight`, ...).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.storage.checkpoints import BACKBONE, save_tensors
from tangent_arithmetic.storage.reading import readable

if TYPE_CHECKING:
    from jaxtyping import Float

HEAD = "mlp_head"
Saved = TypeVar("Saved", bound="_Saved")


class _Saved(nn.Module):
    """A module with `save` and `load`."""

    kind: str

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.sizes = sizes

    def save(self, filename: str | Path, theta0_hash: str | None = None, **info: Any) -> str:
        """Writes the weights, and returns their content hash.

        Args:
            filename: file to write; `.pth` becomes `.safetensors`.
            theta0_hash: content hash of the weights that these were fine-tuned from.
            **info: metadata, JSON-serialisable.
        """
        theta, info = dict(self.state_dict()), {**self.sizes, **info}
        return save_tensors(filename, theta, self.kind, theta0_hash=theta0_hash, info=info)

    @classmethod
    def load(cls: type[Saved], filename: str | Path) -> Saved:
        """Reads a file that `save` wrote.

        Raises:
            MissingFileError: if it does not exist.
            UsageError: if it is damaged or of another kind, or if weights are missing, unknown or
                of another shape; lists all differences.
        """
        checkpoint = load_checkpoint(filename, kinds=(cls.kind,))
        info, theta = checkpoint.info, checkpoint.theta
        sizes = {name: info[name] for name in ("input_dim", "output_dim") if name in info}
        what = f"{cls.__name__} and {filename}"
        with readable(filename, f"a {cls.kind}"):
            if not all(type(size) is int and size > 0 for size in sizes.values()):
                raise ValueError(f"expected sizes above 0, got {sizes}")
            with torch.device("meta"):  # check the stated sizes before allocating memory
                statedict.check_same(cls(**sizes).state_dict(), theta, what)
            module = cls(**sizes)
        statedict.copy_into(module.state_dict(), theta, what)
        return module


class MLPBlock(nn.Module):
    """`num_layers` linear layers, each followed by ReLU.

    Args:
        input_dim: number of input features.
        output_dim: number of features of every layer.
        num_layers: number of linear layers.
    """

    def __init__(self, input_dim: int, output_dim: int, num_layers: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(num_layers):
            layers += [nn.Linear(input_dim if i == 0 else output_dim, output_dim), nn.ReLU()]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        """Features of the last layer."""
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
        """The number of output features, d/2."""
        return self.transition.out_features

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch half"]:
        """Features of the last layer."""
        out: Tensor = self.block2(self.transition(self.block1(x)))
        return out


class Head(_Saved):
    """The classifier: three linear layers with ReLU between them.

    Args:
        input_dim: number of features of the backbone.
        output_dim: number of classes.
    """

    kind = HEAD

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__(input_dim=input_dim, output_dim=output_dim)
        hidden = max(input_dim // 2, 1)
        self.layers = nn.Sequential(
            nn.Linear(input_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, output_dim),
        )
        initialize(self)

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Logits of features."""
        logits: Tensor = self.layers(features)
        return logits


class ClassificationModel(nn.Module):
    """A backbone, standard or linearised, and a head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch classes"]:
        """Logits of inputs."""
        logits: Tensor = self.head(self.backbone(x))
        return logits


def initialize(module: nn.Module) -> None:
    r"""Draws the weights of all linear layers from \(N(0, 2 / fan_{in})\) and sets biases to 0.

    This preserves the scale of the signal. PyTorch's default would shrink it by about
    \(\sqrt{6}\) at each of thirteen ReLU layers, until the classes cannot be told apart.

    Source: He et al., "Delving Deep into Rectifiers", arXiv:1502.01852, equation (10).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
