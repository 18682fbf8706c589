"""Hooks of mkdocs: README.md is the home page, and pages may link to any file of the repository.

Files outside docs/ that pages link to are copied into the site, below `repository/`, as are those
that copied pages link to, and what the navigation names; a folder becomes a list of its files. So
a link is written once, as it works in a clone. Notebooks become pages; formulas become MathML,
which browsers show without a script.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
COPIES = "repository"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/tour.ipynb": "tour.md",
}
SOURCES = {uri: place for place, uri in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds `PAGES` and every file that the navigation names or pages link to."""
    pages = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    named = [source(uri) for uri in addresses(config["nav"]) if uri.startswith(COPIES)]
    todo, known = [*PAGES, *named, *pages], set(pages)
    while todo:
        place = todo.pop()
        path = ROOT / place
        if place not in known:
            known.add(place)
            files.append(_file(config, path, address(place)))
        linked = targets(path.read_text(encoding="utf-8"), place) if place.endswith(".md") else ()
        if path.is_dir():
            linked = (each.relative_to(ROOT).as_posix() for each in _members(path))
        todo += [each for each in linked if each not in known and _is_copied(each)]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links of a page to what they are in the site."""
    uri = page.file.src_uri
    place, folder = source(uri), posixpath.dirname(uri)

    def replaced(match: re.Match[str]) -> str:
        there = address(resolved(match[1], place))
        return posixpath.relpath(there, folder or ".") + (match[2] or "")

    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [LINK.sub(replaced, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(replaced, markdown[end:])])


def on_page_content(content: str, **_: Any) -> str:
    """Writes the formulas of a page as MathML."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]).strip(), display=display)

    return FORMULA.sub(mathml, content)


def targets(text: str, place: str) -> Iterator[str]:
    """The files that the text of a Markdown file links to, as paths below the root."""
    return (resolved(match[1], place) for match in LINK.finditer(CODE.sub("", text)))


def resolved(link: str, place: str) -> str:
    """The path that a relative link of the file `place` leads to; a folder's README.md, if any."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
    readme = f"{target}/README.md"
    return readme if (ROOT / readme).is_file() else target


def addresses(nav: Any) -> Iterator[str]:
    """The pages of a navigation, in order."""
    for entry in nav:
        found = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from [found] if isinstance(found, str) else addresses(found)


def address(place: str) -> str:
    """The path in the site of a file or folder of the repository."""
    if place in PAGES or place.startswith("docs/"):
        return PAGES.get(place, place.removeprefix("docs/"))
    return f"{COPIES}/{place}" + ("/index.md" if (ROOT / place).is_dir() else "")


def source(uri: str) -> str:
    """The inverse of `address`."""
    if uri in SOURCES or not uri.startswith(f"{COPIES}/"):
        return SOURCES.get(uri, f"docs/{uri}")
    return uri.removeprefix(f"{COPIES}/")


def notebook(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and what the code has printed."""
    parts: list[str] = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        streams = (out for out in cell["outputs"] if out.get("name") == "stdout")
        parts += [f"```text\n{''.join(out['text']).rstrip()}\n```" for out in streams]
    return "\n\n".join(parts)


def _is_copied(place: str) -> bool:
    return not place.startswith("docs/") and (ROOT / place).exists()


def _members(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")


def _file(config: Any, path: Path, uri: str) -> File:
    if path.is_dir():
        lines = [f"- [{each.name}]({each.name})" for each in _members(path)]
        return File.generated(config, uri, content="\n".join([f"# {path.name}", "", *lines]))
    if path.suffix == ".ipynb":
        return File.generated(config, uri, content=notebook(path))
    return File.generated(config, uri, abs_src_path=str(path))
