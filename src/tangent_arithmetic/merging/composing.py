"""Hydra restricted to composing configurations; it executes nothing that a configuration names.

Hydra itself calls the targets of `hydra.callbacks`, `hydra.launcher`, `hydra.sweeper` and the
logging nodes, imports packages in its search path, and sets environment variables, all of which
any group may set with `# @package _global_`. Here each configuration, also of every job of a sweep,
is compared with fixed values before Hydra acts on it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra.version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser import overrides_parser
from hydra.core.override_parser.overrides_visitor import HydraOverrideVisitor
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tangent_arithmetic.merging.configurations import configurations
from tangent_arithmetic.runtime.errors import UsageError, closest, shown, unknown

SHOWN = 8  # keys in a message
LONGEST = 200  # characters of a mapping in a message
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
# where a job writes
PLACES = ["merged_model_save_path", "method.model_save_path", "taskpool.model_save_path"]
PLACES += ["report_save_path"]
USERS = ("main", "command-line", "hydra.searchpath")  # providers that users add folders by


class _Visitor(HydraOverrideVisitor):
    """Reads overrides; a key that is given twice is an error, as in YAML."""

    def visitDictContainer(self, ctx: Any) -> dict[str, Any]:
        """The mapping in braces."""
        found = super().visitDictContainer(ctx)
        if len(found) < (ctx.getChildCount() - 1) // 2:  # braces, pairs, and commas between them
            raise UsageError(f"expected each key once, got {shown(ctx.getText(), LONGEST)}")
        return found


overrides_parser.HydraOverrideVisitor = _Visitor  # type: ignore[misc]


def run_hydra(task: TaskFunction, folder: Path, name: str, words: Sequence[str]) -> None:
    """Composes configurations from command-line words and runs a task on each.

    Accepts the flags of Hydra's own applications: `--multirun`, `--cfg`, `--help` and so on.

    Args:
        task: function of the configuration of a run, or of each job of a sweep.
        folder: the folder of the configurations.
        name: the primary configuration, which also names the job.
        words: flags and overrides.

    Raises:
        UsageError: for a configuration that `check` refuses, or contradicting flags.
    """
    hydra.version.setbase("1.3")
    parser = get_args_parser()
    args = parser.parse_args(list(words))
    if args.experimental_rerun is not None:
        raise UsageError("--experimental-rerun is refused: it would execute code from a pickle")
    if bare := [word for word in args.overrides if "=" not in word and not word.startswith("~")]:
        raise UsageError(f"expected KEY=VALUE, got {shown(bare[0])!r}; --help lists the keys")
    commands = [args.run, args.multirun, args.cfg, args.info, args.shell_completion]
    if sum(bool(command) for command in commands) > 1:
        raise UsageError("choose one of --run, --multirun, --cfg, --info and --shell-completion")
    if args.resolve and not (args.cfg or args.help):
        raise UsageError("--resolve needs --cfg or --help")
    application = Hydra(task_name=name, config_loader=_Loader(_search_path(args, folder)))
    GlobalHydra.instance().initialize(application)
    failures: list[Exception] = []

    def guarded(config: DictConfig) -> None:  # an error within a job is printed by Hydra
        try:
            task(config)
        except Exception as error:
            failures.append(error)

    try:
        if args.help:
            application.app_help(args.config_name or name, parser, args)
        else:
            with _no_sweep_folder(application, args, args.config_name or name) as words:
                args.overrides = words
                _execute(application, args, args.config_name or name, guarded)
    finally:
        GlobalHydra.instance().clear()
    if failures:
        raise failures[0]


def _search_path(args: argparse.Namespace, folder: Path) -> ConfigSearchPath:
    """The folders of configurations: Hydra's, ours or `--config-path`, and `--config-dir`."""
    main = str(folder) if args.config_path is None else args.config_path
    path = create_config_search_path(main if "://" in main else _existing("config-path", main))
    if args.config_dir is not None:
        own = _existing("config-dir", args.config_dir)
        path.prepend("command-line", f"file://{own}", SearchPathQuery(provider="schema"))
    return path


def _existing(flag: str, folder: str) -> str:
    if not Path(folder).is_dir():
        raise UsageError(f"--{flag}: expected a folder, found none at {shown(folder)}")
    return str(Path(folder).resolve())


