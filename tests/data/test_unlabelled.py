"""Images without labels: whose turn it is, and what does not change them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tangent_arithmetic.data.base import ArrayPictures, name_of
from tangent_arithmetic.data.unlabelled import Joined, Rounds, Unlabelled
from tangent_arithmetic.runtime import ddp

SIZES = {"a": 5, "b": 3, "c": 1}


def pictures(value: int, count: int) -> ArrayPictures:
    images = np.full((count, 2, 2, 3), value, dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return ArrayPictures(images, np.zeros((count, 4), np.uint8))  # several labels an image


PARTS = {name: pictures(100 + i, size) for i, (name, size) in enumerate(SIZES.items())}


def noisy(image: object) -> Tensor:
    """A transform that draws random numbers."""
    return torch.from_numpy(np.array(image)).float() + torch.rand(2, 2, 3)


def sets_of(batch: Tensor) -> list[int]:
    return [int(image[1, 1, 1]) - 100 for image in batch]


def test_sets_take_turns_and_every_image_is_used_before_one_comes_again() -> None:
    others = Unlabelled(PARTS, noisy, batch_size=2)
    batches = [others.batch(step) for step in range(18)]
    assert [set(sets_of(batch)) for batch in batches] == [{0}, {1}, {2}] * 6
    assert [len(batch) for batch in batches[:9]] == [2, 2, 1, 2, 1, 1, 1, 2, 1]
    first = [int(image[0, 0, 0]) for step in (0, 3, 6) for image in batches[step]]
    second = [int(image[0, 0, 0]) for step in (9, 12, 15) for image in batches[step]]
    assert sorted(first) == sorted(second) == [*range(5)]
    assert first != second


def test_together_a_step_has_images_of_every_set() -> None:
    others = Unlabelled(PARTS, noisy, batch_size=2, together=True)
    assert [sorted(sets_of(others.batch(step))) for step in range(2)] == [
        [0, 0, 1, 1, 2],
        [0, 0, 1, 2],
    ]


def test_a_step_has_the_same_images_wherever_a_run_starts_and_however_they_are_loaded() -> None:
    whole = Unlabelled(PARTS, noisy, 2, seed=3)
    expected = [whole.batch(step) for step in range(8)]
    for workers in (0, 2):
        resumed = Unlabelled(PARTS, noisy, 2, seed=3, num_workers=workers)
        for step in range(5, 8):
            torch.testing.assert_close(resumed.batch(step), expected[step], rtol=0, atol=0)
        resumed.close()
    assert not torch.equal(Unlabelled(PARTS, noisy, 2, seed=4).batch(0), expected[0])


def test_ranks_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [PARTS["a"], PARTS["b"]]

    def first() -> list[Any]:
        return list(itertools.islice(Rounds(two, None, 2, False, 0, 0), 6))

    whole = first()
    monkeypatch.setattr(ddp, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(ddp, "rank", lambda rank=rank: rank)
        shares.append(first())
    for keys, one, other in zip(whole, *shares, strict=True):
        if len(keys) == 1:
            assert one == other == keys  # none goes without
        else:
            assert [one[0], other[0]] == keys


def test_means_of_ranks_are_weighted_to_that_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(image: object) -> Tensor:
        return torch.from_numpy(np.array(image)).double()

    whole = Unlabelled(PARTS, mean, 3, together=True)
    expected = [whole.batch(step).mean() for step in range(8)]
    monkeypatch.setattr(ddp, "world_size", lambda: 4)
    found = torch.zeros(8, dtype=torch.float64)
    for rank in range(4):
        monkeypatch.setattr(ddp, "rank", lambda rank=rank: rank)
        share = Unlabelled(PARTS, mean, 3, together=True)
        for step in range(8):
            found[step] += share.weight(step) * share.batch(step).mean() / 4
    torch.testing.assert_close(found, torch.stack(expected))


def test_an_image_is_named_as_in_its_own_set() -> None:
    joined = Joined(PARTS)
    assert len(joined) == 9 and joined[5][1] == 0
    assert name_of(joined, 6) == name_of(PARTS["b"], 1)
