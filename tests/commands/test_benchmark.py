"""Costs are ratios of paired turns, each variant in a process of its own."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

NAMES = ["a", "b", "c"]
Patch = pytest.MonkeyPatch


COMMAND = "tangent_arithmetic.commands.benchmark"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The command, as a module that spawned processes can import too."""
    return importlib.import_module(COMMAND)


def settings(script: ModuleType) -> Any:
    return script.Settings("none", 1, "cpu", "fp32")


# ratios

FOUND = {
    "new": {"time": [1.0, 10.0, 3.0], "memory": [6.0]},
    "old": {"time": [2.0, 30.0, 3.0], "memory": [2.0]},
    "third": {"time": [1.0, 1.0, 4.0], "memory": [1.0]},
}
RATIOS = {
    "old / new": ("time", "old", "new"),
    "memory, new / old": ("memory", "new", "old"),
    "not asked for": ("time", "old", "nobody"),
    "nor this": ("time", "nobody", "old"),
    "not measured": ("forward", "old", "new"),
}


def test_ratios_are_taken_within_rounds(script: ModuleType) -> None:
    summary = script.summarize(FOUND, RATIOS)
    # within rounds 2, 3 and 1; the medians, 3 and 3, would give 1
    assert summary["ratios"]["old / new"] == {"median": 2.0, "least": 1.0, "most": 3.0, "pairs": 3}
    assert summary["ratios"]["memory, new / old"] == {
        "median": 3.0,
        "least": 3.0,
        "most": 3.0,
        "pairs": 1,
    }


def test_ratios_of_what_was_not_measured_are_left_out(script: ModuleType) -> None:
    assert list(script.summarize(FOUND, RATIOS)["ratios"]) == ["old / new", "memory, new / old"]


def test_medians_are_of_each_variant_and_measure(script: ModuleType) -> None:
    assert script.summarize(FOUND, {})["medians"] == {
        "new": {"time": 3.0, "memory": 6.0},
        "old": {"time": 3.0, "memory": 2.0},
        "third": {"time": 1.0, "memory": 1.0},
    }


def test_rounds_that_do_not_pair_are_an_error(script: ModuleType) -> None:
    found = {"new": {"time": [1.0, 2.0]}, "old": {"time": [1.0]}}
    with pytest.raises(ValueError, match=r"shorter|longer"):
        script.summarize(found, {"ratio": ("time", "old", "new")})


def test_the_table_has_each_figure_with_its_unit(script: ModuleType) -> None:
    text = script.table(script.summarize(FOUND, RATIOS))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["new", "time", "3.00 s"] in lines and ["new", "memory", "6.00 GiB"] in lines
    assert ["old / new", "2.000", "1.000 to 3.000", "3"] in lines


@pytest.mark.parametrize("subject", ["step", "sweep", "startup", "data"])
def test_each_ratio_is_of_variants_that_there_are(script: ModuleType, subject: str) -> None:
    comparison = script.COMPARISONS[subject]
    assert comparison.ratios
    for _, above, below in comparison.ratios.values():
        assert {above, below} <= comparison.variants.keys() and above != below


# turns, in real processes


def _serve(pipe: Any, subject: str, variant: str, settings: Any, folder: Path) -> None:
    """Runs in a spawned process: the real server, with turns that write down whose turn it is.

    The clock is one that turns alone move: turn t of the n-th variant takes 10 n + t.
    """
    if variant == "broken":
        os.close(sys.stderr.fileno())  # the trace is no news
        raise SystemExit(1)
    sys.modules["torch"] = ModuleType("torch")  # takes seconds, and a CPU needs nothing of it
    script: Any = importlib.import_module(COMMAND)
    clock = [0.0]
    script.time = SimpleNamespace(perf_counter=lambda: clock[0])

    def build(settings: Any, folder: Path) -> dict[str, Callable[[], None]]:
        log = folder / "log"

        def say(line: str) -> None:
            with log.open("a") as file:
                file.write(f"{line}\n")

        def measure(name: str) -> Callable[[], None]:
            turns: list[int] = []

            def turn() -> None:
                say(f"start {name} {variant} {os.getpid()}")
                clock[0] += 10 * NAMES.index(variant) + len(turns)
                turns.append(1)
                time.sleep(0.01)
                say(f"end {name} {variant} {os.getpid()}")

            return turn

        say(f"build {variant}")
        return {"step": measure("step"), "forward": measure("forward")}

    script.COMPARISONS = {subject: script.Comparison({variant: build}, {})}
    script._serve(pipe, subject, variant, settings, folder)


