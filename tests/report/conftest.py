"""The small run of the analyses, whose results the page shows, and a browser."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.analysis.conftest import composed, own, run, words
from tests.browser import browsing

__all__ = ["browser", "composed", "own", "run", "words"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as chromium:
        yield chromium
