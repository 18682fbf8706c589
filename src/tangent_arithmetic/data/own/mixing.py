"""Suites of own data sets, alone or beside those of a suite that is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tangent_arithmetic.data import suites
from tangent_arithmetic.data.own.sources import OwnSet
from tangent_arithmetic.data.suites import OWN_SUITE, Suite
from tangent_arithmetic.runtime.errors import UsageError


def empty_suite(like: Suite, name: str = OWN_SUITE) -> Suite:
    """A suite without data sets and with the recipe of another one."""
    return replace(
        like, name=name, control=None, tasks={}, related={}, sets={}, borrowed={}, analogies=()
    )


def with_recipe(suite: Suite, like: Suite) -> Suite:
    """A suite with its own data sets and the recipe of another one."""
    return replace(
        like,
        name=suite.name,
        tasks=suite.tasks,
        control=suite.control,
        related=suite.related,
        sets=suite.sets,
        borrowed=suite.borrowed,
        analogies=suite.analogies,
    )


def with_own(suite: Suite, own: Iterable[OwnSet], tasks: Iterable[str] = ()) -> Suite:
    """A suite with further data sets.

    Args:
        suite: the suite.
        own: the data sets.
        tasks: those of them that become tasks of the suite; the rest are trained on and evaluated
            only when named.

    Raises:
        UsageError: if the suite has another data set of one of these names.
    """
    names = set(tasks)
    for each in own:
        if each.name in suite.names:
            raise UsageError(
                f"suite {suite.name} has a data set {each.name}; give yours another name than in "
                f"{each.name}=..."
            )
        suite = suite.listing(each.name, each.task, each.name in names)
        if each.dataset is not None:
            suite = replace(suite, sets={**suite.sets, each.name: each.dataset})
        else:
            assert each.borrowed is not None
            suite = replace(suite, borrowed={**suite.borrowed, each.name: each.borrowed})
    return suite


def borrowing(suite: Suite, names: Iterable[str], home: str) -> Suite:
    """A suite with those of some names that it lacks and another suite has, under the same names.

    Args:
        suite: the suite.
        names: X or XVal.
        home: the other suite.
    """
    for name in dict.fromkeys(name.removesuffix("Val") for name in names):
        if name not in suite.names and name in suites.SUITES[home].names:
            entry = OwnSet(name, suites.SUITES[home].task(name), borrowed=(home, name))
            suite = with_own(suite, [entry])
    return suite
