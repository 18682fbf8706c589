r"""Features of linearised encoders, from which the logits at every coefficient follow exactly.

\[ \phi(x; \theta_0 + \sum_t a_t \tau_t) = f_0(x) + \sum_t a_t\, d_t(x), \quad
   f_0 = f(x; \theta_0), \quad d_t = J(x; \theta_0)\, \tau_t \]

One pass over a data set computes them all. They are cached on disk under a hash of everything they
depend on: theta0, tau_t, the images, the preprocessing, the precision, the software, and the
sources and the structure of the encoder. If a source is unknown, nothing is cached. A
preprocessing is identified by its attribute `recipe`, any JSON value; the models in
`encoders/clip.py` set it. Without one, features are computed each time. Those of a standard encoder
at its own weights, such as the zero-shot model that every sweep begins with, are cached alike, and
so is what else depends on an encoder alone, see `computed_once`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tangent_arithmetic.data.identity import fingerprint, labels_of
from tangent_arithmetic.data.loading import EvalBatches, to_device
from tangent_arithmetic.encoders.base import Encoder, LinearEncoder, is_linear
from tangent_arithmetic.encoders.built import LIBRARIES, code_of
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.atomic import atomic, files_below, remove_parts
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.digests import json_hash
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.runtime.software import software
from tangent_arithmetic.storage.statedict import State, check_part, content_hash, in_range, scale
from tangent_arithmetic.tangent import at_once
from tangent_arithmetic.tangent.functional import evaluating
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tangent_arithmetic.tangent.memory import freed_memory_kept

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64, UInt8

logger = logging.getLogger(__name__)

PAIRS = 768  # of an image and a direction, in memory at once; ViT-B-32 takes 3 MB for each
DIRECTIONS = 128  # at once; those beyond take another pass
OURS = (*LIBRARIES, "tangent_arithmetic")  # packages whose software is identified
CACHE_BYTES = 8 * 2**30  # beyond this the least recently used features are deleted


@dataclass(frozen=True)
class Features:
    """Features of this rank's share of a data set, in order.

    Attributes:
        f0: features at theta0.
        directions: J(x; theta0) tau for each task vector.
        labels: the true classes; uint8 (images, classes) where an image has several.
    """

    f0: Float32[Tensor, "images features"]
    directions: list[Float32[Tensor, "images features"]]
    labels: Int64[Tensor, " images"] | UInt8[Tensor, "images classes"]

    def to(self, device: torch.device) -> Features:
        """Copies them to a device."""
        directions = [direction.to(device) for direction in self.directions]
        return Features(self.f0.to(device), directions, self.labels.to(device))

    def at(self, coefs: Sequence[float]) -> Float[Tensor, "images features"]:
        """Features at theta0 + sum of coefs[t] * tau_t."""
        phi = self.f0
        for coef, direction in zip(coefs, self.directions, strict=True):
            phi = torch.add(phi, direction, alpha=in_range(coef, direction.dtype))
        return phi


@torch.no_grad()
def linear_features(
    encoder: LinearEncoder,
    vectors: Sequence[State],
    batches: EvalBatches | Iterable[Sequence[Tensor]],
    compute: Compute | None = None,
    cache: Path | None = None,
    total: State | None = None,
) -> Features:
    """The features of a split at theta0 and along task vectors.

    Args:
        encoder: provides f and theta0; its theta is ignored.
        vectors: each tau_t by name; buffers are ignored.
        batches: (images, labels) of this rank.
        compute: device and precision; None for the encoder's device, in float32.
        cache: folder of cached features; None for no cache. Only features of `EvalBatches` are
            cached, since only their images can be identified.
        total: the sum of the vectors, whose direction, the sum of theirs, is cached too; None for
            none.
    """
    compute = compute or Compute.of(encoder.weights())
    names = encoder.theta0()
    for tau in vectors:
        check_part(encoder.weights(), tau, "theta and tau")
    vectors = [{name: tau[name] for name in names if name in tau} for tau in vectors]
    signs, vectors = _with_signs(vectors)
    hashes = [content_hash(tau) for tau in vectors]
    by_hash = dict(zip(hashes, vectors, strict=True))
    folder, found = _cached(encoder, by_hash, batches, compute, cache)
    steps = (found[key]["features"] for key in hashes)
    directions = [sign * step for sign, step in zip(signs, steps, strict=True)]
    if folder and total is not None:
        (sign,), (tau,) = _with_signs([{name: total[name] for name in names if name in total}])
        path = folder / f"{content_hash(tau)}.safetensors"
        if not path.is_file():
            _write(path, {"features": sign * torch.stack(directions).sum(dim=0)})
    return Features(found["f0"]["features"], directions, found["f0"]["labels"])


@torch.no_grad()
def standard_features(
    encoder: Encoder,
    batches: EvalBatches | Iterable[Sequence[Tensor]],
    compute: Compute | None = None,
    cache: Path | None = None,
) -> Features:
    """The features of a split at a standard encoder's weights, without directions.

    Args:
        encoder: the encoder, at theta.
        batches: as for `linear_features`, and so are the others.
        compute: device and precision.
        cache: folder of cached features.
    """
    compute = compute or Compute.of(encoder.weights())
    _, found = _cached(encoder, {}, batches, compute, cache)
    return Features(found["f0"]["features"], [], found["f0"]["labels"])


def _cached(
    encoder: Encoder | LinearEncoder,
    vectors: Mapping[str, State],
    batches: EvalBatches | Iterable[Sequence[Tensor]],
    compute: Compute,
    cache: Path | None,
) -> tuple[Path | None, dict[str, dict[str, Tensor]]]:
    """The folder of cached features, if any, and the tensors of f0 and of each vector.

    Args:
        encoder: the encoder.
        vectors: task vectors by their hash.
        batches: (images, labels) of this rank.
        compute: device and precision.
        cache: folder of cached features.
    """
    folder, cached = None, dict[str, dict[str, Tensor]]()
    if cache is not None and isinstance(batches, EvalBatches):
        folder = _folder(cache, encoder, batches, compute)
        if folder:
            cached = _read_all(folder, ["f0", *vectors], _labels(batches))
    missing = {key: tau for key, tau in vectors.items() if key not in cached}
    if "f0" not in cached or missing:
        computed = _compute(encoder, missing, batches, compute)
        if folder:
            for key, tensors in computed.items():
                _write(folder / f"{key}.safetensors", tensors)
            _prune(folder.parent)
        cached |= computed
    else:
        logger.info("features of %s: read from %s", getattr(batches, "name", "a split"), folder)
    return folder, cached


def computed_once(
    encoder: Encoder,
    of: Mapping[str, Any],
    make: Callable[[], Tensor],
    compute: Compute,
    cache: Path | None,
) -> Tensor:
    """A tensor that depends on an encoder's weights and on `of` alone, from the cache if it can be.

    Args:
        encoder: the encoder.
        of: what else it depends on; JSON values.
        make: computes it.
        compute: device and precision.
        cache: folder of cached features; None for no cache.
    """
    folder = None if cache is None else _place(cache, encoder, compute, of)
    if folder is None:
        return make()
    path = folder / "tensor.safetensors"
    with _if_readable(path):
        return _read(path)["tensor"]
    made = make()
    _write(path, {"tensor": made})
    _prune(folder.parent)
    return made


def _with_signs(vectors: Sequence[State]) -> tuple[list[float], list[State]]:
    """Signs, and the vectors times these, by which tau and -tau share a file."""
    signs = [_sign(tau) for tau in vectors]
    scaled = [scale(tau, s) if s < 0 else tau for tau, s in zip(vectors, signs, strict=True)]
    return signs, scaled


def _sign(tau: State) -> float:
    """The sign of a task vector's first non-zero weight."""
    for name in sorted(tau):
        value = tau[name]
        flat = (torch.view_as_real(value) if value.is_complex() else value).flatten()
        nonzero = flat.nonzero()
        if len(nonzero):
            return float(flat[nonzero[0, 0]].sign())
    return 1.0


