"""CIFAR-100: a hundred types of objects, 32 x 32 pixels; the fine labels.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

from pathlib import Path

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip8.cifar10 import read_batches
from tangent_arithmetic.data.clip8.folders import listed

CLASSES = listed(
    """
    apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge,
    bus, butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud,
    cockroach, couch, crab, crocodile, cup, dinosaur, dolphin, elephant, flatfish, forest, fox,
    girl, hamster, house, kangaroo, keyboard, lamp, lawn mower, leopard, lion, lizard, lobster, man,
    maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, otter, palm tree,
    pear, pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray,
    road, rocket, rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel,
    streetcar, sunflower, sweet pepper, table, tank, telephone, television, tiger, tractor, train,
    trout, tulip, turtle, wardrobe, whale, willow tree, wolf, woman, worm
    """
)


def load(location: Path) -> Splits:
    """Reads `cifar-100-python/` below `location`."""
    from torchvision.datasets import CIFAR100

    return read_batches("CIFAR100", CIFAR100, location)
