"""The model card of a merged folder: licences, and a command that makes the model again."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tangent_arithmetic import merging
from tangent_arithmetic.commands import merge
from tangent_arithmetic.merging import Algorithm, CLIPVisionModelPool, ModelPool
from tangent_arithmetic.merging.cards import licence_of
from tangent_arithmetic.merging.compressed import Compressed
from tests.merging.makers import layers

NAMES = ("_pretrained_", "a", "stanford-cars")


def folders(root: Path, *licences: str) -> dict[str, Path]:
    """Models with model cards; the last licence counts for the others."""
    root.mkdir(exist_ok=True)
    places = {name: root / f"models of {name}" for name in NAMES}
    for seed, (name, place) in enumerate(places.items()):
        place.mkdir()
        odd = {name: torch.full((3,), float(seed)) for name in ("a.b c", "h.0", "h.1")}
        save_file({**layers(seed), **odd}, str(place / "model.safetensors"))
        licence = licences[min(seed, len(licences) - 1)] if licences else None
        if licence:
            (place / "README.md").write_text(f"---\nlicense: {licence}\n---\n# {name}\n")
    return places


def front_matter(text: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return content


def written(algorithm: Algorithm, models: Any, folder: Path) -> str:
    return (algorithm.run_to(models, folder) / "README.md").read_text()


@pytest.mark.parametrize(
    "algorithm",
    [
        merging.TaskArithmeticAlgorithm(0.4),
        merging.SimpleAverageAlgorithm(),
        merging.TaskSingularVectorMerging(alpha=[0.5, 2.0], exclude_keys=["layer0", "a.b c"]),
        merging.KnotsAlgorithm(0.5, inner_options={"threshold": 50, "merge_func": "mean"}),
        merging.TiesMergingAlgorithm(0.3, plugins=["normalise", {"lines": {"beta": 0.2}}]),
        merging.DellaAlgorithm(seed=3),
    ],
    ids=repr,
)
def test_the_command_makes_the_same_model(
    algorithm: Algorithm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = folders(tmp_path)
    text = written(algorithm, places, tmp_path / "first")
    block = re.search(r"```sh\n(.*?)```", text, re.DOTALL)
    assert block is not None
    program, command, *words = shlex.split(block[1].replace("\\\n", " "))
    assert (program, command) == ("tangent-arithmetic", "merge")
    monkeypatch.chdir(tmp_path)
    assert merge.main(words) == 0
    first, again = (load_file(tmp_path / n / "model.safetensors") for n in ("first", "merged"))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    recipes = [merging.written_recipe(tmp_path / name) for name in ("first", "merged")]
    assert recipes[0] == recipes[1]


def test_the_command_has_names_with_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ("_pretrained_", "1", "my task: a, (b)")
    names = dict(zip(known, folders(tmp_path).values(), strict=True))
    text = written(merging.TaskArithmeticAlgorithm(), names, tmp_path / "first")
    block = re.search(r"```sh\n(.*?)```", text, re.DOTALL)
    assert block is not None
    monkeypatch.chdir(tmp_path)
    assert merge.main(shlex.split(block[1].replace("\\\n", " "))[2:]) == 0
    first, again = (load_file(tmp_path / n / "model.safetensors") for n in ("first", "merged"))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    other = {**names, "it's": names.pop("1")}
    text = written(merging.TaskArithmeticAlgorithm(), other, tmp_path / "second")
    assert "Names of the models cannot be given to the command" in text and "```sh" not in text


def test_what_is_no_method_of_the_command_has_none(tmp_path: Path) -> None:
    compressed = Compressed(ModelPool(folders(tmp_path)), "tall_masks").merge("a")
    text = (merging.save_merged(compressed, tmp_path / "m") / "README.md").read_text()
    assert "`tall_masks of a` is no method of the command" in text and "```sh" not in text


def test_the_command_of_towers_names_their_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {name: tmp_path / name for name in NAMES}
    for seed, place in enumerate(places.values()):
        place.mkdir()
        state = {
            "embeddings.class_embedding": torch.full((3,), float(seed)),
            "other": torch.ones(1),
        }
        save_file(state, str(place / "model.safetensors"))
    text = written(
        merging.TaskArithmeticAlgorithm(1.0), CLIPVisionModelPool(places), tmp_path / "x"
    )
    block = re.search(r"```sh\n(.*?)```", text, re.DOTALL)
    assert block is not None
    monkeypatch.chdir(tmp_path)
    assert merge.main(shlex.split(block[1].replace("\\\n", " "))[2:]) == 0
    assert list(load_file(tmp_path / "merged" / "model.safetensors")) == [
        "embeddings.class_embedding"
    ]


@pytest.mark.parametrize(
    ("licences", "key", "terms"),
    [
        (["mit"], "mit", "All parents state the licence mit."),
        (["apache-2.0", "mit"], None, "state apache-2.0, mit. Check the terms of all parents"),
        (["mit", "mit", ""], None, "state mit. No licence was found for `stanford-cars`. Check"),
        ([], None, "No licence was found for `_pretrained_`, `a`, `stanford-cars`. Check the"),
    ],
)
def test_licences_are_those_of_the_parents(
    licences: list[str], key: str | None, terms: str, tmp_path: Path
) -> None:
    text = written(merging.TaskArithmeticAlgorithm(), folders(tmp_path, *licences), tmp_path / "m")
    assert front_matter(text).get("license") == key
    assert terms in text.replace("\n", " ")
    assert "base_model" not in front_matter(text)  # local folders are no models of the hub


def test_licences_of_their_own_are_told_apart(tmp_path: Path) -> None:
    own = [f"other\nlicense_name: {name}" for name in ("llama3", "gemma")]
    text = written(merging.TaskArithmeticAlgorithm(), folders(tmp_path, *own), tmp_path / "m")
    assert "The parents' model cards state gemma, llama3. Check the terms" in text
    same = folders(tmp_path / "same", own[0])
    text = written(merging.TaskArithmeticAlgorithm(), same, tmp_path / "n")
    assert "All parents state the licence llama3." in text


def test_folders_are_no_parents_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    for name, place in folders(tmp_path).items():
        place.rename(tmp_path / "m" / name)
    models = {name: f"m/{name}" for name in NAMES}
    text = written(merging.TaskArithmeticAlgorithm(), models, tmp_path / "merged")
    assert "base_model" not in front_matter(text)


def test_parents_on_the_hub_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = folders(tmp_path, "mit")
    by_name = {f"org/{name}": place for name, place in places.items()}
    monkeypatch.setattr("tangent_arithmetic.merging.weights.resolve", lambda n: by_name[n[7:]])
    models = {name: f"hf-hub:org/{name}" for name in NAMES}
    text = written(merging.TaskArithmeticAlgorithm(), models, tmp_path / "merged")
    found = front_matter(text)
    assert found["base_model"] == [f"org/{name}" for name in NAMES]
    assert found["base_model_relation"] == "merge" and found["license"] == "mit"


def test_models_in_memory_have_no_command(tmp_path: Path) -> None:
    models = {name: layers(seed) for seed, name in enumerate(NAMES)}
    text = written(merging.TaskArithmeticAlgorithm(), models, tmp_path / "merged")
    assert "Models were given in memory" in text and "```sh" not in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# A title",
        "---\nlicense: [a, b]\n---\n",
        "---\n- x\n---\n",
        "---\n{\n---\n",
        "---\n\x00",
    ],
)
def test_other_cards_state_no_licence(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == {}
