"""The pass itself: a module run on dual numbers, by rules or by PyTorch's forward AD.

`differentiate` chooses the method, sets the weights and guards what the module keeps; `duals.py`
defines what happens at each functional; `engine.py` is the public face.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent import outputs
from tangent_arithmetic.tangent.caches import CACHES
from tangent_arithmetic.tangent.call import Call
from tangent_arithmetic.tangent.directions import AT_ONCE, ONE_BY_ONE, CannotShare, Directions
from tangent_arithmetic.tangent.duals import Duals
from tangent_arithmetic.tangent.outputs import log_once
from tangent_arithmetic.tangent.plain import Unfused, locating, plain_jvp
from tangent_arithmetic.tangent.recompute import Segments
from tangent_arithmetic.tangent.state import Attributes, Key, tensors_in, tensors_kept
from tangent_arithmetic.tangent.weights import (
    AtTheta0,
    NeedsForwardAD,
    Tangents,
    buffers_lent,
    leaf,
    swapped,
)

WITHOUT_RULES: WeakSet[nn.Module] = WeakSet()  # modules that differentiate in their forward pass
SETTLED: WeakSet[nn.Module] = WeakSet()  # modules whose method has worked before


def differentiate(call: Call) -> tuple[Any, list[Any]]:
    """The output and its derivatives, by the fastest method that is exact.

    That is one pass for all directions, or for as many as `at_once` allows; a pass for each; a pass
    without rules; or `torch.func.jvp`.
    """
    held = list(tensors_kept(call.model))
    _check_held(call, held)
    transforms = [level.key() for level in retrieve_all_functorch_interpreters()]
    if TransformType.Jvp in transforms or forward_ad._current_level >= 0:
        raise RuntimeError(
            "expected no forward-mode AD around this call, got torch.func.jvp, jacfwd, hessian or "
            "a forward_ad.dual_level: PyTorch's nested forward mode is wrong for some operations, "
            "such as layer_norm. Use reverse mode outside: torch.func.vjp, grad, jacrev"
        )
    if transforms or any(isinstance(m, torch.jit.ScriptModule) for m in call.model.modules()):
        return _each(_plain, call)
    recording = torch.is_grad_enabled()
    if recording and _requires_grad(call, held):
        log_once(
            "inputs, buffers, attributes or theta0 require grad",
            "using PyTorch's slower forward AD",
        )
        return _each(_plain, call)
    learnt = recording and any(leaf(v, name).requires_grad for v in call.vectors for name in v)
    by_rules = functools.partial(run, learnt=learnt)
    native = functools.partial(run, learnt=learnt, rules=False)
    if call.model in WITHOUT_RULES:
        return _each(native, call)
    several = len(call.vectors) > 1
    separate = several and (learnt or call.model in ONE_BY_ONE)
    replay = None if call.model in SETTLED and not several else call.replay()
    try:
        result = _each(by_rules, call) if separate else _in_chunks(by_rules, call)
        SETTLED.add(call.model)
        return result
    except CannotShare as reason:
        assert replay is not None
        log_once(str(reason), "using one pass per direction")
        replay.restore()
        return _each(by_rules, call)
    except NeedsForwardAD as reason:
        log_once(f"{type(call.model).__name__}: {reason}", "using PyTorch's slower forward AD")
        if replay is not None:
            replay.restore()
        WITHOUT_RULES.add(call.model)
        return _each(native, call)


def _each(method: Callable[[Call], tuple[Any, list[Any]]], call: Call) -> tuple[Any, list[Any]]:
    """Runs one pass per direction, each from the same random numbers, statistics and inputs."""
    if len(call.vectors) == 1:
        return method(call)
    saved, results = call.replay(), []
    for v in call.vectors:
        saved.restore()
        results.append(method(replace(call, vectors=[v])))
    return results[0][0], [d_out for _, (d_out,) in results]


def _in_chunks(
    method: Callable[[Call], tuple[Any, list[Any]]], call: Call
) -> tuple[Any, list[Any]]:
    """Runs a pass for all directions, or several for as many at once as `AT_ONCE` allows.

    Directions are taken in the order of the parameters that they move first, so that those of one
    pass, and those alive at one place in it, are neighbours.
    """
    size = AT_ONCE.get() or len(call.vectors)
    if len(call.vectors) == 1:
        return method(call)
    place = {name: k for k, name in enumerate(call.parameters)}
    firsts = [min((place[name] for name in v), default=len(place)) for v in call.vectors]
    order = sorted(range(len(firsts)), key=firsts.__getitem__)
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    saved = call.replay() if len(chunks) > 1 else None
    out, steps = None, dict[int, Any]()
    for chunk in chunks:
        if saved is not None:
            saved.restore()
        out, found = method(replace(call, vectors=[call.vectors[k] for k in chunk]))
        steps.update(zip(chunk, found, strict=True))
    return out, [steps[k] for k in range(len(order))]


def _plain(call: Call) -> tuple[Any, list[Any]]:
    model, vector = call.model, call.vectors[0]
    with _caches_apart(model) as carried, buffers_lent(model, call.values) as values:
        out, d_out = plain_jvp(model, values, vector, *call.args, **call.kwargs)
    if peek_interpreter_stack() is None:
        _check_state(call, carried)
    return out, [d_out]


def _requires_grad(call: Call, held: Sequence[tuple[Key, Tensor]]) -> bool:
    """Whether there is anything to differentiate in besides the directions.

    Args:
        call: the call.
        held: the tensors in attributes and buffers of the module.
    """
    known = CACHES.get(call.model, set())
    own = {id(parameter) for parameter in call.parameters.values()}
    return any(
        tensor.requires_grad
        for tensor in itertools.chain(
            call.values.values(),
            (t for v in pytree.tree_leaves((call.args, call.kwargs)) for t in tensors_in(v)),
            (t for key, t in held if key not in known and id(t) not in own),
        )
    )


def _check_held(call: Call, held: Sequence[tuple[Key, Tensor]]) -> None:
    """Raises if an attribute holds a parameter that moves: a pass would take it for a constant."""
    moving = {id(call.parameters[name]): name for v in call.vectors for name in v}
    for key, tensor in held:
        if id(tensor) in moving:
            raise RuntimeError(
                f"expected parameters that the forward pass reads by their own names, got also "
                f"{Attributes(call.model).names([key])[0]!r}, which holds "
                f"{moving[id(tensor)]!r} and would be a constant; drop it and read the parameter "
                "itself, or tie them: self.head.weight = self.emb.weight"
            )


@contextlib.contextmanager
def _caches_apart(model: nn.Module) -> Iterator[list[Key]]:
    """Empties known caches inside the block; then puts back whatever holds tensors of the pass.

    Yields:
        A list, which has the attributes and buffers that held such tensors afterwards.
    """
    known, kept, carried = CACHES.get(model, set()), Attributes(model), list[Key]()
    kept.clear(known)
    try:
        yield carried
    finally:
        carried += kept.of_the_pass()
        kept.restore([*carried, *known])


def run(
    call: Call, learnt: bool, rules: bool = True, kind: type[Duals] = Duals
) -> tuple[Any, list[Any]]:
    """Runs one pass; records the primal graph only if a tangent requires grad.

    Args:
        call: the call.
        learnt: whether the result is differentiated in the directions.
        rules: False leaves all operations to PyTorch's forward AD.
        kind: how duals along one direction meet functionals; a subclass may watch them.
    """
    model, vectors = call.model, call.vectors
    duals = kind(learnt) if len(vectors) == 1 else Directions(len(vectors))
    segments = Segments(call, duals)

    def make(name: str) -> Tensor:
        segments.note(name)
        value = call.value(name)
        if not any(name in v for v in vectors):
            return value
        with torch._C.DisableTorchFunction():
            parts = [v[name].detach().to(value) if name in v else None for v in vectors]
            if learnt and leaf(vectors[0], name).requires_grad:
                value = AtTheta0.apply(leaf(vectors[0], name), value)
            return duals.weight(value, parts)

    unchanged = _Unchanged(call)
    with torch.set_grad_enabled(learnt), forward_ad.dual_level():
        weights = swapped(model, call.parameters, call.values, make, at_once=not rules)
        with contextlib.ExitStack() as stack:
            carried = stack.enter_context(_caches_apart(model))
            stack.enter_context(locating(model))
            cached = stack.enter_context(weights)
            stack.enter_context(duals if rules else Unfused())
            if rules:
                stack.enter_context(segments.recomputed(cached))
            out = model(*call.args, **call.kwargs)
        unchanged.check()
        leaves, spec = outputs.flatten(out)
        pairs = [duals.tangents(value) for value in leaves]
    _check_state(call, carried)
    if all(tangents is None for _, tangents in pairs):
        _check_zero(model, vectors)
    plain = [value.detach() if isinstance(value, Tensor) else value for value, _ in pairs]
    pairs = [(value, unchanged.apart(tangents)) for value, tangents in pairs]
    steps = [[outputs.step(*pair, k) for pair in pairs] for k in range(len(vectors))]
    return pytree.tree_unflatten(plain, spec), [pytree.tree_unflatten(s, spec) for s in steps]


class _Unchanged:
    """Guards the caller's weights and directions against changes by the pass."""

    def __init__(self, call: Call) -> None:
        self._model = call.model
        own = {name: call.values.get(name, value) for name, value in call.parameters.items()}
        given = [v for v in call.vectors if isinstance(v, dict)]
        self._versions = [
            (name, value, value._version)
            for tensors in (own, *given)
            for name, value in tensors.items()
            if not value.is_inference()
        ]
        self._places = {
            value.untyped_storage().data_ptr()
            for v in given
            for value in v.values()
            if value.layout is torch.strided
        }

    def check(self) -> None:
        """Raises if a parameter or a direction has been changed in place."""
        for name, value, version in self._versions:
            if value._version != version:
                raise RuntimeError(
                    f"expected a forward pass that leaves its parameters alone, got "
                    f"{type(self._model).__name__}, which changes {name!r} in place: theta0 must "
                    "stay where it is; do this once, before linearising"
                )

    def apart(self, tangents: list[Tensor] | None) -> list[Tensor] | None:
        """Tangents of an output that share no memory with the directions."""
        if tangents is None or not self._places:
            return tangents
        return [
            t.clone()
            if t.layout is torch.strided and t.untyped_storage().data_ptr() in self._places
            else t
            for t in tangents
        ]


