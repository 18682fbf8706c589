"""The sentences below figures say what the tables say, and nothing where a table is damaged."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tangent_arithmetic.analysis.takeaways import TAKEAWAYS, takeaway

COMMITTED = Path(__file__).resolve().parents[2] / "results/embedded/ViT-Nano-8_seed3/analysis"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tables = {
        "single": "task,standard,posthoc,linear,advantage_linear+taujp\n"
        "A,0.9,0.5,0.8,0.1\nB,0.7,0.8,0.7,0.1\n",
        "subsets": "mode,num_vectors,absolute\nlinear,1,0.5\nlinear,1,0.6\nlinear,2,0.7\n",
        "interference": "mode,images of,A,B\nlinear,A,0.5,0.02\nlinear,B,0.04,0.3\n"
        "linear,C,0.01,0.02\nlinear+taujp,A,0.2,0.001\nlinear+taujp,B,0.003,0.2\n",
        "disentanglement": "mode,coef1,coef2,error\nstandard,0,2,1.9\nlinear,0,0.5,1.9\n"
        + "".join(f"standard,{p},0.4\nlinear,{p},0.2\n" for p in ("0,0", "0,1", "1,0", "1,1")),
        "xi": "mode,task1,task2,xi\nstandard,A,B,0.4\nlinear,A,B,0.1\nlinear,A,C,0.3\n",
        "kernel": "mode,task,own,even,use,error,shift\nlinear,A,0.9,0.5,0.5,0,0\n"
        "linear,A,0.1,0.5,0.5,0,0\nlinear,B,0.7,0.5,1,0,0\n",
        "ensembles": "mode,gap\nstandard,0.5\nlinear,1e-7\nlinear,3e-7\n",
        "similarity": "mode1,task1,mode2,task2,cosine\nlinear,A,linear,A,1\n"
        "linear,A,linear,B,-0.3\nlinear,A,standard,B,0.9\nlinear,B,linear,C,0.1\n",
        "layers": "mode,task,layer,share\nlinear,A,one,0.25\nlinear,A,two,0.75\n",
        "negation": "mode,task,coefficient,target,control\nlinear,A,0,0.6,0.8\n"
        "linear,A,0.5,0.3,0.77\nlinear,A,1,0.1,0.5\n",
        "negation_random": "mode,vector,target\nlinear,task,0.25\nlinear,random,0.5\n",
        "fronts": "mode,tasks,point,task,weight,accuracy\n"
        "linear,A+B,0,A,0,0.1\nlinear,A+B,0,B,1,0.8\nlinear,A+B,1,A,0.5,0.5\n"
        "linear,A+B,1,B,0.5,0.7\nlinear,A+B,2,A,1,0.55\nlinear,A+B,2,B,0,0.2\n",
        "analogies": "mode,vector,chosen,accuracy\nlinear,zero-shot,-,0.25\nlinear,target,-,0.75\n"
        "linear,c + b - a,without target,0.5\nlinear,c + b - a,with target,0.6\n",
        "analogies_few": "target,start,shots,accuracy\nA,analogy,1,0.5\nA,analogy,5,0.4\n"
        "A,pre-trained model,1,0.4\nA,pre-trained model,5,0.6\n",
    }
    for name, text in tables.items():
        (tmp_path / f"{name}.csv").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "single",
            "Against standard fine-tuning, on average: linear 5.0 points below (largest gap: A, "
            "10.0); post-hoc 15.0 points below (largest gap: A, 40.0).",
        ),
        ("subsets", "From one vector to all 2 the mean of all tasks goes from 55.0 to 70.0 % (l"),
        (
            "interference",
            "Mean interference by examples and vector. linear: 0.03 off the diagonal, 0.4 on it; "
            "0.015 on the control set; largest: 0.04, vector of A on B. linear, \u03c4Jp: 0.002 "
            "off the diagonal, 0.2 on it; largest: 0.003, vector of A on B.",
        ),
        ("xi", "Mean of the pairs, lowest first: linear 0.20, standard 0.40."),
        (
            "kernel",
            "Of the eigenfunctions that a task vector uses, 60 % (linear) are on its own task's "
            "examples, 50 % if spread evenly.",
        ),
        (
            "ensembles",
            "Largest relative difference of an ensemble to the sum of weights: 0.5 (standard) and "
            "3e-07 (linear).",
        ),
        (
            "disentanglement",
            "Mean error at 4 points of the frame, lowest first: linear 0.20, standard 0.40.",
        ),
        (
            "similarity",
            "Mean cosine between tasks: -0.100 (linear); farthest from 0: -0.30, A and B (linear).",
        ),
        ("layers", "Largest share of the squared norm: two, 75 % (linear)."),
        (
            "negation",
            "With 95 % of the control accuracy kept, one common coefficient lowers the task from "
            "60.0 to 30.0 % (linear).",
        ),
        (
            "negation_random",
            "The task after negation of its own vector or of a random one: 25.0 or 50.0 % (linear)",
        ),
        (
            "fronts",
            "Against all weight for one of A and B, equal weights give up so many points of each: "
            "5.0 and 10.0 (linear).",
        ),
        (
            "analogies",
            "Without examples of the target, c + b - a reaches on average 50.0 % (linear; 25.0 "
            "zero-shot, 75.0 own).",
        ),
        (
            "analogies_few",
            "The analogy is the better start in 1 of 2 settings; mean difference -5.0 points.",
        ),
    ],
)
def test_a_takeaway_is_computed(name: str, expected: str, folder: Path) -> None:
    assert takeaway(folder, name).startswith(expected)


def test_a_mode_that_is_better_on_average_has_its_largest_gain_named(tmp_path: Path) -> None:
    (tmp_path / "single.csv").write_text("task,standard,linear\nA,0.5,0.6\nB,0.5,0.9\nC,0.5,0.4\n")
    expected = "linear 13.3 points above (largest gap: B, 40.0)."
    assert takeaway(tmp_path, "single").endswith(expected)


def test_an_estimated_kernel_is_said_to_be_one(tmp_path: Path) -> None:
    rows = "linear,A,0.4,0.25,1,0.08,0.02\nlinear,B,0.2,0.75,1,0.08,0.04\n"
    (tmp_path / "kernel.csv").write_text(f"mode,task,own,even,use,error,shift\n{rows}")
    said = takeaway(tmp_path, "kernel")
    assert "30 % (linear)" in said and "50 % if spread evenly" in said
    assert said.endswith("towards an even spread: half the directions give 3.0 points less.")


def test_standard_fine_tuning_alone_has_nothing_to_say(tmp_path: Path) -> None:
    (tmp_path / "single.csv").write_text("task,zeroshot,standard\nA,0.5,0.6\n")
    assert takeaway(tmp_path, "single") == ""


def test_tasks_may_be_called_as_missing_values_or_numbers(tmp_path: Path) -> None:
    (tmp_path / "single.csv").write_text("task,standard,linear\nA,0.5,0.4\nNA,0.5,0.2\n")
    assert "largest gap: NA, 30.0" in takeaway(tmp_path, "single")
    rows = "linear,null,linear,null,1\nlinear,null,linear,2019,-0.3\nlinear,2019,linear,2019,1\n"
    (tmp_path / "similarity.csv").write_text(f"mode1,task1,mode2,task2,cosine\n{rows}")
    assert takeaway(tmp_path, "similarity").endswith("-0.30, null and 2019 (linear).")


def test_modes_on_grids_that_share_few_points_are_not_compared(tmp_path: Path) -> None:
    rows = "standard,0,0,0\nstandard,0,0.4,0.4\nlinear,0,0,0\nlinear,0,0.5,0.2\n"
    (tmp_path / "disentanglement.csv").write_text(f"mode,coef1,coef2,error\n{rows}")
    assert takeaway(tmp_path, "disentanglement") == ""


@pytest.mark.parametrize(
    "name", sorted(set(TAKEAWAYS) - {"interference", "fronts", "kernel", "xi", "ensembles"})
)  # committed later
def test_committed_tables_have_takeaways_and_damaged_ones_none(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert takeaway(COMMITTED, name).endswith(".")
    assert takeaway(tmp_path, name) == "" and not caplog.text
    table = pd.read_csv(COMMITTED / f"{name}.csv")
    table[table.columns[:1]].to_csv(tmp_path / f"{name}.csv")
    assert takeaway(tmp_path, name) == "" and "has no takeaway" in caplog.text
    (tmp_path / f"{name}.csv").write_bytes(b"\xff\x00")
    assert takeaway(tmp_path, name) == ""
