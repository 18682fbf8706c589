"""Own texts through all commands, with a tiny model of `transformers`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from safetensors import safe_open

from tangent_arithmetic.commands import add, combine, evaluate, finetune, negate, reproduce
from tests.sentences import model_folder

GOOD, BAD = ("good", "great", "lovely", "fine"), ("bad", "awful", "poor", "sad")
SUBJECTS = {"films": ("movie", "plot", "actor"), "phones": ("phone", "screen", "battery")}


def table(folder: Path, name: str, subjects: tuple[str, ...]) -> Path:
    """Reviews whose label follows from a word."""
    draw, rows = random.Random(name), ["text,label"]
    seen: set[str] = set()
    while len(rows) < 81:
        words = [draw.choice(("the", "a", "this")), draw.choice(subjects), "is", "very"]
        label = len(rows) % 2
        words.insert(draw.randrange(5), draw.choice((BAD, GOOD)[label]))
        text = " ".join(words + ["!"] * draw.randrange(6))
        if text not in seen:
            seen.add(text)
            rows.append(f"{text},{('negative', 'positive')[label]}")
    path = folder / f"{name}.csv"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("texts")
    tasks = ",".join(f"{n}={table(root, n, words)}" for n, words in SUBJECTS.items())
    control = table(root, "food", ("soup", "cake", "taste"))
    return [
        f"--model=transformers:{model_folder(root / 'model')}",
        f"--tasks={tasks}",
        f"--control-dataset=food={control}",
        "--template=this review is {} .",
        "--epochs=3",
        "--batch-size=8",
        "--lr=3e-3",
        "--warmup-length=1",
        "--n-eval-points=5",
        "--device=cpu",
        "--num-workers=0",
        f"--save={root / 'checkpoints'}",
        f"--results={root / 'results'}",
        f"--cache-dir={root / 'cache'}",
    ]


def results(flags: list[str], name: str) -> dict[str, object]:
    root = Path(next(flag for flag in flags if flag.startswith("--results=")).partition("=")[2])
    (path,) = root.rglob(name)
    content: dict[str, object] = json.loads(path.read_text())
    return content


@pytest.mark.parametrize("mode, prefix", [("standard", ""), ("linear", "linear_")])
def test_fine_tune_add_and_negate(mode: str, prefix: str, flags: list[str]) -> None:
    chosen = [*flags, f"--finetuning-mode={mode}"]
    assert evaluate.main([*flags, "--finetuning-mode=none"]) == 0
    for main in (finetune.main, evaluate.main, add.main, negate.main):
        assert main(chosen) == 0
    single = results(flags, f"{prefix}ft_accuracies.json")
    zeroshot = results(flags, "zeroshot_accuracies.json")
    for task in SUBJECTS:
        assert float(str(single[task])) >= float(str(zeroshot[task]))
    assert results(flags, f"{prefix}additions.json")["test"]
    assert results(flags, f"{prefix}negations.json").keys() >= {*SUBJECTS}


def test_regularised_solved_and_posthoc(flags: list[str]) -> None:
    assert evaluate.main([*flags, "--finetuning-mode=none"]) == 0
    for objective in ("taujp", "tak"):
        chosen = [*flags, "--finetuning-mode=linear", f"--objective={objective}"]
        for main in (finetune.main, evaluate.main, add.main):
            assert main(chosen) == 0
    assert combine.main(chosen) == 0
    for mode in ("standard", "posthoc"):
        main = finetune.main if mode == "standard" else evaluate.main
        assert main([*flags, f"--finetuning-mode={mode}"]) == 0
    assert results(flags, "posthoc_ft_accuracies.json")


def test_a_model_of_images_is_refused(flags: list[str], tmp_path: Path) -> None:
    chosen = [flag for flag in flags if not flag.startswith(("--model", "--save", "--results"))]
    extra = [f"--save={tmp_path}", f"--results={tmp_path}", "--finetuning-mode=none"]
    assert evaluate.main([*chosen, "--model=ViT-Nano-8", *extra]) == 2


def test_the_checkpoint_names_the_model(flags: list[str]) -> None:
    root = next(flag for flag in flags if flag.startswith("--save=")).partition("=")[2]
    assert finetune.main([*flags, "--finetuning-mode=standard"]) == 0
    with safe_open(Path(root) / "filmsVal" / "finetuned.safetensors", "pt") as file:
        assert "transformers:" in str(file.metadata())


OWN = """
import torch
from torch import nn

class Letters:
    reads_texts = True

    def __call__(self, text):
        return torch.tensor([ord(letter) % 64 for letter in text])

class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 24)

    def forward(self, ids):
        mask = (ids >= 0).float()[..., None]
        return (self.embedding(ids.clamp(min=0)) * mask).sum(1)

def build():
    return Bag(), Letters()
"""


def test_an_encoder_of_one_s_own(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_texts.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    kept = [f for f in flags if not f.startswith(("--model", "--save", "--results", "--template"))]
    own = ["--model=python:own_texts:build", "--save=checkpoints", "--results=results"]
    assert finetune.main([*kept, *own, "--finetuning-mode=linear"]) == 0
    assert evaluate.main([*kept, *own, "--finetuning-mode=linear"]) == 0


@pytest.mark.slow
def test_the_suite_in_miniature(tmp_path: Path) -> None:
    """Real texts and the embedded CLIP's text tower, from nothing to the page."""
    root = Path(__file__).parents[1] / "data" / "text_miniature"
    argv = [
        "--suite=text",
        "--model=text-tower:ViT-Nano-8",
        "--modes=standard,linear,posthoc",
        "--tasks=Movies,Tweets",
        f"--data-location={root}",
        "--n-eval-points=3",
        "--device=cpu",
        f"--save={tmp_path / 'checkpoints'}",
        f"--results={tmp_path / 'results'}",
        f"--cache-dir={tmp_path / 'cache'}",
    ]
    assert reproduce.main(argv) == 0
    found = {path.name for path in (tmp_path / "results" / "text").rglob("*.json")}
    sums = {"additions-Movies+Tweets.json", "posthoc_additions-Movies+Tweets.json"}
    assert sums | {"linear_negations.json"} <= found
    assert list((tmp_path / "results").rglob("report.html"))
