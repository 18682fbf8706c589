"""Stratified samples, and `--sample` in evaluations."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.eval import eval_single_dataset
from src.heads import get_classification_head
from tangent_arithmetic.data.base import SubsetPictures
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.data.sampling import stratified
from tangent_arithmetic.run.args import parse_arguments
from tangent_arithmetic.run.models import command, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tests.conftest import MakeArgs


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.integers(1, 100))
def test_each_class_has_its_share(labels: list[int], count: int) -> None:
    chosen = stratified(np.array(labels), count)
    assert len(chosen) == min(count, len(labels))
    assert (np.diff(chosen) > 0).all()
    for k in set(labels):
        places = np.flatnonzero(np.array(labels) == k)
        taken = [i for i in chosen if labels[i] == k]
        assert taken == places[: len(taken)].tolist()  # the first of the class
        assert abs(len(taken) - min(1, count / len(labels)) * len(places)) < 1


def test_fractions_go_to_the_largest_remainders() -> None:
    labels = np.array([0] * 5 + [1] * 3 + [2] * 2)
    assert stratified(labels, 4).tolist() == [0, 1, 5, 8]  # shares 2, 1.2, 0.8
    assert stratified(labels[::-1], 4).tolist() == [0, 2, 5, 6]
    assert stratified(labels, 1).tolist() == [0]
    assert stratified(labels, 10).tolist() == stratified(labels, 99).tolist() == list(range(10))


def test_labels_may_be_any_integers() -> None:
    """Invalid labels are reported when their pictures are read."""
    assert stratified(np.array([-1, 7, 7, -1, 300, 7]), 3).tolist() == [0, 1, 2]


def test_a_sample_larger_than_the_split_is_logged_once(
    args: MakeArgs, caplog: pytest.LogCaptureFixture
) -> None:
    settings = args(sample=123456)
    with caplog.at_level(logging.INFO, logger="tangent_arithmetic.data.registry"):
        for _ in range(2):
            assert len(Run.of(settings).data.evaluated("EmojiVal").test) == 209
    expected = "--sample=123456: EmojiVal has 209 examples, all of them are evaluated"
    assert [record.message for record in caplog.records] == [expected]


def test_a_sample_is_evaluated_instead_of_the_split(args: MakeArgs) -> None:
    whole, part = (Run.of(args(sample=sample)).data for sample in (None, 40))
    everything, sample = whole.dataset("EmojiVal").test, part.evaluated("EmojiVal").test
    assert isinstance(sample, SubsetPictures)
    assert list(sample.indices) == stratified(labels_of(everything), 40).tolist()
    assert whole.split_hashes(["EmojiVal"]) != part.split_hashes(["EmojiVal"])

    settings = args(sample=40)
    encoder, _ = zeroshot_encoder(Run.of(settings))
    batches = part.batches("EmojiVal", encoder.val_preprocess)
    labels = [int(label) for _, truth in batches for label in truth]
    assert labels == labels_of(sample).tolist() and len(labels) == 40

    head, transform = get_classification_head(settings, "EmojiVal"), encoder.val_preprocess
    assert transform is not None
    with torch.no_grad():  # picture by picture
        logits = [head(encoder(transform(sample[i][0])[None])) for i in range(40)]
    hits = sum(int(x.argmax()) == label for x, label in zip(logits, labels, strict=True))
    result = eval_single_dataset(encoder, "EmojiVal", settings)
    assert result["num_images"] == 40 and 0 < hits < 40 and result["top1"] == hits / 40


def test_results_of_a_sample_are_in_another_folder(args: MakeArgs) -> None:
    assert Run.of(args(sample=30, seed=2)).results.name == "ViT-Nano-8_seed2_sample30"
    assert Run.of(args()).results.name == "ViT-Nano-8"
    assert "--sample=30" in command("eval_single_task", Run.of(args(sample=30)), "none")


def test_an_empty_sample_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--sample=0"])
    assert "expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 7, 40, 99, 100, 500])
def test_a_sample_of_images_with_several_labels_has_each_set_of_labels_by_its_share(
    count: int,
) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((100, 3)) < 0.4).astype(np.uint8)
    chosen = stratified(labels, count)
    assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == min(count, 100)
    for kind, size in zip(*np.unique(labels, axis=0, return_counts=True), strict=True):
        found = (labels[chosen] == kind).all(axis=1).sum()
        assert abs(found - size * min(count, 100) / 100) <= 1
