"""The explorer's exact best coefficients, and those solved for weights, against Python's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tangent_arithmetic.arithmetic import line
from tangent_arithmetic.arithmetic.fronts import SMALLEST_RIDGE, front
from tangent_arithmetic.arithmetic.logits import Logits
from tangent_arithmetic.arithmetic.solving.losses import Term, cross_entropy
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.arithmetic.solving.solver import Objective
from tangent_arithmetic.arithmetic.steps import Steps, weighted
from tangent_arithmetic.report import explorer
from tests.browser import opened
from tests.report.test_explorer import HEAD
from tests.report.test_explorer import LOGITS as OTHER

VECTORS = ("A", "B", "C")
TASKS = ("A", "B")
SINGLES = {"AVal": 0.8, "BVal": 0.9}
STEP = 0.05


def features(seed: int, images: int = 150, width: int = 7) -> torch.Tensor:
    """f0 and three directions of each picture: (images, 4, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 1 + len(VECTORS), width, generator=generator)


def reduced(seed: int, name: str, classes: int, bias: bool, normalises: bool) -> Reduced:
    """A split, three of whose four pictures have the class at some coefficients.

    Those of the control set are all zero.
    """
    generator = torch.Generator().manual_seed(100 + seed)
    wide, weight = features(seed), torch.randn(classes, 7, generator=generator)
    base, *steps = (4 * wide @ weight.T).unbind(1)
    at = torch.tensor([1.0, 0.0, 0.0, 0.0] if name == "ShapesVal" else [1.0, 0.6, 0.3, -0.2])
    true = torch.einsum("s,nsd->nd", at, wide)
    labels = (true @ weight.T).argmax(dim=1)
    labels[::4] = torch.randint(classes, labels[::4].shape, generator=generator)
    root = wide.transpose(1, 2) if normalises else None
    offset = torch.randn(classes, generator=generator) if bias else None
    return Reduced(name, base, torch.stack(steps), root, labels, offset)


def logits_of(split: Reduced) -> Logits:
    """The same split as the explorer holds it."""
    inner = None
    if split.root is not None and split.bias is not None:
        inner = split.root.double().transpose(1, 2) @ split.root.double()
    count = len(split)
    parts = split.base, split.steps, split.labels, split.bias, inner
    return Logits(split.name, VECTORS, *parts, of=count)


def inner_of(splits: dict[str, Reduced]) -> dict[str, torch.Tensor | None]:
    """The inner products that the page needs beside its logits."""
    found: dict[str, torch.Tensor | None] = {}
    for name, split in splits.items():
        if split.root is None:
            found[name] = None
        elif split.bias is None:
            found[name] = split.root.double().transpose(1, 2) @ split.root.double()
    return found


KINDS = {"plain": (False, True), "affine": (True, False), "normalised with bias": (True, True)}


def splits_of(kind: str) -> dict[str, Reduced]:
    """Validation splits of two tasks and the control set, with heads of a kind."""
    return {
        f"{name}Val": reduced(i, f"{name}Val", classes, *KINDS[kind])
        for i, (name, classes) in enumerate((("A", 4), ("B", 6), ("Shapes", 5)))
    }


def content(kind: str) -> str:
    splits = splits_of(kind)
    logits = {name: logits_of(split) for name, split in splits.items()}
    return explorer.build(logits, SINGLES, control="Shapes", inner=inner_of(splits))


@pytest.fixture
def page(browser: Any, tmp_path: Path, request: Any) -> Iterator[Any]:
    path = tmp_path / "explorer.html"
    path.write_text(HEAD + content(getattr(request, "param", "plain")), encoding="utf-8")
    with opened(browser, path) as explorer_page:
        yield explorer_page


def coefs(page: Any) -> list[float]:
    return [float(coef) for coef in page.evaluate("window.tangentExplorer.coefs()")]


def steps_of(kind: str, start: list[float], direction: list[float]) -> tuple[Steps, Steps]:
    """The mean normalised accuracy of the tasks along a line, and the control set's accuracy."""
    splits = {name: logits_of(split) for name, split in splits_of(kind).items()}
    own = [line.accuracy(splits[f"{task}Val"], direction, start) for task in TASKS]
    weights = [1 / (2 * SINGLES[f"{task}Val"]) for task in TASKS]
    return weighted(own, weights), line.accuracy(splits["ShapesVal"], direction, start)


# --- the exact line

LINES = [
    ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
    ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
    ([0.3, 0.0, -0.4], [0.0, 1.0, 0.0]),
    ([0.5, 0.7, 0.0], [0.0, 0.0, 1.0]),
]


