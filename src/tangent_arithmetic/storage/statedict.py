r"""Pure arithmetic on named tensors.

A state is a mapping from names to tensors, such as \(\theta\) or \(\tau = \theta - \theta_0\).
Nothing but `copy_into` and `move_into` changes its inputs; two states are paired by name, never by
position, and must have the same names and shapes. A parameter that has several names (a tied
weight) counts and moves once, see `ties`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from tangent_arithmetic.runtime.errors import UsageError, shown

logger = logging.getLogger(__name__)

State = Mapping[str, Tensor]
Ties = Mapping[str, str]
FULL = (torch.float32, torch.float64)
NARROW = (
    torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)  # fmt: skip
NARROW_OR_FULL = {*NARROW, *FULL}
MOVED = "weights and task vector"
TIES = "ties"  # the entry of a file's facts that says which names are one parameter
NAMED = 8  # names that a message lists


def check_tensors(state: State, what: str = "the state") -> None:
    """Checks that a state holds dense tensors and nothing else.

    Raises:
        UsageError: naming what it holds instead.
    """
    wrong = [
        f"{shown(name)}: {_described(name, value)}"
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
        or value.layout is not torch.strided
    ]
    if wrong:
        raise UsageError(f"{what} must hold dense tensors by name, got\n  " + "\n  ".join(wrong))


def _described(name: Any, value: Any) -> str:
    if not isinstance(name, str):
        return f"a name of type {type(name).__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of layout {value.layout}"
    return type(value).__name__


def check_same(a: State, b: State, what: str = "states") -> None:
    """Checks that two states have the same names and shapes.

    Raises:
        UsageError: listing all differences, sorted.
    """
    check_tensors(a, what)
    check_tensors(b, what)
    problems = [f"only in the first: {shown(name)}" for name in sorted(a.keys() - b.keys())]
    problems += [f"only in the second: {shown(name)}" for name in sorted(b.keys() - a.keys())]
    problems += [
        f"{shown(name)}: shape {tuple(a[name].shape)} against {tuple(b[name].shape)}"
        for name in sorted(a.keys() & b.keys())
        if a[name].shape != b[name].shape
    ]
    if problems:
        raise UsageError(f"{what} do not match:\n  " + "\n  ".join(problems))


def check_part(whole: State, part: State, what: str) -> None:
    """Checks that a state has no other names than another one, and its shapes.

    Raises:
        UsageError: listing all differences, sorted.
    """
    check_same({name: whole[name] for name in part if name in whole}, part, what)


def ties(state: State) -> dict[str, str]:
    """The other names of parameters that have several: name -> the first name of the same memory.

    Args:
        state: weights in memory, such as the state dict of a module.
    """
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, value in state.items():
        before = first.setdefault(_memory(value), name)
        if before != name:
            found[name] = before
    return found


def _memory(value: Tensor) -> Any:
    """What two names of one tensor have in common."""
    if value.is_meta or not value.numel():
        return id(value)
    try:
        start = value.data_ptr()
    except RuntimeError:  # under `torch.func` a tensor has no memory
        return id(value)
    return value.device, value.dtype, start, tuple(value.shape), value.stride()


def joined(*several: Ties) -> dict[str, str]:
    """The ties of several states as one, other name -> name; the first state's choice wins."""
    first: dict[str, str] = {}

    def root(name: str) -> str:
        while name in first:
            name = first[name]
        return name

    for found in several:
        for other, name in found.items():
            a, b = root(other), root(name)
            if a != b:
                first[a] = b
    return {other: root(other) for other in first}


def agreed(tied: Ties, *states: State) -> dict[str, str]:
    """Those ties by whose names no state has different numbers."""
    return {
        name: first
        for name, first in tied.items()
        if all(equal(s[name], s[first]) for s in states if name in s and first in s)
    }


