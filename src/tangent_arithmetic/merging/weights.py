"""The weights of one model, read one tensor at a time, from memory or from mapped files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tangent_arithmetic.encoders.base import BUILT
from tangent_arithmetic.encoders.loading import resolve
from tangent_arithmetic.encoders.published import hub, huggingface
from tangent_arithmetic.encoders.registry import encoder_kinds
from tangent_arithmetic.merging.spectral import OUTPUTS, TOKENS, module_of
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown
from tangent_arithmetic.runtime.private import expanded
from tangent_arithmetic.storage import checkpoints, statedict
from tangent_arithmetic.storage.reading import check_header, read_json, readable
from tangent_arithmetic.storage.unpickler import read_pickle, tensors_of
from tangent_arithmetic.storage.wrappers import read_weights

INTEGERS = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16}
INTEGERS |= {"I32": torch.int32, "I64": torch.int64}
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
FLOATS |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPES = INTEGERS | FLOATS  # by the codes of safetensors
CODES = {dtype: code for code, dtype in DTYPES.items()}
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")  # of files of weights
SAMPLE = 256  # numbers of each tensor in a fingerprint
CONFIG = "config.json"
# names of the scales of quantised tensors, and the dtypes of these
SCALES = re.compile(r"(.*[._])?(weight_scale(_inv|_2)?|scale_inv|scales|_scale|SCB|absmax|qzeros)")
PACKED = {torch.int8, torch.uint8, torch.int32, *statedict.FLOAT8}


@dataclass(frozen=True)
class Weights:
    """Named tensors that are read on demand.

    Attributes:
        outline: name -> a tensor without memory (device "meta") of the same dtype and shape.
        read: reads a tensor by name; in a file it is mapped, not copied, and must not be modified.
        kind: "image_encoder" and so on for our checkpoints and published encoders, else "".
        facts: known facts about the model: "hash", "theta0_hash", "model", and "built", how its
            features are computed, see `encoders.built`.
        place: the path as the user wrote it; None for weights in memory.
        folder: the Hugging Face folder of the weights, or None.
        files: the files of the weights.
        shards: the name of each tensor's file, if the weights are in files.
        ties: other names of tied parameters, see `tangent_arithmetic.storage.statedict.ties`.
        written: the text of files in `folder` that a merge writes instead of copying them.
        low_rank: for adapters, reads the two factors of a tensor's step from the pre-trained
            weights, in float64; None for a tensor without adapter.
    """

    outline: dict[str, Tensor]
    read: Callable[[str], Tensor]
    kind: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    place: str | None = None
    folder: Path | None = None
    files: tuple[Path, ...] = ()
    shards: Mapping[str, str] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    low_rank: Callable[[str], tuple[Tensor, Tensor] | None] | None = None

    @property
    def is_encoder(self) -> bool:
        """Whether they are of a registered kind of encoder, see `encoders.registry`."""
        return self.kind in encoder_kinds() and "model" in self.facts

    @property
    def is_linear(self) -> bool:
        """Whether the encoder is linearised."""
        return self.kind.startswith("linearized_")

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by name, each read on demand."""
        return _Tensors(self.outline, self.read)

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(value.nbytes for value in self.outline.values())

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration in the Hugging Face folder, or as written; empty if there is none.

        Raises:
            UsageError: if it is damaged.
        """
        if CONFIG in self.written:
            written: dict[str, Any] = json.loads(self.written[CONFIG])
            return written
        path = None if self.folder is None else self.folder / CONFIG
        return read_json(path) if path is not None and path.is_file() else {}

    def identity(self) -> dict[str, Any]:
        """Place, hash (if the file has one), size, and a fingerprint of the model.

        The fingerprint covers names, shapes and the first numbers of each tensor; it distinguishes
        models, but is not a checksum.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.outline.items()):
            digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            start = self.read(name).reshape(-1)[:SAMPLE].detach().cpu().contiguous()
            digest.update(start.view(torch.uint8).numpy().tobytes())
        known = {key: self.facts[key] for key in ("model", "hash") if self.facts.get(key)}
        place = {} if self.place is None else {"place": self.place}
        return {**place, **known, "bytes": self.nbytes, "fingerprint": digest.hexdigest()[:32]}


def is_embedding(name: str, value: Tensor) -> bool:
    """Whether a tensor has a row for each token, by its name: an embedding or `lm_head`."""
    return value.ndim == 2 and module_of(name) in (*TOKENS, *OUTPUTS)


def check_plain(weights: Weights, model: str) -> None:
    """Checks that numbers are stored as they are, not quantised with scales of their own.

    Raises:
        UsageError: if the folder's configuration or the names of tensors say otherwise.
    """
    outline, signs = weights.outline, []
    with contextlib.suppress(UsageError):  # a damaged configuration says nothing
        if weights.config.get("quantization_config"):
            signs.append("quantization_config in its config.json")
    if any(value.dtype in PACKED and value.ndim > 1 for value in outline.values()):
        signs += [shown(name) for name in sorted(outline) if SCALES.fullmatch(name)][:1]
    if signs:
        raise UsageError(
            f"{model} is quantised ({signs[0]}), expected weights that are numbers without scales; "
            "dequantise it first, such as with dequantize() and save_pretrained(FOLDER) of "
            "transformers"
        )


