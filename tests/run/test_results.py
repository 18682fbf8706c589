from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tangent_arithmetic.run import results
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import MissingFileError, UnwritableError, UsageError

THETA0 = "a" * 64
MODES = {"none": "zeroshot_", "standard": "", "linear": "linear_", "posthoc": "posthoc_"}


def origin(**changes: Any) -> dict[str, Any]:
    run = {"theta0_hash": THETA0, "seed": 0, "suite": "embedded", "model": "ViT-Nano-8"}
    return {**run, "checkpoints": {"MNIST": "1" * 64}, **changes}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# --- files


def test_files_have_the_names_of_the_public_projects() -> None:
    run = Run.of(Config(seed=1))
    folder = Path("results/embedded/ViT-Nano-8_seed1")
    for mode, prefix in MODES.items():
        path = folder / f"{prefix}{'' if mode == 'none' else 'ft_'}accuracies.json"
        assert results.accuracies_path(run, mode) == path
        for operation in ("additions", "negations"):
            path = folder / f"{prefix}{operation}.json"
            assert results.arithmetic_path(run, mode, operation) == path
    part = run.with_(tasks=["MNIST", "Emoji"])
    name = "linear_additions-MNIST+Emoji.json"  # a sum of a part of the suite's tasks
    assert results.arithmetic_path(part, "linear", "additions") == folder / name
    assert results.arithmetic_path(part, "linear", "negations").name == "linear_negations.json"


def test_write_results_writes_a_file_and_a_line_of_the_database(tmp_path: Path) -> None:
    path, database = tmp_path / "new" / "ft_accuracies.json", tmp_path / "db" / "all.jsonl"
    args = Config(results_db=str(database), exp_name="trial")
    for accuracy in (0.5, 0.75):
        results.write_results(path, {"MNIST": accuracy}, Run.of(args))
    assert json.loads(path.read_text(encoding="utf-8")) == {"MNIST": 0.75}
    lines = [json.loads(line) for line in database.read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"MNIST": accuracy, "exp_name": "trial", "file": str(path)} for accuracy in (0.5, 0.75)
    ]


def test_only_the_first_rank_writes_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tangent_arithmetic.runtime.ddp.is_main_process", lambda: False)
    args = Config(results_db=str(tmp_path / "all.jsonl"))
    results.write_results(tmp_path / "additions.json", {"test": {}}, Run.of(args))
    assert list(tmp_path.iterdir()) == []


# writes the accuracies of tasks of its own, one after the other
WRITER = """
import sys
from pathlib import Path
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.results import write_merged
from tangent_arithmetic.run.run import Run

origin = {"theta0_hash": "a", "seed": 0, "suite": "embedded", "model": "m"}
args = Run.of(Config(results_db=sys.argv[2]))
for i in range(25):
    name = f"{sys.argv[3]}{i}"
    write_merged(Path(sys.argv[1]), {name: 0.5, "provenance": {**origin, "splits": {}}}, args)
"""


def test_runs_at_the_same_time_lose_nothing_of_each_other(tmp_path: Path) -> None:
    path, database = tmp_path / "results" / "ft_accuracies.json", tmp_path / "all.jsonl"
    command = [sys.executable, "-c", WRITER, str(path), str(database)]
    for process in [subprocess.Popen([*command, name]) for name in "ab"]:
        assert process.wait(timeout=120) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert set(found) == {"provenance", *(f"{name}{i}" for name in "ab" for i in range(25))}
    lines = database.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 50 and all(json.loads(line) for line in lines)
    assert [p.name for p in path.parent.iterdir()] == ["ft_accuracies.json"]


DAMAGED = {
    "cut": b'{"Emoji": 0.',
    "empty": b"",
    "binary": bytes(range(256)),
    "a list": b"[]",
    "null": b"null",
    "deep": 100_000 * b"[",
    "a string accuracy": b'{"Emoji": "0.2"}',
    "provenance is no object": b'{"Emoji": 0.2, "provenance": 3}',
}


