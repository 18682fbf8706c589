"""A paper in a command: what `reproduce --paper=NAME` makes, needs and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
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

OF_ANALOGIES, OF_LINEAR = ("analogies", "few"), ("kernel",)  # analyses that need them
PAIRS = "pairs"  # the sums of two among the subsets
ENDINGS = ("csv", "tex", "md", "pdf", "svg")  # of an item's files


def further(paper: Paper, run: Run, flags: list[str], modes: Sequence[str]) -> list[Stage]:
    """The stages of a paper beside those of the benchmark: more fine-tuning, and analyses.

    Args:
        paper: the paper.
        run: the run.
        flags: its flags, for each entry point.
        modes: the modes to analyse.
    """
    from tangent_arithmetic.analysis.tables import table_path
    from tangent_arithmetic.commands import analyze, finetune

    costs = Costs(len(run.tasks), run.config.n_eval_points)
    found = []
    ascent = "standard+ascent"
    names = [n for n in paper.analyses if n not in OF_ANALOGIES or has_analogies(run)]
    if not any(MODES[mode].linear for mode in modes):
        names = [n for n in names if n not in OF_LINEAR]
    if "negation" in names and run.control_set is None:
        names.remove("negation")
    if "negation" in names:
        argv = [f"--finetuning-mode={ascent}", *flags]
        cost = costs.training("standard")
        found.append(
            Stage("gradient ascent", finetune.main, argv, None, cost, each_task(run), ascent)
        )
    if more := analogy_sets(run) if "analogies" in names else []:
        parts = {name: [f"--train-dataset={name}"] for name in more}
        for mode in in_order(MODES[mode].training.name for mode in modes):
            argv, cost = [f"--finetuning-mode={mode}", *flags], Costs(len(more), 1).training(mode)
            label = f"{mode} fine-tuning for analogies"
            found.append(Stage(label, finetune.main, argv, None, cost, parts, mode))
    for name in names:
        last = analyze.ANALYSES[name][-1][0]
        argv = [name, f"--modes={','.join(modes)}", *flags]
        output = table_path(run, last)
        found.append(Stage(f"analysis {name}", analyze.main, argv, output, costs.analysis(name)))
    return found


def has_analogies(run: Run) -> bool:
    """Whether there are analogies of the run's suite."""
    return bool(run.suite.analogies) and run.tasks == list(run.suite.tasks)


def analogy_sets(run: Run) -> list[str]:
    """The data sets of analogies that are no tasks of the run."""
    from tangent_arithmetic.analysis.analogies import analogies_of

    names = [n for one in analogies_of(run) for n in (one.c, one.b, one.a, one.d, one.w)]
    return [name for name in dict.fromkeys(names) if name and name not in run.tasks]


