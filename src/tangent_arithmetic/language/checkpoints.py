"""Models and tokenizers of transformers by name or folder, and folders of fine-tuned models.

A fine-tuned model, standard or linear, is a folder that transformers reads, with its tokenizer; how
it was made is beside the weights in `tangent_arithmetic.json`, which is written last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tangent_arithmetic.encoders.backbones import tokenizers
from tangent_arithmetic.language.models import (
    CausalLM,
    Seq2SeqLM,
    TextClassifier,
    TokenModel,
    head_of,
)
from tangent_arithmetic.runtime.atomic import disk_errors, write_json
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, hub_failure, shown
from tangent_arithmetic.storage.checkpoints import not_finite
from tangent_arithmetic.storage.reading import read_json
from tangent_arithmetic.storage.states import check_settings
from tangent_arithmetic.tangent.linearized import LinearizedModel

FACTS = "tangent_arithmetic.json"


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model on the hub, or in a folder.

    Raises:
        UsageError: if there is none.
    """
    if (folder := Path(name)).is_dir():
        tokenizers.files_of(folder)
    tokenizer = _loaded("AutoTokenizer", name)
    tokenizers.check_tokens(tokenizer, name)
    return tokenizer


def load_causal(name: str | Path) -> CausalLM:
    """A decoder such as GPT-2 or Llama, in float32."""
    return CausalLM(_model("CausalLM", name))


def load_seq2seq(name: str | Path) -> Seq2SeqLM:
    """An encoder and decoder such as T5, in float32."""
    return Seq2SeqLM(_model("Seq2SeqLM", name))


def load_classifier(name: str | Path, classes: int | None = None, seed: int = 0) -> TextClassifier:
    """A classifier of texts, in float32.

    Args:
        name: of a model; without a head only if `classes` is given.
        classes: number of classes; None for the model's own.
        seed: of a head that the model does not have.
    """
    if classes is None:
        return TextClassifier(_model("SequenceClassification", name))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = _model("SequenceClassification", name, new_head=True, num_labels=classes)
    return TextClassifier(model)


def load_judge(name: str | Path) -> Any:
    """A classifier of any kind as transformers has it, such as a BERT, in float32."""
    return _model("SequenceClassification", name).eval()


def _model(kind: str, name: str | Path, new_head: bool = False, **options: Any) -> Any:
    """A model in float32, all of whose weights are read; with `new_head` its head need not be."""
    model, info = _loaded(f"AutoModelFor{kind}", name, output_loading_info=True, **options)
    drawn = (f"{head_of(model)}.",) if new_head else ()
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(drawn)):
        raise UsageError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__}, the first of them "
            f"{shown(missing[0])}; expected all of them, since the others would be random numbers. "
            "Fetch it again, or name another model"
        )
    return model.float()


def _loaded(kind: str, name: str | Path, **options: Any) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingFileError(
            f"{name} needs the library transformers, which is not installed "
            '(pip install -e ".[hub]")'
        ) from error
    try:
        return getattr(transformers, kind).from_pretrained(str(name), **options)
    except Exception as error:  # of the library, of the network, of the file system
        raise MissingFileError(
            f"{name} cannot be read as {kind.removeprefix('Auto')} {hub_failure(error)}; expected "
            "the name of a model on the hub, or a folder of transformers' layout"
        ) from error


def save(
    model: TokenModel | LinearizedModel, folder: Path, tokenizer: Any, facts: dict[str, Any]
) -> None:
    """Writes a model as a folder that transformers reads.

    Args:
        model: standard or linear; of a linear one theta.
        folder: the folder.
        tokenizer: its tokenizer; None for none.
        facts: how it was made.

    Raises:
        UsageError: if a weight is not finite.
    """
    plain: Any = model.standard() if isinstance(model, LinearizedModel) else model
    if bad := not_finite(dict(plain.named_parameters())):
        raise UsageError(f"{folder} was not written: {bad[0]} and {len(bad) - 1} more not finite")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        plain.model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    write_json(folder / FACTS, {"linear": isinstance(model, LinearizedModel), **facts})


def facts_of(folder: str | Path) -> dict[str, Any]:
    """How the model in a folder was made; empty if `save` did not write it."""
    path = Path(folder) / FACTS
    return read_json(path) if path.is_file() else {}


def is_done(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether the folder holds a finished model that was made with these facts.

    Raises:
        UsageError: if it was made with others; it is not overwritten.
    """
    if not (recorded := facts_of(folder)):
        return False
    check_settings(folder, recorded, facts, "--save")
    return True
