"""TAK's estimate of interference beside its exact value, for fine-tuned and random task vectors.

    python scripts/study_factors.py --of=MNIST
    python scripts/study_factors.py --of=MNIST --images=16 --tasks=MNIST,Signs

Collects the factors of a data set in each form, from its training images, and compares
tau^T G tau with the mean of |J tau|^2 / |f0|^2 on `--images` of its validation images, for the
linear task vectors of the run's other tasks and a random one. Writes factors.json and factors.md
beside the runs' results: ratios of the estimate to the exact value, smallest to largest, of the sum
over layers of each alone and of the whole. Encoders are those of `finetune` in linear mode, and
must be there. Other flags are those of the evaluation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.run.args import Parser, parse_arguments
from tangent_arithmetic.run.factors import Sample
from tangent_arithmetic.run.models import task_vector, zeroshot_encoder
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.runtime.atomic import check_writable, write_json, write_text
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.training.factors import Settings, collect
from tangent_arithmetic.training.factors.comparison import WHOLE, Comparison, compare

LAYERS, RANDOM = "layers", "random"
BATCH = 32
# form -> training images, settings
FORMS = {
    "diag": (256, Settings("diag")),
    "kfac, rank 128, no directions": (256, Settings("kfac", directions=0)),
    "ekfac, rank 128, no directions": (256, Settings(directions=0)),
    "ekfac, rank 128, 64 directions (default)": (256, Settings()),
    "the same, 128 images, rank 64, s = 0": (128, Settings(rank=64, shrinkage=0.0)),
}


def vectors_of(run: Run, of: str) -> dict[str, Mapping[str, Tensor]]:
    """The linear task vectors of the tasks but one, and a random vector."""
    start = zeroshot_encoder(run)
    tasks = [task for task in run.tasks if task != of]
    found: dict[str, Mapping[str, Tensor]] = {
        task: task_vector(run, task, "linear", *start).vector for task in tasks
    }
    random = torch.Generator().manual_seed(run.seed)
    first = found[tasks[0]]
    noise = {name: torch.randn(value.shape, generator=random) for name, value in first.items()}
    return {**found, RANDOM: noise}


def ratios(found: Comparison) -> dict[str, float]:
    """Estimate / exact, of each layer that moves the features, of their sum, and of the whole."""
    estimate, exact = (sum(v for name, v in values.items() if name != WHOLE)
                       for values in (found.estimates, found.exact))  # fmt: skip
    return {**found.ratios, LAYERS: estimate / exact}


def rows_of(run: Run, of: str, count: int) -> dict[str, dict[str, dict[str, float]]]:
    """The ratios of each form, by vector."""
    encoder, _ = zeroshot_encoder(run)
    data, linear, vectors = run.data.dataset(f"{of}Val"), linearized(encoder), vectors_of(run, of)
    held_out = Sample(data.test, encoder.val_preprocess, count, run.seed)
    images = torch.stack(list(held_out)).split(BATCH)
    found = {}
    for form, (number, settings) in FORMS.items():
        seen = Sample(data.train, encoder.val_preprocess, number, run.seed)
        factors = collect(encoder, seen, settings)
        found[form] = {
            name: ratios(compare(linear, factors, tau, images)) for name, tau in vectors.items()
        }
    return found


def table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The smallest and the largest ratio over task vectors, and that of the random one."""
    lines = []
    for form, by_vector in rows.items():
        line = [form]
        for part in (LAYERS, WHOLE):
            tuned = [found[part] for name, found in by_vector.items() if name != RANDOM]
            line += [f"{min(tuned):.2f}-{max(tuned):.2f}", f"{by_vector[RANDOM][part]:.2f}"]
        lines.append(line)
    return markdown_table(["factors", "sum of layers", RANDOM, "whole", RANDOM], lines)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Collects, compares, writes."""
    parser = Parser(description=__doc__)
    parser.add_argument("--of", default="MNIST", help="data set of the factors")
    parser.add_argument("--images", type=int, default=128, help="images of the exact value")
    own, flags = parser.parse_known_args(argv)
    setup_logging()
    run, begin = Run.of(parse_arguments([*flags, "--finetuning-mode=linear"])), time.monotonic()
    output = run.results.parent / "factors.json"
    check_writable(output)
    rows = rows_of(run, own.of, own.images)
    facts: dict[str, Any] = {"of": own.of, "images": own.images, "rows": rows}
    facts["provenance"] = provenance(run, time.monotonic() - begin)
    write_json(output, facts)
    write_text(output.with_suffix(".md"), f"{table(rows)}\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
