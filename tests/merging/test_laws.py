"""Laws that methods share: order, one model, zero vectors, scale, pieces, threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tangent_arithmetic import merging
from tangent_arithmetic.merging import METHODS, Algorithm, stream
from tests.merging.makers import State

SEED = st.integers(0, 2**31)
BIG = {"alpha": 1.0, "scaling_factor": 1.0}
OWN = {
    name: method
    for name, method in METHODS.items()
    if method.function.__module__.startswith("tangent_arithmetic.merging.")
}
# some take two models; dummy takes the first; test_with_data.py has those with images
MERGING = sorted(
    {n for n, m in OWN.items() if not m.needs_data and m.num_models is None} - {"dummy"}
)
# masks follow from the models' names
RANDOM = {"dare_task_arithmetic", "dare_ties", "della"}
# drops or reshapes even a single vector
LOSSY = {
    *RANDOM,
    "ties",
    "consensus_ties",
    "ace",
    "knots",
    "svc",
    "lines_task_arithmetic",
    "breadcrumbs",
    "iso_c",
    "iso_cts",
    "pcb_merging",
    "star",
}
# options under which they lose nothing
LOSSLESS: dict[str, dict[str, Any]] = {
    "ties": {"threshold": 100},
    "breadcrumbs": {"beta": 0.0, "gamma": 0.0},
    "dare_task_arithmetic": {"sparsity_ratio": 0.0},
    "dare_ties": {"sparsity_ratio": 0.0, "threshold": 100},
    "della": {"sparsity_ratio": 0.0, "epsilon": 0.0},
    "star": {"eta": 100},
    "consensus_task_arithmetic": {"prun_thre_k": 1},
    "consensus_ties": {"prun_thre_k": 1, "threshold": 100},
    "lines_task_arithmetic": {"beta": 0.0},
    "svc": {"inner_options": {"scaling_factor": 1.0}},
    "knots": {"inner_options": {"threshold": 100}},
}
# merges the models themselves, so that a shift or a scale of all task vectors is none of the result
OF_THETA = {"karcher"}


def algorithm(name: str, num_models: int, **options: Any) -> Algorithm:
    """The method with a scaling factor of 1, and equal weights where it has weights."""
    known = OWN[name].defaults
    options |= {key: value for key, value in BIG.items() if key in known}
    if name == "weighted_average":
        options["weights"] = [1.0] * num_models
    if name == "wudi":
        options |= {"iter_num": 10, "lr": 1e-3}
    return merging.algorithm_class(OWN[name].algorithm)(**options)


def pool_of(seed: int, num_models: int, dtype: torch.dtype = torch.float64) -> dict[str, State]:
    generator = torch.Generator().manual_seed(seed)

    def state() -> State:
        shapes = {"w": (7, 5), "v": (5,), "s": (), "h.0": (2,), "h.1": (2,)}
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in shapes.items()
        }

    return {name: state() for name in ("_pretrained_", *"abcdefgh"[:num_models])}


def close(found: State, expected: State, rtol: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", [name for name in MERGING if name not in RANDOM])
@settings(max_examples=8, deadline=None)
@given(seed=SEED, data=st.data())
def test_the_order_of_the_models_does_not_matter(name: str, seed: int, data: st.DataObject) -> None:
    pool = pool_of(seed, 4)
    order = data.draw(st.permutations("abcd"))
    permuted = {"_pretrained_": pool["_pretrained_"], **{name: pool[name] for name in order}}
    merge = algorithm(name, 4)
    close(merge.run(permuted), merge.run(pool), rtol=1e-7)


@pytest.mark.parametrize("name", [name for name in MERGING if name not in RANDOM])
def test_methods_say_whether_rows_are_outputs(name: str) -> None:
    pool, merge, generator = pool_of(0, 3), algorithm(name, 3), torch.Generator().manual_seed(0)
    for size, state in enumerate(pool.values()):
        state["w"] = size * torch.randn(24, 10, generator=generator, dtype=torch.float64)
    turned = {key: {**state, "w": state["w"].mT.contiguous()} for key, state in pool.items()}
    found, expected = merge.run(turned)["w"].mT, merge.run(pool)["w"]
    assert torch.allclose(found, expected, rtol=1e-7) != OWN[name].of_outputs


@pytest.mark.parametrize("name", [n for n in MERGING if n not in LOSSY or n in LOSSLESS])
@settings(max_examples=8, deadline=None)
@given(seed=SEED)
def test_one_model_gives_itself(name: str, seed: int) -> None:
    pool = pool_of(seed, 1)
    found = algorithm(name, 1, **LOSSLESS.get(name, {})).run(pool)
    close(found, pool["a"], rtol=1e-6)


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vectors_are_harmless(name: str, dtype: torch.dtype) -> None:
    """All models as the pre-trained one give it; one of them among others gives finite weights."""
    pool = pool_of(0, 3, dtype)
    same = {key: pool["_pretrained_"] for key in pool}
    close(algorithm(name, 3).run(same), pool["_pretrained_"], rtol=1e-6)
    pool["b"] = pool["_pretrained_"]
    merged = algorithm(name, 3).run(pool)
    assert all(bool(value.isfinite().all()) for value in merged.values())
    nothing = {key: {n: 0 * v for n, v in state.items()} for key, state in pool.items()}
    close(algorithm(name, 3).run(nothing), nothing["a"], rtol=0)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi_closed_form"])
def test_a_zero_vector_changes_no_direction_of_the_others(name: str) -> None:
    """Its singular vectors would be arbitrary; only the ranks and means count it as a model."""
    pool = pool_of(1, 1)
    pool["b"] = pool["_pretrained_"]
    base = pool["_pretrained_"]["w"]
    merged = algorithm(name, 2).run(pool)["w"] - base
    tau = pool["a"]["w"] - base
    u, _, vt = torch.linalg.svd(tau, full_matrices=False)
    inside = (u.mT @ merged @ vt.mT).diagonal()
    torch.testing.assert_close((u * inside) @ vt, merged)


@pytest.mark.parametrize("name", MERGING)
@settings(max_examples=8, deadline=None)
@given(seed=SEED, factor=st.sampled_from([0.01, 3.0, 100.0]))
def test_methods_are_equivariant_to_the_scale_of_all_task_vectors(
    name: str, seed: int, factor: float
) -> None:
    """All but WUDI by Adam and ACE, which have absolute lengths, and PCB, which has a tanh."""
    if name in {"wudi", "ace", "pcb_merging", *OF_THETA}:
        return
    pool = pool_of(seed, 3)
    zero = {key: 0 * value for key, value in pool["_pretrained_"].items()}
    pool["_pretrained_"] = zero  # so that the scaled vectors are scaled exactly

    def merged(scale: float) -> State:
        scaled = {n: {k: scale * v for k, v in state.items()} for n, state in pool.items()}
        return algorithm(name, 3).run(scaled)

    found, reference = merged(factor), merged(1.0)
    close({k: v / factor for k, v in found.items()}, reference, rtol=1e-6)


@pytest.mark.parametrize("name", MERGING)
def test_neither_pieces_nor_threads_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(2, 3, torch.float32)
    generator = torch.Generator().manual_seed(3)
    for state in pool.values():
        state["w"] = torch.randn(70, 90, generator=generator)
    merge = algorithm(name, 3)
    results: list[Tensor] = []
    for size, threads in ((2**18, 1), (2**18, 2), (1000, 1)):
        if name.startswith("dare") and size == 1000:
            continue  # their masks are compared in test_methods.py
        monkeypatch.setattr(stream, "PIECE", size)
        torch.set_num_threads(threads)
        results.append(merge.run(pool)["w"])
    torch.set_num_threads(1)
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(OWN))
def test_definitions_are_documented(name: str) -> None:
    """Formula, options, source."""
    doc = OWN[name].function.__doc__ or ""
    assert doc.startswith(("\\(", "`ties`")) or "\\(" in doc
    assert name == "dummy" or "Source:" in doc
    if name not in {"dummy", "dare_ties"}:
        assert all(f"{option}:" in doc for option in OWN[name].defaults)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
