"""Of a damaged results file the sound part is read, the rest is named, and no trace escapes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tangent_arithmetic.run import results_schema
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.results import require_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError

COMMITTED = sorted(Path(__file__).parents[2].glob("results/embedded/ViT-*/**/*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_committed_results_are_sound(path: Path) -> None:
    found, faults = results_schema.read(path)
    assert faults == [] and json.loads(path.read_text(encoding="utf-8")) == found


# file, its content, what is sound, what is named
DAMAGES: list[tuple[str, str, Any, list[str]]] = [
    ("ft_accuracies", '{"MNIST": "0.9", "Emoji": 0.5}', {"Emoji": 0.5}, ["MNIST: expected a nu"]),
    ("ft_accuracies", '{"MNIST": 1.5}', {}, ["MNIST: expected a number from 0 to 1, got 1.5"]),
    ("ft_accuracies", '{"MNIST": -0.1, "Emoji": true}', {}, ["MNIST", "Emoji"]),
    ("ft_accuracies", '{"MNIST": NaN, "Emoji": Infinity}', {}, ["MNIST", "Emoji"]),
    ("ft_accuracies", '{"MNIST": [0.5], "Emoji": {"a": 1}}', {}, ["got a list", "got a dict"]),
    ("ft_accuracies", '{"MNIST": 1' + 400 * "0" + "}", {}, ["MNIST"]),
    ("ft_accuracies", '{"MNIST": 0.1, "MNIST": 0.9}', {}, ["MNIST: .* got two values"]),
    ("ft_accuracies", '{"MNIST": 0.1, "MNIST": 0.1}', {"MNIST": 0.1}, []),
    (
        "linear_stress",
        '{"task": "A", "methods": {"a": {"plain": {"top1": {"A": 1.5, "B": 1}}, "seconds": 2}}}',
        {"task": "A", "methods": {"a": {"plain": {"top1": {"B": 1}}, "seconds": 2}}},
        ["methods > a > plain > top1 > A: expected a number from 0 to 1"],
    ),
    ("ft_accuracies", '{"provenance": "me"}', {}, ["provenance: expected an object"]),
    (
        "ft_accuracies",
        '{"provenance": {"argv": "a b", "seed": "0", "versions": [], "config": {"lr": 1}}}',
        {"provenance": {"config": {"lr": 1}}},
        ["provenance > argv", "provenance > seed", "provenance > versions"],
    ),
    ("additions", '{"coefficient": null}', {}, ["coefficient: expected a finite number, got None"]),
    (
        "additions",
        '{"test": {"avg_top1": "x", "A:top1": 2, "avg_normalized_top1": 1.2}, "val": 3}',
        {"test": {"avg_normalized_top1": 1.2}},
        ["test > avg_top1", "test > A:top1", "val: expected an object"],
    ),
    (
        "additions",
        '{"val": {"0.15000000000000002": {}, "0.15": {"avg_top1": 1}, "nan": {}, "b": {}}}',
        {"val": {"0.15": {}}},
        ["val > 0.15", "val > nan", "val > b"],
    ),
    (
        "linear_combined_task",
        '{"test": {"solved": {"MNIST": 0.5}}, "uniform": 0.3, "checkpoint": "x", "provenance": 1}',
        {"test": {"solved": {"MNIST": 0.5}}, "uniform": 0.3, "checkpoint": "x"},
        ["provenance: expected an object"],
    ),
    (
        "negated_task",
        '{"MNIST": {"test": {"solved": {"MNIST": 0.5}}}}',
        {"MNIST": {"test": {"solved": {"MNIST": 0.5}}}},
        [],
    ),
    ("negations", '{"MNIST": 0.5}', {}, ["MNIST: expected an object, got 0.5"]),
    (
        "negations",
        '{"MNIST": {"test": 0.5, "coefficient": "0.3", "val": [], "qualified": 1}}',
        {"MNIST": {"test": 0.5}},
        ["MNIST > coefficient", "MNIST > val", "MNIST > qualified"],
    ),
    ("ft_accuracies", '{"\\u001b[31mred": 2}', {}, [r"\\x1b\[31mred"]),
]


@pytest.mark.parametrize(("name", "content", "sound", "named"), DAMAGES)
def test_damage(name: str, content: str, sound: Any, named: list[str], tmp_path: Path) -> None:
    path = tmp_path / f"{name}.json"
    path.write_text(content, encoding="utf-8")
    found, faults = results_schema.read(path)
    assert found == sound and len(faults) == len(named)
    for fault, start in zip(faults, named, strict=True):
        assert re.search(start, fault), fault


NO_RESULTS = {
    "cut": b'{"MNIST": 0.',
    "empty": b"",
    "binary": bytes(range(256)),
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "deep": b'{"MNIST": ' + 100_000 * b"[",
    "UTF-16": '{"MNIST": 0.5}'.encode("utf-16"),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("content", NO_RESULTS.values(), ids=NO_RESULTS)
def test_what_is_no_object_is_an_error_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ft_accuracies.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"ft_accuracies\.json (cannot be read|is a Git LFS)"):
        results_schema.read(path)


# --- any damage


def jsons(leaves: int = 6) -> st.SearchStrategy[Any]:
    """Any JSON, also what Python alone takes for it."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    keys = st.sampled_from(["test", "val", "coefficient", "MNIST", "0.5", "argv"]) | st.text()
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=leaves,
    )


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else ()
    return [at, *(place for key, one in inner for place in places(one, (*at, key)))]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A results file with a value replaced, cut short, or with bytes changed."""
    kind = draw(st.sampled_from(["value", "value", "cut", "bytes"]))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if kind == "bytes":
        changed = bytearray(content)
        for _ in range(draw(st.integers(1, 5))):
            changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
        return bytes(changed)
    found = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(found)[1:]))
        holder = found
        for key in way:
            holder = holder[key]
        holder[last] = draw(jsons())
    return json.dumps(found).encode()


FOLDER = COMMITTED[0].parent
ACCURACIES = (FOLDER / "ft_accuracies.json").read_bytes()
ORIGIN = json.loads(ACCURACIES)["provenance"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=damaged(ACCURACIES))
def test_results_that_are_needed_are_sound_or_refused(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "ft_accuracies.json"
    path.write_bytes(content)
    needed = ["MNIST", "MNISTVal"]
    hashes = {"MNIST": ORIGIN["checkpoints"]["MNIST"]}
    try:
        found = require_results(
            path, Run.of(Config()), ORIGIN["theta0_hash"], "MAKE", hashes, needed
        )
    except UsageError as error:
        assert str(path) in str(error) and "MAKE" in str(error)
    else:
        assert all(isinstance(found[name], float | int) for name in needed)
        assert all(0 <= found[name] <= 1 for name in needed)
