"""The way back: files for the public projects, read with re-created layouts of their classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.commands.checkpoint import main
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.storage.checkpoints import save_tensors
from tests.encoders.makers import PublishedEncoder, PublishedHead, clip, named, small_models

NAME = "ViT-Tiny"


class PublishedLinear(nn.Module):
    """Their linear encoder: parameters by index, in the order of the encoder's."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.model = nn.Module()
        start = list(encoder.parameters())
        for part in ("params", "params0"):
            self.model.register_module(part, nn.ParameterList(p.detach().clone() for p in start))


@pytest.fixture(autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with small_models(tmp_path_factory.mktemp("models")):
        yield


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Their pre-trained file, which holds the weights beside the vision tower."""
    path = tmp_path / "public" / "zeroshot.pt"
    path.parent.mkdir()
    with named(ImageEncoder=PublishedEncoder):
        torch.save(PublishedEncoder(clip(NAME)), path)
    return path


def tuned(base: Path) -> ImageEncoder:
    encoder = ImageEncoder.load(NAME, base)
    encoder.load_weights({n: v + 0.01 * torch.randn_like(v) for n, v in encoder.weights().items()})
    return encoder


def test_an_encoder_is_a_state_dict_of_theirs(base: Path, tmp_path: Path) -> None:
    encoder = tuned(base)
    encoder.save(tmp_path / "ours.pt")
    out, back = tmp_path / "theirs.pt", tmp_path / "back.safetensors"
    convert = ["convert", "--to=public", f"--theta0={base}"]
    assert main([*convert, str(tmp_path / "ours.safetensors"), str(out)]) == 0
    theirs = PublishedEncoder(clip(NAME, seed=7))
    theirs.load_state_dict(torch.load(out, weights_only=True))  # strict
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs.model.encode_image(x), encoder.eval()(x))
    assert main(["convert", str(out), str(back), f"--model={NAME}"]) == 0
    assert load_checkpoint(back).hash == load_checkpoint(tmp_path / "ours.safetensors").hash


def test_a_linear_encoder_is_written_by_index(base: Path, tmp_path: Path) -> None:
    linear = LinearizedImageEncoder(
        image_encoder=tuned(base), init_encoder=ImageEncoder.load(NAME, base)
    )
    linear.save(tmp_path / "ours.pt")
    out, back = tmp_path / "theirs.pt", tmp_path / "back.safetensors"
    convert = ["convert", "--to=public", f"--theta0={base}"]
    assert main([*convert, str(tmp_path / "ours.safetensors"), str(out)]) == 0
    content = torch.load(out, weights_only=True)
    assert content.pop("model_name") == NAME
    encoder = PublishedEncoder(clip(NAME))
    theirs = PublishedLinear(encoder)
    theirs.load_state_dict(content)  # strict
    params: Any = theirs.model.get_submodule("params")
    for (name, start), moved in zip(encoder.named_parameters(), params, strict=True):
        expected: Tensor = linear.weights().get(name, start)
        assert torch.equal(moved, expected), name
    assert main(["convert", str(out), str(back), f"--model={NAME}"]) == 0
    one, other = load_checkpoint(back), load_checkpoint(tmp_path / "ours.safetensors")
    assert (one.hash, one.theta0_hash) == (other.hash, other.theta0_hash)


def test_a_head_is_their_class(tmp_path: Path) -> None:
    head = ClassificationHead(True, torch.randn(4, 6), torch.randn(4), list("abcd"))
    head.save(tmp_path / "head_X.safetensors")
    out, back = tmp_path / "head_X.pt", tmp_path / "back.safetensors"
    assert main(["convert", "--to=public", str(tmp_path / "head_X.safetensors"), str(out)]) == 0
    with named(ClassificationHead=PublishedHead):
        theirs = torch.load(out, weights_only=False)
    assert isinstance(theirs, PublishedHead) and theirs.normalize is True
    assert torch.equal(theirs.weight, head.weight) and torch.equal(theirs.bias, head.bias)
    assert main(["convert", str(out), str(back)]) == 0
    assert load_checkpoint(back).hash == load_checkpoint(tmp_path / "head_X.safetensors").hash


def test_what_has_no_public_format_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vector, tower = tmp_path / "vector.safetensors", tmp_path / "tower.safetensors"
    save_tensors(vector, {"w": torch.ones(1)}, "task_vector")
    tuned(base).save(tower)
    out = tmp_path / "out.pt"
    cases = {
        (str(vector), str(out)): "no format for a task_vector",
        (str(tower), str(tmp_path / "out.safetensors")): "expected OUT to end in .pt",
        (str(tower), str(base)): "exists; choose another or add --force",
        (str(tower), str(out), f"--theta0={tower}"): "lacks 6 of the weights",
    }
    for words, message in cases.items():
        before = base.read_bytes()
        assert main(["convert", "--to=public", *words]) == 2
        assert message in capsys.readouterr().err and not out.exists()
        assert base.read_bytes() == before


def test_inspect_goes_on_after_a_bad_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    ClassificationHead(True, torch.ones(2, 3)).save(good)
    bad.write_bytes(b"no checkpoint")
    assert main(["inspect", str(bad), str(tmp_path / "none.pt"), str(good)]) == 2
    out, err = capsys.readouterr()
    assert "head, written by this project" in out
    assert f"error: {bad} is damaged" in err and "none.pt" in err
    assert main(["inspect", str(good)]) == 0
