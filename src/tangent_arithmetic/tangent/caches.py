"""Caches of weights that modules keep between calls, which are stale at other weights."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from tangent_arithmetic.tangent.state import Attributes, Key

CACHES: WeakKeyDictionary[nn.Module, set[Key]] = WeakKeyDictionary()  # filled anew in each pass


def empty_caches(model: object) -> None:
    """Empties the caches of weights that a module keeps, which it fills again in its next call.

    These are the ones that its own `train` empties (timm's LeViT), and those in `CACHES`, except
    persistent buffers, which are weights. The modes of its parts stay.

    Args:
        model: the module; anything else is left alone.
    """
    if not isinstance(model, nn.Module):
        return
    flags = {part: part.training for part in model.modules()}
    if own := [part for part in flags if type(part).train is not nn.Module.train]:
        for part in own:
            part.train()
            part.train(flags[part])
        for part, training in flags.items():
            part.training = training
    if known := CACHES.get(model):
        parts = list(flags)
        Attributes(model).clear([key for key in known if not _is_saved(parts[key[0]], key[1])])


def _is_saved(part: nn.Module, name: str) -> bool:
    return name in part._buffers and name not in part._non_persistent_buffers_set
