"""Merging from files to files."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.merging import (
    CLIPVisionModelPool,
    ModelPool,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
    written_recipe,
)
from tangent_arithmetic.merging.writer import size_of
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.statedict import content_hash

State = dict[str, Tensor]


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "big": torch.randn(700, 900, generator=generator),  # several pieces
        "half": torch.randn(33, generator=generator).to(torch.bfloat16),
        "double": torch.randn(5, generator=generator, dtype=torch.float64),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 3),
        "steps": torch.tensor([seed]),
        "flag": torch.tensor([True, False]),
    }


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for seed, name in enumerate(("_pretrained_", "a", "b")):
        found[name] = tmp_path / f"{name}.safetensors"
        save_file(state(seed), str(found[name]), metadata={"format": "pt"})
    return found


def test_files_give_what_memory_gives(files: dict[str, Path], tmp_path: Path) -> None:
    memory = {name: load_file(str(path)) for name, path in files.items()}
    for algorithm in (TaskArithmeticAlgorithm(0.4), TiesMergingAlgorithm(0.7, 30)):
        expected = algorithm.run(memory)
        path = algorithm.run_to(files, tmp_path / "out" / "merged.safetensors")
        assert content_hash(load_file(str(path))) == content_hash(expected)
        assert content_hash(algorithm.run(files)) == content_hash(expected)
    assert sorted(p.name for p in path.parent.iterdir()) == ["merged.safetensors"]


def test_the_recipe_tells_models_and_options(files: dict[str, Path], tmp_path: Path) -> None:
    path = TaskArithmeticAlgorithm(0.4).run_to(files, tmp_path / "merged.safetensors")
    recipe = written_recipe(path)
    assert recipe["method"] == "task_arithmetic" and recipe["options"] == {"scaling_factor": 0.4}
    assert list(recipe["models"]) == ["_pretrained_", "a", "b"]
    assert recipe["models"]["a"]["place"] == str(files["a"])
    prints = {model["fingerprint"] for model in recipe["models"].values()}
    assert len(prints) == 3
    with pytest.raises(UsageError, match="was not written by a merge"):
        written_recipe(files["a"])


@pytest.mark.parametrize("limit", ["1MB", "100KB", "5GB"])
def test_shards_are_read_by_transformers_rules(
    files: dict[str, Path], tmp_path: Path, limit: str
) -> None:
    algorithm = TaskArithmeticAlgorithm(0.4)
    folder = algorithm.run_to(files, tmp_path / "merged", max_shard_size=limit)
    index = folder / "model.safetensors.index.json"
    if limit == "5GB":
        found = load_file(str(folder / "model.safetensors"))
        assert not index.exists()
    else:
        listed = json.loads(index.read_text())
        parts = [load_file(str(folder / file)) for file in set(listed["weight_map"].values())]
        assert len(parts) == 2
        found = {name: value for part in parts for name, value in part.items()}
        for name, file in listed["weight_map"].items():
            assert name in load_file(str(folder / file))
        size = sum(value.nbytes for value in found.values())
        assert listed["metadata"]["total_size"] == size
    assert content_hash(found) == content_hash(algorithm.run(files))
    again = SimpleAverageAlgorithm().run({"x": folder, "y": files["a"]})  # sharded input
    torch.testing.assert_close(again["big"], (found["big"] + state(1)["big"]) / 2)


def test_sizes_are_read(tmp_path: Path) -> None:
    assert size_of("1.5GB") == 1_500_000_000 and size_of("200 kb") == 200_000 and size_of(7) == 7
    for text in ("5", "GB", "-1MB", "1PB"):
        with pytest.raises(UsageError, match="expected a size such as 5GB"):
            size_of(text)


def test_nothing_is_left_where_merging_fails(files: dict[str, Path], tmp_path: Path) -> None:
    broken = state(2)
    broken["steps"], broken["scalar"] = torch.tensor([2]), torch.tensor(float("nan"))
    save_file(broken, str(files["b"]))
    for target in ("out/merged.safetensors", "out/folder"):
        with pytest.raises(UsageError, match=r"b has nan at index 0 of scalar"):
            TaskArithmeticAlgorithm().run_to(files, tmp_path / target)
        assert not list((tmp_path / "out").iterdir())


def test_an_earlier_result_survives_a_failure(files: dict[str, Path], tmp_path: Path) -> None:
    target = TaskArithmeticAlgorithm().run_to(files, tmp_path / "folder")
    before = (target / "model.safetensors").read_bytes()
    broken = {**state(2), "scalar": torch.tensor(float("nan"))}
    save_file(broken, str(files["b"]))
    with pytest.raises(UsageError, match="b has nan"):
        TaskArithmeticAlgorithm().run_to(files, target)
    assert (target / "model.safetensors").read_bytes() == before
    save_file(state(3), str(files["b"]))
    TaskArithmeticAlgorithm().run_to(files, target)  # its own folder may be replaced
    assert (target / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_with_and_without_the_systems_help(
    at_once: bool, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr("tangent_arithmetic.merging.writer._exchange", lambda one, other: False)
    elif sys.platform == "linux":  # the second way is not taken
        monkeypatch.setattr("shutil.rmtree", _only_parts)
    for seed in (1, 2):
        save_file(state(seed), str(files["b"]))
        target = TaskArithmeticAlgorithm().run_to(files, tmp_path / "new" / "folder")
        found = load_file(str(target / "model.safetensors"))
        assert content_hash(found) == content_hash(TaskArithmeticAlgorithm().run(files))
        assert [p.name for p in target.parent.iterdir()] == ["folder"]


def _only_parts(path: Path, ignore_errors: bool = False) -> None:
    assert path.name.endswith(".part")
    rmtree(path, ignore_errors)


def test_folders_of_others_are_not_replaced(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="holds other files; expected a new folder"):
        TaskArithmeticAlgorithm().run_to(files, tmp_path / "mine")
    with pytest.raises(UsageError, match="is the model a itself"):
        TaskArithmeticAlgorithm().run_to(files, files["a"])
    with pytest.raises(UsageError, match="is a folder; expected a file"):
        (tmp_path / "x.safetensors").mkdir()
        TaskArithmeticAlgorithm().run_to(files, tmp_path / "x.safetensors")


FULL = """
import resource, sys
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.merging import TaskArithmeticAlgorithm

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
try:
    TaskArithmeticAlgorithm().run_to({n: f"{sys.argv[1]}/{n}.safetensors" for n in
                                      ("_pretrained_", "a", "b")}, sys.argv[2])
