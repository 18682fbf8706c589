"""Zero-shot heads agree with an independent computation and are kept while they are current."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from src.heads import get_classification_head
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.data.embedded.model import WEIGHTS, register
from tangent_arithmetic.data.templates import get_templates
from tangent_arithmetic.encoders.clip import create_clip
from tangent_arithmetic.encoders.heads import build_classification_head, zeroshot_weights
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts
from tangent_arithmetic.run import heads
from tangent_arithmetic.run.models import zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError

CPU = torch.device("cpu")
NAMES = ("a", "bb", "c")
TEMPLATES: list[Callable[[str], str]] = ["{}".format, "the {}".format]


class Clip(nn.Module):
    """A text tower that can be computed by hand: the sum of a row a letter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(128, 4))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.seen: list[str] = []

    def tokenizer(self, texts: list[str]) -> torch.Tensor:
        self.seen += texts
        counts = torch.zeros(len(texts), 128)
        for row, text in enumerate(texts):
            for letter in text:
                counts[row, ord(letter)] += 1
        return counts

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens @ self.table


def _by_hand(clip: Clip) -> np.ndarray:
    table, scale = clip.table.detach().double().numpy(), np.exp(2.0)
    rows = []
    for name in NAMES:
        texts = [sum(table[ord(letter)] for letter in text) for text in (name, f"the {name}")]
        mean = sum(text / np.linalg.norm(text) for text in texts) / 2
        rows.append(scale * mean / np.linalg.norm(mean))
    return np.stack(rows)


def test_weights_are_scaled_normalised_means_of_normalised_texts() -> None:
    clip = Clip().train()
    found = zeroshot_weights(clip, NAMES, TEMPLATES, CPU)
    np.testing.assert_allclose(found.numpy(), _by_hand(clip), rtol=1e-5, atol=1e-6)
    assert clip.seen == ["a", "the a", "bb", "the bb", "c", "the c"]
    assert found.dtype == torch.float32 and not found.requires_grad


def test_half_precision_towers_give_float32_weights() -> None:
    clip = Clip()

    class Half(Clip):
        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().encode_text(tokens).bfloat16()

    half = Half()
    half.load_state_dict(clip.state_dict())
    found = zeroshot_weights(half, NAMES, TEMPLATES, CPU)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), _by_hand(clip), rtol=0.05, atol=0.1)


def test_a_model_without_its_tokenizer_is_refused() -> None:
    """The stock tokenizer would give wrong numbers without a word."""
    message = (
        r"expected a CLIP with a tokenizer, .* tangent_arithmetic\.encoders\.clip\.create_clip"
    )
    with pytest.raises(UsageError, match=message):
        zeroshot_weights(nn.Linear(1, 1), NAMES, TEMPLATES, CPU)


