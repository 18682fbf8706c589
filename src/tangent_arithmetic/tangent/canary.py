r"""The check of first calls: is J v the derivative?

On the first call of a module with inputs of a new kind, three things are tried on a few of its
examples, along a pseudo-random direction v:

1. caches of weights that the module already holds are found, to be emptied in every pass from then
   on (`state.py`): the output is the same without them, and they come back;
2. the adjoint test \(\langle u, J v \rangle = \langle J^\top u, v \rangle\): the tangent agrees
   with PyTorch's reverse mode;
3. \(J v\) agrees with a central difference.

If it agrees with neither, a tangent has been lost, and the call ends in an error that names the
module. If only reverse mode agrees with it, the module stops gradients (detach, NumPy, a
straight-through estimator): the expansion follows autograd, and a warning says so. If only
differences agree, reverse mode alone is stopped (`no_grad`, a hook): another warning, unless the
gradient is zero by convention, as that of a padding row of an embedding. Errors are relative to
J v or, where that is rounding, to the output.

The first call with several directions, which share a pass, checks these too: the parts of a
direction must sum to the whole. If they do not, each takes a pass of its own, with a warning.

It costs about seven forward passes of at most `EXAMPLES` examples, and one for each kind of buffer,
in which the module's hooks run too. `checking(False)` turns it off; `check=True` of
`LinearizedModel` repeats it in each call, with all examples, in float64.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.amp.autocast_mode import is_autocast_available
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.backends import lent_to_backward
from tangent_arithmetic.tangent.caches import CACHES
from tangent_arithmetic.tangent.call import Call
from tangent_arithmetic.tangent.directions import ONE_BY_ONE
from tangent_arithmetic.tangent.outputs import differentiable_tensors
from tangent_arithmetic.tangent.passes import copied, differentiate, same
from tangent_arithmetic.tangent.probe import Probe
from tangent_arithmetic.tangent.state import Attributes, Key, tensors_in, unpack

logger = logging.getLogger(__name__)

EXAMPLES = 3  # two would be constant after batch normalisation
KINDS = 100  # of inputs of one module, so that texts among them do not cost a check each
# of the difference, relative to the weights; the largest for modules that compute in
# float32 inside, the smallest for networks with many kinks
STEPS = {torch.float64: (1e-3, 1e-4, 1e-5, 1e-6, 1e-7), torch.float32: (1e-3,)}
ADJOINT = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
PARTS = 3  # of the probe, in the check of directions that share a pass
DIFFERENCE = {torch.float64: 1e-3, torch.float32: 0.1}  # tolerances, relative
# module -> kind of inputs -> the parameters that have moved in a check
_seen: WeakKeyDictionary[nn.Module, dict[Hashable, set[str]]] = WeakKeyDictionary()
_enabled: ContextVar[bool] = ContextVar("checking", default=True)


class Disagreement(RuntimeError):
    """J v is not the derivative."""


@contextlib.contextmanager
def checking(enabled: bool) -> Iterator[None]:
    """Turns the check of first calls on or off inside the block."""
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def first_call(call: Call) -> None:
    """Checks a call if its module has not moved these parameters with inputs of this kind.

    Raises:
        Disagreement: if J v is not the derivative; names the module where they part.
    """
    if not _enabled.get() or not _checkable(call):
        return
    kind, seen = _kind(call), _seen.setdefault(call.model, {})
    names = {name for v in call.vectors for name in v}
    checks: dict[Hashable, Callable[[Call], None]] = {kind: _check}
    if len(call.vectors) > 1:
        checks[kind, "together"] = _check_together
    for key, check in checks.items():
        if (new := names - seen.get(key, set())) and len(seen) < KINDS:
            seen.setdefault(key, set()).update(new)
            try:
                with saved_tensors_hooks(_identity, _identity):  # not those of a checkpoint around
                    on_few(check, call)
            except Disagreement:
                seen[key] -= new
                raise


def _identity(value: Tensor) -> Tensor:
    return value


def on_few(check: Callable[[Call], None], call: Call) -> None:
    """Runs a check on a few examples, or on all if these are no valid input."""
    for small in (_examples(call, EXAMPLES), _examples(call, None)):
        try:
            return check(small)
        except Disagreement:
            raise
        except Exception as error:  # a part of the batch may be no valid input
            logger.debug("%s was not checked: %s", type(call.model).__name__, error)


def _check_together(call: Call) -> None:
    """Has each direction take a pass of its own if those that share one do not add up.

    The probe is split into directions of consecutive parameters, whose tangents must sum to its
    own.
    """
    names = list(dict.fromkeys(name for v in call.vectors for name in v))
    size = max(1, -(-len(names) // PARTS))
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    whole, *probes = (Probe(part, call.value) for part in (names, *parts))
    dtype = _precision(call, whole)
    if dtype is None or call.model in ONE_BY_ONE:
        return
    with torch.no_grad():
        out, (alone,) = _derivatives(call, whole)
        _, (again, *steps) = _derivatives(call, whole, *probes)
    expected, tangents = _finite(alone), [_finite(step) for step in steps]
    sums = [sum(terms[1:], terms[0]) for terms in zip(*tangents, strict=True)]
    tolerance = min(10 * ADJOINT[dtype], DIFFERENCE[torch.float32])
    values = _finite(out)
    if max(_distance(d, expected, values) for d in (sums, _finite(again))) > tolerance:
        ONE_BY_ONE.add(call.model)
        logger.warning(
            "%s gives other tangents along several directions at once than along each: it takes a "
            "pass per direction; check the rules of your own",
            type(call.model).__name__,
        )


def check(call: Call) -> None:
    """Checks a call with all its examples, in float64 if the module can be converted.

    Raises:
        Disagreement: if J v is neither the derivative by autograd nor by differences.
    """
    if _checkable(call):
        whole = _examples(call, None)
        _check(_in_float64(whole) or whole, strict=True)


def _checkable(call: Call) -> bool:
    """Whether there are ordinary weights, and no transform or level of forward AD around."""
    if peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    if any(isinstance(v, Iterator) for v in pytree.tree_leaves((call.args, call.kwargs))):
        return False  # a check would exhaust it
    kinds = {type(p) for p in call.model.parameters()} | {type(v) for v in call.values.values()}
    return kinds <= {Tensor, nn.Parameter}


def _kind(call: Call) -> Hashable:
    """Structure, dtypes, dimensions and flags of the inputs, and the modes that change the pass."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    shapes = [
        (v.dtype, v.ndim, v.device.type, v.layout) if isinstance(v, Tensor) else _flag(v)
        for v in leaves
    ]
    return str(spec), tuple(shapes), call.model.training, _autocast(call)


