"""The small run of the analyses, whose results the page shows."""

from tests.analysis.conftest import args, made, run, words

__all__ = ["args", "made", "run", "words"]