def _check_zero(model: nn.Module, vectors: Sequence[Tangents]) -> None:
    """Raises if directions are not zero; called if no output has a tangent."""
    if any(bool(v[name].any()) for v in vectors for name in v):
        raise RuntimeError(
            f"expected an output of {type(model).__name__} that depends on the parameters, got one "
            "without tangents; the forward pass discards them (detach, .data, a NumPy round trip, "
            "or an argmax as the only output)"
        )


def _check_state(call: Call, carried: list[Key]) -> None:
    """Raises if the output depends on state with tangents that the module keeps between calls.

    The module is called twice without tangents. A cache of weights makes no difference to the
    second call: it is then filled anew in each pass. A hidden state does.
    """
    if CACHES.get(call.model, set()).issuperset(carried):
        return
    kept, saved = Attributes(call.model), call.replay()
    with torch.no_grad():
        first = copied(call.primal())
        saved.restore_inputs()
        second = call.primal()
    kept.restore()
    saved.restore()
    if not same(first, second):
        names = ", ".join(map(repr, kept.names(carried)))
        raise RuntimeError(
            f"expected a module without state, got {type(call.model).__name__}, which keeps "
            f"{names} between calls: it depends on the parameters, and its tangent would be lost; "
            "pass the state as an input and return it, or reset it in the forward pass"
        )
    CACHES.setdefault(call.model, set()).update(carried)


def copied(tree: Any) -> Any:
    """The tree with copies of its tensors."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, tree)


def same(first: Any, second: Any, tolerance: float = 1e-5) -> bool:
    """Whether two outputs agree up to rounding."""
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return all(
        torch.allclose(a, b, tolerance, tolerance * float(a.abs().max()), equal_nan=True)
        for a, b in pairs
        if isinstance(a, Tensor) and a.numel() and a.layout is torch.strided
    )
