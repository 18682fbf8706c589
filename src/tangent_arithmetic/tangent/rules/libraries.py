"""Operators of other libraries, by their qualified names, so that nothing is imported for them.

All are linear in what they sample or weight; positions (boxes, offsets) have no tangents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.tangent.rules.registry import Push, Tangent, rule, total


def _refuse(d: Tangent, position: Tensor, name: str) -> None:
    if d(position) is not None:
        raise NotImplementedError(f"{name} has no forward AD in its positions.")


@rule("torchvision::roi_align")
def roi_align(input: Tensor, rois: Tensor, *options: Any) -> tuple[Tensor, Push]:
    """Features of regions, linear in the feature map."""
    operator = torch.ops.torchvision.roi_align

    def push(d: Tangent) -> Tensor:
        _refuse(d, rois, "roi_align")
        return operator(d(input), rois, *options)  # type: ignore[no-any-return]

    return operator(input, rois, *options), push


@rule("torchvision::deform_conv2d")
def deform_conv2d(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *options: Any
) -> tuple[Tensor, Push]:
    """Deformable convolution, linear in each of input, weight and mask, affine in the bias."""
    operator = torch.ops.torchvision.deform_conv2d

    def push(d: Tangent) -> Tensor | None:
        _refuse(d, offset, "deform_conv2d")
        dx, dweight, dmask, dbias, zero = (
            d(input),
            d(weight),
            d(mask),
            d(bias),
            torch.zeros_like(bias),
        )
        if dweight is None and dbias is not None:
            dweight = torch.zeros_like(weight)
        shift = zero if dbias is None else dbias
        return total(
            None if dx is None else operator(dx, weight, offset, mask, zero, *options),
            None if dweight is None else operator(input, dweight, offset, mask, shift, *options),
            None if dmask is None else operator(input, weight, offset, dmask, zero, *options),
        )

    return operator(input, weight, offset, mask, bias, *options), push
