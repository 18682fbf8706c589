"""The small run of the analyses."""

from tests.analysis.conftest import made, run

__all__ = ["made", "run"]
