"""Kernel, CKA, ensembles, xi as a number, baselines of negation and seeds, on a small run."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tangent_arithmetic.analysis import (
    analogies,
    baselines,
    cka,
    disentanglement,
    ensembles,
    kernel,
    negation,
    seeds,
    similarity,
    single,
    subsets,
)
from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.analysis.figures import plain
from tangent_arithmetic.analysis.intervals import binomial_error, bootstrap
from tangent_arithmetic.analysis.tables import read_table, table_path, write_table
from tangent_arithmetic.analysis.typeset import latex
from tangent_arithmetic.arithmetic.kernel import Kernel, exact
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.commands import analyze, finetune, paper
from tangent_arithmetic.encoders.linearized import LinearizedEncoder
from tangent_arithmetic.run.args import Config, parse_arguments
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.run.models import split_of, task_vector, zeroshot_encoder
from tangent_arithmetic.run.present import with_checkpoints
from tangent_arithmetic.run.results import arithmetic_path
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import with_seed
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.analysis.conftest import smaller_suite
from tests.arithmetic.tiny import FEATURES, Convolution, pictures
from tests.commands.test_texts import OWN
from tests.small_suite import TASKS, random_vector

NUMBERS = range(1, 41)


def test_use_and_energy_are_those_of_the_kernel_on_the_tasks_images(run: Run) -> None:
    few = run.with_(kernel_images=6, kernel_directions=40)
    table = kernel.table(few, ["standard", "linear"])  # only linear modes have a kernel
    assert set(table["mode"]) == {"linear"} and set(table["task"]) == set(TASKS)
    own = table[table["task"] == "Emoji"]
    assert list(own["function"]) == list(range(1, 13))
    assert own["use"].sum() == pytest.approx(1) and own["eigenvalue"].sum() == pytest.approx(1)
    assert own["eigenvalue"].is_monotonic_decreasing
    both = own["own"].to_numpy() + table[table["task"] == "FashionMNIST"]["own"].to_numpy()
    assert both == pytest.approx(np.ones(12))  # an eigenfunction's energy is on one task or another
    assert 0 < own["error"].iloc[0] < 0.5 and own["shift"].iloc[0] != 0
    shares = kernel.localisation(table).set_index("task")
    assert shares["share"]["Emoji"] == pytest.approx((own["own"] * own["use"]).sum())
    assert list(shares["even"]) == [0.5, 0.5]
    local = plain(kernel.draw, table, few).axes[2]
    assert local.get_xlabel() == "kernel estimated: moved towards an even spread"
    with pytest.raises(UsageError, match="the kernel is that of linear models, got standard"):
        kernel.table(few, ["standard"])


def test_the_kernel_is_exact_where_that_is_affordable(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, images = Convolution().eval(), torch.rand(3, 3, 6, 6)
    true = exact(encoder, images).values
    assert torch.equal(kernel._kernel(run, encoder, images).values, true)
    for directions in (None, 0, 16):
        monkeypatch.setattr(kernel, "AFFORDED", 3 * FEATURES - 1)
        found = kernel._kernel(run.with_(kernel_directions=directions), encoder, images)
        assert (found.error is None) == (directions == 0)


def test_an_exact_kernel_is_computed_once_for_its_images_and_weights(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, counted = zeroshot_encoder(run)[0], []
    images = torch.rand(2, 3, 32, 32)
    values = iter(torch.arange(9.0).double())

    def computed(module: Any, some: Tensor) -> Kernel:
        counted.append(1)
        return Kernel(next(values) * torch.eye(2).double())

    monkeypatch.setattr(kernel, "exact", computed)
    cached = run.with_(cache_dir=str(tmp_path))
    first = kernel._kernel(cached, encoder, images).values
    for seed in (0, 1):
        found = kernel._kernel(cached.with_(seed=seed), encoder, images)
        assert torch.equal(found.values, first) and found.error is None
    assert len(counted) == 1
    others = [(cached, encoder, images + 1), (cached.with_(feature_cache=False), encoder, images)]
    moved = copy.deepcopy(encoder)
    moved.load_weights({name: value + 1 for name, value in encoder.weights().items()})
    for other in (*others, (cached, moved, images)):
        assert not torch.equal(kernel._kernel(*other).values, first)
    assert len(counted) == 4
    for file in tmp_path.rglob("tensor.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    kernel._kernel(cached, encoder, images)
    assert len(counted) == 5 and "is damaged and computed again" in caplog.text


def test_localisation_is_beside_the_tasks_share_of_the_images(own: Run) -> None:
    """Nine of ten images are of the first task: spread evenly, it has nine tenths."""
    table = pd.DataFrame(
        {"mode": "linear", "task": ["A", "A", "B", "B"], "function": [1, 2] * 2,
         "eigenvalue": [0.6, 0.4] * 2, "own": [0.9, 0.9, 0.1, 0.1], "even": [0.9, 0.9, 0.1, 0.1],
         "use": 0.5, "error": 0.0, "shift": 0.0}
    )  # fmt: skip
    found = kernel.localisation(table)
    assert list(found["share"]) == pytest.approx(list(found["even"]))
    assert plain(kernel.draw, table, own).axes[2].get_xlabel() == ""


def test_the_kernel_of_texts_of_several_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_words.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f"{i * 'a'},{i % 2}\n" for i in NUMBERS)
    )
    (tmp_path / "b.csv").write_text("text,label\n" + "".join(f"b{i},{i % 2}\n" for i in NUMBERS))
    words = [
        "--model=python:own_words:build",
        f"--tasks=A={tmp_path / 'a.csv'},B={tmp_path / 'b.csv'}",
    ]
    words += ["--finetuning-mode=linear", "--epochs=1", "--device=cpu", "--num-workers=0"]
    words += [f"--{name}={tmp_path / name}" for name in ("save", "results", "cache-dir")]
    assert finetune.main(words) == 0
    table = kernel.table(
        Run.of(parse_arguments(words)).with_(kernel_images=3, kernel_directions=8), ["linear"]
    )
    assert list(table["function"]) == 2 * [1, 2, 3, 4, 5, 6]
    assert table.groupby("task")["use"].sum().to_numpy() == pytest.approx([1, 1])


@pytest.mark.parametrize("mode", ["standard", "linear"])
def test_cka_compares_features_before_and_after(run: Run, mode: str) -> None:
    table = cka.table(run, [mode]).set_index(["task", "images of"])["cka"]
    assert len(table) == 2 * 3 and table.between(0, 1).all()
    edits = Edits(run.with_(sample=cka.IMAGES), mode, TASKS)
    before, *after = cka.features(edits, "Shapes")
    for task, moved in zip(TASKS, after, strict=True):
        encoder, theta0_hash = zeroshot_encoder(run)
        tau = task_vector(run, task, mode, encoder, theta0_hash)
        (images, _) = next(iter(edits.split("Shapes").batches))
        model = tau.apply_to(encoder)
        with torch.no_grad():
            torch.testing.assert_close(moved[: len(images)], model(images), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(before[: len(images)], encoder(images))


def test_linear_ensembles_are_sums_of_weights_to_1e_6() -> None:
    encoder = Convolution().double().eval()
    linear = LinearizedEncoder(encoder)
    names = linear.theta0()
    vectors = [
        {n: v.double() for n, v in random_vector(names, seed=i).items()} for i in range(3)
    ]  # fmt: skip
    images = torch.from_numpy(pictures(9).images).permute(0, 3, 1, 2).double() / 255
    batches = [(images, torch.arange(9) % FEATURES)]
    split = Split("X", torch.nn.Identity(), batches)
    before = {name: value.clone() for name, value in linear.weights().items()}
    coefs = [1 / 3, 1.0, -2.0]
    for row in ensembles.compare(linear, vectors, split, coefs):
        assert row["gap"] < 1e-6 and row["agreement"] == 1 and row["weights"] == row["ensemble"]
    assert all(torch.equal(value, before[n]) for n, value in linear.weights().items())
    standard = ensembles.compare(encoder, vectors, split, coefs)
    assert all(row["gap"] > 1e-2 for row in standard)


def test_ensembles_are_those_of_the_runs_models(run: Run) -> None:
    table = ensembles.table(run, ["linear", "standard"])
    linear = table[table["mode"] == "linear"]
    assert linear["gap"].max() < 1e-5 and (linear["agreement"] == 1).all()
    assert table[table["mode"] == "standard"]["gap"].min() > linear["gap"].max()
    edits = Edits(run.with_(sample=ensembles.IMAGES), "linear", TASKS)
    row = linear[(linear["task"] == "Emoji") & (linear["coefficient"] == 0.5)].iloc[0]
    assert row["weights"] == pytest.approx(
        edits.accuracies("Emoji", [dict.fromkeys(TASKS, 0.5)])[0]
    )


@pytest.mark.parametrize("mode", ["standard", "linear"])
def test_xi_is_the_mean_error_in_the_frame(run: Run, mode: str) -> None:
    of_pair = run.with_(pairs=["Emoji+FashionMNIST"])
    row = disentanglement.xi(of_pair.with_(grid_points=9), [mode]).iloc[0]
    assert row["points"] == 3 and row["low"] <= row["xi"] <= row["high"]
    edits, pair = Edits(run, mode, TASKS), ("Emoji", "FashionMNIST")
    errors = disentanglement.errors(edits, pair, [0.0, 0.5, 1.0])
    assert row["xi"] == pytest.approx(errors["error"].mean())
    assert disentanglement.xi(of_pair, [mode]).iloc[0]["points"] == disentanglement.FRAME


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(200):
        one, other = (rng.random(80) < 0.3).astype(float), (rng.random(50) < 0.1).astype(float)
        low, high = bootstrap([one, other], seed)
        covered.append(low <= 0.4 <= high)
    assert 0.9 <= np.mean(covered) <= 0.99
    assert bootstrap([np.zeros(5)]) == (0.0, 0.0)
    draws = rng.binomial(200, 0.3, 4000) / 200
    assert binomial_error(0.3, 200) == pytest.approx(draws.std(), rel=0.05)


def test_gradient_ascent_is_a_baseline_and_no_mode_of_other_analyses(
    run: Run, tmp_path: Path
) -> None:
    for name in ("checkpoints", "results"):
        source = run.folder if name == "checkpoints" else Path(run.config.results)
        shutil.copytree(source, tmp_path / name)
    own = run.with_(save=str(tmp_path / "checkpoints"), results=str(tmp_path / "results"))
    words = [f"--save={own.folder}", "--tasks=Emoji,FashionMNIST", "--epochs=2", "--lr=1e-2"]
    words += ["--batch-size=16", "--warmup-length=1", "--device=cpu", f"--cache-dir={run.cache}"]
    assert finetune.main(["--finetuning-mode=standard+ascent", *words]) == 0
    assert "standard+ascent" not in with_checkpoints(own)[0]
    table = baselines.table(own, ["standard"])
    assert list(table["vector"][:5]) == ["task", "random", "others", "ascent", "ascent, whole"]
    encoder, theta0_hash = zeroshot_encoder(own)
    tau = task_vector(own, "Emoji", "standard+ascent", encoder, theta0_hash)
    model, row = tau.apply_to(encoder), table[table["vector"] == "ascent, whole"].iloc[0]
    assert row["target"] == split_of(own, encoder, "Emoji").accuracy(model)["top1"]
    assert row["target"] < row["zeroshot"] and row["coefficient"] == 1
    others = table[(table["vector"] == "others") & (table["task"] == "Emoji")].iloc[0]
    vector = task_vector(own, "FashionMNIST", "standard", encoder, theta0_hash).vector
    expected = split_of(own, encoder, "Emoji").sweep(encoder, vector, [others["coefficient"]])
    assert [others["target"]] == expected
    assert baselines.ascent_of("posthoc") is None and baselines.ascent_of("linear+tak") is not None


def test_seeds_are_summarised_beside_the_error_of_the_images(own: Run) -> None:
    with pytest.raises(MissingFileError, match=r"make them first, such as by .* subsets"):
        seeds.table(own, ["linear"])
    columns = ["mode", "num_vectors", "tasks", "absolute", "normalised"]
    for seed, value in ((0, 0.5), (1, 0.7)):
        one = with_seed(own, seed)
        rows = [("linear", 1, t, value + 0.1 * i, 0.9) for i, t in enumerate(("A", "B"))]
        write_table(one, "subsets", pd.DataFrame(rows, columns=columns), 1.0)
        (one.results / "ft_accuracies.json").write_text(json.dumps({"provenance": {}}))
    table = seeds.table(own, ["linear"])
    row = table[table["value"] == "absolute"].iloc[0]
    assert (row["row"], row["seeds"], row["mean"]) == ("1", 2, pytest.approx(0.65))
    assert row["std"] == pytest.approx(np.std([0.55, 0.75], ddof=1))
    assert row["binomial"] == pytest.approx(binomial_error(0.65, 48))  # 24 test images a task
    assert pd.isna(table[table["value"] == "normalised"].iloc[0]["binomial"])
    every = seeds.of_seeds([with_seed(own, seed) for seed in range(3)], "subsets")
    both = seeds.averaged(seeds.shared(every, "subsets"), "subsets")
    assert list(both.columns)[:5] == columns and list(both["absolute"]) == pytest.approx([0.6, 0.7])
    assert list(both["absolute std"]) == pytest.approx([np.std([0.5, 0.7], ddof=1)] * 2)
    assert table_path(own, "subsets").is_file()
    with pytest.raises(MissingFileError, match="no tables of posthoc to summarise"):
        seeds.table(own, ["posthoc"])


def test_the_localisation_over_seeds_is_the_mean_of_that_of_each(own: Run) -> None:
    """The eigenfunction of rank 1 is that of the task in one seed, of the other's in another."""
    rows = [
        (seed, "linear", "A", rank, 1 / rank, *[float(rank == mine)] * 2, 0.5, 0.0, 0.0)
        for seed, mine in ((0, 1), (1, 2))
        for rank in (1, 2)
    ]
    columns = ["seed", "mode", "task", "function", "eigenvalue", "own", "use", *kernel.OF_VECTORS]
    table = pd.DataFrame(rows, columns=columns)
    shared = seeds.shared(table, "kernel")
    both = seeds.averaged(shared, "kernel")
    assert kernel.localisation(both)["share"].tolist() == [1.0]
    assert kernel.localisation(table[table["seed"] == 1])["share"].tolist() == [1.0]
    assert list(both["used"]) == [0.5, 1.0] and not {"own", "use"} & set(both)
    assert list(both["used std"]) == pytest.approx([0.5**0.5, 0.0])
    _, used, local = plain(kernel.draw, shared, own).axes
    assert list(used.lines[0].get_ydata()) == [50.0, 100.0]
    assert local.patches[0].get_height() == 100
    alone = seeds.shared(table[table["seed"] == 0], "kernel")
    assert list(seeds.averaged(alone, "kernel").columns) == columns[1:]


