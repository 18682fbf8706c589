r"""Pure arithmetic on named tensors.

A state maps names to tensors, for instance \(\theta\) or \(\tau = \theta - \theta_0\). Two
states are paired by name and must have the same names and shapes. Only `copy_into` and `move_into`
change their inputs. A parameter with several names (tied weights) is counted and moved once.
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
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
NARROW = (torch.float16, torch.bfloat16, *FLOAT8)
NARROW_OR_FULL = {*NARROW, *FULL}
MOVED = "weights and task vector"
BOTH = "fine-tuned and pre-trained weights"
TIES = "ties"  # metadata entry: which names are one parameter
LISTED = 8  # names in a message


def check_tensors(state: State, what: str = "the state") -> None:
    """Checks that a state holds only dense tensors.

    Raises:
        UsageError: listing everything else.
    """
    wrong = []
    for name, value in state.items():
        if not isinstance(name, str):
            wrong.append(f"{shown(name)}: a name of type {type(name).__name__}")
        elif not isinstance(value, Tensor):
            wrong.append(f"{shown(name)}: {type(value).__name__}")
        elif value.layout is not torch.strided:
            wrong.append(f"{shown(name)}: a tensor of layout {value.layout}")
    if wrong:
        raise UsageError(f"{what} must hold dense tensors by name, got\n  " + "\n  ".join(wrong))


def check_stored(state: State, what: str = "the state") -> None:
    """Checks that a state holds only dense tensors, with numbers.

    Raises:
        UsageError: listing what is not a dense tensor, or naming one on the meta device.
    """
    check_tensors(state, what)
    for name, value in state.items():
        if value.is_meta:
            raise UsageError(f"{shown(name)} is on the meta device, which holds no numbers")


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
    """Checks that the names of `part` are in `whole`, with the same shapes.

    Raises:
        UsageError: listing all differences, sorted.
    """
    check_same({name: whole[name] for name in part if name in whole}, part, what)


def ties(state: State) -> dict[str, str]:
    """The tied weights of a state: each further name of a tensor -> its first name."""
    first: dict[Any, str] = {}
    firsts = {name: first.setdefault(_memory(value), name) for name, value in state.items()}
    return {name: other for name, other in firsts.items() if other != name}


def _memory(value: Tensor) -> Any:
    """A key that is equal for two names of the same tensor."""
    if value.is_meta or not value.numel():
        return id(value)
    try:
        start = value.data_ptr()
    except RuntimeError:  # under `torch.func` a tensor has no memory
        return id(value)
    return value.device, value.dtype, start, tuple(value.shape), value.stride()


def merge_ties(*several: Ties) -> dict[str, str]:
    """Merges the ties of several states; the first state decides which name represents the rest."""
    first: dict[str, str] = {}

    def root(name: str) -> str:
        while name in first:
            name = first[name]
        return name

    for tied in several:
        for other, name in tied.items():
            a, b = root(other), root(name)
            if a != b:
                first[a] = b
    return {other: root(other) for other in first}


def consistent_ties(tied: Ties, *states: State) -> dict[str, str]:
    """The ties whose two names hold the same numbers in every state."""
    return {
        name: first
        for name, first in tied.items()
        if all(equal(s[name], s[first]) for s in states if name in s and first in s)
    }


def deduplicate(state: State, tied: Ties, what: str) -> dict[str, Tensor]:
    """The state with one name per parameter: the first of its tied names.

    Raises:
        UsageError: if the names of one parameter hold different numbers.
    """
    unique: dict[str, Tensor] = {}
    for name, value in state.items():
        first = tied.get(name, name)
        if first in unique and not equal(unique[first], value):
            raise UsageError(
                f"{shown(first)} and {shown(name)} are one parameter (tied), but {what} has "
                "different numbers for the two; clone one of them in the weights to untie them"
            )
        unique.setdefault(first, value)
    return unique


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, regardless of dtype and device."""
    if a.shape != b.shape or a.is_complex() != b.is_complex():
        return False
    if a is b or a.is_meta or b.is_meta:
        return True
    if a.dtype == b.dtype and a.element_size() == 1:  # torch cannot compare float8
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    elif a.dtype != b.dtype and {a.dtype, b.dtype} <= NARROW_OR_FULL:
        a, b = a.double(), b.double()
    return torch.equal(a, b.to(a.device))


