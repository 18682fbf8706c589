"""Noisy captions of the pre-training pool.

As on the web, a caption may use a synonym, name only the category, or belong to another image.
Images in the style of the tasks are rare in the pool and mostly have vague captions: pre-training
sees their features but associates them only loosely with words, which leaves room for fine-tuning.
"""

from __future__ import annotations

from tangent_arithmetic.data.embedded.drawing import Rng, pick

WRONG = 0.03  # fraction of captions that belong to another image
VAGUE = 0.12  # fraction of captions that name only the category
RARE = 0.15  # fraction of a family's images in the style of a task
VAGUE_IF_RARE = 0.6  # fraction of vague captions among those

OPENINGS = (
    "a photo of {}.",
    "a picture of {}.",
    "an image of {}.",
    "a drawing of {}.",
    "{}.",
    "{}",
    "a photo of the {}.",
    "this is {}.",
    "a small picture of {}.",
    "a blurry photo of {}.",
)
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
    "orchard": ("orchard", "fruit trees", "plantation"),
    "polka dots": ("polka dots", "polka dot", "dotted"),
    "checkerboard": ("checkerboard", "checkered", "chess board"),
    "spots": ("spots", "spotted"),
    "cracks": ("cracks", "cracked"),
    "waves": ("waves", "wavy"),
    "bricks": ("bricks", "brick wall"),
    "sneaker": ("sneaker", "sports shoe"),
    "trousers": ("trousers", "pants"),
    "pullover": ("pullover", "sweater"),
    "t-shirt": ("t-shirt", "tee shirt", "top"),
    "ankle boot": ("ankle boot", "boot"),
    "bag": ("bag", "handbag"),
    "no entry": ("no entry", "do not enter"),
    "yield": ("yield", "give way"),
    "dead end": ("dead end", "no through road"),
    "turn left": ("turn left", "left turn"),
    "turn right": ("turn right", "right turn"),
    "go straight": ("go straight", "straight ahead"),
}
KINDS = {  # word -> categories used in vague captions
    "t-shirt": ("top", "piece of clothing"),
    "trousers": ("piece of clothing", "something to wear"),
    "pullover": ("top", "piece of clothing"),
    "dress": ("piece of clothing", "something to wear"),
    "coat": ("jacket", "piece of clothing"),
    "sandal": ("shoe", "something to wear"),
    "shirt": ("top", "piece of clothing"),
    "sneaker": ("shoe", "something to wear"),
    "bag": ("thing in a shop", "accessory"),
    "ankle boot": ("shoe", "something to wear"),
    "forest": ("green land", "vegetation"),
    "crop fields": ("land", "a landscape"),
    "lake": ("water", "a landscape"),
    "river": ("water", "a landscape"),
    "highway": ("a landscape", "land with a line"),
    "houses": ("buildings", "a built-up area"),
    "factories": ("buildings", "a built-up area"),
    "orchard": ("vegetation", "land"),
    "horizontal stripes": ("striped", "lines"),
    "vertical stripes": ("striped", "lines"),
    "diagonal stripes": ("striped", "lines"),
    "checkerboard": ("squares", "regular"),
    "polka dots": ("round", "regular"),
    "grid": ("lines", "regular"),
    "bricks": ("squares", "lines"),
    "waves": ("lines", "curved"),
    "zigzag": ("lines", "jagged"),
    "rings": ("round", "curved"),
    "grainy": ("rough", "irregular"),
    "cloudy": ("soft", "irregular"),
    "spots": ("round", "irregular"),
    "cracks": ("rough", "irregular"),
    "triangles": ("jagged", "regular"),
    "crosshatch": ("lines", "regular"),
}


def say(rng: Rng, word: str) -> str:
    """The word or a synonym."""
    return pick(rng, SYNONYMS.get(word, (word,)))


def noun_for(rng: Rng, word: str, rare: bool) -> str:
    """The word or a synonym, or a category of the word in vague captions."""
    return pick(rng, KINDS[word]) if is_vague(rng, rare) else say(rng, word)


def is_rare(rng: Rng) -> bool:
    """Draws whether the next image has the style of a task."""
    return bool(rng.random() < RARE)


def is_vague(rng: Rng, rare: bool = False) -> bool:
    """Draws whether the next caption names only the category."""
    return bool(rng.random() < (VAGUE_IF_RARE if rare else VAGUE))


def caption(rng: Rng, *phrases: str) -> str:
    """One of the phrases in a sentence."""
    return pick(rng, OPENINGS).format(pick(rng, phrases))


def plural(phrase: str) -> str:
    """The plural."""
    return phrase + ("es" if phrase.endswith(("s", "x")) else "s")
