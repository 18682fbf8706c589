"""The notebook docs/tour.ipynb: executed as it is committed, and anew."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs" / "tour.ipynb"


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
    sums = [
        [float(value) for value in re.findall(r": ([\d.]+)[,}]", line)]
        for line in re.findall(r"sum at 0.5: .*", text)
    ]
    standard, linear = sums
    assert min(linear) > max(standard) + 0.1
    rows = re.findall(r"\| (zero-shot|linear), test +\| +([\d.]+) \| +([\d.]+)", text)
    before, after = ([float(value) for value in row[1:]] for row in rows)
    assert all(new > old + 5 for old, new in zip(before, after, strict=True))
    assert re.search(r"1681 models in [\d.]+ s", text)
    (page,) = (
        output.data["text/html"] for cell in code(notebook) for output in cell.outputs
        if "text/html" in output.get("data", {})
    )  # fmt: skip
    assert "explorer-data" in page


def test_it_is_committed_as_executed() -> None:
    notebook = read()
    check(notebook)
    written = TOUR.read_text(encoding="utf-8")
    assert not re.search(r"/(tmp|home|root|Users|work)/", written)
    assert "Warning" not in written and len(written) < 1.5e6


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
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
