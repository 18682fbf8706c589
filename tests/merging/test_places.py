"""Where merged models go: nothing that a merge did not write is replaced, and no model."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.merging import TaskArithmeticAlgorithm, written_recipe
from tangent_arithmetic.merging.program import run
from tangent_arithmetic.merging.saving import RECIPE
from tangent_arithmetic.runtime.errors import UnwritableError, UsageError
from tangent_arithmetic.storage.checkpoints import read_header
from tests.merging.test_files import encoder_files

State = dict[str, Tensor]
NAMES = ("_pretrained_", "a", "b")


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(100, generator=generator) for i in range(4)}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "in"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        save_file(state(seed), str(folder / f"{name}.safetensors"))
    return {name: folder / f"{name}.safetensors" for name in NAMES}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Models of Hugging Face: a folder each, with configuration."""
    for seed, name in enumerate(NAMES):
        folder = tmp_path / "hub" / name
        folder.mkdir(parents=True)
        save_file(state(seed), str(folder / "model.safetensors"))
        (folder / "config.json").write_text(json.dumps({"model_type": "toy", "seed": seed}))
        (folder / "vocab.txt").write_text("a b c")
    return {name: tmp_path / "hub" / name for name in NAMES}


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def merge(
    models: dict[str, Path], target: Path | str, size: str = "5GB", coef: float = 0.5
) -> Path:
    return TaskArithmeticAlgorithm(coef).run_to(models, target, max_shard_size=size)


# --- what else is in the folder


