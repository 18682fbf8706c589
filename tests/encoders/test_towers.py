"""Every kind of vision tower through fine-tuning, evaluation, addition and negation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.heads import get_classification_head
from tangent_arithmetic.commands import add as eval_task_addition
from tangent_arithmetic.commands import evaluate as eval_single_task
from tangent_arithmetic.commands import finetune
from tangent_arithmetic.commands import negate as eval_task_negation
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
QUICK = ("ViT-Tiny", "RN-Tiny")  # OpenAI's two kinds; the others are run with the slow tests


def write_start(model: str, path: Path) -> None:
    """Random weights of which none is 0, as at the end of a ResNet's blocks: all get a gradient."""
    encoder = ImageEncoder.without_weights(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    encoder.save(path)


@pytest.fixture(
    scope="module",
    params=[pytest.param(t, marks=() if t in QUICK else pytest.mark.slow) for t in TOWERS],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The tower's name and a folder in which all scripts have run with it."""
    folder = tmp_path_factory.mktemp("tower")
    argv = [f"--model={request.param}__init__", "--suite=embedded", *flags(folder)]
    argv += ["--lr=3e-3", "--epochs=6", f"--load={folder / 'start.safetensors'}"]
    with pytest.MonkeyPatch.context() as patch, small_suite(patch), known_towers(folder):
        write_start(f"{request.param}__init__", folder / "start.safetensors")
        for mode in ("standard", "linear"):
            assert finetune.main([*argv, f"--finetuning-mode={mode}"]) == 0
        for mode in ("none", *EDITED):
            assert eval_single_task.main([*argv, f"--finetuning-mode={mode}"]) == 0
        for mode in EDITED:
            assert eval_task_addition.main([*argv, f"--finetuning-mode={mode}"]) == 0
            assert eval_task_negation.main([*argv, f"--finetuning-mode={mode}"]) == 0
        yield request.param, folder


def theta(folder: Path, name: str) -> State:
    return load_checkpoint(folder / "checkpoints" / f"{name}.safetensors").theta


def test_every_parameter_is_trained(run: tuple[str, Path]) -> None:
    tower, folder = run
    params = {n for n, _ in ImageEncoder.without_weights(f"{tower}__init__").named_parameters()}
    start = theta(folder, "zeroshot")
    for task in TASKS:
        for mode in ("", "linear_"):
            tuned = theta(folder, f"{task}Val/{mode}finetuned")
            still = {name for name in params if torch.equal(start[name], tuned[name])}
            assert not still, (task, mode)
            assert all(bool(value.isfinite().all()) for value in tuned.values())


def test_all_results_are_there(run: tuple[str, Path]) -> None:
    tower, folder = run
    (found,) = (folder / "results" / "embedded").iterdir()
    assert found.name == f"{tower}__init__"
    singles = ("zeroshot", "ft", "linear_ft", "posthoc_ft")
    for name in (f"{single}_accuracies" for single in singles):
        results = load_results(found / f"{name}.json")
        assert all(0 <= results[task] <= 1 for task in TASKS)
    sums = f"additions-{'+'.join(TASKS)}"
    for prefix in ("", "linear_", "posthoc_"):
        added = load_results(found / f"{prefix}{sums}.json")
        assert math.isfinite(added["test"]["avg_normalized_top1"])
        assert set(load_results(found / f"{prefix}negations.json")) >= set(TASKS)


@torch.no_grad()
def test_linear_models_are_the_derivative_of_standard_ones(
    run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against PyTorch's own forward-mode AD, in float64; buffers stay as they were."""
    _, folder = run
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
def test_heads_are_unit_vectors_times_the_model_s_scale(run: tuple[str, Path]) -> None:
    tower, folder = run
    args = small_config(folder)
    args.model, args.suite = f"{tower}__init__", "embedded"
    clip: Any = create_clip(args.model)[0]
    head = get_classification_head(args, TASKS[0])
    scale = clip.logit_scale.exp().item()
    torch.testing.assert_close(head.weight.norm(dim=1), torch.full((9,), scale))
