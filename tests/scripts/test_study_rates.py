"""The study of rates and seeds, on a small run: its rows are what the checkpoints give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tangent_arithmetic.arithmetic.coefficients import least_kept
from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.run.models import checkpoint_hashes, split_of, task_vector, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.atomic import write_json
from tangent_arithmetic.runtime.errors import DivergedError, UsageError
from tangent_arithmetic.storage.reading import read_json
from tests.commands.test_reproduce import checkpoint, script
from tests.small_suite import TASKS, flags, small_config, small_suite

NAME = "results/embedded/rates_ViT-Nano-8_Emoji+FashionMNIST.json"


def words(folder: Path) -> list[str]:
    return [word for word in flags(folder) if not word.startswith("--save=")]


def test_another_model_other_tasks_and_a_sample_have_a_file_of_their_own(tmp_path: Path) -> None:
    study, run = script("study_rates"), Run.of(small_config(tmp_path))
    others = [
        run,
        run.with_(tasks=None),
        run.with_(sample=20),
        run.with_(suite="embedded", model="ViT-B-32"),
    ]
    names = [study.output_of(one).name for one in others]
    assert names[0] == Path(NAME).name and len(set(names)) == 4
    assert names[1:3] == ["rates_ViT-Nano-8.json",
                          "rates_ViT-Nano-8_sample20_Emoji+FashionMNIST.json"]  # fmt: skip


@pytest.mark.parametrize(
    "flag", ["--save=x", "--seed=1", "--finetuning-mode=linear", "--lr=1e-3", "--tasks=Shapes"]
)
def test_flags_that_the_study_sets_itself_are_refused(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = script("study_rates")
    monkeypatch.setattr(study, "trained", lambda *_: pytest.fail("trained"))
    assert study.main([flag]) == 2
    told = capsys.readouterr().err
    assert "leave it out" in told and flag.partition("=")[0] in told


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--factors=1,a", "a number, got 'a'"),
        ("--factors=", "a number, got ''"),
        ("--factors=0", "at least 1e-06, got 0"),
        ("--seeds=x", "a whole number, got 'x'"),
        ("--seeds=0,", "a whole number, got ''"),
        ("--seeds=-1", "at least 0, got -1"),
        ("--modes=standard,linaer", "expected one of none, standard, linear"),
    ],
)
def test_values_that_make_no_sense_are_refused(
    flag: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = script("study_rates")
    monkeypatch.setattr(study, "trained", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="2"):
        study.main([flag, f"--results={tmp_path}"])
    assert expected in capsys.readouterr().err


def test_rows_of_other_modes_rates_and_seeds_are_kept(tmp_path: Path) -> None:
    study, run = script("study_rates"), Run.of(small_config(tmp_path))
    output = study.output_of(run)
    assert study.rows_of(output, run) == []
    rows = list[dict[str, Any]]()
    for mode, factor, seed in (("linear", 1, 0), ("standard", 3, 0), ("standard", 1, 0),
                               ("standard", 1, 1), ("standard", 1, 0)):  # fmt: skip
        config = vars(run.with_(seed=seed, lr=factor * 1e-3).config)
        row = {"mode": mode, "factor": factor, "seed": seed, "provenance": {"config": config}}
        write_json(output, {"rows": study.added(rows, {**row, "single": len(rows)})})
        rows = study.rows_of(output, run)
    assert [(*study.key(row), row["single"]) for row in rows] == [
        ("standard", 1, 0, 4),
        ("standard", 1, 1, 3),
        ("standard", 3, 0, 1),
        ("linear", 1, 0, 0),
    ]
    with pytest.raises(UsageError, match="made with another --epochs, --wd"):
        study.rows_of(output, run.with_(epochs=2, wd=0.2))


def test_rows_of_the_same_checkpoints_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = script("study_rates")
    first = Run.of(small_config(tmp_path)).with_(finetuning_mode="standard")
    run = first.with_(save=str(tmp_path / "second"), seed=1)
    for one, value in ((first, 1.0), (run, 2.0)):
        for task in TASKS:
            checkpoint(one, task, "standard", value)
    monkeypatch.setattr(study, "trained", lambda *_: None)

    def measured(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(study, "zeroshot_encoder", measured)
    hashes = {
        name: checkpoint_hashes(one, list(TASKS), "standard")
        for name, one in (("checkpoints", run), ("first", first))
    }
    old = {"mode": "standard", "factor": 3.0, "seed": 1, "single": 0.5, **hashes}
    assert study.record(run, 3.0, first, old) is old
    for again in (None, {**old, "first": None}):
        with pytest.raises(InterruptedError):
            study.record(run, 3.0, first, again)
    checkpoint(run, TASKS[0], "standard", 3.0)
    with pytest.raises(InterruptedError):
        study.record(run, 3.0, first, old)


def test_a_divergence_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = script("study_rates")

    def diverges(*_: object) -> None:
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(study, "trained", diverges)
    with small_suite(monkeypatch):
        argv = [*words(tmp_path), "--modes=standard", "--factors=10", "--seeds=0"]
        assert study.main([*argv, "--sample=9"]) == 0
    found = read_json(tmp_path / NAME.replace("8_E", "8_sample9_E"))
    assert [row["diverged"] for row in found["rows"]] == ["the loss is nan"]
    assert (found["tasks"], found["sample"]) == (list(TASKS), 9)
    assert "|standard,ratex10|0|1|-|" in "".join(capsys.readouterr().out.split())
    text = (tmp_path / NAME.replace("8_E", "8_sample9_E")).with_suffix(".md").read_text()
    assert text.startswith("ViT-Nano-8 on Emoji, FashionMNIST, 9 examples of each split\n")
    assert "Binomial standard error of the images, at most: 17 % on a task" in text
    drawn = (tmp_path / NAME).parent.glob("rates_ViT-Nano-8_sample9_E*.png")
    assert [path.stem.rpartition("_")[2] for path in sorted(drawn)] == [
        "Emoji+FashionMNIST",
        "along",
    ]


def test_a_single_task_accuracy_of_zero_decides_no_coefficient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero's sum is best at 1, where that of the others is at its worst."""
    study, run, least = script("study_rates"), Run.of(small_config(tmp_path)), list[float]()

    class Split:
        def __init__(self, name: str) -> None:
            self.name = name

        def sweep(self, _: Any, tau: dict[str, float], coefs: list[float]) -> list[float]:
            if self.name.startswith("Zero"):
                return [0.0 if tau["w"] == 1 else coef for coef in coefs]
            return [0.6 - 0.1 * coef for coef in coefs]

    class Tau(dict[str, float]):
        def __add__(self, other: Tau) -> Tau:
            return Tau(w=self["w"] + other["w"])

        @property
        def vector(self) -> Tau:
            return self

    def negated(*args: Any) -> dict[str, float]:
        least.append(args[4])
        return {"test": 0.1, "test_control": 0.57}

    monkeypatch.setattr(study, "split_of", lambda _, __, name: Split(name))
    monkeypatch.setattr(study, "base_encoder", lambda *_: None)
    monkeypatch.setattr(study, "negate", negated)
    taus: Any = {"Zero": Tau(w=1.0), "Other": Tau(w=1.0)}
    found = study.evaluated(run.with_(finetuning_mode="standard"), taus, None)
    assert found["coefficient"] == 0.0
    assert least == [least_kept(0.95, 0.6)] * 2


