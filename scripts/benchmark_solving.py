"""Measures how long solving for coefficients takes after the pass, on random pictures.

    OMP_NUM_THREADS=1 python scripts/benchmark_solving.py
    python scripts/benchmark_solving.py --pictures=5000 --coefficients=48 --features=512

Eight tasks; prints the seconds of a solve with a given ridge, and of the same with the ridge
cross-validated, as `combine` does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.solving.combining import Settings, combine_linear
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.run.args import Parser
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.runtime.ranges import number

TASKS, START, SCALE, CHUNK = 8, 0.3, 20.0, 500
SIZES = (("pictures", 5000), ("coefficients", 48), ("features", 512), ("classes", 10))


def split(pictures: int, directions: int, features: int, classes: int, seed: int) -> Reduced:
    """A split whose directions help a bit, each its own, with labels of which a fifth are noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = SCALE * F.normalize(normal(classes, features), dim=1)
    clean = torch.randint(classes, (pictures,), generator=generator)
    other = torch.randint(classes, (pictures,), generator=generator)
    labels = torch.where(torch.rand(pictures, generator=generator) < 0.2, other, clean)
    helps = 0.01 * torch.rand(1 + directions, 1, 1, generator=generator)
    size = torch.tensor([1.0] + directions * [0.2])[:, None, None] / features**0.5
    logits, roots = [], []
    for own in clean.split(CHUNK):
        phi = size * normal(1 + directions, len(own), features) + helps * weight[own] / SCALE
        logits.append(phi @ weight.T)
        columns = phi.permute(1, 2, 0)
        tall = columns.shape[1] > columns.shape[2]
        roots.append(torch.linalg.qr(columns, mode="r").R if tall else columns.contiguous())
    base, steps = torch.cat(logits, dim=1).split([1, directions])
    return Reduced(str(seed), base[0], steps, torch.cat(roots), labels)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(description=__doc__)
    for name, default in SIZES:
        parser.add_argument(f"--{name}", type=number(int, 1, 10**7), default=default)
    args = parser.parse_args(argv)
    setup_logging()
    shape = (args.pictures, args.coefficients, args.features, args.classes)
    splits = [split(*shape, seed) for seed in range(TASKS)]
    ends = {"start": np.full(args.coefficients, START)}
    for label, ridge in (("ridge 0.1", 0.1), ("cross-validated ridge", None)):
        begin, busy = time.monotonic(), time.process_time()
        found = combine_linear(splits, START, Settings(ridge=ridge))
        seconds, busy = time.monotonic() - begin, time.process_time() - busy
        ends["end"] = found.coefficients
        before, after = (np.mean([s.accuracy(a) for s in splits]) for a in ends.values())
        print(
            f"{label}: {seconds:.2f} s ({busy:.2f} s of processor), objective "
            f"{found.facts['start']:.4f} -> {found.facts['objective']:.4f}, accuracy "
            f"{100 * before:.1f} % -> {100 * after:.1f} %"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
