"""State that modules keep between calls: caches of weights, hidden states.

Whatever a forward pass stores in a module outlives the pass, and with it the tangents. An attribute
or buffer that holds a value with a tangent after a pass is put back to what it was before: the next
pass fills a cache again, and finds no hidden state whose tangent has been lost (`passes.py` checks
that nothing depends on it).
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd import forward_ad

OF_MODULES = frozenset(nn.Module().__dict__) | {"_parameters", "_buffers", "_modules"}
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
DEPTH = 3  # containers inside containers inside an attribute
PLAIN = (str, bytes, int, float, type(None))  # values without tensors in them
Key = tuple[int, str]  # of an attribute or buffer: a module's position, the name


def unpack(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """A dual tensor's value and tangent; PyTorch has no sparse dual tensors."""
    if value.layout is not torch.strided:
        return value, None
    primal, tangent = forward_ad.unpack_dual(value)
    return primal, tangent


def has_tangent(value: object) -> bool:
    """Whether a tensor carries a tangent at the current level of forward AD."""
    return isinstance(value, Tensor) and unpack(value)[1] is not None


def of_the_pass(value: object) -> bool:
    """Whether a value is a tensor that has a tangent or is wrapped by `torch.func`."""
    return isinstance(value, Tensor) and (is_functorch_wrapped_tensor(value) or has_tangent(value))


def _is_opaque(value: Any) -> bool:
    """Whether a value is a module, a class or a function."""
    return isinstance(value, nn.Module | type) or inspect.isroutine(value)


def _attributes_of(value: Any) -> dict[str, Any] | None:
    """The attributes of a plain object: none of a module, a class or a function."""
    if _is_opaque(value):
        return None
    inner = getattr(value, "__dict__", None)
    return inner if isinstance(inner, dict) else None


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if _is_opaque(value):
        return ()
    slots = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
    return [*(_attributes_of(value) or {}).values(), *(getattr(value, n, None) for n in slots)]


def tensors_in(value: Any, depth: float = DEPTH) -> Iterator[Tensor]:
    """The tensors in a value: itself, elements of containers, attributes of plain objects."""
    todo, seen = [(value, depth)], set[int]()
    while todo:
        one, left = todo.pop()
        if isinstance(one, Tensor):
            yield one
        elif left > 0 and not isinstance(one, PLAIN) and id(one) not in seen:
            seen.add(id(one))
            todo += [(child, left - 1) for child in reversed([*_children(one)])]


