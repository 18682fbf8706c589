"""What each command uses of the flags: a table for its help, its checks and suggested commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tangent_arithmetic.run.modes import MODES, edited, linear, trained

MODEL = ("finetuning_mode", "model", "load", "head", "openclip_cachedir", "save", "seed")
DATA = ("suite", "tasks", "template", "data_location", "data_source")
RECIPE = (
    *("recipe", "batch_size", "num_grad_accumulation", "lr", "wd", "ls", "warmup_length", "epochs"),
    *("optimizer", "schedule", "averaging", "image_share", "target", "patience"),
)
METHOD = ("objective", "trainable")
PENALTY = ("penalty", "penalty_norm", "others", "others_batch_size", "others_per_step")
DELTA = ("teacher", "coef_min", "coef_max", "coefs_per_step")
FACTORS = ("factors", "factor_images", "factor_rank", "factor_directions")
TRAINING = (*RECIPE, *PENALTY, *FACTORS, *DELTA)
STATES = ("checkpoint_every", "state_every", "restart")
EVALUATION = ("batch_size", "sample", "feature_cache", "results", "results_db")
ANALYSIS = (
    *("modes", "pairs", "grid_points", "subset_sample", "analogies", "shots", "interference_split"),
    *("kernel_images", "kernel_directions"),
    *("style", "explorer_megabytes"),
)
SOLVING = ("coefficients", "unlabelled", "negate", "ridge", "coefficient_bounds", "solver")
MACHINE = ("device", "precision", "world_size", "port", "num_workers", "cache_dir")
RECORDS = ("exp_name", "wandb")
ANALYSES = (
    *("single", "similarity", "interference", "disentanglement", "negation", "subsets"),
    *("fronts", "analogies", "few", "kernel", "cka", "ensembles", "seeds", "figures", "report"),
)
COMMON = (*MODEL, *METHOD, *DATA, *MACHINE, *RECORDS)
BATCHES = {"batch_size": "examples that are evaluated at a time (default: 256)"}


@dataclass(frozen=True)
class Usage:
    """How a command is used.

    Attributes:
        script: its name beside the package, without `.py`, as in the public projects.
        fields: the settings that it uses, by the names of `Config`.
        examples: command lines without the program's name.
        modes: names of the fine-tuning modes that it has.
        needs_mode: whether it has to be told one of them.
        names: what can be named among its flags; empty for nothing.
        noun: what that is, for messages.
        texts: its own help of a flag.
    """

    script: str
    fields: tuple[str, ...]
    examples: tuple[str, str, str]
    modes: Callable[[], list[str]] = edited
    needs_mode: bool = True
    names: tuple[str, ...] = ()
    noun: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)


USAGES = {
    "finetune": Usage(
        "finetune",
        (*COMMON, "train_dataset", *TRAINING, *STATES, "sample", "results_db"),
        (
            "finetune --finetuning-mode=linear",
            "finetune --finetuning-mode=standard --model=ViT-B-32 --train-dataset=MNIST,DTD",
            "finetune --finetuning-mode=linear --train-dataset=pets=pictures/pets --epochs=5",
        ),
        trained,
        texts={
            "sample": "measure validation accuracy on N examples (default: on at most 1,000)",
            "finetuning_mode": "what is trained: the model, or its linearisation; "
            "MODE+OBJECTIVE+TRAINABLE for variants, such as linear+taujp or standard+attention",
        },
    ),
    "evaluate": Usage(
        "eval_single_task",
        (*COMMON, "eval_datasets", "control_dataset", *EVALUATION, "ahead"),
        (
            "evaluate --finetuning-mode=none",
            "evaluate --finetuning-mode=linear --eval-datasets=MNIST,Signs",
            "evaluate --finetuning-mode=posthoc --sample=500 --device=cpu",
        ),
        lambda: list(MODES),
        texts=BATCHES,
    ),
    "add": Usage(
        "eval_task_addition",
        (*COMMON, *EVALUATION, "n_eval_points"),
        (
            "add --finetuning-mode=linear",
            "add --finetuning-mode=posthoc --tasks=MNIST,Signs",
            "add --finetuning-mode=standard --model=ViT-B-32 --n-eval-points=11",
        ),
        texts=BATCHES,
    ),
    "negate": Usage(
        "eval_task_negation",
        (*COMMON, "control_dataset", *EVALUATION, "n_eval_points", "control_threshold"),
        (
            "negate --finetuning-mode=linear",
            "negate --finetuning-mode=linear --tasks=MNIST --control-threshold=0.9",
            "negate --finetuning-mode=standard --tasks=MNIST --control-dataset=Signs",
        ),
        texts=BATCHES,
    ),
    "combine": Usage(
        "combine",
        (
            *(name for name in COMMON if name not in ("world_size", "port")),
            *("control_dataset", *EVALUATION, "n_eval_points", "control_threshold"),
            *(*SOLVING, "shots"),
        ),
        (
            "combine --finetuning-mode=linear",
            "combine --finetuning-mode=standard --coefficients=task --shots=4",
            "combine --finetuning-mode=linear --coefficients=layer --negate",
        ),
        texts={
            **BATCHES,
            "shots": "solve on N labelled validation examples a class (default: on all)",
            "sample": "solve and evaluate on N examples of each split (default: on all)",
        },
    ),
    "certify": Usage(
        "certify",
        (*COMMON, "control_dataset", *EVALUATION),
        (
            "certify --finetuning-mode=linear",
            "certify --finetuning-mode=linear --tasks=MNIST,Signs --control-dataset=Emoji",
            "certify --finetuning-mode=posthoc --sample=500 --device=cpu",
        ),
        linear,
        texts=BATCHES,
    ),
    "analyze": Usage(
        "analyze",
        (
            *(*COMMON, "control_dataset", *EVALUATION, *ANALYSIS),
            *("n_eval_points", "control_threshold"),
        ),
        (
            "analyze",
            "analyze report --explorer-megabytes=5",
            "analyze disentanglement --pairs=MNIST+Signs --grid-points=21",
        ),
        needs_mode=False,
        names=ANALYSES,
        noun="analysis",
        texts={
            **BATCHES,
            "finetuning_mode": "the only mode to analyse (default: those with checkpoints)",
        },
    ),
}

REPRODUCE = Usage(
    "reproduce",
    (
        *(name for name in COMMON if name not in ("finetuning_mode", "seed", *METHOD)),
        *(*TRAINING, *STATES, "control_dataset", *EVALUATION, "n_eval_points"),
        *("control_threshold", "explorer_megabytes"),
    ),
    (
        "reproduce --quick",
        "reproduce --seeds=3 --modes=standard,linear,linear+taujp",
        "reproduce --suite=mine.yaml --model=ViT-B-32 --device=cuda",
    ),
    needs_mode=False,
)


def examples_of(lines: tuple[str, ...]) -> str:
    """A command's examples, for the end of its description."""
    return "\n".join(["Examples:", *(f"  tangent-arithmetic {line}" for line in lines)])


def choices(command: str) -> dict[str, tuple[str, ...]]:
    """Names that shell completion offers for a command's flags; other values are valid too."""
    from tangent_arithmetic.data.suites import EMBEDDED_MODEL, SUITES

    sets = tuple(dict.fromkeys(name for suite in SUITES.values() for name in suite.names))
    models = (EMBEDDED_MODEL, "ViT-B-32", "ViT-B-16", "ViT-L-14", "timm:", "torchvision:")
    return {
        "finetuning_mode": tuple(USAGES[command].modes()),
        "model": models,
        "suite": tuple(SUITES),
        **dict.fromkeys(("tasks", "train_dataset", "eval_datasets", "control_dataset"), sets),
        "device": ("cpu", "cuda", "mps"),
    }
