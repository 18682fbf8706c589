"""The tangent explorer: what a page holds and shows, against Python, and in a real browser."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tangent_arithmetic.arithmetic.logits import Logits
from tangent_arithmetic.report import explorer
from tangent_arithmetic.runtime.errors import UsageError
from tests.browser import browsing, opened

VECTORS = ("Emoji", "Signs", "a</script><b><!--<script>&lt;\u2028\u2029]]>")
COEFS = [
    (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.3, 0.3, 0.3), (-0.35, 1.15, 0.05), (1.37, -0.9, 2.0),
    (1e-3, 0.0, -1.0),
]  # fmt: skip


def made_up(
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


FOUND = {
    "EmojiVal": made_up(0, 16, 3, of=40),
    "SignsVal": made_up(1, 48, 5, bias=True),
    "ShapesVal": made_up(2, 32, 4, bias=True, normalises=False),
    "Emoji": made_up(3, 25, 3, of=41),
    "Signs": made_up(4, 64, 5, bias=True),
    "Shapes": made_up(5, 64, 4, bias=True, normalises=False),
}
SINGLES = {"EmojiVal": 0.5, "SignsVal": 0.75, "Emoji": 0.4, "Signs": 0.7}
PRESETS = {
    "Zero-shot": {},
    "Sum of all": dict.fromkeys(VECTORS, 1.0),
    "Only Signs": {"Signs": 1.0},
    "Forget Emoji (0.35)": {"Emoji": -0.35},
}


def fragment(key: str = "abc") -> str:
    """The explorer of the made up logits."""
    return explorer.build(FOUND, SINGLES, PRESETS, control="Shapes", key=key)


@pytest.mark.parametrize("coefs", COEFS)
def test_a_page_holds_what_python_computes_with(coefs: tuple[float, ...]) -> None:
    found = explorer.accuracies(fragment(), dict(zip(VECTORS, coefs, strict=True)))
    assert found == {name: logits.accuracy(coefs) for name, logits in FOUND.items()}
    assert len(set(found.values())) > 1


def test_the_classes_do_change_with_the_coefficients() -> None:
    for logits in FOUND.values():
        assert len({tuple(logits.predictions(c).tolist()) for c in COEFS}) == len(COEFS)


def test_numbers_come_back_bit_by_bit() -> None:
    data = json.loads(explorer.DATA.findall(fragment())[0])
    for split in data["splits"]:
        back, logits = explorer._unpacked(split, data["vectors"]), FOUND[split["name"]]
        for kind in explorer.KINDS:
            before, after = getattr(logits, kind), getattr(back, kind)
            assert (before is None) == (after is None)
            assert before is None or (torch.equal(before, after) and before.dtype == after.dtype)
        assert (back.of, split["images"]) == (logits.of, len(logits.labels))


def test_vectors_that_are_not_there() -> None:
    with pytest.raises(UsageError, match=r"no vectors \['Cars'\] in this page; it has \['Emoji'"):
        explorer.accuracies(fragment(), {"Cars": 1.0})
    with pytest.raises(UsageError, match="no tangent explorer"):
        explorer.accuracies("<html></html>", {})


def test_logits_of_different_vectors_are_no_page() -> None:
    other = Logits(**{**vars(FOUND["Emoji"]), "vectors": ("x", "y", "z")})
    with pytest.raises(ValueError, match="too many values"):
        explorer.build({"Emoji": FOUND["Emoji"], "Signs": other})


def test_a_part_is_found_again_by_its_key() -> None:
    own = fragment("abc")
    page = f"<html>{own}<p>more</p></html>"
    assert explorer.part_of(page, "abc") == own
    assert explorer.part_of(page, "abd") is None and explorer.part_of(page, "") is None
    assert explorer.part_of("<html></html>", "abc") is None


def test_a_part_that_is_kept_gets_todays_script() -> None:
    own = fragment("abc")
    older = own.replace('"use strict";', "").replace("Tangent explorer", "Explorer")
    assert older != own and explorer.part_of(older, "abc") == own
    posthoc = explorer.build(FOUND, SINGLES, PRESETS, "Shapes", "posthoc", "abc")
    assert explorer.part_of(posthoc, "abc", "posthoc") == posthoc != own


def test_names_cannot_end_the_script() -> None:
    page = fragment()
    assert len(re.findall("</script>", page)) == 2  # the data's and the program's
    assert not re.search("[<>&\u2028\u2029]", explorer.DATA.findall(page)[0])
    assert json.loads(explorer.DATA.findall(page)[0])["vectors"] == list(VECTORS)


@pytest.mark.parametrize("data", ["<!--<script>", "[" * 100_000, "", '{"a": NaN}'])
def test_a_kept_part_is_written_anew_or_left_out(data: str) -> None:
    own = fragment("abc")
    page = explorer.DATA.sub(lambda m: m[0].replace(m[1], data), own)
    assert data in page and explorer.part_of(page, "abc") is None
    page = explorer.DATA.sub(lambda m: m[0].replace(m[1], '{"a": "<!--<script>"}'), own)
    part = explorer.part_of(page, "abc")
    assert part is not None and "<!--<script>" not in part
    assert json.loads(explorer.DATA.findall(part)[0]) == {"a": "<!--<script>"}


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as found:
        yield found


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    path = tmp_path / "explorer.html"
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8>{fragment()}", encoding="utf-8")
    with opened(browser, path) as found:
        yield found


def of_python(coefs: tuple[float, ...], test: bool) -> dict[str, float]:
    """The accuracies of one split's data sets."""
    return {n: x.accuracy(coefs) for n, x in FOUND.items() if n.endswith("Val") != test}


