"""Each method without data against its formula, written densely in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from tangent_arithmetic import merging
from tangent_arithmetic.merging import METHODS, Algorithm
from tangent_arithmetic.merging.methods import dare
from tangent_arithmetic.merging.methods.consensus import lambdas_of
from tangent_arithmetic.merging.trimming import KEY_BITS, key_value, ordered_keys
from tangent_arithmetic.runtime.errors import UsageError
from tests.merging.makers import State

Array = np.ndarray
SHAPES = {
    "wide": (6, 11),
    "tall": (9, 4),
    "square": (8, 8),
    "visual.positional_embedding": (5, 7),
    "vector": (7,),
    "scalar": (),
    "conv": (3, 2, 2, 2),
    "text_projection": (4, 6),
    "model.token_embedding.weight": (9, 4),
}
MATRICES = ("wide", "tall", "square", "visual.positional_embedding")


def pool_of(num_models: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, State]:
    generator = torch.Generator().manual_seed(seed)
    names = ["_pretrained_", *"abcdefgh"[:num_models]]
    return {
        name: {
            key: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for key, shape in SHAPES.items()
        }
        for name in names
    }


def taus_of(pool: dict[str, State], key: str) -> list[Array]:
    base = pool["_pretrained_"][key].double().numpy()
    return [state[key].double().numpy() - base for n, state in pool.items() if n != "_pretrained_"]


def check(
    algorithm: Algorithm,
    pool: dict[str, State],
    expected: Callable[[str, list[Array]], Array],
    rtol: float = 1e-9,
    keys: Sequence[str] = tuple(SHAPES),
) -> None:
    """The merged vectors are what a function of a tensor's name and task vectors gives."""
    merged = algorithm.run(pool)
    for key in keys:
        found = (merged[key].double() - pool["_pretrained_"][key].double()).numpy()
        reference = expected(key, taus_of(pool, key))
        np.testing.assert_allclose(found, reference, rtol=rtol, atol=rtol, err_msg=key)


def or_mean(
    of_matrix: Callable[[list[Array]], Array], scale: float
) -> Callable[[str, list[Array]], Array]:
    """The method on matrices, the mean of the task vectors elsewhere, both scaled."""

    def expected(key: str, taus: list[Array]) -> Array:
        return scale * (of_matrix(taus) if key in MATRICES else np.mean(taus, axis=0))

    return expected


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    return np.linalg.svd(matrix, full_matrices=False)


def orthogonal(matrix: Array) -> Array:
    u, _, vt = svd(matrix)
    return u @ vt


# --- spectral methods


