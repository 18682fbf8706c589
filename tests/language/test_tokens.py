from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tangent_arithmetic.language.tokens import blocks, encode, padded, paired
from tangent_arithmetic.runtime.errors import UsageError
from tests.language.makers import save_tokenizer


def test_rows_are_padded_with_minus_one() -> None:
    assert padded([[5, 6], [7]]).tolist() == [[5, 6], [7, -1]]
    assert padded([[5]], length=3).tolist() == [[5, -1, -1]]


def test_a_pair_is_a_source_and_a_target_that_begins() -> None:
    assert paired([[5, 6, 7], [8]], [[3], [4, 2]], start=0).tolist() == [
        [[5, 6, 7], [0, 3, -1]],
        [[8, -1, -1], [0, 4, 2]],
    ]


def test_long_texts_are_cut_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = save_tokenizer(tmp_path, sentence_end=True)
    texts = ["the film was good", "the a film"]
    with caplog.at_level(logging.INFO, logger="tangent_arithmetic"):
        short = encode(texts, tokenizer, 4)
    assert "1 of 2 texts are cut after 4 tokens" in caplog.text
    end = tokenizer.eos_token_id
    assert [len(ids) for ids in short] == [4, 4] and [ids[-1] for ids in short] == [end, end]
    pair = encode(["the film"], tokenizer, 10, ["good"])
    assert tokenizer.decode(pair[0]) == "the film </s> good </s>"


def test_empty_texts_are_refused(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="1 of 2 texts have no tokens, the first of them text 1"):
        encode(["good", "  "], tokenizer, 9)
    assert encode([], tokenizer, 9) == []


def test_blocks_are_one_stream(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, sentence_end=True)
    texts = ["the film", "", "was good and great", "the meal"]
    found = blocks(texts, tokenizer, 3)
    stream = tokenizer(" ".join(texts), add_special_tokens=False)["input_ids"]
    assert found.flatten()[:8].tolist() == stream and found.shape == (3, 3)
    assert torch.equal(found[2, 2:], torch.tensor([-1]))
    assert blocks(texts, tokenizer, 7).shape == (1, 7)  # the last token alone has no context
    with pytest.raises(UsageError, match="two tokens or more, got 1 in all"):
        blocks(["good"], tokenizer, 4)
