"""The tasks of the papers' language experiments: where the hub has them, columns, prompts, answers.

The prompts and answers of GLUE are FusionBench's to the letter, "Answere" included, since its
published flan-t5 models were trained on them (tanganke/fusion_bench, MIT, file
fusion_bench/tasks/flan_t5_text_generation/glue_prompt_templates.py). Those of reviews are T5's own
for SST-2 (arXiv:1910.10683, appendix D.9), which it has seen.
"""

from __future__ import annotations

from dataclasses import dataclass

ENTAILMENT = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not_entailment")
NO_YES = ("no", "yes")
GLUE = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """A labelled data set of texts, or of pairs of texts.

    Attributes:
        repo: its repository on the hub.
        config: its configuration there; None for the only one.
        columns: the one or two columns of text, in the order in which a classifier reads them.
        classes: the hub's names of the classes, in the order of our labels; empty for a score.
        label: the column of labels.
        test: the split to report on; that of GLUE has no public labels, and "validation" takes its
            place, as in the published numbers.
        prompt: the input of a text-to-text model, with columns in braces; empty if it has none.
        answers: the outputs, in the order of the classes; empty for a score, "{:.1f}".
    """

    repo: str
    config: str | None
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    label: str = "label"
    test: str = "validation"
    prompt: str = ""
    answers: tuple[str, ...] = ()

    @property
    def is_score(self) -> bool:
        """Whether the label is a number, measured by Spearman's correlation, not by accuracy."""
        return not self.classes


TASKS = {
    "cola": Task(
        GLUE,
        "cola",
        ("sentence",),
        ("unacceptable", "acceptable"),
        prompt="Indicate if the following sentence is grammatically correct or not: "
        "\"{sentence}\". Answere 'acceptable' or 'unacceptable'.",
        answers=("unacceptable", "acceptable"),
    ),
    "mnli": Task(
        GLUE,
        "mnli",
        ("premise", "hypothesis"),
        ENTAILMENT,
        test="validation_matched",
        prompt="Does the premise: '{premise}' logically imply, contradict, or is neutral to the "
        "hypothesis: '{hypothesis}'? Answere with 'entailment', 'contradiction', or 'neutral'.",
        answers=ENTAILMENT,
    ),
    "mrpc": Task(
        GLUE,
        "mrpc",
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        prompt="Are the following sentences '{sentence1}' and '{sentence2}' conveying the same "
        "meaning? Answere with 'yes' or 'no'.",
        answers=NO_YES,
    ),
    "qnli": Task(
        GLUE,
        "qnli",
        ("question", "sentence"),
        TWO_WAY,
        prompt="Given the context: '{sentence}', does the question '{question}' have an answer "
        "based on the information provided? Answer with 'yes' or 'no'.",
        answers=("yes", "no"),
    ),
    "qqp": Task(
        GLUE,
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        prompt="Do the questions '{question1}' and '{question2}' have the same intent? Answere "
        "with 'yes' or 'no'.",
        answers=NO_YES,
    ),
    "rte": Task(
        GLUE,
        "rte",
        ("sentence1", "sentence2"),
        TWO_WAY,
        prompt="Does the text: '{sentence1}' entail that '{sentence2}' is true? Provide 'yes' or "
        "'no'.",
        answers=("yes", "no"),
    ),
    "sst2": Task(
        GLUE,
        "sst2",
        ("sentence",),
        ("negative", "positive"),
        prompt="Given the sentence '{sentence}', determine the sentiment. Is it positive or "
        "negative?",
        answers=("negative", "positive"),
    ),
    "stsb": Task(
        GLUE,
        "stsb",
        ("sentence1", "sentence2"),
        (),
        prompt="Consider the sentences '{sentence1}' and '{sentence2}'. On a scale from 1 "
        "(completely different) to 5 (completely similar), rate the similarity.",
    ),
    "snli": Task("stanfordnlp/snli", None, ("premise", "hypothesis"), ENTAILMENT, test="test"),
    "sick": Task("RobZamp/sick", None, ("sentence_A", "sentence_B"), ENTAILMENT, test="test"),
    "scitail": Task(
        "allenai/scitail",
        "tsv_format",
        ("premise", "hypothesis"),
        ("entails", "neutral"),
        test="test",
    ),
    "amazon": Task(
        "fancyzhx/amazon_polarity",
        None,
        ("content",),
        ("negative", "positive"),
        test="test",
        prompt="sst2 sentence: {content}",
        answers=("negative", "positive"),
    ),
    "yelp": Task(
        "fancyzhx/yelp_polarity",
        None,
        ("text",),
        ("1", "2"),
        test="test",
        prompt="sst2 sentence: {text}",
        answers=("negative", "positive"),
    ),
}
GLUE_8 = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
GLUE_7 = GLUE_8[:-1]  # GPT-2 classifies
NLI_6 = ("snli", "mnli", "sick", "scitail", "rte", "qnli")
COMMENTS, WIKITEXT = "google/civil_comments", "Salesforce/wikitext"
WIKITEXT_CONFIG = "wikitext-103-raw-v1"
