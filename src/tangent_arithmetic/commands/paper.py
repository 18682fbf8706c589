"""A paper in a command: what `reproduce --paper=NAME` makes, needs and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tangent_arithmetic.commands.stages import Stage, each_task
from tangent_arithmetic.report.papers.items import ADDITION, NEGATION, SINGLE, Item, Paper
from tangent_arithmetic.run.costs import Costs, of_clip
from tangent_arithmetic.run.modes import MODES, in_order
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.atomic import write_json, write_text
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.eta import Step, shown_time

OF_ANALOGIES = ("analogies", "few")  # analyses that need them
PAIRS = "pairs"  # the sums of two among the subsets
# figures of means over rows, within a seed first: they are drawn from the rows of every seed
AVERAGED = ("subsets", "negation_random", "kernel", "ensembles")
# tables that are not of the tasks' accuracies: what the error of the images is of
TARGETS, ERRORS = "targets", "disentanglement errors"
OF = {"analogies": TARGETS, "few": TARGETS, "analogies_few": TARGETS, "disentanglement": ERRORS,
      "xi": ERRORS, "similarity": None, "kernel": None}  # fmt: skip
LONGEST = 45  # rows of a table that fit a page
CLAIM = {0: 0.08, 1: 0.27, 2: 0.17, 3: 0.27, 5: 0.09}  # widths of the columns of claims
FIGURES = ("pdf", "png", "svg")
ENDINGS = ("csv", "tex", "md", *FIGURES)  # of an item's files


def further(paper: Paper, run: Run, flags: list[str], modes: Sequence[str]) -> list[Stage]:
    """The stages of a paper beside those of the benchmark: more fine-tuning, and analyses.

    Args:
        paper: the paper.
        run: the run.
        flags: its flags, for each entry point.
        modes: the modes to analyse.

    Raises:
        UsageError: for an invalid analogy or pair of tasks.
    """
    from tangent_arithmetic.analysis.analogies import analogies_of
    from tangent_arithmetic.analysis.baselines import ascent_of
    from tangent_arithmetic.analysis.tables import table_path
    from tangent_arithmetic.commands import analyze, finetune

    costs, found = Costs.of(run), []
    names = [name for name in paper.analyses if name not in left_out(run, modes)]
    if set(OF_ANALOGIES) & set(names):
        analogies_of(run)  # raises before the work
    ascents = [ascent for mode in modes if (ascent := ascent_of(mode))]
    if "negation" in names and "standard" in modes:
        ascent = "standard+ascent"
        argv, cost = [f"--finetuning-mode={ascent}", *flags], costs.training("standard")
        found.append(Stage("gradient ascent", finetune.main, argv, None, cost, each_task(run)))
    if more := dict.fromkeys(one for name in names for one in further_sets(run, name)):
        parts = {name: [f"--train-dataset={name}"] for name in more}
        for mode in in_order(MODES[mode].training.name for mode in modes):
            argv, cost = [f"--finetuning-mode={mode}", *flags], Costs(len(more), 1).training(mode)
            label = f"{mode} fine-tuning on further data sets"
            found.append(Stage(label, finetune.main, argv, None, cost, parts))
    for name in names:
        output = table_path(run, analyze.ANALYSES[name][-1][0])
        argv = [name, f"--modes={','.join(modes)}", *flags]
        made = Stage(f"analysis {name}", analyze.main, argv, output, costs.analysis(name))
        reads = (*modes, *ascents) if name == "negation" else tuple(modes)
        found.append(replace(made, modes=reads, sets=tuple(further_sets(run, name))))
    return found


def left_out(run: Run, modes: Sequence[str]) -> dict[str, str]:
    """The analyses that a run with these modes does not make, each with the reason."""
    few, found = "standard" not in modes, dict[str, str]()
    if few or len(modes) == 1:
        found["single"] = "compares standard models with those of other modes; see --modes"
    if not any(MODES[mode].linear for mode in modes):
        found["kernel"] = "is of linear models; see --modes"
    if len(run.tasks) < 2 and not run.config.pairs:
        found["disentanglement"] = "compares tasks in pairs, and there is one; set --pairs=A+B"
    if run.control_set is None:
        found["negation"] = f"suite {run.suite.name} has no control set"
    if few:
        found["few"] = "fine-tunes standard models; see --modes"
    if not has_analogies(run):
        reason = f"no analogies of {', '.join(run.tasks)}; set --analogies=C+B-A=D"
        found.update(dict.fromkeys(OF_ANALOGIES, reason))
    return found


def has_analogies(run: Run) -> bool:
    """Whether analogies are named, or the run has all tasks of a suite with analogies."""
    own = bool(run.suite.analogies) and set(run.tasks) == set(run.suite.tasks)
    return own or bool(run.config.analogies)


def further_sets(run: Run, analysis: str) -> list[str]:
    """The data sets whose checkpoints an analysis needs and that are no tasks of the run."""
    from tangent_arithmetic.analysis.tables import data_sets_of
    from tangent_arithmetic.commands.analyze import ANALYSES

    named = [one for table, *_ in ANALYSES[analysis] for one in data_sets_of(run, table)]
    return [one for one in dict.fromkeys(named) if one not in run.tasks]


def data_sets(paper: Paper, run: Run, modes: Sequence[str]) -> list[str]:
    """The data sets that a paper needs."""
    names = [name for name in paper.analyses if name not in left_out(run, modes)]
    more = [one for name in names for one in further_sets(run, name)]
    return list(dict.fromkeys([*run.tasks, *([run.control_set] if run.control_set else []), *more]))


def plan(
    paper: Paper, runs: Sequence[Run], work: Sequence[Sequence[Stage]], needed: Sequence[str]
) -> str:
    """What a paper needs and how long it takes, for the terminal."""
    run, steps = runs[0], [step for todo in work for stage in todo for step in stage.steps]
    lines = [
        f"{paper.title} (arXiv:{paper.arxiv}) on suite {run.suite.name}, {run.model}, "
        f"{len(runs)} seed{'s' if len(runs) > 1 else ''}{run.examples}",
        f"needs the data sets {', '.join(needed)}",
    ]
    if run.suite.name == "embedded":
        seconds = sum(step.cost for step in steps)
        lines.append(f"takes about {shown_time(seconds)} on two cores, if nothing is done yet")
    elif run.suite.name.startswith("clip"):
        lines += _on_gpus(run, steps)
    return "\n".join(lines)


def _on_gpus(run: Run, steps: Sequence[Step]) -> list[str]:
    """What a public suite needs: its data, and so much time where the model's cost is known."""
    lines, gpus = [], run.config.world_size
    each = [of_clip(step, run.model, gpus) for step in steps]
    known = [value for value in each if value is not None]
    if len(known) == len(each):
        lines.append(
            f"takes about {shown_time(sum(known))} on {gpus} GPU{'s' if gpus > 1 else ''} of "
            "40 TFLOP/s, from operations alone (none was timed); --world-size=N for several"
        )
    made_by = f"tangent-arithmetic prepare-data --suite={run.suite.name}"
    return [*lines, f"the data sets come with: {made_by}"]


