"""The pools of models and data sets of CLIP, by FusionBench's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

import tangent_arithmetic
from tangent_arithmetic.commands import merge
from tangent_arithmetic.data import hub
from tangent_arithmetic.data.clip20 import PUBLIC_SETS
from tangent_arithmetic.data.suites import SUITES
from tangent_arithmetic.data.templates import get_templates
from tangent_arithmetic.merging import taskpools
from tangent_arithmetic.merging.targets import pool_of, rows_of, task_pool_of
from tangent_arithmetic.merging.taskpools import PROMPTS, HubRows, generic_task

Composed = Callable[..., dict[str, Any]]
CONFIG = Path(tangent_arithmetic.__file__).parent / "config"


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
    named = {name: f"tanganke/clip-vit-{model}_{name}" for name in sets}
    assert models.models == {"_pretrained_": f"openai/clip-vit-{model}", **named}
    rows = {name: rows_of(entry, name) for name, entry in sets.items()}
    ours = {row.known() or PROMPTS[row.path] for row in rows.values()}
    letters = {"EMNIST": "EMNISTLetters"}  # FusionBench's twenty have the letters
    assert ours == {letters.get(name, name) for name in SUITES[f"clip{count}"].tasks}


SMALL = {
    "base-patch32_TA4": "sun397 stanford-cars gtsrb dtd",
    "base-patch32_TA6": "sun397 stanford-cars resisc45 eurosat gtsrb dtd",
    "base-patch32_TA8_control_task": "sun397 stanford-cars resisc45 eurosat svhn gtsrb mnist dtd",
    "base-patch32_svhn_and_mnist": "svhn mnist",
    "base-patch32_sun397_and_cars": "sun397 stanford-cars",
    "base-patch32_cars_and_dtd": "stanford-cars dtd",
    "base-patch32_sun397_and_dtd": "sun397 dtd",
    "base-patch32_sun397_cars_and_dtd": "sun397 stanford-cars dtd",
    "base-patch32_single_finetuned": "stanford-cars",
}


@pytest.mark.parametrize("name", SMALL)
def test_pools_of_some_of_the_eight(name: str, composed: Composed) -> None:
    node = composed(f"modelpool=CLIPVisionModelPool/clip-vit-{name}")["modelpool"]
    hub = {task: f"tanganke/clip-vit-base-patch32_{task}" for task in SMALL[name].split()}
    assert pool_of(node).models == {"_pretrained_": "openai/clip-vit-base-patch32", **hub}


@pytest.mark.parametrize("count", [10, 12, 16, 18])
def test_pools_of_the_first_of_twenty(count: int, composed: Composed) -> None:
    pool = "modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TALL"
    twenty, found = (pool_of(composed(f"{pool}{n}")["modelpool"]).models for n in (20, count))
    assert list(found.items()) == list(twenty.items())[: count + 1]


def test_pools_with_keys_of_their_own(composed: Composed) -> None:
    pool = "modelpool=CLIPVisionModelPool/clip-vit-base-patch"
    two = pool_of(composed(f"{pool}32_two_tasks_control_task")["modelpool"])
    hub = {"model_1": "sun397", "model_2": "stanford-cars"}
    places = {name: f"tanganke/clip-vit-base-patch32_{task}" for name, task in hub.items()}
    assert two.models == {"_pretrained_": "openai/clip-vit-base-patch32", **places}
    lora = pool_of(composed(f"{pool}16_TA8_lora")["modelpool"])
    tasks = SMALL["base-patch32_TA8_control_task"].split()
    keys = {"stanford-cars": "cars"}
    places = {keys.get(t, t): f"tanganke/clip-vit-base-patch16_{t}_lora-16" for t in tasks}
    assert lora.models == {"_pretrained_": "openai/clip-vit-base-patch16", **places}


@pytest.mark.parametrize("model", ["base-patch32", "base-patch16", "large-patch14"])
def test_a_pool_of_one_model_is_that_model(model: str, composed: Composed) -> None:
    pool = f"modelpool=CLIPVisionModelPool/clip-vit-{model}_individual"
    for words, place in (
        ([], f"openai/clip-vit-{model}"),
        (["modelpool.base_model=mine"], "mine"),
        (["modelpool.models._pretrained_=mine"], "mine"),
    ):
        found = pool_of(composed(pool, *words)["modelpool"]).models
        assert found == {"_pretrained_": place, "individual": place}


def test_task_pools_of_four_tasks_and_of_one(composed: Composed) -> None:
    pool = "taskpool=CLIPVisionModelTaskPool/clip-vit-"
    every = composed(f"{pool}classification_TALL20")["taskpool"]
    four = composed(f"{pool}classification_TA4")["taskpool"]
    assert list(four["test_datasets"]) == SMALL["base-patch32_TA4"].split()
    one = composed(f"{pool}single-task_rendered-sst2")["taskpool"]
    sets = {"rendered-sst2": every["test_datasets"]["rendered-sst2"]}
    assert one == {**every, "test_datasets": sets}
    folder = CONFIG / "taskpool" / "CLIPVisionModelTaskPool"
    texts = {path.name: path.read_text() for path in folder.glob("clip-vit-single-task_*.yaml")}
    like = texts["clip-vit-single-task_rendered-sst2.yaml"]
    for name in every["test_datasets"]:
        text = texts.pop(f"clip-vit-single-task_{name}.yaml")
        assert text == like.replace("rendered-sst2", name)
    assert not texts


def test_the_task_pool_with_a_control_task_has_it_first(composed: Composed) -> None:
    pool = "taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8"
    eight, nine = (composed(f"{pool}{end}")["taskpool"] for end in ("", "_with_control_task"))
    assert [*nine["test_datasets"]] == ["tiny-imagenet", *eight["test_datasets"]]
    control = nine["test_datasets"].pop("tiny-imagenet")
    assert nine == eight
    assert rows_of(control, "tiny-imagenet").ours() == "TinyImageNet"


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


def rows_with(classes: Sequence[str], count: int) -> Any:
    """Rows of the hub, one image for each of the first classes."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    pictures = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(count)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(classes))})
    return Dataset.from_dict({"image": pictures, "label": [*range(count)]}, features=features)


