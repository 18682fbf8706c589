"""Random numbers that follow from names, so that the order of models does not matter."""

from __future__ import annotations

import hashlib

import torch


def generator_of(*names: object) -> torch.Generator:
    """A generator whose seed is a hash of names and numbers; the same on every machine."""
    digest = hashlib.sha256("|".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
