from __future__ import annotations

import dataclasses
import os
import re
from operator import attrgetter
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import processes
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.training.recipe import Recipe

# published recipe: arXiv:2305.12827 and the public projects
EPOCHS = dict(Cars=35, DTD=76, EuroSAT=12, GTSRB=11, MNIST=5, RESISC45=15, SUN397=14, SVHN=4)


@pytest.mark.parametrize(
    ("args", "suite"),
    [
        (Config(), "embedded"),
        (Config(model="ViT-Nano-8__init__"), "embedded"),
        (Config(model="ViT-B-32"), "clip8"),
        (Config(model="ViT-L-14__pretrained__laion2b_s32b_b82k"), "clip8"),
        (Config(model="ViT-B-32", suite="embedded"), "embedded"),
        (Config(suite="clip8"), "clip8"),
        (SimpleNamespace(model="ViT-B-32"), "clip8"),
        (SimpleNamespace(), "embedded"),
    ],
)
def test_the_suite_is_the_flag_or_the_models(args: Any, suite: str) -> None:
    assert Run.of(args).suite.name == suite


def test_an_unknown_suite_names_the_nearest_first() -> None:
    with pytest.raises(UsageError, match=r"unknown suite 'clip9'; choose from clip8, .*text$"):
        _ = Run.of(Config(suite="clip9")).suite


@pytest.mark.parametrize(
    ("args", "tasks", "trained", "evaluated"),
    [
        (Config(model="ViT-B-32"), list(EPOCHS), list(EPOCHS), list(EPOCHS)),
        (Config(tasks=["MNIST", "Emoji"]), *3 * [["MNIST", "Emoji"]]),
        (Config(tasks=["MNISTVal"]), ["MNIST"], ["MNIST"], ["MNIST"]),
        (
            Config(tasks=["Emoji"], train_dataset=["MNISTVal"], eval_datasets=["SignsVal"]),
            ["Emoji"],
            ["MNIST"],
            ["SignsVal"],
        ),
        (
            SimpleNamespace(tasks="Emoji", eval_datasets="MNIST,MNISTVal"),
            ["Emoji"],
            ["Emoji"],
            ["MNIST", "MNISTVal"],
        ),
    ],
)
def test_data_sets_are_those_named_else_the_tasks_else_all_of_the_suite(
    args: Any, tasks: list[str], trained: list[str], evaluated: list[str]
) -> None:
    run = Run.of(args)
    assert (run.tasks, run.train_datasets, run.eval_datasets) == (tasks, trained, evaluated)


@pytest.mark.parametrize(
    ("derived", "args"),
    [
        ("tasks", Config(tasks=["MNST"])),
        ("train_datasets", Config(train_dataset=["MNST"])),
        ("eval_datasets", Config(eval_datasets=["Emoji", "MNST"])),
        ("control", Config(control_dataset="MNST")),
    ],
)
def test_an_unknown_data_set_names_the_nearest_first(derived: str, args: Config) -> None:
    message = "unknown data set of suite embedded 'MNST'; choose from MNIST, .*Shapes"
    with pytest.raises(UsageError, match=message):
        getattr(Run.of(args), derived)


@pytest.mark.parametrize(
    ("args", "control"),
    [
        (Config(), "Shapes"),
        (Config(model="ViT-B-32"), "ImageNet"),
        (Config(control_dataset="MNISTVal", tasks=["Emoji"]), "MNIST"),
        (Config(control_dataset="Shapes"), "Shapes"),
    ],
)
def test_control_set(args: Config, control: str) -> None:
    assert Run.of(args).control == control


@pytest.mark.parametrize("suite", ["embedded", "clip8"])
def test_a_control_set_is_none_of_the_tasks(suite: str) -> None:
    named = SimpleNamespace(suite=suite, tasks="MNISTVal", control_dataset="MNIST")
    with pytest.raises(UsageError, match="--control-dataset=MNIST is one of the run's tasks"):
        _ = Run.of(named).control
    with pytest.raises(UsageError, match="--control-dataset=MNIST is one of the run's tasks"):
        Run.of(Config(suite=suite, control_dataset="MNIST")).check()


@pytest.mark.parametrize(
    ("derived", "args", "message"),
    [
        ("tasks", {"tasks": ["Emoji", "Emoji"]}, "--tasks: names Emoji twice"),
        ("tasks", {"tasks": ["MNIST", "MNISTVal"]}, "--tasks names MNIST twice"),
        ("train_datasets", {"train_dataset": "MNISTVal,MNIST"}, "--train-dataset names MNIST tw"),
        ("eval_datasets", {"eval_datasets": "MNIST,MNIST"}, "--eval-datasets: names MNIST twice"),
        ("tasks", {"tasks": ","}, "--tasks: names nothing"),
        ("train_datasets", {"train_dataset": []}, "--train-dataset: names nothing"),
        ("eval_datasets", {"eval_datasets": []}, "--eval-datasets: names nothing"),
    ],
)
def test_a_data_set_is_named_once(derived: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        getattr(Run.of(SimpleNamespace(**args)), derived)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("lr", float("inf")),
        ("wd", float("nan")),
        ("ls", 1.0),
        ("precision", "fp16"),
        ("port", 99_999_999),
        ("batch_size", 0),
        ("num_workers", -1),
        ("epochs", 2.5),
        ("shots", ["few"]),
        ("explorer_megabytes", float("inf")),
        ("save", "x" * 300),
        ("tasks", ["MNST"]),
    ],
)
@pytest.mark.parametrize("kind", [Config, SimpleNamespace])
def test_invalid_settings_are_refused_by_the_run(name: str, value: Any, kind: Any) -> None:
    args = kind(**{name: value})
    with pytest.raises(UsageError):
        Run.of(args).check()
    if name != "tasks":  # which its suite must know, too
        with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')}: "):
            getattr(Run.of(args).config, name)


