r"""Directions: task vectors restricted to groups of parameters, one coefficient each.

| grouping | a coefficient for each |
|---|---|
| task | task |
| layer | layer, shared by all tasks |
| task-layer | layer of each task |
| block | parameter tensor of each task, the "blocks" of aTLAS (arXiv:2407.02880) |
| a regular expression | distinct match in a parameter's name, of each task; "rest" for no match |

Layers follow from the names of the parameters: the embedding, each block, the head. A block is an
element of a list of modules, such as `resblocks.3`, that has modules of its own. Of nested lists it
is the outermost one whose elements are alike, so that a model in a list of its own, as in
sentence-transformers, is no block. Parameters of no block belong to the embedding if their module
comes before the blocks, else to the head. Those that are beside the modules, whose place says
nothing, belong to the embedding unless they are named like a projection.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.statedict import State, add

GROUPINGS = ("task", "layer", "task-layer", "block")
EMBEDDING, HEAD, REST = "embedding", "head", "rest"
INDEX = re.compile(r"(?<![^._])\d+(?=\.[^.]+\.[^.])")  # with a module below it and its tensor
PROJECTION = re.compile(r"^(proj|head|heads|.*_projection|fc|classifier)$")


@dataclass(frozen=True)
class Direction:
    """A task vector restricted to a group of parameters.

    Attributes:
        task: the task; None if all tasks share the coefficient.
        group: the layer, tensor or match; None for all parameters.
        vector: tau by name, of these parameters alone.
    """

    task: str | None
    group: str | None
    vector: State

    @property
    def name(self) -> str:
        """`TASK`, `GROUP` or `TASK/GROUP`."""
        return "/".join(part for part in (self.task, self.group) if part is not None)


def directions(
    vectors: Mapping[str, State], grouping: str, order: Sequence[str] | None = None
) -> list[Direction]:
    """The directions of a grouping; those of a task are in the order of its groups.

    Args:
        vectors: task vectors by task.
        grouping: one of `GROUPINGS`, or a regular expression.
        order: all names of the model's parameters in the order of its modules; None for that of
            the first vector.

    Raises:
        UsageError: for an invalid regular expression, or one that matches no parameter.
    """
    names = list(order or next(iter(vectors.values())))
    if grouping == "task":
        return [Direction(task, None, tau) for task, tau in vectors.items()]
    group_of = grouped(grouping, names)
    groups = dict.fromkeys(group_of(name) for name in names)
    if grouping in ("layer", "task-layer"):
        groups = dict.fromkeys(by_layer(names))
    parts = [
        Direction(task, group, {n: v for n, v in tau.items() if group_of(n) == group})
        for task, tau in vectors.items()
        for group in groups
    ]
    parts = [part for part in parts if part.vector]
    if grouping != "layer":
        return parts
    return [Direction(None, g, _sum(p.vector for p in parts if p.group == g)) for g in groups]


def along(vectors: Sequence[State], coefs: Iterable[float]) -> dict[str, Tensor]:
    """The sum of coefs[k] * vectors[k]."""
    total: dict[str, Tensor] = {}
    for coef, tau in zip(coefs, vectors, strict=True):
        for name, value in tau.items():
            step = float(coef) * value
            total[name] = total[name] + step if name in total else step
    return total


def check_grouping(grouping: str) -> str:
    """The grouping, if it is a name or a valid regular expression.

    Raises:
        UsageError: otherwise.
    """
    try:
        re.compile(grouping)
    except re.error as error:
        raise UsageError(
            f"--coefficients: expected {', '.join(GROUPINGS)} or a regular expression of names of "
            f"parameters, got '{shown(grouping)}' ({error})"
        ) from error
    return grouping


def layers(names: Sequence[str]) -> dict[str, str]:
    """The layer of each parameter.

    Args:
        names: of all parameters, in the order of the modules that own them.
    """
    blocks = places(names)
    if not blocks:  # each module is a layer of its own
        return {name: name.rpartition(".")[0] or name for name in names}
    stacks = {stack for stack, _ in blocks.values()}
    alone = len(stacks) == 1
    last = max(i for i, name in enumerate(names) if name in blocks)
    root = min(stacks, key=len)
    labels = {}
    for i, name in enumerate(names):
        if name in blocks:
            stack, index = blocks[name]
            last_word = stack.rstrip("._").rpartition(".")[2]
            labels[name] = f"block {index}" if alone else f"{last_word}.{index}"
        else:
            labels[name] = HEAD if i > last or _projects(name, root) else EMBEDDING
    return labels


def places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The block of each parameter that is in one: the name of its list, and its index there."""
    lists = {
        name: [(name[: m.start()], m[0], name[m.end() :]) for m in INDEX.finditer(name)]
        for name in names
    }
    elements = {element for each in lists.values() for element in each}
    number = Counter((stack, rest) for stack, _, rest in elements)
    alike = {stack for (stack, _), count in number.items() if count > 1}
    found = {}
    for name, each in lists.items():
        blocks = [(stack, index) for stack, index, _ in each if stack in alike]
        blocks += [e[:2] for e in each if not any(stack.startswith(e[0]) for stack in alike)]
        if blocks:
            found[name] = blocks[0]
    return found


def by_layer(names: Sequence[str]) -> dict[str, list[str]]:
    """The parameters of each layer, with layers in the order of a forward pass.

    Args:
        names: of all parameters, in the order of the modules that own them.
    """
    layer_of = layers(names)
    order = sorted(dict.fromkeys(layer_of.values()), key=lambda g: (g == HEAD, g != EMBEDDING))
    members: dict[str, list[str]] = {layer: [] for layer in order}
    for name, layer in layer_of.items():
        members[layer].append(name)
    return members


def _projects(name: str, root: str) -> bool:
    """Whether a parameter beside the modules of the blocks is named like a projection."""
    owner, _, leaf = name.rpartition(".")
    return root.startswith(f"{owner}." if owner else "") and bool(PROJECTION.match(leaf))


def grouped(grouping: str, names: Sequence[str]) -> Callable[[str], str]:
    """The function from a parameter's name to its group.

    Args:
        grouping: one of `GROUPINGS` except "task", or a regular expression.
        names: of all parameters, in the order of the modules that own them.

    Raises:
        UsageError: for an invalid regular expression, or one that matches no parameter.
    """
    if grouping == "block":
        return lambda name: name
    if grouping in ("layer", "task-layer"):
        table = layers(names)
        return lambda name: table[name]
    pattern = re.compile(check_grouping(grouping))
    if not any(pattern.search(name) for name in names):
        raise UsageError(
            f"--coefficients='{shown(grouping)}' matches the name of no parameter; expected "
            f"{', '.join(GROUPINGS)}, or a regular expression of names such as {shown(names[-1])}"
        )

    def matched(name: str) -> str:
        found = pattern.search(name)
        if found is None:
            return REST
        return ".".join(part for part in found.groups() if part) or found[0] or REST

    return matched


def _sum(vectors: Iterable[State]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for tau in vectors:
        total = add(total, tau) if total else dict(tau)
    return total
