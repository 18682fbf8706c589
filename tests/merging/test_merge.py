"""`python src/merge.py`: composition, files, evaluation, errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tangent_arithmetic.commands import add as eval_task_addition
from tangent_arithmetic.commands import evaluate as eval_single_task
from tangent_arithmetic.commands import finetune, merge
from tangent_arithmetic.merging import DareTaskArithmetic, ModelPool, TaskArithmeticAlgorithm
from tangent_arithmetic.merging.configurations import configurations
from tangent_arithmetic.merging.targets import (
    algorithm_of,
    device_settings,
    place_of,
    pool_of,
    rows_of,
    target_of,
    task_pool_of,
)
from tangent_arithmetic.run import results_schema
from tangent_arithmetic.run.results import load_results
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import content_hash
from tests.merging.test_files import encoder_files, state
from tests.small_suite import SIZES, TASKS, flags, small_suite

ROOT = Path(merge.__file__).resolve().parent.parent
Run = Callable[..., int]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    found = {}
    for seed, name in enumerate(("_pretrained_", "a", "b")):
        found[name] = str(tmp_path / f"{name}.safetensors")
        save_file(state(seed), found[name])
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(*words: str, places: dict[str, str] | None = None) -> int:
        pool = []
        if places is not None:
            listed = ", ".join(f"{name}: {path}" for name, path in places.items())
            pool = ["modelpool=files", f"modelpool.models={{{listed}}}"]
        flags = [word for word in words if word.startswith("-")]
        rest = [word for word in words if word not in flags]
        return merge.main([*flags, *pool, f"path.output_dir={tmp_path / 'outputs'}", *rest])

    return run


def report_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("outputs/merge/*/program_report.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_one_command_merges_files(
    run: Run, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged.safetensors"
    words = ["method=task_arithmetic", "method.scaling_factor=0.4"]
    assert run(*words, f"merged_model_save_path={out}", places=places) == 0
    memory = {name: load_file(path) for name, path in places.items()}
    expected = TaskArithmeticAlgorithm(0.4).run(memory)
    assert content_hash(load_file(str(out))) == content_hash(expected)
    assert "scaling_factor: 0.4" in capsys.readouterr().out
    report = report_of(tmp_path)
    assert report["merge"]["options"] == {"scaling_factor": 0.4}
    assert report["model_info"]["all_params"] == sum(v.numel() for v in memory["a"].values())


@pytest.mark.parametrize(
    "words",
    [
        ["method=simple_average"],
        ["method=ties_merging", "method.threshold=50", "method.merge_func=mean"],
        ["method=dare/task_arithmetic", "seed=5"],
        ["method=dare/ties_merging"],
        ["method=linear/weighted_average", "method.weights=[0.3,0.7]", "method.normalize=false"],
        ["method=dummy"],
    ],
    ids=lambda words: words[0],
)
def test_methods_have_the_names_of_fusion_bench(
    words: list[str], run: Run, places: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "merged.safetensors"
    assert run(*words, f"merged_model_save_path={out}", "print_config=false", places=places) == 0
    assert load_file(str(out)).keys() == state(0).keys()
    report = report_of(tmp_path)
    if "seed=5" in words:
        assert report["merge"]["options"]["seed"] == 5


def test_slerp_takes_two(run: Run, places: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    two = {name: places[name] for name in ("a", "b")}
    words = ["method=slerp/slerp", "method.t=0.25", f"merged_model_save_path={out}"]
    assert run(*words, places=two) == 0 and out.is_file()


def test_sweeps_write_a_report_each(run: Run, places: dict[str, str], tmp_path: Path) -> None:
    assert run("-m", "method.scaling_factor=0.1,0.2", places=places) == 0
    paths = sorted(tmp_path.glob("outputs/multirun/merge/*/*/program_report.json"))
    reports = [json.loads(path.read_text()) for path in paths]
    assert [r["merge"]["options"]["scaling_factor"] for r in reports] == [0.1, 0.2]


def test_dry_runs_touch_nothing(
    run: Run, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged.safetensors"
    assert run("dry_run=true", f"merged_model_save_path={out}", places=places) == 0
    assert not out.exists() and not list(tmp_path.glob("outputs/merge/*/program_report.json"))
    assert "dry run: TaskArithmeticAlgorithm(scaling_factor=0.3) of _pretrained_, a, b" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=task_arithmetik"], "Could not find 'method/task_arithmetik'"),
        (["method=fisher_merging/clip_fisher_merging"], "Could not find 'method/fisher_merging"),
        (["method.scaling=1"], "scaling"),
        (["+method.scaling=1"], "has no option 'scaling'; its options are scaling_factor"),
        (["method.scaling_factor=auto"], "chosen on validation data; name a taskpool"),
        (["method._target_=os.system"], "unknown method._target_ 'os.system'; choose from tangent"),
        (["method._target_=fusion_bench.method.RegMeanAlgorithm"], "'fusion_bench.method.RegMean"),
        (["modelpool._target_=builtins.eval"], "unknown modelpool._target_ 'builtins.eval'"),
        (["taskpool._target_=torch.load"], "unknown taskpool._target_ 'torch.load'"),
        (["fabric.devices=4"], "fabric.devices=4 is not supported"),
        (["fabric.strategy=fsdp"], "fabric.strategy=fsdp is not supported"),
        (["fabric.accelerator=tpu"], "unknown fabric.accelerator 'tpu'; choose from"),
        (["merged_model_save_kwargs={shards: 2}"], "merged_model_save_kwargs has shards"),
        (["modelpool.models.a=/nowhere/a.safetensors"], "no checkpoint at /nowhere/a.safetensors"),
        (["modelpool.models.a={_target_: os.remove, path: x}"], "unknown _target_ of modelpool"),
        (["+modelpool.fast=true"], "modelpool has fast, which is not supported"),
    ],
)  # fmt: skip
def test_mistakes_end_with_code_2_and_no_output(
    words: list[str],
    message: str,
    run: Run,
    places: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out" / "merged.safetensors"
    assert run(f"merged_model_save_path={out}", "print_config=false", *words, places=places) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_missing_pools_are_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("modelpool=files") == 2
    assert "modelpool.models" in capsys.readouterr().err


def test_the_command_imports_nothing_heavy(places: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tangent_arithmetic.commands import merge\n"
        "code = merge.main(sys.argv[1:])\n"
        "heavy = {'transformers', 'datasets', 'open_clip', 'torchvision', 'timm', 'matplotlib'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\nraise SystemExit(code)"
    )
    listed = ", ".join(f"{name}: {path}" for name, path in places.items())
    words = ["modelpool=files", f"modelpool.models={{{listed}}}",
             f"merged_model_save_path={tmp_path / 'm.safetensors'}",
             f"path.output_dir={tmp_path / 'outputs'}"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "loaded: []" in done.stdout


def test_help_is_quick(tmp_path: Path) -> None:
    """It runs from any folder, and without PyTorch; so do errors in the configuration."""
    code = (
        "import sys, runpy\nfrom tangent_arithmetic.commands import merge\n"
        "print(merge.main(['method=nothing']), merge.main(['--help']), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "method: dummy, simple_average, task_arithmetic, ties_merging" in done.stdout
    assert "CLIPVisionModelPool" in done.stdout and done.stdout.endswith("2 0 False\n")
    script = [sys.executable, str(ROOT.parent / "merge.py"), "--help"]
    again = subprocess.run(script, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert again.stdout and again.stdout in done.stdout


# --- the embedded suite


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which two small sets were fine-tuned on and evaluated."""
    folder = tmp_path_factory.mktemp("embedded")
    with pytest.MonkeyPatch.context() as patch, small_suite(patch):
        patch.setattr(
            "tangent_arithmetic.run.run.DEFAULT_CACHE", folder / "cache"
        )  # the command has no flag for it
        for mode in ("standard", "linear"):
            words = [*flags(folder), f"--finetuning-mode={mode}"]
            assert finetune.main(words) == 0
            assert eval_single_task.main(words) == 0
            assert eval_task_addition.main([*words, "--n-eval-points=21"]) == 0
        yield folder


