"""Factors of Gauss-Newton matrices against explicit Jacobians in float64."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.training.factors import (
    Block,
    Factors,
    Settings,
    blocks_of,
    collect,
    collection,
    load_factors,
    merge,
    save_factors,
)
from tangent_arithmetic.training.factors import bases as bases_module
from tangent_arithmetic.training.factors.bases import compress, leading
from tangent_arithmetic.training.factors.comparison import WHOLE, compare

FULL = Settings("ekfac", rank=10**4, directions=0, probes=0)  # every output: no random numbers
EVERY = replace(FULL, directions=10**4, shrinkage=0.0)


class Tower(nn.Module):
    """A vision transformer in small: all kinds of layers, and free parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(4))
        self.positions = nn.Parameter(torch.randn(5, 4))
        self.kinds = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.proj = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), 1, 4), x], 1) + self.positions
        y = self.norm(x + self.kinds(torch.arange(5)))
        x = x + self.attn(y, y, y, need_weights=False)[0]
        x = x + self.mlp(x)
        features: Tensor = x.mean(1) @ self.proj
        return features


def tower() -> nn.Module:
    return Tower().double()


def images(seed: int = 1, count: int = 5) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).double()


def jacobian(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """J / |f0| of each image, by name of parameter."""
    theta = {name: value.detach() for name, value in module.named_parameters()}

    def features(params: Mapping[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, dict(params), (x,))

    size = features(theta).norm(dim=1)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no batching rule
        found = torch.func.jacrev(features)(theta)
    return {n: j / size.reshape(-1, *[1] * (j.ndim - 1)) for n, j in found.items()}


def of_block(block: Block, jacobians: Mapping[str, Tensor]) -> Tensor:
    """The block's rows of J, as matrices: (images, features, rows, columns)."""
    count, features = next(iter(jacobians.values())).shape[:2]
    flat = {n: j.flatten(0, 1) for n, j in jacobians.items()}
    each = [block.matrix({n: j[i] for n, j in flat.items()}) for i in range(count * features)]
    return torch.stack(each).unflatten(0, (count, features))


def dense(rows: Tensor) -> Tensor:
    """The mean of J^T J over images, of a block or of several in a row."""
    flat = rows.flatten(2)
    return torch.einsum("nfa,nfb->ab", flat, flat) / len(flat)


def matrix_of(factors: Factors, block: Block) -> Tensor:
    """A block's factor as a dense matrix."""
    size = block.shape[0] * block.shape[1]
    units = torch.eye(size, dtype=torch.float64).reshape(size, *block.shape)
    return torch.stack([factors.factors[block.name].product(u).flatten() for u in units])


def exact(module: nn.Module, x: Tensor, tau: Mapping[str, Tensor]) -> float:
    """The mean of |J tau|^2 / |f0|^2."""
    j = jacobian(module, x)
    d = torch.stack([torch.einsum("nfa,a->nf", j[n].flatten(2), tau[n].flatten()) for n in tau])
    return float(d.sum(0).square().sum(1).mean())


def direction(module: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in module.named_parameters()
    }


def test_blocks_cover_each_parameter_once_and_are_matrices() -> None:
    module = tower()
    blocks, theta = blocks_of(module), dict(module.named_parameters())
    assert sorted(name for block in blocks for name in block.names) == sorted(theta)
    shapes = {block.name: block.shape for block in blocks}
    assert shapes == {
        "conv.weight": (4, 13),
        "token": (4, 1),
        "positions": (5, 4),
        "kinds.weight": (5, 4),
        "norm.weight": (8, 1),
        "attn.in_proj_weight": (12, 5),
        "attn.out_proj.weight": (4, 5),
        "mlp.0.weight": (6, 5),
        "mlp.2.weight": (4, 7),
        "proj": (4, 3),
    }
    for block in blocks:
        parts = block.parts(block.matrix(theta))
        assert parts.keys() == set(block.names)
        assert all(torch.equal(parts[name], theta[name]) for name in parts)


def test_a_linear_map_has_exact_kronecker_factors() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(4, 3).double(), torch.randn(6, 4).double()
    (block,) = blocks_of(module)
    expected = dense(of_block(block, jacobian(module, x)))
    for kind in ("kfac", "ekfac"):
        found = collect(module, x, replace(FULL, kind=kind))
        torch.testing.assert_close(matrix_of(found, block), expected, rtol=1e-10, atol=1e-12)


def test_moments_are_exact_on_the_diagonal_of_their_basis_and_vectors_in_full() -> None:
    module, x = tower(), images()
    found, jacobians = collect(module, x, FULL), jacobian(module, x)
    for block in found.blocks:
        factor, rows = found.factors[block.name], of_block(block, jacobians)
        assert factor.left is not None and factor.right is not None
        turned = factor.left.mT @ rows @ factor.right
        expected = turned.square().sum(1).mean(0)
        torch.testing.assert_close(factor.moments, expected, rtol=1e-9, atol=1e-12)
        assert float(factor.rest) == 0
        if not block.is_matrix:
            torch.testing.assert_close(matrix_of(found, block), dense(rows), rtol=1e-9, atol=1e-10)


def test_bases_are_eigenvectors_of_the_moments_of_rows_and_columns() -> None:
    module, x = tower(), images()
    found, jacobians = collect(module, x, FULL), jacobian(module, x)
    for block in found.blocks:
        rows, factor = of_block(block, jacobians), found.factors[block.name]
        for basis, moment in (
            (factor.left, torch.einsum("nfab,nfcb->ac", rows, rows) / len(rows)),
            (factor.right, torch.einsum("nfab,nfac->bc", rows, rows) / len(rows)),
        ):
            assert basis is not None
            turned = basis.mT @ moment @ basis
            torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-9)
            assert bool((turned.diagonal().diff() <= 1e-9).all())


def test_the_diagonal_is_exact() -> None:
    module, x = tower(), images()
    found, jacobians = collect(module, x, Settings("diag", probes=0)), jacobian(module, x)
    for block in found.blocks:
        expected = of_block(block, jacobians).square().sum(1).mean(0)
        torch.testing.assert_close(found.factors[block.name].moments, expected)


def test_all_directions_make_the_whole_matrix_exact_and_without_them_layers_add_up() -> None:
    module, x = tower(), images()
    whole, layers = collect(module, x, EVERY), collect(module, x, FULL)
    tau = direction(module)
    assert whole.value(tau) == pytest.approx(exact(module, x, tau), rel=1e-9)
    assert layers.value(tau) == pytest.approx(sum(layers.values(tau).values()), rel=1e-12)
    one = {n: v if n.startswith("mlp") else torch.zeros_like(v) for n, v in tau.items()}
    assert whole.value(one) == pytest.approx(exact(module, x, one), rel=1e-9)


def test_few_directions_come_closer_than_independent_layers() -> None:
    module, x = tower(), images()
    tau = direction(module, 8)
    wanted = exact(module, x, tau)
    errors = [
        abs(collect(module, x, replace(EVERY, directions=k)).value(tau) / wanted - 1)
        for k in (0, 4, 15)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-9


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_truncation_keeps_the_trace(kind: str) -> None:
    module, x = tower(), images()
    found = collect(module, x, Settings(kind, rank=2, directions=3, probes=0))  # type: ignore[arg-type]
    jacobians = jacobian(module, x)
    for block in found.blocks:
        expected = of_block(block, jacobians).square().sum((1, 2, 3)).mean()
        factor = found.factors[block.name]
        assert float(factor.trace(block.shape)) == pytest.approx(float(expected), rel=1e-9)
        assert max(factor.moments.shape) <= 2
        assert float(matrix_of(found, block).trace()) == pytest.approx(float(expected), rel=1e-9)


def test_random_probes_estimate_the_same_matrix() -> None:
    module, x = tower(), images(count=2)
    tau = direction(module)
    settings = replace(EVERY, probes=400, directions=0)
    found, again = collect(module, x, settings), collect(module, x, settings)
    reference = collect(module, x, FULL)
    for name, value in found.values(tau).items():
        assert value == pytest.approx(reference.values(tau)[name], rel=0.4)
        assert torch.equal(found.factors[name].moments, again.factors[name].moments)


def test_sketched_moments_have_nearly_the_leading_eigenvectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(40, 30).double(), torch.randn(60, 40).double() * torch.logspace(0, -2, 40)
    (block,) = blocks_of(module)
    exact_factor = collect(module, x, replace(FULL, rank=4)).factors[block.name]
    monkeypatch.setattr(collection, "EXACT", 0)
    sketched = collect(module, x, replace(FULL, rank=4)).factors[block.name]
    assert exact_factor.right is not None and sketched.right is not None
    overlap = torch.linalg.svdvals(exact_factor.right.mT @ sketched.right)
    assert float(overlap.min()) > 0.9
    assert not torch.equal(exact_factor.right, sketched.right)


@pytest.mark.parametrize("size", [30, 90])
def test_leading_eigenvectors_of_small_and_large_matrices(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases_module, "DENSE_SIDE", 40)
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size).double())[0]
    values = torch.logspace(0, -6, size).double()
    before = torch.get_rng_state()
    found = leading((basis * values) @ basis.mT, 3)
    assert torch.equal(torch.get_rng_state(), before)
    overlap = found.mT @ basis[:, :3]
    torch.testing.assert_close(overlap.abs(), torch.eye(3).double(), rtol=0, atol=1e-4)


