"""Every kind of vision tower through fine-tuning, evaluation, addition and negation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.heads import get_classification_head
from tangent_arithmetic.commands import add, evaluate, finetune, negate
from tangent_arithmetic.encoders.clip import create_clip
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.run.results import load_results
from tangent_arithmetic.storage.statedict import State
from tests.small_suite import TASKS, flags, small_config, small_suite
from tests.towers import TOWERS, known_towers

pytestmark = pytest.mark.clip
EDITED = ("standard", "linear", "posthoc")
QUICK = ("RN-Tiny", ("linear",))  # a ResNet has buffers; other tests use the embedded ViT


def write_start(model: str, path: Path) -> None:
    """Random weights without the zeros at the end of a ResNet's blocks, to get gradients."""
    encoder = ImageEncoder.without_weights(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    encoder.save(path)


@pytest.fixture(
    scope="module",
    params=[QUICK, *(pytest.param((tower, EDITED), marks=pytest.mark.slow) for tower in TOWERS)],
    ids=str,
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tower's name, a folder in which all commands have run with it, and their modes."""
    folder, (tower, modes) = tmp_path_factory.mktemp("tower"), request.param
    argv = [f"--model={tower}__init__", "--suite=embedded", *flags(folder)]
    argv += ["--lr=3e-3", "--epochs=2", f"--load={folder / 'start.safetensors'}"]
    with pytest.MonkeyPatch.context() as patch, small_suite(patch), known_towers(folder):
        write_start(f"{tower}__init__", folder / "start.safetensors")
        for mode in ("standard", "linear"):
            assert finetune.main([*argv, f"--finetuning-mode={mode}"]) == 0
        assert evaluate.main([*argv, "--finetuning-mode=none"]) == 0
        for mode in modes:
            for command in (evaluate, add, negate):
                assert command.main([*argv, f"--finetuning-mode={mode}"]) == 0
        yield tower, folder, modes


def theta(folder: Path, name: str) -> State:
    return load_checkpoint(folder / "checkpoints" / f"{name}.safetensors").theta


def test_every_parameter_is_trained_and_every_result_written(run: Any) -> None:
    tower, folder, modes = run
    params = {n for n, _ in ImageEncoder.without_weights(f"{tower}__init__").named_parameters()}
    start = theta(folder, "zeroshot")
    for task, prefix in itertools.product(TASKS, ("", "linear_")):
        tuned = theta(folder, f"{task}Val/{prefix}finetuned")
        assert not {name for name in params if torch.equal(start[name], tuned[name])}
        assert all(bool(value.isfinite().all()) for value in tuned.values())
    results = folder / "results" / "embedded" / f"{tower}__init__"
    prefixes = ["" if mode == "standard" else f"{mode}_" for mode in modes]
    for name in ("zeroshot", *(f"{prefix}ft" for prefix in prefixes)):
        singles = load_results(results / f"{name}_accuracies.json")
        assert all(0 <= singles[task] <= 1 for task in TASKS)
    for prefix in prefixes:
        added = load_results(results / f"{prefix}additions-{'+'.join(TASKS)}.json")
        assert math.isfinite(added["test"]["avg_normalized_top1"])
        assert set(load_results(results / f"{prefix}negations.json")) >= set(TASKS)


@torch.no_grad()
def test_linear_models_are_the_derivative_of_standard_ones(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against PyTorch's own forward-mode AD, in float64; buffers stay as they were."""
    _, folder, _ = run
    encoder = ImageEncoder.load(folder / "checkpoints" / "zeroshot.safetensors").double()
    tuned = {n: v.double() for n, v in theta(folder, f"{TASKS[0]}Val/linear_finetuned").items()}
    params = {name: p.detach() for name, p in encoder.named_parameters()}
    tau = {name: tuned[name] - p for name, p in params.items()}
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode rule
        found: Any = torch.func.jvp(
            lambda p: torch.func.functional_call(encoder, p, (x,)), (params,), (tau,)
        )
    value, slope = found
    linear = LinearizedImageEncoder(image_encoder=encoder).double()
    linear.load_weights({**encoder.weights(), **{name: tuned[name] for name in params}})
    torch.testing.assert_close(linear(x), value + slope, rtol=1e-10, atol=1e-10)
    assert slope.norm() > 1e-3 * value.norm()


@torch.no_grad()
def test_heads_are_unit_vectors_times_the_model_s_scale(run: Any) -> None:
    tower, folder, _ = run
    args = small_config(folder)
    args.model, args.suite = f"{tower}__init__", "embedded"
    clip: Any = create_clip(args.model)[0]
    head = get_classification_head(args, TASKS[0])
    scale = clip.logit_scale.exp().item()
    torch.testing.assert_close(head.weight.norm(dim=1), torch.full((9,), scale))