def tsv(taus: list[Array]) -> Array:
    rank = max(1, min(taus[0].shape) // len(taus))
    parts = [svd(tau) for tau in taus]
    u = np.concatenate([u[:, :rank] for u, _, _ in parts], axis=1)
    s = np.concatenate([s[:rank] for _, s, _ in parts])
    v = np.concatenate([vt[:rank].T for _, _, vt in parts], axis=1)
    return orthogonal(u) @ np.diag(s) @ orthogonal(v).T


@pytest.mark.parametrize("num_models", [1, 2, 3, 4])
def test_tsv_m(num_models: int) -> None:
    pool = pool_of(num_models)
    check(merging.TaskSingularVectorMerging(0.7), pool, or_mean(tsv, 0.7))


def test_tsv_m_with_a_factor_for_each_model() -> None:
    pool, factors = pool_of(2), [0.5, 2.0]

    def expected(key: str, taus: list[Array]) -> Array:
        scaled = [f * tau for f, tau in zip(factors, taus, strict=True)]
        return or_mean(tsv, 1.0)(key, scaled)

    check(merging.TaskSingularVectorMerging(alpha=factors), pool, expected)


def iso_c(taus: list[Array]) -> Array:
    u, s, vt = svd(np.sum(taus, axis=0))
    return np.mean(s) * u @ vt


def iso_cts(taus: list[Array], fraction: float) -> Array:
    rank = min(taus[0].shape)
    common = rank - round((rank - int(rank * fraction)) / len(taus)) * len(taus)
    own = (rank - common) // len(taus)
    parts = [[part[..., :common] for part in _columns(np.sum(taus, axis=0))]]
    basis = parts[0][0]
    for tau in taus:
        rest = tau - basis @ basis.T @ tau
        parts.append([part[..., :own] for part in _columns(rest)])
    u, s, v = (np.concatenate(each, axis=-1) for each in zip(*parts, strict=True))
    return np.mean(s) * orthogonal(u) @ orthogonal(v).T


def _columns(matrix: Array) -> tuple[Array, Array, Array]:
    u, s, vt = svd(matrix)
    return u, s, vt.T


@pytest.mark.parametrize("num_models", [1, 3])
def test_iso_c(num_models: int) -> None:
    check(merging.ISO_C_Merge(1.3), pool_of(num_models), or_mean(iso_c, 1.3))


@pytest.mark.parametrize("fraction", [0.4, 0.8, 1.0])
@pytest.mark.parametrize("num_models", [1, 2])
def test_iso_cts(num_models: int, fraction: float) -> None:
    algorithm = merging.ISO_CTS_Merge(1.5, fraction)
    check(algorithm, pool_of(num_models), or_mean(lambda taus: iso_cts(taus, fraction), 1.5))


def star(taus: list[Array], eta: float) -> Array:
    total = np.zeros_like(taus[0])
    for tau in taus:
        u, s, vt = svd(tau)
        rank = 1
        while s[:rank].sum() < eta / 100 * s.sum() * (1 - 1e-12):
            rank += 1
        total += u[:, :rank] @ np.diag(s[:rank] * s.sum() / s[:rank].sum()) @ vt[:rank]
    return total / len(taus)


@pytest.mark.parametrize("eta", [1, 40, 77.5, 100])
def test_star(eta: float) -> None:
    check(merging.StarAlgorithm(0.9, eta), pool_of(3), or_mean(lambda taus: star(taus, eta), 0.9))


def interference(merged: Array, taus: list[Array]) -> float:
    return sum(np.sum(((merged - tau) @ tau.T) ** 2) / np.sum(tau**2) for tau in taus)


def test_wudi_in_closed_form_is_the_minimum() -> None:
    def least_squares(taus: list[Array]) -> Array:
        n = taus[0].shape[1]
        rows = np.concatenate([tau / np.linalg.norm(tau) for tau in taus])  # rows @ M.T = targets
        targets = np.concatenate([tau @ tau.T / np.linalg.norm(tau) for tau in taus])
        assert np.linalg.matrix_rank(rows) == n
        return np.linalg.lstsq(rows, targets, rcond=None)[0].T

    algorithm = merging.WudiClosedFormAlgorithm(0.9, ridge=1e-13)
    check(algorithm, pool_of(3), or_mean(least_squares, 0.9), rtol=1e-7)


def test_the_ridge_of_wudi_pulls_towards_the_sum() -> None:
    """The gradient of the objective plus the penalty vanishes at the result."""
    pool = pool_of(3)
    for key in MATRICES:
        taus = taus_of(pool, key)
        grams = [tau.T @ tau / np.sum(tau**2) for tau in taus]
        epsilon = 0.3 * np.trace(sum(grams)) / len(grams[0])
        found = merging.WudiClosedFormAlgorithm(ridge=0.3).run(pool)[key]
        merged = (found - pool["_pretrained_"][key]).numpy()
        slope = sum((merged - tau) @ gram for tau, gram in zip(taus, grams, strict=True))
        slope += epsilon * (merged - np.sum(taus, axis=0))
        np.testing.assert_allclose(slope, 0, atol=1e-10)


def test_wudi_in_closed_form_is_bounded_where_the_ranks_fill_the_matrix() -> None:
    """Four vectors of a quarter of the rank: the exact minimum is many times as long as the sum."""
    rng, size = np.random.default_rng(0), 32
    near = rng.normal(size=(8, size))  # rows that all tasks nearly share
    taus = [
        rng.normal(size=(size, 8)) @ (near + 0.02 * rng.normal(size=near.shape)) for _ in range(4)
    ]
    rows = np.concatenate([tau / np.linalg.norm(tau) for tau in taus])
    targets = np.concatenate([tau @ tau.T / np.linalg.norm(tau) for tau in taus])
    exact = np.linalg.lstsq(rows, targets, rcond=1e-9)[0].T
    pool = {name: {"w": torch.tensor(tau)} for name, tau in zip("abcd", taus, strict=True)}
    pool["_pretrained_"] = {"w": torch.zeros(size, size).double()}
    length = np.linalg.norm(np.sum(taus, axis=0))
    assert np.linalg.norm(exact) > 20 * length
    near_exact = merging.WudiClosedFormAlgorithm(ridge=1e-11).run(pool)["w"].norm()
    assert near_exact > 15 * length
    found = merging.WudiClosedFormAlgorithm().run(pool)["w"]
    assert found.norm() < 1.5 * length
    assert interference(found.numpy(), taus) < interference(np.sum(taus, axis=0), taus)


@pytest.mark.parametrize("steps", [0, 1, 25])
def test_wudi_takes_steps_of_adam_on_the_objective(steps: int) -> None:
    def descend(taus: list[Array]) -> Array:
        stack = torch.tensor(np.stack(taus))
        merged = stack.sum(dim=0).requires_grad_()
        optimizer = torch.optim.Adam([merged], lr=0.01)
        for _ in range(steps):
            products = (merged - stack) @ stack.mT
            energy = stack.square().sum(dim=(1, 2), keepdim=True)
            optimizer.zero_grad()
            (products.square() / energy).sum().backward()
            optimizer.step()
        return merged.detach().numpy()

    algorithm = merging.WUDIMerging(0.9, iter_num=steps, lr=0.01)
    check(algorithm, pool_of(3), or_mean(descend, 0.9), rtol=1e-8)


def test_wudi_lowers_the_interference() -> None:
    pool = pool_of(3)
    taus = taus_of(pool, "wide")

    def of(algorithm: Algorithm) -> float:
        merged = algorithm.run(pool)["wide"] - pool["_pretrained_"]["wide"]
        return interference(merged.numpy(), taus)

    values = [of(merging.WUDIMerging(iter_num=n, lr=0.01)) for n in (0, 50, 500)]
    assert values[0] > values[1] > values[2] > of(merging.WudiClosedFormAlgorithm(ridge=1e-9))


def test_float32_is_merged_to_its_precision() -> None:
    """Gram matrices stand for LAPACK's decomposition where they are exact enough."""
    pool = pool_of(3, dtype=torch.float32)
    cases = [
        (merging.TaskSingularVectorMerging(), tsv),
        (merging.ISO_C_Merge(), iso_c),
        (merging.ISO_CTS_Merge(), lambda taus: iso_cts(taus, 0.8)),
        (merging.StarAlgorithm(), lambda taus: star(taus, 40)),
    ]
    for algorithm, reference in cases:
        check(algorithm, pool, or_mean(reference, 1.0), rtol=3e-6)


@pytest.mark.parametrize("condition", [1e2, 1e4, 5e5])
def test_ill_conditioned_matrices_are_decomposed_to_the_precision_of_float32(
    condition: float,
) -> None:
    u, v = (orthogonal(np.random.default_rng(i).normal(size=(12, 12))) for i in (0, 1))
    tau = u @ np.diag(np.geomspace(1, 1 / condition, 12)) @ v
    zero = torch.zeros(12, 12)
    rounded = torch.tensor(tau).float()
    isometry = orthogonal(rounded.double().numpy())
    size = np.linalg.svd(rounded.double().numpy(), compute_uv=False).mean()
    pool = {"_pretrained_": {"w": zero}, "a": {"w": rounded}}
    found = merging.ISO_C_Merge(1 / size).run(pool)["w"]
    np.testing.assert_allclose(found.numpy(), isometry, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_of_low_rank_keep_it(dtype: torch.dtype) -> None:
    """Singular vectors of the value 0 are arbitrary; none enters a result."""
    numbers = np.random.default_rng(3)
    tau = torch.tensor(numbers.normal(size=(9, 2)) @ numbers.normal(size=(2, 12))).to(dtype)
    pool = {"_pretrained_": {"w": 0 * tau}, "a": {"w": tau}}
    for algorithm in (merging.ISO_C_Merge(), merging.ISO_CTS_Merge(1.0, 0.5)):
        merged = algorithm.run(pool)["w"].double()
        s, before = (torch.linalg.svdvals(value.double()) for value in (merged, pool["a"]["w"]))
        assert s[0].item() == pytest.approx(before[:2].mean().item(), rel=1e-5)
        assert s[1].item() == pytest.approx(s[0].item(), rel=1e-5) and s[2].item() < 1e-5
    merged = merging.TaskSingularVectorMerging().run(pool)["w"]
    torch.testing.assert_close(merged, pool["a"]["w"])


def test_excluded_matrices_are_averaged() -> None:
    pool = pool_of(2)
    keys = list(MATRICES)
    for algorithm in (
        merging.TaskSingularVectorMerging(exclude_keys=keys),
        merging.ISO_C_Merge(exclude_keys=keys),
        merging.ISO_CTS_Merge(exclude_keys=keys),
        merging.StarAlgorithm(exclude_keys=keys),
        merging.WUDIMerging(exclude_keys=keys),
        merging.WudiClosedFormAlgorithm(exclude_keys=keys),
    ):
        check(algorithm, pool, lambda _, taus: np.mean(taus, axis=0))


# --- masks


def middle(tau: Array, beta: float, gamma: float) -> Array:
    order = np.argsort(np.abs(tau).reshape(-1))
    number = len(order)
    mask = np.zeros(number, dtype=bool)
    mask[order[int(beta * number) : number - int(gamma * number)]] = True
    return np.where(mask.reshape(tau.shape), tau, 0)


def test_breadcrumbs() -> None:
    def expected(_: str, taus: list[Array]) -> Array:
        return 0.4 * np.sum([middle(tau, 0.5, 0.2) for tau in taus], axis=0)

    check(merging.BreadcrumbsAlgorithm(0.4, beta=0.5, gamma=0.2), pool_of(3), expected)


WEIGHTS = [1.0, 0.5, [1.0, -0.5, 0.75], [1.0, -1.0, 1.0], [-1.0, -1.0, -1.0], [0.0, 2.0, 1.0]]


def generalized(
    kept: Sequence[Array], weights: float | list[float], elect: bool, normalize: bool
) -> Array:
    """mergekit's generalised task arithmetic, a single weight at a time."""
    listed, merged = weights if isinstance(weights, list) else [weights] * 3, np.zeros_like(kept[0])
    for i in np.ndindex(merged.shape):
        pairs = [(w, w * tau[i]) for w, tau in zip(listed, kept, strict=True)]
        if elect:
            sign = 1 if sum(v for _, v in pairs) >= 0 else -1
            pairs = [(w, v) for w, v in pairs if v * sign > 0]
        divisor = sum(w for w, _ in pairs)
        divides = normalize and abs(divisor) >= 1e-8
        merged[i] = sum(v for _, v in pairs) / (divisor if divides else 1)
    return merged


def largest(tau: Array, share: float) -> Array:
    sizes = np.sort(np.abs(tau).reshape(-1))
    return np.where(np.abs(tau) >= sizes[-max(1, int(share * len(sizes)))], tau, 0)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_of_both_signs_count_in_the_election_and_in_the_mean(
    normalize: bool, weights: float | list[float]
) -> None:
    """As in mergekit: the divisor is the sum of the weights that agree, whatever its sign."""

    def ties(_: str, taus: list[Array]) -> Array:
        kept = [largest(tau, 0.4) for tau in taus]
        return 0.7 * generalized(kept, weights, True, normalize)

    def breadcrumbs(_: str, taus: list[Array]) -> Array:
        kept = [middle(tau, 0.5, 0.2) for tau in taus]
        return 0.7 * generalized(kept, weights, True, normalize)

    func, pool = "mean" if normalize else "sum", pool_of(3)
    options = {"scope": "tensor", "zero_sign": "positive", "merge_func": func, "weights": weights}
    check(merging.TiesMergingAlgorithm(0.7, 40, **options), pool, ties)
    options = {"elect": True, "weights": weights, "normalize": normalize}
    check(merging.BreadcrumbsAlgorithm(0.7, 0.5, 0.2, **options), pool, breadcrumbs)


@pytest.mark.parametrize("weights", [1.0, [1.0, -0.5, 0.75]], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_without_an_election(normalize: bool, weights: float | list[float]) -> None:
    numbers, pool = {"normalize": normalize, "weights": weights}, pool_of(3)

    def breadcrumbs(_: str, taus: list[Array]) -> Array:
        kept = [middle(tau, 0.5, 0.2) for tau in taus]
        return 0.7 * generalized(kept, weights, False, normalize)

    def dropped(key: str, taus: list[Array]) -> Array:
        masks = [dare.uniform(0, name, key, 0, taus[0].size).numpy() > 0.4 for name in "abc"]
        pairs = zip(taus, masks, strict=True)
        kept = [tau * mask.reshape(tau.shape) / 0.6 for tau, mask in pairs]
        return 0.7 * generalized(kept, weights, False, normalize)

    check(merging.BreadcrumbsAlgorithm(0.7, 0.5, 0.2, **numbers), pool, breadcrumbs)
    check(merging.DareTaskArithmetic(0.7, 0.4, **numbers), pool, dropped, rtol=1e-6)


def test_weights_count_in_the_majority_that_elects_where_the_sum_is_0() -> None:
    vectors = {"_pretrained_": [0.0, 0.0, 0.0], "a": [2.0, 1.0, 1.0], "b": [2.0, 3.0, 3.0]}
    pool = {name: {"w": torch.tensor(values).double()} for name, values in vectors.items()}
    found = merging.TiesMergingAlgorithm(1.0, 100, weights=[1.0, -1.0]).run(pool)["w"]
    assert found.tolist() == [-2.0, -3.0, -3.0]  # the sums are 0, -2, -2


@pytest.mark.parametrize("weights", [[1.0, 2.0, -0.5], [0.5, 0.5, 0.5]], ids=str)
def test_weights_in_a_sum_are_those_of_the_plug_in(weights: list[float]) -> None:
    pool, scale = pool_of(3), {"scale": {"factors": weights}}
    for kind, options in (
        (merging.TiesMergingAlgorithm, {}),
        (merging.DareTiesMerging, {}),
        (merging.DareTaskArithmetic, {}),
        (merging.BreadcrumbsAlgorithm, {"elect": True}),
        (merging.DellaAlgorithm, {"normalize": False}),
    ):
        found = kind(**options, weights=weights).run(pool)
        expected = kind(**options, plugins=[scale]).run(pool)
        for key in SHAPES:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_consensus_of_ties(k: int) -> None:
    pool = pool_of(3)
    merged = merging.TiesMergingAlgorithm(1.0, 30).run(pool)

    def expected(key: str, taus: list[Array]) -> Array:
        whole = (merged[key] - pool["_pretrained_"][key]).numpy()
        used = sum((np.abs(t) > 0.4 * np.abs(whole - t)).astype(int) for t in taus)
        return 0.6 * whole * (used >= k)

    check(merging.ConsensusTiesAlgorithm(0.6, 0.4, k, 30), pool, expected)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.8, 1.0])
def test_sce(share: float) -> None:
    """As its paper: select, calculate, erase, a single weight at a time."""

    def expected(_: str, taus: list[Array]) -> Array:
        stack = np.stack(taus)
        variance = stack.var(axis=0)
        kept = np.argsort(variance.reshape(-1))[variance.size - int(share * variance.size) :]
        mask = np.zeros(variance.size, dtype=bool)
        mask[kept] = True
        stack *= mask.reshape(variance.shape)
        squares = np.array([np.sum(tau**2) for tau in stack])
        shares = list(squares / squares.sum()) if squares.any() else [1.0] * len(stack)
        agreeing = np.where(stack.sum(axis=0) >= 0, stack > 0, stack < 0)
        return (
            0.9
            * generalized(list(stack * agreeing), shares, False, False)
            / np.maximum(np.tensordot(shares, agreeing.astype(float), axes=1), 1e-300)
        )

    check(merging.SceAlgorithm(0.9, share), pool_of(3), expected)


def test_sce_keeps_all_weights_of_equal_variance() -> None:
    """Which of equals stay would depend on the order otherwise; small vectors are as large ones."""
    pool = {name: {"w": torch.zeros(6).double()} for name in ("_pretrained_", "a")}
    pool["b"] = {"w": 1e-6 * torch.tensor([2.0, 2.0, 2.0, -2.0, 1.0, 0.0]).double()}
    found = merging.SceAlgorithm(select_topk=0.5).run(pool)["w"] * 1e6
    torch.testing.assert_close(found, torch.tensor([2.0, 2.0, 2.0, -2.0, 0.0, 0.0]).double())


# --- two models


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(("flatten", "row_wise"), [(True, False), (False, False), (False, True)])
def test_nuslerp(flatten: bool, row_wise: bool, with_base: bool) -> None:
    pool, t = pool_of(2), 0.6
    given = dict(pool) if with_base else {n: s for n, s in pool.items() if n != "_pretrained_"}
    found = merging.NuslerpAlgorithm([2.0, 3.0], flatten, row_wise).run(given)

    def between(u: Array, v: Array) -> Array:
        cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
        angle = np.arccos(np.clip(cosine, -1, 1))
        if np.sin(angle) < 3e-4:
            return (1 - t) * u + t * v
        return (np.sin((1 - t) * angle) * u + np.sin(t * angle) * v) / np.sin(angle)

    for key in SHAPES:
        start = (pool["_pretrained_"][key] if with_base else 0 * pool["a"][key]).numpy()
        u, v = (np.atleast_1d(pool[name][key].numpy() - start) for name in "ab")
        axis = 0 if row_wise else -1
        if flatten:
            merged = between(u.reshape(-1), v.reshape(-1)).reshape(start.shape)
        else:
            rows = np.moveaxis(u, axis, -1), np.moveaxis(v, axis, -1)
            merged = np.zeros_like(rows[0])
            for i in np.ndindex(merged.shape[:-1]):
                merged[i] = between(rows[0][i], rows[1][i])
            merged = np.moveaxis(merged, -1, axis).reshape(start.shape)
        np.testing.assert_allclose(found[key].numpy(), start + merged, rtol=1e-9, atol=1e-9)


def test_nuslerp_of_opposite_vectors_is_linear_and_a_zero_vector_harmless() -> None:
    u = torch.tensor([0.3, -0.1, 0.7])
    base = torch.tensor([1e3, -1e3, 1e3])  # the rounding of the weights is none of directions
    pool = {"_pretrained_": {"w": base}, "a": {"w": base + u}, "b": {"w": base - u}}
    found = merging.NuslerpAlgorithm([0.7, 0.3]).run(pool)["w"]
    torch.testing.assert_close(found, base + 0.4 * (base + u - base), rtol=0, atol=1e-3)
    pool["b"] = pool["_pretrained_"]
    found = merging.NuslerpAlgorithm().run(pool)["w"]
    torch.testing.assert_close(found, base + 0.5**0.5 * (base + u - base))


@pytest.mark.parametrize("t", [1e-3, 0.5, 100.0])
def test_nearswap(t: float) -> None:
    """As in mergekit, with a weight for each number."""

    def expected(_: str, taus: list[Array]) -> Array:
        (tau,) = taus
        weight = np.minimum(1, t / np.maximum(np.abs(tau), 1e-300))
        return weight * tau

    pool = pool_of(1)
    pool["a"]["vector"][:3] = pool["_pretrained_"]["vector"][:3]
    check(merging.NearswapAlgorithm(t), pool, expected)


def test_arcee_fusion() -> None:
    pool = pool_of(1)
    found = merging.ArceeFusionAlgorithm().run(pool)
    for key in SHAPES:
        u, v = (np.atleast_1d(pool[name][key].numpy()) for name in ("_pretrained_", "a"))
        p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) + 1e-8 for x in (v, u))
        scores = np.abs(v - u) * np.sum(p * np.log(p / q), axis=-1, keepdims=True)
        low, middle, high = (
            np.sort(scores.reshape(-1))[int(a * (scores.size - 1))] for a in (0.25, 0.5, 0.75)
        )
        taken = scores >= middle + 1.5 * (high - low)
        expected = np.where(taken, v, u).reshape(pool["a"][key].shape)
        np.testing.assert_array_equal(found[key].numpy(), expected)
        assert key == "scalar" or not taken.all()
    turned = {name: {"w": state["wide"].T.contiguous()} for name, state in pool.items()}
    across = merging.ArceeFusionAlgorithm().run(turned)["w"].T
    assert METHODS["arcee_fusion"].of_outputs and not torch.equal(across, found["wide"])


