"""Tiny models of `transformers` with tokenizers, as folders of their own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

LINES = (
    "good great lovely fine bad awful poor sad movie plot actor phone screen battery soup cake",
    "taste the a is was of very not and it this review opinion positive negative . !",
)
WORDS = [word for line in LINES for word in line.split()]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZE = len(WORDS) + len(SPECIAL)
KINDS = ("bert", "gpt2", "llama", "t5")


def tokenizer_folder(folder: Path, length: int = 32) -> None:
    """Writes a word-level tokenizer with BERT's special tokens."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=length,
    ).save_pretrained(folder)


def module(kind: str) -> Any:
    """A tiny model with random weights and the usual dropout."""
    torch.manual_seed(0)
    small: Any = {"num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
    if kind == "bert":
        return BertModel(BertConfig(vocab_size=SIZE, hidden_size=16, **small))
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        )
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=SIZE, hidden_size=16, max_position_embeddings=32, **small)
        )
    return T5ForConditionalGeneration(
        T5Config(vocab_size=SIZE, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def model_folder(folder: Path, kind: str = "bert", pooling: str | None = None) -> Path:
    """Writes a model with its tokenizer, and the pooling configuration of sentence-transformers.

    Args:
        folder: the folder.
        kind: one of `KINDS`.
        pooling: the key that is true, such as "pooling_mode_cls_token"; None for no such file.
    """
    module(kind).save_pretrained(folder)
    tokenizer_folder(folder)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        text = json.dumps({"word_embedding_dimension": 16, pooling: True})
        (folder / "1_Pooling" / "config.json").write_text(text)
    return folder
