"""The wheel alone, in an environment without the clone: complete, and it runs what it promises."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str | Path, folder: Path) -> str:
    environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        list(map(str, words)), cwd=folder, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"  # a build leaves folders behind
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "src", "pyproject.toml", "README.md",
         "LICENSE", "NOTICE"], cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\n")  # fmt: skip
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w")
    run(*pip, folder, copy, folder=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and this one's libraries, without the clone."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder / "env", folder=folder)
    python = folder / "env" / "bin" / "python"
    (own,) = (folder / "env" / "lib").glob("python*/site-packages")
    (own / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    run(python, "-m", "pip", "install", "--no-deps", wheel, folder=folder)
    code = "import tangent_arithmetic; print(tangent_arithmetic.__file__)"
    assert run(python, "-c", code, folder=folder).startswith(str(own))
    return python.parent


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the programs lie elsewhere")
def test_the_wheel_holds_the_package_alone_and_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "src/tangent_arithmetic"], cwd=ROOT,
        capture_output=True, text=True, check=True,
    ).stdout.split("\n")  # fmt: skip
    expected = {n.removeprefix("src/") for n in tracked if n and (ROOT / n).is_file()}
    assert names == expected


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the programs lie elsewhere")
def test_the_benchmark_its_page_and_merging_run_from_the_wheel(
    binaries: Path, tmp_path: Path
) -> None:
    program = binaries / "tangent-arithmetic"
    assert "finetune" in run(program, "--help", folder=tmp_path)
    quick = ["--quick", "--tasks=MNIST,Emoji", "--n-eval-points=3", "--device=cpu"]
    assert "Task addition" in run(program, "reproduce", *quick, folder=tmp_path)
    (page,) = tmp_path.rglob("report.html")
    assert "explorer-data" in page.read_text(encoding="utf-8")
    merged = run(
        program, "merge", "method=ties_merging", "modelpool=embedded", "taskpool=embedded",
        "modelpool.run=checkpoints/quick", "modelpool.tasks=[MNIST,Emoji]",
        "taskpool.run=checkpoints/quick", "taskpool.tasks=[MNIST,Emoji]", folder=tmp_path,
    )  # fmt: skip
    assert "MNIST" in merged and "average" in merged
