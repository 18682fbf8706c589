"""The code blocks of our own README run, and so do doctests."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import torch

import src.linearize

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_your_own_model_in_ten_lines() -> None:
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(python_blocks()[0], scope)
    assert scope["tau"].norm() > 0
    with torch.no_grad():
        difference = scope["forgetful"](scope["x"]) - scope["model"](scope["x"])
    assert difference.abs().max() > 1e-3


def test_doctests() -> None:
    result = doctest.testmod(src.linearize)
    assert result.attempted > 0 and result.failed == 0


def test_every_file_that_the_readme_names_is_there() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"(?:bash|python) ((?:src|scripts)/\w+\.\w+)", README):
        assert (ROOT / name).exists(), name
