from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FACES = sorted(
    path.stem
    for path in (ROOT / "src").iterdir()
    if not path.stem.startswith("__") and (path.suffix == ".py" or path.is_dir())
)


def test_no_face_shadows_another_module_when_a_script_puts_src_on_the_path() -> None:
    assert {"args", "heads", "linearize", "tangent_arithmetic"} <= set(FACES)
    installed = set(metadata.packages_distributions()) - {"src", "tangent_arithmetic"}
    taken = sys.stdlib_module_names | installed | {"datasets", "evaluate", "distributed"}
    assert sorted(taken & set(FACES)) == []


def run_python(*argv: str) -> list[str]:
    command = [sys.executable, *argv]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")


def test_all_faces_work_in_a_clone_that_is_not_installed() -> None:
    installed = [place for place in sys.path if Path(place) not in (Path(), ROOT, ROOT / "src")]
    faces = [name for name in FACES if (ROOT / f"src/{name}.py").is_file()]
    code = f"""
import importlib, sys
sys.path[:] = ['', *{installed!r}]
for name in {faces!r}:
    face = importlib.import_module(f"src.{{name}}")
    assert face.__all__ and all(hasattr(face, public) for public in face.__all__), name
    print(name)
"""
    assert run_python("-S", "-c", code) == [*faces, ""]


def test_a_script_of_src_runs_without_its_folder_on_the_path() -> None:
    assert (
        "usage: tangent-arithmetic checkpoint"
        in run_python(str(ROOT / "src" / "checkpoints.py"), "--help")[0]
    )


def rooms() -> set[str]:
    package = ROOT / "src" / "tangent_arithmetic"
    return {path.name for path in package.iterdir() if path.is_dir() and path.name[0] != "_"}


def test_the_map_of_the_architecture_is_the_tree() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\|[^|]*\| `(\w+)/` \|", text, flags=re.MULTILINE)) == rooms() - {
        "config"
    }
    beside = text.partition("| place | holds |")[2].partition("\n\n")[0]
    places = re.findall(r"`([\w/]+)/`", beside)
    assert {"src", "scripts", "tests", "docs", "examples", "results"} == set(places)
    assert all((ROOT / place).is_dir() for place in places)


def test_no_module_of_the_package_imports_a_face() -> None:
    faces = "|".join(set(FACES) - {"tangent_arithmetic"})
    found = re.compile(rf"^\s*(?:from|import) (?:src|{faces})\b", flags=re.MULTILINE)
    for path in (ROOT / "src" / "tangent_arithmetic").rglob("*.py"):
        assert not found.search(path.read_text(encoding="utf-8")), path


def test_a_face_is_a_few_lines() -> None:
    for path in (ROOT / "src").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 110, path


@pytest.mark.parametrize(
    ("module", "needs", "free_of"),
    [
        ("tangent.linearized", "torch", {"open_clip", "wandb", "torchvision", "transformers"}),
        ("run.args", "argparse", {"torch", "numpy"}),
    ],
)
def test_importing_is_cheap(module: str, needs: str, free_of: set[str]) -> None:
    code = (
        f"import sys, tangent_arithmetic.{module}; print(*{free_of | {needs}!r} & {{*sys.modules}})"
    )
    assert run_python("-c", code) == [needs, ""]
