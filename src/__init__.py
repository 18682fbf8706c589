"""Tangent Arithmetic: task vectors, linearised fine-tuning and the evaluation of both."""

import os
import sys
from pathlib import Path
from types import TracebackType

__version__ = "0.1.0"


def _told_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Ends a script that Ctrl-C interrupts while it imports as `errors.entry_point` does later."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(130)


# only where a script of this project is what runs: not for those who import it
_ROOT = Path(__file__).resolve().parent.parent
if sys.argv[:1] == ["-m"] or Path(*sys.argv[:1]).resolve().parent in (
    _ROOT / "src",
    _ROOT / "scripts",
):
    sys.excepthook = _told_interrupt
