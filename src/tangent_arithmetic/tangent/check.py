"""`python -m tangent_arithmetic.tangent.check MODULE:FACTORY`: is a model linearised exactly?

The factory is called without arguments and returns `(model, inputs)`, the inputs as a tuple or a
dict. The check compares J v with reverse mode and with differences in float64, then lists the
operations by cost: which have a rule, which take PyTorch's forward AD (correct, and slower), which
two backward passes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tangent_arithmetic.tangent import canary
from tangent_arithmetic.tangent.backends import one_pass
from tangent_arithmetic.tangent.call import Call
from tangent_arithmetic.tangent.duals import Duals
from tangent_arithmetic.tangent.engine import check_call
from tangent_arithmetic.tangent.outputs import differentiable_tensors
from tangent_arithmetic.tangent.passes import run
from tangent_arithmetic.tangent.plain import operation
from tangent_arithmetic.tangent.probe import Probe
from tangent_arithmetic.tangent.state import has_tangent


@dataclass
class Operation:
    """The cost of a functional in one recorded linear pass.

    Args:
        name: of the functional.
        method: "rule", "forward AD" or "two backward passes".
        calls: number of calls with a tangent.
        seconds: in these calls, of value and tangent together.
    """

    name: str
    method: str
    calls: int = 0
    seconds: float = 0.0


class Watched(Duals):
    """Duals that note the method and time of each functional that gives a tangent."""

    operations: dict[tuple[str, str], Operation]

    def apply(self, rule: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Evaluates a functional by its rule."""
        return self._timed(
            "rule", func, lambda: super(Watched, self).apply(rule, func, args, kwargs)
        )

    def native(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Evaluates a functional by PyTorch's forward AD, or by its backward pass."""
        return self._timed(
            "forward AD", func, lambda: super(Watched, self).native(func, args, kwargs)
        )

    def by_backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Evaluates a functional by its backward pass."""
        evaluate = super().by_backward
        return self._timed("two backward passes", func, lambda: evaluate(func, args, kwargs))

    def _timed(self, method: str, func: Callable[..., Any], evaluate: Callable[[], Any]) -> Any:
        start, before = time.perf_counter(), self._total()
        out = evaluate()
        spent = time.perf_counter() - start - (self._total() - before)  # without calls inside
        if any(map(has_tangent, differentiable_tensors(out))) and self._total() == before:
            entry = self.operations[operation(func), method]
            entry.calls, entry.seconds = entry.calls + 1, entry.seconds + spent
        return out

    def _total(self) -> float:
        return sum(entry.seconds for entry in self.operations.values())


class _Operations(defaultdict[tuple[str, str], Operation]):
    def __missing__(self, key: tuple[str, str]) -> Operation:
        self[key] = Operation(*key)
        return self[key]


def operations(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Operation]:
    """The functionals of a linear pass with gradients, by descending cost.

    Args:
        model: the module; all its parameters move.
        args: inputs.
        kwargs: keyword inputs.
    """
    found = _Operations()
    kind = type("WatchedOnce", (Watched,), {"operations": found})
    names = dict(model.named_parameters())
    call = Call(model, {}, [], tuple(args), dict(kwargs))
    v = {n: t.requires_grad_() for n, t in Probe(names, call.value).items()}
    with one_pass(), torch.enable_grad():
        for _ in range(2):  # the first pass warms up
            found.clear()
            run(replace(call, vectors=[v]), learnt=True, kind=kind)
    return sorted(found.values(), key=lambda entry: -entry.seconds)


def verdict(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """What is wrong with the linearisation of a module; None if it is exact."""
    names = dict(model.named_parameters())
    probe = Probe(names, lambda name: names[name].detach())
    try:
        check_call(model, {}, probe, *args, **kwargs)
    except (canary.Disagreement, NotImplementedError, RuntimeError, TypeError) as error:
        return str(error)
    return None


def report(found: Sequence[Operation]) -> str:
    """A table of operations."""
    total = sum(entry.seconds for entry in found) or 1.0
    rows = [f"{'operation':36}{'method':22}{'calls':>7}{'ms':>10}{'share':>8}"]
    for entry in found:
        share = f"{entry.seconds / total:.0%}"
        rows.append(
            f"{entry.name:36}{entry.method:22}{entry.calls:7}{1000 * entry.seconds:10.2f}{share:>8}"
        )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 0 if the linearisation is exact, 1 if not, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m tangent_arithmetic.tangent.check")
    parser.description = (
        "Checks that a model is linearised exactly, and shows what each operation costs."
    )
    parser.add_argument("factory", metavar="MODULE:FACTORY", help="returns (model, inputs)")
    options = parser.parse_args(argv)
    module, _, name = options.factory.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        model, inputs = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        parser.error(
            f"expected a function that returns (model, inputs), got {options.factory}: {error}"
        )
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    args = (args,) if isinstance(args, Tensor) else args
    model.eval()
    trouble = verdict(model, args, kwargs)
    if trouble is not None:
        print(f"NOT EXACT: {trouble}")
        return 1
    print("exact: J v is the derivative by reverse mode and by differences")
    print(report(operations(model, args, kwargs)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
