"""Classifiers in one file: ours, and pickled ones of the public projects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tangent_arithmetic.encoders.backbones.encoder import BackboneEncoder
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.classifiers import ImageClassifier, MultiHeadImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.runtime.errors import UsageError
from tests.encoders.makers import PublishedEncoder, PublishedHead, clip, named, small_models

CLIP, BACKBONE = "ViT-Nano-8", "timm:test_vit__init__"
MAKERS: dict[str, Callable[[], ModuleEncoder]] = {
    "standard": lambda: ImageEncoder.without_weights(CLIP),
    "linear": lambda: linearized(ImageEncoder.without_weights(CLIP)),
    "backbone": lambda: BackboneEncoder(BACKBONE),
    "linear backbone": lambda: linearized(BackboneEncoder(BACKBONE)),
}


def head(encoder: nn.Module, x: torch.Tensor, classes: int) -> ClassificationHead:
    with torch.no_grad():
        width = encoder.eval()(x).shape[1]
    return ClassificationHead(True, torch.randn(classes, width), classnames=list("abc")[:classes])


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_a_classifier_comes_back(kind: str, tmp_path: Path) -> None:
    encoder = MAKERS[kind]()
    x = torch.randn(2, 3, *((160, 160) if "backbone" in kind else (32, 32)))
    heads = [head(encoder, x, classes) for classes in (3, 2)]
    for value in encoder.weights().values():  # away from the point of expansion
        if value.is_floating_point():
            value += 0.01 * torch.randn_like(value)
    one, both = ImageClassifier(encoder, heads[0]), MultiHeadImageClassifier(encoder, heads)
    one.save(tmp_path / "one.pt", note="mine")
    both.save(tmp_path / "both.safetensors")
    again = ImageClassifier.load(tmp_path / "one.pt").eval()
    assert type(again.image_encoder) is type(encoder)
    assert torch.equal(again(x), one.eval()(x))
    several = MultiHeadImageClassifier.load(tmp_path / "both.safetensors").eval()
    for i in range(2):
        assert torch.equal(several(x, i), both.eval()(x, i))
    assert not any(p.requires_grad for p in several.classification_heads.parameters())
    with pytest.raises(UsageError, match="holds 2 heads, expected one; read it with MultiHead"):
        ImageClassifier.load(tmp_path / "both.safetensors")


class PublishedClassifier(nn.Module):
    """Their classifier."""

    def __init__(self, encoder: nn.Module, *heads: nn.Module) -> None:
        super().__init__()
        self.image_encoder = encoder
        if len(heads) == 1:
            self.classification_head = heads[0]
        else:
            self.classification_heads = nn.ModuleList(heads)


@pytest.mark.parametrize("count", [1, 2])
def test_their_pickled_classifier_is_read(count: int, tmp_path: Path) -> None:
    with small_models(tmp_path):
        model = clip("ViT-Tiny")
        heads = [PublishedHead(True, torch.randn(3, 8)) for _ in range(count)]
        theirs = PublishedClassifier(PublishedEncoder(model), *heads)
        kinds = {"ImageEncoder": PublishedEncoder, "ClassificationHead": PublishedHead}
        with named(ImageClassifier=PublishedClassifier, **kinds):
            torch.save(theirs, tmp_path / "classifier.pt")
        ours = MultiHeadImageClassifier.load(tmp_path / "classifier.pt", "ViT-Tiny").eval()
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            features = nn.functional.normalize(model.encode_image(x), dim=-1)
            for i, one in enumerate(heads):
                torch.testing.assert_close(ours(x, i), features @ one.weight.T)


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    encoder = ImageEncoder.without_weights(CLIP)
    encoder.save(tmp_path / "encoder.pt")
    with pytest.raises(UsageError, match="holds a image_encoder, expected a image_classifier"):
        ImageClassifier.load(tmp_path / "encoder.safetensors")
    with pytest.raises(UsageError, match="a classifier of Linear, Linear cannot be saved"):
        ImageClassifier(nn.Linear(2, 2), nn.Linear(2, 2)).save(tmp_path / "x.pt")