@pytest.mark.parametrize(
    ("flag", "folder"),
    [
        ("save", "folder"),
        ("results", "results"),
        ("cache_dir", "cache"),
        ("data_location", "data.location"),
    ],
)
def test_a_folder_below_a_file_is_refused_by_its_flag(
    flag: str, folder: str, tmp_path: Path
) -> None:
    file, gone = tmp_path / "file", tmp_path / "gone"
    file.write_text("x")
    gone.symlink_to(tmp_path / "nowhere")
    for place in (file, file / "a" / "b", gone):
        message = f"--{flag.replace('_', '-')}: expected a folder at .*, but .* is not one"
        with pytest.raises(UsageError, match=message):
            attrgetter(folder)(Run.of(SimpleNamespace(**{flag: str(place)})))
    args = SimpleNamespace(**{flag: str(tmp_path / "a" / "b")})
    assert str(attrgetter(folder)(Run.of(args))).startswith(f"{tmp_path}/a/b")


def test_a_path_given_in_python_has_its_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    args = SimpleNamespace(save="~/run", cache_dir=Path("~/cache"), load="~/a.pt")
    assert Run.of(args).folder == Path("/home/ann/run")
    assert Run.of(args).cache == Path("/home/ann/cache")
    assert Run.of(args).load == "/home/ann/a.pt"
    assert Run.of(Config()).data.location == Path("/home/ann/data")
    assert Run.of(Config()).cache == Path("/home/ann/.cache/tangent-arithmetic")
    assert Run.of(Config(cache_dir="c")).cache == Path("c")


@pytest.mark.parametrize(
    ("args", "folder", "results"),
    [
        (Config(), "checkpoints/ViT-Nano-8", "results/embedded/ViT-Nano-8"),
        (
            Config(model="ViT-B-32", seed=3, results="r"),
            "checkpoints_3/ViT-B-32",
            "r/clip8/ViT-B-32_seed3",
        ),
        (Config(seed=0), "checkpoints_0/ViT-Nano-8", "results/embedded/ViT-Nano-8_seed0"),
        (Config(seed=3, save="a/b"), "a/b", "results/embedded/ViT-Nano-8_seed3"),
        (
            Config(model="hf-hub:owner/name", suite="embedded"),
            "checkpoints/hf-hub-owner-name",
            "results/embedded/hf-hub-owner-name",
        ),
    ],
)
def test_folders_follow_model_seed_and_suite(args: Config, folder: str, results: str) -> None:
    assert (Run.of(args).folder, Run.of(args).results) == (Path(folder), Path(results))


@pytest.mark.parametrize(
    "model", ["..", ".", "", "a\0b", "a\nb", "x" * 256, "local-dir:" + "/x" * 128]
)
def test_a_models_name_must_be_a_folders(model: str) -> None:
    with pytest.raises(UsageError, match="invalid model name"):
        _ = Run.of(Config(model=model)).folder


@pytest.mark.parametrize("model", ["../../x", "/etc/x", "..\\x", "C:\\x"])
def test_a_models_name_stays_in_the_run(model: str) -> None:
    folder = Run.of(Config(model=model)).folder
    assert folder.parent == Path("checkpoints") and len(PureWindowsPath(folder.name).parts) == 1


def test_paths_of_the_run() -> None:
    run = Run.of(Config(save="run"))
    assert run.zeroshot_path == Path("run/zeroshot.safetensors")
    for dataset in ("MNIST", "MNISTVal"):
        assert run.head_path(dataset) == Path("run/head_MNIST.safetensors")
        for mode, prefix in {"standard": "", "posthoc": "", "linear": "linear_"}.items():
            path = Path(f"run/MNISTVal/{prefix}finetuned.safetensors")
            assert run.finetuned_path(dataset, mode) == path


@pytest.mark.parametrize(("seed", "expected"), [(None, 0), (0, 0), (5, 5)])
def test_seed(seed: int | None, expected: int) -> None:
    assert Run.of(Config(seed=seed)).seed == expected


def test_load_is_one_checkpoint() -> None:
    for load, expected in ((None, None), (["a.pt"], "a.pt"), ("a.pt", "a.pt")):
        assert Run.of(SimpleNamespace(load=load)).load == expected
    with pytest.raises(UsageError, match=r"--load takes one checkpoint, got 2: a\.pt, b\.pt"):
        _ = Run.of(Config(load=["a.pt", "b.pt"])).load


