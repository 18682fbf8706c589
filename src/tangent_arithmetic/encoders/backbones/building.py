"""What every source of backbones gives, and how a failure to build one is explained."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from torch import nn

from tangent_arithmetic.encoders.base import Transform
from tangent_arithmetic.runtime.errors import RunError, UsageError, shown

SPARE_NUMBERS = 10_000_000  # for buffers that files need not store


@dataclass(frozen=True)
class Backbone:
    """A module from images or texts to features, and its transforms.

    Attributes:
        module: maps images (batch, 3, height, width), or token ids (batch, length), to features
            (batch, features).
        train_preprocess: transform of a PIL image, or a text, for training.
        val_preprocess: transform likewise for evaluation.
        classifiers: names of the layers that it was built without; files may hold their weights.
    """

    module: nn.Module
    train_preprocess: Transform
    val_preprocess: Transform
    classifiers: tuple[str, ...] = ()


def surplus(
    names: Iterable[str], own: Collection[str], classifiers: Sequence[str] = ()
) -> list[str]:
    """The names of weights in a file that make it one of another, larger model.

    What the model lacks as a whole, such as a classifier or a decoder, does not, nor buffers that
    it does not keep: they are left out. One more of several numbered layers does.

    Args:
        names: of the file.
        own: of the model.
        classifiers: names of layers that the model was built without.
    """
    parts = {part for name in own for part in accumulate(name.split("."), "{}.{}".format)}
    prefixes = tuple(_lacked(layer, own) for layer in classifiers)
    rest = (name for name in names if name not in own and not name.startswith(prefixes))
    return [name for name in rest if _is_further(name, parts)]


def _is_further(name: str, parts: Collection[str]) -> bool:
    """Whether a weight is of one more layer like others, or of a layer that the model has."""
    outer = list(accumulate(name.split("."), "{}.{}".format))
    first = next(part for part in outer if part not in parts)  # that the model lacks
    if first == name:
        return "." in name and name.rpartition(".")[2] in ("weight", "bias")
    return first != outer[0] and first[-1].isdigit()


def _lacked(layer: str, own: Iterable[str]) -> str:
    """The prefix of the weights of a layer, and of the layers around it that have none left."""
    outer = [f"{part}." for part in accumulate(layer.split("."), "{}.{}".format)]
    return next((part for part in outer if not any(n.startswith(part) for n in own)), outer[-1])


def check_size(module: nn.Module, files: Sequence[Path], place: str) -> None:
    """Refuses a configuration that describes a far larger model than its files hold.

    Args:
        module: the model, without storage.
        files: of its weights.
        place: its name, for messages.

    Raises:
        UsageError: if it is larger.
    """
    size = sum(value.numel() for value in module.state_dict().values())
    most = sum(file.stat().st_size for file in files) + SPARE_NUMBERS
    if size > most:
        raise UsageError(
            f"{place} is refused: its configuration describes {size:,} weights, but its files hold "
            f"at most {most:,}"
        )


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
