r"""LiNeS: task arithmetic whose coefficient grows linearly with the depth of the layer."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, Pieces, merging_method
from tangent_arithmetic.merging.spectral import mean_tau
from tangent_arithmetic.runtime.errors import UsageError, shown

NUMBERED = re.compile(r"(.*[^.\d])(\d+)")  # "layer2", which is beside "layer1"


def lists_of(name: str) -> Iterator[tuple[str, tuple[int, int], str]]:
    """The lists of modules that a tensor is in, the outermost first.

    Lists beside each other that a number tells apart, such as `layer1` and `layer2` of a ResNet,
    are one.

    Returns:
        For each its name, the index there, and the tensor's name within the element.
    """
    words = name.split(".")
    for i, word in enumerate(words):
        if word.isdigit():
            owner = ".".join(words[:i])
            beside = NUMBERED.fullmatch(owner)
            stack, number = beside.groups() if beside else (owner, 0)
            yield stack, (int(number), int(word)), ".".join(words[i + 1 :])


def depths(names: Collection[str]) -> dict[str, float]:
    """The depth of each tensor: 0 in the first block of its list and outside, 1 in the last.

    Of nested lists, blocks are the elements of the outermost one in which several have a tensor of
    one name; a model in a list of its own, as in sentence-transformers, is no block. Where no list
    has such tensors, it is the outermost one with several elements.

    Raises:
        UsageError: if no list has several elements.
    """
    lists = {name: list(lists_of(name)) for name in names}
    within = Counter((stack, rest) for each in lists.values() for stack, _, rest in each)
    alike = {stack for (stack, _), number in within.items() if number > 1}
    indices: dict[str, set[tuple[int, int]]] = {}
    for stack, index, _ in itertools.chain.from_iterable(lists.values()):
        indices.setdefault(stack, set()).add(index)
    depth = {
        (stack, index): rank / (len(known) - 1)
        for stack, known in indices.items()
        if len(known) > 1
        for rank, index in enumerate(sorted(known))
    }
    if not depth:
        raise UsageError(
            "LiNeS scales by the depth of blocks, and the names of these weights number none, such "
            f"as layers.0.weight and layers.1.weight; got {shown(min(names, default=''))} and "
            "others. Choose a method without depth, such as task_arithmetic"
        )

    def of(name: str) -> float:
        blocks = [(stack, index) for stack, index, _ in lists[name] if (stack, index) in depth]
        blocks.sort(key=lambda block: block[0] not in alike)
        return depth[blocks[0]] if blocks else 0.0

    return {name: of(name) for name in names}


def growth(num_tasks: int, beta: float, depth: float) -> float:
    """The coefficient of a tensor divided by that of the first block, 1 / num_tasks."""
    return 1 + num_tasks * beta * depth


def prepare(pieces: Pieces, **_options: Any) -> dict[str, float]:
    """The depth of each tensor."""
    return depths({piece.name for piece in pieces()})


@merging_method(
    "lines_task_arithmetic",
    source="arXiv:2410.17146",
    prepare=prepare,
    passes=2,
    coefficient="beta",
    scales=False,
)
def lines_task_arithmetic(
    piece: Piece, *, beta: float = 0.5, statistics: dict[str, float]
) -> Tensor:
    r"""\(\theta = \theta_0 + (\alpha + \beta \frac{l - 1}{L - 1}) \sum_t \tau_t\) in block l of L.

    \(\alpha = 1 / T\), the coefficient of the mean, which tensors outside of the blocks have, and
    those of the first one. The paper's \(\alpha\) for another merged vector is the norm of the sum
    divided by T and by the norm of that vector.

    Args:
        piece: one piece of every model.
        beta: what the last block has beyond alpha; the paper chooses it on validation.
        statistics: the result of `prepare`.

    Source: Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model
    Merging", arXiv:2410.17146, sections 4 and 5.2.
    """
    factor = growth(len(piece.thetas), beta, statistics[piece.name])
    return mean_tau(piece).mul_(factor).add_(piece.base)