def folder_of(paper: Paper, run: Run) -> Path:
    """Where a paper's tables and figures are written, by the first of its runs."""
    return run.results.parent / "papers" / run.results.name / paper.name


def write(paper: Paper, runs: Sequence[Run], modes: Sequence[str]) -> Path:
    """Writes every table and figure of these modes that applies, and the claims.

    Returns:
        The folder.
    """
    from tangent_arithmetic.run.latex import document, placed
    from tangent_arithmetic.run.tables import markdown_table

    made_of = [item.made_of for item in paper.items if item.made_of is not None]
    folder, about = folder_of(paper, runs[0]), " ".join(caption(runs[0], runs, *made_of))
    lines, parts = [], list[str]()
    for item in paper.items:
        files, remark = list[str](), item.why_not
        if item.made_of is not None:
            try:
                files, note = _write_item(item, runs, modes, folder)
                parts += _placed(item, files, note, folder)
            except UsageError as error:
                remark = str(error)
        every = [f"{item.stem}.{ending}" for ending in ENDINGS]
        for name in [*every, *(f"paper/{name}" for name in every)]:
            if name not in files:
                (folder / name).unlink(missing_ok=True)
        named = ", ".join(f"[{name}]({name})" for name in files)
        lines.append([item.shown, item.title, named or f"not here: {remark}"])
    index = markdown_table(["place", "shows", "files"], lines)
    title = f"{paper.title}, on {runs[0].suite.name}"
    about = (
        f"arXiv:{paper.arxiv}; {about} A † marks a place or a number that was recalled, not read "
        "in a public text."
    )
    claims = _claims(paper, runs, modes, folder)
    text = f"# {title}\n\n{about}\n\n{index}\n\n## Claims\n\n{claims}\n"
    write_text(folder / "README.md", text)
    parts.append(placed("table", "claims", "Claims of the paper, and our measurements."))
    write_text(folder / "paper.tex", document(title, about, parts))
    return folder


