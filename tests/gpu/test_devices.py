"""What a GPU computes beside what the CPU does, by the commands themselves on the small suite.

`TANGENT_TEST_DEVICE=cpu` runs these tests without a GPU, so that their own code is known to work.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tangent_arithmetic.commands import add, evaluate, finetune, merge
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder, linearized
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.merging.algorithms import algorithm_class
from tangent_arithmetic.run.args import parse_arguments
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.storage.checkpoints import read_safetensors
from tangent_arithmetic.storage.statedict import difference, norm
from tests.merging.makers import NAMES, layers
from tests.small_suite import SIZES, TASKS, flags, small_suite

State = dict[str, Tensor]
DEVICE = os.environ.get("TANGENT_TEST_DEVICE", "")
if not DEVICE and torch.cuda.is_available():
    DEVICE = "cuda"
elif not DEVICE and torch.backends.mps.is_available():
    DEVICE = "mps"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DEVICE, reason="neither a CUDA nor an MPS device is there"),
    pytest.mark.filterwarnings("default"),  # libraries warn of what a machine lacks
]
PREFIX = {"standard": "", "linear": "linear_"}


@pytest.fixture(scope="module", autouse=True)
def float32() -> Iterator[None]:
    """Convolutions compute in float32, not in TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[dict[str, Path]]:
    """Folders of two tasks that were fine-tuned for three steps in both modes: CPU and device."""
    found = {}
    with pytest.MonkeyPatch.context() as patch, small_suite(patch):
        for name, device in (("cpu", "cpu"), ("device", DEVICE)):
            found[name] = tmp_path_factory.mktemp(name)
            for mode in PREFIX:
                assert finetune.main(on(device, found[name], cache, mode)) == 0
        yield found


def on(device: str, root: Path, cache: Path, mode: str, *more: str) -> list[str]:
    """The flags of a small run on a device."""
    places = [f"--device={device}", f"--cache-dir={cache}", f"--finetuning-mode={mode}"]
    return [*flags(root), *places, "--seed=0", *more]


def checkpoint(root: Path, mode: str, task: str = "Emoji") -> Any:
    return load_checkpoint(root / "checkpoints" / f"{task}Val" / f"{PREFIX[mode]}finetuned.pt")


