"""Stratified samples, and `--sample` in evaluations."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.args import Config
from src.data.base import SubsetPictures
from src.data.identity import labels_of
from src.data.registry import dataset_for, eval_batches, evaluated, split_hashes
from src.data.sampling import stratified
from src.eval import eval_single_dataset
from src.modeling import ImageEncoder
from src.runs import command, zeroshot_encoder
from src.settings import results_dir
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
    with caplog.at_level(logging.INFO, logger="src.data.registry"):
        for _ in range(2):
            assert len(evaluated(settings, "EmojiVal").test) == 209
    expected = "--sample=123456: EmojiVal has 209 pictures, all of them are evaluated"
    assert [record.message for record in caplog.records] == [expected]


def test_a_sample_is_evaluated_and_nothing_else(args: MakeArgs) -> None:
    whole, part = args(), args(sample=30)
    everything, sample = dataset_for(whole, "EmojiVal").test, evaluated(part, "EmojiVal").test
    assert isinstance(sample, SubsetPictures)
    assert list(sample.indices) == stratified(labels_of(everything), 30).tolist()
    batches = list(eval_batches(part, "EmojiVal", zeroshot_encoder(part)[0].val_preprocess))
    labels = [int(label) for _, truth in batches for label in truth]
    assert labels == labels_of(sample).tolist() and len(labels) == 30
    assert len(evaluated(args(sample=10**6), "EmojiVal").test) == len(everything)
    assert split_hashes(whole, ["EmojiVal"]) != split_hashes(part, ["EmojiVal"])


def test_the_accuracy_of_a_sample_is_that_of_its_pictures(args: MakeArgs) -> None:
    settings = args(sample=40)
    encoder, _ = zeroshot_encoder(settings)
    found = eval_single_dataset(encoder, "EmojiVal", settings)
    assert found["num_images"] == 40
    hits = _hits(encoder, settings, evaluated(settings, "EmojiVal").test)
    assert 0 < hits < 40 and found["top1"] == hits / 40


def _hits(encoder: ImageEncoder, settings: Config, pictures: object) -> int:
    """Picture by picture."""
    import torch

    from src.heads import get_classification_head

    head = get_classification_head(settings, "EmojiVal")
    assert isinstance(pictures, SubsetPictures)
    hits = 0
    with torch.no_grad():
        for i in range(len(pictures)):
            image, label = pictures[i]
            hits += int(head(encoder(encoder.val_preprocess(image)[None])).argmax()) == label
    return hits


def test_results_of_a_sample_have_a_folder_of_their_own(args: MakeArgs) -> None:
    assert results_dir(args(sample=30, seed=2)).name == "ViT-Nano-8_seed2_sample30"
    assert results_dir(args()).name == "ViT-Nano-8"
    assert "--sample=30" in command("eval_single_task", args(sample=30), "none")


def test_a_sample_of_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from src.args import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(["--sample=0"])
    assert "expected at least 1, got 0" in capsys.readouterr().err
