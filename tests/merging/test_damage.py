"""Whatever is in a file, an option or a configuration: a message, no trace, no wrong model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tangent_arithmetic.merging import (
    Algorithm,
    CLIPVisionModelPool,
    DareTaskArithmetic,
    DareTiesMerging,
    ModelPool,
    SimpleAverageAlgorithm,
    SlerpMergeAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
    WeightedAverageAlgorithm,
    stream,
)
from tangent_arithmetic.merging.methods import dare
from tangent_arithmetic.merging.program import run
from tangent_arithmetic.merging.taskpools import Task, TaskPool
from tangent_arithmetic.merging.weights import open_clip_vision, open_weights
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError
from tests.merging.test_files import encoder_files

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(5, generator=generator), "b": torch.randn(2, 3, generator=generator)}


# --- files


@FUZZ
@given(data=st.data())
def test_damaged_files_give_a_message(tmp_path: Path, data: st.DataObject) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_file(state(0), str(good), metadata={"format": "pt"})
    content = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["byte", "cut", "insert", "header"]))
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        some = data.draw(st.binary(min_size=1, max_size=9))
        if kind == "byte" and content:
            content[at] = some[0]
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = some
        else:
            content[8 : 8 + len(some)] = some
    bad.write_bytes(content)
    with contextlib.suppress(UsageError):
        TaskArithmeticAlgorithm(0.5).run_to(
            {"_pretrained_": good, "a": bad}, tmp_path / "merged.safetensors"
        )


HEADERS: list[Any] = [
    [], 3, None, {}, {"a": 3}, {"a": {}}, {"a": {"dtype": "F32"}},
    {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [2**64], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
    {"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**63]}},
    {"__metadata__": {"format": "tangent-arithmetic/1"}},
    {"__metadata__": {"format": "tangent-arithmetic/1", "info": "[" * 10**5, "kind": "",
                      "hash": "", "theta0_hash": ""}},
    {"__metadata__": {"format": "tangent-arithmetic/9"}},
    {"__metadata__": {"format": "tangent-arithmetic/1", "info": "{}", "kind": "image_encoder",
                      "hash": "0" * 64, "theta0_hash": ""},
     "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
@pytest.mark.parametrize("opened", [open_weights, open_clip_vision])
def test_odd_headers_give_a_message(
    header: Any, opened: Callable[[Path], Any], tmp_path: Path
) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(UsageError, match=r"x\.safetensors"):
        ModelPool({"x": opened(path), "y": {"a": torch.ones(1)}}).check()
        raise UsageError(f"{path} is without fault")  # an empty model is one


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.safetensors", b""), ("x.safetensors", b"\xff" * 100), ("x.bin", b"PK\x03\x04"),
        ("x.pt", b"\x80\x02."), ("x.pt", b"text"), ("x.pth", b""), ("x.csv", b"a,b"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        ("x.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pool", [ModelPool, CLIPVisionModelPool])
def test_files_that_are_none_give_a_message(
    name: str, content: bytes, pool: type[ModelPool], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        SimpleAverageAlgorithm().run(pool({"x": tmp_path / name, "y": state(0)}))


@pytest.mark.parametrize(
    "place", ["x" * 300, f"{'y' * 300}/model", "a\0b", "~nobody-of-this-name/x", "", 7, None, b"x"]
)
def test_places_that_are_none_give_a_message(place: Any) -> None:
    with pytest.raises(UsageError, match=r"."):
        ModelPool({"x": place}).check()


def test_a_checkpoint_whose_bits_flipped_is_not_merged(tmp_path: Path) -> None:
    places = encoder_files(tmp_path)
    data = bytearray(places["DTD"].read_bytes())
    data[-9] ^= 1  # the last bit of a number's mantissa or so: finite, and wrong
    places["DTD"].write_bytes(data)
    with pytest.raises(UsageError, match="is damaged"):
        TaskArithmeticAlgorithm().run_to(places, tmp_path / "merged.safetensors")


# --- options


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            TaskArithmeticAlgorithm,
            {"scaling_factor": "half"},
            "scaling_factor must be a number, got 'half'",
        ),
        (
            TaskArithmeticAlgorithm,
            {"scaling_factor": None},
            "scaling_factor must be a number, got None",
        ),
        (
            TaskArithmeticAlgorithm,
            {"scaling_factor": True},
            "scaling_factor must be a number, got True",
        ),
        (
            TaskArithmeticAlgorithm,
            {"scaling_factor": [0.3]},
            "scaling_factor must be a number, got",
        ),
        (
            TaskArithmeticAlgorithm,
            {"scaling_factor": torch.ones(2)},
            "scaling_factor must be a number, got",
        ),
        (
            TaskArithmeticAlgorithm,
            {"scaling_factor": torch.tensor(0.3, requires_grad=True)},
            "plain numbers without gradients",
        ),
        (TaskArithmeticAlgorithm, {"scaling_factor": float("nan")}, "not finite"),
        (TaskArithmeticAlgorithm, {"scaling_factor": float("inf")}, "not finite"),
        (DareTaskArithmetic, {"sparsity_ratio": "x"}, "sparsity_ratio must be a number"),
        (
            DareTaskArithmetic,
            {"sparsity_ratio": 1.0},
            "sparsity_ratio must be at least 0 and below 1",
        ),
        (DareTaskArithmetic, {"rescale": "yes"}, "rescale must be true or false"),
        (DareTaskArithmetic, {"seed": 0.5}, "seed must be an integer"),
        (DareTiesMerging, {"threshold": float("nan")}, "threshold must be above 0"),
        (TiesMergingAlgorithm, {"threshold": "20"}, "threshold must be a number"),
        (TiesMergingAlgorithm, {"remove_keys": "a"}, "remove_keys must be a list of names"),
        (TiesMergingAlgorithm, {"remove_keys": [1]}, "remove_keys must be a list of names"),
        (TiesMergingAlgorithm, {"scope": []}, "unknown scope"),
        (WeightedAverageAlgorithm, {"weights": ["a", "b"]}, "weights must be a list of numbers"),
        (WeightedAverageAlgorithm, {"weights": 3}, "weights must be a list of numbers"),
        (SlerpMergeAlgorithm, {"t": float("nan")}, "t must be from 0 to 1"),
        (
            SlerpMergeAlgorithm,
            {"DOT_THRESHOLD": 1.0},
            "DOT_THRESHOLD must be at least 0 and below 1",
        ),
        (SlerpMergeAlgorithm, {"epsilon": None}, "epsilon must be a number"),
    ],
    ids=str,
)
def test_options_are_what_they_should_be(
    kind: type[Algorithm], options: dict[str, Any], message: str
) -> None:
    models = {"_pretrained_": state(0), "a": state(1)}
    if kind.method == "weighted_average":
        models["b"] = state(2)
    with pytest.raises(UsageError, match=message):
        kind(**options).run(models)


def test_options_of_other_libraries_are_numbers(tmp_path: Path) -> None:
    import numpy as np

    models = {"_pretrained_": state(0), "a": state(1)}
    expected = TaskArithmeticAlgorithm(0.5).run(models)
    for half in (np.float64(0.5), np.float32(0.5), torch.tensor(0.5)):
        assert torch.equal(TaskArithmeticAlgorithm(half).run(models)["a"], expected["a"])
        TaskArithmeticAlgorithm(half).run_to(models, tmp_path / "m.safetensors")  # has a recipe


CONFIG: dict[str, Any] = {
    "fabric": {}, "path": {"data_dir": "data", "log_dir": "logs"}, "seed": None,
    "method": {"_target_": "src.merging.TaskArithmeticAlgorithm", "scaling_factor": 0.5},
    "modelpool": {"_target_": "src.merging.ModelPool", "models": {"a": "a", "b": "b"}},
    "taskpool": {"_target_": "src.merging.DummyTaskPool"}, "dry_run": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        *({group: value} for group in ("fabric", "path", "method", "modelpool", "taskpool")
          for value in (None, 3, "text", ["a"])),
        {"modelpool": {"_target_": "src.merging.run_pool"}},
        {"modelpool": {"_target_": "src.merging.ModelPool", "models": ["a"]}},
        {"modelpool": {"_target_": "src.merging.ModelPool", "models": {"a": {"path": 3}}}},
        {"taskpool": {"_target_": "src.merging.SuiteTaskPool"}},
        {"taskpool": {"_target_": "src.merging.CLIPVisionModelTaskPool", "base_model": "x",
                      "test_datasets": {"a": {"_target_": "datasets.load_dataset", "_args_": 3}}}},
        {"taskpool": {"_target_": "src.merging.CLIPVisionModelTaskPool", "base_model": "x",
                      "dataloader_kwargs": "many", "test_datasets": {"a": 3}}},
        {"taskpool": {"_target_": "src.merging.CLIPVisionModelTaskPool", "base_model": "x",
                      "test_datasets": {
                          "a": {"_target_": "fusion_bench.utils.data.train_validation_split"}}}},
        {"merged_model_save_kwargs": "fast"}, {"merged_model_save_kwargs": {"fsync": "no"}},
        {"merged_model_save_kwargs": {1: 2}},
    ],
    ids=str,
)  # fmt: skip
def test_odd_configurations_give_a_message(change: Mapping[str, Any]) -> None:
    assert run(CONFIG)["dry_run"]
    with pytest.raises(UsageError, match=r"."):
        run({**CONFIG, **change})


# --- masks of DARE


@pytest.mark.parametrize("block", [2**18, 7])
def test_masks_do_not_depend_on_the_pieces(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dare, "MASK_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    size = 2**18 + 2**17 + 3 if block > 7 else 50
    models = {name: {"w": torch.randn(size, generator=generator), "s": torch.randn(3)}
              for name in ("_pretrained_", "a", "b")}  # fmt: skip
    found = []
    for piece in (2**18, 2**16, 2**19, 10**5, 2**18 + 1) if block > 7 else (50, 1, 3, 7, 8, 14, 49):
        monkeypatch.setattr(stream, "PIECE", piece)
        found.append([DareTaskArithmetic(sparsity_ratio=0.9, seed=3).run(models)["w"],
                      DareTiesMerging(sparsity_ratio=0.5, seed=3).run(models)["w"]])  # fmt: skip
    for one, two in found[1:]:
        assert torch.equal(one, found[0][0]) and torch.equal(two, found[0][1])


def test_masks_are_those_of_earlier_versions() -> None:
    """A generator a block of 2**18 numbers, of the hash of seed, model, tensor and its start."""
    import hashlib

    expected = []
    for start, size in ((0, 2**18), (2**18, 2**18), (2**19, 5)):
        digest = hashlib.sha256(f"3|a|w|{start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        expected.append(torch.rand(size, generator=generator))
    assert torch.equal(dare.uniform(3, "a", "w", 0, 2**19 + 5), torch.cat(expected))
    assert torch.equal(dare.uniform(3, "a", "w", 2**18 - 2, 4)[2:], expected[1][:2])
    assert len(dare.uniform(3, "a", "w", 2**18, 0)) == 0


# --- the caller's model


class Interrupted(nn.Module):
    """An encoder that is interrupted at the third picture."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.layer, self.error, self.seen = nn.Linear(4, 2), error, 0
        self.val_preprocess = None

    def weights(self) -> dict[str, Tensor]:
        return dict(self.state_dict())

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.load_state_dict(dict(weights))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        if self.seen == 3:
            raise self.error
        found: Tensor = self.layer(x)
        return found


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=repr)
def test_the_model_is_as_it_was_after_an_interruption(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder: Any = Interrupted(error)
    before = {name: value.clone() for name, value in encoder.weights().items()}
    tasks = TaskPool(
        Run.of(Config(model="x", device="cpu")), {"t": Task(lambda _: None, nn.Identity)}
    )
    batches = [(torch.randn(2, 4), torch.zeros(2, dtype=torch.int64))] * 3
    monkeypatch.setattr(tasks, "_batches", lambda *_: batches)
    tau = {name: torch.ones_like(value) for name, value in before.items()}
    with pytest.raises(type(error)):
        tasks.sweep(encoder, tau, [0.5, 1.0])
    for name, value in encoder.weights().items():
        assert torch.equal(value, before[name])


def test_an_empty_split_is_named() -> None:
    tasks = TaskPool(
        Run.of(Config(model="x", device="cpu")), {"t": Task(lambda _: [], nn.Identity)}
    )
    encoder: Any = Interrupted(RuntimeError())
    with pytest.raises(UsageError, match="the test split of t is empty"):
        tasks.evaluate(encoder)