@pytest.mark.parametrize("several", [False, True])
def test_an_interval_over_images_is_that_of_one_seed(several: bool, own: Run) -> None:
    columns = ["mode", "task1", "task2", "xi", "low", "high", "points", "seed"]
    rows = [("linear", "A", "B", xi, xi - 0.01, xi + 0.02, 6, seed)
            for seed, xi in enumerate((0.1, 0.5)[: 1 + several])]  # fmt: skip
    means = seeds.averaged(seeds.shared(pd.DataFrame(rows, columns=columns), "xi"), "xi")
    assert ("low" in means) == ("high" in means) == (not several)
    assert list(means["xi"]) == pytest.approx([0.3 if several else 0.1])
    axis = plain(disentanglement.draw_xi, means, own).axes[0]
    assert len(axis.collections) == 1  # bars, of the interval or of the spread


def test_tables_of_other_settings_are_left_out(own: Run, caplog: pytest.LogCaptureFixture) -> None:
    row = {"mode": "linear", "num_vectors": 1, "tasks": "A", "absolute": 0.5, "normalised": 0.9}
    changes: dict[int, dict[str, Any]]
    changes = {1: {"subset_sample": 5}, 2: {"n_eval_points": 9}, 3: {"grid_points": 7},
               4: {"tasks": [f"{task}Val" for task in TASKS]}}  # fmt: skip
    runs = [with_seed(own, seed) for seed in range(5)]
    for one in runs:
        made = one.with_(**changes.get(one.seed, {}))
        write_table(made, "subsets", pd.DataFrame([row]), 1.0)
    assert set(seeds.of_seeds(runs, "subsets")["seed"]) == {0, 3, 4}
    for seed, flag in ((1, "subset-sample"), (2, "n-eval-points")):
        told = f"seed {seed} is left out: {table_path(runs[seed], 'subsets')} was made with another"
        assert f"{told} --{flag}, as" in caplog.text
        assert re.search(rf"analyze\.py subsets .*--seed={seed} ", caplog.text)
    again = [one.with_(subset_sample=5) for one in runs]
    assert set(seeds.of_seeds(again, "subsets")["seed"]) == {1}


