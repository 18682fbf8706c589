"""LoRA and L-LoRA against their definitions in float64, and their folders read by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_arithmetic.arithmetic.task_vectors import NonLinearTaskVector, TaskVector
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedEncoder, linearized
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.training import adapters as folders
from tangent_arithmetic.training import lora
from tangent_arithmetic.training.adapters import merged, save_adapters
from tangent_arithmetic.training.lora import LowRank, adapted, targets
from tangent_arithmetic.training.reparametrised import parts_of
from tests.towers import known_towers
from tests.training.selections import Attending, move
from tests.training.tiny import Tiny

MATRICES = ["patches.weight", "attn.in_proj_weight", "attn.out_proj.weight", "out.weight"]
PLAIN = Attending().double().eval()
IMAGES = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def adapters(encoder: nn.Module) -> dict[str, LowRank]:
    found = {n: part for n, part in parts_of(encoder)[1].items() if isinstance(part, LowRank)}
    assert found
    return found


def features(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    """f(x; W_0 + 2 B A) of the plain module, with an explicit product."""
    weights: dict[str, Tensor] = {}
    for name, parameter in PLAIN.named_parameters():
        step = 2 * (b[name] @ a[name]).reshape(parameter.shape) if name in a else 0
        weights[name] = parameter.detach() + step
    out: Tensor = torch.func.functional_call(PLAIN, weights, (IMAGES,))
    return out


def test_a_linear_model_with_adapters_is_the_linearisation_in_both_of_them() -> None:
    made = adapted(linearized(Attending()), 2, "all").double().eval()
    parts = adapters(made)
    assert list(parts) == MATRICES
    a = {name: part.a.detach() for name, part in parts.items()}
    zero = {name: torch.zeros_like(part.b) for name, part in parts.items()}
    move(made)
    steps = {name: part.b.detach() for name, part in parts.items()}
    with sdpa_kernel(SDPBackend.MATH):
        by_a, by_b = torch.func.jacrev(features, argnums=(0, 1))(a, zero)
    assert not any(jacobian.any() for jacobian in by_a.values())  # A has no effect, as B is zero
    tangent = torch.stack(
        [torch.einsum("nfor,or->nf", by_b[name], step) for name, step in steps.items()]
    ).sum(0)
    f0 = features(a, zero)
    torch.testing.assert_close(made(IMAGES), f0 + tangent, rtol=1e-10, atol=1e-10)
    assert tangent.abs().max() > 0.1

    (made(IMAGES) ** 2).sum().backward()
    for name, part in parts.items():
        expected = torch.einsum("nf,nf...->...", 2 * (f0 + tangent), by_b[name])
        torch.testing.assert_close(part.b.grad, expected, rtol=1e-9, atol=1e-10)
        assert "a" not in dict(part.named_parameters())


def test_a_standard_model_with_adapters_trains_both() -> None:
    made = adapted(Attending(), 3, "all").double().eval()
    move(made)
    parts = adapters(made)
    a = {name: part.a.detach().requires_grad_() for name, part in parts.items()}
    b = {name: part.b.detach().requires_grad_() for name, part in parts.items()}
    expected = features(a, b)
    torch.testing.assert_close(made(IMAGES), expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((expected**2).sum(), [*a.values(), *b.values()])
    (made(IMAGES) ** 2).sum().backward()
    found = [part.a.grad for part in parts.values()] + [part.b.grad for part in parts.values()]
    torch.testing.assert_close(found, list(gradients), rtol=1e-9, atol=1e-10)


def test_adapters_start_as_those_of_peft_do() -> None:
    made = adapted(Tiny(), 4, "all", seed=3)
    again, other = (adapted(Tiny(), 4, "all", seed=seed) for seed in (3, 4))
    theirs: Any = peft.get_peft_model(Tiny(), peft.LoraConfig(r=4, target_modules=["net.1"]))
    part = adapters(made)["net.1.weight"]
    assert not part.b.any()
    assert part.a.shape == theirs.base_model.model.net[1].lora_A["default"].weight.shape
    wide = adapted(Tiny(), 4, "all").double()
    values = torch.cat(
        [p.a.detach().flatten() for p in adapters(wide).values() if p.a.shape[1] == 48]
    )
    assert values.abs().max() <= 48**-0.5 and values.std().item() == pytest.approx(
        144**-0.5, rel=0.1
    )
    assert torch.equal(part.a, adapters(again)["net.1.weight"].a)
    assert not torch.equal(part.a, adapters(other)["net.1.weight"].a)


@pytest.mark.parametrize("linear", [False, True])
def test_peft_reads_the_folder(linear: bool, tmp_path: Path) -> None:
    base = Tiny()
    made = adapted(linearized(Tiny()) if linear else Tiny(), 2, "all")
    move(made)
    assert save_adapters(made, tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        folders.CONFIG,
        folders.WEIGHTS,
    ]
    config = json.loads((tmp_path / "x" / folders.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (2, 4.0, "none")
    images = torch.randn(4, 3, 4, 4)
    theirs = peft.PeftModel.from_pretrained(Tiny(), str(tmp_path / "x"))
    dense = Tiny()
    dense.load_weights(made.weights())
    torch.testing.assert_close(theirs(images), dense(images))
    assert (dense(images) - base(images)).abs().max() > 0.1


TOWERS = ("ViT-Tiny", "RN-Tiny", "CoCa-Tiny", "SigLIP-Tiny", "ConvNeXt-Tiny")


@pytest.mark.parametrize("which", ["attention-weights", "all"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_folder_merges_into_the_weights_of_the_checkpoint(
    name: str, which: str, tmp_path: Path
) -> None:
    with known_towers(tmp_path):
        torch.manual_seed(0)
        base = ImageEncoder.without_weights(f"{name}__init__")
        start = {key: value.clone() for key, value in base.weights().items()}
        if name == "ConvNeXt-Tiny" and which != "all":
            with pytest.raises(UsageError, match=r"no matrix of the model.*such as lora:R:mlp"):
                adapted(base, 2, which)
            return
        made = adapted(linearized(base), 2, which)
        assert isinstance(made, LinearizedEncoder)
        move(made)
        save_adapters(made, tmp_path / "x")
        dense = merged(base, tmp_path / "x")
        assert type(dense) is type(base)
        assert all(torch.equal(base.weights()[key], value) for key, value in start.items())
        expected = made.weights()
        for key, value in dense.weights().items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)
        vector = NonLinearTaskVector(base, dense)
        moved = {key for key, value in vector.vector.items() if value.abs().max() > 1e-3}
        assert moved == set(targets(base.requires_grad_(True), which))
        assert isinstance(vector, TaskVector)


def test_output_projections_of_attention_are_merged_once(tmp_path: Path) -> None:
    """PEFT adds them twice; remove the correction when this fails: it is fixed."""
    made = adapted(Attending(), 2, "attention-weights")
    move(made)
    save_adapters(made, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Attending(), str(tmp_path)).merge_and_unload()
    w0, ours = Attending().attn.out_proj.weight, made.weights()["attn.out_proj.weight"]
    torch.testing.assert_close(theirs.attn.out_proj.weight - w0, 2 * (ours - w0))
    torch.testing.assert_close(merged(Attending(), tmp_path).attn.out_proj.weight, ours)


def test_half_of_attention_adapted_leaves_the_other_half(tmp_path: Path) -> None:
    made = adapted(Attending(), 2, "in_proj_weight")
    move(made)
    save_adapters(made, tmp_path)
    for name, value in merged(Attending(), tmp_path).weights().items():
        torch.testing.assert_close(value, made.weights()[name])


def test_foreign_adapters_of_all_kinds_of_weights(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["net.1"], bias="all", modules_to_save=["net.3"])
    model = peft.get_peft_model(Tiny(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(str(tmp_path))
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(merged(Tiny(), tmp_path)(images), model(images))


def test_encoders_without_adapters_write_nothing(tmp_path: Path) -> None:
    for encoder in (Tiny(), linearized(Tiny())):
        assert not save_adapters(encoder, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    made = adapted(Tiny(), 2, "all")
    save_adapters(made, tmp_path / "x")
    with pytest.raises(UsageError, match=r"adapters in .* do not fit a Attending"):
        merged(Attending(), tmp_path / "x")
    state = load_file(tmp_path / "x" / folders.WEIGHTS)
    save_file(dict(list(state.items())[1:]), tmp_path / "x" / folders.WEIGHTS)
    with pytest.raises(UsageError, match="do not fit a Tiny"):
        merged(Tiny(), tmp_path / "x")
    (tmp_path / "x" / folders.WEIGHTS).rename(tmp_path / "x" / "adapter_model.bin")
    with pytest.raises(MissingFileError, match=r"has no adapter_model\.safetensors, expected"):
        merged(Tiny(), tmp_path / "x")


def test_ranks_beyond_the_full_one_are_refused() -> None:
    adapted(Attending(), 8, "all")
    with pytest.raises(UsageError, match="at most 8, the full rank of the largest of 2 matrices"):
        adapted(Attending(), 9)


class Positions(ModuleEncoder):
    kind = "positions_encoder"

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)


def test_embeddings_have_no_adapters_and_a_missing_peft_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match=r"lora:R:all: no matrix of the model that can have"):
        adapted(Positions(), 2, "all")
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install peft"):
        adapted(Tiny(), 2, "all")
