"""Encoders of texts by name: models of `transformers`, and text towers of CLIPs.

Outputs are pooled as the model's configuration says: "mean" of the tokens, the first one ("cls"),
or the "last" one. Dropout is off, since the linear model has none.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import nn

from tangent_arithmetic.encoders.backbones import tokenizers
from tangent_arithmetic.encoders.backbones.building import Backbone, check_size, unavailable
from tangent_arithmetic.encoders.backbones.names import TEXT_TOWER, TRANSFORMERS, BackboneName
from tangent_arithmetic.encoders.backbones.sentence_files import pooling, reading
from tangent_arithmetic.encoders.backbones.sentences import (
    POOLINGS,
    ClipTokenize,
    SentenceModel,
    TextTower,
    Tokenize,
    check_padding,
    positions_of,
)
from tangent_arithmetic.encoders.clip import create_clip, tokenizer_of
from tangent_arithmetic.encoders.published.huggingface import weight_files
from tangent_arithmetic.encoders.published.minilm import model_folder
from tangent_arithmetic.runtime.digests import file_hash
from tangent_arithmetic.runtime.errors import UsageError, unknown
from tangent_arithmetic.storage.wrappers import read_weights

OPTIONS = ("pooling", "length")
LONGEST = 512  # tokens, where neither the name nor the model's files say


def build(name: BackboneName, weights: bool) -> Backbone:
    """A model of `transformers` by its name.

    Args:
        name: a folder or a repository of the hub, and `?pooling=...&length=...`.
        weights: whether to load its weights.

    Raises:
        UsageError: if it is unknown, does not return features of tokens, or its weights or its
            tokenizer do not fit.
    """
    place, options = _with_options(name)
    folder = model_folder(place)
    pooled, length = options.get("pooling") or pooling(folder), options.get("length")
    with unavailable(f"{TRANSFORMERS}{place}", False):
        module = _module(folder, weights and name.weights is not None, place)
        transform = _tokenize(folder, module, int(length) if length else None)
        model = SentenceModel(module, pooled)
        check_padding(model, transform.encode("a text")[0], transform.length, place)
    config = file_hash(folder / "config.json")
    transform.recipe |= {"pooling": pooled, "config": config}  # of the features too
    return Backbone(model, transform, transform)


def build_tower(name: BackboneName, weights: bool) -> Backbone:
    """The text tower of a CLIP by its name, see `encoders.clip.ClipName`."""
    clip_name = name.text.removeprefix(TEXT_TOWER)
    clip, _, _ = create_clip(clip_name, weights=weights)
    clip.tokenizer = None  # type: ignore[assignment]
    length = int(getattr(clip, "context_length", 77))
    transform = ClipTokenize(tokenizer_of(clip_name), length, clip_name)
    return Backbone(TextTower(clip, transform.padding), transform, transform)


def _with_options(name: BackboneName) -> tuple[str, dict[str, str]]:
    """The folder or repository in a name, and its options."""
    place, _, query = name.architecture.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option, value in options.items():
        if option not in OPTIONS:
            raise unknown(f"option of {TRANSFORMERS}{place}", option, OPTIONS)
        if option == "pooling" and value not in POOLINGS:
            raise unknown("pooling", value, POOLINGS)
        if option == "length" and not (value.isdecimal() and int(value) > 0):
            raise UsageError(f"{TRANSFORMERS}{place}: expected a length of 1 or more, got {value}")
    return place, options


def _module(folder: Path, weights: bool, place: str) -> nn.Module:
    """The model without dropout and without a pooler of its own."""
    import transformers

    auto: Any = transformers.AutoModel
    config = transformers.AutoConfig.from_pretrained(folder)
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    if getattr(config, "is_encoder_decoder", False):
        auto = transformers.AutoModelForTextEncoding
    if not weights:
        module: nn.Module = auto.from_config(config)
    else:
        files = weight_files(folder)
        with torch.device("meta"):
            outline = auto.from_config(config)
        check_size(outline, files, place)
        state = {key: value for file in files for key, value in read_weights(file).items()}
        with _quiet():
            module, report = type(outline).from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True
            )
        missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
        if missing or report["mismatched_keys"]:
            raise UsageError(
                f"{folder}: its weights do not fit its configuration; missing or of another shape: "
                f"{', '.join(map(str, [*missing, *report['mismatched_keys']][:5]))}"
            )
    if hasattr(module, "pooler"):
        module.pooler = None  # type: ignore[assignment]
    return module.float().eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the library's bar and report of loading; what the report may say is checked here."""
    from transformers.utils import logging as library

    logging: Any = library  # parts of it have no types
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _tokenize(folder: Path, module: nn.Module, length: int | None) -> Tokenize:
    """The tokenizer of a model."""
    import transformers

    files = tokenizers.files_of(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizers.check_tokens(tokenizer, folder)
    tokenizers.check_fits(tokenizer, module, folder)
    most = int(tokenizer.model_max_length)
    most = min(most, positions_of(module) or most)
    if length is not None and length > most:
        raise UsageError(f"{folder} takes at most {most} tokens, got length={length}")
    read = reading(folder)
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
    return Tokenize(tokenizer, length or min(most, read.length or LONGEST), digest, read)
