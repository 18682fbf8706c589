"""Published checkpoints of every format are read, and give the same features."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector, NonLinearTaskVector
from tangent_arithmetic.commands import add, evaluate, negate
from tangent_arithmetic.commands.checkpoint import main
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts
from tangent_arithmetic.encoders.mlp import BackBone
from tangent_arithmetic.encoders.published import formats
from tangent_arithmetic.encoders.published.loading import load
from tangent_arithmetic.encoders.published.recorded import of_processor
from tangent_arithmetic.run.models import zeroshot_encoder
from tangent_arithmetic.run.results import load_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.reading import LFS_POINTER
from tangent_arithmetic.storage.statedict import content_hash
from tangent_arithmetic.storage.unpickler import read_pickle, state_of
from tests.encoders.makers import (
    SMALL,
    WRITERS,
    PublishedHead,
    clip,
    named,
    small_models,
    write_encoder,
)
from tests.loopback_hub import elsewhere, hub
from tests.small_suite import TASKS, flags, small_suite

pytestmark = pytest.mark.clip
OPENAI = formats.OPENAI


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with small_models(tmp_path_factory.mktemp("towers")):
        yield


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32)


def visual(model: Any) -> dict[str, Tensor]:
    return {f"model.visual.{name}": value for name, value in model.visual.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- pickled modules


@torch.no_grad()
@pytest.mark.parametrize("tower", SMALL)
@pytest.mark.parametrize("writer", WRITERS)
def test_pickled_encoders(tower: str, writer: str, tmp_path: Path, images: Tensor) -> None:
    model = write_encoder(tower, tmp_path / "finetuned.pt", writer)
    state = load_checkpoint(tmp_path / "finetuned.pt")
    assert state.kind == "image_encoder" and state.info["model"] == tower
    assert state.info["published"] == "pickled src.modeling.ImageEncoder"
    assert_same(state.theta, visual(model))
    encoder = ImageEncoder.load(tmp_path / "finetuned.pt")
    torch.testing.assert_close(encoder(images), model.encode_image(images), rtol=0, atol=0)


@torch.no_grad()
def test_classes_that_were_removed_from_open_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip 2.0's VisualTransformer."""
    model = clip("ViT-Tiny")
    old = type("VisualTransformer", (type(model.visual),), {"__module__": "open_clip.model"})
    monkeypatch.setattr(open_clip.model, "VisualTransformer", old, raising=False)
    model.visual.__class__ = old
    torch.save(model, tmp_path / "model.pt")
    monkeypatch.undo()
    assert not hasattr(open_clip.model, "VisualTransformer")
    assert_same(load_checkpoint(tmp_path / "model.pt").theta, visual(model))


def test_buffers_that_are_not_persistent_are_left_out(tmp_path: Path) -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("mask", torch.ones(3), persistent=False)
    module.shared = nn.Linear(2, 2)
    module.again = module.shared
    torch.save(module, tmp_path / "module.pt")
    assert dict(state_of(read_pickle(tmp_path / "module.pt"))).keys() == module.state_dict().keys()


@pytest.mark.parametrize("writer", WRITERS)
def test_pickled_heads(writer: str, tmp_path: Path) -> None:
    head = PublishedHead(True, torch.randn(5, 8))
    with named(ClassificationHead=PublishedHead):
        WRITERS[writer](head, tmp_path / "head_MNIST.pt")
    for name in ("head_MNIST.pt", "head_MNISTVal.pt", "head_MNIST.safetensors"):
        found = ClassificationHead.load(tmp_path / name)
        assert found.normalize is True
        assert torch.equal(found.weight, head.weight) and torch.equal(found.bias, head.bias)


# --- state dicts


