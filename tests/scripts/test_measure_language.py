from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from tangent_arithmetic.language.models import CausalLM
from tests.commands.test_reproduce import script
from tests.language.makers import gpt2


def test_figures_of_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = script("measure_language")
    monkeypatch.setattr(measure, "gpt2", lambda layers: gpt2(n_layer=layers, vocab_size=50257))
    path = tmp_path / "figures.json"
    words = ["--layers=1", "--tokens=6", "--coefficients=4", "--rounds=1", f"--output={path}"]
    monkeypatch.setattr("sys.argv", ["measure_language.py", *words])
    assert measure.main() == 0
    found = json.loads(path.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert set(found["step, seconds"]) == {"standard", "linear", "torch.func.jvp"}
    assert 0 <= found["sweep, seconds"]["largest relative difference of perplexity"] < 1e-5


def test_the_model_is_gpt_2(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = script("measure_language")
    tiny = gpt2().model
    monkeypatch.setattr(transformers, "GPT2LMHeadModel", lambda config: tiny)
    assert isinstance(measure.gpt2(1), CausalLM)
