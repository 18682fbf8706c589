"""How a result was made: command line, settings, commit, software and machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import tangent_arithmetic
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.private import without_home

ROOT = Path(__file__).resolve().parents[3]  # of a clone
PACKAGES = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow")


def git_commit() -> str | None:
    """The checkout's commit, with "+changes" if files differ from it; None outside of git."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    if not (ROOT / ".git").exists() or not (ROOT / "src" / "tangent_arithmetic").is_dir():
        return None  # an installed package, perhaps inside a repository of its user
    try:
        changed = git("status", "--porcelain", "--", "src", "scripts")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance(run: Run, seconds: float, **facts: Any) -> dict[str, Any]:
    """The facts that identify how a result was made: command line, settings, software, machine."""
    config = {n: v for n, v in sorted(vars(run.config).items()) if n != "finetuning_accuracies"}
    facts = {
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "config": config,
        "model": run.config.model,
        "suite": run.suite.name,
        **({} if run.config.finetuning_mode is None else {"mode": run.mode.name}),
        "seed": run.seed,
        "commit": git_commit(),
        "source": _relative(Path(tangent_arithmetic.__file__)),
        "versions": versions(),
        "device": str(run.device),
        "machine": machine(),
        "world_size": ddp.world_size(),
        "seconds": round(seconds, 1),
        **facts,
    }
    kept: dict[str, Any] = without_home(facts)
    return kept


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def machine() -> str:
    """The system and the cores."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count() or 1} cores"


def versions(*further: str) -> dict[str, str]:
    """The versions of Python and of the libraries that results depend on, and of further ones."""
    found = {name: metadata.version(name) for name in (*PACKAGES, *further)}
    return {"python": platform.python_version(), **found}
