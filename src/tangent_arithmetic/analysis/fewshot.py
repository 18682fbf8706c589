"""Fine-tuning on few pictures of a data set, from an edited model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np

from tangent_arithmetic.analysis.edits import Edits, Point
from tangent_arithmetic.arithmetic.task_vectors import NonLinearTaskVector
from tangent_arithmetic.data.base import SubsetPictures
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.encoders.images import ImageClassifier, ImageEncoder
from tangent_arithmetic.run.models import classification_head, split_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.training.loop import seed_everything, train

STEPS = 40  # optimizer steps, however few the pictures


def few_shot(run: Run, edits: Edits, point: Point, dataset: str, shots: int) -> tuple[float, int]:
    """Test accuracy after standard fine-tuning of an edited model on a few pictures a class.

    Args:
        run: the run; the recipe is the data set's, but for `STEPS` steps.
        edits: the model, in standard mode.
        point: where it starts, coefficients of its vectors.
        dataset: the target, without Val.
        shots: training pictures of each class, the first of a seeded order; 0 for no training.

    Returns:
        The accuracy, and the number of pictures.
    """
    encoder = edited_encoder(edits, point)
    if shots == 0:
        return split_of(run, encoder, dataset).accuracy(encoder)["top1"], 0
    data = run.data.dataset(f"{dataset}Val").train
    chosen = SubsetPictures(data, chosen_indices(labels_of(data), shots, run.seed))
    recipe = run.recipe(dataset)
    size = min(recipe.batch_size, len(chosen))
    epochs = -(-STEPS // max(1, -(-len(chosen) // size)))
    recipe = replace(recipe, batch_size=size, epochs=epochs)
    classifier = ImageClassifier(encoder, classification_head(run, dataset))
    classifier.freeze_head()
    seed_everything(run.seed)
    train(
        classifier, chosen, encoder.train_preprocess, recipe, run.seed, run.device,
        f"{dataset}, {shots} a class",
    )  # fmt: skip
    return split_of(run, encoder, dataset).accuracy(encoder)["top1"], len(chosen)


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
