"""A suggested command does what the run that suggests it needs, and nothing else."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from tangent_arithmetic.run.args import Config, parse_arguments, parse_names
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.suggest import ONCE, command
from tangent_arithmetic.run.usage import USAGES

# a value of every flag, other than its default
VALUES: dict[str, Any] = {
    "model": "ViT-Nano-8__init__", "suite": "embedded", "tasks": ["MNIST", "Signs"],
    "train_dataset": ["Signs"], "eval_datasets": ["MNIST"], "control_dataset": "Emoji",
    "template": "a photo of a {}, isn't it?", "head": "probe", "data_location": "/d a t a",
    "data_source": "folder", "save": "runs/it's mine", "results": "r", "load": ["a.pt"],
    "cache_dir": "c$HOME", "openclip_cachedir": "o", "results_db": "db", "batch_size": 3,
    "num_grad_accumulation": 2, "lr": 0.25, "wd": 0.0, "ls": 0.5, "warmup_length": 4, "epochs": 7,
    "checkpoint_every": 2, "state_every": 9, "restart": True, "seed": 5, "n_eval_points": 3,
    "sample": 8, "control_threshold": 0.5, "pairs": ["MNIST+Signs"], "grid_points": 3,
    "subset_sample": 1, "analogies": ["A+B-C=D"], "shots": ["2"], "explorer_megabytes": 2.0,
    "feature_cache": False, "ahead": "page", "device": "cpu", "precision": "bf16", "world_size": 2,
    "port": 4000,
    "num_workers": 1, "exp_name": "one two", "wandb": True, "style": "paper",
    "interference_split": "validation", "penalty": 3.0, "penalty_norm": "plain",
    "others": ["MNIST"], "others_batch_size": 8, "others_per_step": "all", "factors": "kfac",
    "factor_images": 64, "factor_rank": 32, "factor_directions": 0, "teacher": "linear",
    "coef_min": 0.1, "coef_max": 2.0, "coefs_per_step": 3, "coefficients": "task",
    "unlabelled": "entropy", "ridge": 0.1, "coefficient_bounds": ["0", "2"],
    "solver": "gauss-newton", "negate": True, "recipe": "fast", "optimizer": "sgd",
    "schedule": "constant", "averaging": 0.5, "image_share": 0.3, "target": 0.9, "patience": 3,
    "modes": ["linear"], "kernel_images": 5, "kernel_directions": 7,
}  # fmt: skip
FREE = {*ONCE, "finetuning_accuracies"}


def test_the_table_has_every_flag_with_another_value() -> None:
    defaults = vars(parse_arguments([]))
    assert VALUES.keys() | FREE == defaults.keys() | {"restart"}
    assert all(VALUES[name] != defaults[name] for name in VALUES)
    assert {name for usage in USAGES.values() for name in usage.fields} == VALUES.keys() | set(ONCE)


@pytest.mark.parametrize("subcommand", USAGES)
def test_a_suggested_command_gives_the_same_settings(subcommand: str) -> None:
    usage = USAGES[subcommand]
    run = Run.of(Config(**VALUES))
    program, script, *words = shlex.split(command(usage.script, run, usage.modes()[-1]))
    assert (program, script) == ("python", f"src/{usage.script}.py")
    parsed = parse_arguments(words)
    for name in VALUES.keys() - FREE:
        expected = VALUES[name] if name in usage.fields else getattr(parse_arguments([]), name)
        assert getattr(parsed, name) == expected, name
    assert parsed.finetuning_mode == usage.modes()[-1]


def suggested(script: str, argv: list[str], **options: Any) -> list[str]:
    run = Run.of(parse_arguments(argv))
    return shlex.split(command(script, run, "linear", **options))[2:]


@pytest.mark.parametrize(
    ("argv", "task", "expected"),
    [
        ([], None, []),
        (["--tasks=MNIST,Signs"], "MNIST", ["--tasks=MNIST,Signs"]),
        (["--eval-datasets=EmojiVal,Emoji"], "Emoji", ["--train-dataset=Emoji"]),
        (["--tasks=MNIST"], "Emoji", ["--tasks=MNIST", "--train-dataset=Emoji"]),
        ([], "DigitsVal", ["--train-dataset=Digits"]),
        (["--batch-size=512"], None, []),  # of the evaluation
        (["--batch-size=16", "--epochs=2"], None, ["--batch-size=16", "--epochs=2"]),
    ],
)
def test_what_is_to_be_fine_tuned_and_how(
    argv: list[str], task: str | None, expected: list[str]
) -> None:
    found = suggested("finetune", argv, task=task)
    assert found == ["--finetuning-mode=linear", *expected]


def test_sources_of_own_data_are_kept(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "my pets" / label).mkdir(parents=True)
    flag = f"--tasks=pets={tmp_path / 'my pets'}"
    words = ["--finetuning-mode=linear", flag]
    assert suggested("finetune", [flag], task="pets") == words
    assert suggested("eval_single_task", [flag]) == words
    named = flag.replace("--tasks", "--eval-datasets")
    words[1] = flag.replace("--tasks", "--train-dataset")
    assert suggested("finetune", [named], task="pets") == words


def test_without_a_clone_the_subcommand_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tangent_arithmetic.run.suggest.ROOT", Path("/nowhere"))
    line = command("analyze", Run.of(Config(seed=3)), name="report")
    program, subcommand, *words = shlex.split(line)
    assert (program, subcommand) == ("tangent-arithmetic", "analyze")
    names, config = parse_names(("report",), "analysis", words)
    assert names == ["report"] and config.seed == 3


def test_a_mode_with_a_regular_expression_can_be_pasted() -> None:
    mode = r"linear+.*\.(attn|mlp)\..*"
    run = Run.of(parse_arguments([f"--finetuning-mode={mode}"]))
    assert f"--finetuning-mode={mode}" in shlex.split(command("eval_single_task", run, mode))
