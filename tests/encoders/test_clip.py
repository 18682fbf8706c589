"""CLIP by name: names, weights, activation, transforms, the hub, and the embedded model."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.push_to_hf_hub import save_for_hf
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import tangent_arithmetic.encoders.clip
from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.data.embedded.model import WEIGHTS, register
from tangent_arithmetic.encoders.clip import ClipName, canonical, create_clip, outline
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.merging import ModelPool
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.reading import LFS_POINTER
from tests.loopback_hub import elsewhere, hub
from tests.towers import TOWERS, known_towers

NAME = "ViT-Nano-8"
STOCK_VOCABULARY = 49408


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The calls of open_clip, which then builds an empty model."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create(architecture: str, **kwargs: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
        calls.append((architecture, kwargs))
        model: Any = nn.Linear(1, 1)
        model.visual = nn.Identity()
        model.visual.preprocess_cfg = {}
        return model, nn.Identity(), nn.Identity()

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    return calls


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "architecture", "pretrained"),
    [
        ("ViT-B-32", "ViT-B-32", "openai"),
        ("ViT-B-32__pretrained__laion2b_s34b_b79k", "ViT-B-32", "laion2b_s34b_b79k"),
        ("ViT-L-14__init__", "ViT-L-14", None),
        ("coca_ViT-B-32__pretrained__laion2b", "coca_ViT-B-32", "laion2b"),
        ("ViT-B-32__pretrained__my/file.pt", "ViT-B-32", "my/file.pt"),
        ("ViT-Nano-8", "ViT-Nano-8", str(WEIGHTS)),
        ("ViT-Nano-8__init__", "ViT-Nano-8", None),
        ("ViT-Nano-8__pretrained__my.safetensors", "ViT-Nano-8", "my.safetensors"),
        ("hf-hub:org/name", "hf-hub:org/name", ""),
        ("local-dir:folder__init__", "local-dir:folder", None),
    ],
)
def test_names_are_parsed_into_architecture_and_weights(
    name: str, architecture: str, pretrained: str | None
) -> None:
    assert ClipName.parse(name) == ClipName(architecture, pretrained)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-33", "unknown model 'ViT-B-33'; choose from ViT-B-32, "),
        ("vit-nano-8", "unknown model 'vit-nano-8'; choose from ViT-Nano-8, "),
        (
            "ViT-B-32__pretrained__laion2b_s34b",
            "unknown weights of ViT-B-32 'laion2b_s34b'; choose from laion2b_s34b_b79k, ",
        ),
        ("ViT-Nano-8__pretrained__openai", "unknown weights of ViT-Nano-8 'openai'"),
        ("hf-hub:a/b__pretrained__openai", "has its own weights; remove __pretrained__openai"),
    ],
)
def test_unknown_names_list_the_nearest_first(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_clip(name)


@pytest.mark.parametrize(
    ("name", "pretrained", "quick"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-B-32__pretrained__laion400m_e32", "laion400m_e32", True),
        ("ViT-B-32__pretrained__datacomp_xl_s13b_b90k", "datacomp_xl_s13b_b90k", False),
        ("ViT-B-32-quickgelu__pretrained__metaclip_400m", "metaclip_400m", True),
        ("ViT-B-32__init__", None, False),
    ],
)
def test_quick_gelu_goes_with_the_weights(
    name: str, pretrained: str | None, quick: bool, tmp_path: Path, calls: list[Any]
) -> None:
    """OpenAI's weights lose up to four points with the activation that the name stands for."""
    model: Any = create_clip(name, tmp_path)[0]
    [(architecture, kwargs)] = calls
    assert architecture == name.partition("__")[0]
    assert kwargs["pretrained"] == pretrained
    assert kwargs["cache_dir"] == str(tmp_path)
    assert kwargs.get("force_quick_gelu", False) is quick
    assert model.name == name and not model.training
    assert model.tokenizer.vocab_size == STOCK_VOCABULARY


# --- weights from files, folders and the hub


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("towers")
    with known_towers(folder):
        yield folder


