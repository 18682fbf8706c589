"""`jvp` and `jvps`: a module's output and its derivative along directions, from one pass.

This module chooses the method, sets the weights and processes the outputs; `duals.py` defines what
happens at each functional.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.duals import CannotShare, Duals
from tangent_arithmetic.tangent.plain import locating, no_fast_path, plain_jvp
from tangent_arithmetic.tangent.replay import Replay
from tangent_arithmetic.tangent.weights import AtTheta0, leaf, swapped, usable

logger = logging.getLogger(__name__)

Tangents = Mapping[str, Tensor]


def jvp(
    model: nn.Module, params0: Mapping[str, Tensor], tangents: Tangents, *args: Any, **kwargs: Any
) -> tuple[Any, Any]:
    r"""\(f(x; \theta_0)\) and \(J(x; \theta_0)\, v\) from one pass of a module.

    Args:
        model: the module f; its weights and flags are restored on exit.
        params0: theta0 by name, possibly with buffers; missing tensors are the module's own.
        tangents: v by name of parameter; missing tensors are zero. A `Displacement` stands for
            theta - theta0.
        *args: inputs of the module.
        **kwargs: keyword inputs of the module.

    Returns:
        Two trees with the structure of the module's output. The first has no gradient with respect
        to the tangents; the second is once differentiable in them. If inputs, buffers or theta0
        require grad, both are differentiable in these too, by PyTorch's slower forward AD.

    Raises:
        ValueError: for names that the module does not have.
        NotImplementedError: for an operation without a forward-mode derivative; names it and its
            module.
        RuntimeError: inside other forward-mode AD, or if the forward pass discards the tangents.
    """
    out, (d_out,) = jvps(model, params0, [tangents], *args, **kwargs)
    return out, d_out


def jvps(
    model: nn.Module,
    params0: Mapping[str, Tensor],
    vectors: Sequence[Tangents],
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, list[Any]]:
    """As `jvp`, for several directions, which share one primal pass if possible.

    Returns:
        The output, and its derivative along each of the directions.
    """
    _check_names(model, params0, vectors)
    _refuse_caches((args, kwargs))
    with no_fast_path():  # and outside of inference mode
        values = {name: usable(value) for name, value in params0.items()}
        args, kwargs = pytree.tree_map(usable, (args, kwargs))
        return _choose(model, values, vectors, args, kwargs)


def _choose(
    model: nn.Module,
    values: Mapping[str, Tensor],
    vectors: Sequence[Tangents],
    args: Any,
    kwargs: Any,
) -> tuple[Any, list[Any]]:
    """Chooses one shared pass, a pass per direction, or PyTorch's own forward AD."""
    transforms = [level.key() for level in retrieve_all_functorch_interpreters()]
    if TransformType.Jvp in transforms or forward_ad._current_level >= 0:
        raise RuntimeError(
            "expected no forward-mode AD around this call, got torch.func.jvp, jacfwd, hessian or "
            "a forward_ad.dual_level: PyTorch's nested forward mode is wrong for some operations, "
            "such as layer_norm. Use reverse mode outside: torch.func.vjp, grad, jacrev"
        )
    if transforms or any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        return _each(plain_jvp, model, values, vectors, args, kwargs)
    recording = torch.is_grad_enabled()
    if recording and _requires_grad((values, args, kwargs, dict(model.named_buffers()))):
        _log_once("inputs, buffers or theta0 require grad", "using PyTorch's slower forward AD")
        return _each(plain_jvp, model, values, vectors, args, kwargs)
    learnt = recording and any(leaf(v, name).requires_grad for v in vectors for name in v)
    if len(vectors) == 1:
        return _run(model, values, vectors, learnt, args, kwargs)
    if learnt:
        return _each(jvp, model, values, vectors, args, kwargs)
    replay = _replay(model, values)
    try:
        return _run(model, values, vectors, learnt, args, kwargs)
    except CannotShare as reason:
        _log_once(str(reason), "using one pass per direction")
    replay.restore()
    return _each(jvp, model, values, vectors, args, kwargs)


def _each(
    one: Callable[..., tuple[Any, Any]],
    model: nn.Module,
    values: Mapping[str, Tensor],
    vectors: Sequence[Tangents],
    args: Any,
    kwargs: Any,
) -> tuple[Any, list[Any]]:
    """Runs one pass per direction, each with the same random numbers and statistics."""
    if len(vectors) == 1:
        out, d_out = one(model, values, vectors[0], *args, **kwargs)
        return out, [d_out]
    replay, results = _replay(model, values), []
    for v in vectors:
        replay.restore()
        results.append(one(model, values, v, *args, **kwargs))
    return results[0][0], [d_out for _, d_out in results]


