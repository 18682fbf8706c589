"""What the files of sentence-transformers say of a model beyond its weights and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tangent_arithmetic.encoders.backbones.names import TRANSFORMERS
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.reading import inside, read_json, readable

KEYS: Mapping[str, str] = {  # since its version 6 names alone
    "cls": "cls",
    "mean": "mean",
    "lasttoken": "last",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
MODULES = ("Transformer", "Pooling", "Normalize")  # that we have; a head normalises
PROMPTS = "config_sentence_transformers.json"
# of a causal language model in name, whose tokens see all of the text
TWO_SIDED = ("bert-generation", "xlnet")


@dataclass(frozen=True)
class Reading:
    """How a text is read before it has tokens, and how many it may have.

    Attributes:
        length: most tokens of a text; None if nothing says.
        lower: whether its letters become small.
        prompt: what it begins with.
    """

    length: int | None = None
    lower: bool = False
    prompt: str = ""

    def __call__(self, text: str) -> str:
        """The text as the tokenizer gets it."""
        whole = self.prompt + text
        return whole.lower() if self.lower else whole


def reading(folder: Path) -> Reading:
    """How texts are read by a model in a folder.

    Raises:
        UsageError: if its default prompt is not among its prompts.
    """
    own = next(iter(sorted(folder.glob("sentence_*_config.json"))), None)
    stated = {} if own is None else read_json(own)
    listed = folder / PROMPTS
    prompts = read_json(listed) if listed.is_file() else {}
    prompt, name = "", prompts.get("default_prompt_name")
    if name is not None:
        known = prompts.get("prompts") or {}
        if name not in known:
            raise UsageError(
                f"{listed} has the default prompt {shown(name)}, expected one of its prompts "
                f"{', '.join(map(shown, known)) or '(none)'}; correct it, or remove the file"
            )
        prompt = str(known[name])
    length = stated.get("max_seq_length")
    return Reading(length and int(length), bool(stated.get("do_lower_case")), prompt)


def pooling(folder: Path) -> str:
    """How a model's outputs are pooled, by its configuration.

    Raises:
        UsageError: if it needs what we do not have.
    """
    modules = _modules(folder)
    if strange := [kind for kind in modules if kind not in MODULES]:
        raise UsageError(
            f"{folder} has the module {shown(strange[0])} of sentence-transformers, expected "
            f"{', '.join(MODULES)} only; {TRANSFORMERS}{folder}?pooling=mean leaves it out"
        )
    if inner := modules.get("Transformer"):
        raise UsageError(
            f"{folder} has its model in {inner}; name that folder and a pooling, as in "
            f"{TRANSFORMERS}{folder / inner}?pooling=mean"
        )
    own = folder / modules.get("Pooling", "1_Pooling") / "config.json"
    if "Pooling" not in modules and not own.is_file():
        return "last" if _is_causal(read_json(folder / "config.json")) else "mean"
    stated = read_json(own)
    chosen = [key for key, value in stated.items() if value is True and "mode" in key]
    if "pooling_mode" in stated:
        mode = stated["pooling_mode"]
        chosen = list(map(str, mode)) if isinstance(mode, list) else [str(mode)]
    if len(chosen) != 1 or chosen[0] not in KEYS:
        raise UsageError(
            f"{own} has the pooling {', '.join(map(shown, chosen)) or 'none'}, expected one of "
            f"{', '.join(KEYS)}; choose one as in {TRANSFORMERS}{folder}?pooling=mean"
        )
    if stated.get("include_prompt") is False and reading(folder).prompt:
        raise UsageError(
            f"{own} leaves the tokens of the default prompt out of the pooling, expected all of "
            f"them; {TRANSFORMERS}{folder}?pooling={KEYS[chosen[0]]} pools them as well"
        )
    return KEYS[chosen[0]]


def _modules(folder: Path) -> dict[str, str]:
    """The path of each module below the folder, by its kind; empty if there is no list."""
    listed = folder / "modules.json"
    if not listed.is_file():
        return {}
    with readable(listed, "a list of modules"):
        entries = json.loads(listed.read_bytes())
        paths = {each["type"].rpartition(".")[2]: str(each.get("path", "")) for each in entries}
    return {kind: str(inside(listed, path)) if path else "" for kind, path in paths.items()}


def _is_causal(config: Mapping[str, Any]) -> bool:
    """Whether each token of a model sees those before it alone, by its configuration."""
    from transformers.models.auto import modeling_auto as known

    kind = config.get("model_type")
    masked = kind in (*known.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *TWO_SIDED)
    causal = kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not masked
    two_sided = config.get("is_encoder_decoder") or config.get("use_bidirectional_attention")
    return bool(config.get("is_decoder") or causal) and not two_sided
