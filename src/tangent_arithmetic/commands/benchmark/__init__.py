"""Measures the cost of linearisation and data loading: time and memory, as paired ratios.

Each variant has its own process. The processes take turns, one at a time, in an order that rotates
every round. Ratios are computed within rounds and reported as median, minimum and maximum over the
rounds; the first turn of each process is warm-up.

    tangent-arithmetic benchmark step      training step and forward pass: standard, linear, plain
    tangent-arithmetic benchmark objective  linear fine-tuning: supervised, τJp with 16 other
                                             images a step, TAK
    tangent-arithmetic benchmark sweep     21 coefficients: in one sweep, or one by one
    tangent-arithmetic benchmark directions  features along 8 vectors, whole and by block, against
                                             their bound in forward passes
    tangent-arithmetic benchmark startup   importing the library, and --help
    tangent-arithmetic benchmark data      loading images: by number of workers, and by stage

"linear" is this project's engine, "plain" is `torch.func.jvp` with unfused attention, "selected" is
"linear" with the parameters of `--trainable` alone, "averaged" with the mean of the iterates.
"compiled" is the standard model by `torch.compile`, "compiled jvp" the linear one that it makes of
`torch.func.jvp`; both are measured where they are named, since they take minutes to compile.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tangent_arithmetic.commands.benchmark import images, summary
from tangent_arithmetic.commands.benchmark.subjects import SUBJECTS, Settings
from tangent_arithmetic.commands.benchmark.turns import measure
from tangent_arithmetic.run.args import Parser
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.ranges import number


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with `variants` as a list of known names."""
    parser = Parser(prog="tangent-arithmetic benchmark", description=__doc__)
    parser.add_argument("subject", choices=sorted(SUBJECTS))
    parser.add_argument(
        "--model",
        default="ViT-B-32",
        help="of open_clip; step: also timm, torchvision, transformers",
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), default=32, help="images or texts per batch"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=number(int, 1), default=5, help="turns of each variant")
    parser.add_argument("--variants", help="comma-separated (default: all that need no compiler)")
    parser.add_argument(
        "--trainable",
        default="attention",
        help="step: parameters that the variant selected trains, as in finetune",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    subject = SUBJECTS[options.subject]
    known = subject.variants
    usual = [name for name in known if name not in subject.on_request]
    variants = options.variants.split(",") if options.variants else usual
    if unknown := set(variants) - known.keys():
        parser.error(f"unknown variants {sorted(unknown)}; choose from {', '.join(known)}")
    if len(set(variants)) < len(variants):
        parser.error(f"--variants={options.variants} names a variant twice")
    options.variants = variants
    return options


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = _options(argv)
    settings = Settings(
        options.model, options.batch_size, options.device, options.precision, options.trainable
    )
    from tangent_arithmetic.run.provenance import git_commit, versions  # imports torch
    from tangent_arithmetic.runtime.atomic import write_json

    subject = SUBJECTS[options.subject]
    with tempfile.TemporaryDirectory() as name:
        subject.prepare(Path(name))
        figures = measure(options.subject, options.variants, settings, options.rounds, Path(name))
    results = summary.summarize(figures, subject.ratios)
    if options.subject == "data":
        size = {"pictures": images.NUM_PHOTOS, "size": list(images.PHOTO_SIZE)}
        rates = summary.loading(results["medians"], images.NUM_PHOTOS)
        results = {**size, "format": "JPEG, quality 90", **rates, **results}
    machine = f"{platform.system()} {platform.machine()}, {processor()}, {os.cpu_count()} cores"
    facts = {
        "subject": options.subject,
        **asdict(settings),
        "rounds": options.rounds,
        "machine": machine,
        "versions": versions(),
        "commit": git_commit(),
        **results,
        "rounds_in_full": figures,
    }
    if options.output:
        write_json(options.output, facts)
    print(f"{settings}\n{machine}\n\n{summary.table(results)}")
    if options.subject == "data":
        print(f"\n{summary.loading_table(results)}")
    return 0
