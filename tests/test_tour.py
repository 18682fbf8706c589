"""The notebook docs/tour.ipynb: executed as it is committed, and anew."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs" / "tour.ipynb"
DATA = re.compile(r'<script type="application/json".*?</script>', re.DOTALL)


def read() -> Any:
    return nbformat.read(TOUR, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: Any) -> str:
    """Everything that its cells print."""
    return "".join(
        output.get("text", "") for cell in code(notebook) for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )  # fmt: skip


def shown(notebook: Any) -> str:
    """Sources, and what a reader sees below them; pictures and the explorer's numbers left out."""
    parts = [cell.source for cell in notebook.cells]
    for output in (output for cell in code(notebook) for output in cell.outputs):
        data = {
            kind: value for kind, value in output.get("data", {}).items() if "image" not in kind
        }
        parts += [output.get("text", ""), *data.values()]
    return DATA.sub("", "\n".join(parts))


def imports(notebook: Any) -> Iterator[tuple[str, str | None]]:
    """Modules that its cells import, with the name that is taken from them, if any."""
    lines = [line for cell in code(notebook) for line in cell.source.splitlines()]
    for node in ast.walk(ast.parse("\n".join(line for line in lines if line[:1] != "%"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((str(node.module), alias.name) for alias in node.names)


def check(notebook: Any) -> None:
    """What is true of every run of it."""
    assert [cell.execution_count for cell in code(notebook)] == [
        i + 1 for i in range(len(code(notebook)))
    ]
    kinds = [output.output_type for cell in code(notebook) for output in cell.outputs]
    assert "error" not in kinds and "display_data" in kinds
    text = printed(notebook)
    assert "at theta0 the two differ by 0.0" in text
    gaps = [float(gap) for gap in re.findall(r"over step squared (\d+)", text)]
    assert len(gaps) == 4 and max(gaps[1:]) < 1.02 * min(gaps[1:])  # quadratic
    for coef, least in (("0.5", 0.95), ("1.0", 0.8)):
        lines = re.findall(rf"sum at {coef}: (.*)", text)
        kept = [float(value) for line in lines for value in re.findall(r": ([\d.]+)", line)]
        assert len(kept) == 4 and min(kept) >= least  # both tasks, in both modes
    standard, linear = map(float, re.findall(r"off by (\S+) of it", text))
    assert linear < 1e-12 and standard > 0.1
    rows = re.findall(r"\| (zero-shot|linear), test +\| +([\d.]+) \| +([\d.]+)", text)
    before, after = ([float(value) for value in row[1:]] for row in rows)
    assert all(new > old + 5 for old, new in zip(before, after, strict=True))
    assert re.search(r"3721 models, each on 709 pictures, in [\d.]+ s", text)
    moves = re.findall(r"own coefficient moves it by up to ([\d.]+), the other's ([\d.]+)", text)
    assert len(moves) == 2 and all(float(own) > float(other) for own, other in moves)
    assert re.search(r"'EmojiVal': [\d.]+, 'MNISTVal': [\d.]+\} both ways", text)
    (page,) = (
        output.data["text/html"] for cell in code(notebook) for output in cell.outputs
        if "text/html" in output.get("data", {})
    )  # fmt: skip
    assert "explorer-data" in page


def test_it_is_committed_as_executed() -> None:
    notebook = read()
    check(notebook)
    text = shown(notebook)
    paths = re.findall(r"/(?:tmp|home|root|Users|work|var|private)/\S*", text)
    assert not paths and f"{ROOT}/" not in TOUR.read_text(encoding="utf-8")
    assert "Warning" not in text and TOUR.stat().st_size < 1.5e6
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert all(output.get("name") != "stderr" for output in outputs)


def test_what_it_imports_is_there() -> None:
    found = set(imports(read()))
    assert ("tangent_arithmetic", "LinearizedModel") in found
    for module, name in found:
        if name is None or module.partition(".")[0] != "tangent_arithmetic":
            assert importlib.util.find_spec(module), module
        elif not hasattr(importlib.import_module(module), name):
            assert importlib.util.find_spec(f"{module}.{name}"), (module, name)


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    jupyter = [f"JUPYTER_{name}_DIR" for name in ("CONFIG", "DATA", "RUNTIME")]
    for name in ("HOME", "IPYTHONDIR", "MPLCONFIGDIR", "TMPDIR", *jupyter):
        monkeypatch.setenv(name, str(tmp_path))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    kernel = tmp_path / "kernels" / "own"  # this interpreter, whatever is installed elsewhere
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        json.dumps({
            "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "own", "language": "python",
        })
    )  # fmt: skip
    notebook = read()
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="own", coalesce_streams=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )  # fmt: skip
    client.execute()
    check(notebook)