@pytest.mark.parametrize(
    ("path", "config", "split"),
    [
        ("tanganke/resisc45", None, "contrast"),
        ("tanganke/resisc45", "other", "test"),
        ("tanganke/resisc45", None, "train"),
        ("ethz/food101", None, "test"),  # its test split is called "validation"
        ("zh-plus/tiny-imagenet", None, "train"),
    ],
)
def test_other_splits_and_configurations_are_those_of_the_hub(
    path: str, config: str | None, split: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With our labels, matched by name, and our prompts."""
    name = HubRows(path, None, "test").known()
    ours = PUBLIC_SETS[str(name)].hub
    assert ours is not None
    theirs, seen = ours.classnames[::-1], list[Any]()

    def load_rows(_name: str, *of: Any) -> Any:
        seen.append(of)
        return rows_with(theirs, 3)

    monkeypatch.setattr(hub, "load_rows", load_rows)
    rows = {"x": HubRows(path, config, split)}
    tasks = taskpools.CLIPVisionModelTaskPool(rows, "x", data_location=str(tmp_path), device="cpu")
    pictures = tasks.tasks["x"].pictures(False)
    assert pictures is not None and seen == [(path, config, split)]
    assert [ours.classnames[pictures[i][1]] for i in range(3)] == list(theirs[:3])
    assert tasks.tasks["x"].pictures(True) is None
    heads: list[Any] = []
    generic_task("x", rows["x"], lambda *of: heads.append(of)).head()  # type: ignore[arg-type]
    assert heads == [(ours.classnames, get_templates(str(name), "clip20"))]


def test_letters_come_from_the_hub_with_our_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"load_rows": None, "classes_of": ("A", "B"), "pictures_of": None}.items():
        monkeypatch.setattr(hub, name, lambda *_, value=value: value)
    seen: list[Any] = []

    def head(classes: Any, prompts: Any) -> Any:
        seen.append((classes, [prompt("A") for prompt in prompts]))

    rows = HubRows("tanganke/emnist_letters", None, "test")
    assert rows.known() is None and taskpools.SUITE == "clip20"
    generic_task("letters", rows, head).head()
    assert seen == [(("A", "B"), ['a photo of the digit character: "A".'])]
