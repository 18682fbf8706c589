"""The tangent explorer: its data and display, against Python and in a real browser."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tangent_arithmetic.arithmetic.logits import Logits
from tangent_arithmetic.report import explorer, packing
from tangent_arithmetic.runtime.errors import UsageError
from tests.browser import opened

VECTORS = ("Emoji", "Signs", "a</script><b><!--<script>&lt;\u2028\u2029]]>")
COEFS = [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.3, 0.3, 0.3), (-0.35, 1.15, 0.05), (1.37, -0.9, 2.0)]


def random_logits(
    seed: int, images: int, classes: int, bias: bool = False, normalises: bool = True, of: int = 0
) -> Logits:
    """Random logits whose classes change with the coefficients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    parts = draw(images, 1 + len(VECTORS), 6, dtype=torch.float64)
    return Logits(
        dataset="",
        vectors=VECTORS,
        base=draw(images, classes),
        steps=draw(len(VECTORS), images, classes),
        labels=torch.randint(classes, (images,), generator=generator),
        bias=draw(classes) if bias else None,
        gram=parts @ parts.transpose(1, 2) if bias and normalises else None,
        of=of or images,
    )


LOGITS = {
    "EmojiVal": random_logits(0, 16, 3, of=40),
    "SignsVal": random_logits(1, 48, 5, bias=True),
    "ShapesVal": random_logits(2, 32, 4, bias=True, normalises=False),
    "Emoji": random_logits(3, 25, 3, of=41),
    "Signs": random_logits(4, 64, 5, bias=True),
    "Shapes": random_logits(5, 64, 4, bias=True, normalises=False),
}
SINGLES = {"EmojiVal": 0.5, "SignsVal": 0.75, "Emoji": 0.4, "Signs": 0.7}
PRESETS = {
    "Zero-shot": {},
    "Sum of all": dict.fromkeys(VECTORS, 1.0),
    "Only Signs": {"Signs": 1.0},
    "Forget Emoji (0.35)": {"Emoji": -0.35},
}


def fragment(key: str = "abc") -> str:
    """The explorer of `LOGITS`."""
    return explorer.build(LOGITS, SINGLES, PRESETS, control="Shapes", key=key)


@pytest.mark.parametrize("coefs", COEFS)
def test_python_computes_the_same_accuracies_from_a_page(coefs: tuple[float, ...]) -> None:
    shown = explorer.accuracies(fragment(), dict(zip(VECTORS, coefs, strict=True)))
    assert shown == {name: logits.accuracy(coefs) for name, logits in LOGITS.items()}
    assert len(set(shown.values())) > 1


def test_numbers_in_a_page_are_exact() -> None:
    data = json.loads(explorer.DATA.findall(fragment())[0])
    for split in data["splits"]:
        logits = LOGITS[split["name"]]
        assert len({tuple(logits.predictions(c).tolist()) for c in COEFS}) == len(COEFS)
        assert (split["of"], split["images"]) == (logits.of, len(logits.labels))
        for kind, dtype in packing.KINDS.items():
            value, text = getattr(logits, kind), split[kind]
            assert (value is None) == (text is None)
            if value is not None:
                numbers = np.frombuffer(base64.b64decode(text), dtype)
                assert np.array_equal(numbers, value.numpy().ravel())