@pytest.mark.parametrize("write_them", [results.write_results, results.write_merged])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_kept_beside_the_new_one(
    content: bytes, write_them: Any, tmp_path: Path
) -> None:
    path, new = tmp_path / "ft_accuracies.json", {"MNIST": 0.9, "provenance": origin()}
    for kept in ("", "2", "3"):
        path.write_bytes(content)
        write_them(path, new, Run.of(Config()))
        assert json.loads(path.read_text(encoding="utf-8")) == new
        assert path.with_name(f"ft_accuracies.json.damaged{kept}").read_bytes() == content
    write_them(path, new, Run.of(Config()))
    assert len(list(tmp_path.iterdir())) == 4  # what is sound is not kept beside


def test_the_valid_part_of_a_damaged_file_is_kept(tmp_path: Path) -> None:
    old = {"Emoji": 0.2, "Signs": "0.3", "provenance": origin()}
    path = write(tmp_path / "ft_accuracies.json", old)
    results.write_merged(path, {"MNIST": 0.9, "provenance": origin()}, Run.of(Config()))
    assert set(results.load_results(path)) == {"Emoji", "MNIST", "provenance"}
    kept = (tmp_path / "ft_accuracies.json.damaged").read_text(encoding="utf-8")
    assert json.loads(kept) == old