def _autocast(call: Call) -> bool:
    """Whether autocast is on for a device of the module."""
    kinds = {value.device.type for value in call.parameters.values()}
    return any(map(torch.is_autocast_enabled, filter(is_autocast_available, kinds)))


def _precision(call: Call, probe: Probe) -> torch.dtype | None:
    """The coarsest type that the module computes in; None if its moving weights are of none known.

    That of any weight, since a module may compute in several, and bfloat16 under autocast.
    """
    if next((call.value(n).dtype for n in probe), None) not in ADJOINT:
        return None
    if _autocast(call):
        return torch.bfloat16
    dtypes = (call.value(name).dtype for name in call.parameters)
    return max(filter(ADJOINT.__contains__, dtypes), key=ADJOINT.__getitem__)


def _flag(value: object) -> Hashable:
    """The type of an input that is no tensor, with its value if it may choose another path."""
    kind: type = type(value)
    chooses = isinstance(value, bool | Enum) or (isinstance(value, str) and value.isidentifier())
    return (kind, str(value)) if chooses else kind


def _examples(call: Call, count: int | None) -> Call:
    """The call with copies of its inputs, of the first examples if all have as many."""

    def few(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        part = value[:count] if shared and count is not None and value.ndim else value
        return part.detach().clone()

    inputs = [v for v in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(v, Tensor)]
    shared = len({len(v) for v in inputs if v.ndim}) == 1
    args, kwargs = pytree.tree_map(few, (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs)


def _in_float64(call: Call) -> Call | None:
    """The call of a copy of the module in float64; None if it cannot be converted."""

    def wide(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating else value

    try:
        model = copy.deepcopy(call.model).double()
        args, kwargs = pytree.tree_map(wide, (call.args, call.kwargs))
        values = {name: wide(value) for name, value in call.values.items()}
        double = replace(call, model=model, values=values, args=args, kwargs=kwargs)
        with torch.no_grad(), _undone(double):
            double.primal()
        return double
    except Exception as error:  # quantised weights, dtypes that are written into the code
        logger.debug("%s does not run in float64: %s", type(call.model).__name__, error)
        return None


@contextlib.contextmanager
def _undone(call: Call) -> Iterator[None]:
    """Puts all that a pass changes back after the block, so that the next pass is the same."""
    saved, kept = call.replay(), Attributes(call.model)
    try:
        yield
    finally:
        kept.restore()
        saved.restore()


def _derivatives(call: Call, *probes: Probe) -> tuple[Any, list[Any]]:
    with _undone(call):
        return differentiate(replace(call, vectors=probes))


def _check(call: Call, strict: bool = False) -> None:
    find_caches(call)
    names = dict.fromkeys(name for v in call.vectors for name in v)
    probe = Probe(names, call.value)
    dtype = _precision(call, probe)
    if dtype is None:
        return
    error, steps = _adjoint_error(call, names)
    adjoint = error <= ADJOINT[dtype]
    if not adjoint or dtype in STEPS:
        _compare_with_differences(call, probe, dtype, steps if adjoint else None, strict)


def _adjoint_error(call: Call, names: Iterable[str]) -> tuple[float, list[Tensor]]:
    r"""\(|\langle u, J v \rangle - \langle J^\top u, v \rangle|\) over \(|u| |J v|\); \(J v\)."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad(), _undone(call):
        probe = Probe(names, call.value, scale)
        out, (d_out,) = differentiate(replace(call, vectors=[probe]))
        tangents = _finite(d_out)
        steps = [d.to(torch.promote_types(d.dtype, torch.float32)) for d in tangents]
        if not steps:
            return 0.0, []
        random = torch.Generator().manual_seed(1)
        signs = [(torch.rand(d.shape, generator=random) < 0.5).to(d) * 2 - 1 for d in steps]
        products = (_real(d) * _real(u) for d, u in zip(steps, signs, strict=True))
        inner = sum(product.sum().cpu().double() for product in products)  # MPS has no float64
        assert isinstance(inner, Tensor)
        with lent_to_backward():
            (slope,) = torch.autograd.grad(inner, scale) if inner.requires_grad else (inner,)
    steps = [d.detach() for d in steps]
    error = abs(float(inner.detach()) - float(slope)) / _scale(steps, _finite(out))
    return error, [d.detach() for d in tangents]


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def _finite(tree: Any) -> list[Tensor]:
    return [v for v in differentiable_tensors(tree) if v.isfinite().all()]


def _compare_with_differences(
    call: Call, probe: Probe, dtype: torch.dtype, adjoint: list[Tensor] | None, strict: bool
) -> None:
    """Raises, or warns if reverse mode agrees with J v, unless J v is the limit of differences.

    If it is, and reverse mode does not agree, `_compare_with_gradients` has the last word.

    Args:
        call: the call.
        probe: v.
        dtype: of the weights.
        adjoint: J v if reverse mode agrees with it, else None.
        strict: whether to raise even then.
    """
    if adjoint is not None and _difference_error(call, probe, dtype, adjoint) <= DIFFERENCE[dtype]:
        return
    double = call if dtype is torch.float64 else _in_float64(call)
    if double is None:  # then only what is plainly wrong is refused
        if (
            adjoint is not None
            or dtype not in STEPS
            or _difference_error(call, probe, dtype) < DIFFERENCE[dtype]
        ):
            return
        raise _disagreement(call, "derivative")
    probe = Probe(probe, double.value)
    double = _off_kinks(double, probe)
    if _difference_error(double, probe, torch.float64) <= DIFFERENCE[torch.float64]:
        if adjoint is None:
            _compare_with_gradients(double, probe, strict)
        return
    if strict or adjoint is None:
        raise _disagreement(double, "derivative")
    logger.warning(
        "%s stops gradients in %s (detach, NumPy, a straight-through estimator): its "
        "linearisation follows autograd, not differences of its values",
        type(call.model).__name__,
        _where(double),
    )


def _compare_with_gradients(call: Call, probe: Probe, strict: bool) -> None:
    """Warns, or raises if `strict`, where reverse mode is stopped and values are not.

    Rows of embeddings that get no gradient by convention are left out.
    """
    padded = {
        id(parameter)
        for module in call.model.modules()
        if getattr(module, "padding_idx", None) is not None
        for parameter in module.parameters(recurse=False)
    }
    names = [name for name in probe if id(call.parameters[name]) not in padded]
    if _adjoint_error(call, names)[0] <= ADJOINT[torch.float32]:
        return
    message = (
        f"expected gradients of {type(call.model).__name__} that are the transpose of its J v, got "
        "others: a region under no_grad, or a hook on gradients, changes them and not the values. "
        "Its linearisation follows the values, its backward pass does not; with detach() in place "
        "of no_grad both follow autograd"
    )
    if strict:
        raise Disagreement(message)
    logger.warning(message)


def _off_kinks(call: Call, probe: Probe) -> Call:
    """The call at weights nearby: at theta0 itself, zeros may lie on the kinks of a ReLU."""
    near = {name: call.value(name) + 0.01 * probe[name].roll(1) for name in probe}
    return replace(call, values={**call.values, **near})


def _difference_error(
    call: Call, probe: Probe, dtype: torch.dtype, tangents: list[Tensor] | None = None
) -> float:
    """The distance of J v from a central difference, relative to it, at the best step.

    Args:
        call: the call.
        probe: v.
        dtype: of the weights.
        tangents: J v if it is known.
    """
    with torch.no_grad():
        if tangents is None:
            tangents = _finite(_derivatives(call, probe)[1][0])
        error = float("inf")
        for t in STEPS[dtype]:
            high, low = (_finite(_moved(call, probe, s * t)) for s in (1, -1))
            if not len(tangents) == len(high) == len(low):
                return 0.0
            differences = [(h - m) / (2 * t) for h, m in zip(high, low, strict=True)]
            error = min(error, _distance(tangents, differences, high))
            if error <= DIFFERENCE[dtype]:
                break
    return error


def _moved(call: Call, probe: Probe, t: float) -> Any:
    """The output at theta0 + t v, from the state and the inputs of the first call."""
    with _undone(call):
        Attributes(call.model).clear(CACHES.get(call.model, ()))
        return call.primal(lambda n, value: value + t * probe[n] if n in probe else value)


def _distance(
    actual: Sequence[Tensor], expected: Sequence[Tensor], values: Sequence[Tensor]
) -> float:
    """|actual - expected| over |expected|.

    Args:
        actual: derivatives.
        expected: what they are compared with.
        values: what they are derivatives of.
    """
    gap = _norm([a - e for a, e in zip(actual, expected, strict=True)])
    return gap / _scale(expected, values)


def _scale(derivatives: Sequence[Tensor], values: Sequence[Tensor]) -> float:
    """What errors of derivatives are relative to: the derivatives, unless they are rounding."""
    precision: float = max((torch.finfo(v.dtype).eps for v in values), default=0.0) ** 0.5
    return max(_norm(derivatives), precision * _norm(values), sys.float_info.min)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(v.abs().square().sum()) for v in tensors))


def _disagreement(call: Call, reference: str) -> Disagreement:
    return Disagreement(
        f"expected J v of {type(call.model).__name__} to be its {reference}, got another value; "
        f"they part in {_where(call)}; write it with PyTorch's differentiable operations, give its "
        "autograd.Function a `jvp`, or define a rule (tangent_arithmetic.tangent.rule)"
    )


@dataclass
class _Recorded:
    """What hooks see of a submodule: its outputs' tangents, or their values."""

    path: str
    kind: str
    values: list[Tensor]


def _where(call: Call) -> str:
    """The submodule that is first to finish with tangents that are not its output's difference."""
    names = dict.fromkeys(name for v in call.vectors for name in v)
    probe = Probe(names, call.value)
    dtype = _precision(call, probe) or torch.bfloat16
    t = STEPS.get(dtype, (1e-2,))[0]
    with torch.no_grad():
        steps = _record(call, lambda: _derivatives(call, probe))
        high = _record(call, lambda: _moved(call, probe, t))
        low = _record(call, lambda: _moved(call, probe, -t))
    for d, h, m in zip(steps, high, low, strict=False):
        if not d.path == h.path == m.path or len(d.values) != len(h.values):
            break
        expected = [(a - b) / (2 * t) for a, b in zip(h.values, m.values, strict=True)]
        if _distance(d.values, expected, h.values) > DIFFERENCE.get(dtype, 0.1):
            return f"module {d.path!r} ({d.kind})" if d.path else f"the module itself ({d.kind})"
    return f"the module itself ({type(call.model).__name__})"


def _record(call: Call, run: Callable[[], Any]) -> list[_Recorded]:
    """The outputs of all submodules in a run, in the order in which they finish."""
    records: list[_Recorded] = []

    def hook(path: str) -> Callable[..., None]:
        def record(module: nn.Module, _inputs: Any, out: Any) -> None:
            with torch._C.DisableTorchFunction():
                values = [_seen_value(v) for v in differentiable_tensors(out)]
            records.append(_Recorded(path, type(module).__name__, values))

        return record

    handles = [m.register_forward_hook(hook(path)) for path, m in call.model.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return records


def _seen_value(value: Tensor) -> Tensor:
    if forward_ad._current_level < 0:
        return value.detach().clone()
    primal, tangent = unpack(value)
    return torch.zeros_like(primal) if tangent is None else tangent.detach().clone()


def find_caches(call: Call) -> None:
    """Registers attributes and buffers that the module computes anew if they are missing."""
    known, kept = CACHES.get(call.model, set()), Attributes(call.model)
    own = {id(parameter) for parameter in call.model.parameters()}
    alike: dict[Hashable, list[Key]] = defaultdict(list)
    for key in kept.with_tensors():
        tensors = differentiable_tensors(list(tensors_in(kept.value(key))))
        if key not in known and any(id(t) not in own for t in tensors):
            alike[kept.alike(key)].append(key)
    candidates = list(itertools.chain(*alike.values()))
    if not candidates:
        return
    with torch.no_grad(), _undone(call):
        out = copied(call.primal())
    if not _come_back(call, candidates, out):
        candidates = [k for keys in alike.values() if _come_back(call, keys, out) for k in keys]
    CACHES.setdefault(call.model, set()).update(candidates)


def _come_back(call: Call, keys: list[Key], expected: Any) -> bool:
    """Whether the module fills emptied attributes again, with the same output."""
    with torch.no_grad(), _undone(call):
        Attributes(call.model).clear(keys)
        try:
            out = call.primal()
        except Exception:  # the attribute is needed: no cache
            return False
        return same(out, expected) and set(keys) <= set(Attributes(call.model).with_tensors())
