"""Suites of own data sets: from flags, from a file, drafted from folders, registered in Python."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import tangent_arithmetic
from tangent_arithmetic.commands.suite import main
from tangent_arithmetic.data import registry as registry_module
from tangent_arithmetic.data import suites, templates
from tangent_arithmetic.data.own.budget import budget
from tangent_arithmetic.data.own.suite_file import ALL_KEYS, read_suite
from tangent_arithmetic.data.registry import get_classnames, get_dataset, known_datasets
from tangent_arithmetic.data.suites import Suite, Task, get_suite, register_dataset
from tangent_arithmetic.data.templates import get_templates
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.conftest import MakeArgs
from tests.data.own.conftest import Fill
from tests.data.own.test_torch_sets import Items


@pytest.fixture
def folder(fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three data sets in the working directory: pets, birds and things."""
    fill(tmp_path / "pets", {"cat": 20, "big_dog": 20})
    fill(tmp_path / "birds", {"owl": 10, "tit": 10, "wren": 5})
    fill(tmp_path / "things", {"cup": 6, "pan": 6})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes the registrations of a test."""
    monkeypatch.setattr(suites, "SUITES", copy.copy(suites.SUITES))
    monkeypatch.setattr(suites, "DATASETS", {})
    for module in (registry_module, templates):
        monkeypatch.setattr(module, "DATASETS", suites.DATASETS)


def _prompts(run: Run, name: str) -> list[str]:
    return [template("x") for template in get_templates(name, run.suite)]


# --- flags


def test_tasks_named_by_their_folders_are_a_suite(folder: Path, args: MakeArgs) -> None:
    run = Run.of(args(tasks=["pets=pets", "birds=./birds"])).check()
    assert (run.suite.name, run.tasks, run.eval_datasets) == ("own", ["pets", "birds"], run.tasks)
    assert run.suite.names == ("pets", "birds") and run.control_set is None
    assert run.results.parts[-2:] == ("own", "ViT-Nano-8")
    data = run.data.dataset("petsVal")
    assert (len(data.train), len(data.test), data.source) == (29, 3, "folder")
    assert run.data.classnames("petsVal") == ("big dog", "cat")
    assert _prompts(run, "petsVal") == ["a photo of a x."]
    with pytest.raises(UsageError, match=r"suite own has no control set.*--control-dataset=NAME"):
        _ = run.control


def test_a_table_that_was_edited_is_read_again(tmp_path: Path, args: MakeArgs) -> None:
    table = tmp_path / "films.csv"
    for count in (10, 20):
        rows = (f"film {i} is {word},{word}" for i in range(count) for word in ("good", "bad"))
        table.write_text("\n".join(["text,label", *rows]))
        os.utime(table, ns=(count, count))  # changes within a tick of the clock are seen
        data = Run.of(args(tasks=[f"films={table}"])).check().data.dataset("films")
        assert len(data.train) + len(data.test) == 2 * count


@pytest.mark.parametrize(
    ("settings", "name", "tasks", "control"),
    [
        ({"train_dataset": ["pets=pets"]}, "own", ["pets"], None),
        ({"eval_datasets": ["pets=pets"]}, "own", ["pets"], None),
        ({"tasks": ["pets=pets"], "control_dataset": "things=things"}, "own", ["pets"], "things"),
        ({"tasks": ["pets=pets"], "control_dataset": "Shapes"}, "own", ["pets"], "Shapes"),
        ({"tasks": ["pets=pets"], "eval_datasets": ["petsVal", "Emoji"]}, "own", ["pets"], None),
        ({"control_dataset": "things=things", "tasks": ["Emoji"]}, "embedded", ["Emoji"], "things"),
        ({"tasks": ["MNIST", "pets=pets"]}, "embedded", ["MNIST", "pets"], "Shapes"),
        ({"tasks": ["pets=pets"], "suite": "embedded"}, "embedded", ["pets"], "Shapes"),
        ({"tasks": ["d=embedded:MNIST", "pets=pets"]}, "own", ["d", "pets"], None),
    ],
)
def test_own_and_other_data_sets_mix(
    settings: dict[str, Any],
    name: str,
    tasks: list[str],
    control: str | None,
    folder: Path,
    args: MakeArgs,
) -> None:
    run = Run.of(args(**settings)).check()
    assert (run.suite.name, run.tasks, run.control_set) == (name, tasks, control)
    for each in (*run.tasks, *run.eval_datasets, *([control] if control else [])):
        assert run.data.classnames(each) and _prompts(run, each)
        assert Run.of(run.config).suite == run.suite  # in another process
    assert get_suite("embedded").related.keys() == {"Digits", "StreetLetters", "Pool"}


def test_a_borrowed_data_set_is_that_of_its_suite(folder: Path, args: MakeArgs) -> None:
    run = Run.of(args(tasks=["digits=embedded:MNIST", "pets=pets"]))
    assert run.data.dataset("digitsVal").name == "digitsVal"
    assert (len(run.data.dataset("digits").train), run.data.dataset("digits").source) == (
        3200,
        "embedded",
    )
    assert run.data.classnames("digits")[3] == "three" and run.recipe("digits").epochs == 1
    assert _prompts(run, "digits") == [t("x") for t in get_templates("MNIST", "embedded")]


def test_templates_come_from_the_nearest_place(folder: Path, args: MakeArgs) -> None:
    (folder / "pets" / "templates.txt").write_text("a pet called {}.\n{}\n")
    (folder / "prompts.txt").write_text("{} one\n{} two\n")
    own = {"tasks": ["pets=pets", "birds=birds"]}
    assert _prompts(Run.of(args(**own)), "pets") == ["a pet called x.", "x"]
    run = Run.of(args(**own, template="my {}"))
    assert _prompts(run, "pets") == _prompts(run, "birds") == ["my x"]
    run = Run.of(args(**own, template="prompts.txt"))
    assert _prompts(run, "petsVal") == ["x one", "x two"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("pets=", UsageError, "expected a source after pets=, got nothing"),
        ("a/b=pets", UsageError, r"invalid data set 'a/b'"),
        ("petsVal=pets", UsageError, "not ending in Val"),
        ("pets=nowhere", MissingFileError, "data set pets: nowhere does not exist; expected a fol"),
        ("pets=hup:a/b", UsageError, "unknown kind of source of data set pets 'hup'; ch"),
        ("pets=pets?epoch=3", UsageError, "unknown option of data set pets .* 'epoch'; ch"),
        ("pets=pets?epochs=0", UsageError, "expected epochs of at least 1, got '0'"),
        ("pets=notes.txt", UsageError, r"expected a folder or a table .*notes\.txt"),
        ("pets=pets?classnames=no.txt", MissingFileError, "file of class names no.txt does not"),
        ("pets=embedded:MNIS", UsageError, "unknown data set of suite embedded 'MNIS'; choose fro"),
        ("MNIST=pets", None, ""),
    ],
)
def test_wrong_sources_are_refused(
    text: str, error: type[Exception] | None, message: str, folder: Path, args: MakeArgs
) -> None:
    (folder / "notes.txt").write_text("x")
    run = Run.of(args(tasks=[text]))
    if error is None:
        assert run.check().suite.name == "own"
        with pytest.raises(UsageError, match="suite embedded has a data set MNIST; give yours"):
            Run.of(args(tasks=[text], suite="embedded")).check()
        return
    with pytest.raises(error, match=message):
        run.check()


def test_one_name_with_two_sources_is_refused(folder: Path, args: MakeArgs) -> None:
    run = Run.of(args(tasks=["a=pets"], train_dataset=["a=birds"]))
    with pytest.raises(UsageError, match="a is named with two sources, a=pets and a=birds"):
        run.check()


# --- how long to train


@pytest.mark.parametrize(
    ("images", "epochs", "warmup"),
    [
        (55000, 5, 215),  # MNIST of the papers
        (68257, 4, 213),  # SVHN
        (23976, 11, 206),  # GTSRB
        (17010, 15, 199),  # RESISC45
        (3384, 74, 199),  # DTD; 76 in the papers
        (500, 76, 30),  # small: at most 76 epochs
        (1, 76, 7),
        (10**7, 1, 500),
    ],
)
def test_epochs_follow_the_papers_rule(images: int, epochs: int, warmup: int) -> None:
    planned = budget(images, 128, get_suite("clip8"))
    assert (planned.epochs, planned.warmup_length) == (epochs, warmup)
    assert planned.steps == epochs * -(-images // 128)
    assert ("most epochs" in str(planned)) == (epochs == 76)


def test_recipes_follow_from_images_and_flags(folder: Path, args: MakeArgs) -> None:
    own = ["pets=pets", "birds=birds?epochs=3"]
    run = Run.of(args(tasks=own))
    pets, birds = run.recipe("pets"), run.recipe("birds")
    assert (pets.epochs, pets.warmup_length, pets.lr, pets.batch_size) == (60, 6, 3e-4, 64)
    assert (birds.epochs, birds.warmup_length) == (3, 1)
    clip = Run.of(args(model="ViT-B-32", tasks=own)).recipe("pets")
    assert (clip.epochs, clip.warmup_length, clip.lr, clip.batch_size) == (76, 7, 1e-5, 128)
    flagged = Run.of(args(tasks=own, epochs=9, warmup_length=5, batch_size=7)).recipe("pets")
    assert (flagged.epochs, flagged.warmup_length, flagged.batch_size) == (9, 5, 7)


# --- files

FILE = """
name: mine
templates: ["a {}.", "the {}."]
lr: 1e-4
batch_size: 10
warmup_length: 3
tasks:
  pets: pets
  birds: {source: birds, epochs: 7, templates: "a bird, {}", classnames: [o, t, w]}
