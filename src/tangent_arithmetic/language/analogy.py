r"""The sentiment analogy: Yelp's sentiment from that of Amazon and the language of both.

\[ \tau_{yelp,sent} \approx \tau_{amazon,sent} + (\tau_{yelp,lm} - \tau_{amazon,lm}) \]

"sent" is fine-tuned on labelled reviews, "lm" on unlabelled ones: their first half is the input,
the second the output, our reading of language modelling for an encoder and decoder. Controls tell
what part of a gain is the analogy's: without the vector of sentiment, without the source's
language, without the target's, and of sentiment alone.

Source: arXiv:2212.04089, section on task analogies.
"""

from __future__ import annotations

import logging
from typing import Any

from tangent_arithmetic.arithmetic.coefficients import find_optimal_coef
from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.language.checkpoints import load_seq2seq
from tangent_arithmetic.language.finetuning import total
from tangent_arithmetic.language.rows import labelled
from tangent_arithmetic.language.settings import Settings
from tangent_arithmetic.language.tasks import TASKS
from tangent_arithmetic.language.text_to_text import TextToText
from tangent_arithmetic.language.tokens import TokenRows, encode, paired
from tangent_arithmetic.runtime.errors import UsageError

logger = logging.getLogger(__name__)

SOURCE, TARGET = "amazon", "yelp"
EDITS: dict[str, dict[str, int]] = {
    "analogy": {f"{SOURCE}_sent": 1, f"{TARGET}_lm": 1, f"{SOURCE}_lm": -1},
    "sentiment of the source": {f"{SOURCE}_sent": 1},
    "language of the target": {f"{TARGET}_lm": 1},
    "languages alone": {f"{TARGET}_lm": 1, f"{SOURCE}_lm": -1},
    "without the source's language": {f"{SOURCE}_sent": 1, f"{TARGET}_lm": 1},
    "without the target's language": {f"{SOURCE}_sent": 1, f"{SOURCE}_lm": -1},
    "sentiment of the target": {f"{TARGET}_sent": 1},
}


class Reviews(TextToText):
    """Reviews of two shops: their sentiment, and their language."""

    def language(self, name: str) -> TokenRows:
        """Reviews without labels: the first half of each is the input, the second the output.

        Raises:
            UsageError: if none has two words.
        """
        task, settings = TASKS[name], self.settings
        rows, _ = labelled(name, "train", task, settings.data, settings.rows)
        texts = [text.split() for text in rows[task.columns[0]]]
        texts = [words for words in texts if len(words) > 1]
        if not texts:
            raise UsageError(
                f"{name}: expected reviews of two words or more, got {len(rows)} of one at most; "
                "give more with --rows, or other data with --data-location"
            )
        if len(texts) < len(rows):
            logger.info("%s: %d reviews of a word at most left out", name, len(rows) - len(texts))
        first = [" ".join(words[: len(words) // 2]) for words in texts]
        second = [" ".join(words[len(words) // 2 :]) for words in texts]
        sources, targets = (
            encode(part, self.tokenizer, settings.length) for part in (first, second)
        )
        return TokenRows(paired(sources, targets, self.base.start))

    def part(self, name: str) -> TaskVector:
        """The vector of DATASET_sent or DATASET_lm."""
        dataset, _, kind = name.partition("_")
        data = self.rows if kind == "sent" else self.language
        return self.vectors.get(name, self.base, lambda: data(dataset), load_seq2seq)


def run(settings: Settings) -> dict[str, Any]:
    """Evaluates the analogy and its controls on the target, each at its best coefficient.

    Returns:
        For each edit `val` at each coefficient, the `coefficient` and the accuracy `test`; that of
        the `pretrained` model; hashes of the `weights`.
    """
    study, edits = Reviews(settings), {}
    parts = {name: study.part(name) for name in sorted({n for e in EDITS.values() for n in e})}
    for edit, signs in EDITS.items():
        vector = total(parts[name] * float(sign) for name, sign in signs.items())
        val = {c: study.score(study.edited(vector, c), TARGET, "val") for c in settings.coefs}
        best = find_optimal_coef({c: {"accuracy": v} for c, v in val.items()}, "accuracy")
        edits[edit] = {
            "val": {f"{coef:g}": accuracy for coef, accuracy in val.items()},
            "coefficient": best,
            "test": study.score(study.edited(vector, best), TARGET, "test"),
        }
    pretrained = study.score(study.base, TARGET, "test")
    return {"pretrained": pretrained, "edits": edits, "weights": study.vectors.hashes}
