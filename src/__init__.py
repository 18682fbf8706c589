"""Names of the public projects, for `from src.task_vectors import TaskVector` from a clone.

The package is `tangent_arithmetic`, which lies beside these files; it is found without installing.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("tangent_arithmetic") is None:
    sys.path.append(str(Path(__file__).parent))
