"""Flags of `combine`: what they mean together, and the names of the files that follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tangent_arithmetic.arithmetic.solving.combining import Settings
from tangent_arithmetic.arithmetic.solving.groups import Direction, directions
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.run.config import Config
from tangent_arithmetic.run.models import task_vector
from tangent_arithmetic.run.results import solution_name
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError


def shots_of(config: Config) -> int | None:
    """`--shots` of this command, labelled pictures a class; None for all.

    Raises:
        UsageError: if it is not one number.
    """
    if config.shots == Config().shots:  # the analyses' default
        return None
    if len(config.shots) != 1:
        raise UsageError(f"--shots: expected one number of pictures a class, got {config.shots}")
    return int(config.shots[0])


def settings_of(run: Run) -> Settings:
    """How the run solves for coefficients.

    Raises:
        UsageError: for flags that make no sense together.
    """
    config = run.config
    bounds = None
    if config.coefficient_bounds is not None:
        try:
            low, high = map(float, config.coefficient_bounds)
        except ValueError:
            low, high = 1.0, 0.0
        if not low <= high:
            raise UsageError(
                "--coefficient-bounds: expected the least and the largest coefficient, such as "
                f"0,1, got {','.join(config.coefficient_bounds)}"
            )
        if config.negate and low >= 0:
            raise UsageError(
                f"--negate looks for coefficients below 0, got bounds {low:g},{high:g}; choose "
                "such as --coefficient-bounds=-2,0"
            )
        bounds = (low, high)
    if config.unlabelled is not None and (config.negate or shots_of(config) is not None):
        raise UsageError("--unlabelled uses no labels; leave out --shots and --negate")
    if config.negate and not run.mode.linear:
        raise UsageError(
            "--negate solves for coefficients of linear models; choose --finetuning-mode=linear or "
            "--finetuning-mode=posthoc"
        )
    solver = None if config.solver == "auto" else config.solver
    if solver is not None and run.mode.linear:
        raise UsageError(f"--solver is for standard models, got mode {run.mode.name}; leave it out")
    return Settings(config.ridge, bounds, config.unlabelled, solver=solver, seed=run.seed)


def slug(run: Run) -> str:
    """The run's part of the names of its files, see `run.results.solution_name`."""
    return solution_name(run, run.config.coefficients, shots_of(run.config))


def parts_of(run: Run, encoder: ModuleEncoder, theta0_hash: str, tasks: Sequence[str]
) -> list[Direction]:  # fmt: skip
    """The directions of some tasks' vectors."""
    mode = run.mode.name
    taus = {task: task_vector(run, task, mode, encoder, theta0_hash).vector for task in tasks}
    return directions(taus, run.config.coefficients, list(encoder.weights()))


def named(parts: Sequence[Direction], a: np.ndarray) -> dict[str, float]:
    """Coefficients by the names of their directions."""
    return {part.name: float(c) for part, c in zip(parts, a, strict=True)}
