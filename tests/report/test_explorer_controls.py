"""The explorer's address, copies, search, warning and layout, in a real browser."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tangent_arithmetic.report import explorer
from tests.browser import opened
from tests.report.test_explorer import HEAD, LOGITS, PRESETS, SINGLES, VECTORS, fragment

TASKS = ("Emoji", "Signs")
GRID = np.round(np.arange(0, 1.001, 0.05), 10).tolist()
WIDE = np.round(np.arange(-1, 2.001, 0.05), 10).tolist()
ORIGIN = {"folder": "a folder/\"x'", "file": "linear_finetuned.safetensors", "kind": "TaskVector"}


def written(path: Path, content: str) -> Path:
    path.write_text(HEAD + content, encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    origin = explorer.build(LOGITS, SINGLES, PRESETS, control="Shapes", origin=ORIGIN)
    return written(tmp_path / "explorer.html", origin)


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    with opened(browser, file) as explorer_page:
        yield explorer_page


def coefs(page: Any) -> list[float]:
    return [float(coef) for coef in page.evaluate("window.tangentExplorer.coefs()")]


def value(a: list[float]) -> float:
    """The mean normalised validation accuracy, by Python."""
    parts = [LOGITS[f"{task}Val"].accuracy(a) / SINGLES[f"{task}Val"] for task in TASKS]
    return sum(parts) / len(parts)


def kept(a: list[float]) -> bool:
    """Whether the control set keeps 95 % of its zero-shot accuracy."""
    logits = LOGITS["ShapesVal"]
    return logits.accuracy(a) >= 0.95 * logits.accuracy([0.0] * len(VECTORS))


# --- the address


def test_the_address_holds_the_position(browser: Any, page: Any, file: Path) -> None:
    page.get_by_label("Preset").select_option("Only Signs")
    page.get_by_role("radio", name="test").check()
    number = page.get_by_role("spinbutton", name=f"coefficient of {VECTORS[2]}")
    number.fill("-0.3")
    number.press("Tab")
    state = page.evaluate("window.tangentExplorer.state()")
    address = page.evaluate("window.location.href")
    with opened(browser, file) as other:
        other.goto("about:blank")
        other.goto(address)
        assert coefs(other) == [0, 1, -0.3]
        assert other.get_by_role("radio", name="test").is_checked()
        assert other.evaluate("window.tangentExplorer.state()") == state


def test_back_and_forward_restore_positions(page: Any) -> None:
    for name in ("Sum of all", "Only Signs"):
        page.get_by_label("Preset").select_option(name)
    page.go_back()
    page.wait_for_function("window.tangentExplorer.coefs().join() === '1,1,1'")
    assert page.get_by_label("Preset").input_value() == "Sum of all"
    page.go_back()
    page.wait_for_function("window.tangentExplorer.coefs().join() === '0,0,0'")
    assert page.get_by_label("Preset").input_value() == "Zero-shot"
    page.go_forward()
    page.wait_for_function("window.tangentExplorer.coefs().join() === '1,1,1'")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("#explorer=Signs:0.5,Nobody:3,Emoji:x", [0, 0.5, 0]),
        ("#explorer=%E0%A4%A:1,Emoji:-2.5", [-2.5, 0, 0]),
        ("#explorer=", [0, 0, 0]),
        ("#figures", [0, 0, 0]),
    ],
)
def test_a_foreign_address_does_no_harm(
    browser: Any, file: Path, address: str, expected: list[float]
) -> None:
    with opened(browser, file) as page:
        page.goto("about:blank")
        page.goto(file.as_uri() + address)
        assert coefs(page) == expected


def test_back_to_no_address_shows_validation_again(page: Any) -> None:
    page.get_by_role("radio", name="test").check()
    page.go_back()
    page.wait_for_function("window.location.hash === ''")
    assert page.get_by_role("radio", name="validation").is_checked()


def test_a_link_to_a_part_of_the_page_keeps_the_position_in_the_address(page: Any) -> None:
    page.get_by_label("Preset").select_option("Only Signs")
    before = page.evaluate("window.location.hash")
    page.evaluate("window.location.hash = '#explorer-title'")
    page.wait_for_function(f"window.location.hash === {json.dumps(before)}")
    assert coefs(page) == [0, 1, 0]


# --- sliders


@pytest.mark.parametrize(
    ("keys", "expected"),
    [(["End"], 2), (["End", "ArrowLeft"], 1.95), (["End", *["ArrowLeft"] * 3], 1.85)],
)
def test_the_slider_of_all_is_at_their_coefficient(
    page: Any, keys: list[str], expected: float
) -> None:
    page.get_by_label("Preset").select_option("Only Signs")
    slider = page.locator("#explorer-slider-all")
    slider.focus()
    for key in keys:
        slider.press(key)
    assert coefs(page) == pytest.approx([expected] * 3)
    assert float(slider.input_value()) == pytest.approx(expected)


def test_a_cleared_number_is_the_coefficient_again(page: Any) -> None:
    for name, shown in ((VECTORS[0], "0.5"), ("all task vectors", "")):
        page.evaluate(f"window.tangentExplorer.set({json.dumps(VECTORS[0])}, 0.5)")
        number = page.get_by_role("spinbutton", name=f"coefficient of {name}")
        number.fill("")
        number.press("Tab")
        assert number.input_value() == shown and coefs(page) == [0.5, 0, 0]


def test_the_status_is_of_the_position(page: Any) -> None:
    status = page.locator("#explorer-status")
    for name in ("Only Signs", "Sum of all"):
        page.locator("#explorer-common").click()
        page.wait_for_function(
            "document.querySelector('#explorer-status').textContent.startsWith('Best common')"
        )
        page.get_by_label("Preset").select_option(name)
        assert status.text_content() == ""


# --- copies


def test_copies_are_json_and_python(page: Any) -> None:
    page.get_by_label("Preset").select_option("Sum of all")
    page.evaluate("window.tangentExplorer.set('Signs', -0.35)")
    expected = dict(zip(VECTORS, (1.0, -0.35, 1.0), strict=True))
    assert json.loads(page.evaluate("window.tangentExplorer.asJson()")) == expected
    lines = page.evaluate("window.tangentExplorer.asPython()").split("theta0 =")[0]
    found: dict[str, Any] = {}
    exec(lines, found)  # the dictionary and the folder
    assert found["coefs"] == expected and found["folder"] == ORIGIN["folder"]


def test_what_cannot_reach_the_clipboard_is_selected(page: Any) -> None:
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(Error()) }")
    page.get_by_role("button", name="Copy as JSON").click()
    area = page.get_by_label("text to copy")
    area.wait_for()
    assert json.loads(area.input_value()) == dict.fromkeys(VECTORS, 0)
    assert "Ctrl+C" in page.locator("#explorer-status").text_content()


# --- all at once, reset, search


def test_the_slider_of_all_and_reset(page: Any) -> None:
    number = page.get_by_role("spinbutton", name="coefficient of all task vectors")
    number.fill("0.45")
    number.press("Tab")
    assert coefs(page) == [0.45] * 3
    page.evaluate("window.tangentExplorer.set('Emoji', 0.9)")
    assert number.input_value() == ""  # they differ
    page.get_by_role("button", name="Reset").click()
    assert coefs(page) == [0.0] * 3 and number.input_value() == "0"
    assert page.get_by_label("Preset").input_value() == "Zero-shot"


@pytest.mark.parametrize("careful", [False, True])
def test_the_best_common_coefficient_is_pythons(page: Any, careful: bool) -> None:
    page.get_by_role("radio", name="test").check()  # the search reads validation all the same
    page.locator("#explorer-careful").set_checked(careful)
    page.get_by_role("button", name="Best common coefficient").click()
    status = page.locator("#explorer-status")
    page.wait_for_function("document.querySelector('#explorer-status').textContent.includes('%')")
    allowed = [c for c in GRID if not careful or kept([c] * 3)]
    best = max(allowed, key=lambda c: (value([c] * 3), -c))
    assert coefs(page) == [best] * 3
    shown = f"{100 * value([best] * 3):.1f} % on the validation examples"
    assert shown in status.text_content()


@pytest.mark.parametrize("careful", [False, True])
def test_no_single_coefficient_improves_on_the_best(page: Any, careful: bool) -> None:
    page.locator("#explorer-careful").set_checked(careful)
    page.get_by_role("button", name="Best coefficients", exact=True).click()
    page.wait_for_function("document.querySelector('#explorer-status').textContent.includes('%')")
    best = coefs(page)
    common = max(value([c] * 3) for c in GRID if not careful or kept([c] * 3))
    assert value(best) >= common
    assert not careful or kept(best)
    for t, coef in itertools.product(range(3), WIDE):
        other = [*best[:t], coef, *best[t + 1 :]]
        assert (careful and not kept(other)) or value(other) <= value(best) + 1e-9


# --- what is said beside the numbers


def test_chance_and_the_control_sets_loss(page: Any) -> None:
    state = page.evaluate("window.tangentExplorer.state()")
    assert {name: one["chance"] for name, one in state.items()} == {
        "EmojiVal": 1 / 3,
        "SignsVal": 1 / 5,
        "ShapesVal": 1 / 4,
    }
    warning = page.locator("#explorer-warning")
    logits = LOGITS["ShapesVal"]
    start = logits.accuracy([0.0] * 3)
    seen = set()
    for a in itertools.product((-1.0, 0.0, 1.0), repeat=3):
        for name, coef in zip(VECTORS, a, strict=True):
            page.evaluate("([name, coef]) => window.tangentExplorer.set(name, coef)", [name, coef])
        lost = start - logits.accuracy(a)
        assert warning.is_visible() == (lost >= 0.01)
        seen.add(lost >= 0.01)
        if lost >= 0.01:
            assert f"Shapes loses {100 * lost:.1f} points" in warning.text_content()
    assert seen == {True, False}


def test_without_a_control_set_nothing_is_said_of_it(browser: Any, tmp_path: Path) -> None:
    tasks = {name: logits for name, logits in LOGITS.items() if "Shapes" not in name}
    path = written(tmp_path / "explorer.html", explorer.build(tasks, SINGLES, PRESETS))
    with opened(browser, path) as page:
        page.get_by_label("Preset").select_option("Sum of all")
        assert not page.locator("#explorer-careful").is_visible()
        assert not page.locator("#explorer-warning").is_visible()
        assert "(control)" not in page.locator("#explorer-rows").text_content()
        page.get_by_role("button", name="Best coefficients", exact=True).click()
        page.wait_for_function(
            "document.querySelector('#explorer-status').textContent.includes('%')"
        )
        assert value(coefs(page)) >= max(value([c] * 3) for c in GRID)


def test_a_single_task_has_no_slider_of_all(browser: Any, tmp_path: Path) -> None:
    logits = LOGITS["EmojiVal"]
    alone = replace(logits, vectors=VECTORS[:1], steps=logits.steps[:1])
    path = written(tmp_path / "explorer.html", explorer.build({"EmojiVal": alone}))
    with opened(browser, path) as page:
        assert page.locator("input[type=range]").count() == 1
        assert page.locator("#explorer-summary").text_content().startswith("Emoji: ")


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes of the sum of precision times the step in recall, by thresholds."""
    values = []
    for s, y in zip(scores.T, labels.T, strict=True):
        if y.any():
            recall, total = 0.0, 0.0
            for threshold in sorted(set(s.tolist()), reverse=True):
                chosen = s >= threshold
                now = y[chosen].sum() / y.sum()
                total += (now - recall) * y[chosen].mean()
                recall = now
            values.append(total)
    return float(np.mean(values))


