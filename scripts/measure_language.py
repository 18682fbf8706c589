"""Measures a GPT-2 of 124 million random weights: training steps, and a sweep of perplexity.

    python scripts/measure_language.py                    # about fifteen minutes on one core
    python scripts/measure_language.py --layers=2 --tokens=32 --coefficients=3 --rounds=1

Steps of standard and linear fine-tuning, by this project's engine and by `torch.func.jvp`, take
turns; the first round is warm-up. Perplexity at all coefficients comes from one pass and from a
linear model at each coefficient; the largest difference is shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.coefficients import coefficients
from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector
from tangent_arithmetic.language.losses import token_loss
from tangent_arithmetic.language.models import CausalLM
from tangent_arithmetic.language.perplexity import exponential, mean_loss, sweep
from tangent_arithmetic.run.provenance import versions
from tangent_arithmetic.runtime.atomic import write_json
from tangent_arithmetic.tangent import plain_jvp
from tangent_arithmetic.tangent.linearized import LinearizedModel

SIZE = 1e-3  # of the task vector's entries; weights are drawn with 0.02


def gpt2(layers: int) -> CausalLM:
    """GPT-2 in the size of its configuration's defaults, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return CausalLM(GPT2LMHeadModel(GPT2Config(n_layer=layers)))


def moved(model: CausalLM) -> LinearizedModel:
    """Its linearisation at theta0 plus a random vector."""
    vector = {name: SIZE * torch.randn_like(p) for name, p in model.named_parameters()}
    linear: LinearizedModel = LinearizedTaskVector(vector=vector).apply_to(model)
    return linear


def plainly(linear: LinearizedModel, ids: Tensor) -> Tensor:
    """The logits of a linear model by `torch.func.jvp`."""
    theta, theta0 = linear.theta(), linear.theta0()
    tangents = {name: theta[name] - theta0[name] for name in theta}
    f0, step = plain_jvp(linear.module0(), theta0, tangents, ids)
    total: Tensor = f0 + step
    return total


def timed(work: Callable[[], object]) -> float:
    """The seconds that it takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def steps(model: CausalLM, linear: LinearizedModel, ids: Tensor, rounds: int) -> dict[str, Any]:
    """Seconds of a forward and backward pass, of the variants in turn."""

    def step(owner: nn.Module, logits: Callable[[Tensor], Tensor]) -> None:
        token_loss(logits(ids), ids).backward()
        owner.zero_grad(set_to_none=True)

    variants: dict[str, Callable[[], None]] = {
        "standard": lambda: step(model, model),
        "linear": lambda: step(linear, linear),
        "torch.func.jvp": lambda: step(linear, lambda batch: plainly(linear, batch)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, work in variants.items():
            spent = timed(work)
            if number:
                seconds[name].append(spent)
    return {name: statistics.median(values) for name, values in seconds.items()}


def sweeps(model: CausalLM, linear: LinearizedModel, ids: Tensor, count: int) -> dict[str, float]:
    """Seconds of perplexity at all coefficients, in one pass and one by one, and their difference.

    One by one, the linear model is moved to each coefficient.
    """
    theta, theta0 = linear.theta(), linear.theta0()
    tau = {name: theta[name].detach() - theta0[name] for name in theta}
    coefs, found, apart = coefficients(count), dict[float, float](), dict[float, float]()

    def one_pass() -> None:
        found.update(sweep(linear, tau, ids, coefs))

    def one_by_one() -> None:
        for coef in coefs:
            with torch.no_grad():
                for name, value in theta.items():
                    value.copy_(theta0[name] + coef * tau[name])
            apart[coef] = mean_loss(linear, ids)

    def by_torch() -> None:
        with torch.no_grad():
            token_loss(plainly(linear, ids), ids)

    seconds = {"one pass": timed(one_pass), "one by one": timed(one_by_one)}
    seconds["torch.func.jvp, one coefficient"] = timed(by_torch)
    difference = max(abs(exponential(found[c]) / exponential(apart[c]) - 1) for c in coefs)
    ends = {"perplexity at 0": exponential(found[0.0]), "at 1": exponential(found[1.0])}
    return {**seconds, "largest relative difference of perplexity": difference, **ends}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128, help="of a text; one text a batch")
    parser.add_argument("--coefficients", type=int, default=21)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    model = gpt2(args.layers)
    linear = moved(model)
    ids = torch.randint(0, 50257, (1, args.tokens))
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": args.tokens,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "step, seconds": steps(model, linear, ids, args.rounds),
        "sweep, seconds": sweeps(model, linear, ids, args.coefficients),
    }
    print(json.dumps(figures, indent=2))
    if args.output:
        write_json(args.output, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