def test_compress_is_the_leading_part_of_a_signed_sum() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(6, 3).double(), torch.randn(6, 5).double()]
    rows, signs = torch.cat(parts, 1), torch.tensor([1.0, 1, 1, 1, -1, -1]).double()
    values, vectors = torch.linalg.eigh(rows.mT @ (signs[:, None] * rows))
    positive = values.clamp(min=0)
    for count in (2, 6):
        found = torch.cat(compress(parts, signs, count), 1)
        kept = positive.clone()
        kept[:-count] = 0
        expected = (vectors * kept) @ vectors.mT
        torch.testing.assert_close(found.mT @ found, expected, rtol=1e-9, atol=1e-9)


def both(settings: Settings) -> tuple[nn.Module, Factors, Factors]:
    module = tower()
    return module, collect(module, images(1), settings), collect(module, images(2), settings)


@pytest.mark.parametrize("weights", [None, [0.5, 0.5], [0.3, 0.7]])
def test_merged_factors_are_the_weighted_sum(weights: list[float] | None) -> None:
    first, second = weights or [0.5, 0.5]
    module, a, b = both(Settings("diag", probes=0))
    tau = direction(module)
    wanted = first * a.value(tau) + second * b.value(tau)
    assert merge([a, b], weights).value(tau) == pytest.approx(wanted, rel=1e-12)
    module, a, b = both(EVERY)  # exact, thus so is their sum
    wanted = first * exact(module, images(1), tau) + second * exact(module, images(2), tau)
    assert merge([a, b], weights, directions=10**4).value(tau) == pytest.approx(wanted, rel=1e-8)