@pytest.mark.parametrize("page", ["plain", "affine"], indirect=True)
@pytest.mark.parametrize(("start", "direction"), LINES)
def test_the_exact_best_is_pythons(
    page: Any, start: list[float], direction: list[float], request: Any
) -> None:
    kind = request.node.callspec.params["page"]
    call = (
        "([start, direction]) => window.tangentExplorer.lines.best(start, direction, false, -1, 2)"
    )
    found = page.evaluate(call, [start, direction])
    accuracy, _ = steps_of(kind, start, direction)
    best = accuracy.best(low=-1.0, high=2.0)
    assert found["value"] == pytest.approx(best.value, abs=1e-12)
    assert (found["low"], found["high"]) == pytest.approx((best.low, best.high), abs=1e-12)
    assert best.low < found["coef"] < best.high
    assert float(accuracy.at([found["coef"]])[0]) == best.value


def test_lines_that_are_the_same_or_do_not_move(browser: Any, tmp_path: Path) -> None:
    logits = logits_of(splits_of("plain")["AVal"])
    base, steps = logits.base.clone(), logits.steps.clone()
    steps[:, ::3] = 0  # no coefficient moves these pictures
    base[:, 2], steps[:, :, 2] = (
        base[:, 1],
        steps[:, :, 1],
    )  # of equal classes the first is predicted
    logits = replace(logits, base=base, steps=steps)
    path = tmp_path / "explorer.html"
    path.write_text(HEAD + explorer.build({"AVal": logits}), encoding="utf-8")
    with opened(browser, path) as page:
        found = page.evaluate(
            "window.tangentExplorer.lines.best([0, 0, 0], [1, 0.5, 0], false, -1, 2)"
        )
    best = line.accuracy(logits, [1.0, 0.5, 0.0]).best(-1.0, 2.0)
    assert found["value"] == best.value
    assert (found["low"], found["high"]) == pytest.approx((best.low, best.high), abs=1e-12)


def test_the_exact_best_keeps_the_control_set(page: Any) -> None:
    start, direction = LINES[0]
    call = (
        "([start, direction]) => window.tangentExplorer.lines.best(start, direction, true, -1, 2)"
    )
    found = page.evaluate(call, [start, direction])
    accuracy, control = steps_of("plain", start, direction)
    least = 0.95 * float(control.at([0.0])[0])
    edges = torch.cat([torch.tensor([-1.0]).double(), accuracy.edges, control.edges]).unique()
    inside = edges[(edges >= -1) & (edges < 2)]
    allowed = inside[control.at(inside) >= least]
    assert found["value"] == pytest.approx(float(accuracy.at(allowed).max()), abs=1e-12)
    assert float(control.at([found["coef"]])[0]) >= least
    free, _ = steps_of("plain", start, direction)
    assert found["value"] < free.best(-1.0, 2.0).value  # the control set costs something here


def test_the_common_coefficient_is_the_exact_one(page: Any) -> None:
    page.get_by_role("button", name="Best common coefficient").click()
    page.wait_for_function("document.querySelector('#explorer-status').textContent.includes('%')")
    accuracy, _ = steps_of("plain", *LINES[0])
    best = accuracy.best(0.0, 1.0)
    (value,) = set(coefs(page))
    assert best.low < value < best.high
    grid = np.arange(0, 1.001, STEP).tolist()
    assert best.value > float(accuracy.at(grid).max())  # which the grid misses here


def drag(page: Any, vector: str, value: float) -> None:
    """Moves a slider."""
    page.get_by_role("slider", name=vector, exact=True).evaluate(
        "(i, value) => { i.value = value; i.dispatchEvent(new Event('input')); }", str(value)
    )
    page.evaluate("() => new Promise(requestAnimationFrame)")


@pytest.mark.parametrize("vector", ["B", "all"])
def test_sliders_snap_to_the_exact_best(page: Any, vector: str) -> None:
    page.evaluate("window.tangentExplorer.set('A', 0.3)")
    start, direction = ([0.3, 0.0, 0.0], [0.0, 1.0, 0.0]) if vector == "B" else LINES[0]
    accuracy, _ = steps_of("plain", start, direction)
    best = accuracy.best(-1.0, 2.0)
    nearest = round(round(best.coefficient / STEP) * STEP, 2)
    drag(page, vector, nearest)
    assert coefs(page)[1] == nearest  # not unless asked for
    page.get_by_label("snap to the exact best").check()
    drag(page, vector, nearest)
    assert best.low < coefs(page)[1] < best.high
    number = page.get_by_role("spinbutton", name=f"coefficient of {vector}")
    assert vector != "B" or float(number.input_value()) == coefs(page)[1]
    status = page.locator("#explorer-status").text_content()
    assert f"{100 * best.value:.1f} %" in status and f"{best.low:.4f} to {best.high:.4f}" in status
    drag(page, vector, nearest + 2 * STEP)
    assert coefs(page)[1] == round(nearest + 2 * STEP, 2)


# --- weights


