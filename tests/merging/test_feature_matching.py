"""LOT, FeatCal and ProDistill against their definitions, written out in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from tangent_arithmetic.data import texts as texts_module
from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.data.texts import Texts
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.merging.methods.prodistill import blocks_of
from tangent_arithmetic.runtime.errors import UsageError
from tests.merging.small import Data, Small, State, inputs_of_maps, merged, pixels, small_data

BLOCKS = ("blocks.0.", "blocks.1.")


@pytest.fixture
def data() -> Data:
    return small_data()


@pytest.fixture(scope="module")
def tower() -> Data:
    """Two models of ViT-Nano-8 from one random start, with four images each."""
    torch.manual_seed(0)
    base = ImageEncoder.without_weights("ViT-Nano-8").double().eval()
    towers, rng = {"_pretrained_": base}, np.random.default_rng(0)
    pictures = {}
    for name in ("a", "b"):
        towers[name] = copy.deepcopy(base)
        for value in towers[name].weights().values():
            value.add_(0.02 * torch.randn_like(value))
        shades = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
        pictures[name] = ArrayPictures(shades, np.arange(4) % 2)
    encoders = {name: InDouble(encoder) for name, encoder in towers.items()}
    return Data(encoders, {name: nn.Linear(256, 2).double() for name in pictures}, pictures)


class InDouble(ModuleEncoder):
    """An image encoder that takes its images in float64."""

    kind = "in_double"

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.inner = encoder
        self.val_preprocess = lambda image: encoder.val_preprocess(image).double()  # type: ignore[misc]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.inner(images)
        return features


@torch.no_grad()
def inputs_of_scales(encoder: Small, x: Tensor) -> State:
    """The normalised inputs of the layer normalisations, by hand."""
    x, found = encoder.embed(x.unflatten(1, (4, 6))), {}
    blocks: Any = encoder.blocks
    for i, block in enumerate(blocks):
        spread = (x.var(-1, correction=0, keepdim=True) + block.norm.eps).sqrt()
        found[f"blocks.{i}.norm.weight"] = ((x - x.mean(-1, keepdim=True)) / spread).flatten(0, 1)
        x = block(x)
    return found


def taus_of(data: Data) -> list[State]:
    start = data.pool["_pretrained_"]
    return [{n: v - start[n] for n, v in data.pool[model].items()} for model in data.models]


def at(data: Data, coef: float) -> State:
    """theta0 + coef * sum of tau."""
    taus, start = taus_of(data), data.pool["_pretrained_"]
    return {name: value + coef * sum(tau[name] for tau in taus) for name, value in start.items()}


@torch.no_grad()
def least_drift(data: Data) -> State:
    """theta0 and the shortest T that minimises the sum of |X_k (T - T_k)^T|^2 / images."""
    theta0, taus = data.pool["_pretrained_"], taus_of(data)
    result = {n: v + sum(tau[n] for tau in taus) / 2 for n, v in theta0.items()}
    runs = [(data.encoders[model], data.images(model)) for model in data.models]
    maps = [inputs_of_maps(encoder, x) for encoder, x in runs]
    for name in maps[0]:
        xs = [own[name] / len(x) ** 0.5 for own, (_, x) in zip(maps, runs, strict=True)]
        ys = [x @ tau[name].T for x, tau in zip(xs, taus, strict=True)]
        found = torch.linalg.lstsq(torch.cat(xs), torch.cat(ys), driver="gelsd", rcond=1e-7)
        result[name] = theta0[name] + found.solution.T
    scales = [inputs_of_scales(encoder, x) for encoder, x in runs]
    for name in scales[0]:
        for d in range(len(theta0[name])):
            above = below = 0.0
            for own, tau, (_, x) in zip(scales, taus, runs, strict=True):
                weight = float(own[name][:, d].norm() ** 2) / len(x)
                above, below = above + weight * float(tau[name][d]), below + weight
            result[name][d] = theta0[name][d] + above / below
    return result


@pytest.mark.parametrize("seen", [3, 2])
def test_lot_has_the_least_drift(data: Data, seen: int) -> None:
    """And stays at theta0 where no input of any task has a component."""
    for own in data.pictures.values():
        own.images[..., seen:] = 0  # the colours that the embedding does not see
    found = merged("lot", data)
    torch.testing.assert_close(found, least_drift(data), rtol=1e-6, atol=1e-8)
    unseen = torch.tensor([c >= seen for c in range(3)] * 2)
    start = data.pool["_pretrained_"]["embed.weight"]
    torch.testing.assert_close(found["embed.weight"][:, unseen], start[:, unseen])
    assert all(count == 64 for _, count, _ in data.splits)


def test_lot_of_one_model_gives_its_features(tower: Data) -> None:
    """In a tower of open_clip: a model's own task vector has no drift, whatever its rank."""
    encoders = {name: tower.encoders[name] for name in ("_pretrained_", "a")}
    one = Data(encoders, {"a": tower.heads["a"]}, tower.pictures)
    found = copy.deepcopy(tower.encoders["a"])
    found.load_weights(merged("lot", one))
    name = "inner.model.visual.transformer.resblocks.3.mlp.c_proj.weight"
    assert not torch.allclose(found.weights()[name], one.pool["a"][name])
    x = one.images("a")
    torch.testing.assert_close(found(x), tower.encoders["a"](x), rtol=1e-5, atol=1e-6)


