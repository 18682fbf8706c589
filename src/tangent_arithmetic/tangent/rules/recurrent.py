r"""Recurrent layers: \(h_t = \phi(a_t, h_{t-1})\) with gates \(a_t = W x_t + U h_{t-1} + b\).

The value comes from PyTorch's fused kernel. Since it gives all \(h_t\), the gates and the terms
\(dW x_t + W dx_t + dU h_{t-1} + db\) of all times are single products; only
\(U\, dh_{t-1}\) is left to a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from tangent_arithmetic.tangent.rules.registry import Push, Tangent, composite, rule, total

KINDS: dict[str, Callable[..., Any]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "tanh": torch.rnn_tanh,
    "relu": torch.rnn_relu,
}


def recurrent_layer(kind: str, x: Tensor, start: Tensor, *weights: Tensor) -> Tensor:
    """One layer in one direction.

    Args:
        kind: a key of `KINDS`.
        x: inputs, shape (times, batch, inputs).
        start: h_0, and c_0 of an LSTM, shape (1 or 2, batch, units).
        *weights: W, U and, if there are biases, b and c of PyTorch's two products.

    Returns:
        All h_t, and an LSTM's last c, shape (times, or times + 1, batch, units).
    """
    if has_torch_function((x, start, *weights)):
        result: Tensor = handle_torch_function(
            recurrent_layer, (x, start, *weights), kind, x, start, *weights
        )
        return result
    return _value(kind, x, start, weights)


def _value(kind: str, x: Tensor, start: Tensor, weights: Sequence[Tensor]) -> Tensor:
    options = (list(weights), len(weights) == 4, 1, 0.0, False, False, False)
    if kind == "lstm":
        h, _, c = torch.lstm(x, (start[:1], start[1:]), *options)
        return torch.cat((h, c))
    out: Tensor = KINDS[kind](x, start, *options)[0]
    return out


@rule(recurrent_layer)
def layer_and_tangent(kind: str, x: Tensor, start: Tensor, *weights: Tensor) -> tuple[Tensor, Push]:
    """One layer in one direction, see `recurrent_layer`."""
    out = _value(kind, x, start, weights)
    w, u = weights[:2]
    b, c = weights[2:] or (None, None)

    def push(d: Tangent) -> Tensor | None:
        times = len(x)
        h = torch.cat((start[:1], out[: times - 1]))  # before each time
        dx, dstart = d(x), d(start)
        dstart = torch.zeros_like(start) if dstart is None else dstart
        db, dc = (None if v is None else d(v) for v in (b, c))
        steps = [_linear(d(w), x, db), _linear(d(u), h, dc), _linear(w, dx, None)]
        shape = (*h.shape[:-1], len(w))
        from_x = total(*(s.expand(shape) for s in (steps[0], steps[2]) if s is not None))
        from_h = None if steps[1] is None else steps[1].expand(shape)
        zero = h.new_zeros(shape)
        from_x, from_h = (zero if step is None else step for step in (from_x, from_h))
        gates = F.linear(x, w, b), F.linear(h, u, c)
        return TANGENTS[kind](_Terms(*gates, from_x, from_h, u, out, start, dstart))

    return out, push


@dataclass(frozen=True)
class _Terms:
    """What the tangent of a layer follows from.

    Attributes:
        x: W x + b, shape (times, batch, gates * units).
        h: U h + c, of the same shape; h of the time before.
        dx: the tangent of `x`.
        dh: the tangent of `h` without U dh.
        u: U, shape (gates * units, units).
        out: what `recurrent_layer` returns.
        start: the initial state.
        dstart: its tangent.
    """

    x: Tensor
    h: Tensor
    dx: Tensor
    dh: Tensor
    u: Tensor
    out: Tensor
    start: Tensor
    dstart: Tensor


def _linear(weight: Tensor | None, x: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """`weight x + bias`, of which either term may be zero."""
    if weight is None or x is None:
        return bias
    return F.linear(x, weight, bias)


def _rnn_tangent(slope: Callable[[Tensor], Tensor]) -> Callable[[_Terms], Tensor]:
    def tangent(t: _Terms) -> Tensor:
        slopes, step, dh = slope(t.out), t.dx + t.dh, t.dstart[0]
        steps = []
        for k in range(len(step)):
            dh = slopes[k] * torch.addmm(step[k], dh, t.u.T)
            steps.append(dh)
        return torch.stack(steps)

    return tangent


def _lstm_tangent(t: _Terms) -> Tensor:
    i, f, g, o = (t.x + t.h).chunk(4, dim=-1)  # (times, batch, units)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = [t.start[1]]
    for k in range(len(i)):
        cells.append(torch.addcmul(i[k] * g[k], f[k], cells[-1]))
    before, now = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh()
    # dc_t = f_t dc_{t-1} + the products of the gates' tangents with these, and dh_t likewise
    to_cell = torch.stack((g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)), dim=2)
    to_output, from_cell = now * o * (1 - o), o * (1 - now * now)
    step, dh, dc = t.dx + t.dh, t.dstart[0], t.dstart[1]
    steps = []
    for k in range(len(step)):
        da = torch.addmm(step[k], dh, t.u.T).unflatten(-1, (4, -1))  # (batch, 4, units)
        dc = torch.addcmul((to_cell[k] * da[:, :3]).sum(dim=1), f[k], dc)
        dh = torch.addcmul(to_output[k] * da[:, 3], from_cell[k], dc)
        steps.append(dh)
    return torch.stack([*steps, dc])


def _gru_tangent(t: _Terms) -> Tensor:
    before = torch.cat((t.start, t.out[:-1]))
    (rx, zx, nx), (rh, zh, nh) = t.x.chunk(3, dim=-1), t.h.chunk(3, dim=-1)
    r, z = (rx + rh).sigmoid(), (zx + zh).sigmoid()
    n = (nx + r * nh).tanh()
    # h_t = (1 - z) n + z h_{t-1}
    to_n = (1 - z) * (1 - n * n)
    to_r, to_z = to_n * nh * r * (1 - r), (before - n) * z * (1 - z)
    dh, steps = t.dstart[0], []
    for k in range(len(r)):
        drx, dzx, dnx = t.dx[k].chunk(3, dim=-1)
        drh, dzh, dnh = torch.addmm(t.dh[k], dh, t.u.T).chunk(3, dim=-1)
        dh = (
            to_r[k] * (drx + drh) + to_z[k] * (dzx + dzh) + to_n[k] * (dnx + r[k] * dnh) + z[k] * dh
        )
        steps.append(dh)
    return torch.stack(steps)


TANGENTS: dict[str, Callable[[_Terms], Tensor]] = {
    "lstm": _lstm_tangent,
    "gru": _gru_tangent,
    "tanh": _rnn_tangent(lambda h: 1 - h * h),
    "relu": _rnn_tangent(lambda h: (h > 0).to(h.dtype)),
}


def _layers(
    kind: str,
    input: Tensor,
    states: tuple[Tensor, ...],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """Layers and directions one by one, as PyTorch's functional returns them."""
    directions, size = 1 + bidirectional, 4 if has_biases else 2
    if (train and dropout > 0) or len(params) != num_layers * directions * size:
        return NotImplemented  # random masks; projections
    x = input.transpose(0, 1) if batch_first else input
    ends: list[list[Tensor]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            start = torch.stack([state[place] for state in states])
            weights = params[place * size : (place + 1) * size]
            out = recurrent_layer(kind, x.flip(0) if direction else x, start, *weights)
            h, last = out[: len(x)], out[len(x) - 1 :]
            ends.append(list(last.unbind(0)))
            outputs.append(h.flip(0) if direction else h)
        x = torch.cat(outputs, dim=-1) if bidirectional else outputs[0]
    final = [torch.stack(column) for column in zip(*ends, strict=True)]
    return (x.transpose(0, 1) if batch_first else x, *final)


@composite(KINDS["lstm"])
def lstm(input: Tensor, hx: Any, params: Any, *options: Any, **named: Any) -> Any:
    """LSTM layers; packed sequences are left to PyTorch."""
    if not isinstance(params, list | tuple) or isinstance(hx, Tensor) or named:
        return NotImplemented
    return _layers("lstm", input, tuple(hx), params, *options)


def _register(kind: str) -> None:
    @composite(KINDS[kind])
    def layers(input: Tensor, hx: Tensor, params: Any, *options: Any, **named: Any) -> Any:
        if not isinstance(params, list | tuple) or named:
            return NotImplemented
        return _layers(kind, input, (hx,), params, *options)


for _kind in ("gru", "tanh", "relu"):
    _register(_kind)