class _Tensors(Mapping[str, Tensor]):
    def __init__(self, outline: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self.outline, self.read = outline, read

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)


def held(state: Mapping[str, Tensor], **facts: Any) -> Weights:
    """Weights in memory.

    Raises:
        UsageError: if the state holds anything but tensors.
    """
    state = dict(state)
    statedict.check_tensors(state, str(facts.get("place") or "a model"))
    outline = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    inputs_first = sorted(state, key=lambda name: module_of(name) in OUTPUTS)
    ties = statedict.ties({name: state[name] for name in inputs_first})
    return Weights(outline, lambda name: state[name].detach(), ties=ties, **facts)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns errors while a safetensors file is read into a `UsageError`."""
    with readable(path, "a safetensors file"):
        try:
            yield
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{error}; is it damaged?") from error


def mapped(files: Sequence[Path], names: Callable[[str], str | None] = str) -> dict[str, Any]:
    """Outline and reader of safetensors files, as the arguments of `Weights`.

    Args:
        files: one file, or the shards of a model.
        names: (name in the file) -> name in the model, or None to skip the tensor.

    Raises:
        UsageError: for a damaged file, or an unknown dtype.
    """
    outline: dict[str, Tensor] = {}
    keys: dict[str, tuple[Path, Any, str]] = {}
    for path in files:
        with _reading(path):
            check_header(path)
            file = safe_open(str(path), framework="pt")
            for key in file.keys():  # noqa: SIM118 - not a dict
                name = names(key)
                if name is None:
                    continue
                part = file.get_slice(key)
                if part.get_dtype() not in DTYPES:
                    raise UsageError(
                        f"{path}: {shown(key)} has the unknown dtype {shown(part.get_dtype())}"
                    )
                dtype = DTYPES[part.get_dtype()]
                outline[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
                keys[name] = (path, file, key)

    def read(name: str) -> Tensor:
        path, file, key = keys[name]
        with _reading(path):
            value: Tensor = file.get_tensor(key)
        return value

    shards = {name: path.name for name, (path, _, _) in keys.items()}
    return {"outline": outline, "read": read, "files": tuple(files), "shards": shards}


def open_weights(place: str | Path) -> Weights:
    """The weights at a place.

    Args:
        place: a safetensors file, one of our checkpoints (under our name or that of the public
            projects), a published `.pt`, a Hugging Face folder (sharded or not), or
            `hf-hub:ORG/NAME`.

    Raises:
        MissingFileError: if nothing is there.
        UsageError: if it is damaged or does not hold weights.
    """
    with readable(place, "the weights of a model"):
        path = find(place)
        if path.is_dir():
            return _renamed(path, str(place))
        if path.suffix == ".safetensors":
            return _safetensors(path, str(place))
        return _pickled(path, str(place))


def open_clip_vision(place: str | Path) -> Weights:
    """The vision tower of a Hugging Face CLIP, complete or not, under its names there.

    The integer buffer `position_ids` of old files and the projection, which `CLIPVisionModel`
    lacks, are skipped.

    Args:
        place: a folder, a safetensors file, or `[hf-hub:]ORG/NAME`.
    """
    with readable(place, "the weights of a model"):
        tower = _renamed(find(place), str(place), _vision)
    if not tower.outline:
        raise UsageError(
            f"{place} has no vision tower of a CLIP, expected names such as "
            f"{huggingface.PREFIX}embeddings.class_embedding"
        )
    if tower.folder is None or not tower.config:
        return tower
    return replace(tower, facts={BUILT: huggingface.built(tower.folder, tower.config)})


def _vision(key: str) -> str | None:
    name = key.removeprefix(huggingface.PREFIX)
    if name in huggingface.DROPPED:
        return None
    tower = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
    return key if name.startswith(tower) else None


def with_names(weights: Weights, names: Callable[[str], str]) -> Weights:
    """The same weights under other names.

    Args:
        weights: the weights.
        names: (name) -> the new name, a different one for each.
    """
    old = {names(name): name for name in weights.outline}
    low_rank = weights.low_rank
    return replace(
        weights,
        outline={name: weights.outline[own] for name, own in old.items()},
        read=lambda name: weights.read(old[name]),
        shards={names(name): file for name, file in weights.shards.items()},
        ties={names(name): names(first) for name, first in weights.ties.items()},
        low_rank=None if low_rank is None else lambda name: low_rank(old[name]),
    )


def find(place: str | Path) -> Path:
    """The file or folder of a place; a name ORG/NAME that is not a path is resolved on the hub."""
    path = expanded(place)
    if path.is_file() or path.is_dir():
        return path
    text = str(place)
    if hub.is_hub(text) or not on_hub(text):
        return resolve(place)
    try:
        return resolve(place)
    except MissingFileError as missing:
        try:
            return resolve(f"{hub.HUB}{text}")
        except UsageError as error:
            raise MissingFileError(f"{missing}; on the hub: {error}") from error


def on_hub(place: str) -> bool:
    """Whether a place is a name on the hub: `hf-hub:ORG/NAME`, or ORG/NAME that is no path."""
    if hub.is_hub(place):
        return True
    of_files = place.startswith((".", "checkpoints")) or Path(place).suffix in SUFFIXES
    return bool(hub.NAME.fullmatch(place)) and not of_files and not expanded(place).exists()


def tensors_in(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file, which are mapped, or of a pickled state dict."""
    if path.suffix != ".safetensors":
        return tensors_of(read_pickle(path))
    opened = mapped([path])
    return _Tensors(opened["outline"], opened["read"])


