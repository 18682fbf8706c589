"""`python src/merge.py`: composition, files, evaluation, errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tangent_arithmetic.commands import add, evaluate, finetune, merge
from tangent_arithmetic.data.clip20 import PUBLIC_SETS
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.merging import (
    DareTaskArithmetic,
    ModelPool,
    TaskArithmeticAlgorithm,
    algorithm_class,
    get_method,
    program,
    run_pool,
)
from tangent_arithmetic.merging.configurations import configurations
from tangent_arithmetic.merging.examples import Part
from tangent_arithmetic.merging.results import Record, label_of
from tangent_arithmetic.merging.targets import algorithm_of, pool_of, rows_of
from tangent_arithmetic.merging.taskpools import SuiteTaskPool, TaskPool
from tangent_arithmetic.report import stressed
from tangent_arithmetic.run import results_schema
from tangent_arithmetic.run.results import load_results
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.statedict import content_hash
from tests.merging.makers import NAMES, State, encoder_files, mixed, write_files
from tests.small_suite import SIZES, TASKS, flags, small_suite

ROOT = Path(merge.__file__).resolve().parent.parent
NUM_COEFFICIENTS = 3
Run = Callable[..., int]
SWEEP = "method.scaling_factor=0.1,0.2"
REPORT = "report_save_path='{log_dir}/program_report.json'"


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    return write_files(tmp_path, {name: mixed(seed) for seed, name in enumerate(NAMES)})


def pool_words(places: dict[str, Path]) -> list[str]:
    listed = ", ".join(f"{name}: {path}" for name, path in places.items())
    return ["modelpool=files", f"modelpool.models={{{listed}}}"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(*words: str, places: dict[str, Path] | None = None) -> int:
        pool = [] if places is None else pool_words(places)
        flags = [word for word in words if word.startswith("-")]
        rest = [word for word in words if word not in flags]
        place = [f"path.output_dir={tmp_path / 'outputs'}", REPORT]
        return merge.main([*flags, *pool, *place, *rest])

    return run


def report_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("outputs/merge/*/program_report.json")
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def test_one_command_merges_files(
    run: Run, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged.safetensors"
    words = ["method=task_arithmetic", "method.scaling_factor=0.4"]
    words += [f"merged_model_save_path={out}", "print_config=true"]
    assert run(*words, places=places) == 0
    memory = {name: load_file(path) for name, path in places.items()}
    expected = TaskArithmeticAlgorithm(0.4).run(memory)
    assert content_hash(load_file(out)) == content_hash(expected)
    assert "scaling_factor: 0.4" in capsys.readouterr().out
    report = report_of(tmp_path)
    assert report["merge"]["options"] == {"scaling_factor": 0.4}
    assert report["model_info"]["all_params"] == sum(v.numel() for v in memory["a"].values())


@pytest.mark.parametrize(
    "words",
    [
        "simple_average",
        "ties_merging method.threshold=50 method.merge_func=mean",
        "dare/task_arithmetic seed=5",
        "dare/ties_merging",
        "linear/weighted_average method.weights=[0.3,0.7] method.normalize=false",
        "slerp/slerp method.t=0.25 ~modelpool.models._pretrained_",
        "task_singular_vector/TaskSingularVectorMerging method.alpha=[0.5,1]",
        "isotropic_merging/iso_c method.exclude_keys=[big]",
        "isotropic_merging/iso_cts method.common_space_fraction=0.9",
        "model_stock/model_stock",
        "wudi/wudi method.iter_num=1",
        "dummy",
    ],
)
def test_methods_have_the_names_of_fusion_bench(
    words: str, run: Run, places: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "merged.safetensors"
    more = [f"merged_model_save_path={out}", "print_config=false"]
    assert run(*f"method={words}".split(), *more, places=places) == 0
    assert load_file(out).keys() == mixed(0).keys()
    if "seed=5" in words:
        assert report_of(tmp_path)["merge"]["options"]["seed"] == 5


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("ties", "ties_merging"),
        ("dare_ties", "dare/ties_merging"),
        ("dare_task_arithmetic", "dare/task_arithmetic"),
        ("weighted_average", "linear/weighted_average"),
    ],
)
def test_methods_have_their_own_names_too(
    name: str, theirs: str, run: Run, places: dict[str, Path], tmp_path: Path
) -> None:
    weights = ["method.weights=[0.3,0.7]"] if "weighted" in name else []
    for i, method in enumerate((name, theirs)):
        words = [f"method={method}", f"merged_model_save_path={tmp_path / f'{i}.safetensors'}"]
        assert run(*words, *weights, places=places) == 0
    one, other = (content_hash(load_file(tmp_path / f"{i}.safetensors")) for i in (0, 1))
    assert one == other


@pytest.mark.parametrize("sweep", [False, True])
def test_nothing_is_written_or_dumped_unless_asked_for(
    sweep: bool,
    places: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    words = ["-m", "method.scaling_factor=0.1,0.2"] if sweep else []
    assert merge.main([*words, *pool_words(places)]) == 0
    assert list(folder.iterdir()) == []
    said = "merged 2 models by task_arithmetic; not saved (merged_model_save_path=PATH)\n"
    assert capsys.readouterr().out == said * (2 if sweep else 1)


def test_sweeps_write_a_report_each(run: Run, places: dict[str, Path], tmp_path: Path) -> None:
    target = f"merged_model_save_path={tmp_path}/${{hydra:job.num}}.safetensors"
    assert run("-m", "method.scaling_factor=0.1,0.2", target, places=places) == 0
    assert (tmp_path / "0.safetensors").is_file() and (tmp_path / "1.safetensors").is_file()
    paths = sorted(tmp_path.glob("outputs/multirun/merge/*/*/program_report.json"))
    reports = [json.loads(path.read_text()) for path in paths]
    assert [r["merge"]["options"]["scaling_factor"] for r in reports] == [0.1, 0.2]


@pytest.mark.parametrize(
    "words",
    [
        [SWEEP, "merged_model_save_path=m.safetensors"],
        [SWEEP, "report_save_path=r.json"],
        [SWEEP, "+method.model_save_path=${path.output_dir}/m"],
        [SWEEP, "taskpool.model_save_path=m"],
        [SWEEP, "merged_model_save_path=a.safetensors,b.safetensors"],
        ["merged_model_save_path=m.pt,m.safetensors"],
        ["merged_model_save_path=m.bin,./m.pth"],
        ["merged_model_save_path=m,m.safetensors"],  # one file for encoders
    ],
)
def test_jobs_of_a_sweep_that_replace_each_other_s_results_are_refused(
    words: list[str],
    places: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert merge.main(["-m", *pool_words(places), *words]) == 2
    assert "several jobs of the sweep would write" in capsys.readouterr().err
    assert not list((tmp_path / "here").rglob("*"))


def test_what_cannot_be_merged_is_found_without_a_place(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(places["a"])
    state["big"][1, 2] = float("nan")
    save_file(state, str(places["a"]))
    assert merge.main(pool_words(places)) == 2
    assert "a has nan at index 902 of big" in capsys.readouterr().err


def test_dry_runs_touch_nothing(
    run: Run, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
        (["method=task_arithmetik"], "unknown method 'task_arithmetik'; choose from task_"),
        (["method=surgery/adamerging_surgery"], "unknown method 'surgery/adamerging_surgery'"),
        (["method.scaling=1"], "unknown key 'method.scaling'; nearest: method.scaling_factor, "),
        (["taskpool=svhn"], "unknown taskpool 'svhn'; choose from CLIPVisionModelTaskPool/clip-"),
        (["merged"], "expected KEY=VALUE, got 'merged'; --help lists the keys"),
        (["modelpool.models=???"], "modelpool.models is not set; expected modelpool.models=VALUE"),
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
        (["+modelpool.vocabulary=union"], "modelpool has vocabulary, which is not supported"),
        (["+method.model_save_path=other"], "method.model_save_path=other differ; name one"),
        (["taskpool.model_save_path=other"], "taskpool.model_save_path=other differ; name one"),
        (["+tyop=1"], "the configuration has tyop, which is not supported; its keys are"),
        (["+fabric.num_nodes=4"], "fabric has num_nodes, which is not supported; its keys are"),
        (["+path.foo=3"], "path has foo, which is not supported"),
        (["+taskpool.foo=1"], "taskpool has foo, which is not supported; its keys are model_save"),
        (["seed=abc"], "seed must be an integer from 0 on, or null, got 'abc'"),
        (["seed=-1"], "seed must be an integer from 0 on, or null, got -1"),
        (["dry_run=nope"], "dry_run must be true or false, got 'nope'"),
        (["fast_dev_run=1"], "fast_dev_run must be true or false, got 1"),
        (["modelpool.allow_base_mismatch=no"], "modelpool.allow_base_mismatch must be true or"),
        (["plugins={lines:{beta:0.2}}"], "plugins is a list; expected plugins=[...], got plugins="),
    ],
)
def test_mistakes_end_with_code_2_and_no_output(
    words: list[str],
    message: str,
    run: Run,
    places: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out" / "merged.safetensors"
    assert run(f"merged_model_save_path={out}", "print_config=false", *words, places=places) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_a_misspelt_key_in_a_file_is_refused(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [task_arithmetic@method, _self_]\n"
        "merged_model_savepath: m.safetensors\n"
    )
    words = ["--config-dir", str(tmp_path / "conf"), "method=mine", *pool_words(places)]
    assert merge.main(words) == 2
    message = "merged_model_savepath, which is not supported; its keys are merged_model_save_path"
    assert message in capsys.readouterr().err


def test_missing_models_are_named(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("modelpool=files") == 2
    assert "modelpool.models" in capsys.readouterr().err
    assert run("modelpool=embedded", f"modelpool.run={tmp_path / 'none'}") == 2
    message = capsys.readouterr().err
    assert "no checkpoint at" in message and "python src/finetune.py --finetuning-mode=" in message
    own = tmp_path / "mine.yaml"
    own.write_text("tasks: {digits: {source: 'embedded:MNIST', epochs: 1}}\n")
    words = (f"modelpool.suite={own}", f"modelpool.run={tmp_path / 'none'}")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "zeroshot.safetensors").touch()
    assert run("modelpool=embedded", *words) == 2
    assert "digitsVal" in capsys.readouterr().err  # the suite's task, which is not trained
    assert run("modelpool=embedded", "modelpool.mode=posthoc") == 2
    assert "mode 'posthoc' has no checkpoints of its own" in capsys.readouterr().err
    assert run("modelpool=embedded", f"modelpool.run={tmp_path}", "modelpool.mode=taujp") == 2
    assert "unknown fine-tuning mode 'taujp'" in capsys.readouterr().err
    (tmp_path / "zeroshot.safetensors").touch()
    assert (
        run("modelpool=embedded", f"modelpool.run={tmp_path}", "modelpool.mode=linear+taujp") == 2
    )
    assert "linear_taujp_finetuned.safetensors" in capsys.readouterr().err


def test_help_is_quick_and_merging_imports_nothing_heavy(
    places: dict[str, Path], tmp_path: Path
) -> None:
    """From any folder. Help and errors in the configuration do without PyTorch."""
    code = (
        "import sys\nfrom tangent_arithmetic.commands.merge import main\n"
        "print(main(['method=nothing']), main(['--help']), 'torch' in sys.modules)\n"
        "heavy = {'transformers', 'datasets', 'open_clip', 'torchvision', 'timm', 'matplotlib'}\n"
        "print(main(sys.argv[1:]), heavy & set(sys.modules))"
    )
    words = [*pool_words(places), "merged_model_save_path=m.safetensors", "print_config=false"]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "method: ace, arcee_fusion, breadcrumbs, " in done.stdout
    assert (
        "task_arithmetic, task_wise_adamerging, ties, ties_merging, tsv_m, weighted_average"
        in done.stdout
    )
    assert done.stdout.startswith("usage: tangent-arithmetic merge [KEY=VALUE ...]")
    assert "CLIPVisionModelPool" in done.stdout and "\n2 0 False\n" in done.stdout
    assert done.stdout.endswith("0 set()\n")


# --- the embedded suite


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run on two small sets, fine-tuned and evaluated."""
    folder = tmp_path_factory.mktemp("embedded")
    with pytest.MonkeyPatch.context() as patch, small_suite(patch):
        # the command has no flags for these
        patch.setattr("tangent_arithmetic.run.run.DEFAULT_CACHE", folder / "cache")
        patch.setattr("tangent_arithmetic.merging.program.POINTS", NUM_COEFFICIENTS)
        for mode in ("standard", "linear"):
            words = [*flags(folder), f"--finetuning-mode={mode}"]
            words += [f"--n-eval-points={NUM_COEFFICIENTS}"]
            assert [main(words) for main in (finetune.main, evaluate.main, add.main)] == [0] * 3
        yield folder


