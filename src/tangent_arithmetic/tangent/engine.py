"""A module and its derivative along some directions, from one pass.

`duals.py` says what happens at each functional; here is which way a call takes, what the weights
are, and what becomes of the outputs.
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
        model: the module f; its own weights and flags are as before on exit.
        params0: theta0 by name; may name buffers too. What is missing is the module's own.
        tangents: v, by names of parameters; what is missing is zero. A `Displacement` stands for
            theta - theta0.
        *args: inputs of the module.
        **kwargs: keyword inputs of the module.

    Returns:
        Two trees like the module's output. The first carries no gradient to the tangents; the
        second is differentiable in them, once. Where inputs, buffers or theta0 require grad, both
        are differentiable in these too, by PyTorch's own forward AD, more slowly.

    Raises:
        ValueError: for names that the module does not have.
        NotImplementedError: for an operation without forward-mode derivative, naming it and the
            module it is in.
        RuntimeError: inside other forward-mode AD, or if the output lost the tangent on the way.
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
    """As `jvp`, for several directions that share one pass of the primal where they can.

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
    """One shared pass where it can be, otherwise one a direction or PyTorch's own forward AD."""
    transforms = [level.key() for level in retrieve_all_functorch_interpreters()]
    if TransformType.Jvp in transforms or forward_ad._current_level >= 0:
        raise RuntimeError(
            "expected no forward-mode AD around this call, got torch.func.jvp, jacfwd, hessian or "
            "a forward_ad.dual_level: nested, PyTorch's own is wrong for some operations, such as "
            "layer_norm. Take reverse mode outside: torch.func.vjp, grad, jacrev"
        )
    if transforms or any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        return _each(plain_jvp, model, values, vectors, args, kwargs)
    recording = torch.is_grad_enabled()
    if recording and _requires_grad((values, args, kwargs, dict(model.named_buffers()))):
        _say_once("inputs, buffers or theta0 require grad", "PyTorch's forward AD, slower")
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
        _say_once(str(reason), "a pass each for several directions")
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
    """A pass a direction, with the same random numbers and statistics in each."""
    if len(vectors) == 1:
        out, d_out = one(model, values, vectors[0], *args, **kwargs)
        return out, [d_out]
    replay, found = _replay(model, values), []
    for v in vectors:
        replay.restore()
        found.append(one(model, values, v, *args, **kwargs))
    return found[0][0], [d_out for _, d_out in found]


def _replay(model: nn.Module, values: Mapping[str, Tensor]) -> Replay:
    return Replay(values.get(name, buffer) for name, buffer in model.named_buffers())


@functools.cache
def _say_once(reason: str, instead: str) -> None:
    logger.info("%s: %s", reason, instead)


def _check_names(
    model: nn.Module, params0: Mapping[str, Tensor], vectors: Sequence[Tangents]
) -> None:
    if not vectors:
        raise ValueError("expected at least one direction, got none")
    known = {name for name, _ in model.named_parameters()}
    strange = {name for v in vectors for name in v if name not in known}
    if strange:
        raise ValueError(
            f"expected a direction over parameters, got also {', '.join(sorted(strange))}"
        )
    strange = params0.keys() - known - {name for name, _ in model.named_buffers()}
    if strange:
        raise ValueError(f"params0 has names that the module has not: {', '.join(sorted(strange))}")


def _requires_grad(tree: Any) -> bool:
    return any(isinstance(v, Tensor) and v.requires_grad for v in pytree.tree_leaves(tree))


def _is_cache(value: Any) -> bool:
    """Whether a value is a cache of keys and values of transformers, which is no tree."""
    return any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__)


def _refuse_caches(inputs: Any) -> None:
    for value in pytree.tree_leaves(inputs, is_leaf=_is_cache):
        if _is_cache(value) and value.get_seq_length() > 0:
            raise TypeError(
                f"expected no cached keys and values, got a filled {type(value).__name__}: it has "
                "no tangents, so the expansion would be wrong; pass the whole sequence"
            )


def _run(
    model: nn.Module,
    values: Mapping[str, Tensor],
    vectors: Sequence[Tangents],
    learnt: bool,
    args: Any,
    kwargs: Any,
) -> tuple[Any, list[Any]]:
    """One pass; the graph of the primal is recorded only if a tangent requires grad."""
    own = dict(model.named_parameters())
    duals = Duals(len(vectors), learnt)

    def make(name: str) -> Tensor:
        value = values[name] if name in values else usable(own[name].detach())
        if not any(name in v for v in vectors):
            return value
        with torch._C.DisableTorchFunction():
            known = [v[name].detach().to(value) if name in v else None for v in vectors]
            if learnt and leaf(vectors[0], name).requires_grad:
                value = AtTheta0.apply(leaf(vectors[0], name), value)
            return duals.pair(value, known)

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
    """Raises if directions are not zero; called where no output carries a tangent."""
    if any(bool(v[name].any()) for v in vectors for name in v):
        raise RuntimeError(
            f"expected an output of {type(model).__name__} that depends on the parameters, got one "
            "without tangents; the forward pass cuts them off (detach, .data, a NumPy round trip, "
            "or an argmax as the only output)"
        )


def _checked(value: Any) -> Any:
    """An output; refused if it hides tensors from us, and so from linearisation."""
    if isinstance(value, Tensor):
        return value
    if _is_cache(value):
        _say_once(f"{type(value).__name__} holds no tangents", "None in its place")
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
    """The tangent in the forward pass; in the backward pass, the way into the primal's graph."""

    @staticmethod
    def forward(ctx: Any, primal: Tensor, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None