def test_names_of_tasks_are_read_as_they_are_written(own: Run) -> None:
    names = ["NA", "None", "null", "nan", "2019", "1e3", "-", "A, B"]
    for name in ("analogies", "single", "negation_random"):
        table = pd.DataFrame({"task": names, "chosen": "-", "accuracy": [*[0.5] * 7, np.nan]})
        if name == "analogies":
            table["target"] = names
        else:
            table["target"] = 0.25
        write_table(own, name, table, 1.0)
        pd.testing.assert_frame_equal(read_table(own, name), table, check_dtype=False)


def test_tasks_without_a_single_accuracy_are_not_normalised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in a sum, see `metrics.normalized`."""
    coefs = [0.5, 1.0]

    class Model:
        def accuracies(self, name: str, points: list[dict[str, float]]) -> list[float]:
            scale = 0.0 if name.startswith("Zero") else 0.8
            return [scale * (1 - 0.1 * len(point)) * max(point.values(), default=0)
                    for point in points]  # fmt: skip

    model: Any = Model()
    singles = {"Good": 0.8, "GoodVal": 0.8, "Zero": 0.0, "ZeroVal": 0.0}
    tasks = ["Good", "Zero"]
    rows = subsets.evaluate(model, subsets.subsets(tasks), tasks, singles, coefs)
    assert [row["coefficient"] for row in rows] == [1.0] * 3
    assert [row["normalised"] for row in rows] == pytest.approx([0.9, 0.9, 0.8])
    assert [row["own_normalised"] for row in rows] == pytest.approx([0.9, np.nan, 0.8], nan_ok=True)
    assert "fine-tuned accuracy is 0: Zero" in caplog.text
    analogy = analogies.Analogy(c="Good", b="Zero", a="Other", d="Target")
    table = pd.DataFrame(analogies.evaluate(model, analogy, coefs))
    assert set(table[table["chosen"] == "without target"]["coefficient"]) == {1.0}
    with pytest.raises(UsageError, match=r"single-task accuracies on ZeroVal are 0.*fine-tune ag"):
        subsets.evaluate(model, [("Zero",)], ["Zero"], singles, coefs)
    with pytest.raises(UsageError, match="single-task accuracies on Zero, ZeroToo are 0"):
        analogies.evaluate(model, analogies.Analogy("Zero", "ZeroToo", "Other", "Target"), coefs)


def test_a_subset_keeps_its_own_tasks_at_its_own_coefficient() -> None:
    """A vector that hurts the other task more than it helps its own is best left out for all."""

    class Model:
        def accuracies(self, name: str, points: list[dict[str, float]]) -> list[float]:
            own = name.removesuffix("Val")
            return [
                0.5 + sum(0.4 * c if task == own else -0.5 * c for task, c in point.items())
                for point in points
            ]

    model: Any = Model()
    singles = dict.fromkeys(["A", "AVal", "B", "BVal"], 0.9)
    rows = subsets.evaluate(model, [("A",), ("A", "B")], ["A", "B"], singles, [0.0, 0.5, 1.0])
    assert [row["coefficient"] for row in rows] == [0.0, 0.0]
    assert [row["own_coefficient"] for row in rows] == [1.0, 0.0]
    assert [row["own_normalised"] for row in rows] == pytest.approx([1.0, 0.5 / 0.9])
    assert rows[0]["own_absolute"] == pytest.approx(0.9)
    assert rows[0]["normalised"] == pytest.approx(0.5 / 0.9)


def test_every_seed_has_the_same_sample_of_subsets(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []

    def evaluated(*args: Any) -> list[Any]:
        chosen.append(args[1])
        return []

    monkeypatch.setattr(subsets, "Edits", lambda *_: type("E", (), {"theta0_hash": "", "split": 0}))
    monkeypatch.setattr(subsets, "evaluate", evaluated)
    for name, value in (("checkpoint_hashes", {}), ("require_results", {}), ("smallest", 9)):
        monkeypatch.setattr(subsets, name, lambda *_, found=value: found)
    eight = run.with_(tasks=None)
    for seed in (0, 1):
        subsets.table(eight.with_(seed=seed), ["standard"])
    assert chosen[0] == chosen[1] and len(chosen[0]) < 255


def test_what_not_every_seed_has_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = [(0, "linear", 3, "A+B+C", 0.5), (1, "linear", 3, "A+B+C", 0.7),
            (0, "linear", 3, "A+B+D", 0.1), (1, "linear", 3, "B+C+D", 0.2)]  # fmt: skip
    columns = ["seed", "mode", "num_vectors", "tasks", "absolute"]
    table = pd.DataFrame(rows, columns=columns)
    both = seeds.averaged(seeds.shared(table, "subsets"), "subsets")
    assert list(both["tasks"]) == ["A+B+C"] and both["absolute"][0] == pytest.approx(0.6)
    assert both["absolute std"].notna().all()
    assert "subsets: not every seed has 2 of 4 rows, left out of the means" in caplog.text
    with pytest.raises(UsageError, match="of 2 seeds have no row in common"):
        seeds.shared(table[2:], "subsets")
    single = pd.DataFrame({"seed": [0, 1], "task": "A", "linear": [0.5, 0.7]})
    single["linear+taujp"] = [0.9, np.nan]
    means = seeds.averaged(seeds.shared(single, "single"), "single")
    assert list(means.columns)[:2] == ["task", "linear"]
    assert means["linear"][0] == pytest.approx(0.6) and "linear+taujp" not in means
    assert "single: not every seed has linear+taujp, left out" in caplog.text


def test_a_mean_average_precision_has_no_binomial_error(
    own: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = seeds.binomial(own, 0.5, TASKS)
    assert error == binomial_error(0.5, seeds.images(own, TASKS))
    monkeypatch.setattr(seeds, "labels_of", lambda _: np.zeros((24, 3), np.uint8))
    assert seeds.binomial(own, 0.5, TASKS) is None


def test_sizes_of_subsets_are_drawn_in_order(run: Run) -> None:
    rows = [("subsets", "standard", size, "absolute", 0.5, 0.1, 3, 0.01) for size in "128"]
    rows += [("subsets", "linear", size, "absolute", 0.6, 0.1, 3, 0.01) for size in "12345678"]
    columns = ["table", "mode", "row", "value", "mean", "std", "seeds", "binomial"]
    axis = plain(seeds.draw, pd.DataFrame(rows, columns=columns), run).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == list("12345678")
    assert [list(line.get_xdata()) for line in axis.lines[:1]] == [[0, 1, 7]]
    xi = pd.DataFrame([("xi", "linear", "A, B", "xi", 0.2, 0.1, 3, None)], columns=columns)
    (axis,) = plain(seeds.draw, xi, run).axes
    assert axis.get_ylabel() == "disentanglement error" and axis.lines[0].get_ydata()[0] == 0.2


SPREAD = {  # of each table: a function that draws it, and rows
    "single": (single.draw, {"task": ["A", "B"], "classes": 9, "zeroshot": 0.4, "standard": 0.8,
                             "linear": 0.7, "advantage_linear": 0.1}),
    "xi": (disentanglement.draw_xi, {"mode": ["linear"], "task1": "A", "task2": "B", "xi": 0.2}),
    "analogies": (analogies.draw, {"mode": "linear", "target": "D", "chosen": ["-", "-"],
                                   "vector": ["zero-shot", "target"], "accuracy": 0.5}),
    "analogies_few": (analogies.draw_few, {"target": "D", "shots": [0, 1], "accuracy": 0.5,
                                           "start": ["pre-trained model", "analogy"]}),
}  # fmt: skip
AVERAGED = {  # the same of figures of means over the tasks: rows of two, and a column of values
    "negation_random": (baselines.draw, {"mode": "linear", "vector": "task", "task": ["A", "B"],
                                         "target": 0.3, "control": 0.6, "zeroshot": 0.5,
                                         "zeroshot_control": 0.7}, "target"),
    "subsets": (subsets.draw, {"mode": "linear", "num_vectors": 1, "tasks": ["A", "B"],
                               "absolute": 0.5, "normalised": 0.8}, "absolute"),
    "ensembles": (ensembles.draw, {"mode": "linear", "task": ["A", "B"], "coefficient": 0.5,
                                   "weights": 0.5, "ensemble": 0.6, "gap": 0.1}, "weights"),
    "kernel": (kernel.draw, {"mode": "linear", "task": ["A", "B"], "function": 1,
                             "eigenvalue": 0.6, "used": 0.5, "local": 0.4, "even": 0.5,
                             "shift": 0.0, "error": 0.0}, "used"),
}  # fmt: skip


def _strokes(figure: Any) -> int:
    """Bars and bands of the figure's axes."""
    return sum(len(axis.collections) for axis in figure.axes)