@pytest.fixture(scope="module")
def published(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP as open_clip's users publish one, with transforms of its own."""
    folder = tmp_path_factory.mktemp("published") / "org" / "tiny"
    model = open_clip.create_model("SigLIP-Tiny", force_preprocess_cfg={"mean": (0.1, 0.2, 0.3)})
    tokenizer: Any = open_clip.get_tokenizer("SigLIP-Tiny")
    config = json.loads((towers / "SigLIP-Tiny.json").read_text())
    config["text_cfg"]["hf_tokenizer_name"] = "org/tiny"
    save_for_hf(model, tokenizer, config, str(folder), safe_serialization=True)
    return folder


def described(name: str, cache_dir: Path | None = None) -> dict[str, Any]:
    """The outputs of a CLIP for fixed inputs."""
    model: Any
    model, train, val = create_clip(name, cache_dir)
    picture = Image.new("RGB", (40, 32), (0, 51, 255))
    with torch.no_grad():
        return {
            "images": model.encode_image(torch.ones(1, 3, 32, 32))[0].tolist(),
            "texts": model.encode_text(model.tokenizer(["a photo of the face ."]))[0].tolist(),
            "val": val(picture).flatten()[::100].tolist(),
            "train": train(picture).mean((1, 2)).tolist(),
        }


def test_a_folder_with_configuration_and_weights(published: Path) -> None:
    found = described(f"local-dir:{published}")
    mean = torch.tensor([0.1, 0.2, 0.3])
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)
    expected = (torch.tensor([0.0, 0.2, 1.0]) - mean) / std
    torch.testing.assert_close(torch.tensor(found["train"]), expected, atol=1e-4, rtol=1e-4)
    encoder = ImageEncoder.without_weights(f"local-dir:{published}")
    assert sorted({n.split(".")[1] for n in encoder.weights()}) == ["visual"]


DESCRIBE = """
import json, sys
from pathlib import Path
from tests.encoders.test_clip import described
print(json.dumps(described("hf-hub:org/tiny", Path({cache!r}))))
"""


@pytest.mark.slow
def test_a_model_of_the_hub_is_downloaded_once(published: Path, tmp_path: Path) -> None:
    expected = described(f"local-dir:{published}")
    code = DESCRIBE.format(cache=str(tmp_path / "cache"))
    with hub(published.parent.parent) as (address, asked):
        done = elsewhere(code, tmp_path, HF_ENDPOINT=address)
        assert done.returncode == 0, done.stderr
        assert "GET /org/tiny/resolve/main/open_clip_model.safetensors" in asked
        found = json.loads(done.stdout.splitlines()[-1])
        for key in ("images", "texts", "val"):
            torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(expected[key]))
    again = elsewhere(code, tmp_path, HF_HUB_OFFLINE="1")  # the server is gone
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["images"] == found["images"]


