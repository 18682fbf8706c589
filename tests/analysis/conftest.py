"""A small run, with both modes fine-tuned and everything evaluated that analyses read."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tangent_arithmetic.commands import add as eval_task_addition
from tangent_arithmetic.commands import evaluate as eval_single_task
from tangent_arithmetic.commands import finetune
from tangent_arithmetic.commands import negate as eval_task_negation
from tangent_arithmetic.run.args import Config, parse_arguments
from tests.small_suite import flags, small_suite


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Settings of the run, whose files are there, in the home folder of who ran it."""
    folder = tmp_path_factory.mktemp("analysis")
    with pytest.MonkeyPatch.context() as patch, small_suite(patch):
        patch.setenv("HOME", str(folder))
        for mode in ("standard", "linear"):
            database = f"--results-db={folder / 'all.jsonl'}"
            assert finetune.main([f"--finetuning-mode={mode}", database, *flags(folder)]) == 0
        for mode in ("none", "standard", "linear", "posthoc"):
            assert eval_single_task.main([f"--finetuning-mode={mode}", *flags(folder)]) == 0
        for mode in ("standard", "linear", "posthoc"):
            assert eval_task_addition.main([f"--finetuning-mode={mode}", *flags(folder)]) == 0
            assert eval_task_negation.main([f"--finetuning-mode={mode}", *flags(folder)]) == 0
        return parse_arguments(flags(folder))


@pytest.fixture(scope="module")
def run(made: Config) -> Iterator[Config]:
    """The run, with its small sets in place: for a module, for other tests need the true ones.

    Its results are every test's; a test that writes results takes `args`.
    """
    with pytest.MonkeyPatch.context() as patch, small_suite(patch):
        before = _contents(made)
        yield made
        assert _contents(made) == before, "a test wrote results into the run that all tests share"


@pytest.fixture
def args(run: Config, tmp_path: Path) -> Config:
    """The run's settings, with a copy of its results."""
    own = copy.copy(run)
    shutil.copytree(run.results, tmp_path / "results")
    own.results = str(tmp_path / "results")
    return own


@pytest.fixture
def words(made: Config, args: Config) -> list[str]:
    """The command line of `args`."""
    assert made.save is not None
    return flags(Path(made.save).parent, args.results)


def _contents(run: Config) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(run.results).rglob("*") if path.is_file()}