def solved(blocks: list[tuple[Tensor, Tensor]], ridge: float, anchor: Tensor) -> Tensor:
    """argmin_v of the sum of |X v - Y|^2 over blocks (X, Y), plus ridge * |v - anchor|^2."""
    eye = torch.eye(len(anchor), dtype=torch.float64)
    blocks = [*blocks, (ridge**0.5 * eye, ridge**0.5 * anchor)]
    x, y = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    found: Tensor = torch.linalg.lstsq(x, y).solution
    return found


@torch.no_grad()
def calibrated(data: Data, ridge: float, rho: float, alpha: float) -> State:
    """FeatCal's fits as least-squares problems with a row for each token."""
    theta0, start = data.pool["_pretrained_"], at(data, 0.3)
    anchors = {name: rho * start[name] + (1 - rho) * theta0[name] for name in start}
    result = {name: value.clone() for name, value in start.items()}
    images = [data.images(model) for model in data.models]
    experts = [data.encoders[model] for model in data.models]
    there = [inputs_of_maps(e, x) for e, x in zip(experts, images, strict=True)]
    for block in BLOCKS:
        student = copy.deepcopy(data.encoders["_pretrained_"])
        student.load_weights(result)
        here = [inputs_of_maps(student, x) for x in images]
        for name in [name for name in here[0] if name.startswith(block)]:
            bias = name.replace("weight", "bias")
            rows, shares, means = [], [], []
            for own, other, expert in zip(here, there, experts, strict=True):
                x, w = own[name], expert.weights()
                y = (alpha * other[name] + (1 - alpha) * x) @ w[name].T
                shares.append(1 / (x.T @ x / len(x)).norm())
                root = (shares[-1] / len(x)).sqrt()
                rows.append((root * x, root * y))
                means.append((x.mean(0), y.mean(0) + w[bias]))
            fit = solved(rows, ridge, anchors[name].T)
            wanted = torch.stack([y - x @ fit for x, y in means])
            roots = torch.stack(shares).sqrt()[:, None]
            shift = solved([(roots, roots * wanted)], ridge, anchors[bias][None])
            result[name], result[bias] = fit.T, shift[0]
        z = [inputs_of_scales(student, x) for x in images]
        name, bias = f"{block}norm.weight", f"{block}norm.bias"
        for d in range(len(theta0[name])):
            rows = []
            for own, expert in zip(z, experts, strict=True):
                x, w = own[name][:, d], expert.weights()
                design = torch.stack([x, torch.ones_like(x)], 1) / len(x) ** 0.5
                rows.append((design, design @ torch.stack([w[name][d], w[bias][d]])[:, None]))
            anchor = torch.stack([anchors[name][d], anchors[bias][d]])[:, None]
            result[name][d], result[bias][d] = solved(rows, ridge, anchor)[:, 0]
    return result


@pytest.mark.parametrize(
    ("ridge", "rho", "alpha"),
    [(0.05, 2.0, 0.3), (0.01, 2.2, 0.25), (1.0, 1.0, 0.0), (0.1, 0.0, 1.0)],
)
def test_featcal_is_the_ridge_regression_of_each_block(
    data: Data, ridge: float, rho: float, alpha: float
) -> None:
    for size in (3, 8):  # whatever the batches
        data.batch_size = size
        found = merged("featcal", data, ridge=ridge, anchor_blend=rho, interpolation=alpha)
        expected = calibrated(data, ridge, rho, alpha)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert all(count == 256 for _, count, _ in data.splits)


