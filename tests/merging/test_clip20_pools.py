"""The pools of 14 and 20 models and data sets, by FusionBench's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tangent_arithmetic.commands import merge
from tangent_arithmetic.data.suites import SUITES
from tangent_arithmetic.merging import taskpools
from tangent_arithmetic.merging.targets import pool_of, rows_of, task_pool_of
from tangent_arithmetic.merging.taskpools import PROMPTS, HubRows, generic_task

Composed = Callable[..., dict[str, Any]]


@pytest.fixture
def composed(capsys: pytest.CaptureFixture[str]) -> Composed:
    """The configuration of `merge` with some overrides."""

    def compose(*words: str) -> dict[str, Any]:
        assert merge.main([*words, "--cfg", "job"]) == 0
        node: Any = OmegaConf.create(capsys.readouterr().out)
        groups = {group: node[group] for group in ("modelpool", "taskpool")}
        return {name: OmegaConf.to_container(group, resolve=True) for name, group in groups.items()}

    return compose


@pytest.mark.parametrize("model", ["base-patch32", "base-patch16", "large-patch14"])
def test_pools_of_eight_are_those_without_data_sets(model: str, composed: Composed) -> None:
    pool = f"modelpool=CLIPVisionModelPool/clip-vit-{model}_TA8"
    assert composed(pool)["modelpool"] == composed(f"{pool}_model_only")["modelpool"]


@pytest.mark.parametrize("count", [14, 20])
@pytest.mark.parametrize("model", ["base-patch32", "base-patch16", "large-patch14"])
def test_models_and_data_sets_are_those_of_fusion_bench(
    count: int, model: str, composed: Composed
) -> None:
    pool = f"modelpool=CLIPVisionModelPool/clip-vit-{model}_TALL{count}"
    tasks = f"taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TALL{count}"
    node = composed(pool, tasks)
    assert node["modelpool"] == composed(f"{pool}_model_only")["modelpool"]
    models = pool_of(node["modelpool"])
    sets = node["taskpool"]["test_datasets"]
    assert models.model_names == list(sets) and len(sets) == count
    hub = {name: f"tanganke/clip-vit-{model}_{name}" for name in sets}
    assert models.models == {"_pretrained_": f"openai/clip-vit-{model}", **hub}
    rows = {name: rows_of(entry, name) for name, entry in sets.items()}
    ours = {row.known() or PROMPTS[row.path] for row in rows.values()}
    letters = {"EMNIST": "EMNISTLetters"}  # FusionBench's twenty have the letters
    assert ours == {letters.get(name, name) for name in SUITES[f"clip{count}"].tasks}


def test_the_task_pool_reads_test_splits(
    composed: Composed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That of Food101 is the hub's split "validation"."""
    node = composed("taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TALL20")
    tasks = task_pool_of(node["taskpool"], {"data_location": str(tmp_path), "device": "cpu"})
    assert tasks is not None and len(tasks.tasks) == 20
    seen: list[str] = []

    class Data:
        test = ()

        def dataset(self, name: str) -> Data:
            seen.append(name)
            return self

    monkeypatch.setattr(type(tasks.run), "data", Data())
    for name, task in tasks.tasks.items():
        if name != "emnist_letters":
            task.pictures(False)
    assert "Food101" in seen and not any(name.endswith("Val") for name in seen)
    assert {*seen, "EMNIST"} == set(SUITES["clip20"].tasks)


def test_letters_come_from_the_hub_with_our_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    from tangent_arithmetic.data import hub

    for name, value in {"load_rows": None, "classes_of": ("A", "B"), "pictures_of": None}.items():
        monkeypatch.setattr(hub, name, lambda *_, value=value: value)
    seen: list[Any] = []

    def head(classes: Any, prompts: Any) -> Any:
        seen.append((classes, [prompt("A") for prompt in prompts]))

    rows = HubRows("tanganke/emnist_letters", None, "test")
    assert rows.known() is None and taskpools.SUITE == "clip20"
    generic_task("letters", rows, head).head()
    assert seen == [(("A", "B"), ['a photo of the digit character: "A".'])]