def on_embedded(folder: Path) -> list[str]:
    """The words of a merge of that run's checkpoints, and of its evaluation."""
    tasks = ",".join(TASKS)
    save = folder / "checkpoints"
    return ["modelpool=embedded", "taskpool=embedded", f"modelpool.run={save}",
            f"taskpool.run={save}", f"modelpool.tasks=[{tasks}]", f"taskpool.tasks=[{tasks}]",
            f"taskpool.results={folder / 'results'}", "print_config=false"]  # fmt: skip


@pytest.mark.parametrize(("mode", "prefix"), [("standard", ""), ("linear", "linear_")])
def test_merged_accuracies_are_those_of_the_addition_script(
    mode: str, prefix: str, embedded: Path, run: Run, tmp_path: Path
) -> None:
    (path,) = embedded.glob(f"results/**/{prefix}additions-*.json")
    added = json.loads(path.read_text())
    target = tmp_path / "report.json"
    words = [f"modelpool.mode={mode}", "method.scaling_factor=auto", f"report_save_path={target}"]
    assert run(*on_embedded(embedded), *words) == 0
    report = json.loads(target.read_text())
    chosen = report["scaling_factor"]
    assert chosen["coefficient"] == added["coefficient"]
    assert chosen["validation"][str(chosen["coefficient"])] == max(chosen["validation"].values())
    assert chosen["metric"] == "mean normalised accuracy" and len(chosen["validation"]) == 21
    assert report["merge"]["options"] == {"scaling_factor": chosen["coefficient"]}
    assert set(report) >= {*TASKS, "average"}
    for task in TASKS:
        assert report[task]["accuracy"] == pytest.approx(added["test"][f"{task}:top1"])
    (path,) = embedded.glob(f"results/**/merging-*{'linear' if mode == 'linear' else 'auto-of'}*")
    kept = load_results(path)
    assert results_schema.read(path)[1] == []
    assert kept["merge"]["label"].startswith("task_arithmetic (scaling_factor=auto), ")
    assert kept["coefficient"] == added["coefficient"] and len(kept["val"]) == 21
    assert kept["test"].keys() == added["test"].keys()
    for name, value in added["test"].items():
        assert kept["test"][name] == pytest.approx(value)
    for name in ("theta0_hash", "checkpoints", "seed", "suite", "model"):
        assert kept["provenance"][name] == added["provenance"][name]


