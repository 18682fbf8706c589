"""What a file records of activation and preprocessing is used, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from tangent_arithmetic.encoders import built
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.runtime.errors import UsageError
from tests.encoders.makers import PublishedEncoder, named, small_models

NAME = "ViT-Tiny"  # with OpenAI's activation, QuickGELU
MEAN = (0.1, 0.2, 0.3)


@pytest.fixture(autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    built.say.cache_clear()
    with small_models(tmp_path_factory.mktemp("models")):
        yield


def write(path: Path, quick: bool, **transforms: Any) -> nn.Module:
    """Writes a pickled encoder of the public projects; returns its CLIP."""
    model = open_clip.create_model(NAME, force_quick_gelu=quick).eval()
    theirs = PublishedEncoder(model)
    if transforms:
        _, theirs.train_preprocess, theirs.val_preprocess = open_clip.create_model_and_transforms(
            NAME, **transforms
        )
    with named(ImageEncoder=PublishedEncoder):
        torch.save(theirs, path)
    return model


@pytest.mark.parametrize("quick", [True, False])
@torch.no_grad()
def test_the_activation_of_a_pickled_tower_is_used(
    quick: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, ours = tmp_path / "zeroshot.pt", tmp_path / "ours" / "zeroshot.safetensors"
    model: Any = write(path, quick)
    x = torch.randn(2, 3, 32, 32)
    encoder = ImageEncoder.load(NAME, path).eval()
    assert torch.equal(encoder(x), model.encode_image(x))
    said = "was made with the activation GELU, which is used instead of the QuickGELU"
    assert (said in caplog.text) is not quick
    encoder.save(ours)
    again = ImageEncoder.load(NAME, ours).eval()
    assert torch.equal(again(x), encoder(x))
    linear = LinearizedImageEncoder(image_encoder=again)
    linear.save(tmp_path / "linear.safetensors")
    loaded = LinearizedImageEncoder.load(tmp_path / "linear.safetensors", model_name=NAME)
    torch.testing.assert_close(loaded.eval()(x), encoder(x))
    plain = getattr(ImageEncoder(f"{NAME}__init__").val_preprocess, "recipe", None)
    assert (getattr(encoder.val_preprocess, "recipe", None) == plain) is quick  # of cached features


def test_the_preprocessing_of_a_pickled_encoder_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "zeroshot.pt"
    write(path, True, image_mean=MEAN, image_interpolation="bilinear")
    encoder = ImageEncoder.load(NAME, path)
    assert "mean [0.1, 0.2, 0.3], interpolation bilinear" in caplog.text
    assert encoder.val_preprocess is not None
    red = encoder.val_preprocess(Image.new("RGB", (32, 32)))[:, 0, 0]
    std = torch.tensor(encoder.model.visual.preprocess_cfg["std"])
    torch.testing.assert_close(red, -torch.tensor(MEAN) / std)
    encoder.save(tmp_path / "ours.safetensors")
    again = ImageEncoder.load(NAME, tmp_path / "ours.safetensors")
    assert repr(again.val_preprocess) == repr(encoder.val_preprocess)


def test_another_size_of_images_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "zeroshot.pt"
    write(path, True, force_image_size=64)
    with pytest.raises(
        UsageError, match=r"was made for images of .*64.* pixels, but ViT-Tiny takes"
    ):
        ImageEncoder.load(NAME, path)


def test_a_state_dict_cannot_know_which_a_note_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = open_clip.create_model(NAME, force_quick_gelu=True)
    torch.save(PublishedEncoder(model).state_dict(), tmp_path / "a.pt")
    with caplog.at_level("INFO"):
        for _ in range(2):
            ImageEncoder.load(NAME, tmp_path / "a.pt")
    assert caplog.text.count("records neither activation nor preprocessing") == 1


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    encoder = ImageEncoder(f"{NAME}__init__")
    with pytest.raises(UsageError, match="activation SwiGLU, expected GELU or QuickGELU"):
        encoder.adopt({"activation": "SwiGLU"}, "a file")
    with pytest.raises(UsageError, match="records a preprocessing that cannot be read"):
        encoder.adopt({"preprocess": {"mean": ["a"]}}, "a file")
    encoder.adopt(None, "a file of an earlier version")
    assert encoder.adopted == ()
