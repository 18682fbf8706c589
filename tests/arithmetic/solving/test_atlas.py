"""aTLAS: its steps by hand, and what it reaches beside the solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.solving.atlas import Recipe, atlas
from tangent_arithmetic.arithmetic.solving.minibatches import NetworkImages, StoredImages
from tangent_arithmetic.arithmetic.solving.solver import Objective, minimum
from tangent_arithmetic.arithmetic.solving.standard import supervised
from tests.arithmetic.solving.problems import DIRECTIONS, IMAGES, logits, points, raw, reduced
from tests.arithmetic.solving.test_standard import K, loss_at, model

LABELS = [raw(seed)[2] for seed in (0, 1)]


def stored() -> StoredImages:
    return StoredImages([reduced(seed) for seed in (0, 1)])


def test_logits_of_stored_images_and_through_the_network() -> None:
    a, images, merged = torch.tensor(points(1)[0]), stored(), model()
    chosen = {0: torch.tensor([3, 1]), 1: torch.tensor([5])}
    for seed, own in images.logits(a, chosen).items():
        torch.testing.assert_close(own, logits(seed, a)[chosen[seed]], rtol=0, atol=1e-5)
    network, point = NetworkImages(merged), torch.tensor(points(1, K)[0], requires_grad=True)
    every = {s: torch.arange(len(labels)) for s, labels in enumerate(network.labels)}
    found = network.logits(point, every)
    loss = sum(F.cross_entropy(found[s], network.labels[s]) / 2 for s in every)
    expected = loss_at(merged, point)
    assert isinstance(loss, torch.Tensor)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    slopes = [torch.autograd.grad(value, point)[0] for value in (loss, expected)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-4)
    assert all(torch.equal(p, merged.theta0[n]) for n, p in merged.encoder.weights().items())


@pytest.mark.parametrize("clip", [1e9, 0.01])
def test_steps_on_all_images_against_adamw_by_hand(clip: float) -> None:
    recipe = Recipe(rate=0.02, decay=0.3, batch=2 * IMAGES, epochs=4, clip=clip)
    a, m, v = np.zeros(DIRECTIONS), np.zeros(DIRECTIONS), np.zeros(DIRECTIONS)
    path, right = [a], []
    for step in range(1, 5):
        point = torch.tensor(a, requires_grad=True)
        loss = sum(F.cross_entropy(logits(s, point), LABELS[s]) for s in (0, 1))
        (slope,) = torch.autograd.grad(torch.as_tensor(loss), point)
        g = slope.numpy() * min(1, clip / float(slope.norm()))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        a = a * (1 - 0.02 * 0.3)
        a = a - 0.02 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        path.append(a)
    for a in path:
        at = [logits(s, torch.tensor(a)).argmax(1) == LABELS[s] for s in (0, 1)]
        right.append(float(torch.cat(at).double().mean()))
    found = atlas(stored(), recipe)
    assert found.accuracies == pytest.approx(right) and found.steps == 4
    assert found.epoch == int(np.argmax(right)) > 0
    np.testing.assert_allclose(found.coefficients, path[found.epoch], atol=1e-5)


def test_it_approaches_the_loss_of_the_solver() -> None:
    splits = [reduced(seed) for seed in (0, 1)]
    objective = Objective(supervised(splits), np.zeros(DIRECTIONS))
    least = objective.value(minimum(objective, objective.centre)[0])
    start = objective.value(objective.centre)
    short, long = (
        atlas(StoredImages(splits), Recipe(rate=0.02, decay=0, batch=40, epochs=epochs), seed=1)
        for epochs in (1, 60)
    )
    ends = [objective.value(found.coefficients) for found in (short, long)]
    assert least < ends[1] < ends[0] < start and ends[1] - least < 0.15 * (start - least)
    again = atlas(StoredImages(splits), Recipe(rate=0.02, decay=0, batch=40, epochs=1), seed=1)
    assert again.coefficients.tolist() == short.coefficients.tolist()
    assert short.steps == IMAGES // 20


def test_through_the_network_it_lowers_the_true_loss() -> None:
    merged = model()
    found = atlas(NetworkImages(merged), Recipe(rate=0.05, batch=20, epochs=5))
    start, end = (
        float(loss_at(merged, torch.tensor(a))) for a in (np.zeros(K), found.coefficients)
    )
    assert found.epoch > 0 and end < 0.9 * start and len(found.accuracies) == 6