MISSING = {
    "hf-hub:org/none": [
        "open_clip_config.json and open_clip_model.safetensors of org/none",
        "--model=local-dir:FOLDER",
    ],
    "ViT-B-32__pretrained__laion2b_s34b_b79k": [
        "the weights laion2b_s34b_b79k of ViT-B-32 are unavailable",
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K on the Hugging Face hub",
        "--model=ViT-B-32__pretrained__FILE",
        "Other weights: openai, ",
        "--model=ViT-B-32__init__",
    ],
    "ViT-B-32": ["timm/vit_base_patch32_clip_224.openai on the Hugging Face hub"],
}
FAIL = """
from tangent_arithmetic.encoders.clip import create_clip
from tangent_arithmetic.runtime.errors import UsageError
for name in {names!r}:
    try:
        create_clip(name, {cache!r})
    except UsageError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("offline", [True, False])
def test_missing_weights_are_an_error_that_says_where_to_put_them(
    offline: bool, tmp_path: Path
) -> None:
    code = FAIL.format(names=list(MISSING), cache=str(tmp_path / "cache"))
    with hub(tmp_path) as (address, _):
        env = {"HF_HUB_OFFLINE": "1"} if offline else {}
        done = elsewhere(code, tmp_path, HF_ENDPOINT=address, **env)
    assert done.returncode == 0, done.stderr
    for line, said in zip(done.stdout.splitlines(), MISSING.values(), strict=True):
        for words in (*said, str(tmp_path / "cache")):
            assert words in line
        assert ("HF_HUB_OFFLINE is set" in line) is offline


def test_a_file_of_weights(towers: Path, tmp_path: Path, images: Tensor) -> None:
    model: Any = open_clip.create_model("ViT-Tiny").eval()
    writers: dict[str, Callable[..., None]] = {"a.safetensors": save_file, "a.pt": torch.save}
    for name, save in writers.items():
        save(model.state_dict(), tmp_path / name)
        read: Any = create_clip(f"ViT-Tiny__pretrained__{tmp_path / name}")[0]
        assert torch.equal(read.encode_image(images), model.encode_image(images))


def test_a_file_of_something_else_is_refused(towers: Path, tmp_path: Path) -> None:
    ImageEncoder.without_weights("ViT-Tiny__init__").save(tmp_path / "encoder.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "pointer.pt").write_bytes(LFS_POINTER)
    full = "does not hold the weights of a full ViT-Tiny .*alone with --load"
    for name, message in {
        "encoder.safetensors": full,
        "text.pt": full,
        "pointer.pt": "is a Git LFS pointer.*git lfs pull",
    }.items():
        with pytest.raises(UsageError, match=rf"{name} {message}"):
            create_clip(f"ViT-Tiny__pretrained__{tmp_path / name}")


def test_files_for_images_of_another_size_are_refused(towers: Path, tmp_path: Path) -> None:
    state = open_clip.create_model("ViT-Tiny", force_image_size=64).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"size mismatch for visual\.positional_embedding"):
        create_clip(f"ViT-Tiny__pretrained__{tmp_path / 'w.safetensors'}")


def test_an_activation_that_is_not_recorded_is_named(
    towers: Path, tmp_path: Path, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name in ("ViT-B-32", "ViT-B-32", "ViT-B-32-quickgelu", "ViT-Tiny"):
        (tmp_path / "mine.pt").touch()
        for weights in (False, True):
            create_clip(f"{name}__pretrained__{tmp_path / 'mine.pt'}", weights=weights)
    assert caplog.text.count("does not record its activation") == 1
    assert "that of ViT-B-32, GELU." in caplog.text
    assert "use --model=ViT-B-32-quickgelu__pretrained__FILE" in caplog.text


@pytest.mark.parametrize("folder", ["models--timm--vit_tiny.openai", "laion"])
def test_a_file_of_openai_s_gets_quick_gelu(towers: Path, tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "snapshots" / "open_clip_model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(open_clip.create_model("ViT-Tiny").state_dict(), path)
    model = create_clip(f"ViT-Tiny__pretrained__{path}")[0]
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("QuickGELU" in kinds) is ("openai" in folder)


@torch.no_grad()
def test_openai_s_archives_are_read_without_executing_them(
    towers: Path, tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs: Any = open_clip.create_model("ViT-Tiny", force_quick_gelu=True).eval()
    tokens = open_clip.get_tokenizer("ViT-Tiny")(["a photo of a face."])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(
            theirs, {"encode_image": images, "encode_text": tokens}, check_trace=False
        )
    traced.save(str(tmp_path / "ViT-B-32.pt"))
    monkeypatch.setattr(torch.jit, "load", None)
    ours: Any = create_clip(f"ViT-Tiny__pretrained__{tmp_path / 'ViT-B-32.pt'}")[0]
    torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images))
    torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens))
    assert ours.logit_scale == theirs.logit_scale
    with pytest.raises(UsageError, match=r"ViT-B-32\.pt does not hold the weights of a full RN-T"):
        create_clip(f"RN-Tiny__pretrained__{tmp_path / 'ViT-B-32.pt'}")


@pytest.mark.parametrize("weights", [True, False])
def test_transforms_go_with_the_weights(
    weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    """A SigLIP centres pixels at 1/2, whether its weights are loaded now or from a checkpoint."""
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda *args, **kwargs: None)
    create_clip("ViT-B-16-SigLIP__pretrained__webli", weights=weights)
    (tmp_path / "mine.pt").touch()
    create_clip(f"ViT-B-16-SigLIP__pretrained__{tmp_path / 'mine.pt'}", weights=weights)
    assert len(calls) == 2
    for _, kwargs in calls:
        assert kwargs["image_mean"] == kwargs["image_std"] == (0.5, 0.5, 0.5)
        assert kwargs["image_resize_mode"] == "squash"
        assert kwargs["load_weights"] is weights and kwargs["pretrained_text"] is False


def test_a_missing_package_is_named(towers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = r'SigLIP-Tiny needs the package transformers, .*pip install -e "\.\[hub\]"'
    with pytest.raises(UsageError, match=message):
        create_clip("SigLIP-Tiny__init__")
    create_clip("SigLIP-Tiny__init__", weights=False)  # needs no tokenizer


# --- names in files are hints


@pytest.fixture
def tiny(towers: Path, tmp_path: Path) -> Path:
    """A folder with a ViT-Tiny and its configuration, which is changed by tests."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(open_clip.create_model("ViT-Tiny").state_dict(), folder / WEIGHTS_FILE)
    configure(folder)
    return folder


