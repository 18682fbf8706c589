"""State that modules keep between calls in plain attributes: caches of weights, hidden states.

Parameters and buffers are PyTorch's business; anything else that a forward pass stores in a module
outlives the pass, and with it the tangents. An attribute that holds a value with a tangent after a
pass is put back to what it was before: the next pass fills a cache again, and finds no hidden state
whose tangent has been lost (`passes.py` checks that nothing depends on it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

OF_MODULES = frozenset(nn.Module().__dict__) | {"_parameters", "_buffers", "_modules"}
DEPTH = 3  # containers inside containers inside an attribute
Key = tuple[int, str]  # of an attribute: a module's position, the attribute's name


def unpack(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """A dual tensor's value and tangent; PyTorch has no sparse dual tensors."""
    if value.layout is not torch.strided:
        return value, None
    primal, tangent = forward_ad.unpack_dual(value)
    return primal, tangent


def has_tangent(value: object) -> bool:
    """Whether a tensor carries a tangent at the current level of forward AD."""
    return isinstance(value, Tensor) and unpack(value)[1] is not None


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set):
        return value
    inner = getattr(value, "__dict__", None)
    plain = (
        isinstance(inner, dict) and not isinstance(value, nn.Module | type) and not callable(value)
    )
    return inner.values() if plain and inner is not None else ()


def tensors_in(value: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    """The tensors in a value: itself, elements of containers, attributes of plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif depth > 0 and not isinstance(value, str | bytes | int | float | None):
        for child in list(_children(value)):
            yield from tensors_in(child, depth - 1)


def _containers(value: Any, depth: int = DEPTH) -> Iterator[dict[Any, Any] | list[Any]]:
    """The mutable containers in a value: dicts, lists, the attributes of plain objects."""
    if depth == 0 or isinstance(value, Tensor | nn.Module | type | str | int | float | None):
        return
    inner = getattr(value, "__dict__", None) if not isinstance(value, dict | list) else value
    if isinstance(inner, dict | list) and not callable(value):
        yield inner
    for child in list(_children(value)):
        yield from _containers(child, depth - 1)


def _refill(container: dict[Any, Any] | list[Any], content: dict[Any, Any] | list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(content)
    else:
        container.extend(content)


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor or a tuple of tensors, which belongs to its container."""
    return isinstance(value, Tensor | tuple) and any(True for _ in tensors_in(value))


def copied_results(model: nn.Module) -> dict[int, Tensor]:
    """Detached copies, by id, of the computed tensors that a model keeps, as `deepcopy`'s memo."""
    kept = Attributes(model)
    tensors = (t for key in kept.with_tensors() for t in tensors_in(kept.value(key)))
    return {id(t): t.detach().clone() for t in tensors if not t.is_leaf}


class Attributes:
    """The plain attributes of a module's submodules at one time, to compare with and to restore.

    Args:
        model: the module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values: dict[Key, Any] = {}
        self._contents: dict[Key, list[tuple[Any, Any]]] = {}
        for place, name, value in self._now():
            self._values[place, name] = value
            inside = [(c, c.copy()) for c in _containers(value)]
            if inside:
                self._contents[place, name] = inside

    def _now(self) -> Iterator[tuple[int, str, Any]]:
        for place, module in enumerate(self._model.modules()):
            for name, value in list(module.__dict__.items()):
                if name not in OF_MODULES:
                    yield place, name, value

    def value(self, key: Key) -> Any:
        """An attribute's value then."""
        return self._values[key]

    def with_tensors(self) -> list[Key]:
        """The attributes that held tensors then."""
        return [key for key, value in self._values.items() if any(True for _ in tensors_in(value))]

    def with_tangents(self) -> list[Key]:
        """The attributes that hold tensors with tangents now."""
        return [
            (place, name)
            for place, name, value in self._now()
            if any(has_tangent(tensor) for tensor in tensors_in(value))
        ]

    def clear(self, keys: Iterable[Key]) -> None:
        """Takes the tensors out of attributes: elements are dropped, attributes become None.

        An attribute that holds nothing but the model's own parameters stays: no tangent is in it.
        """
        modules = list(self._model.modules())
        own = {id(parameter) for parameter in self._model.parameters()}
        for place, name in keys:
            if all(id(t) in own for t in tensors_in(self._values.get((place, name)))):
                continue
            if isinstance(self._values.get((place, name)), Tensor):
                modules[place].__dict__[name] = None
            for container, _ in self._contents.get((place, name), ()):
                if isinstance(container, list):
                    container[:] = [v for v in container if not _holds_tensors(v)]
                    continue
                of_object = not isinstance(self._values[place, name], dict)
                for key in [k for k, v in container.items() if _holds_tensors(v)]:
                    if of_object:
                        container[key] = None
                    else:
                        del container[key]

    def restore(self, keys: Iterable[Key] | None = None) -> None:
        """Puts attributes back to what they were; all of them if `keys` is None."""
        modules = list(self._model.modules())
        every = [(place, name) for place, name, _ in self._now()] + list(self._values)
        for place, name in every if keys is None else keys:
            if (place, name) not in self._values:
                modules[place].__dict__.pop(name, None)
                continue
            for container, content in self._contents.get((place, name), ()):
                _refill(container, content)
            modules[place].__dict__[name] = self._values[place, name]

    def names(self, keys: Iterable[Key]) -> list[str]:
        """The dotted names of attributes, for messages."""
        paths = [path for path, _ in self._model.named_modules()]
        return sorted({f"{paths[place]}.{name}".lstrip(".") for place, name in keys})