def test_methods_of_two_models_leave_equal_models_as_they_are() -> None:
    pool = pool_of(1)
    same = {"_pretrained_": pool["a"], "a": pool["a"]}
    for algorithm in (merging.NearswapAlgorithm(), merging.ArceeFusionAlgorithm()):
        for key, value in algorithm.run(same).items():
            assert torch.equal(value, pool["a"][key])
    found = merging.NuslerpAlgorithm().run({**same, "b": pool["a"]})
    for key, value in found.items():
        torch.testing.assert_close(value, pool["a"][key], rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_consensus(k: int) -> None:
    lambdas = [0.2, 0.4, 0.6]

    def expected(_: str, taus: list[Array]) -> Array:
        total = sum(taus)
        pairs = zip(taus, lambdas, strict=True)
        used = sum((np.abs(t) > value * np.abs(total - t)).astype(int) for t, value in pairs)
        return 0.4 * total * (used >= k)

    algorithm = merging.ConsensusTaskArithmeticAlgorithm(0.4, lambdas, k)
    check(algorithm, pool_of(3), expected)
    assert lambdas_of(0.3, "ab") == [0.3, 0.3]


@pytest.mark.parametrize("elect", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("rescale", "weights"), [(True, 1.0), (False, 1.0), (True, [1.0, -0.5, 0.75])], ids=str
)
def test_della(elect: bool, rescale: bool, normalize: bool, weights: float | list[float]) -> None:
    p, epsilon = 0.5, 0.6
    pool = pool_of(3)

    def expected(key: str, taus: list[Array]) -> Array:
        kept = []
        for name, tau in zip("abc", taus, strict=True):
            rows = tau.reshape(len(tau) if tau.ndim > 1 else 1, -1)
            numbers = dare.uniform(7, name, key, 0, tau.size).numpy().reshape(rows.shape)
            n, out = rows.shape[1], np.zeros_like(rows)
            for i, row in enumerate(rows):
                ranks = np.argsort(np.argsort(-np.abs(row)))
                drop = p + epsilon * (ranks / (n - 1) - 0.5) if n > 1 else np.full(n, p)
                out[i] = np.where(numbers[i] >= drop, row / (1 - drop) if rescale else row, 0)
            kept.append(out.reshape(tau.shape))
        return 0.9 * generalized(kept, weights, elect, normalize)

    options = {"seed": 7, "weights": weights, "normalize": normalize}
    check(merging.DellaAlgorithm(0.9, p, epsilon, elect, rescale, **options), pool, expected)


def test_della_drops_small_weights_more_often() -> None:
    tau = torch.linspace(1, 2, 1000).repeat(200, 1)
    pool = {"_pretrained_": {"w": torch.zeros_like(tau)}, "a": {"w": tau}}
    found = merging.DellaAlgorithm(1.0, 0.4, 0.6).run(pool)["w"]
    dropped = (found == 0).double().mean(dim=0)
    assert abs(dropped.mean().item() - 0.4) < 0.01
    assert abs(dropped[:100].mean().item() - 0.67) < 0.02  # mean of the tenth: 0.7 - 0.03
    assert abs(dropped[-100:].mean().item() - 0.13) < 0.02
    assert abs(found.double().mean().item() - tau.double().mean().item()) < 0.02


def test_pcb() -> None:
    """Over the vector of all tensors, as the authors' code."""
    pool = pool_of(3)
    flat = np.stack(
        [np.concatenate([taus_of(pool, key)[i].reshape(-1) for key in SHAPES]) for i in range(3)]
    )
    merged = pcb(flat, 0.3)
    found = merging.PcbMergingAlgorithm(1.2, 0.3).run(pool)
    vector = np.concatenate(
        [(found[key] - pool["_pretrained_"][key]).numpy().reshape(-1) for key in SHAPES]
    )
    np.testing.assert_allclose(vector, 1.2 * merged, rtol=1e-5, atol=1e-5)


def test_keys_are_ordered_like_signed_numbers() -> None:
    values = torch.tensor([-torch.inf, -3e38, -2.5, -1e-45, -0.0, 0.0, 1e-45, 0.5, 3e38])
    keys = ordered_keys(values)
    assert keys.tolist() == sorted(keys.tolist()) and len(keys.unique()) == len(values)
    assert [key_value(key) for key in keys.tolist()] == values.tolist()
    assert bool((keys >= 0).all()) and bool((keys < 2**KEY_BITS).all())


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.99, 1.0])
def test_pcb_with_bounds_of_either_sign(ratio: float) -> None:
    """The bound of the parameters that count is negative where more count than agree."""
    pool = pool_of(2, seed=5, dtype=torch.float32)
    flat = np.stack(
        [np.concatenate([taus_of(pool, key)[i].reshape(-1) for key in SHAPES]) for i in (0, 1)]
    )
    found = merging.PcbMergingAlgorithm(1.0, ratio).run(pool)
    vector = [(found[key] - pool["_pretrained_"][key]).numpy().reshape(-1) for key in SHAPES]
    np.testing.assert_allclose(np.concatenate(vector), pcb(flat, ratio), rtol=1e-4, atol=1e-4)


