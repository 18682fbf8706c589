"""`jvp` and `jvps`: a module's output and its derivative along directions, from one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent import canary
from tangent_arithmetic.tangent.backends import one_pass
from tangent_arithmetic.tangent.call import Call
from tangent_arithmetic.tangent.outputs import is_cache
from tangent_arithmetic.tangent.passes import differentiate
from tangent_arithmetic.tangent.weights import Tangents, usable


def jvp(
    model: nn.Module,
    params0: Mapping[str, Tensor],
    tangents: Tangents,
    /,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, Any]:
    r"""\(f(x; \theta_0)\) and \(J(x; \theta_0)\, v\) from one pass of a module.

    The first call for each kind of input is checked (`canary.py`).

    Args:
        model: the module f; its weights and flags are restored on exit.
        params0: theta0 by name, possibly with buffers; missing tensors are the module's own. Tied
            ones may have any of their names, as in a state dict.
        tangents: v by name of parameter; missing tensors are zero. A `Displacement` stands for
            theta - theta0.
        *args: inputs of the module.
        **kwargs: keyword inputs of the module.

    Returns:
        Two trees with the structure of the module's output. The first has no gradient with respect
        to the tangents; the second is once differentiable in them. If inputs, buffers, tensors in
        the module's attributes or theta0 require grad, both are differentiable in these too, by
        PyTorch's slower forward AD.

    Raises:
        ValueError: for names that the module does not have.
        NotImplementedError: for an operation without a forward-mode derivative; names it and its
            module.
        RuntimeError: inside other forward-mode AD; if the forward pass discards the tangents, or
            keeps a state that depends on the parameters; if an attribute of the module holds a
            parameter with a tangent; if the check of the first call fails.
    """
    out, (d_out,) = jvps(model, params0, [tangents], *args, **kwargs)
    return out, d_out


def jvps(
    model: nn.Module,
    params0: Mapping[str, Tensor],
    vectors: Sequence[Tangents],
    /,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, list[Any]]:
    """As `jvp`, for several directions, which share one primal pass if possible.

    Where a direction moves nothing yet, it costs nothing (`directions.py`); `at_once` bounds how
    many share a pass, and with them the memory.

    Returns:
        The output, and its derivative along each of the directions.
    """
    with one_pass():
        call = _call(model, params0, vectors, args, kwargs)
        canary.first_call(call)
        return differentiate(call)


def find_caches(model: nn.Module, /, *args: Any, **kwargs: Any) -> None:
    """Finds the caches of weights that a module fills, for `empty_caches`.

    They are those that it computes anew if they are missing, with the same output. It takes a few
    passes of at most three examples, after which the module is as before, its caches filled.

    Args:
        model: the module, at the weights of its caches.
        *args: inputs of the module.
        **kwargs: keyword inputs of the module.
    """
    with one_pass():
        canary.on_few(_fill_and_find, Call(model, {}, (), args, kwargs))


@torch.no_grad()
def _fill_and_find(call: Call) -> None:
    saved = call.replay()
    call.primal()
    saved.restore()
    canary.find_caches(call)


def check_call(
    model: nn.Module,
    params0: Mapping[str, Tensor],
    tangents: Tangents,
    /,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Compares J v with reverse mode and with differences in float64; arguments as for `jvp`.

    Raises:
        RuntimeError: if it is not the derivative; names the module where they part.
    """
    with one_pass():
        canary.check(_call(model, params0, [tangents], args, kwargs))


def _call(
    model: nn.Module,
    params0: Mapping[str, Tensor],
    vectors: Sequence[Tangents],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Call:
    inputs = pytree.tree_map(usable, (args, kwargs))
    call = Call(model, _by_all_names(model, params0), vectors, *inputs)
    _check_names(call)
    _check_loaded({**call.parameters, **params0}, inputs)
    _refuse_caches(inputs)
    return call


def _by_all_names(model: nn.Module, params0: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The given values, those of tied tensors under each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    own = {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}
    unknown = params0.keys() - own.keys()
    if unknown:
        raise ValueError(f"params0 has names unknown to the module: {', '.join(sorted(unknown))}")
    given = {id(own[name]): usable(value) for name, value in params0.items()}
    return {name: given[id(value)] for name, value in own.items() if id(value) in given}


def _check_names(call: Call) -> None:
    if not call.vectors:
        raise ValueError("expected at least one direction, got none")
    unknown = {name for v in call.vectors for name in v} - call.parameters.keys()
    if unknown:
        raise ValueError(
            f"expected a direction over parameters, got also {', '.join(sorted(unknown))}"
        )


def _check_loaded(weights: Mapping[str, Tensor], inputs: Any) -> None:
    away = sorted(name for name, value in weights.items() if value.is_meta)
    given = [v for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)]
    if away and not (len(away) == len(weights) and all(v.is_meta for v in given)):
        raise ValueError(
            f"expected weights with values, got {len(away)} on the meta device, such as "
            f"{away[0]!r}: they are offloaded or not loaded yet; load the whole model first"
        )


def _refuse_caches(inputs: Any) -> None:
    for value in pytree.tree_leaves(inputs, is_leaf=is_cache):
        if is_cache(value) and value.get_seq_length() > 0:
            raise TypeError(
                f"expected no cached keys and values, got a filled {type(value).__name__}: it has "
                "no tangents, so the result would be wrong; pass the whole sequence"
            )
