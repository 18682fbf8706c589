"""What a pickled encoder records beside its weights: its activation and its image transforms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tangent_arithmetic.encoders.built import ACTIVATION, GELU, PREPROCESS, QUICK_GELU
from tangent_arithmetic.storage.pickle_names import ARGUMENTS
from tangent_arithmetic.storage.unpickler import Stub

MOST_MODULES = 20_000
TOWER = "visual"
TRANSFORMS = ("val_preprocess", "preprocess")  # attributes of an encoder
PILLOW = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # before torchvision had names


def recorded(module: Stub) -> dict[str, Any]:
    """The activation and the preprocessing of a pickled encoder, as far as they are recorded.

    Args:
        module: the encoder, or a CLIP.

    Returns:
        `activation`: GELU, QuickGELU or another name; `preprocess`: size, mean, std, interpolation.
        Without entries that are missing or ambiguous.
    """
    facts: dict[str, Any] = {}
    towers = [stub for name, stub in _walk(module) if name == TOWER] or [module]
    names = {name for tower in towers for name in map(_activation, _stubs(tower)) if name}
    if len(names) == 1:
        facts[ACTIVATION] = names.pop()
    made = next((module.state[name] for name in TRANSFORMS if name in module.state), None)
    if config := _preprocessing(made):
        facts[PREPROCESS] = config
    return facts


def _walk(module: Stub) -> Iterator[tuple[str, Stub]]:
    """The modules inside a module, each once, with their names in their parents."""
    found, todo = {id(module)}, [module]
    while todo and len(found) < MOST_MODULES:
        children = todo.pop().state.get("_modules")
        for name, child in children.items() if isinstance(children, Mapping) else ():
            if isinstance(child, Stub) and isinstance(name, str) and id(child) not in found:
                found.add(id(child))
                todo.append(child)
                yield name, child


def _stubs(module: Stub) -> list[Stub]:
    return [module, *(stub for _, stub in _walk(module))]


def _activation(stub: Stub) -> str | None:
    """The name of a module that is a GELU of some kind."""
    name = stub.path().rpartition(".")[2]
    if name == GELU and stub.state.get("approximate", "none") != "none":
        return f"{GELU} ({stub.state['approximate']})"
    return name if name in (GELU, QUICK_GELU) else None


def _preprocessing(transform: Any) -> dict[str, Any]:
    """Size, mean, std and interpolation of a pickled composition of torchvision's transforms."""
    parts = transform.state.get("transforms") if isinstance(transform, Stub) else None
    config: dict[str, Any] = {}
    for part in parts if isinstance(parts, list) else ():
        if not isinstance(part, Stub):
            continue
        kind, state = part.path().rpartition(".")[2], part.state
        if kind == "Normalize":
            config |= {n: _numbers(state.get(n)) for n in ("mean", "std")}
        elif kind == "CenterCrop":
            config["size"] = _numbers(state.get("size"))
        elif kind == "Resize":
            config["interpolation"] = _interpolation(state.get("interpolation"))
    return {name: value for name, value in config.items() if value is not None}


def of_processor(config: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, std and interpolation of an image processor of `transformers`, by its configuration."""
    inner = config.get("image_processor")
    stated = inner if isinstance(inner, Mapping) else config
    facts = {
        "mean": _numbers(stated.get("image_mean")),
        "std": _numbers(stated.get("image_std")),
        "interpolation": _interpolation(stated.get("resample")),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _numbers(value: Any) -> list[float] | None:
    values = list(value) if isinstance(value, list | tuple) else [value]
    valid = 0 < len(values) <= 3 and all(type(one) in (int, float) for one in values)
    return values if valid else None


def _interpolation(value: Any) -> str | None:
    """The name of an interpolation: a member of torchvision's enum, or Pillow's number."""
    if isinstance(value, Stub):
        names = value.state.get(ARGUMENTS)
        return str(names[0]) if isinstance(names, tuple) and len(names) == 1 else None
    return PILLOW.get(value) if type(value) is int else None