def pcb(flat: Array, ratio: float) -> Array:
    num_models, number = flat.shape
    sizes = np.sort(np.abs(flat), axis=1)
    low = sizes[:, int(1e-4 * number), None]
    high = sizes[:, int(number * (1 - 1e-4) - 1), None]
    clamped = np.clip(np.abs(flat), low, high)
    intra = np.exp(num_models * ((clamped - low) / (high - low)) ** 2)
    raw = intra * np.tanh(flat * flat.sum(axis=0))
    least = np.sort(raw, axis=1)[:, int(number * (1 - ratio)), None]
    beta = (np.maximum(raw, least) - least) / (raw.max(axis=1, keepdims=True) - least)
    return (np.sign(flat) * clamped * beta).sum(axis=0) / np.maximum(beta.sum(axis=0), 1e-12)


def svc(whole: Array, taus: list[Array], alpha: float) -> Array:
    """Direction by direction, as the paper's algorithm."""
    u, s, vt = svd(whole)
    for r in range(len(s)):
        merged = s[r] * vt[r]
        shares = []
        for tau in taus:
            own = u[:, r] @ tau
            shares.append(max(alpha, merged @ own / (own @ own)))
        s[r] *= len(taus) / sum(shares)
    return u @ np.diag(s) @ vt


@pytest.mark.parametrize("alpha", [0.05, 0.4])
def test_svc_of_task_arithmetic(alpha: float) -> None:
    def expected(key: str, taus: list[Array]) -> Array:
        whole = 0.5 * np.sum(taus, axis=0)
        return svc(whole, taus, alpha) if key in MATRICES else whole

    algorithm = merging.SvcAlgorithm(alpha, inner_options={"scaling_factor": 0.5})
    check(algorithm, pool_of(3), expected)


