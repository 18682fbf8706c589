"""An encoder of texts, registered from outside: task vectors, linearisation, evaluation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.analysis import disentanglement
from tangent_arithmetic.analysis.edits import EditedEncoder
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.arithmetic.task_vectors import NonLinearTaskVector
from tangent_arithmetic.encoders import registry
from tangent_arithmetic.encoders.base import ModuleEncoder, is_encoder, is_linear
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.linearized import LinearizedEncoder, linearized, standard
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.tangent.linearized import LinearizedModel

WORDS, FEATURES, CLASSES = 12, 5, 3
COEFS = [0.0, 0.5, 1.0]


class TextEncoder(ModuleEncoder):
    """Token ids (batch, length) to features (batch, features)."""

    kind = "text_encoder"

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, FEATURES)
        self.mlp = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.LayerNorm(FEATURES))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.embedding(tokens).mean(dim=1))
        return out


def _load_standard(path: Path) -> TextEncoder:
    encoder = TextEncoder()
    encoder.load_weights(load_checkpoint(path).theta)
    return encoder


def _load_linear(path: Path) -> LinearizedEncoder:
    checkpoint, encoder = load_checkpoint(path), TextEncoder()
    encoder.load_weights(checkpoint.theta0 or checkpoint.theta)
    linear = LinearizedEncoder(encoder)
    linear.load_weights(checkpoint.theta)
    return linear


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_LOADERS", copy.copy(registry._LOADERS))
    registry.register_encoder(TextEncoder.kind, _load_standard, _load_linear)


@pytest.fixture
def models() -> tuple[TextEncoder, TextEncoder]:
    """theta0 and theta."""
    theta0 = TextEncoder().eval()
    theta = copy.deepcopy(theta0)
    with torch.no_grad():
        for value in theta.parameters():
            value.add_(torch.randn_like(value))
    return theta0, theta


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randint(WORDS, (8, length)), torch.randint(CLASSES, (8,))) for length in (4, 7, 3)
    ]


@torch.no_grad()
@pytest.mark.parametrize("linear", [False, True])
def test_an_encoder_of_texts_is_edited_and_evaluated(
    linear: bool, models: tuple[TextEncoder, TextEncoder], batches: list[tuple[Tensor, Tensor]]
) -> None:
    theta0, theta = models
    assert is_encoder(theta0) and not is_encoder(nn.Linear(1, 1))
    head = ClassificationHead(True, torch.randn(CLASSES, FEATURES))
    tau = NonLinearTaskVector(theta0, theta)
    base = linearized(theta0) if linear else theta0
    assert is_linear(base) == linear

    def expected(coef: float) -> float:
        edited = (tau.apply_to_linear if linear else tau.apply_to)(theta0, coef)
        hits = [(head(edited(x)).argmax(1) == y).sum() for x, y in batches]
        return float(sum(hits)) / sum(len(y) for _, y in batches)

    wanted = [expected(coef) for coef in COEFS]
    split = Split("texts", head, batches)
    assert split.sweep(base, tau.vector, COEFS) == pytest.approx(wanted)
    assert len(set(wanted)) > 1
    base.load_weights(theta.weights())
    found = split.accuracy(base)
    assert (found["top1"], found["num_images"]) == (pytest.approx(wanted[-1]), 24)


@torch.no_grad()
def test_a_linearised_encoder_keeps_names_and_goes_back(
    models: tuple[TextEncoder, TextEncoder], batches: list[tuple[Tensor, Tensor]]
) -> None:
    theta0, theta = models
    linear = linearized(theta0)
    assert linearized(linear) is linear and standard(theta0) is theta0
    assert linear.weights().keys() == theta0.weights().keys()
    linear.load_weights(theta.weights())
    x = batches[0][0]
    torch.testing.assert_close(standard(linear)(x), theta(x))
    torch.testing.assert_close(
        linear(x), theta0(x) + linear.tangents(x, [linear.displacement()])[1][0]
    )
    with pytest.raises(TypeError, match="subclasses ModuleEncoder, got Linear"):
        linearized(nn.Linear(1, 1))  # type: ignore[call-overload]


@torch.no_grad()
@pytest.mark.parametrize("zeroshot", [False, True])
def test_checkpoints_of_a_registered_kind_are_loaded_and_edited(
    zeroshot: bool,
    models: tuple[TextEncoder, TextEncoder],
    batches: list[tuple[Tensor, Tensor]],
    tmp_path: Path,
) -> None:
    theta0, theta = models
    linear = LinearizedEncoder(theta0)
    linear.load_weights(theta.weights())
    if zeroshot:  # theta0 is then stored there alone
        theta0.save(tmp_path / "zeroshot.pt")
    theta.save(tmp_path / "finetuned.pt", epochs=1)
    linear.save(tmp_path / "linear_finetuned.pt")
    theta0.save(tmp_path / "zeroshot.pt")
    x = batches[0][0]
    for name in ("finetuned.pt", "linear_finetuned.pt"):
        torch.testing.assert_close(registry.load_standard(tmp_path / name)(x), theta(x))
        tau = NonLinearTaskVector(tmp_path / "zeroshot.pt", tmp_path / name)
        for source in (tmp_path / "zeroshot.pt", theta0, linearized(theta0)):
            edited = tau.apply_to(source)
            assert isinstance(edited, TextEncoder)
            torch.testing.assert_close(edited(x), theta(x))
            edited = tau.apply_to_linear(source)
            assert is_linear(edited)
            torch.testing.assert_close(edited(x), linear(x))
    torch.testing.assert_close(registry.load_linear(tmp_path / "linear_finetuned.pt")(x), linear(x))
    torch.testing.assert_close(registry.load_linear(tmp_path / "finetuned.pt")(x), theta(x))


@torch.no_grad()
@pytest.mark.parametrize("linear", [False, True])
def test_analyses_take_an_encoder_of_texts(
    linear: bool, models: tuple[TextEncoder, TextEncoder], batches: list[tuple[Tensor, Tensor]]
) -> None:
    theta0, theta = models
    tau = NonLinearTaskVector(theta0, theta)
    head = ClassificationHead(True, torch.randn(CLASSES, FEATURES))
    base = linearized(theta0) if linear else theta0
    vectors = {"one": tau.vector, "other": (-tau).vector}
    model = EditedEncoder(base, vectors, lambda name: Split(name, head, batches))
    (joint, zero, one, other), labels = model.predictions(
        "one", [{"one": 1.0, "other": 1.0}, {}, {"one": 1.0}, {"other": 1.0}]
    )
    assert torch.equal(joint, zero) and len(labels) == 24
    errors = disentanglement.errors(model, ("one", "other"), [0.0, 1.0])
    changed = [float((zero != alone).double().mean()) for alone in (one, other)]
    assert errors.iloc[0]["error"] == 0 < sum(changed)
    assert errors.iloc[3][["error1", "error2"]].tolist() == pytest.approx(changed)


def test_unregistered_kinds_and_second_registrations_are_refused(tmp_path: Path) -> None:
    ClassificationHead(True, torch.ones(2, 3)).save(tmp_path / "head.pt")
    with pytest.raises(UsageError, match="holds a head, expected one of image_encoder, "):
        registry.load_standard(tmp_path / "head.pt")
    with pytest.raises(UsageError, match="kind of encoder checkpoint 'text_encoder' is already"):
        registry.register_encoder(TextEncoder.kind, _load_standard, _load_linear)


def test_the_study_s_backbone_is_a_registered_kind(tmp_path: Path) -> None:
    from tangent_arithmetic.encoders.mlp import BackBone

    backbone = BackBone(4)
    backbone.save(tmp_path / "backbone.pt")
    linear = registry.load_linear(tmp_path / "backbone.pt")
    assert isinstance(linear, LinearizedModel)
    x = torch.randn(3, 4)
    torch.testing.assert_close(linear(x), registry.load_standard(tmp_path / "backbone.pt")(x))