@pytest.fixture(scope="module")
def measured(
    script: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, dict[str, list[float]]], list[list[str]]]:
    """What four rounds of three variants gave, and what the processes wrote down."""
    folder = tmp_path_factory.mktemp("turns")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "_serve", _serve)
        found = script.measure("step", NAMES, settings(script), 4, folder)
    return found, [line.split() for line in (folder / "log").read_text().splitlines()]


Measured = tuple[dict[str, dict[str, list[float]]], list[list[str]]]


def test_the_first_turn_of_each_is_not_counted(measured: Measured) -> None:
    found, _ = measured
    assert list(found) == NAMES
    for n, name in enumerate(NAMES):
        for what in ("step", "forward"):
            assert found[name][what] == [10 * n + t for t in (1, 2, 3, 4)]


def test_memory_is_measured_once_after_the_steps(measured: Measured) -> None:
    found, _ = measured
    for name in NAMES:
        assert list(found[name]) == ["step", "memory", "forward"]
        (memory,) = found[name]["memory"]
        assert 0.001 < memory < 100  # GiB


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count from the start of main")
def test_memory_is_that_of_the_variant_not_of_who_starts_it(
    script: ModuleType, tmp_path: Path, monkeypatch: Patch
) -> None:
    # on Linux ru_maxrss begins with what the parent held when it started the process, so that
    # small variants all report the parent's memory, and a ratio of 1. VmHWM of /proc/self/status
    # is the process's own. (The command line's parent holds 0.5 GiB: torch, for the versions.)
    monkeypatch.setattr(script, "_serve", _serve)
    held = b"x" * (512 * 2**20)
    found = script.measure("step", ["a"], settings(script), 1, tmp_path)
    assert len(held) / 2**30 == 0.5
    assert found["a"]["memory"][0] < 0.25


def test_each_round_visits_each_variant_once_in_rotating_order(measured: Measured) -> None:
    _, log = measured
    for what in ("step", "forward"):
        order = [line[2] for line in log if line[:2] == ["start", what]]
        rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
        assert len(rounds) == 5
        assert all(sorted(visited) == NAMES for visited in rounds)
        for earlier, later in pairwise(rounds):
            assert later == [*earlier[1:], earlier[0]]


def test_one_works_at_a_time_each_in_a_process_of_its_own(measured: Measured) -> None:
    _, log = measured
    assert log[:3] == [["build", name] for name in NAMES]
    turns = log[3:]
    for start, end in zip(turns[::2], turns[1::2], strict=True):
        assert (start[0], end[0]) == ("start", "end") and start[1:] == end[1:]
    owners = {(variant, process) for _, _, variant, process in turns}
    assert len(owners) == len({process for _, process in owners}) == 3
    assert str(os.getpid()) not in {process for _, process in owners}


def test_all_steps_come_before_all_forward_passes(measured: Measured) -> None:
    _, log = measured
    assert [line[1] for line in log[3:]] == ["step"] * 30 + ["forward"] * 30


def _serve_unlike(pipe: Any, subject: str, variant: str, settings: Any, folder: Path) -> None:
    """Variants with measures of their own; each turn says that it took the variant's number."""
    pipe.send(["time"] if variant in "ab" else ["read", "decode"])
    while (name := pipe.recv()) is not None:
        with (folder / "log").open("a") as file:
            file.write(f"{name} {variant}\n")
        pipe.send(float(NAMES.index(variant)))


