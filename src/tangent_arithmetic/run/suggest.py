"""The command line that makes what is missing, with a run's settings."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any

from tangent_arithmetic.run.config import Config, checked
from tangent_arithmetic.run.provenance import ROOT
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.usage import RECIPE, USAGES

ONCE = ("finetuning_mode", "objective", "trainable", "restart")  # not for another command
OF_TRAINING = tuple(name for name in RECIPE if name != "batch_size")


def command(
    script: str, run: Run, mode: str | None = None, name: str | None = None, task: str | None = None
) -> str:
    """The command line that makes what is missing; it can be pasted into a shell.

    Args:
        script: of a clone, without its ending; without a clone its subcommand is named.
        run: the run; every setting that the script uses and that differs from its default is set.
        mode: a fine-tuning mode.
        name: of what the script is to make, for one that takes names.
        task: a data set that is to be fine-tuned, if all of the run's tasks may not hold it.
    """
    subcommand = next(key for key, usage in USAGES.items() if usage.script == script)
    clone = (ROOT / "src" / f"{script}.py").is_file()
    words = [f"python src/{script}.py" if clone else f"tangent-arithmetic {subcommand}"]
    if name is not None:
        words.append(name)
    if mode is not None:
        words.append(shlex.quote(f"--finetuning-mode={mode}"))
    for setting, value in _settings(run, subcommand, task).items():
        words.append(shlex.quote(_word(setting, value)))
    return " ".join(words)


def _settings(run: Run, subcommand: str, task: str | None) -> dict[str, Any]:
    """The settings to pass on, by name."""
    defaults, values = Config(), dict(vars(run.config))
    used = set(USAGES[subcommand].fields).difference(ONCE)
    if subcommand == "finetune":
        values["train_dataset"] = _to_train(run, task)
        if all(values[name] == getattr(defaults, name) for name in OF_TRAINING):
            used.discard("batch_size")  # that of an evaluation, not of training
    return {
        item.name: values[item.name]
        for item in fields(Config)
        if item.name in used
        and values[item.name] != checked(item.name, getattr(defaults, item.name))
    }


def _to_train(run: Run, task: str | None) -> list[str] | None:
    """The data sets to fine-tune on: `--train-dataset`, or what `--tasks` does not hold."""
    if run.config.train_dataset:
        return run.config.train_dataset
    named = run.config.eval_datasets
    if named and not run.config.tasks:
        texts = (text.partition("=") for text in named)
        return list(dict.fromkeys(n.removesuffix("Val") + eq + place for n, eq, place in texts))
    if task is not None and task.removesuffix("Val") not in run.tasks:
        return [task.removesuffix("Val")]
    return None


def _word(setting: str, value: Any) -> str:
    flag = setting.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={','.join(value) if isinstance(value, list) else value}"
