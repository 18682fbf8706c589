r"""Features of linearised encoders, from which every coefficient's logits follow exactly.

\[ \phi(x; \theta_0 + \sum_t a_t \tau_t) = f_0(x) + \sum_t a_t\, d_t(x), \quad
   f_0 = f(x; \theta_0), \quad d_t = J(x; \theta_0)\, \tau_t \]

One pass over a data set gives all of them. They are kept on disk under a hash of what they depend
on: theta0, tau_t, the pictures, the preprocessing, the precision and the software. A preprocessing
is known by the `recipe` that it declares (any JSON value, an attribute of the transform); those of
the models in `encoders/clip.py` do. Features with another one are computed each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tangent_arithmetic.data.identity import fingerprint, labels_of
from tangent_arithmetic.data.loading import EvalBatches, share, to_device
from tangent_arithmetic.encoders.base import LinearEncoder
from tangent_arithmetic.runtime.atomic import atomic, remove_parts
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.runtime.software import software
from tangent_arithmetic.storage.statedict import State, check_part, content_hash, scale

logger = logging.getLogger(__name__)

CACHE_BYTES = 8 * 2**30  # the oldest features are deleted beyond this


@dataclass(frozen=True)
class Features:
    """This rank's share of a data set, in order.

    Attributes:
        f0: features at theta0, float32 (images, features).
        directions: one a task vector, likewise.
        labels: int64 (images,).
    """

    f0: Tensor
    directions: list[Tensor]
    labels: Tensor

    def to(self, device: torch.device) -> Features:
        """The same on a device."""
        moved = [direction.to(device) for direction in self.directions]
        return Features(self.f0.to(device), moved, self.labels.to(device))

    def at(self, coefs: Sequence[float]) -> Tensor:
        """Features at theta0 + sum of coefs[t] * tau_t."""
        found = self.f0
        for coef, direction in zip(coefs, self.directions, strict=True):
            found = torch.add(found, direction, alpha=coef)
        return found


@torch.no_grad()
def linear_features(
    encoder: LinearEncoder,
    vectors: Sequence[State],
    batches: EvalBatches | Iterable[Sequence[Tensor]],
    compute: Compute | None = None,
    cache: Path | None = None,
) -> Features:
    """The features of a split at theta0 and along task vectors.

    Args:
        encoder: gives f and theta0; its theta takes no part.
        vectors: each tau_t by name; buffers take no part.
        batches: (images, labels) of this rank.
        compute: device and precision; None for the encoder's device, in float32.
        cache: folder where features are kept and found again; None keeps none. Only those of
            `EvalBatches` are kept, since their pictures can be told from others.
    """
    compute = compute or Compute.of(encoder.weights())
    names = encoder.theta0()
    for tau in vectors:
        check_part(encoder.weights(), tau, "theta and tau")
    vectors = [{name: tau[name] for name in names if name in tau} for tau in vectors]
    signs = [_sign(tau) for tau in vectors]  # tau and -tau share what is kept
    vectors = [scale(tau, s) if s < 0 else tau for tau, s in zip(vectors, signs, strict=True)]
    names_of = ["f0", *(content_hash(tau) for tau in vectors)]
    folder, kept = None, dict[str, dict[str, Tensor]]()
    if cache is not None and isinstance(batches, EvalBatches):
        folder = _folder(cache, encoder, batches, compute)
        kept = _read_all(folder, names_of, _truth(batches)) if folder else {}
    missing = [i for i, name in enumerate(names_of[1:]) if name not in kept]
    if "f0" not in kept or missing:
        f0, labels, steps = _compute(encoder, [vectors[i] for i in missing], batches, compute)
        found = {"f0": {"features": f0, "labels": labels}}
        found |= {names_of[i + 1]: {"features": d} for i, d in zip(missing, steps, strict=True)}
        if folder:
            for name, tensors in found.items():
                _write(folder / f"{name}.safetensors", tensors)
            _prune(folder.parent)
        kept |= found
    else:
        logger.info("features of %s: found in %s", getattr(batches, "name", "a split"), folder)
    f0, *steps = (kept[name]["features"] for name in names_of)
    directions = [sign * step for sign, step in zip(signs, steps, strict=True)]
    return Features(f0, directions, kept["f0"]["labels"])


def _truth(batches: EvalBatches) -> Tensor:
    """The labels of this rank's share of the pictures."""
    own = share(labels_of(batches.pictures).tolist(), batches.rank, batches.world_size)
    return torch.tensor(own, dtype=torch.int64)