@pytest.mark.parametrize("name", SPREAD)
def test_figures_have_the_spread_over_seeds(name: str, own: Run) -> None:
    draw, columns = SPREAD[name]
    table = pd.DataFrame(columns)
    floats = table.select_dtypes("float")
    several = table.join(pd.DataFrame(0.05, floats.index, [f"{c} std" for c in floats]))
    assert _strokes(plain(draw, several, own)) > _strokes(plain(draw, table, own))


def _heights(figure: Any) -> list[float]:
    """Of the bars and bands of the figure's axes, those that are not 0."""
    paths = [p for axis in figure.axes for one in axis.collections for p in one.get_paths()]
    heights = [float(np.ptp(path.vertices[:, 1])) for path in paths if len(path.vertices)]
    return [height for height in heights if height > 1e-6]


@pytest.mark.parametrize("name", AVERAGED)
def test_the_spread_of_a_mean_is_not_that_of_its_tasks(name: str, own: Run) -> None:
    """Seeds in which one task gains what the other loses have the same mean."""
    assert set(AVERAGED) == set(paper.AVERAGED)
    draw, columns, value = AVERAGED[name]
    one = pd.DataFrame(columns).assign(seed=0)
    one[value] += [0.1, -0.1]
    same, higher = one.assign(seed=1), one.assign(seed=1)
    same[value] -= [0.2, -0.2]
    higher[value] += 0.05
    spread = 100 * np.std([0, 0.05], ddof=1)
    for other, expected in ((same, []), (higher, [2 * spread])):
        table = seeds.shared(pd.concat([one, other], ignore_index=True), name)
        figure = plain(draw, table, own)
        found = [h for h in _heights(figure) if h != pytest.approx(20)]  # of the tasks
        assert found == pytest.approx(expected)


