"""The study of TAK's factors, on a small run: its ratios are those of the comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from tangent_arithmetic.commands import finetune
from tangent_arithmetic.storage.reading import read_json
from tangent_arithmetic.training.factors import Settings
from tests.commands.test_reproduce import script
from tests.small_suite import flags, small_suite


@pytest.mark.slow
def test_ratios_of_a_small_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = script("study_factors")
    forms = {"ekfac": (16, Settings(rank=32, directions=8)), "diag": (16, Settings("diag"))}
    with small_suite(monkeypatch):
        assert finetune.main(["--finetuning-mode=linear", *flags(tmp_path)]) == 0
        monkeypatch.setattr(study, "FORMS", forms)
        argv = ["--of=Emoji", "--images=8", *flags(tmp_path)]
        assert study.main(argv) == 0
    found = read_json(tmp_path / "results" / "embedded" / "factors.json")
    assert found["of"] == "Emoji" and found["provenance"]["mode"] == "linear"
    assert found["rows"].keys() == forms.keys()
    for by_vector in found["rows"].values():
        assert by_vector.keys() == {"FashionMNIST", "random"}
    ekfac, diag = (found["rows"][form] for form in forms)
    assert 0 < diag["FashionMNIST"]["whole"] < ekfac["FashionMNIST"]["whole"]
    assert 0.3 < ekfac["random"]["layers"] < 3  # a random vector moves no layers in concert
    assert "| diag " in capsys.readouterr().out
