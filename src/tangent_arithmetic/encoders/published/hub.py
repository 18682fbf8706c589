"""Checkpoints on the Hugging Face hub: `hf-hub:ORG/NAME`, downloaded once."""

from __future__ import annotations

import re
from pathlib import Path

from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, hub_failure

HUB = "hf-hub:"
NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "*.model")
OTHERS = ("added_tokens.json", "preprocessor_config.json", "generation_config.json", "README.md")
PROCESSOR = ("processor_config.json", "chat_template*")
SENTENCES = ("modules.json", "*sentence_*.json", "*/config.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the preferred one first
ADAPTERS = ("adapter_config.json", "adapter_model.*")


def is_hub(path: str | Path) -> bool:
    """Whether a path names a checkpoint on the hub."""
    return str(path).startswith(HUB)


def fetch(path: str | Path) -> Path:
    """Downloads `hf-hub:ORG/NAME[@REVISION]` to the hub's cache (`HF_HOME`); returns its folder.

    Only the configuration, weights (safetensors if there are any), adapters, tokenizer, processor,
    chat template and model card are downloaded, and only once.

    Raises:
        MissingFileError: if the hub is unreachable and the cache has no copy, or there are no
            weights.
        UsageError: if the name is invalid.
    """
    from huggingface_hub import constants, snapshot_download

    match = NAME.fullmatch(str(path).removeprefix(HUB))
    if match is None:
        raise UsageError(f"invalid hub name {path}; expected hf-hub:ORG/NAME[@REVISION]")
    repo, revision = match["repo"], match["revision"]
    always = ["config.json", *TOKENIZER, *OTHERS, *PROCESSOR, *SENTENCES, *ADAPTERS]
    for name in WEIGHTS:
        stem, _, kind = name.partition(".")
        index = f"{name}.index.json"
        wanted = [*always, name, index, f"{stem}-*.{kind}"]
        try:
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        except Exception as error:  # of the library, of the network, of the file system
            raise MissingFileError(
                f"{path} is unavailable {hub_failure(error)}. Looked for {repo} in "
                f"{constants.HF_HUB_CACHE} and on the hub; without a network, put its config.json "
                "and weights into a folder and name the folder"
            ) from error
        if (folder / name).is_file() or (folder / index).is_file():
            return folder
        if (folder / ADAPTERS[0]).is_file():
            return folder
    raise MissingFileError(f"{path}: expected {' or '.join(WEIGHTS)}, got no weights")