def test_several_labels_a_picture_have_mean_average_precision(browser: Any, tmp_path: Path) -> None:
    many = {}
    for name in ("SignsVal", "Emoji"):
        logits = LOGITS[name]
        labels = torch.rand(logits.base.shape, generator=torch.Generator().manual_seed(1)) < 0.3
        labels[:, -1] = False  # a class without positives does not count
        base = (logits.base * 2).round() / 2  # with equal scores
        many[name] = replace(logits, base=base, labels=labels.byte())
    content = explorer.build(many)
    path = written(tmp_path / "explorer.html", content)
    with opened(browser, path) as page:
        for split, name in (("validation", "SignsVal"), ("test", "Emoji")):
            page.get_by_role("radio", name=split).check()
            for a in ((0.0, 0.0, 0.0), (0.5, -0.25, 1.0)):
                for vector, coef in zip(VECTORS, a, strict=True):
                    page.evaluate("([v, c]) => window.tangentExplorer.set(v, c)", [vector, coef])
                one = page.evaluate("window.tangentExplorer.state()")[name]
                expected = average_precision(many[name].at(a).numpy(), many[name].labels.numpy())
                assert one["accuracy"] == pytest.approx(expected, abs=1e-12)
                assert one["error"] is None
                assert many[name].accuracy(a) == pytest.approx(expected, abs=1e-12)
                coefs = dict(zip(VECTORS, a, strict=True))
                assert explorer.accuracies(content, coefs)[name] == many[name].accuracy(a)
                assert one["chance"] == pytest.approx(many[name].labels[:, :-1].double().mean())
        assert "mAP" in page.locator("#explorer-rows").text_content()