def test_other_vectors_and_other_pages_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no vectors \['Cars'\] in this page; it has \['Emoji'"):
        explorer.accuracies(fragment(), {"Cars": 1.0})
    with pytest.raises(UsageError, match="no tangent explorer"):
        explorer.accuracies("<html></html>", {})
    other = replace(LOGITS["Emoji"], vectors=("x", "y", "z"))
    with pytest.raises(ValueError, match="too many values"):
        explorer.build({"Emoji": LOGITS["Emoji"], "Signs": other})


def test_an_explorer_is_found_by_its_key_and_gets_the_current_script() -> None:
    own = fragment("abc")
    page = f"<html>{own}<p>more</p></html>"
    assert explorer.part_of(page, "abc") == own
    assert explorer.part_of(page, "abd") is None and explorer.part_of(page, "") is None
    assert explorer.part_of("<html></html>", "abc") is None
    older = own.replace('"use strict";', "").replace("Tangent explorer", "Explorer")
    assert older != own and explorer.part_of(older, "abc") == own
    posthoc = explorer.build(LOGITS, SINGLES, PRESETS, "Shapes", "posthoc", "abc")
    assert explorer.part_of(posthoc, "abc", "posthoc") == posthoc != own


def test_names_cannot_end_the_script() -> None:
    page = fragment()
    assert len(re.findall("</script>", page)) == 2  # the data's and the program's
    assert not re.search("[<>&\u2028\u2029]", explorer.DATA.findall(page)[0])
    assert json.loads(explorer.DATA.findall(page)[0])["vectors"] == list(VECTORS)


@pytest.mark.parametrize("data", ["<!--<script>", "[" * 100_000, "", '{"a": NaN}'])
def test_a_damaged_explorer_is_dropped_and_another_escaped(data: str) -> None:
    own = fragment("abc")
    page = explorer.DATA.sub(lambda m: m[0].replace(m[1], data), own)
    assert data in page and explorer.part_of(page, "abc") is None
    page = explorer.DATA.sub(lambda m: m[0].replace(m[1], '{"a": "<!--<script>"}'), own)
    part = explorer.part_of(page, "abc")
    assert part is not None and "<!--<script>" not in part
    assert json.loads(explorer.DATA.findall(part)[0]) == {"a": "<!--<script>"}


# --- in a browser

HEAD = "<!DOCTYPE html><meta name=viewport content='width=device-width'><meta charset=utf-8>"


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    path = tmp_path / "explorer.html"
    path.write_text(HEAD + fragment(), encoding="utf-8")
    with opened(browser, path) as explorer_page:
        yield explorer_page


def of_python(coefs: tuple[float, ...], test: bool) -> dict[str, float]:
    """The accuracies of one split's data sets."""
    return {n: x.accuracy(coefs) for n, x in LOGITS.items() if n.endswith("Val") != test}


def of_page(page: Any) -> dict[str, float]:
    """The accuracies computed by the page's script."""
    state = page.evaluate("window.tangentExplorer.state()")
    return {name: one["accuracy"] for name, one in state.items()}


def error(value: float, name: str) -> float:
    """The binomial standard error of an accuracy."""
    return math.sqrt(value * (1 - value) / len(LOGITS[name].labels))


def rows(page: Any) -> list[list[str]]:
    """The table as one reads it, without the bars."""
    texts = page.locator("#explorer-rows tr").evaluate_all(
        "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
    )
    return [[*row[:1], *row[2:]] for row in texts]


@pytest.mark.parametrize("test", [False, True])
def test_the_pages_numbers_are_pythons(page: Any, test: bool) -> None:
    if test:
        page.get_by_role("radio", name="test").check()
    assert list(of_page(page)) == [name for name in LOGITS if name.endswith("Val") != test]
    for coefs in COEFS:
        for name, coef in zip(VECTORS, coefs, strict=True):
            page.evaluate("([name, coef]) => window.tangentExplorer.set(name, coef)", [name, coef])
        expected, zeroshot = of_python(coefs, test), of_python((0.0, 0.0, 0.0), test)
        assert of_page(page) == expected
        for (name, value), row in zip(expected.items(), rows(page), strict=True):
            change, logits = value - zeroshot[name], LOGITS[name]
            single = SINGLES.get(name)
            number = str(len(logits.labels))
            assert row == [
                name.removesuffix("Val") + (" (control)" if "Shapes" in name else ""),
                f"{100 * value:.1f} \u00b1 {100 * error(value, name):.1f}",
                ("+" if change >= 0 else "\u2212") + f"{100 * abs(change):.1f}",
                "\u2013" if single is None else f"{100 * (value / single):.1f}",
                number if logits.of == len(logits.labels) else f"{number} of {logits.of}",
            ]


def test_the_mean_is_of_the_tasks_alone(page: Any) -> None:
    values = of_python((0.0, 0.0, 0.0), test=False)
    mean = (values["EmojiVal"] + values["SignsVal"]) / 2
    normalised = (values["EmojiVal"] / 0.5 + values["SignsVal"] / 0.75) / 2
    text = page.locator("#explorer-summary").text_content()
    assert text == (
        f"Mean of 2 tasks: {100 * mean:.1f} % (+0.0 from zero-shot), "
        f"normalised {100 * normalised:.1f} %."
    )
    assert page.locator("#explorer-summary").get_attribute("aria-live") == "polite"
    note = page.locator("#explorer-note").text_content()
    assert "96 of 120 examples" in note and "--sample=" in note


def test_sliders_by_keyboard(page: Any) -> None:
    slider = page.get_by_role("slider", name="Signs")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("window.tangentExplorer.coefs()[1] === 0.15")
    page.keyboard.press("Shift+Tab")  # back to the number of the vector before
    assert page.evaluate("document.activeElement.dataset.vector") == "0"
    page.keyboard.type("1.37")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "explorer-slider-1"
    assert page.evaluate("window.tangentExplorer.coefs()") == [1.37, 0.15, 0.0]
    page.wait_for_function("document.querySelector('#explorer-preset').value === ''")
    page.evaluate("() => new Promise(requestAnimationFrame)")
    expected = of_python((1.37, 0.15, 0.0), test=False)
    assert of_page(page) == expected
    shown = [row[1].split(" ")[0] for row in rows(page)]
    assert shown == [f"{100 * v:.1f}" for v in expected.values()]
    page.keyboard.press("End")
    page.wait_for_function("window.tangentExplorer.coefs()[1] === 2")
    page.keyboard.press("Home")
    page.wait_for_function("window.tangentExplorer.coefs()[1] === -1")


def test_sliders_by_mouse_and_by_number(page: Any) -> None:
    slider = page.get_by_role("slider", name="Emoji")
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2)
    page.wait_for_function("window.tangentExplorer.coefs()[0] > 1.2")
    number = page.get_by_role("spinbutton", name="coefficient of Emoji")
    assert float(number.input_value()) == page.evaluate("window.tangentExplorer.coefs()[0]")
    number.fill("-0.4")
    page.wait_for_function("window.tangentExplorer.coefs()[0] === -0.4")
    assert slider.input_value() == "-0.4"
    number.fill("")  # half typed: the last number stands
    page.evaluate("() => new Promise(requestAnimationFrame)")
    assert page.evaluate("window.tangentExplorer.coefs()[0]") == -0.4
    assert of_page(page) == of_python((-0.4, 0.0, 0.0), test=False)


