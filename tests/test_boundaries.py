"""Each boundary to a file: whatever is wrong with it, the answer is a value or an error of ours.

A boundary is a maker of a good file and its reader. The good file is damaged at random: bytes are
cut, flipped, overwritten, added; the JSON in it gets other values; it is replaced by a file of
another kind, a folder, a link to itself. An error that is not a `UsageError`, or that does not name
the file, is a failure.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from tangent_arithmetic.analysis.tables import read_table, table_path
from tangent_arithmetic.arithmetic.features import _read_all, _write
from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.artificial_data.workspace import Workspace
from tangent_arithmetic.commands import merge
from tangent_arithmetic.data.clip20 import PUBLIC_SETS
from tangent_arithmetic.data.files import class_pictures
from tangent_arithmetic.data.loading import SeededPictures
from tangent_arithmetic.data.prepare.arrange import listed
from tangent_arithmetic.data.prepare.unpack import gunzip, unpack
from tangent_arithmetic.data.sources import load_public
from tangent_arithmetic.encoders import mlp as models
from tangent_arithmetic.encoders.clip import create_clip
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts
from tangent_arithmetic.merging.adapters import open_adapters
from tangent_arithmetic.merging.cards import licence_of
from tangent_arithmetic.merging.vocabulary import Tokens
from tangent_arithmetic.merging.weights import held, open_clip_vision, open_weights
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.results import complete_results, load_results, optional_results
from tangent_arithmetic.run.results import merge as merged
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.reading import read_json, read_text
from tangent_arithmetic.storage.states import RunStates
from tangent_arithmetic.storage.unpickler import read_pickle
from tests.archives import tar_bytes, zip_bytes
from tests.encoders.makers import PublishedHead, named, small_models, write_encoder
from tests.miniatures import MAKERS, picture
from tests.towers import TOWERS

Make = Callable[[Path], Path]
Read = Callable[[Path], Any]
GENERATOR = torch.Generator().manual_seed(0)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 350837024\n"
DATA_SETS = {"ImageNet": 1, "SUN397": 1}  # examples, of those with a great many folders
SLOW = pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])


@dataclass(frozen=True)
class Boundary:
    """Where a kind of file comes in.

    Attributes:
        make: writes good files into a folder and returns the one to damage.
        read: reads all of it.
        examples: damaged files to try.
    """

    make: Make
    read: Read
    examples: int = 10


def tensors(*shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"t{i}.weight": torch.randn(s, generator=GENERATOR) for i, s in enumerate(shapes)}


# --- makers of good files


def saved(name: str, write: Callable[[Path], object]) -> Make:
    """A maker of one file."""

    def make(folder: Path) -> Path:
        write(folder / name)
        return folder / name

    return make


def written(name: str, content: bytes | str) -> Make:
    data = content.encode() if isinstance(content, str) else content
    return saved(name, lambda path: path.write_bytes(data))


def tiny() -> ImageEncoder:
    return ImageEncoder(Config(model="ViT-Tiny__init__"))


def published_encoder(writer: str) -> Make:
    return saved("published.pt", lambda path: write_encoder("ViT-Tiny", path, writer))


def write_published_head(path: Path) -> None:
    with named(ClassificationHead=PublishedHead):
        torch.save(PublishedHead(True, torch.randn(5, 8)), path)


HF_VISION: dict[str, Any] = {  # ViT-Tiny's
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 8,
    "hidden_act": "quick_gelu",
}


def hugging_face(damaged: str) -> Make:
    """A folder of a CLIP's vision tower, of which one file is damaged."""

    def make(folder: Path) -> Path:
        import transformers

        config = transformers.CLIPVisionConfig(**HF_VISION)
        model = transformers.CLIPVisionModelWithProjection(config)
        model.save_pretrained(folder, safe_serialization=True)
        if damaged.endswith("index.json"):
            names = list(model.state_dict())
            (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
            weights = dict.fromkeys(names, "model-00001-of-00001.safetensors")
            (folder / damaged).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
        return folder / damaged

    return make


def state_of_run(folder: Path) -> Path:
    states = RunStates(folder / "finetuned.safetensors", {"lr": 0.1})
    states.save(tensors((3,)), 7, {"seconds": 1.0})
    return states.folder / f"{7:08d}.safetensors"


def read_state(path: Path) -> Any:
    return RunStates(path.parent.parent / "finetuned.safetensors", {"lr": 0.1}).newest()


ORIGIN = {"theta0_hash": "a", "seed": 0, "config": {"precision": "fp32"}, "checkpoints": {}}
RESULTS = {"MNIST": 0.5, "MNISTVal": 0.5, "val": {"0.15": {"MNIST:top1": 0.5}}}


def read_results(path: Path) -> Any:
    optional_results(path)
    new = {"DTD": 1.0, "provenance": {"theta0_hash": "a", "seed": 0, "suite": "s", "model": "m"}}
    with_others = merged(path, new)
    return load_results(path), complete_results(path, "a command", ["MNIST"]), with_others


def table_file(folder: Path) -> Path:
    path = table_path(Run.of(Config(results=str(folder))), "single")
    path.parent.mkdir(parents=True)
    pd.DataFrame({"mode": ["linear"], "accuracy": [0.5]}).to_csv(path, index=False)
    return path


def read_table_file(path: Path) -> Any:
    return read_table(Run.of(Config(results=str(path.parents[3]))), "single")


def study_data(folder: Path) -> Path:
    path = Workspace(folder).csv("dataset1", "train")
    path.parent.mkdir()
    rows = {"0": [i / 40 for i in range(40)], "1": [1.0] * 40, "target": [0, 1] * 20}
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def class_folders(folder: Path) -> Path:
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        picture(folder / name, 100)
    return folder / "a" / "1.png"


def read_all(pictures: Any) -> Any:
    seeded = SeededPictures(pictures, None)
    return [seeded[i] for i in range(len(seeded))]


def config_group(folder: Path) -> Path:
    (folder / "method").mkdir()
    path = folder / "method" / "own.yaml"
    path.write_text(yaml.safe_dump({"name": "simple_average", "_target_": "simple_average"}))
    return path


def compose(path: Path) -> None:
    """A dry run with it; the exit code is the boundary's answer."""
    words = [f"--config-dir={path.parent.parent}", "method=own", "dry_run=true"]
    code = merge.main([*words, f"hydra.run.dir={path.parent.parent}"])
    assert code in (0, 2)


FILES = {"a/1.txt": b"one" * 40, "b.txt": b"two"}


def into(unpacker: Callable[[Path, Path], None]) -> Read:
    def read(path: Path) -> None:
        target = path.parent / "unpacked"
        target.mkdir(exist_ok=True)
        unpacker(path, target)

    return read


ADAPTED = {"net.0.weight": torch.zeros(3, 4), "net.0.bias": torch.zeros(3)}
FACTORS = {"A": torch.ones(2, 4), "B": torch.ones(3, 2)}


def adapters(damaged: str) -> Make:
    """A folder of adapters for `ADAPTED`, of which one file is damaged."""

    def make(folder: Path) -> Path:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"net.*": 3}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        state = {f"base_model.model.net.0.lora_{n}.weight": v for n, v in FACTORS.items()}
        save_file(state, str(folder / "adapter_model.safetensors"))
        return folder / damaged

    return make


