"""Where merged models go: no model is replaced, and no file that a merge did not write."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.merging import TaskArithmeticAlgorithm, saving, writer, written_recipe
from tangent_arithmetic.merging.cards import CARD
from tangent_arithmetic.merging.program import run
from tangent_arithmetic.merging.saving import RECIPE
from tangent_arithmetic.runtime.errors import UnwritableError, UsageError
from tangent_arithmetic.storage.checkpoints import read_header
from tests.merging.makers import NAMES, encoder_files, layers, write_files

STATES = {name: layers(seed) for seed, name in enumerate(NAMES)}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return write_files(tmp_path / "in", STATES)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Models of Hugging Face: a folder each, with configuration."""
    for name, state in STATES.items():
        folder = tmp_path / "hub" / name
        folder.mkdir(parents=True)
        save_file(state, str(folder / "model.safetensors"))
        (folder / "config.json").write_text(json.dumps({"model_type": "toy", "name": name}))
        (folder / "vocab.txt").write_text("a b c")
    return {name: tmp_path / "hub" / name for name in NAMES}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging fails, so that an error must come before the work."""
    monkeypatch.setattr("tangent_arithmetic.merging.stream.Merge.parts", lambda self: 1 / 0)


def content(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def merge(
    models: dict[str, Path], target: Path | str, size: str = "5GB", coef: float = 0.5
) -> Path:
    return TaskArithmeticAlgorithm(coef).run_to(models, target, max_shard_size=size)


def refuse(models: dict[str, Path], target: Path | str, message: str, kept: Path) -> None:
    """Merges, which must fail and leave everything in the folder `kept` as it is."""
    before = content(kept)
    with pytest.raises(UsageError, match=message):
        merge(models, target)
    assert content(kept) == before


# --- other files in the folder


def test_other_files_in_the_folder_stay(folders: dict[str, Path], tmp_path: Path) -> None:
    target = merge(folders, tmp_path / "merged", "1KB")
    written = set(content(target))
    assert len([name for name in written if name.startswith("model-")]) == 2
    (target / "eval" / "deep").mkdir(parents=True)
    (target / "empty").mkdir()
    (target / "link").symlink_to("eval/deep")
    for name in ("notes.md", ".hidden", "eval/deep/a.csv", "model.backup.safetensors"):
        (target / name).write_text("mine")
    mine = {name: data for name, data in content(target).items() if name not in written}
    merge(folders, target, coef=0.1)
    one_shard = {"model.safetensors", "config.json", "vocab.txt", CARD, RECIPE}
    assert content(target).keys() - mine.keys() == one_shard
    merge(folders, target, "1KB", 0.2)
    after = content(target)
    assert {name: after[name] for name in mine} == mine
    assert after.keys() - mine.keys() == written
    assert (target / "link").is_symlink() and (target / "link" / "a.csv").is_file()
    assert (target / "empty").is_dir()
    assert written_recipe(target)["options"] == {"scaling_factor": 0.2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "merged"]


def test_a_file_that_appears_during_the_merge_stays(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = merge(folders, tmp_path / "merged")

    def late(*_: object) -> str:
        (target / "late.txt").write_text("mine")
        return "# Card"

    monkeypatch.setattr(saving, "card", late)
    merge(folders, target)
    assert (target / "late.txt").read_text() == "mine"


def test_a_failure_while_files_are_renamed_leaves_what_there_was(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = merge(folders, tmp_path / "merged", "1KB")
    before, replace, failing = content(target), Path.replace, True

    def fails(source: Path, place: Path) -> Path:
        if failing and place == target / "model.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(source, place)

    monkeypatch.setattr(Path, "replace", fails)
    monkeypatch.setattr(writer, "_exchange", lambda *_: False)
    with pytest.raises(UnwritableError, match=rf"cannot write {target}: Input/output error"):
        merge(folders, target, coef=0.1)
    assert content(target) == before and {p.name for p in target.iterdir()} == set(before)
    failing = False
    merge(folders, target, coef=0.1)
    assert "model-00001-of-00002.safetensors" not in content(target)


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_mount_point_is_written_into(
    earlier: bool,
    writable: bool,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, replace, make = tmp_path / "mount", Path.replace, tempfile.mkdtemp
    target.mkdir()
    if earlier:
        merge(folders, target, "1KB")

    def within(source: Path, place: Path) -> Path:
        if target in (source, place):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        if (target in source.parents) != (target in place.parents):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return replace(source, place)

    def not_beside(dir: Path, **names: str) -> str:
        if not writable and target not in (dir, *dir.parents):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return make(dir=dir, **names)

    monkeypatch.setattr(Path, "replace", within)
    monkeypatch.setattr("tempfile.mkdtemp", not_beside)
    assert merge(folders, target) == target
    written = {"model.safetensors", "config.json", "vocab.txt", CARD, RECIPE}
    assert content(target).keys() == written == {p.name for p in target.iterdir()}


@pytest.mark.skipif(os.name != "posix", reason="links and modes")
@pytest.mark.parametrize("place", ["link", ".", "merged"])
def test_a_folder_keeps_its_place_and_its_mode(
    place: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "merged"
    target.mkdir()
    target.chmod(0o2770)
    (tmp_path / "link").symlink_to("merged")
    before = target.stat()
    monkeypatch.chdir(target if place == "." else tmp_path)
    for _ in range(2):
        merge(folders, place)
        assert target.stat().st_mode == before.st_mode
        assert place != "." or target.stat().st_ino == before.st_ino  # where the user's shell is
        assert written_recipe(target) and (tmp_path / "link").is_symlink()
    assert (target / CARD).read_text().splitlines().count("# merged") == 1


@pytest.mark.skipif(os.name != "posix", reason="links and modes")
def test_a_new_folder_has_the_mode_of_the_user_and_may_be_a_link(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("deep/merged")
    earlier = os.umask(0o077)
    try:
        merge(folders, tmp_path / "link")
    finally:
        os.umask(earlier)
    target = tmp_path / "deep" / "merged"
    assert (tmp_path / "link").is_symlink() and written_recipe(target)
    assert target.stat().st_mode & 0o777 == 0o700


def foreign_weights(target: Path) -> None:
    save_file(layers(9), str(target / "model.safetensors"))


def linked_weights(target: Path) -> None:
    (target / "model.safetensors").rename(target / "other.safetensors")
    (target / "model.safetensors").symlink_to("other.safetensors")


def folder_of_this_name(target: Path) -> None:
    (target / "vocab.txt").unlink()
    (target / "vocab.txt").mkdir()


def writes(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda target: (target / name).write_bytes(data)


CHANGED, FOREIGN = "which an earlier merge did not write or", "holds other files; expected a new"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (writes("config.json", b"{}"), f"holds config.json, {CHANGED}"),
        (writes(CARD, b"# Mine"), f"holds README.md, {CHANGED}"),
        (foreign_weights, f"holds model.safetensors, {CHANGED}"),
        (linked_weights, f"holds model.safetensors, {CHANGED}"),
        (folder_of_this_name, f"holds vocab.txt, {CHANGED}"),
        (writes(RECIPE, b'{"flour": "500 g"}'), FOREIGN),
        (writes(RECIPE, b"\xff\xfe{"), FOREIGN),
        (writes(RECIPE, b"[" * 100_000), FOREIGN),
        (lambda target: (target / RECIPE).unlink(), FOREIGN),
    ],
)
def test_changed_files_are_not_replaced(
    change: Callable[[Path], object],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    target = merge(folders, tmp_path / "merged")
    change(target)
    request.getfixturevalue("no_work")
    refuse(folders, target, message, target)


def test_folders_of_earlier_versions_are_recognised(files: dict[str, Path], tmp_path: Path) -> None:
    """Their recipes have no list of files; the weights show that a merge wrote them."""
    target = merge(files, tmp_path / "merged", "1KB")
    recipe = json.loads((target / RECIPE).read_text())
    assert set(recipe.pop("files")) == {path.name for path in target.iterdir()} - {RECIPE}
    (target / RECIPE).write_text(json.dumps(recipe))
    (target / CARD).unlink()
    (target / "notes.md").write_text("mine")
    merge(files, target)
    assert {p.name for p in target.iterdir()} == {"model.safetensors", RECIPE, CARD, "notes.md"}


def test_only_merged_files_are_replaced(files: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "out" / "merged.safetensors"
    target.parent.mkdir()
    for data in (b"", b"mine", files["a"].read_bytes()):
        target.write_bytes(data)
        refuse(files, target, "exists and is not the result of a merge", target.parent)
    target.unlink()
    before = merge(files, target).read_bytes()
    assert merge(files, target, coef=0.7).read_bytes() != before
    (tmp_path / "x.safetensors").mkdir()
    refuse(files, tmp_path / "x.safetensors", "is a folder; expected a file", tmp_path)


# --- the models themselves


def hard_link(place: Path) -> Path:
    os.link(place, place.parent.parent / "hard.safetensors")
    return place.parent.parent / "hard.safetensors"


def symbolic_link(place: Path) -> Path:
    (place.parent.parent / "link.safetensors").symlink_to(place)
    return place.parent.parent / "link.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        lambda place: place,
        lambda place: place.parent / ".." / place.parent.name / place.name,
        lambda place: place.with_suffix(".pt"),  # means .safetensors
        lambda place: Path(place.name),  # in the working folder
        symbolic_link,
        hard_link,
    ],
)
def test_a_merged_file_is_not_overwritten(
    name: Callable[[Path], Path],
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path / "in")
    message = "is the model a itself; choose another path"
    refuse(files, name(files["a"]), message, tmp_path / "in")


def test_no_file_takes_precedence_over_a_pickled_model(tmp_path: Path) -> None:
    """x.safetensors is read instead of x.pt."""
    models = {name: tmp_path / f"{name}.pt" for name in NAMES}
    for name, path in models.items():
        torch.save(STATES[name], path)
    for name in ("a.pt", "a.safetensors"):
        refuse(models, tmp_path / name, "is the model a itself", tmp_path)
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
def test_the_folder_of_a_merged_model_is_not_written_to(
    target: str, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(folders["_pretrained_"])
    refuse(folders, tmp_path / target, message, tmp_path)


def test_a_result_that_is_merged_again_is_not_replaced(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    target = merge(folders, tmp_path / "merged")
    weights = target / "model.safetensors"
    for place in (target, weights):
        refuse({**folders, "a": place}, target, "is the model a itself; choose another", target)
    weights.rename(target / "model-00001-of-00001.safetensors")
    moved = {**folders, "a": target / "model-00001-of-00001.safetensors"}
    refuse(moved, target, "holds the model a; choose another folder", target)


def test_models_below_the_merged_folder_stay(folders: dict[str, Path], tmp_path: Path) -> None:
    target = merge(folders, tmp_path / "merged")
    (target / "parts").mkdir()
    moved = {name: folders[name].rename(target / "parts" / name) for name in NAMES}
    before = content(target / "parts")
    merge(moved, target, coef=0.9)
    assert content(target / "parts") == before
    assert written_recipe(target)["options"] == {"scaling_factor": 0.9}


def test_checkpoints_are_recognised_under_other_names(tmp_path: Path) -> None:
    """`X/finetuned.pt` is read from `XVal/finetuned.safetensors`, which is not overwritten."""
    models = {**encoder_files(tmp_path), "MNIST": tmp_path / "MNIST" / "finetuned.pt"}
    refuse(models, tmp_path / "MNISTVal" / "finetuned.pt", "is the model MNIST itself", tmp_path)
    refuse(models, tmp_path / "zeroshot.safetensors", "is the model _pretrained_ its", tmp_path)


# --- places that cannot be written


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
@pytest.mark.parametrize("place", ["in/a.safetensors/x", "x" * 300, f"{'y' * 300}/x", "a\0b"])
def test_impossible_places_are_refused_before_the_work(
    suffix: str, place: str, files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"cannot (write|be read)"):
        merge(files, f"{tmp_path}/{place}{suffix}")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_unwritable_places_are_refused_before_the_work(
    suffix: str, code: int, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(UnwritableError, match=rf"cannot write .*merged{suffix}: .*; make room"):
        merge(files, tmp_path / f"merged{suffix}")


def test_the_longest_names_work(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("x" * 255, "y" * 243 + ".safetensors"):
        path = merge(files, tmp_path / name)
        for key, value in load_file(path / "model.safetensors" if path.is_dir() else path).items():
            theta0, a, b = (STATES[name][key] for name in NAMES)
            torch.testing.assert_close(value, theta0 + 0.5 * (a + b - 2 * theta0))
    assert not list(tmp_path.glob(".*"))


def configuration(files: dict[str, Path], **more: object) -> dict[str, Any]:
    models = {name: str(path) for name, path in files.items()}
    return {
        "fabric": {},
        "path": {"data_dir": "data", "log_dir": "logs"},
        "method": {"_target_": "src.merging.TaskArithmeticAlgorithm", "scaling_factor": 0.5},
        "modelpool": {"_target_": "src.merging.ModelPool", "models": models},
        "taskpool": {"_target_": "src.merging.DummyTaskPool"},
        **more,
    }


PARTS = ("model.safetensors", "merge_recipe.json", "README.md")


def test_a_report_replaces_only_a_report(files: dict[str, Path], tmp_path: Path) -> None:
    place, notes = tmp_path / "report.json", tmp_path / "in" / "notes.json"
    notes.write_text('{"mine": 1}')
    for coef in (0.5, 0.6):
        config = configuration(files, report_save_path=str(place))
        config["method"]["scaling_factor"] = coef
        run(config)
        assert json.loads(place.read_text())["merge"]["options"] == {"scaling_factor": coef}
    before = content(tmp_path / "in")
    for wrong in (files["a"], notes, tmp_path):
        with pytest.raises(UsageError, match=r"is not a report|cannot be read|is not a file"):
            run(configuration(files, report_save_path=str(wrong)))
    same = {
        "report_save_path": str(tmp_path / "in" / ".." / "m.safetensors"),
        "merged_model_save_path": str(tmp_path / "m.safetensors"),
    }
    folder = {"merged_model_save_path": str(tmp_path / "out")}
    parts = [{"report_save_path": str(tmp_path / "out" / name)} for name in PARTS]
    for places in (same, *({**folder, **part} for part in parts)):
        with pytest.raises(UsageError, match="is also the path of the merged model"):
            run(configuration(files, **places))
    assert content(tmp_path / "in") == before


def test_all_places_are_checked_before_coefficients_are_tried(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tangent_arithmetic.merging import program

    monkeypatch.setattr(program, "task_pool_of", lambda *_: object())
    monkeypatch.setattr(program, "choose_scaling_factor", lambda *_: 1 / 0)
    auto = {"_target_": "src.merging.TaskArithmeticAlgorithm", "scaling_factor": "auto"}
    for key, place in (("merged_model", files["a"]), ("report", files["a"] / "x")):
        with pytest.raises(UsageError, match=r"itself; choose another path|cannot write"):
            run(configuration(files, method=auto, **{f"{key}_save_path": str(place)}))


# --- what is copied


def test_the_tokenizer_is_copied_byte_for_byte(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token, a label or a merge rule may be spelled like the home folder."""
    monkeypatch.setenv("HOME", "/app")
    base = folders["_pretrained_"]
    texts = {name: '{"~": 4,  "/app": 12}' for name in ("vocab.json", "tokenizer.json")}
    texts |= {"tokenizer_config.json": '{"pad_token": "/app"}', "x.spm": "/app"}
    for name, text in texts.items():
        (base / name).write_text(text)
    config = {"id2label": {"0": "/app"}, "text_config": {"_name_or_path": "/app/gpt"}, "e": 1e-5}
    (base / "config.json").write_text(json.dumps(config))
    target = merge(folders, tmp_path / "merged")
    assert {name: (target / name).read_text() for name in texts} == texts
    shared = {**config, "text_config": {"_name_or_path": "~/gpt"}}
    assert json.loads((target / "config.json").read_text()) == shared