control:
  things: things
related:
  digits: embedded:MNIST
"""


def test_a_suite_in_a_file(folder: Path, args: MakeArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "suite.yaml").write_text(FILE)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")  # paths are relative to the file
    run = Run.of(args(suite="../suite.yaml")).check()
    assert (run.suite.name, run.tasks, run.control) == ("mine", ["pets", "birds"], "things")
    assert not run.suite.analogies  # those of the embedded suite are of its own data sets
    assert run.results.parts[-2:] == ("mine", "ViT-Nano-8")
    assert run.data.classnames("birds") == ("o", "t", "w")
    assert _prompts(run, "pets") == ["a x.", "the x."] and _prompts(run, "birds") == ["a bird, x"]
    birds = run.recipe("birds")
    assert (birds.lr, birds.batch_size, birds.epochs, birds.warmup_length) == (1e-4, 10, 7, 3)
    assert run.recipe("pets").epochs == 20 and len(run.data.dataset("things").test) == 2
    assert _prompts(Run.of(args(suite="../suite.yaml", template="my {}")), "birds") == ["my x"]
    more = Run.of(args(suite="../suite.yaml", tasks=["pets", "Emoji", "new=../things"]))
    assert more.tasks == ["pets", "Emoji", "new"]
    digits = Run.of(args(suite="../suite.yaml", train_dataset=["digits"]))
    assert digits.train_datasets == ["digits"] and digits.recipe("digits").epochs == 1


def test_places_in_a_file_are_relative_to_it(folder: Path) -> None:
    (folder / "suites").mkdir()
    (folder / "birds.csv").write_text("path,label\n")
    (folder / "names.txt").write_text("a\nb\n")
    tasks = "a: hub:../pets\n  b: ../birds.csv?label=kind\n  c: hub:org/pets?config=x\n"
    path = folder / "suites" / "s.yaml"
    path.write_text(f"tasks:\n  {tasks}  d: {{source: ../pets, classnames: ../names.txt}}\n")
    suite = read_suite(path, get_suite("clip8"))
    loads: dict[str, Any] = {name: entry.load for name, entry in suite.sets.items()}
    assert Path(loads["a"].repo).samefile(folder / "pets")
    assert loads["b"].path.samefile(folder / "birds.csv")
    assert dict(loads["b"].columns) == {"label": "kind"}
    assert loads["c"].repo == "org/pets"
    assert get_dataset("d", None, "", suite=suite).classnames == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected keys such as tasks:, got a NoneType"),
        ("name: x\n", r"has no tasks; add"),
        ("tsks: {pets: pets}\n", r"unknown key in .* 'tsks'; choose from tasks, "),
        ("tasks: [pets]\n", r"tasks must map names to sources"),
        ("tasks: {pets: 3}\n", r"tasks\.pets must be a source, or have the key source"),
        ("tasks: {pets: {sorce: pets}}\n", r"tasks\.pets must be a source"),
        ("tasks: {pets: {source: pets, epoch: 3}}\n", r"unknown option of data set pets"),
        ("tasks: {pets: {source: pets, epochs: 0}}\n", r"epochs of at least 1, got 0"),
        ("tasks: {pets: {source: pets, templates: [no]}}\n", r"templates with one \{\} each"),
        ("tasks: {pets: {source: pets, classnames: {a: b}}}\n", r"classnames a file or a list"),
        ("tasks: {pets: {source: pets, classnames: [yes, no]}}\n", r"classnames, got \[True, Fal"),
        ("tasks: {pets: {source: pets.csv, label: on}}\n", r"a text as label, got True: YAML"),
        ("tasks: {yes: pets}\n", r"expected names as keys of tasks, got True: YAML reads yes"),
        ("tasks: {pets: gone}\n", r"suite\.yaml: data set pets: .*gone does not exist"),
        ("tasks: {pets: pets}\nlr: fast\n", r"lr is 'fast', expected a number from 0 to 1000"),
        ("tasks: {pets: pets}\nepochs: 1.5\n", r"epochs is 1\.5, expected an integer from 1"),
        ("tasks: {pets: pets}\nbatch_size: true\n", r"batch_size is True, expected an integer"),
        ("tasks: {pets: pets}\ncontrol: {a: pets, b: birds}\n", r"control must be one data set"),
        ("tasks: {pets: pets}\ncontrol: {pets: birds}\n", r"has a data set pets; give yours"),
        ("tasks: {pets: pets}\nname: embedded\n", r"there is another suite embedded"),
        ("tasks: {pets: pets}\nname: a b\n", r"invalid suite name in .* 'a b'"),
        ("tasks: {pets: pets, pets: birds}\n", r"pets is twice in the group of line 1"),
        ("tasks: {pets: pets\n", r"cannot be read as the YAML file of a suite"),
        ("tasks: !!python/object/apply:os.system ['true']\n", r"cannot be read as the YAML"),
    ],
)
def test_wrong_files_are_refused(text: str, message: str, folder: Path) -> None:
    (folder / "pets.csv").write_text("path,label\n")
    path = folder / "suite.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_suite(path, get_suite("embedded"))


def test_a_missing_file_is_named(args: MakeArgs) -> None:
    with pytest.raises(MissingFileError, match=r"none\.yaml does not exist, expected the YAML"):
        Run.of(args(suite="none.yaml")).check()


# --- suite init


def test_init_writes_what_suite_reads(
    folder: Path, args: MakeArgs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "pets", "b=birds", "--output=mine.yaml", "--control=things"]) == 0
    out = capsys.readouterr().out
    assert "about 60 steps of 64 images a task, at most 76 epochs" in out
    assert "pets: 2 classes, 8 test images, 29 training examples: 60 epochs, 60 steps, 6 of" in out
    assert "wrote mine.yaml" in out and "--suite=mine.yaml" in out
    run = Run.of(args(suite="mine.yaml")).check()
    assert (run.suite.name, run.tasks, run.control) == ("mine", ["pets", "b"], "things")
    content = yaml.safe_load((folder / "mine.yaml").read_text())
    assert set(content) <= set(ALL_KEYS)
    assert content["tasks"]["b"] == {"source": "birds", "epochs": 60}
    assert run.recipe("b") == Run.of(args(tasks=["b=birds"])).recipe("b")


def test_init_keeps_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "suite.yaml").write_text("kept")
    assert main(["init", "pets"]) == 2
    assert "suite.yaml exists and is not overwritten" in capsys.readouterr().err
    assert (folder / "suite.yaml").read_text() == "kept"
    assert main(["init", "pets", "--force"]) == 0
    assert "no control set: negation needs one" in capsys.readouterr().out
    suite = read_suite("suite.yaml", get_suite("embedded"))
    assert suite.control is None and list(suite.tasks) == ["pets"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pets", "x/../pets"], "two data sets would be called pets"),
        (["gone"], "data set gone: gone does not exist"),
        (["pets", "--output=mine.txt"], "expected a name that ends in .yaml or .yml"),
        (["pets", "--output=a b.yaml"], "invalid suite name in a b.yaml 'a b'"),
        (["empty"], "empty has no folders; expected one folder of images per class"),
    ],
)
def test_init_refuses_what_makes_no_suite(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    (folder / "x").mkdir()
    assert main(["init", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.glob("*.yaml"))


@pytest.mark.parametrize(("copied", "total"), [(0, 60), (10, 80), (30, 120)])
def test_validation_has_no_copies_of_training_images(
    copied: int,
    total: int,
    fill: Fill,
    tmp_path: Path,
    args: MakeArgs,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    name = f"pets{copied}"  # a note is logged once a name
    root = fill(tmp_path / name, {"train/cat": 30, "train/dog": 30, "test/cat": 1, "test/dog": 1})
    for folder in (root / "train" / "cat", root / "train" / "dog"):
        for i, path in enumerate(sorted(folder.iterdir())[:copied]):
            shutil.copy(path, folder / f"copy{i}.png")
    val = Run.of(args(tasks=[f"{name}={root}"])).data.dataset(f"{name}Val")
    parts = [
        [np.asarray(part[i][0]).tobytes() for i in range(len(part))]
        for part in (val.train, val.test)
    ]
    assert len(parts[0]) + len(parts[1]) == total
    assert not set(parts[0]) & set(parts[1]) and len(set(parts[1])) == 6
    assert (f"{2 * copied} training images are copies of others" in caplog.text) == bool(copied)


# --- Python


def _items(count: int, classes: int = 2) -> Items:
    rng = np.random.default_rng(count)
    pixels = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    return Items([(Image.fromarray(image), i % classes) for i, image in enumerate(pixels)])


def test_plain_data_sets_are_registered(registry: None, args: MakeArgs) -> None:
    register = tangent_arithmetic.register_dataset
    register("pets", _items(20), _items(6), ("cat", "dog"), ("a {}.",), epochs=4)
    register("birds", train=_items(30), test=None, classnames=["owl", "tit"])
    register("things", _items(8), _items(4), ("cup", "pan"), control=True)
    for settings in ({"tasks": ["pets", "birds"]}, {"suite": "own"}):
        run = Run.of(args(**settings)).check()
        assert (run.suite.name, run.tasks, run.control) == ("own", ["pets", "birds"], "things")
    recipe = run.recipe("pets")
    assert _prompts(run, "pets") == ["a x."] and (recipe.epochs, recipe.lr) == (4, 3e-4)
    assert Run.of(args(suite="own", model="ViT-B-32")).recipe("pets").lr == 1e-5
    assert [len(run.data.dataset(name).test) for name in ("pets", "birds", "birdsVal")] == [6, 6, 2]
    assert known_datasets("own").keys() == {"pets", "birds", "things"}
    assert get_classnames("birds", "", "own") == ("owl", "tit")
    register("more", _items(20), _items(6), ("cat", "dog"), suite="embedded")
    assert Run.of(args(tasks=["more", "MNIST"])).check().suite.name == "embedded"
    with pytest.raises(UsageError, match="'pets' is already registered"):
        register("pets", _items(20), _items(6), ("cat", "dog"))
    with pytest.raises(UsageError, match="suite own has the control set things; register other"):
        register("other", _items(20), _items(6), ("cat", "dog"), control=True)


def test_the_first_form_of_registration_remains(registry: None, tmp_path: Path) -> None:
    from tangent_arithmetic.data.plain import plain_splits

    def load(location: Path) -> Any:
        return plain_splits("late", _items(20), _items(6), None, (location.name, "b"))

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, location: Path) -> Any:
            return load(location)

    register_dataset("late", load, ("a {}.",), "embedded", Task(1, 2))
    register_dataset(
        "later", load=Unhashable(), templates=["a {}."], suite="embedded", task=Task(1, 2)
    )
    for name in ("late", "later"):
        data = get_dataset(name, None, tmp_path / "root", suite="embedded")
        assert data.classnames == ("root", "b") and len(data.train) == 20


def test_a_suite_without_a_control_set_has_its_tasks_only() -> None:
    assert Suite("x", {"a": Task(1, 2)}).names == ("a",)


def test_class_names_of_embedded_sets_draw_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tangent_arithmetic.data.embedded import rendering

    monkeypatch.setattr(rendering, "load_embedded", None)
    assert len(get_classnames("EmojiVal", tmp_path, "embedded", tmp_path / "none")) == 9
