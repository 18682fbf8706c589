"""Weights on disk: safetensors with JSON metadata, written atomically, checked when read.

    python -m src.checkpoints inspect FILE...
    python -m src.checkpoints convert IN OUT [--model=NAME] [--theta0=FILE]

One key space: a standard and a linear checkpoint hold the same names (`model.visual...`); the mode
is metadata. A linear checkpoint holds theta, and theta0 (under `theta0/...`) unless a zero-shot
file of the same content lies beside it or one folder up.

Files of other projects are read as well, by `src/published/`, without executing anything.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.errors import MissingFileError, UnwritableError, UsageError, shown
from src.private import without_home
from src.processes import fcntl, lock
from src.published import hub
from src.reading import check_header
from src.statedict import TIES, State, content_hash, ties

logger = logging.getLogger(__name__)

PROJECT = "tangent-arithmetic/"
FORMAT = f"{PROJECT}1"
THETA0 = "theta0/"
ZEROSHOT = "zeroshot.safetensors"
STATE = "run_state"  # of src/states.py
ENCODERS = ("image_encoder", "linearized_image_encoder")
BACKBONE = "mlp_backbone"  # of src/artificial_data
FOLDERS = ("config.json", "adapter_config.json")  # one of these is in a folder of Hugging Face
AGAIN = "delete it and make it again"
LONGEST_STEM = 200  # bytes of a file's name that its temporary folder has; a name has 255 at most
UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file says.

    Attributes:
        theta: the weights, by name.
        kind: "image_encoder", "linearized_image_encoder", "head" or another word.
        hash: content hash of theta.
        theta0: the point of expansion of a linear checkpoint.
        theta0_hash: content hash of the pre-trained weights that theta was fine-tuned from.
        info: everything else, for instance the model's name and how it was trained.
    """

    theta: dict[str, Tensor]
    kind: str
    hash: str
    theta0: dict[str, Tensor] | None = None
    theta0_hash: str | None = None
    info: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def atomic(path: Path, fsync: bool = True) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and moves it there if the block succeeds.

    A reader sees the old file or the whole new one, never a part; after a power cut too, unless
    `fsync` is false. What a process that was killed in such a block left half written is removed
    by the next one that writes the same file.

    Raises:
        UnwritableError: if the disk is full, or nothing can be written there.
    """
    with disk_errors(path), part_folder(path) as folder:
        temporary = folder / path.name
        temporary.touch()
        yield temporary
        if fsync:
            _sync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    if fsync and os.name == "posix":
        with disk_errors(path):
            _sync(path.parent)


@contextlib.contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path`, which exists during the block.

    It is locked, so that others can tell it from one that a killed process left; those for the same
    `path` are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent, path.name)
    folder, handle = _new_part(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _new_part(path: Path) -> tuple[Path, int | None]:
    """A new folder, and the handle of the lock on it where the system has locks."""
    prefix = f".{_stem(path.name)}."
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=".part"))
        if fcntl is None:
            return folder, None
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            lock(handle)
            if folder.is_dir():
                return folder, handle
            os.close(handle)  # taken for left behind before it was locked


def _stem(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:LONGEST_STEM])


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Makes an `UnwritableError` of what a full or read-only disk says while `path` is written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = _unwritable(error)
        if reason is None:
            raise
        raise UnwritableError(path, reason) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(error: Exception) -> str | None:
    """What keeps a file from being written, if that is what an error says."""
    if isinstance(error, UnwritableError):
        return error.reason
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        code = int(found[1])
    return os.strerror(code) if code in UNWRITABLE else None


def remove_parts(folder: Path, name: str = "") -> None:
    """Removes what killed processes left half written in a folder, of a file or of all.

    What a living process is writing is locked and stays; so does everything on a file system
    without locks.
    """
    for part in folder.glob(f".{glob.escape(_stem(name))}*.part"):
        with contextlib.suppress(OSError):  # another process has just removed it
            handle = os.open(part, os.O_RDONLY)
            try:
                if lock(handle, wait=False):
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
            finally:
                os.close(handle)


def check_writable(path: Path) -> None:
    """Checks that a file can be written, before the work whose result it is to hold.

    Raises:
        UnwritableError: if it cannot, or something else than a file is there.
    """
    with disk_errors(path):
        if path.exists() and not path.is_file():
            raise UnwritableError(path, "it exists and is no file")
        with part_folder(path) as folder:
            (folder / path.name).write_bytes(bytes(4096))


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically; what UTF-8 has no bytes for is spelt out."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, without home folders, see `src.private.without_home`."""
    write_text(path, json.dumps(without_home(value), indent=2) + "\n")


def as_safetensors(path: str | Path) -> Path:
    """The path that we write to when a user names `path`: `.pt` becomes `.safetensors`."""
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".safetensors"):
        return path.with_suffix(".safetensors")
    return path.with_name(path.name + ".safetensors")


