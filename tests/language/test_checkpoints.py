from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tangent_arithmetic.language.checkpoints import (
    load_causal,
    load_classifier,
    load_judge,
    load_tokenizer,
)
from tangent_arithmetic.runtime.errors import UsageError
from tests.language.makers import gpt2
from tests.language.worlds import World


def bert(folder: Path) -> None:
    """Writes a body without a head."""
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=9, **shape)).save_pretrained(folder)


def part(folder: Path) -> None:
    """Writes a GPT-2 without a block."""
    model = gpt2().model
    kept = {name: value for name, value in model.state_dict().items() if "h.1." not in name}
    model.save_pretrained(folder, state_dict=kept)


LACKING: dict[str, tuple[Callable[[Path], Any], Callable[..., Any], str]] = {
    "a block": (part, load_causal, "lacks 12 weights of GPT2LMHeadModel, .* transformer.h.1.attn"),
    "a judge's head": (bert, load_judge, "lacks 2 weights of BertFor.*classifier.bias"),
    "a head": (lambda f: gpt2().model.save_pretrained(f), load_classifier, "of them score.weight"),
    "more than a head": (part, lambda f: load_classifier(f, 2), "lacks 12 weights of GPT2ForSeq"),
}


@pytest.mark.parametrize("write, load, message", LACKING.values(), ids=LACKING)
def test_weights_are_not_drawn_silently(
    write: Callable[[Path], Any], load: Callable[..., Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path)
    with pytest.raises(UsageError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("stated", ["", "tokenizer_config.json"])
def test_a_tokenizer_without_tokens_is_refused(stated: str, tmp_path: Path) -> None:
    gpt2().model.save_pretrained(tmp_path)
    if stated:
        (tmp_path / stated).write_text("{}")
    with pytest.raises(UsageError, match="has no tokenizer; save it there with"):
        load_tokenizer(tmp_path)


def test_a_new_head_is_that_of_its_seed(world: World) -> None:
    heads = [load_classifier(world.model("t5"), 2, seed).model for seed in (0, 0, 1)]
    first, again, other = (model.classification_head.out_proj.weight for model in heads)
    assert torch.equal(first, again) and not torch.equal(first, other)
