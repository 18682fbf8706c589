r"""Pure arithmetic on named tensors.

A state is a mapping from names to tensors, such as \(\theta\) or \(\tau = \theta - \theta_0\).
Nothing but `copy_into` and `move_into` changes its inputs; two states are paired by name, never by
position, and must have the same names and shapes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def check_same(a: State, b: State, what: str = "states") -> None:
    """Checks that two states have the same names and shapes.

    Raises:
        ValueError: listing all differences, sorted.
    """
    problems = [f"only in the first: {name}" for name in sorted(a.keys() - b.keys())]
    problems += [f"only in the second: {name}" for name in sorted(b.keys() - a.keys())]
    problems += [
        f"{name}: shape {tuple(a[name].shape)} against {tuple(b[name].shape)}"
        for name in sorted(a.keys() & b.keys())
        if a[name].shape != b[name].shape
    ]
    if problems:
        raise ValueError(f"{what} do not match:\n  " + "\n  ".join(problems))


def check_part(whole: State, part: State, what: str) -> None:
    """Checks that a state has no other names than another one, and its shapes.

    Raises:
        ValueError: listing all differences, sorted.
    """
    check_same({name: whole[name] for name in part if name in whole}, part, what)


def copy_into(own: State, theta: State, what: str) -> None:
    """Copies the tensors of theta into those of `own`, in place.

    Args:
        own: what is overwritten; keeps its types and devices.
        theta: what is copied.
        what: the two of them, for the message.

    Raises:
        ValueError: if names or shapes differ, listing all differences.
    """
    check_same(own, theta, what)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(theta[name])


def floating(state: State) -> dict[str, Tensor]:
    """The tensors that arithmetic applies to: floating-point ones."""
    return {name: value for name, value in state.items() if value.is_floating_point()}


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def add(a: State, b: State) -> dict[str, Tensor]:
    """`a + b`."""
    check_same(a, b)
    return {name: value + b[name] for name, value in a.items()}


def subtract(a: State, b: State) -> dict[str, Tensor]:
    """`a - b`."""
    check_same(a, b)
    return {name: value - b[name] for name, value in a.items()}


def widened(state: State) -> dict[str, Tensor]:
    """The tensors, those of half precision in float32."""
    return {name: _at_least_float32(value) for name, value in state.items()}


def combined(theta: State, theta0: State, operation: str = "subtract") -> dict[str, Tensor]:
    """What is formed of the floating-point tensors, in at least float32, where theta is.

    Args:
        theta: fine-tuned weights.
        theta0: pre-trained weights.
        operation: "subtract", "add", "multiply" or "divide". A quotient that is not finite is 0.
    """
    check_same(theta, theta0, "fine-tuned and pre-trained weights")
    form: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "subtract": torch.sub,
        "add": torch.add,
        "multiply": torch.mul,
        "divide": _quotient,
    }
    return {
        name: form[operation](
            _at_least_float32(value), _at_least_float32(theta0[name].to(value.device))
        )
        for name, value in floating(theta).items()
    }


def difference(theta: State, theta0: State) -> dict[str, Tensor]:
    """`tau = theta - theta0` of the floating-point tensors, in at least float32, where theta is."""
    return combined(theta, theta0)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return (a / b).nan_to_num(0.0, 0.0, 0.0)


def scale(a: State, factor: float | Tensor) -> dict[str, Tensor]:
    """`factor * a`."""
    return {name: value * factor for name, value in a.items()}


def power(a: State, exponent: float) -> dict[str, Tensor]:
    """`a ** exponent`, by element."""
    return {name: value**exponent for name, value in a.items()}


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


def move(theta: State, tau: State, scaling_coef: float = 1.0) -> dict[str, Tensor]:
    """`theta + scaling_coef * tau`, in theta's types; what tau does not have stays as it is.

    Raises:
        ValueError: if tau has a tensor that theta does not have, or of another shape.
    """
    check_part(theta, tau, "weights and task vector")
    moved = dict(theta)
    for name, step in tau.items():
        base = theta[name]
        moved[name] = _moved(base, step, scaling_coef)
    return moved


def _moved(base: Tensor, step: Tensor, scaling_coef: float) -> Tensor:
    wide = _at_least_float32(base)
    step = step.to(base.device, torch.promote_types(wide.dtype, step.dtype))
    return torch.add(wide, step, alpha=scaling_coef).to(base.dtype)


@torch.no_grad()
def move_into(own: State, theta: State, tau: State, scaling_coef: float) -> None:
    """Makes the tensors of `own` those of `move(theta, tau, scaling_coef)`, in their own memory.

    Args:
        own: the weights to overwrite, of theta's types and on its device.
        theta: the weights to start from; not `own` itself.
        tau: the task vector; what it does not have is left alone in `own`.
        scaling_coef: the coefficient.
    """
    for name, step in tau.items():
        base = theta[name]
        if base.dtype == step.dtype == _at_least_float32(base).dtype:
            torch.add(base, step, alpha=scaling_coef, out=own[name])
        else:
            own[name].copy_(_moved(base, step, scaling_coef))


def content_hash(state: State) -> str:
    """Hash of what a state contains: sorted names, types, shapes and bytes.

    Returns:
        64 hexadecimal digits (SHA-256), the same on every machine.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        if math.prod(value.shape):
            digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    flat = value.clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().data
