"""The tables and figures of the two papers, and which of our tables each is made from.

Places are those of the papers' latest arXiv versions. One that was recalled and not read in a
public text is unverified, and shown with a dagger, as in the report.
"""

from __future__ import annotations

from dataclasses import dataclass

SINGLE, ADDITION, NEGATION = "Single-task accuracy", "Task addition", "Task negation"


@dataclass(frozen=True)
class Item:
    """A table or figure of a paper.

    Attributes:
        place: its name in the paper, such as "table 1".
        title: what it shows.
        made_of: our table: an analysis table such as "subsets", or a table over seeds of the
            summary, `SINGLE`, `ADDITION` or `NEGATION`; None if it does not apply.
        why_not: why it does not apply.
        verified: whether the place was read in a public text.
    """

    place: str
    title: str
    made_of: str | None
    why_not: str = ""
    verified: bool = False

    @property
    def stem(self) -> str:
        """The name of its files."""
        return "_".join(self.place.replace(".", "_").split())

    @property
    def shown(self) -> str:
        """Its place, with a dagger if it was recalled."""
        return self.place if self.verified else f"{self.place} †"


@dataclass(frozen=True)
class Paper:
    """A paper.

    Attributes:
        name: value of `--paper`.
        title: its title.
        arxiv: its number.
        modes: the modes that it compares.
        analyses: the analyses to make for it, of `analyze`.
        items: its tables and figures.
    """

    name: str
    title: str
    arxiv: str
    modes: tuple[str, ...]
    analyses: tuple[str, ...]
    items: tuple[Item, ...]


LANGUAGE = "of language models, see tangent-arithmetic language {}"
RATES = "a figure of scripts/study_rates.py, beside the runs' results"
PAPERS = {
    "arithmetic": Paper(
        "arithmetic",
        "Editing Models with Task Arithmetic",
        "2212.04089",
        ("standard",),
        ("similarity", "negation", "subsets", "analogies", "few"),
        (
            Item("table 1", "forgetting by negation, means over the tasks", NEGATION, "", True),
            Item("table 1 baselines", "negation against its baselines", "negation_random"),
            Item("table 2", "less toxic generation", None, LANGUAGE.format("toxicity")),
            Item("figure 2", "sums of two task vectors", "pairs"),
            Item("figure 3", "sums over all subsets, by their size", "subsets", "", True),
            Item("table 3", "task vectors for GLUE", None, LANGUAGE.format("glue")),
            Item("table 4", "analogies between domains", None, LANGUAGE.format("analogy")),
            Item("figure 4", "analogies without examples of the target", "analogies"),
            Item("figure 4 few", "analogies with few examples of the target", "analogies_few"),
            Item("figure 5", "cosines between task vectors", "similarity", "", True),
            Item("figure 6", "learning rates", None, RATES),
            Item("figure 7", "vectors along fine-tuning", None, RATES),
        ),
    ),
    "tangent": Paper(
        "tangent",
        "Task Arithmetic in the Tangent Space",
        "2305.12827",
        ("standard", "posthoc", "linear"),
        ("single", "disentanglement", "negation", "kernel", "ensembles"),
        (
            Item("figure 2", "the non-linear advantage", "single"),
            Item("figure 3", "disentanglement error of pairs of tasks", "disentanglement"),
            Item("figure 3 xi", "the same as one number", "xi"),
            Item("table 1", "task addition", ADDITION),
            Item("table 2", "task negation", NEGATION),
            Item("figure 5", "single-task accuracy of each mode", SINGLE),
            Item("section 6", "localisation of the kernel's eigenfunctions", "kernel"),
            Item("section 3", "ensembles against sums of weights", "ensembles"),
            Item("section 7", "random initialisation", None, "needs pre-training from scratch"),
        ),
    ),
}
