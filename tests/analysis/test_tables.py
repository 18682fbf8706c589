"""Files of analysis tables: what several calls write to one, and the checkpoints that it is of."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from tangent_arithmetic.analysis import seeds
from tangent_arithmetic.analysis.tables import read_own, read_table, table_path, write_table
from tangent_arithmetic.analysis.takeaways import takeaway
from tangent_arithmetic.commands import analyze
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.reading import read_json

MODES = ("standard", "linear")
TASKS = ("Emoji", "Signs")


def trained(run: Run, task: str, mode: str, value: float) -> None:
    save_tensors(run.finetuned_path(task, mode), {"w": torch.tensor([value])}, kind="other")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with checkpoints of two tasks in two modes, and of gradient ascent."""
    config = Config(results=str(tmp_path), save=str(tmp_path / "save"), tasks=[*TASKS])
    found = Run.of(config)
    for task in TASKS:
        for value, mode in enumerate((*MODES, "standard+ascent")):
            trained(found, task, mode, float(value))
    save_tensors(found.zeroshot_path, {"w": torch.zeros(1)}, kind="other")
    return found


def sums(*modes: str, value: float = 0.5) -> pd.DataFrame:
    """A table of subsets: one vector, and both."""
    rows = [(mode, size, "+".join(TASKS[:size]), value / 3) for mode in modes for size in (1, 2)]
    table = pd.DataFrame(rows, columns=["mode", "num_vectors", "tasks", "absolute"])
    return table.assign(normalised=0.9)


def test_a_call_for_one_mode_keeps_the_rows_of_others(run: Run) -> None:
    write_table(run, "subsets", sums(*MODES), 1.0)
    path = write_table(run.with_(num_workers=1), "subsets", sums("standard", value=0.7), 2.0)
    expected = pd.concat([sums("standard", value=0.7), sums("linear")], ignore_index=True)
    pd.testing.assert_frame_equal(read_own(run, "subsets"), expected, check_exact=True)
    facts = read_json(path.with_suffix(".json"))
    assert (facts["seconds"], facts["config"]["num_workers"]) == (2.0, 1)
    earlier = facts["earlier"]["linear"]
    assert list(facts["earlier"]) == ["linear"]
    assert (earlier["seconds"], earlier["config"]["num_workers"]) == (1.0, None)
    names = {
        f"{t}Val/{name}.safetensors" for t in TASKS for name in ("finetuned", "linear_finetuned")
    }
    assert set(facts["checkpoints"]) == names
    write_table(run, "subsets", sums("standard"), 3.0)
    assert read_json(path.with_suffix(".json"))["earlier"] == {"linear": earlier}


def test_cosines_to_vectors_of_another_mode_are_kept(run: Run) -> None:
    rows = [(a, b, i) for i, (a, b) in enumerate((a, b) for a in MODES for b in MODES)]
    table = pd.DataFrame(rows, columns=["mode1", "mode2", "cosine"]).assign(task1="A", task2="B")
    write_table(run, "similarity", table, 1.0)
    own = table[(table["mode1"] == "linear") & (table["mode2"] == "linear")].assign(cosine=9)
    write_table(run, "similarity", own, 1.0)
    assert sorted(read_own(run, "similarity")["cosine"]) == [0, 1, 2, 9]