def vector(root: Path, mode: str, task: str = "Emoji") -> State:
    """A task vector of a run."""
    theta0 = load_checkpoint(root / "checkpoints" / "zeroshot.pt").theta
    return difference(checkpoint(root, mode, task).theta, theta0)


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The relative distance of all tensors together."""
    here = {name: value.detach().cpu() for name, value in found.items()}
    there = {name: value.detach().cpu() for name, value in expected.items()}
    return float(norm(difference(here, there)) / norm(there))


def moved(tower: str) -> LinearizedImageEncoder:
    """A linearised encoder away from theta0."""
    linear = linearized(ImageEncoder.without_weights(tower).eval())
    with torch.no_grad():
        for value in linear.parameters():
            value.add_(0.1 * value.abs().mean() * torch.randn_like(value))
    return linear


@pytest.mark.parametrize("tower", ["ViT-Nano-8__init__", "RN-Tiny__init__"])
def test_linearised_features_and_gradients(
    tower: str, resnet: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert resnet == "RN-Tiny__init__"
    linear, images, found = moved(tower), torch.randn(4, 3, 32, 32), dict[str, State]()
    signs = torch.randn(4, linear(images[:1]).shape[1])
    with caplog.at_level("DEBUG", logger="tangent_arithmetic.tangent"):
        for name in ("cpu", DEVICE):
            model = copy.deepcopy(linear).to(torch.device(name))
            parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
            features = model(images.to(name))
            assert features.device.type == torch.device(name).type
            loss = (features * signs.to(name)).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            slopes = {f"gradient of {n}": g for n, g in zip(parameters, gradients, strict=True)}
            found["cpu" if not found else "device"] = {"features": features, **slopes}
    assert "was not checked" not in caplog.text  # J v, against differences and reverse mode
    device, expected = found["device"], found["cpu"]
    assert distance({"": device.pop("features")}, {"": expected.pop("features")}) < 1e-4
    assert distance(device, expected) < 1e-4


@pytest.mark.parametrize("mode", PREFIX)
def test_training_by_the_command(mode: str, roots: dict[str, Path]) -> None:
    for task in TASKS:
        found, expected = (vector(roots[name], mode, task) for name in ("device", "cpu"))
        assert float(norm(expected)) > 0 and distance(found, expected) < 0.1


@pytest.mark.parametrize("mode", PREFIX)
def test_evaluation_and_a_sweep(
    mode: str, roots: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """Of the same checkpoints; an image close to a boundary may fall on its other side."""
    found = []
    for i, device in enumerate(("cpu", DEVICE)):
        results = tmp_path / str(i)
        argv = on(device, roots["device"], cache, mode, f"--results={results}")
        assert evaluate.main(argv) == 0 and add.main(argv) == 0
        (path,) = results.rglob(f"{PREFIX[mode]}additions-*.json")
        found.append(json.loads(path.read_text(encoding="utf-8")))
    expected, here = found
    assert here["provenance"]["device"].startswith(DEVICE)
    assert here["val"].keys() == expected["val"].keys() and len(here["val"]) == 3
    for coef, metrics in expected["val"].items():
        for task in TASKS:
            name = f"{task}Val:top1"
            gap = abs(here["val"][coef][name] - metrics[name])
            assert gap <= 2 / SIZES["val"] + 1e-9


METHODS = ["TaskArithmeticAlgorithm", "TiesMergingAlgorithm"]
METHODS += [] if DEVICE == "mps" else ["TaskSingularVectorMerging"]  # in float64


@pytest.mark.parametrize("name", METHODS)
def test_merging_tensors_of_a_device(name: str) -> None:
    states = {model: layers(seed) for seed, model in enumerate(NAMES)}
    states |= {m: {**s, "matrix": s["layer0"].reshape(10, 10)} for m, s in states.items()}
    there = {m: {n: v.to(DEVICE) for n, v in state.items()} for m, state in states.items()}
    found, expected = (algorithm_class(name)().run(pool) for pool in (there, states))
    assert {value.device.type for value in found.values()} == {torch.device(DEVICE).type}
    assert distance(found, expected) < 1e-5


def test_merging_with_images(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tangent_arithmetic.run.run.DEFAULT_CACHE", tmp_path / "cache")
    merged = {}
    for name, device in (("cpu", "cpu"), ("device", DEVICE)):
        out = tmp_path / f"{name}.safetensors"
        words = ["modelpool=embedded", "taskpool=embedded", "print_config=false"]
        words += [f"{p}.run={roots['device'] / 'checkpoints'}" for p in ("modelpool", "taskpool")]
        words += [f"{p}.tasks=[{','.join(TASKS)}]" for p in ("modelpool", "taskpool")]
        words += [f"taskpool.results={tmp_path / name}", f"path.output_dir={tmp_path / 'outputs'}"]
        words += ["method=regmean", "method.num_regmean_examples=16", "seed=0"]
        words += [f"fabric.accelerator={device.partition(':')[0]}", f"merged_model_save_path={out}"]
        assert merge.main(words) == 0
        merged[name] = read_safetensors(out)
    start = load_checkpoint(roots["device"] / "checkpoints" / "zeroshot.pt").theta
    found, expected = (difference(merged[name], start) for name in ("device", "cpu"))
    assert float(norm(expected)) > 0 and distance(found, expected) < 1e-2


def test_autocast(roots: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    """Training and features in bfloat16, with weights that stay float32."""
    argv = on(DEVICE, tmp_path, cache, "linear", "--tasks=Emoji", "--precision=bf16")
    assert finetune.main(argv) == 0
    found = checkpoint(tmp_path, "linear")
    assert found.info["recipe"]["precision"] == "bf16"
    assert {value.dtype for value in found.theta.values()} == {torch.float32}
    assert distance(vector(tmp_path, "linear"), vector(roots["device"], "linear")) < 0.5
    path = tmp_path / "checkpoints" / "EmojiVal" / "linear_finetuned.safetensors"
    encoder = LinearizedImageEncoder.load(path).to(torch.device(DEVICE)).eval()
    images, features = torch.randn(4, 3, 32, 32, device=DEVICE), []
    for precision in ("fp32", "bf16"):
        compute = Compute(torch.device(DEVICE), precision)
        with torch.no_grad(), compute.autocast():
            features.append(encoder(images).float())
    assert 0 < distance({"": features[1]}, {"": features[0]}) < 0.05


def _finetune(run: Run) -> None:
    """Fine-tunes on the small suite, in every process of a run."""
    with pytest.MonkeyPatch.context() as patch, small_suite(patch):
        finetune.work(run)


@pytest.mark.skipif(
    DEVICE != "cpu" and torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)
def test_two_processes_train_as_one(roots: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    argv = on(DEVICE.partition(":")[0], tmp_path, cache, "linear", "--tasks=Emoji")
    start(_finetune, parse_arguments([*argv, "--world-size=2", "--port=12441"]))
    assert checkpoint(tmp_path, "linear").info["world_size"] == 2
    assert distance(vector(tmp_path, "linear"), vector(roots["device"], "linear")) < 0.05