def solved(page: Any, weights: dict[str, float]) -> dict[str, Any]:
    found = page.evaluate("w => window.tangentExplorer.solver.solve(w)", weights)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("page", KINDS, indirect=True)
@pytest.mark.parametrize("weights", [(0.5, 0.5, 0.0), (1.0, 0.0, 0.0), (0.2, 0.3, 0.5)])
def test_solved_coefficients_are_those_of_the_front(
    page: Any, weights: tuple[float, ...], request: Any
) -> None:
    splits = splits_of(request.node.callspec.params["page"])
    found = solved(page, dict(zip(splits, (3 * w for w in weights), strict=True)))
    start = np.full(len(VECTORS), 0.3)
    expected = front(list(splits.values()), np.array([weights]), start).coefficients[0]
    terms = [
        Term(split, cross_entropy, weight)
        for split, weight in zip(splits.values(), weights, strict=True)
        if weight
    ]
    objective = Objective(terms, start, SMALLEST_RIDGE)
    assert found["value"] == pytest.approx(objective.value(np.array(found["coefs"])), rel=1e-6)
    assert found["value"] <= objective.value(expected) * (1 + 1e-6)
    np.testing.assert_allclose(found["coefs"], expected, atol=1e-3)


def test_weights_move_the_sliders(page: Any) -> None:
    summary = page.locator("#explorer-chooser summary")
    summary.click()
    weights = page.locator("#explorer-weights input")
    assert weights.evaluate_all("all => all.map(i => i.value)") == ["0.5", "0.5", "0"]
    names = page.locator("#explorer-weights label").all_text_contents()
    assert names == ["A", "B", "Shapes (control)"]
    page.get_by_role("button", name="Solve").click()
    page.wait_for_function(
        "document.querySelector('#explorer-status').textContent.includes('Solved')"
    )
    expected = solved(page, {"AVal": 1, "BVal": 1})["coefs"]
    assert coefs(page) == pytest.approx(expected, abs=5e-5)
    equal = page.evaluate("window.tangentExplorer.state()")
    drag_weight = "(i) => { i.value = 0; i.dispatchEvent(new Event('change')); }"
    weights.nth(1).evaluate(drag_weight)  # all for the first task
    page.wait_for_function(f"Math.abs(window.tangentExplorer.coefs()[0] - {expected[0]}) > 1e-3")
    alone = page.evaluate("window.tangentExplorer.state()")
    assert alone["AVal"]["accuracy"] >= equal["AVal"]["accuracy"]
    weights.nth(0).evaluate(drag_weight)
    page.wait_for_function(
        "document.querySelector('#explorer-status').textContent.includes('all')"
        " || document.querySelector('#explorer-status').textContent.includes('All')"
    )
    assert "give one task a weight" in page.locator("#explorer-status").text_content()
    page.get_by_role("button", name="Equal weights").click()
    assert weights.evaluate_all("all => all.map(i => i.value)") == ["0.5", "0.5", "0"]


# --- where it is not possible


@pytest.mark.parametrize("page", ["normalised with bias"], indirect=True)
def test_heads_without_lines_are_weighed_but_do_not_snap(page: Any) -> None:
    assert not page.get_by_label("snap to the exact best").is_visible()
    assert page.locator("#explorer-chooser").is_visible()


def test_pages_without_inner_products_have_no_weights(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "explorer.html"
    splits = {name: logits_of(split) for name, split in splits_of("plain").items()}
    path.write_text(HEAD + explorer.build(splits, SINGLES, control="Shapes"), encoding="utf-8")
    with opened(browser, path) as page:
        assert not page.locator("#explorer-chooser").is_visible()
        assert page.get_by_label("snap to the exact best").is_visible()
        assert page.evaluate("window.tangentExplorer.coefs()") == [0, 0, 0]


def test_several_labels_a_picture_have_neither(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "explorer.html"
    logits = OTHER["Emoji"]
    labels = (torch.arange(logits.base.numel()).reshape(logits.base.shape) % 3 == 0).byte()
    path.write_text(HEAD + explorer.build({"EmojiVal": replace(logits, labels=labels)}))
    with opened(browser, path) as page:
        for part in ("#explorer-chooser", "#explorer-snap-label"):
            assert not page.locator(part).is_visible()


@pytest.mark.parametrize("width", [400, 1280])
def test_the_weights_fit(browser: Any, tmp_path: Path, width: int) -> None:
    path = tmp_path / "explorer.html"
    path.write_text(HEAD + content("plain"), encoding="utf-8")
    with opened(browser, path, viewport={"width": width, "height": 800}) as page:
        page.locator("#explorer-chooser summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = page.locator("#explorer-weights *").evaluate_all(
            "all => all.map(i => i.getBoundingClientRect().toJSON())"
        )
        assert all(box["width"] > 0 and box["right"] <= width for box in boxes)
