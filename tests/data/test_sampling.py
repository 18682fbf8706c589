"""Stratified samples, and `--sample` in evaluations."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.eval import eval_single_dataset
from tangent_arithmetic.data.base import SubsetPictures
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.data.sampling import stratified
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.run.args import Config
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


def test_what_is_left_goes_to_the_largest_remainders() -> None:
    labels = np.array([0] * 5 + [1] * 3 + [2] * 2)
    assert stratified(labels, 4).tolist() == [0, 1, 5, 8]  # shares 2, 1.2, 0.8
    assert stratified(labels[::-1], 4).tolist() == [0, 2, 5, 6]
    assert stratified(labels, 1).tolist() == [0]
    assert stratified(labels, 10).tolist() == stratified(labels, 99).tolist() == list(range(10))


def test_labels_may_be_any_numbers() -> None:
    """A label that is no class is told when its picture is read, not here."""
    assert stratified(np.array([-1, 7, 7, -1, 300, 7]), 3).tolist() == [0, 1, 2]


def test_a_sample_beyond_the_split_is_told_once(
    args: MakeArgs, caplog: pytest.LogCaptureFixture
) -> None:
    settings = args(sample=123456)
    with caplog.at_level(logging.INFO, logger="tangent_arithmetic.data.registry"):
        for _ in range(2):
            assert len(Run.of(settings).data.evaluated("EmojiVal").test) == 209
    expected = "--sample=123456: EmojiVal has 209 images, all of them are evaluated"
    assert [record.message for record in caplog.records] == [expected]


def test_a_sample_is_evaluated_and_nothing_else(args: MakeArgs) -> None:
    whole, part = args(), args(sample=30)
    everything, sample = (
        Run.of(whole).data.dataset("EmojiVal").test,
        Run.of(part).data.evaluated("EmojiVal").test,
    )
    assert isinstance(sample, SubsetPictures)
    assert list(sample.indices) == stratified(labels_of(everything), 30).tolist()
    batches = list(
        Run.of(part).data.batches("EmojiVal", zeroshot_encoder(Run.of(part))[0].val_preprocess)
    )
    labels = [int(label) for _, truth in batches for label in truth]
    assert labels == labels_of(sample).tolist() and len(labels) == 30
    assert len(Run.of(args(sample=10**6)).data.evaluated("EmojiVal").test) == len(everything)
    assert Run.of(whole).data.split_hashes(["EmojiVal"]) != Run.of(part).data.split_hashes(
        ["EmojiVal"]
    )


def test_the_accuracy_of_a_sample_is_that_of_its_pictures(args: MakeArgs) -> None:
    settings = args(sample=40)
    encoder, _ = zeroshot_encoder(Run.of(settings))
    found = eval_single_dataset(encoder, "EmojiVal", settings)
    assert found["num_images"] == 40
    hits = _hits(encoder, settings, Run.of(settings).data.evaluated("EmojiVal").test)
    assert 0 < hits < 40 and found["top1"] == hits / 40


def _hits(encoder: ImageEncoder, settings: Config, pictures: object) -> int:
    """Picture by picture."""
    import torch

    from src.heads import get_classification_head

    head = get_classification_head(settings, "EmojiVal")
    assert isinstance(pictures, SubsetPictures)
    hits, transform = 0, encoder.val_preprocess
    assert transform is not None
    with torch.no_grad():
        for i in range(len(pictures)):
            image, label = pictures[i]
            hits += int(head(encoder(transform(image)[None])).argmax()) == label
    return hits


def test_results_of_a_sample_have_a_folder_of_their_own(args: MakeArgs) -> None:
    assert Run.of(args(sample=30, seed=2)).results.name == "ViT-Nano-8_seed2_sample30"
    assert Run.of(args()).results.name == "ViT-Nano-8"
    assert "--sample=30" in command("eval_single_task", Run.of(args(sample=30)), "none")


def test_a_sample_of_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tangent_arithmetic.run.args import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(["--sample=0"])
    assert "expected at least 1, got 0" in capsys.readouterr().err
