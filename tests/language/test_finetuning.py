from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tangent_arithmetic.language.checkpoints import FACTS, load_causal
from tangent_arithmetic.language.finetuning import Vectors, finetune
from tangent_arithmetic.language.settings import Mode, Settings
from tangent_arithmetic.language.tokens import TokenRows
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.reading import read_json
from tangent_arithmetic.training.recipe import Recipe
from tests.language.makers import gpt2

RECIPE = Recipe(
    lr=0.01, epochs=1, batch_size=1, num_grad_accumulation=1, warmup_length=0, wd=0, ls=0
)


def test_rows_without_a_next_token_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.tensor([[5, 6], [7, -1], [8, 9], [-1, 4]])
    with caplog.at_level(logging.INFO, logger="tangent_arithmetic"):
        done = finetune(gpt2(), TokenRows(rows), RECIPE)
    assert done["steps"] == 2 and math.isfinite(done["last_epoch_loss"])
    assert "2 rows without a next token are left out" in caplog.text
    with pytest.raises(UsageError, match="expected rows of two tokens or more, got 2"):
        finetune(gpt2(), TokenRows(rows[1::2]), RECIPE)


@pytest.mark.parametrize("mode", ["standard", "linear"])
def test_a_kept_model_is_of_its_data(mode, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, rows = gpt2(), TokenRows(torch.randint(3, 40, (3, 4)))
    made = []
    for _ in range(2):
        vectors = Vectors(Settings("tiny", tmp_path, RECIPE, mode=mode), None)
        vectors.get("a", base, lambda: rows, load_causal)
        made.append(vectors.hashes["a"])
    assert made[0] == made[1] and made[0]["theta0"] != made[0]["theta"]
    with pytest.raises(UsageError, match=r"data was \w{12}\.\.\., is now .* with --save"):
        vectors.get("a", base, lambda: TokenRows(rows.ids + 1), load_causal)


@pytest.mark.parametrize("mode", ["standard", "linear"])
def test_a_kept_model_is_of_its_base(
    mode: Mode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, other, rows = gpt2(), gpt2(), TokenRows(torch.randint(3, 40, (3, 4)))
    settings = Settings("tiny", tmp_path, RECIPE, mode=mode)
    Vectors(settings, None).get("a", base, lambda: rows, load_causal)
    folder = tmp_path / f"{mode}_a"
    published = replace(settings, finetuned={"a": str(folder)})
    Vectors(published, None).get("a", base, lambda: rows, load_causal)
    for each, flag in ((settings, "--save"), (published, "--finetuned")):
        with pytest.raises(UsageError, match=rf"theta0 was \w{{12}}\.\.\., is now .* with {flag}"):
            Vectors(each, None).get("a", other, lambda: rows, load_causal)
    assert not caplog.records
    path = folder / FACTS
    facts = {name: value for name, value in read_json(path).items() if name != "theta0"}
    path.write_text(json.dumps(facts))
    Vectors(settings, None).get("a", base, lambda: rows, load_causal)
    assert "an earlier version, which recorded no hash of theta0; delete it" in caplog.text
