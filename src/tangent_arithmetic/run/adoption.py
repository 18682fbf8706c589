"""Settings that follow from others: the suite's model, and those of a public project's folder."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from tangent_arithmetic.data.suites import EMBEDDED_MODEL, SUITES
from tangent_arithmetic.encoders.published.layout import layout_of
from tangent_arithmetic.run.config import Config

logger = logging.getLogger(__name__)


def adopted(config: Config) -> Config:
    """The settings, with the suite's model, and mode, model and seed of the folder `--save`.

    Only what is not set is adopted.

    Args:
        config: the settings.
    """
    suite = SUITES.get(config.suite or "")
    if config.model == EMBEDDED_MODEL and suite is not None:
        config = replace(config, model=suite.model)
    layout = None if config.save is None else layout_of(Path(config.save))
    if layout is None:
        return config
    found: dict[str, Any] = {}
    if config.finetuning_mode is None:
        found["finetuning_mode"] = layout.mode
    if config.model == EMBEDDED_MODEL:
        found["model"] = layout.model
    if config.seed is None and layout.seed is not None:
        found["seed"] = layout.seed
    if found:
        _say(str(config.save), ", ".join(f"{name} {value}" for name, value in found.items()))
    return replace(config, **found)


@functools.cache
def _say(folder: str, settings: str) -> None:
    logger.info("%s: public checkpoints, hence %s", folder, settings)
