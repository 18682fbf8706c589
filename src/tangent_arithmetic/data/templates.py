"""Prompt templates of the data sets of suite clip8, and the lookup for all suites.

Source: the prompts that OpenAI published with CLIP (Radford et al., 2021, arXiv:2103.00020);
ImageNet's eighty come with open_clip.
"""

from __future__ import annotations

from collections.abc import Callable

from tangent_arithmetic.data.suites import DATASETS, Suite, get_suite
from tangent_arithmetic.runtime.errors import unknown

_TINY_PHOTOS = tuple(
    template.format(article, "{}")
    for article in ("a", "the")
    for template in (
        "a photo of {} {}.",
        "a blurry photo of {} {}.",
        "a black and white photo of {} {}.",
        "a low contrast photo of {} {}.",
        "a high contrast photo of {} {}.",
        "a bad photo of {} {}.",
        "a good photo of {} {}.",
        "a photo of {} small {}.",
        "a photo of {} big {}.",
    )
)
_AERIAL = tuple(
    f"{view} {kind} of {article}{{}}."
    for article in ("", "a ", "the ")
    for kind in ("imagery", "photo", "view")
    for view in ("satellite", "aerial")
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "Cars": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of my {}.",
        "i love my {}!",
        "a photo of my dirty {}.",
        "a photo of my clean {}.",
        "a photo of my new {}.",
        "a photo of my old {}.",
    ),
    "CIFAR10": _TINY_PHOTOS,
    "CIFAR100": _TINY_PHOTOS,
    "DTD": tuple(
        f"a photo of {article} {{}} {noun}."
        for article in ("a", "the")
        for noun in ("texture", "pattern", "thing", "object")
    ),
    "EuroSAT": (
        "a centered satellite photo of {}.",
        "a centered satellite photo of a {}.",
        "a centered satellite photo of the {}.",
    ),
    "Food101": ("a photo of {}, a type of food.",),
    "GTSRB": (
        'a zoomed in photo of a "{}" traffic sign.',
        'a centered photo of a "{}" traffic sign.',
        'a close up photo of a "{}" traffic sign.',
    ),
    "MNIST": ('a photo of the number: "{}".',),
    "RESISC45": _AERIAL,
    "STL10": ("a photo of a {}.", "a photo of the {}."),
    "SUN397": ("a photo of a {}.", "a photo of the {}."),
    "SVHN": ('a photo of the number: "{}".',),
}


def get_templates(name: str, suite: str | Suite = "clip8") -> list[Callable[[str], str]]:
    """The prompts of a data set, each a function of the class name.

    Args:
        name: the data set; `MNISTVal` has the templates of `MNIST`.
        suite: the suite that has it, or its name.

    Raises:
        UsageError: if the suite has no such data set.
    """
    name = name.removesuffix("Val")
    suite = get_suite(suite) if isinstance(suite, str) else suite
    if (own := suite.own(name)) is not None:
        return [template.format for template in own.templates]
    home, name = suite.borrowed.get(name, (suite.name, name))
    if home != suite.name:
        return get_templates(name, home)
    if (home, name) == ("clip8", "ImageNet"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return list(OPENAI_IMAGENET_TEMPLATES)
    known = dict(TEMPLATES) if home == "clip8" else {}
    if home == "embedded":
        from tangent_arithmetic.data.embedded import EMBEDDED_SETS

        known = {n: embedded.templates for n, embedded in EMBEDDED_SETS.items()}
    if name not in known:
        own_names = [each for where, each in DATASETS if where == home]
        imagenet = ["ImageNet"] if home == "clip8" else []
        raise unknown("data set", name, [*known, *own_names, *imagenet])
    return [template.format for template in known[name]]