def _placed(item: Item, files: Sequence[str], note: str, folder: Path) -> list[str]:
    """The figure of an item, and its table if that fits a page, with captions, in LaTeX."""
    from tangent_arithmetic.run.latex import placed

    place = item.shown.capitalize()
    figure = next((name for name in reversed(files) if name.endswith(".pdf")), None)
    parts = [placed("figure", figure, f"{place}: {item.title}. {note}")] if figure else []
    table = f"{item.stem}.tex"
    if table in files and (folder / table).read_text(encoding="utf-8").count("\n") < LONGEST:
        told = "the numbers of the figure." if figure else f"{item.title}. {note}"
        parts.append(placed("table", item.stem, f"{place}: {told}"))
    return parts


def caption(run: Run, runs: Sequence[Run], *names: str) -> list[str]:
    """What tables and figures are of: sentences on the runs, and on the error of the images.

    The latter has bounds of the binomial standard errors on the test splits.

    Args:
        run: one of the runs.
        runs: the runs of all seeds.
        names: what tables and figures are made of, see `Item`; accuracies of tasks if empty.
    """
    from tangent_arithmetic.analysis.seeds import examples, sampled

    numbers = ", ".join(str(one.seed) for one in runs)
    seeds = f"seeds {numbers} (mean ± standard deviation)" if len(runs) > 1 else f"seed {numbers}"
    one = names[0] if len(names) == 1 else ""
    told = [f"{run.model}, suite {run.suite.name}{examples(run, one)}, {seeds}."]
    kinds = [OF.get(name, SINGLE) for name in names] or [SINGLE]
    bounds = [bound for kind in dict.fromkeys(kinds) for bound in _bounds(sampled(run, one), kind)]
    if bounds:
        larger = "; normalised accuracies and differences have larger ones" * (SINGLE in kinds)
        listed = ", ".join(bounds)
        told.append(f"Binomial standard error of the images, at most: {listed}{larger}.")
    return told


def _bounds(run: Run, kind: str | None) -> list[str]:
    """Bounds of the error of the images, of a kind of `OF` or of accuracies of tasks (`SINGLE`)."""
    from tangent_arithmetic.analysis.analogies import analogies_of
    from tangent_arithmetic.analysis.disentanglement import pairs_of
    from tangent_arithmetic.analysis.intervals import largest_error
    from tangent_arithmetic.analysis.seeds import images

    def largest(names: Sequence[str]) -> float:
        """Of the accuracy on one of these."""
        return 100 * largest_error(min(images(run, [name]) for name in names))

    def top1(names: Sequence[str | None]) -> list[str]:
        return [name for name in names if name and not run.data.dataset(name).multilabel]

    found = list[str]()
    if kind == SINGLE:
        if tasks := top1(run.tasks):
            found.append(f"{largest(tasks):.2g} % on a task")
        if len(tasks) > 1:
            mean = 100 * largest_error(images(run, tasks))
            found.append(f"{mean:.2g} % on the mean of the tasks")
        found += [f"{largest([name]):.2g} % on {name}" for name in top1([run.control_set])]
    analogies = analogies_of(run) if kind == TARGETS and has_analogies(run) else []
    if targets := top1([analogy.d for analogy in analogies]):
        found.append(f"{largest(targets):.2g} % on a target of analogies")
    if kind == ERRORS and (run.config.pairs or len(run.tasks) > 1):
        pairs = ([images(run, [name]) for name in pair] for pair in pairs_of(run))
        error = max(largest_error(*sizes) for sizes in pairs)
        found.append(f"{error:.2g} on a disentanglement error")
    return found


def _write_item(
    item: Item, runs: Sequence[Run], modes: Sequence[str], folder: Path
) -> tuple[list[str], str]:
    """Writes the files of a table or figure; their names, and what they are of."""
    if item.made_of in (SINGLE, ADDITION, NEGATION):
        return _write_grid(item, runs, modes, folder)
    return _write_analysis(item, runs, modes, folder)


