"""The documentation site builds without a warning, is complete, and opens offline."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import tangent_arithmetic
from tests.browser import browsing

pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra: docs)")
pytest.importorskip("material", reason="mkdocs-material is not installed (extra: docs)")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (extra: docs)")
ROOT = Path(__file__).resolve().parents[2]
SIZES = {"phone": (360, 740), "tablet": (768, 1024), "desktop": (1280, 900)}
OPENED = ("index", "tutorials/own-images", "published-numbers", "api", "migration")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as own:
        yield own


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The address of the site on this machine."""
    handler = functools.partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def opened(browser: Any, address: str, **context: Any) -> Iterator[Any]:
    """A page of the site; fails at the end if there was an error or a request to another place."""
    host = address.rpartition("/")[0].partition("//")[2].partition("/")[0]
    with contextlib.closing(browser.new_context(**context)) as own:
        page, problems = own.new_page(), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console", lambda said: problems.append(said.text) if said.type == "error" else None
        )
        page.on(
            "request",
            lambda asked: (
                None if host in asked.url or asked.url[:5] in ("data:", "blob:")
                else problems.append(asked.url)
            ),
        )  # fmt: skip
        page.goto(address)
        yield page
        assert problems == []


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags are of no interest here."""


def addresses(entries: Any) -> Iterator[str]:
    for entry in entries:
        found = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from [found] if isinstance(found, str) else addresses(found)


def test_every_page_of_docs_is_in_the_navigation() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    listed = set(addresses(config["nav"]))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed
    made = listed - pages  # of files elsewhere, see scripts/site_hooks.py
    assert {"index.md", "changelog.md", "contributing.md", "tour.md"} <= made
    copied = {uri.removeprefix("repository/") for uri in made if uri.startswith("repository/")}
    assert copied and all((ROOT / place).is_file() for place in copied)


@pytest.mark.slow
def test_it_is_complete_and_asks_for_nothing(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    outside = re.compile(r'<(?:script|img|iframe)[^>]*\bsrc="(?:https?:)?//|<link[^>]*href="http')
    for page in pages:
        if site / "repository" not in page.parents:  # pages of runs are tested on their own
            assert not outside.search(page.read_text(encoding="utf-8")), page
    api = (site / "api.html").read_text(encoding="utf-8")
    for name in tangent_arithmetic.__all__:
        assert name.startswith("__") or name in api, name
    assert (site / "repository/results/embedded/ViT-Nano-8_seed3/report.html").is_file()
    assert (site / "images/explorer.png").is_file()
    for name in ("api", "tak", "trainable"):
        written = (site / f"{name}.html").read_text(encoding="utf-8")
        assert "<math" in written and "arithmatex" not in written and "\\tau" not in written


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_its_pages_open_in_a_browser(served: str, browser: Any, size: str, scheme: str) -> None:
    width, height = SIZES[size]
    viewport = {"width": width, "height": height}
    for name in OPENED:
        address = f"{served}/{name}.html"
        with opened(browser, address, viewport=viewport, color_scheme=scheme) as page:
            assert page.locator("article h1").first.is_visible(), name
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            images = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
            assert page.evaluate(images) == 0, name