def open_adapted(folder: Path) -> None:
    weights = open_adapters(folder, held(ADAPTED))
    for name in weights.outline if weights is not None else ():
        assert weights is not None and weights.read(name).shape == ADAPTED[name].shape


def below(read: Read) -> Read:
    """Reads the folder of a file."""
    return lambda path: read(path.parent)


CACHE = {"features": torch.ones(3, 2), "labels": torch.arange(3)}
TOWER = {"model_cfg": TOWERS["ViT-Tiny"], "preprocess_cfg": {}}
CHECKPOINT = saved(
    "ours.safetensors",
    lambda path: save_tensors(path, tensors((3, 4), (2,)), "task_vector", info={"a": [1]}),
)
ENCODER = saved("encoder.safetensors", lambda path: tiny().save(path))
LINEAR = saved(
    "linear.safetensors", lambda path: LinearizedImageEncoder(image_encoder=tiny()).save(path)
)
HEAD = saved(
    "head_MNIST.safetensors", lambda path: ClassificationHead(True, torch.randn(5, 8)).save(path)
)
VECTOR = saved(
    "vector.safetensors", lambda path: TaskVector(vector=tensors((2, 2), (3,))).save(path)
)
BACKBONE = saved("mlp.safetensors", lambda path: models.BackBone(input_dim=8).save(path))
MLP_HEAD = saved("mlp.safetensors", lambda path: models.Head(input_dim=4, output_dim=2).save(path))
INDEX = "model.safetensors.index.json"
BOUNDARIES = {
    "our checkpoint": Boundary(CHECKPOINT, load_checkpoint),
    "its facts": Boundary(CHECKPOINT, read_facts),
    "our encoder": Boundary(ENCODER, ImageEncoder.load),
    "our linear encoder": Boundary(LINEAR, LinearizedImageEncoder.load),
    "our head": Boundary(HEAD, ClassificationHead.load),
    "our task vector": Boundary(VECTOR, TaskVector.load),
    "a task vector of it": Boundary(ENCODER, lambda path: TaskVector(path, path)),
    "a backbone": Boundary(BACKBONE, models.BackBone.load),
    "an MLP's head": Boundary(MLP_HEAD, models.Head.load),
    "a published encoder": Boundary(published_encoder("zip"), load_checkpoint),
    "an old published encoder": Boundary(published_encoder("legacy"), load_checkpoint),
    "a plain pickle": Boundary(published_encoder("pickle 4"), load_checkpoint),
    "a pickle": Boundary(published_encoder("zip"), read_pickle),
    "a published head": Boundary(
        saved("head_MNIST.pt", write_published_head), ClassificationHead.load
    ),
    "weights to merge": Boundary(CHECKPOINT, open_weights),
    "published weights to merge": Boundary(published_encoder("zip"), open_weights),
    "a folder's config": Boundary(hugging_face("config.json"), below(load_checkpoint)),
    "a folder's weights": Boundary(hugging_face("model.safetensors"), below(load_checkpoint)),
    "a folder's index": Boundary(hugging_face(INDEX), below(load_checkpoint)),
    "a folder to merge": Boundary(hugging_face(INDEX), below(open_clip_vision)),
    "a folder's weights to merge": Boundary(
        hugging_face("model.safetensors"), below(open_clip_vision)
    ),
    "adapters to merge": Boundary(adapters("adapter_model.safetensors"), below(open_adapted)),
    "a configuration of adapters": Boundary(adapters("adapter_config.json"), below(open_adapted)),
    "a tokenizer": Boundary(
        written("tokenizer.json", json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []})),
        lambda path: Tokens.of(path.parent, "a"),
    ),
    "a model card": Boundary(
        written("README.md", "---\nlicense: mit\n---\n# A model\n"), below(licence_of)
    ),
    "a local model": Boundary(
        written("open_clip_config.json", json.dumps(TOWER)),
        lambda path: create_clip(f"local-dir:{path.parent}__init__"),
    ),
    "a state of a run": Boundary(state_of_run, read_state),
    "a cache of features": Boundary(
        saved("f0.safetensors", lambda path: _write(path, CACHE)),
        lambda path: _read_all(path.parent, ["f0"], torch.arange(3)),
    ),
    "results": Boundary(
        written("ft_accuracies.json", json.dumps({**RESULTS, "provenance": ORIGIN})), read_results
    ),
    "a table": Boundary(table_file, read_table_file),
    "a study's data": Boundary(
        study_data, lambda path: Workspace(path.parent.parent).data("dataset1", "val")
    ),
    "JSON": Boundary(written("facts.json", '{"a": {"b": [1, 2.5, null]}}'), read_json),
    "a text": Boundary(written("names.txt", "a\nb\n"), read_text),
    "a list of files": Boundary(written("train.txt", "a/1.jpg\nb/2.jpg\n"), listed),
    "a zip archive": Boundary(written("files.zip", zip_bytes(FILES)), into(unpack)),
    "a tar archive": Boundary(written("files.tar", tar_bytes(FILES, "w")), into(unpack)),
    "a packed tar archive": Boundary(written("files.tgz", tar_bytes(FILES)), into(unpack)),
    "a tar.xz archive": Boundary(written("files.tar.xz", tar_bytes(FILES, "w:xz")), into(unpack)),
    "a packed file": Boundary(
        written("file.gz", gzip.compress(b"content" * 99)),
        into(lambda path, target: gunzip(path, target / "file")),
    ),
    "a folder of pictures": Boundary(
        class_folders, lambda path: read_all(class_pictures(path.parent.parent))
    ),
    "a group of a configuration": Boundary(config_group, compose, 2),
}