def is_extra(name: str) -> bool:
    """Whether an entry of a state dict is what `nn.Module.get_extra_state` returns, no weight."""
    return name.rpartition(".")[2] == "_extra_state"


def places(read: Callable[[], State], what: str) -> State:
    """The tensors of a model, to write into.

    Args:
        read: gives its tensors.
        what: the model, for the message.

    Raises:
        UsageError: if some are copies: what is written into these never reaches the model.
    """
    state, again = read(), read()
    copies = [name for name, value in state.items() if _is_copy(name, value, again[name])]
    if copies:
        raise UsageError(
            f"expected weights of {shown(what)} that can be set, got copies of {len(copies)}, such "
            f"as {shown(copies[0])}: they are computed from others (LoRA, TaLoS), or its "
            "state_dict() copies them. Set them before they are reparametrised, or in an encoder "
            "without parts that has loaded its weights()"
        )
    return state


def _is_copy(name: str, value: Any, again: Any) -> bool:
    """Whether a tensor of a state is another one when it is read again; not of extra state."""
    if not isinstance(value, Tensor) or is_extra(name):
        return False
    memory = _memory(value)  # a tuple if known
    return isinstance(memory, tuple) and memory != _memory(again)


def copy_into(target: State, theta: State, what: str) -> None:
    """Copies the tensors of theta into those of `target`, in place.

    Args:
        target: the tensors to overwrite; they keep their dtypes and devices.
        theta: the tensors to copy.
        what: a description of both for messages.

    Raises:
        UsageError: if names or shapes differ (all differences are listed), if theta has different
            numbers for two names of one parameter, or numbers that a dtype of `target` cannot hold.
            Nothing is copied then.
    """
    check_same(target, theta, what)
    deduplicate(theta, ties(target), "the copied state")
    with torch.no_grad():
        ready = {name: round_to(theta[name], value.dtype, name) for name, value in target.items()}
        for name, value in target.items():
            value.copy_(ready[name])


def is_real_float(value: Tensor) -> bool:
    """Whether arithmetic applies to a tensor: real floating-point numbers, not block scales."""
    return value.dtype in NARROW_OR_FULL


def warn_excluded(what: str, names: tuple[str, ...]) -> None:
    """Warns of tensors that differ between models but are excluded from the arithmetic."""
    if names:
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        listed = ", ".join(shown(name) for name in names[:LISTED])
        logger.warning(
            f"{what} differ in {listed}{more}, which take no part in the arithmetic: they do not "
            "hold real floating-point numbers in each of them"
        )


