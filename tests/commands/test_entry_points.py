from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.eval import evaluate
from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector
from tangent_arithmetic.commands import add as eval_task_addition
from tangent_arithmetic.commands import evaluate as eval_single_task
from tangent_arithmetic.commands import finetune
from tangent_arithmetic.commands import negate as eval_task_negation
from tangent_arithmetic.data.registry import split_record
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts
from tangent_arithmetic.run.args import Config, parse_arguments
from tangent_arithmetic.run.results import load_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.usage import USAGES
from tangent_arithmetic.runtime.ddp import free_port
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.states import RunStates
from tests.small_suite import TASKS, flags, small_suite

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("finetune", "eval_single_task", "eval_task_addition", "eval_task_negation")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which both modes have been fine-tuned and the single tasks evaluated."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch, small_suite(monkeypatch):
        for mode in ("standard", "linear"):
            assert finetune.main([f"--finetuning-mode={mode}", *flags(folder)]) == 0
        for mode in ("none", "standard", "linear", "posthoc"):
            assert eval_single_task.main([f"--finetuning-mode={mode}", *flags(folder)]) == 0
        yield folder


def results(root: Path, name: str) -> dict[str, Any]:
    return load_results(root / "results" / "embedded" / "ViT-Nano-8" / f"{name}.json")


def test_finetuning_writes_theta_and_stores_theta0_once(root: Path) -> None:
    folder = root / "checkpoints"
    zeroshot = load_checkpoint(folder / "zeroshot.pt")
    for task in TASKS:
        for name in ("finetuned", "linear_finetuned"):
            state = load_checkpoint(folder / f"{task}Val" / f"{name}.pt")
            assert state.theta.keys() == zeroshot.theta.keys()
            assert state.theta0_hash == zeroshot.hash != state.hash
        stored = (folder / f"{task}Val" / "linear_finetuned.safetensors").stat().st_size
        assert stored < 1.1 * (folder / "zeroshot.safetensors").stat().st_size
    assert not list(folder.rglob("*resume*")) and not list(folder.rglob("*.part"))


