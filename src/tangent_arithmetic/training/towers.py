"""The blocks of a vision tower, found by its structure, and what comes after one of them."""

from __future__ import annotations

import re

from torch import nn

from tangent_arithmetic.tangent.linearized import LinearizedModel

LISTS = (nn.Sequential, nn.ModuleList)
BETWEEN = "Merg|Downsampl|Embed|Stem|Pool|Head"  # in names of classes that are no blocks
AFTER = "proj|head"  # parameters of a tower itself, not of a layer, that are used after its blocks


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks by name, in the order of the tower.

    A block is an item of a `Sequential` or `ModuleList` that has layers of its own (a transformer
    layer, a bottleneck). A stage, whose blocks are such a list, counts as these.

    Args:
        model: the model; of a linearised one, the model that it expands.
    """
    model = model.module0() if isinstance(model, LinearizedModel) else model
    blocks = list[tuple[str, nn.Module]]()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in blocks)
        owner = model.get_submodule(name.rpartition(".")[0])
        if name and not inside and isinstance(owner, LISTS) and _is_block(module):
            blocks.append((name, module))
    return blocks


def _is_block(module: nn.Module) -> bool:
    stage = any(_is_row(child) for child in module.children())
    return _is_composite(module) and not stage and not re.search(BETWEEN, type(module).__name__)


def _is_composite(module: nn.Module) -> bool:
    """Whether a module has layers with parameters, and is no mere list of them."""
    layers = (child for child in module.children() if any(True for _ in child.parameters()))
    return not isinstance(module, LISTS) and any(True for _ in layers)


def _is_row(module: nn.Module) -> bool:
    """Whether a module is a list of blocks of one class."""
    items = list(module.children())
    alike = len({type(item) for item in items}) == 1 and all(map(_is_composite, items))
    return isinstance(module, LISTS) and alike


def after_block(model: nn.Module, block: str) -> set[str]:
    """The names of the parameters of a block and of what comes after it.

    Layers come in the order in which they are registered, which in the towers of open_clip, timm,
    torchvision and transformers is the order of use. A parameter that is no layer's own (a class
    token, positions, a projection) comes before the blocks unless its name has `AFTER`.

    Args:
        model: the tower, or its linearisation.
        block: the name of the block.
    """
    model = model.module0() if isinstance(model, LinearizedModel) else model
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    kept = set[str]()
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        above = owner == "" or block.startswith(f"{owner}.")
        if re.search(AFTER, leaf) if above else order[owner] >= order[block]:
            kept.add(name)
    return kept
