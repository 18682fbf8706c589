"""The interference matrix equals its definition with an explicit Jacobian, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev

from tangent_arithmetic.arithmetic.features import Features
from tangent_arithmetic.arithmetic.interference import matrix, means, of_features
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.encoders.linearized import LinearizedEncoder
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError
from tests.arithmetic.tiny import Convolution, pictures
from tests.small_suite import random_vector

State = dict[str, Tensor]


@pytest.fixture
def encoder() -> Convolution:
    made: Convolution = Convolution().eval()
    return made


def reference(encoder: Convolution, tau: State, images: Tensor) -> float:
    """The definition, with the Jacobian of each image in float64."""
    wide = encoder.double().eval()
    theta0 = {name: value.detach() for name, value in wide.named_parameters()}
    sizes = []
    for x in images.double():

        def features(theta: State, x: Tensor = x) -> Tensor:
            out: Tensor = functional_call(wide, theta, (x[None],))
            return out[0]

        jacobian = jacrev(features)(theta0)
        moved = sum(
            torch.tensordot(jacobian[name], tau[name].double(), tau[name].ndim) for name in theta0
        )
        assert isinstance(moved, Tensor)
        sizes.append(float(moved.square().sum() / features(theta0).square().sum()))
    return sum(sizes) / len(sizes)


def test_the_matrix_equals_its_definition(encoder: Convolution, tmp_path: Path) -> None:
    linear = LinearizedEncoder(encoder)
    theta0 = linear.theta0()
    vectors = {
        name: {n: v for n, v in random_vector(theta0, seed=i).items() if n in theta0}
        for i, name in enumerate(("A", "B"))
    }
    arrays = {"A": pictures(7), "C": ArrayPictures(255 - pictures(5).images, pictures(5).labels)}

    def split(name: str, cache: Path | None) -> Split:
        batches = EvalBatches(arrays[name], linear.val_preprocess, 3, 0, name, 0, 1)
        return Split(name, torch.nn.Identity(), batches, cache=cache)

    found = matrix(linear, vectors, {name: split(name, tmp_path) for name in arrays})
    assert {name: list(row) for name, row in found.items()} == {"A": ["A", "B"], "C": ["A", "B"]}
    again = matrix(linear, vectors, {name: split(name, tmp_path) for name in arrays})
    assert again == found  # from cached features
    scaled = {"A": {n: -2 * v for n, v in vectors["A"].items()}}
    doubled = matrix(linear, scaled, {"C": split("C", None)})
    assert doubled["C"]["A"] == pytest.approx(4 * found["C"]["A"], rel=1e-5)
    for name, row in found.items():
        images = torch.from_numpy(arrays[name].images).permute(0, 3, 1, 2) / 255
        for vector, value in row.items():
            expected = reference(copied(encoder), vectors[vector], images)
            assert value == pytest.approx(expected, rel=1e-4)


def copied(encoder: Convolution) -> Convolution:
    """A copy, which may be cast."""
    made = Convolution()
    made.load_state_dict(encoder.state_dict())
    return made


def test_ranks_are_weighted_by_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    f0, step = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])
    here = Features(f0, [step, 0 * step], torch.zeros(1, dtype=torch.int64))
    monkeypatch.setattr(ddp, "gather", lambda own: [own, ([1.0, 3.0], 3), ([0.0, 0.0], 0)])
    assert of_features(here) == [(4 + 1) / 4, 3 / 4]
    none = Features(torch.zeros(0, 0), [torch.zeros(0, 0)], torch.zeros(0, dtype=torch.int64))
    monkeypatch.setattr(ddp, "gather", lambda own: [own, ([2.0], 4)])
    assert of_features(none) == [0.5]


@pytest.mark.parametrize(
    ("f0", "message"),
    [
        (torch.zeros(0, 0), "no images to measure interference on: the split is empty"),
        (torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "features at theta0, .* are 0 or not finite"),
    ],
)
def test_undefined_interference_is_an_error(f0: Tensor, message: str) -> None:
    labels = torch.zeros(len(f0), dtype=torch.int64)
    for step in (f0, torch.ones_like(f0)):
        with pytest.raises(UsageError, match=message):
            of_features(Features(f0, [step], labels))


def test_means_are_over_pairs_of_different_tasks() -> None:
    rows = {"A": {"A": 0.5, "B": 0.02}, "B": {"A": 0.04, "B": 0.3}, "Control": {"A": 0.9, "B": 0.1}}
    found = means(rows)
    assert found.off == pytest.approx(0.03) and found.on == pytest.approx(0.4)
    assert found.largest == ("B", "A", 0.04) and found.control == pytest.approx(0.5)
    assert str(found) == (
        "0.03 off the diagonal, 0.4 on it; 0.5 on the control set; largest: 0.04, vector of A on B"
    )
    assert str(means({"A": {"A": 0.5}})) == "- off the diagonal, 0.5 on it"
