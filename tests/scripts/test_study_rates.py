"""The study of rates and seeds, on a small run: its rows are what the checkpoints give."""

from __future__ import annotations

from pathlib import Path

import pytest

from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.run.models import split_of, task_vector, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.storage.reading import read_json
from tests.commands.test_reproduce import script
from tests.small_suite import TASKS, flags, small_config, small_suite


@pytest.mark.slow
def test_rows_are_what_the_checkpoints_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--modes=standard", "--factors=0.1,10", "--seeds=0,1", f"--folder={tmp_path / 'rates'}"]
    with small_suite(monkeypatch):
        assert script("study_rates").main([*flags(tmp_path), *argv]) == 0
        rows = read_json(tmp_path / "results/embedded/rates.json")["rows"]
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
    assert "standard, rate x 10" in capsys.readouterr().out
