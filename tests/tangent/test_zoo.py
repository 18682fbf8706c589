"""Models of timm, transformers and torchvision are linearised exactly, in every call.

Each is compared with PyTorch's reverse mode, and with a central difference, at weights that all
matter; then once more, and after a step of training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.linearized import LinearizedModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of libraries about themselves
]
ZOO = json.loads((Path(__file__).parent / "zoo.json").read_text(encoding="utf-8"))
# no padding: reverse mode gives its row of the embeddings no gradient
IDS = torch.tensor([[5, 3, 17, 8, 9, 4, 30, 12], [7, 7, 3, 21, 6, 11, 13, 5]])
MASK = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])


def _alive(model: nn.Module) -> nn.Module:
    """The model with weights that all matter: no zeros, no scales of 1e-6."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            size = value.square().mean().sqrt().clamp(min=0.05)
            value.add_(0.1 * size * torch.randn_like(value))
        for module in model.modules():
            if (
                isinstance(module, nn.modules.batchnorm._BatchNorm)
                and module.running_var is not None
            ):
                assert module.running_mean is not None
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def _outputs(out: Any) -> list[Tensor]:
    leaves = [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)]
    return [v for v in leaves if v.is_floating_point() and v.requires_grad]


def _norm(tensors: list[Tensor]) -> float:
    return sum(float(t.detach().double().square().sum()) for t in tensors) ** 0.5


def _difference(model: nn.Module, theta0: Any, v: Any, inputs: dict[str, Any], t: float) -> Any:
    def at(s: float) -> list[Tensor]:
        moved = {n: (theta0[n] + s * v[n]).requires_grad_() for n in theta0}
        args, kwargs = inputs.get("args", ()), inputs.get("kwargs", {})
        return [
            o.detach() for o in _outputs(torch.func.functional_call(model, moved, args, kwargs))
        ]

    return [(h - m) / (2 * t) for h, m in zip(at(t), at(-t), strict=True)]


def check(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Compares the linearisation of a model with its derivatives by other means."""
    model, inputs = _alive(model), {"args": args, "kwargs": kwargs}
    double = next(model.parameters()).dtype is torch.float64
    learnt = {name: value for name, value in model.named_parameters() if value.requires_grad}
    theta0 = {name: value.detach().clone() for name, value in learnt.items()}
    v = {n: 0.1 * p.square().mean().sqrt() * torch.randn_like(p) for n, p in theta0.items()}
    plain = _outputs(model(*args, **kwargs))
    u = [torch.randn_like(out) for out in plain]
    reverse = torch.autograd.grad(plain, list(learnt.values()), u, allow_unused=True)
    slope = sum(
        float((g * w).sum()) for g, w in zip(reverse, v.values(), strict=True) if g is not None
    )
    linear = LinearizedModel(model)
    linear.load_state_dict({**linear.state_dict(), **{n: theta0[n] + v[n] for n in theta0}})
    for _ in range(2):
        _, d = linear.primal_and_tangent(*args, **kwargs)
        steps = [step.detach() for step in _outputs(d)]
        assert len(steps) == len(plain)
        inner = sum(float((a * b).sum()) for a, b in zip(steps, u, strict=True))
        scale = _norm(steps) * _norm(u)
        assert abs(inner - slope) <= (1e-6 if double else 1e-3) * scale
    errors = []
    for t in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7) if double else (1e-2, 1e-3):
        differences = _difference(model, theta0, v, inputs, t)
        gap = _norm([a.detach() - b for a, b in zip(steps, differences, strict=True)])
        errors.append(gap / _norm(differences))
    assert min(errors) < (1e-2 if double else 5e-2)  # some compute in float32 inside
    _check_training(linear, theta0, reverse, u, args, kwargs, 1e-6 if double else 1e-3)


def _check_training(
    linear: LinearizedModel, theta0: Any, reverse: Any, u: Any, args: Any, kwargs: Any, bar: float
) -> None:
    """The gradient is J^T u whatever theta, and the step of SGD moves f_lin along it."""
    for _ in range(2):
        before = _outputs(linear(*args, **kwargs))
        linear.zero_grad()
        torch.autograd.backward(before, u)
        found = [linear.theta()[name].grad for name in theta0]
        gaps = [
            (a if a is not None else torch.zeros_like(p))
            - (b if b is not None else torch.zeros_like(p))
            for a, b, p in zip(found, reverse, theta0.values(), strict=True)
        ]
        size = _norm([g for g in reverse if g is not None])
        assert _norm(gaps) <= bar * size
        rate = 1e-3 / size
        with torch.no_grad():
            for p in linear.parameters():
                if p.grad is not None:
                    p.sub_(rate * p.grad)
        after = _outputs(linear(*args, **kwargs))
        change = sum(float(((a - b) * w).sum()) for a, b, w in zip(after, before, u, strict=True))
        assert change == pytest.approx(-rate * size**2, rel=1e-4 if bar < 1e-4 else 5e-2)


@pytest.mark.parametrize("name", ZOO["timm"])
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    options = dict(ZOO["timm"][name])
    size, count = options.pop("pixels"), options.pop("batch", 1)
    try:
        model = timm.create_model(name, pretrained=False, num_classes=5, **options)
    except RuntimeError as error:  # another version of timm
        pytest.skip(str(error))
    check(model.double(), torch.randn(count, 3, size, size, dtype=torch.float64))


@pytest.mark.parametrize("name", ZOO["torchvision"])
def test_torchvision(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=5, **options).double()
    check(
        model,
        torch.randn(1, 3, ZOO["torchvision"][name], ZOO["torchvision"][name], dtype=torch.float64),
    )


COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for name, entry in ZOO["transformers"].items()
        for attention in entry["attention"]
    ],
)
def test_transformers(name: str, attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    entry = ZOO["transformers"][name]
    common = {} if entry.get("own") else COMMON
    try:
        config = transformers.AutoConfig.for_model(name, **{**common, **entry.get("config", {})})
    except (ValueError, KeyError) as error:  # another version of transformers
        pytest.skip(str(error))
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation=attention)
    model = model.float() if entry.get("float32") else model.double()
    dtype = next(model.parameters()).dtype
    if "pixels" in entry:
        check(model, pixel_values=torch.randn(1, 3, entry["pixels"], entry["pixels"], dtype=dtype))
        return
    inputs: dict[str, Any] = {"input_ids": IDS}
    if entry.get("mask", True):
        inputs["attention_mask"] = MASK
    if entry.get("decoder"):
        inputs["decoder_input_ids"] = IDS[:, :5]
    check(model, **inputs)
