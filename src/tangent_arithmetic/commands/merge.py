r"""Merges models by one command with composable configuration.

    python src/merge.py method=task_arithmetic method.scaling_factor=0.5 \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_svhn_and_mnist \
        taskpool=CLIPVisionModelTaskPool/clip-vit-base-patch32_svhn_and_mnist \
        merged_model_save_path=merged

Groups lie in `config/` and have FusionBench's names; `-m` sweeps. docs/merging.md has the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tangent_arithmetic.merging.composing import check_flags, composing_only
from tangent_arithmetic.runtime.errors import UsageError, entry_point, printable, shown
from tangent_arithmetic.runtime.logs import setup_logging

CONFIG = Path(__file__).resolve().parent.parent / "config"


def work(config: DictConfig) -> None:
    """Runs one composed configuration."""
    from tangent_arithmetic.merging.program import run, table

    setup_logging()
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"the configuration is not complete: {error}") from error
    plain["path"]["log_dir"] = HydraConfig.get().runtime.output_dir  # in a sweep, one a job
    if plain.get("print_config"):
        print(OmegaConf.to_yaml(config))
    report = run(plain)
    if report.get("dry_run"):
        names = ", ".join(map(shown, report["models"]))
        print(f"dry run: {printable(report['method'])} of {names}")
    else:
        lines = [printable(line) for line in table(report)]
        print("\n".join(lines) or f"merged {len(report['merge']['models'])} models")


def explain(error: Exception) -> str:
    """What is wrong with the configuration, in the words of Hydra and of the error behind."""
    found = [str(part).strip() for part in (error, error.__cause__) if part and str(part).strip()]
    text = "\n".join(dict.fromkeys(found)) or type(error).__name__
    return text.partition("\nConfig search path")[0].strip()


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    words = [sys.argv[0], *argv] if argv is not None else sys.argv
    environment = {"HYDRA_FULL_ERROR": "1"}  # errors come to us, who print them
    composed = hydra.main(version_base="1.3", config_path=str(CONFIG), config_name="merge")(work)
    with patch.object(sys, "argv", words), patch.dict(os.environ, environment), composing_only():
        check_flags(words[1:])
        try:
            composed()
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(explain(error)) from error
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