@pytest.mark.parametrize("prefix", ["model.visual.", "visual.", "module.model.visual."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_state_dicts(prefix: str, suffix: str, tmp_path: Path) -> None:
    model = clip("ViT-Tiny")
    state = {f"{prefix}{name}": value for name, value in model.visual.state_dict().items()}
    path = tmp_path / f"nonlinear_finetuned{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    elif prefix == "visual.":
        torch.save(state, path)
    else:
        extra = {f"{prefix.removesuffix('visual.')}extra": torch.ones(1)}
        torch.save({"state_dict": {**state, **extra}}, path)
    assert_same(load_checkpoint(path).theta, visual(model))


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    model = clip("ViT-Tiny").half()
    torch.save(model.state_dict(), tmp_path / "half.pt")
    found = load_checkpoint(tmp_path / "half.pt").theta
    assert all(value.dtype == torch.float32 for value in found.values())
    assert_same(found, {name: value.float() for name, value in visual(model).items()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layer.weight": torch.ones(2)}, r"tensors of an image encoder .*got layer\.weight"),
        ([1, 2], r"expected an encoder or a head .* got a list"),
        ({"visual.proj": torch.ones(2, 2)}, "fit none of ViT-Tiny, RN-Tiny; name the model with"),
    ],
)
def test_other_content_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=message):
        load_checkpoint(tmp_path / "other.pt")


# --- linear models by index


def write_linear(
    path: Path, tower: str = "ViT-Tiny", with_text: bool = False, **changes: Any
) -> tuple[Any, Any]:
    """A linear file of the tangent project: parameters of a CLIP without its text transformer."""
    theta, theta0 = clip(tower, 1), clip(tower, 0)
    content: dict[str, Any] = {"model_name": tower}
    for key, model in (("params", theta), ("params0", theta0)):
        if not with_text:
            del model.transformer
        for i, value in enumerate(model.parameters()):
            content[f"model.{key}.{i}"] = value.detach().clone()
    torch.save({**content, **changes}, path)
    return theta, theta0


@torch.no_grad()
@pytest.mark.parametrize("with_text", [False, True])
def test_linear_files_by_index(with_text: bool, tmp_path: Path, images: Tensor) -> None:
    path = tmp_path / "linear_finetuned.pt"
    theta, theta0 = write_linear(path, with_text=with_text)
    assert main(["convert", str(path), str(tmp_path / "out.safetensors")]) == 0
    for state in (load_checkpoint(path), load_checkpoint(tmp_path / "out.safetensors")):
        assert state.kind == "linearized_image_encoder" and state.theta0 is not None
        assert_same(state.theta, visual(theta))
        assert_same(state.theta0, visual(theta0))
        assert state.theta0_hash == content_hash(visual(theta0))
    linear, still = LinearizedImageEncoder.load(path), LinearizedImageEncoder.load(path)
    still.load_weights(visual(theta0))
    torch.testing.assert_close(still(images), theta0.visual(images))
    assert (linear(images) - still(images)).abs().max() > 1e-3
    assert LinearizedTaskVector(path, path).norm() == 0


def test_linear_files_in_half_precision_become_float32(tmp_path: Path) -> None:
    path = tmp_path / "linear_finetuned.pt"
    write_linear(path)
    content = torch.load(path)
    halves = {n: v.half() if isinstance(v, Tensor) else v for n, v in content.items()}
    torch.save(halves, path)
    found = load_checkpoint(path)
    assert found.theta0 is not None
    assert {v.dtype for v in (*found.theta.values(), *found.theta0.values())} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": None}, "does not state its model; name it with --model"),
        ({"model.params.0": torch.ones(3)}, "expected the parameters of ViT-Tiny .*do not fit"),
        ({"model.params.999": torch.ones(3)}, r"model\.params\.0 to 999, some are missing"),
        ({"model_name": "RN-Tiny"}, "expected the parameters of RN-Tiny .*do not fit"),
        ({"model_name": "ViT-None"}, "unknown model 'ViT-None'"),
        ({"tower": "RN-Tiny"}, r"without its buffers \(.*\), which this format cannot"),
        # a file cannot choose what is built
        ({"model_name": "hf-hub:org/name"}, "name the model yourself"),
        ({"model_name": "local-dir:/nowhere"}, "name the model yourself"),
        ({"model_name": "ViT-Tiny__pretrained__/etc/hostname"}, "name the model yourself"),
        ({"model_name": "ViT-bigG-14__init__"}, "expected the parameters of ViT-bigG-14__init__ "),
        ({"model_name": "a" * 10**6}, "unknown model 'aaa"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_linear_files_that_do_not_fit(changes: Any, message: str, tmp_path: Path) -> None:
    write_linear(tmp_path / "linear_finetuned.pt", **changes)
    with pytest.raises(UsageError, match=message) as caught:
        load_checkpoint(tmp_path / "linear_finetuned.pt")
    assert len(str(caught.value)) < 5000


# --- Hugging Face


def vision_config(**changes: Any) -> transformers.CLIPVisionConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 64, "projection_dim": 8}
    layers = {"num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32}
    return transformers.CLIPVisionConfig(**{**sizes, **layers, **changes})


def randomised(model: Any) -> Any:
    """Adds noise to every weight, since some start at 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["one file", "shards", "whole CLIP"])
def test_clip_with_projection(kind: str, tmp_path: Path, images: Tensor) -> None:
    config: Any = vision_config()
    if kind == "whole CLIP":
        sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        text = {**sizes, "vocab_size": 16}
        config = transformers.CLIPConfig(
            vision_config=config.to_dict(), text_config=text, projection_dim=8
        )
        model = randomised(transformers.CLIPModel(config))
        expected = model.get_image_features(images)
        expected = getattr(expected, "pooler_output", expected)
    else:
        model = randomised(transformers.CLIPVisionModelWithProjection(config))
        expected = model(images).image_embeds
    model.save_pretrained(tmp_path / "hf", max_shard_size="8KB" if kind == "shards" else "5GB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file() is (kind == "shards")
    encoder = ImageEncoder.load(tmp_path / "hf")
    assert encoder.model_name == "ViT-Tiny"
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prefixed", [True, False])
def test_clip_without_projection_takes_the_base_model_s(
    prefixed: bool, tmp_path: Path, images: Tensor
) -> None:
    """Both styles of keys, with the zero-shot file one folder up."""
    base = write_encoder("ViT-Tiny", tmp_path / "zeroshot.pt")
    model = randomised(transformers.CLIPVisionModel(vision_config()))
    folder = tmp_path / "mnist"
    model.save_pretrained(folder)
    file, prefix = folder / "model.safetensors", "vision_model." if prefixed else ""
    state = {name.removeprefix("vision_model."): v for name, v in load_file(file).items()}
    save_file({f"{prefix}{name}": value for name, value in state.items()}, file)
    expected = model(images).pooler_output @ base.visual.proj
    encoder = ImageEncoder.load(folder)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)
    assert read_facts(folder)["theta0_hash"] == content_hash(visual(base))


def test_a_missing_projection_or_another_activation_is_an_error(tmp_path: Path) -> None:
    config = vision_config(hidden_act="gelu")
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "tower")
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "gelu")
    for name, message in {
        "tower": r"convert .*/tower OUT --theta0=FILE",
        "gelu": r"activation 'gelu', but ViT-Tiny .* 'quick_gelu'",
    }.items():
        with pytest.raises(UsageError, match=message):
            load_checkpoint(tmp_path / name)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_clip_of_transformers_computes_as_its_folder_records(
    activation: str, tmp_path: Path, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomised(
        transformers.CLIPVisionModelWithProjection(vision_config(hidden_act=activation))
    )
    folder, file = tmp_path / "hf", tmp_path / "hf" / "model.safetensors"
    model.save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.25, 0.5], "image_std": [0.5, 0.5, 0.25], "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    for name in ("ViT-Tiny", "ViT-Tiny__pretrained__openai", "ViT-Tiny__init__"):
        for path in (folder, file):
            encoder = ImageEncoder.load(name, path)
            torch.testing.assert_close(
                encoder(images), model(images).image_embeds, rtol=1e-5, atol=1e-5
            )
            used = encoder.built()["preprocess"]
            assert (list(used["mean"]), used["interpolation"]) == ([0.5, 0.25, 0.5], "bilinear")
    caplog.clear()
    caplog.set_level("INFO")
    shutil.copy(file, tmp_path / "alone.safetensors")
    load_checkpoint(tmp_path / "alone.safetensors")
    assert "alone.safetensors records neither activation nor preprocessing" in caplog.text


def test_the_processor_of_transformers_5_is_read() -> None:
    inner = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3, "size": {}}
    assert of_processor({"image_processor": inner}) == {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bicubic",
    }
    assert of_processor({"image_mean": "many", "resample": None}) == {}


def test_other_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    with pytest.raises(MissingFileError, match="no checkpoint at"):
        load_checkpoint(folder)
    (tmp_path / "model-1.safetensors").write_text("outside of the folder")
    index, config, no_map = "model.safetensors.index.json", "config.json", "expected a weight_map"
    outside = r"lists missing files: model-1\.safetensors"
    for file, text, message in (
        (config, '{"model_type": "bert"}', "holds a 'bert', expected a 'clip'"),
        (config, "[]", r"as a JSON object \(TypeError: it holds a list\)"),
        (config, "{", r"as a JSON object \(JSONDecodeError"),
        (config, "[" * 99_999, r"as a JSON object \(RecursionError"),
        (config, '{"model_type": "clip"}', r"no weights in .* expected model\.safetensors"),
        (index, "{}", no_map),
        (index, '{"weight_map": ["model-1.safetensors"]}', no_map),
        (index, '{"weight_map": {}}', no_map),
        (index, '{"weight_map": {"a": "model-1.safetensors"}}', outside),
        (index, '{"weight_map": {"a": "../model-1.safetensors"}}', outside),
        (index, '{"weight_map": {"a": "/model-1.safetensors"}}', outside),
    ):
        (folder / file).write_text(text)
        with pytest.raises(UsageError, match=message):
            load_checkpoint(folder)
    (folder / "model-1.safetensors").write_bytes(b"\x10" + bytes(30))
    with pytest.raises(UsageError, match=r"model-1\.safetensors is damaged"):
        load_checkpoint(folder)


def test_weights_of_transformers_in_a_pickle(tmp_path: Path) -> None:
    """Older repositories have pytorch_model.bin alone."""
    model = randomised(transformers.CLIPVisionModelWithProjection(vision_config()))
    model.save_pretrained(tmp_path / "hf")
    expected = load_checkpoint(tmp_path / "hf").theta
    state = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    assert_same(load_checkpoint(tmp_path / "hf").theta, expected)
    torch.save([1], tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UsageError, match="expected a state dict, got a list"):
        load_checkpoint(tmp_path / "hf")


# --- which model


def test_a_folder_named_after_another_architecture_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "RN-Tiny" / "MNISTVal" / "finetuned.pt"
    write_encoder("ViT-Tiny", path)
    with pytest.raises(UsageError, match="in a folder RN-Tiny, but its weights belong to ViT-Tiny"):
        load_checkpoint(path)
    assert load(path, model="ViT-Tiny").info["model"] == "ViT-Tiny"
    torch.save({"visual.proj": torch.ones(2, 2)}, path)
    with pytest.raises(UsageError, match=r"does not fit ViT-Tiny: .*missing, expected .* more"):
        load(path, model="ViT-Tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_the_true_sizes_are_recognised(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "OPENAI", OPENAI)
    model = write_encoder(name, tmp_path / "finetuned.pt")
    found = load_checkpoint(tmp_path / "finetuned.pt")
    assert found.info["model"] == name
    assert_same(found.theta, visual(model))


# --- wrappers


@pytest.mark.parametrize("tower", ["ViT-Tiny", "CoCa-Tiny"])
def test_load_takes_a_training_checkpoint_as_the_model_that_is_named(
    tower: str, tmp_path: Path, args: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Also a model whose shapes are none of OpenAI's."""
    caplog.set_level(logging.INFO)
    model, path = clip(tower), tmp_path / "epoch_3.pt"
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, path)
    name = f"{tower}__init__"
    encoder, theta0_hash = zeroshot_encoder(Run.of(args(model=name, load=[str(path)])))
    assert encoder.model_name == name and theta0_hash == content_hash(visual(model))
    assert_same(ImageEncoder.load(name, path).weights(), visual(model))
    assert_same(load_checkpoint(path).theta, visual(model))  # named by now
    assert f"{path}: unwrapped 'state_dict', module." in caplog.text
    with pytest.raises(UsageError, match=r"does not fit RN-Tiny__.*Add --model=(ViT|CoCa)-Tiny"):
        ImageEncoder(args(model="RN-Tiny__init__", load=[str(path)]))


@pytest.mark.parametrize("kind", ["module", "_orig_mod"])
def test_pickled_modules_in_wrappers(kind: str, tmp_path: Path) -> None:
    head, wrapper = PublishedHead(False, torch.randn(5, 8)), nn.Module()
    wrapper.add_module(kind, head)
    with named(ClassificationHead=PublishedHead):
        torch.save(wrapper, tmp_path / "head.pt")
    found = ClassificationHead.load(tmp_path / "head.pt")
    assert torch.equal(found.weight, head.weight) and found.normalize is False


@pytest.mark.parametrize("names", ["net.model.visual.", "module.classifier.image_encoder.visual."])
def test_encoders_in_other_models(names: str, tmp_path: Path) -> None:
    model = clip("ViT-Tiny")
    state = {f"{names}{name}": value for name, value in model.visual.state_dict().items()}
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(2)}}, tmp_path / "x.ckpt")
    assert_same(load_checkpoint(tmp_path / "x.ckpt").theta, visual(model))
    torch.save({**state, **{f"twin.{n}": v for n, v in state.items()}}, tmp_path / "y.ckpt")
    with pytest.raises(UsageError, match="expected one image encoder, got 2"):
        load_checkpoint(tmp_path / "y.ckpt")


