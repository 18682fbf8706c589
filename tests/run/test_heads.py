"""The heads of a run: zero-shot, published, or a probe; one is never mistaken for another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.run import heads
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.heads import classification_head
from tangent_arithmetic.run.models import split_of, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError
from tests.conftest import MakeArgs
from tests.encoders.makers import PublishedHead, named

Log = pytest.LogCaptureFixture
CLASSES, FEATURES = 9, 256  # of Emoji, and of the embedded model


def publish(folder: Path, weights: torch.Tensor, name: str = "head_Emoji.pt") -> Path:
    """Writes a head as the public projects do."""
    folder.mkdir(parents=True, exist_ok=True)
    with named(ClassificationHead=PublishedHead):
        torch.save(PublishedHead(True, weights), folder / name)
    return folder / name


@pytest.fixture
def without_text(args: MakeArgs, tmp_path: Path) -> Config:
    """Settings of a model whose file has no text tower."""
    encoder, path = ImageEncoder("ViT-Nano-8"), tmp_path / "tower.safetensors"
    encoder.model_name = f"ViT-Nano-8__pretrained__{path}"
    encoder.save(path)
    return args(model=encoder.model_name, load=[str(path)], suite="embedded")


def test_a_probe_fits_the_pictures_and_is_kept(args: MakeArgs, caplog: Log) -> None:
    run = Run.of(args(head="probe"))
    encoder, _ = zeroshot_encoder(run)
    with caplog.at_level(logging.INFO):
        head = classification_head(run, "Emoji")
    assert "linear probe on 771 examples" in caplog.text
    info = read_facts(run.head_path("Emoji"))["info"]
    accuracy = split_of(run, encoder, "EmojiVal").accuracy(encoder)["top1"]
    assert accuracy == pytest.approx(info["probe"]["val_accuracy"]) and accuracy > 0.5
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert torch.equal(classification_head(run, "EmojiVal").weight, head.weight)
    assert "linear probe" not in caplog.text


def test_probes_and_zeroshot_heads_are_not_mistaken(args: MakeArgs) -> None:
    made = [
        classification_head(Run.of(args(head=kind)), "Emoji")
        for kind in ("probe", "zeroshot", "probe", "auto")
    ]
    assert [head.normalize for head in made] == [False, True, False, True]
    assert torch.equal(made[0].weight, made[2].weight) and torch.equal(
        made[1].weight, made[3].weight
    )


def test_a_backbone_gets_a_probe(args: MakeArgs, caplog: Log) -> None:
    settings = {"model": "timm:test_vit__init__", "seed": 3}
    run = Run.of(args(**settings))
    assert run.suite.name == "embedded"
    with caplog.at_level(logging.INFO):
        head = classification_head(run, "Emoji")
    assert "since timm:test_vit__init__ has no text tower" in caplog.text
    assert head.weight.shape == (CLASSES, 64)
    with pytest.raises(UsageError, match="no text tower, which --head=zeroshot needs"):
        classification_head(Run.of(args(head="zeroshot", **settings)), "Emoji")


@pytest.mark.parametrize("name", ["head_Emoji.pt", "head_EmojiVal.pt"])
def test_a_published_head_stands_in_for_the_text_tower(
    name: str, without_text: Config, caplog: Log
) -> None:
    run, weights = Run.of(without_text), torch.randn(CLASSES, FEATURES)
    zeroshot_encoder(run)
    with pytest.raises(UsageError, match=r"Or put the published head_Emoji.pt into"):
        classification_head(run, "Emoji")
    path = publish(run.folder, weights, name)
    head = classification_head(run, "Emoji")
    assert torch.equal(head.weight, weights) and head.normalize and len(head.classnames) == CLASSES
    assert f"using the published head {path}" in caplog.text
    path.unlink()  # it is kept in our format
    assert torch.equal(classification_head(run, "EmojiVal").weight, weights)


@pytest.mark.parametrize("shape", [(CLASSES + 1, FEATURES), (CLASSES, FEATURES - 1)])
def test_a_published_head_that_does_not_fit_is_refused(
    shape: tuple[int, int], without_text: Config
) -> None:
    run = Run.of(without_text)
    zeroshot_encoder(run)
    publish(run.folder, torch.randn(shape))
    with pytest.raises(UsageError, match=f"a head for {shape[0]} classes of {shape[1]} features"):
        classification_head(run, "Emoji")
    assert not run.head_path("Emoji").exists()


def test_the_text_tower_counts_more_than_a_published_head(args: MakeArgs) -> None:
    run = Run.of(args())
    publish(run.folder, torch.randn(CLASSES, FEATURES))
    head = classification_head(run, "Emoji")
    assert read_facts(run.head_path("Emoji"))["info"]["model"] == "ViT-Nano-8"
    assert head.normalize


def test_very_large_sets_are_sampled(args: MakeArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "MOST_PICTURES", 90)
    counts: list[int] = []
    fit = heads.probe.fit

    def counted(train: Any, val: Any, classnames: Any) -> Any:
        counts.extend([len(train.labels), len(val.labels), len(train.labels.unique())])
        return fit(train, val, classnames)

    monkeypatch.setattr(heads.probe, "fit", counted)
    classification_head(Run.of(args(head="probe")), "Emoji")
    assert counts == [90, 90, CLASSES]
