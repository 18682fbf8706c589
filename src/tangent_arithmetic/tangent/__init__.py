r"""Forward-mode differentiation of modules, optimised for linearised fine-tuning.

`jvp(model, params0, tangents, x)` computes \(f(x; \theta_0)\) and \(J(x; \theta_0)\, v\). The
latter is linear in \(v\), so its backward pass, \(J^\top g\), is that of the ordinary model at
\(\theta_0\), from the same saved tensors. A training step costs one forward pass, two more for the
tangent, and an ordinary backward pass: 5 units instead of 3.

`engine.py` is the entrance, `passes.py` runs a module on dual numbers, along one direction
(`duals.py`) or several (`directions.py`, `stacks.py`); `rules/` has the derivative of each
functional, `weights.py` replaces a module's parameters. `plain.py` wraps PyTorch's own forward-mode
AD, the reference and the fallback, with the operations of `unfused.py` taken apart. `canary.py`
checks first calls, `state.py` guards what modules keep between calls, `caches.py` empties caches of
weights, `copies.py` copies modules, `backends.py` has PyTorch's process-wide switches.
"""

from tangent_arithmetic.tangent.canary import checking
from tangent_arithmetic.tangent.directions import at_once
from tangent_arithmetic.tangent.engine import check_call, find_caches, jvp, jvps
from tangent_arithmetic.tangent.plain import plain_jvp
from tangent_arithmetic.tangent.rules import rule
from tangent_arithmetic.tangent.weights import Displacement

__all__ = [
    "Displacement",
    "at_once",
    "check_call",
    "checking",
    "find_caches",
    "jvp",
    "jvps",
    "plain_jvp",
    "rule",
]