def _compute(
    encoder: Encoder | LinearEncoder,
    vectors: dict[str, State],
    batches: EvalBatches | Iterable[Sequence[Tensor]],
    compute: Compute,
) -> dict[str, dict[str, Tensor]]:
    """The tensors to cache of f0 and of each vector, from one pass over this rank's share."""
    device = compute.device
    encoder.to(device)
    taus = [{name: v.to(device) for name, v in tau.items()} for tau in vectors.values()]
    parts: list[list[Tensor]] = []
    labels: list[Tensor] = []
    total = len(batches) if isinstance(batches, EvalBatches) else None
    bar = progress(batches, f"features of {getattr(batches, 'name', 'a split')}", total)
    with evaluating(encoder), freed_memory_kept():
        for batch in bar:
            images, truth = to_device(batch, device)
            bar.note(len(images) * ddp.world_size())
            with compute.autocast():
                if is_linear(encoder):
                    f0, steps = few_at_a_time(encoder, images, taus or [{}])
                else:
                    f0, steps = encoder(images), []
            parts.append([value.float().cpu() for value in (f0, *steps[: len(taus)])])
            labels.append(truth.cpu())
    if not parts:  # fewer images than ranks
        parts = [[torch.zeros(0, 0)] * (1 + len(taus))]
    features = [torch.cat(column) for column in zip(*parts, strict=True)]
    tensors = {key: {"features": v} for key, v in zip(("f0", *vectors), features, strict=True)}
    tensors["f0"]["labels"] = torch.cat(labels) if labels else _labels(batches)
    return tensors


