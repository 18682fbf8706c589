"""What every source of backbones gives, and how a failure to build one is explained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from tangent_arithmetic.encoders.base import Transform
from tangent_arithmetic.runtime.errors import RunError, UsageError, shown


@dataclass(frozen=True)
class Backbone:
    """A module from images to features, and its image transforms.

    Attributes:
        module: maps images (batch, 3, height, width) to features (batch, features).
        train_preprocess: transform of a PIL image for training.
        val_preprocess: transform of a PIL image for evaluation.
    """

    module: nn.Module
    train_preprocess: Transform
    val_preprocess: Transform


@contextlib.contextmanager
def unavailable(name: str, weights: bool) -> Iterator[None]:
    """Turns errors while a model is built into a `UsageError`.

    Args:
        name: the model, without its weights.
        weights: whether its weights were to be downloaded.
    """
    try:
        yield
    except (UsageError, RunError, MemoryError):
        raise
    except Exception as error:  # of timm, torchvision, the hub, the network, the user's code
        reason = f"{type(error).__name__}: {shown(str(error).strip().partition(chr(10))[0], 300)}"
        if not weights:
            raise UsageError(f"{name} cannot be built ({reason})") from error
        raise UsageError(
            f"the weights of {name} are unavailable ({reason}). Without a network, copy the file "
            f"from a machine that has it and use --model={name}__pretrained__FILE; "
            f"--model={name}__init__ has random weights"
        ) from error
