"""Certifies which coefficients leave the answers of a linear model on a control set as they are.

For each task vector alone, and for the sum of all, the range of the coefficient in which all, 99 %
and 95 % of the pre-trained model's answers on the control set's test pictures stay. See
docs/exact.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from tangent_arithmetic.arithmetic.certificates import SHARES, Certificate, certify
from tangent_arithmetic.arithmetic.logits import linear_logits
from tangent_arithmetic.encoders.base import ModuleEncoder, is_linear
from tangent_arithmetic.report.certified import STATEMENT
from tangent_arithmetic.report.page import report_path, write_report
from tangent_arithmetic.run.checks import parse_command
from tangent_arithmetic.run.heads import evaluated_on
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.run.models import (
    announce,
    base_encoder,
    checkpoint_hashes,
    split_of,
    task_vector,
    zeroshot_encoder,
)
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.results import arithmetic_path, check_targets, write_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.run.tracking import tracked
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.logs import setup_logging

SUM = "sum of all"


def certificate_of(run: Run, theta0_hash: str, encoder: ModuleEncoder) -> Certificate:
    """The certificate of a run's task vectors on its control set, at theta0.

    Args:
        run: the run, of a linear mode.
        theta0_hash: of the pre-trained weights.
        encoder: the pre-trained encoder.
    """
    mode, tasks = run.mode.name, run.tasks
    base = base_encoder(encoder, mode)
    assert is_linear(base)
    vectors = {t: task_vector(run, t, mode, encoder, theta0_hash).vector for t in tasks}
    logits = linear_logits(base, vectors, split_of(run, base, run.control))
    directions = {task: [float(task == other) for other in tasks] for task in tasks}
    if len(tasks) > 1:
        directions[SUM] = [1.0] * len(tasks)
    return certify(logits, directions)


def certified_control(run: Run) -> dict[str, Any]:
    """The certificate as results, with provenance."""
    begin, control = time.monotonic(), run.control
    encoder, theta0_hash = zeroshot_encoder(run)
    facts = certificate_of(run, theta0_hash, encoder).facts()
    hashes = checkpoint_hashes(run, run.tasks, run.mode.name)
    origin = {"theta0_hash": theta0_hash, "checkpoints": hashes, **evaluated_on(run, [control])}
    about = {name: facts[name] for name in ("images", "accuracy", "radii")}
    return {
        "control": {"name": control, **about},
        "ranges": facts["ranges"],
        "provenance": provenance(run, time.monotonic() - begin, **origin),
    }


def certificate_table(ranges: Mapping[str, Mapping[str, Sequence[float | None]]]) -> str:
    """A row a task vector: the range of its coefficient in which a share of the answers stays."""
    header = ["coefficient of", *(f"{100 * share:g} % stay" for share in SHARES)]
    rows = [[name, *(_range(each[f"{s:g}"]) for s in SHARES)] for name, each in ranges.items()]
    return markdown_table(header, rows)


def _range(ends: Sequence[float | None]) -> str:
    low, high = ("-inf" if ends[0] is None else f"{ends[0]:.3f}"), ends[1]
    return f"{low} to {'inf' if high is None else f'{high:.3f}'}"


def work(run: Run) -> None:
    """Certifies, writes and prints, in every process of the run."""
    announce(run, "certify")
    path = arithmetic_path(run, run.mode.name, "certificates")
    check_targets(run, path, report_path(run))
    with tracked(run, f"certificates-{run.mode.name}") as tracker:
        results = certified_control(run)
        write_results(path, results, run)
        tracker.show("report", write_report(run))
    if ddp.is_main_process():
        control = results["control"]
        print(certificate_table(results["ranges"]))
        radius = control["radii"]["1"]
        size = "any length" if radius is None else f"a Euclidean length below {radius:.4f}"
        print(
            f"\n{control['images']} test pictures of {control['name']}. A change of all "
            f"coefficients together, of {size}, changes none of the answers.\n{STATEMENT}\n"
            f"wrote {path}"
        )


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    _, args = parse_command("certify", argv, __doc__)
    setup_logging()
    start(work, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