def test_adapters_are_refused(tmp_path: Path) -> None:
    lora = {f"base_model.model.x.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(lora, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({"state_dict": lora}, tmp_path / "lora.pt")
    for path in (folder, folder / "adapter_model.safetensors", tmp_path / "lora.pt"):
        for read in (load_checkpoint, ImageEncoder.load, lambda p: NonLinearTaskVector(p, p)):
            with pytest.raises(UsageError, match=r"is a LoRA adapter.*merge_and_unload\(\)"):
                read(path)


# --- damage


@pytest.mark.parametrize(
    "name", ["x.pt", "x.safetensors", "hf/model.safetensors", "hf/config.json"]
)
def test_pointers_of_git_lfs_are_refused(name: str, tmp_path: Path) -> None:
    transformers.CLIPVisionModelWithProjection(vision_config()).save_pretrained(tmp_path / "hf")
    (tmp_path / name).write_bytes(LFS_POINTER + b"v1\noid sha256:0\nsize 1\n")
    path = tmp_path / name
    with pytest.raises(UsageError, match=r"is a Git LFS pointer, .*git lfs pull"):
        load_checkpoint(path.parent if path.parent.name == "hf" else path)


def written(path: Path, tensors: dict[str, Any], folder: bool) -> Path:
    """A file, or the folder of a CLIP of transformers, with these tensors."""
    if not folder:
        torch.save(tensors, path / "x.pt")
        return path / "x.pt"
    (path / "config.json").write_text('{"model_type": "clip"}')
    torch.save(tensors, path / "pytorch_model.bin")
    return path


def tower_of_transformers() -> dict[str, Any]:
    return transformers.CLIPVisionModelWithProjection(vision_config()).state_dict()


def linear_content(folder: Path) -> dict[str, Any]:
    write_linear(folder / "whole.pt")
    return dict(read_pickle(folder / "whole.pt"))


WHOLE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "head": lambda _: {"weight": torch.ones(2, 3), "bias": torch.ones(2)},
    "encoder": lambda _: visual(clip("ViT-Tiny")),
    "linear": linear_content,
    "transformers": lambda _: tower_of_transformers(),
    "backbone": lambda _: dict(BackBone(4).state_dict()),
}
READERS: tuple[Callable[[Path], Any], ...] = (ClassificationHead.load, ImageEncoder.load)
READERS += (LinearizedImageEncoder.load, BackBone.load)
DAMAGE: dict[str, Callable[[Tensor], Any]] = {
    "missing": lambda t: None,
    "a number": lambda t: t.sum(),
    "a vector": lambda t: t.reshape(-1),
    "one more dimension": lambda t: t[None],
    "empty": lambda t: t.new_zeros(0),
    "cut": lambda t: t[:1],
    "integers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "half": lambda t: t.half(),
    "a text": lambda t: "tensor",
}