def test_svc_lowers_what_all_tasks_share() -> None:
    """A direction that two tasks share counts twice in the sum, one of their own once."""
    shared, own = np.outer([1.0, 0, 0], [1.0, 0, 0]), np.outer([0, 1.0, 0], [0, 1.0, 0])
    taus = {"a": shared + own, "b": shared}
    pool = {name: {"w": torch.tensor(tau)} for name, tau in taus.items()}
    pool["_pretrained_"] = {"w": torch.zeros(3, 3).double()}
    found = merging.SvcAlgorithm(inner_options={"scaling_factor": 1.0}).run(pool)["w"].numpy()
    assert abs(found[0, 0] - 1) < 1e-9  # 2 * 2 / (2 + 2)
    assert abs(found[1, 1] - 2 / 1.1) < 1e-9  # the other task does not respond: 2 / (1 + 0.1)


def test_svc_of_ties_has_the_statistics_of_the_whole_vector() -> None:
    pool = pool_of(3)
    ties = merging.TiesMergingAlgorithm(1.0, 30).run(pool)
    options = {"scaling_factor": 1.0, "threshold": 30}

    def expected(key: str, taus: list[Array]) -> Array:
        whole = (ties[key] - pool["_pretrained_"][key]).numpy()
        return svc(whole, taus, 0.1) if key in MATRICES else whole

    check(merging.SvcAlgorithm(inner="ties", inner_options=options), pool, expected)


