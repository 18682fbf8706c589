"""A small run, fine-tuned in both modes and evaluated, trained once per session for all rooms."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib import pyplot

from tangent_arithmetic.commands import add, evaluate, finetune, negate
from tangent_arithmetic.run.run import Run
from tests.small_suite import SIZES, flags, small_config, small_suite


@pytest.fixture(autouse=True)
def figures_closed() -> Iterator[None]:
    yield
    pyplot.close("all")


@contextmanager
def smaller_suite() -> Iterator[None]:
    """The small suite with fewer images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "val", 20)
        patch.setitem(SIZES, "test", 24)
        with small_suite(patch):
            yield


@functools.cache
def trained(base: Path) -> Path:
    """The folder of the run, which is also the home folder of the user who made it.

    Args:
        base: pytest's temporary folder of this session.
    """
    folder = base / "small_run"
    folder.mkdir()
    with smaller_suite(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        words, database = flags(folder), f"--results-db={folder / 'all.jsonl'}"
        for mode in ("standard", "linear"):
            assert finetune.main([f"--finetuning-mode={mode}", database, *words]) == 0
        assert evaluate.main(["--finetuning-mode=none", *words]) == 0
        for mode in ("standard", "linear", "posthoc"):
            for command in (evaluate, add, negate):
                assert command.main([f"--finetuning-mode={mode}", *words]) == 0
    return folder


@functools.cache
def varied(base: Path) -> Path:
    """The folder of a copy of the run that has the mode linear+taujp too, evaluated in all ways."""
    folder = base / "varied_run"
    shutil.copytree(trained(base), folder)
    with smaller_suite():
        words = [*flags(folder), "--finetuning-mode=linear+taujp", "--others-batch-size=8"]
        assert finetune.main([word for word in words if not word.startswith("--results=")]) == 0
        for command in (evaluate, add, negate):
            assert command.main(words) == 0
    return folder


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The run of `varied`, whose results tests may add to."""
    folder = varied(tmp_path_factory.getbasetemp())
    with smaller_suite():
        yield Run.of(small_config(folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The run and its suite; tests must not write into its results, see `own`."""
    folder = trained(tmp_path_factory.getbasetemp())
    with smaller_suite():
        shared = Run.of(small_config(folder))
        before = _contents(shared)
        yield shared
        assert _contents(shared) == before, "a test wrote into the results that all tests share"


@pytest.fixture
def own(run: Run, tmp_path: Path) -> Run:
    """The run with a copy of its results."""
    shutil.copytree(run.config.results, tmp_path / "results")
    return run.with_(results=str(tmp_path / "results"))


@pytest.fixture
def words(own: Run, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of `own`."""
    return flags(trained(tmp_path_factory.getbasetemp()), own.config.results)


def _contents(run: Run) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.results.rglob("*") if path.is_file()}