# --- damage


def pickled(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


ODD = [
    {"state_dict": 5},
    {"state_dict": {"a": {"b": torch.ones(2)}}},
    {"model.visual.proj": torch.ones(2, dtype=torch.complex64), 3: torch.ones(1)},
    {"classnames": [1], "weight": torch.ones(2, 2, dtype=torch.int64)},
    [torch.ones(2)],
    {},
    {"model_name": ["x"], "weights": []},
    nn.Linear(2, 2),
    {"metadata": {"model_name": {}}, **{f"{i}": torch.ones(i) for i in range(3)}},
]
NUMBERS: list[Any] = [None, True, -1, 0, 2**70, 1e308, float("nan")]
TEXTS: list[Any] = ["", "x", "\x1b[31m", "../../x", "9" * 5000]
JSON_VALUES = [*NUMBERS, *TEXTS, [], [[]], {}, {"a": 1}, ["a", 1]]
OTHERS: list[bytes] = [
    b"",
    b"\0" * 64,
    LFS,
    "a\nb\n".encode("utf-16"),
    b"\xff\xfe\xfd",
    b"null",
    b"[]",
    b'"text"',
    b'{"a": 1}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a": ' + b"9" * 10_000 + b"}",
    b"a,b\n1\n",
    b"_target_: os.system\ncommand: echo\n",
    b"a: &x [*x]\n? [1]\n: !!python/object:os.system {}\n",
    zip_bytes(FILES),
    zip_bytes({"archive/data.pkl": b"\x80\x02}q\x00."}),
    tar_bytes(FILES),
    gzip.compress(b"x"),
    b"\x89PNG\r\n\x1a\n" + b"\0" * 32,
    b"\x80\x04N.",
    struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 2) + b"{}",
    struct.pack("<Q", 2) + b"[]",
    save({}),
    save({"a": torch.ones(2)}),
    save({"weight": torch.ones(2, 2, dtype=torch.float16), "bias": torch.ones(5)}),
    *map(pickled, ODD),
    *(pickled(value, _use_new_zipfile_serialization=False) for value in ODD),
]


