"""Checkpoints on the Hugging Face hub: `hf-hub:ORG/NAME`, downloaded once."""

from __future__ import annotations

import re
from pathlib import Path

from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, hub_failure

HUB = "hf-hub:"
NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
TEXT = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json")  # small
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the better first


def is_hub(path: str | Path) -> bool:
    """Whether a path is the name of a checkpoint on the hub."""
    return str(path).startswith(HUB)


def fetch(path: str | Path) -> Path:
    """The local folder of `hf-hub:ORG/NAME[@REVISION]`, in the hub's cache (`HF_HOME`).

    Configuration, weights and tokenizer alone are downloaded, and what is there already is not;
    safetensors are preferred to pickles.

    Raises:
        MissingFileError: if the hub cannot be asked and the cache has no copy, or has no weights.
        UsageError: if the name is none.
    """
    from huggingface_hub import constants, snapshot_download

    match = NAME.fullmatch(str(path).removeprefix(HUB))
    if match is None:
        raise UsageError(f"{path} is no name on the hub, expected hf-hub:ORG/NAME[@REVISION]")
    repo, revision = match["repo"], match["revision"]
    for name in WEIGHTS:
        stem, _, kind = name.partition(".")
        index = f"{name}.index.json"
        wanted = ["config.json", name, index, f"{stem}-*.{kind}", *TEXT]
        try:
            found = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        except Exception as error:  # of the library, of the network, of the file system
            raise MissingFileError(
                f"{path} cannot be had {hub_failure(error)}. Looked for {repo} in "
                f"{constants.HF_HUB_CACHE} and on the hub; without a network put its config.json "
                "and weights into a folder and name the folder"
            ) from error
        if (found / name).is_file() or (found / index).is_file():
            return found
    raise MissingFileError(f"{path} has no weights, expected {' or '.join(WEIGHTS)}")
