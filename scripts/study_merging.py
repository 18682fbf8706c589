"""Compares the merging methods on the embedded suite; writes results/embedded/merging.{json,md}.

    python scripts/study_merging.py --seeds=3
    python scripts/study_merging.py --seeds=3 --modes=linear,linear+taujp --stem=merging_linear
    python scripts/study_merging.py --seeds=3 --methods=lot,featcal     # adds rows to the files
    python scripts/study_merging.py --seeds=3 --costs    # measures seconds and memory again, alone

Encoders are those of `finetune.py` (made where they are missing), a table for each mode of
`--modes`. All eight tasks are merged; the coefficient of a method that has one is chosen on
validation from 21 values, accuracies are on test, normalised by those of each task's own encoder.
`slerp`, which takes two models, merges MNIST's and Signs' and is measured on these two. Methods
that need images take validation images, and merge standard encoders only. Memory is the most that
the process held during the merge beyond what it held before, the merged weights included.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tangent_arithmetic.commands import finetune
from tangent_arithmetic.data.suites import EMBEDDED_MODEL, get_suite
from tangent_arithmetic.merging import get_method, run_pool
from tangent_arithmetic.merging.algorithms import algorithm_class
from tangent_arithmetic.merging.pool import ModelPool
from tangent_arithmetic.merging.program import choose_scaling_factor
from tangent_arithmetic.merging.registry import PRETRAINED
from tangent_arithmetic.merging.stream import merged_state
from tangent_arithmetic.merging.taskpools import SuiteTaskPool
from tangent_arithmetic.run.args import Config, Parser
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.provenance import git_commit, versions
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import spread
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.runtime.atomic import write_json, write_text
from tangent_arithmetic.runtime.errors import entry_point, unknown
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.runtime.peaks import forget_peak, peak_bytes
from tangent_arithmetic.runtime.ranges import number
from tangent_arithmetic.storage.reading import read_json

logger = logging.getLogger(__name__)
PAIR = ("MNIST", "Signs")
SPLITS = ("test", "val")
Row = dict[str, Any]
# label -> method, options, tasks (all if empty)
METHODS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "simple_average": ("simple_average", {}, ()),
    "weighted_average (by gain)": ("weighted_average", {}, ()),
    "task_arithmetic": ("task_arithmetic", {}, ()),
    "ties (sum)": ("ties", {}, ()),
    "ties (mean)": ("ties", {"merge_func": "mean"}, ()),
    "ties (sum, by tensor)": ("ties", {"scope": "tensor"}, ()),
    "dare_task_arithmetic": ("dare_task_arithmetic", {}, ()),
    "dare_ties": ("dare_ties", {}, ()),
    **{
        name: (name, {}, ())
        for name in (
            "breadcrumbs",
            "della",
            "lines_task_arithmetic",
            "consensus_task_arithmetic",
            "consensus_ties",
            "sce",
            "pcb_merging",
            "model_stock",
            "karcher",
            "multislerp",
            "star",
            "tsv_m",
            "iso_c",
            "iso_cts",
            "wudi",
            "wudi_closed_form",
            "ace",
            "svc",
            "knots",
            "core_space",
            "regmean",
            "regmean_plusplus",
            "lot",
            "featcal",
            "prodistill",
        )
    },
    "fisher_merging (64 images)": ("fisher_merging", {"num_fisher_examples": 64}, ()),
    **{
        f"{name} (rate 0.01, 100 steps)": (name, {"lr": 0.01, "max_steps": 100}, ())
        for name in ("task_wise_adamerging", "layer_wise_adamerging")
    },
    "breadcrumbs_ties": ("breadcrumbs", {"elect": True}, ()),
    "della_linear": ("della", {"elect": False, "normalize": False}, ()),
    **{
        f"{name} (2 tasks)": (name, {}, PAIR)
        for name in ("slerp", "nuslerp", "nearswap", "arcee_fusion", "task_arithmetic")
    },
}


def accuracies(pool: ModelPool, tasks: SuiteTaskPool, split: str) -> dict[str, dict[str, float]]:
    """Accuracy of the pre-trained encoder and of each task's own encoder, by task."""

    def accuracy(name: str, task: str) -> float:
        weights = pool.weights(name)
        encoder = tasks.encoder(pool, {key: weights.read(key) for key in weights.outline})
        return tasks.measure(encoder, task, {}, [1.0], split == "val")[0]["accuracy"]

    return {
        "zero-shot": {task: accuracy(PRETRAINED, task) for task in tasks.tasks},
        "own": {task: accuracy(task, task) for task in tasks.tasks},
    }


def pool_for(run: Path, label: str, tasks: Sequence[str], mode: str) -> ModelPool:
    """The models that a method merges, by its label."""
    method, _, named = METHODS[label]
    pool = run_pool(run, list(named or tasks), mode)
    if get_method(method).ordered:  # between the two, not from theta0
        return ModelPool({name: pool.models[name] for name in named})
    return pool


def study(run: Path, seed: int, mode: str, methods: Sequence[str]) -> dict[str, Row]:
    """Some methods on one run's encoders: accuracies by task, the chosen coefficient, costs."""
    suite = get_suite("embedded")
    names = list(suite.tasks)
    tasks = SuiteTaskPool(EMBEDDED_MODEL, str(run), names)
    pair = SuiteTaskPool(EMBEDDED_MODEL, str(run), list(PAIR))
    own, on_val = (accuracies(run_pool(run, names, mode), tasks, split) for split in SPLITS)
    rows: dict[str, Row] = {"zero-shot": {"top1": own["zero-shot"], "own": own["own"]}}
    for label, (name, given, named) in METHODS.items():
        method = get_method(name)
        if name not in methods or (method.needs_data and MODES[mode].linear):
            continue
        options, pool = dict(given), pool_for(run, label, names, mode)
        measured, algorithm = pair if named else tasks, algorithm_class(method.algorithm)
        row: Row = {"own": {task: own["own"][task] for task in measured.tasks}}
        if name == "weighted_average":
            gains = [on_val["own"][task] - on_val["zero-shot"][task] for task in names]
            options["weights"] = [round(max(gain, 0.0), 4) for gain in gains]
        if "seed" in method.defaults:
            options["seed"] = seed
        if method.coefficient is not None:
            at_one = algorithm(**{**options, method.coefficient: 1.0})
            chosen = choose_scaling_factor(at_one, pool, measured)
            options[method.coefficient] = row["coefficient"] = chosen["coefficient"]
        state, spent = merged(label, options, pool, measured)
        report = measured.evaluate(measured.encoder(pool, state))
        row["top1"] = {task: report[task]["accuracy"] for task in measured.tasks}
        rows[label] = {**row, "options": options, **spent}
        mean = 100 * np.mean(list(row["top1"].values()))
        logger.info("seed %d, %s, %s: %.1f", seed, mode, label, mean)
    return rows


def merged(
    label: str, settings: Mapping[str, Any], pool: ModelPool, tasks: SuiteTaskPool
) -> tuple[dict[str, Tensor], Row]:
    """A merged model, and its costs: seconds, and bytes beyond those that were held before."""
    method = get_method(METHODS[label][0])
    examples = tasks.examples(pool) if method.needs_data else None
    forget_peak()
    before, begun = peak_bytes(), time.monotonic()
    merge = algorithm_class(method.algorithm)(**settings).merge(pool, examples=examples)
    state = merged_state(merge)
    seconds, peak = round(time.monotonic() - begun, 3), peak_bytes() - before
    return state, {"seconds": seconds, "peak_bytes": peak}


def costs(run: Path, mode: str, rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows of an earlier study of this run's encoders, with their costs measured again."""
    names, found = list(get_suite("embedded").tasks), dict(rows)
    for label in (label for label in METHODS if label in rows):
        tasks = SuiteTaskPool(EMBEDDED_MODEL, str(run), list(METHODS[label][2] or names))
        pool = pool_for(run, label, names, mode)
        _, measured = merged(label, rows[label]["options"], pool, tasks)
        found[label] = {**rows[label], **measured}
    return found


def in_order(earlier: Mapping[str, Row], found: Mapping[str, Row]) -> dict[str, Row]:
    """Rows of an earlier study and of this one, in the order of `METHODS`; this one's count."""
    rows = {**earlier, **found}
    return {label: rows[label] for label in ("zero-shot", *METHODS) if label in rows}


def summarize(seeds: Mapping[int, Mapping[str, Row]]) -> list[list[str]]:
    """A line per method: absolute and normalised accuracy (mean and deviation), coefficients, cost.

    Args:
        seeds: seed -> label -> row; a label may not have all seeds yet.
    """
    lines = []
    for label in dict.fromkeys(label for rows in seeds.values() for label in rows):
        rows = [by_method[label] for by_method in seeds.values() if label in by_method]
        absolute = [float(np.mean(list(row["top1"].values()))) for row in rows]
        relative = [
            float(np.mean([value / row["own"][task] for task, value in row["top1"].items()]))
            for row in rows
        ]
        coefs = ", ".join(str(row["coefficient"]) for row in rows if "coefficient" in row)
        costs = [_median(rows, "seconds", 1.0, 2), _median(rows, "peak_bytes", 2.0**-20, 0)]
        lines.append([label, spread(absolute), spread(relative), coefs or "-", *costs])
    return lines


def _median(rows: Sequence[Row], key: str, scale: float, digits: int) -> str:
    values = [row[key] for row in rows if key in row]
    return f"{scale * np.median(values):.{digits}f}" if values else "-"


def write(path: Path, results: Mapping[int, Mapping[str, dict[str, Row]]], seconds: float) -> str:
    """Writes the results so far, by seed, mode and label, and returns the tables."""
    header = ["method", "accuracy, %", "normalised, %", "coefficient", "seconds", "MiB"]
    modes = list(dict.fromkeys(mode for rows in results.values() for mode in rows))
    tables = {
        mode: markdown_table(
            header, summarize({s: rows[mode] for s, rows in results.items() if mode in rows})
        )
        for mode in modes
    }
    shown = "\n\n".join(f"## {MODES[mode].label}\n\n{table}" for mode, table in tables.items())
    text = (
        "# Merging on the embedded suite\n\n"
        f"`python scripts/study_merging.py --seeds={len(results)} --modes={','.join(modes)}`: mean "
        "test accuracy of the merged tasks (eight unless said), absolute and divided by that of "
        "each task's own encoder; mean and standard deviation over fine-tuning seeds. "
        "Coefficients, one a seed, were chosen on validation. Seconds to merge and memory beyond "
        f"what was held before are medians.\n\n{shown}\n"
    )
    publish(path, text, results, seconds)
    return shown


def publish(
    path: Path, text: str, results: Mapping[int, Mapping[str, Any]], seconds: float
) -> None:
    """Writes a page, `.md`, and the results by seed with their provenance, `.json`."""
    facts: Row = {"commit": git_commit(), "versions": versions(), "seeds": len(results)}
    facts["seconds"] = round(seconds, 1)
    content = {"provenance": facts, "seeds": {str(seed): rows for seed, rows in results.items()}}
    write_json(path.with_suffix(".json"), content)
    write_text(path.with_suffix(".md"), text)


def options(doc: str | None, argv: Sequence[str] | None, modes: str = "") -> argparse.Namespace:
    """The flags of a study.

    Args:
        doc: its help.
        argv: the words of the command line.
        modes: default of `--modes`; "" for a study without this flag and those after it.
    """
    parser = Parser(description=doc)
    seeds = number(int, 1, 10_000)
    parser.add_argument("--seeds", type=seeds, default=1, help="fine-tuning seeds, from 0")
    parser.add_argument("--results", type=Path, default=Path("results"), help="results' root")
    if modes:
        parser.add_argument("--modes", default=modes, help=f"modes of encoders (default: {modes})")
        parser.add_argument("--stem", default="merging", help="of the files (default: merging)")
        text = "NAME,... to add to the files (default: all, files are made anew)"
        parser.add_argument("--methods", type=lambda names: names.split(","), help=text)
        text = "measure only the costs of the merges in the files again"
        parser.add_argument("--costs", action="store_true", help=text)
    return parser.parse_args(argv)


def runs(seeds: int, modes: Sequence[str]) -> Iterator[tuple[int, Path]]:
    """Each seed with the folder of its encoders, which are made where they are missing."""
    for seed in range(seeds):
        flags = [] if seed == 0 else [f"--seed={seed}"]  # seed 0 is the default run's
        for mode in modes:
            code = finetune.main([f"--model={EMBEDDED_MODEL}", f"--finetuning-mode={mode}", *flags])
            if code:
                raise SystemExit(code)
        yield seed, Run.of(Config(model=EMBEDDED_MODEL, seed=seed or None)).folder


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = options(__doc__, argv, "standard")
    modes = [MODES[name].name for name in args.modes.split(",")]
    setup_logging()
    every, path = [name for name, *_ in METHODS.values()], args.results / "embedded" / args.stem
    if strange := set(args.methods or ()) - set(every):
        raise unknown("merging method", min(strange), every)
    adds = args.methods or args.costs
    earlier = read_json(path.with_suffix(".json"))["seeds"] if adds else {}
    results: dict[int, dict[str, dict[str, Row]]] = {int(s): own for s, own in earlier.items()}
    begun, table = time.monotonic(), ""
    for seed, run in runs(args.seeds, modes):
        results.setdefault(seed, {})
        for mode in modes:
            rows = results[seed].get(mode, {})
            found = (
                costs(run, mode, rows)
                if args.costs
                else study(run, seed, mode, args.methods or every)
            )
            results[seed][mode] = in_order(rows, found)
            table = write(path, results, time.monotonic() - begun)
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