def _replay(model: nn.Module, values: Mapping[str, Tensor]) -> Replay:
    return Replay(values.get(name, buffer) for name, buffer in model.named_buffers())


@functools.cache
def _log_once(reason: str, consequence: str) -> None:
    logger.info("%s: %s", reason, consequence)


def _check_names(
    model: nn.Module, params0: Mapping[str, Tensor], vectors: Sequence[Tangents]
) -> None:
    if not vectors:
        raise ValueError("expected at least one direction, got none")
    parameters = {name for name, _ in model.named_parameters()}
    unknown = {name for v in vectors for name in v} - parameters
    if unknown:
        raise ValueError(
            f"expected a direction over parameters, got also {', '.join(sorted(unknown))}"
        )
    unknown = params0.keys() - parameters - {name for name, _ in model.named_buffers()}
    if unknown:
        raise ValueError(f"params0 has names unknown to the module: {', '.join(sorted(unknown))}")


def _requires_grad(tree: Any) -> bool:
    return any(isinstance(v, Tensor) and v.requires_grad for v in pytree.tree_leaves(tree))


def _is_cache(value: Any) -> bool:
    """Whether a value is a key-value cache of transformers, which is not a pytree."""
    return any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__)


def _refuse_caches(inputs: Any) -> None:
    for value in pytree.tree_leaves(inputs, is_leaf=_is_cache):
        if _is_cache(value) and value.get_seq_length() > 0:
            raise TypeError(
                f"expected no cached keys and values, got a filled {type(value).__name__}: it has "
                "no tangents, so the result would be wrong; pass the whole sequence"
            )


def _run(
    model: nn.Module,
    values: Mapping[str, Tensor],
    vectors: Sequence[Tangents],
    learnt: bool,
    args: Any,
    kwargs: Any,
) -> tuple[Any, list[Any]]:
    """Runs one pass; records the primal graph only if a tangent requires grad."""
    parameters = dict(model.named_parameters())
    duals = Duals(len(vectors), learnt)

    def make(name: str) -> Tensor:
        value = values[name] if name in values else usable(parameters[name].detach())
        if not any(name in v for v in vectors):
            return value
        with torch._C.DisableTorchFunction():
            parts = [v[name].detach().to(value) if name in v else None for v in vectors]
            if learnt and leaf(vectors[0], name).requires_grad:
                value = AtTheta0.apply(leaf(vectors[0], name), value)
            return duals.pair(value, parts)

    with torch.set_grad_enabled(learnt), forward_ad.dual_level():
        with locating(model), swapped(model, values, make), duals:
            out = model(*args, **kwargs)
        leaves, spec = pytree.tree_flatten(out, is_leaf=_is_cache)
        pairs = [duals.split(_checked(value)) for value in leaves]
    if all(tangents is None for _, tangents in pairs):
        _check_zero(model, vectors)
    plain = [value.detach() if isinstance(value, Tensor) else value for value, _ in pairs]
    steps = [[_step(*pair, k) for pair in pairs] for k in range(len(vectors))]
    return pytree.tree_unflatten(plain, spec), [pytree.tree_unflatten(s, spec) for s in steps]


def _check_zero(model: nn.Module, vectors: Sequence[Tangents]) -> None:
    """Raises if directions are not zero; called if no output has a tangent."""
    if any(bool(v[name].any()) for v in vectors for name in v):
        raise RuntimeError(
            f"expected an output of {type(model).__name__} that depends on the parameters, got one "
            "without tangents; the forward pass discards them (detach, .data, a NumPy round trip, "
            "or an argmax as the only output)"
        )


def _checked(value: Any) -> Any:
    """An output leaf; raises if it contains tensors that are hidden from the pytree."""
    if isinstance(value, Tensor):
        return value
    if _is_cache(value):
        _log_once(f"{type(value).__name__} has no tangents", "replaced by None")
        return None
    hidden = [name for name, v in getattr(value, "__dict__", {}).items() if isinstance(v, Tensor)]
    if hidden:
        raise TypeError(
            "expected outputs that are tensors, tuples, lists or dicts, got "
            f"{type(value).__name__} with tensors in {', '.join(sorted(hidden))}; return a dict, "
            "or register the class with torch.utils._pytree.register_pytree_node"
        )
    return value


def _step(value: Any, tangents: Sequence[Tensor] | None, k: int) -> Any:
    """The k-th derivative of one output."""
    if not isinstance(value, Tensor):
        return value
    step = torch.zeros_like(value) if tangents is None else tangents[k].detach()
    return _Carry.apply(value, step) if value.requires_grad else step


class _Carry(torch.autograd.Function):
    """Returns the tangent in the forward pass; backpropagates into the primal's graph."""

    @staticmethod
    def forward(ctx: Any, primal: Tensor, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None
