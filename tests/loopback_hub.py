"""A server on this machine that speaks the part of the Hugging Face hub's protocol we need."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that downloads of files and of snapshots need."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        path = self._answer()
        if path:
            self.wfile.write(path.read_bytes())

    def _answer(self) -> Path | None:
        self.asked.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/models/"):
            self._list()
            return None
        repo, _, file = self.path.replace(COMMIT, "main").partition("/resolve/main/")
        path = self.root / repo.lstrip("/") / file
        known = bool(file) and path.is_file()
        self.send_response(200 if known else 404)
        size = path.stat().st_size if known else 0
        self.send_header("Content-Length", str(size))
        if path.parent.is_dir():
            self.send_header("X-Repo-Commit", COMMIT)
        if known:
            self.send_header("ETag", f'"{path.name}-{size}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        return path if known else None

    def _list(self) -> None:
        """Answers what a repository holds."""
        repo = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
        folder = self.root / repo
        names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
        if "/tree/" in self.path:
            sizes = {name: (folder / name).stat().st_size for name in names}
            answer: Any = [
                {"type": "file", "path": name, "size": size, "oid": name}
                for name, size in sizes.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in names]
            answer = {"id": repo, "sha": COMMIT, "siblings": siblings}
        body = json.dumps(answer).encode()
        self.send_response(200 if names else 404)
        if not names:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@contextlib.contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """A server of the folders ORG/NAME below `root`: its address, and what it was asked."""
    handler: Any = type("Handler", (Hub,), {"root": root, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
        server.shutdown()


def elsewhere(code: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own: the hub's address is read once, at import."""
    names = {"HF_HOME": str(home), "NO_PROXY": "*", "no_proxy": "*", "HF_HUB_DISABLE_XET": "1"}
    inherited = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**inherited, **names, **env},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