@contextlib.contextmanager
def _no_sweep_folder(
    application: Hydra, args: argparse.Namespace, name: str
) -> Iterator[list[str]]:
    """The overrides, with a folder for the files of a sweep that is removed if nobody asked for it.

    It is kept if reports go there, or if `hydra.sweep.dir` is set.
    """
    words = list(args.overrides)
    if not args.multirun or any("hydra.sweep.dir=" in word for word in words):
        yield words
        return
    config = application.compose_config(name, words, RunMode.MULTIRUN)
    if "log_dir" in str(OmegaConf.select(config, "report_save_path")):
        yield words
        return
    with tempfile.TemporaryDirectory() as folder:
        yield [*words, f"hydra.sweep.dir='{folder}'"]


def _execute(application: Hydra, args: argparse.Namespace, name: str, task: TaskFunction) -> None:
    words = args.overrides
    if args.hydra_help:
        config = application.compose_config(name, words, RunMode.RUN)
        settings = application.get_sanitized_hydra_cfg(config)
        template, parser = config.hydra.hydra_help, get_args_parser()
        text = application.get_help(template, settings, parser, resolve=False)
        sys.stdout.write(f"{text}\n")
    elif args.cfg:
        application.show_cfg(name, words, args.cfg, args.package, args.resolve)
    elif args.info:
        application.show_info(args.info, name, words)
    elif args.shell_completion:
        try:
            application.shell_completion(name, words)
        except ValueError as error:
            raise UsageError(f"--shell-completion: {error}") from error
    else:
        mode = application.get_mode(name, words)
        if mode is None or (args.multirun and mode == RunMode.RUN):
            mode = RunMode.MULTIRUN if args.multirun else RunMode.RUN
            words = [*words, f"hydra.mode={mode.name}"]
        start = application.run if mode == RunMode.RUN else application.multirun
        if mode == RunMode.MULTIRUN:
            _check_places(application, name, words)
        start(config_name=name, task_function=task, overrides=words)


def _check_places(application: Hydra, name: str, words: Sequence[str]) -> None:
    """Checks, before the work, that no job of a sweep writes where another one has written.

    A path with and without `.safetensors` counts as one, since an encoder is written to the file.
    """
    from tangent_arithmetic.merging.saving import file_of

    jobs: dict[Path, int] = {}
    twice: list[str] = []

    def note(config: DictConfig) -> None:
        settings = HydraConfig.get()
        # the job itself gives the message
        with contextlib.suppress(OmegaConfBaseException, OSError, RuntimeError, ValueError):
            for key in () if OmegaConf.select(config, "dry_run") else PLACES:
                if place := OmegaConf.select(config, key):
                    path = file_of(str(place).replace("{log_dir}", settings.runtime.output_dir))
                    if settings.job.chdir:
                        path = Path(settings.runtime.output_dir) / path
                    path = path.resolve()
                    if jobs.setdefault(path, settings.job.num) != settings.job.num:
                        twice.append(f"{key}={shown(place)}")

    with tempfile.TemporaryDirectory() as folder:
        own = [*words, f"hydra.sweep.dir='{folder}'"]
        application.multirun(config_name=name, task_function=note, overrides=own)
    if twice:
        raise UsageError(
            f"several jobs of the sweep would write {twice[0]}; expected a path of its own for "
            "each, such as one with '${hydra:job.num}' in it"
        )


class _Methods(StructuredConfigSource):
    """The group `method`, made from the registered merging methods."""

    def __init__(self) -> None:
        super().__init__("methods", "structured://")
        self.store = ConfigStore.__new__(ConfigStore)  # not the one that all of Hydra shares
        self.store.repo = {}
        for name, node in configurations().items():
            group, _, leaf = f"method/{name}".rpartition("/")
            self.store.store(leaf, node, group)


class _Repository(ConfigRepository):
    """The sources of configurations, of which none imports a package that a user names."""

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        """Opens the sources of a search path.

        Raises:
            UsageError: if a user's entry is a package.
        """
        for element in config_search_path.get_path():
            scheme, separator, _ = str(element.path).partition("://")
            if separator and scheme != "file" and str(element.provider).startswith(USERS):
                raise UsageError(
                    f"{shown(element.path)} in the search path of configurations is refused: it "
                    "would import a package; name a folder instead"
                )
        super().initialize_sources(config_search_path)
        self.sources.insert(-1, _Methods())  # Hydra expects its schema source to be the last