def test_merged_factors_are_the_diagonal_of_the_sum_in_the_common_basis() -> None:
    module, a, b = both(FULL)
    merged = merge([a, b])
    for block in merged.blocks:
        total = (matrix_of(a, block) + matrix_of(b, block)) / 2
        found = merged.factors[block.name]
        assert found.left is not None and found.right is not None
        basis = torch.einsum("ap,bq->abpq", found.left, found.right).flatten(0, 1).flatten(1)
        diagonal = (basis.mT @ total @ basis).diagonal().reshape(found.moments.shape)
        torch.testing.assert_close(found.moments, diagonal, rtol=1e-9, atol=1e-12)
        if not block.is_matrix:
            torch.testing.assert_close(matrix_of(merged, block), total, rtol=1e-9, atol=1e-10)
    tau = direction(module)
    assert merged.value(tau) == pytest.approx((a.value(tau) + b.value(tau)) / 2, rel=0.3)


def test_merged_factors_are_as_large_as_one_and_keep_the_trace() -> None:
    _, a, b = both(Settings(rank=2, directions=3, probes=0))
    merged = merge([a, b, a])
    assert merged.numel() == a.numel()
    for block in a.blocks:
        traces = [float(f.factors[block.name].trace(block.shape)) for f in (a, b, a)]
        found = float(merged.factors[block.name].trace(block.shape))
        assert found == pytest.approx(sum(traces) / 3, rel=1e-9)


def test_a_task_is_added_and_taken_out_again() -> None:
    module, a, b = both(EVERY)
    tau = direction(module)
    sum_of_both = merge([a, b], [1.0, 1.0], directions=10**4)
    assert sum_of_both.value(tau) == pytest.approx(a.value(tau) + b.value(tau), rel=1e-8)
    alone = merge([sum_of_both, b], [1.0, -1.0])
    assert alone.value(tau) == pytest.approx(a.value(tau), rel=1e-6)


def test_factors_of_different_models_or_kinds_are_not_merged() -> None:
    module = tower()
    a = collect(module, images(), FULL)
    for other in (
        collect(nn.Linear(3, 2).double(), torch.randn(2, 3).double(), FULL),
        collect(module, images(), Settings("diag")),
        collect(module, images(), EVERY),
    ):
        with pytest.raises(UsageError, match="of the same model and kind, got different ones"):
            merge([a, other])
    with pytest.raises(ValueError, match="expected 1 weights, got 2"):
        merge([a], [1.0, 2.0])
    with pytest.raises(ValueError, match="expected images to collect factors from, got none"):
        collect(module, images(count=0))


