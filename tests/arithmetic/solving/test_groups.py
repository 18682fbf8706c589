"""Groups of parameters of models by other libraries, and the directions that they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from tangent_arithmetic.arithmetic.solving.groups import along, check_grouping, directions, layers
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import State

VIT = {
    "vision_cfg": {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
}


def clip_tower() -> nn.Module:
    cfg = open_clip.CLIPVisionCfg(**VIT["vision_cfg"])
    tower: nn.Module = open_clip.model._build_vision_tower(16, cfg)
    return tower


def hugging_face() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(num_hidden_layers=3, projection_dim=4, **sizes)
    return transformers.CLIPVisionModelWithProjection(config)


BLOCKS = ["block 0", "block 1", "block 2"]
STAGES = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
# model, its layers in order, parameters of the embedding, parameters of the head
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], set[str], set[str]]] = {
    "open_clip": (
        clip_tower,
        BLOCKS,
        {"class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias"},
        {"proj", "ln_post.weight", "ln_post.bias"},
    ),
    "timm": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=3),
        BLOCKS,
        {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"},
        {"norm.weight", "norm.bias", "head.weight", "head.bias"},
    ),
    "timm, stages": (
        lambda: timm.create_model("resnet18"),
        STAGES,
        {"conv1.weight", "bn1.weight", "bn1.bias"},
        {"fc.weight", "fc.bias"},
    ),
    "torchvision": (
        lambda: torchvision.models.VisionTransformer(16, 8, 3, 2, 8, 8, num_classes=4),
        BLOCKS,
        {"class_token", "encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"},
        {"encoder.ln.weight", "encoder.ln.bias", "heads.head.weight", "heads.head.bias"},
    ),
    "transformers": (
        hugging_face,
        BLOCKS,
        {
            *(
                f"vision_model.embeddings.{n}"
                for n in ("class_embedding", "patch_embedding.weight")
            ),
            "vision_model.embeddings.position_embedding.weight",
            *(f"vision_model.pre_layrnorm.{n}" for n in ("weight", "bias")),
        },
        {
            *(f"vision_model.post_layernorm.{n}" for n in ("weight", "bias")),
            "visual_projection.weight",
        },
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_layers_of_models_of_other_libraries(model: str) -> None:
    build, blocks, embedding, head = MODELS[model]
    with torch.device("meta"):
        names = [name for name, _ in build().named_parameters()]
    for prefix in ("", "model.visual."):  # encoders wrap their model
        found = layers([prefix + name for name in names])
        owned = {layer: {n for n, g in found.items() if g == layer} for layer in found.values()}
        assert set(owned) == {"embedding", *blocks, "head"}
        assert {n.removeprefix(prefix) for n in owned["embedding"]} == embedding
        assert {n.removeprefix(prefix) for n in owned["head"]} == head
        assert min(len(owned[block]) for block in blocks) >= 6


def test_without_blocks_each_module_is_a_layer() -> None:
    assert layers(["a.0.weight", "a.0.bias", "b.weight", "c"]) == {
        "a.0.weight": "a.0",
        "a.0.bias": "a.0",
        "b.weight": "b",
        "c": "c",
    }


def test_a_model_in_a_list_of_its_own_is_no_block() -> None:
    blocks = [f"0.auto_model.encoder.layer.{i}.attention.self.key.weight" for i in range(3)]
    names = ["0.auto_model.embeddings.word_embeddings.weight", *blocks, "2.dense.linear.weight"]
    assert list(layers(names).values()) == ["embedding", "block 0", "block 1", "block 2", "head"]


def test_stages_are_blocks_and_what_is_in_them_is_not() -> None:
    names = [f"layers.{i}.blocks.{j}.attn.qkv.weight" for i in range(2) for j in range(2)]
    assert list(layers(names).values()) == ["block 0", "block 0", "block 1", "block 1"]


NAMES = ["embed.weight", "proj", *(f"blocks.{i}.{n}.weight" for i in range(2) for n in "ab"), "n.b"]


def vectors() -> dict[str, State]:
    return {task: {name: torch.randn(2) for name in NAMES} for task in ("x", "y")}


LAYERS = ["embedding", "block 0", "block 1", "head"]
DISTINCT = ["embed.weight", "blocks.0.a.weight"]


@pytest.mark.parametrize(
    ("grouping", "expected"),
    [
        ("task", ["x", "y"]),
        ("layer", LAYERS),
        ("task-layer", [f"{task}/{layer}" for task in "xy" for layer in LAYERS]),
        ("block", [f"{task}/{name}" for task in "xy" for name in NAMES]),
        (r"blocks\.(\d+)\.(\w)", [f"{t}/{g}" for t in "xy" for g in ("rest", "0.a", "0.b", "1.a", "1.b")]),  # noqa: E501
        ("blocks", [f"{t}/{g}" for t in "xy" for g in ("rest", "blocks")]),
    ],
)  # fmt: skip
def test_directions_are_named_and_sum_to_the_task_vectors(
    grouping: str, expected: list[str]
) -> None:
    taus = vectors()
    parts = directions(taus, grouping, NAMES)
    assert [part.name for part in parts] == expected
    assert all(part.vector for part in parts)
    count = Counter(name for part in parts for name in part.vector)
    assert set(count) == set(NAMES) and set(count.values()) == {1 if grouping == "layer" else 2}
    total = along([part.vector for part in parts], [1.0] * len(parts))
    for name in NAMES:
        torch.testing.assert_close(total[name], taus["x"][name] + taus["y"][name])


def test_along_weighs_vectors_and_leaves_them_as_they_are() -> None:
    a, b = {"w": torch.ones(2), "u": torch.ones(1)}, {"w": torch.ones(2)}
    total = along([a, b], [2.0, -0.5])
    assert total["w"].tolist() == [1.5, 1.5] and total["u"].tolist() == [2.0]
    assert a["w"].tolist() == b["w"].tolist() == [1.0, 1.0]


def test_invalid_groupings_are_refused() -> None:
    with pytest.raises(UsageError, match=r"expected task, layer, task-layer, block or a regular"):
        check_grouping("(")
    with pytest.raises(UsageError, match=r"'layers' matches the name of no parameter"):
        directions(vectors(), "layers", NAMES)
