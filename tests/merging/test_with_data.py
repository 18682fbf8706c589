"""Methods that run the models on images, against their definitions in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.merging import get_method
from tangent_arithmetic.merging.algorithms import algorithm_class
from tangent_arithmetic.merging.inner_products import inner_products
from tangent_arithmetic.merging.methods.adamerging import backward, mean_entropy
from tangent_arithmetic.merging.methods.fisher_merging import diagonal_fisher
from tangent_arithmetic.merging.moving import MovingEncoder
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.tangent.gradients import ExampleGradients
from tests.merging.small import FEATURES, Data, State, inputs_of_maps, merged, pixels, small_data


@pytest.fixture
def data() -> Data:
    return small_data()


def logits_of(data: Data, model: str, weights: State, images: Tensor) -> Tensor:
    encoder = data.encoders[model]
    found: Tensor = data.heads[model](functional_call(encoder, weights, (images,)))
    return found


def parameters(encoder: nn.Module) -> State:
    return {name: p.detach() for name, p in encoder.named_parameters()}


def dense_fisher(data: Data, model: str, several: bool = False) -> State:
    """The mean over images of the sum over labels of p(y) (d log p(y))^2, label by label."""
    weights = {n: p.requires_grad_() for n, p in parameters(data.encoders[model]).items()}
    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    for image in (images := data.images(model)):
        logits = logits_of(data, model, weights, image[None])[0]
        logs = logits.log_softmax(0)
        if several:  # of every set of labels
            signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * len(logits))
            logs = F.logsigmoid(signs * logits).sum(1)
        for log in logs:
            gradients = torch.autograd.grad(log, list(weights.values()), retain_graph=True)
            for name, gradient in zip(weights, gradients, strict=True):
                total[name] += log.detach().exp() * gradient.square() / len(images)
    return total


def fusion_bench_fisher(data: Data, model: str, batch_size: int) -> State:
    """The square of the gradient of sum sqrt(p) log p over a batch, over the number of images."""
    weights = {n: p.requires_grad_() for n, p in parameters(data.encoders[model]).items()}
    images = data.images(model)
    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    for batch in images.split(batch_size):
        logs = logits_of(data, model, weights, batch).log_softmax(1)
        loss = (logs.exp().detach().sqrt() * logs).sum()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += gradient.square() / len(images)
    return total


def flat(state: State) -> Tensor:
    return torch.cat([value.flatten() for value in state.values()])


@pytest.mark.parametrize("several", [False, True])
def test_fisher_information_is_that_of_single_images(data: Data, several: bool) -> None:
    if several:
        labels = np.eye(4, dtype=np.uint8)[data.pictures["a"].labels]
        data.pictures["a"] = ArrayPictures(data.pictures["a"].images, labels)
    expected = flat(dense_fisher(data, "a", several))
    for size in (1, 5):  # whatever the batches
        data.batch_size = size
        encoder = copy.deepcopy(data.encoders["a"])
        found = diagonal_fisher(encoder, data.split(encoder, "a"))
        torch.testing.assert_close(flat(found), expected, rtol=1e-9, atol=1e-15)


def test_the_estimator_of_fusion_bench_has_products_of_images_and_classes(data: Data) -> None:
    """It depends on the batches, and even for single images is not the Fisher information."""
    exact = flat(dense_fisher(data, "a"))
    alone, together = (flat(fusion_bench_fisher(data, "a", size)) for size in (1, 8))
    for one, other in ((alone, exact), (together, exact), (together, alone)):
        cosine = F.cosine_similarity(one, other, dim=0)
        assert cosine < 0.99 or not 0.9 < one.norm() / other.norm() < 1.1


def test_gradients_of_images_taken_one_by_one_are_the_same(data: Data) -> None:
    encoder = data.encoders["a"]
    weights = {name: p.requires_grad_() for name, p in encoder.named_parameters()}
    of = ExampleGradients(encoder, weights, lambda value, probe: value * probe)
    images, probes = data.images("a"), torch.randn(8, 2, FEATURES, dtype=torch.float64)
    expected = of(images, probes)
    assert of.can_batch
    of.can_batch = False
    torch.testing.assert_close(dict(of(images, probes)), dict(expected))


@pytest.mark.parametrize("normalize", [False, True])
def test_fisher_merging_is_the_weighted_mean(data: Data, normalize: bool) -> None:
    floor = 1e-3
    found = merged(
        "fisher_merging", data, normalize_fisher_weight=normalize, minimal_fisher_weight=floor
    )
    fishers = {model: dense_fisher(data, model) for model in data.models}
    for name, value in found.items():
        above = below = torch.zeros_like(value)
        for model, fisher in fishers.items():
            weight = fisher[name] + floor if name in fisher else torch.ones_like(value)
            if normalize and name in fisher:
                weight = weight / (flat(fisher).norm() + floor)
            above = above + weight * data.pool[model][name]
            below = below + weight
        torch.testing.assert_close(value, above / below, rtol=1e-9, atol=1e-12)
    assert all(count == 256 for _, count, _ in data.splits)


def least_squares(weights: list[Tensor], inputs: list[Tensor], ratio: float) -> Tensor:
    """argmin_W of the sum of |X_k W^T - X_k W_k^T|^2 / n_k; by normal equations."""
    inputs = [x / (len(x) / 4) ** 0.5 for x in inputs]  # four tokens an image
    if ratio == 1:
        targets = torch.cat([x @ w.T for x, w in zip(inputs, weights, strict=True)])
        return torch.linalg.lstsq(torch.cat(inputs), targets).solution.T
    grams = [x.T @ x * (ratio + (1 - ratio) * torch.eye(x.shape[1]).double()) for x in inputs]
    right = sum(w @ g for w, g in zip(weights, grams, strict=True))
    assert isinstance(right, Tensor)
    return right @ torch.linalg.inv(sum(grams[1:], grams[0]))


@torch.no_grad()
def regression(data: Data, ratio: float, plus: bool) -> State:
    """RegMean, or RegMean++ layer by layer, of the models."""
    tasks = [data.pool[model] for model in data.models]
    result = {name: torch.stack([t[name] for t in tasks]).mean(0) for name in tasks[0]}
    for layer in ("embed.", "blocks.0.", "blocks.1."):
        before = dict(result)
        for name in [n for n in inputs_of_maps(data.encoders["a"], data.images("a")) if layer in n]:
            inputs = []
            for model in data.models:
                encoder = copy.deepcopy(data.encoders[model])
                if plus:  # merged, but for the layer itself
                    own = {n: v for n, v in data.pool[model].items() if n.startswith(layer)}
                    encoder.load_weights({**before, **own})
                inputs.append(inputs_of_maps(encoder, data.images(model))[name])
            result[name] = least_squares([t[name] for t in tasks], inputs, ratio)
    return result


@pytest.mark.parametrize("ratio", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("name", ["regmean", "regmean_plusplus"])
def test_regmean_is_the_least_squares_fit(data: Data, name: str, ratio: float) -> None:
    found = merged(name, data, reduce_non_diagonal_ratio=ratio)
    expected = regression(data, ratio, plus=name == "regmean_plusplus")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_regmean_leaves_equal_models_and_unseen_inputs_at_the_mean(data: Data) -> None:
    data.encoders["b"] = data.encoders["a"]
    found = merged("regmean", data)
    torch.testing.assert_close(found, data.pool["a"], rtol=1e-9, atol=1e-12)
    data.encoders["b"] = data.encoders["_pretrained_"]
    for own in data.pictures.values():
        own.images[:] = 0  # of which the embedding sees nothing
    mean = (data.pool["a"]["embed.weight"] + data.pool["b"]["embed.weight"]) / 2
    torch.testing.assert_close(merged("regmean", data)["embed.weight"], mean)


@pytest.mark.parametrize("name", ["regmean", "regmean_plusplus", "lot", "fisher_merging"])
def test_models_in_half_precision_are_fitted_in_single(data: Data, name: str) -> None:
    def in_type(dtype: torch.dtype) -> State:
        for module in (*data.encoders.values(), *data.heads.values()):
            module.to(dtype)
        base = data.encoders["_pretrained_"]
        base.val_preprocess = lambda image: pixels(image).bfloat16().to(dtype)
        return merged(name, data)

    found = in_type(torch.bfloat16)
    expected = in_type(torch.float64)
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    for key, value in found.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=0.02, atol=0.02)


@torch.no_grad()
def test_inner_products_are_those_of_all_linear_maps(data: Data) -> None:
    encoder = data.encoders["a"]
    found = inner_products(encoder, data.split(encoder, "a"))
    inputs = inputs_of_maps(encoder, data.images("a"))
    torch.testing.assert_close(found, {name: x.T @ x / 8 for name, x in inputs.items()})


def by_autograd(data: Data, alpha: Tensor, group_of: Mapping[str, int]) -> Tensor:
    """The sum over tasks of mean entropies at theta0 + sum of alpha tau."""
    weights, learnt = State(), parameters(data.encoders["_pretrained_"])
    for name, start in data.pool["_pretrained_"].items():
        row = alpha[group_of[name]] if name in learnt else alpha[group_of[name]].detach()
        taus = torch.stack([data.pool[model][name] - start for model in data.models])
        weights[name] = start + torch.tensordot(row, taus, dims=1)
    total = torch.zeros((), dtype=torch.float64)
    for model in data.models:
        logits = logits_of(data, model, weights, data.images(model))
        p = logits.softmax(1)
        total = total - (p * p.log()).sum(1).mean()
    return total


@pytest.mark.parametrize("grouping", ["task", "block", "task-layer"])
def test_one_backward_pass_gives_all_derivatives(data: Data, grouping: str) -> None:
    """And theta0 and the task vectors are read a tensor at a time."""
    moving = MovingEncoder(data, grouping)
    moving.encoder.requires_grad_()
    rows = {name: moving.row[group] for name, group in moving.group_of.items()}
    count = {"task": 1, "block": len(data.pool["a"]), "task-layer": 4}[grouping]
    assert len(moving.groups) == count
    generator = torch.Generator().manual_seed(1)
    alpha = torch.rand(count, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    data.most = 0
    moving.place(alpha.detach())
    for model in data.models:
        split = data.split(moving.encoder, model)
        backward(moving.encoder, split, data.images(model), several=False)
    found = moving.gradient()
    (expected,) = torch.autograd.grad(by_autograd(data, alpha, rows), alpha)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    largest = max(value.nbytes for value in data.pool["a"].values())
    assert 0 < data.most <= 3 * largest
    assert all(p.grad is None for p in moving.encoder.parameters())


@pytest.mark.parametrize(
    ("name", "grouping", "clamp"),
    [
        ("task_wise_adamerging", "task", True),
        ("task_wise_adamerging", "task", False),
        ("layer_wise_adamerging", "block", True),
        ("layer_wise_adamerging", "task-layer", True),
    ],
)
def test_adamerging_follows_adam_on_the_entropy(
    data: Data, name: str, grouping: str, clamp: bool
) -> None:
    """With batches of all images, its steps are those of Adam by autograd."""
    options: dict[str, Any] = {"lr": 0.2, "max_steps": 6, "batch_size": 8, "clamp_weights": clamp}
    if name.startswith("layer"):
        options["grouping"] = grouping
    found = merged(name, data, split="test", **options)
    assert [part for _, _, part in data.splits] == ["test", "test"]
    moving = MovingEncoder(data, grouping)
    rows = {key: moving.row[group] for key, group in moving.group_of.items()}
    alpha = torch.full((len(moving.groups), 2), 0.3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([alpha], lr=0.2)
    for _ in range(6):
        optimizer.zero_grad()
        by_autograd(data, alpha, rows).backward()
        optimizer.step()
        if clamp:
            alpha.data.clamp_(0, 1)
    moving.place(alpha.detach())
    torch.testing.assert_close(found, moving.encoder.weights(), rtol=1e-6, atol=1e-9)


def test_entropy_of_several_labels_is_that_of_each_class() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64)
    expected = torch.distributions.Bernoulli(logits=logits).entropy().mean()
    torch.testing.assert_close(mean_entropy(logits, several=True), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fisher_merging", {"num_fisher_examples": 0}, "num_fisher_examples must be at least 1"),
        ("fisher_merging", {"minimal_fisher_weight": 0.0}, "must be above 0, got 0.0"),
        ("regmean", {"num_regmean_examples": 0}, "num_regmean_examples must be at least 1"),
        ("regmean_plusplus", {"reduce_non_diagonal_ratio": 1.5}, "must be from 0 to 1, got 1.5"),
        ("task_wise_adamerging", {"lr": 0.0}, "its lr above 0, got 1000 and 0.0"),
        ("layer_wise_adamerging", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(data: Data, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merged(name, data, **options)


def test_models_that_diverged_are_named_before_any_run(data: Data) -> None:
    data.encoders["b"].proj.data[0, 0] = np.nan
    with pytest.raises(UsageError, match="b has nan at index 0 of proj"):
        merged("regmean", data)
    assert not data.splits


def test_methods_with_data_ask_for_it(data: Data) -> None:
    algorithm = algorithm_class(get_method("regmean").algorithm)()
    with pytest.raises(UsageError, match="runs the models on images of their tasks, and got none"):
        algorithm.run(data.pool)
    changed = type(algorithm)(plugins=["normalise"])
    with pytest.raises(UsageError, match="runs the models as they are and takes no plug-ins"):
        changed.run(data.pool, data)