def plan(paper: Paper, runs: Sequence[Run], work: Sequence[Sequence[Stage]]) -> str:
    """What a paper needs and how long it takes, for the terminal."""
    run, steps = runs[0], [step for todo in work for stage in todo for step in stage.steps]
    names = [*run.tasks, *([run.control_set] if run.control_set else [])]
    lines = [
        f"{paper.title} (arXiv:{paper.arxiv}) on suite {run.suite.name}, {run.model}, "
        f"{len(runs)} seed{'s' if len(runs) > 1 else ''}",
        f"needs the data sets {', '.join(names)}",
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


def check_data(run: Run) -> None:
    """Checks that every data set is there before the work.

    Raises:
        UsageError: for the first one that is not.
    """
    for name in [*run.tasks, *([run.control_set] if run.control_set else [])]:
        run.data.dataset(name)


def folder_of(paper: Paper, run: Run) -> Path:
    """Where a paper's tables and figures are written, by the first of its runs."""
    return run.results.parent / "papers" / run.results.name / paper.name


def write(paper: Paper, runs: Sequence[Run]) -> Path:
    """Writes every table and figure that applies, and the claims; gives the folder."""
    from tangent_arithmetic.run.results import markdown_table

    folder = folder_of(paper, runs[0])
    lines, tex = [], list[str]()
    for item in paper.items:
        files, remark = [], item.why_not
        if item.made_of is not None:
            try:
                files = _write_item(item, runs, folder)
            except UsageError as error:
                remark = str(error)
        for ending in ENDINGS:
            if f"{item.stem}.{ending}" not in files:
                (folder / f"{item.stem}.{ending}").unlink(missing_ok=True)
        tex += [name for name in files if name.endswith(".tex")]
        named = ", ".join(f"[{name}]({name})" for name in files)
        lines.append([item.shown, item.title, named or f"not here: {remark}"])
    index = markdown_table(["place", "shows", "files"], lines)
    seeds = ", ".join(str(run.seed) for run in runs)
    text = (
        f"# {paper.title}, on {runs[0].suite.name}\n\narXiv:{paper.arxiv}; {runs[0].model}; seeds "
        f"{seeds}. Means, and standard deviations over seeds in columns of their own or after ±. "
        "A † marks a place or a number that was recalled, not read in a public text.\n\n"
        f"{index}\n\n## Claims\n\n{_claims(paper, runs, folder)}\n"
    )
    write_text(folder / "README.md", text)
    inputs = "".join(f"\\input{{{Path(name).stem}}}\n\n" for name in [*tex, "claims.tex"])
    write_text(
        folder / "paper.tex",
        f"\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{inputs}"
        "\\end{document}\n",
    )
    return folder


def _write_item(item: Item, runs: Sequence[Run], folder: Path) -> list[str]:
    if item.made_of in (SINGLE, ADDITION, NEGATION):
        return _write_grid(item, runs, folder)
    return _write_analysis(item, runs, folder)


def _write_grid(item: Item, runs: Sequence[Run], folder: Path) -> list[str]:
    """A table of the summary over seeds."""
    from tangent_arithmetic.run.latex import booktabs
    from tangent_arithmetic.run.results import markdown_table
    from tangent_arithmetic.run.summary import collect, grids

    first = runs[0]
    found = grids(collect(runs), first.tasks, first.control_set)
    grid = next((one for one in found if one[0].startswith(str(item.made_of))), None)
    if grid is None:
        raise UsageError(f"suite {first.suite.name} has no control set")
    _, header, rows = grid
    write_text(folder / f"{item.stem}.tex", booktabs(header, rows))
    write_text(folder / f"{item.stem}.md", f"{markdown_table(header, rows)}\n")
    return [f"{item.stem}.tex", f"{item.stem}.md"]


def _write_analysis(item: Item, runs: Sequence[Run], folder: Path) -> list[str]:
    """A figure of the means over seeds, and its table."""
    from tangent_arithmetic.analysis import seeds, subsets
    from tangent_arithmetic.analysis.figures import plain, save
    from tangent_arithmetic.analysis.tables import LONGEST, latex, read_own
    from tangent_arithmetic.commands.analyze import ANALYSES

    draws = {name: draw for parts in ANALYSES.values() for name, _, draw in parts}
    draws[PAIRS] = subsets.draw_pairs
    name = "subsets" if item.made_of == PAIRS else str(item.made_of)
    every = seeds.of_seeds(runs, name)
    if every.empty:
        read_own(runs[0], name)  # raises the error that names the command
    means, table = seeds.averaged(every, name)
    if item.made_of == PAIRS:
        means, table = (one[one["num_vectors"] == 2] for one in (means, table))
    write_text(folder / f"{item.stem}.csv", table.to_csv(index=False))
    files = [f"{item.stem}.csv"]
    if len(table) <= LONGEST:
        write_text(folder / f"{item.stem}.tex", latex(table))
        files.append(f"{item.stem}.tex")
    run = runs[0]
    note = f"{run.model}, suite {run.suite.name}, mean of {every['seed'].nunique()} seeds"
    save(plain(draws[str(item.made_of)], means, run), folder, item.stem, note)
    return [*files, f"{item.stem}.pdf", f"{item.stem}.svg"]


def _claims(paper: Paper, runs: Sequence[Run], folder: Path) -> str:
    """Writes the table of claims in three forms; gives it in Markdown."""
    from tangent_arithmetic.report.papers.claims import CLAIMS, verdict
    from tangent_arithmetic.report.papers.evidence import Evidence
    from tangent_arithmetic.run.latex import booktabs
    from tangent_arithmetic.run.results import markdown_table

    evidence = [Evidence(run) for run in runs]
    found = [verdict(claim, evidence) for claim in CLAIMS if claim.paper == paper.name]
    header = ["place", "claim", "in the paper", "here", "seeds", "verdict"]
    rows = [
        [v.claim.place, v.claim.text, v.claim.published, v.measured, str(v.seeds), v.verdict]
        for v in found
    ]
    write_text(folder / "claims.tex", booktabs(header, rows))
    records: list[dict[str, Any]] = []
    for v in found:
        record = {k: value for k, value in asdict(v).items() if k != "claim"}
        about = {n: getattr(v.claim, n) for n in ("paper", "place", "text", "published")}
        records.append({**about, **record})
    write_json(folder / "claims.json", {"claims": records})
    return markdown_table(header, rows)
