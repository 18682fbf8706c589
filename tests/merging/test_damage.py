"""Invalid files, options and configurations give a message, no traceback and no wrong model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tangent_arithmetic.encoders.base import ModuleEncoder
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
from tangent_arithmetic.merging.targets import LOADERS, device_settings, place_of, task_pool_of
from tangent_arithmetic.merging.taskpools import Task, TaskPool
from tangent_arithmetic.merging.weights import open_clip_vision, open_weights
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import content_hash
from tests.merging.makers import NAMES, encoder_files, layers

# --- files; tests/test_boundaries.py damages them at random


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}


def ours(**facts: str) -> dict[str, Any]:
    return {"__metadata__": {"format": "tangent-arithmetic/1", **facts}}


HEADERS: list[Any] = [
    *([], 3, None, {}, {"a": 3}, {"a": {}}, {"a": {"dtype": "F32"}}),
    entry(shape=[-1]),
    entry(shape=[2**62, 8]),
    entry(shape=[2**64]),
    entry(dtype="F99"),
    entry(dtype="C64", data_offsets=[0, 8]),
    entry(data_offsets=[4, 0]),
    entry(data_offsets=[0, 2**63]),
    ours(),
    ours(info="[" * 10**5, kind="", hash="", theta0_hash=""),
    ours(format="tangent-arithmetic/9"),
    {**ours(info="{}", kind="image_encoder", hash="0" * 64, theta0_hash=""), **entry()},
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
@pytest.mark.parametrize("opened", [open_weights, open_clip_vision])
def test_invalid_headers_give_a_message(
    header: Any, opened: Callable[[Path], Any], tmp_path: Path
) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(UsageError, match=r"x\.safetensors"):
        ModelPool({"x": opened(path), "y": {"a": torch.ones(1)}}).check()
        raise UsageError(f"{path} is without fault")  # an empty model is one


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
CONTENTS = {
    "x.safetensors": [b"", b"\xff" * 100, LFS],
    "x.bin": [b"PK\x03\x04"],
    "x.pt": [b"\x80\x02.", b"text", LFS],
    "x.pth": [b""],
    "x.csv": [b"a,b"],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, each) for name, several in CONTENTS.items() for each in several]
)
@pytest.mark.parametrize("pool", [ModelPool, CLIPVisionModelPool])
def test_files_without_weights_give_a_message(
    name: str, content: bytes, pool: type[ModelPool], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        SimpleAverageAlgorithm().run(pool({"x": tmp_path / name, "y": layers(0)}))


@pytest.mark.parametrize(
    "place", ["x" * 300, f"{'y' * 300}/model", "a\0b", "~nobody-of-this-name/x", "", 7, None, b"x"]
)
def test_invalid_places_give_a_message(place: Any) -> None:
    with pytest.raises(UsageError, match=r"."):
        ModelPool({"x": place}).check()


def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    places = encoder_files(tmp_path)
    data = bytearray(places["DTD"].read_bytes())
    data[-9] ^= 1  # the last bit of a number's mantissa or so: finite, and wrong
    places["DTD"].write_bytes(data)
    with pytest.raises(UsageError, match="is damaged"):
        TaskArithmeticAlgorithm().run_to(places, tmp_path / "merged.safetensors")


# --- options

NUMBER = "scaling_factor must be a finite number, got"
INVALID: list[tuple[type[Algorithm], str, Any, str]] = [
    *(
        (TaskArithmeticAlgorithm, "scaling_factor", value, NUMBER)
        for value in ("half", None, True, [0.3], torch.ones(2))
    ),
    (TaskArithmeticAlgorithm, "scaling_factor", torch.ones(1, requires_grad=True), "gradients"),
    (TaskArithmeticAlgorithm, "scaling_factor", float("nan"), NUMBER),
    (TaskArithmeticAlgorithm, "scaling_factor", float("inf"), NUMBER),
    (DareTaskArithmetic, "sparsity_ratio", "x", "sparsity_ratio must be a finite number"),
    (DareTaskArithmetic, "sparsity_ratio", 1.0, "sparsity_ratio must be at least 0 and below 1"),
    (DareTaskArithmetic, "rescale", "yes", "rescale must be true or false"),
    (DareTaskArithmetic, "seed", 0.5, "seed must be an integer"),
    (DareTiesMerging, "threshold", float("nan"), "threshold must be a finite number"),
    (TiesMergingAlgorithm, "threshold", "20", "threshold must be a finite number"),
    (TiesMergingAlgorithm, "remove_keys", "a", "remove_keys must be a list of names"),
    (TiesMergingAlgorithm, "remove_keys", [1], "remove_keys must be a list of names"),
    (TiesMergingAlgorithm, "scope", [], "unknown scope"),
    (WeightedAverageAlgorithm, "weights", ["a", "b"], "weights must be a list of finite numbers"),
    (WeightedAverageAlgorithm, "weights", 3, "weights must be a list of finite numbers"),
    (SlerpMergeAlgorithm, "t", float("nan"), "t must be a finite number"),
    (SlerpMergeAlgorithm, "DOT_THRESHOLD", 1.0, "DOT_THRESHOLD must be at least 0 and below 1"),
    (SlerpMergeAlgorithm, "epsilon", None, "epsilon must be a finite number"),
]


@pytest.mark.parametrize(("kind", "option", "value", "message"), INVALID, ids=str)
def test_invalid_options_give_a_message(
    kind: type[Algorithm], option: str, value: Any, message: str
) -> None:
    models = {"_pretrained_": layers(0), "a": layers(1)}
    if kind.method == "weighted_average":
        models["b"] = layers(2)
    with pytest.raises(UsageError, match=message):
        kind(**{option: value}).run(models)


def test_numbers_of_other_libraries_are_options(tmp_path: Path) -> None:
    models = {"_pretrained_": layers(0), "a": layers(1)}
    expected = TaskArithmeticAlgorithm(0.5).run(models)
    for half in (np.float64(0.5), np.float32(0.5), torch.tensor(0.5)):
        path = TaskArithmeticAlgorithm(half).run_to(models, tmp_path / "m.safetensors")
        assert content_hash(load_file(path)) == content_hash(expected)


OURS = "tangent_arithmetic.merging"
CONFIG: dict[str, Any] = {
    "fabric": {},
    "path": {"data_dir": "data", "log_dir": "logs"},
    "method": {"_target_": f"{OURS}.TaskArithmeticAlgorithm", "scaling_factor": 0.5},
    "modelpool": {"_target_": f"{OURS}.ModelPool", "models": {"a": "a", "b": "b"}},
    "taskpool": {"_target_": f"{OURS}.DummyTaskPool"},
    "dry_run": True,
}
POOL = {"_target_": f"{OURS}.ModelPool"}
CLIP = {"_target_": f"{OURS}.CLIPVisionModelTaskPool", "base_model": "x"}
ROWS = "datasets.load_dataset"
SPLIT = "fusion_bench.utils.data.train_validation_split"
MNIST = {"_target_": ROWS, "path": "mnist", "split": "train"}
TENTH = {"_target_": SPLIT, "dataset": MNIST, "validation_fraction": 0.1, "random_seed": 0}
TENTH |= {"return_split": "val"}
ODD: list[tuple[str, Any, str]] = [  # group, value, message
    *(
        (group, value, ".")
        for group in ("fabric", "path", "method", "modelpool", "taskpool")
        for value in (None, 3, "text", ["a"])
    ),
    ("method", {}, "method has no _target_"),
    ("fabric", {"precision": "16-mixed"}, "unknown fabric.precision '16-mixed'"),
    ("modelpool", {"_target_": f"{OURS}.run_pool"}, "invalid configuration"),
    ("modelpool", {**POOL, "models": ["a"]}, "modelpool.models must map names to models"),
    ("modelpool", {**POOL, "models": None}, "modelpool.models must map names to models"),
    ("modelpool", {**POOL, "models": {"a": {"path": 3}}}, "must be a path or a name on the hub"),
    ("modelpool", {**POOL, "models": {"a": 7}}, "must be a path or a name on the hub, got 7"),
    ("modelpool", {**POOL, "models": {"a": "x"}, "platform": "x"}, "unknown platform 'x'"),
    *(
        ("modelpool", {**POOL, "models": {"a": {"path": "o/a", **more}}}, f"models.a has {message}")
        for more, message in (
            ({"torch_dtype": "float16"}, "torch_dtype='float16', which is not supported: leave it"),
            ({"subfolder": "unet"}, "subfolder='unet', which is not"),
            ({"reversion": "main"}, "reversion='main', which is not"),
            ({"merge_and_unload": False}, "merge_and_unload=False, which is not"),
            ({"pickle_path": "x"}, "pickle_path and path; expected one of them"),
            ({"path": "./a", "revision": "main"}, "revision=main, but ./a is no name on the hub"),
        )
    ),
    (
        "modelpool",
        {**POOL, "models": {"a": "x"}, "model_kwargs": {"torch_dtype": "bfloat16"}},
        "modelpool.model_kwargs has torch_dtype='bfloat16'",
    ),
    ("taskpool", {"_target_": f"{OURS}.SuiteTaskPool"}, "invalid configuration"),
    ("taskpool", CLIP, "test_datasets must map names to data sets"),
    ("taskpool", {**CLIP, "layer_wise_feature_save_path": "x"}, "save_path is not supported"),
    ("taskpool", {**CLIP, "dataloader_kwargs": "many"}, "invalid configuration"),
    ("taskpool", {**CLIP, "test_datasets": {"a": 3}}, "unknown _target_ of taskpool.test_data"),
    ("taskpool", {**CLIP, "test_datasets": {"a": {"_target_": ROWS, "_args_": 3}}}, "invalid"),
    ("taskpool", {**CLIP, "test_datasets": {"a": {"_target_": ROWS}}}, "needs the path of a data"),
    ("taskpool", {**CLIP, "test_datasets": {"a": {"_target_": "os.system"}}}, "'os.system'"),
    ("taskpool", {**CLIP, "test_datasets": {"a": {"_target_": SPLIT}}}, "invalid configuration"),
    *(
        ("taskpool", {**CLIP, "test_datasets": {"a": {**TENTH, **more}}}, message)
        for more, message in (
            ({"validation_fraction": 0.2}, "only a tenth of train with seed 0 is supported"),
            ({"validation_size": 9}, "only a tenth of train with seed 0 is supported"),
            ({"dataset": {**MNIST, "split": "test"}}, "of test; only a tenth of train with seed 0"),
            ({"seed": 1}, "test_datasets.a has seed, which is not supported"),
            ({"dataset": {**MNIST, "path": "me/mine"}}, "is no data set of our registry"),
        )
    ),
    *(
        ("taskpool", {**CLIP, "test_datasets": {"a": {"_target_": ROWS, **rows}}}, message)
        for rows, message in (
            ({"_args_": ["svhn", "x", "y"]}, "at most a configuration, got .'svhn', 'x', 'y'"),
            ({"path": "1aurent/PatchCamelyon", "split": "valid"}, "names the split valid of 1aur"),
        )
    ),
    *(
        ("taskpool", {**CLIP, "test_datasets": {"a": MNIST}, **more}, message)
        for more, message in (
            ({"processor": "y"}, "processor is that of y, but taskpool.base_model x, whose token"),
            ({"clip_model": "y", "processor": "x"}, "of x, but taskpool.clip_model y, whose"),
            ({"dataloader_kwargs": {"drop_last": True}}, "dataloader_kwargs has drop_last, which"),
            ({"dataloader_kwargs": {"batchsize": 8}}, "has batchsize, .* its keys are batch_size"),
            ({"train_datasets": None}, "taskpool has train_datasets, which is not supported"),
        )
    ),
    ("merged_model_save_kwargs", "fast", "invalid configuration"),
    ("merged_model_save_kwargs", {"fsync": "no"}, "fsync must be true or false, got 'no'"),
    ("merged_model_save_kwargs", {1: 2}, "merged_model_save_kwargs has 1; its keys are"),
]


@pytest.mark.parametrize(("group", "value", "message"), ODD, ids=str)
def test_invalid_configurations_give_a_message(group: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run({**CONFIG, group: value})


def test_a_configuration_names_devices_and_models() -> None:
    assert run(CONFIG) == {
        "dry_run": True,
        "method": "TaskArithmeticAlgorithm(scaling_factor=0.5)",
        "models": ["a", "b"],
    }
    settings = device_settings({"accelerator": "gpu", "precision": "bf16-mixed"})
    assert settings == {"device": "cuda", "precision": "bf16"}


def test_a_model_has_the_revision_that_its_entry_names() -> None:
    loader: dict[str, Any] = {"_target_": LOADERS[0], "torch_dtype": "auto"}
    loader |= {"trust_remote_code": False, "pretrained_model_name_or_path": "org/name"}
    assert place_of(loader, "a") == "org/name"
    assert place_of({**loader, "revision": "v1.0"}, "a") == "org/name@v1.0"


def test_the_clip_of_a_task_pool_is_its_clip_model() -> None:
    """As in FusionBench, where `base_model` is the default of the others."""
    loader = {"_target_": "transformers.CLIPModel.from_pretrained"}
    node: dict[str, Any] = {**CLIP, "test_datasets": {"a": {**MNIST, "split": "test"}}}
    node |= {"dataloader_kwargs": {"batch_size": 4, "shuffle": False, "pin_memory": True}}
    clip = {**loader, "pretrained_model_name_or_path": "org/other"}
    for more, expected in (
        ({}, "x"),
        ({"clip_model": clip, "processor": "org/other"}, "org/other"),
    ):
        tasks: Any = task_pool_of({**node, **more}, {"device": "cpu"})
        assert tasks.base_model == expected and tasks.run.data.batch_size == 4


# --- masks of DARE


@pytest.mark.parametrize("block", [2**18, 7])
def test_masks_do_not_depend_on_the_pieces(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dare, "MASK_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    size = 2**18 + 2**17 + 3 if block > 7 else 50
    models = {name: {"w": torch.randn(size, generator=generator)} for name in NAMES}
    sizes = (2**18, 2**16, 2**19, 10**5, 2**18 + 1) if block > 7 else (50, 1, 3, 7, 8, 14, 49)
    for algorithm in (DareTaskArithmetic(sparsity_ratio=0.9, seed=3), DareTiesMerging(seed=3)):
        merged = []
        for piece in sizes:
            monkeypatch.setattr(stream, "PIECE", piece)
            merged.append(algorithm.run(models)["w"])
        assert all(torch.equal(each, merged[0]) for each in merged)


def test_masks_equal_those_of_earlier_versions() -> None:
    """Each block of 2**18 numbers has a generator, seeded by seed, model, tensor and start."""
    expected = []
    for start, size in ((0, 2**18), (2**18, 2**18), (2**19, 5)):
        digest = hashlib.sha256(f"3|a|w|{start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        expected.append(torch.rand(size, generator=generator))
    assert torch.equal(dare.uniform(3, "a", "w", 0, 2**19 + 5), torch.cat(expected))
    assert torch.equal(dare.uniform(3, "a", "w", 2**18 - 2, 4)[2:], expected[1][:2])
    assert len(dare.uniform(3, "a", "w", 2**18, 0)) == 0


# --- the caller's model


class Interrupted(ModuleEncoder):
    """An encoder that is interrupted at the third picture."""

    kind = "interrupted"

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.layer, self.error, self.seen = nn.Linear(4, 2), error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        if self.seen == 3:
            raise self.error
        features: Tensor = self.layer(x)
        return features


def pool_of_one() -> TaskPool:
    task = Task(lambda _: [], nn.Identity)
    return TaskPool(Run.of(Config(model="x", device="cpu")), {"t": task})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=repr)
def test_an_interruption_leaves_the_model_unchanged(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder: Any = Interrupted(error)
    before = {name: value.clone() for name, value in encoder.weights().items()}
    tasks = pool_of_one()
    batches = [(torch.randn(2, 4), torch.zeros(2, dtype=torch.int64))] * 3
    monkeypatch.setattr(tasks, "_batches", lambda *_: batches)
    tau = {name: torch.ones_like(value) for name, value in before.items()}
    with pytest.raises(type(error)):
        tasks.sweep(encoder, tau, [0.5, 1.0])
    for name, value in encoder.weights().items():
        assert torch.equal(value, before[name])


def test_an_empty_split_is_named() -> None:
    encoder: Any = Interrupted(RuntimeError())
    with pytest.raises(UsageError, match="the test split of t is empty"):
        pool_of_one().evaluate(encoder)