@torch.no_grad()
def few_at_a_time(
    encoder: LinearEncoder | LinearizedModel,
    images: Tensor,
    vectors: Sequence[Mapping[str, Tensor]],
) -> tuple[Float[Tensor, "batch features"], list[Float[Tensor, "batch features"]]]:
    """f0 and the directions of a batch, of so few images at a time that memory is bounded.

    An image's features do not depend on the others, so this costs no arithmetic; a pass of fewer
    directions would compute f0 again.

    Args:
        encoder: provides f and theta0.
        images: the batch.
        vectors: each tau_t by name; what is missing is zero.
    """
    parts: list[list[Tensor]] = []
    with at_once(DIRECTIONS):
        for some in images.split(max(1, PAIRS // min(len(vectors), DIRECTIONS))):
            f0, steps = encoder.tangents(some, vectors)
            parts.append([f0, *steps])
    f0, *steps = (torch.cat(column) for column in zip(*parts, strict=True))
    return f0, steps


def _labels(batches: EvalBatches | Iterable[Sequence[Tensor]]) -> Tensor:
    """The labels of this rank's share; none of batches whose images are not listed."""
    if not isinstance(batches, EvalBatches):
        return torch.zeros(0, dtype=torch.int64)
    return torch.tensor(labels_of(batches.pictures)[batches.order])


def _folder(
    cache: Path, encoder: Encoder | LinearEncoder, batches: EvalBatches, compute: Compute
) -> Path | None:
    """The folder of the features of these images at theta0; None if they are not cached."""
    images, transform = fingerprint(batches.pictures), batches.transform
    recipe = getattr(transform, "recipe", None)
    if images is None or recipe is None:
        what = "images have no identity" if images is None else "preprocessing declares no recipe"
        logger.info("features are not cached, since the %s", what)
        return None
    facts = {
        "pictures": images,
        "preprocess": [recipe, _without_addresses(transform)],
        "share": [batches.rank, batches.world_size],
    }
    return _place(cache, encoder, compute, facts)


def _place(
    cache: Path, encoder: Encoder | LinearEncoder, compute: Compute, of: Mapping[str, Any]
) -> Path | None:
    """The folder of what depends on an encoder at theta0 and on `of`; None if it is not cached.

    Of a standard encoder theta0 is its own weights.
    """
    modules = _modules(encoder)
    code = [code_of(module, known=OURS) for module in modules]
    if not code or None in code:
        logger.info("features are not cached, since a source of the encoder is unknown")
        return None
    facts = {
        "model": [encoder.identity(), encoder.built() if hasattr(encoder, "built") else {}],
        "modules": [code, [_without_addresses(module) for module in modules]],
        "theta0": content_hash(encoder.weights0() if is_linear(encoder) else encoder.weights()),
        "precision": compute.precision,
        "device": compute.device.type,
        **of,
        **software(),
    }
    key = json_hash(facts)
    return cache / key[:32]


def _modules(encoder: Encoder | LinearEncoder) -> list[nn.Module]:
    """The encoder, and the modules that it linearises; none of an encoder that is no module."""
    if not isinstance(encoder, nn.Module):
        return []
    linear = [part for part in encoder.modules() if isinstance(part, LinearizedModel)]
    return [encoder, *(part.module0() for part in linear)]


def _without_addresses(value: object) -> str:
    return re.sub(r" at 0x\w+", "", repr(value))


def _read_all(folder: Path, keys: Sequence[str], labels: Tensor) -> dict[str, dict[str, Tensor]]:
    """The cached tensors by key; without those that are missing or, with a warning, damaged.

    Args:
        folder: the folder of the features.
        keys: "f0", then the hash of each task vector.
        labels: the labels that f0 must have.
    """
    cached: dict[str, dict[str, Tensor]] = {}
    width = None
    for key in dict.fromkeys(keys):
        path = folder / f"{key}.safetensors"
        with _if_readable(path):
            tensors = _read(path)
            features = tensors["features"]
            width = features.shape[1:] if width is None else width
            if features.shape != (len(labels), *width) or len(width) != 1:
                raise ValueError(f"features of shape {tuple(features.shape)}")
            if key == "f0" and not torch.equal(tensors["labels"], labels):
                raise ValueError("other labels")
            cached[key] = tensors
    return cached


@contextlib.contextmanager
def _if_readable(path: Path) -> Iterator[None]:
    """Ends the block where a cached file is missing or, with a warning, damaged."""
    try:
        yield
    except FileNotFoundError:  # never written, or just deleted by another process
        pass
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        logger.warning("%s is damaged and computed again (%s)", path, error)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; raises `ValueError` if they do not match its checksum."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (file.metadata() or {}).get("hash") != content_hash(tensors):
            raise ValueError("its checksum differs")
    with contextlib.suppress(OSError):  # just deleted, or in a read-only folder
        os.utime(path)  # the least recently used are deleted first
    return tensors


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"hash": content_hash(tensors)})
    except (OSError, SafetensorError) as error:  # a full disk, a read-only folder
        logger.warning("features are not cached: %s", error)


def _prune(root: Path) -> None:
    """Deletes the least recently used features beyond `CACHE_BYTES`.

    Also deletes the leftovers of killed processes. Files being written count but stay.
    """
    for folder in root.glob("*/"):
        remove_parts(folder)
    files, excess = [], -CACHE_BYTES
    for path in files_below(root, ".safetensors"):
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
