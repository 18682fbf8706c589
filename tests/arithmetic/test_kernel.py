"""The kernel equals inner products of explicit Jacobians, in float64; sketches to their error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_arithmetic.arithmetic import kernel
from tangent_arithmetic.arithmetic.eigenfunctions import Eigenfunctions, cka
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.runtime.errors import UsageError
from tests.arithmetic.tiny import FEATURES, Convolution


class Attention(ModuleEncoder):
    """A layer of attention over four tokens, which has no feature in common with a convolution."""

    kind = "attention"

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Linear(27, 8)
        self.attention = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images.reshape(len(images), 4, 27))
        out: Tensor = self.attention(tokens).mean(dim=1)
        return out


class Scaled(Convolution):
    """A convolution with a factor of its features, as CLIPs have."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor) -> Tensor:
        return self.logit_scale * super().forward(images)


def made(kind: type[ModuleEncoder]) -> ModuleEncoder:
    torch.manual_seed(0)
    return kind().double().eval()


def pictures(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 6, 6, generator=generator, dtype=torch.float64)


def jacobians(encoder: ModuleEncoder, images: Tensor) -> Tensor:
    """The Jacobian of each image, of shape (images, features * parameters)."""
    theta0 = {name: value.detach() for name, value in encoder.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):  # the others have no rule for `vmap`
        rows = jacrev(lambda theta: functional_call(encoder, theta, (images,)))(theta0)
    flat = [row.reshape(*row.shape[:2], -1) for row in rows.values()]
    return torch.cat(flat, dim=2).flatten(1)


@pytest.mark.parametrize("kind", [Convolution, Attention, Scaled])
@pytest.mark.parametrize("block", [2**29, 2**14])  # one block, and several
def test_the_kernel_of_two_sets_equals_explicit_jacobians(
    kind: type[ModuleEncoder], block: int
) -> None:
    encoder, images, others = made(kind), pictures(5, 1), pictures(3, 2)
    before = {name: value.clone() for name, value in encoder.weights().items()}
    here, there = jacobians(encoder, images), jacobians(encoder, others)
    features = encoder(images).shape[1]
    found = kernel.exact(encoder, images, others, block)
    assert found.error is None and found.relative_error == 0
    torch.testing.assert_close(found.values, here @ there.T / features, rtol=1e-10, atol=1e-12)
    own = kernel.exact(encoder, images, block=block).values
    torch.testing.assert_close(own, here @ here.T / features, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in encoder.weights().items())


def test_the_passes_of_an_exact_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, images = made(Convolution), pictures(5, 1)
    counted: list[int] = []
    gradients = kernel._gradients

    def counting(*args: Any) -> Any:
        counted.append(len(args[2]))
        return gradients(*args)

    monkeypatch.setattr(kernel, "_gradients", counting)
    for block in (2**29, 2**12):
        counted.clear()
        kernel.exact(encoder, images, block=block)
        assert kernel.passes(encoder, images, block) == sum(counted)
    assert sum(counted) > 5 * FEATURES  # several blocks


def test_either_half_of_the_directions_has_an_estimate_of_its_own() -> None:
    encoder, images = made(Convolution), pictures(4, 1)
    found = kernel.sketched(encoder, images, directions=6)
    one, other = found.halves
    torch.testing.assert_close((one + other) / 2, found.values)
    assert not torch.allclose(one, other) and not kernel.exact(encoder, images).halves


def test_sketches_are_unbiased_within_their_standard_error() -> None:
    encoder, images, others = made(Convolution), pictures(5, 1), pictures(4, 2)
    exact = kernel.exact(encoder, images, others).values
    runs = []
    for seed in range(30):
        found = kernel.sketched(encoder, images, others, directions=40, seed=seed)
        assert found.error is not None and 0.02 < found.relative_error < 0.7
        runs.append((found.values, found.error))
    values, errors = (torch.stack(column) for column in zip(*runs, strict=True))
    true = values.std(dim=0)  # over seeds: what the stated errors estimate
    assert (errors.mean(dim=0) / true).log().abs().mean() < 0.2
    off = (values.mean(dim=0) - exact) / (true / len(runs) ** 0.5)
    assert off.square().mean() < 4
    again = kernel.sketched(encoder, images, directions=2, seed=3).values
    assert torch.equal(again, kernel.sketched(encoder, images, directions=2, seed=3).values)
    with pytest.raises(UsageError, match="at least two directions"):
        kernel.sketched(encoder, images, directions=1)


def test_functions_of_the_model_use_its_leading_eigenfunctions() -> None:
    encoder, images = made(Convolution), pictures(8, 1)
    jacobian = jacobians(encoder, images)
    found = Eigenfunctions.of(kernel.exact(encoder, images).values)
    singular = torch.linalg.svdvals(jacobian).square() / FEATURES
    torch.testing.assert_close(found.eigenvalues, singular)
    energy = found.energy([3, 5])
    torch.testing.assert_close(energy.sum(dim=1), torch.ones(8).double())
    assert float(energy[2, 0]) == pytest.approx(float(found.vectors[:3, 2].square().sum()))
    function = 2.0 * found.vectors[:, :2] @ torch.tensor([[3.0, 0.0], [0.0, 4.0]]).double()
    expected = torch.tensor([0.36, 0.64] + [0.0] * 6).double()
    torch.testing.assert_close(found.use(function), expected)


def test_disjoint_tasks_have_localised_eigenfunctions() -> None:
    blocks = torch.block_diag(torch.full((2, 2), 5.0), torch.full((3, 3), 1.0) + torch.eye(3))
    energy = Eigenfunctions.of(blocks).energy([2, 3])[:4]  # the fifth eigenvalue is zero
    assert torch.equal(energy.round(decimals=9).sort(dim=1).values[:, 1], torch.ones(4).double())


def test_cka_ignores_rotation_shift_and_scale_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    assert cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-6)
    y = torch.randn(40, 3, generator=generator)
    centred = torch.eye(40) - 1 / 40
    gram_x, gram_y = (centred @ value @ value.T @ centred for value in (x, y))
    expected = (gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm())
    assert cka(x, y) == pytest.approx(float(expected), rel=1e-4) and cka(x, y) < 0.5
