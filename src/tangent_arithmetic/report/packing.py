"""The logits of a split as JSON, for the explorer's script, and back."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tangent_arithmetic.arithmetic.logits import Logits

INNER = "<f4"  # inner products for the norms of features, upper triangles
KINDS = {"base": "<f4", "steps": "<f4", "labels": "<i2", "bias": "<f4", "gram": "<f8"}


def packed(name: str, logits: Logits) -> dict[str, Any]:
    """The logits of a split, in the format of the page's script."""
    return {
        "name": name,
        "task": name.removesuffix("Val"),
        "split": "validation" if name.endswith("Val") else "test",
        "images": len(logits.labels),
        "of": logits.of,
        "classes": logits.base.shape[1],
        "multilabel": logits.labels.ndim == 2,
        **{kind: _written(getattr(logits, kind), dtype) for kind, dtype in KINDS.items()},
    }


def packed_inner(inner: torch.Tensor | None) -> str | None:
    """Inner products in the format of the page's script: the upper triangles, by rows.

    Args:
        inner: symmetric matrices (images, 1+vectors, 1+vectors); None if the head does not
            normalise.
    """
    if inner is None:
        return None
    rows, columns = torch.triu_indices(inner.shape[1], inner.shape[2])
    return _written(inner[:, rows, columns], INNER)


def _written(value: torch.Tensor | None, dtype: str) -> str | None:
    if value is None:
        return None
    return base64.b64encode(value.numpy().astype(dtype).tobytes()).decode()


def unpacked(split: Mapping[str, Any], vectors: Sequence[str]) -> Logits:
    """The inverse of `packed`."""
    n, classes, t = split["images"], split["classes"], len(vectors)
    shapes = {
        "base": (n, classes),
        "steps": (t, n, classes),
        "labels": (n, classes) if split.get("multilabel") else (n,),
        "bias": (classes,),
        "gram": (n, 1 + t, 1 + t),
    }
    parts: dict[str, Any] = dict.fromkeys(KINDS)
    for kind, shape in shapes.items():
        if split[kind] is not None:
            array = np.frombuffer(base64.b64decode(split[kind]), KINDS[kind]).reshape(shape)
            parts[kind] = torch.from_numpy(array.copy())
    labels = parts["labels"]
    parts["labels"] = labels.byte() if labels.ndim == 2 else labels.long()
    return Logits(dataset=split["name"], vectors=tuple(vectors), of=split["of"], **parts)
