"""Model pools: the models to merge, by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tangent_arithmetic.encoders.base import is_encoder
from tangent_arithmetic.encoders.loading import resolve
from tangent_arithmetic.encoders.published.huggingface import PREFIX
from tangent_arithmetic.encoders.registry import load_linear, load_standard
from tangent_arithmetic.merging.adapters import open_adapters
from tangent_arithmetic.merging.built import check_built, check_functions
from tangent_arithmetic.merging.registry import PRETRAINED
from tangent_arithmetic.merging.weights import (
    CONFIG,
    Weights,
    check_plain,
    held,
    open_clip_vision,
    open_weights,
    with_names,
)
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.models import command
from tangent_arithmetic.run.modes import MODES, trained
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.tangent.caches import empty_caches
from tangent_arithmetic.tangent.copies import copy_to_move

Model = nn.Module | Mapping[str, Tensor] | str | Path | Weights


class ModelPool:
    """Models of one architecture, opened at first use and read one tensor at a time.

    Args:
        models: name -> a module, a state dict, or a path of weights, see `open_weights`, or of
            adapters, see `open_adapters`. The pre-trained model is named `_pretrained_`.
        allow_base_mismatch: accept models whose files say that they were fine-tuned from other
            weights than those of `_pretrained_`, or whose `config.json` differs in the function.

    Attributes:
        model_names: the names without `_pretrained_`.
    """

    opened_by: Callable[[str | Path], Weights] = staticmethod(open_weights)

    def __init__(self, models: Mapping[str, Model], allow_base_mismatch: bool = False) -> None:
        if not isinstance(models, Mapping):
            raise UsageError(
                f"expected models by name, got a {type(models).__name__}; pass a dict, such as "
                f"{{{PRETRAINED!r}: BASE, 'a': MODEL}}"
            )
        self.models = dict(models)
        self.model_names = [name for name in self.models if name != PRETRAINED]
        self.allow_base_mismatch = allow_base_mismatch
        self._open: dict[str, Weights] = {}
        if not self.model_names:
            raise UsageError("expected at least one model to merge, got none")

    @classmethod
    def of(cls, models: ModelPool | Mapping[str, Model]) -> ModelPool:
        """A pool as it is, or the pool of models by name."""
        return models if isinstance(models, ModelPool) else cls(models)

    @property
    def has_pretrained(self) -> bool:
        """Whether there is a pre-trained model."""
        return PRETRAINED in self.models

    def weights(self, name: str) -> Weights:
        """The weights of a model."""
        return self._own(name)

    def _own(self, name: str) -> Weights:
        """The weights of a model as they were opened, for pools that change them together."""
        if name not in self._open:
            self._open[name] = self._opened(name)
            check_plain(self._open[name], name)
        return self._open[name]

    def _opened(self, name: str) -> Weights:
        match self.models[name]:
            case Weights() as weights:
                return weights
            case nn.Module() as module:
                return held(_state_of(module), written=_written(module))
            case Mapping() as state:
                return held(state)
            case str() | Path() as place:
                fine_tuned = self.has_pretrained and name != PRETRAINED
                base = self._own(PRETRAINED) if fine_tuned else None
                return open_adapters(place, base) or type(self).opened_by(place)
            case other:
                raise UsageError(
                    f"the model {name} must be a module, a state dict or a path, got a "
                    f"{type(other).__name__}"
                )

    @property
    def base_name(self) -> str:
        """The model that gives the result its dtypes, and the tensors that are not merged."""
        return PRETRAINED if self.has_pretrained else self.model_names[0]

    @property
    def base(self) -> Weights:
        """The weights of that model."""
        return self.weights(self.base_name)

    def check(self) -> None:
        """Checks that the models can be merged.

        Raises:
            UsageError: if names or shapes differ (all differences are listed), if a model was
                fine-tuned from other weights, if linear and standard models are mixed, or if files
                record different activations, preprocessing, numbers of heads or the like.
        """
        problems = []
        for name in self.model_names:
            base, model = self.base, self.weights(name)
            try:
                statedict.check_same(base.outline, model.outline)
            except UsageError as error:
                listed = str(error).partition("\n")[2]
                problems.append(f"{self.base_name} (first) and {name} (second):\n{listed}")
        if problems:
            raise UsageError(
                "expected models of one architecture, but these differ:\n" + "\n".join(problems)
            )
        kinds = {self.weights(name).kind for name in self.model_names}
        if len(kinds) > 1:
            raise UsageError(f"expected models of one kind, got {', '.join(sorted(kinds))}")
        for one, other in itertools.combinations((self.base_name, *self.model_names), 2):
            pair = self.weights(one), self.weights(other)
            check_built(*pair, one, other)
            if not self.allow_base_mismatch:
                check_functions(*pair, one, other)
        self._check_start()

    def _check_start(self) -> None:
        """Checks that all models were fine-tuned from the pre-trained one, if files say so."""
        if self.allow_base_mismatch or not self.has_pretrained:
            return
        base = self.base.facts.get("hash")
        for name in self.model_names:
            start = self.weights(name).facts.get("theta0_hash")
            if base and start and base != start:
                raise UsageError(
                    f"{name} was fine-tuned from weights {start[:12]}..., but {PRETRAINED} has "
                    f"{base[:12]}...: the task vectors have different origins. Choose the matching "
                    "pre-trained model, or set allow_base_mismatch=true"
                )

    def build(self, state: dict[str, Tensor]) -> Any:
        """A new model with merged weights, of the same kind as the models of the pool.

        Returns:
            A module like the base model; for checkpoints of encoders an encoder; else the state
            dict.
        """
        base = self.models[self.base_name]
        if isinstance(base, nn.Module):
            module = copy_to_move(base)
            own = statedict.places(lambda: _state_of(module), type(module).__name__)
            statedict.copy_into(own, state, "the model and the merged weights")
            empty_caches(module)
            return module
        model = self.weights(self.model_names[0])
        if not (model.is_encoder and self.base.files):
            return state
        load = load_linear if model.is_linear else load_standard
        encoder: Any = load(self.base.files[0])
        encoder.load_weights(state)
        return encoder


class CLIPVisionModelPool(ModelPool):
    """Vision towers of Hugging Face CLIPs; of a complete CLIP only the tower is used.

    All have the base model's names: with the prefix `vision_model.`, or without it, as
    transformers 5 saves towers.
    """

    opened_by = staticmethod(open_clip_vision)

    def _opened(self, name: str) -> Weights:
        weights = super()._opened(name)
        if name == self.base_name:
            return weights
        prefix = PREFIX if any(key.startswith(PREFIX) for key in self.base.outline) else ""
        return with_names(weights, lambda key: prefix + key.removeprefix(PREFIX))


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module; for an encoder those that it saves."""
    state = module.weights() if is_encoder(module) else module.state_dict()
    strange = (n for n, v in state.items() if v is not None and not isinstance(v, Tensor))
    if others := [name for name in strange if not statedict.is_extra(name)]:
        raise UsageError(
            f"expected a module whose state are tensors, got {type(module).__name__} with "
            f"{', '.join(others[:3])}, as of quantised weights; merge the models before they are "
            "quantised"
        )
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _written(module: nn.Module) -> dict[str, str]:
    """The configuration of a model of transformers, as the text of its file."""
    text = getattr(getattr(module, "config", None), "to_json_string", None)
    return {CONFIG: text()} if callable(text) else {}


def run_pool(run: str | Path, tasks: list[str], mode: str = "standard") -> ModelPool:
    """The encoders of a run of `finetune.py`: the pre-trained one and one per task.

    Args:
        run: the run's folder, `checkpoints/MODEL`.
        tasks: the tasks, in merging order.
        mode: "standard", "linear" or one composed of these, such as "linear+taujp".

    Raises:
        UsageError: for an unknown mode, or one without checkpoints of its own.
        MissingFileError: if a model is missing; the message names the command that makes it.
    """
    if MODES[mode].training.name != mode or not MODES[mode].edits:
        raise UsageError(
            f"mode {mode!r} has no checkpoints of its own; choose from {', '.join(trained())}, or "
            "one composed of these, such as linear+taujp"
        )
    own = Run.of(Config(save=str(run)))
    models = {task: own.finetuned_path(task, mode) for task in tasks}
    models = {PRETRAINED: own.zeroshot_path, **models}
    made_by = command("finetune", own, mode)
    return ModelPool({key: resolve(path, made_by) for key, path in models.items()})
