"""The papers' experiments with language models: what each needs, and its recipe."""

from __future__ import annotations

from dataclasses import dataclass

from tangent_arithmetic.language.tasks import GLUE, GLUE_7, GLUE_8, NLI_6
from tangent_arithmetic.runtime.errors import UsageError, unknown

CLASSIFIER = "unitary/toxic-bert"  # the weights of Detoxify("original")


@dataclass(frozen=True)
class Experiment:
    """An experiment of the command.

    Attributes:
        module: the module with its function `run`.
        model: the pre-trained model.
        tasks: its tasks, of which `--tasks` chooses; each has a task vector of its name.
        published: fine-tuned models on the hub, with the task in braces; None if there are none.
        lr: peak learning rate.
        epochs: passes over the training rows.
        needs: models and data sets by their names on the hub.
        takes: how long it takes, estimated from the number of operations, not measured.
        vectors: the names of its task vectors, if it has no tasks.
    """

    module: str
    model: str
    tasks: tuple[str, ...]
    published: str | None
    lr: float
    epochs: int
    needs: str
    takes: str
    vectors: tuple[str, ...] = ()


EXPERIMENTS = {
    "glue": Experiment(
        "text_to_text",
        "google/flan-t5-base",
        GLUE_8,
        "tanganke/flan-t5-base_glue-{}",
        4e-5,
        1,
        f"google/flan-t5-base, with --published tanganke/flan-t5-base_glue-TASK; {GLUE}",
        "published models, 21 coefficients: an hour on a GPU, a day on two cores; --rows=100 "
        "--n-eval-points=5 half an hour on two cores; fine-tuning all tasks: 5 hours on a GPU",
    ),
    "gpt2": Experiment(
        "classification",
        "openai-community/gpt2",
        GLUE_7,
        "tanganke/gpt2_{}",
        5e-5,
        3,
        f"openai-community/gpt2, with --published tanganke/gpt2_TASK; {GLUE}",
        "published models, 21 coefficients: half an hour on a GPU, a day on two cores, linear a "
        "quarter of that, since all coefficients are one pass; fine-tuning: 6 hours on a GPU",
    ),
    "nli": Experiment(
        "classification",
        "google-t5/t5-base",
        NLI_6,
        None,
        5e-5,
        3,
        f"google-t5/t5-base; stanfordnlp/snli, RobZamp/sick, allenai/scitail, {GLUE}",
        "fine-tuning: 15 hours on a GPU; with --rows=2000 20 minutes",
    ),
    "toxicity": Experiment(
        "toxicity",
        "openai-community/gpt2",
        (),
        None,
        1e-5,
        5,
        f"openai-community/gpt2, a classifier such as {CLASSIFIER}; google/civil_comments, "
        "Salesforce/wikitext",
        "20 minutes on a GPU; on two cores 8 hours standard, a day linear; --generations=20 "
        "--rows=20 half an hour",
        vectors=("toxic", "harmless", "ascent"),
    ),
    "analogy": Experiment(
        "analogy",
        "google-t5/t5-small",
        (),
        None,
        1e-4,
        1,
        "google-t5/t5-small, -base or -large; fancyzhx/amazon_polarity, fancyzhx/yelp_polarity",
        "with --rows=20000 an hour on a GPU for t5-small; all rows: days",
        vectors=("amazon_sent", "amazon_lm", "yelp_sent", "yelp_lm"),
    ),
}


def chosen_tasks(experiment: Experiment, text: str | None) -> tuple[str, ...]:
    """The tasks of `--tasks`, or all of an experiment.

    Raises:
        UsageError: for a task that the experiment does not have.
    """
    if text is None:
        return experiment.tasks
    if not experiment.tasks:
        raise UsageError(f"--tasks: language {experiment.module} has no tasks to choose from")
    tasks = tuple(dict.fromkeys(text.split(",")))
    for task in tasks:
        if task not in experiment.tasks:
            raise unknown("task", task, experiment.tasks)
    return tasks
