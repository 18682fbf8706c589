"""Tokenizers of `transformers`: their files, and whether they are complete and fit their model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tangent_arithmetic.runtime.errors import UsageError, shown

FILES = ("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "*.model")
BOUNDARY = "▁"  # of words, in vocabularies of SentencePiece: no token of a text by itself


def files_of(folder: Path) -> list[Path]:
    """The files that decide the tokens of a text, sorted.

    Raises:
        UsageError: if there are none.
    """
    files = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
    if not files:
        raise _missing(folder)
    return sorted(files)


def check_tokens(tokenizer: Any, place: str | Path) -> None:
    """Refuses a tokenizer without tokens, which transformers makes where a file is missing.

    Args:
        tokenizer: the tokenizer.
        place: its folder or repository, for the message.

    Raises:
        UsageError: if it has no tokens but special ones.
    """
    if not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens, BOUNDARY}:
        raise _missing(place)


def check_fits(tokenizer: Any, model: nn.Module, place: str | Path) -> None:
    """Refuses a tokenizer with tokens that its model does not embed.

    Special tokens that no text has, such as one for padding alone, need not be embedded.

    Args:
        tokenizer: the tokenizer.
        model: of `transformers`.
        place: their folder or repository, for the message.

    Raises:
        UsageError: if a text may have such a token.
    """
    rows = getattr(model.config, "vocab_size", None)
    if rows is None:  # a model that hashes characters
        return
    special = {*tokenizer.all_special_ids} - {*tokenizer("")["input_ids"]}
    numbers = {number: token for token, number in tokenizer.get_vocab().items()}
    largest = max(numbers.keys() - special, default=0)
    if largest >= rows:
        raise UsageError(
            f"{place}: its tokenizer has the token {shown(numbers[largest])} with the number "
            f"{largest}, but its model embeds {rows} tokens; call model.resize_token_embeddings("
            "len(tokenizer)) and save it again, or take the model's own tokenizer"
        )


def _missing(place: str | Path) -> UsageError:
    return UsageError(
        f"{place} has no tokenizer; save it there with tokenizer.save_pretrained({str(place)!r})"
    )
