"""Prompts of the data sets: their published number, order and wording."""

from __future__ import annotations

import pytest

from tangent_arithmetic.data.clip20 import PUBLIC_SETS
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.data.templates import OF_IMAGENET, TEMPLATES, get_templates
from tangent_arithmetic.runtime.errors import UsageError

COUNTS = {"Cars": 8, "CIFAR10": 18, "CIFAR100": 18, "DTD": 8, "EuroSAT": 3, "Food101": 1}
COUNTS |= {"GTSRB": 3, "ImageNet": 80, "MNIST": 1, "RESISC45": 18, "STL10": 2, "SUN397": 2}
COUNTS |= {"SVHN": 1, "EMNIST": 1, "EMNISTLetters": 1, "FashionMNIST": 2, "FER2013": 6}
COUNTS |= {"Flowers102": 1, "KMNIST": 1, "OxfordIIITPet": 1, "PCAM": 1, "RenderedSST2": 1}
COUNTS |= {"TinyImageNet": 80}


def test_number_of_prompts_and_places_for_the_class_name() -> None:
    assert {*TEMPLATES, *OF_IMAGENET} == set(COUNTS) == set(PUBLIC_SETS)
    for name, count in COUNTS.items():
        texts = [template("<class>") for template in get_templates(name)]
        assert len(set(texts)) == count
        assert all(text.count("<class>") == 1 and "{" not in text for text in texts)


@pytest.mark.parametrize(
    ("name", "index", "text"),
    [
        ("Cars", 3, "i love my x!"),
        ("CIFAR10", 0, "a photo of a x."),
        ("CIFAR10", 7, "a photo of a small x."),
        ("CIFAR100", 9, "a photo of the x."),
        ("CIFAR100", 17, "a photo of the big x."),
        ("DTD", 3, "a photo of a x object."),
        ("DTD", 4, "a photo of the x texture."),
        ("EuroSAT", 1, "a centered satellite photo of a x."),
        ("EMNIST", 0, 'a photo of the digit character: "x".'),
        ("EMNISTLetters", 0, 'a photo of the digit character: "x".'),
        ("FashionMNIST", 1, "a photo of the x."),
        ("FER2013", 0, "a photo of a x looking face."),
        ("FER2013", 5, "look at how x they are."),
        ("Flowers102", 0, "a photo of a x, a type of flower."),
        ("Food101", 0, "a photo of x, a type of food."),
        ("KMNIST", 0, "a photo of the character x."),
        ("OxfordIIITPet", 0, "a photo of a x, a type of pet."),
        ("PCAM", 0, "this is a photo of x"),
        ("RenderedSST2", 0, "a x review of a movie."),
        ("GTSRB", 0, 'a zoomed in photo of a "x" traffic sign.'),
        ("ImageNet", 0, "a bad photo of a x."),
        ("ImageNet", 79, "a tattoo of the x."),
        ("MNIST", 0, 'a photo of the number: "x".'),
        ("RESISC45", 1, "aerial imagery of x."),
        ("RESISC45", 2, "satellite photo of x."),
        ("RESISC45", 17, "aerial view of the x."),
        ("STL10", 1, "a photo of the x."),
        ("SUN397", 0, "a photo of a x."),
        ("SVHN", 0, 'a photo of the number: "x".'),
        ("TinyImageNet", 79, "a tattoo of the x."),
    ],
)
def test_wording_and_order(name: str, index: int, text: str) -> None:
    """Samples of the published lists; the validation split has the same prompts."""
    assert get_templates(name)[index]("x") == text
    assert get_templates(f"{name}Val")[index]("x") == text


def test_embedded_data_sets_have_their_own_prompts() -> None:
    for name, entry in EMBEDDED_SETS.items():
        expected = [template.replace("{}", "x") for template in entry.templates]
        assert [template("x") for template in get_templates(f"{name}Val", "embedded")] == expected
    assert get_templates("MNIST")[0]("3") != get_templates("MNIST", "embedded")[0]("3")


@pytest.mark.parametrize(
    ("name", "suite", "message"),
    [
        ("EuroSATs", "clip8", "unknown data set 'EuroSATs'; choose from EuroSAT, "),
        ("Imagenet", "clip8", "unknown data set 'Imagenet'; choose from ImageNet, "),
        ("Cars", "embedded", r"unknown data set 'Cars'; choose from .*Emoji"),
        ("Cars", "clip", "unknown suite 'clip'; choose from clip8, clip14, clip20, "),
    ],
)
def test_unknown_names_list_the_nearest_first(name: str, suite: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get_templates(name, suite)