def test_heat_maps_state_the_largest_spread_over_seeds(own: Run) -> None:
    rows = [("linear", 2, "A+B", 0.9, 0.01, 1.0), ("linear", 2, "B+C", 0.8, 0.03, 1.0)]
    columns = ["mode", "num_vectors", "tasks", "own_normalised", "own_normalised std"]
    table = pd.DataFrame(rows, columns=[*columns, "own_coefficient"])
    *_, bar = plain(subsets.draw_pairs, table, own).axes
    assert bar.get_ylabel().endswith("standard deviation over seeds: at most 0.03")


def test_the_cosine_with_a_vector_of_zero_is_not_defined(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    taus = {("linear", "A"): {"w": torch.ones(2)}, ("linear", "B"): {"w": torch.zeros(2)}}
    monkeypatch.setattr(similarity, "_vectors", lambda *_: taus)
    found = similarity.table(run)["cosine"].to_numpy()
    np.testing.assert_allclose(found, [1.0, np.nan, np.nan, np.nan])
    shares = similarity.layers(run)
    np.testing.assert_allclose(shares["share"], [1.0, np.nan])
    assert "linear & B & w & - & 0" in latex(shares)


def test_the_error_of_the_images_is_of_those_that_an_accuracy_is_of(own: Run) -> None:
    """Bounds that of two tasks of different sizes, whatever each one's accuracy."""
    run = own.with_(sample=20, control_dataset="MNIST")
    assert [seeds.images(run, names) for names in (TASKS, ["Emoji"], ["MNIST"])] == [40, 20, 20]
    few, many = len(own.data.dataset("Emoji").test), len(own.data.dataset("MNIST").test)
    assert few < many and seeds.images(own, ["Emoji", "MNIST"]) == 2 * few
    p, q = 0.7, 0.2
    exact = np.sqrt(p * (1 - p) / few + q * (1 - q) / many) / 2
    assert exact < binomial_error((p + q) / 2, 2 * few) < np.sqrt(2) * 0.5 / np.sqrt(2 * few)
    rows = [("linear", "random", task, 0.5, 0.5) for task in TASKS]
    table = pd.DataFrame(rows, columns=["mode", "vector", "task", "target", "control"])
    what = seeds.SUMMED["negation_random"]
    found = seeds.summed(own, table.assign(seed=0), what).set_index("value")["binomial"]
    control = len(own.data.dataset("Shapes").test)
    assert found["target"] == binomial_error(0.5, 2 * few)
    assert found["control"] == binomial_error(0.5, control)


def test_ensembles_have_the_error_of_the_images_that_they_are_of(tmp_path: Path) -> None:
    run = Run.of(Config(tasks=["MNIST", "Letters"], results=str(tmp_path)))
    row = {"mode": "linear", "coefficient": 0.5, "weights": 1.0, "ensemble": 0.0}
    table = pd.DataFrame([{**row, "task": task, "agreement": 0.5, "gap": 1e-7} for task in "AB"])
    write_table(run, "ensembles", table, 1.0)
    found = seeds.table(run, ["linear"]).set_index("value")["binomial"]
    assert found["weights"] == found["ensemble"] == pytest.approx(1 / (2 * (2 * 128 + 1)))
    assert pd.isna(found["gap"])


def test_captions_name_the_seeds_and_the_images_of_a_table(own: Run) -> None:
    table = pd.DataFrame({"coefficient": [0.0, 0.0], "seed": [2, 0]})
    assert seeds.seeds_of(own, table) == "seeds 0, 2"
    assert seeds.seeds_of(own, table[:1]) == "seed 2"
    assert seeds.seeds_of(own, table[["coefficient"]]) == "seed 0"
    assert seeds.seeds_of(own, pd.DataFrame({"seeds": [2, 3]})) == "3 seeds"
    run = own.with_(sample=100, kernel_images=32)
    told = {name: seeds.examples(run, name) for name in ("single", "kernel", "ensembles", "cka")}
    assert told == {
        "single": ", 100 examples of each split",
        "kernel": ", at most 32 examples of each split",
        "ensembles": ", at most 100 examples of each split",
        "cka": ", at most 100 examples of each split",
    }
    assert seeds.examples(own, "ensembles") == ", at most 128 examples of each split"
    assert seeds.examples(own, "single") == ""
    rows = {"mode": "linear", "task": "A", "coefficient": [0.0, 1.0] * 2, "seed": [0, 0, 1, 1]}
    swept = pd.DataFrame({**rows, "target": 0.5, "control": 0.6})
    analyze.show(run, "negation", negation.draw_curves, swept)
    drawn = (run.results / "figures" / f"{table_path(run, 'negation').stem}.svg").read_text("utf-8")
    assert "suite embedded, seeds 0, 1, 100 examples of each split" in drawn


def test_targets_of_analogies_are_averaged_within_a_seed(own: Run) -> None:
    values = {("Emoji", 0): 0.4, ("Emoji", 1): 0.6, ("FashionMNIST", 0): 0.6,
              ("FashionMNIST", 1): 0.4}  # fmt: skip
    rows = [("linear", target, "c", "with target", value, seed)
            for (target, seed), value in values.items()]  # fmt: skip
    columns = ["mode", "target", "vector", "chosen", "accuracy", "seed"]
    table, name = pd.DataFrame(rows, columns=columns), "analogies (mean)"
    (row,) = seeds.summed(own, table, seeds.SUMMED[name]).to_dict("records")
    assert (row["row"], row["mean"]) == ("c, with target", 0.5)
    assert row["std"] == pytest.approx(0)  # each target's own is 0.14
    assert row["binomial"] == binomial_error(0.5, 48)


def _measured(run: Run) -> pd.DataFrame:
    """The numbers of kernel, CKA and ensembles, on few images."""
    few = run.with_(kernel_images=5, kernel_directions=16, sample=5)
    parts = [one.table(few, ["linear", "standard"]) for one in (kernel, cka, ensembles)]
    return pd.concat(parts).select_dtypes("number").fillna(0)


def _in_two_processes(folder: Path, run: Run) -> None:
    with smaller_suite():
        _measured(run).to_csv(folder / f"rank{ddp.rank()}.csv", index=False)


@pytest.mark.slow
def test_two_processes_measure_the_images_of_both(run: Run, tmp_path: Path) -> None:
    config = replace(run.config, world_size=2, port=12433)
    start(functools.partial(_in_two_processes, tmp_path), config)
    for rank in (0, 1):
        found = pd.read_csv(tmp_path / f"rank{rank}.csv").to_numpy()
        np.testing.assert_allclose(found, _measured(run).to_numpy(), rtol=2e-3, atol=1e-5)


def test_a_seed_of_other_tasks_does_not_stop_the_control_curve(
    own: Run, caplog: pytest.LogCaptureFixture
) -> None:
    other = with_seed(own, 1)
    shutil.copytree(own.results, other.results)
    path = arithmetic_path(other, "linear", "negations")
    fewer = json.loads(path.read_text())
    del fewer["Emoji"]
    path.write_text(json.dumps(fewer))
    assert set(negation.curves(own, ["linear"])["seed"]) == {0}
    assert "linear: seed 1 is left out: " in caplog.text and "has no sound Emoji" in caplog.text


def test_the_control_curve_has_all_seeds(own: Run, caplog: pytest.LogCaptureFixture) -> None:
    other = with_seed(own, 1)
    shutil.copytree(own.results, other.results)
    table = negation.curves(own, ["linear"])
    assert set(table["seed"]) == {0, 1} and len(table) == 12
    shifted = table.assign(target=table["target"] + 0.1 * table["seed"])
    (band,) = plain(negation.draw_curves, shifted, own).axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    means = 100 * shifted.groupby("coefficient")["target"].mean()
    spread = 100 * np.std([0.0, 0.1], ddof=1)
    assert heights.max() == pytest.approx(means.max() + spread)
    path = arithmetic_path(other, "linear", "negations")
    fewer = json.loads(path.read_text())
    for task in TASKS:
        del fewer[task]["val"]["0.5"]
    path.write_text(json.dumps(fewer))
    assert set(negation.curves(own, ["linear"])["seed"]) == {0}
    assert "2 coefficients of Emoji, expected 3" in caplog.text


def test_pairs_are_drawn_by_their_own_accuracy(run: Run) -> None:
    rows = [("linear", 1, "A", 0.3), ("linear", 2, "A+B", 0.9), ("linear", 2, "B+C", 0.8)]
    earlier = pd.DataFrame(rows, columns=["mode", "num_vectors", "tasks", "own_normalised"])
    with pytest.raises(UsageError, match=r"of an earlier version.* at the coefficient for all"):
        subsets.draw_pairs(earlier, run)
    table = earlier.assign(own_coefficient=1.0)
    (image,) = plain(subsets.draw_pairs, table, run).axes[0].images
    square = pd.DataFrame(image.get_array().filled(np.nan))
    assert square.loc[0, 1] == square.loc[1, 0] == 0.9 and square.loc[1, 2] == 0.8
    assert square.isna().to_numpy().sum() == 5  # the diagonal, and A with C
