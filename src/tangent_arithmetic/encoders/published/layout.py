"""Folders of public checkpoints whose names say how they were trained.

lshangge/OrthoReg: `checkpoints_{seed}/{mode}_{lr}[_lambda{x}]_{model}/{Dataset}Val/*.pt`, with the
modes `standard`, `linear` and `linear-2` (attention alone, not linear), each also `{mode}_ortho`.
katoro8989/tau-Jp_Task_Arithmetic: `checkpoints_reg_{efficient,strict}[_{seed}]/{model}/...`. Both
write the files of gortizji/tangent_task_arithmetic, OrthoReg with its modes as prefixes.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUMBER = r"\d+(?:\.\d*)?(?:e[+-]?\d+)?"
NAMED = re.compile(
    rf"(?P<mode>[A-Za-z][\w-]*?)_(?P<lr>{NUMBER})(?:_lambda(?P<penalty>{NUMBER}))?_(?P<model>(?!lambda\d).+)"
)
SEEDED = re.compile(r"checkpoints(?:_(?P<seed>\d+))?")
REGULARISED = re.compile(r"checkpoints_reg_(?P<kind>efficient|strict)(?:_(?P<seed>\d+))?")
ATTENTION = "attention-weights"
MODES = {  # theirs -> ours, our name of a checkpoint, and theirs in older files
    "standard": ("standard", "finetuned", ""),
    "standard_ortho": ("standard+orthoreg", "standard_orthoreg_finetuned", "finetuned"),
    "linear": ("linear", "linear_finetuned", ""),
    "linear_ortho": ("linear+orthoreg", "linear_orthoreg_finetuned", "linear_finetuned"),
    "linear-2": (f"standard+{ATTENTION}", f"standard_{ATTENTION}_finetuned", "finetuned"),
    "linear-2_ortho": (
        f"standard+orthoreg+{ATTENTION}",
        f"standard_orthoreg_{ATTENTION}_finetuned",
        "finetuned",
    ),
}
TAUJP = ("linear+taujp", "linear_taujp_finetuned", "linear_finetuned")
PREFIXES = ("", "nonlinear_", "linear_", *(f"{mode}_" for mode in MODES if mode != "linear"))
ZEROSHOTS = tuple(dict.fromkeys(f"{prefix}zeroshot.pt" for prefix in PREFIXES))


@dataclass(frozen=True)
class Layout:
    """What the name of a folder of public checkpoints says.

    Attributes:
        mode: our name of the mode.
        checkpoint: our name of a fine-tuned checkpoint in it, without its ending.
        files: their names, without endings, the first one that is there.
        model: the model's name.
        facts: how it was trained, by their names: mode, lr, lambda, seed.
    """

    mode: str
    checkpoint: str
    files: tuple[str, ...]
    model: str
    facts: dict[str, Any]

    @property
    def seed(self) -> int | None:
        """The seed, if the folder has one."""
        seed: int | None = self.facts.get("seed")
        return seed


def model_in(name: str) -> str:
    """The model in the name of a folder, or that name."""
    found = NAMED.fullmatch(name)
    return found["model"] if found and found["mode"] in MODES else name


def layout_of(folder: Path) -> Layout | None:
    """What a folder's name says; None for a folder without public fine-tuned checkpoints.

    Args:
        folder: the folder of a model, above those of the data sets.
    """
    folder = folder.absolute()
    layout = _named(folder.name, folder.parent.name)
    if layout is None or not any(_files(folder, layout.files)):
        return None
    return layout


def _files(folder: Path, stems: tuple[str, ...]) -> Iterator[Path]:
    return (path for stem in stems for path in folder.glob(f"*/{stem}.pt"))


def _named(name: str, parent: str) -> Layout | None:
    facts: dict[str, Any] = {}
    if regularised := REGULARISED.fullmatch(parent):
        facts = {"mode": "linear", "penalty": regularised["kind"]}
        return _layout(TAUJP, "linear_finetuned", name, facts, regularised["seed"])
    found, seeded = NAMED.fullmatch(name), SEEDED.fullmatch(parent)
    if found is None or found["mode"] not in MODES:
        return None
    facts = {"mode": found["mode"], "lr": float(found["lr"])}
    if found["penalty"]:
        facts["lambda"] = float(found["penalty"])
    own = "finetuned" if found["mode"] == "standard" else f"{found['mode']}_finetuned"
    return _layout(MODES[found["mode"]], own, found["model"], facts, seeded and seeded["seed"])


def _layout(
    ours: tuple[str, str, str], own: str, model: str, facts: dict[str, Any], seed: str | None
) -> Layout:
    mode, checkpoint, older = ours
    files = tuple(dict.fromkeys(filter(None, (own, older))))
    return Layout(mode, checkpoint, files, model, facts | ({"seed": int(seed)} if seed else {}))


def beside(path: Path) -> list[Path]:
    """The public files that hold the checkpoint of one of our names, the first one preferred.

    Args:
        path: a fine-tuned checkpoint as we name it, in the folder of a data set.
    """
    if not path.stem.endswith("finetuned") or (layout := layout_of(path.parent.parent)) is None:
        return []
    names = layout.files if path.stem == layout.checkpoint else ()
    return [path.with_name(f"{name}.pt") for name in names]


def facts_of(path: Path) -> dict[str, Any]:
    """How a public checkpoint was trained, from the folder that it lies in; empty if unknown."""
    layout = layout_of(path.absolute().parent.parent)
    return layout.facts if layout and path.stem in layout.files else {}
