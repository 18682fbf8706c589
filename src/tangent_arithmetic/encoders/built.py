"""How an encoder computes features beyond its weights: activations and image transforms.

Weights do not say with which activation or which preprocessing they were trained; a file may. What
a file records wins over what its model's name implies, and a log line says so.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tangent_arithmetic.encoders.base import Transform
from tangent_arithmetic.runtime.errors import UsageError, shown

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "torchvision", "timm", "open_clip", "transformers")
ACTIVATION, PREPROCESS, ADOPTED = "activation", "preprocess", "adopted"
GELU, QUICK_GELU = "GELU", "QuickGELU"
NUMBERS = ("mean", "std")
COMPARED = ("size", *NUMBERS, "interpolation", "resize_mode")


def activation_of(tower: nn.Module) -> str | None:
    """The name of a CLIP tower's activation, GELU or QuickGELU; None if it has neither or both."""
    from open_clip.transformer import QuickGELU

    names = {
        QUICK_GELU if isinstance(part, QuickGELU) else GELU
        for part in tower.modules()
        if isinstance(part, QuickGELU) or (type(part) is nn.GELU and part.approximate == "none")
    }
    return names.pop() if len(names) == 1 else None


def set_activation(model: nn.Module, name: str) -> None:
    """Replaces GELU by QuickGELU in all of a CLIP's towers, or the other way around."""
    from open_clip.transformer import QuickGELU

    made = {GELU: nn.GELU, QUICK_GELU: QuickGELU}[name]
    for parent in list(model.modules()):
        for child, part in list(parent.named_children()):
            if isinstance(part, QuickGELU) or type(part) is nn.GELU:
                setattr(parent, child, made())


def transforms_of(config: Mapping[str, Any]) -> tuple[Transform, Transform]:
    """The transforms of a preprocessing as open_clip describes it, for training and evaluation."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    known = {name: config[name] for name in PreprocessCfg.__dataclass_fields__ if name in config}
    made = [image_transform_v2(PreprocessCfg(**known), is_train=flag) for flag in (True, False)]
    train, val = made
    return train, val


def identify(
    transform: Any, config: Mapping[str, Any], training: bool, activation: str | None = None
) -> None:
    """Sets the recipe of a transform of open_clip, see `arithmetic/features.py`.

    Args:
        transform: the transform.
        config: its preprocessing.
        training: whether it augments.
        activation: the model's, if its name does not imply it: features depend on it, too.
    """
    transform.recipe = {"open_clip": dict(config), "training": training}
    if activation is not None:
        transform.recipe[ACTIVATION] = activation


def differences(recorded: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a recorded preprocessing that differ from another one's."""
    return {
        name: recorded[name]
        for name in COMPARED
        if name in recorded and _plain(recorded[name]) != _plain(config.get(name))
    }


def _plain(value: Any) -> Any:
    """A value as JSON gives it again; equal numbers for the three channels as one."""
    if isinstance(value, list | tuple):
        numbers = [float(one) for one in value]
        return numbers[0] if len(set(numbers)) == 1 else numbers
    return float(value) if isinstance(value, int | float) else value


def checked(recorded: object, source: str | Path) -> dict[str, Any]:
    """A file's record in a form that can be used.

    Raises:
        UsageError: if it names an activation or a preprocessing that cannot be built.
    """
    if not isinstance(recorded, Mapping):
        return {}
    activation, config = recorded.get(ACTIVATION), recorded.get(PREPROCESS, {})
    if activation not in (None, GELU, QUICK_GELU):
        raise UsageError(
            f"{source} was made with the activation {shown(activation)}, expected {GELU} or "
            f"{QUICK_GELU}; it cannot be used with this model"
        )
    if not isinstance(config, Mapping) or not all(map(_is_valid, config.items())):
        raise UsageError(f"{source} records a preprocessing that cannot be read: {shown(config)}")
    adopted = recorded.get(ADOPTED)
    names = [
        name for name in (ACTIVATION, PREPROCESS) if isinstance(adopted, list) and name in adopted
    ]
    return {ACTIVATION: activation, PREPROCESS: dict(config), ADOPTED: names}


def _is_valid(entry: tuple[Any, Any]) -> bool:
    """Whether an entry of a preprocessing is a name, a number or a few numbers."""
    name, value = entry
    if isinstance(value, list | tuple):
        return 0 < len(value) <= 3 and all(isinstance(one, int | float) for one in value)
    return isinstance(name, str) and isinstance(value, str | int | float | None)


@functools.cache  # once for a file, which is read several times
def say(message: str, level: int = logging.WARNING) -> None:
    """Logs a message once."""
    logger.log(level, "%s", message)


def code_of(module: nn.Module, *others: object, known: Sequence[str] = LIBRARIES) -> str | None:
    """A hash of the sources of a module's classes; None if one is unknown.

    Args:
        module: the module.
        *others: further functions or classes whose sources count.
        known: packages whose versions tell their sources.
    """
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    skipped = {*known, *sys.stdlib_module_names}
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in skipped]
    digest = hashlib.sha256()
    try:
        files = {inspect.getsourcefile(one) for one in (*own, *others)}  # type: ignore[arg-type]
        for file in sorted(str(file) for file in files):
            digest.update(Path(file).read_bytes())
    except (OSError, TypeError):
        return None
    return digest.hexdigest()
