"""Fine-tunes the base model's backbone on another data set, with a new head.

    python -m src.artificial_data.finetune --dataset=dataset2                  # head and backbone
    python -m src.artificial_data.finetune --dataset=dataset2 --freeze=backbone       # head alone
    python -m src.artificial_data.finetune --dataset=dataset2 --freeze=head --mode=linear

`--freeze=head` uses the head that `--freeze=backbone` trained. `--mode=linear` trains the
linearisation of the backbone at the pre-trained weights, `--mode=taujp` too, with a penalty on its
tangents on rows of the other tasks; `--mode=scratch` starts from a new backbone instead of the
pre-trained one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tangent_arithmetic.artificial_data import flags
from tangent_arithmetic.artificial_data.presets import BASE, LINEAR, MODES, Mode, Recipe
from tangent_arithmetic.artificial_data.train import OWN, fit, initialized, num_classes, seeded
from tangent_arithmetic.artificial_data.workspace import Workspace, is_done
from tangent_arithmetic.encoders.loading import read_facts, resolve
from tangent_arithmetic.encoders.mlp import BackBone, ClassificationModel, Head
from tangent_arithmetic.runtime.atomic import check_writable
from tangent_arithmetic.runtime.compute import find_device
from tangent_arithmetic.runtime.errors import UsageError, entry_point, unknown
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.runtime.software import software
from tangent_arithmetic.storage.states import RunStates
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tangent_arithmetic.training.objectives.taujp import tangent_size

logger = logging.getLogger(__name__)
Freeze = Literal["none", "backbone", "head"]
FREEZE: tuple[Freeze, ...] = ("none", "backbone", "head")


def finetune(
    workspace: Workspace,
    dataset: str,
    recipe: Recipe,
    mode: Mode = "standard",
    freeze: Freeze = "none",
    device: torch.device | str = "cpu",
) -> Path:
    """Fine-tunes on a data set and writes what was trained, unless it exists.

    Args:
        workspace: the folders of data, base model and checkpoints.
        dataset: its name.
        recipe: learning rate, batch size, epochs.
        mode: "standard"; "linear": the linearisation at the pre-trained weights; "taujp": as
            linear, with the preset's penalty on J tau on rows of the other tasks, without their
            classes; "scratch": as standard, from a new backbone.
        freeze: "none" trains the backbone and a new head; "backbone" the head alone; "head" the
            backbone alone, under the head that "backbone" trained.
        device: where to train.

    Returns:
        The file of the backbone, or of the head if the backbone is frozen.

    Raises:
        MissingFileError: if data, base model or head are missing.
        UsageError: if there is a checkpoint of this name with other settings.
        ValueError: if the base model lacks a weight, listing all differences.
    """
    _check(workspace, dataset, mode, freeze)
    made = _settings(workspace, dataset, recipe, mode, freeze)
    base_hash = made["theta0"]
    path, head_path = workspace.backbone(dataset, mode), workspace.head(dataset, mode)
    written = {"none": (path, head_path), "backbone": (head_path,), "head": (path,)}[freeze]
    if all([is_done(file, made) for file in written]):
        RunStates(written[0], made).clean_up()
        return written[0]
    for file in written:
        check_writable(file)

    x, y = workspace.data(dataset, "train", device)
    backbone, head = _parts(workspace, dataset, mode, freeze, x.shape[1], num_classes(y))
    backbone.requires_grad_(freeze != "backbone")
    head.requires_grad_(freeze != "head")
    body = LinearizedModel(backbone) if mode in LINEAR else backbone
    model = ClassificationModel(body, head).to(device)
    name = f"{mode} {'head' if freeze == 'backbone' else 'backbone'} on {dataset}"
    states = RunStates(written[0], {**made, **software(OWN)})
    trained: nn.Module = model
    if freeze == "backbone":  # features do not change
        with torch.no_grad():
            x = model.backbone(x)
        trained = model.head
    penalty = None
    if mode == "taujp" and isinstance(body, LinearizedModel):
        others = _others(workspace, dataset)
        rows = [workspace.data(other, "train", device)[0] for other in others]
        penalty = partial(_penalty, body, rows, recipe.batch_size, workspace)
    with states.locked():
        losses = fit(trained, x, y, recipe, workspace.seed, name, states, penalty)
        facts = {"made": made, "dataset": dataset, "mode": mode, "losses": losses}
        if head_path in written:
            head.save(head_path, base_hash, **facts)
        if path in written:
            if isinstance(body, LinearizedModel):  # theta is kept; theta0 is the base model's
                backbone.load_state_dict(body.theta())
            backbone.save(path, None if mode == "scratch" else base_hash, **facts)
        states.remove()
    return written[0]


def _settings(
    workspace: Workspace, dataset: str, recipe: Recipe, mode: str, freeze: str
) -> dict[str, Any]:
    """What a checkpoint is made of; one of the same name that is made of other things is refused.

    Raises:
        MissingFileError: if data, base model or head are missing.
    """
    base_path = resolve(workspace.backbone(), workspace.command("train"))
    made = {
        **asdict(recipe),
        "seed": workspace.seed,
        "data": workspace.data_hash(dataset),
        "mode": mode,
        "freeze": freeze,
        "theta0": str(read_facts(base_path)["hash"]),
    }
    if mode == "taujp":
        hashes = {name: workspace.data_hash(name) for name in _others(workspace, dataset)}
        made |= {"penalty": workspace.preset.penalty, "others": hashes}
    if freeze == "head":  # it is the same in all modes
        probe = workspace.command("finetune", f"--dataset={dataset}", "--freeze=backbone")
        made["head"] = str(read_facts(resolve(workspace.head(dataset), probe))["hash"])
    return made


def _others(workspace: Workspace, dataset: str) -> list[str]:
    """The other tasks."""
    return [name for name in workspace.preset.tasks if name != dataset]


def _penalty(
    body: LinearizedModel, others: Sequence[Tensor], batch: int, workspace: Workspace, step: int
) -> Tensor:
    """The penalty of τJp on half a batch of one other task's rows, in turn."""
    x = others[step % len(others)]
    drawn = torch.randperm(len(x), generator=seeded(workspace.seed, f"others {step}"))
    rows = drawn[: max(batch // 2, 1)].to(x.device)
    f0, tangent = body.primal_and_tangent(x[rows])
    return workspace.preset.penalty * tangent_size(f0, tangent, "relative").mean()


def _check(workspace: Workspace, dataset: str, mode: str, freeze: str) -> None:
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if freeze not in FREEZE:
        raise unknown("part to freeze", freeze, FREEZE)
    if dataset == BASE:
        raise UsageError(f"{BASE} is the base model's data set; fine-tune on another one")
    if mode == "taujp" and not set(workspace.preset.tasks) - {dataset}:
        raise UsageError(f"--mode=taujp needs rows of another task than {dataset}; there is none")
    if mode != "standard" and freeze == "backbone":
        raise UsageError("a head on the frozen backbone has no mode; leave out --mode")


def _parts(
    workspace: Workspace, dataset: str, mode: str, freeze: str, features: int, classes: int
) -> tuple[BackBone, Head]:
    """The backbone to start from, and the head."""
    if mode == "scratch":
        backbone: BackBone = initialized(
            BackBone, workspace.seed, f"backbone {dataset}", input_dim=features
        )
    else:
        backbone = BackBone.load(workspace.backbone())
        if backbone.sizes["input_dim"] != features:
            raise UsageError(
                f"{dataset} has {features} features, expected {backbone.sizes['input_dim']}, those "
                "of the base model"
            )
    if freeze == "head":
        return backbone, Head.load(workspace.head(dataset))
    sizes = {"input_dim": backbone.get_output_dim(), "output_dim": classes}
    return backbone, initialized(Head, workspace.seed, f"head {dataset}", **sizes)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = flags.make_parser(__doc__)
    flags.add_seed(parser)
    parser.add_argument("--dataset", required=True, help="data set to fine-tune on")
    parser.add_argument("--mode", default="standard", choices=MODES, help="default: standard")
    parser.add_argument("--freeze", default="none", choices=FREEZE, help="default: none")
    flags.add_fields(parser, Recipe, "training")
    args = parser.parse_args(argv)
    setup_logging()
    workspace = flags.workspace_of(args)
    preset = workspace.preset
    start = preset.probe or preset.base if args.freeze == "backbone" else preset.recipe(args.mode)
    recipe = replace(start, **flags.given(args, Recipe))
    done = finetune(
        workspace, args.dataset, recipe, args.mode, args.freeze, find_device(args.device)
    )
    logger.info("%s", done)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
