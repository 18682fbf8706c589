"""What is wrong with a command line is said before PyTorch is imported."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tangent_arithmetic.run.checks import architectures, parse_command
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.runtime.errors import UsageError

MODE = "--finetuning-mode=linear"
CASES = [
    ("finetune", [], "finetune.py needs a fine-tuning mode; choose --finetuning-mode=standard"),
    ("finetune", ["--finetuning-mode=posthoc"], "finetune.py has no fine-tuning mode 'posthoc'"),
    ("add", ["--finetuning-mode=none"], "eval_task_addition.py has no fine-tuning mode 'none'"),
    ("analyze", ["--finetuning-mode=none"], "analyze.py has no fine-tuning mode 'none'"),
    ("finetune", [MODE, "--train-dataset=MNITS"], "suite embedded 'MNITS'; choose from MNIST, "),
    ("evaluate", [MODE, "--eval-datasets=Sign"], "suite embedded 'Sign'; choose from Signs, "),
    ("add", [MODE, "--tasks=MNIST,Car"], "data set of suite embedded 'Car'; choose from "),
    ("add", [MODE, "--tasks=MNIST,MNISTVal"], "names MNIST twice"),
    ("negate", [MODE, "--control-dataset=Shape"], "suite embedded 'Shape'; choose from Shapes, "),
    ("negate", [MODE, "--control-dataset=MNIST"], "is one of the run's tasks"),
    ("add", [MODE, "--suite=clip"], "unknown suite 'clip'; choose from clip8, "),
    ("add", [MODE, "--suite=none.yaml"], "none.yaml does not exist"),
    ("add", [MODE, "--tasks=pets=nowhere/pets"], "nowhere/pets does not exist"),
    ("add", [MODE, "--model=ViT-B-23"], "'ViT-B-23'; nearest of open_clip's: ViT-B-32"),
    ("add", [MODE, "--model=local-dir:nowhere"], "expected a folder at nowhere, found none"),
    ("add", [MODE, "--load=nowhere/at/all.pt"], "expected a checkpoint at nowhere/at/all.pt"),
    ("analyze", ["--pairs=MNIST+Sing"], "data set of suite embedded 'Sing'; choose from Signs, "),
    ("analyze", ["--analogies=MNIST+Signs-Emoij=Letters"], "'Emoij'; choose from Emoji, "),
    ("analyze", ["--analogies=MNIST+Signs-Emoji=Letters!Emoij"], "'Emoij'; choose from Emoji, "),
    ("analyze", ["--pairs=Emoji-Letters"], "data set of suite embedded 'Emoji-Letters'"),
    (
        "finetune",
        ["--finetuning-mode=linear+taujp", "--tasks=Emoji,Letters", "--others=Letters"],
        "other data sets than Letters",
    ),
    ("analyze", ["singel"], "unknown analysis 'singel'; choose from single, "),
]


@pytest.mark.parametrize(("command", "words", "message"), CASES)
def test_a_mistake_is_refused_by_name(command: str, words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_command(command, words)
    assert message in str(refused.value)


def test_a_mistake_is_refused_without_torch(tmp_path: Path) -> None:
    """All of them in one process, which then has imported nothing heavy."""
    code = f"""
import sys
from tangent_arithmetic.commands.cli import main
for command, words, _ in {CASES!r}:
    assert main([command, *words]) == 2, words
print(*sorted({{"torch", "pandas", "open_clip"}} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "\n" and done.stderr.count("error: ") == len(CASES)


@pytest.mark.parametrize(
    "model",
    [
        *("ViT-Nano-8", "ViT-Nano-8__init__", "ViT-B-32", "ViT-B/32", "ViT-B-16__pretrained__x.pt"),
        *("hf-hub:a/b", "timm:resnet50", "torchvision:resnet18", "python:m:f", "RN50-quickgelu"),
    ],
)
def test_names_of_models_that_may_exist_are_accepted(model: str) -> None:
    words = [MODE, f"--model={model}", "--suite=embedded"]
    assert parse_command("finetune", words)[1].model == model


def test_architectures_are_those_of_open_clip() -> None:
    import open_clip

    assert set(architectures()) == set(open_clip.list_models())


def test_a_checkpoint_may_be_meant_by_another_name(tmp_path: Path) -> None:
    (tmp_path / "MNISTVal").mkdir()
    (tmp_path / "zeroshot.safetensors").touch()
    for name in ("zeroshot.pt", "MNIST/zeroshot.pt", "MNISTVal/linear_zeroshot.pt"):
        path = str(tmp_path / name)
        assert parse_command("finetune", [MODE, f"--load={path}"])[1].load == [path]


def test_a_registered_mode_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = dataclasses.replace(MODES["linear"], name="mine", prefix="mine_")
    monkeypatch.setitem(MODES, "mine", mine)
    assert parse_command("add", ["--finetuning-mode=mine"])[1].finetuning_mode == "mine"