def ace(taus: list[Array], eps: float, share: float) -> Array:
    """With explicit inverses, as the authors' code."""
    size, logs = taus[0].shape[1], np.log([np.sum(tau**2) for tau in taus])
    normalise = np.var(logs, ddof=1) / np.mean(logs) ** 2 > 0.3
    rows = [tau - tau.mean(axis=0) for tau in taus]
    raw = [x.T @ x for x in rows]
    divisors = [np.trace(c) if normalise else 1.0 for c in raw]
    sigmas = [c / d for c, d in zip(raw, divisors, strict=True)]
    padded = [c + eps / d * np.eye(size) for c, d in zip(sigmas, divisors, strict=True)]
    common = np.sum(sigmas, axis=0).mean(axis=0) * np.ones((size, 1))
    if normalise:
        common /= np.mean([np.sum(tau**2) for tau in taus])
    first = sum(x @ c for x, c in zip(rows, padded, strict=True))
    start = first @ np.linalg.inv(np.sum(padded, axis=0) + common)
    if not normalise:
        return start
    mean = np.mean(padded, axis=0)
    u, s, vt = svd(start + sum(x @ (c - mean) for x, c in zip(rows, sigmas, strict=True)))
    kept = int(share * len(s))
    return start + s[:kept].mean() * u[:, :kept] @ vt[:kept]