def test_presets(page: Any) -> None:
    select = page.get_by_label("Preset")
    assert select.input_value() == "Zero-shot"
    for name, point in PRESETS.items():
        select.select_option(name)
        coefs = tuple(point.get(vector, 0.0) for vector in VECTORS)
        assert page.evaluate("window.tangentExplorer.coefs()") == list(coefs)
        assert of_page(page) == of_python(coefs, test=False)
        numbers = page.locator("#explorer-sliders .tx-slider:not(.tx-all) input[type=number]")
        assert numbers.evaluate_all("all => all.map(i => +i.value)") == list(coefs)


def test_a_page_without_a_test_split(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "explorer.html"
    only = {name: logits for name, logits in LOGITS.items() if not name.endswith("Val")}
    path.write_text(HEAD + explorer.build(only), encoding="utf-8")
    with opened(browser, path) as page:
        assert page.get_by_role("radio", name="validation").is_disabled()
        assert of_page(page) == of_python((0.0, 0.0, 0.0), test=True)


def luminance(colour: str) -> float:
    """WCAG's relative luminance of a CSS colour rgb(r, g, b)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(
    ("scheme", "width"), list(itertools.product(["light", "dark"], [360, 1280]))
)
def test_readable_at_any_width_by_day_and_by_night(
    browser: Any, tmp_path: Path, scheme: str, width: int
) -> None:
    path = tmp_path / "explorer.html"
    path.write_text(HEAD + fragment(), encoding="utf-8")
    size = {"width": width, "height": 740}
    with opened(browser, path, viewport=size, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = page.locator("input[type=range], select, input[type=number]").evaluate_all(
            "all => all.map(i => i.getBoundingClientRect().toJSON())"
        )
        assert all(box["right"] <= width and box["height"] >= 24 for box in boxes), boxes
        sizes = page.locator("#explorer td, #explorer th, #explorer label").evaluate_all(
            "all => all.map(i => parseFloat(getComputedStyle(i).fontSize))"
        )
        assert min(sizes) >= 12
        ink, back = page.locator(".tx-results").evaluate(
            "box => [getComputedStyle(box).color, getComputedStyle(box).backgroundColor]"
        )
        low, high = sorted((luminance(ink), luminance(back)))
        assert (high + 0.05) / (low + 0.05) >= 7
