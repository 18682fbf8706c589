"""Small, odd and hard data sets, from files to results, by the commands that a user types."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tangent_arithmetic.commands import add, analyze, evaluate, finetune, negate
from tangent_arithmetic.report.explorer import accuracies
from tangent_arithmetic.run.frames import load_results

COLOURS = {"red circle": (220, 40, 40), "green square": (40, 160, 60), "blue line": (40, 60, 220)}


def picture(labels: Sequence[str], seed: int, mode: str = "RGB") -> Image.Image:
    """A light image with a shape for each label."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (32, 32), tuple(int(v) for v in rng.integers(200, 255, 3)))
    draw = ImageDraw.Draw(image)
    for label in labels:
        x, y = (int(v) for v in rng.integers(2, 18, 2))
        box = (x, y, x + 11, y + 11)
        if "line" in label:
            draw.line(box, COLOURS[label], width=3)
        elif "circle" in label:
            draw.ellipse(box, COLOURS[label])
        else:
            draw.rectangle(box, COLOURS[label])
    return image.convert(mode)


def several_labels(folder: Path, images: int = 24) -> str:
    """A CSV of images with none, one or several labels."""
    folder.mkdir()
    rows, names = [], list(COLOURS)
    for i in range(images):
        labels = [name for bit, name in enumerate(names) if i >> bit & 1]
        picture(labels, i).save(folder / f"{i}.png")
        rows.append((f"{folder.name}/{i}.png", "|".join(labels), "train" if i < 16 else "test"))
    table = folder.with_suffix(".csv")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "split"), *rows])
    return str(table)


def folders(folder: Path, sizes: dict[str, tuple[int, int]], mode: str = "RGB") -> str:
    """Class folders below train and test, with so many images each."""
    for split, at in (("train", 0), ("test", 1)):
        for k, (name, counts) in enumerate(sizes.items()):
            place = folder / split / name
            place.mkdir(parents=True)
            known = name if name in COLOURS else list(COLOURS)[k % 3]
            for i in range(counts[at]):
                picture([known], 1000 * at + 100 * k + i, mode).save(place / f"{i}.png")
    return str(folder)


ODD: dict[str, Callable[[Path], str]] = {
    "several": several_labels,
    "uneven": lambda p: folders(
        p, {"red circle": (9, 6), "green square": (3, 2), "blue line": (1, 1)}
    ),
    "single": lambda p: folders(p, {"red circle": (4, 3)}),
    "tiny": lambda p: folders(p, {"red circle": (2, 1), "green square": (1, 1)}),
    "gray": lambda p: folders(p, {"red circle": (4, 2), "green square": (4, 2)}, "L"),
    "many": lambda p: folders(p, {f"thing {k}": (1, 1) for k in range(100)}),
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def common(root: Path, names: Sequence[str]) -> list[str]:
    """Flags that every command takes."""
    sources = [f"{name}={ODD[name](root / name)}" for name in names]
    return [
        f"--tasks={','.join(sources)}",
        "--device=cpu",
        "--num-workers=0",
        f"--cache-dir={root}/cache",
    ]


def results(root: Path, name: str) -> dict[str, Any]:
    (path,) = root.rglob(f"{name}.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("name", [n for n in ODD if n != "several"])
def test_an_odd_set_is_trained_and_evaluated(root: Path, name: str, capsys: Any) -> None:
    flags = [*common(root, [name]), "--finetuning-mode=linear"]
    assert finetune.main([*flags, "--epochs=1", "--batch-size=4"]) == 0
    assert evaluate.main(flags) == 0
    found = results(root, "linear_ft_accuracies")
    assert found[f"{name}:balanced"] <= 1 and 0 <= found[name] <= 1
    if name == "single":
        assert found[name] == found[f"{name}:balanced"] == 1.0
    if name == "gray":  # equal classes
        assert found[name] == pytest.approx(found[f"{name}:balanced"])


def test_sets_of_both_kinds_go_through_the_whole_benchmark(root: Path, capsys: Any) -> None:
    flags = common(root, ["several", "uneven"])
    linear = [*flags, "--finetuning-mode=linear", "--n-eval-points=3"]
    assert finetune.main([*linear, "--epochs=2", "--batch-size=8", "--lr=1e-3"]) == 0
    assert evaluate.main([*flags, "--finetuning-mode=none"]) == 0
    assert evaluate.main(linear) == 0
    assert "mean average precision, not accuracy: several" in capsys.readouterr().out
    assert add.main(linear) == 0
    summed, singles = results(root, "linear_additions"), results(root, "linear_ft_accuracies")
    test = summed["test"]
    assert "several:top1" not in test and singles["several:map"] == singles["several"]
    assert test["avg_top1"] == pytest.approx((test["several:map"] + test["uneven:top1"]) / 2)
    normalised = test["several:map"] / singles["several"]
    assert test["several:normalized_map"] == pytest.approx(normalised)

    assert analyze.main(["report", *linear]) == 0
    (page,) = root.rglob("report.html")
    coef = summed["coefficient"]
    shown = accuracies(page.read_text(), {"several": coef, "uneven": coef})
    assert shown["several"] == pytest.approx(test["several:map"], abs=1e-5)
    assert shown["uneven"] == pytest.approx(test["uneven:top1"], abs=1e-12)

    forgotten = [f"--tasks=uneven={root / 'uneven'}", *linear[1:]]
    assert negate.main([*forgotten, f"--control-dataset=several={root / 'several.csv'}"]) == 0
    metrics = results(root, "linear_negations")["uneven"]["val"]["0.0"]
    assert "severalVal:map" in metrics and "unevenVal:balanced" in metrics
    table = load_results(root / "results")
    assert set(table[table["task"] == "several"]["metric"]) >= {"map", "normalized_map"}
