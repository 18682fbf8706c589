"""Fine-tuning on few pictures of a data set, from an edited model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np

from src.analysis.edits import Edits, Point
from src.data.base import SubsetPictures
from src.data.identity import labels_of
from src.data.registry import dataset_for
from src.eval import eval_single_dataset
from src.heads import get_classification_head
from src.modeling import ImageClassifier, ImageEncoder
from src.settings import device_of, recipe_for, seed_of
from src.task_vectors import NonLinearTaskVector
from src.training import seed_everything, train

STEPS = 40  # optimizer steps, however few the pictures


def few_shot(args: Any, edits: Edits, point: Point, dataset: str, shots: int) -> tuple[float, int]:
    """Test accuracy after standard fine-tuning of an edited model on a few pictures a class.

    Args:
        args: settings; the recipe is the data set's, but for `STEPS` steps.
        edits: the model, in standard mode.
        point: where it starts, coefficients of its vectors.
        dataset: the target, without Val.
        shots: training pictures of each class, the first of a seeded order; 0 for no training.

    Returns:
        The accuracy, and the number of pictures.
    """
    encoder = edited_encoder(edits, point)
    if shots == 0:
        return eval_single_dataset(encoder, dataset, args)["top1"], 0
    data = dataset_for(args, f"{dataset}Val").train
    chosen = SubsetPictures(data, chosen_indices(labels_of(data), shots, seed_of(args)))
    recipe = recipe_for(args, dataset)
    size = min(recipe.batch_size, len(chosen))
    epochs = -(-STEPS // max(1, -(-len(chosen) // size)))
    recipe = replace(recipe, batch_size=size, epochs=epochs)
    classifier = ImageClassifier(encoder, get_classification_head(args, dataset))
    classifier.freeze_head()
    seed_everything(seed_of(args))
    train(
        classifier, chosen, encoder.train_preprocess, recipe, seed_of(args), device_of(args),
        f"{dataset}, {shots} a class",
    )  # fmt: skip
    return eval_single_dataset(encoder, dataset, args)["top1"], len(chosen)


def edited_encoder(edits: Edits, point: Point) -> ImageEncoder:
    """A standard encoder of its own at theta0 + sum of coefficients times vectors."""
    if not point:
        return copy.deepcopy(edits.encoder)
    total = sum(c * NonLinearTaskVector(vector=edits.vectors[name]) for name, c in point.items())
    assert isinstance(total, NonLinearTaskVector)
    edited: ImageEncoder = total.apply_to_nonlinear(edits.encoder)
    return edited


def chosen_indices(labels: Any, shots: int, seed: int) -> list[int]:
    """Indices, in order, of `shots` pictures of each class (all of a class that has fewer)."""
    order = np.random.default_rng([seed, 19]).permutation(len(labels))
    ordered = np.asarray(labels)[order]
    chosen = [order[ordered == k][:shots] for k in np.unique(ordered)]
    return np.sort(np.concatenate(chosen)).tolist()