def once(state: State, tied: Ties, what: str) -> dict[str, Tensor]:
    """The state with one name a parameter.

    Raises:
        UsageError: if the names of one parameter hold different numbers.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        first = tied.get(name, name)
        if first in found and not equal(found[first], value):
            raise UsageError(
                f"{shown(first)} and {shown(name)} are one parameter (tied), but {what} has "
                "different numbers for the two; clone one of them in the weights to untie them"
            )
        found.setdefault(first, value)
    return found


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their types and devices."""
    if a.shape != b.shape or a.is_complex() != b.is_complex():
        return False
    if a is b or a.is_meta or b.is_meta:
        return True
    if a.dtype == b.dtype and a.element_size() == 1:  # torch compares no float8
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    elif a.dtype != b.dtype and {a.dtype, b.dtype} <= NARROW_OR_FULL:
        a, b = a.double(), b.double()
    return torch.equal(a, b.to(a.device))


def copy_into(own: State, theta: State, what: str) -> None:
    """Copies the tensors of theta into those of `own`, in place.

    Args:
        own: what is overwritten; keeps its types and devices.
        theta: what is copied.
        what: the two of them, for the message.

    Raises:
        UsageError: if names or shapes differ (all differences are listed), if theta has different
            numbers for two names of one parameter, or numbers that a type of `own` cannot hold.
    """
    check_same(own, theta, what)
    once(theta, ties(own), "what is copied")
    with torch.no_grad():
        ready = {name: stored(theta[name], value.dtype, name) for name, value in own.items()}
        for name, value in own.items():
            value.copy_(ready[name])


def takes_part(value: Tensor) -> bool:
    """Whether arithmetic applies to a tensor: real floating-point numbers, not scales of blocks."""
    return value.dtype in NARROW_OR_FULL


@functools.cache  # once, not for every vector
def say_left_out(what: str, names: tuple[str, ...]) -> None:
    """Names the tensors that differ between models but take no part in the arithmetic.

    Args:
        what: the models.
        names: the tensors; nothing is said if there are none.
    """
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        listed = ", ".join(shown(name) for name in names[:NAMED])
        logger.warning(
            "%s differ in %s%s, which take no part in the arithmetic: they do not hold real "
            "floating-point numbers in each of them", what, listed, more,
        )  # fmt: skip


def _calculated_in(dtype: torch.dtype) -> torch.dtype:
    """The type that numbers of a type are calculated with."""
    if dtype in FULL:
        return dtype
    if dtype in NARROW:
        return torch.float32
    if dtype.is_complex or dtype.is_floating_point:
        raise UsageError(f"numbers of type {dtype} take no part in arithmetic; leave them out")
    return torch.float64  # integers


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(_calculated_in(value.dtype))


def stored(
    value: Tensor, dtype: torch.dtype, name: str, *sources: Tensor, start: int = 0
) -> Tensor:
    """The numbers in the type that they are kept in, rounded once.

    Args:
        value: the numbers.
        dtype: the type.
        name: what they are called, for the message.
        *sources: what they were calculated from: where all of it is finite, they have to be.
        start: number of the first of them in the whole tensor, for the message.

    Raises:
        UsageError: if the type cannot hold one of them.
    """
    if value.is_complex() and not dtype.is_complex:
        raise UsageError(f"{shown(name)} is complex, which {dtype} cannot hold")
    found = value if value.dtype == dtype else value.to(dtype)
    if (found is value and not sources) or value.is_meta or _vectorized():
        return found
    if dtype in NARROW_OR_FULL and value.dtype in NARROW_OR_FULL:
        wrong = _out_of_range(value.detach(), found.detach(), sources)
    else:
        wrong = found.detach().to(value.dtype) != value.detach()
    if wrong is not None and bool(wrong.any()):
        at = int(wrong.reshape(-1).nonzero()[0])
        number = value.detach().reshape(-1)[at].item()
        reason = (
            "which is no finite number" if not math.isfinite(abs(number))
            else f"which {dtype} cannot hold; keep the weights in a wider type, such as float32"
        )  # fmt: skip
        raise UsageError(f"{shown(name)} would get {number:.6g} at number {start + at}, {reason}")
    return found


