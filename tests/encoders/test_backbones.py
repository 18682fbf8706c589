"""Backbones by name: features, linearisation, files, transforms, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision import models

from tangent_arithmetic.arithmetic.task_vectors import NonLinearTaskVector
from tangent_arithmetic.encoders.backbones import encoder as backbones
from tangent_arithmetic.encoders.backbones.building import surplus
from tangent_arithmetic.encoders.backbones.encoder import BackboneEncoder
from tangent_arithmetic.encoders.backbones.names import is_backbone
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.encoders.models import pretrained
from tangent_arithmetic.encoders.registry import load_linear, load_standard
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError

VIT, RESNET = "timm:test_vit__init__", "timm:test_resnet__init__"
NAMES = [VIT, RESNET, "torchvision:squeezenet1_1__init__", "python:own_models:build"]
OWN = """
import torch
from torch import nn
from torch.nn.utils import prune
from torchvision import transforms as t

KEPT = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
PREPROCESS = t.Compose([t.Resize((32, 32)), t.ToTensor()])

def build():
    return KEPT, PREPROCESS

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))

    def forward(self, x):
        return self.model(x)

def inner():
    return Inner()

def bare():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))

def maps():
    return nn.Conv2d(3, 4, 3)

class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = bare()

    def forward(self, x):
        return self.inner(x).double()

def casting():
    return Casting()

def half():
    return bare().half()

def pruned():
    module = bare()
    prune.l1_unstructured(module[2], "weight", 0.5)
    return module

def scripted():
    return torch.jit.script(bare())

def compiled():
    return torch.compile(bare())

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))

def meta():
    with torch.device("meta"):
        return bare()

def enclosing():
    module = bare()
    module.head = lambda h: module[2](h)
    return module

def number():
    return 3

def broken():
    raise OSError("no disk")
