"""Every script on the miniature of the public data sets, with a random CLIP.

The CLIP is a tiny ViT, so that CI can afford it. The same at true size (an hour; ImageNet's head
has one prompt a class then, since the text tower would need more than an hour for its 80):

    CLIP8_MODEL=ViT-B-32__init__ python -m pytest -m slow tests/test_clip8_end_to_end.py
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tangent_arithmetic.commands import add as eval_task_addition
from tangent_arithmetic.commands import evaluate as eval_single_task
from tangent_arithmetic.commands import finetune
from tangent_arithmetic.commands import negate as eval_task_negation
from tangent_arithmetic.data.registry import get_dataset
from tangent_arithmetic.data.suites import get_suite
from tangent_arithmetic.data.templates import get_templates
from tangent_arithmetic.run.results import load_results
from tests.clip8_miniature import make_miniature
from tests.towers import known_towers

pytestmark = [pytest.mark.clip, pytest.mark.slow]
TASKS = tuple(get_suite("clip8").tasks)
TINY = "ViT-Tiny__init__"
MODEL = os.environ.get("CLIP8_MODEL", TINY)
EDITED = ("standard", "linear", "posthoc")


def flags(root: Path, model: str) -> list[str]:
    return [
        f"--model={model}",
        "--suite=clip8",
        "--epochs=2",
        "--batch-size=32",
        "--lr=1e-3",
        "--n-eval-points=3",
        "--num-workers=0",
        "--device=cpu",
        f"--data-location={root / 'data'}",
        f"--save={root / 'checkpoints'}",
        f"--results={root / 'results'}",
        f"--cache-dir={root / 'cache'}",
    ]


def first_template_of_imagenet(name: str, suite: str) -> list[Callable[[str], str]]:
    return get_templates(name, suite)[: 1 if name == "ImageNet" else None]


def run_everything(root: Path, argv: list[str]) -> None:
    for mode in ("standard", "linear"):
        assert finetune.main([*argv, f"--finetuning-mode={mode}"]) == 0
    for mode in ("none", *EDITED):
        assert eval_single_task.main([*argv, f"--finetuning-mode={mode}"]) == 0
    for script, mode in itertools.product((eval_task_addition, eval_task_negation), EDITED):
        assert script.main([*argv, f"--finetuning-mode={mode}"]) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which everything has run."""
    folder = tmp_path_factory.mktemp("clip8")
    with pytest.MonkeyPatch.context() as patch, known_towers(folder):
        make_miniature(folder / "data", patch)
        if MODEL != TINY:
            patch.setattr(
                "tangent_arithmetic.encoders.heads.get_templates", first_template_of_imagenet
            )
        run_everything(folder, flags(folder, MODEL))
        yield folder


def test_results_of_every_task_and_mode_are_there(root: Path) -> None:
    (found,) = (root / "results" / "clip8").iterdir()
    for name in ("zeroshot", "ft", "linear_ft", "posthoc_ft"):
        results = load_results(found / f"{name}_accuracies.json")
        assert all(0 <= results[f"{task}{split}"] <= 1 for task in TASKS for split in ("", "Val"))
    for prefix in ("", "linear_", "posthoc_"):
        added = load_results(found / f"{prefix}additions.json")
        assert {f"{task}:top1" for task in TASKS} <= set(added["test"])
        assert set(load_results(found / f"{prefix}negations.json")) >= set(TASKS)
    assert "ImageNet" in load_results(found / "zeroshot_accuracies.json")


def test_every_task_has_its_checkpoints_and_one_head(root: Path) -> None:
    folder = root / "checkpoints"
    for task in TASKS:
        assert (folder / f"{task}Val" / "finetuned.safetensors").is_file()
        assert (folder / f"{task}Val" / "linear_finetuned.safetensors").is_file()
    heads = {path.stem for path in folder.glob("head_*")}
    assert heads == {f"head_{name}" for name in (*TASKS, "ImageNet")}


def test_no_validation_picture_is_trained_on(root: Path) -> None:
    for task in TASKS:
        data = get_dataset(f"{task}Val", None, root / "data", suite="clip8")
        whole = get_dataset(task, None, root / "data", suite="clip8")
        assert len(data.test) > 0
        if task != "EuroSAT":  # has a folder of its own
            assert len(data.train) + len(data.test) == len(whole.train)
