"""Merging from files to files."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.merging import (
    CLIPVisionModelPool,
    ModelPool,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
    written_recipe,
)
from tangent_arithmetic.merging.cards import CARD
from tangent_arithmetic.merging.saving import RECIPE
from tangent_arithmetic.merging.taskpools import CLIPVisionModelTaskPool, HubRows
from tangent_arithmetic.merging.weights import find, open_weights
from tangent_arithmetic.merging.writer import size_of
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.statedict import content_hash
from tests.merging.makers import NAMES, encoder_files, mixed, write_files


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return write_files(tmp_path, {name: mixed(seed) for seed, name in enumerate(NAMES)})


def test_files_give_the_same_as_memory(files: dict[str, Path], tmp_path: Path) -> None:
    memory = {name: load_file(path) for name, path in files.items()}
    for algorithm in (TaskArithmeticAlgorithm(0.4), TiesMergingAlgorithm(0.7, 30)):
        expected = algorithm.run(memory)
        path = algorithm.run_to(files, tmp_path / "out" / "merged.safetensors")
        assert content_hash(load_file(path)) == content_hash(expected)
        assert content_hash(algorithm.run(files)) == content_hash(expected)
    assert sorted(p.name for p in path.parent.iterdir()) == ["merged.safetensors"]


def test_the_recipe_has_models_and_options(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = written_recipe(TaskArithmeticAlgorithm(0.4).run_to(files, tmp_path / "m.safetensors"))
    assert recipe["method"] == "task_arithmetic" and recipe["options"] == {"scaling_factor": 0.4}
    assert list(recipe["models"]) == ["_pretrained_", "a", "b"]
    assert recipe["models"]["a"]["place"] == str(files["a"])
    assert len({model["fingerprint"] for model in recipe["models"].values()}) == 3
    with pytest.raises(UsageError, match="was not written by a merge"):
        written_recipe(files["a"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert written_recipe("~/m.safetensors") == recipe


@pytest.mark.parametrize("limit", ["1MB", "100KB", "5GB", "base"])
def test_shards_follow_the_rules_of_transformers(
    files: dict[str, Path], tmp_path: Path, limit: str
) -> None:
    algorithm = TaskArithmeticAlgorithm(0.4)
    folder = algorithm.run_to(files, tmp_path / "merged", max_shard_size=limit)
    index = folder / "model.safetensors.index.json"
    if limit in ("5GB", "base"):  # the base model is one file
        merged = load_file(folder / "model.safetensors")
        assert not index.exists()
    else:
        listed = json.loads(index.read_text())
        parts = {file: load_file(folder / file) for file in listed["weight_map"].values()}
        assert len(parts) == 2
        merged = {name: parts[file][name] for name, file in listed["weight_map"].items()}
        assert sum(map(len, parts.values())) == len(merged)
        size = sum(value.nbytes for value in merged.values())
        assert listed["metadata"]["total_size"] == size
    assert content_hash(merged) == content_hash(algorithm.run(files))
    again = SimpleAverageAlgorithm().run({"x": folder, "y": files["a"]})  # sharded input
    torch.testing.assert_close(again["big"], (merged["big"] + mixed(1)["big"]) / 2)


def test_shards_are_those_of_the_base_model(tmp_path: Path) -> None:
    """Whatever the order of the names: transformers shards in the order of the layers."""
    places: dict[str, Path] = {}
    layers = [f"layers.{i}.w" for i in range(12)]
    for seed, name in enumerate(NAMES):
        places[name], generator = tmp_path / name, torch.Generator().manual_seed(seed)
        places[name].mkdir()
        files = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
        parts = {file: layers[4 * i : 4 * i + 4] for i, file in enumerate(files)}
        for file, names in parts.items():
            state = {key: torch.randn(5, generator=generator) for key in names}
            torch.save(state, places[name] / file)
        weight_map = {key: file for file, names in parts.items() for key in names}
        index = places[name] / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    folder = TaskArithmeticAlgorithm(0.4).run_to(places, tmp_path / "out", max_shard_size="base")
    listed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert listed == {
        key: f"model-0000{1 + i // 4}-of-00003.safetensors" for i, key in enumerate(layers)
    }
    merged = {key: load_file(folder / file)[key] for key, file in listed.items()}
    assert content_hash(merged) == content_hash(TaskArithmeticAlgorithm(0.4).run(places))


def test_sizes_are_parsed() -> None:
    assert size_of("1.5GB") == 1_500_000_000 and size_of("200 kb") == 200_000 and size_of(7) == 7
    for text in ("5", "GB", "-1MB", "1PB"):
        with pytest.raises(UsageError, match="expected a size such as 5GB"):
            size_of(text)


def test_a_failed_merge_leaves_what_there_was(files: dict[str, Path], tmp_path: Path) -> None:
    target = TaskArithmeticAlgorithm().run_to(files, tmp_path / "earlier" / "folder")
    before = (target / "model.safetensors").read_bytes()
    save_file({**mixed(2), "scalar": torch.tensor(float("nan"))}, str(files["b"]))
    for place in ("out/merged.safetensors", "out/folder", "earlier/folder"):
        with pytest.raises(UsageError, match=r"b has nan at index 0 of scalar"):
            TaskArithmeticAlgorithm().run_to(files, tmp_path / place)
    assert not list((tmp_path / "out").iterdir())
    assert (target / "model.safetensors").read_bytes() == before


def test_a_folder_is_replaced(files: dict[str, Path], tmp_path: Path) -> None:
    for seed in (1, 2):
        save_file(mixed(seed), str(files["b"]))
        target = TaskArithmeticAlgorithm().run_to(files, tmp_path / "new" / "folder")
        merged = load_file(target / "model.safetensors")
        assert content_hash(merged) == content_hash(TaskArithmeticAlgorithm().run(files))
        assert [p.name for p in target.parent.iterdir()] == ["folder"]
        assert {p.name for p in target.iterdir()} == {"model.safetensors", CARD, RECIPE}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize("target", ["merged.safetensors", "folder"])
@pytest.mark.parametrize("size", [100, 1_000_000])
def test_a_full_disk_leaves_nothing(
    target: str, size: int, files: dict[str, Path], tmp_path: Path
) -> None:
    import resource

    path = tmp_path / "out" / target
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(UsageError, match=f"cannot write {path}: File too large; make room"):
            TaskArithmeticAlgorithm().run_to(files, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(path.parent.iterdir())


def test_invalid_files_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    text, damaged = tmp_path / "weights.safetensors", tmp_path / "damaged.safetensors"
    text.write_text("these are no weights")
    text.with_suffix(".txt").write_text("these are no weights")
    damaged.write_bytes(files["a"].read_bytes()[:-100])
    for path in (text, damaged, text.with_suffix(".txt")):
        with pytest.raises(UsageError, match=path.name):
            SimpleAverageAlgorithm().run({"x": path, "a": files["a"]})
    with pytest.raises(MissingFileError, match=r"no checkpoint at .*absent"):
        SimpleAverageAlgorithm().run({"x": tmp_path / "absent.safetensors", "a": files["a"]})


# --- our checkpoints


@pytest.mark.parametrize("linear", [False, True])
def test_our_checkpoints_give_checkpoints(linear: bool, tmp_path: Path) -> None:
    places = encoder_files(tmp_path, linear)
    algorithm = TaskArithmeticAlgorithm(0.3)
    path = algorithm.run_to(places, tmp_path / "elsewhere" / "merged.pt")
    assert path.name == "merged.safetensors"
    merged = load_checkpoint(path)  # compares the checksum
    states = {name: load_checkpoint(place).theta for name, place in places.items()}
    torch.testing.assert_close(merged.theta, algorithm.run(states), rtol=0, atol=0)
    assert merged.theta0_hash == content_hash(states["_pretrained_"])
    assert merged.info["merge_recipe"]["models"]["DTD"]["hash"]
    encoder = algorithm.run(places)
    assert content_hash(encoder.weights()) == merged.hash
    if linear:
        assert merged.theta0 is not None and merged.kind == "linearized_image_encoder"
        assert content_hash(encoder.weights0()) == merged.theta0_hash
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(type(encoder).load(path).eval()(x), encoder.eval()(x))


def built_files(folder: Path, **records: Any) -> dict[str, Path]:
    """Checkpoints of ViT-Nano-8 that record how features are computed; None for no record."""
    torch.manual_seed(0)
    encoder, paths = ImageEncoder.without_weights("ViT-Nano-8"), dict[str, Path]()
    theta0 = {name: value.clone() for name, value in encoder.weights().items()}
    for name, record in records.items():
        paths[name] = folder / f"{name.strip('_')}.safetensors"
        theta = {n: v + 0.02 * torch.randn_like(v) for n, v in theta0.items()}
        if record is None:
            save_tensors(paths[name], theta, "image_encoder", info={"model": "ViT-Nano-8"})
        else:
            own = ImageEncoder.without_weights("ViT-Nano-8")
            own.adopt(record, "a file")
            own.load_weights(theta)
            own.save(paths[name])
    return paths


QUICK = {"activation": "QuickGELU"}
DARK = {"preprocess": {"mean": [0.1, 0.2, 0.3]}}


@pytest.mark.parametrize("linear", [False, True])
def test_merged_checkpoints_compute_features_as_their_parents(linear: bool, tmp_path: Path) -> None:
    """The activation and the preprocessing, which their model's name does not imply."""
    record = {**QUICK, **DARK}
    places = built_files(tmp_path, _pretrained_=record, a=record, b=record)
    if linear:
        for name in ("a", "b"):
            start = ImageEncoder.load(places["_pretrained_"])
            model = LinearizedImageEncoder(image_encoder=start)
            model.load_weights(ImageEncoder.load(places[name]).weights())
            model.save(places[name])
    algorithm = TaskArithmeticAlgorithm(0.5)
    expected = algorithm.run(places)
    found = type(expected).load(algorithm.run_to(places, tmp_path / "out" / "m.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.eval()(x), expected.eval()(x))
    assert found.built() == expected.built() == ImageEncoder.load(places["_pretrained_"]).built()
    assert found.built()["adopted"] == ["activation", "preprocess"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"a": {}, "b": QUICK}, "a and b compute .* record activation GELU and QuickGELU. Choose"),
        ({"_pretrained_": QUICK, "a": {}}, "_pretrained_ and a .* activation QuickGELU and GELU"),
        ({"a": {}, "b": DARK}, r"mean \[0.5, 0.5, 0.5\] and \[0.1, 0.2, 0.3\]"),
        ({"a": None, "b": QUICK}, "another activation than that of their model in one, and none"),
        ({"a": {}, "b": None}, ""),
        ({"_pretrained_": DARK, "a": DARK, "b": DARK}, ""),
    ],
    ids=str,
)
def test_models_that_compute_features_differently_are_refused(
    records: dict[str, Any], message: str, tmp_path: Path
) -> None:
    places = built_files(tmp_path, **records)
    if message:
        with pytest.raises(UsageError, match=message):
            SimpleAverageAlgorithm().run(places)
    else:
        SimpleAverageAlgorithm().run(places)


