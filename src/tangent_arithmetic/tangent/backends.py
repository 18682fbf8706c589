"""Process-wide switches of PyTorch that a pass needs, and the lock that guards them.

PyTorch's level of forward AD, its choice of attention kernels and its compiler's stance belong to
the process, not to a thread. Passes of several threads therefore take turns.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules._functions import BackwardHookFunction
from torch.nn.utils import parametrize
from torch.utils import checkpoint

from tangent_arithmetic.tangent.reverse import by_reverse
from tangent_arithmetic.tangent.state import has_tangent

logger = logging.getLogger(__name__)

FUSED_ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}
FUSED_RNN = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
TURN = threading.RLock()  # held by the thread whose pass it is
LENT = threading.Event()  # set while that thread waits for a backward pass


@functools.cache
def load_forward_rules() -> None:
    """Loads PyTorch's forward-mode rules, silencing a warning about torch.jit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
    # modules with full backward hooks pass their inputs through this identity
    setattr(BackwardHookFunction, "jvp", staticmethod(_same_tangents))  # noqa: B010 - typed as a method


def _same_tangents(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
    return tuple(None if t is None else t.view_as(t) for t in tangents)


@contextlib.contextmanager
def lent_to_backward() -> Iterator[None]:
    """Lends the turn to the threads of a backward pass, for which this one waits."""
    LENT.set()
    try:
        yield
    finally:
        LENT.clear()


@contextlib.contextmanager
def one_pass(backward: bool = False) -> Iterator[None]:
    """The surroundings of a pass: one thread at a time, nothing compiled or inferred.

    It leaves `torch.inference_mode`, which would discard tangents, and runs `torch.compile`d and
    scripted functions from their Python source, since compiled code ignores tangents. The fast path
    of `nn.MultiheadAttention` is off in any `TorchFunctionMode`, and every pass runs in one.

    Args:
        backward: whether it is run by a backward pass, on a GPU in a thread of PyTorch's own.
    """
    gradients, lent = torch.is_grad_enabled(), backward and LENT.is_set()
    with contextlib.nullcontext() if lent else TURN, contextlib.ExitStack() as stack:
        load_forward_rules()
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_scripts_as_python())
        stack.enter_context(_functions_by_backward())
        stack.enter_context(checkpointing(activations_kept))
        # a weight that parametrize.cached() keeps is of another pass
        stack.enter_context(replaced(parametrize, {"_cache_enabled": 0}))
        stack.enter_context(_slices_of_parameters())
        yield


@contextlib.contextmanager
def replaced(owner: Any, replacements: Mapping[str, Any]) -> Iterator[None]:
    """Replaces, or adds, attributes of an owner inside the block."""
    own = {name: vars(owner)[name] for name in replacements if name in vars(owner)}
    for name, value in replacements.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in replacements:
            if name in own:
                setattr(owner, name, own[name])
            else:
                delattr(owner, name)


def _scripts_as_python() -> contextlib.AbstractContextManager[None]:
    """Runs scripted functions from their Python source.

    The TorchScript executor replaces parts of a function by derivatives of its own, which drop
    tangents, from the second call on.
    """

    def from_source(function: Any, *args: Any, **kwargs: Any) -> Any:
        source = getattr(function, "_torchdynamo_inline", None)
        if source is None:
            raise NotImplementedError(
                f"{function.name} is a scripted function without Python source: no forward AD."
            )
        return source(*args, **kwargs)

    return replaced(torch.jit.ScriptFunction, {"__call__": from_source})


def _functions_by_backward() -> contextlib.AbstractContextManager[None]:
    """Gives custom `autograd.Function`s without a `jvp` the tangents of their backward passes."""
    function: Any = torch.autograd.Function
    own = vars(function)["apply"]

    def with_tangents(cls: Any, *args: Any, **kwargs: Any) -> Any:
        apply = own.__get__(None, cls)
        if cls.jvp is function.jvp and any(map(has_tangent, args)):
            out = by_reverse(apply, args, kwargs)
            if out is not NotImplemented:
                return out
        return apply(*args, **kwargs)

    return replaced(function, {"apply": classmethod(with_tangents)})


def _slices_of_parameters() -> contextlib.AbstractContextManager[None]:
    """Slices of an `nn.ParameterList` are lists; in PyTorch they hold new parameters."""
    item = nn.ParameterList.__getitem__

    def item_or_list(parameters: nn.ParameterList, which: Any) -> Any:
        if isinstance(which, slice):
            return [item(parameters, i) for i in range(*which.indices(len(parameters)))]
        return item(parameters, which)

    return replaced(nn.ParameterList, {"__getitem__": item_or_list})


def checkpointing(run: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    """Inside the block `run` takes the place of `torch.utils.checkpoint.checkpoint`.

    It is replaced where PyTorch's function, under whatever name it was imported, looks first.

    Args:
        run: called with a segment's function, its arguments, its keywords, and whether it runs in
            contexts of its own.
    """
    inner: Any = checkpoint.checkpoint
    names = {*inspect.signature(inner).parameters, "preserve_rng_state"}
    plain = checkpoint.noop_context_fn

    def instead(function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        if function is None:  # checkpoint(use_reentrant=...) decorates a function
            return inner.__wrapped__(**kwargs)
        keywords = {name: value for name, value in kwargs.items() if name not in names}
        return run(function, args, keywords, kwargs.get("context_fn", plain) is not plain)

    return replaced(inner.__wrapped__, {"__dynamo_disable": instead})


def activations_kept(
    function: Callable[..., Any], args: Any, kwargs: Any, contexts: bool = False
) -> Any:
    """Runs a checkpointed segment as if it were none, with a warning if it is to be learnt."""
    if torch.is_grad_enabled():
        _warn_of_checkpoints()
    return function(*args, **kwargs)


@functools.cache
def _warn_of_checkpoints() -> None:
    """Says that a linearised model keeps the activations of a checkpointed segment."""
    logger.warning("activation checkpointing is off in this linearised model: activations are kept")


@contextlib.contextmanager
def forward_ad_backends() -> Iterator[None]:
    """Disables kernels without a forward-mode rule, fused attention among them."""
    with one_pass(), sdpa_kernel(SDPBackend.MATH):
        yield


def differentiable(func: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    """Disables kernels of a functional without forward AD: fused attention and fused RNNs."""
    name = getattr(func, "__name__", "")
    if name in FUSED_ATTENTION:
        return sdpa_kernel(SDPBackend.MATH)
    return _no_fused_rnn() if name in FUSED_RNN else contextlib.nullcontext()


@contextlib.contextmanager
def _no_fused_rnn() -> Iterator[None]:
    mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch._C._set_cudnn_enabled(cudnn)
