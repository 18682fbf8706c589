"""Generative and classifying models of transformers as modules from token ids to logits.

Each takes one integer tensor in which -1 is padding, on the right; decoders alone take it on the
left too. Dropout is off in training too: the linear and the standard model then differ in nothing
else.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from typing_extensions import Self

from tangent_arithmetic.data.texts import PADDING
from tangent_arithmetic.encoders.backbones.sentences import (
    first_position,
    last_pooling,
    positions_of,
)
from tangent_arithmetic.runtime.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


def trimmed(ids: Int64[Tensor, "batch length"]) -> Int64[Tensor, "batch positions"]:
    """The ids without the last columns that are padding in every row; at least one column."""
    columns = (ids != PADDING).any(dim=0).nonzero()
    return ids[:, : max(1, int(columns.max()) + 1 if len(columns) else 1)]


class TokenModel(nn.Module):
    """A model of transformers that maps a tensor of token ids to a tensor.

    Args:
        model: the model; used as it is, not copied.

    Attributes:
        model: the same.
        positions: the most tokens that it takes; None if it has no limit.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self._first, self.positions = first_position(model), positions_of(model)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, without dropout."""
        return super().train(False)

    def inputs(self, ids: Int64[Tensor, "batch length"]) -> dict[str, Any]:
        """The model's inputs for a row of ids: the tokens, their mask, and their positions.

        Raises:
            UsageError: if a row has more tokens than the model has positions.
        """
        mask = ids != PADDING
        check_room(self, int(mask.sum(dim=1).amax()))
        inputs = {"input_ids": ids.clamp(min=0), "attention_mask": mask.long(), "use_cache": False}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0) + self._first
        return inputs


def check_room(model: TokenModel, tokens: int) -> None:
    """Checks that a model has positions for a number of tokens.

    Raises:
        UsageError: if it has not.
    """
    if model.positions is not None and tokens > model.positions:
        raise UsageError(
            f"the model has positions for {model.positions} tokens, got {tokens}; expected no "
            "more, give shorter rows or fewer new tokens"
        )


def check_positions(model: TokenModel, **flags: int) -> None:
    """Checks that a model has as many positions as flags ask for; some have no limit.

    Raises:
        UsageError: naming the first flag that asks for more.
    """
    most = model.positions
    if most is not None and isinstance(model, Seq2SeqLM):
        most -= 1  # the decoder's first token takes one
    for flag, tokens in flags.items():
        if most is not None and tokens > most:
            raise UsageError(
                f"--{flag}={tokens}: the model has positions for {most} tokens; expected no more, "
                f"give --{flag}={most} or less"
            )


class LanguageModel(TokenModel):
    """A model that gives logits of the next token; subclasses define `forward`."""

    def sequence(self, ids: Int64[Tensor, ...]) -> Int64[Tensor, "batch length"]:
        """The ids that the model continues: those of the text, or of the decoder."""
        raise NotImplementedError

    def forward(self, ids: Int64[Tensor, ...]) -> Float[Tensor, "batch positions vocabulary"]:
        """Logits of the token after each position.

        Positions end with the last one that is not padding in every row.
        """
        raise NotImplementedError


class CausalLM(LanguageModel):
    """A decoder, such as GPT-2 or Llama, on ids of shape (batch, length)."""

    def sequence(self, ids: Int64[Tensor, "batch length"]) -> Int64[Tensor, "batch length"]:
        """The ids themselves."""
        return ids

    def forward(
        self, ids: Int64[Tensor, "batch length"]
    ) -> Float[Tensor, "batch positions vocabulary"]:
        """Logits of the token after each position."""
        logits: Tensor = self.model(**self.inputs(trimmed(ids))).logits
        return logits


class Seq2SeqLM(LanguageModel):
    """An encoder and a decoder, such as T5.

    Its input is a pair of rows in one tensor of shape (batch, 2, length), see `tokens.paired`: the
    source, and the decoder's ids, which begin with `start`.
    """

    @property
    def start(self) -> int:
        """The token with which the decoder begins."""
        return int(self.model.config.decoder_start_token_id)

    def sequence(self, ids: Int64[Tensor, "batch 2 length"]) -> Int64[Tensor, "batch length"]:
        """The decoder's ids."""
        return ids[:, 1]

    def forward(
        self, ids: Int64[Tensor, "batch 2 length"]
    ) -> Float[Tensor, "batch positions vocabulary"]:
        """Logits of the token after each position of the decoder."""
        source, target = trimmed(ids[:, 0]), trimmed(ids[:, 1])
        check_room(self, target.shape[1])
        decoder = {
            "decoder_input_ids": target.clamp(min=0),
            "decoder_attention_mask": (target != PADDING).long(),
        }
        logits: Tensor = self.model(**self.inputs(source), **decoder).logits
        return logits


HEADS = ("score", "classification_head")


def head_of(model: nn.Module) -> str:
    """The name of a classifier's head.

    Raises:
        UsageError: if it is none of `HEADS`.
    """
    for name in HEADS:
        if hasattr(model, name):
            return name
    raise UsageError(
        f"{type(model).__name__} has no head on the last token; expected a classifier with a "
        f"{' or '.join(HEADS)}, such as GPT-2, Llama or T5"
    )


class TextClassifier(TokenModel):
    """A body and a head on the hidden state of the last token, as transformers has them.

    Takes `GPT2ForSequenceClassification`, `LlamaForSequenceClassification`,
    `T5ForSequenceClassification` and the like. An encoder-decoder reads the text in both, as
    transformers' does.
    """

    @property
    def head(self) -> str:
        """The name of the head, with which its parameters' names begin."""
        return f"model.{head_of(self.model)}"

    def forward(self, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch classes"]:
        """Logits of the classes."""
        ids = trimmed(ids)
        inputs, body = self.inputs(ids), self.model.base_model
        if self.model.config.is_encoder_decoder:
            start = self.model.config.decoder_start_token_id
            inputs["decoder_input_ids"] = nn.functional.pad(
                inputs["input_ids"], (1, -1), value=start
            )
        hidden = last_pooling(body(**inputs)[0], ids != PADDING)
        logits: Tensor = self.get_submodule(self.head)(hidden)
        return logits