def test_results_of_other_models_stay_out_of_the_run(
    embedded: Path, run: Run, tmp_path: Path
) -> None:
    """Nor are partial ones kept; others have a file for each method and its options."""
    quiet = f"report_save_path={tmp_path / 'report.json'}"
    results, save = f"taskpool.results={tmp_path / 'results'}", embedded / "checkpoints"
    words = [*on_embedded(embedded), quiet, results]
    assert run(*words, "fast_dev_run=true") == 0
    assert run(*words, "taskpool.results=null") == 0
    other = encoder_files(tmp_path / "other")
    rest = [word for word in words if not word.startswith("modelpool")]
    assert run(*rest, places={name: str(path) for name, path in other.items()}) == 0
    assert not (tmp_path / "results").exists()
    one = ["modelpool.tasks=[Emoji]", "taskpool.tasks=[Emoji]"]
    for word in ("scaling_factor=0.3", "scaling_factor=0.4"):
        assert run(*words, *one, f"method.{word}") == 0
    seeded = tmp_path / "checkpoints_3" / "ViT-Nano-8"
    shutil.copytree(save, seeded)
    assert run(*words, *one, "method=simple_average", f"modelpool.run={seeded}",
               f"taskpool.run={seeded}") == 0  # fmt: skip
    names = {str(path.relative_to(tmp_path / "results" / "embedded")) for path in
             (tmp_path / "results").rglob("*.json")}  # fmt: skip
    assert names == {
        "ViT-Nano-8/merging-task_arithmetic-of-Emoji-on-Emoji.json",
        "ViT-Nano-8/merging-task_arithmetic-scaling_factor=0.4-of-Emoji-on-Emoji.json",
        "ViT-Nano-8_seed3/merging-simple_average-of-Emoji-on-Emoji.json",
    }


def test_a_quick_look_takes_a_part_of_the_pictures(
    embedded: Path, run: Run, tmp_path: Path
) -> None:
    target = tmp_path / "slerp.json"
    words = ["method=slerp/slerp", "modelpool.tasks=[Emoji]", f"report_save_path={target}"]
    words += ["fast_dev_run=true", "+taskpool.batch_size=20"]
    assert run(*on_embedded(embedded), *words) == 0
    assert json.loads(target.read_text())["Emoji"]["num_images"] == 20 < SIZES["test"]


def test_a_run_that_is_missing_is_named(run: Run, tmp_path: Path, capsys: Any) -> None:
    assert run("modelpool=embedded", f"modelpool.run={tmp_path / 'none'}") == 2
    message = capsys.readouterr().err
    assert "no checkpoint at" in message and "python src/finetune.py --finetuning-mode=" in message
    assert run("modelpool=embedded", "modelpool.mode=posthoc") == 2
    assert "unknown mode 'posthoc' of a pool" in capsys.readouterr().err


