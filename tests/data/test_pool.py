"""The pre-training pool, without Twemoji's images: they are not installed for tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer

from tangent_arithmetic.data.embedded import pool
from tangent_arithmetic.data.embedded.captions import WRONG
from tangent_arithmetic.data.embedded.drawing import SIZE, Rng
from tangent_arithmetic.data.embedded.model import MERGES

DRAWN = [family for family, _ in pool.FAMILIES.values() if family is not pool._emoji]


@pytest.mark.parametrize("family", DRAWN, ids=lambda family: family.__name__.strip("_"))
def test_families_draw_reproducible_pairs(family: Callable[[Rng], pool.Pair]) -> None:
    pairs = [family(np.random.default_rng(seed)) for seed in range(60)]
    again = [family(np.random.default_rng(seed)) for seed in range(60)]
    for (image, text), (same, same_text) in zip(pairs, again, strict=True):
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8 and image.std() > 1
        np.testing.assert_array_equal(image, same)
        assert text == same_text and text.strip() and "{" not in text
    assert len({image.tobytes() for image, _ in pairs}) == 60
    assert len({text for _, text in pairs}) > 20


@pytest.fixture
def without_emoji(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = {name: pair for name, pair in pool.FAMILIES.items() if name != "emoji"}
    monkeypatch.setattr(pool, "FAMILIES", rest)


def test_a_pair_is_a_function_of_seed_and_index(without_emoji: None) -> None:
    image, text = pool.draw_pair(3, 17)
    same, same_text = pool.draw_pair(3, 17)
    np.testing.assert_array_equal(image, same)
    assert text == same_text
    assert not np.array_equal(image, pool.draw_pair(4, 17)[0])
    assert not np.array_equal(image, pool.draw_pair(3, 18)[0])


def test_a_few_captions_belong_to_another_image(
    without_emoji: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pool, "FAMILIES", {"a": (lambda rng: (np.zeros((SIZE, SIZE, 3)), str(rng.random())), 1.0)}
    )
    texts = [pool.draw_pair(0, i)[1] for i in range(1500)]
    repeated = len(texts) - len(set(texts))
    assert 0.5 * WRONG < repeated / len(texts) < 1.5 * WRONG


def test_captions_fit_the_embedded_model(without_emoji: None) -> None:
    """The vocabulary covers all words, and no caption is truncated."""
    tokenizer = SimpleTokenizer(bpe_path=str(MERGES), context_length=20)
    longest = max(len(tokenizer.encode(pool.draw_pair(0, i)[1])) for i in range(400))
    assert longest + 2 <= 20
