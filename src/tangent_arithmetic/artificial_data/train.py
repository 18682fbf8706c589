"""Trains the base model: a backbone and a head on dataset1.

    python -m src.artificial_data.train [--preset=readme] [--lr=1e-3 --batch-size=32 --epochs=100]

Backbone and head are saved apart, as `mlp_model` and `mlp_model_head`.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tangent_arithmetic.artificial_data import flags
from tangent_arithmetic.artificial_data.presets import BASE, Recipe
from tangent_arithmetic.artificial_data.workspace import Workspace, is_done
from tangent_arithmetic.encoders.mlp import BackBone, ClassificationModel, Head
from tangent_arithmetic.runtime.atomic import check_writable
from tangent_arithmetic.runtime.compute import find_device
from tangent_arithmetic.runtime.errors import UsageError, entry_point
from tangent_arithmetic.runtime.logs import progress, setup_logging
from tangent_arithmetic.runtime.software import SOURCES, software
from tangent_arithmetic.storage.states import RunStates
from tangent_arithmetic.training.resume import Keeper

logger = logging.getLogger(__name__)

OWN = (*SOURCES, "artificial_data")  # the sources that the study's weights depend on


def seeded(seed: int, what: str) -> torch.Generator:
    """A random generator for one purpose of a run, independent of those for others."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {what}".encode()))


def initialized(kind: type[Any], seed: int, what: str, **sizes: int) -> Any:
    """A backbone or head with the initial weights of a seed; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeded(seed, what).initial_seed()))
        return kind(**sizes)


def num_classes(y: Tensor) -> int:
    """The number of classes of a data set."""
    return int(y.max()) + 1


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    order: int,
    name: str,
    states: RunStates | None = None,
    penalty: Callable[[int], Tensor] | None = None,
) -> list[float]:
    """Trains, in place, the parameters that require grad: Adam on the mean cross-entropy.

    The order of an epoch's batches follows from (order, epoch) alone; the last, incomplete batch is
    dropped. An interrupted run continues from its last state and ends in the same weights.

    Args:
        model: gives logits, shape (rows, classes).
        x: inputs, shape (rows, features).
        y: classes, shape (rows).
        recipe: learning rate, batch size, epochs.
        order: seed of the order of batches.
        name: of the model, for messages.
        states: where the run's resume states are kept, counted in epochs.
        penalty: what is added to the loss of a step, by its number from the first epoch's start.

    Returns:
        The mean loss of each epoch.

    Raises:
        UsageError: if there are fewer rows than a batch has, or the loss is not finite.
    """
    size = recipe.batch_size
    if len(x) < size:
        raise UsageError(f"{name}: {len(x)} rows are less than a batch of {size}")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=recipe.lr)
    keeper = Keeper(states, model, optimizer, unit="epoch")
    keeper.resume()
    for epoch in progress(range(keeper.done, recipe.epochs), name):
        drawn = torch.randperm(len(x), generator=seeded(order, f"epoch {epoch}")).to(x.device)
        total = torch.zeros((), device=x.device)
        steps = len(x) // size
        for i, rows in enumerate(drawn[: steps * size].split(size)):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            if penalty is not None:
                loss = loss + penalty(epoch * steps + i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        keeper.losses.append(total.item() / steps)
        if not torch.isfinite(total):
            raise UsageError(
                f"{name}: the loss of epoch {epoch + 1} is not finite; lower the learning rate "
                f"({recipe.lr})"
            )
        if keeper.due():
            keeper.save()
    return keeper.losses


def train(
    workspace: Workspace, recipe: Recipe | None = None, device: torch.device | str = "cpu"
) -> Path:
    """Trains the base model and writes backbone and head, unless they exist.

    Args:
        workspace: the folders of data and checkpoints.
        recipe: learning rate, batch size, epochs; the preset's if None.
        device: where to train.

    Returns:
        The file of the backbone.

    Raises:
        MissingFileError: if the data set is missing.
        UsageError: if there is a base model with other settings.
    """
    recipe = recipe or workspace.preset.base
    path, head_path = workspace.backbone(), workspace.head()
    made = {**asdict(recipe), "seed": workspace.seed, "data": workspace.data_hash(BASE)}
    if is_done(path, made) and is_done(head_path, made):
        RunStates(path, made).clean_up()
        return path
    for file in (path, head_path):
        check_writable(file)
    x, y = workspace.data(BASE, "train", device)
    backbone = initialized(BackBone, workspace.seed, "backbone", input_dim=x.shape[1])
    sizes = {"input_dim": backbone.get_output_dim(), "output_dim": num_classes(y)}
    head = initialized(Head, workspace.seed, "head", **sizes)
    model = ClassificationModel(backbone, head).to(device)
    states = RunStates(path, {**made, **software(OWN)})
    with states.locked():
        losses = fit(model, x, y, recipe, workspace.seed, f"base model on {BASE}", states)
        head.save(head_path, made=made, dataset=BASE)
        backbone.save(path, made=made, dataset=BASE, losses=losses)
        states.remove()
    return path


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = flags.make_parser(__doc__)
    flags.add_seed(parser)
    flags.add_fields(parser, Recipe, "training")
    args = parser.parse_args(argv)
    setup_logging()
    workspace = flags.workspace_of(args)
    recipe = replace(workspace.preset.base, **flags.given(args, Recipe))
    logger.info("%s", train(workspace, recipe, find_device(args.device)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