def _out_of_range(value: Tensor, found: Tensor, sources: Sequence[Tensor]) -> Tensor | None:
    """Which numbers the type that they were rounded to does not reach; None if it holds all."""
    wide = value if value.dtype in FULL else value.float()
    if not wide.numel():
        return None
    least, greatest = torch.aminmax(wide)
    most = torch.finfo(found.dtype).max
    if bool((least >= -most) & (greatest <= most)):
        return None
    back = found if found.dtype in FULL else found.float()
    beyond = ~torch.isfinite(back) | (wide.abs() > _largest(found.dtype))
    wrong = torch.isfinite(wide) & beyond
    wrong |= torch.isinf(wide) & ~torch.isinf(back)
    if sources:
        sound = [torch.isfinite(_at_least_float32(source.detach())) for source in sources]
        wrong |= functools.reduce(torch.logical_and, sound) & ~torch.isfinite(wide)
    return wrong


@functools.cache
def _largest(dtype: torch.dtype) -> float:
    """The largest number that rounds to one of the type; torch lets some types saturate."""
    info = torch.finfo(dtype)
    if dtype == torch.float64:
        return info.max
    return info.max + 2.0 ** math.floor(math.log2(info.max)) * info.eps / 2


def _vectorized() -> bool:
    """Whether `torch.vmap` is at work, under which no number can be looked at."""
    levels = retrieve_all_functorch_interpreters()
    return any(level.key() == TransformType.Vmap for level in levels)


def add(a: State, b: State) -> dict[str, Tensor]:
    """`a + b`; finite numbers give finite ones, or an error."""
    check_same(a, b)
    return {name: _finite(name, value + b[name], value, b[name]) for name, value in a.items()}


def subtract(a: State, b: State) -> dict[str, Tensor]:
    """`a - b`, likewise."""
    check_same(a, b)
    return {name: _finite(name, value - b[name], value, b[name]) for name, value in a.items()}


def _finite(name: str, found: Tensor, *sources: Tensor) -> Tensor:
    return stored(found, found.dtype, name, *sources)


def widened(state: State) -> dict[str, Tensor]:
    """The tensors, those of half precision in float32.

    Raises:
        UsageError: if there is something else than real numbers.
    """
    check_tensors(state, "a vector")
    return {name: _at_least_float32(value) for name, value in state.items()}


def combined(theta: State, theta0: State, operation: str = "subtract") -> dict[str, Tensor]:
    """What is formed of the floating-point tensors, in at least float32, where theta is.

    Other tensors are left out; those that differ are named in the log. What is the same in both,
    such as a mask of -inf, has difference 0.

    Args:
        theta: fine-tuned weights.
        theta0: pre-trained weights.
        operation: "subtract", "add", "multiply" or "divide". A quotient that is not finite is 0.

    Raises:
        UsageError: if names or shapes differ, or what is formed of finite numbers is not finite.
    """
    check_same(theta, theta0, "fine-tuned and pre-trained weights")
    rest = (n for n in theta if not (takes_part(theta[n]) and takes_part(theta0[n])))
    say_left_out(
        "fine-tuned and pre-trained weights",
        tuple(name for name in rest if not equal(theta[name], theta0[name])),
    )
    form: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "subtract": _difference,
        "add": torch.add,
        "multiply": torch.mul,
        "divide": _quotient,
    }
    found: dict[str, Tensor] = {}
    for name, value in theta.items():
        if takes_part(value) and takes_part(theta0[name]):
            a, b = _at_least_float32(value), _at_least_float32(theta0[name].to(value.device))
            formed = form[operation](a, b)
            found[name] = _finite(name, formed, a, b)
    return found


def difference(theta: State, theta0: State) -> dict[str, Tensor]:
    """`tau = theta - theta0` of the floating-point tensors, in at least float32, where theta is."""
    return combined(theta, theta0)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    found = a - b
    if found.is_meta or bool(torch.isfinite(found.sum())):
        return found
    return torch.where(a == b, torch.zeros_like(found), found)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return (a / b).nan_to_num(0.0, 0.0, 0.0)


def scale(a: State, factor: float | Tensor) -> dict[str, Tensor]:
    """`factor * a`, likewise."""
    return {name: _finite(name, value * factor, value) for name, value in a.items()}


def power(a: State, exponent: float) -> dict[str, Tensor]:
    """`a ** exponent`, by element, likewise."""
    return {name: _finite(name, value**exponent, value) for name, value in a.items()}


