r"""Merges models in one command with a composable configuration.

    tangent-arithmetic merge method=task_arithmetic method.scaling_factor=0.5 \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_svhn_and_mnist \
        taskpool=CLIPVisionModelTaskPool/clip-vit-base-patch32_svhn_and_mnist \
        merged_model_save_path=merged

Groups and keys have FusionBench's names; `-m` sweeps. `merge stress` perturbs task vectors and
reports how each method degrades, `merge compare` puts results beside published ones, see their
--help. See docs/merging.md.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from tangent_arithmetic.merging.composing import run_hydra
from tangent_arithmetic.merging.registry import PRETRAINED
from tangent_arithmetic.runtime.errors import UsageError, entry_point, printable, shown

CONFIG = Path(__file__).resolve().parent.parent / "config"
COMMANDS = ("stress", "compare")


def work(config: DictConfig) -> None:
    """Runs one composed configuration."""
    from tangent_arithmetic.merging.program import run, table
    from tangent_arithmetic.runtime.logs import setup_logging

    setup_logging()
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = shown(error.full_key or "a key")
        raise UsageError(f"{key} is not set; expected {key}=VALUE, see --cfg job") from error
    except OmegaConfBaseException as error:
        raise UsageError(f"the configuration is incomplete: {error}") from error
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder != Path.cwd():  # of a job in a sweep, or hydra.run.dir
        plain["path"]["log_dir"] = str(folder)
    if plain.get("print_config"):
        print(OmegaConf.to_yaml(config))
    report = run(plain)
    if report.get("dry_run"):
        names = ", ".join(map(shown, report["models"]))
        print(f"dry run: {printable(report['method'])} of {names}")
    else:
        lines = [printable(line) for line in table(report)]
        print("\n".join([*lines, _merged(report["merge"], report["written"])]))


def _merged(recipe: Mapping[str, Any], target: Path | None) -> str:
    """What was merged, and where it is, for the last line."""
    count = len([name for name in recipe["models"] if name != PRETRAINED])
    method = printable(recipe["method"])
    place = f"; wrote {shown(target)}" if target else "; not saved (merged_model_save_path=PATH)"
    return f"merged {count} model{'s' if count != 1 else ''} by {method}{place}"


def explain(error: Exception) -> str:
    """The messages of an error of Hydra and of its cause, without the search path."""
    parts = [str(part).strip() for part in (error, error.__cause__) if part and str(part).strip()]
    text = "\n".join(dict.fromkeys(parts)) or type(error).__name__
    return text.partition("\nConfig search path")[0].strip().replace("\t", "  ")


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] and words[0] in COMMANDS:
        module = importlib.import_module(f"tangent_arithmetic.commands.{words[0]}")
        return int(module.main(words[1:]))
    try:
        run_hydra(work, CONFIG, "merge", words)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(error)) from error
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