@pytest.mark.parametrize("settings", [Settings("diag"), Settings(rank=3, directions=2)])
def test_a_file_gives_the_factors_back_for_their_theta0_alone(
    tmp_path: Path, settings: Settings
) -> None:
    module, path = tower(), tmp_path / "factors_A.safetensors"
    kept = replace(collect(module, images(), settings), info={"set": "A", "images": 5})
    save_factors(path, kept, "ab" * 32)
    found = load_factors(path, "ab" * 32)
    assert found.blocks == kept.blocks and found.info == kept.info
    tau = direction(module)
    assert found.value(tau) == kept.value(tau)
    with pytest.raises(UsageError, match=r"at weights abababababab..., expected cdcdcdcdcdcd"):
        load_factors(path, "cd" * 32)
    save_tensors(path, {"w": torch.zeros(1)}, "head")
    with pytest.raises(UsageError, match=r"expected a file of factors .* got one with a head"):
        load_factors(path)


def test_a_block_that_is_too_large_is_named_and_keeps_its_diagonal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(collection, "LARGEST_SIDE", 12)
    module, x = tower(), images()
    with caplog.at_level(logging.WARNING):
        found = collect(module, x, EVERY)
    assert "conv.weight: 4 x 13 is too large for Kronecker factors" in caplog.text
    block = next(block for block in found.blocks if block.name == "conv.weight")
    expected = of_block(block, jacobian(module, x)).square().sum(1).mean(0)
    torch.testing.assert_close(found.factors["conv.weight"].moments, expected)
    assert found.factors["conv.weight"].left is None and "conv.weight" not in found.directions


def test_parameters_without_derivatives_are_named(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Linear(2, 2).double()
    module.register_parameter("count", nn.Parameter(torch.tensor(3), requires_grad=False))
    module.register_parameter("spare", nn.Parameter(torch.zeros(2).double()))
    with caplog.at_level(logging.WARNING):
        found = collect(module, torch.randn(3, 2).double(), FULL)
    assert "count: not penalised" in caplog.text
    assert [block.name for block in found.blocks] == ["weight", "spare"]
    assert not found.factors["spare"].moments.any()


@pytest.mark.parametrize("origin", ["open_clip", "timm"])
def test_real_vision_transformers_collect(origin: str) -> None:
    torch.manual_seed(0)
    if origin == "open_clip":
        from open_clip.transformer import VisionTransformer

        module: nn.Module = VisionTransformer(16, 8, 16, 2, 2, 2.0, output_dim=8)
    else:
        timm = pytest.importorskip("timm")
        module = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=0, embed_dim=24
        )
    x = torch.randn(4, 3, 16, 16)
    found = collect(module, x, Settings(rank=8, directions=4))
    assert {n for b in found.blocks for n in b.names} == {n for n, _ in module.named_parameters()}
    tau = {n: 0.01 * torch.randn_like(p) for n, p in module.named_parameters()}
    assert found.value(tau) > 0


def test_an_image_without_features_counts_as_zero() -> None:
    class Rectified(ModuleEncoder):
        kind = "rectified_encoder"

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs).relu() * (inputs.sum(1, keepdim=True) > 0)

    module, x = Rectified(), torch.tensor([[1.0, 2, 3, 4], [-1, -2, -3, -4]]).double()
    torch.nn.init.ones_(module.layer.weight)
    tau = direction(module)
    both, one = (
        compare(linearized(module), collect(module, part, EVERY), tau, [part])
        for part in (x, x[:1])
    )
    for found, alone in ((both.exact, one.exact), (both.estimates, one.estimates)):
        assert found[WHOLE] == pytest.approx(alone[WHOLE] / 2, rel=1e-8) and alone[WHOLE] > 0


def test_estimates_are_compared_with_exact_values() -> None:
    class Encoder(ModuleEncoder):
        kind = "tower_encoder"

        def __init__(self) -> None:
            super().__init__()
            self.tower = Tower().double()

        def forward(self, inputs: Tensor) -> Tensor:
            features: Tensor = self.tower(inputs)
            return features

    module, x = Encoder(), images()
    tau = direction(module)
    found = compare(linearized(module), collect(module, x, EVERY), tau, x.split(2))
    assert found.exact[WHOLE] == pytest.approx(exact(module, x, tau), rel=1e-9)
    assert found.ratios[WHOLE] == pytest.approx(1, rel=1e-8)
    assert found.ratios["tower.norm.weight"] == pytest.approx(1, rel=1e-8)
    one = {n: v if n == "tower.proj" else torch.zeros_like(v) for n, v in tau.items()}
    assert found.exact["tower.proj"] == pytest.approx(exact(module, x, one), rel=1e-9)
    part = compare(linearized(module), collect(module, x, EVERY), one, x.split(2))
    assert set(part.ratios) == {"tower.proj", WHOLE}