def split_hashes(root: Path) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Of the tasks' splits, and of the control set's."""
    data = Run.of(parse_arguments(flags(root))).data
    tasks = data.split_hashes([name for task in TASKS for name in (task, f"{task}Val")])
    return tasks, data.split_hashes(["Shapes", "ShapesVal"])


def test_checkpoints_and_results_record_their_pictures(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hashes, control = split_hashes(root)
    for task in TASKS:
        split = split_record(Run.of(parse_arguments(flags(root))).data.dataset(f"{task}Val"))
        for name in ("finetuned", "linear_finetuned"):
            path = root / "checkpoints" / f"{task}Val" / f"{name}.safetensors"
            assert read_facts(path)["info"]["split"] == split
        assert hashes[f"{task}Val"] == split["val"] != split["train"]
    assert None not in hashes.values()
    assert results(root, "ft_accuracies")["provenance"]["splits"] == hashes
    assert results(root, "zeroshot_accuracies")["provenance"]["splits"] == {**hashes, **control}
    assert "another split" not in caplog.text


def test_a_checkpoint_of_another_split_is_warned_of(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(root / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / f"{TASKS[0]}Val" / "finetuned.safetensors"
    state = load_checkpoint(path)
    info = {**state.info, "split": {"train": "1" * 64, "val": "2" * 64}}
    save_tensors(path, state.theta, state.kind, theta0_hash=state.theta0_hash, info=info)
    argv = [f"--cache-dir={root / 'cache'}", "--finetuning-mode=standard"]
    assert eval_single_task.main([*flags(tmp_path), *argv]) == 0
    assert caplog.text.count(f"was trained on another split of {TASKS[0]}") == 1
    assert f"another split of {TASKS[1]}" not in caplog.text


def test_a_finished_task_is_skipped(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "checkpoints" / "EmojiVal" / "finetuned.safetensors"
    before = path.stat().st_mtime_ns
    with caplog.at_level("INFO", logger="tangent_arithmetic"):
        assert finetune.main(["--finetuning-mode=standard", *flags(root)]) == 0
    assert path.stat().st_mtime_ns == before
    assert "Emoji standard: done before, skipped" in caplog.text
    assert "the embedded model; --model=ViT-B-32 is CLIP" in caplog.text


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lr=0.5", "lr was 0.0003, is now 0.5"),
        ("--precision=bf16", "precision was fp32, is now bf16"),
    ],
)
def test_a_checkpoint_of_other_settings_is_not_overwritten(
    flag: str, message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.main(["--finetuning-mode=linear", *flags(root), flag]) == 2
    assert message in capsys.readouterr().err


def flat(state: dict[str, Tensor], theta0: dict[str, Tensor]) -> Tensor:
    return torch.cat([(state[name] - theta0[name]).flatten() for name in sorted(theta0)])


@pytest.mark.parametrize("mode", ["standard", "linear"])
def test_bf16_trains_float32_weights_to_nearly_the_same_place(
    root: Path, tmp_path: Path, mode: str
) -> None:
    name = "finetuned" if mode == "standard" else "linear_finetuned"
    argv = [f"--finetuning-mode={mode}", *flags(tmp_path), f"--cache-dir={root / 'cache'}"]
    argv += ["--tasks=Emoji", "--precision=bf16"]
    assert finetune.main(argv) == 0
    theta0 = load_checkpoint(root / "checkpoints" / "zeroshot.pt").theta
    wide = load_checkpoint(root / "checkpoints" / "EmojiVal" / f"{name}.pt")
    path = tmp_path / "checkpoints" / "EmojiVal" / f"{name}.safetensors"
    narrow = load_checkpoint(path)
    assert narrow.theta.keys() == wide.theta.keys()
    assert {v.dtype for v in [*narrow.theta.values(), *wide.theta.values()]} == {torch.float32}
    assert narrow.info["steps"] == wide.info["steps"] >= 3
    assert narrow.info["recipe"] == {**wide.info["recipe"], "precision": "bf16"}
    loss = wide.info["last_epoch_loss"]
    assert narrow.info["last_epoch_loss"] == pytest.approx(loss, rel=0.02)
    a, b = flat(narrow.theta, theta0), flat(wide.theta, theta0)
    assert not torch.equal(a, b)
    assert torch.cosine_similarity(a, b, dim=0) > 0.97
    assert eval_single_task.main([*argv, "--eval-datasets=Emoji"]) == 0
    accuracy = "ft_accuracies" if mode == "standard" else "linear_ft_accuracies"
    found, expected = results(tmp_path, accuracy), results(root, accuracy)
    assert found["Emoji"] == pytest.approx(expected["Emoji"], abs=0.1)
    before = path.stat().st_mtime_ns
    assert finetune.main(argv) == 0
    assert path.stat().st_mtime_ns == before


def test_a_checkpoint_from_before_the_flag_is_one_of_float32(root: Path, tmp_path: Path) -> None:
    state = load_checkpoint(root / "checkpoints" / "EmojiVal" / "finetuned.pt")
    wanted = {**state.info["recipe"], "seed": 0}
    old = {name: value for name, value in state.info["recipe"].items() if name != "precision"}
    assert len(old) == len(wanted) - 2
    path, start = tmp_path / "finetuned.safetensors", str(state.theta0_hash)
    assert not finetune.is_done(path, wanted, start)
    info = {**state.info, "recipe": old}
    save_tensors(path, state.theta, state.kind, theta0_hash=start, info=info)
    assert finetune.is_done(path, wanted, start)
    with pytest.raises(UsageError, match=r"\(precision was fp32, is now bf16\)"):
        finetune.is_done(path, {**wanted, "precision": "bf16"}, start)
    with pytest.raises(UsageError, match=r"\(seed was 0, is now 1; theta0 was .*another\)"):
        finetune.is_done(path, {**wanted, "seed": 1}, "another")


def test_linear_vector_at_one_is_its_checkpoint(root: Path) -> None:
    folder = root / "checkpoints"
    path = folder / "EmojiVal" / "linear_finetuned.pt"
    vector = LinearizedTaskVector(folder / "EmojiVal" / "linear_zeroshot.pt", path)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        edited = vector.apply_to(folder / "zeroshot.pt", scaling_coef=1.0)(images)
        assert (edited - LinearizedImageEncoder.load(path)(images)).abs().max() < 1e-5
        assert (edited - ImageEncoder.load(folder / "zeroshot.pt")(images)).abs().max() > 1e-3


def test_single_task_results_have_both_splits_and_provenance(root: Path) -> None:
    def keys(*names: str) -> set[str]:
        splits = [split for name in names for split in (name, f"{name}Val")]
        return {*splits, *(f"{split}:balanced" for split in splits), "provenance"}

    zeroshot = results(root, "zeroshot_accuracies")
    assert zeroshot.keys() == keys(*TASKS, "Shapes")
    for name in ("ft", "linear_ft", "posthoc_ft"):
        assert results(root, f"{name}_accuracies").keys() == keys(*TASKS)
    origin = zeroshot["provenance"]
    assert origin["theta0_hash"] == read_facts(root / "checkpoints/zeroshot.safetensors")["hash"]
    for key in ("argv", "config", "commit", "versions", "device", "seconds", "machine", "seed"):
        assert key in origin


def test_a_part_of_the_tasks_does_not_lose_the_others(root: Path) -> None:
    before = results(root, "ft_accuracies")
    argv = ["--finetuning-mode=standard", *flags(root), "--eval-datasets=Emoji"]
    assert eval_single_task.main(argv) == 0
    after = results(root, "ft_accuracies")
    assert {k: v for k, v in after.items() if k != "provenance"} == {
        k: v for k, v in before.items() if k != "provenance"
    }


@pytest.mark.parametrize("mode", ["standard", "linear", "posthoc"])
def test_addition_reports_the_chosen_coefficient(
    root: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    db = root / "db.jsonl"
    argv = [f"--finetuning-mode={mode}", *flags(root), f"--results-db={db}", "--exp_name=mine"]
    assert eval_task_addition.main(argv) == 0
    prefix = "" if mode == "standard" else f"{mode}_"
    found = results(root, f"{prefix}additions-Emoji+FashionMNIST")
    val, coef = found["val"], str(found["coefficient"])
    assert list(val) == ["0.0", "0.5", "1.0"]
    assert found["provenance"]["splits"] == split_hashes(root)[0]
    best = max(metrics["avg_normalized_top1"] for metrics in val.values())
    assert val[coef]["avg_normalized_top1"] == best
    test, zeroshot = found["test"], found["zeroshot"]
    singles = results(root, f"{prefix}ft_accuracies")
    for task in TASKS:
        assert test[f"{task}:normalized_top1"] == pytest.approx(
            test[f"{task}:top1"] / singles[task]
        )
        assert zeroshot[f"{task}:top1"] == results(root, "zeroshot_accuracies")[task]
    line = json.loads(db.read_text().splitlines()[-1])
    assert line["exp_name"] == "mine" and line["coefficient"] == found["coefficient"]
    out = capsys.readouterr().out
    assert "zero-shot, absolute" in out and f"sum, {mode}, normalised" in out


@pytest.mark.parametrize("mode", ["standard", "linear", "posthoc"])
def test_negation_keeps_the_control(
    root: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--finetuning-mode={mode}", *flags(root), "--control-threshold=0.8"]
    assert eval_task_negation.main(argv) == 0
    prefix = "" if mode == "standard" else f"{mode}_"
    found = results(root, f"{prefix}negations")
    tasks, control = split_hashes(root)
    assert found["provenance"]["splits"] == {**tasks, **control}
    least = 0.8 * results(root, "zeroshot_accuracies")["ShapesVal"]
    for task in TASKS:
        one = found[task]
        kept = {c: m for c, m in one["val"].items() if m["ShapesVal:top1"] >= least}
        chosen = kept[str(one["coefficient"])]
        assert chosen[f"{task}Val:top1"] == min(m[f"{task}Val:top1"] for m in kept.values())
        assert one["qualified"] is True
    assert "Shapes zero-shot" in capsys.readouterr().out


def test_results_of_other_checkpoints_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = [f for f in flags(root) if not f.startswith("--save")]
    elsewhere.append(f"--save={tmp_path / 'other'}")
    assert finetune.main(["--finetuning-mode=standard", *elsewhere, "--lr=1e-3"]) == 0
    assert eval_task_addition.main(["--finetuning-mode=standard", *elsewhere]) == 2
    err = capsys.readouterr().err
    assert "is of another run (checkpoint of Emoji" in err
    assert "python src/eval_single_task.py --finetuning-mode=standard" in err


def test_other_pretrained_weights_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = root / "checkpoints" / "EmojiVal" / "finetuned.safetensors"
    argv = ["--finetuning-mode=none", *flags(root), f"--load={load}"]
    assert eval_single_task.main(argv) == 2
    assert "runs from different starting points are not mixed" in capsys.readouterr().err
    fresh = [f for f in flags(tmp_path) if not f.startswith("--cache-dir")]
    fresh += [f"--cache-dir={root / 'cache'}", f"--load={load}", "--tasks=Emoji"]
    assert eval_single_task.main(["--finetuning-mode=none", *fresh]) == 0
    loaded = results(tmp_path, "zeroshot_accuracies")["Emoji"]
    assert loaded == results(root, "ft_accuracies")["Emoji"]


def test_a_missing_checkpoint_names_the_command(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--finetuning-mode=linear", *flags(tmp_path), f"--cache-dir={root / 'cache'}"]
    assert eval_single_task.main(argv) == 2
    err = capsys.readouterr().err
    assert "linear_finetuned.safetensors" in err
    assert f"python src/finetune.py --finetuning-mode=linear --save={tmp_path}" in err
    assert not any(path.is_file() for path in (tmp_path / "results").rglob("*"))


EDITED = "standard, --finetuning-mode=linear, --finetuning-mode=posthoc"


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        (finetune, [], "finetune.py needs a fine-tuning mode; choose --finetuning-mode=standard"),
        (eval_single_task, [], "needs a fine-tuning mode; choose --finetuning-mode=none, "),
        (eval_task_addition, [], f"needs a fine-tuning mode; choose --finetuning-mode={EDITED}"),
        (eval_task_negation, [], f"needs a fine-tuning mode; choose --finetuning-mode={EDITED}"),
        (finetune, ["--finetuning-mode=posthoc"], "has no fine-tuning mode 'posthoc'"),
        (
            finetune,
            ["--finetuning-mode=linear", "--tasks=Textres"],
            "unknown data set of suite embedded 'Textres'; choose from Textures",
        ),
    ],
)
def test_a_missing_mode_or_unknown_name_lists_the_choices(
    script: Any, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        (eval_task_negation, ["--control-dataset=Emoji"], "--control-dataset=Emoji is one of "),
        (eval_task_negation, ["--tasks=Shapes"], "--tasks names Shapes, which is the control set"),
        (eval_single_task, ["--tasks=Emoji,EmojiVal"], "--tasks names Emoji twice"),
        (finetune, ["--train-dataset=EmojiVal,Emoji"], "--train-dataset names Emoji twice"),
        (finetune, ["--save={file}/run"], "--save: expected a folder at "),
        (finetune, ["--cache-dir={file}"], "--cache-dir: expected a folder at "),
        (eval_single_task, ["--results={file}"], "--results: expected a folder at "),
    ],
)
def test_conflicting_flags_are_refused_before_the_work(
    script: Any,
    argv: list[str],
    message: str,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    own = ["--finetuning-mode=standard", *flags(root), *(word.format(file=file) for word in argv)]
    assert script.main(own) == 2
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].startswith(f"error: {message}") and told.out == ""


def test_the_control_set_alone_is_evaluated_and_shown(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--finetuning-mode=none", *flags(root), f"--results={tmp_path}"]
    assert eval_single_task.main([*argv, "--eval-datasets=Shapes"]) == 0
    assert "| %                     | Shapes | mean |" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--control-dataset=Shapes is one of the data sets"):
        config = Config(eval_datasets=["Shapes"], control_dataset="Shapes")
        evaluate(ImageEncoder.load(root / "checkpoints" / "zeroshot.pt"), config)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_each_script(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / "src" / f"{script}.py")
    monkeypatch.setattr("sys.argv", [path, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(path, run_name="__main__")
    out = capsys.readouterr().out
    name = next(name for name, usage in USAGES.items() if usage.script == script)
    assert f"usage: tangent-arithmetic {name} " in out
    assert "--finetuning-mode" in out
    assert ("--control-threshold" in out) is (name == "negate")


def test_a_module_starts_as_its_script() -> None:
    argv = ["-P", "-m", "tangent_arithmetic.commands.finetune", "--finetuning-mode=none"]
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2 and "has no fine-tuning mode 'none'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_run_on_one_checkpoint_stops(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--finetuning-mode=linear", *flags(root), f"--save={tmp_path}"]
    path = tmp_path / "EmojiVal" / "linear_finetuned.safetensors"
    with RunStates(path, {}).locked():
        assert finetune.main(own) == 2
    told = capsys.readouterr().err
    assert f"another run (process {os.getpid()} on " in told and f"is making {path};" in told
    assert not path.exists() and not list(path.parent.iterdir())


@pytest.mark.slow
def test_snapshots_and_two_processes(root: Path, tmp_path: Path) -> None:
    """Two processes on the real, small Emoji set: same steps, nearly the same weights."""
    base = ["--finetuning-mode=linear", "--tasks=Emoji", "--epochs=1", "--device=cpu"]
    base.append(f"--cache-dir={tmp_path / 'cache'}")
    code = "import sys; from src.finetune import main; sys.exit(main(sys.argv[1:]))"
    alone = [sys.executable, "-c", code]
    agent = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port(0)}", "--rdzv-id=test",
        str(ROOT / "src" / "finetune.py"),
    ]  # fmt: skip
    commands = {
        "one process": [alone],
        "two processes": [[*alone, "--world-size=2"]],
        "two nodes": [agent, agent],  # as on two machines
    }
    states = {}
    for name, started in commands.items():
        folder = tmp_path / name
        rest = [*base, f"--save={folder}", "--checkpoint-every=4"]
        processes = [subprocess.Popen([*c, *rest], stderr=subprocess.PIPE) for c in started]
        for process in processes:
            told = process.communicate(timeout=300)[1]
            assert process.returncode == 0, told.decode()
        states[name] = load_checkpoint(folder / "EmojiVal" / "linear_finetuned.pt")
        assert (folder / "EmojiVal" / "linear_checkpoint_4.safetensors").is_file()
        assert not list(folder.rglob("*resume*"))
    one = states.pop("one process")
    theta0 = load_checkpoint(tmp_path / "one process" / "zeroshot.pt").theta
    moved = torch.cat([(one.theta[n] - theta0[n]).flatten() for n in theta0])
    for two in states.values():
        assert one.info["steps"] == two.info["steps"] and two.info["world_size"] == 2
        apart = torch.cat([(one.theta[n] - two.theta[n]).flatten() for n in theta0])
        assert apart.norm() / moved.norm() < 0.05
