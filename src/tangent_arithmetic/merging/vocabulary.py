r"""Embeddings of unequal vocabulary: their union, token by token.

The union has the tokens of the base model under their numbers, then those that other models have
added, in the order of the pool. Where a model lacks a token, its row is that of the base model, so
that its task vector is 0 there. A token that the base model lacks starts at the mean of the rows of
those models that have it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.merging.weights import Weights, is_embedding
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.reading import read_json

TOKENIZER, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
CONFIG = "config.json"
FILES = (TOKENIZER, SETTINGS, ADDED, CONFIG)


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
            tokens.
    """
    base, size = models[base_name], max(rows(models[base_name]), default=0)
    own = {name: base if w.low_rank is not None else w for name, w in models.items()}  # adapters
    tokens = {name: Tokens.of(weights.folder, name) for name, weights in own.items()}
    new, after = _new_tokens(tokens, base_name), max(tokens[base_name].ids.values()) + 1
    if after > size:
        raise UsageError(
            f"the tokenizer of {base_name} has {after} tokens, but its embeddings {size} rows; "
            "name the tokenizer of this model"
        )
    numbers = {token: after + i for i, token in enumerate(new)}
    union = _Union(
        models,
        base_name,
        {name: _places(each, tokens[base_name], numbers) for name, each in tokens.items()},
        frozenset(numbers.values()),
        max(size, after + len(new)),
    )
    written = _files(base.folder, tokens, numbers, union.size)
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


def _of_others(weights: Weights) -> Callable[[str], tuple[Tensor, Tensor] | None] | None:
    """The steps of adapters in tensors that are no embeddings of tokens."""
    low_rank = weights.low_rank
    if low_rank is None:
        return None
    kept = {key for key, value in weights.outline.items() if not is_embedding(key, value)}
    return lambda key: low_rank(key) if key in kept else None


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
    """

    models: Mapping[str, Weights]
    base_name: str
    places: Mapping[str, Mapping[int, int]]
    new: frozenset[int]
    size: int

    def resized(self, key: str, value: Tensor) -> Tensor:
        """A tensor of an outline with the rows of the union, if it is an embedding of tokens."""
        if not is_embedding(key, value):
            return value
        return torch.empty(self.size, *value.shape[1:], dtype=value.dtype, device="meta")

    def read(self, name: str, key: str) -> Tensor:
        """A tensor of a model."""
        value = self.models[name].read(key)
        if not is_embedding(key, value):
            return value
        full = self._base(key)
        if name == self.base_name:
            return full
        places = self.places[name]
        full[list(places)] = value[list(places.values())].to(full)
        spare = set(range(min(len(value), self.size))) - self.new - places.keys()
        unused = sorted(spare - set(places.values()))  # rows without a token
        full[unused] = value[unused].to(full)
        return full

    def _base(self, key: str) -> Tensor:
        """The base model's rows, and for each new token the mean of those that have it."""
        own = self.models[self.base_name].read(key)
        full = torch.zeros(self.size, *own.shape[1:], dtype=torch.float64, device=own.device)
        counts = torch.zeros(self.size, dtype=torch.float64, device=own.device)
        for name, places in self.places.items():
            added = [row for row in places if row in self.new]
            value = self.models[name].read(key)
            full[added] += value[[places[row] for row in added]].to(full)
            counts[added] += 1
        full /= counts.clamp(min=1)[:, None]
        old = [row for row in range(len(own)) if row not in self.new]
        full[old] = own[old].to(full)
        return full.to(own.dtype)


def _files(
    folder: Path | None, tokens: Mapping[str, Tokens], numbers: Mapping[str, int], size: int
) -> dict[str, str]:
    """The files of the base model's folder that the new tokens change, as text."""
    assert folder is not None, "its tokenizer was read"
    entries: dict[str, Mapping[str, Any]] = {}
    for each in tokens.values():
        for token in each.added.keys() & numbers.keys() - entries.keys():
            entries[token] = {**each.added[token], "id": numbers[token]}
    entries = {token: entries[token] for token in numbers}
    content = {name: read_json(folder / name) for name in FILES if (folder / name).is_file()}
    if CONFIG in content:
        content[CONFIG]["vocab_size"] = size
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