@pytest.mark.parametrize("kind", WHOLE)
def test_damaged_tensors_are_errors_of_ours(kind: str, tmp_path: Path) -> None:
    """A file with one damaged tensor is read or refused; no other error escapes."""
    content, rng = WHOLE[kind](tmp_path), random.Random(kind)
    names = [name for name, value in content.items() if isinstance(value, Tensor)]
    for label, damage in DAMAGE.items():
        for victim in {names[-1], rng.choice(names)}:
            bad = {**content, victim: damage(content[victim].clone())}
            bad = {name: value for name, value in bad.items() if value is not None}
            folder = tmp_path / label / victim
            folder.mkdir(parents=True)
            path = written(folder, bad, folder=kind == "transformers")
            for read in READERS:
                with contextlib.suppress(UsageError):
                    read(path)


PATCHES = "vision_model.embeddings.patch_embedding.weight"
QUERY = "vision_model.encoder.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual_projection.weight": torch.ones(8)}, r"to be a matrix, got \(8,\)"),
        ({QUERY: torch.ones(3, 3)}, r"expected equal shapes in transformer\.resblocks\.0\.attn\.w"),
        ({QUERY: None}, "got only k_proj, v_p"),
        ({PATCHES: torch.ones(())}, "fit none"),
        ({"\x1b[31m": torch.ones(1)}, r"unexpected tensor '\\\\x1b\[31m' in a CLIP"),
    ],
)
def test_damaged_folders_say_what_is_wrong(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    prefix = "vision_model."
    tensors = {
        n if n.startswith("visual_") else f"{prefix}{n.removeprefix(prefix)}": value
        for n, value in tower_of_transformers().items()
    }
    content = {n: value for n, value in {**tensors, **changes}.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        load_checkpoint(written(tmp_path, content, folder=True))


# --- in use


def test_theta0_of_a_published_file_is_found(tmp_path: Path) -> None:
    run = tmp_path / "ViT-Tiny"
    base = write_encoder("ViT-Tiny", run / "zeroshot.pt", seed=0)
    tuned = write_encoder("ViT-Tiny", run / "MNIST" / "finetuned.pt", seed=1)
    found = load_checkpoint(run / "MNISTVal" / "finetuned.pt")  # X and XVal are the same
    assert found.theta0_hash == content_hash(visual(base))
    vector = NonLinearTaskVector(run / "zeroshot.pt", run / "MNISTVal" / "finetuned.pt")
    expected = visual(tuned)["model.visual.proj"] - visual(base)["model.visual.proj"]
    assert torch.equal(vector.vector["model.visual.proj"], expected)


def test_published_models_are_evaluated_added_and_negated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    base = write_encoder("ViT-Tiny", folder / "zeroshot.pt", seed=0)
    for seed, task in enumerate(TASKS, start=1):
        name = "nonlinear_finetuned.pt" if seed == 1 else "finetuned.pt"
        write_encoder("ViT-Tiny", folder / f"{task}Val" / name, seed=seed)
    argv = [*flags(tmp_path), "--model=ViT-Tiny__init__", "--suite=embedded"]
    with pytest.MonkeyPatch.context() as patch, small_suite(patch):
        for mode in ("none", "standard"):
            assert evaluate.main([*argv, f"--finetuning-mode={mode}"]) == 0
        assert add.main([*argv, "--finetuning-mode=standard"]) == 0
        assert negate.main([*argv, "--finetuning-mode=posthoc"]) == 0
        assert "does not say where it started from" not in caplog.text
        (results,) = (tmp_path / "results" / "embedded").iterdir()
        for name in ("additions-" + "+".join(TASKS), "posthoc_negations"):
            found = load_results(results / f"{name}.json")
            assert found["provenance"]["theta0_hash"] == content_hash(visual(base))


def test_an_unknown_theta0_is_a_warning_per_task(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for task in TASKS:
        write_encoder("ViT-Tiny", tmp_path / "checkpoints" / f"{task}Val" / "finetuned.pt")
    argv = [*flags(tmp_path), "--model=ViT-Tiny__init__", "--suite=embedded"]
    with pytest.MonkeyPatch.context() as patch, small_suite(patch):
        assert evaluate.main([*argv, "--finetuning-mode=standard"]) == 0
    assert caplog.text.count("does not say where it started from") == len(TASKS)


# --- the hub

FROM_HUB = """
from pathlib import Path
from tangent_arithmetic.commands.checkpoint import main
from tests.encoders.makers import small_models
with small_models(Path({folder!r})):
    for arguments in {commands!r}:
        assert main(arguments) == 0
"""


@pytest.mark.slow
def test_names_on_the_hub_are_downloaded_once(tmp_path: Path) -> None:
    served = tmp_path / "served" / "org"
    tuned = transformers.CLIPVisionModel(vision_config()).eval()
    whole = transformers.CLIPVisionModelWithProjection(vision_config()).eval()
    tuned.save_pretrained(served / "tuned")
    for name in ("base", "pickled"):
        whole.save_pretrained(served / name)
        torch.save(whole.state_dict(), served / name / "pytorch_model.bin")
    (served / "pickled" / "model.safetensors").unlink()
    for name in ("chat_template.jinja", "processor_config.json", "notes.txt"):
        (served / "base" / name).write_text("{}")
    convert = ["convert", "hf-hub:org/tuned", str(tmp_path / "out.pt"), "--theta0=hf-hub:org/base"]
    commands = [convert, ["inspect", "hf-hub:org/base", "hf-hub:org/pickled"]]
    (tmp_path / "towers").mkdir()
    code = FROM_HUB.format(folder=str(tmp_path / "towers"), commands=commands)
    with hub(tmp_path / "served") as (address, asked):
        done = elsewhere(code, tmp_path, HF_ENDPOINT=address)
        assert done.returncode == 0, done.stderr
    files = {line.rpartition("/")[2] for line in asked if line.startswith("GET /org/base/")}
    wanted = {"config.json", "model.safetensors", "chat_template.jinja", "processor_config.json"}
    assert files == wanted  # the pickle is left there
    again = elsewhere(code, tmp_path, HF_HUB_OFFLINE="1")  # the server is gone
    assert again.returncode == 0 and "already holds the same weights" in again.stdout, again.stderr
    found = load_checkpoint(tmp_path / "out.safetensors")
    projection = whole.visual_projection.weight.T
    assert torch.equal(found.theta["model.visual.proj"], projection)
    key = "model.visual.ln_post.weight"
    assert torch.equal(found.theta[key], tuned.state_dict()["post_layernorm.weight"])


def test_names_that_the_hub_does_not_have_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "hf-hub:org/none"]) == 2  # tests ask no hub
    said = capsys.readouterr().err
    assert "hf-hub:org/none is unavailable" in said and "HF_HUB_OFFLINE is set" in said
    assert main(["inspect", "hf-hub:none"]) == 2
    assert "expected hf-hub:ORG/NAME[@REVISION]" in capsys.readouterr().err


# --- the command


def test_convert_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_encoder("ViT-Tiny", tmp_path / "in" / "zeroshot.pt", seed=0)
    write_encoder("ViT-Tiny", tmp_path / "in" / "finetuned.pt", seed=1)
    source, target = str(tmp_path / "in" / "finetuned.pt"), str(tmp_path / "out" / "mine.pt")
    assert main(["convert", source, target]) == 0
    written = tmp_path / "out" / "mine.safetensors"
    assert f"wrote {written}" in capsys.readouterr().out
    converted, original = load_checkpoint(written), load_checkpoint(source)
    assert_same(converted.theta, original.theta)
    assert converted.hash == original.hash and converted.theta0_hash == original.theta0_hash
    assert main(["convert", source, target]) == 0
    assert "already holds the same weights" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "in" / "zeroshot.pt"), target]) == 2
    assert "add --force" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "in" / "zeroshot.pt"), target, "--force"]) == 0
    assert main(["convert", str(tmp_path / "none.pt"), target]) == 2
    capsys.readouterr()
    assert main(["inspect", source, str(written)]) == 0
    out = capsys.readouterr().out
    assert "image_encoder, pickled src.modeling.ImageEncoder" in out
    assert f"started from {original.theta0_hash}" in out and "model ViT-Tiny" in out


def test_convert_uses_the_named_theta0(tmp_path: Path) -> None:
    base = write_encoder("ViT-Tiny", tmp_path / "base.pt", seed=0)
    transformers.CLIPVisionModel(vision_config()).save_pretrained(tmp_path / "hf")
    argv = ["convert", str(tmp_path / "hf"), str(tmp_path / "out.pt")]
    assert main([*argv, f"--theta0={tmp_path / 'base.pt'}"]) == 0
    found = load_checkpoint(tmp_path / "out.safetensors")
    assert found.theta0_hash == content_hash(visual(base))
    assert torch.equal(found.theta["model.visual.proj"], base.visual.proj)
