"""Several directions in one pass: each equals its own, whatever part of the weights it moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from tangent_arithmetic.tangent.linearized import LinearizedModel

Vectors = list[dict[str, Tensor]]


def clip() -> nn.Module:
    return VisionTransformer(16, 8, 24, layers=3, heads=2, mlp_ratio=2.0, output_dim=6)


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=5)


def vit() -> nn.Module:
    options: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 2,
    }
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(48, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.out(self.rnn(images.flatten(1).unflatten(1, (-1, 48)))[0][:, -1])
        return result


MODELS: dict[str, Callable[[], nn.Module]] = {
    "clip": clip,
    "resnet": resnet,
    "vit": vit,
    "recurrent": Recurrent,
}


def vectors(model: nn.Module) -> Vectors:
    """Whole ones, every parameter alone or every third, halves that overlap, and an empty one."""
    torch.manual_seed(1)
    whole = [{n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(2)]
    names = list(whole[0])
    alone = [{name: whole[0][name]} for name in names[:: max(1, len(names) // 12)]]
    cut = len(names) // 2
    halves = [{n: whole[1][n] for n in part} for part in (names[: cut + 2], names[cut - 2 :])]
    return [whole[0], *alone, {}, *halves, whole[1]]


@pytest.mark.parametrize("name", MODELS)
def test_each_direction_equals_its_own_pass(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    linear, x = LinearizedModel(model), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    taus = vectors(model)
    with torch.no_grad():
        f0, found = linear.tangents(x, taus)
        torch.testing.assert_close(f0, model(x), rtol=1e-12, atol=1e-12)
        for tau, tangent in zip(taus, found, strict=True):
            if not tau:
                assert not tangent.any()
                continue
            expected = linear.primal_and_tangent(x, tangent=tau)[1]
            scale = float(expected.abs().max())
            torch.testing.assert_close(tangent, expected, rtol=1e-9, atol=1e-10 * max(scale, 1))
            reference = (
                torch.func.jvp(
                    lambda p: torch.func.functional_call(model, p, (x,)),
                    ({n: p.detach() for n, p in model.named_parameters() if n in tau},),
                    (tau,),
                )[1]
                if name == "resnet"
                else expected
            )
            torch.testing.assert_close(tangent, reference, rtol=1e-8, atol=1e-9 * max(scale, 1))


@pytest.mark.parametrize("name", ["clip", "resnet"])
def test_float32_agrees_to_rounding(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    exact = LinearizedModel(MODELS[name]().double().eval())
    exact.module0().load_state_dict(model.double().state_dict())
    model.float()
    x, taus = torch.randn(2, 3, 16, 16), vectors(model)
    with torch.no_grad():
        _, found = LinearizedModel(model).tangents(x, taus)
        double = [{n: t.double() for n, t in tau.items()} for tau in taus]
        _, expected = exact.tangents(x.double(), double)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm()) <= 2e-5 * float(other.norm())
