"""Ours against fusion-bench and mergekit; `scripts/make_golden.py` made the values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tangent_arithmetic.merging import get_method
from tangent_arithmetic.merging.methods import dare, della
from tangent_arithmetic.merging.pool import ModelPool
from tangent_arithmetic.merging.stream import Merge, merged_state

GOLDEN = Path(__file__).parent.parent / "golden"
LIBRARIES = ("fusion_bench", "mergekit")
CONTENT = {name: json.loads((GOLDEN / f"merging_{name}.json").read_text()) for name in LIBRARIES}
CASES = [(name, i) for name in LIBRARIES for i in range(len(CONTENT[name]["cases"]))]


def states(content: dict[str, Any], dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: torch.tensor(value, dtype=dtype) for key, value in state.items()}
        for name, state in content.items()
    }


@pytest.mark.parametrize(("library", "index"), CASES)
def test_merged_weights_equal_theirs_to_rounding(
    library: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = CONTENT[library]
    case = content["cases"][index]
    numbers = states(content["numbers"], torch.float32)
    for module in (dare, della):
        monkeypatch.setattr(
            module,
            "uniform",
            lambda seed, model, name, start, size: numbers[model][name].reshape(-1)[start:][:size],
        )
    models = states(content["models"], torch.float32)
    pool = ModelPool({name: models[name] for name in case["models"]})
    found = merged_state(Merge(pool, get_method(case["method"]), case["options"]))
    assert found.keys() == case["merged"].keys()
    for name, value in case["merged"].items():
        expected = torch.tensor(value)
        if (library, case["method"], name) == ("mergekit", "model_stock", "0.weight"):
            expected = models["_pretrained_"][name]  # t is -0.009: mergekit goes beyond theta0
        torch.testing.assert_close(found[name], expected, rtol=2e-6, atol=2e-7)


def test_every_method_has_a_golden_value_or_a_dense_reference() -> None:
    from tangent_arithmetic.merging import METHODS
    from tests.merging import test_dense_references as dense
    from tests.merging import test_feature_matching as matching
    from tests.merging import test_spaces as spaces
    from tests.merging import test_with_data as with_data

    covered = {case["method"] for name in LIBRARIES for case in CONTENT[name]["cases"]}
    own = {
        n
        for n, m in METHODS.items()
        if m.function.__module__.startswith("tangent_arithmetic.merging.")
    }
    text, of_spaces, on_images, matched = (
        Path(str(module.__file__)).read_text(encoding="utf-8")
        for module in (dense, spaces, with_data, matching)
    )
    text, on_images = text + of_spaces, on_images + matched
    referenced = {
        n
        for n in own
        if (f'"{n}"' in on_images if METHODS[n].needs_data else f"{METHODS[n].algorithm}(" in text)
    }
    assert covered | referenced == own - {"dummy"}
