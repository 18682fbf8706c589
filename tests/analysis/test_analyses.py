"""The analyses on a small run, against what the evaluation scripts and plain loops find."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from src.eval import eval_single_dataset
from tangent_arithmetic.analysis import (
    analogies,
    disentanglement,
    negation,
    similarity,
    single,
    subsets,
)
from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.analysis.fewshot import chosen_indices, few_shot
from tangent_arithmetic.analysis.tables import table_path
from tangent_arithmetic.commands import analyze
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.models import finetuned_encoder, split_of, task_vector, zeroshot_encoder
from tangent_arithmetic.run.modes import edited
from tangent_arithmetic.run.results import arithmetic_path, load_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.small_suite import TASKS

MODES = ("standard", "posthoc", "linear")


def changed(args: Config, **changes: Any) -> Config:
    found = copy.copy(args)
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_no_file_of_a_run_names_the_home_folder(made: Config) -> None:
    assert made.save is not None
    home = Path(made.save).parent
    written = [path for path in home.rglob("*") if path.is_file()]
    assert {".safetensors", ".json", ".html", ".jsonl"} <= {path.suffix for path in written}
    for path in written:
        assert str(home).encode() not in path.read_bytes(), path


# --- edits


@pytest.mark.parametrize("mode", MODES)
def test_one_vector_is_what_the_sweep_finds(run: Config, mode: str) -> None:
    edits = Edits(Run.of(run), mode, TASKS)
    coefs = [-0.5, 0.0, 0.3, 1.0]
    for task in TASKS:
        tau = task_vector(Run.of(run), task, mode, edits.encoder, edits.theta0_hash)
        expected = split_of(Run.of(run), edits.base, "Emoji").sweep(edits.base, tau.vector, coefs)
        assert edits.accuracies("Emoji", [{task: c} for c in coefs]) == expected


@pytest.mark.parametrize("mode", MODES)
def test_several_vectors_are_the_model_at_their_sum(run: Config, mode: str) -> None:
    edits = Edits(Run.of(run), mode, TASKS)
    point = {"Emoji": 0.4, "FashionMNIST": -0.7}
    encoder, theta0_hash = zeroshot_encoder(Run.of(run))
    one, other = (task_vector(Run.of(run), t, mode, encoder, theta0_hash) for t in TASKS)
    total = 0.4 * one + (-0.7) * other
    model = (total.apply_to_linear if mode == "posthoc" else total.apply_to)(encoder)
    for dataset in ("Emoji", "FashionMNISTVal"):
        expected = eval_single_dataset(model, dataset, run)["top1"]
        assert edits.accuracies(dataset, [{}, point, {}])[1] == expected


def test_the_pretrained_weights_are_untouched(run: Config) -> None:
    edits = Edits(Run.of(run), "standard", TASKS)
    before = {name: value.clone() for name, value in edits.base.weights().items()}
    edits.accuracies("EmojiVal", [{"Emoji": 1.0}, {"FashionMNIST": 2.0}])
    assert all(torch.equal(value, before[n]) for n, value in edits.base.weights().items())


def test_a_vector_that_is_not_there_is_named(run: Config) -> None:
    with pytest.raises(KeyError, match=r"no vectors \['Emojo'\]; there are \['Emoji'\]"):
        Edits(Run.of(run), "linear", ["Emoji"]).predictions("Emoji", [{"Emojo": 1.0}])


# --- disentanglement


@pytest.mark.parametrize("mode", MODES)
def test_disentanglement_is_its_definition(run: Config, mode: str) -> None:
    args = changed(run, pairs=["Emoji+FashionMNIST"], grid_points=3)
    found = disentanglement.table(Run.of(args), [mode]).set_index(["coef1", "coef2"])
    assert sorted(found.index) == [(a, b) for a in (-2.0, 0.0, 2.0) for b in (-2.0, 0.0, 2.0)]
    edits = Edits(Run.of(run), mode, TASKS)
    for a, b in ((-2.0, 2.0), (2.0, -2.0), (0.0, 2.0)):
        expected = []
        for task, alone in zip(TASKS, ({"Emoji": a}, {"FashionMNIST": b}), strict=True):
            (joint,), _ = edits.predictions(task, [{"Emoji": a, "FashionMNIST": b}])
            (own,), _ = edits.predictions(task, [alone])
            expected.append(float((joint != own).double().mean()))
        row = found.loc[(a, b)]
        assert [row["error1"], row["error2"]] == pytest.approx(expected, abs=1e-12)
        assert row["error"] == row["error1"] + row["error2"]
    for a in (-2.0, 2.0):  # where the other vector is not added, nothing changes
        assert found.loc[(a, 0.0)]["error1"] == 0 == found.loc[(0.0, a)]["error2"]
    assert found.loc[(0.0, 0.0)]["error"] == 0 < found["error"].max()


@pytest.mark.parametrize("text", ["Emoji", "Emoji+Emoji", "Emoji+Signz"])
def test_pairs_that_are_none_are_refused(run: Config, text: str) -> None:
    with pytest.raises(UsageError, match=r"expected --pairs of two tasks|unknown data set"):
        disentanglement.pairs_of(Run.of(changed(run, pairs=[text])))


def test_the_pairs_of_a_suite_are_its_first_tasks() -> None:
    assert disentanglement.pairs_of(Run.of(Config())) == [
        ("Emoji", "FashionMNIST"), ("LandCover", "Letters"), ("MNIST", "Signs")
    ]  # fmt: skip


# --- subsets


def test_all_subsets_and_a_sample() -> None:
    tasks = list("abcdefgh")
    every = subsets.subsets(tasks)
    assert len(every) == 255 == len(set(every)) and every[-1] == tuple(tasks)
    sampled = subsets.subsets(tasks, 2, seed=1)
    sizes = [len(s) for s in sampled]
    assert [sizes.count(k) for k in range(1, 9)] == [8, 28, 2, 2, 2, 2, 2, 1]
    assert set(sampled) <= set(every) and sampled == subsets.subsets(tasks, 2, seed=1)
    assert sampled != subsets.subsets(tasks, 2, seed=2)


def test_subsets_of_all_are_the_sum_that_addition_finds(run: Config) -> None:
    found = subsets.table(Run.of(run), edited())
    assert len(found) == 9 and set(found["num_vectors"]) == {1, 2}
    for mode in ("posthoc", "linear"):  # the standard one looks at other coefficients
        addition = load_results(arithmetic_path(Run.of(run), mode, "additions"))
        row = found[(found["mode"] == mode) & (found["num_vectors"] == 2)].iloc[0]
        assert row["coefficient"] == addition["coefficient"]
        assert row["absolute"] == pytest.approx(addition["test"]["avg_top1"], abs=1e-12)
        assert row["normalised"] == pytest.approx(addition["test"]["avg_normalized_top1"])
        assert row["own_absolute"] == row["absolute"]


# --- the rest


def test_single_tasks_are_those_of_the_results(run: Config) -> None:
    found = single.table(Run.of(run)).set_index("task")
    encoder, theta0_hash = zeroshot_encoder(Run.of(run))
    tuned = finetuned_encoder(Run.of(run), "Emoji", "posthoc", encoder, theta0_hash)
    assert found.loc["Emoji", "posthoc"] == eval_single_dataset(tuned, "Emoji", run)["top1"]
    row = found.loc["Emoji"]
    gap = (row["standard"] - row["linear"]) / (1 - 1 / 9)
    assert row["advantage_linear"] == pytest.approx(gap)


def test_cosines_norms_and_layers(run: Config) -> None:
    found = similarity.table(Run.of(run)).set_index(["mode1", "task1", "mode2", "task2"])
    encoder, theta0_hash = zeroshot_encoder(Run.of(run))
    one, other = (task_vector(Run.of(run), t, "linear", encoder, theta0_hash) for t in TASKS)
    row = found.loc[("linear", "Emoji", "linear", "FashionMNIST")]
    assert row["cosine"] == pytest.approx(float(one.cosine_similarity(other)), abs=1e-6)
    norm = sum(float(v.double().square().sum()) for v in one.vector.values()) ** 0.5
    assert row["norm1"] == pytest.approx(norm)
    shares = similarity.layers(Run.of(run))
    assert len(shares["layer"].unique()) == 10
    assert np.allclose(shares.groupby(["mode", "task"])["share"].sum(), 1.0)
    linear = shares[(shares["mode"] == "linear") & (shares["task"] == "Emoji")]
    assert np.hypot.reduce(linear["norm"]) == pytest.approx(norm)


def test_random_vectors_have_the_norms_of_the_task_vector() -> None:
    tau = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(2.0), "c": torch.zeros(3)}
    noise = negation.random_like(tau, 0, "MNIST")
    assert noise.keys() == tau.keys()
    for name, value in tau.items():
        assert noise[name].shape == value.shape and noise[name].dtype == torch.float32
        assert float(noise[name].norm()) == pytest.approx(float(value.norm()), rel=1e-5)
    again = negation.random_like(tau, 0, "MNIST")
    assert all(torch.equal(noise[name], again[name]) for name in tau)
    for seed, task in ((1, "MNIST"), (0, "Signs")):
        assert not torch.equal(negation.random_like(tau, seed, task)["a"], noise["a"])


def test_negation_against_random_vectors(run: Config) -> None:
    found = negation.against_random(Run.of(run), ["linear"])
    assert list(found["vector"]) == ["task", "random"] * 2
    known = load_results(arithmetic_path(Run.of(run), "linear", "negations"))["Emoji"]
    row = found.iloc[0]
    assert (row["target"], row["control"]) == (known["test"], known["test_control"])
    curve = negation.curves(Run.of(run), ["linear"])
    assert len(curve) == 6 and set(curve["coefficient"]) == {0.0, 0.5, 1.0}


def test_analogies_are_evaluated_at_their_vectors(run: Config) -> None:
    args = changed(run, analogies=["Emoji+FashionMNIST-Emoji=FashionMNIST"])  # c + b - c = b
    found = analogies.table(Run.of(args), ["linear"]).set_index(["vector", "chosen"])
    edits = Edits(Run.of(run), "linear", TASKS)
    zero, target = edits.accuracies("FashionMNIST", [{}, {"FashionMNIST": 1.0}])
    assert found.loc[("zero-shot", "-"), "accuracy"] == zero
    assert found.loc[("target", "-"), "accuracy"] == target
    for chosen in ("without target", "with target"):
        row = found.loc[("c + b", chosen)]
        coef = row["coefficient"]
        (accuracy,) = edits.accuracies("FashionMNIST", [{"Emoji": coef, "FashionMNIST": coef}])
        assert row["accuracy"] == accuracy


def test_pairs_and_analogies_come_once() -> None:
    with pytest.raises(UsageError, match="--pairs names Signs and Emoji twice"):
        disentanglement.pairs_of(Run.of(Config(pairs=["Emoji+Signs", "Signs + EmojiVal"])))
    twice = "Emoji+Signs-MNIST=Letters,Emoji + Signs - MNISTVal = Letters"
    with pytest.raises(UsageError, match=r"--analogies names .* twice"):
        analogies.analogies_of(Run.of(Config(analogies=twice.split(","))))
    (analogy,) = analogies.analogies_of(Run.of(Config(analogies=["Emoji+Signs-Emoji=Signs"])))
    assert analogy.point == {"Emoji": 0.0, "Signs": 1.0}  # c + b - c


@pytest.mark.parametrize("text", ["A+B=C", "Emoji+FashionMNIST-MNIST=Letterz"])
def test_analogies_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected an analogy such as|unknown data set"):
        analogies.analogies_of(Run.of(Config(analogies=[text])))
    with pytest.raises(UsageError, match="has no analogies of its own"):
        analogies.analogies_of(Run.of(Config(suite="clip8", model="ViT-B-32")))


def test_few_pictures_are_chosen_by_class(run: Config) -> None:
    labels = np.array([0, 1, 1, 1, 2, 2, 0, 1])
    chosen = chosen_indices(labels, 2, 0)
    assert np.bincount(labels[chosen]).tolist() == [2, 2, 2] and chosen == sorted(set(chosen))
    assert chosen_indices(labels, 2, 0) == chosen and len(chosen_indices(labels, 9, 0)) == 8
    train = Run.of(run).data.dataset("EmojiVal").train
    assert labels_of(train).tolist() == [train[i][1] for i in range(len(train))]


def test_few_pictures_improve_on_none(run: Config) -> None:
    edits = Edits(Run.of(run), "standard", TASKS)
    before, none = few_shot(Run.of(run), edits, {"Emoji": 0.5}, "FashionMNIST", 0)
    (expected,) = edits.accuracies("FashionMNIST", [{"Emoji": 0.5}])
    assert (before, none) == (expected, 0)
    _, count = few_shot(Run.of(run), edits, {}, "FashionMNIST", 1)
    assert count == len(np.unique(labels_of(Run.of(run).data.dataset("FashionMNISTVal").train)))
    assert edits.accuracies("FashionMNIST", [{"Emoji": 0.5}]) == [expected]


# --- the command


@pytest.mark.parametrize(
    "names", [["single", "similarity"], pytest.param([], marks=pytest.mark.slow)]
)
def test_the_command_writes_tables_figures_and_provenance(
    names: list[str], args: Config, words: list[str]
) -> None:
    folder = Run.of(args).results
    own = ["--grid-points=3", "--pairs=Emoji+FashionMNIST", "--shots=1"]
    own += ["--analogies=Emoji+FashionMNIST-Emoji=FashionMNIST"]
    assert analyze.main([*names, *words, *own]) == 0
    for analysis in names or analyze.ANALYSES:
        for name, _, _ in analyze.ANALYSES[analysis]:
            found = pd.read_csv(folder / "analysis" / f"{name}.csv")
            assert len(found) > 1 and not found.isna().any().any()
            facts = load_results(folder / "analysis" / f"{name}.json")
            assert facts["seed"] == 0 and facts["commit"]
            png, svg = (folder / "figures" / f"{name}.{kind}" for kind in ("png", "svg"))
            assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
            text = svg.read_text(encoding="utf-8")
            assert "<svg" in text and "seed 0" in text
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") >= len(names or analyze.ANALYSES)
    assert ("explorer-data" in page) == (not names)


def test_an_unknown_analysis_is_told_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze.main(["subset", f"--save={tmp_path}"]) == 2
    assert "unknown analysis 'subset'; choose from subsets" in capsys.readouterr().err


def test_figures_are_drawn_again_from_their_tables(args: Config) -> None:
    analyze.analyze(Run.of(args), ["single"])
    figure, table = (
        Run.of(args).results / "figures" / "single.svg",
        table_path(Run.of(args), "single"),
    )
    before = figure.read_text(encoding="utf-8")
    figure.unlink()
    analyze.analyze(Run.of(args), ["figures"])
    assert figure.read_text(encoding="utf-8") == before
    changed = pd.read_csv(table)
    changed["linear"] = 0.1
    changed.to_csv(table, index=False)
    analyze.analyze(Run.of(args), ["figures"])
    assert figure.read_text(encoding="utf-8") != before


def test_what_cannot_be_analysed_is_left_out_if_nothing_was_named(
    run: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = copy.copy(run)
    own.results, own.save = str(tmp_path / "results"), str(tmp_path / "save")
    with pytest.raises(MissingFileError, match=r"python src/finetune\.py"):
        analyze.analyze(Run.of(own), ["similarity"])
    analyze.analyze(Run.of(own))
    left = {r.getMessage().split(" is left")[0] for r in caplog.records if "left out" in r.msg}
    assert {"similarity", "subsets", "analogies", "the explorer"} <= left
    assert (Run.of(own).results / "report.html").is_file()


def test_a_missing_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main(["similarity", f"--save={tmp_path}", f"--cache-dir={tmp_path}"]) == 2
    assert "Make it with: python src/finetune.py" in capsys.readouterr().err
    with pytest.raises(MissingFileError, match=r"python src/analyze\.py analogies .*--seed=3"):
        analogies.with_few_pictures(Run.of(Config(results=str(tmp_path), seed=3)))
