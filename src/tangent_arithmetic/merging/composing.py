"""Hydra held to composing configurations: it runs nothing that one of them names.

Hydra calls what `hydra.callbacks`, `hydra.launcher`, `hydra.sweeper` and the logging nodes name,
imports what its search path names, and sets the environment. Any group may set these, by
`# @package _global_`. So every configuration, of a single run and of each job of a sweep, is
compared with what is fixed, before Hydra acts on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tangent_arithmetic.runtime.errors import UsageError, shown

PLUGINS = "hydra._internal.core_plugins"
QUIET = {"version": 1, "root": None, "disable_existing_loggers": False}
FIXED: dict[str, Any] = {
    "launcher": {"_target_": f"{PLUGINS}.basic_launcher.BasicLauncher"},
    "sweeper": {"_target_": f"{PLUGINS}.basic_sweeper.BasicSweeper"},
    "callbacks": {},
    "job_logging": QUIET,
    "hydra_logging": QUIET,
    "job": {"env_set": {}},
}
NAMED = ("main", "command-line", "hydra.searchpath")  # who may add to the search path


@contextmanager
def composing_only() -> Iterator[None]:
    """Within the block, Hydra refuses configurations that choose what it runs or imports."""
    compose, open_sources = ConfigLoaderImpl.load_configuration, ConfigRepository.initialize_sources

    def load_configuration(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        try:
            config = compose(self, *args, **kwargs)
        except (HydraException, OmegaConfBaseException, UsageError):
            raise
        except Exception as error:  # of the YAML reader, of the file system, of a nested file
            reason = f"{type(error).__name__}: {shown(error, 500)}"
            raise UsageError(f"the configuration cannot be read ({reason})") from error
        check(config)
        return config

    def initialize_sources(self: ConfigRepository, config_search_path: ConfigSearchPath) -> None:
        for element in config_search_path.get_path():
            scheme, separator, _ = str(element.path).partition("://")
            if separator and scheme != "file" and str(element.provider).startswith(NAMED):
                raise UsageError(
                    f"{shown(element.path)} in the search path of configurations is refused, since "
                    "a package would be imported; name a folder"
                )
        open_sources(self, config_search_path)

    with (
        patch.object(ConfigLoaderImpl, "load_configuration", load_configuration),
        patch.object(ConfigRepository, "initialize_sources", initialize_sources),
    ):
        yield


def check(config: DictConfig) -> None:
    """Checks that a configuration leaves to us what Hydra runs.

    Nothing is resolved: an interpolation where something is fixed is refused as such, so that it
    cannot become something else afterwards.

    Raises:
        UsageError: naming what it sets.
    """
    node: Any = OmegaConf.to_container(config, resolve=False)
    hydra = node.get("hydra")
    if not isinstance(hydra, Mapping):
        raise _refused("hydra", hydra)
    for part, wanted in FIXED.items():
        found = hydra.get(part)
        if part == "job" and isinstance(found, Mapping):
            found = {"env_set": found.get("env_set")}
        if part == "sweeper" and isinstance(found, Mapping):
            _check_grid(found.get("params"))
            found = {key: v for key, v in found.items() if key not in ("params", "max_batch_size")}
        if found != wanted:
            raise _refused(*_difference(f"hydra.{part}", found, wanted))


def _check_grid(params: Any) -> None:
    """Checks that `hydra.sweeper.params`, what a sweep goes over, holds plain values."""
    plain = isinstance(params, Mapping | type(None)) and all(
        not key.startswith("_")
        and (value is None or isinstance(value, bool | int | float | str))
        and "${" not in str(value)
        for key, value in (params or {}).items()
    )
    if not plain:
        raise _refused("hydra.sweeper.params", params)


def _difference(path: str, found: Any, wanted: Any) -> tuple[str, Any]:
    """The first value that is not the wanted one, with its path."""
    if isinstance(found, Mapping):
        inner = wanted if isinstance(wanted, Mapping) else {}
        for key, value in found.items():
            if key not in inner or inner[key] != value:
                return _difference(f"{path}.{key}", value, inner.get(key))
    return path, found


def _refused(path: str, value: Any) -> UsageError:
    return UsageError(
        f"the configuration sets {shown(path)} to {shown(value)}, which is refused: what Hydra "
        "itself runs (launcher, sweeper, callbacks, logging, environment) is fixed. Remove it; "
        "sweeps are -m key=1,2,3"
    )


def check_flags(words: list[str]) -> None:
    """Checks the flags of the command line, before Hydra reads them again.

    Raises:
        UsageError: for the flag that runs a pickle.
    """
    if get_args_parser().parse_args(words).experimental_rerun is not None:
        raise UsageError("--experimental-rerun is refused: it would execute what a pickle says")
