from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tangent_arithmetic.encoders.mlp import BackBone, ClassificationModel, Head, MLPBlock
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.statedict import content_hash


def test_the_backbone_has_the_public_names_and_size() -> None:
    backbone = BackBone(512)
    names = list(backbone.state_dict())
    assert names[:2] == ["block1.block.0.weight", "block1.block.0.bias"]
    assert names[10] == "transition.weight" and names[-1] == "block2.block.8.bias"
    # 1,807,754 with the public head, Linear 256 -> 128 -> 10
    public_head = 256 * 128 + 128 + 128 * 10 + 10
    assert sum(p.numel() for p in backbone.parameters()) == 1_807_754 - public_head
    assert backbone.get_output_dim() == 256


def test_blocks_end_in_relu_and_the_transition_does_not() -> None:
    block = MLPBlock(4, 6, num_layers=3)
    kinds = [type(layer) for layer in block.block]
    assert kinds == [nn.Linear, nn.ReLU] * 3
    assert [layer.weight.shape for layer in block.block[::2]] == [(6, 4), (6, 6), (6, 6)]
    x = torch.randn(5, 8)
    backbone = BackBone(8)
    expected = x
    for stage in (backbone.block1.block, [backbone.transition], backbone.block2.block):
        for layer in stage:
            expected = layer(expected)
    assert torch.equal(backbone(x), expected)
    assert (backbone.transition(backbone.block1(x)) < 0).any()


def test_the_head_has_three_layers() -> None:
    head = Head(16, 5)
    assert [type(layer) for layer in head.layers] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    assert ClassificationModel(BackBone(32), head)(torch.randn(7, 32)).shape == (7, 5)


def test_the_initialisation_keeps_the_size_of_the_signal() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 64)
    ours = BackBone(64)
    default = BackBone(64)
    for layer in default.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    with torch.no_grad():
        assert 0.1 < ours(x).square().mean().sqrt() < 10
        assert default(x).std(dim=0).max() < 1e-3  # what differs between rows


def test_files_give_the_same_weights(tmp_path: Path) -> None:
    for module in (BackBone(6), Head(3, 4)):
        module.save(tmp_path / "m.pth", dataset="d")
        again = type(module).load(tmp_path / "m.pth")
        assert again.sizes == module.sizes
        assert content_hash(again.state_dict()) == content_hash(module.state_dict())


def test_a_missing_or_unknown_weight_is_an_error(tmp_path: Path) -> None:
    backbone = BackBone(6)
    state = dict(backbone.state_dict())
    state["block1.block.1.weight"] = state.pop("block1.block.0.weight")
    save_tensors(tmp_path / "b", state, BackBone.kind, info=backbone.sizes)
    with pytest.raises(ValueError, match=r"(?s)first: block1.block.0.weight.*block1.block.1.w"):
        BackBone.load(tmp_path / "b")


def test_errors_of_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no checkpoint at"):
        BackBone.load(tmp_path / "none")
    Head(3, 4).save(tmp_path / "h")
    with pytest.raises(UsageError, match="holds a mlp_head, expected a mlp_backbone"):
        BackBone.load(tmp_path / "h")


DIFFERENT, UNREADABLE = "BackBone and .* do not match", "cannot be read as a mlp_backbone"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        *(({"input_dim": size}, DIFFERENT) for size in (10**6, 7)),
        *(({"input_dim": size}, UNREADABLE) for size in (10**30, 0, -6, 2.5, "6", None, [6])),
        ({}, UNREADABLE),
        ({"input_dim": 6, "output_dim": 2}, UNREADABLE),
    ],
)
def test_sizes_in_a_file_are_compared_with_its_weights_first(
    sizes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    state = dict(BackBone(6).state_dict())
    save_tensors(tmp_path / "backbone.pth", state, BackBone.kind, info=sizes)
    with pytest.raises(UsageError, match=rf"(?s){message}"):
        BackBone.load(tmp_path / "backbone.pth")