def test_all_that_the_base_model_needs_is_copied(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, modules = folders["_pretrained_"], ("1_Pooling", "2_Dense", "..")
    needed = ("source.spm", "qwen.tiktoken", "a.bpe", "1_Pooling/config.json", "2_Dense/d.json")
    for name in (*needed, "own.py", "notes/a.txt", "train.log"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    save_file(layers(9), str(base / "2_Dense" / "model.safetensors"))
    (base / "modules.json").write_text(json.dumps([{"path": path} for path in ("", *modules)]))
    target = merge(folders, tmp_path / "merged")
    kept = {"model.safetensors", "config.json", "vocab.txt", CARD, RECIPE, "modules.json"}
    kept |= {*needed, "2_Dense/model.safetensors"}
    assert content(target).keys() == kept
    assert f"weights in {base}/2_Dense are copied from the base model" in caplog.text
    (base / "config.json").write_text('{"auto_map": {"AutoModel": "own.Model"}}')
    merge(folders, target)
    assert content(target).keys() == {*kept, "own.py"}
    (target / "1_Pooling" / "mine.txt").write_text("mine")
    refuse(folders, target, f"holds 1_Pooling, {CHANGED}", target)


# --- what is shared


def test_no_written_file_contains_the_home_folder(
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
    for path in (target, single):
        assert written_recipe(path)["models"]["a"]["place"] == "~/a"
    assert json.loads((target / "config.json").read_text())["_name_or_path"] == "~/a"


def test_merged_checkpoints_have_a_checksum_of_their_header(tmp_path: Path) -> None:
    path = merge(encoder_files(tmp_path), tmp_path / "merged.safetensors")
    assert load_checkpoint(path).info["merge_recipe"]["method"] == "task_arithmetic"
    data = path.read_bytes()
    assert data.count(b"task_arithmetic") == 1
    path.write_bytes(data.replace(b"task_arithmetic", b"task_aRithmetic"))
    with pytest.raises(UsageError, match="its header's checksum differs"):
        read_header(path)
