from __future__ import annotations

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


@pytest.mark.parametrize("face", [name for name in FACES if (ROOT / f"src/{name}.py").is_file()])
def test_a_face_works_in_a_clone_that_is_not_installed(face: str) -> None:
    installed = [place for place in sys.path if Path(place) not in (Path(), ROOT, ROOT / "src")]
    code = (
        f"import sys; sys.path[:] = ['', *{installed!r}]; import src.{face} as face; "
        "print(all(hasattr(face, name) for name in face.__all__))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"]


@pytest.mark.parametrize(
    ("module", "needs", "free_of"),
    [
        (
            "tangent_arithmetic.tangent.linearized",
            "torch",
            ["open_clip", "wandb", "torchvision", "matplotlib", "transformers"],
        ),
        ("tangent_arithmetic.run.args", "argparse", ["torch", "numpy"]),
    ],
)
def test_importing_is_cheap(module: str, needs: str, free_of: list[str]) -> None:
    wanted = {needs, *free_of}
    code = f"import sys, {module}; print(*sorted({wanted!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [needs]
