"""How many pictures of each split fit into the explorer."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from tangent_arithmetic.run.models import classification_head
from tangent_arithmetic.run.run import Run


def sample_size(run: Run, names: Iterable[str], vectors: int) -> int | None:
    """The largest number of images per split that fits into the page; None if all images do."""
    sizes: list[tuple[int, int]] = []  # number of images, bytes per image
    for name in names:
        head = classification_head(run, name)
        data, classes = run.data.dataset(name), head.weight.shape[0]
        several = data.multilabel
        has_gram = head.normalize and (several or bool(head.bias.any()))
        gram = 8 * (1 + vectors) ** 2 if has_gram else 0
        if name.endswith("Val") and head.normalize and not has_gram:
            gram = 4 * (1 + vectors) * (2 + vectors) // 2  # see `packing.packed_inner`
        labels = 2 * (classes if several else 1)
        sizes.append((len(data.test), 4 * (1 + vectors) * classes + labels + gram))
    limit = int(run.config.explorer_megabytes * 1e6 * 3 / 4)  # base64 turns 3 bytes into 4
    sample = run.config.sample
    most = max(images for images, _ in sizes)
    most = most if sample is None else min(sample, most)

    def excess(count: int) -> int:
        return sum(min(count, images) * each for images, each in sizes) - limit

    if excess(most) <= 0:
        return None if sample is None else most
    return max(1, bisect.bisect_right(range(most), 0, key=excess) - 1)
