"""From folders of images to one model for all of them, by the functions behind the command line."""

# ruff: noqa: T201 - an example talks to its reader

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tangent_arithmetic import load_results
from tangent_arithmetic.commands import add, evaluate, finetune, suite


def stripes(rng: np.random.Generator, vertical: bool) -> Image.Image:
    """A picture of noisy stripes."""
    wave = 90 * np.sin(np.arange(48) / rng.uniform(1.5, 3) + rng.uniform(0, 6))
    image = 128 + np.broadcast_to(wave if vertical else wave[:, None], (48, 48))
    noisy = image[..., None] + rng.normal(0, 30, (48, 48, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def halves(rng: np.random.Generator, left: bool) -> Image.Image:
    """A picture whose left or right half is bright."""
    image = rng.normal(90, 30, (48, 48, 3))
    image[:, slice(0, 24) if left else slice(24, 48)] += 90
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def main() -> None:
    """Draws two data sets in the current folder, fine-tunes on each, and adds the vectors."""
    classes = {
        "stripes": (stripes, ("horizontal stripes", "vertical stripes")),
        "halves": (halves, ("bright on the right", "bright on the left")),
    }
    for name, (draw, labels) in classes.items():
        for label, phrase in enumerate(labels):
            folder = Path(name, phrase.replace(" ", "_"))
            folder.mkdir(parents=True)
            for i in range(60):
                rng = np.random.default_rng((label, i))
                draw(rng, bool(label)).save(folder / f"{i:02}.png")

    suite.main(["init", *classes, "--output=mine.yaml"])
    flags = ["--suite=mine.yaml", "--epochs=4", "--device=cpu", "--cache-dir=cache"]
    finetune.main(["--finetuning-mode=linear", *flags])
    for mode in ("none", "linear"):
        evaluate.main([f"--finetuning-mode={mode}", *flags])
    add.main(["--finetuning-mode=linear", *flags])

    frame = load_results("results").query("split == 'test' and metric == 'top1'")
    before = frame[frame["mode"] == "none"].value.mean()
    after = frame[frame["method"] == "addition"].value.mean()
    print(f"one model for both: from {100 * before:.1f} % to {100 * after:.1f} %")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        main()
        os.chdir("/")