@pytest.mark.parametrize("task", EPOCHS)
def test_recipe_is_the_published_one(task: str) -> None:
    assert Run.of(Config(model="ViT-B-32")).recipe(task) == Recipe(
        lr=1e-5,
        epochs=EPOCHS[task],
        batch_size=128,
        num_grad_accumulation=1,
        warmup_length=500,
        wd=0.1,
        ls=0.0,
    )


@pytest.mark.parametrize("model", ["ViT-L-14", "ViT-L-14__pretrained__laion2b_s32b_b82k"])
def test_vit_l_14_halves_the_batch_and_accumulates(model: str) -> None:
    recipe = Run.of(Config(model=model)).recipe("DTD")
    assert (recipe.batch_size, recipe.num_grad_accumulation) == (64, 2)


def test_flags_win_over_the_table_one_by_one() -> None:
    args = Config(model="ViT-L-14")
    table = Run.of(args).recipe("DTD")
    flags: dict[str, Any] = dict(
        lr=0.0,
        epochs=1,
        batch_size=2,
        num_grad_accumulation=3,
        warmup_length=0,
        wd=0.0,
        ls=0.1,
        precision="bf16",
    )
    for name, value in flags.items():
        found = Run.of(dataclasses.replace(args, **{name: value})).recipe("DTD")
        assert found == dataclasses.replace(table, **{name: value})


@pytest.mark.parametrize(
    ("args", "processes", "workers"),
    [
        (Config(model="ViT-B-32"), None, 7),
        (Config(model="ViT-B-32"), "2", 3),
        (Config(model="ViT-B-32"), "16", 1),
        (Config(model="ViT-B-32", num_workers=0), None, 0),
        (Config(model="ViT-B-32", num_workers=9), "2", 9),
        (Config(), None, 0),
    ],
)
def test_num_workers(
    args: Config, processes: str | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tangent_arithmetic.runtime.processes.usable_cores", lambda: 7)
    if processes is not None:  # torchrun says how many share a machine
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert Run.of(args).num_workers == workers


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= processes.usable_cores() <= (os.cpu_count() or 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert processes.usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert processes.usable_cores() == 5


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_device_is_the_best_there_is(
    cuda: bool, mps: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert Run.of(Config()).device == torch.device(device)
    assert Run.of(Config(device="cpu")).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "unknown device 'gpu'; choose from cpu, cuda, cuda:N, mps"),
        ("cuda:1", "--device=cuda:1, but this PyTorch sees no CUDA device; try --device=cpu"),
        ("meta", "unknown device 'meta'; choose from cpu, cuda, cuda:N, mps"),
        ("cuda:x", "unknown device 'cuda:x'; choose from cpu, cuda, cuda:N, mps"),
        ("mps", "--device=mps, but this PyTorch sees no MPS device; try --device=cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=re.escape(message)):
        _ = Run.of(Config(device=device)).device


def test_a_cuda_device_has_an_existing_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Run.of(Config(device="cuda:1")).device == torch.device("cuda:1")
    with pytest.raises(UsageError, match=r"--device=cuda:2, but this PyTorch sees 2 CUDA devices"):
        _ = Run.of(Config(device="cuda:2")).device


@pytest.mark.parametrize(
    ("args", "dtype"),
    [
        (Config(device="cpu"), torch.float32),
        (Config(device="cpu", precision="bf16"), torch.bfloat16),
        (SimpleNamespace(device="cpu"), torch.float32),
    ],
)
def test_the_precision_is_what_is_computed_in_not_what_weights_are_in(
    args: Any, dtype: torch.dtype
) -> None:
    layer = torch.nn.Linear(2, 2)
    with Run.of(args).compute.autocast():
        out = layer(torch.ones(1, 2))
    assert out.dtype == dtype
    out.float().sum().backward()
    assert layer.weight.dtype == torch.float32
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert layer(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(("args", "size"), [(Config(), 256), (Config(batch_size=3), 3)])
def test_the_batch_of_an_evaluation_is_the_flag_or_256(args: Config, size: int) -> None:
    assert Run.of(args).data.batch_size == size


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ({}, 32),
        ({"batch_size": 4, "num_grad_accumulation": 2}, 4),
        ({"batch_size": 1}, 1),
        ({"batch_size": 4, "others_batch_size": 7}, 7),
    ],
)
def test_a_step_takes_half_as_many_other_images(flags: dict[str, int], count: int) -> None:
    run = Run.of(Config(finetuning_mode="linear", objective="taujp", **flags))  # type: ignore[arg-type]
    assert run.others_batch_size("MNIST") == count


def test_a_task_is_not_among_its_others() -> None:
    run = Run.of(Config(finetuning_mode="linear+taujp", others=["MNIST", "Letters", "Shapes"]))
    assert run.others("MNIST") == ["Letters", "Shapes"]
    assert run.others("Signs") == ["MNIST", "Letters", "Shapes"]
    with pytest.raises(UsageError, match="other data sets than MNIST"):
        run.with_(others=["MNIST"]).others("MNIST")