class _Loader(ConfigLoaderImpl):
    """Composes configurations and checks each of them."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        self.config_search_path = config_search_path
        self.repository = _Repository(config_search_path)

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        """A composed configuration.

        Raises:
            UsageError: if it cannot be read, or `check` refuses it.
        """
        try:
            config = super().load_configuration(*args, **kwargs)
        except MissingConfigException as error:
            raise self._unknown(error) from error
        except ConfigCompositionException as error:
            raise self._unknown_key(error, args, kwargs) from error
        except (HydraException, OmegaConfBaseException, UsageError):
            raise
        except Exception as error:  # of the YAML reader, of the file system, of a nested file
            reason = f"{type(error).__name__}: {shown(error, 500)}"
            raise UsageError(f"cannot read the configuration ({reason})") from error
        check(config)
        return config

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        """The choices of a group; without overrides Hydra would copy all groups each time."""
        if config_name is None and not overrides:
            return self.repository.get_group_options(group_name, results_filter)
        return super().get_group_options(group_name, results_filter, config_name, overrides)

    def _unknown(self, error: MissingConfigException) -> Exception:
        """The error for an unknown name of a group, with all names, nested ones too."""
        group, _, name = str(error.missing_cfg_file or "").partition("/")
        if not name or not (known := list(self._names(group))):
            return error
        return unknown(group, name.removesuffix(".yaml"), known)

    def _names(self, group: str, below: str = "") -> Iterator[str]:
        """The names in a group, as `group=NAME` takes them."""
        place = f"{group}/{below}".rstrip("/")
        for name in self.repository.get_group_options(place, ObjectType.CONFIG):
            yield f"{below}{name}"
        for name in self.repository.get_group_options(place, ObjectType.GROUP):
            yield from self._names(group, f"{below}{name}/")

    def _unknown_key(
        self, error: ConfigCompositionException, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Exception:
        """The error for a key that the configuration lacks, or that holds a list there."""
        key = getattr(error.__cause__, "full_key", None)
        if not key:
            return error
        words = [str(word) for word in kwargs.get("overrides", args[1] if len(args) > 1 else [])]
        plain = [word for word in words if "." not in word.partition("=")[0] and key not in word]
        try:
            config = super().load_configuration(*args, **{**kwargs, "overrides": plain})
        except (HydraException, OmegaConfBaseException, TypeError):
            return error
        node: Any = OmegaConf.to_container(config, resolve=False)
        nearest = closest(str(key), _keys({k: v for k, v in node.items() if k != "hydra"}))
        if key == nearest[0]:
            given = [word for word in words if word.partition("=")[0].lstrip("+") == key]
            got = shown(", ".join(given), LONGEST) or "a mapping"
            return UsageError(f"{key} is a list; expected {key}=[...], got {got}")
        adding = f", +{shown(key)}=VALUE adds a key" if "." in key else ""
        return UsageError(
            f"unknown key '{shown(key)}'; nearest: {', '.join(nearest[:SHOWN])}. --cfg job prints "
            f"the configuration{adding}"
        )


def _keys(node: Mapping[Any, Any], above: str = "") -> Iterator[str]:
    """The keys of a configuration, as overrides spell them."""
    for key, value in node.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{above}{key}.")


def check(config: DictConfig) -> None:
    """Checks that a configuration does not change what Hydra itself runs.

    Interpolations are not resolved: where a value is fixed, an interpolation is refused as such, so
    that it cannot become something else later.

    Raises:
        UsageError: naming the value that is not allowed.
    """
    node: Any = OmegaConf.to_container(config, resolve=False)
    settings = node.get("hydra")
    if not isinstance(settings, Mapping):
        raise _refused("hydra", settings)
    for part, fixed in FIXED.items():
        value = settings.get(part)
        if part == "job" and isinstance(value, Mapping):
            value = {"env_set": value.get("env_set")}
        if part == "sweeper" and isinstance(value, Mapping):
            if not _is_grid(value.get("params")):
                raise _refused("hydra.sweeper.params", value["params"])
            value = {key: v for key, v in value.items() if key not in ("params", "max_batch_size")}
        if value != fixed:
            raise _refused(*_difference(f"hydra.{part}", value, fixed))


def _is_grid(params: object) -> bool:
    """Whether `hydra.sweeper.params` holds plain values only."""
    if not isinstance(params, Mapping):
        return params is None
    return all(
        not key.startswith("_")
        and isinstance(value, bool | int | float | str | None)
        and "${" not in str(value)
        for key, value in params.items()
    )


def _difference(path: str, value: object, fixed: object) -> tuple[str, object]:
    """The first inner value that differs from the fixed one, with its path."""
    if isinstance(value, Mapping):
        inner = fixed if isinstance(fixed, Mapping) else {}
        for key, own in value.items():
            if key not in inner or inner[key] != own:
                return _difference(f"{path}.{key}", own, inner.get(key))
    return path, value


def _refused(path: str, value: object) -> UsageError:
    return UsageError(
        f"the configuration sets {shown(path)} to {shown(value)}, which is refused: what Hydra "
        "itself runs (launcher, sweeper, callbacks, logging, environment) is fixed. Remove it; "
        "for a sweep use -m key=1,2,3"
    )