"""


@pytest.fixture(autouse=True)
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_models", None)


def pictures() -> Tensor:
    return torch.randn(2, 3, 160, 160)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_backbone_is_linearised_saved_and_loaded(name: str, tmp_path: Path) -> None:
    encoder, x = BackboneEncoder(name).eval(), pictures()
    features = encoder(x)
    assert features.shape[0] == 2 and features.ndim == 2
    digest = encoder.save(tmp_path / "zeroshot.pt")
    again = load_standard(tmp_path / "zeroshot.safetensors").eval()
    assert isinstance(again, BackboneEncoder) and torch.equal(again(x), features)
    tuned = BackboneEncoder(name)
    tuned.load_weights(
        {n: v + 0.01 if v.is_floating_point() else v for n, v in encoder.weights().items()}
    )
    tau = NonLinearTaskVector(encoder, tuned)
    assert torch.equal(tau.apply_to(tmp_path / "zeroshot.pt", 1.0)(x), tuned.eval()(x))
    linear = linearized(encoder)
    torch.testing.assert_close(linear(x), features)
    linear.load_weights({**tuned.weights(), **linear_buffers(linear)})
    linear.save(tmp_path / "linear_finetuned.pt")
    kept = load_linear(tmp_path / "linear_finetuned.safetensors")
    assert torch.equal(kept(x), linear(x)) and not torch.allclose(linear(x), features)
    assert digest != linear.save(tmp_path / "other.pt")


def linear_buffers(linear: Any) -> dict[str, Tensor]:
    return {n: v for n, v in linear.weights().items() if n not in linear.theta0()}


def test_features_are_those_of_the_library(tmp_path: Path) -> None:
    module: Any = timm.create_model("test_vit", num_classes=7).eval()
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    encoder = BackboneEncoder(
        f"timm:test_vit__pretrained__{tmp_path / 'weights.safetensors'}"
    ).eval()
    x = pictures()
    with torch.no_grad():
        expected = module.forward_head(module.forward_features(x), pre_logits=True)
        assert torch.equal(encoder(x), expected)
    torch.save(
        {"state_dict": {f"module.{n}": v for n, v in module.state_dict().items()}},
        tmp_path / "w.pth",
    )
    again = BackboneEncoder(f"timm:test_vit__pretrained__{tmp_path / 'w.pth'}")
    assert torch.equal(again.eval()(x), expected)


def test_a_torchvision_classifier_loses_its_last_layer(tmp_path: Path) -> None:
    module = models.mobilenet_v3_small(weights=None).eval()
    torch.save(module.state_dict(), tmp_path / "w.pth")
    encoder = BackboneEncoder(f"torchvision:mobilenet_v3_small__pretrained__{tmp_path / 'w.pth'}")
    x = pictures()
    with torch.no_grad():
        assert torch.equal(module.classifier[-1](encoder.eval()(x)), module(x))


@pytest.mark.parametrize(("name", "whole"), [("googlenet", True), ("inception_v3", False)])
@torch.no_grad()
def test_a_torchvision_classifier_loses_its_auxiliary_ones(
    name: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = models.get_model(name, init_weights=False, transform_input=True).eval()
    state = module.state_dict()
    torch.save(state, tmp_path / "w.pth")
    weights = models.get_model_weights(name)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **options: state)
    x = torch.randn(1, 3, 80, 80)
    expected = module(x)
    for tag in ("", f"__pretrained__{tmp_path / 'w.pth'}")[: 1 + whole]:
        encoder = BackboneEncoder(f"torchvision:{name}{tag}").eval()
        assert torch.equal(module.fc(encoder(x)), expected)
        assert not any("aux" in key.lower() for key in encoder.weights())
    if whole:
        encoder.save(tmp_path / "ours.safetensors")
        again = BackboneEncoder.load(tmp_path / "ours.safetensors", encoder.model_name).eval()
        assert torch.equal(module.fc(again(x)), expected)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("timm:test_resnet", "layer1.9.conv1.weight", r"layer1\.9\.conv1\.weight, which it lacks"),
        (
            "torchvision:squeezenet1_1",
            "features.99.weight",
            r"lacks 1 of its tensors \(features\.99",
        ),
        ("timm:test_resnet", "decoder.weight", None),
        ("timm:test_convnext", "head.fc.1.weight", None),
        ("torchvision:squeezenet1_1", "classifier.1.0.weight", None),
    ],
)
def test_more_weights_than_those_of_the_model(
    name: str, more: str, message: str | None, tmp_path: Path
) -> None:
    scheme, _, architecture = name.partition(":")
    module: Any = timm if scheme == "timm" else models
    state = (module.create_model if scheme == "timm" else module.get_model)(
        architecture
    ).state_dict()
    path = tmp_path / "w.safetensors"
    save_file({**state, more: torch.ones(1)}, path)
    settings = Config(model=f"{name}__init__", load=[str(path)])
    if message is None:
        found = pretrained(settings).weights()
        assert all(torch.equal(value, state[key[6:]]) for key, value in found.items())
        BackboneEncoder(f"{name}__pretrained__{path}")
        return
    with pytest.raises(UsageError, match=message):
        BackboneEncoder(f"{name}__pretrained__{path}")
    with pytest.raises(UsageError, match=rf"{more}: \(1,\), expected none"):
        pretrained(settings)


def test_positional_embeddings_of_another_size_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", img_size=96).state_dict()
    path = tmp_path / "w.safetensors"
    save_file({f"visual.trunk.{name}": value for name, value in state.items()}, path)
    with pytest.raises(UsageError, match=r"pos_embed: \(1, 37, 64\), expected \(1, 101, 64\)"):
        BackboneEncoder(f"timm:test_vit__pretrained__{path}")


def test_a_module_named_model_loads_its_own_state_dict(tmp_path: Path) -> None:
    encoder = BackboneEncoder("python:own_models:inner")
    state = encoder.model.state_dict()
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / "w.safetensors")
    name = "python:own_models:inner"
    found = pretrained(Config(model=name, load=[str(tmp_path / "w.safetensors")])).weights()
    assert torch.equal(found["model.model.1.weight"], state["model.1.weight"] + 1)


@pytest.mark.parametrize(
    "prefix", ["model.", "image_encoder.model.", "module.image_encoder.model."]
)
def test_weights_in_a_file_of_an_encoder_or_a_classifier_are_read(
    prefix: str, tmp_path: Path
) -> None:
    state = BackboneEncoder(RESNET).model.state_dict()
    content = {f"{prefix}{name}": value + 1 for name, value in state.items()}
    outer = prefix.removesuffix("image_encoder.model.")
    if outer != prefix:
        content[f"{outer}classification_head.weight"] = torch.zeros(3, 4)
    torch.save(content, tmp_path / "w.pt")
    found = pretrained(Config(model=RESNET, load=[str(tmp_path / "w.pt")])).weights()
    assert all(torch.equal(found[f"model.{name}"], value + 1) for name, value in state.items())


def test_a_file_of_two_models_is_refused(tmp_path: Path) -> None:
    state = BackboneEncoder(RESNET).model.state_dict()
    both = {f"{who}.model.{n}": v for who in ("student", "teacher") for n, v in state.items()}
    torch.save(both, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"does not fit .*missing"):
        pretrained(Config(model=RESNET, load=[str(tmp_path / "w.pt")]))


@pytest.mark.parametrize("name", NAMES)
def test_transforms_fit_the_module_and_are_identified(name: str) -> None:
    encoder = BackboneEncoder(name)
    image = Image.new("RGB", (50, 40), (255, 0, 0))
    for transform in (encoder.train_preprocess, encoder.val_preprocess):
        assert transform is not None
        x = transform(image)
        assert x.ndim == 3 and encoder.eval()(x[None]).ndim == 2
        json.dumps(transform.recipe)  # type: ignore[attr-defined]
    assert encoder.train_preprocess.recipe != encoder.val_preprocess.recipe  # type: ignore[union-attr]


def test_a_repository_of_timm_is_read_from_a_folder(tmp_path: Path) -> None:
    module: Any = timm.create_model("test_vit", num_classes=5)
    folder = tmp_path / "repository"
    folder.mkdir()
    save_file(module.state_dict(), folder / "model.safetensors")
    config: dict[str, Any] = {
        "architecture": "test_vit",
        "pretrained_cfg": {
            "mean": [0.1] * 3,
            "input_size": [3, 160, 160],
            "fixed_input_size": True,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    name = f"local-dir:{folder}"
    assert is_backbone(name) and not is_backbone(f"local-dir:{tmp_path}")
    encoder, x = BackboneEncoder(name).eval(), pictures()
    with torch.no_grad():
        expected = module.eval().forward_head(module.forward_features(x), pre_logits=True)
        assert torch.equal(encoder(x), expected)
    assert "0.1" in str(encoder.val_preprocess)
    older = {**config["pretrained_cfg"], "architecture": "test_vit", "num_features": 64}
    older["model_args"] = {"num_classes": 5}
    (folder / "config.json").write_text(json.dumps(older))
    again = BackboneEncoder(name)
    assert str(again.val_preprocess) == str(encoder.val_preprocess)
    config["architecture"] = "vit_giant_patch14_224"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"describes .* weights, but its files hold at most"):
        BackboneEncoder(name)


def test_two_encoders_of_a_factory_do_not_share_weights() -> None:
    one, other = (BackboneEncoder("python:own_models:build") for _ in range(2))
    with torch.no_grad():
        next(one.parameters()).zero_()
    assert next(other.parameters()).any()


SLOW = pytest.mark.slow  # imports much


@pytest.mark.parametrize(
    "name", ["half", "pruned", "scripted", pytest.param("compiled", marks=SLOW)]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning")
def test_any_module_is_copied_with_weights_that_train(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    encoder = BackboneEncoder(f"python:own_models:{name}")
    weights = encoder.weights()
    assert all(value.is_leaf and value.requires_grad for value in encoder.parameters())
    assert {value.dtype for value in weights.values()} == {torch.float32}
    weight = "model.2.weight_orig" if name == "pruned" else "model.2.weight"
    assert weight in weights and encoder(pictures()).requires_grad
    assert ("weights of torch.float16 become float32" in caplog.text) == (name == "half")


def test_features_of_another_precision_are_refused() -> None:
    encoder = BackboneEncoder("python:own_models:casting")
    with pytest.raises(UsageError, match=r"features of torch\.float64, expected torch\.float32"):
        encoder(pictures())


def test_a_module_without_transforms_gets_those_of_imagenet() -> None:
    encoder = BackboneEncoder("python:own_models:bare")
    assert encoder.val_preprocess is not None
    x = encoder.val_preprocess(Image.new("RGB", (300, 260)))
    assert x.shape == (3, 224, 224) and encoder(x[None]).shape == (1, 2)


BAD = [
    ("timm:resnet500__init__", "unknown model of timm 'resnet500'; choose from resnet50"),
    ("timm:resnet18.none", "unknown weights of timm:resnet18 'none'"),
    ("timm:test_vit__pretrained__nowhere.pt", "no file of weights nowhere.pt"),
    (
        "torchvision:resnet19__init__",
        "unknown model of torchvision 'resnet19'; choose from resnet18",
    ),
    ("torchvision:resnet18__pretrained__V9", "unknown weights of torchvision:resnet18 'V9'"),
    ("python:own_models", "expected MODULE:FACTORY"),
    ("python:no_such_module:build", "no module no_such_module on Python's path"),
    ("python:own_models:biuld", "has no 'biuld'; nearest in it: build"),
    ("python:own_models:number", "returned int; expected a torch.nn.Module"),
    ("python:own_models:lazy", r"1\.weight has no values yet; in the factory, pass a batch"),
    ("python:own_models:meta", r"2\.weight has no values yet; in the factory, build it without"),
    ("python:own_models:enclosing", "functions that enclose parts of it in head"),
    ("python:own_models:broken", r"cannot be built \(OSError: no disk\)"),
    ("python:own_models:build__init__", "the factory of a python: model gives its weights"),
]


@pytest.mark.parametrize(("name", "message"), BAD, ids=[name for name, _ in BAD])
def test_a_name_that_cannot_be_built_is_explained(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BackboneEncoder(name)


def test_missing_weights_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match=r"timm:test_vit__pretrained__FILE; .*timm:test_vit__init__ has random"
    ):
        BackboneEncoder("timm:test_vit")  # the tests are offline


def test_a_map_of_features_is_refused() -> None:
    encoder = BackboneEncoder("python:own_models:maps")
    with pytest.raises(UsageError, match=r"expected features of shape \(batch, features\)"):
        encoder(pictures())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    BackboneEncoder(VIT).save(path)
    with pytest.raises(
        UsageError, match="holds weights of timm:test_vit__init__, expected timm:test_resnet"
    ):
        BackboneEncoder.load(path, RESNET)
    checkpoint_of(path, "timm:test_vit2__init__")
    with pytest.raises(UsageError, match="does not fit timm:test_vit2__init__"):
        BackboneEncoder.load(path)


def test_a_name_in_a_file_executes_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_named", set())
    path = tmp_path / "a.safetensors"
    encoder = BackboneEncoder(VIT)
    for name in ("python:own_models:build", "hf-hub:a/b"):
        encoder.model_name = name
        encoder.save(path)
        with pytest.raises(UsageError, match="names in files are not trusted"):
            BackboneEncoder.load(path)
    assert "own_models" not in sys.modules


def test_changed_code_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.safetensors"
    BackboneEncoder("python:own_models:build").save(path)
    BackboneEncoder.load(path)
    assert not caplog.records
    (tmp_path / "own_models.py").write_text(f"{OWN}\n# another forward pass\n")
    BackboneEncoder.load(path)
    assert "was made with other preprocessing or code" in caplog.text


def checkpoint_of(path: Path, name: str) -> None:
    """Gives a checkpoint another model's name."""
    encoder = BackboneEncoder(VIT)
    encoder.model_name = name
    encoder.save(path)


def test_a_missing_repository_is_explained(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        BackboneEncoder(f"local-dir:{tmp_path / 'none'}")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["fc.weight", "net.fc.weight", "net.fc.bias", "decoder.0.weight"], []),  # left out
        (["net.0.mask", "net.0.attn.index"], []),  # buffers that the model does not keep
        (["net.2.weight"], ["net.2.weight"]),  # one layer more
        (["net.layer3.a.weight"], ["net.layer3.a.weight"]),
        (["net.0.scale", "net.0.bias"], ["net.0.bias"]),
    ],
)
def test_what_makes_a_file_one_of_a_larger_model(names: list[str], expected: list[str]) -> None:
    own = ["net.0.weight", "net.1.weight", "net.layer2.a.weight"]
    assert surplus([*own, *names], own) == expected