def test_models_of_another_start_or_kind_are_refused(tmp_path: Path) -> None:
    places, linear = encoder_files(tmp_path), encoder_files(tmp_path / "linear", linear=True)
    with pytest.raises(UsageError, match="models of one kind, got image_encoder, linearized"):
        TaskArithmeticAlgorithm().run({**places, "MNIST": linear["MNIST"]})
    other = {n: value + 1 for n, value in load_checkpoint(places["_pretrained_"]).theta.items()}
    places["_pretrained_"] = tmp_path / "other.safetensors"
    save_tensors(places["_pretrained_"], other, "image_encoder", info={"model": "ViT-Nano-8"})
    message = r"MNIST was fine-tuned from weights .* have different origins"
    with pytest.raises(UsageError, match=message):
        TaskArithmeticAlgorithm().run(places)
    TaskArithmeticAlgorithm().run(ModelPool(places, allow_base_mismatch=True))


# --- Hugging Face


def test_clips_of_transformers_merge_and_load(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = {**size, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    text = {**size, "num_hidden_layers": 1, "vocab_size": 99}
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    models = {"_pretrained_": whole} | {
        name: CLIPVisionModel(CLIPVisionConfig(**vision, projection_dim=8)) for name in ("a", "b")
    }
    states = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tower = getattr(model, "vision_model", model).state_dict()
        states[name] = {key.removeprefix("vision_model."): value for key, value in tower.items()}
    pool = CLIPVisionModelPool({name: tmp_path / name for name in models})
    folder = TaskArithmeticAlgorithm(0.3).run_to(pool, tmp_path / "merged", max_shard_size="5KB")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "clip_vision_model" and config["hidden_size"] == 16
    for name, value in CLIPVisionModel.from_pretrained(folder).state_dict().items():
        key = name.removeprefix("vision_model.")
        if value.is_floating_point():
            base = states["_pretrained_"][key].double()
            expected = base + 0.3 * sum(states[n][key].double() - base for n in ("a", "b"))
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(UsageError, match="has no vision tower of a CLIP"):
        CLIPVisionModelPool(write_files(tmp_path, {"x": mixed(0)})).check()


def test_towers_of_different_activations_are_refused(tmp_path: Path) -> None:
    for name, activation in (("a", "gelu"), ("b", "quick_gelu")):
        (tmp_path / name).mkdir()
        state = {"vision_model.embeddings.class_embedding": torch.ones(3)}
        state |= {"visual_projection.weight": torch.ones(2, 3)}
        save_file(state, str(tmp_path / name / "model.safetensors"))
        config = {"model_type": "clip_vision_model", "hidden_act": activation}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    pool = CLIPVisionModelPool({name: tmp_path / name for name in ("a", "b")})
    with pytest.raises(UsageError, match="record activation GELU and QuickGELU"):
        SimpleAverageAlgorithm().run(pool)
    rows = {"x": HubRows("me/mine", None, "test")}
    tasks = CLIPVisionModelTaskPool(rows, str(tmp_path / "b"), device="cpu")
    with pytest.raises(UsageError, match=r"a and base_model=.* activation GELU and QuickGELU"):
        tasks.encoder(pool, dict(pool.base.tensors))


@pytest.mark.parametrize("prefixed", ["none", "base", "models", "all"])
def test_names_of_towers_are_those_of_the_base(prefixed: str, tmp_path: Path) -> None:
    """transformers 5 can save towers without the prefix; a merge neither adds nor drops it."""
    places: dict[str, Path] = {}
    for seed, name in enumerate(NAMES):
        own = prefixed in ("all", "base" if name == "_pretrained_" else "models")
        prefix, places[name] = "vision_model." if own else "", tmp_path / name
        places[name].mkdir()
        shapes = {"embeddings.class_embedding": 3, "encoder.layers.0.mlp.fc1.weight": 4}
        state = {f"{prefix}{key}": torch.full((n,), float(seed)) for key, n in shapes.items()}
        save_file(state, str(places[name] / "model.safetensors"))
    folder = TaskArithmeticAlgorithm(1.0).run_to(CLIPVisionModelPool(places), tmp_path / "merged")
    merged = load_file(folder / "model.safetensors")
    assert merged.keys() == load_file(places["_pretrained_"] / "model.safetensors").keys()
    assert all(bool((value == 3).all()) for value in merged.values())


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "mistralai/Mistral-7B-v0.1"])
def test_names_on_the_hub_may_have_dots(name: str) -> None:
    with pytest.raises(MissingFileError, match=f"hf-hub:{name} is unavailable"):
        find(name)  # tests ask no hub
    with pytest.raises(MissingFileError, match=r"no checkpoint at run/x\.safetensors"):
        find("run/x.safetensors")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
