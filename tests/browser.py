"""A real browser for tests of pages."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
DISABLED = ("gpu", "quic", "sync", "background-networking", "component-update")
FLAGS = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in DISABLED)]


def require_browser() -> str:
    """The path of a Chromium; skips the test if there is none."""
    pytest.importorskip("playwright", reason="playwright is not installed (extra: test)")
    named = os.environ.get("CHROMIUM")
    path = named or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium, or set CHROMIUM=/path")
    return path


@contextlib.contextmanager
def browsing() -> Iterator[Any]:
    """A headless Chromium, with an empty profile."""
    path = require_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Any, path: Path, **context: Any) -> Iterator[Any]:
    """A page from a file; fails at the end if there was an error or a request to the network."""
    with contextlib.closing(browser.new_context(**context)) as own:
        page = own.new_page()
        problems: list[str] = []

        def log_error(message: Any) -> None:
            if message.type == "error":
                problems.append(message.text)

        def log_request(request: Any) -> None:
            if not request.url.startswith(("file:", "data:", "blob:")):
                problems.append(request.url)

        page.on("console", log_error)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", log_request)
        page.goto(path.as_uri())
        yield page
        assert problems == []
