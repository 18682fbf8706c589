"""Choices of trainable parameters on towers of several libraries, against what gradients reach."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedEncoder, linearized
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.training.loop import TrainingData, train
from tangent_arithmetic.training.towers import after_block, blocks_of
from tangent_arithmetic.training.trainable import Choice, choice_of, train_only
from tests.towers import known_towers
from tests.training.tiny import RECIPE, Tiny


@pytest.fixture(scope="module", autouse=True)
def towers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with known_towers(tmp_path_factory.mktemp("towers")):
        yield


def of_open_clip(name: str) -> nn.Module:
    return ImageEncoder.without_weights(f"{name}__init__")


def of_timm(name: str) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=3)


def of_transformers(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    size |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    if kind == "clip":
        config = transformers.CLIPVisionConfig(**size, projection_dim=8)
        return transformers.CLIPVisionModelWithProjection(config)
    return transformers.ViTModel(transformers.ViTConfig(**size))


def vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32
    )


def swin() -> nn.Module:
    return models.SwinTransformer([4, 4], 8, [1, 2], [1, 2], [2, 2])


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the number of blocks
    "open_clip ViT": (lambda: of_open_clip("ViT-Tiny"), 2),
    "open_clip ResNet": (lambda: of_open_clip("RN-Tiny"), 4),
    "open_clip CoCa": (lambda: of_open_clip("CoCa-Tiny"), 2),
    "open_clip SigLIP": (lambda: of_open_clip("SigLIP-Tiny"), 6),
    "open_clip ConvNeXt": (lambda: of_open_clip("ConvNeXt-Tiny"), 9),
    "timm ViT": (lambda: of_timm("test_vit"), 6),
    "timm ResNet": (lambda: of_timm("test_resnet"), 4),
    "torchvision ViT": (vit, 3),
    "torchvision Swin": (swin, 3),
    "torchvision ResNet": (lambda: models.resnet18(num_classes=3), 8),
    "torchvision MobileNet": (lambda: models.mobilenet_v2(num_classes=3, width_mult=0.1), 17),
    "transformers CLIP": (lambda: of_transformers("clip"), 3),
    "transformers ViT": (lambda: of_transformers("vit"), 3),
}


def output(model: nn.Module, images: Tensor) -> Tensor:
    out = model(images)
    if isinstance(out, Tensor):
        return out
    value: Tensor = out["image_embeds" if "image_embeds" in out else "pooler_output"]
    return value


def reached(model: nn.Module, block: str) -> set[str]:
    """The parameters that have a gradient if the input of a block is cut off."""
    hook = model.get_submodule(block).register_forward_pre_hook(
        lambda _, args: tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    )
    model.zero_grad(set_to_none=True)
    output(model.eval(), torch.randn(2, 3, 32, 32)).square().sum().backward()
    hook.remove()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def used(model: nn.Module) -> set[str]:
    model.zero_grad(set_to_none=True)
    output(model.eval(), torch.randn(2, 3, 32, 32)).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_the_last_blocks_and_what_follows_are_what_a_gradient_reaches(name: str) -> None:
    torch.manual_seed(0)
    build, count = MODELS[name]
    model = build()
    blocks, everything = blocks_of(model), used(model)
    assert len(blocks) == count
    for block in {blocks[0][0], blocks[count // 2][0], blocks[-1][0]}:
        assert after_block(model, block) & everything == reached(model, block)
    train_only(model, "last:2")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == after_block(model, blocks[-2][0])


IN_BLOCK = {  # model -> choice -> names in the last block
    "open_clip ViT": {
        "attention": r"attn\.",
        "attention-weights": r"attn\.(in_proj_weight|out_proj\.weight)",
        "mlp": r"mlp\.",
        "norm": r"ln_[12]\.",
    },
    "open_clip SigLIP": {
        "attention": r"attn\.",
        "attention-weights": r"attn\.(qkv|proj)\.weight",
        "mlp": r"mlp\.",
        "norm": r"norm[12]\.",
    },
    "open_clip ConvNeXt": {"mlp": r"mlp\.", "norm": r"norm\."},
    "torchvision ViT": {
        "attention": r"self_attention\.",
        "attention-weights": r"self_attention\.(in_proj_weight|out_proj\.weight)",
        "mlp": r"mlp\.",
        "norm": r"ln_[12]\.",
    },
    "torchvision Swin": {
        "attention": r"attn\.",
        "attention-weights": r"attn\.(qkv|proj)\.weight",
        "mlp": r"mlp\.",
        "norm": r"norm[12]\.",
    },
    "torchvision ResNet": {"norm": r"bn[12]\."},
    "transformers CLIP": {
        "attention": r"self_attn\.",
        "attention-weights": r"self_attn\.(q|k|v|out)_proj\.weight",
        "mlp": r"mlp\.",
        "norm": r"layer_norm[12]\.",
    },
    "transformers ViT": {
        "attention": r"attention\.",
        "attention-weights": r"attention\..*weight",
        "mlp": r"mlp\.",
        "norm": r"layernorm_(before|after)\.",
    },
}
CASES = [(name, choice) for name, choices in IN_BLOCK.items() for choice in choices]


@pytest.mark.parametrize(("name", "choice"), CASES)
def test_layers_are_recognised_in_models_of_several_libraries(name: str, choice: str) -> None:
    model = MODELS[name][0]()
    last = blocks_of(model)[-1][0]
    train_only(model, choice)
    for parameter, p in model.named_parameters():
        if parameter.startswith(f"{last}."):
            wanted = re.match(IN_BLOCK[name][choice], parameter.removeprefix(f"{last}."))
            assert p.requires_grad == (wanted is not None), parameter


def test_the_pooling_of_a_resnet_is_attention() -> None:
    model = of_open_clip("RN-Tiny")
    train_only(model, "attention-weights")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"model.visual.attnpool.{part}_proj.weight" for part in "qkvc"
    }


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_the_query_and_the_norms_of_a_pooler_are_not_attention() -> None:
    model = of_open_clip("CoCa-Tiny")
    train_only(model, "attention")
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "attn_pool" in n}
    assert trained and all(name.startswith("model.visual.attn_pool.attn.") for name in trained)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("choice", ["mlp", "norm", "last:1", r"^model\.visual\.ln_post"])
def test_frozen_weights_stay_as_they_are_bit_by_bit(choice: str, linear: bool) -> None:
    torch.manual_seed(0)
    standard = ImageEncoder.without_weights("ViT-Tiny__init__")
    train_only(standard, choice)
    wanted = {name for name, p in standard.named_parameters() if p.requires_grad}
    encoder = ImageEncoder.without_weights("ViT-Tiny__init__")
    trained = linearized(encoder) if linear else encoder
    train_only(trained, choice)
    if isinstance(trained, LinearizedEncoder):  # what is frozen has no tangent
        assert set(trained.model._displacement()) == wanted
    before = {name: value.clone() for name, value in trained.weights().items()}
    classifier = ImageClassifier(trained, ClassificationHead(True, torch.randn(3, 8)))
    classifier.freeze_head()
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    pictures = ArrayPictures(images, np.arange(8) % 3)
    train(classifier, TrainingData(pictures, to_tensor), replace(RECIPE, epochs=2, wd=0.5))
    moved = {n for n, value in trained.weights().items() if not torch.equal(value, before[n])}
    assert moved == wanted and 0 < len(wanted) < len(before)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", Choice("subset", "all")),
        ("last:2", Choice("subset", "last:2")),
        ("lora:8", Choice("lora", "attention-weights", 8)),
        ("lora:4:mlp", Choice("lora", "mlp", 4)),
        ("lora:4:a:b", Choice("lora", "a:b", 4)),
        ("talos", Choice("talos", "all", 0.1)),
        ("talos:0.02", Choice("talos", "all", 0.02)),
    ],
)
def test_values_of_the_flag(which: str, expected: Choice) -> None:
    assert choice_of(which) == expected


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("lora:", "expected lora:R, R a rank, 1 or more"),
        ("lora:0", "expected lora:R"),
        ("lora:x", "expected lora:R"),
        ("talos:0", r"talos:SHARE.* above 0 and below 1"),
        ("talos:1", "talos:SHARE"),
        ("talos:nan", "talos:SHARE"),
        ("talos:a", "talos:SHARE"),
        ("last:0", "expected last:K, K a number of blocks, 1 or more"),
        ("last:", "expected last:K"),
        ("last:3", r"last:3: expected at most 2, the blocks of the model \(Residual"),
        ("atention", r"atention matches none of the \d+ parameters; choose all, attention.*, "
         r"last:K, lora:R, talos or a regular .*names are such as model\.visual\."),
        ("(", r"expected all, .* or a regular expression.*, got \(?.*unterminated"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("linear", [False, True])
def test_what_is_no_choice_is_refused(which: str, message: str, linear: bool) -> None:
    encoder = ImageEncoder.without_weights("ViT-Tiny__init__")
    with pytest.raises(UsageError, match=message):
        train_only(linearized(encoder) if linear else encoder, choice_of(which).which)


def test_a_model_without_blocks_says_so() -> None:
    with pytest.raises(UsageError, match=r"at most 0, the blocks of the model \(none\)"):
        train_only(Tiny(), "last:1")