@pytest.mark.slow
def test_rows_are_what_the_checkpoints_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--modes=standard", "--factors=0.1,10", "--seeds=0,1", f"--folder={tmp_path / 'rates'}"]
    study = script("study_rates")
    with small_suite(monkeypatch):
        assert study.main([*words(tmp_path), *argv]) == 0
        rows = read_json(tmp_path / NAME)["rows"]
        assert [(row["factor"], row["seed"]) for row in rows] == [
            (0.1, 0),
            (0.1, 1),
            (10, 0),
            (10, 1),
        ]
        assert rows[2]["norm"] > 2 * rows[0]["norm"]  # a longer way at a higher rate
        one, other = dict[str, TaskVector](), dict[str, TaskVector]()
        for seed, taus in ((0, one), (1, other)):
            folder = tmp_path / "rates" / f"seed{seed}" / "standard_10"
            run = Run.of(small_config(tmp_path)).with_(save=str(folder), seed=seed)
            encoder, theta0_hash = zeroshot_encoder(run)
            taus |= {t: task_vector(run, t, "standard", encoder, theta0_hash) for t in TASKS}
        found = [split_of(run, encoder, t).sweep(encoder, other[t].vector, [1.0])[0] for t in TASKS]
        assert rows[3]["single"] == pytest.approx(sum(found) / len(found))
        cosines = [one[t].dot(other[t]) / (one[t].norm() * other[t].norm()) for t in TASKS]
        assert rows[3]["cosine with the first seed"] == pytest.approx(float(sum(cosines)) / 2)
        assert rows[0]["cosine with the first seed"] is None
        for steps in rows[3]["along"].values():
            values = [steps[key] for key in sorted(steps, key=int)]
            assert values[-1] == pytest.approx(1, abs=1e-5) and values[0] < 0.99
        argv[1:3] = ["--factors=10", "--seeds=0,1"]
        with monkeypatch.context() as patch:  # what is there is not measured again
            patch.setattr(f"{study.__name__}.evaluated", lambda *_: pytest.fail("evaluated"))
            assert study.main([*words(tmp_path), *argv]) == 0
        assert read_json(tmp_path / NAME)["rows"] == rows
    assert "standard, rate x 10" in capsys.readouterr().out
