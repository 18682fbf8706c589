"""Prompt templates of the public data sets, and the lookup for all suites.

Source: the prompts that OpenAI published with CLIP (Radford et al., 2021, arXiv:2103.00020);
ImageNet's eighty, also those of TinyImageNet, come with open_clip. EMNIST, FashionMNIST and KMNIST
are not among them: their prompts are those of the authors of arXiv:2405.07813
(github.com/nik-dim/tall_masks), and those of EMNISTLetters are FusionBench's, which are EMNIST's.
"""

from __future__ import annotations

from collections.abc import Callable

from tangent_arithmetic.data.suites import DATASETS, PUBLIC, Suite, get_suite
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

OF_IMAGENET = ("ImageNet", "TinyImageNet")
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
    "EMNIST": ('a photo of the digit character: "{}".',),
    "EMNISTLetters": ('a photo of the digit character: "{}".',),
    "FashionMNIST": ("a photo of a {}.", "a photo of the {}."),
    "FER2013": (
        "a photo of a {} looking face.",
        "a photo of a face showing the emotion: {}.",
        "a photo of a face looking {}.",
        "a face that looks {}.",
        "they look {}.",
        "look at how {} they are.",
    ),
    "Flowers102": ("a photo of a {}, a type of flower.",),
    "Food101": ("a photo of {}, a type of food.",),
    "GTSRB": (
        'a zoomed in photo of a "{}" traffic sign.',
        'a centered photo of a "{}" traffic sign.',
        'a close up photo of a "{}" traffic sign.',
    ),
    "KMNIST": ("a photo of the character {}.",),
    "MNIST": ('a photo of the number: "{}".',),
    "OxfordIIITPet": ("a photo of a {}, a type of pet.",),
    "PCAM": ("this is a photo of {}",),
    "RenderedSST2": ("a {} review of a movie.",),
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
    if home in PUBLIC and name in OF_IMAGENET:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return list(OPENAI_IMAGENET_TEMPLATES)
    known = dict(TEMPLATES) if home in PUBLIC else {}
    if home == "text":
        from tangent_arithmetic.data.text_suite import TEMPLATES as SENTENCES

        known = dict(SENTENCES)
    if home == "embedded":
        from tangent_arithmetic.data.embedded import EMBEDDED_SETS

        known = {n: embedded.templates for n, embedded in EMBEDDED_SETS.items()}
    if name not in known:
        own_names = [each for where, each in DATASETS if where == home]
        imagenet = OF_IMAGENET if home in PUBLIC else ()
        raise unknown("data set", name, [*known, *own_names, *imagenet])
    return [template.format for template in known[name]]