# --- layout


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_the_mean_stays_and_nothing_is_hidden(
    browser: Any, file: Path, scheme: str
) -> None:
    size = {"width": 360, "height": 500}
    with opened(browser, file, viewport=size, color_scheme=scheme) as page:
        page.locator("#explorer-rows tr").last.scroll_into_view_if_needed()
        box = page.locator("#explorer-summary").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 100
        for row in page.locator("#explorer-rows tr").all():
            boxes = [cell.bounding_box() for cell in row.locator("th, td").all()]
            assert len(boxes) == 6 and all(b["width"] > 0 and b["height"] > 0 for b in boxes)
            assert row.locator(".tx-bar").bounding_box()["width"] > 100
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("width", [360, 1000])
def test_printed_all_columns_are_there(browser: Any, file: Path, width: int) -> None:
    with opened(browser, file, viewport={"width": width, "height": 700}) as page:
        page.emulate_media(media="print")
        for cells in ("thead th", "tbody tr:first-child > *"):
            boxes = [cell.bounding_box() for cell in page.locator(f"#explorer {cells}").all()]
            assert len(boxes) == 6 and all(box["width"] > 0 for box in boxes)


def test_ticks_are_at_zero_and_one(page: Any) -> None:
    track = page.locator(".tx-slider:not(.tx-all) .tx-track").first
    width = track.bounding_box()["width"]
    rem = page.evaluate("parseFloat(getComputedStyle(document.documentElement).fontSize)")
    for pseudo, tick in (("::before", 0.0), ("::after", 1.0)):
        left = track.evaluate(f"i => parseFloat(getComputedStyle(i, '{pseudo}').left)")
        assert left == pytest.approx(rem / 2 + (width - rem) * (tick + 1) / 3, abs=0.6)


def test_the_fragment_has_no_origin_unless_told() -> None:
    data = json.loads(explorer.DATA.findall(fragment())[0])
    assert data["origin"] is None
    part = explorer.part_of(fragment(), "abc", origin=ORIGIN)
    assert part is not None and json.loads(explorer.DATA.findall(part)[0])["origin"] == ORIGIN