def replaced(value: Any, data: st.DataObject) -> Any:
    """JSON-like data in which something, perhaps deep, is another value, gone or renamed."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 3)):
        key = data.draw(st.sampled_from(sorted(value)))
        rest = {name: inner for name, inner in value.items() if name != key}
        how = data.draw(st.sampled_from(["inside", "inside", "gone", "renamed"]))
        if how == "inside":
            return {**value, key: replaced(value[key], data)}
        return rest if how == "gone" else {**rest, data.draw(st.text(max_size=9)): value[key]}
    if isinstance(value, list) and value and data.draw(st.integers(0, 2)):
        i = data.draw(st.integers(0, len(value) - 1))
        return [*value[:i], replaced(value[i], data), *value[i + 1 :]]
    if isinstance(value, str) and value[:1] == "{" and data.draw(st.booleans()):
        return json.dumps(replaced(json.loads(value), data))  # of safetensors' metadata
    return data.draw(st.sampled_from(JSON_VALUES))


def with_other_values(content: bytes, data: st.DataObject) -> bytes | None:
    """The content with other values in its JSON, if it has any."""
    for head, start in ((b"", 0), (content[:8], 8)):
        end = len(content) if not head else 8 + struct.unpack("<Q", head.ljust(8, b"\0"))[0]
        try:
            value = json.loads(content[start:end])
        except ValueError:
            continue
        made = json.dumps(replaced(value, data)).encode()
        return (struct.pack("<Q", len(made)) if head else b"") + made + content[end:]
    return None


def damage(path: Path, content: bytes, data: st.DataObject) -> None:
    """Replaces a file with a damaged one."""
    size = len(content)
    kinds = ["cut", "flip", "overwrite", "add", "other", "values", "values", "values", "nothing"]
    kind = data.draw(st.sampled_from([*kinds, "folder", "loop"]))
    at = data.draw(st.integers(0, max(0, size - 1)))
    if kind in ("folder", "loop", "nothing"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        return
    if kind == "values":
        made = with_other_values(content, data)
        kind, content = ("done", made) if made is not None else ("flip", content)
    if kind == "cut":
        content = content[:at]
    elif kind == "flip":
        flipped = bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))])
        content = content[:at] + flipped + content[at + 1 :]
    elif kind == "overwrite":
        junk = data.draw(st.binary(min_size=1, max_size=40))
        content = content[:at] + junk + content[at + len(junk) :]
    elif kind == "add":
        content = content[:at] + data.draw(st.binary(min_size=1, max_size=40)) + content[at:]
    elif kind == "other":
        content = data.draw(st.sampled_from(OTHERS))
    path.write_bytes(content)


def check(read: Read, path: Path, root: Path | None = None) -> None:
    """Reads a damaged file: the result is a value or a UsageError that names the file or folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about the content; only errors matter here
        try:
            read(path)
        except UsageError as error:
            names = (path.name, path.stem, str(root or path.parent))
            assert any(name in str(error) for name in names), error
            assert "\x1b" not in str(error) and len(str(error)) < 50_000


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with small_models(tmp_path_factory.mktemp("towers")):
        yield


