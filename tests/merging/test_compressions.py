"""Compressions against their formulas, written densely in float64, and their bits against bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tangent_arithmetic.merging import ModelPool, save_merged, stream
from tangent_arithmetic.merging.compressed import Compressed
from tangent_arithmetic.merging.compressions import COMPRESSIONS
from tangent_arithmetic.merging.compressions.quantised import quantised
from tangent_arithmetic.runtime.errors import UsageError
from tests.merging.makers import State
from tests.merging.test_dense_references import MATRICES, SHAPES, Array, pool_of, svd

NUMBER = 64  # bits of a number of these models
TASKS = "abc"
LAMBDAS = [0.2, 0.7, 1.5]
Taus = list[dict[str, Array]]  # of each task, by tensor
Reference = Callable[[Taus, int], tuple[dict[str, Array], int, int]]


def taus_of(pool: dict[str, State]) -> Taus:
    base = pool["_pretrained_"]
    return [{n: (pool[task][n] - base[n]).numpy() for n in base} for task in TASKS]


def test_models_by_name_are_a_pool() -> None:
    pool = pool_of(3)
    one, other = (Compressed(each, "emr").reconstruct("a") for each in (pool, ModelPool(pool)))
    assert (one.bits, one.shared) == (other.bits, other.shared)
    assert all(torch.equal(one.state[name], value) for name, value in other.state.items())


def packed(mask: Array) -> int:
    """The bits of a mask, whose bytes are filled but for the last one."""
    assert 0 <= 8 * np.packbits(mask.reshape(-1)).nbytes - mask.size < 8
    return mask.size


def tall(taus: Taus, task: int) -> tuple[dict[str, Array], int, int]:
    found, bits, shared = {}, 0, 0
    for name, own in taus[task].items():
        total = np.sum([tau[name] for tau in taus], axis=0)
        mask = np.abs(own) >= LAMBDAS[task] * np.abs(total - own)
        found[name] = np.where(mask, total, 0)
        bits, shared = bits + packed(mask), shared + 8 * total.astype(np.float64).nbytes
    return found, bits, shared


def emr(taus: Taus, task: int) -> tuple[dict[str, Array], int, int]:
    unified, masks = {}, {}
    for name, own in taus[task].items():
        sign = np.sign(np.sum([tau[name] for tau in taus], axis=0))
        aligned = [np.where(np.sign(tau[name]) == sign, np.abs(tau[name]), 0) for tau in taus]
        unified[name] = sign * np.max(aligned, axis=0)
        masks[name] = own * unified[name] > 0
    size = sum(np.abs(own).sum() for own in taus[task].values())
    scale = size / sum(np.abs(unified[n] * masks[n]).sum() for n in masks)
    found = {name: scale * unified[name] * masks[name] for name in masks}
    bits = sum(map(packed, masks.values())) + 8 * np.float64(scale).nbytes
    return found, bits, sum(8 * vector.nbytes for vector in unified.values())


def tsv(taus: Taus, task: int) -> tuple[dict[str, Array], int, int]:
    found, bits = {}, 0
    for name, own in taus[task].items():
        stored, found[name] = [own], own
        if name in MATRICES:
            rank = max(1, min(own.shape) // len(taus))
            u, s, vt = svd(own)
            factors = [u[:, :rank], s[:rank], vt[:rank]]
            if sum(factor.size for factor in factors) < own.size:
                stored, found[name] = factors, factors[0] @ np.diag(factors[1]) @ factors[2]
        bits += sum(8 * each.size * own.itemsize for each in stored)
    return found, bits, 0


def bitdelta(taus: Taus, task: int) -> tuple[dict[str, Array], int, int]:
    found, bits = {}, 0
    for name, own in taus[task].items():
        positive, scale = own > 0, np.mean(np.abs(own))
        found[name] = scale * (2.0 * positive - 1)
        bits += packed(positive) + NUMBER
    return found, bits, 0


def quantised_by(number: int) -> Reference:
    def reference(taus: Taus, task: int) -> tuple[dict[str, Array], int, int]:
        found, bits = {}, 0
        for name, own in taus[task].items():
            if own.size == 1:
                found[name] = own
            else:
                step = (own.max() - own.min()) / (2**number - 1)
                zero = -np.round(own.min() / step)
                integers = np.clip(np.round(own / step) + zero, 0, 2**number - 1)
                assert len(np.unique(integers)) <= 2**number
                found[name] = step * (integers - zero)
            bits += number * own.size + NUMBER + 32
        return found, bits, 0

    return reference


CASES: dict[str, tuple[str, dict[str, Any], Reference]] = {
    "tall_masks": ("tall_masks", {"tall_mask_lambda": LAMBDAS}, tall),
    "emr": ("emr", {}, emr),
    "tsv_c": ("tsv_c", {}, tsv),
    "bitdelta": ("bitdelta", {}, bitdelta),
    **{f"quantised {b}": ("quantised", {"bits": b}, quantised_by(b)) for b in (1, 2, 4, 8, 16)},
}


def test_every_compression_has_a_reference() -> None:
    assert {name for name, *_ in CASES.values()} == set(COMPRESSIONS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("piece", [2**18, 10])
def test_definitions_and_bits(case: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE", piece)
    (name, options, reference), pool = CASES[case], pool_of(len(TASKS))
    compressed = Compressed(ModelPool(pool), name, **options)
    for index, task in enumerate(TASKS):
        found = compressed.reconstruct(task)
        expected, bits, shared = reference(taus_of(pool), index)
        assert (found.bits, found.shared) == (bits, shared)
        for key in SHAPES:
            tau = (found.state[key] - pool["_pretrained_"][key]).numpy()
            np.testing.assert_allclose(tau, expected[key], rtol=1e-9, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("case", CASES)
def test_one_task_and_zero_vectors(case: str) -> None:
    """A single task is kept by those that share; vectors of 0 stay 0."""
    name, options, _ = CASES[case]
    options = {} if name == "tall_masks" else options
    pool = pool_of(1)
    found = Compressed(ModelPool(pool), name, **options).reconstruct("a").state
    for key in SHAPES if name in ("tall_masks", "emr", "tsv_c") else ():
        torch.testing.assert_close(found[key], pool["a"][key])
    pool = {**pool, "a": pool["_pretrained_"], "b": pool["_pretrained_"]}
    nothing = Compressed(ModelPool(pool), name, **options).reconstruct("b").state
    for key, value in pool["_pretrained_"].items():
        assert torch.equal(nothing[key], value)


def test_singular_values_of_0_are_not_stored() -> None:
    tau = torch.outer(torch.arange(1.0, 13), torch.arange(1.0, 13))
    pool = {n: {"w": float(n != "_pretrained_") * tau} for n in ("_pretrained_", "a", "b")}
    found = Compressed(ModelPool(pool), "tsv_c").reconstruct("a")
    assert found.bits == 32 * (12 + 1 + 12)  # not 6 times as much, the rank that two tasks may have
    torch.testing.assert_close(found.state["w"], tau)


def test_bitdelta_s_scale_is_the_best_for_its_signs() -> None:
    pool = pool_of(1)
    found = Compressed(ModelPool(pool), "bitdelta").reconstruct("a").state["wide"]
    tau, base = pool["a"]["wide"] - pool["_pretrained_"]["wide"], pool["_pretrained_"]["wide"]
    errors = [float(((1 + e) * (found - base) - tau).square().sum()) for e in (-0.01, 0.0, 0.01)]
    assert errors[1] == min(errors)


@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30),
    bits=st.integers(1, 16),
    shift=st.sampled_from([0.0, 2e3, -2e3]),
)
def test_quantised_numbers_are_within_a_step(values: list[float], bits: int, shift: float) -> None:
    """Half a step from rounding, and up to another half where the zero point was rounded."""
    tensor = torch.tensor(values, dtype=torch.float64) + shift
    found = quantised(tensor, bits)
    step = float(tensor.max() - tensor.min()) / (2**bits - 1)
    assert len(found.unique()) <= 2**bits
    assert float((found - tensor).abs().max()) <= step * (1 + 1e-6) + 1e-9


def test_what_is_not_compressed_stays_the_pretrained_model_s() -> None:
    """Integers and identical infinities take no bits; a tied tensor takes them once."""
    shared = torch.arange(6.0)
    base: State = {"ids": torch.tensor([1, 2]), "mask": torch.full((3,), -torch.inf)}
    pool = {
        "_pretrained_": {**base, "w": (zero := torch.zeros(6)), "tied": zero},
        "a": {**base, "w": shared, "tied": shared},
    }
    found = Compressed(ModelPool(pool), "bitdelta").reconstruct("a")
    assert found.bits == 6 + 32
    assert all(torch.equal(found.state[name], base[name]) for name in base)
    assert torch.equal(found.state["w"], found.state["tied"])


def test_bits_of_half_precision_are_those_of_the_numbers_stored() -> None:
    pool = pool_of(2, dtype=torch.bfloat16)
    number = sum(value.numel() for value in pool["a"].values())
    found = Compressed(ModelPool(pool), "emr").reconstruct("a")
    assert (found.bits, found.shared) == (number + 64, 32 * number)  # summed in float32
    assert all(value.dtype == torch.bfloat16 for value in found.state.values())


def test_a_reconstruction_is_written_as_a_merge_is(tmp_path: Path) -> None:
    compressed = Compressed(ModelPool(pool_of(3)), "tsv_c")
    path = save_merged(compressed.merge("b"), tmp_path / "b.safetensors")
    expected = compressed.reconstruct("b").state
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda pool: Compressed(pool, "zip"), "unknown compression 'zip'; choose from bitdelta"),
        (lambda pool: Compressed(pool, "emr", k=1), "emr has no options, got 'k'"),
        (lambda pool: Compressed(pool, "emr").reconstruct("x"), "unknown model 'x'; choose from"),
        (
            lambda pool: Compressed(pool, "quantised", bits=17).reconstruct("a"),
            "bits must be from 1 to 16, got 17",
        ),
        (
            lambda pool: Compressed(pool, "tall_masks", tall_mask_lambda=[1]).reconstruct("a"),
            "tall_mask_lambda must be one number of at least 0, or 3 of them",
        ),
        (
            lambda _: Compressed(ModelPool({"a": pool_of(1)["a"]}), "emr").reconstruct("a"),
            "needs the pre-trained model, named _pretrained_",
        ),
    ],
)
def test_errors(act: Callable[[ModelPool], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        act(ModelPool(pool_of(3)))


def test_definitions_are_documented() -> None:
    for each in COMPRESSIONS.values():
        doc = each.function.__doc__ or ""
        assert "\\(" in doc and "Source:" in doc and each.source in doc
        assert all(f"{option}:" in doc for option in each.defaults)