def test_featcal_without_biases(data: Data) -> None:
    """Maps and scales alone are fitted where there is no bias or shift."""
    for encoder in data.encoders.values():
        for block in encoder.blocks:
            block.hidden.bias = block.norm.bias = None
    found = merged("featcal", data)
    names = {name for name in found if "hidden" in name or "norm" in name}
    assert names == {f"{block}{leaf}.weight" for block in BLOCKS for leaf in ("hidden", "norm")}
    z = [inputs_of_scales(student_of(data), data.images(model)) for model in data.models]
    name = "blocks.0.norm.weight"
    energies = torch.stack([own[name].square().mean(0) for own in z])
    scales = torch.stack([data.pool[model][name] for model in data.models])
    anchor = 2 * at(data, 0.3)[name] - data.pool["_pretrained_"][name]
    expected = ((energies * scales).sum(0) + 0.05 * anchor) / (energies.sum(0) + 0.05)
    torch.testing.assert_close(found[name], expected)


def student_of(data: Data) -> Small:
    student: Small = copy.deepcopy(data.encoders["_pretrained_"])
    student.load_weights(at(data, 0.3))
    return student


def through(blocks: Any, index: int, x: Tensor) -> Tensor:
    for block in blocks[:index]:
        x = block(x)
    return x


def distilled(data: Data, epochs: int, lr: float, seen: int) -> tuple[State, list[float]]:
    """ProDistill by gradients in the weights and the chain rule, with Adam written out."""
    student, losses = student_of(data), []
    taus = taus_of(data)
    with torch.no_grad():
        tokens = [data.images(model)[:seen].unflatten(1, (4, 6)) for model in data.models]
    for i in range(2):
        block, prefix = student.blocks[i], f"blocks.{i}."
        names = [name for name, _ in block.named_parameters()]
        theta0 = {name: data.pool["_pretrained_"][prefix + name] for name in names}
        with torch.no_grad():
            inputs = [through(student.blocks, i, student.embed(x)) for x in tokens]
            experts = [data.encoders[model] for model in data.models]
            targets = [
                through(e.blocks, i + 1, e.embed(x)) for e, x in zip(experts, tokens, strict=True)
            ]

        def distance(
            theta: State, block: Any = block, inputs: Any = inputs, targets: Any = targets
        ) -> Tensor:
            return sum(
                ((functional_call(block, theta, (x,)) - y) ** 2).sum()
                for x, y in zip(inputs, targets, strict=True)
            )

        alphas = {n: torch.full((2, *v.shape), 0.3).double() for n, v in theta0.items()}
        first, second = ({n: torch.zeros_like(v) for n, v in alphas.items()} for _ in range(2))
        for step in range(1, epochs + 1):
            theta = moved(theta0, alphas, taus, prefix)
            losses.append(float(distance(theta)))
            for name, slope in grad(distance)(theta).items():
                each = torch.stack([slope * tau[prefix + name] for tau in taus])
                first[name] = 0.9 * first[name] + 0.1 * each
                second[name] = 0.999 * second[name] + 0.001 * each**2
                size = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
                alphas[name] = alphas[name] - lr * first[name] / (1 - 0.9**step) / size
        with torch.no_grad():
            for name, value in moved(theta0, alphas, taus, prefix).items():
                block.get_parameter(name).copy_(value)
    return student.weights(), losses


def moved(theta0: State, alphas: State, taus: list[State], prefix: str) -> State:
    return {
        name: start + sum(alphas[name][k] * tau[prefix + name] for k, tau in enumerate(taus))
        for name, start in theta0.items()
    }


