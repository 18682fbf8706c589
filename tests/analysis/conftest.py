"""A small run, with both modes fine-tuned and everything evaluated that analyses read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from src import eval_single_task, eval_task_addition, eval_task_negation, finetune
from src.args import Config, parse_arguments
from tests.small_suite import flags, small_suite


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Settings of the run."""
    folder = tmp_path_factory.mktemp("analysis")
    with pytest.MonkeyPatch.context() as patch, small_suite(patch):
        for mode in ("standard", "linear"):
            assert finetune.main([f"--finetuning-mode={mode}", *flags(folder)]) == 0
        for mode in ("none", "standard", "linear", "posthoc"):
            assert eval_single_task.main([f"--finetuning-mode={mode}", *flags(folder)]) == 0
        for mode in ("standard", "linear", "posthoc"):
            assert eval_task_addition.main([f"--finetuning-mode={mode}", *flags(folder)]) == 0
            assert eval_task_negation.main([f"--finetuning-mode={mode}", *flags(folder)]) == 0
        yield parse_arguments(flags(folder))
