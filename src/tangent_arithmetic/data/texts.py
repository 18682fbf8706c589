"""Texts as a data set, and the padding of their tokens.

A transform that reads texts has the attribute `reads_texts`; it maps a text to a vector of token
ids. In a batch shorter vectors end in `PADDING`, so that one tensor of integers holds the ids and
the attention mask, and all that evaluates, edits or fine-tunes is the same as for images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tangent_arithmetic.runtime.errors import PictureError, shown

if TYPE_CHECKING:
    from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class Texts:
    """Texts in memory.

    Attributes:
        texts: the texts.
        labels: int64 (texts,), or uint8 (texts, classes) where a text has several labels.
        name: where they come from, for messages.

    Raises:
        PictureError: if UTF-8 has no form for one, which no tokenizer would read.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    name: str = "texts"

    def __post_init__(self) -> None:
        for index, text in enumerate(self.texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise PictureError(
                    f"{self.name_of(index)} has half of a surrogate pair, expected a text that "
                    "UTF-8 can hold; decode it again, or remove it"
                ) from error

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        label = self.labels[index]
        return self.texts[index], label if np.ndim(label) else int(label)

    def name_of(self, index: int) -> str:
        """The name of a text, for messages: its data set, its number and how it begins."""
        return f"text {index} of {self.name} ('{shown(self.texts[index], 40)}')"

    @cached_property
    def ids(self) -> list[str]:
        """An id for each text, which follows from its content."""
        digests = (hashlib.sha256(text.encode()) for text in self.texts)
        return [digest.hexdigest()[:16] for digest in digests]

    def digests(self) -> list[Hashable]:
        """A key for each text that differs between different texts."""
        return list(self.texts)


def tokens_of(batch: Tensor) -> Tensor | None:
    """Which positions of a batch of texts hold tokens (texts, longest); None for images."""
    return None if batch.is_floating_point() or batch.ndim != 2 else batch != PADDING


def lengths_of(examples: Any, transform: Any = None) -> np.ndarray | None:
    """The length of each text of a split; None for images, which have one size.

    Args:
        examples: the split.
        transform: of the model. Lengths are in tokens if it has a method `lengths`, which maps
            texts to theirs, else in characters.
    """
    texts = _texts_of(examples)
    if texts is None:
        return None
    measure = getattr(transform, "lengths", None) if texts else None  # tokenizers fail on nothing
    lengths = [len(text) for text in texts] if measure is None else measure(texts)
    return np.asarray(lengths, np.int64)


def _texts_of(examples: Any) -> list[str] | None:
    """The texts of a split; None for images."""
    if isinstance(examples, Texts):
        return list(examples.texts)
    indices = getattr(examples, "indices", None)
    inner = None if indices is None else _texts_of(getattr(examples, "pictures", None))
    return None if indices is None or inner is None else [inner[int(i)] for i in indices]


def check_reads(transform: Any, value: object, name: Callable[[], str]) -> None:
    """Checks that a model reads what a data set holds.

    Args:
        transform: of the model; None for none.
        value: an untransformed text or image.
        name: gives its name.

    Raises:
        PictureError: if the model reads texts and the data set holds images, or the reverse.
    """
    reads_texts, is_text = getattr(transform, "reads_texts", False), isinstance(value, str)
    if transform is None or reads_texts == is_text:
        return
    one, other = ("text", "images") if is_text else ("image", "texts")
    raise PictureError(
        f"{name()} is {'a' if is_text else 'an'} {one}, and the model reads {other}; name a model "
        f"that reads {one}s: --model={'transformers:NAME' if is_text else 'ViT-B-32'}, or other "
        "data"
    )


def collate(items: Sequence[tuple[Any, Any]]) -> Any:
    """A batch of transformed examples and labels; vectors of token ids are padded at the end."""
    from torch import Tensor
    from torch.utils.data import default_collate

    first = items[0][0]
    if not isinstance(first, Tensor) or first.ndim != 1 or first.is_floating_point():
        return default_collate(list(items))
    tokens, labels = zip(*items, strict=True)
    return pad(tokens), default_collate(list(labels))


def pad(tokens: Sequence[Tensor]) -> Tensor:
    """Vectors of token ids as one int64 matrix (texts, longest), see `PADDING`."""
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence(list(tokens), batch_first=True, padding_value=PADDING)
