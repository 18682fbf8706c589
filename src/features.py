r"""Features of linearised encoders, from which every coefficient's logits follow exactly.

\[ \phi(x; \theta_0 + \sum_t a_t \tau_t) = f_0(x) + \sum_t a_t\, d_t(x), \quad
   f_0 = f(x; \theta_0), \quad d_t = J(x; \theta_0)\, \tau_t \]

One pass over a data set gives all of them. They are kept on disk under a hash of what they depend
on: theta0, tau_t, the pictures, the preprocessing, the precision and the software.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import src
from src import ddp
from src.checkpoints import atomic
from src.data.identity import fingerprint
from src.data.loading import to_device
from src.data.registry import eval_batches, evaluated
from src.linearize import LinearizedImageEncoder
from src.logs import progress
from src.settings import autocast_of, cache_dir, device_of, setting
from src.statedict import State, check_part, content_hash, scale

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
    encoder: LinearizedImageEncoder, vectors: Sequence[State], dataset_name: str, args: Any
) -> Features:
    """The features of a data set at theta0 and along task vectors.

    Args:
        encoder: gives f and theta0; its theta takes no part.
        vectors: each tau_t by name; buffers take no part.
        dataset_name: X for the test split, XVal for the validation split.
        args: settings; `feature_cache` says whether features are kept and found again.
    """
    names = encoder.model.theta0()
    for tau in vectors:
        check_part(encoder.weights(), tau, "theta and tau")
    vectors = [{name: tau[name] for name in names if name in tau} for tau in vectors]
    signs = [_sign(tau) for tau in vectors]  # tau and -tau share what is kept
    vectors = [scale(tau, s) if s < 0 else tau for tau, s in zip(vectors, signs, strict=True)]
    pictures = evaluated(args, dataset_name).test
    folder = _folder(encoder, pictures, args) if setting(args, "feature_cache") else None
    paths = [folder and folder / f"{content_hash(tau)}.safetensors" for tau in vectors]
    kept = {i: found for i, path in enumerate(paths) if path and (found := _read(path))}
    base = _read(folder / "f0.safetensors") if folder else None
    missing = [i for i in range(len(vectors)) if i not in kept]
    if base is None or missing:
        f0, labels, steps = _compute(encoder, [vectors[i] for i in missing], dataset_name, args)
        base = {"features": f0, "labels": labels}
        kept.update({i: {"features": step} for i, step in zip(missing, steps, strict=True)})
        if folder:
            _write(folder / "f0.safetensors", base)
            for i in missing:
                path = paths[i]
                assert path is not None
                _write(path, kept[i])
            _prune(folder.parent)
    else:
        logger.info("features of %s: found in %s", dataset_name, folder)
    directions = [sign * kept[i]["features"] for i, sign in enumerate(signs)]
    return Features(base["features"], directions, base["labels"])


def _sign(tau: State) -> float:
    """The sign of a task vector's first weight that is not zero."""
    for name in sorted(tau):
        found = tau[name].flatten().nonzero()
        if len(found):
            return float(tau[name].flatten()[found[0, 0]].sign())
    return 1.0


def _compute(
    encoder: LinearizedImageEncoder, vectors: Sequence[State], dataset_name: str, args: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One pass over this rank's share: f0, the labels, one direction a vector."""
    device = device_of(args)
    encoder.eval().to(device)
    vectors = [{name: value.to(device) for name, value in tau.items()} for tau in vectors]
    loader = eval_batches(args, dataset_name, encoder.val_preprocess)
    parts: list[list[Tensor]] = []
    labels = []
    for batch in progress(loader, f"features of {dataset_name}", len(loader)):
        images, truth = to_device(batch, device)
        with autocast_of(args):
            f0, steps = encoder.model.tangents(images, vectors or [{}])
        parts.append([value.float().cpu() for value in (f0, *steps)])
        labels.append(truth.cpu())
    if not parts:  # fewer images than ranks
        empty = torch.zeros(0, 0)
        return empty, torch.zeros(0, dtype=torch.int64), [empty for _ in vectors]
    f0, *steps = (torch.cat(column) for column in zip(*parts, strict=True))
    return f0, torch.cat(labels), steps[: len(vectors)]


def _folder(encoder: LinearizedImageEncoder, pictures: Any, args: Any) -> Path | None:
    """Where the features at this theta0 of these pictures are kept."""
    data, preprocess = fingerprint(pictures), _recipe(encoder.val_preprocess)
    if data is None or preprocess is None:
        return None
    facts = {
        "model": encoder.model_name,
        "theta0": content_hash(encoder.weights0()),
        "pictures": data,
        "preprocess": preprocess,
        "precision": setting(args, "precision"),
        "device": device_of(args).type,
        "share": [ddp.rank(), ddp.world_size()],
        "versions": [src.__version__, torch.__version__],
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_dir(args) / "features" / key[:32]


def _recipe(transform: Any) -> str | None:
    """What a transform does, the same in every process; None if its text does not say it.

    A function is known by its module, name and code; a closure, or an object with nothing but an
    address, is not.
    """
    steps = getattr(transform, "transforms", None)  # torchvision's Compose
    if steps is not None:
        parts = [_recipe(step) for step in steps]
        return None if None in parts else f"{type(transform).__name__}({parts})"
    if isinstance(transform, types.FunctionType) and transform.__closure__ is None:
        code = transform.__code__
        text = f"{transform.__module__}.{code.co_name} {code.co_code.hex()} {code.co_consts}"
    else:
        text = repr(transform)
    return None if " at 0x" in text else text


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        found = load_file(path)
    except FileNotFoundError:  # never there, or another process has just deleted it
        return None
    except (SafetensorError, OSError):
        logger.warning("%s is damaged and computed again", path)
        return None
    with contextlib.suppress(OSError):  # deleted meanwhile, or a folder that is read only
        os.utime(path)  # used now; the oldest are deleted first
    return found


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary)
    except (OSError, SafetensorError) as error:  # a full disk, a folder that is read only
        logger.warning("features are not kept: %s", error)


def _prune(root: Path) -> None:
    """Deletes the features that were not used for longest, beyond the cache's size."""
    files = []
    for path in root.glob("*/*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another process prunes too
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    excess = sum(size for _, size, _ in files) - CACHE_BYTES
    for _, size, path in sorted(files):
        if excess <= 0:
            return
        excess -= size
        path.unlink(missing_ok=True)