@pytest.mark.parametrize("scales", [(1, 1, 1), (0.001, 1, 5)], ids=["alike", "heterogeneous"])
def test_ace(scales: tuple[float, ...]) -> None:
    pool = pool_of(3)
    base = pool["_pretrained_"]
    for name, scale in zip("abc", scales, strict=True):
        pool[name] = {key: base[key] + scale * (v - base[key]) for key, v in pool[name].items()}
    logs = np.log([np.sum(tau**2) for tau in taus_of(pool, "wide")])
    assert (np.var(logs, ddof=1) / np.mean(logs) ** 2 > 0.3) == (scales[0] != 1)
    algorithm = merging.AceAlgorithm(0.7, eps=0.05, rank_fraction=0.5)
    check(algorithm, pool, or_mean(lambda taus: ace(taus, 0.05, 0.5), 0.7), rtol=1e-7)


# --- depth


RESNET = [f"layer{i}.{j}.conv1.w" for i, number in ((1, 2), (2, 1), (3, 2)) for j in range(number)]
DEPTHS: list[dict[str, float]] = [
    {"conv1.weight": 0.0, "blocks.0.w": 0.0, "blocks.1.w": 0.5, "blocks.2.w": 1.0}
    | {"text.h.5.w": 0.0, "text.h.7.0.w": 1.0, "only.3.w": 0.0, "layer4.weight": 0.0},
    {"conv1.w": 0.0, "conv2.w": 0.0, **dict(zip(RESNET, (0, 0.25, 0.5, 0.75, 1.0), strict=True))}
    | {"layer3.0.downsample.0.w": 0.75, "layer3.0.downsample.1.w": 0.75},
    {"0.model.emb.w": 0.0, **{f"0.model.layer.{i}.out.w": i / 3 for i in range(4)}, "2.w": 1.0},
    {f"enc.block.{i}.layer.{j}.w": i / 2 for i in range(3) for j in range(2)},
]


