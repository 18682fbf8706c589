from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import src

PACKAGE = Path(src.__file__).parent
NAMES = sorted(
    path.stem
    for path in PACKAGE.iterdir()
    if not path.stem.startswith("__") and (path.suffix == ".py" or path.is_dir())
)


def test_no_module_shadows_another_when_a_script_puts_src_on_the_path() -> None:
    assert {"args", "data", "linearize"} <= set(NAMES)
    installed = set(metadata.packages_distributions()) - {"src"}
    taken = sys.stdlib_module_names | installed | {"datasets", "evaluate", "distributed"}
    assert sorted(taken & set(NAMES)) == []


@pytest.mark.parametrize(
    ("module", "needs", "free_of"),
    [
        (
            "src.linearize",
            "torch",
            ["open_clip", "wandb", "torchvision", "matplotlib", "transformers"],
        ),
        ("src.args", "argparse", ["torch", "numpy"]),
    ],
)
def test_importing_is_cheap(module: str, needs: str, free_of: list[str]) -> None:
    wanted = {needs, *free_of}
    code = f"import sys, {module}; print(*sorted({wanted!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [needs]