def test_pools_of_encoders_give_checkpoints(run: Run, tmp_path: Path) -> None:
    from tangent_arithmetic.encoders.loading import load_checkpoint

    places = {name: str(path) for name, path in encoder_files(tmp_path / "run").items()}
    assert run(f"merged_model_save_path={tmp_path / 'merged'}", places=places) == 0
    assert load_checkpoint(tmp_path / "merged.safetensors").kind == "image_encoder"


# --- configurations as objects


def test_every_group_of_the_configuration_is_understood() -> None:
    for node in configurations().values():
        assert algorithm_of(node, seed=3).options is not None
    files = sorted((ROOT / "config" / "modelpool" / "CLIPVisionModelPool").glob("*.yaml"))
    pools = [yaml.safe_load(path.read_text()) for path in files if "template" not in path.name]
    sizes = {len(pool_of(pool).model_names) for pool in pools if "_target_" in pool}
    assert len(pools) >= 7 and sizes == {2, 8}


@pytest.mark.parametrize("target", ["fusion_bench.method.dare.DareTaskArithmetic",
                                    "fusion_bench.method.DareTaskArithmetic"])  # fmt: skip
def test_names_of_fusion_bench_are_ours(target: str) -> None:
    algorithm = algorithm_of({"_target_": target, "scaling_factor": 0.7}, seed=9)
    assert isinstance(algorithm, DareTaskArithmetic)
    assert algorithm.options == {"scaling_factor": 0.7, "seed": 9}
    pool = pool_of({
        "_target_": "fusion_bench.modelpool.OpenCLIPVisionModelPool",
        "models": {"a": {"model_name": "ViT-B-16", "pickle_path": "x/finetuned.pt"}},
    })  # fmt: skip
    assert isinstance(pool, ModelPool) and pool.models == {"a": "x/finetuned.pt"}


def test_parts_of_the_configuration_are_checked() -> None:
    with pytest.raises(UsageError, match="method has no _target_"):
        target_of({}, "method")
    with pytest.raises(UsageError, match="must be a path or a name on the hub, got 7"):
        place_of(7, "modelpool.models.a")
    with pytest.raises(UsageError, match="unknown platform 'modelscope'"):
        pool_of(
            {
                "_target_": "tangent_arithmetic.merging.ModelPool",
                "models": {"a": "x"},
                "platform": "modelscope",
            }
        )
    with pytest.raises(UsageError, match=r"modelpool.models must map names to models"):
        pool_of({"_target_": "tangent_arithmetic.merging.ModelPool", "models": None})
    with pytest.raises(UsageError, match="only a tenth with seed 0 is supported"):
        rows_of({"_target_": "fusion_bench.utils.data.train_validation_split",
                 "dataset": {"_target_": "datasets.load_dataset", "path": "mnist"},
                 "validation_fraction": 0.2}, "x")  # fmt: skip
    with pytest.raises(UsageError, match="needs the path of a data set"):
        rows_of({"_target_": "datasets.load_dataset"}, "x")
    with pytest.raises(UsageError, match=r"unknown _target_ of x 'os.system'"):
        rows_of({"_target_": "os.system", "path": "x"}, "x")
    with pytest.raises(UsageError, match=r"unknown fabric.precision '16-mixed'"):
        device_settings({"precision": "16-mixed"})
    assert device_settings({"accelerator": "gpu", "precision": "bf16-mixed"}) == {
        "device": "cuda",
        "precision": "bf16",
    }
    with pytest.raises(UsageError, match=r"layer_wise_feature_save_path is not supported"):
        task_pool_of({"_target_": "tangent_arithmetic.merging.CLIPVisionModelTaskPool",
                      "layer_wise_feature_save_path": "x"}, {})  # fmt: skip
    with pytest.raises(UsageError, match=r"test_datasets must map names to data sets"):
        task_pool_of(
            {"_target_": "tangent_arithmetic.merging.CLIPVisionModelTaskPool", "base_model": "x"},
            {},
        )


def test_rows_name_our_sets() -> None:
    rows = rows_of(
        {"_target_": "datasets.load_dataset", "_args_": ["ufldl-stanford/svhn", "cropped_digits"],
         "split": "test"}, "svhn",
    )  # fmt: skip
    assert rows.known() == "SVHN" and rows.config == "cropped_digits" and not rows.validation
    assert rows_of({"_target_": "datasets.load_dataset", "path": "me/mine"}, "x").known() is None
    folder = ROOT / "config" / "dataset" / "image_classification"
    names = set()
    for path in sorted(folder.rglob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if "defaults" not in content:
            ((name, entry),) = content.items()
            names.add(rows_of(entry, name).known())
    assert None not in names and len(names) == 11


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
