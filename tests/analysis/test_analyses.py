"""The analyses on a small run, against the evaluation scripts and plain loops."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from src.eval import eval_single_dataset
from tangent_arithmetic.analysis import (
    analogies,
    baselines,
    disentanglement,
    fewshot,
    fronts,
    interference,
    negation,
    similarity,
    single,
    subsets,
)
from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.analysis.figures import plain
from tangent_arithmetic.analysis.tables import LONGEST, table_path, write_table
from tangent_arithmetic.commands import analyze
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.encoders.base import is_linear
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.models import finetuned_encoder, task_vector, zeroshot_encoder
from tangent_arithmetic.run.results import accuracies_path, arithmetic_path, load_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.small_suite import TASKS

MODES = ("standard", "posthoc", "linear")
DEFAULT = Run.of(Config())


def test_no_file_of_a_run_names_the_home_folder(run: Run) -> None:
    home = run.cache.parent
    written = [path for path in home.rglob("*") if path.is_file()]
    assert {".safetensors", ".json", ".html", ".jsonl"} <= {path.suffix for path in written}
    for path in written:
        assert str(home).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("mode", MODES)
def test_edits_evaluate_the_model_at_each_sum_of_vectors(run: Run, mode: str) -> None:
    edits = Edits(run, mode, TASKS)
    before = {name: value.clone() for name, value in edits.base.weights().items()}
    encoder, theta0_hash = zeroshot_encoder(run)
    one, other = (task_vector(run, task, mode, encoder, theta0_hash) for task in TASKS)
    both = {"Emoji": 0.4, "FashionMNIST": -0.7}
    models = [
        (tau.apply_to_linear if mode == "posthoc" else tau.apply_to)(encoder)
        for tau in (-0.5 * one, 0.4 * one + (-0.7) * other)
    ]
    expected = [eval_single_dataset(model, "EmojiVal", run)["top1"] for model in models]
    assert edits.accuracies("EmojiVal", [{"Emoji": -0.5}, both]) == expected
    assert all(torch.equal(value, before[n]) for n, value in edits.base.weights().items())
    with pytest.raises(KeyError, match=r"no vectors \['Emojo'\]; there are \['Emoji', 'Fashion"):
        edits.predictions("Emoji", [{"Emojo": 1.0}])


@pytest.mark.parametrize("mode", ["standard", "linear"])
def test_disentanglement_error_matches_its_definition(run: Run, mode: str) -> None:
    of_pair = run.with_(pairs=["Emoji+FashionMNIST"], grid_points=3)
    table = disentanglement.table(of_pair, [mode])
    errors = table.set_index(["coef1", "coef2"])
    assert sorted(errors.index) == list(itertools.product((-2.0, 0.0, 2.0), repeat=2))
    edits, (a, b) = Edits(run, mode, TASKS), (-2.0, 2.0)
    points = [{"Emoji": a, "FashionMNIST": b}, {"Emoji": a}, {"FashionMNIST": b}]
    expected = []
    for alone, task in enumerate(TASKS, 1):
        classes, _ = edits.predictions(task, points)
        expected.append(float((classes[0] != classes[alone]).double().mean()))
    row = errors.loc[(a, b)]
    assert [row["error1"], row["error2"]] == pytest.approx(expected, abs=1e-12)
    assert row["error"] == row["error1"] + row["error2"]
    for a in (-2.0, 2.0):  # without the other vector nothing changes
        assert errors.loc[(a, 0.0)]["error1"] == 0 == errors.loc[(0.0, a)]["error2"]
    assert errors.loc[(0.0, 0.0)]["error"] == 0 < errors["error"].max()
    image = plain(disentanglement.draw, table, of_pair).axes[0].images[0].get_array()
    assert image[2, 0] == row["error"]  # coef2 upwards, coef1 to the right


def test_pairs_default_to_the_first_tasks() -> None:
    first = [("Emoji", "FashionMNIST"), ("LandCover", "Letters"), ("MNIST", "Signs")]
    assert disentanglement.pairs_of(DEFAULT) == first
    three = DEFAULT.with_(tasks=["MNIST", "Signs", "Emoji"])
    assert disentanglement.pairs_of(three) == [("MNIST", "Signs")]
    assert fronts.sets_of(three) == [("MNIST", "Signs"), ("MNIST", "Signs", "Emoji")]
    with pytest.raises(UsageError, match=r"two tasks to pair, got MNIST; set --pairs=A\+B"):
        disentanglement.pairs_of(DEFAULT.with_(tasks=["MNIST"]))


def test_names_in_analogies_may_have_a_hyphen() -> None:
    names = ["my-set", "my", "set-2", "A"]
    sets = [f"{name}={Path(__file__).parents[1] / 'data'}" for name in names]
    for text in ("A+my-set-2=my-set", "my+A-my-set=set-2Val", "A+my-set-my=set-2!my-set"):
        (one,) = analogies.analogies_of(DEFAULT.with_(tasks=sets, analogies=[text]))
        assert f"{one.c}+{one.b}-{one.a}={one.d}" in text and (one.w or "") in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": ["Emoji"]}, "expected --pairs of two tasks each"),
        ({"pairs": ["Emoji+Emoji"]}, "expected --pairs of two tasks each"),
        ({"pairs": ["Emoji+Signz"]}, "unknown data set"),
        ({"pairs": ["Emoji+Signs", "Signs + EmojiVal"]}, "--pairs names Signs and Emoji twice"),
        ({"analogies": ["A+B=C"]}, "expected an analogy such as"),
        ({"analogies": ["Emoji+Signs-MNIST=Letterz"]}, "unknown data set"),
        (
            {"analogies": ["Emoji+Signs-MNIST=Letters", "Emoji + Signs - MNISTVal = Letters"]},
            "--analogies names the target Letters twice",
        ),
        *(
            ({"analogies": [text]}, "names the target Letters among its own parts")
            for text in (
                "Letters+Signs-MNIST=Letters",
                "Signs+Letters-MNIST=LettersVal",
                "Signs+MNIST-Letters=Letters",
                "Signs+MNIST-Emoji=Letters!Letters",
            )
        ),
        (
            {"analogies": ["Emoji+Signs-MNIST=Letters", "Signs+Emoji-MNIST=Letters"]},
            "--analogies names the target Letters twice; expected one analogy for each target",
        ),
        ({"suite": "clip8", "model": "ViT-B-32"}, "has no analogies of its own"),
    ],
)
def test_invalid_pairs_and_analogies_are_refused(settings: dict[str, Any], message: str) -> None:
    of = disentanglement.pairs_of if "pairs" in settings else analogies.analogies_of
    with pytest.raises(UsageError, match=message):
        of(DEFAULT.with_(**settings))


def test_all_subsets_and_a_sample() -> None:
    tasks = list("abcdefgh")
    every = subsets.subsets(tasks)
    assert len(every) == 255 == len(set(every)) and every[-1] == tuple(tasks)
    sampled = subsets.subsets(tasks, 2)
    sizes = [len(s) for s in sampled]
    assert [sizes.count(k) for k in range(1, 9)] == [8, 28, 2, 2, 2, 2, 2, 1]
    assert set(sampled) <= set(every) and sampled == subsets.subsets(tasks, 2)


def test_linear_modes_of_many_tasks_are_sampled_too() -> None:
    clip = DEFAULT.with_(suite="clip20", model="ViT-B-32", subset_sample=3)
    assert (subsets.sample_of(clip, "linear"), subsets.sample_of(DEFAULT, "standard")) == (3, 2)
    assert subsets.sample_of(DEFAULT, "posthoc") is None


def test_the_full_subset_equals_the_sum_of_task_addition(run: Run) -> None:
    table = subsets.table(run, ["posthoc", "linear"])
    assert len(table) == 6 and set(table["num_vectors"]) == {1, 2}
    for mode in ("posthoc", "linear"):
        addition = load_results(arithmetic_path(run, mode, "additions"))
        row = table[(table["mode"] == mode) & (table["num_vectors"] == 2)].iloc[0]
        assert row["coefficient"] == addition["coefficient"]
        assert row["absolute"] == pytest.approx(addition["test"]["avg_top1"], abs=1e-12)
        assert row["normalised"] == pytest.approx(addition["test"]["avg_normalized_top1"])
        assert row["own_absolute"] == row["absolute"]
        assert row["own_coefficient"] == row["coefficient"]
    figure = plain(subsets.draw, table, run)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["linear (3 subsets)", "post-hoc (3 subsets)"]


def test_single_tasks_are_read_from_the_results(run: Run) -> None:
    row = single.table(run).set_index("task").loc["Emoji"]
    encoder, theta0_hash = zeroshot_encoder(run)
    tuned = finetuned_encoder(run, "Emoji", "posthoc", encoder, theta0_hash)
    assert row["posthoc"] == eval_single_dataset(tuned, "Emoji", run)["top1"]
    gap = (row["standard"] - row["linear"]) / (1 - 1 / 9)
    assert row["advantage_linear"] == pytest.approx(gap)


def test_single_tasks_of_some_modes(own: Run) -> None:
    table = single.table(own, ["linear"])
    assert list(table.columns) == [
        *("task", "classes", "zeroshot", "standard", "linear", "advantage_linear")
    ]
    alone = single.table(own, ["standard"])
    assert list(alone.columns)[2:] == ["zeroshot", "standard"]
    assert len(plain(single.draw, alone, own).axes) == 2
    path = accuracies_path(own, "linear")
    facts = load_results(path)
    facts["provenance"]["checkpoints"]["Emoji"] = "0" * 64  # fine-tuned again since
    path.write_text(json.dumps(facts))
    assert len(single.table(own, ["posthoc"])) == 2
    with pytest.raises(UsageError, match=r"is of another run .checkpoint of Emoji"):
        single.table(own, ["linear"])


def test_cosines_norms_and_layers(run: Run) -> None:
    table = similarity.table(run)
    encoder, theta0_hash = zeroshot_encoder(run)
    one, other = (task_vector(run, t, "linear", encoder, theta0_hash) for t in TASKS)
    pairs = table.set_index(["mode1", "task1", "mode2", "task2"])
    row = pairs.loc[("linear", "Emoji", "linear", "FashionMNIST")]
    assert row["cosine"] == pytest.approx(float(one.cosine_similarity(other)), abs=1e-6)
    norm = sum(float(v.double().square().sum()) for v in one.vector.values()) ** 0.5
    assert row["norm1"] == pytest.approx(norm)
    shares = similarity.layers(run)
    assert len(shares["layer"].unique()) == 10
    assert np.allclose(shares.groupby(["mode", "task"])["share"].sum(), 1.0)
    linear = shares[(shares["mode"] == "linear") & (shares["task"] == "Emoji")]
    assert np.hypot.reduce(linear["norm"]) == pytest.approx(norm)
    written = [text.get_text() for text in plain(similarity.draw, table, run).axes[1].texts]
    assert written == [".00", ".00"]  # the vectors are nearly orthogonal; no diagonal
    bars = plain(similarity.draw_layers, shares, run).axes[0].containers
    assert sum(bar[0].get_width() for bar in bars) == pytest.approx(100)


def test_interference_comes_with_every_sum_and_is_an_analysis(composed: Run) -> None:
    mode = "linear+taujp"
    table = interference.table(composed, ["standard", "posthoc", mode])
    assert list(table.columns) == ["mode", "images of", *TASKS]
    assert list(table["mode"]) == ["posthoc"] * 3 + [mode] * 3
    assert list(table["images of"])[:3] == [*TASKS, "Shapes"]
    rows = interference.matrices(table)[mode]
    edits = Edits(composed, mode, TASKS)
    assert is_linear(edits.base)
    for name in ("Emoji", "Shapes"):
        (batch,) = edits.split(name).batches
        for task in TASKS:
            f0, (step,) = edits.base.tangents(batch[0], [edits.vectors[task]])
            sizes = step.double().square().sum(dim=1) / f0.double().square().sum(dim=1)
            assert rows[name][task] == pytest.approx(float(sizes.mean()), rel=1e-5)
    stored = load_results(arithmetic_path(composed, mode, "additions"))["interference"]
    for task in TASKS:
        assert stored[task] == pytest.approx(rows[task], rel=1e-6)  # all 24 images are measured
    other = interference.table(composed.with_(interference_split="validation"), [mode])
    assert not np.allclose(other[list(TASKS)], table[3:][list(TASKS)])
    with pytest.raises(UsageError, match=r"that of linear models, got standard; choose from --fin"):
        interference.table(composed, ["standard"])


@pytest.mark.slow
def test_analyses_are_of_the_modes_with_checkpoints(
    composed: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(composed.config.results, tmp_path / "results")
    run = composed.with_(results=str(tmp_path / "results"), grid_points=3)
    run = run.with_(pairs=["Emoji+FashionMNIST"])
    (run.results / "posthoc_negations.json").unlink()
    names = ["single", "similarity", "negation", "disentanglement"]
    with caplog.at_level("INFO"):
        analyze.analyze(run, names)
    assert "negation: no results of posthoc, left out" in caplog.text
    tables = {name: pd.read_csv(table_path(run, name)) for name in names}
    assert list(tables["negation"]["mode"].unique()) == ["standard", "linear", "linear+taujp"]
    assert list(tables["similarity"]["mode1"].unique()) == ["standard", "linear", "linear+taujp"]
    assert len(tables["disentanglement"]["mode"].unique()) == 4
    assert list(tables["single"].columns)[3:] == [
        *("standard", "posthoc", "linear", "linear+taujp"),
        *("advantage_posthoc", "advantage_linear", "advantage_linear+taujp"),
    ]
    page = (run.results / "report.html").read_text(encoding="utf-8")
    assert "linear, \u03c4Jp 0." in page  # in a takeaway
    before = pd.read_csv(table_path(run, "similarity"))
    analyze.analyze(run.with_(finetuning_mode="linear+taujp"), ["similarity"])
    after = pd.read_csv(table_path(run, "similarity"))
    assert len(after) == len(before) and set(after["mode1"]) == set(before["mode1"])
    named = analyze.explored_mode(run, ["standard", "linear+taujp", "posthoc"])
    assert named == "linear+taujp"
    assert analyze.explored_mode(run, ["standard"]) == "linear"


def test_random_vectors_have_the_norms_of_the_task_vector() -> None:
    tau = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(2.0), "c": torch.zeros(3)}
    noise = baselines.random_like(tau, 0, "MNIST")
    assert noise.keys() == tau.keys()
    for name, value in tau.items():
        assert noise[name].shape == value.shape and noise[name].dtype == torch.float32
        assert float(noise[name].norm()) == pytest.approx(float(value.norm()), rel=1e-5)
    again = baselines.random_like(tau, 0, "MNIST")
    assert all(torch.equal(noise[name], again[name]) for name in tau)
    for seed, task in ((1, "MNIST"), (0, "Signs")):
        assert not torch.equal(baselines.random_like(tau, seed, task)["a"], noise["a"])


def test_negation_against_random_vectors(run: Run) -> None:
    table = baselines.table(run, ["linear"])
    assert list(table["vector"]) == ["task", "random", "others"] * 2
    known = load_results(arithmetic_path(run, "linear", "negations"))["Emoji"]
    row = table.iloc[0]
    assert (row["target"], row["control"]) == (known["test"], known["test_control"])
    bars = plain(baselines.draw, table, run).axes[0].containers[::2]
    means = table.groupby("vector")["target"].mean()
    heights = [bar[0].get_height() for bar in bars]
    assert heights == pytest.approx([100 * means[kind] for kind in ("task", "random", "others")])
    with pytest.raises(UsageError, match=r"3 coefficients of Emoji, expected 9; 3 co.*negation"):
        negation.curves(run.with_(n_eval_points=9), ["linear"])
    curve = negation.curves(run, ["linear"])
    assert len(curve) == 6 and set(curve["coefficient"]) == {0.0, 0.5, 1.0}
    lines = plain(negation.draw_curves, curve, run).axes[0].lines
    assert len(lines[0].get_xdata()) == 3 and lines[1].get_label().endswith("the threshold")


def test_the_negation_beside_its_baselines_has_their_settings(own: Run) -> None:
    path = arithmetic_path(own, "linear", "negations")
    results = load_results(path)
    for task in TASKS:
        results[task]["test"] = 2.0  # of other flags or checkpoints
    path.write_text(json.dumps(results))
    assert baselines.table(own, ["linear"])["target"].max() <= 1


def test_analogies_are_evaluated_at_their_vectors(run: Run) -> None:
    of_run = run.with_(analogies=["Emoji+Emoji-Emoji=FashionMNIST"])
    (analogy,) = analogies.analogies_of(of_run)
    assert analogy.point == {"Emoji": 1.0}
    table = analogies.table(of_run, ["linear"])
    rows = table.set_index(["vector", "chosen"])
    edits = Edits(run, "linear", TASKS)
    zero, target = edits.accuracies("FashionMNIST", [{}, {"FashionMNIST": 1.0}])
    assert rows.loc[("zero-shot", "-"), "accuracy"] == zero
    assert rows.loc[("target", "-"), "accuracy"] == target
    for chosen in ("without target", "with target"):
        row = rows.loc[("c + b", chosen)]
        point = {"Emoji": 2 * row["coefficient"]}
        assert edits.accuracies("FashionMNIST", [point]) == [row["accuracy"]]
    heights = [bar.get_height() for bar in plain(analogies.draw, table, of_run).axes[0].patches]
    assert len(heights) == 9 and (heights[0], heights[-1]) == (100 * zero, 100 * target)


def test_an_analogy_has_its_parts_as_controls(run: Run) -> None:
    of_run = run.with_(analogies=["Letters+StreetLetters-Digits=StreetDigits!Emoji"])
    (analogy,) = analogies.analogies_of(of_run)
    plus, minus = {"Letters": 1.0}, {"Digits": -1.0}
    assert analogy.vectors == {
        "c": plus,
        "b": {"StreetLetters": 1.0},
        "c + b": {**plus, "StreetLetters": 1.0},
        "c - a": plus | minus,
        "b - a": {"StreetLetters": 1.0, **minus},
        "c + w - a": {**plus, "Emoji": 1.0, **minus},
        "c + b - a": {**plus, "StreetLetters": 1.0, **minus},
    }
    with_control = run.with_(analogies=["Emoji+Emoji-Emoji=FashionMNIST!Emoji"])
    table = analogies.table(with_control, ["linear"]).set_index(["vector", "chosen"])["accuracy"]
    for chosen in ("without target", "with target"):
        assert table["c + b - a", chosen] == table["c", chosen] == table["c + w - a", chosen]
        assert table["c - a", chosen] == table["zero-shot", "-"]


def test_few_images_are_chosen_by_class() -> None:
    labels = np.array([0, 1, 1, 1, 2, 2, 0, 1])
    chosen = fewshot.chosen_indices(labels, 2, 0)
    assert np.bincount(labels[chosen]).tolist() == [2, 2, 2] and chosen == sorted(set(chosen))
    assert fewshot.chosen_indices(labels, 2, 0) == chosen
    assert len(fewshot.chosen_indices(labels, 9, 0)) == 8


def test_few_shot_experiment(own: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewshot, "STEPS", 2)
    few = own.with_(analogies=["Emoji+Emoji-Emoji=FashionMNIST"], shots=[1])
    keys = ("mode", "target", "c", "b", "a", "w", "vector", "chosen", "coefficient", "accuracy")
    sets = ("FashionMNIST", "Emoji", "Emoji", "Emoji", "-")
    row = ("standard", *sets, "c + b - a", "without target", 0.5, 0.1)
    other = ("standard", *sets[:-1], "Signs", "c + b - a", "without target", 0.7, 0.1)
    write_table(few, "analogies", pd.DataFrame([other, row], columns=keys), 1.0)
    table = analogies.with_few_images(few)
    labels = labels_of(few.data.dataset("FashionMNISTVal").train)
    assert list(table["num_images"]) == [0, len(np.unique(labels))] * 2
    edits = Edits(few, "standard", TASKS)
    before = edits.accuracies("FashionMNIST", [{}, {"Emoji": 0.5}])
    assert list(table[table["shots"] == 0]["accuracy"]) == before
    lines = plain(analogies.draw_few, table, few).axes[0].lines
    assert [line.get_ydata()[0] for line in lines] == [100 * value for value in before]
    with pytest.raises(UsageError, match="was made with another --n-eval-points"):
        analogies.with_few_images(few.with_(n_eval_points=9))
    another = few.with_(analogies=["Emoji+Emoji-Emoji=FashionMNIST!Emoji"])
    with pytest.raises(MissingFileError, match=r"no table at .*=FashionMNIST!Emoji"):
        analogies.with_few_images(another)
    table_path(few, "analogies").unlink()
    rows = pd.DataFrame([("linear", *row[1:])], columns=keys)
    write_table(few, "analogies", rows, 1.0)
    with pytest.raises(UsageError, match=r"has no standard model of FashionMNIST\. .*standard"):
        analogies.with_few_images(few)


def test_few_shots_have_their_own_warm_up_and_no_accumulation(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Any] = []
    monkeypatch.setattr(fewshot, "train", lambda *args, **_: recipes.append(args[2]))
    long = run.with_(warmup_length=500, num_grad_accumulation=4, image_share=0.5)
    for one in (long, run, run.with_(recipe="fast")):
        fewshot.few_shot(one, Edits(one, "standard", TASKS), {}, "Emoji", 1)
    assert recipes[0] == recipes[1] and recipes[1].warmup_length == 8
    assert len(recipes) == 3


@pytest.mark.slow
def test_the_screens_figure_is_never_older_than_its_table(own: Run) -> None:
    for accuracy in (0.5, 0.7):
        table = single.table(own).assign(linear=accuracy)
        analyze.show(own.with_(style="paper"), "single", single.draw, table)
    figure = f"{table_path(own, 'single').stem}.svg"
    paper = own.results / "figures/paper" / figure
    screen = (own.results / "figures" / figure).read_text(encoding="utf-8")
    analyze.show(own, "single", single.draw, table)
    assert paper.is_file() and "examples of each split" not in screen
    assert (own.results / "figures" / figure).read_text(encoding="utf-8") == screen
    analyze.show(own.with_(sample=9), "single", single.draw, table)
    of_sample = own.with_(sample=9).results / "figures" / figure
    assert "seed 0, 9 examples of each split" in of_sample.read_text(encoding="utf-8")


@pytest.mark.parametrize("names", [["single"], pytest.param([], marks=pytest.mark.slow)])
def test_the_command_writes_tables_figures_and_provenance(
    names: list[str], own: Run, words: list[str]
) -> None:
    extra = ["--grid-points=3", "--pairs=Emoji+FashionMNIST", "--shots=1", "--kernel-images=4"]
    extra += ["--analogies=Emoji+Emoji-Emoji=FashionMNIST"]
    assert analyze.main([*names, *words, *extra]) == 0
    made = own.with_(pairs=["Emoji+FashionMNIST"], analogies=["Emoji+Emoji-Emoji=FashionMNIST"])
    for analysis in names or analyze.ANALYSES:
        for name, _, _ in analyze.ANALYSES[analysis]:
            path = table_path(made, name)
            table = pd.read_csv(path)
            known = table.drop(columns=["std", "binomial"], errors="ignore")  # of one seed
            assert len(table) > 1 and not known.isna().any().any()
            facts = load_results(path.with_suffix(".json"))
            assert facts["seed"] == 0 and facts["commit"]
            assert facts["theta0_hash"] and facts["checkpoints"]
            figure = own.results / "figures" / path.name
            png, svg = (figure.with_suffix(f".{kind}") for kind in ("png", "svg"))
            assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
            text = svg.read_text(encoding="utf-8")
            assert "<svg" in text and ("1 seed" if name == "seeds" else "seed 0") in text
            pdf = figure.with_suffix(".pdf").read_bytes()
            assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # embedded TrueType
            assert path.with_suffix(".tex").is_file() == (len(table) <= LONGEST)
    page = (own.results / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure ") >= len(names or analyze.ANALYSES)
    assert ("explorer-data" in page) == (not names)
    path = table_path(own, "single")
    figure = own.results / "figures" / f"{path.stem}.svg"
    before = figure.read_text(encoding="utf-8")
    changed = pd.read_csv(path)
    changed["linear"] = 0.1
    changed.to_csv(path, index=False)
    analyze.analyze(own, ["figures"])
    assert figure.read_text(encoding="utf-8") != before


def test_missing_inputs_are_skipped_unless_named(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = run.with_(results=str(tmp_path / "results"), save=str(tmp_path / "save"))
    with pytest.raises(MissingFileError, match=r"python src/finetune\.py"):
        analyze.analyze(empty, ["similarity"])
    analyze.analyze(empty)
    skipped = {r.getMessage().split(" is left")[0] for r in caplog.records if "left out" in r.msg}
    assert {"similarity", "subsets", "analogies", "the explorer"} <= skipped
    assert (empty.results / "report.html").is_file()
    with pytest.raises(MissingFileError, match=r"python src/analyze\.py analogies .*--seed=3"):
        analogies.with_few_images(empty.with_(seed=3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("subset", "unknown analysis 'subset'; choose from subsets"),
        ("similarity", "Make it with: python src/finetune.py"),
    ],
)
def test_errors_name_the_way_out(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze.main([name, f"--save={tmp_path}", f"--cache-dir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err
