"""Costs are ratios of paired turns, each variant in a process of its own."""

from __future__ import annotations

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

from tangent_arithmetic.commands import benchmark
from tangent_arithmetic.commands.benchmark import images, main, subjects, summary, turns
from tangent_arithmetic.commands.benchmark.subjects import (
    ENGINE,
    SUBJECTS,
    Settings,
    Subject,
    bounds,
    by_block,
)
from tangent_arithmetic.runtime.errors import UsageError

# anything else is imported in the tests: spawned processes import this module too
NAMES = ["a", "b", "c"]
SETTINGS = Settings("none", 1, "cpu", "fp32")
Patch = pytest.MonkeyPatch


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


# ratios

FIGURES = {
    "new": {"time": [1.0, 10.0, 3.0], "memory": [6.0]},
    "old": {"time": [2.0, 30.0, 3.0], "memory": [2.0]},
    "third": {"time": [1.0, 1.0, 4.0], "memory": [1.0]},
}
RATIOS = {
    "old / new": ("time", "old", "new"),
    "memory, new / old": ("memory", "new", "old"),
    "no such divisor": ("time", "old", "nobody"),
    "no such variant": ("time", "nobody", "old"),
    "not measured": ("forward", "old", "new"),
}


def test_ratios_are_taken_within_rounds_and_unmeasured_ones_left_out() -> None:
    results = summary.summarize(FIGURES, RATIOS)
    # within rounds 2, 3 and 1; the medians, 3 and 3, would give 1
    assert results["ratios"] == {
        "old / new": {"median": 2.0, "least": 1.0, "most": 3.0, "pairs": 3},
        "memory, new / old": {"median": 3.0, "least": 3.0, "most": 3.0, "pairs": 1},
    }
    assert results["medians"] == {
        "new": {"time": 3.0, "memory": 6.0},
        "old": {"time": 3.0, "memory": 2.0},
        "third": {"time": 1.0, "memory": 1.0},
    }
    lines = cells(summary.table(results))
    assert ["new", "time", "3.00 s"] in lines and ["new", "memory", "6.00 GiB"] in lines
    assert ["old / new", "2.000", "1.000 to 3.000", "3"] in lines


def test_rounds_that_do_not_pair_are_an_error() -> None:
    unequal = {"new": {"time": [1.0, 2.0]}, "old": {"time": [1.0]}}
    with pytest.raises(ValueError, match=r"shorter|longer"):
        summary.summarize(unequal, {"ratio": ("time", "old", "new")})


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_each_ratio_compares_existing_variants(subject: Subject) -> None:
    assert subject.ratios
    for _, above, below in subject.ratios.values():
        assert {above, below} <= subject.variants.keys() and above != below


def test_directions_have_their_bound_and_their_blocks() -> None:
    assert bounds(12) == {"whole": 17, "blocks": 53} and bounds(6)["blocks"] == 29
    names = ("stem.w", "a.blocks.0.mlp.1.w", "a.blocks.0.b", "a.blocks.1.w", "head.w")
    split = by_block(dict.fromkeys(names))  # type: ignore[arg-type]
    assert [list(part) for part in split] == [list(names[1:3]), [names[3]]]


# turns, in real processes


def _serve(pipe: Any, subject: str, variant: str, settings: Any, folder: Path) -> None:
    """The real server in a spawned process, with turns that log whose turn it is.

    The clock is one that turns alone move: turn t of the n-th variant takes 10 n + t.
    """
    if variant == "broken":
        os.close(sys.stderr.fileno())  # hides the expected traceback
        raise SystemExit(1)
    sys.modules["torch"] = ModuleType("torch")  # takes seconds, and a CPU needs nothing of it
    clock = [0.0]
    turns.time = SimpleNamespace(perf_counter=lambda: clock[0])  # type: ignore[assignment]

    def build(settings: Any, folder: Path) -> dict[str, Callable[[], None]]:
        log = folder / "log"

        def write(line: str) -> None:
            with log.open("a") as file:
                file.write(f"{line}\n")

        def measure(name: str) -> Callable[[], None]:
            done: list[int] = []

            def turn() -> None:
                write(f"start {name} {variant} {os.getpid()}")
                clock[0] += 10 * NAMES.index(variant) + len(done)
                done.append(1)
                time.sleep(0.01)
                write(f"end {name} {variant} {os.getpid()}")

            return turn

        write(f"build {variant}")
        return {"step": measure("step"), "forward": measure("forward")}

    SUBJECTS[subject] = Subject({variant: build}, {})  # type: ignore[dict-item]
    turns._serve(pipe, subject, variant, settings, folder)


