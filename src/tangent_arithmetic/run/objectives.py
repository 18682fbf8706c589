"""The objective of a run, and the parameters that it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from tangent_arithmetic.data.loading import SeededPictures
from tangent_arithmetic.data.registry import ImageDataset
from tangent_arithmetic.data.unlabelled import Unlabelled
from tangent_arithmetic.encoders.base import ModuleEncoder, Transform
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.run.factors import factors_facts, factors_of
from tangent_arithmetic.run.models import base_encoder
from tangent_arithmetic.run.modes import ALL, SUPERVISED
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.teacher import OF_DELTA, load_teacher, teacher_facts
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.digests import json_hash
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.states import RunStates
from tangent_arithmetic.training import talos
from tangent_arithmetic.training.lora import adapted
from tangent_arithmetic.training.objectives import OBJECTIVES, Objective, Setting
from tangent_arithmetic.training.trainable import choice_of, train_only

OF_PENALTY = ("penalty", "penalty_norm")
# what an objective may read, by name: of (run, task)
FILES = {"teacher": load_teacher, "factors": factors_of}


def method_of(run: Run, task: str) -> dict[str, Any]:
    """What a checkpoint records of objective and trained parameters; nothing for the papers'.

    Args:
        run: the run.
        task: the task.
    """
    mode, config = run.mode, run.config
    facts: dict[str, Any] = {}
    if mode.trainable != ALL:
        facts["trainable"] = mode.trainable
    if mode.objective != SUPERVISED:
        facts["objective"] = mode.objective
        facts |= {name: getattr(config, name) for name in OF_PENALTY}
    if (further := FACTS.get(mode.objective)) is not None:
        facts |= further(run, task)
    return facts


def others_facts(run: Run, task: str) -> dict[str, Any]:
    """What a checkpoint records of the images that its penalty saw."""
    return {
        "others": run.others(task),
        "others_batch_size": run.others_batch_size(task),
        "others_per_step": run.config.others_per_step,
    }


# what a checkpoint records of an objective's own settings
FACTS: dict[str, Callable[[Run, str], dict[str, Any]]] = {
    "taujp": others_facts,
    "tak": factors_facts,
    "delta": teacher_facts,
}


def objective_of(run: Run, task: str, data: ImageDataset, model: nn.Module) -> Objective:
    """The objective with which a task is fine-tuned.

    Args:
        run: the run.
        task: the task.
        data: its data set.
        model: the classifier, on its device.

    Raises:
        UsageError: if the objective needs images of other data sets, and there are none.
    """
    config = run.config
    setting = Setting(
        recipe=run.recipe(task),
        multilabel=data.multilabel,
        model=model,
        penalty=config.penalty,
        options={"seed": run.seed, **{n: getattr(config, n) for n in (*OF_PENALTY, *OF_DELTA)}},
        others=_others(run, task, getattr(model, "train_preprocess", None)),
        files=lambda name: FILES[name](run, task),
    )
    return OBJECTIVES[run.mode.objective](setting)


def trained_encoder(
    run: Run,
    encoder: ModuleEncoder,
    head: ClassificationHead,
    data: ImageDataset,
    states: RunStates,
) -> ModuleEncoder:
    """The encoder to train: as the run's mode edits it, and with the mode's trained parameters.

    Args:
        run: the run.
        encoder: the pre-trained encoder.
        head: the task's head.
        data: the task's data set.
        states: of the run; masks are kept beside its checkpoint.

    Raises:
        UsageError: if the model has no such parameters.
    """
    choice = choice_of(run.mode.trainable)
    tuned = base_encoder(encoder, run.mode.name)
    if choice.kind == "lora":
        return adapted(tuned, int(choice.number), choice.which, run.seed)
    if choice.kind == "talos":
        return talos.restricted(tuned, _masks(run, encoder, head, data, states, choice.number))
    train_only(tuned, choice.which)
    return tuned


def _masks(
    run: Run,
    encoder: ModuleEncoder,
    head: ClassificationHead,
    data: ImageDataset,
    states: RunStates,
    share: float,
) -> talos.Masks:
    """The weights that TaLoS trains, from a file beside the checkpoint or computed by rank 0."""
    path = states.checkpoint.with_name(f"{states.checkpoint.stem}_masks.safetensors")
    made = json_hash(states.settings)
    if ddp.is_main_process() and talos.load_masks(path, made) is None:
        classifier = ImageClassifier(encoder, head).to(run.device)
        classifier.freeze_head()
        pictures = SeededPictures(data.train, encoder.val_preprocess)
        order = np.random.default_rng(run.seed).permutation(len(pictures))[: talos.IMAGES]
        images = [pictures[int(index)][0] for index in order]
        masks = talos.masks_of(classifier, images, share, run.seed)
        prefix = "image_encoder."
        masks = {name.removeprefix(prefix): mask for name, mask in masks.items()}
        talos.save_masks(path, masks, made)
    ddp.barrier()
    masks_or_none = talos.load_masks(path, made)
    if masks_or_none is None:
        raise UsageError(f"{path} is not that of rank 0; --save must be a folder that all share")
    return masks_or_none


def _others(run: Run, task: str, transform: Transform | None) -> Callable[[], Unlabelled]:
    def make() -> Unlabelled:
        return Unlabelled(
            {name: run.data.dataset(f"{name}Val").train for name in run.others(task)},
            transform,
            run.others_batch_size(task),
            together=run.config.others_per_step == "all",
            seed=run.seed,
            num_workers=run.num_workers,
        )

    return make