def dot(a: State, b: State) -> Tensor:
    """The sum over all elements of `a * b`, accumulated in float64 (float32 on MPS)."""
    check_same(a, b)
    if not a:
        return torch.zeros(())
    return torch.stack([(_wide(value) * _wide(b[name])).sum() for name, value in a.items()]).sum()


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


def norm(a: State) -> Tensor:
    """The Euclidean norm over all elements."""
    return dot(a, a).sqrt()


def move(
    theta: State, tau: State, scaling_coef: float | Tensor = 1.0, tied: Ties | None = None
) -> dict[str, Tensor]:
    """`theta + scaling_coef * tau`, in theta's types; what tau does not have stays as it is.

    A parameter moves under all its names, and names that share memory in theta share it again.
    Derivatives go through all three.

    Args:
        theta: the weights.
        tau: the task vector, with one or all of the names of a parameter.
        scaling_coef: the coefficient, a number or a tensor without dimensions.
        tied: further names of tau's parameters, see `ties`; those that theta shows are known.

    Raises:
        UsageError: if tau has a tensor that theta does not have, of another shape, or two steps for
            one parameter, or if a type of theta cannot hold where a number goes.
    """
    first = joined(ties(theta), tied or {})
    steps = once(tau, first, "the task vector")
    check_part({first.get(name, name): value for name, value in theta.items()}, steps, MOVED)
    moved, done = dict(theta), dict[str, str]()
    for name, base in theta.items():
        whole = first.get(name, name)
        if whole not in steps:
            continue
        twin = done.setdefault(whole, name)
        if twin != name and theta[twin].dtype == base.dtype and equal(theta[twin], base):
            moved[name] = moved[twin]
        else:
            check_same({name: base}, {name: steps[whole]}, MOVED)
            moved[name] = _moved(name, base, steps[whole], scaling_coef)
    return moved


def _moved(name: str, base: Tensor, step: Tensor, scaling_coef: float | Tensor) -> Tensor:
    wide = _at_least_float32(base)
    step = step.to(base.device, torch.promote_types(wide.dtype, _calculated_in(step.dtype)))
    if isinstance(scaling_coef, Tensor):
        wide = wide.to(step.dtype)
        found = torch.addcmul(wide, step, scaling_coef.to(step.device, step.dtype))
    else:
        found = torch.add(wide, step, alpha=scaling_coef)
    return stored(found, base.dtype, name, base)


@torch.no_grad()
def move_into(own: State, theta: State, tau: State, scaling_coef: float) -> None:
    """Makes the tensors of `own` those of `move(theta, tau, scaling_coef)`, in their own memory.

    Args:
        own: the weights to overwrite, of theta's types and on its device.
        theta: the weights to start from; not `own` itself.
        tau: the task vector; what it does not have is left alone in `own`.
        scaling_coef: the coefficient.

    Raises:
        UsageError: if a type of `own` cannot hold where a number goes; `own` is changed by then.
    """
    sums: list[Tensor] = []
    for name, step in tau.items():
        base = theta[name]
        if base.dtype == step.dtype and base.dtype in FULL:
            torch.add(base, step, alpha=scaling_coef, out=own[name])
            sums.append(own[name].sum().to(sums[0].device if sums else base.device, torch.float32))
        else:
            own[name].copy_(_moved(name, base, step, scaling_coef))
    if sums and not bool(torch.isfinite(torch.stack(sums)).all()):
        for name in tau:
            stored(own[name], own[name].dtype, name, theta[name])


def content_hash(state: State) -> str:
    """Hash of what a state contains: sorted names, types, shapes and bytes.

    Args:
        state: the tensors, each of which is asked for once.

    Returns:
        64 hexadecimal digits (SHA-256), the same on every machine.

    Raises:
        UsageError: if there is something else than dense tensors with memory.
    """
    digest = hashlib.sha256()
    for name in sorted(state, key=str):
        check_tensors({name: (value := state[name])})
        if value.is_meta:
            raise UsageError(f"{shown(name)} is on the device meta and has no numbers")
        value = value.detach().cpu()
        head = f"{name}|{value.dtype}|{tuple(value.shape)}|"
        digest.update(head.encode(errors="surrogatepass"))
        if math.prod(value.shape):
            digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    flat = value.clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().data
