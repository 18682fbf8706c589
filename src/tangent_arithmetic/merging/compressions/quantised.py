r"""Quantised task vectors: b-bit integers with a scale and a zero point per tensor."""

from __future__ import annotations

from torch import Tensor

from tangent_arithmetic.merging.compressing import Code, compression, width_of
from tangent_arithmetic.merging.registry import Piece
from tangent_arithmetic.runtime.errors import UsageError

MOST = 16  # bits; the error of more is that of float32
ZERO_POINT = 32  # bits of a zero point


def quantised(values: Tensor, bits: int) -> Tensor:
    r"""Numbers after rounding to \(2^b\) equal steps from the smallest to the largest."""
    low, high = values.aminmax()
    step = (high - low) / (2**bits - 1)
    if step == 0:  # all numbers are equal; the step is that number, and the integers are 1
        return values.clone()
    zero = -(low / step).round()
    integers = ((values / step).round() + zero).clamp(0, 2**bits - 1)
    decoded: Tensor = (integers - zero) * step
    return decoded


@compression("quantised", source="arXiv:2503.06921", whole=True)
def quantised_task_vector(piece: Piece, index: int, *, bits: int = 4) -> Code:
    r"""\(\hat\tau_t = \Delta (q - z)\) with integers q of b bits, tensor by tensor.

    \(q = \operatorname{clip}(\lfloor \tau_t / \Delta \rceil + z, 0, 2^b - 1)\) with the step
    \(\Delta = (\max \tau_t - \min \tau_t) / (2^b - 1)\) and the zero point
    \(z = -\lfloor \min \tau_t / \Delta \rceil\). A step is stored as one number, z with 32 bits.
    The paper's residual variant, in which tasks share a base vector, is not here.

    Args:
        piece: one tensor of every model.
        index: t.
        bits: b, from 1 to 16.

    Source: Kim et al., "Task Vector Quantization for Memory-Efficient Model Merging",
    arXiv:2503.06921.
    """
    if not 1 <= bits <= MOST:
        raise UsageError(f"quantised's bits must be from 1 to {MOST}, got {bits}")
    tau = piece.tau(index)
    return Code(quantised(tau, bits), bits=bits * len(tau) + width_of(piece) + ZERO_POINT)
