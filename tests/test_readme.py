"""The code blocks of our own README and docs run, and so do doctests."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tangent_arithmetic.tangent.rules import RULES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
TANGENT = DOCS["tangent.md"]
SOURCES = ROOT / "src"
WITH_DOCTESTS = sorted(
    path.relative_to(SOURCES).with_suffix("").as_posix().replace("/", ".")
    for path in (SOURCES / "tangent_arithmetic").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def python_blocks(text: str = README) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_your_own_model_in_ten_lines() -> None:
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(python_blocks()[0], scope)
    assert scope["tau"].norm() > 0
    with torch.no_grad():
        difference = scope["forgetful"](scope["x"]) - scope["model"](scope["x"])
    assert difference.abs().max() > 1e-3


def test_the_page_on_the_engine() -> None:
    torch.manual_seed(0)
    use, own_rule = python_blocks(TANGENT)
    scope: dict[str, Any] = {}
    exec(use, scope)
    jvp, model, theta0, v, x = (scope[name] for name in ("jvp", "model", "theta0", "v", "x"))
    assert torch.allclose(scope["d1"], jvp(model, theta0, v, x)[1])
    assert all(value.grad is not None for value in scope["theta"].values())
    before = dict(RULES)
    try:
        exec(own_rule, scope)
        assert torch.sinh in RULES
    finally:
        RULES.clear()
        RULES.update(before)


@pytest.mark.parametrize("module", WITH_DOCTESTS)
def test_doctests(module: str) -> None:
    before = dict(RULES)
    try:
        result = doctest.testmod(importlib.import_module(module))
    finally:
        RULES.clear()
        RULES.update(before)
    assert result.attempted > 0 and result.failed == 0


def test_every_file_that_the_readme_names_is_there() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
    for page, text in DOCS.items():
        for name in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / "docs" / name).exists(), (page, name)
    for page, text in {**DOCS, "README.md": README}.items():
        for name in re.findall(r"(?:bash|python) ((?:src|scripts)/\w+\.\w+)", text):
            assert (ROOT / name).exists(), (page, name)
