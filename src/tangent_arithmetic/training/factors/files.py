"""Files of factors: safetensors with provenance, tied to the weights that they belong to."""

from __future__ import annotations

from pathlib import Path

from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import damaged, read_checkpoint, save_tensors
from tangent_arithmetic.training.factors.blocks import Block
from tangent_arithmetic.training.factors.factor import Factor
from tangent_arithmetic.training.factors.whole import Factors

KIND = "factors"
DIRECTIONS = "directions"


def save_factors(path: str | Path, factors: Factors, theta0_hash: str) -> str:
    """Writes factors, and returns the content hash of their tensors.

    Args:
        path: file to write.
        factors: the factors; their `info` is kept.
        theta0_hash: content hash of the encoder's weights.
    """
    tensors = {
        f"{name}/{part}": value
        for name, factor in factors.factors.items()
        for part, value in factor.tensors().items()
    }
    tensors |= {f"{name}/{DIRECTIONS}": value for name, value in factors.directions.items()}
    blocks = [{"names": block.names, "shapes": block.shapes} for block in factors.blocks]
    info = {"blocks": blocks, "shrinkage": factors.shrinkage, "provenance": dict(factors.info)}
    return save_tensors(path, tensors, KIND, theta0_hash=theta0_hash, info=info)


def load_factors(path: str | Path, theta0_hash: str | None = None) -> Factors:
    """Reads factors.

    Args:
        path: the file.
        theta0_hash: content hash of the weights that they must belong to; None for any.

    Raises:
        UsageError: if they belong to other weights, or the file holds something else.
    """
    path = Path(path)
    found = read_checkpoint(path)
    if found is None or found.kind != KIND:
        kind = "of another project" if found is None else f"with a {found.kind}"
        raise UsageError(f"expected a file of factors at {path}, got one {kind}")
    if theta0_hash is not None and found.theta0_hash != theta0_hash:
        raise UsageError(
            f"{path} holds factors at weights {str(found.theta0_hash)[:12]}..., expected "
            f"{theta0_hash[:12]}...: a Gauss-Newton matrix belongs to one theta0. Delete it, and "
            "it is collected again"
        )
    try:
        blocks = tuple(
            Block(tuple(b["names"]), tuple(tuple(shape) for shape in b["shapes"]))
            for b in found.info["blocks"]
        )
        parts = dict[str, dict[str, object]]()
        for key, value in found.theta.items():
            name, _, part = key.rpartition("/")
            parts.setdefault(name, {})[part] = value
        directions = {n: p.pop(DIRECTIONS) for n, p in parts.items() if DIRECTIONS in p}
        factors = {block.name: Factor(**parts[block.name]) for block in blocks}  # type: ignore[arg-type]
        facts = (found.info["shrinkage"], found.info["provenance"])
        return Factors(blocks, factors, directions, *facts)  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
