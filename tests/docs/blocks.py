"""The fenced blocks of README.md and docs/, and a folder in which they run as they are written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
)
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n)?"
    r"^```(?P<language>sh|bash|python)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)
CLONE = ("src", "scripts", "examples", "docs", "mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md")
SMALL = Path(__file__).with_name("small_sets.py")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its file, below the root.
        line: where it begins.
        language: sh or python.
        text: what it says.
        reason: why it is not run; None if it is.
        title: the file that it is the content of; None if it is code to run.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None
    title: str | None


def blocks(page: str) -> list[Block]:
    """The blocks of a page in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            page,
            text[: match.start("language")].count("\n") + 1,
            "python" if match["language"] == "python" else "sh",
            match["text"],
            match["reason"],
            match["title"],
        )
        for match in FENCE.finditer(text)
    ]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]  # a variable of the environment
        if words:
            yield words


def run_page(page: str, folder: Path, home: Path) -> None:
    """Runs all blocks of a page, in order; neighbouring Python blocks share their names."""
    environment = prepared(folder, home)
    todo = [block for block in blocks(page) if block.reason is None]
    for (language, title), group in groupby(todo, key=lambda b: (b.language, b.title)):
        members = list(group)
        if title is not None:
            (folder / title).write_text(members[0].text, encoding="utf-8")
            continue
        text = "\n".join(block.text for block in members)
        python = str(folder / "bin" / "python")
        start = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [python, "-c"]
        where = f"{page}, line {members[0].line}"
        run([*start, text], folder, environment, where)


def run(
    command: Sequence[str], folder: Path, environment: dict[str, str], where: str, limit: int = 1500
) -> str:
    """The output of a command; fails with it if the command does."""
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, timeout=limit,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{where} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def prepared(folder: Path, home: Path) -> dict[str, str]:
    """Makes a folder look like a clone whose data sets are small, and gives its environment."""
    for name in CLONE:
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "README.md", folder)
    shutil.copytree(ROOT / "results", folder / "results")  # commands write into it
    tools = folder / "bin"
    tools.mkdir()
    for name, words in {
        "python": [sys.executable],
        "tangent-arithmetic": [sys.executable, "-m", "tangent_arithmetic.commands.cli"],
    }.items():
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        tool.chmod(0o755)
    site = folder / "site-packages"
    site.mkdir()
    shutil.copy(SMALL, site / "sitecustomize.py")
    paths = [str(site), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    cache = home / "matplotlib"
    return {
        **os.environ,
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": ":".join(filter(None, paths)),
        "HOME": str(home),
        "MPLCONFIGDIR": str(cache),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
        "NO_MKDOCS_2_WARNING": "1",
        "TQDM_DISABLE": "1",
    }