def of_page(page: Any) -> dict[str, float]:
    """What the page's script found."""
    state = page.evaluate("window.tangentExplorer.state()")
    return {name: one["accuracy"] for name, one in state.items()}


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
    for coefs in COEFS:
        for name, coef in zip(VECTORS, coefs, strict=True):
            page.evaluate("([name, coef]) => window.tangentExplorer.set(name, coef)", [name, coef])
        expected, zeroshot = of_python(coefs, test), of_python((0.0, 0.0, 0.0), test)
        assert of_page(page) == expected
        for (name, value), row in zip(expected.items(), rows(page), strict=True):
            change, logits = value - zeroshot[name], FOUND[name]
            single = SINGLES.get(name)
            number = str(len(logits.labels))
            assert row == [
                name.removesuffix("Val") + (" (control)" if "Shapes" in name else ""),
                f"{100 * value:.1f}",
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
    assert "96 of 120 pictures" in note and "--sample=" in note


def test_sliders_by_keyboard(page: Any) -> None:
    slider = page.get_by_role("slider", name="Signs")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("window.tangentExplorer.coefs()[1] === 0.15")
    page.keyboard.press("Shift+Tab")  # back to the number of the vector before
    page.keyboard.type("1.37")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "explorer-slider-1"
    assert page.evaluate("window.tangentExplorer.coefs()") == [1.37, 0.15, 0.0]
    page.wait_for_function("document.querySelector('#explorer-preset').value === ''")
    page.evaluate("() => new Promise(requestAnimationFrame)")
    assert of_page(page) == of_python((1.37, 0.15, 0.0), test=False)
    assert [row[1] for row in rows(page)] == [
        f"{100 * v:.1f}" for v in of_python((1.37, 0.15, 0.0), test=False).values()
    ]
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
    page.evaluate("() => new Promise(requestAnimationFrame)")
    assert of_page(page) == of_python((-0.4, 0.0, 0.0), test=False)


def test_presets(page: Any) -> None:
    select = page.get_by_label("Preset")
    assert select.input_value() == "Zero-shot"
    for name, point in PRESETS.items():
        select.select_option(name)
        coefs = tuple(point.get(vector, 0.0) for vector in VECTORS)
        assert page.evaluate("window.tangentExplorer.coefs()") == list(coefs)
        assert of_page(page) == of_python(coefs, test=False)
        assert [row[1] for row in rows(page)] == [
            f"{100 * v:.1f}" for v in of_python(coefs, test=False).values()
        ]
        values = page.locator("input[type=number]").evaluate_all("all => all.map(i => +i.value)")
        assert values == list(coefs)


def test_the_test_split_is_read_on_demand(page: Any) -> None:
    data = "JSON.parse(document.querySelector('#explorer-data').textContent)"
    assert {s["split"] for s in page.evaluate(data)["splits"]} == {"validation", "test"}
    assert list(of_page(page)) == ["EmojiVal", "SignsVal", "ShapesVal"]
    page.get_by_role("radio", name="test").check()
    assert list(of_page(page)) == ["Emoji", "Signs", "Shapes"]


def test_a_page_without_a_test_split(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "explorer.html"
    only = {name: logits for name, logits in FOUND.items() if not name.endswith("Val")}
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8>{explorer.build(only)}", encoding="utf-8")
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
    head = "<!DOCTYPE html><meta name=viewport content='width=device-width'><meta charset=utf-8>"
    path.write_text(head + fragment(), encoding="utf-8")
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