def _sign(tau: State) -> float:
    """The sign of a task vector's first weight that is not zero."""
    for name in sorted(tau):
        found = tau[name].flatten().nonzero()
        if len(found):
            return float(tau[name].flatten()[found[0, 0]].sign())
    return 1.0


def _compute(
    encoder: LinearEncoder,
    vectors: Sequence[State],
    batches: EvalBatches | Iterable[Sequence[Tensor]],
    compute: Compute,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One pass over this rank's share: f0, the labels, one direction a vector."""
    device = compute.device
    encoder.eval().to(device)
    vectors = [{name: value.to(device) for name, value in tau.items()} for tau in vectors]
    parts: list[list[Tensor]] = []
    labels = []
    total = len(batches) if isinstance(batches, EvalBatches) else None
    for batch in progress(batches, f"features of {getattr(batches, 'name', 'a split')}", total):
        images, truth = to_device(batch, device)
        with compute.autocast():
            f0, steps = encoder.tangents(images, vectors or [{}])
        parts.append([value.float().cpu() for value in (f0, *steps)])
        labels.append(truth.cpu())
    if not parts:  # fewer images than ranks
        empty = torch.zeros(0, 0)
        return empty, torch.zeros(0, dtype=torch.int64), [empty for _ in vectors]
    f0, *steps = (torch.cat(column) for column in zip(*parts, strict=True))
    return f0, torch.cat(labels), steps[: len(vectors)]


def _folder(
    cache: Path, encoder: LinearEncoder, batches: EvalBatches, compute: Compute
) -> Path | None:
    """The folder of the features of these pictures at this theta0."""
    data, transform = fingerprint(batches.pictures), batches.transform
    recipe = getattr(transform, "recipe", None)
    if data is None or recipe is None:
        what = "pictures have no identity" if data is None else "preprocessing declares no recipe"
        logger.info("features are not kept, since the %s", what)
        return None
    facts = {
        "model": encoder.identity(),
        "theta0": content_hash(encoder.weights0()),
        "pictures": data,
        "preprocess": [recipe, re.sub(r" at 0x\w+", "", repr(transform))],
        "precision": compute.precision,
        "device": compute.device.type,
        "share": [batches.rank, batches.world_size],
        **software(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache / key[:32]


def _read_all(folder: Path, names: Sequence[str], labels: Tensor) -> dict[str, dict[str, Tensor]]:
    """What is kept of these names and whole; what is damaged is said, once, and left out.

    Args:
        folder: where it is.
        names: "f0", then the hash of each task vector.
        labels: what f0 must be of, int64 (images,).
    """
    found: dict[str, dict[str, Tensor]] = {}
    width = None
    for name in dict.fromkeys(names):
        path = folder / f"{name}.safetensors"
        try:
            tensors = _read(path)
            features = tensors["features"]
            width = features.shape[1:] if width is None else width
            if features.shape != (len(labels), *width) or len(width) != 1:
                raise ValueError(f"features of shape {tuple(features.shape)}")
            if name == "f0" and not torch.equal(tensors["labels"], labels):
                raise ValueError("other labels")
        except FileNotFoundError:  # never there, or another process has just deleted it
            continue
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            logger.warning("%s is damaged and computed again (%s)", path, error)
            continue
        found[name] = tensors
    return found


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, which carries their hash.

    Raises:
        ValueError: if they are not those that were written.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (file.metadata() or {}).get("hash") != content_hash(tensors):
            raise ValueError("its checksum differs")
    with contextlib.suppress(OSError):  # deleted meanwhile, or a folder that is read only
        os.utime(path)  # used now; the oldest are deleted first
    return tensors


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"hash": content_hash(tensors)})
    except (OSError, SafetensorError) as error:  # a full disk, a folder that is read only
        logger.warning("features are not kept: %s", error)


def _prune(root: Path) -> None:
    """Deletes the features that were not used for longest, beyond the cache's size.

    What killed processes left half written is deleted; what others are writing counts.
    """
    for folder in root.glob("*/"):
        remove_parts(folder)
    files, excess = [], -CACHE_BYTES
    for path in root.glob("*/**/*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another process prunes too
            facts = path.stat()
            excess += facts.st_size
            if path.parent.parent == root:  # else it is being written
                files.append((facts.st_mtime, facts.st_size, path))
    for _, size, path in sorted(files):
        if excess <= 0:
            return
        excess -= size
        path.unlink(missing_ok=True)
