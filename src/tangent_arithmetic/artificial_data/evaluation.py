"""Accuracy of a backbone on an artificial data set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tangent_arithmetic.artificial_data.presets import BASE
from tangent_arithmetic.artificial_data.workspace import Workspace
from tangent_arithmetic.encoders.loading import resolve
from tangent_arithmetic.encoders.mlp import Head

ROWS = 2048  # at a time


def accuracy(logits: Tensor, y: Tensor) -> float:
    """The share of rows whose largest logit is that of the class.

    A row with a non-finite logit counts as wrong.

    Args:
        logits: shape (rows, classes).
        y: classes, shape (rows).
    """
    correct = (logits.argmax(dim=1) == y) & finite(logits)
    return int(correct.sum()) / len(correct)


def finite(logits: Tensor) -> Tensor:
    """Whether all logits of a row are finite, shape (rows)."""
    return logits.isfinite().all(dim=1)


def get_head(dataset: str, workspace: Workspace | None = None, mode: str = "standard") -> Head:
    """The head of a data set.

    Raises:
        MissingFileError: if it is missing.
    """
    workspace = workspace or Workspace()
    step, *words = ["train"] if dataset == BASE else ["finetune", f"--dataset={dataset}"]
    return Head.load(resolve(workspace.head(dataset, mode), workspace.command(step, *words)))


@torch.no_grad()
def features(backbone: nn.Module, x: Tensor) -> Tensor:
    """The backbone's features of all rows, shape (rows, features)."""
    return torch.cat([backbone(rows) for rows in x.split(ROWS)])


@torch.no_grad()
def eval_single_dataset(
    backbone: nn.Module,
    dataset: str,
    device: torch.device | str = "cpu",
    *,
    head: nn.Module | None = None,
    split: str = "test",
    workspace: Workspace | None = None,
) -> float:
    """The accuracy, in [0, 1], of a backbone under a data set's head.

    Args:
        backbone: a `BackBone`, its linearisation or any module from rows to features.
        dataset: name of the data set.
        device: where to compute; the backbone is moved there.
        head: the head; the one fine-tuned (or probed) on this data set if None.
        split: "test", "val" or "train".
        workspace: the files of data and head; the current folder's default preset if None.

    Raises:
        MissingFileError: if the data set or the head is missing.
    """
    workspace = workspace or Workspace()
    head = head or get_head(dataset, workspace)
    x, y = workspace.data(dataset, split, device)
    return accuracy(head.to(device)(features(backbone.to(device), x)), y)