def _renamed(path: Path, place: str, names: Callable[[str], str | None] = str) -> Weights:
    """The weights in a file or in a folder of Hugging Face, under other names, see `mapped`."""
    folder = path if path.is_dir() else None
    files = huggingface.weight_files(path) if folder else [path]
    if files[0].suffix == ".safetensors":
        opened = mapped(files, names)
        return Weights(**opened, place=place, folder=folder, ties=_equal_embeddings(**opened))
    kept, shards = dict[str, Tensor](), dict[str, str]()
    for file in files:
        named = ((names(key), value) for key, value in read_weights(file).items())
        own = {name: value for name, value in named if name is not None}
        kept, shards = kept | own, shards | dict.fromkeys(own, file.name)
    return _unpickled(kept, place=place, folder=folder, files=tuple(files), shards=shards)


def _unpickled(state: Mapping[str, Tensor], **facts: Any) -> Weights:
    """The weights in a pickled file; its equal embeddings are tied, as in safetensors files."""
    weights = held(state, **facts)
    equal = _equal_embeddings(weights.outline, weights.read)
    return replace(weights, ties=statedict.merge_ties(weights.ties, equal))


def _equal_embeddings(
    outline: Mapping[str, Tensor], read: Callable[[str], Tensor], **_facts: Any
) -> dict[str, str]:
    """The ties of embeddings that a file holds under several names: further name -> first name."""
    names = [name for name, value in outline.items() if is_embedding(name, value)]
    names.sort(key=lambda name: (module_of(name) in OUTPUTS, name))
    tied: dict[str, str] = {}
    for i, name in enumerate(names):
        same = (n for n in names[:i] if n not in tied and outline[n].shape == outline[name].shape)
        first = next((n for n in same if statedict.equal(read(n), read(name))), None)
        tied |= {name: first} if first is not None else {}
    return tied


def _safetensors(path: Path, place: str) -> Weights:
    """A safetensors file; one of ours must match its checksum."""
    facts = checkpoints.read_header(path)
    if facts is None:
        opened = mapped([path])
        return Weights(**opened, place=place, ties=_equal_embeddings(**opened))
    known = {**facts["info"], "hash": facts["hash"], "theta0_hash": facts["theta0_hash"]}

    def own(key: str) -> str | None:
        return None if key.startswith(checkpoints.THETA0) else key

    opened = mapped([path], own)
    ties = _recorded_ties(facts["info"], opened["outline"])
    weights = Weights(**opened, kind=facts["kind"], facts=known, place=place, ties=ties)
    if statedict.content_hash(weights.tensors) != facts["hash"]:
        raise checkpoints.damaged(path, "its checksum differs")
    return weights


def _recorded_ties(info: Mapping[str, Any], outline: Mapping[str, Tensor]) -> dict[str, str]:
    """The ties that one of our checkpoints records of its tensors."""
    tied = info.get(statedict.TIES)
    pairs = tied.items() if isinstance(tied, Mapping) else ()
    known = {n: str(first) for n, first in pairs if {n, str(first)} <= outline.keys()}
    return statedict.merge_ties(known)


def _pickled(path: Path, place: str) -> Weights:
    """A published encoder under our names; any other state dict under its own names."""
    state = read_weights(path)
    plain = _unpickled(state, place=place, files=(path,))
    linear = any(name.startswith("model.params") for name in state)
    if state and not linear and not any("visual." in name for name in state):
        return plain
    from tangent_arithmetic.encoders.published.loading import load

    try:
        encoder = load(path)
    except UsageError:
        if linear or not state:
            raise
        return plain  # of another model with a tower `visual`
    known = {**encoder.info, "hash": encoder.hash, "theta0_hash": encoder.theta0_hash}
    return held(encoder.theta, kind=encoder.kind, facts=known, place=place, files=(path,))