def _containers(value: Any, depth: int = DEPTH) -> Iterator[dict[Any, Any] | list[Any]]:
    """The mutable containers in a value: dicts, lists, the attributes of plain objects."""
    if depth == 0 or isinstance(value, (Tensor, *PLAIN)):
        return
    inner = value if isinstance(value, dict | list) else _attributes_of(value)
    if inner is not None:
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


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` has wrapped, or the module itself."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def attributes_enclosing(model: nn.Module) -> list[str]:
    """The attributes with functions that enclose a module or parameter of the model.

    Those of `torch.compile` do not count: copies are without them, or have their own.
    """
    modules = list(model.modules())
    own = {id(part) for part in (*modules, *model.parameters())}
    homes = [*attributes(model)]
    homes += [((i, n), vars(m)) for i, m in enumerate(modules) for n in HOOKS if n in vars(m)]
    keys = [
        (place, name)
        for (place, name), home in homes
        if not (name == "_compiled_call_impl" or hasattr(modules[place], "_orig_mod"))
        and _encloses(home[name], own)
    ]
    return Attributes(model).names(keys)


def _encloses(value: Any, own: Collection[int], depth: int = DEPTH, inside: bool = False) -> bool:
    """Whether a function in a value encloses an object with one of the ids."""
    if inside and id(value) in own:
        return True
    if depth == 0 or isinstance(value, (Tensor, nn.Module, *PLAIN)):
        return False
    if not inside and inspect.isfunction(value):
        inside, depth = True, DEPTH
    return any(_encloses(inner, own, depth - 1, inside) for inner in enclosed(value))


def enclosed(value: Any) -> Iterable[Any]:
    """What a value refers to: what a function encloses, elements, attributes of plain objects."""
    if inspect.isfunction(value):
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*inspect.getclosurevars(value).nonlocals.values(), *defaults]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    return _children(value)


def attributes(model: nn.Module) -> Iterator[tuple[Key, dict[str, Any]]]:
    """The attributes and buffers of a module's submodules, each with the dict that holds it."""
    for place, module in enumerate(model.modules()):
        for name in list(module.__dict__):
            if name not in OF_MODULES:
                yield (place, name), module.__dict__
        buffers = module.__dict__.get("_buffers")
        if isinstance(buffers, dict):  # not of a scripted module
            for name in list(buffers):
                yield (place, name), buffers


def tensors_kept(model: nn.Module) -> Iterator[tuple[Key, Tensor]]:
    """The tensors in attributes and buffers; not an RNN's list of its weights, which it renews."""
    for key, home in attributes(model):
        value = home[key[1]]
        if not isinstance(value, PLAIN) and key[1] != "_flat_weights":
            for tensor in tensors_in(value):
                yield key, tensor


def unwrap_constants(model: nn.Module) -> None:
    """Unwraps attributes and buffers that `torch.func` has wrapped without a tangent."""
    for (_, name), home in attributes(model):
        value = home[name]
        wrapped = isinstance(value, Tensor) and is_functorch_wrapped_tensor(value)
        if wrapped and not has_tangent(value):
            home[name] = get_unwrapped(value)


class Attributes:
    """The attributes and buffers of a module's submodules at one time, to compare and to restore.

    Args:
        model: the module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values: dict[Key, Any] = {}
        self._homes: dict[Key, dict[str, Any]] = {}
        self._contents: dict[Key, list[tuple[Any, Any]]] = {}
        for key, home in attributes(model):
            value = self._values[key] = home[key[1]]
            self._homes[key] = home
            inside = [(c, c.copy()) for c in _containers(value)]
            if inside:
                self._contents[key] = inside

    def value(self, key: Key) -> Any:
        """An attribute's value then."""
        return self._values[key]

    def with_tensors(self) -> list[Key]:
        """The attributes that held tensors then."""
        return [key for key, value in self._values.items() if any(True for _ in tensors_in(value))]

    def alike(self, key: Key) -> Hashable:
        """The same for buffers of one name in modules of one class; the key of an attribute."""
        place, name = key
        module = list(self._model.modules())[place]
        return key if self._homes[key] is module.__dict__ else (type(module), name)

    def of_the_pass(self) -> list[Key]:
        """The attributes that hold tensors of a pass now."""
        return [
            key
            for key, home in attributes(self._model)
            if any(of_the_pass(tensor) for tensor in tensors_in(home[key[1]]))
        ]

    def clear(self, keys: Collection[Key]) -> None:
        """Takes the tensors out of attributes: elements are dropped, attributes become None.

        An attribute that holds nothing but the model's own parameters stays: no tangent is in it.
        """
        own = {id(parameter) for parameter in self._model.parameters()} if keys else set()
        for key in keys:
            value = self._values.get(key)
            if all(id(t) in own for t in tensors_in(value)):
                continue
            if isinstance(value, Tensor):
                self._homes[key][key[1]] = None
            for container, _ in self._contents.get(key, ()):
                if isinstance(container, list):
                    container[:] = [v for v in container if not _holds_tensors(v)]
                    continue
                of_object = not isinstance(value, dict)
                for name in [n for n, v in container.items() if _holds_tensors(v)]:
                    if of_object:
                        container[name] = None
                    else:
                        del container[name]

    def restore(self, keys: Collection[Key] | None = None) -> None:
        """Puts attributes back to what they were; all of them if `keys` is None."""
        if keys is None:
            keys = [*(key for key, _ in attributes(self._model)), *self._values]
        added = [key for key in keys if key not in self._values]
        homes = dict(attributes(self._model)) if added else {}
        for key in added:
            homes.get(key, {}).pop(key[1], None)
        for key in (k for k in keys if k in self._values):
            for container, content in self._contents.get(key, ()):
                _refill(container, content)
            self._homes[key][key[1]] = self._values[key]

    def names(self, keys: Iterable[Key]) -> list[str]:
        """The dotted names of attributes, for messages."""
        paths = [path for path, _ in self._model.named_modules()]
        return sorted({f"{paths[place]}.{name}".lstrip(".") for place, name in keys})