def test_prodistill_follows_adam_on_the_distance_of_features(data: Data) -> None:
    found = merged("prodistill", data, epochs=5, lr=0.05, batch_size=8)
    expected, losses = distilled(data, 5, 0.05, 8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert losses[4] < losses[0] and losses[9] < losses[5]
    torch.testing.assert_close(merged("prodistill", data, epochs=0), at(data, 0.3))
    assert all(count == 64 for _, count, _ in data.splits)


@torch.no_grad()
def drift(data: Data, weights: State) -> float:
    """The squared distance of features to those of each task's model, over all tasks."""
    encoder = copy.deepcopy(data.encoders["_pretrained_"])
    encoder.load_weights(weights)
    images = {model: data.images(model) for model in data.models}
    return sum(float((encoder(x) - data.encoders[m](x)).square().sum()) for m, x in images.items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("featcal", {}),
        ("prodistill", {"epochs": 8, "batch_size": 3}),  # batches of several sizes
    ],
)
def test_features_of_a_tower_come_nearer(
    tower: Data, name: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """In a tower of open_clip, whose embedding and head stay at theta0 + 0.3 sum of tau."""
    caplog.set_level("INFO")
    found, start = merged(name, tower, **options), at(tower, 0.3)
    assert drift(tower, found) < 0.8 * drift(tower, start)
    for key, value in found.items():
        assert torch.allclose(value, start[key], rtol=1e-12) == ("resblocks" not in key), key
    logged = [str(record.msg % record.args) for record in caplog.records]
    losses = [line.split(": ")[1].split(" -> ") for line in logged if " -> " in line]
    assert len(losses) == (4 if name == "prodistill" else 0)  # blocks
    assert all(float(after) < float(before) for before, after in losses)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lot", {"num_examples": 0}, "lot's num_examples must be at least 1, got 0"),
        ("featcal", {"num_examples": 0}, "featcal's num_examples must be at least 1, got 0"),
        ("featcal", {"ridge": 0.0}, "featcal's ridge must be above 0, got 0.0"),
        ("featcal", {"interpolation": 1.5}, "interpolation must be from 0 to 1, got 1.5"),
        ("prodistill", {"num_examples": 0}, "num_examples must be at least 1, got 0"),
        ("prodistill", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("prodistill", {"epochs": -1}, "epochs must be at least 0 and its lr above 0, got -1"),
        ("prodistill", {"lr": 0.0}, "its lr above 0, got 100 and 0.0"),
    ],
)
def test_options_out_of_range(data: Data, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merged(name, data, **options)


class Flat(ModuleEncoder):
    """An encoder without blocks."""

    kind = "flat"

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(24, 5)
        self.val_preprocess = pixels

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.map(images)
        return features


def test_prodistill_refuses_encoders_without_blocks_of_their_own(data: Data) -> None:
    with pytest.raises(UsageError, match="Flat has no list of blocks; choose a method that"):
        blocks_of(Flat())
    for encoder in data.encoders.values():
        encoder.blocks[1] = encoder.blocks[0]  # two calls of one block
    with pytest.raises(UsageError, match=r"calls blocks.0 2 times"):
        merged("prodistill", data)


class Letters:
    """A tokenizer of letters."""

    reads_texts = True

    def __call__(self, text: str) -> Tensor:
        return torch.tensor([ord(letter) - 96 for letter in text])

    def lengths(self, texts: list[str]) -> list[int]:
        return [len(text) for text in texts]


class Sentences(ModuleEncoder):
    """A small BERT."""

    kind = "sentences"

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        from tangent_arithmetic.encoders.backbones.sentences import SentenceModel

        config = transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=64,
        )  # fmt: skip
        self.model = SentenceModel(transformers.BertModel(config, add_pooling_layer=False), "mean")
        self.val_preprocess = Letters()

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.model(tokens)
        return features


def sentences(batch_size: int) -> Data:
    torch.manual_seed(0)
    base, rng = Sentences().double().eval(), np.random.default_rng(0)
    encoders, texts = {"_pretrained_": base}, {}
    for name in ("a", "b"):
        encoders[name] = copy.deepcopy(base)
        for value in encoders[name].weights().values():
            if value.is_floating_point():
                value.add_(0.05 * torch.randn_like(value))
        words = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 24)))) for _ in range(12)]
        texts[name] = Texts(tuple(words), np.zeros(12, np.int64))
    heads: dict[str, nn.Module] = {name: nn.Linear(16, 2).double() for name in texts}
    return Data(encoders, heads, texts, batch_size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("regmean", {}),
        ("lot", {}),
        ("featcal", {}),
        ("prodistill", {"epochs": 3, "batch_size": 12}),
    ],
)
def test_padding_of_texts_counts_for_nothing(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer padding, the same result."""
    found = merged(name, sentences(12), **options)
    if name == "prodistill":  # whose batches are its steps
        shorter = texts_module.pad
        monkeypatch.setattr(texts_module, "pad", lambda t: F.pad(shorter(t), (0, 5), value=-1))
    again = merged(name, sentences(12 if name == "prodistill" else 1), **options)
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-8)


def test_prodistill_does_not_depend_on_the_order_of_models(data: Data) -> None:
    options: dict[str, Any] = {"epochs": 3, "lr": 0.05, "batch_size": 3}
    found = merged("prodistill", data, **options)
    turned = small_data()
    turned.heads = dict(reversed(turned.heads.items()))
    turned.encoders = dict(reversed(turned.encoders.items()))
    torch.testing.assert_close(merged("prodistill", turned, **options), found, rtol=1e-5, atol=1e-7)
