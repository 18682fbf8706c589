"""Tiny random models of transformers, a tokenizer, and folders of data sets as the hub has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tangent_arithmetic.language.models import CausalLM, LanguageModel, Seq2SeqLM

VOCABULARY = 40
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def gpt2(attention: str = "sdpa", **settings: Any) -> CausalLM:
    """A GPT-2, whose output weights are its input embeddings."""
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**{**SMALL, **shape, **settings})
    config._attn_implementation = attention
    return CausalLM(drawn(transformers.GPT2LMHeadModel(config)))


def llama(attention: str = "sdpa", **settings: Any) -> CausalLM:
    """A Llama with grouped keys and untied output weights."""
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = transformers.LlamaConfig(**{**SMALL, **shape, **settings})
    config._attn_implementation = attention
    return CausalLM(drawn(transformers.LlamaForCausalLM(config)))


def t5(attention: str = "eager", **settings: Any) -> Seq2SeqLM:
    """A T5, whose encoder, decoder and output share their embeddings."""
    shape: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    shape |= {"feed_forward_proj": "gated-gelu"}  # as flan-t5; smooth, unlike ReLU
    special = {"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.T5Config(**{"vocab_size": VOCABULARY, **shape, **special, **settings})
    config._attn_implementation = attention
    return Seq2SeqLM(drawn(transformers.T5ForConditionalGeneration(config), 0.12))


def bart() -> Seq2SeqLM:
    """A BART, whose positions are absolute."""
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 16, "max_position_embeddings": 64}
    for part in ("encoder", "decoder"):
        shape |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 32}
    shape |= {"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.BartConfig(**shape, forced_eos_token_id=2)
    return Seq2SeqLM(drawn(transformers.BartForConditionalGeneration(config)))


def drawn(model: Any, scale: float = 0.2) -> Any:
    """The model with weights larger than transformers draws, so that all of it matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=scale)
            elif "norm" in name or "ln" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


MODELS: dict[str, Callable[[], LanguageModel]] = {
    "GPT-2, sdpa": gpt2,
    "GPT-2, eager": lambda: gpt2("eager"),
    "Llama, sdpa": llama,
    "Llama, eager": lambda: llama("eager"),
    "T5, eager": t5,
    "T5, sdpa": lambda: t5("sdpa"),
    "T5, untied": lambda: t5(tie_word_embeddings=False),
}


def rows(model: LanguageModel, lengths: Sequence[int] = (7, 3, 5)) -> Tensor:
    """Random ids for a model, with padding on the right."""
    width = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width))
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = -1
    if not isinstance(model, Seq2SeqLM):
        return ids
    target = ids.flip(0).clone()
    target[:, 0] = 0
    target[:, 5:] = -1
    return torch.stack([ids, target], dim=1)


def direction(model: torch.nn.Module, scale: float = 0.05) -> dict[str, Tensor]:
    """A random task vector."""
    return {name: scale * torch.randn_like(p) for name, p in model.named_parameters()}


WORDS = (  # noqa: SIM905 - a list of words is read more easily
    "the a film book meal hotel lamp was is not very good bad fine dull great awful and or it this "
    "we you they like hate love stupid fool idiot nice people yes no acceptable unacceptable "
    "positive negative entailment neutral contradiction"
).split()


def save_tokenizer(folder: Path, sentence_end: bool = False) -> Any:
    """Writes a tokenizer of words and characters; with `sentence_end` it appends </s>, as T5's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    characters = [chr(code) for code in range(33, 127)]
    pieces = ["<pad>", "</s>", "<unk>", *characters, *(f"##{c}" for c in characters), *WORDS]
    ids = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    if sentence_end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", ids["</s>"])]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast
