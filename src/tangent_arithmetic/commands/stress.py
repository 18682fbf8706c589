"""Perturbs task vectors and reports the accuracy that each merging method loses.

    tangent-arithmetic merge stress --sample=50

The models are those of `finetune`. One task's vector is made longer, as that of an over- or an
under-confident expert, an outlier or a near-duplicate joins, all are rounded, some are left out, a
tensor is missing: each with and without norm normalisation. Coefficients are those that are best on
validation without a perturbation. Writes stress.json, stress.md and figures/stress.* to the folder
of the run's results, linear_stress.json and so on for linear models. Other flags are those of
`add`, such as --model, --save, --tasks, --seed, --results and --device; --sample=N evaluates on N
examples of each task and takes minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tangent_arithmetic.merging.methods import METHODS
from tangent_arithmetic.merging.pool import run_pool
from tangent_arithmetic.merging.stress import default_methods, stress, tables
from tangent_arithmetic.merging.taskpools import RunTaskPool
from tangent_arithmetic.run.args import Parser, parse_arguments
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.results import check_targets, write_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.atomic import write_text
from tangent_arithmetic.runtime.errors import entry_point, unknown
from tangent_arithmetic.runtime.logs import setup_logging


def _page(run: Run, own: argparse.Namespace, task: str, text: str) -> str:
    share = "all examples" if run.config.sample is None else f"{run.config.sample} examples a task"
    return (
        f"# Perturbed task vectors, {run.model}\n\n"
        f"Mean test accuracy of the merge of {len(run.tasks)} tasks ({own.mode} models, {share}), "
        "and the percentage points that each perturbation loses, negative where accuracy rises. "
        f"The vector that is changed or copied alone is that of {task}; with fewer vectors, "
        "accuracy is compared on their own tasks. Coefficients were chosen on validation without "
        f"a perturbation.\n\n{text}"
    )


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, Run]:
    """The flags of this command, and the run that the others describe."""
    parser = Parser(prog="tangent-arithmetic merge stress", description=__doc__)
    parser.add_argument("--methods", default="", help="NAME,... to compare (default: all)")
    parser.add_argument("--task", help="whose vector is perturbed (default: the first)")
    parser.add_argument(
        "--finetuning-mode", dest="mode", default="standard", help="of the models, such as linear"
    )
    own, flags = parser.parse_known_args(argv)
    run = Run.of(parse_arguments(flags))
    own.task = own.task or run.tasks[0]
    if own.task not in run.tasks:
        raise unknown("task", own.task, run.tasks)
    own.methods = own.methods.split(",") if own.methods else default_methods()
    if strange := [name for name in own.methods if name not in METHODS]:
        raise unknown("merging method", strange[0], METHODS)
    return own, run


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    own, run = _options(sys.argv[1:] if argv is None else argv)
    pool, stem = run_pool(run.folder, run.tasks, own.mode), f"{MODES[own.mode].prefix}stress"
    paths = [run.results / f"{stem}.{ending}" for ending in ("json", "md")]
    check_targets(run, *paths)
    from tangent_arithmetic.analysis.figures import plain, save
    from tangent_arithmetic.report.stressed import draw

    setup_logging()
    begun = time.monotonic()
    found = stress(pool, RunTaskPool(run), own.methods, own.task, run.seed)
    text = tables(found)
    origin = provenance(run, time.monotonic() - begun, mode=own.mode)
    write_results(paths[0], {**found, "provenance": origin}, run)
    write_text(paths[1], _page(run, own, own.task, text))
    save(plain(draw, found), run.results / "figures", stem)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
