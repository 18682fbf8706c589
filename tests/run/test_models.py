"""The encoders of a run are not evaluated on pictures that they were trained on without a word."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tangent_arithmetic.data.identity import pictures_hash
from tangent_arithmetic.data.registry import split_record
from tangent_arithmetic.run import models as runs
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.storage.checkpoints import save_tensors
from tests.conftest import MakeArgs
from tests.data.test_sources import dtd_lists
from tests.miniatures import make_dtd

Log = pytest.LogCaptureFixture


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    runs._warn_once.cache_clear()
    yield
    runs._warn_once.cache_clear()


def checkpoint(path: Path, **info: Any) -> Path:
    save_tensors(path, {"w": torch.ones(1)}, "image_encoder", info=info)
    return path


def said(path: Path, args: Config, task: str, caplog: Log) -> list[str]:
    """The warnings of two checks of one checkpoint."""
    caplog.clear()
    for _ in range(2):
        runs.check_split(path, Run.of(args), task)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [record.getMessage() for record in warnings]


def test_the_same_split_is_nothing_to_warn_of(args: MakeArgs, tmp_path: Path, caplog: Log) -> None:
    own = split_record(Run.of(args()).data.dataset("EmojiVal"))
    path = checkpoint(tmp_path / "a.safetensors", split=own)
    assert said(path, args(), "Emoji", caplog) == []
    # where the pictures came from does not matter if they are the same
    path = checkpoint(tmp_path / "b.safetensors", split={**own, "source": "elsewhere"})
    assert said(path, args(), "Emoji", caplog) == []


def test_other_content_of_the_same_split_is_warned_of_once(
    args: MakeArgs, tmp_path: Path, caplog: Log
) -> None:
    data = Run.of(args()).data.dataset("EmojiVal")
    facts = {"split": split_record(data), "content": pictures_hash(data.train)}
    assert said(checkpoint(tmp_path / "a.safetensors", **facts), args(), "Emoji", caplog) == []
    path = checkpoint(tmp_path / "b.safetensors", **{**facts, "content": "0" * 64})
    (warning,) = said(path, args(), "Emoji", caplog)
    assert warning.startswith(f"{path} was trained on other pictures or labels of Emoji than this")


@pytest.mark.parametrize("part", ["train", "val"])
def test_another_split_is_warned_of_once(
    part: str, args: MakeArgs, tmp_path: Path, caplog: Log
) -> None:
    own = split_record(Run.of(args()).data.dataset("EmojiVal"))
    other = {**own, part: "0" * 64, "source": "hub"}
    path = checkpoint(tmp_path / "a.safetensors", split=other)
    (warning,) = said(path, args(), "Emoji", caplog)
    assert warning.startswith(f"{path} was trained on another split of Emoji (source hub) than")
    assert "(source embedded): its training pictures may be among those" in warning


def test_a_checkpoint_from_before_the_record_is_not_warned_of(
    args: MakeArgs, tmp_path: Path, caplog: Log
) -> None:
    path = checkpoint(tmp_path / "a.safetensors", task="Emoji")
    assert said(path, args(), "Emoji", caplog) == []


def test_a_published_checkpoint_needs_the_seeds_folders(
    args: MakeArgs, tmp_path: Path, caplog: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path / "a.safetensors", published="task_vectors")
    dtd_lists(tmp_path / "theirs")
    make_dtd(tmp_path / "ours", monkeypatch)
    ours, theirs, nothing = (
        args(suite="clip8", data_location=str(tmp_path / root), data_source=source)
        for root, source in (("ours", "auto"), ("theirs", "auto"), ("nowhere", "folder"))
    )
    assert said(path, ours, "DTD", caplog) == []
    assert said(path, nothing, "DTD", caplog) == []
    (warning,) = said(path, theirs, "DTD", caplog)
    assert "published checkpoint, and DTD comes from the source torchvision" in warning
    assert warning.endswith("DTDVal may hold its training pictures. Use --data-source=folder")


def test_a_record_counts_more_than_being_published(
    args: MakeArgs, tmp_path: Path, caplog: Log
) -> None:
    dtd_lists(tmp_path / "theirs")
    theirs = args(suite="clip8", data_location=str(tmp_path / "theirs"))
    own = split_record(Run.of(theirs).data.dataset("DTDVal"))
    path = checkpoint(tmp_path / "a.safetensors", published="mine", split=own)
    assert said(path, theirs, "DTD", caplog) == []


def test_the_command_that_makes_what_is_missing_names_the_source(args: MakeArgs) -> None:
    settings = Config(data_source="hub", suite="clip8")
    made_by = "python src/finetune.py --finetuning-mode=linear --suite=clip8 --data-source=hub"
    assert runs.command("finetune", Run.of(settings), "linear") == made_by


def test_a_mix_of_activations_is_warned_of_once(args: MakeArgs, caplog: Log) -> None:
    run = Run.of(args())
    encoder, digest = runs.zeroshot_encoder(run)
    path = run.finetuned_path("Emoji", "standard")
    encoder.save(path, theta0_hash=digest)
    runs.check_start(path, run, "standard", digest)
    assert not caplog.records
    checkpoint(path, theta0=digest, built={"activation": "QuickGELU"})
    for _ in range(2):
        runs.check_start(path, run, "standard", "")
    mixed = [one for one in caplog.records if "mixes two models" in one.getMessage()]
    assert len(mixed) == 1 and "activation QuickGELU, but" in mixed[0].getMessage()
