"""Fine-tuning of language models, standard and linear, by the training loop of all models."""

from __future__ import annotations

import copy
import functools
import logging
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector, TaskVector
from tangent_arithmetic.language import checkpoints
from tangent_arithmetic.language.losses import TokenLoss, next_tokens
from tangent_arithmetic.language.models import PADDING, LanguageModel, TokenModel
from tangent_arithmetic.language.settings import Settings
from tangent_arithmetic.language.tokens import TokenRows
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import State, content_hash
from tangent_arithmetic.storage.states import check_settings
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tangent_arithmetic.training.loop import TrainingData, train
from tangent_arithmetic.training.objectives import Objective
from tangent_arithmetic.training.recipe import Recipe

logger = logging.getLogger(__name__)

Data = Callable[[], TokenRows]


def finetune(
    model: TokenModel | LinearizedModel,
    rows: TokenRows,
    recipe: Recipe,
    objective: Objective | None = None,
    seed: int = 0,
    description: str = "fine-tuning",
) -> dict[str, Any]:
    """Fine-tunes a model in place; a linear one in its tangent space.

    Args:
        model: on its device.
        rows: token ids, with labels for a classifier; of a language model those in which no token
            follows another are left out.
        recipe: rate, epochs, batch size and so on.
        objective: the loss; if None the loss over tokens, or a classifier's cross-entropy.
        seed: of the order of the rows.
        description: for the progress bar.

    Returns:
        Facts such as the steps, the seconds and the last epoch's loss.

    Raises:
        UsageError: if no row is left.
    """
    inner = model.module0() if isinstance(model, LinearizedModel) else model
    if isinstance(inner, LanguageModel):
        rows = _with_targets(rows, inner)
        objective = TokenLoss() if objective is None else objective
    data = TrainingData(rows)
    return train(model, data, recipe, objective=objective, seed=seed, description=description)


def _with_targets(rows: TokenRows, model: LanguageModel) -> TokenRows:
    """The rows that have a loss: those in which a token follows another."""
    kept = (next_tokens(model.sequence(rows.ids)) != PADDING).any(dim=1)
    if not bool(kept.any()):
        raise UsageError(f"expected rows of two tokens or more, got {len(rows)} of one at most")
    if bool(kept.all()):
        return rows
    logger.info("%d rows without a next token are left out", int((~kept).sum()))
    return TokenRows(rows.ids[kept], None if rows.labels is None else rows.labels[kept])


def total(vectors: Iterable[TaskVector]) -> TaskVector:
    """The sum of one or more task vectors."""
    return functools.reduce(operator.add, vectors)


class Vectors:
    """The task vectors of an experiment: read from models, or fine-tuned and kept.

    Args:
        settings: of the experiment.
        tokenizer: written beside fine-tuned models.

    Attributes:
        hashes: by name, those of the weights from which and to which a vector leads.
    """

    def __init__(self, settings: Settings, tokenizer: Any) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.hashes: dict[str, dict[str, str]] = {}

    @property
    def kind(self) -> type[TaskVector]:
        """The class of vectors, whose `apply_to` gives a standard or a linear model."""
        return LinearizedTaskVector if self.settings.applies_linear else TaskVector

    def get(
        self,
        name: str,
        base: TokenModel,
        data: Data,
        load: Callable[[str | Path], TokenModel],
        objective: Objective | None = None,
        linear: bool | None = None,
        made: Mapping[str, Any] | None = None,
    ) -> TaskVector:
        """The vector of a name: of a model in the settings, of one in their folder, or a new one.

        Args:
            name: the name.
            base: theta0; unchanged.
            data: gives the rows to train on.
            load: reads a model.
            objective: as of `finetune`.
            linear: whether to fine-tune in the tangent space; the settings decide if None.
            made: further facts by which a kept model must have been made.

        Raises:
            UsageError: if a kept model was made with other settings, data or weights of the base.
        """
        linear = self.settings.trains_linear if linear is None else linear
        theta0 = content_hash(dict(base.named_parameters()))
        self.hashes[name] = {"theta0": theta0}
        if (published := self.settings.finetuned.get(name)) is not None:
            recorded = checkpoints.facts_of(published)
            if "theta0" in recorded:
                check_settings(Path(published), recorded, {"theta0": theta0}, "--finetuned")
            return self._vector(name, base, load(published).to(self.settings.device))
        kind = "linear" if linear else "standard"
        folder = self.settings.save / f"{kind}_{name}"
        rows = data()
        hashes = _recorded(folder, {"data": rows.digest(), "theta0": theta0})
        facts = {**self._facts(name), **(made or {}), **hashes}
        if checkpoints.is_done(folder, facts):
            logger.info("%s: read from %s", name, folder)
            return self._vector(name, base, load(folder).to(self.settings.device))
        model = LinearizedModel(base) if linear else copy.deepcopy(base)
        recipe, seed = self.settings.recipe, self.settings.seed
        done = finetune(model, rows, recipe, objective, seed, name)
        spent = {key: done[key] for key in ("steps", "seconds", "last_epoch_loss")}
        checkpoints.save(model, folder, self.tokenizer, {**facts, **spent})
        return self._vector(name, base, model)

    def _vector(
        self, name: str, base: TokenModel, model: TokenModel | LinearizedModel
    ) -> TaskVector:
        """The vector between two models; the hash of the second is noted."""
        theta: State = dict(model.named_parameters())
        if isinstance(model, LinearizedModel):
            theta = model.theta()
        self.hashes[name]["theta"] = content_hash(theta)
        return self.kind(base, model)

    def _facts(self, name: str) -> dict[str, Any]:
        """What a model of this name must have been made with."""
        settings = self.settings
        made = {"base": settings.model, "rows": settings.rows, "length": settings.length}
        return {"name": name, "seed": settings.seed, "recipe": asdict(settings.recipe), **made}


def _recorded(folder: Path, hashes: Mapping[str, str]) -> dict[str, str]:
    """The hashes by which the model in a folder can be checked: all if there is no model yet."""
    kept = checkpoints.facts_of(folder)
    if kept and (missing := sorted(hashes.keys() - kept)):
        logger.warning(
            "%s was made by an earlier version, which recorded no hash of %s; delete it to "
            "fine-tune again if these have changed since",
            folder,
            " and ".join(missing),
        )
    return {key: value for key, value in hashes.items() if key in kept or not kept}
