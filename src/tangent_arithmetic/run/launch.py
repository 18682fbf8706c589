"""Starts a run in all its processes."""

from __future__ import annotations

import functools
from collections.abc import Callable

from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.logs import setup_logging


def start(work: Callable[[Run], None], args: object) -> None:
    """Calls `work(run)` in every process of a run, see `ddp.run`.

    Args:
        work: a function at the top level of a module, or a `functools.partial` of one.
        args: the flags, see `Run.of`.

    Raises:
        UsageError: if the flags make no sense together, before anything starts; or if that is what
            ended one of the processes.
    """
    config = Run.of(args).check().config
    ddp.run(functools.partial(_resolved, work, config), config.world_size, config.port)


def _resolved(work: Callable[[Run], None], config: Config) -> None:
    setup_logging()  # ranks are known by now
    work(Run.of(config))
