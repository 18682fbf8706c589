r"""Embeddings of unequal vocabulary: their union, token by token.

The union has the tokens of the base model under their numbers, then those that other models have
added, in the order of the pool. Where a model lacks a token, its row is that of the base model, so
that its task vector is 0 there. A token that the base model lacks starts at the mean of the rows of
those models that have it.

Merging reads one such tensor of every model into memory at a time, in the model's dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.merging.spectral import OUTPUTS, module_of
from tangent_arithmetic.merging.weights import CONFIG, Weights, is_embedding
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.reading import read_json

TOKENIZER, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
FILES = (TOKENIZER, SETTINGS, ADDED, CONFIG)
BIASED = (*OUTPUTS, "predictions")  # modules whose bias has a number for each token
ROWS = 2**14  # that are copied at once; affects memory only


@dataclass(frozen=True)
class Tokens:
    """The tokens of a model.

    Attributes:
        ids: token -> its row; those of the tokenizer's model and the added ones.
        added: the entries of the added tokens, as in `tokenizer.json`, by token.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, folder: Path | None, model: str) -> Tokens:
        """The tokens of the tokenizer in a folder.

        Raises:
            UsageError: if there is no `tokenizer.json`.
        """
        path = None if folder is None else folder / TOKENIZER
        if path is None or not path.is_file():
            raise UsageError(
                f"vocabulary=union needs the {TOKENIZER} of every model, and {model} has none; "
                "save it beside the weights with tokenizer.save_pretrained(FOLDER)"
            )
        content = read_json(path)
        try:
            vocabulary = content["model"]["vocab"]
            if not isinstance(vocabulary, Mapping):  # Unigram: pairs of token and score
                vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
            added = {str(entry["content"]): entry for entry in content.get("added_tokens") or ()}
            ids = {**vocabulary, **{token: int(entry["id"]) for token, entry in added.items()}}
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is no tokenizer of transformers ({error!r})") from error
        return cls(ids, added)


def rows(weights: Weights) -> tuple[int, ...]:
    """The number of rows of each embedding of tokens."""
    sizes = weights.outline.items()
    return tuple(value.shape[0] for name, value in sorted(sizes) if is_embedding(name, value))


def united(models: Mapping[str, Weights], base_name: str) -> dict[str, Weights]:
    """The models over the union of their vocabularies.

    Args:
        models: the models, each over its own vocabulary.
        base_name: the name of the base model.

    Raises:
        UsageError: if a tokenizer is missing, or is no extension of the base model's by added
            tokens; or if the base model has no embedding of tokens, or several of unequal size.
    """
    base, sizes = models[base_name], set(rows(models[base_name]))
    if len(sizes) != 1:
        raise UsageError(
            f"vocabulary=union needs one number of rows of all embeddings of tokens; {base_name} "
            f"has {' and '.join(map(str, sorted(sizes))) or 'no such embedding'} among "
            f"{', '.join(map(shown, sorted(base.outline)[:5]))} and others"
        )
    (size,) = sizes
    own = {name: base if w.low_rank is not None else w for name, w in models.items()}  # adapters
    tokens = {name: Tokens.of(weights.folder, name) for name, weights in own.items()}
    for name, each in tokens.items():
        number, least = max(each.ids.values()) + 1, min(rows(own[name]), default=size)
        if number > least:
            raise UsageError(
                f"the tokenizer of {name} has {number} tokens, but its embeddings {least} rows; "
                "name the tokenizer of this model"
            )
    new, after = _new_tokens(tokens, base_name), max(tokens[base_name].ids.values()) + 1
    numbers = {token: after + i for i, token in enumerate(new)}
    places = {name: _places(each, tokens[base_name], numbers) for name, each in tokens.items()}
    union = _Union(models, base_name, places, list(numbers.values()), max(size, after + len(new)))
    _check_sizes(base, base_name, size, union.size)
    written = _files(base.folder, tokens, numbers, size, union.size)
    return {
        name: replace(
            weights,
            outline={key: union.resized(key, value) for key, value in weights.outline.items()},
            read=partial(union.read, name),
            low_rank=_of_others(weights),
            written=written if name == base_name else {},
        )
        for name, weights in models.items()
    }


def _check_sizes(base: Weights, base_name: str, old: int, size: int) -> None:
    """Refuses biases with a number for each token that have no place in the union."""
    outline = base.outline.items()
    biases = [n for n, v in outline if n.endswith("bias") and v.ndim and v.shape[-1] == old]
    left = [name for name in biases if not _has_rows(name, base.outline[name])]
    if left and size != old:
        raise UsageError(
            f"{base_name} has a number for each token in {', '.join(map(shown, left))}, which "
            "vocabulary=union does not merge; merge models of one vocabulary"
        )


def _of_others(weights: Weights) -> Callable[[str], tuple[Tensor, Tensor] | None] | None:
    """The steps of adapters in tensors that are no embeddings of tokens."""
    low_rank = weights.low_rank
    if low_rank is None:
        return None
    kept = {key for key, value in weights.outline.items() if not _has_rows(key, value)}
    return lambda key: low_rank(key) if key in kept else None


def _has_rows(name: str, value: Tensor) -> bool:
    """Whether a tensor has a row, or a number, for each token."""
    of_bias = value.ndim == 1 and name.endswith(".bias")
    return is_embedding(name, value) or (of_bias and module_of(name[: -len(".bias")]) in BIASED)