def test_variants_may_have_measures_of_their_own(
    script: ModuleType, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(script, "_serve", _serve_unlike)
    found = script.measure("data", NAMES, settings(script), 1, tmp_path)
    assert found == {
        "a": {"time": [0.0]},
        "b": {"time": [1.0]},
        "c": {"read": [2.0], "decode": [2.0]},
    }
    log = (tmp_path / "log").read_text().split("\n")
    assert log[:4] == ["time a", "time b", "time b", "time a"]
    assert log[4:8] == ["read c", "read c", "decode c", "decode c"]


def test_no_process_outlives_the_measurement(
    script: ModuleType, tmp_path: Path, monkeypatch: Patch
) -> None:
    before = set(multiprocessing.active_children())
    monkeypatch.setattr(script, "_serve", _serve)
    with pytest.raises(EOFError):  # a variant that cannot be built ends it, at once
        script.measure("step", ["a", "broken"], settings(script), 1, tmp_path)
    assert set(multiprocessing.active_children()) <= before


# the command


@pytest.fixture
def asked(script: ModuleType, monkeypatch: Patch) -> list[Any]:
    """What `measure` was called with; it answers with figures made by hand."""
    seen: list[Any] = []

    def measure(subject: str, variants: list[str], *rest: Any) -> Any:
        seen.append((subject, variants, *rest))
        figures = {
            "import torch": [1.0, 10.0, 3.0],
            "import tangent_arithmetic.tangent.linearized": [2.0, 30.0, 3.0],
        }
        return {name: {"time": figures[name]} for name in variants if name in figures}

    monkeypatch.setattr(script, "measure", measure)
    return seen


def test_the_file_says_what_was_measured_on_what(
    script: ModuleType, asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tangent_arithmetic.run.results import git_commit, versions

    path = tmp_path / "new" / "startup.json"
    argv = ["startup", "--rounds=3", f"--output={path}", "--batch-size=5", "--model=ViT-Nano-8"]
    assert script.main([*argv, "--precision=bf16"]) == 0
    facts = json.loads(path.read_text())
    assert facts["subject"] == "startup" and facts["rounds"] == 3
    assert facts["model"] == "ViT-Nano-8__init__" and facts["batch_size"] == 5
    assert facts["device"] == "cpu" and facts["precision"] == "bf16"
    assert f"{os.cpu_count()} cores" in facts["machine"]
    assert script.processor() and script.processor() in facts["machine"]
    assert facts["versions"] == versions() and facts["versions"]["torch"]
    assert facts["commit"] == git_commit()
    assert facts["ratios"] == {
        "import tangent_arithmetic.tangent.linearized / import torch": {
            "median": 2.0,
            "least": 1.0,
            "most": 3.0,
            "pairs": 3,
        }
    }
    assert facts["medians"]["import torch"] == {"time": 3.0}
    assert facts["rounds_in_full"]["import tangent_arithmetic.tangent.linearized"] == {
        "time": [2.0, 30.0, 3.0]
    }
    out = capsys.readouterr().out
    assert (
        facts["machine"] in out
        and "import tangent_arithmetic.tangent.linearized / import torch" in out
    )


def test_all_variants_are_measured_unless_some_are_named(
    script: ModuleType, asked: list[Any]
) -> None:
    script.main(["startup"])
    script.main(
        [
            "startup",
            "--variants=import tangent_arithmetic.tangent.linearized,import torch",
            "--rounds=1",
        ]
    )
    (_, everything, _, rounds, _), (subject, named, wanted, one, _) = asked
    assert everything == list(script.COMPARISONS["startup"].variants) and rounds == 5
    assert (
        subject == "startup"
        and named == ["import tangent_arithmetic.tangent.linearized", "import torch"]
        and one == 1
    )
    assert wanted == script.Settings("ViT-B-32__init__", 32, "cpu", "fp32")


def test_a_sweep_has_pictures_and_the_others_none(
    script: ModuleType, asked: list[Any], monkeypatch: Patch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(script, "write_pictures", written.append)
    script.main(["startup"])
    script.main(["step"])
    assert not written
    script.main(["sweep"])
    assert written == [asked[-1][-1] / "data"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["startup", "--variants=import torch,nonsense"], "unknown variants ['nonsense']; choose"),
        (["step", "--variants=import torch"], "unknown variants ['import torch']"),
        (["step", "--variants=linear,"], "unknown variants ['']"),
        (["startup", "--rounds=0"], "--rounds: expected at least 1, got 0"),
        (["startup", "--rounds=-2"], "--rounds: expected at least 1, got -2"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["step", "--precision=fp16"], "invalid choice: 'fp16'"),
        ([], "required: subject"),
        (["startup", "--variants=import torch,import torch"], "import torch"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_measured(
    script: ModuleType,
    asked: list[Any],
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        script.main(argv)
    assert message in capsys.readouterr().err
    assert not asked


def test_the_pictures_are_ones_that_the_reader_of_eurosat_accepts(
    script: ModuleType, tmp_path: Path, monkeypatch: Patch
) -> None:
    from tangent_arithmetic.data.clip8 import CLIP8_SETS

    assert script.NUM_PICTURES >= 10  # the reader wants one a class
    monkeypatch.setattr(script, "NUM_PICTURES", 23)
    monkeypatch.setattr(script, "PICTURE_SIZE", (64, 48))
    script.write_pictures(tmp_path / "data")
    splits = CLIP8_SETS["EuroSAT"](tmp_path / "data")
    assert splits.val is not None
    assert (len(splits.train), len(splits.val), len(splits.test)) == (10, 10, 23)
    assert sorted({splits.test[i][1] for i in range(23)}) == list(range(10))
    image, _ = splits.test[22]
    assert image.size == (64, 48) and image.mode == "RGB"
    assert len({splits.test[i][0].tobytes() for i in range(23)}) == 23


# loading


@pytest.mark.parametrize(
    ("cores", "counts"), [(1, [0, 1]), (2, [0, 1, 2]), (6, [0, 1, 2, 4, 6]), (8, [0, 1, 2, 4, 8])]
)
def test_workers_double_up_to_the_cores(script: ModuleType, cores: int, counts: list[int]) -> None:
    assert script.worker_counts(cores) == counts


LOADED = {
    "0 workers": {"train": 4.0, "val": 2.0},
    "2 workers": {"train": 2.0, "val": 1.0},
    "stages": {
        "read": 0.1,
        "decode": 1.1,
        "train, resize": 3.1,
        "train, all": 3.6,
        "val, resize": 1.3,
        "val, all": 1.8,
    },
}


def test_loading_is_told_in_images_a_second_and_by_stages(script: ModuleType) -> None:
    facts = script.loading(LOADED, 200)
    assert facts["images_per_second"] == {
        "0 workers": {"train": 50.0, "val": 100.0},
        "2 workers": {"train": 100.0, "val": 200.0},
    }
    assert facts["milliseconds"] == {
        "train": {"read": 0.5, "decode": 5.0, "resize": 10.0, "rest": 2.5},
        "val": {"read": 0.5, "decode": 5.0, "resize": 1.0, "rest": 2.5},
    }
    assert facts["bound"] == {"train": "resize", "val": "decode"}
    text = script.loading_table(facts)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["2 workers", "100", "200"] in lines
    assert "train: 18.00 ms per image on one core (read 0.50, decode 5.00, resize 10.00" in text
    assert "bound by resize, 56 % of it" in text and "bound by decode, 56 % of it" in text


def test_without_the_stages_nothing_is_said_of_them(script: ModuleType) -> None:
    facts = script.loading({"0 workers": {"train": 4.0, "val": 2.0}}, 200)
    assert list(facts) == ["images_per_second"]
    assert "bound" not in script.loading_table(facts)


def test_photos_are_jpeg_files_of_their_size(
    script: ModuleType, tmp_path: Path, monkeypatch: Patch
) -> None:
    from PIL import Image

    assert script.NUM_PHOTOS == 1000 and script.PHOTO_SIZE == (500, 375)
    monkeypatch.setattr(script, "NUM_PHOTOS", 12)
    script.write_photos(tmp_path)
    paths = sorted(tmp_path.rglob("*.jpg"))
    assert len(paths) == 12 and len({path.read_bytes() for path in paths}) == 12
    with Image.open(paths[0]) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
    # as large as a photograph: a flat picture would take no time to decode
    assert all(40_000 < path.stat().st_size < 200_000 for path in paths)


def test_the_file_says_what_bounds_loading(
    script: ModuleType, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {name: {k: [v] for k, v in times.items()} for name, times in LOADED.items()}
    seen: list[list[Path]] = []

    def measure(subject: str, variants: Any, options: Any, rounds: int, folder: Path) -> Any:
        seen.append(list((folder / "photos").rglob("*.jpg")))
        return found

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "NUM_PHOTOS", 20)
    monkeypatch.setattr(script, "PHOTO_SIZE", (50, 40))
    path = tmp_path / "data.json"
    assert script.main(["data", f"--output={path}"]) == 0
    facts = json.loads(path.read_text())
    assert len(seen[0]) == 20
    assert (facts["subject"], facts["pictures"], facts["size"]) == ("data", 20, [50, 40])
    assert facts["images_per_second"]["2 workers"] == {"train": 10.0, "val": 20.0}
    assert facts["bound"] == {"train": "resize", "val": "decode"}
    assert facts["medians"]["stages"]["decode"] == 1.1
    assert "bound by resize" in capsys.readouterr().out


# all of it, for real


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_a_small_model(script: ModuleType, tmp_path: Path, precision: str) -> None:
    path = tmp_path / "step.json"
    argv = ["step", "--model=ViT-Nano-8", "--batch-size=2", "--rounds=2", f"--output={path}"]
    assert script.main([*argv, f"--precision={precision}"]) == 0
    facts = json.loads(path.read_text())
    assert list(facts["medians"]) == ["standard", "linear", "plain"]
    assert facts["ratios"].keys() == script.COMPARISONS["step"].ratios.keys()
    for name, ratio in facts["ratios"].items():
        assert 0 < ratio["least"] <= ratio["median"] <= ratio["most"]
        assert ratio["pairs"] == (1 if "memory" in name else 2)


@pytest.mark.slow
def test_a_sweep_of_a_small_model(script: ModuleType, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(script, "NUM_PICTURES", 10)
    monkeypatch.setattr(script, "PICTURE_SIZE", (64, 48))
    path = tmp_path / "sweep.json"
    argv = ["sweep", "--model=ViT-Nano-8", "--batch-size=4", "--rounds=1", f"--output={path}"]
    assert script.main(argv) == 0
    facts = json.loads(path.read_text())
    assert len(facts["medians"]) == 4 and len(facts["ratios"]) == 2


@pytest.mark.slow
def test_startup(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "startup.json"
    assert script.main(["startup", "--rounds=1", f"--output={path}"]) == 0
    facts = json.loads(path.read_text())
    assert all(0.01 < figures["time"] < 300 for figures in facts["medians"].values())
    assert {ratio["pairs"] for ratio in facts["ratios"].values()} == {1}


@pytest.mark.slow
def test_loading_of_a_few_photos(script: ModuleType, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(script, "NUM_PHOTOS", 24)
    path = tmp_path / "data.json"
    argv = ["data", "--model=ViT-Nano-8", "--batch-size=5", "--rounds=1", f"--output={path}"]
    assert script.main([*argv, "--variants=0 workers,1 worker,stages"]) == 0
    facts = json.loads(path.read_text())
    assert list(facts["images_per_second"]) == ["0 workers", "1 worker"]
    assert all(0 < rate < 1e5 for rates in facts["images_per_second"].values()
               for rate in rates.values())  # fmt: skip
    for spent in facts["milliseconds"].values():
        assert list(spent) == ["read", "decode", "resize", "rest"]
        assert 0 < spent["read"] < spent["decode"]
    assert facts["ratios"].keys() == {"train, 0 workers / 1 worker", "val, 0 workers / 1 worker"}
