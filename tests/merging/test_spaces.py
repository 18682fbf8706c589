"""KnOTS and Core Space against dense references in float64, on adapters and on dense vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tangent_arithmetic import merging
from tangent_arithmetic.merging import ModelPool
from tangent_arithmetic.runtime.errors import UsageError
from tests.merging.makers import State
from tests.merging.test_adapters import pool_of as adapters
from tests.merging.test_dense_references import (
    MATRICES,
    Array,
    check,
    or_mean,
    pool_of,
    svd,
    taus_of,
)

QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"


def ties(vectors: list[Array], share: float) -> Array:
    """The mean of the agreeing entries of vectors of one shape, each trimmed by itself."""
    flat = np.stack([vector.reshape(-1) for vector in vectors])
    for row in flat:
        least = np.sort(np.abs(row))[::-1][min(int(share * row.size), row.size - 1)]
        row[np.abs(row) < least] = 0
    agreeing = flat * (np.sign(flat) == np.sign(flat.sum(axis=0)))
    total = agreeing.sum(axis=0) / np.maximum((agreeing != 0).sum(axis=0), 1)
    return total.reshape(vectors[0].shape)


def knots(taus: list[Array], share: float) -> Array:
    u, s, vt = svd(np.concatenate(taus, axis=1))
    kept = s > 1e-9 * s[0]
    parts = np.split(s[kept, None] * vt[kept], len(taus), axis=1)
    return u[:, kept] @ ties(parts, share)


@pytest.mark.parametrize("num_models", [2, 3])
def test_knots(num_models: int) -> None:
    """A threshold for each matrix."""
    options = {"threshold": 0.3, "merge_func": "mean", "scope": "tensor"}
    algorithm = merging.KnotsAlgorithm(0.6, inner_options=options)

    def expected(taus: list[Array]) -> Array:
        # `scope: tensor` keeps the largest int(K n), the global scope int(K n) + 1
        size = (
            sum(tau.shape[1] for tau in taus)
            // len(taus)
            * np.linalg.matrix_rank(np.concatenate(taus, axis=1))
        )
        return knots(taus, (int(0.3 * size) - 0.5) / size)

    check(algorithm, pool_of(num_models), or_mean(expected, 0.6))


def test_thresholds_of_knots_are_over_all_matrices() -> None:
    pool = pool_of(3)
    parts: dict[str, tuple[Array, list[Array]]] = {}
    for key in MATRICES:
        u, s, vt = svd(np.concatenate(taus_of(pool, key), axis=1))
        parts[key] = u, np.split(s[:, None] * vt, 3, axis=1)
    rows = [np.concatenate([parts[key][1][i].reshape(-1) for key in MATRICES]) for i in range(3)]
    merged = ties([row.copy() for row in rows], 0.2)
    algorithm = merging.KnotsAlgorithm(inner_options={"threshold": 20, "merge_func": "mean"})
    found, at = algorithm.run(pool), 0
    for key in MATRICES:
        u, (first, *_) = parts[key]
        expected = u @ merged[at : at + first.size].reshape(first.shape)
        at += first.size
        np.testing.assert_allclose((found[key] - pool["_pretrained_"][key]).numpy(), expected)


@pytest.mark.parametrize("inner", ["task_arithmetic", "simple_average"])
def test_linear_methods_are_the_same_in_any_space(inner: str) -> None:
    pool = pool_of(3)
    outside = merging.algorithm_class(merging.get_method(inner).algorithm)
    expected = (outside(1.0) if inner == "task_arithmetic" else outside()).run(pool)
    for algorithm in (merging.KnotsAlgorithm(inner=inner), merging.CoreSpaceAlgorithm(inner=inner)):
        found = algorithm.run(pool)
        for key in MATRICES:
            torch.testing.assert_close(found[key], expected[key])


def core_taus(paths: dict[str, Path], key: str) -> tuple[Array, Array, list[Array]]:
    """The bases and cores of adapters, from their files: U and V of the stacked B and A."""
    module = key.removesuffix(".weight")
    files = [
        load_file(paths[n] / "adapter_model.safetensors") for n in paths if n != "_pretrained_"
    ]
    a, b = (
        [file[f"base_model.model.{module}.lora_{side}.weight"].double().numpy() for file in files]
        for side in "AB"
    )
    u, _, _ = svd(np.concatenate(b, axis=1))
    _, _, vt = svd(np.concatenate(a))
    scale = 3 / 2  # alpha 3, rank 4, rsLoRA
    return u, vt, [scale * u.T @ left @ right @ vt.T for left, right in zip(b, a, strict=True)]


def test_core_space_of_adapters_is_that_of_their_factors(tmp_path: Path) -> None:
    """TIES depends on the basis, so that it tells one basis from another."""
    paths, _ = adapters("rslora", tmp_path, 2)
    u, vt, cores = core_taus(paths, QUERY)
    share = (int(0.5 * cores[0].size) - 0.5) / cores[0].size
    expected = u @ ties(cores, share) @ vt
    options = {"threshold": 50, "merge_func": "mean", "scope": "tensor"}
    merged = merging.CoreSpaceAlgorithm(inner="ties", inner_options=options).run(paths)[QUERY]
    base = load_file(paths["_pretrained_"] / "model.safetensors")[QUERY]
    np.testing.assert_allclose((merged - base).numpy(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("inner", "outside"),
    [("tsv_m", merging.TaskSingularVectorMerging()), ("iso_c", merging.ISO_C_Merge())],
)
def test_spectral_methods_do_not_depend_on_the_basis(
    inner: str, outside: Any, tmp_path: Path
) -> None:
    """The sum of the ranks is that of the matrix, so that both keep all singular values."""
    paths, _ = adapters("rslora", tmp_path, 2)
    found, expected = merging.CoreSpaceAlgorithm(inner=inner).run(paths), outside.run(paths)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_core_space_of_dense_vectors_has_balanced_factors() -> None:
    def expected(taus: list[Array]) -> Array:
        parts = [svd(tau) for tau in taus]
        u, _, _ = svd(np.concatenate([u * np.sqrt(s) for u, s, _ in parts], axis=1))
        _, _, vt = svd(np.concatenate([np.sqrt(s)[:, None] * vt for _, s, vt in parts]))
        cores = [u.T @ tau @ vt.T for tau in taus]
        return u @ ties(cores, (int(0.4 * cores[0].size) - 0.5) / cores[0].size) @ vt

    options = {"threshold": 40, "merge_func": "mean", "scope": "tensor"}
    algorithm = merging.CoreSpaceAlgorithm(2.0, "ties", options)
    check(algorithm, pool_of(2), or_mean(expected, 2.0))


def test_adapters_without_a_step_change_nothing(tmp_path: Path) -> None:
    paths, _ = adapters("rslora", tmp_path, 2)
    base = ModelPool(paths).base
    still: dict[str, Any] = {"_pretrained_": dict(base.tensors), "a": dict(base.tensors)}
    for algorithm in (merging.KnotsAlgorithm(), merging.CoreSpaceAlgorithm()):
        merged: State = algorithm.run(still)
        assert all(torch.equal(merged[name], value) for name, value in base.tensors.items())


def test_the_inner_method_is_checked() -> None:
    pool = pool_of(2)
    for inner, message in (
        ("slerp", "unknown inner method 'slerp'; choose from"),
        ("regmean", "unknown inner method 'regmean'"),
    ):
        with pytest.raises(UsageError, match=message):
            merging.KnotsAlgorithm(inner=inner).run(pool)
    with pytest.raises(UsageError, match="ties has no option 'density'"):
        merging.KnotsAlgorithm(inner_options={"density": 0.2}).run(pool)
    with pytest.raises(UsageError, match="inner_options must be a mapping of names to"):
        merging.CoreSpaceAlgorithm(inner_options="x").run(pool)
