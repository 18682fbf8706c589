"""Own images from folders to sums, with the commands that a user types."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tangent_arithmetic.commands.cli import main
from tangent_arithmetic.run.modes import LINEAR, ZEROSHOT

SETS = {"colours": ("red", "blue"), "lines": ("horizontal", "vertical")}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders of twenty images each in the working directory."""
    rng = np.random.default_rng(0)
    for name, classes in SETS.items():
        for label, folder in enumerate(classes):
            (tmp_path / name / folder).mkdir(parents=True)
            for i in range(10):
                pixels = rng.integers(0, 60, (32, 32, 3)).astype(np.uint8)
                if name == "colours":
                    pixels[4:28, 4:28, 2 * label] = 220
                else:
                    (pixels if label == 0 else pixels.swapaxes(0, 1))[::4] = 220
                Image.fromarray(pixels).save(tmp_path / name / folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_folders_become_a_suite_that_is_tuned_and_added(
    own: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["suite", "init", *SETS, "--output=mine.yaml"]) == 0
    flags = ["--suite=mine.yaml", "--device=cpu", f"--cache-dir={cache}"]
    linear = f"--finetuning-mode={LINEAR.name}"
    assert main(["finetune", linear, "--epochs=2", *flags]) == 0
    for mode in (f"--finetuning-mode={ZEROSHOT.name}", linear):
        assert main(["evaluate", mode, *flags]) == 0  # without a control set
    assert main(["add", linear, "--n-eval-points=3", *flags]) == 0
    results = own / "results" / "mine" / "ViT-Nano-8"
    added = json.loads((results / "linear_additions.json").read_text())
    assert added["test"]["avg_top1"] >= 0.75 and added["provenance"]["suite"] == "mine"
    assert "colours" in (results / "report.html").read_text()
    capsys.readouterr()
    assert main(["negate", linear, *flags]) == 2
    assert "suite mine has no control set" in capsys.readouterr().err


@pytest.mark.slow
def test_a_control_set_from_a_flag_is_preserved(
    own: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tasks=colours=colours", "--control-dataset=lines=lines", "--device=cpu"]
    flags += [f"--cache-dir={cache}", "--n-eval-points=3"]
    linear = f"--finetuning-mode={LINEAR.name}"
    assert main(["finetune", linear, "--epochs=1", *flags]) == 0
    assert main(["evaluate", f"--finetuning-mode={ZEROSHOT.name}", *flags]) == 0
    assert main(["negate", linear, *flags]) == 0
    assert "lines zero-shot" in capsys.readouterr().out
    assert (own / "results" / "own" / "ViT-Nano-8" / "linear_negations.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks=pets=nowhere"], "data set pets: nowhere does not exist"),
        (["--tasks=colours=colours?epoch=2"], "unknown option of data set colours"),
        (["--suite=none.yaml"], "none.yaml does not exist"),
        (["--tasks=colours=colours", "--template=a photo"], "expected as template a prompt with"),
    ],
)
def test_wrong_sources_end_with_code_2(
    words: list[str], message: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", f"--finetuning-mode={LINEAR.name}", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (own / "checkpoints").exists()