def candidates(path: str | Path) -> list[Path]:
    """Where a checkpoint may lie that is named in our way or that of the public projects.

    `.pt` is `.safetensors`, folder X is XVal and back, `linear_zeroshot` is `zeroshot`, and the
    zero-shot file of a task is that of the run, one folder up.
    """
    ours = as_safetensors(Path(path).absolute())
    name = ours.name.removeprefix("linear_") if "zeroshot" in ours.name else ours.name
    folder = ours.parent
    twin = folder.name.removesuffix("Val") if folder.name.endswith("Val") else f"{folder.name}Val"
    found = [ours, folder / name]
    if folder.name:
        found.append(folder.with_name(twin) / name)
    if name == ZEROSHOT:
        found.append(folder.parent / name)
    if name.startswith("head_"):
        stem = name.removesuffix(".safetensors")
        plain = stem.removesuffix("Val")
        found += [folder / f"{plain}.safetensors", folder / f"{plain}Val.safetensors"]
    return list(dict.fromkeys(found))


def published_candidates(path: str | Path) -> list[Path]:
    """Where a checkpoint of another project may lie that is named in one of these ways."""
    found = [Path(path).absolute()]
    for ours in candidates(path):
        for name in (ours.name, f"nonlinear_{ours.name}"):
            found.append(ours.with_name(name).with_suffix(".pt"))
    return list(dict.fromkeys(found))


def resolve(path: str | Path, made_by: str | None = None) -> Path:
    """The existing file that `path` means: the one that it names, if it is there.

    Beside a file of another format that is named, ours of that name is meant, since `save` writes
    it in its place; a warning says so.

    Args:
        path: a path in our way or that of the public projects, or `hf-hub:ORG/NAME`.
        made_by: the command that makes the file, for the message.

    Raises:
        MissingFileError: if there is none.
    """
    if hub.is_hub(path):
        return hub.fetch(path)
    named, tried = Path(path).absolute(), candidates(path)
    if named.is_file() or any((named / name).is_file() for name in FOLDERS):
        return _ours_beside(named) or named
    for candidate in tried:
        if candidate.is_file():
            return candidate
    for candidate in published_candidates(path):
        if candidate.is_file() or (candidate / "config.json").is_file():
            return candidate
    way_out = f" Make it with: {made_by}" if made_by else ""
    raise MissingFileError(
        f"no checkpoint at {path} (looked for {', '.join(map(str, tried))}).{way_out}"
    )


def _ours_beside(named: Path) -> Path | None:
    """The file of ours that `save` writes where `named` is named, if there is one."""
    ours = as_safetensors(named)
    if ours == named or not ours.is_file():
        return None
    try:
        if read_header(ours) is None:
            return None
    except UsageError as error:
        logger.warning("%s; %s is read, which is beside it", error, named)
        return None
    logger.warning("%s is read, which this project wrote, not %s beside it", ours, named.name)
    return ours


def save_tensors(
    path: str | Path,
    theta: dict[str, Tensor],
    kind: str,
    theta0: dict[str, Tensor] | None = None,
    theta0_hash: str | None = None,
    info: dict[str, Any] | None = None,
) -> str:
    """Writes a checkpoint and returns the content hash of theta.

    Args:
        path: file to write; `.pt` becomes `.safetensors`.
        theta: the weights.
        kind: what they are the weights of.
        theta0: the point of expansion; stored unless a zero-shot file holds the same.
        theta0_hash: content hash of the pre-trained weights; computed from theta0 if that is given.
        info: JSON-serialisable facts to keep with the weights.

    Raises:
        UsageError: if a weight is not finite; only a `run_state` may hold such.
        UnwritableError: if it cannot be written.
    """
    path = as_safetensors(path)
    if kind != STATE and (bad := not_finite(theta)):
        raise UsageError(
            f"{path} is not written: {len(bad)} of {len(theta)} tensors are not finite "
            f"({', '.join(map(shown, bad[:3]))}{', ...' if len(bad) > 3 else ''}); expected finite "
            "weights"
        )
    if kind in (*ENCODERS, BACKBONE) and (tied := ties(theta)):
        info = {**(info or {}), TIES: tied}
    tensors = dict(theta)
    if theta0 is not None:
        theta0_hash = content_hash(theta0)
        if _find_zeroshot(path, theta0_hash) is None:
            tensors |= {THETA0 + name: value for name, value in theta0.items()}
    tensors = _storable(tensors)
    facts = {
        "format": FORMAT,
        "kind": kind,
        "hash": content_hash({name: tensors[name] for name in theta}),
        "theta0_hash": theta0_hash or "",
        "info": json.dumps(without_home(info or {}), sort_keys=True),
    }
    facts["check"] = checksum(facts)
    with atomic(path) as temporary:
        save_file(tensors, str(temporary), metadata=facts)
    return facts["hash"]


def not_finite(state: State) -> list[str]:
    """The names of the tensors that hold NaN, or infinity where it is no mask of attention."""
    found = []
    for name, value in state.items():
        if value.is_floating_point() or value.is_complex():
            bad = value.isnan() if name.endswith("mask") else ~value.isfinite()
            if bool(bad.any()):
                found.append(name)
    return found


