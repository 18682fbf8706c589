"""CLIP by name, encoders on disk, heads, and the embedded model as open_clip sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from tangent_arithmetic.data.embedded.model import WEIGHTS
from tangent_arithmetic.encoders.classifiers import ImageClassifier, MultiHeadImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder, VisionTower
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.checkpoints import save_tensors

NAME = "ViT-Nano-8"


# --- encoders


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageEncoder.without_weights(NAME).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32)


@torch.no_grad()
def test_weights_are_the_published_vision_tower(args: Callable[..., Any], images: Tensor) -> None:
    encoder, whole = ImageEncoder(args()), ImageEncoder(args(), keep_lang=True)
    assert isinstance(encoder.model, VisionTower)
    assert set(encoder.state_dict()) == set(encoder.weights()) == set(whole.weights())
    assert all(name.startswith("model.visual.") for name in encoder.weights())
    published = load_file(WEIGHTS)
    for name, value in encoder.weights().items():
        assert value.dtype == torch.float32 and torch.equal(value, whole.weights()[name])
        assert torch.equal(value, published[name.removeprefix("model.")].float())
    text = {"model.token_embedding.weight", "model.text_projection", "model.logit_scale"}
    assert text <= set(whole.state_dict())
    assert torch.equal(encoder(images), whole(images))
    assert encoder(images).shape == (3, 256)


@torch.no_grad()
def test_features_can_be_normalised(encoder: ImageEncoder, images: Tensor) -> None:
    expected = encoder(images) / encoder(images).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(encoder.model.encode_image(images, normalize=True), expected)


def test_transforms_are_those_of_the_pretraining(encoder: ImageEncoder) -> None:
    """(x / 255 - 0.5) / 0.25."""
    picture = Image.new("RGB", (32, 32), (0, 51, 255))
    for transform in (encoder.val_preprocess, encoder.train_preprocess):
        assert transform is not None
        x = transform(picture)
        assert x.shape == (3, 32, 32)
        torch.testing.assert_close(x[:, 5, 7], torch.tensor([-2.0, -1.2, 2.0]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["zeroshot.pt", "a/b/finetuned.safetensors", "plain"])
def test_encoders_round_trip(
    name: str, encoder: ImageEncoder, images: Tensor, tmp_path: Path
) -> None:
    encoder.save(tmp_path / name, epochs=3)
    for read in (
        ImageEncoder.load(tmp_path / name),
        ImageEncoder.load(NAME, tmp_path / name),
        ImageEncoder.load(str(tmp_path / name)),
    ):
        assert read.model_name == NAME
        assert torch.equal(read(images), encoder(images))


@torch.no_grad()
def test_load_takes_the_place_of_the_published_weights(
    args: Callable[..., Any], encoder: ImageEncoder, images: Tensor, tmp_path: Path
) -> None:
    encoder.save(tmp_path / "mine.pt")
    read = ImageEncoder(args(load=[str(tmp_path / "mine.pt")]))
    assert torch.equal(read(images), encoder(images))
    assert not torch.equal(read(images), ImageEncoder(args())(images))
    with pytest.raises(UsageError, match="--load takes one checkpoint, got 2: a, b"):
        ImageEncoder(args(load=["a", "b"]))


def test_another_model_s_checkpoint_is_refused(
    encoder: ImageEncoder, resnet: str, tmp_path: Path, args: Callable[..., Any]
) -> None:
    encoder.save(tmp_path / "nano.pt")
    message = r"holds weights of ViT-Nano-8, expected RN-Tiny__init__; add --model=ViT-Nano-8"
    with pytest.raises(UsageError, match=message):
        ImageEncoder.load(resnet, tmp_path / "nano.pt")
    with pytest.raises(UsageError, match=message):
        ImageEncoder(args(model=resnet, load=[str(tmp_path / "nano.pt")]))


def test_weights_of_another_shape_are_listed(encoder: ImageEncoder) -> None:
    theta = dict(encoder.weights())
    theta["model.visual.proj"] = theta["model.visual.proj"][:, :3]
    theta["model.visual.extra"] = torch.zeros(1)
    message = (
        r"(?s)weights of ViT-Nano-8 and the checkpoint do not match"
        r".*only in the second: model\.visual\.extra.*proj: shape \(192, 256\) against \(192, 3\)"
    )
    with pytest.raises(ValueError, match=message):
        encoder.load_weights(theta)


PROJ, MORE = "model.visual.proj", "model.visual.more"


@pytest.mark.parametrize("changes", [{PROJ: None}, {MORE: torch.ones(3)}, {PROJ: torch.ones(3, 1)}])
def test_checkpoints_of_another_shape_are_refused_before_anything_is_built(
    changes: dict[str, Tensor | None],
    encoder: ImageEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theta = {n: v for n, v in {**encoder.weights(), **changes}.items() if v is not None}
    save_tensors(tmp_path / "x.pt", theta, "image_encoder", info={"model": NAME})
    monkeypatch.setattr("tangent_arithmetic.encoders.images.create_clip", None)
    message = rf"x\.\w+ does not fit {NAME}: model\.visual\.(proj|more): .*, expected .*--model"
    for load in (
        lambda: ImageEncoder.load(tmp_path / "x.pt"),
        lambda: ImageEncoder.load(NAME, tmp_path / "x.pt"),
        lambda: LinearizedImageEncoder.load(tmp_path / "x.pt"),
    ):
        with pytest.raises(UsageError, match=message):
            load()


def test_missing_files_and_files_of_another_kind_are_refused(
    encoder: ImageEncoder, tmp_path: Path
) -> None:
    encoder.save(tmp_path / "encoder.pt")
    ClassificationHead(True, torch.ones(2, 3)).save(tmp_path / "head.pt")
    with pytest.raises(UsageError, match="expected a head"):
        ClassificationHead.load(tmp_path / "encoder.pt")
    for kind in (ImageEncoder, LinearizedImageEncoder):
        with pytest.raises(UsageError, match="expected an encoder"):
            kind.load(tmp_path / "head.pt")
        with pytest.raises(MissingFileError, match=r"no checkpoint at .*x\.pt \(looked for .*\)\."):
            kind.load(tmp_path / "x.pt")


# --- heads and classifiers


@given(st.booleans(), st.booleans(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_head_is_a_linear_map_of_unit_features(
    normalize: bool, biased: bool, batch: int, classes: int, features: int
) -> None:
    rng = np.random.default_rng((batch, classes, features))
    x, w = rng.normal(size=(batch, features)), rng.normal(size=(classes, features))
    b = rng.normal(size=classes) if biased else None
    head = ClassificationHead(
        normalize, torch.from_numpy(w), None if b is None else torch.from_numpy(b)
    )
    unit = x / np.linalg.norm(x, axis=1, keepdims=True) if normalize else x
    expected = unit @ w.T + (0.0 if b is None else b)
    found = head(torch.from_numpy(x).float()).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_heads_round_trip(normalize: bool, tmp_path: Path) -> None:
    head = ClassificationHead(normalize, torch.randn(2, 3), torch.randn(2), ["a cat", "a dög"])
    head.save(tmp_path / "head_PetsVal.pt", made="here")
    for name in ("head_PetsVal.pt", "head_Pets.pt", "head_PetsVal.safetensors"):
        read = ClassificationHead.load(tmp_path / name)
        assert read.normalize is normalize and read.classnames == ("a cat", "a dög")
        assert torch.equal(read.weight, head.weight) and torch.equal(read.bias, head.bias)


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        ({"bias": None}, {}, r"head\.pt is not a complete head: it has tensors weight, "),
        ({"more": torch.ones(1)}, {}, "it has tensors bias, more, weight, normalize"),
        ({}, {"normalize": None}, "normalize None, classnames"),
        ({}, {"normalize": "yes"}, "normalize yes"),
        ({}, {"classnames": 3}, "classnames 3"),
        ({}, {"classnames": [1, 2]}, r"classnames \[1, 2\]"),
        ({"weight": torch.ones(6)}, {}, r"holds a head of torch.float32 weights \(6,\)"),
        ({"weight": torch.ones(())}, {}, r"weights \(\) and .*expected real \(classes"),
        ({"bias": torch.ones(3)}, {}, r"biases \(3,\), expected"),
        ({"bias": torch.ones(2, 1)}, {}, r"biases \(2, 1\)"),
        ({"weight": torch.ones(2, 3).long()}, {}, "a head of torch.int64 weights"),
    ],
)
def test_incomplete_heads_are_refused(
    tensors: dict[str, Tensor | None], facts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    whole = {"weight": torch.ones(2, 3), "bias": torch.ones(2), **tensors}
    theta = {name: value for name, value in whole.items() if value is not None}
    info = {"normalize": True, "classnames": ["a", "b"], **facts}
    save_tensors(tmp_path / "head.pt", theta, "head", info=info)
    with pytest.raises(UsageError, match=message):
        ClassificationHead.load(tmp_path / "head.pt")


def test_a_classifier_is_the_encoder_and_then_the_head(
    encoder: ImageEncoder, images: Tensor
) -> None:
    head = ClassificationHead(True, torch.randn(4, 256))
    classifier = ImageClassifier(encoder, head)
    with torch.no_grad():
        assert torch.equal(classifier(images), head(encoder(images)))
    assert classifier.train_preprocess is encoder.train_preprocess
    assert classifier.val_preprocess is encoder.val_preprocess
    assert all(value.requires_grad for value in classifier.parameters())
    classifier.freeze_head()
    frozen = {name for name, value in classifier.named_parameters() if not value.requires_grad}
    assert frozen == {"classification_head.weight", "classification_head.bias"}


def test_each_task_has_its_head(encoder: ImageEncoder, images: Tensor) -> None:
    heads = [ClassificationHead(True, torch.randn(classes, 256)) for classes in (4, 2, 4)]
    plain = ImageClassifier(nn.Identity(), heads[0])
    assert plain.train_preprocess is None and plain.val_preprocess is None
    classifier = MultiHeadImageClassifier(encoder, heads)
    with torch.no_grad():
        for index, head in enumerate(heads):
            assert torch.equal(classifier(images, index), head(encoder(images)))
    assert not any(value.requires_grad for head in heads for value in head.parameters())
    assert all(value.requires_grad for value in encoder.parameters())
    assert classifier.val_preprocess is encoder.val_preprocess


# --- linearised encoders


@torch.no_grad()
def test_linearised_encoders_follow_the_protocol_of_encoders(
    args: Callable[..., Any], images: Tensor
) -> None:
    encoder, whole = ImageEncoder(args()), ImageEncoder(args(), keep_lang=True)
    for linear in (
        LinearizedImageEncoder(args(), keep_lang=True),
        LinearizedImageEncoder(image_encoder=encoder),
        LinearizedImageEncoder(image_encoder=whole),
    ):
        assert linear.model_name == NAME
        assert linear.weights().keys() == encoder.weights().keys()
        assert linear(images).shape == (3, 256)
        torch.testing.assert_close(linear(images), encoder(images), rtol=1e-5, atol=1e-5)
        assert callable(linear.train_preprocess) and callable(linear.val_preprocess)
    assert "model.token_embedding.weight" in whole.state_dict()  # left unchanged
