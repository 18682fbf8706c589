"""Names of backbones: `timm:NAME`, `transformers:NAME`, `python:MODULE:FACTORY`, and others."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tangent_arithmetic.data.suites import READS_TEXT, WITHOUT_TEXT
from tangent_arithmetic.encoders.clip import CONFIG, FOLDER, HUB, ClipName
from tangent_arithmetic.encoders.published import hub
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.private import expanded
from tangent_arithmetic.storage.reading import read_json

TIMM, TORCHVISION, PYTHON = WITHOUT_TEXT
TRANSFORMERS, TEXT_TOWER = READS_TEXT
SCHEMES = (*WITHOUT_TEXT, *READS_TEXT)


@dataclass(frozen=True)
class BackboneName:
    """A parsed name, `SCHEME:ARCHITECTURE[__pretrained__TAG_OR_FILE | __init__]`.

    Attributes:
        scheme: one of `SCHEMES`; `hf-hub:` or `local-dir:` for a repository of timm's.
        architecture: the name within the scheme.
        weights: a tag or a file; "" for those that come with the architecture, None for random
            initialisation.
    """

    scheme: str
    architecture: str
    weights: str | None

    @classmethod
    def parse(cls, name: str) -> BackboneName:
        """Parses a name.

        Raises:
            UsageError: if weights are named that the scheme does not have.
        """
        scheme = next(one for one in (*SCHEMES, HUB, FOLDER) if name.startswith(one))
        rest = name.removeprefix(scheme)
        architecture, _, weights = rest.removesuffix("__init__").partition("__pretrained__")
        named = bool(weights) or rest.endswith("__init__")
        if scheme == PYTHON and named:
            raise UsageError(
                f"{name}: the factory of a python: model gives its weights; name {PYTHON}"
                f"{architecture}, and a file of other weights with --load"
            )
        return cls(scheme, architecture, None if rest.endswith("__init__") else weights)

    @property
    def text(self) -> str:
        """The name that was parsed."""
        end = "__init__" if self.weights is None else ""
        tag = f"__pretrained__{self.weights}" if self.weights else ""
        return f"{self.scheme}{self.architecture}{tag}{end}"

    @property
    def file(self) -> Path | None:
        """The file of the weights, if the name contains one."""
        path = expanded(self.weights or "")
        with contextlib.suppress(OSError, ValueError):  # not a valid file name
            return path if self.weights and path.is_file() else None
        return None

    def folder(self) -> Path:
        """The folder of a repository, downloaded once.

        Raises:
            MissingFileError: if it is unavailable.
        """
        if self.scheme == HUB:
            return hub.fetch(f"{HUB}{self.architecture}")
        return Path(ClipName.parse(f"{FOLDER}{self.architecture}").folder or ".")


def is_backbone(name: str) -> bool:
    """Whether a model is no CLIP, by its name and, for a repository, its configuration."""
    if name.startswith(SCHEMES):
        return True
    return name.startswith((HUB, FOLDER)) and _is_timm(name.removesuffix("__init__"))


@functools.cache
def _is_timm(name: str) -> bool:
    """Whether a repository is timm's: it states an architecture, and has no CLIP."""
    if (folder := ClipName.parse(name).folder) is not None:
        own = folder / "config.json"
        return not (folder / CONFIG).is_file() and own.is_file() and _states(own)
    repo = name.removeprefix(HUB)
    return _file_of(repo, CONFIG) is None and _states(_file_of(repo, "config.json"))


def _states(path: Path | None) -> bool:
    if path is None:
        return False
    with contextlib.suppress(UsageError):
        return isinstance(read_json(path).get("architecture"), str)
    return False


def _file_of(repo: str, file: str) -> Path | None:
    """A file of a repository on the hub, from the cache or the network; None if there is none."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    with contextlib.suppress(Exception):  # of the library, of the network: no such file here
        cached: Any = try_to_load_from_cache(repo, file)
        return Path(cached if isinstance(cached, str) else hf_hub_download(repo, file))
    return None
