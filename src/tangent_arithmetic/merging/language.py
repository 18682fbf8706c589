"""Pools of language models: one set of names, tied embeddings kept tied, heads left out."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from tangent_arithmetic.merging.pool import Model, ModelPool
from tangent_arithmetic.merging.vocabulary import TOKENIZER, Tokens, rows, united
from tangent_arithmetic.merging.weights import Weights, with_names
from tangent_arithmetic.runtime.errors import UsageError, shown, unknown

logger = logging.getLogger(__name__)
# causal masks, which old files of GPT-2 hold and transformers ignores
MASKS = re.compile(r"(.*\.)?attn\.(masked_)?bias")
HEADS = re.compile(r"(.*\.)?(score|classifier)\.(.*\.)?(weight|bias)")
VOCABULARIES = ("same", "union")


class LanguageModelPool(ModelPool):
    """Language models of one architecture in folders of `transformers`, sharded or not.

    All have the base model's names: classes of one architecture differ in a prefix, such as
    `transformer.`, and versions in further names of tied embeddings and in masks. A head that the
    base model lacks is left out, and the log says so.

    Args:
        models: as for `ModelPool`.
        allow_base_mismatch: as for `ModelPool`.
        vocabulary: "same" refuses vocabularies of unequal size, and warns of tokenizers that differ
            in a row; "union" merges token by token, see `merging.vocabulary`.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        allow_base_mismatch: bool = False,
        vocabulary: str = "same",
    ) -> None:
        super().__init__(models, allow_base_mismatch)
        if vocabulary not in VOCABULARIES:
            raise unknown("vocabulary", vocabulary, VOCABULARIES)
        self.vocabulary = vocabulary
        self._united: dict[str, Weights] = {}

    def weights(self, name: str) -> Weights:
        """The weights of a model, over the pool's vocabulary."""
        if self.vocabulary == "same":
            return self._own(name)
        if not self._united:
            opened = {each: self._own(each) for each in self.models}
            self._united = united(opened, self.base_name)
        return self._united[name]

    def _opened(self, name: str) -> Weights:
        weights = super()._opened(name)
        base = self.base_name
        return weights if name == base else aligned(weights, self._own(base), name)

    def check(self) -> None:
        """Checks that the models can be merged, see `ModelPool.check`."""
        try:
            super().check()
        except UsageError as error:
            if len({rows(self._own(name)) for name in self.models}) == 1:
                raise
            raise UsageError(
                f"{error}\nThe vocabularies have different sizes; vocabulary=union merges them by "
                "token, on the command line modelpool=language modelpool.vocabulary=union"
            ) from error
        if self.vocabulary == "same":
            self._warn_of_tokens()

    def _warn_of_tokens(self) -> None:
        """Warns if one row of the embeddings belongs to different tokens."""
        size, known = max(rows(self.base), default=0), dict[int, tuple[str, str]]()
        for name in self.models:
            weights = self._own(name)
            folder = None if weights.low_rank is not None else weights.folder  # not of adapters
            if folder is None or not (folder / TOKENIZER).is_file():
                continue
            with contextlib.suppress(UsageError):  # a tokenizer of another kind
                for token, row in Tokens.of(folder, name).ids.items():
                    model, other = known.setdefault(row, (name, token))
                    if other != token and row < size:
                        logger.warning(
                            "row %d of the embeddings is %s in %s, but %s in %s: different tokens "
                            "are merged into one; vocabulary=union merges token by token",
                            *(row, shown(other), model, shown(token), name),
                        )
                        return


def aligned(weights: Weights, base: Weights, model: str) -> Weights:
    """The weights of a model under the names of the base model.

    Args:
        weights: the weights.
        base: the base model's.
        model: the model's name, for the log.
    """
    weights = with_names(weights, _renaming(weights.outline, base.outline))
    extra = weights.outline.keys() - base.outline.keys()
    heads = sorted(name for name in extra if HEADS.fullmatch(name))
    if heads:
        logger.info(
            "left out of the merge: %s of %s, a head that the base model lacks",
            ", ".join(heads),
            model,
        )
    twins = {name for name in extra if set(_tied_to(name, weights.ties)) & base.outline.keys()}
    left = {*heads, *twins, *(name for name in extra if MASKS.fullmatch(name))}
    sources = {name: (weights, name) for name in weights.outline if name not in left}
    for name in base.outline.keys() - sources.keys():
        known = [twin for twin in _tied_to(name, base.ties) if twin in weights.outline]
        if known:
            sources[name] = weights, known[0]
        elif MASKS.fullmatch(name):
            sources[name] = base, name
    ties = {**base.ties, **weights.ties}
    return replace(
        weights,
        outline={name: of.outline[own] for name, (of, own) in sources.items()},
        read=lambda name: sources[name][0].read(sources[name][1]),
        ties={name: first for name, first in ties.items() if {name, first} <= sources.keys()},
    )


def _tied_to(name: str, ties: Mapping[str, str]) -> Iterator[str]:
    """The other names of a tied parameter."""
    first = ties.get(name, name)
    return (each for each in (first, *(n for n in ties if ties[n] == first)) if each != name)


def _renaming(names: Iterable[str], targets: Iterable[str]) -> Callable[[str], str]:
    """The change of a prefix that gives the most of the target names."""
    names, known = list(names), set(targets)

    def first_words(of: Iterable[str]) -> list[str]:
        return sorted({f"{name.partition('.')[0]}." for name in of})

    changes = [("", ""), *((word, "") for word in first_words(names))]
    changes += [("", word) for word in first_words(known)]

    def renamed(name: str, dropped: str, added: str) -> str:
        return added + name.removeprefix(dropped)

    def hits(change: tuple[str, str]) -> int:
        new = {renamed(name, *change) for name in names}
        return len(new & known) if len(new) == len(names) else -1

    best = max(changes, key=hits)
    return lambda name: renamed(name, *best)
