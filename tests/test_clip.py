"""CLIP by name: names, weights, activation, transforms, the hub, and the embedded model."""

from __future__ import annotations

import json
import logging
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

from src.clip import ClipName, create_clip, outline
from src.data.embedded.model import WEIGHTS, register
from src.errors import UsageError
from src.modeling import ImageEncoder
from tests.loopback_hub import elsewhere, hub
from tests.towers import known_towers

NAME = "ViT-Nano-8"
STOCK_VOCABULARY = 49408


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
def test_names_say_architecture_and_weights(
    name: str, architecture: str, pretrained: str | None
) -> None:
    assert ClipName.parse(name) == ClipName(architecture, pretrained)


def test_unknown_names_list_the_nearest_first() -> None:
    with pytest.raises(UsageError, match="unknown model 'ViT-B-33'; choose from ViT-B-32, "):
        create_clip("ViT-B-33")
    with pytest.raises(UsageError, match="unknown model 'vit-nano-8'; choose from ViT-Nano-8, "):
        create_clip("vit-nano-8")
    message = "unknown weights of ViT-B-32 'laion2b_s34b'; choose from laion2b_s34b_b79k, "
    with pytest.raises(UsageError, match=message):
        create_clip("ViT-B-32__pretrained__laion2b_s34b")


def test_unknown_weights_of_the_embedded_model_are_refused_too() -> None:
    with pytest.raises(UsageError, match=r"unknown weights of ViT-Nano-8 'openai'"):
        create_clip("ViT-Nano-8__pretrained__openai")


@pytest.mark.parametrize(
    ("name", "pretrained", "quick"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-L-14", "openai", True),
        ("ViT-B-32__pretrained__laion400m_e32", "laion400m_e32", True),
        ("ViT-B-32__pretrained__datacomp_xl_s13b_b90k", "datacomp_xl_s13b_b90k", False),
        ("ViT-B-32__pretrained__laion2b_s34b_b79k", "laion2b_s34b_b79k", False),
        ("ViT-B-32-quickgelu__pretrained__metaclip_400m", "metaclip_400m", True),
        ("ViT-B-32__init__", None, False),
    ],
)
def test_quick_gelu_goes_with_the_weights(
    name: str,
    pretrained: str | None,
    quick: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OpenAI's weights lose up to four points with the activation that the name stands for."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create(architecture: str, **kwargs: Any) -> tuple[nn.Module, None, None]:
        calls.append((architecture, kwargs))
        return nn.Linear(1, 1), None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    model: Any = create_clip(name, tmp_path)[0]
    (architecture, kwargs), = calls  # fmt: skip
    assert architecture == name.partition("__")[0]
    assert kwargs["pretrained"] == pretrained
    assert kwargs["cache_dir"] == str(tmp_path)
    assert kwargs.get("force_quick_gelu", False) is quick
    assert model.name == name and not model.training
    assert model.tokenizer.vocab_size == STOCK_VOCABULARY


def test_quick_gelu_is_what_open_clip_makes_of_it() -> None:
    """The option that we pass does change the activation, and not passing it does not."""
    small = {"layers": 1, "width": 64, "image_size": 32, "patch_size": 32}
    for quick in (True, False):
        model = open_clip.create_model(
            "ViT-B-32",
            force_quick_gelu=quick,
            vision_cfg=small,
            text_cfg={"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
            embed_dim=8,
        )
        kinds = {type(module).__name__ for module in model.visual.modules()}
        assert ("QuickGELU" in kinds, "GELU" in kinds) == (quick, not quick)


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
    """What a CLIP gives for fixed inputs."""
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
from tests.test_clip import described
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
        "the weights laion2b_s34b_b79k of ViT-B-32 are not at hand",
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K on the Hugging Face hub",
        "--model=ViT-B-32__pretrained__FILE",
        "Other weights: openai, ",
        "--model=ViT-B-32__init__",
    ],
    "ViT-B-32": ["timm/vit_base_patch32_clip_224.openai on the Hugging Face hub"],
}
FAIL = """
from src.clip import create_clip
from src.errors import UsageError
for name in {names!r}:
    try:
        create_clip(name, {cache!r})
    except UsageError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("offline", [True, False])
def test_without_the_weights_the_error_says_where_they_may_be_put(
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
    for name in ("encoder.safetensors", "text.pt"):
        if name == "text.pt":
            (tmp_path / name).write_text("hello")
        message = rf"{name} does not hold the weights of a whole ViT-Tiny .*goes to --load"
        with pytest.raises(UsageError, match=message):
            create_clip(f"ViT-Tiny__pretrained__{tmp_path / name}")


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
    with pytest.raises(UsageError, match=r"ViT-B-32\.pt does not hold the weights of a whole RN-T"):
        create_clip(f"RN-Tiny__pretrained__{tmp_path / 'ViT-B-32.pt'}")


@pytest.mark.parametrize("weights", [True, False])
def test_transforms_go_with_the_weights(
    weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SigLIP centres pixels at 1/2, whether its weights are loaded now or from a checkpoint."""
    calls: list[dict[str, Any]] = []

    def create(architecture: str, **kwargs: Any) -> tuple[nn.Module, None, None]:
        calls.append(kwargs)
        return nn.Linear(1, 1), None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda *args, **kwargs: None)
    create_clip("ViT-B-16-SigLIP__pretrained__webli", weights=weights)
    (tmp_path / "mine.pt").touch()
    create_clip(f"ViT-B-16-SigLIP__pretrained__{tmp_path / 'mine.pt'}", weights=weights)
    for kwargs in calls:
        assert kwargs["image_mean"] == kwargs["image_std"] == (0.5, 0.5, 0.5)
        assert kwargs["image_resize_mode"] == "squash"
        assert kwargs["load_weights"] is weights and kwargs["pretrained_text"] is False


def test_a_missing_package_is_named(towers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = r'SigLIP-Tiny needs the package transformers, .*pip install -e "\.\[hub\]"'
    with pytest.raises(UsageError, match=message):
        create_clip("SigLIP-Tiny__init__")
    create_clip("SigLIP-Tiny__init__", weights=False)  # needs no tokenizer


def test_two_kinds_of_weights_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match="hf-hub:a/b has weights of its own, got 'openai' as well"):
        create_clip("hf-hub:a/b__pretrained__openai")


# --- the embedded model


@torch.no_grad()
def test_open_clip_knows_the_embedded_model(images: Tensor) -> None:
    register()
    theirs: Any = open_clip.create_model(NAME, pretrained=str(WEIGHTS)).eval()
    ours: Any = create_clip(NAME)[0]
    assert NAME in open_clip.list_models()
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert torch.equal(theirs.encode_image(images), ours.encode_image(images))
    tokens = open_clip.get_tokenizer(NAME)(["a photo of a red circle."])
    assert torch.equal(theirs.encode_text(tokens), ours.encode_text(tokens))


def test_the_stock_vocabulary_is_never_used() -> None:
    register()
    tokenizer = open_clip.get_tokenizer(NAME)
    model: Any = create_clip(NAME)[0]
    rows = model.token_embedding.weight.shape[0]
    assert tokenizer.vocab_size == model.tokenizer.vocab_size == rows != STOCK_VOCABULARY
    text = ["a photo of a red circle."]
    assert torch.equal(tokenizer(text), model.tokenizer(text))
    assert tokenizer.decode(tokenizer(text)[0].tolist()).startswith(
        "<start_of_text>a photo of a red circle . <end_of_text>"
    )


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