_warn_once = functools.cache(warn_excluded)  # not for every vector


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are computed."""
    if dtype in FULL:
        return dtype
    if dtype in NARROW:
        return torch.float32
    if dtype.is_complex or dtype.is_floating_point:
        raise UsageError(f"numbers of type {dtype} take no part in arithmetic; leave them out")
    return torch.float64  # integers


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(_compute_dtype(value.dtype))


def round_to(
    value: Tensor, dtype: torch.dtype, name: str, *sources: Tensor, start: int = 0
) -> Tensor:
    """Rounds numbers to the dtype in which they are stored, within its range.

    Args:
        value: the numbers.
        dtype: the dtype.
        name: the tensor's name, for the message.
        *sources: the operands; where all of them are finite, the result must be, too.
        start: index of the first number in the whole tensor, for the message.

    Raises:
        UsageError: if the dtype cannot hold one of them.
    """
    if value.is_complex() and not dtype.is_complex:
        raise UsageError(f"{shown(name)} is complex, which {dtype} cannot hold")
    rounded = value if value.dtype == dtype else value.to(dtype)
    if (rounded is value and not sources) or value.is_meta or _vectorized():
        return rounded
    if dtype in NARROW_OR_FULL and value.dtype in NARROW_OR_FULL:
        wrong = _out_of_range(value.detach(), rounded.detach(), sources)
    else:
        wrong = rounded.detach().to(value.dtype) != value.detach()
    if wrong is not None and bool(wrong.any()):
        at = int(wrong.reshape(-1).nonzero()[0])
        number = value.detach().reshape(-1)[at].item()
        reason = "which is not finite"
        if math.isfinite(abs(number)):
            reason = f"which {dtype} cannot hold; store it in a wider dtype, such as float32"
        raise UsageError(f"{shown(name)} would be {number:.6g} at index {start + at}, {reason}")
    return rounded


def _out_of_range(value: Tensor, rounded: Tensor, sources: Sequence[Tensor]) -> Tensor | None:
    """A mask of the numbers outside the range of the dtype they were rounded to; None for none."""
    wide = value if value.dtype in FULL else value.float()
    if not wide.numel():
        return None
    least, greatest = torch.aminmax(wide)
    most = torch.finfo(rounded.dtype).max
    if bool((least >= -most) & (greatest <= most)):
        return None
    back = rounded if rounded.dtype in FULL else rounded.float()
    beyond = ~torch.isfinite(back) | (wide.abs() > _largest(rounded.dtype))
    wrong = torch.isfinite(wide) & beyond
    wrong |= torch.isinf(wide) & ~torch.isinf(back)
    if sources:
        finite = [torch.isfinite(_at_least_float32(source.detach())) for source in sources]
        wrong |= functools.reduce(torch.logical_and, finite) & ~torch.isfinite(wide)
    return wrong


@functools.cache
def _largest(dtype: torch.dtype) -> float:
    """The largest number that rounds to a finite one; torch lets some dtypes saturate."""
    info = torch.finfo(dtype)
    if dtype == torch.float64:
        return info.max
    return info.max + 2.0 ** math.floor(math.log2(info.max)) * info.eps / 2


def _vectorized() -> bool:
    """Whether `torch.vmap` is active, under which no value can be inspected."""
    return any(i.key() == TransformType.Vmap for i in retrieve_all_functorch_interpreters())


def add(a: State, b: State) -> dict[str, Tensor]:
    """`a + b`; a UsageError if finite numbers overflow."""
    check_same(a, b)
    return {name: _finite(name, value + b[name], value, b[name]) for name, value in a.items()}


def subtract(a: State, b: State) -> dict[str, Tensor]:
    """`a - b`; a UsageError if finite numbers overflow."""
    check_same(a, b)
    return {name: _finite(name, value - b[name], value, b[name]) for name, value in a.items()}


def _finite(name: str, value: Tensor, *sources: Tensor) -> Tensor:
    return round_to(value, value.dtype, name, *sources)


def widened(state: State) -> dict[str, Tensor]:
    """The tensors in at least float32.

    Raises:
        UsageError: if a tensor does not hold real numbers.
    """
    check_tensors(state, "a vector")
    return {name: _at_least_float32(value) for name, value in state.items()}


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """`a - b`, where equal entries, such as the -inf of an attention mask, have difference 0."""
    tau = a - b
    if tau.is_meta or bool(torch.isfinite(tau.sum())):
        return tau
    return torch.where(a == b, torch.zeros_like(tau), tau)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "subtract": _difference,
    "add": torch.add,
    "multiply": torch.mul,
    "divide": lambda a, b: (a / b).nan_to_num(0.0, 0.0, 0.0),
}


def combine(theta: State, theta0: State, operation: str = "subtract") -> dict[str, Tensor]:
    """Combines the floating-point tensors elementwise, in at least float32, on theta's device.

    Other tensors are left out, with a warning if they differ.

    Args:
        theta: fine-tuned weights.
        theta0: pre-trained weights.
        operation: "subtract", "add", "multiply" or "divide". A quotient that is not finite is 0.

    Raises:
        UsageError: if names or shapes differ, or finite numbers overflow.
    """
    check_same(theta, theta0, BOTH)
    results: dict[str, Tensor] = {}
    excluded: list[str] = []
    for name, value in theta.items():
        if is_real_float(value) and is_real_float(theta0[name]):
            a, b = _at_least_float32(value), _at_least_float32(theta0[name].to(value.device))
            results[name] = _finite(name, OPERATIONS[operation](a, b), a, b)
        elif not equal(value, theta0[name]):
            excluded.append(name)
    _warn_once(BOTH, tuple(excluded))
    return results


def difference(theta: State, theta0: State) -> dict[str, Tensor]:
    """`tau = theta - theta0` of the floating-point tensors, see `combine`."""
    return combine(theta, theta0)


def scale(a: State, factor: float | Tensor) -> dict[str, Tensor]:
    """`factor * a`; a UsageError if finite numbers overflow."""
    return {name: _finite(name, value * factor, value) for name, value in a.items()}


def divide(a: State, divisor: float | Tensor) -> dict[str, Tensor]:
    """`a / divisor`; a UsageError if the divisor is 0, or finite numbers overflow."""
    if not _vectorized() and bool(divisor == 0):
        raise UsageError("a task vector cannot be divided by 0; expected another number")
    return {name: _finite(name, value / divisor, value) for name, value in a.items()}


def power(a: State, exponent: float) -> dict[str, Tensor]:
    """`a ** exponent`, elementwise; a UsageError if finite numbers overflow."""
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
    """`theta + scaling_coef * tau`, in theta's dtypes; tensors that tau lacks are unchanged.

    A parameter moves under all its names, and names that share memory in theta share it again.
    Differentiable in all three.

    Args:
        theta: the weights.
        tau: the task vector, with one or all of the names of a parameter.
        scaling_coef: the coefficient, a number or a scalar tensor.
        tied: further names of tau's parameters, see `ties`; the ties of theta are detected.

    Raises:
        UsageError: if tau has a tensor that theta lacks, or of another shape, or two steps for one
            parameter, or if a dtype of theta cannot hold a result.
    """
    first = merge_ties(ties(theta), tied or {})
    steps = deduplicate(tau, first, "the task vector")
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


def in_range(coef: float, dtype: torch.dtype) -> float:
    """The coefficient, checked.

    Raises:
        UsageError: if it is finite but beyond the range of the dtype it is multiplied in.
    """
    most = torch.finfo(dtype).max
    if most < abs(coef) < math.inf:
        raise UsageError(
            f"coefficient {coef:g} is beyond the range of {dtype}; expected at most {most:.3g} in "
            "absolute value, or weights in float64"
        )
    return coef


def _moved(name: str, base: Tensor, step: Tensor, scaling_coef: float | Tensor) -> Tensor:
    wide = _at_least_float32(base)
    step = step.to(base.device, torch.promote_types(wide.dtype, _compute_dtype(step.dtype)))
    if isinstance(scaling_coef, Tensor):
        wide = wide.to(step.dtype)
        moved = torch.addcmul(wide, step, scaling_coef.to(step.device, step.dtype))
    else:
        moved = torch.add(wide, step, alpha=in_range(scaling_coef, step.dtype))
    return round_to(moved, base.dtype, name, base)


@torch.no_grad()
def move_into(target: State, theta: State, tau: State, scaling_coef: float) -> None:
    """Writes `move(theta, tau, scaling_coef)` into the tensors of `target`, in place.

    Args:
        target: the weights to overwrite, with theta's dtypes and device.
        theta: the weights to start from; not `target` itself.
        tau: the task vector; tensors of `target` that it lacks are left alone.
        scaling_coef: the coefficient.

    Raises:
        UsageError: if a dtype of `target` cannot hold a result; `target` has changed by then.
    """
    sums: list[Tensor] = []
    for name, step in tau.items():
        base = theta[name]
        if base.dtype == step.dtype and base.dtype in FULL:
            torch.add(base, step, alpha=in_range(scaling_coef, step.dtype), out=target[name])
            sums.append(
                target[name].sum().to(sums[0].device if sums else base.device, torch.float32)
            )
        else:
            target[name].copy_(_moved(name, base, step, scaling_coef))
    if sums and not bool(torch.isfinite(torch.stack(sums)).all()):
        for name in tau:
            round_to(target[name], target[name].dtype, name, theta[name])


def content_hash(state: State) -> str:
    """SHA-256 of a state: sorted names, dtypes, shapes and bytes; the same on every machine.

    Returns:
        64 hexadecimal digits.

    Raises:
        UsageError: if a value is not a dense tensor with memory.
    """
    digest = hashlib.sha256()
    for name in sorted(state, key=str):
        check_stored({name: (value := state[name])})
        value = value.detach().cpu().resolve_neg().resolve_conj()
        head = f"{name}|{value.dtype}|{tuple(value.shape)}|"
        digest.update(head.encode(errors="surrogatepass"))
        if value.numel():
            flat = value.clone(memory_format=torch.contiguous_format).reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