def on_embedded(folder: Path, tasks: str = ",".join(TASKS)) -> list[str]:
    """The words of a merge of that run's checkpoints, and of its evaluation."""
    pools = [
        f"{pool}.{word}"
        for pool in ("modelpool", "taskpool")
        for word in (f"run={folder / 'checkpoints'}", f"tasks=[{tasks}]")
    ]
    results = f"taskpool.results={folder / 'results'}"
    return ["modelpool=embedded", "taskpool=embedded", *pools, results, "print_config=false"]


@pytest.mark.parametrize(("mode", "prefix"), [("standard", ""), ("linear", "linear_")])
def test_merged_accuracies_equal_those_of_the_addition_script(
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
    assert chosen["metric"] == "mean normalised accuracy"
    assert len(chosen["validation"]) == NUM_COEFFICIENTS
    assert report["merge"]["options"] == {"scaling_factor": chosen["coefficient"]}
    assert set(report) >= {*TASKS, "average"}
    for task in TASKS:
        assert report[task]["accuracy"] == pytest.approx(added["test"][f"{task}:top1"])
    (path,) = embedded.glob(f"results/**/merging-*{'linear' if mode == 'linear' else 'auto-of'}*")
    kept = load_results(path)
    assert results_schema.read(path)[1] == []
    assert kept["merge"]["label"].startswith("task_arithmetic (scaling_factor=auto), ")
    assert kept["coefficient"] == added["coefficient"] and kept["val"].keys() == added["val"].keys()
    main = {k: v for k, v in added["test"].items() if not k.endswith(":balanced")}
    assert kept["test"].keys() == main.keys()
    for name, value in main.items():
        assert kept["test"][name] == pytest.approx(value)
    for name in ("theta0_hash", "checkpoints", "seed", "suite", "model", "mode"):
        assert kept["provenance"][name] == added["provenance"][name]


def test_auto_is_kept_under_the_name_of_the_option(
    embedded: Path, run: Run, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    words = [*on_embedded(embedded), f"report_save_path={report}", "method.alpha=auto"]
    words += [f"taskpool.results={tmp_path / 'results'}"]
    assert run(*words, "method=tsv_m") == 0
    content = json.loads(report.read_text())
    chosen = content["scaling_factor"]["coefficient"]
    assert content["merge"]["options"] == {"alpha": chosen, "exclude_keys": None}
    (path,) = (tmp_path / "results").rglob("merging-tsv_m-alpha=auto*.json")
    assert load_results(path)["coefficient"] == chosen


def test_plug_ins_are_in_the_name_and_the_label(embedded: Path, run: Run, tmp_path: Path) -> None:
    words = [*on_embedded(embedded), f"taskpool.results={tmp_path / 'results'}"]
    assert run(*words, "plugins=[normalise,{lines:{beta:0.2}}]", "+taskpool.sample=20") == 0
    (path,) = (tmp_path / "results").rglob("merging-task_arithmetic-after-normalise*.json")
    kept = load_results(path)
    assert kept["merge"]["label"].startswith("task_arithmetic, after normalise+lines (beta=0.2)")
    assert path.parent.name.endswith("_sample20") and results_schema.read(path)[1] == []


@pytest.mark.slow
def test_stress_writes_json_and_tables(
    embedded: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--save={embedded / 'checkpoints'}", f"--tasks={','.join(TASKS)}", "--sample=8"]
    words += [f"--results={tmp_path}", "--methods=simple_average,ties", f"--task={TASKS[1]}"]
    assert merge.main(["stress", *words]) == 0
    text = capsys.readouterr().out
    assert text.count("| simple_average ") == 2 and "refused" in text
    (folder,) = tmp_path.glob("embedded/ViT-Nano-8_sample8")
    found = json.loads((folder / "stress.json").read_text())
    assert found["provenance"]["mode"] == "standard" and found["task"] == TASKS[1]
    ties = found["methods"]["ties"]
    for key in ("plain", "normalised"):
        assert ties[key]["top1"].keys() == set(TASKS)
        assert all(cell.keys() & {"lost", "refused"} for cell in ties[key]["perturbed"].values())
    lost = stressed.lost(found, "plain").loc["ties"]
    assert lost.isna().sum() == 1  # a missing tensor is refused
    assert (folder / "figures" / "stress.svg").stat().st_size > 10_000
    page = (folder / "stress.md").read_text()
    assert "8 examples a task" in page and f"that of {TASKS[1]}" in page


def test_only_complete_results_of_the_run_s_models_are_stored(
    embedded: Path, run: Run, tmp_path: Path
) -> None:
    """A file for each method and its options."""
    report = tmp_path / "report.json"
    quiet = [f"report_save_path={report}", f"taskpool.results={tmp_path / 'results'}"]
    words = [*on_embedded(embedded, "Emoji"), *quiet]
    slerp = ["method=slerp/slerp", "fast_dev_run=true", "+taskpool.batch_size=20"]
    assert run(*words, *slerp) == 0
    assert json.loads(report.read_text())["Emoji"]["num_images"] == 20 < SIZES["test"]
    assert run(*words, "taskpool.results=null") == 0
    rest = [word for word in words if not word.startswith("modelpool")]
    assert run(*rest, places=encoder_files(tmp_path / "other")) == 0
    assert not (tmp_path / "results").exists()
    for factor in (0.3, 0.4):
        assert run(*words, f"method.scaling_factor={factor}") == 0
    seeded = tmp_path / "checkpoints_3" / "ViT-Nano-8"
    shutil.copytree(embedded / "checkpoints", seeded)
    places = [f"modelpool.run={seeded}", f"taskpool.run={seeded}"]
    assert run(*words, *places, "method=simple_average") == 0
    emoji, other = (seeded / f"{task}Val" / "finetuned.safetensors" for task in TASKS)
    shutil.copy(other, emoji)  # another run of the same pre-trained model
    assert run(*words, places[0], "method=simple_average") == 0
    half = ["fabric.precision=bf16-mixed", "+taskpool.sample=8"]
    assert run(*words, *half) == 0
    paths = (tmp_path / "results" / "embedded").rglob("*.json")
    assert {f"{path.parent.name}/{path.name}" for path in paths} == {
        "ViT-Nano-8/merging-task_arithmetic-of-Emoji-on-Emoji.json",
        "ViT-Nano-8/merging-task_arithmetic-scaling_factor=0.4-of-Emoji-on-Emoji.json",
        "ViT-Nano-8_sample8/merging-task_arithmetic-of-Emoji-on-Emoji-in-bf16.json",
        "ViT-Nano-8_seed3/merging-simple_average-of-Emoji-on-Emoji.json",
    }


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fisher_merging/clip_fisher_merging", {"num_fisher_examples": 2}),
        ("regmean/clip_regmean", {"num_regmean_examples": 8}),
        ("regmean_plusplus/clip_regmean_plusplus", {"num_regmean_examples": 8}),
        ("lot", {"num_examples": 8}),
        ("featcal", {"num_examples": 8}),
        ("prodistill", {"num_examples": 4, "epochs": 2}),
        ("task_wise_adamerging", {"max_steps": 2, "split": "test"}),
        ("adamerging/clip", {"max_steps": 2, "grouping": "task-layer"}),
    ],
)
def test_methods_that_need_images_take_those_of_the_task_pool(
    method: str, options: dict[str, Any], embedded: Path, run: Run, tmp_path: Path
) -> None:
    report, merged = tmp_path / "report.json", tmp_path / "merged.safetensors"
    words = [f"method={method}", *(f"method.{key}={value}" for key, value in options.items())]
    words += [f"report_save_path={report}", f"merged_model_save_path={merged}", "seed=4"]
    words += [f"taskpool.results={tmp_path / 'results'}"]
    assert run(*on_embedded(embedded), *words) == 0
    content = json.loads(report.read_text())
    assert content["merge"]["options"].items() >= {**options, "seed": 4}.items()
    assert {"Emoji", "FashionMNIST", "average"} < content.keys()
    weights = load_file(merged)
    start = load_file(embedded / "checkpoints" / "zeroshot.safetensors")
    assert any(not torch.equal(weights[name], value) for name, value in start.items())
    (kept,) = (tmp_path / "results").rglob("merging-*.json")
    assert ("split=test" in kept.name) == ("split" in options)


def test_images_of_a_task_are_chosen_by_the_seed(embedded: Path) -> None:
    checkpoints = embedded / "checkpoints"
    pool = run_pool(checkpoints, list(TASKS))
    tasks = SuiteTaskPool("ViT-Nano-8", str(checkpoints), list(TASKS), device="cpu", num_workers=0)
    examples = tasks.examples(pool)
    encoder = examples.encoder()

    def chosen(count: int | None, seed: int, part: Part = "validation") -> torch.Tensor:
        split = examples.split(encoder, "Emoji", count, seed, part)
        return torch.cat([images for images, _ in split.batches])

    assert len(chosen(None, 0)) == len(chosen(99, 0)) == SIZES["val"]
    assert len(chosen(None, 0, "test")) == SIZES["test"]
    assert len(chosen(10, 0).flatten(1).unique(dim=0)) > 5
    assert torch.equal(chosen(10, 0), chosen(10, 0))
    assert not torch.equal(chosen(10, 0), chosen(10, 1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modelpool.mode=linear"], "runs standard encoders, and these are linearised"),
        (["taskpool.tasks=[Emoji]"], "the task pool has no FashionMNIST; its tasks are Emoji"),
        (["taskpool=dummy"], "runs the models on images of their tasks, and got none"),
    ],
)
def test_models_that_cannot_be_run_on_images(
    words: list[str], message: str, embedded: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    taskpool = [] if "taskpool=dummy" in words else on_embedded(embedded)[1:]
    pools = [word for word in on_embedded(embedded) if word.startswith("modelpool")]
    assert run(*pools, *taskpool, "method=regmean", *words) == 2
    assert message in capsys.readouterr().err


def test_encoders_give_checkpoints(run: Run, tmp_path: Path) -> None:
    places = encoder_files(tmp_path / "run")
    assert run(f"merged_model_save_path={tmp_path / 'merged'}", places=places) == 0
    assert load_checkpoint(tmp_path / "merged.safetensors").kind == "image_encoder"


def test_a_place_in_the_method_is_that_of_fusion_bench(
    run: Run, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its model_stock.yaml saves to `${path.log_dir}/checkpoint`."""
    words = ["method=model_stock/model_stock", f"path.log_dir={tmp_path / 'logs'}"]
    words += [
        "+method.model_save_path=${path.log_dir}/checkpoint",
        "+method.model_save_kwargs=null",
    ]
    assert run(*words, places=places) == 0
    target = tmp_path / "logs" / "checkpoint"
    assert f"by model_stock; wrote {target}\n" in capsys.readouterr().out
    merged = load_file(target / "model.safetensors")
    assert content_hash(merged) == content_hash(algorithm_class("ModelStock")().run(places))


# --- configurations as objects


def test_all_methods_and_pools_of_the_configuration_exist() -> None:
    for node in configurations().values():
        assert algorithm_of(node, seed=3).options is not None
    files = sorted((ROOT / "config" / "modelpool" / "CLIPVisionModelPool").glob("*.yaml"))
    pools = [yaml.safe_load(path.read_text()) for path in files if "template" not in path.name]
    sizes = {len(pool_of(pool).model_names) for pool in pools if "_target_" in pool}
    assert len(pools) >= 7 and sizes >= {2, 8}  # others are composed, see test_clip20_pools


@pytest.mark.parametrize("name", ["KnotsAlgorithm", "SvcAlgorithm", "CoreSpaceAlgorithm"])
def test_the_seed_is_that_of_the_inner_method_too(name: str) -> None:
    node = {"_target_": f"tangent_arithmetic.merging.{name}", "inner": "dare_task_arithmetic"}
    assert algorithm_of(node, seed=9).options["inner_options"] == {"seed": 9}
    own = {"inner_options": {"seed": 3, "scaling_factor": 0.5}}
    assert algorithm_of({**node, **own}, seed=9).options["inner_options"] == own["inner_options"]
    assert "inner_options" not in algorithm_of({**node, "inner": "ties"}, seed=9).options


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("tsv_m (alpha=auto), of a+stanford-cars", "tsv_m-alpha=auto-of-a+stanford-cars"),
        ("wudi (lr=1e-05, x=-0.5)", "wudi-lr=1e-05-x=-0.5"),
        ("x, after scale (factors=[1, -1])", "x-after-scale-factors=-1-1-f51bf68a"),
        ("x, after scale (factors=[1, 1])", "x-after-scale-factors=-1-1-8dfc86e1"),
    ],
)
def test_results_of_different_labels_have_different_names(label: str, name: str) -> None:
    run: Any = SimpleNamespace(results=Path("results"))
    assert Record(run, label, "").path == Path("results") / f"merging-{name}.json"


@pytest.mark.parametrize(
    ("modes", "label"),
    [
        (("standard", "standard"), ""),
        (("linear", "linear"), ", linear"),
        (("linear+taujp", "linear+taujp"), ", linear+taujp"),
        (("standard", "standard+attention"), ", standard and standard+attention"),
    ],
)
def test_results_of_different_modes_have_different_labels(
    modes: tuple[str, ...], label: str, tmp_path: Path
) -> None:
    places = encoder_files(tmp_path, "linear" in modes[0])
    for name, mode in zip(("MNIST", "DTD"), modes, strict=True):
        own = load_checkpoint(places[name])
        facts = {"model": "ViT-Nano-8", "mode": mode}
        save_tensors(places[name], own.theta, own.kind, own.theta0, own.theta0_hash, facts)
    merged = TaskArithmeticAlgorithm().merge(places)
    run = SuiteTaskPool("ViT-Nano-8", str(tmp_path), ["MNIST"], device="cpu").run
    assert label_of(run, merged, False) == f"task_arithmetic{label}, of MNIST+DTD, on MNIST"


def test_names_of_fusion_bench_stand_for_ours() -> None:
    for module in ("method", "method.dare"):
        node = {"_target_": f"fusion_bench.{module}.DareTaskArithmetic", "scaling_factor": 0.7}
        algorithm = algorithm_of(node, seed=9)
        assert isinstance(algorithm, DareTaskArithmetic)
        assert algorithm.options == {"scaling_factor": 0.7, "seed": 9}
    node = {"_target_": "fusion_bench.method.IsotropicMergingInCommonSubspace"}
    assert algorithm_of({**node, "scaling_factor": 1.5}).method == "iso_c"
    node = {"_target_": "fusion_bench.method.ModelStock", "model_save_path": None}
    assert algorithm_of({**node, "ignore_keys": ["x"]}).options == {"ignore_keys": ["x"]}
    with pytest.raises(UsageError, match="no option 'model_save_path'"):
        algorithm_of({**node, "model_save_path": "here"})
    model = {"model_name": "ViT-B-16", "pickle_path": "x/finetuned.pt"}
    target = "fusion_bench.modelpool.OpenCLIPVisionModelPool"
    pool = pool_of({"_target_": target, "models": {"a": model}})
    assert isinstance(pool, ModelPool) and pool.models == {"a": "x/finetuned.pt"}


def test_configurations_of_fusion_bench_are_accepted_as_they_are() -> None:
    home = "fusion_bench.method"
    tsv = {"_target_": f"{home}.TaskSingularVectorMerging", "alpha": 1, "exclude_keys": None}
    for node in (
        tsv | {"return_single_task_models": False},
        {"_target_": f"{home}.ISO_C_Merge", "scaling_factor": 1.0, "exclude_keys": None},
        {"_target_": f"{home}.model_stock.ModelStock", "ignore_keys": ["model.logit_scale"]},
        {"_target_": f"{home}.WUDIMerging", "iter_num": 400, "exclude_keys": None},
        {"_target_": f"{home}.RegMeanAlgorithmForCLIP", "exclude_param_names_regex": []}
        | {"weight_transpose": True, "dataloader_kwargs": {"batch_size": 32}},
    ):
        assert algorithm_of(node).options is not None
    with pytest.raises(UsageError, match="tsv_m has no option 'return_single_task_models'"):
        algorithm_of(tsv | {"return_single_task_models": True})


@pytest.mark.parametrize(
    ("name", "best"),
    [("task_arithmetic", 0.5), ("tsv_m", 0.5), ("iso_c", 1.5), ("lines_task_arithmetic", 0.5)],
)
def test_auto_chooses_the_option_that_scales_within_the_range_of_the_method(
    name: str, best: float
) -> None:
    class Tasks:
        """Accuracy falls with the distance from the best coefficient."""

        def encoder(self, _pool: ModelPool, state: State) -> Any:
            return SimpleNamespace(weights=lambda: state)

        def sweep(self, encoder: Any, tau: State, coefs: list[float]) -> dict[str, list[float]]:
            for key, value in encoder.weights().items():  # a line through the merged weights
                torch.testing.assert_close(value + best * tau[key], at_best[key])
            return {"task": [9 - abs(coef - best) for coef in coefs]}

    states = {name: torch.full((2, 2), i + 1.0) for i, name in enumerate(("_pretrained_", *"ab"))}
    pool = ModelPool({n: {"layers.0.w": v, "layers.1.w": v + 1} for n, v in states.items()})
    kind: Any = algorithm_class(get_method(name).algorithm)
    option = str(get_method(name).coefficient)
    at_best, algorithm = kind(**{option: best}).run(pool), kind(**{option: 1.0})
    chosen = program.choose_scaling_factor(algorithm, pool, cast(TaskPool, Tasks()))
    assert chosen["coefficient"] == best and float([*chosen["validation"]][-1]) == 2 * best


def test_rows_name_our_sets() -> None:
    svhn = ["ufldl-stanford/svhn", "cropped_digits"]
    rows = rows_of({"_target_": "datasets.load_dataset", "_args_": svhn, "split": "test"}, "svhn")
    assert rows.known() == "SVHN" and rows.config == "cropped_digits" and not rows.validation
    assert rows_of({"_target_": "datasets.load_dataset", "path": "me/mine"}, "x").known() is None
    folder = ROOT / "config" / "dataset" / "image_classification"
    names = set()
    for path in sorted(folder.rglob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if "defaults" not in content:
            ((name, entry),) = content.items()
            rows = rows_of(entry, name)
            names.add(rows.known() or rows.path)
    # the letters of EMNIST are read from the hub as they are there
    assert names - PUBLIC_SETS.keys() == {"tanganke/emnist_letters"} and len(names) == 21


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_steps_along_an_encoder_have_no_nan_where_it_has_a_mask() -> None:
    mask = torch.tensor([-torch.inf, 0.0])
    states = [{"mask": mask, "w": torch.full((2,), v, dtype=torch.bfloat16)} for v in (3.0, 1.0)]
    theta, theta0 = (cast(Any, SimpleNamespace(weights=lambda own=own: own)) for own in states)
    tau = program.difference(theta, theta0)
    assert tau["mask"].tolist() == [0.0, 0.0]
    assert tau["w"].tolist() == [2.0, 2.0] and tau["w"].dtype is torch.float32
