"""Written files never contain the path of the home folder, nor JSON files what JSON lacks."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tangent_arithmetic.analysis import tables
from tangent_arithmetic.artificial_data import report as study
from tangent_arithmetic.commands import analyze, prepare_data
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.report import page as report
from tangent_arithmetic.run import provenance, results, tracking
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import write_summary
from tangent_arithmetic.runtime.atomic import write_json
from tangent_arithmetic.runtime.private import without_home
from tangent_arithmetic.storage.checkpoints import save_tensors
from tests.commands.test_reproduce import script

HOME = "/home/ann"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ann", "~"),
        ("/home/ann/data", "~/data"),
        ("--load=/home/ann/a.pt,/home/ann/b.pt", "--load=~/a.pt,~/b.pt"),
        ("local-dir:/home/ann/clip", "local-dir:~/clip"),
        ("ViT-B-32__pretrained__/home/ann/w.pt", "ViT-B-32__pretrained__~/w.pt"),
        ("no file '/home/ann/x' (see /home/ann)", "no file '~/x' (see ~)"),
        ("see `/home/ann`, or /home/ann. Or", "see `~`, or ~. Or"),
        ("/home/anna/data /home/ann.b /home/ann-2/x", "/home/anna/data /home/ann.b /home/ann-2/x"),
        ("/mnt/home/ann/data", "/mnt/home/ann/data"),
        (Path("/home/ann/data"), "~/data"),
        (["/home/ann/a", ("/home/ann/b",)], ["~/a", ["~/b"]]),
        ({"/home/ann/a": {"load": ["/home/ann/b"]}}, {"~/a": {"load": ["~/b"]}}),
        ({"lr": 0.1, "seed": None, "wandb": False}, {"lr": 0.1, "seed": None, "wandb": False}),
        ("a\udcff", "a\\udcff"),
    ],
)
def test_home_folders_become_a_tilde(
    value: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", HOME)
    assert without_home(value) == expected


@pytest.mark.parametrize("home", ["/", "//", "", "."])
def test_the_root_is_not_abbreviated(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.chdir("/")
    assert without_home("/data/x and ./y") == "/data/x and ./y"


def test_a_linked_home_is_abbreviated_under_both_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk" / "ann").mkdir(parents=True)
    (tmp_path / "ann").symlink_to(tmp_path / "disk" / "ann")
    monkeypatch.setenv("HOME", str(tmp_path / "ann"))
    for home in ("ann", "disk/ann"):
        assert without_home(f"{tmp_path}/{home}/x") == "~/x"


def test_json_files_hold_no_nan(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    value = {"a": [math.nan, {"b": -math.inf}, 0.5], "c": (np.float64("nan"), True, None, "NaN")}
    write_json(tmp_path / "a.json", value)
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert found == {"a": [None, {"b": None}, 0.5], "c": [None, True, None, "NaN"]}
    path = tmp_path / "all.jsonl"
    tracking.append_result(Run.of(Config(results_db=str(path))), {"perplexity": math.inf})
    assert json.loads(path.read_text(), parse_constant=refuse) == {"perplexity": None}


# --- every writer


def write_results(args: Config) -> None:
    facts = provenance.provenance(Run.of(args), 1.0, theta0_hash="a" * 64)
    for mode in ("none", "standard", "linear", "posthoc"):
        path = results.accuracies_path(Run.of(args), mode)
        results.write_merged(path, {"Emoji": 0.5, "provenance": facts}, Run.of(args))
    results.write_results(
        path.with_name("additions.json"), {"test": {}, "provenance": facts}, Run.of(args)
    )


def write_line(args: Config) -> None:
    tracking.append_result(Run.of(args), {"file": Path(args.results) / "x.json", "from": args.load})


def write_table(args: Config) -> None:
    tables.write_table(Run.of(args), "single", pd.DataFrame({"a": [1]}), 1.0)


def write_figure(args: Config) -> None:
    from matplotlib import pyplot

    analyze.show(Run.of(args), "single", lambda table, args: pyplot.figure(), pd.DataFrame())


def write_page(args: Config) -> None:
    path = results.accuracies_path(Run.of(args), "none")
    path.parent.mkdir(parents=True, exist_ok=True)
    origin = {"argv": ["x.py", f"--load={args.save}/a.pt"]}  # as an earlier version wrote it
    path.write_text(json.dumps({"Emoji": 0.5, "provenance": origin}), encoding="utf-8")
    report.write_report(Run.of(args))
    path.unlink()


def write_tables_of_seeds(args: Config) -> None:
    write_results(args)
    write_summary([Run.of(args)])


def write_checkpoint(args: Config) -> None:
    weights = {"w": torch.ones(1)}
    save_tensors(f"{args.save}/a.pt", weights, "image_encoder", info={"from": [args.load]})


def write_head(args: Config) -> None:
    head = ClassificationHead(True, torch.ones(2, 3))
    head.save(f"{args.save}/head.pt", model=f"local-dir:{args.save}/clip")


def write_study(args: Config) -> None:
    frame = pd.DataFrame({"seed": [0]})
    study.write_report(Run.of(args).results, "default", {"training": frame}, 1.0)


def write_preparation(args: Config) -> None:
    flags = [f"--data-location={args.data_location}", "--datasets=MNIST", "--check"]
    assert prepare_data.main([*flags, f"--report={Run.of(args).results / 'data.json'}"]) == 1


def write_ledger(args: Config) -> None:
    reproduce = script("reproduce")
    flags = [f"--save={args.save}", f"--load={','.join(args.load or ())}"]
    stage, ledger = reproduce.stages(Run.of(args), flags)[0], reproduce.Ledger(Run.of(args))
    write_results(args)
    ledger.note(stage)
    assert ledger.is_done(stage)


TABLES = [write_results, write_line, write_table, write_figure, write_page, write_tables_of_seeds]
FILES = [write_checkpoint, write_head, write_study, write_preparation, write_ledger]


@pytest.mark.parametrize("write", [*TABLES, *FILES], ids=lambda write: write.__name__)
def test_no_writer_names_the_home_folder(
    write: Callable[[Config], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "ann"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(sys, "argv", [f"{home}/x.py", f"--load={home}/a,{home}/b", f"{home}"])
    monkeypatch.setattr(study, "draw", lambda *_: None)
    monkeypatch.setattr(study, "readme", lambda *_: "")
    fields = {"save": "run", "results": "results", "results_db": "all.jsonl"}
    fields |= {"data_location": "data", "cache_dir": "cache"}
    paths: dict[str, Any] = {field: f"{home}/{name}" for field, name in fields.items()}
    args = Config(suite="embedded", model="ViT-Nano-8", exp_name=f"of {home}/x", **paths)
    args.load = [f"{home}/a.pt", f"{home}/b.pt"]
    write(args)
    written = [path for path in home.rglob("*") if path.is_file()]
    assert written
    for path in written:
        content = path.read_bytes()
        assert str(home).encode() not in content, path
    assert any(b"~/" in path.read_bytes() for path in written) or write in (write_figure,)


def test_wandb_runs_never_contain_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def init(**options: Any) -> SimpleNamespace:
        seen.update(options)
        return SimpleNamespace(log=None, finish=lambda: None)

    monkeypatch.setenv("HOME", HOME)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    args = Config(wandb=True, load=[f"{HOME}/a.pt"], save=f"{HOME}/run", exp_name=f"{HOME}/x")
    with tracking.tracked(Run.of(args), "job"):
        pass
    assert seen["config"]["load"] == ["~/a.pt"] and seen["name"] == "~/x-job"
    assert HOME not in repr(seen)
