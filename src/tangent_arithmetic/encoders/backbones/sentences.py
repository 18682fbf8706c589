"""Encoders of texts: modules from token ids to pooled features, and the transform of a text.

A text becomes a vector of token ids, see `data.texts`, and its features are the model's outputs
pooled over its tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tangent_arithmetic.data.texts import PADDING
from tangent_arithmetic.encoders.backbones.sentence_files import Reading
from tangent_arithmetic.runtime.errors import UsageError, shown

if TYPE_CHECKING:
    from jaxtyping import Float, Int

logger = logging.getLogger(__name__)

SCALE = 20.0  # of similarities, the usual one of sentence-transformers (arXiv:1908.10084)
AS_IT_IS = Reading()
PROBED = 4  # tokens whose features are compared with and without padding
TOLERANCE = 1e-3  # of the largest feature; rounding makes less than a hundredth of it

Pooling = Callable[[Tensor, Tensor], Tensor]  # (batch, length, width), (batch, length) -> features


def mean_pooling(
    hidden: Float[Tensor, "batch length width"], mask: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch width"]:
    """The mean over the tokens that are not padding."""
    weights = mask.to(hidden.dtype)[..., None]  # (batch, length, 1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def first_pooling(
    hidden: Float[Tensor, "batch length width"], mask: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch width"]:
    """The first token's."""
    return hidden[:, 0]


def last_pooling(
    hidden: Float[Tensor, "batch length width"], mask: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch width"]:
    """That of the last token that is not padding, on whichever side the padding is."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), columns, 0).amax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


POOLINGS: Mapping[str, Pooling] = {"mean": mean_pooling, "cls": first_pooling, "last": last_pooling}


class SentenceModel(nn.Module):
    """A model of `transformers` whose outputs are pooled.

    Args:
        model: the model; its output has `last_hidden_state`.
        pooling: one of `POOLINGS`.

    Attributes:
        scale: factor of similarities in a zero-shot head.
    """

    def __init__(self, model: nn.Module, pooling: str) -> None:
        super().__init__()
        self.model, self.pooling, self.scale = model, pooling, SCALE

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch width"]:
        """Features of texts."""
        mask = (tokens != PADDING).long()
        hidden = self.model(input_ids=tokens.clamp(min=0), attention_mask=mask).last_hidden_state
        return POOLINGS[self.pooling](hidden, mask)


class TextTower(nn.Module):
    """The text tower of a CLIP, with its projection.

    Args:
        clip: a CLIP of open_clip.
        padding: the id with which its tokenizer fills up the shorter texts.
    """

    def __init__(self, clip: nn.Module, padding: int) -> None:
        super().__init__()
        clip.visual = None  # type: ignore[assignment]
        self.clip, self.padding = clip, padding

    @property
    def scale(self) -> float:
        """Factor of similarities in a zero-shot head."""
        return float(self.clip.logit_scale.exp())  # type: ignore[operator]

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch width"]:
        """Features of texts."""
        filled = tokens.masked_fill(tokens == PADDING, self.padding)
        features: Tensor = self.clip.encode_text(filled)  # type: ignore[operator]
        return features


def first_position(model: nn.Module) -> int:
    """The number of a text's first position: 0, or in RoBERTa and its kin after padding's."""
    padding = (
        getattr(module, "padding_idx", None)
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
    )
    return max((index + 1 for index in padding if index is not None), default=0)


def positions_of(model: nn.Module) -> int | None:
    """The most tokens that a model of `transformers` takes; None if it has no limit."""
    most: int | None = getattr(model.config, "max_position_embeddings", None)  # -1 in XLNet
    return most - first_position(model) if most and most > 0 else None


def check_padding(model: nn.Module, tokens: Sequence[int], length: int, place: str) -> None:
    """Refuses a model whose features of a text depend on the padding behind it.

    Args:
        model: maps token ids to features.
        tokens: of a text; at most four are used.
        length: most tokens of a text.
        place: the model's name, for the message.

    Raises:
        UsageError: if the features differ, as those of FNet and Funnel do.
    """
    width = min(2 * PROBED, length)
    if next(model.parameters()).is_meta or width < 2 or not tokens:
        return
    ids = torch.tensor([tokens[: width // 2]])
    padded = nn.functional.pad(ids, (0, width - ids.shape[1]), value=PADDING)
    with torch.no_grad():
        alone, behind = model(ids), model(padded)
    if float((alone - behind).abs().max()) > TOLERANCE * float(alone.abs().max()):
        raise UsageError(
            f"{place}: its features of a text depend on the padding in a batch, expected the same "
            "ones in every batch; name another model"
        )


class Tokenize:
    """The transform of a text by a tokenizer of `transformers`: its token ids, int64 (length,).

    Args:
        tokenizer: the tokenizer.
        length: most tokens of a text; longer ones are truncated.
        recipe: what identifies the tokenizer, a JSON value.
        reading: what becomes of a text before it has tokens.
    """

    reads_texts = True
    remedy = "choose another length as in --model=transformers:NAME?length=N"

    def __init__(
        self, tokenizer: Any, length: int, recipe: Any, reading: Reading = AS_IT_IS
    ) -> None:
        self.tokenizer, self.length, self.reading = tokenizer, length, reading
        self.recipe = {"tokenizer": recipe, "length": length}
        if reading.prompt or reading.lower:
            self.recipe |= {"prompt": reading.prompt, "lower": reading.lower}

    def __call__(self, text: str) -> Tensor:
        """The token ids of a text."""
        ids, cut = self.encode(text)
        if cut:
            _say_cut(self.length, shown(text, 60), self.remedy)
        if not ids:
            raise UsageError(f"the text '{shown(text, 60)}' has no tokens; remove it")
        return torch.tensor(ids, dtype=torch.int64)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, after truncation."""
        read = list(map(self.reading, texts))
        encodings = self.tokenizer(read, truncation=True, max_length=self.length)
        return [len(ids) for ids in encodings["input_ids"]]

    def encode(self, text: str) -> tuple[list[int], bool]:
        """The token ids of a text, and whether it was truncated."""
        encoding = self.tokenizer(self.reading(text), truncation=True, max_length=self.length)
        parts = encoding.encodings  # None for a tokenizer written in Python
        return encoding["input_ids"], bool(parts and parts[0].overflowing)


class ClipTokenize(Tokenize):
    """The transform of a text by a tokenizer of open_clip: as many ids for each text.

    Attributes:
        padding: the id with which the tokenizer fills up the shorter texts.
    """

    remedy = "this model takes no more"

    def __init__(self, tokenizer: Any, length: int, recipe: Any) -> None:
        super().__init__(tokenizer, length, recipe)
        self.padding = int(tokenizer([""])[0, -1])

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of ids of each text, padding included: the tower has one length."""
        return [self.length] * len(texts)

    def encode(self, text: str) -> tuple[list[int], bool]:
        """The token ids of a text, and whether it was truncated."""
        ids = self.tokenizer([text])[0].tolist()
        kept = next((n for n in range(len(ids), 0, -1) if ids[n - 1] != self.padding), 0)
        return ids[:kept] + [PADDING] * (len(ids) - kept), kept == len(ids)


_said: set[int] = set()  # lengths at which texts have been truncated in this process


def _say_cut(length: int, text: str, remedy: str) -> None:
    """Says, once a process, that texts are truncated."""
    if length not in _said:
        _said.add(length)
        logger.warning(
            "texts of more than %d tokens are truncated, the first of them is '%s'; %s",
            length,
            text,
            remedy,
        )