def checksum(facts: Mapping[str, str]) -> str:
    """Checksum of what a file says of itself; that of its tensors is `hash`."""
    kept = {name: facts[name] for name in sorted(facts) if name != "check"}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def _storable(state: State) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, no two in one storage.

    Only what is not so is copied, tied weights for instance.
    """
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in state.items():
        dense = value.detach().cpu().contiguous()
        storage = dense.untyped_storage().data_ptr()
        found[name] = dense.clone() if storage in taken else dense
        taken.add(storage)
    return found


def read_facts(path: Path, model: str | None = None) -> dict[str, Any]:
    """What a checkpoint is: kind, hash, theta0_hash, info. Of ours only the header is read.

    Raises:
        UsageError: if the file is damaged or of no known kind.
    """
    facts = read_header(path)
    if facts is not None:
        return facts
    from src.published.loading import load

    found = load(path, model)
    facts = {"kind": found.kind, "hash": found.hash, "info": found.info}
    return {**facts, "theta0_hash": found.theta0_hash or ""}


def read_header(path: Path) -> dict[str, Any] | None:
    """What one of our files says of itself, see `read_facts`; None for a file of another project.

    Raises:
        UsageError: if the file is damaged, or of another version of this project.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        check_header(path)
        with safe_open(str(path), framework="pt") as file:
            facts: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged ({error}); {AGAIN}") from error
    found = facts.get("format", "")
    if found.startswith(PROJECT) and found != FORMAT:
        raise UsageError(
            f"{path} has format {found!r}, expected {FORMAT!r}: another version of this project "
            "wrote it"
        )
    if found != FORMAT:
        return None
    if facts.get("check", checksum(facts)) != checksum(facts):
        raise UsageError(f"{path} is damaged (its header's checksum differs); {AGAIN}")
    try:
        info = json.loads(facts["info"])
        if not isinstance(info, dict):
            raise TypeError(f"info is a {type(info).__name__}")
        named = {name: facts[name] for name in ("format", "kind", "hash", "theta0_hash")}
        return {**named, "info": info}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}: {error}); {AGAIN}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, of ours or of others.

    Raises:
        UsageError: if the file is damaged.
    """
    try:
        check_header(path)
        return load_file(path)
    except (SafetensorError, OSError, MemoryError) as error:
        raise UsageError(f"{path} is damaged ({error}); {AGAIN}") from error


def load_checkpoint(
    path: str | Path,
    made_by: str | None = None,
    kinds: Sequence[str] | None = None,
    model: str | None = None,
) -> Checkpoint:
    """Reads and checks a checkpoint.

    Args:
        path: a path in our way or that of the public projects, see `candidates`, or a name on the
            Hugging Face hub, `hf-hub:ORG/NAME`.
        made_by: the command that makes the file, for the message.
        kinds: what it may hold; None for anything.
        model: the model's name, for a published file that does not tell; the user's word counts.

    Raises:
        MissingFileError: if it is not there, or if it needs a zero-shot file that is not.
        UsageError: if it is damaged or holds something else.
    """
    path = resolve(path, made_by)
    facts = read_facts(path, model)
    if kinds is not None and facts["kind"] not in kinds:
        wanted = "an encoder" if kinds == ENCODERS else f"a {' or '.join(kinds)}"
        raise UsageError(f"{path} holds a {facts['kind']}, expected {wanted}")
    if read_header(path) is None:
        from src.published.loading import load

        return load(path, model)
    tensors = read_safetensors(path)
    theta = {name: value for name, value in tensors.items() if not name.startswith(THETA0)}
    if content_hash(theta) != facts["hash"]:
        raise UsageError(f"{path} is damaged (its checksum differs); {AGAIN}")
    theta0 = {n.removeprefix(THETA0): v for n, v in tensors.items() if n.startswith(THETA0)}
    theta0_hash = facts["theta0_hash"] or None
    if theta0 and content_hash(theta0) != theta0_hash:
        raise UsageError(f"{path} is damaged (theta0's checksum differs); {AGAIN}")
    if facts["kind"] == "linearized_image_encoder" and not theta0:
        theta0 = _read_zeroshot(path, str(theta0_hash))
    return Checkpoint(
        theta, facts["kind"], facts["hash"], theta0 or None, theta0_hash, facts["info"]
    )


def _find_zeroshot(path: Path, theta0_hash: str) -> Path | None:
    """The zero-shot file near `path` (same folder or one up) with this content hash."""
    path = path.absolute()
    for folder in (path.parent, path.parent.parent):
        zeroshot = folder / ZEROSHOT
        if zeroshot.is_file() and zeroshot != path:
            with contextlib.suppress(UsageError):
                if read_facts(zeroshot)["hash"] == theta0_hash:
                    return zeroshot
    return None


def _read_zeroshot(path: Path, theta0_hash: str) -> dict[str, Tensor]:
    zeroshot = _find_zeroshot(path, theta0_hash)
    if zeroshot is None:
        raise MissingFileError(
            f"{path} was linearised at weights {theta0_hash[:12]}..., expected in {ZEROSHOT} "
            "beside it or one folder up, where they are not; put that file back"
        )
    return load_checkpoint(zeroshot).theta


if __name__ == "__main__":
    from src.published.command import main

    raise SystemExit(main())