def test_pickled_state_dicts_are_read(tmp_path: Path, key: str) -> None:
    for seed, name in enumerate(("x", "y")):
        state = {"module.w": torch.full((3,), float(seed))}
        training = {"epoch": 1, key: state, "optimizer_state_dict": {}, "loss": torch.tensor(0.5)}
        torch.save(training, tmp_path / f"{name}.pth")
    merged = SimpleAverageAlgorithm().run({n: tmp_path / f"{n}.pth" for n in ("x", "y")})
    assert set(merged) == {"w"} and merged["w"].tolist() == [0.5] * 3


class Weighing(nn.Module):
    """A module whose part is called `weights`."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(2, 2)


def test_a_part_called_weights_is_merged() -> None:
    a, b = Weighing(), Weighing()
    merged = SimpleAverageAlgorithm().run({"a": a, "b": b})
    expected = (a.weights.weight + b.weights.weight) / 2
    torch.testing.assert_close(merged.weights.weight, expected)


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_modules_with_quantised_weights_are_refused() -> None:
    made = [torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4))) for _ in "ab"]
    with pytest.raises(UsageError, match="merge the models before they are quantised"):
        SimpleAverageAlgorithm().run(dict(zip("ab", made, strict=True)))


def test_other_models_with_a_tower_of_this_name_are_plain_weights(tmp_path: Path) -> None:
    states = {name: {"visual.w": torch.full((3,), float(i))} for i, name in enumerate(NAMES)}
    for name, state in states.items():
        torch.save(state, tmp_path / f"{name}.bin")
    merged = TaskArithmeticAlgorithm(0.5).run({n: tmp_path / f"{n}.bin" for n in NAMES})
    assert merged["visual.w"].tolist() == [1.5] * 3


def test_a_folder_without_weights_of_the_usual_name_lists_its_files(tmp_path: Path) -> None:
    for name in ("open_clip_model.safetensors", "config.json"):
        (tmp_path / name).write_text("{}")
    message = r"expected model\.safetensors or .*, or name one of its files: open_clip_model\.safe"
    with pytest.raises(MissingFileError, match=message):
        open_weights(tmp_path)


def test_equal_embeddings_are_tied_in_a_file_as_in_its_folder(tmp_path: Path) -> None:
    row = torch.randn(5, 3)
    state = {"wte.weight": row, "lm_head.weight": row.clone(), "w.weight": row.clone()}
    save_file(state, str(tmp_path / "model.safetensors"))
    torch.save({name: value.clone() for name, value in state.items()}, tmp_path / "model.bin")
    for place in ("", "model.safetensors", "model.bin"):
        assert open_weights(tmp_path / place).ties == {"lm_head.weight": "wte.weight"}, place


FP8, INT8, INT32 = torch.float8_e4m3fn, torch.int8, torch.int32


@pytest.mark.parametrize(
    ("dtype", "scale", "sign"),
    [
        (FP8, "w.weight_scale_inv", "weight_scale_inv"),
        (FP8, "w.weight_scale", "weight_scale"),
        (INT8, "w.SCB", "SCB"),
        (torch.uint8, "w.weight.absmax", "absmax"),
        (torch.uint8, "experts.up_proj_scales", "up_proj_scales"),
        (INT32, "w.scales", "scales"),
        (INT8, "w.weight._scale", "_scale"),
        (torch.float32, None, "quantization_config"),
        (FP8, "w.bias", None),
        (torch.bfloat16, "w.scales", None),
    ],
)
def test_quantised_models_are_refused(
    dtype: torch.dtype, scale: str | None, sign: str | None, tmp_path: Path
) -> None:
    """The numbers of a tensor and its scale cannot be merged each by itself."""
    state = {"w.weight": torch.ones(2, 3).to(dtype), scale or "w.bias": torch.ones(2)}
    save_file(state, str(tmp_path / "model.safetensors"))
    config = {} if scale else {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pool = {"_pretrained_": tmp_path, "a": tmp_path}
    if sign is None:
        assert set(TaskArithmeticAlgorithm().run(pool)) == set(state)
        return
    for models in (pool, {**pool, "_pretrained_": state} if scale else pool):
        with pytest.raises(UsageError, match=rf"_pretrained_ is quantised \(.*{sign}.*dequantise"):
            TaskArithmeticAlgorithm().run(models)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_there_may_be_more_shards_than_open_files(tmp_path: Path) -> None:
    import resource

    states = {n: {f"w{i:03d}": torch.full((9,), 1.0 + i) for i in range(200)} for n in NAMES}
    files = write_files(tmp_path, states)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (most + 30, limits[1]))
    try:
        folder = TaskArithmeticAlgorithm().run_to(files, tmp_path / "merged", max_shard_size=40)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    last = load_file(folder / "model-00200-of-00200.safetensors")
    assert last.keys() == {"w199"} and last["w199"].tolist() == [200.0] * 9


def test_models_of_transformers_in_memory_have_their_configuration(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=4)
    models = {name: GPT2LMHeadModel(config) for name in NAMES}
    folder = TaskArithmeticAlgorithm(0.5).run_to(models, tmp_path / "merged")
    again = GPT2LMHeadModel.from_pretrained(folder).state_dict()
    for name, value in TaskArithmeticAlgorithm(0.5).run(models).state_dict().items():
        assert torch.equal(again[name], value), name


# --- memory


@contextlib.contextmanager
def watched() -> Iterator[list[float]]:
    """Megabytes of anonymous memory: a list that receives the peak above the start."""

    def anonymous() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) / 1024

    def look() -> None:
        while not done.wait(0.002):
            seen.append(anonymous())

    done = threading.Event()
    peaks: list[float] = []
    seen = [anonymous()]
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
    peaks.append(max(seen) - seen[0])


def write_large(folder: Path, num_layers: int, size: int) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for seed, name in enumerate(("_pretrained_", *"abcdef")):
        generator = torch.Generator().manual_seed(seed)
        state = {f"layer{i}": torch.randn(size, generator=generator) for i in range(num_layers)}
        paths |= write_files(folder, {name: state})
    return paths


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_piece_of_each_model(tmp_path: Path) -> None:
    """Seven models of 24 MB; holding two of them would be noticed.

    The lower of two peaks counts: the allocator may keep some of what was freed.
    """
    small, models = write_large(tmp_path / "small", 1, 9), write_large(tmp_path / "large", 6, 2**20)
    algorithms = [TaskArithmeticAlgorithm(), TiesMergingAlgorithm()]
    for algorithm in [*algorithms, TiesMergingAlgorithm(scope="tensor")]:
        algorithm.run_to(small, tmp_path / "merged.safetensors")  # loads what is loaded once
        found = []
        for _ in range(2):
            with watched() as peaks:
                algorithm.run_to(models, tmp_path / "merged.safetensors")
            found.append(peaks[0])
        assert min(found) < 45, (algorithm, found)


LIMITED = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from tangent_arithmetic.merging import TaskArithmeticAlgorithm, TiesMergingAlgorithm

models = {name: f"{sys.argv[2]}/{name}.safetensors" for name in ("_pretrained_", *"abcdef")}
for algorithm in (TaskArithmeticAlgorithm(), TiesMergingAlgorithm()):
    algorithm.run_to(models, f"{sys.argv[2]}/{algorithm.method}.safetensors")
"""


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group whose processes have 700 MB, page cache included."""
    first = Path("/sys/fs/cgroup/memory")
    group = (first if first.is_dir() else first.parent) / "tangent-arithmetic-test"
    limit = "memory.limit_in_bytes" if first.is_dir() else "memory.max"
    try:
        group.mkdir(exist_ok=True)
        (group / limit).write_text(str(700_000_000))
    except OSError as error:
        pytest.skip(f"cannot limit the memory of a process here ({error})")
    yield group
    with contextlib.suppress(OSError):  # the kernel is slow to release it
        group.rmdir()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs control groups")
def test_models_larger_than_memory_are_merged(memory_group: Path, tmp_path: Path) -> None:
    """Seven models of 200 MB, where a process has half of that in all."""
    write_large(tmp_path, 10, 5 * 2**20)
    command = [sys.executable, "-c", LIMITED, str(memory_group), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "ties.safetensors").is_file(), done.stderr
