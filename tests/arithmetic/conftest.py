"""The small run of the analyses."""

from tests.analysis.conftest import run

__all__ = ["run"]