@SLOW
@pytest.mark.parametrize("name", BOUNDARIES)
def test_no_damage_gets_past_a_boundary(
    name: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boundary, good = BOUNDARIES[name], tmp_path / "good"
    monkeypatch.chdir(tmp_path)
    good.mkdir()
    inner = boundary.make(good).relative_to(good)
    content = (good / inner).read_bytes()
    boundary.read(good / inner)

    @settings(max_examples=times * boundary.examples)
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        place = tmp_path / "damaged"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(good, place)
        damage(place / inner, content, data)
        check(boundary.read, place / inner)

    attempt()


@SLOW
@pytest.mark.parametrize("name", MAKERS)
def test_no_damage_to_a_data_set_gets_past(
    name: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "good"
    root.mkdir()
    MAKERS[name](root, monkeypatch)
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    kinds = {path.suffix: path for path in files}  # often one of each kind of file, or any

    def read() -> None:
        splits = load_public(name, PUBLIC_SETS[name], root, "folder")
        for pictures in (splits.train, splits.val, splits.test):
            if pictures is not None:
                read_all(pictures)

    @settings(max_examples=times * DATA_SETS.get(name, 4))
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        path = root / data.draw(st.sampled_from([*kinds.values(), *files]))
        content = path.read_bytes()
        try:
            damage(path, content, data)
            check(lambda _: read(), path, root)
        finally:
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_bytes(content)

    read()
    attempt()