def _new_tokens(tokens: Mapping[str, Tokens], base_name: str) -> list[str]:
    """The tokens that the base model lacks, in the order of the models and their numbers."""
    new: dict[str, None] = {}
    for name, each in tokens.items():
        own = sorted(each.ids.keys() - tokens[base_name].ids.keys(), key=each.ids.__getitem__)
        if foreign := [token for token in own if token not in each.added]:
            raise UsageError(
                f"vocabulary=union merges tokenizers that add tokens to that of {base_name}, but "
                f"the one of {name} has {len(foreign)} others, such as {shown(foreign[0])!r}; "
                "merge models of one tokenizer"
            )
        new |= dict.fromkeys(own)
    return list(new)


def _places(own: Tokens, base: Tokens, numbers: Mapping[str, int]) -> dict[int, int]:
    """Row in the union -> row in a model, for the tokens that it has."""
    known = {**base.ids, **numbers}
    return {known[token]: number for token, number in own.ids.items()}


@dataclass(frozen=True)
class _Union:
    """The models over the union of their vocabularies, see the module.

    Attributes:
        models: each over its own vocabulary.
        base_name: the name of the base model.
        places: by model, row in the union -> its own row, for the tokens that it has.
        new: the rows of the tokens that the base model lacks.
        size: the number of rows.
        starts: the new rows of each tensor, once they are known.
    """

    models: Mapping[str, Weights]
    base_name: str
    places: Mapping[str, Mapping[int, int]]
    new: Sequence[int]
    size: int
    starts: dict[str, Tensor] = field(default_factory=dict)

    def resized(self, key: str, value: Tensor) -> Tensor:
        """A tensor of an outline with the rows of the union, if it has a row for each token."""
        if not _has_rows(key, value):
            return value
        return torch.empty(self.size, *value.shape[1:], dtype=value.dtype, device="meta")

    def read(self, name: str, key: str) -> Tensor:
        """A tensor of a model."""
        value = self.models[name].read(key)
        if not _has_rows(key, value):
            return value
        base = self.models[self.base_name].read(key)
        full = value.new_empty(self.size, *value.shape[1:])
        full[: len(base)] = base
        if self.new:
            full[self.new] = self._start(key).to(full)
        if name != self.base_name:
            rows = torch.tensor(self._rows(name, len(value)))
            for target, source in (pair.T for pair in rows.split(ROWS)):
                full[target] = value[source]
        return full

    def _rows(self, name: str, number: int) -> list[tuple[int, int]]:
        """Pairs of a row in the union and the row of a model, which has this number of rows."""
        places = self.places[name]
        spare = set(range(min(number, self.size))) - set(self.new) - places.keys()
        unused = spare - set(places.values())  # rows without a token
        return [*places.items(), *((row, row) for row in sorted(unused))]

    def _start(self, key: str) -> Tensor:
        """The new rows: each the mean of those that have the token, as the base model stores it."""
        if key not in self.starts:
            own = self.models[self.base_name].read(key)
            total = torch.zeros(len(self.new), *own.shape[1:], dtype=torch.float64)
            counts = torch.zeros(len(self.new), *(1 for _ in own.shape[1:]), dtype=torch.float64)
            for name, places in self.places.items():
                known = [i for i, row in enumerate(self.new) if row in places]
                if known:
                    value = self.models[name].read(key)
                    total[known] += value[[places[self.new[i]] for i in known]].to(total)
                    counts[known] += 1
            self.starts[key] = (total / counts).to(own.dtype)
        return self.starts[key]


def _files(
    folder: Path | None,
    tokens: Mapping[str, Tokens],
    numbers: Mapping[str, int],
    old: int,
    size: int,
) -> dict[str, str]:
    """The files of the base model's folder that the new tokens change, as text."""
    assert folder is not None, "its tokenizer was read"
    entries: dict[str, Mapping[str, Any]] = {}
    for each in tokens.values():
        for token in each.added.keys() & numbers.keys() - entries.keys():
            entries[token] = {**each.added[token], "id": numbers[token]}
    entries = {token: entries[token] for token in numbers}
    content = {name: read_json(folder / name) for name in FILES if (folder / name).is_file()}
    if CONFIG in content and not _resize(content[CONFIG], old, size):
        raise UsageError(
            f"{folder / CONFIG} has no vocab_size of {old}, the rows of its embeddings, so that "
            f"vocabulary=union cannot set it to {size}; correct it"
        )
    content[TOKENIZER].setdefault("added_tokens", []).extend(entries.values())
    if isinstance(known := content.get(SETTINGS, {}).get("added_tokens_decoder"), dict):
        for entry in entries.values():
            facts = {key: value for key, value in entry.items() if key != "id"}
            known[str(entry["id"])] = facts
    if ADDED in content:
        content[ADDED] |= numbers
    return {
        name: json.dumps(value, indent=2, ensure_ascii=False) for name, value in content.items()
    }


def _resize(config: dict[str, Any], old: int, size: int) -> int:
    """Sets the number of tokens wherever a configuration has it, such as in `text_config`.

    Returns:
        How often it was there.
    """
    own = config.get("vocab_size") == old
    if own:
        config["vocab_size"] = size
    inner = (value for value in config.values() if isinstance(value, dict))
    return own + sum(_resize(value, old, size) for value in inner)