@pytest.mark.parametrize("write_them", [results.write_results, results.write_merged])
def test_results_that_cannot_be_written_are_printed(
    write_them: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    results.check_targets(Run.of(Config()), folder / "ft_accuracies.json")
    folder.rmdir()
    folder.write_text("in the way")  # stands for a disk that is full by now
    new = {"MNIST": 0.9, "provenance": origin()}
    with pytest.raises(UnwritableError, match=r"cannot write .*results"):
        write_them(folder / "ft_accuracies.json", new, Run.of(Config()))
    assert json.loads(capsys.readouterr().out) == new


@pytest.mark.parametrize(
    ("file", "database", "reason"),
    [
        ("file/ft_accuracies.json", None, "cannot write .*: (File exists|Not a directory)"),
        ("folder", None, "folder: it exists and is not a file"),
        ("x" * 300, None, "cannot write .*: File name too long"),
        ("new/ft_accuracies.json", "file/all.jsonl", "all.jsonl: (File exists|Not a directory)"),
        ("new/ft_accuracies.json", "folder", "folder: it exists and is not a file"),
    ],
)
def test_targets_are_checked(file: str, database: str | None, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    args = Config(results_db=None if database is None else str(tmp_path / database))
    with pytest.raises(UsageError, match=reason):
        results.check_targets(Run.of(args), tmp_path / file)


def test_checking_targets_changes_no_file(tmp_path: Path) -> None:
    path, database = tmp_path / "ft_accuracies.json", tmp_path / "all.jsonl"
    path.write_text("{}")
    database.write_text("{}\n")
    results.check_targets(
        Run.of(Config(results_db=str(database))), path, tmp_path / "new" / "x.json"
    )
    assert (path.read_text(), database.read_text()) == ("{}", "{}\n")
    assert list((tmp_path / "new").iterdir()) == []


# --- reading


def test_load_results_reads_both_spellings_of_coefficients(tmp_path: Path) -> None:
    theirs = [repr(float(coef)) for coef in np.linspace(0, 1, 21)]
    ours = [str(round(0.05 * i, 2)) for i in range(21)]
    assert theirs != ours  # 0.15000000000000002 and others
    for spelling in (theirs, ours):
        values = {coef: {"avg_top1": i / 20} for i, coef in enumerate(spelling)}
        path = write(tmp_path / "additions.json", {"test": {"MNIST:top1": 0.5}, "val": values})
        assert results.load_results(path) == {
            "test": {"MNIST:top1": 0.5},
            "val": {coef: {"avg_top1": i / 20} for i, coef in enumerate(ours)},
        }


def test_merge_keeps_the_other_tasks_of_the_run(tmp_path: Path) -> None:
    path, new = tmp_path / "ft_accuracies.json", {"MNIST": 0.9, "provenance": origin(seconds=5)}
    assert results.merge(path, new) == new
    old = {"MNIST": "0" * 64, "Emoji": "2" * 64}
    provenance = origin(checkpoints=old, splits={"MNIST": "a", "Emoji": "b"}, seconds=9)
    write(path, {"MNIST": 0.1, "Emoji": 0.2, "provenance": provenance})
    new["provenance"] = origin(splits={"MNIST": "c"}, seconds=5)
    assert results.merge(path, new) == {
        "MNIST": 0.9,
        "Emoji": 0.2,
        "provenance": origin(
            checkpoints={"MNIST": "1" * 64, "Emoji": "2" * 64},
            splits={"MNIST": "c", "Emoji": "b"},
            seconds=5,
        ),
    }


def test_merge_keeps_negations_of_versions_that_recorded_no_control_set(tmp_path: Path) -> None:
    path = write(tmp_path / "negations.json", {"Emoji": {"test": 0.2}, "provenance": origin()})
    control = {"name": "Shapes", "threshold": 0.95}
    new = {"MNIST": {"test": 0.1}, "provenance": origin(control=control)}
    assert set(results.merge(path, new)) == {"Emoji", "MNIST", "provenance"}


@pytest.mark.parametrize(
    "change",
    [
        {"theta0_hash": "b" * 64},
        {"seed": 1},
        {"suite": "clip8"},
        {"model": "ViT-B-32"},
        {"config": {"precision": "bf16"}},
        {"control": {"name": "Shapes", "threshold": 0.9}},
        None,
    ],
    ids=lambda change: next(iter(change)) if change else "no provenance",
)
def test_merge_drops_another_run(tmp_path: Path, change: dict[str, Any] | None) -> None:
    old: dict[str, Any] = {"Emoji": 0.2}
    if change is not None:
        old["provenance"] = origin(**change)
    new = {"MNIST": 0.9, "provenance": origin()}
    assert results.merge(write(tmp_path / "ft_accuracies.json", old), new) == new


# --- results that another script has made

MADE_BY = "python src/eval_single_task.py --finetuning-mode=standard"


def test_require_results_reads_those_of_this_run(tmp_path: Path) -> None:
    path, run = tmp_path / "ft_accuracies.json", Run.of(Config())
    message = r"no results at .*ft_accuracies\.json\. Make them with: python src/eval_single_task"
    with pytest.raises(MissingFileError, match=message):
        results.require_results(path, run, THETA0, MADE_BY)
    content = {"MNIST": 0.9, "provenance": origin()}
    write(path, content)
    found = results.require_results(path, run, THETA0, MADE_BY, {"MNIST": "1" * 64})
    assert found == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"MNIST": 0.', "cannot be read as a JSON object of results"),
        ('{"MNIST": "0.9"}', r"has no sound MNIST\."),
        ("{}", r"has no sound MNIST\."),
    ],
)
def test_damaged_results_name_the_command_that_makes_them_again(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "ft_accuracies.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=f"{message}.* Make it again with: {MADE_BY}"):
        results.require_results(path, Run.of(Config()), THETA0, MADE_BY, needed=["MNIST"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta0_hash": "b" * 64}, "theta0_hash is b{12}, expected a{12}"),
        ({"seed": 1}, "seed is 1, expected 0"),
        ({"suite": "clip8"}, "suite is clip8, expected embedded"),
        ({"checkpoints": {"MNIST": "2" * 64}}, "checkpoint of MNIST is 2{12}, expected 1{12}"),
        ({"checkpoints": {}}, "checkpoint of MNIST is None, expected 1{12}"),
        ({"config": {"precision": "bf16"}}, "precision is bf16, expected fp32"),
    ],
)
def test_require_results_refuses_those_of_another_run(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "ft_accuracies.json", {"provenance": origin(**change)})
    expected = rf"is of another run \({message}\)\. Make it again with: {MADE_BY}"
    with pytest.raises(UsageError, match=expected):
        results.require_results(path, Run.of(Config()), THETA0, MADE_BY, {"MNIST": "1" * 64})