def _write_grid(
    item: Item, runs: Sequence[Run], modes: Sequence[str], folder: Path
) -> tuple[list[str], str]:
    """A table of the summary over seeds."""
    from tangent_arithmetic.report.papers.evidence import figures_of
    from tangent_arithmetic.run.latex import booktabs
    from tangent_arithmetic.run.summary import grids
    from tangent_arithmetic.run.tables import markdown_table

    first = runs[0]
    found = grids(figures_of(runs, modes), first.tasks, first.control_set)
    grid = next((one for one in found if one[0].startswith(str(item.made_of))), None)
    if grid is None:
        raise UsageError(f"suite {first.suite.name} has no control set")
    _, header, rows = grid
    write_text(folder / f"{item.stem}.tex", booktabs(header, rows))
    write_text(folder / f"{item.stem}.md", f"{markdown_table(header, rows)}\n")
    note = " ".join(caption(first, runs, str(item.made_of)))
    return [f"{item.stem}.tex", f"{item.stem}.md"], note


def _write_analysis(
    item: Item, runs: Sequence[Run], modes: Sequence[str], folder: Path
) -> tuple[list[str], str]:
    """A figure of the means over seeds, and its table."""
    from tangent_arithmetic.analysis import seeds, subsets
    from tangent_arithmetic.analysis.figures import write as write_figure
    from tangent_arithmetic.analysis.tables import LONGEST, MADE_BY, read_own
    from tangent_arithmetic.analysis.typeset import latex
    from tangent_arithmetic.commands.analyze import ANALYSES
    from tangent_arithmetic.report.papers.evidence import rows_of

    draws = {name: draw for parts in ANALYSES.values() for name, _, draw in parts}
    draws[PAIRS] = subsets.draw_pairs
    run, name = runs[0], "subsets" if item.made_of == PAIRS else str(item.made_of)
    if reason := left_out(run, modes).get(MADE_BY.get(name, name)):
        raise UsageError(reason)
    every = seeds.of_seeds(runs, name)
    if every.empty:
        read_own(run, name)  # raises the error that names the command
    every = rows_of(every, modes)
    if item.made_of == PAIRS:
        every = subsets.pairs(every)
    if every.empty:
        raise UsageError(f"nothing of {', '.join(modes)} on {', '.join(run.tasks)}")
    every = seeds.shared(every, name)
    table = seeds.averaged(every, name)
    write_text(folder / f"{item.stem}.csv", table.to_csv(index=False))
    files = [f"{item.stem}.csv"]
    if len(table) <= LONGEST:
        write_text(folder / f"{item.stem}.tex", latex(table))
        files.append(f"{item.stem}.tex")
    of = [one for one in runs if one.seed in set(every["seed"])]
    told, draw, style = caption(run, of, name), draws[str(item.made_of)], run.config.style
    drawn = every if item.made_of in AVERAGED else table
    place: dict[str, Any] = {"folder": folder, "stem": item.stem, "note": "\n".join(told)}
    write_figure(draw, drawn, run, **place, style=style)
    places = ["", "paper/"] if style == "paper" else [""]
    files += [f"{at}{item.stem}.{ending}" for at in places for ending in FIGURES]
    return files, " ".join(told)


def _claims(paper: Paper, runs: Sequence[Run], modes: Sequence[str], folder: Path) -> str:
    """Writes the table of claims in three forms; gives it in Markdown."""
    from tangent_arithmetic.report.papers.claims import CLAIMS, verdict
    from tangent_arithmetic.report.papers.evidence import Evidence
    from tangent_arithmetic.run.latex import booktabs
    from tangent_arithmetic.run.tables import markdown_table

    evidence = [Evidence(run, modes) for run in runs]
    found = [verdict(claim, evidence) for claim in CLAIMS if claim.paper == paper.name]
    header = ["place", "claim", "in the paper", "here", "seeds", "verdict"]
    rows = [
        [v.claim.place, v.claim.text, v.claim.published, v.measured, str(v.seeds), v.verdict]
        for v in found
    ]
    write_text(folder / "claims.tex", booktabs(header, rows, wrapped=CLAIM))
    records: list[dict[str, Any]] = []
    for v in found:
        record = {k: value for k, value in asdict(v).items() if k != "claim"}
        about = {n: getattr(v.claim, n) for n in ("paper", "place", "text", "published")}
        records.append({**about, **record})
    of = {"seeds": [run.seed for run in runs], "sample": runs[0].config.sample, "modes": [*modes]}
    write_json(folder / "claims.json", {**of, "claims": records})
    return markdown_table(header, rows)