@pytest.mark.parametrize("depth", DEPTHS, ids=["stacks", "resnet", "sentence transformer", "t5"])
def test_lines(depth: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = {
        name: {key: torch.randn(2, generator=generator).double() for key in depth}
        for name in ("_pretrained_", *"abcd")
    }
    found = merging.LinesTaskArithmeticAlgorithm(0.6).run(pool)
    for key, where in depth.items():
        expected = (1 / 4 + 0.6 * where) * np.sum(taus_of(pool, key), axis=0)
        merged = (found[key] - pool["_pretrained_"][key]).numpy()
        np.testing.assert_allclose(merged, expected, rtol=1e-12)


def test_lines_of_weights_without_blocks_is_refused() -> None:
    state = {"layer1.w": torch.ones(2), "only.3.w": torch.ones(2)}
    pool = {"_pretrained_": state, "a": {name: value + 1 for name, value in state.items()}}
    for algorithm in (
        merging.LinesTaskArithmeticAlgorithm(),
        merging.TaskArithmeticAlgorithm(plugins=["lines"]),
    ):
        with pytest.raises(
            UsageError, match=r"depth of blocks.* got layer1\.w and others\. Choose"
        ):
            algorithm.run(pool)


# --- spheres


@pytest.mark.parametrize("num_models", [1, 2, 4])
def test_model_stock(num_models: int) -> None:
    def expected(_: str, taus: list[Array]) -> Array:
        pairs = list(itertools.combinations([tau.reshape(-1) for tau in taus], 2))
        mean = np.mean(taus, axis=0)
        if not pairs:
            return mean
        cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
        bottom = 1 + (len(taus) - 1) * cosine
        return mean * (max(0.0, len(taus) * cosine / bottom) if bottom > 1e-6 else 0.0)

    check(merging.ModelStock(), pool_of(num_models), expected)


def test_model_stock_leaves_ignored_keys_at_the_mean() -> None:
    pool = pool_of(3)
    merged = merging.ModelStock(ignore_keys=["wide"]).run(pool)
    mean = torch.stack([pool[name]["wide"] for name in "abc"]).mean(dim=0)
    torch.testing.assert_close(merged["wide"], mean)


def explicit_karcher(vectors: list[Array], weights: Sequence[float], steps: int) -> Array:
    """In the space of the weights, not of the factors."""
    norms = [np.linalg.norm(v) for v in vectors]
    units = [v / n for v, n in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
        step = np.zeros_like(mean)
        for w, u in zip(weights, units, strict=True):
            angle = np.arccos(np.clip(np.sum(mean * u), -1, 1))
            step += w * angle / np.sin(angle) * (u - np.cos(angle) * mean)
        size = np.linalg.norm(step)
        mean = np.cos(size) * mean + np.sin(size) * step / size
    return mean * np.dot(weights, norms)


def test_karcher_is_the_mean_on_the_sphere() -> None:
    pool = pool_of(3)
    del pool["_pretrained_"]
    found = merging.KarcherAlgorithm(max_iter=200, tol=0.0).run(pool)
    for key in ("wide", "conv"):
        vectors = [state[key].numpy().reshape(-1) for state in pool.values()]
        expected = explicit_karcher(vectors, [1 / 3] * 3, 200)
        np.testing.assert_allclose(found[key].numpy().reshape(-1), expected, rtol=1e-9)
        unit = expected / np.linalg.norm(expected)
        pull = np.zeros_like(unit)
        for v in vectors:
            u = v / np.linalg.norm(v)
            angle = np.arccos(unit @ u)
            pull += angle / np.sin(angle) * (u - np.cos(angle) * unit)
        assert np.linalg.norm(pull) < 1e-7  # the gradient of the sum of squared angles


@pytest.mark.parametrize("with_base", [True, False])
def test_multislerp(with_base: bool) -> None:
    pool = pool_of(3)
    weights = [1.0, 2.0, 5.0]
    given = dict(pool) if with_base else {n: s for n, s in pool.items() if n != "_pretrained_"}
    found = merging.MultislerpAlgorithm(weights).run(given)
    for key in ("wide", "conv"):
        start = pool["_pretrained_"][key] if with_base else torch.zeros(SHAPES[key])
        vectors = [(pool[name][key] - start).double().numpy().reshape(-1) for name in "abc"]
        expected = explicit_karcher(vectors, [w / 8 for w in weights], 1)
        merged = (found[key] - start).numpy().reshape(-1)
        np.testing.assert_allclose(merged, expected, rtol=1e-9, atol=1e-12)


def test_multislerp_of_two_is_slerp() -> None:
    pool = pool_of(2)
    del pool["_pretrained_"]
    found = merging.MultislerpAlgorithm([0.3, 0.7]).run(pool)["wide"]
    u, v = pool["a"]["wide"], pool["b"]["wide"]
    v = v / v.norm() * u.norm()  # slerp changes the norm along the way, multislerp takes the mean
    slerp = merging.SlerpMergeAlgorithm(0.7).run({"a": {"w": u}, "b": {"w": v}})["w"]
    cosine = (found * slerp).sum() / found.norm() / slerp.norm()
    assert 1 - cosine.item() < 1e-3  # one step from the chord's mean


def test_opposite_models_have_no_mean_direction() -> None:
    u = torch.tensor([1.0, 2.0, -1.0]).double()
    for algorithm in (merging.KarcherAlgorithm(), merging.MultislerpAlgorithm()):
        assert algorithm.run({"a": {"w": u}, "b": {"w": -u}})["w"].abs().max() < 1e-12
