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
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


def require_browser() -> str:
    """The path of a Chromium; the test is skipped, saying why, where there is none."""
    pytest.importorskip("playwright", reason="playwright is not installed (extra: test)")
    named = os.environ.get("CHROMIUM")
    path = named or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one by CHROMIUM=/path")
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
    """A page of a file; at the end it must have met no error and asked the network for nothing."""
    with contextlib.closing(browser.new_context(**context)) as own:
        page = own.new_page()
        troubles: list[str] = []

        def said(message: Any) -> None:
            if message.type == "error":
                troubles.append(message.text)

        def asked(request: Any) -> None:
            if not request.url.startswith(("file:", "data:", "blob:")):
                troubles.append(request.url)

        page.on("console", said)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", asked)
        page.goto(path.as_uri())
        yield page
        assert troubles == []
