"""Texts as token ids: rows of one length with -1 as padding, pairs, and blocks of a stream."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.data.texts import PADDING, pad
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import content_hash

if TYPE_CHECKING:
    from jaxtyping import Int64

logger = logging.getLogger(__name__)

Ids = list[int]


@dataclass(frozen=True)
class TokenRows:
    """Rows of ids as a data set of the training loop.

    Attributes:
        ids: integers, shape (rows, length) or (rows, 2, length).
        labels: the class of each row; None for zeros, which a loss over tokens does not look at.
    """

    ids: Int64[Tensor, "rows ..."]
    labels: Int64[Tensor, " rows"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.ids[index], 0 if self.labels is None else int(self.labels[index])

    def digest(self) -> str:
        """The hash of all ids and labels."""
        return content_hash(
            {name: value for name, value in vars(self).items() if value is not None}
        )


def encode(
    texts: Sequence[str], tokenizer: Any, length: int, pairs: Sequence[str] | None = None
) -> list[Ids]:
    """The ids of each text, with the tokenizer's special tokens.

    Args:
        texts: the texts.
        tokenizer: of transformers.
        length: tokens after which a text is cut; how many are is logged.
        pairs: the second text of each, if there are two.

    Raises:
        UsageError: if a text has no tokens.
    """
    if not texts:
        return []
    second = {} if pairs is None else {"text_pair": list(pairs)}
    whole = tokenizer(list(texts), **second, verbose=False)["input_ids"]
    if empty := [index for index, ids in enumerate(whole) if not ids]:
        raise UsageError(
            f"{len(empty)} of {len(texts)} texts have no tokens, the first of them text "
            f"{empty[0]}; expected texts that are not empty; leave these out"
        )
    if long := sum(len(ids) > length for ids in whole):
        logger.info("%d of %d texts are cut after %d tokens", long, len(texts), length)
        whole = tokenizer(list(texts), **second, truncation=True, max_length=length)["input_ids"]
    return [list(ids) for ids in whole]


def padded(rows: Sequence[Sequence[int]], length: int = 0) -> Int64[Tensor, "rows length"]:
    """The rows as one tensor, with -1 on the right of the shorter ones.

    Args:
        rows: ids of each text.
        length: columns, if they are to be more than the longest row has.
    """
    ids = pad([torch.tensor(row, dtype=torch.int64) for row in rows])
    return F.pad(ids, (0, max(0, length - ids.shape[1])), value=PADDING)


def paired(
    sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], start: int
) -> Int64[Tensor, "rows 2 length"]:
    """The inputs of a `Seq2SeqLM`: each source, and its target after the decoder's first token.

    Args:
        sources: ids of the encoder.
        targets: ids of the decoder without its first token; empty to generate.
        start: that token.
    """
    begun = [[start, *target] for target in targets]
    length = max(map(len, chain(sources, begun)))
    return torch.stack([padded(sources, length), padded(begun, length)], dim=1)


def blocks(texts: Iterable[str], tokenizer: Any, block: int) -> Int64[Tensor, "rows block"]:
    """All texts as one stream without special tokens, cut into rows of `block` tokens.

    The last row is shorter, and left out if it has a single token, which has no context.

    Args:
        texts: in order; they are joined as they are.
        tokenizer: of transformers.
        block: tokens of a row, at least 2.

    Raises:
        UsageError: if there are fewer than two tokens.
    """
    texts = [text for text in texts if text]
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    stream = list(chain.from_iterable(found))
    rows = [stream[start : start + block] for start in range(0, len(stream), block)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise UsageError(f"expected texts of two tokens or more, got {len(stream)} in all")
    return padded(rows, block)