except UsageError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize("target", ["merged.safetensors", "folder"])
@pytest.mark.parametrize("size", [100, 1_000_000])
def test_a_full_disk_leaves_nothing(
    target: str, size: int, files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", FULL, str(tmp_path), str(out / target), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"cannot write {out / target}: File too large; make room" in done.stdout
    assert not list(out.iterdir())


def test_wrong_files_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "weights.safetensors"
    text.write_text("these are no weights")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(files["a"].read_bytes()[:-100])
    for path in (text, damaged):
        with pytest.raises(UsageError, match=f"{path.name}.*is damaged|{path.name} cannot be read"):
            SimpleAverageAlgorithm().run({"x": path, "a": files["a"]})
    note = tmp_path / "weights.txt"
    note.write_text("these are no weights")
    with pytest.raises(UsageError, match=r"weights\.txt"):
        SimpleAverageAlgorithm().run({"x": note, "a": files["a"]})
    with pytest.raises(MissingFileError, match=r"no checkpoint at .*absent"):
        SimpleAverageAlgorithm().run({"x": tmp_path / "absent.safetensors", "a": files["a"]})


# --- our checkpoints


def encoder_files(folder: Path, linear: bool = False) -> dict[str, Path]:
    torch.manual_seed(0)
    encoder = ImageEncoder.without_weights("ViT-Nano-8")
    theta0 = {name: value.clone() for name, value in encoder.weights().items()}
    start = save_tensors(folder / "zeroshot.safetensors", theta0, "image_encoder",
                         info={"model": "ViT-Nano-8"})  # fmt: skip
    found = {"_pretrained_": folder / "zeroshot.safetensors"}
    kind = "linearized_image_encoder" if linear else "image_encoder"
    for name in ("MNIST", "DTD"):
        theta = {key: value + 0.01 * torch.randn_like(value) for key, value in theta0.items()}
        path = folder / f"{name}Val" / "finetuned.safetensors"
        save_tensors(path, theta, kind, theta0=theta0 if linear else None,
                     theta0_hash=start, info={"model": "ViT-Nano-8"})  # fmt: skip
        found[name] = path
    return found


@pytest.mark.parametrize("linear", [False, True])
def test_our_checkpoints_give_checkpoints(linear: bool, tmp_path: Path) -> None:
    places = encoder_files(tmp_path, linear)
    algorithm = TaskArithmeticAlgorithm(0.3)
    path = algorithm.run_to(places, tmp_path / "elsewhere" / "merged.pt")
    assert path.name == "merged.safetensors"
    found = load_checkpoint(path)  # compares the checksum
    states = {name: load_checkpoint(place).theta for name, place in places.items()}
    torch.testing.assert_close(found.theta, algorithm.run(states), rtol=0, atol=0)
    assert found.theta0_hash == content_hash(states["_pretrained_"])
    assert found.info["merge_recipe"]["models"]["DTD"]["hash"]
    encoder = algorithm.run(places)
    assert content_hash(encoder.weights()) == found.hash
    if linear:
        assert found.theta0 is not None and found.kind == "linearized_image_encoder"
        assert content_hash(encoder.weights0()) == found.theta0_hash
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(type(encoder).load(path).eval()(x), encoder.eval()(x))


def test_another_start_is_refused(tmp_path: Path) -> None:
    places = encoder_files(tmp_path)
    other = load_checkpoint(places["_pretrained_"]).theta
    other = {name: value + 1 for name, value in other.items()}
    save_tensors(
        tmp_path / "other.safetensors", other, "image_encoder", info={"model": "ViT-Nano-8"}
    )
    places["_pretrained_"] = tmp_path / "other.safetensors"
    with pytest.raises(
        UsageError, match=r"MNIST was fine-tuned from weights .* have different origins"
    ):
        TaskArithmeticAlgorithm().run(places)
    TaskArithmeticAlgorithm().run(ModelPool(places, allow_base_mismatch=True))


def test_standard_and_linear_models_are_not_mixed(tmp_path: Path) -> None:
    standard, linear = encoder_files(tmp_path / "s"), encoder_files(tmp_path / "l", linear=True)
    with pytest.raises(UsageError, match="models of one kind, got image_encoder, linearized"):
        TaskArithmeticAlgorithm().run({**standard, "MNIST": linear["MNIST"]})


# --- Hugging Face


def test_clips_of_transformers_merge_and_load(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    vision: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 99}  # fmt: skip
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    whole.save_pretrained(tmp_path / "base")
    tower = {
        name: value for name, value in whole.state_dict().items() if name.startswith("vision_model")
    }
    states = {"_pretrained_": tower}
    for name in ("a", "b"):
        model = CLIPVisionModel(CLIPVisionConfig(**vision, projection_dim=8))
        model.save_pretrained(tmp_path / name)
        states[name] = {
            f"vision_model.{key.removeprefix('vision_model.')}": value
            for key, value in model.state_dict().items()
        }
    pool = CLIPVisionModelPool(
        {n: tmp_path / n for n in ("a", "b")} | {"_pretrained_": tmp_path / "base"}
    )
    folder = TaskArithmeticAlgorithm(0.3).run_to(pool, tmp_path / "merged", max_shard_size="5KB")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "clip_vision_model" and config["hidden_size"] == 16
    merged = CLIPVisionModel.from_pretrained(folder)
    for key, value in merged.state_dict().items():
        name = f"vision_model.{key.removeprefix('vision_model.')}"
        if not value.is_floating_point():
            continue
        base = states["_pretrained_"][name].double()
        expected = base + 0.3 * sum(states[n][name].double() - base for n in ("a", "b"))
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(UsageError, match="has no vision tower of a CLIP"):
        save_file(state(0), str(tmp_path / "x.safetensors"))
        CLIPVisionModelPool({"x": tmp_path / "x.safetensors"}).check()


def test_pickled_state_dicts_are_read_without_executing(tmp_path: Path) -> None:
    for seed, name in enumerate(("x", "y")):
        torch.save({"state_dict": {"w": torch.full((3,), float(seed))}}, tmp_path / f"{name}.pth")
    found = SimpleAverageAlgorithm().run({n: tmp_path / f"{n}.pth" for n in ("x", "y")})
    assert found["w"].tolist() == [0.5] * 3


# --- memory


MERGE = """
import sys, threading, time
import torch
from tangent_arithmetic.merging import TaskArithmeticAlgorithm, TiesMergingAlgorithm

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

torch.set_num_threads(1)
TaskArithmeticAlgorithm().run({"_pretrained_": {"w": torch.zeros(9)}, "a": {"w": torch.ones(9)}})
start = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
folder, algorithm = sys.argv[1], eval(sys.argv[2])
names = ["_pretrained_", *"abcdef"]
algorithm.run_to({n: f"{folder}/{n}.safetensors" for n in names}, f"{folder}/merged.safetensors")
done = True
thread.join()
print(peak - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "algorithm", ["TaskArithmeticAlgorithm()", "TiesMergingAlgorithm()",
                  "TiesMergingAlgorithm(scope='tensor')"],
)  # fmt: skip
def test_memory_is_a_piece_of_each_model(algorithm: str, tmp_path: Path) -> None:
    """Seven models of 64 MB; holding two of them would be noticed."""
    for seed, name in enumerate(("_pretrained_", *"abcdef")):
        torch.manual_seed(seed)
        weights = {f"layer{i}.weight": torch.randn(2**20) for i in range(16)}
        save_file(weights, str(tmp_path / f"{name}.safetensors"))
    command = [sys.executable, "-c", MERGE, str(tmp_path), algorithm]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100, done.stdout  # MB
    assert (
        threading.active_count() >= 1 and (tmp_path / "merged.safetensors").stat().st_size > 2**26
    )


LIMITED = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
import torch
from tangent_arithmetic.merging import TaskArithmeticAlgorithm, TiesMergingAlgorithm

names = ["_pretrained_", *"abcdef"]
models = {name: f"{sys.argv[2]}/{name}.safetensors" for name in names}
for i, algorithm in enumerate((TaskArithmeticAlgorithm(), TiesMergingAlgorithm())):
    algorithm.run_to(models, f"{sys.argv[2]}/merged{i}.safetensors")
print("merged")
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
    with contextlib.suppress(OSError):  # the kernel is slow to let go of it
        group.rmdir()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs control groups")
def test_models_larger_than_memory_are_merged(memory_group: Path, tmp_path: Path) -> None:
    """Seven models of 200 MB, where a process has half of that in all."""
    for seed, name in enumerate(("_pretrained_", *"abcdef")):
        torch.manual_seed(seed)
        weights = {f"layer{i}.weight": torch.randn(5 * 2**20) for i in range(10)}
        save_file(weights, str(tmp_path / f"{name}.safetensors"))
    command = [sys.executable, "-c", LIMITED, str(memory_group), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "merged" in done.stdout, done.stderr
