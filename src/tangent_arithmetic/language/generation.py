r"""Generation, greedy or by sampling, from standard, merged and linear models.

A standard model generates by transformers' `generate`. A linear one has no cache of keys and
values: its logits \(f_0 + J \tau\) come from one pass over the whole text for each token. Both
filter logits by transformers' own processors and draw from the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tangent_arithmetic.language.losses import language_model
from tangent_arithmetic.language.models import (
    PADDING,
    LanguageModel,
    Seq2SeqLM,
    check_room,
    trimmed,
)
from tangent_arithmetic.language.tokens import padded
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.tangent.linearized import LinearizedModel

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        new_tokens: the most tokens of a text.
        sample: draw tokens from their probabilities; otherwise the most likely one is taken.
        temperature: divides the logits.
        top_k: how many of the most likely tokens to draw from; 0 for all.
        top_p: the least probability that the tokens to draw from have together.
        seed: of the draws.
        end: tokens that end a text; None for the model's own.
    """

    new_tokens: int = 20
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    end: tuple[int, ...] | None = None

    def ends(self, config: Any) -> tuple[int, ...]:
        """The tokens that end a text of a model with this configuration."""
        if self.end is not None:
            return self.end
        own = config.eos_token_id
        return () if own is None else (own,) if isinstance(own, int) else tuple(own)


@torch.no_grad()
def generate(
    model: LanguageModel | LinearizedModel,
    prompts: Int64[Tensor, "batch length"],
    sampling: Sampling | None = None,
) -> Int64[Tensor, "batch new"]:
    """The tokens that follow each prompt, with -1 after the end of a text.

    Args:
        model: standard or linear; a sequence-to-sequence model reads the prompt by its encoder.
        prompts: ids with -1 on either side of the shorter ones.
        sampling: how tokens are chosen; greedy if None.

    Raises:
        UsageError: if a prompt has no tokens, or the model has too few positions.
    """
    sampling = sampling or Sampling()
    prompts = _aligned(prompts).to(next(model.parameters()).device)
    _check_room(language_model(model), prompts.shape[1], sampling.new_tokens)
    with torch.random.fork_rng([prompts.device] if prompts.is_cuda else []):
        torch.manual_seed(sampling.seed)
        if isinstance(model, LinearizedModel):
            return stepwise(model, prompts, sampling)
        return _by_transformers(model, prompts, sampling)


def _aligned(prompts: Int64[Tensor, "batch length"]) -> Int64[Tensor, "batch length"]:
    """The prompts with their padding on the right."""
    rows = [row[row != PADDING].tolist() for row in prompts]
    if [] in rows:
        raise UsageError(
            f"expected prompts of one token or more, got none in row {rows.index([])}; leave the "
            "row out"
        )
    return padded(rows)


def _check_room(model: LanguageModel, prompt: int, new: int) -> None:
    """Refuses more tokens than a model has positions for; the decoder's first one takes one."""
    for tokens in (prompt, new + 1) if isinstance(model, Seq2SeqLM) else (prompt + new,):
        check_room(model, tokens)


def _by_transformers(
    model: LanguageModel, prompts: Int64[Tensor, "batch length"], sampling: Sampling
) -> Int64[Tensor, "batch new"]:
    import transformers

    library: Any = transformers
    ends = sampling.ends(model.model.config)
    paired, ids = isinstance(model, Seq2SeqLM), prompts
    if not paired:  # the prompts on the right: what follows is in one column
        ids = padded([row[row != PADDING].flip(0).tolist() for row in prompts]).flip(1).to(prompts)
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    config = library.GenerationConfig(
        max_new_tokens=sampling.new_tokens,
        do_sample=sampling.sample,
        num_beams=1,
        **(drawn if sampling.sample else {}),
        eos_token_id=list(ends) or None,
        pad_token_id=0,
        decoder_start_token_id=model.start if isinstance(model, Seq2SeqLM) else None,
    )
    inner: Any = model.model
    own, inner.generation_config = inner.generation_config, library.GenerationConfig()
    try:  # what `config` leaves open would be the model's own, such as a penalty of repetitions
        whole = inner.generate(
            input_ids=ids.clamp(min=0),
            attention_mask=(ids != PADDING).long(),
            generation_config=config,
        )
    finally:
        inner.generation_config = own
    return _ended(whole[:, 1 if paired else ids.shape[1] :], ends)


def _ended(ids: Int64[Tensor, "batch new"], ends: tuple[int, ...]) -> Int64[Tensor, "batch new"]:
    """The ids with -1 after the first token that ends the text."""
    over = _is_in(ids, ends).cumsum(dim=1)
    before = torch.nn.functional.pad(over, (1, -1)) > 0
    return trimmed(ids.masked_fill(before, PADDING))


def _is_in(ids: Int64[Tensor, ...], ends: tuple[int, ...]) -> Bool[Tensor, ...]:
    return torch.isin(ids, torch.tensor(ends, dtype=ids.dtype, device=ids.device))


def stepwise(
    model: LanguageModel | LinearizedModel,
    prompts: Int64[Tensor, "batch length"],
    sampling: Sampling,
) -> Int64[Tensor, "batch new"]:
    """The tokens that follow each prompt, from a pass over the whole text for each token.

    Args:
        model: standard or linear.
        prompts: ids with -1 on the right of the shorter ones.
        sampling: how tokens are chosen; its seed is the caller's to set.
    """
    inner, choose = language_model(model), _choice(sampling)
    ends, rows = sampling.ends(inner.model.config), torch.arange(len(prompts)).to(prompts)
    seq2seq = isinstance(inner, Seq2SeqLM)
    text = torch.full_like(prompts[:, :1], inner.start) if isinstance(inner, Seq2SeqLM) else prompts
    first = (text != PADDING).sum(dim=1)
    text = torch.nn.functional.pad(text, (0, sampling.new_tokens), value=PADDING)
    over = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    for step in range(sampling.new_tokens):
        logits = model(_pair(prompts, text) if seq2seq else text)
        last = (first + step - 1).clamp(max=logits.shape[1] - 1)  # of a text that is over, any
        chosen = choose(text, logits[rows, last])
        text[rows, first + step] = torch.where(over, PADDING, chosen)
        over |= _is_in(chosen, ends)
        if bool(over.all()):
            break
    columns = first[:, None] + torch.arange(sampling.new_tokens, device=prompts.device)
    return trimmed(text.gather(1, columns))


def _pair(
    source: Int64[Tensor, "batch source"], target: Int64[Tensor, "batch target"]
) -> Int64[Tensor, "batch 2 length"]:
    width = max(source.shape[1], target.shape[1])
    both = (source, target)
    rows = [torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=PADDING) for ids in both]
    return torch.stack(rows, dim=1)


def _choice(
    sampling: Sampling,
) -> Callable[[Int64[Tensor, "batch length"], Float[Tensor, "batch vocabulary"]], Tensor]:
    """A function of the texts and the logits that follow them; gives the next tokens."""
    if not sampling.sample:
        return lambda text, logits: logits.argmax(dim=1)
    from transformers.generation import logits_process

    library: Any = logits_process
    filters = library.LogitsProcessorList()
    if sampling.temperature != 1:
        filters.append(library.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        filters.append(library.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        filters.append(library.TopPLogitsWarper(sampling.top_p))

    def draw(text: Tensor, logits: Tensor) -> Tensor:
        odds: Tensor = filters(text, logits.float()).softmax(dim=1)
        return torch.multinomial(odds, num_samples=1).squeeze(1)

    return draw
