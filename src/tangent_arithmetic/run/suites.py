"""The suite of a run: what `--suite`, the model and data sets named NAME=SOURCE amount to."""

from __future__ import annotations

from tangent_arithmetic.data import suites
from tangent_arithmetic.data.own.mixing import borrowing, empty_suite, with_own, with_recipe
from tangent_arithmetic.data.own.sources import OwnSet, is_own, own_set, plain_name
from tangent_arithmetic.data.suites import OWN_SUITE, Suite, get_suite, suite_of_model
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.private import expanded

SUITE_FILES = (".yaml", ".yml")


def suite_of(config: Config) -> Suite:
    """The suite of a run.

    It is `--suite`, a name or a file, or the model's suite, extended by the data sets that the
    flags name as NAME=SOURCE. Without `--suite`, if all tasks are named so, the suite consists of
    these alone and is called `own`; other data sets of the model's suite are known in it as well.

    Raises:
        UsageError: if the suite is unknown, or a data set cannot be what the flags say.
    """
    home = suite_of_model(config.model)
    templates = _templates(config.template)
    own = _own_sets(config, templates)
    base, alone = _base(config, home, templates)
    named = [plain_name(text) for text in _named(config)]
    if own:
        tasks = [plain_name(text) for text in _primary(config)] if alone else []
        base = with_own(base, own, tasks)
    if base.name == OWN_SUITE:  # registered for any model
        base = with_recipe(base, get_suite(home))
    if base.name not in suites.SUITES or base.name == OWN_SUITE:
        base = borrowing(base, named, home)
    return base


def _templates(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    from tangent_arithmetic.data.own.words import templates_from

    return templates_from(text, "of --template")


def _base(config: Config, home: str, templates: tuple[str, ...] | None) -> tuple[Suite, bool]:
    """The suite before own data sets are added, and whether these become its tasks."""
    if config.suite is not None and _is_file(config.suite):
        from tangent_arithmetic.data.own.suite_file import read_suite

        return read_suite(config.suite, get_suite(home), templates), False
    if config.suite is not None:
        return get_suite(config.suite), False
    primary = _primary(config)
    if primary and all(map(is_own, primary)):
        registered = suites.SUITES.get(OWN_SUITE)
        return registered or empty_suite(get_suite(home)), True
    if (own := suites.SUITES.get(OWN_SUITE)) is not None and primary:
        names = [plain_name(text).removesuffix("Val") for text in primary]
        if all(name in own.names or is_own(t) for name, t in zip(names, primary, strict=True)):
            return own, False
    return get_suite(home), False


def _is_file(suite: str) -> bool:
    ending = suite.lower().endswith(SUITE_FILES)
    return ending or (suite not in suites.SUITES and expanded(suite).is_file())


def _primary(config: Config) -> list[str]:
    """The flag that says what the run is about."""
    return config.tasks or config.train_dataset or config.eval_datasets or []


def _named(config: Config) -> list[str]:
    """All data sets that the flags name."""
    lists = (config.tasks, config.train_dataset, config.eval_datasets, config.others)
    names = [name for each in lists for name in each or []]
    return [*names, *([config.control_dataset] if config.control_dataset else [])]


def _own_sets(config: Config, templates: tuple[str, ...] | None) -> list[OwnSet]:
    """The data sets that the flags name as NAME=SOURCE, each once.

    Raises:
        UsageError: if a name comes with two sources.
    """
    texts: dict[str, str] = {}
    for text in filter(is_own, _named(config)):
        name = plain_name(text)
        if texts.setdefault(name, text) != text:
            raise UsageError(
                f"data set {name} is named with two sources, {texts[name]} and {text}; give them "
                "different names"
            )
    return [own_set(text, templates) for text in texts.values()]