WEIGHTS_FILE = "open_clip_model.safetensors"


def configure(folder: Path, **changes: Any) -> None:
    """Writes the folder's configuration; a change `vision_width` is of `vision_cfg`."""
    model: dict[str, Any] = json.loads(json.dumps(TOWERS["ViT-Tiny"]))
    for name, value in changes.items():
        part, _, key = name.partition("_")
        model[f"{part}_cfg"][key] = value
    text = json.dumps({"model_cfg": model, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}})
    (folder / "open_clip_config.json").write_text(text)


def written(path: Path, model: Any, kind: str = "image_encoder") -> Path:
    """A checkpoint of a ViT-Tiny that names another model."""
    visual: Any = open_clip.create_model("ViT-Tiny").visual
    theta = {f"model.visual.{name}": value for name, value in visual.state_dict().items()}
    save_tensors(path, theta, kind, theta, info={"model": model})
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("hf-hub:org/name", "states the model hf-hub:org/name.*name the model yourself"),
        ("local-dir:/nowhere", "states the model local-dir:/nowhere"),
        ("ViT-Tiny__pretrained__/etc/hostname", "states the model ViT-Tiny__pretrained__/etc"),
        ("ViT-Tiny__pretrained__none", "states the model"),
        ("xlm-roberta-base-ViT-B-32", "states the model xlm"),  # its text tower is on the hub
        ("ViT-bigG-14__init__", r"does not fit ViT-bigG-14__init__: model\.visual\.class_emb"),
        ("RN50", "does not fit RN50"),
        ("ViT-None", r"unknown model 'ViT-None'; choose from ViT-Nano-8, ViT-Tiny"),
        ("\x1b[31m" + "a" * 10**5, r"unknown model '\\x1b\[31maaa"),
        (None, "does not state its model"),
        ({"a": 1}, "does not state its model"),
    ],
)
def test_a_file_cannot_choose_what_is_built(
    model: Any, message: str, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, linear = written(tmp_path / "a.pt", model), tmp_path / "b.safetensors"
    written(linear, model, "linearized_image_encoder")
    monkeypatch.setattr(open_clip, "create_model_and_transforms", None)  # nothing is built
    for load in (
        lambda: ImageEncoder.load(one),
        lambda: LinearizedImageEncoder.load(one),
        lambda: LinearizedImageEncoder.load(linear),
        lambda: TaskVector(one, one).apply_to(one),
        lambda: ModelPool({"a": one, "b": one}).build(load_checkpoint(one).theta),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            load()
        assert len(str(caught.value)) < 5000


def test_a_model_that_the_user_has_named_is_trusted(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"local-dir:{tiny}"
    path = written(tmp_path / "tuned.pt", name)
    with pytest.raises(UsageError, match="name the model yourself"):
        ImageEncoder.load(path)
    expected = ImageEncoder.load(name, path).weights()
    for found in (ImageEncoder.load(path), LinearizedImageEncoder.load(path)):  # named by now
        assert all(torch.equal(found.weights()[key], expected[key]) for key in expected)
    monkeypatch.setattr(tangent_arithmetic.encoders.clip, "_named", set())
    assert LinearizedImageEncoder.load(path, model_name=name).model_name == canonical(name)


# --- folders of models


def test_a_folder_is_found_however_it_is_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Tensor
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    encoders: list[tuple[ImageEncoder, str, Path]] = []
    for place, name in (
        (tmp_path, "local-dir:./models/../models/tiny/"),
        (tmp_path / "elsewhere", "local-dir:~/models/tiny"),
        (tmp_path / "elsewhere", "local-dir:../models/tiny"),
    ):
        monkeypatch.chdir(place)
        encoder = ImageEncoder(Config(model=name))
        assert encoder.model_name == "local-dir:~/models/tiny"
        path = tmp_path / f"{len(encoders)}.safetensors"
        encoder.save(path)
        encoders.append((encoder, name, path))
    assert str(tmp_path) not in encoders[0][2].read_bytes().decode("latin1")
    for encoder, name, _ in encoders[1:]:  # these names mean the same from here
        for _, _, path in encoders:
            read = ImageEncoder.load(name, path)
            assert torch.equal(read(images), encoder(images))
    older = written(tmp_path / "older.pt", f"local-dir:{tiny}")  # an absolute name
    read = ImageEncoder.load("local-dir:~/models/tiny", older)
    assert read.model_name == encoders[0][0].model_name


def test_a_file_of_weights_is_found_from_another_folder(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(open_clip.create_model("ViT-Tiny").state_dict(), tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    encoder = ImageEncoder(Config(model="ViT-Tiny__pretrained__w.pt"))
    encoder.save(tmp_path / "zeroshot.pt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ImageEncoder.load("ViT-Tiny__pretrained__../w.pt", tmp_path / "zeroshot.pt")
    assert ImageEncoder.load(tmp_path / "zeroshot.pt").model_name == encoder.model_name


def test_a_missing_folder_is_an_error_that_names_it(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "zeroshot.safetensors"
    ImageEncoder(Config(model=f"local-dir:{tiny}")).save(path)
    moved = tiny.rename(tmp_path / "moved")
    message = rf"no folder at {tiny}, the place of local-dir:.*--model=local-dir:FOLDER"
    for use in (
        lambda: create_clip(f"local-dir:{tiny}"),
        lambda: ImageEncoder.load(path),
        lambda: outline(f"local-dir:{tiny}__init__"),
    ):
        with pytest.raises(MissingFileError, match=message):
            use()
    read = ImageEncoder.load(f"local-dir:{moved}", path)
    assert read.model_name == canonical(f"local-dir:{moved}")
    assert f"its model was in {tiny}, now in {moved}" in caplog.text
    shutil.copytree(moved, tiny)  # two folders are two models
    with pytest.raises(UsageError, match=r"holds weights of .*tiny, expected .*moved"):
        ImageEncoder.load(f"local-dir:{moved}", path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_layers": 10**6}, r"expected at most 1000 layers, got \[1000000, 1, 0\]"),
        ({"vision_layers": [10**6] * 4}, "expected at most 1000 layers"),
        ({"text_layers": 10**6}, "expected at most 1000 layers"),
        ({"vision_layers": "many"}, "expected at most 1000 layers"),
        ({"vision_width": 10**6}, r"describes [\d,]+ weights, but its file holds at most"),
        ({"text_vocab_size": 10**10}, r"describes [\d,]+ weights"),
        ({"text_context_length": 10**6}, r"describes [\d,]+ weights"),
        (
            {"text_tokenizer_kwargs": {"trust_remote_code": True}},
            "contain trust_remote_code, which may",
        ),
        ({"vision_timm_model_name": "hf-hub:a/b"}, "timm_model_name hf-hub:a/b is not a timm"),
        ({"vision_new": 1}, "cannot be read .*unexpected keyword"),
        ({"vision_width": "wide"}, "cannot be read"),
        ({"vision_patch_size": 0}, "cannot be read"),
        ({"vision_width": 24}, "cannot be read .*size mismatch"),
        ({"vision_image_size": 64}, r"cannot be read .*mismatch for visual\.positional_embedding"),
    ],
)
def test_configurations_that_do_not_match_their_weights(
    changes: dict[str, Any], message: str, tiny: Path
) -> None:
    configure(tiny, **changes)
    with pytest.raises(UsageError, match=message):
        create_clip(f"local-dir:{tiny}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("open_clip_config.json", None, "expected open_clip_config.json and open_clip_model.safet"),
        ("open_clip_config.json", b"{", "cannot be read as a JSON object"),
        ("open_clip_config.json", b"[1]", "it holds a list"),
        ("open_clip_config.json", b"{}", "expected a model_cfg with"),
        ("open_clip_config.json", b'{"model_cfg": {"vision_cfg": 3}}', "expected a model_cfg with"),
        ("open_clip_config.json", LFS_POINTER, "is a Git LFS pointer"),
        (WEIGHTS_FILE, LFS_POINTER, "is a Git LFS pointer"),
        (WEIGHTS_FILE, None, "no weights .*safetensors"),
        (WEIGHTS_FILE, b"hello", "is damaged"),
    ],
)
def test_incomplete_folders_are_refused(
    name: str, content: bytes | None, message: str, tiny: Path
) -> None:
    if content is None:
        (tiny / name).unlink()
    else:
        (tiny / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        create_clip(f"local-dir:{tiny}")


# --- files of weights execute nothing


class Evil:
    """Leaves a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("legacy", [True, False])
def test_pickles_of_weights_are_not_executed(legacy: bool, tiny: Path, tmp_path: Path) -> None:
    path, marker = tiny / "open_clip_pytorch_model.bin", tmp_path / "executed"
    state = open_clip.create_model("ViT-Tiny").state_dict()
    (tiny / WEIGHTS_FILE).unlink()
    torch.save(state, path)
    found: Any = create_clip(f"local-dir:{tiny}")[0]
    assert torch.equal(found.visual.proj, state["visual.proj"])
    torch.save({**state, "x": Evil(marker)}, path, _use_new_zipfile_serialization=not legacy)
    for name in (f"local-dir:{tiny}", f"ViT-Tiny__pretrained__{path}"):
        with pytest.raises(UsageError, match="is refused: it names"):
            create_clip(name)
    assert not marker.exists()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_training_checkpoints_of_open_clip_are_weights(
    prefix: str, towers: Path, tmp_path: Path
) -> None:
    state = open_clip.create_model("ViT-Tiny").state_dict()
    path = tmp_path / "epoch_3.pt"
    content = {f"{prefix}{name}": value for name, value in state.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": content, "optimizer": {}}, path)
    found: Any = create_clip(f"ViT-Tiny__pretrained__{path}")[0]
    assert all(torch.equal(found.state_dict()[key], value) for key, value in state.items())


# --- the embedded model


@torch.no_grad()
def test_open_clip_knows_the_embedded_model(images: Tensor) -> None:
    register()
    theirs: Any = open_clip.create_model(NAME, pretrained=str(WEIGHTS)).eval()
    ours: Any = create_clip(NAME)[0]
    assert NAME in open_clip.list_models()
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert torch.equal(theirs.encode_image(images), ours.encode_image(images))
    tokenizer = open_clip.get_tokenizer(NAME)
    tokens = tokenizer(["a photo of a red circle."])
    assert torch.equal(tokens, ours.tokenizer(["a photo of a red circle."]))
    assert torch.equal(theirs.encode_text(tokens), ours.encode_text(tokens))
    assert tokenizer.vocab_size == len(ours.token_embedding.weight) != STOCK_VOCABULARY
    assert "<start_of_text>a photo of a red circle . <end" in tokenizer.decode(tokens[0].tolist())


def test_init_means_random_weights() -> None:
    one, other = (create_clip("ViT-Nano-8__init__")[0] for _ in range(2))
    assert not torch.equal(*(m.get_parameter("visual.proj") for m in (one, other)))


def test_a_callers_setting_of_logging_is_kept() -> None:
    logging.disable(logging.ERROR)
    try:
        register()
        outline("ViT-Nano-8")
        create_clip("ViT-Nano-8", weights=False)
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)