@pytest.mark.parametrize("change", ["settings", "checkpoints", "records", "columns", "damage"])
def test_what_does_not_belong_together_is_dropped_with_a_warning(
    change: str, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_table(run, "subsets", sums(*MODES), 1.0)
    table = sums("linear")
    if change == "settings":
        run = run.with_(subset_sample=7)
    elif change == "checkpoints":
        trained(run, "Signs", "standard", 9.0)
    elif change == "records":
        facts = read_json(path.with_suffix(".json"))
        del facts["checkpoints"]
        path.with_suffix(".json").write_text(json.dumps(facts))
    elif change == "columns":
        table = table.assign(own_absolute=0.1)
    else:
        path.write_bytes(b"\xff")
    write_table(run, "subsets", table, 1.0)
    assert set(read_table(run, "subsets")["mode"]) == {"linear"}
    lost = "standard is left out: " if change == "checkpoints" else "loses what it held of other"
    assert lost in caplog.text and str(path) in caplog.text
    caplog.clear()
    write_table(run, "subsets", table, 1.0)
    assert not caplog.text


def test_tables_of_other_data_sets_have_files_of_their_own(run: Run) -> None:
    whole = run.with_(tasks=None)
    pairs, analogies = ["Emoji+Signs", "Signs + MNISTVal"], ["Emoji + Signs-MNIST=Letters!Emoji"]
    names = {
        table_path(one, name).name
        for one in (whole, run, whole.with_(pairs=pairs), whole.with_(analogies=analogies))
        for name in ("subsets", "xi", "fronts", "analogies")
    }
    kinds = ("subsets", "xi", "fronts", "analogies")
    expected = {f"{name}{end}.csv" for name in kinds for end in ("", "-Emoji+Signs")}
    expected |= {f"{name}-Emoji+Signs,Signs+MNIST.csv" for name in ("xi", "fronts")}
    assert names == {*expected, "analogies-Emoji+Signs-MNIST=Letters!Emoji.csv"}
    many = [f"{one}+{other}" for one, other in zip(whole.tasks, whole.tasks[1:], strict=False)]
    longer = [f"{one}+{other}" for one, other in zip(whole.tasks, whole.tasks[2:], strict=False)]
    long = {table_path(whole.with_(pairs=p), "xi").name for p in (many, longer, many[:-1])}
    assert len(long) == 3 and max(map(len, long)) < 110
    write_table(whole, "subsets", sums("standard"), 1.0)
    write_table(run, "subsets", sums("linear"), 1.0)
    assert set(read_own(whole, "subsets")["mode"]) == {"standard"}


def test_a_table_of_earlier_checkpoints_is_not_read(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_table(run, "subsets", sums(*MODES), 1.0)
    assert takeaway(path.parent, path.stem, run).startswith("From one vector to all 2")
    trained(run, "Signs", "linear", 9.0)
    assert set(read_own(run, "subsets")["mode"]) == {"standard"}
    assert "linear is left out: " in caplog.text
    assert "SignsVal/linear_finetuned.safetensors is " in caplog.text
    told = takeaway(path.parent, path.stem, run)
    assert told == "Of earlier checkpoints of linear: run the analysis again."
    trained(run, "Emoji", "standard", 9.0)
    with pytest.raises(UsageError, match=r"of earlier checkpoints .*analyze\.py subsets"):
        read_own(run, "subsets")
    assert seeds.of_seeds([run], "subsets").empty and "seed 0 is left out" in caplog.text
    elsewhere = run.with_(save=str(run.folder.with_name("none")))  # as in a clone
    assert set(read_own(elsewhere, "subsets")["mode"]) == set(MODES)


@pytest.mark.parametrize("file", ["zeroshot", "ascent"])
def test_other_weights_that_a_table_is_made_of_count_too(file: str, run: Run) -> None:
    table = pd.DataFrame({"mode": MODES, "vector": "task", "task": "Signs", "target": 0.5})
    write_table(run, "negation_random", table, 1.0)
    if file == "ascent":
        trained(run, "Emoji", "standard+ascent", 9.0)
        assert set(read_own(run, "negation_random")["mode"]) == {"linear"}
    else:
        save_tensors(run.zeroshot_path, {"w": torch.ones(1)}, kind="other")
        with pytest.raises(UsageError, match=r"of earlier checkpoints \(zeroshot\.safetensors is"):
            read_own(run, "negation_random")


def test_comparisons_of_modes_need_the_standard_one(run: Run) -> None:
    table = pd.DataFrame({"task": TASKS, "standard": 0.9, "linear": 0.8, "advantage_linear": 0.1})
    write_table(run, "single", table, 1.0)
    trained(run, "Signs", "linear", 9.0)
    assert list(read_own(run, "single").columns) == ["task", "standard"]
    trained(run, "Signs", "standard", 9.0)
    with pytest.raises(UsageError, match="of earlier checkpoints"):
        read_own(run, "single")


def test_tables_of_before_are_read_with_a_warning(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_table(run, "subsets", sums("linear"), 1.0)
    facts = read_json(path.with_suffix(".json"))
    del facts["checkpoints"], facts["theta0_hash"]
    path.with_suffix(".json").write_text(json.dumps(facts))
    assert len(read_own(run.with_(save=str(run.folder.with_name("none"))), "subsets")) == 2
    assert not caplog.text
    assert len(read_own(run, "subsets")) == 2
    assert f"{path} does not record its checkpoints" in caplog.text


def test_figures_are_of_current_checkpoints(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("similarity", "layers"):
        table = pd.DataFrame({"mode": MODES, "task": "Signs", "layer": "one", "share": 1.0})
        write_table(run, name, table.assign(norm=1.0), 1.0)
    table_path(run, "similarity").unlink()
    trained(run, "Signs", "linear", 9.0)
    analyze.analyze(run, ["figures"])
    figure = run.results / "figures" / "layers-Emoji+Signs.svg"
    assert ">standard<" in (shown := figure.read_text(encoding="utf-8"))
    assert ">linear<" not in shown
    page = (run.results / "report.html").read_text(encoding="utf-8")
    assert "Of earlier checkpoints of linear" in page and "norm by layer, Emoji+Signs" in page
    figure.unlink()
    trained(run, "Signs", "standard", 9.0)
    analyze.analyze(run, ["figures"])
    assert "layers is not drawn: " in caplog.text and not figure.exists()