@pytest.mark.parametrize("at_once", [True, False])
def test_what_else_is_in_the_folder_stays(
    at_once: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr("tangent_arithmetic.merging.writer._exchange", lambda one, other: False)
    target = merge(folders, tmp_path / "merged", "1KB")
    written = set(content(target))
    assert len([name for name in written if name.startswith("model-")]) == 2
    (target / "README.md").write_text("mine")
    (target / ".hidden").write_text("mine")
    (target / "eval" / "deep").mkdir(parents=True)
    (target / "eval" / "deep" / "results.csv").write_text("1,2,3")
    (target / "empty").mkdir()
    (target / "link").symlink_to("eval/deep")
    (target / "model.backup.safetensors").write_bytes(b"mine")
    mine = {name: data for name, data in content(target).items() if name not in written}
    for size, coef in (("5GB", 0.1), ("1KB", 0.2)):
        merge(folders, target, size, coef)
    found = content(target)
    assert {name: found[name] for name in mine} == mine
    assert found.keys() - mine.keys() == written
    assert (target / "link").is_symlink() and (target / "link" / "results.csv").is_file()
    assert (target / "empty").is_dir()
    assert written_recipe(target)["options"] == {"scaling_factor": 0.2}
    assert [path.name for path in tmp_path.iterdir()].count("merged") == 1
    assert not list(tmp_path.glob(".*"))


def test_files_that_are_no_longer_needed_go(folders: dict[str, Path], tmp_path: Path) -> None:
    target = merge(folders, tmp_path / "merged", "1KB")
    assert (target / "model.safetensors.index.json").is_file()
    merge(folders, target)
    names = {path.name for path in target.iterdir()}
    assert names == {"model.safetensors", "config.json", "vocab.txt", RECIPE}


def test_what_comes_while_the_merge_works_stays(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tangent_arithmetic.merging import writer

    target = merge(folders, tmp_path / "merged")
    exchange = writer._exchange

    def late(one: Path, other: Path) -> bool:
        (target / "late.txt").write_text("mine")
        return exchange(one, other)

    monkeypatch.setattr(writer, "_exchange", late)
    merge(folders, target)
    assert (target / "late.txt").read_text() == "mine"


def edited_configuration(target: Path) -> None:
    (target / "config.json").write_text("{}")


def foreign_weights(target: Path) -> None:
    save_file(state(9), str(target / "model.safetensors"))


def linked_weights(target: Path) -> None:
    (target / "model.safetensors").rename(target / "other.safetensors")
    (target / "model.safetensors").symlink_to("other.safetensors")


def folder_of_this_name(target: Path) -> None:
    (target / "vocab.txt").unlink()
    (target / "vocab.txt").mkdir()


def other_recipe(target: Path) -> None:
    (target / RECIPE).write_text(json.dumps({"flour": "500 g"}))


def damaged_recipe(target: Path) -> None:
    (target / RECIPE).write_bytes(b"\xff\xfe{")


def deep_recipe(target: Path) -> None:
    (target / RECIPE).write_text("[" * 100_000)


def no_recipe(target: Path) -> None:
    (target / RECIPE).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited_configuration, "holds config.json, which an earlier merge did not write or"),
        (foreign_weights, "holds model.safetensors, which an earlier merge did not write or"),
        (linked_weights, "holds model.safetensors, which an earlier merge did not write or"),
        (folder_of_this_name, "holds vocab.txt, which an earlier merge did not write or"),
        (other_recipe, "holds other files; expected a new folder"),
        (damaged_recipe, "holds other files; expected a new folder"),
        (deep_recipe, "holds other files; expected a new folder"),
        (no_recipe, "holds other files; expected a new folder"),
    ],
)
def test_what_was_changed_is_not_replaced(
    change: Callable[[Path], None],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = merge(folders, tmp_path / "merged")
    change(target)
    before = content(target)
    monkeypatch.setattr(
        "tangent_arithmetic.merging.stream.Merge.parts", lambda self: 1 / 0
    )  # no work before
    with pytest.raises(UsageError, match=message):
        merge(folders, target)
    assert content(target) == before


def test_folders_of_earlier_versions_are_known(files: dict[str, Path], tmp_path: Path) -> None:
    """Their recipes have no list of files; the weights say that a merge wrote them."""
    target = merge(files, tmp_path / "merged", "1KB")
    recipe = json.loads((target / RECIPE).read_text())
    assert set(recipe.pop("files")) == {path.name for path in target.iterdir()} - {RECIPE}
    (target / RECIPE).write_text(json.dumps(recipe))
    (target / "README.md").write_text("mine")
    merge(files, target)
    assert {p.name for p in target.iterdir()} == {"model.safetensors", RECIPE, "README.md"}


def test_files_that_no_merge_wrote_are_not_replaced(files: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "merged.safetensors"
    for data in (b"", b"mine", (tmp_path / "in" / "a.safetensors").read_bytes()):
        target.write_bytes(data)
        with pytest.raises(UsageError, match="exists and is not the result of a merge"):
            merge(files, target)
        assert target.read_bytes() == data
    target.unlink()
    merge(files, target)
    before = target.read_bytes()
    merge(files, target, coef=0.7)
    assert target.read_bytes() != before


# --- the models themselves


def its_name(models: dict[str, Path], tmp_path: Path) -> Path:
    return models["a"]


def through_parents(models: dict[str, Path], tmp_path: Path) -> Path:
    place = models["b"]
    return place.parent / ".." / place.parent.name / place.name


def symbolic_link(models: dict[str, Path], tmp_path: Path) -> Path:
    link = tmp_path / f"link{models['a'].suffix}"
    link.symlink_to(models["a"])
    return link


def hard_link(models: dict[str, Path], tmp_path: Path) -> Path:
    link = tmp_path / "hard.safetensors"
    os.link(models["a"], link)
    return link


def other_suffix(models: dict[str, Path], tmp_path: Path) -> Path:
    return models["_pretrained_"].with_suffix(".pt")  # means .safetensors


def relative(models: dict[str, Path], tmp_path: Path) -> Path:
    os.chdir(models["a"].parent)
    return Path(models["a"].name)


@pytest.mark.parametrize(
    "place", [its_name, through_parents, symbolic_link, hard_link, other_suffix, relative]
)
def test_a_file_that_is_merged_is_not_written(
    place: Callable[[dict[str, Path], Path], Path],
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = content(tmp_path / "in")
    target = place(files, tmp_path)
    with pytest.raises(UsageError, match=r"is the model .* itself; choose another path"):
        merge(files, target)
    assert content(tmp_path / "in") == before


def test_no_file_takes_the_place_of_a_pickled_model(tmp_path: Path) -> None:
    """Where x.pt is asked for, x.safetensors goes before it."""
    for seed, name in enumerate(NAMES):
        torch.save(state(seed), tmp_path / f"{name}.pt")
    models = {name: tmp_path / f"{name}.pt" for name in NAMES}
    for name in ("a.pt", "a.safetensors"):
        with pytest.raises(UsageError, match="is the model a itself"):
            merge(models, tmp_path / name)
    assert merge(models, tmp_path / "c.pt").is_file()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("hub/a", "is the model a itself"),
        ("hub/a/.", "is the model a itself"),
        ("hub/x/../a", "is in the folder of the model a"),
        ("hub/a/merged", "is in the folder of the model a"),
        ("hub/a/deep/merged.safetensors", "is in the folder of the model a"),
        ("hub/b/model.safetensors", "is the model b itself"),
        ("link", "is the model _pretrained_ itself"),
        ("link/model-00001-of-00002.safetensors", "is in the folder of the model _pretrained_"),
        ("hub", "holds other files; expected a new folder"),
        (".", "holds other files; expected a new folder"),
    ],
)
def test_a_folder_that_is_merged_is_not_written_into(
    target: str, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(folders["_pretrained_"])
    before = content(tmp_path)
    with pytest.raises(UsageError, match=message):
        merge(folders, tmp_path / target)
    assert content(tmp_path) == before


def test_a_merged_folder_that_is_merged_again_is_not_replaced(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    target = merge(folders, tmp_path / "merged")
    before = content(target)
    for place in (target, target / "model.safetensors"):
        with pytest.raises(UsageError, match="is the model a itself; choose another path"):
            merge({**folders, "a": place}, target)
    with pytest.raises(UsageError, match="holds the model a; choose another folder"):
        merge({**folders, "a": target / "model.safetensors"}, target, "1KB")
    assert content(target) == before


def test_models_below_the_merged_folder_stay(folders: dict[str, Path], tmp_path: Path) -> None:
    target = merge(folders, tmp_path / "merged")
    (target / "parts").mkdir()
    for name, folder in folders.items():
        folder.rename(target / "parts" / name)
    moved = {name: target / "parts" / name for name in NAMES}
    before = content(target / "parts")
    merge(moved, target, coef=0.9)
    assert content(target / "parts") == before
    assert written_recipe(target)["options"] == {"scaling_factor": 0.9}


def test_checkpoints_are_known_under_their_other_names(tmp_path: Path) -> None:
    """`X/finetuned.pt` is read from `XVal/finetuned.safetensors`; that is not written to."""
    places = encoder_files(tmp_path)
    models = {**places, "MNIST": tmp_path / "MNIST" / "finetuned.pt"}
    before = content(tmp_path)
    with pytest.raises(UsageError, match="is the model MNIST itself"):
        merge(models, tmp_path / "MNISTVal" / "finetuned.pt")
    with pytest.raises(UsageError, match="is the model _pretrained_ itself"):
        merge(models, tmp_path / "zeroshot.safetensors")
    assert content(tmp_path) == before


# --- places that cannot be written


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
@pytest.mark.parametrize("kind", ["file above", "long", "long folder", "null"])
def test_places_that_cannot_be_are_said_before_the_work(
    suffix: str, kind: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {
        "file above": str(files["a"] / "merged"), "long": str(tmp_path / ("x" * 300)),
        "long folder": str(tmp_path / ("y" * 300) / "merged"), "null": str(tmp_path / "a\0b"),
    }[kind] + suffix  # fmt: skip
    monkeypatch.setattr("tangent_arithmetic.merging.stream.Merge.parts", lambda self: 1 / 0)
    with pytest.raises(UsageError, match=r"cannot (write|be read)"):
        merge(files, place)


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_places_that_cannot_be_written_are_said(
    suffix: str, code: int, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    monkeypatch.setattr("tangent_arithmetic.merging.stream.Merge.parts", lambda self: 1 / 0)
    with pytest.raises(UnwritableError, match=rf"cannot write .*merged{suffix}: .*; make room"):
        merge(files, tmp_path / f"merged{suffix}")


def test_names_as_long_as_they_may_be(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("x" * 255, "y" * 243 + ".safetensors"):
        assert merge(files, tmp_path / name).exists()
    assert not list(tmp_path.glob(".*"))


def configuration(files: dict[str, Path], **more: object) -> dict[str, object]:
    return {
        "fabric": {}, "path": {"data_dir": "data", "log_dir": "logs"}, "seed": None,
        "method": {"_target_": "src.merging.TaskArithmeticAlgorithm", "scaling_factor": 0.5},
        "modelpool": {"_target_": "src.merging.ModelPool",
                      "models": {name: str(path) for name, path in files.items()}},
        "taskpool": {"_target_": "src.merging.DummyTaskPool"}, **more,
    }  # fmt: skip


def test_reports_replace_reports_alone(files: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "report.json"
    for coef in (0.5, 0.6):
        config = configuration(files, report_save_path=str(place))
        config["method"] |= {"scaling_factor": coef}  # type: ignore[operator]
        run(config)
        assert json.loads(place.read_text())["merge"]["options"] == {"scaling_factor": coef}
    before = content(tmp_path / "in")
    for wrong in (files["a"], tmp_path / "notes.json", tmp_path):
        (tmp_path / "notes.json").write_text('{"mine": 1}')
        with pytest.raises(UsageError, match=r"is not a report|cannot be read|is not a file"):
            run(configuration(files, report_save_path=str(wrong)))
    assert content(tmp_path / "in") == before
    assert json.loads((tmp_path / "notes.json").read_text()) == {"mine": 1}
    same = {"report_save_path": str(tmp_path / "in" / ".." / "m.safetensors"),
            "merged_model_save_path": str(tmp_path / "m.safetensors")}  # fmt: skip
    with pytest.raises(UsageError, match="is also the path of the merged model"):
        run(configuration(files, **same))


def test_all_places_are_checked_before_coefficients_are_tried(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tangent_arithmetic.merging import program

    monkeypatch.setattr(program, "task_pool_of", lambda *_: object())
    monkeypatch.setattr(program, "choose_scaling_factor", lambda *_: 1 / 0)
    auto = {"_target_": "src.merging.TaskArithmeticAlgorithm", "scaling_factor": "auto"}
    for more in (
        {"merged_model_save_path": str(files["a"])},
        {"report_save_path": str(files["a"] / "x")},
    ):
        with pytest.raises(UsageError, match=r"itself; choose another path|cannot write"):
            run(configuration(files, method=auto, **more))


# --- what is shared


def test_nothing_that_is_written_names_the_home_folder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "hub"
    monkeypatch.setenv("HOME", str(home))
    config = {"_name_or_path": str(home / "a"), "model_type": "toy"}
    (folders["_pretrained_"] / "config.json").write_text(json.dumps(config))
    target = merge(folders, tmp_path / "merged")
    single = merge(folders, tmp_path / "merged.safetensors")
    report = tmp_path / "report.json"
    run(configuration(folders, report_save_path=str(report)))
    ours = merge(encoder_files(home / "ours"), tmp_path / "ours.safetensors")
    for path in (*target.iterdir(), single, report, ours):
        assert str(home).encode() not in path.read_bytes(), path
    for recipe in (written_recipe(target), written_recipe(single)):
        assert recipe["models"]["a"]["place"] == "~/a"
    assert json.loads((target / "config.json").read_text())["_name_or_path"] == "~/a"


def test_merged_checkpoints_have_the_checksum_of_their_header(tmp_path: Path) -> None:
    path = merge(encoder_files(tmp_path), tmp_path / "merged.safetensors")
    assert load_checkpoint(path).info["merge_recipe"]["method"] == "task_arithmetic"
    data = path.read_bytes()
    assert data.count(b"task_arithmetic") == 1
    path.write_bytes(data.replace(b"task_arithmetic", b"task_aRithmetic"))
    with pytest.raises(UsageError, match="its header's checksum differs"):
        read_header(path)


def test_merged_weights_are_what_they_were(files: dict[str, Path], tmp_path: Path) -> None:
    found = load_file(merge(files, tmp_path / "m.safetensors"))
    theta0, a, b = (state(seed) for seed in range(3))
    for name, value in found.items():
        expected = theta0[name] + 0.5 * (a[name] + b[name] - 2 * theta0[name])
        torch.testing.assert_close(value, expected)
