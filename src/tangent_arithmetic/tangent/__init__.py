r"""Forward-mode differentiation of modules, built for linearised fine-tuning.

`jvp(model, params0, tangents, x)` gives \(f(x; \theta_0)\) and \(J(x; \theta_0)\, v\). The second
is linear in \(v\), so its backward pass, \(J^\top g\), is that of the ordinary model at
\(\theta_0\) and needs nothing but what the ordinary model keeps. A step therefore costs one forward
pass, two more for the tangent and an ordinary backward pass: 5 units against 3.

`engine.py` runs a module on pairs of a value and its tangent (`duals.py`); `rules/` has the
derivative of each functional; `weights.py` puts pairs in the place of a module's parameters;
`plain.py` is PyTorch's own forward-mode AD, the reference, and what the engine leaves to it.
"""

from tangent_arithmetic.tangent.engine import jvp, jvps
from tangent_arithmetic.tangent.plain import plain_jvp
from tangent_arithmetic.tangent.rules import rule
from tangent_arithmetic.tangent.weights import Displacement

__all__ = ["Displacement", "jvp", "jvps", "plain_jvp", "rule"]
