"""The command certify, on a small run."""

from __future__ import annotations

import pytest

from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.commands import certify
from tangent_arithmetic.report.certified import STATEMENT
from tangent_arithmetic.run.results import arithmetic_path, load_results
from tangent_arithmetic.run.run import Run
from tests.analysis.conftest import own, run, words
from tests.small_suite import TASKS

__all__ = ["own", "run", "words"]


def kept(edits: Edits, control: str, point: dict[str, float]) -> float:
    """The share of the control set's answers that stay at a point."""
    before, after = edits.predictions(control, [{}, point])[0]
    return float((before == after).double().mean())


@pytest.mark.parametrize("mode", ["linear", "posthoc"])
def test_certified_ranges_are_those_of_the_model(
    own: Run, words: list[str], mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert certify.main([f"--finetuning-mode={mode}", *words]) == 0
    out = capsys.readouterr().out
    path = arithmetic_path(own, mode, "certificates")
    results = load_results(path)
    edits, control = Edits(own, mode, TASKS), own.control
    origin = results["provenance"]
    assert origin["mode"] == mode and set(origin["checkpoints"]) == set(TASKS)
    assert results["control"]["images"] == len(edits.logits(control).labels)
    assert results["control"]["name"] == control
    assert results["control"]["accuracy"] == pytest.approx(edits.accuracies(control, [{}])[0])
    points = {**{task: {task: 1.0} for task in TASKS}, "sum of all": dict.fromkeys(TASKS, 1.0)}
    assert list(results["ranges"]) == list(points)
    for name, unit in points.items():
        for share, (low, high) in results["ranges"][name].items():
            assert out.count(f"| {name} ") == 1
            for end in (low, high):
                if end is None:
                    continue
                inside, outside = end * (1 - 1e-7), end * (1 + 1e-7)
                at = ({t: coef * u for t, u in unit.items()} for coef in (inside, outside))
                within, beyond = (kept(edits, control, point) for point in at)
                assert within >= float(share) > beyond
    radii = results["control"]["radii"]
    assert radii["1"] <= radii["0.99"] <= radii["0.95"]
    alone = [end for task in TASKS for end in results["ranges"][task]["1"] if end is not None]
    assert 0 < radii["1"] <= min(map(abs, alone))
    assert " ".join(STATEMENT.split()) in " ".join(out.split())
    assert f"wrote {path}" in out and (own.results / "report.html").is_file()


def test_one_task_has_no_sum(own: Run, words: list[str]) -> None:
    argv = ["--finetuning-mode=linear", *words, f"--tasks={TASKS[0]}"]
    assert certify.main(argv) == 0
    path = arithmetic_path(own.with_(tasks=[TASKS[0]]), "linear", "certificates")
    assert list(load_results(path)["ranges"]) == [TASKS[0]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--finetuning-mode=standard"], "standard"),
        ([], "--finetuning-mode"),
        (["--finetuning-mode=linear", "--control-dataset=Emoji"], "is one of the run's tasks"),
    ],
)
def test_refusals(
    words: list[str], argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert certify.main([*words, *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_table_of_unbounded_ranges() -> None:
    ends: list[list[float | None]] = [[-0.5, 0.25], [None, 2.0], [None, None]]
    shares = dict(zip(("1", "0.99", "0.95"), ends, strict=True))
    table = certify.certificate_table({"A": shares}).splitlines()
    assert table[0].split("|")[1:-1][1].strip() == "100 % stay"
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells == ["A", "-0.500 to 0.250", "-inf to 2.000", "-inf to inf"]