Measured = tuple[dict[str, dict[str, list[float]]], list[list[str]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The figures of four rounds of three variants, and the log of the processes."""
    folder = tmp_path_factory.mktemp("turns")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "_serve", _serve)
        figures = turns.measure("step", NAMES, SETTINGS, 4, folder)
    return figures, [line.split() for line in (folder / "log").read_text().splitlines()]


def test_the_first_turn_is_warm_up_and_memory_is_measured_once(measured: Measured) -> None:
    figures, _ = measured
    assert list(figures) == NAMES
    for n, name in enumerate(NAMES):
        assert list(figures[name]) == ["step", "memory", "forward"]
        (memory,) = figures[name].pop("memory")
        assert 0.001 < memory < 100  # GiB
        assert all(
            values == [10 * n + t for t in (1, 2, 3, 4)] for values in figures[name].values()
        )


def test_each_round_visits_each_variant_once_in_rotating_order(measured: Measured) -> None:
    _, log = measured
    assert [line[1] for line in log[3:]] == ["step"] * 30 + ["forward"] * 30
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
    for start, end in zip(log[3::2], log[4::2], strict=True):
        assert (start[0], end[0]) == ("start", "end") and start[1:] == end[1:]
    owners = {(variant, process) for _, _, variant, process in log[3:]}
    assert len(owners) == len({process for _, process in owners}) == 3
    assert str(os.getpid()) not in {process for _, process in owners}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count from the start of main")
def test_memory_excludes_that_of_the_parent_process(tmp_path: Path, monkeypatch: Patch) -> None:
    # On Linux ru_maxrss starts from the parent's memory at the fork, so that all small variants
    # would report the parent's, a ratio of 1; VmHWM of /proc/self/status is the process's own.
    # The parent of a real measurement holds 0.5 GiB: torch, for the versions.
    monkeypatch.setattr(turns, "_serve", _serve)
    held = b"x" * (512 * 2**20)
    figures = turns.measure("step", ["a"], SETTINGS, 1, tmp_path)
    assert len(held) / 2**30 == 0.5
    assert figures["a"]["memory"][0] < 0.25


def _serve_unlike(pipe: Any, subject: str, variant: str, settings: Any, folder: Path) -> None:
    """Variants with different measures; each turn takes the variant's number of seconds."""
    pipe.send(["time"] if variant in "ab" else ["read", "decode"])
    while (name := pipe.recv()) is not None:
        with (folder / "log").open("a") as file:
            file.write(f"{name} {variant}\n")
        pipe.send(float(NAMES.index(variant)))


def test_variants_may_have_different_measures(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(turns, "_serve", _serve_unlike)
    assert turns.measure("data", NAMES, SETTINGS, 1, tmp_path) == {
        "a": {"time": [0.0]},
        "b": {"time": [1.0]},
        "c": {"read": [2.0], "decode": [2.0]},
    }
    log = (tmp_path / "log").read_text().split("\n")
    assert log[:4] == ["time a", "time b", "time b", "time a"]
    assert log[4:8] == ["read c", "read c", "decode c", "decode c"]


def test_no_process_outlives_the_measurement(tmp_path: Path, monkeypatch: Patch) -> None:
    before = set(multiprocessing.active_children())
    monkeypatch.setattr(turns, "_serve", _serve)
    with pytest.raises(
        UsageError, match="broken: its process has ended"
    ):  # a variant that cannot be built ends it, at once
        turns.measure("step", ["a", "broken"], SETTINGS, 1, tmp_path)
    assert set(multiprocessing.active_children()) <= before


# the command


@pytest.fixture
def calls(monkeypatch: Patch) -> list[Any]:
    """The arguments that `measure` is called with; it answers with invented figures."""
    seen: list[Any] = []

    def measure(subject: str, variants: list[str], *rest: Any) -> Any:
        seen.append((subject, variants, *rest))
        figures = {"import torch": [1.0, 10.0, 3.0], f"import {ENGINE}": [2.0, 30.0, 3.0]}
        return {name: {"time": figures[name]} for name in variants if name in figures}

    monkeypatch.setattr(benchmark, "measure", measure)
    return seen


def test_the_file_records_settings_machine_and_figures(
    calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tangent_arithmetic.run.provenance import git_commit, versions

    path, ratio = tmp_path / "new" / "startup.json", f"import {ENGINE} / import torch"
    argv = ["startup", "--rounds=3", f"--output={path}", "--batch-size=5", "--model=ViT-Nano-8"]
    assert main([*argv, "--precision=bf16"]) == 0
    facts = json.loads(path.read_text())
    expected = {
        "subject": "startup",
        "rounds": 3,
        "model": "ViT-Nano-8",
        "batch_size": 5,
        "device": "cpu",
        "precision": "bf16",
        "versions": versions(),
        "commit": git_commit(),
        "ratios": {ratio: {"median": 2.0, "least": 1.0, "most": 3.0, "pairs": 3}},
    }
    assert {name: facts[name] for name in expected} == expected
    machine = facts["machine"]
    assert f"{os.cpu_count()} cores" in machine and benchmark.processor() in machine
    assert facts["medians"]["import torch"] == {"time": 3.0}
    assert facts["rounds_in_full"][f"import {ENGINE}"] == {"time": [2.0, 30.0, 3.0]}
    out = capsys.readouterr().out
    assert machine in out and ratio in out


def test_all_variants_are_measured_unless_some_are_named(calls: list[Any]) -> None:
    main(["startup"])
    main(["startup", f"--variants=import {ENGINE},import torch", "--rounds=1"])
    main(["step"])
    (_, everything, _, rounds, _), (subject, named, settings, one, _), (_, steps, *_) = calls
    assert everything == list(SUBJECTS["startup"].variants) and rounds == 5
    assert (subject, named, one) == ("startup", [f"import {ENGINE}", "import torch"], 1)
    assert settings == Settings("ViT-B-32", 32, "cpu", "fp32")
    assert set(SUBJECTS["step"].variants) - set(steps) == {"compiled", "compiled jvp"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["startup", "--variants=import torch,nonsense"], "unknown variants ['nonsense']; choose"),
        (["step", "--variants=linear,"], "unknown variants ['']"),
        (["startup", "--rounds=0"], "--rounds: expected at least 1, got 0"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["step", "--precision=fp16"], "invalid choice: 'fp16'"),
        ([], "required: subject"),
        (["startup", "--variants=import torch,import torch"], "names a variant twice"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    calls: list[Any], argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(argv)
    assert message in capsys.readouterr().err
    assert not calls


def test_the_pictures_have_the_layout_of_eurosat(tmp_path: Path, monkeypatch: Patch) -> None:
    from tangent_arithmetic.data.clip8 import CLIP8_SETS

    assert images.NUM_PICTURES >= 10  # the reader expects every class
    monkeypatch.setattr(images, "NUM_PICTURES", 23)
    monkeypatch.setattr(images, "PICTURE_SIZE", (64, 48))
    SUBJECTS["sweep"].prepare(tmp_path)
    splits = CLIP8_SETS["EuroSAT"](tmp_path / "data")
    assert splits.val is not None
    assert (len(splits.train), len(splits.val), len(splits.test)) == (10, 10, 23)
    assert sorted({splits.test[i][1] for i in range(23)}) == list(range(10))
    image, _ = splits.test[22]
    assert image.size == (64, 48) and image.mode == "RGB"
    assert len({splits.test[i][0].tobytes() for i in range(23)}) == 23


def test_photos_are_jpeg_files_of_the_size_of_photographs(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    from PIL import Image

    assert images.NUM_PHOTOS == 1000 and images.PHOTO_SIZE == (500, 375)
    monkeypatch.setattr(images, "NUM_PHOTOS", 12)
    images.write_photos(tmp_path)
    paths = sorted(tmp_path.rglob("*.jpg"))
    assert len(paths) == 12 and len({path.read_bytes() for path in paths}) == 12
    with Image.open(paths[0]) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
    # a flat picture would take no time to decode
    assert all(40_000 < path.stat().st_size < 200_000 for path in paths)


# loading


@pytest.mark.parametrize(
    ("cores", "counts"), [(1, [0, 1]), (2, [0, 1, 2]), (6, [0, 1, 2, 4, 6]), (8, [0, 1, 2, 4, 8])]
)
def test_workers_double_up_to_the_cores(cores: int, counts: list[int]) -> None:
    assert subjects.worker_counts(cores) == counts


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


def test_loading_is_reported_in_images_per_second_and_by_stages() -> None:
    facts = summary.loading(LOADED, 200)
    assert facts["images_per_second"] == {
        "0 workers": {"train": 50.0, "val": 100.0},
        "2 workers": {"train": 100.0, "val": 200.0},
    }
    assert facts["milliseconds"] == {
        "train": {"read": 0.5, "decode": 5.0, "resize": 10.0, "rest": 2.5},
        "val": {"read": 0.5, "decode": 5.0, "resize": 1.0, "rest": 2.5},
    }
    assert facts["bound"] == {"train": "resize", "val": "decode"}
    text = summary.loading_table(facts)
    assert ["2 workers", "100", "200"] in cells(text)
    assert "train: 18.00 ms per image on one core (read 0.50, decode 5.00, resize 10.00" in text
    assert "bound by resize, 56 % of it" in text and "bound by decode, 56 % of it" in text
    without = summary.loading({"0 workers": {"train": 4.0, "val": 2.0}}, 200)
    assert list(without) == ["images_per_second"]
    assert "bound" not in summary.loading_table(without)


def test_the_file_names_the_longest_stage_of_loading(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos: list[Path] = []

    def measure(subject: str, variants: Any, options: Any, rounds: int, folder: Path) -> Any:
        photos.extend((folder / "photos").rglob("*.jpg"))
        return {name: {k: [v] for k, v in times.items()} for name, times in LOADED.items()}

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(images, "NUM_PHOTOS", 20)
    monkeypatch.setattr(images, "PHOTO_SIZE", (50, 40))
    path = tmp_path / "data.json"
    assert main(["data", f"--output={path}"]) == 0
    facts = json.loads(path.read_text())
    assert len(photos) == 20
    assert (facts["subject"], facts["pictures"], facts["size"]) == ("data", 20, [50, 40])
    assert facts["images_per_second"]["2 workers"] == {"train": 10.0, "val": 20.0}
    assert facts["bound"] == {"train": "resize", "val": "decode"}
    assert facts["medians"]["stages"]["decode"] == 1.1
    assert "bound by resize" in capsys.readouterr().out


# the real measurements


def run(subject: str, path: Path, *flags: str) -> Any:
    argv = [subject, "--model=ViT-Nano-8", "--batch-size=4", "--rounds=1", f"--output={path}"]
    assert main([*argv, *flags]) == 0
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_a_small_model(tmp_path: Path, precision: str) -> None:
    facts = run("step", tmp_path / "step.json", "--rounds=2", f"--precision={precision}")
    assert list(facts["medians"]) == ["standard", "linear", "plain", "averaged", "selected"]
    ratios = SUBJECTS["step"].ratios
    assert facts["ratios"].keys() == {name for name in ratios if "compiled" not in name}
    for name, ratio in facts["ratios"].items():
        assert 0 < ratio["least"] <= ratio["median"] <= ratio["most"]
        assert ratio["pairs"] == (1 if "memory" in name else 2)


@pytest.mark.slow
def test_a_compiled_step(tmp_path: Path) -> None:
    facts = run("step", tmp_path / "step.json", "--variants=standard,compiled")
    names = ("step", "forward", "peak memory")
    assert [*facts["ratios"]] == [f"{name}, compiled / standard" for name in names]


@pytest.mark.slow
def test_a_step_with_each_objective(tmp_path: Path) -> None:
    facts = run("objective", tmp_path / "objective.json")
    assert list(facts["medians"]) == ["supervised", "taujp", "tak"]
    assert facts["ratios"].keys() == SUBJECTS["objective"].ratios.keys()
    assert facts["ratios"]["step, taujp / supervised"]["median"] > 1


@pytest.mark.slow
def test_a_sweep_of_a_small_model(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(images, "NUM_PICTURES", 10)
    monkeypatch.setattr(images, "PICTURE_SIZE", (64, 48))
    facts = run("sweep", tmp_path / "sweep.json")
    assert len(facts["medians"]) == 4 and len(facts["ratios"]) == 2


@pytest.mark.slow
def test_startup(tmp_path: Path) -> None:
    facts = run("startup", tmp_path / "startup.json")
    assert all(0.01 < figures["time"] < 300 for figures in facts["medians"].values())
    assert {ratio["pairs"] for ratio in facts["ratios"].values()} == {1}


@pytest.mark.slow
def test_loading_of_a_few_photos(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(images, "NUM_PHOTOS", 24)
    facts = run("data", tmp_path / "data.json", "--variants=0 workers,1 worker,stages")
    assert list(facts["images_per_second"]) == ["0 workers", "1 worker"]
    rates = [rate for rates in facts["images_per_second"].values() for rate in rates.values()]
    assert all(0 < rate < 1e5 for rate in rates)
    for spent in facts["milliseconds"].values():
        assert list(spent) == ["read", "decode", "resize", "rest"]
        assert 0 < spent["read"] < spent["decode"]
    assert facts["ratios"].keys() == {"train, 0 workers / 1 worker", "val, 0 workers / 1 worker"}