@torch.no_grad()
def test_the_embedded_model_s_head(args: Callable[..., Any], cache: Path) -> None:
    """Against open_clip's own model and tokenizer, in float64."""
    clip: Any = create_clip("ViT-Nano-8")[0]
    templates, embedded = get_templates("EmojiVal", "embedded"), EMBEDDED_SETS["Emoji"]
    head = build_classification_head(
        clip, "EmojiVal", templates, args().data_location, "cpu", "embedded", cache
    )
    register()
    tokenizer, wide = open_clip.get_tokenizer("ViT-Nano-8"), copy.deepcopy(clip).double()
    rows = []
    for name in embedded.classnames:
        texts = [text.replace("{}", name) for text in embedded.templates]
        features = wide.encode_text(tokenizer(texts)).numpy()
        mean = (features / np.linalg.norm(features, axis=1, keepdims=True)).mean(0)
        rows.append(mean / np.linalg.norm(mean))
    expected = np.exp(wide.logit_scale.item()) * np.stack(rows)
    np.testing.assert_allclose(head.weight.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert head.normalize and not head.bias.any()
    assert head.classnames == embedded.classnames


@pytest.mark.parametrize("name", EMBEDDED_SETS)
def test_every_prompt_fits_the_embedded_model(name: str) -> None:
    """Its ids have a row, none is cut, and no two classes look the same."""
    clip: Any = create_clip("ViT-Nano-8__init__")[0]
    tokenizer = clip.tokenizer
    rows = clip.token_embedding.weight.shape[0]
    embedded = EMBEDDED_SETS[name]
    for prompt in embedded.prompts:
        texts = [prompt(classname) for classname in embedded.classnames]
        assert max(len(tokenizer.encode(text)) for text in texts) + 2 <= tokenizer.context_length
        tokens = tokenizer(texts)
        assert tokens.shape == (len(texts), 20) and tokens.max() < rows
        assert len({tuple(row.tolist()) for row in tokens}) == len(texts)


# --- the kept heads


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often a head is computed."""
    calls: list[int] = []
    compute = zeroshot_weights

    def counted(model: nn.Module, names: Any, templates: Any, device: Any) -> torch.Tensor:
        calls.append(len(names))
        return compute(model, names, templates, device)

    monkeypatch.setattr(heads, "zeroshot_weights", counted)
    return calls


def test_heads_are_computed_once_for_both_splits(
    args: Callable[..., Any], built: list[int]
) -> None:
    settings = args()
    first = get_classification_head(settings, "Emoji")
    again, val = (get_classification_head(settings, name) for name in ("Emoji", "EmojiVal"))
    assert built == [9]
    assert torch.equal(first.weight, again.weight) and torch.equal(first.weight, val.weight)
    assert first.normalize and len(first.classnames) == 9
    kept = Path(settings.save) / "head_Emoji.safetensors"
    assert read_facts(kept)["info"]["model"] == "ViT-Nano-8"
    clip, *_ = create_clip("ViT-Nano-8")
    expected = zeroshot_weights(
        clip, EMBEDDED_SETS["Emoji"].classnames, get_templates("Emoji", "embedded"), CPU
    )
    torch.testing.assert_close(first.weight.detach(), expected)


def test_a_head_needs_no_pictures(args: Callable[..., Any], built: list[int]) -> None:
    """The folder of data is empty; class names are the published ones."""
    run = args(suite="clip8")
    head = get_classification_head(run, "DTDVal")
    assert head.classnames[:2] == ("banded", "blotchy") and head.weight.shape == (47, 256)
    assert get_classification_head(run, "SUN397").classnames[-1] == "youth hostel"
    clip: Any = create_clip("ViT-Nano-8")[0]
    one = build_classification_head(
        clip, "DTD", get_templates("DTD"), run.data_location, CPU, suite="clip8"
    )
    torch.testing.assert_close(one.weight, head.weight)


def test_new_prompts_or_another_model_make_a_new_head(
    args: Callable[..., Any], built: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = args()
    before = get_classification_head(settings, "Emoji")
    monkeypatch.setattr(heads, "get_templates", lambda name, suite: ["the face {}.".format])
    for _ in range(2):
        after = get_classification_head(settings, "Emoji")
        assert len(built) == 2 and not torch.equal(before.weight, after.weight)
    get_classification_head(args(model="ViT-Nano-8__init__"), "Emoji")
    assert len(built) == 3


def test_no_further_heads_after_the_model_s_file_has_changed(
    args: Callable[..., Any], tmp_path: Path
) -> None:
    weights = load_file(WEIGHTS)
    save_file(weights, tmp_path / "w.safetensors")
    settings = args(model=f"ViT-Nano-8__pretrained__{tmp_path / 'w.safetensors'}")
    zeroshot_encoder(Run.of(settings))
    get_classification_head(settings, "Emoji")
    save_file({name: 2 * value for name, value in weights.items()}, tmp_path / "w.safetensors")
    get_classification_head(settings, "Emoji")  # from the start of the run
    Run.of(settings).head_path("Emoji").unlink()
    with pytest.raises(UsageError, match=r"are no longer those of .*zeroshot.safetensors, which"):
        get_classification_head(settings, "Emoji")


def test_a_damaged_head_is_built_again(
    args: Callable[..., Any], built: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    settings = args()
    expected = get_classification_head(settings, "Emoji")
    path = Path(settings.save) / "head_Emoji.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level("WARNING", logger="tangent_arithmetic.encoders.heads"):
        found = get_classification_head(settings, "Emoji")
    assert torch.equal(found.weight, expected.weight) and len(built) == 2
    assert "head_Emoji.safetensors is damaged; building it again" in caplog.text


# --- which file is read


def write_head(path: Path, value: float, ours: bool = False) -> None:
    """A head full of a number, as this or another project writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"weight": torch.full((2, 3), value), "bias": torch.zeros(2)}
    if ours:
        ClassificationHead(True, state["weight"]).save(path)
    else:
        (save_file if path.suffix == ".safetensors" else torch.save)(state, path)


def head_at(path: Path) -> float:
    """The number in the head that `path` stands for."""
    return float(load_checkpoint(path).theta["weight"][0, 0])


@pytest.mark.parametrize(
    ("named", "beside"),
    [
        ("head.pt", "head.safetensors"),
        ("head", "head.safetensors"),
        ("head.pth", "head.safetensors"),
        ("head_MNIST.pt", "head_MNISTVal.safetensors"),
        ("MNIST/head.pt", "MNISTVal/head.safetensors"),
        ("head.safetensors", "head.pt"),
    ],
)
def test_the_named_file_is_read(named: str, beside: str, tmp_path: Path) -> None:
    write_head(tmp_path / named, 1.0)
    write_head(tmp_path / beside, 2.0)
    assert head_at(tmp_path / named) == 1.0
    (tmp_path / named).unlink()
    assert head_at(tmp_path / named) == 2.0


def test_ours_beside_it_is_preferred(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    named, ours = tmp_path / "head.pt", tmp_path / "head.safetensors"
    write_head(named, 1.0)
    write_head(named, 3.0, ours=True)
    assert head_at(named) == 3.0
    assert f"reading {ours}, written by this project, instead of head.pt" in caplog.text
    write_head(tmp_path / "MNIST" / "head.pt", 1.0)
    write_head(tmp_path / "MNISTVal" / "head.pt", 3.0, ours=True)  # not beside it
    assert head_at(tmp_path / "MNIST" / "head.pt") == 1.0
    ours.write_bytes(ours.read_bytes()[:50])
    assert head_at(named) == 1.0
    assert (
        "head.safetensors is damaged" in caplog.text and f"reading {named} beside it" in caplog.text
    )
