"""Models and tokenizers of transformers by name or folder, and folders of fine-tuned models.

A fine-tuned model, standard or linear, is a folder that transformers reads, with its tokenizer; how
it was made is beside the weights in `tangent_arithmetic.json`, which is written last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tangent_arithmetic.language.models import CausalLM, Seq2SeqLM, TextClassifier, TokenModel
from tangent_arithmetic.runtime.atomic import disk_errors, write_json
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, hub_failure
from tangent_arithmetic.storage.checkpoints import not_finite
from tangent_arithmetic.storage.reading import read_json
from tangent_arithmetic.storage.states import check_settings
from tangent_arithmetic.tangent.linearized import LinearizedModel

FACTS = "tangent_arithmetic.json"


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model on the hub, or in a folder."""
    return _loaded("AutoTokenizer", name)


def load_causal(name: str | Path) -> CausalLM:
    """A decoder such as GPT-2 or Llama, in float32."""
    return CausalLM(_loaded("AutoModelForCausalLM", name).float())


def load_seq2seq(name: str | Path) -> Seq2SeqLM:
    """An encoder and decoder such as T5, in float32."""
    return Seq2SeqLM(_loaded("AutoModelForSeq2SeqLM", name).float())


def load_classifier(name: str | Path, classes: int | None = None, seed: int = 0) -> TextClassifier:
    """A classifier of texts, in float32.

    Args:
        name: of a model with or without a head.
        classes: number of classes; None for the model's own.
        seed: of a head that the model does not have.
    """
    options = {} if classes is None else {"num_labels": classes}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = _loaded("AutoModelForSequenceClassification", name, **options)
    return TextClassifier(model.float())


def load_judge(name: str | Path) -> Any:
    """A classifier of any kind as transformers has it, such as a BERT, in float32."""
    return _loaded("AutoModelForSequenceClassification", name).float().eval()


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


def is_done(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether the folder holds a finished model that was made with these facts.

    Raises:
        UsageError: if it was made with others; it is not overwritten.
    """
    if not (folder / FACTS).is_file():
        return False
    check_settings(folder, read_json(folder / FACTS), facts, "--save")
    return True
