"""Few-shot fine-tuning from an edited model."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

from numpy.typing import ArrayLike

from tangent_arithmetic.analysis.edits import Edits, Point
from tangent_arithmetic.arithmetic.metrics import main_of
from tangent_arithmetic.arithmetic.task_vectors import NonLinearTaskVector
from tangent_arithmetic.data.base import SubsetPictures
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.data.sampling import few_of_each
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.run.models import classification_head, split_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.training.loop import TrainingData, seed_everything, train

ORDER = 19  # in the seed of the images' order
STEPS = 40  # optimizer steps, about, whatever the number of images
WARMUP = 0.2  # share of the steps that is warm-up, at most


def few_shot(run: Run, edits: Edits, point: Point, dataset: str, shots: int) -> tuple[float, int]:
    """Test accuracy after standard fine-tuning of an edited model on a few images per class.

    Args:
        run: the run; the training recipe is the data set's, for `STEPS` of a batch each.
        edits: the model, in standard mode.
        point: coefficients of its vectors at the start.
        dataset: the target data set, without Val.
        shots: training images per class, the first in a seeded order; 0 for no training.

    Returns:
        The accuracy, and the number of training images.
    """
    encoder = _edited(edits, point)
    if shots == 0:
        return main_of(split_of(run, encoder, dataset).accuracy(encoder)), 0
    images = run.data.dataset(f"{dataset}Val").train
    chosen = SubsetPictures(images, chosen_indices(labels_of(images), shots, run.seed))
    recipe = run.with_(finetuning_mode="standard").recipe(dataset)
    size = min(recipe.batch_size, len(chosen))
    epochs = math.ceil(STEPS / math.ceil(len(chosen) / size))
    warmup = min(recipe.warmup_length, round(WARMUP * STEPS))
    recipe = replace(recipe, batch_size=size, epochs=epochs, warmup_length=warmup)
    recipe = replace(recipe, num_grad_accumulation=1, image_share=1.0)
    classifier = ImageClassifier(encoder, classification_head(run, dataset))
    classifier.freeze_head()
    seed_everything(run.seed)
    data = TrainingData(chosen, encoder.train_preprocess)
    label = f"{dataset}, {shots} per class"
    train(classifier.to(run.device), data, recipe, seed=run.seed, description=label)
    return main_of(split_of(run, encoder, dataset).accuracy(encoder)), len(chosen)


def _edited(edits: Edits, point: Point) -> ModuleEncoder:
    """A new standard encoder at theta0 + the sum of coefficients times vectors."""
    if not point:
        return copy.deepcopy(edits.encoder)
    total = sum(c * NonLinearTaskVector(vector=edits.vectors[name]) for name, c in point.items())
    assert isinstance(total, NonLinearTaskVector)
    edited: ModuleEncoder = total.apply_to_nonlinear(edits.encoder)
    return edited


def chosen_indices(labels: ArrayLike, shots: int, seed: int) -> list[int]:
    """Sorted indices of `shots` images of each class, see `few_of_each`."""
    return few_of_each(labels, shots, (seed, ORDER))
