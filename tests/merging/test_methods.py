"""Laws and options of the methods, against independent formulas."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from tangent_arithmetic import merging
from tangent_arithmetic.commands import merge
from tangent_arithmetic.merging import (
    METHODS,
    Algorithm,
    DareTaskArithmetic,
    DareTiesMerging,
    DummyAlgorithm,
    ModelPool,
    Piece,
    SimpleAverageAlgorithm,
    SlerpMergeAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
    WeightedAverageAlgorithm,
    algorithm_class,
    get_method,
    merging_method,
    stream,
)
from tangent_arithmetic.merging.compressions import COMPRESSIONS
from tangent_arithmetic.merging.configurations import configurations
from tangent_arithmetic.merging.methods import dare
from tangent_arithmetic.merging.options import TYPES, Registered
from tangent_arithmetic.merging.plugins import PLUGINS
from tangent_arithmetic.merging.targets import algorithm_of
from tangent_arithmetic.merging.weights import held
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import content_hash
from tests.merging.makers import State, write_files
from tests.merging.small import small_data

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
ALL: tuple[Algorithm, ...] = (
    SimpleAverageAlgorithm(),
    WeightedAverageAlgorithm([1.0, 3.0, 2.0]),
    TaskArithmeticAlgorithm(0.4),
    TiesMergingAlgorithm(),
    TiesMergingAlgorithm(scope="tensor", zero_sign="positive", merge_func="mean"),
    DareTaskArithmetic(),
    DareTiesMerging(),
    merging.TaskSingularVectorMerging(0.8),
    merging.ISO_C_Merge(1.3),
    merging.ISO_CTS_Merge(1.3, 0.5),
    merging.BreadcrumbsAlgorithm(beta=0.4, gamma=0.1),
    merging.BreadcrumbsAlgorithm(beta=0.4, gamma=0.1, elect=True, weights=[1.0, -1.0, 0.5]),
    merging.DellaAlgorithm(),
    merging.SceAlgorithm(select_topk=0.5),
    merging.ModelStock(),
    merging.KarcherAlgorithm(),
    merging.MultislerpAlgorithm([1.0, 3.0, 2.0]),
    merging.ConsensusTaskArithmeticAlgorithm(),
    merging.ConsensusTiesAlgorithm(),
    merging.PcbMergingAlgorithm(pcb_ratio=0.4),
    merging.WUDIMerging(iter_num=20),
    merging.WudiClosedFormAlgorithm(),
    merging.StarAlgorithm(),
    merging.LinesTaskArithmeticAlgorithm(),
    DummyAlgorithm(),
)


def models(count: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, State]:
    generator = torch.Generator().manual_seed(7)

    def one() -> State:
        return {
            "w": torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype),
            "s": torch.randn((), generator=generator, dtype=torch.float64).to(dtype),
            "empty": torch.zeros(0, 4, dtype=dtype),
            "steps": torch.tensor([int(torch.randint(9, (), generator=generator))]),
        }

    names = ["_pretrained_", *"abcdefgh"[:count]]
    return {name: one() for name in names}


def flat(state: State) -> np.ndarray:
    return torch.cat([state[name].reshape(-1) for name in ("s", "w")]).double().numpy()


def trimmed(tau: np.ndarray, percent: float) -> np.ndarray:
    order = np.sort(np.abs(tau))
    least = order[max(1, len(tau) - int(percent / 100 * len(tau))) - 1]
    return np.where(np.abs(tau) >= least, tau, 0)


@pytest.mark.parametrize("percent", [2, 20, 50, 99, 100])
@pytest.mark.parametrize("how", ["sum", "mean", "max"])
def test_ties_is_the_papers_algorithm(percent: float, how: str) -> None:
    pool = models()
    base = flat(pool["_pretrained_"])
    taus = np.stack([trimmed(flat(pool[name]) - base, percent) for name in "abc"])
    signs = np.sign(taus.sum(axis=0))
    signs[signs == 0] = np.sign(signs.sum())
    merged = np.zeros_like(base)
    for i, sign in enumerate(signs):
        agreeing = [tau[i] for tau in taus if tau[i] * sign > 0]
        if agreeing:
            forms = {"sum": sum(agreeing), "mean": np.mean(agreeing), "max": max(agreeing, key=abs)}
            merged[i] = forms[how]
    found = TiesMergingAlgorithm(0.7, percent, merge_func=how).run(pool)
    np.testing.assert_allclose(flat(found), base + 0.7 * merged, rtol=1e-12)


def test_ties_by_tensor_keeps_a_share_of_each() -> None:
    pool = {name: {"w": torch.zeros(10), "v": torch.zeros(4)} for name in ("_pretrained_", "a")}
    pool["a"] = {"w": torch.arange(1.0, 11.0), "v": 100 * torch.arange(1.0, 5.0)}
    found = TiesMergingAlgorithm(1.0, 50, scope="tensor").run(pool)
    assert found["w"].tolist() == [0] * 5 + [6, 7, 8, 9, 10]
    assert found["v"].tolist() == [0, 0, 300, 400]
    whole = TiesMergingAlgorithm(1.0, 20).run(pool)  # int(0.2 * 14) + 1 of all
    assert whole["w"].tolist() == [0] * 10 and whole["v"].tolist() == [0, 200, 300, 400]


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_ties_of_mixed_types_has_one_order_of_magnitudes(
    scope: Literal["global", "tensor"],
) -> None:
    single, double = models(1, torch.float32), models(1)
    mixed = {n: {"a": single[n]["w"], "b": 2 * double[n]["w"]} for n in single}
    wide = {n: {k: v.double() for k, v in state.items()} for n, state in mixed.items()}
    found, expected = (TiesMergingAlgorithm(1.0, 30, scope=scope).run(p) for p in (mixed, wide))
    kept = {k: (expected[k] != wide["_pretrained_"][k]) for k in ("a", "b")}
    assert 0 < sum(int(mask.sum()) for mask in kept.values()) < 30
    for key, mask in kept.items():
        assert torch.equal(found[key] != mixed["_pretrained_"][key], mask)


def test_remove_keys_are_left_as_pretrained() -> None:
    pool = models()
    for algorithm in (TiesMergingAlgorithm(remove_keys=["w"]), DareTiesMerging(remove_keys=["w"])):
        assert torch.equal(algorithm.run(pool)["w"], pool["_pretrained_"]["w"])


NAMING: list[tuple[Callable[[list[str]], Algorithm], str]] = [
    (lambda names: TiesMergingAlgorithm(remove_keys=names), "remove_keys"),
    (lambda names: DareTiesMerging(remove_keys=names), "remove_keys"),
    (lambda names: merging.ModelStock(names), "ignore_keys"),
    (lambda names: merging.ISO_C_Merge(exclude_keys=names), "exclude_keys"),
    (
        lambda names: merging.SvcAlgorithm(inner="ties", inner_options={"remove_keys": names}),
        "remove_keys",
    ),
]


@pytest.mark.parametrize(("make", "option"), NAMING, ids=["ties", "dare", "stock", "iso", "inner"])
def test_options_name_tied_tensors_by_any_name(
    make: Callable[[list[str]], Algorithm], option: str
) -> None:
    pool = models()
    for state in pool.values():
        state["in.weight"] = state["out.weight"] = state.pop("w")
    cases: dict[str, list[str]] = {"none": [], **{name: [name] for name in pool["a"]}}
    found = {case: make(names).run(pool) for case, names in cases.items()}
    tied = ("in.weight", "out.weight")
    for key in tied:
        assert all(torch.equal(found["in.weight"][key], found[name][key]) for name in tied)
        assert not torch.equal(found["none"][key], found[key][key])
    with pytest.raises(UsageError, match=rf"{option} names 'in.wait', .* nearest are in\.weight"):
        make(["in.wait"]).run(pool)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(FLOATS, min_size=1, max_size=60), wide=st.booleans(), data=st.data())
def test_ties_keeps_the_largest_weights(
    values: list[float], wide: bool, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, len(values)))
    tau = torch.tensor(values, dtype=torch.float64 if wide else torch.float32)
    algorithm = TiesMergingAlgorithm(1.0, 100 * (kept + 0.5) / len(values), scope="tensor")
    if kept == len(values):
        algorithm = TiesMergingAlgorithm(1.0, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "PIECE", 7)
        merged = algorithm.run({"_pretrained_": {"w": 0 * tau}, "a": {"w": tau}})["w"]
    least = tau.abs().kthvalue(len(values) - kept + 1).values
    assert torch.equal(merged, torch.where(tau.abs() >= least, tau, 0))


@pytest.mark.parametrize("algorithm", ALL, ids=str)
def test_pieces_do_not_matter_and_models_are_not_changed_or_shared(
    algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, numbers = models(), torch.linspace(0, 1, 15)
    for state in pool.values():
        state |= {f"blocks.{i}.w": state["w"] + i for i in range(2)}
    monkeypatch.setattr(dare, "uniform", lambda *words: numbers[words[-2] :][: words[-1]])
    before = {name: content_hash(state) for name, state in pool.items()}
    whole = algorithm.run(pool)
    monkeypatch.setattr(stream, "PIECE", 4)
    cut = algorithm.run(pool)
    assert {name: content_hash(state) for name, state in pool.items()} == before
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-12, atol=0)
    assert torch.equal(whole["steps"], pool["_pretrained_"]["steps"])
    assert whole["empty"].shape == (0, 4)
    for name, state in itertools.product(whole.keys() - {"empty"}, pool.values()):
        assert whole[name].data_ptr() != state[name].data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32(dtype: torch.dtype) -> None:
    pool = {name: {"w": torch.full((3,), 1.0, dtype=dtype)} for name in ("_pretrained_", *"ab")}
    pool["a"]["w"] += 2**-7
    pool["b"]["w"] += 2**-7
    found = TaskArithmeticAlgorithm(0.5).run(pool)["w"]
    assert found.dtype == dtype and found.tolist() == [1.0 + 2**-7] * 3
    assert SimpleAverageAlgorithm().run({**pool, "b": pool["_pretrained_"]})["w"].dtype == dtype


def test_task_arithmetic_at_one_of_one_model_is_that_model() -> None:
    pool = models(1)
    found = TaskArithmeticAlgorithm(scaling_factor=1.0).run(pool)
    torch.testing.assert_close(found["w"], pool["a"]["w"])


def test_modules_give_a_new_module() -> None:
    torch.manual_seed(0)
    pool = {name: nn.Linear(10, 10) for name in ("_pretrained_", "model_1", "model_2")}
    before = [content_hash(module.state_dict()) for module in pool.values()]
    merged = TaskArithmeticAlgorithm(scaling_factor=0.5).run(pool)
    base, one, two = (module.weight.double() for module in pool.values())
    expected = base + 0.5 * ((one - base) + (two - base))
    torch.testing.assert_close(merged.weight.double(), expected, rtol=1e-6, atol=1e-7)
    assert isinstance(merged, nn.Linear) and merged not in pool.values()
    again = TaskArithmeticAlgorithm(0.5, inplace=True).run(pool)
    assert torch.equal(again.weight, merged.weight)
    assert [content_hash(module.state_dict()) for module in pool.values()] == before


def test_slerp_of_unit_vectors_stays_on_the_sphere() -> None:
    u, v = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    for t in (0.0, 0.25, 0.5, 1.0):
        found = SlerpMergeAlgorithm(t=t).run({"a": {"w": u}, "b": {"w": v}})["w"]
        angle = torch.tensor(t * torch.pi / 2, dtype=torch.float64)
        expected = torch.stack([angle.cos(), angle.sin()])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    halfway = SlerpMergeAlgorithm(0.5).run({"a": {"w": u}, "b": {"w": 1.0001 * u}})["w"]
    torch.testing.assert_close(halfway, 1.00005 * u)
    nothing = SlerpMergeAlgorithm(0.5).run({"a": {"w": 0 * u}, "b": {"w": v}})["w"]
    assert bool(torch.isfinite(nothing).all())


def test_dare_masks_follow_from_seed_model_and_name() -> None:
    pool = models()
    once, again = (DareTaskArithmetic(seed=3).run(pool) for _ in range(2))
    other = DareTaskArithmetic(seed=4).run(pool)
    assert torch.equal(once["w"], again["w"]) and not torch.equal(once["w"], other["w"])
    renamed = {name: {"v": state["w"]} for name, state in pool.items()}
    assert not torch.equal(DareTaskArithmetic(seed=3).run(renamed)["v"], once["w"])


def test_dare_masks_do_not_follow_from_the_default_type() -> None:
    pool = models()
    expected = DareTaskArithmetic(seed=3).run(pool)["w"]
    torch.set_default_dtype(torch.float64)
    try:
        found = DareTaskArithmetic(seed=3).run(pool)["w"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_dare_drops_nothing_at_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dare, "uniform", lambda *words: torch.zeros(words[-1]))
    pool = models()
    whole = DareTaskArithmetic(0.5, sparsity_ratio=0.0).run(pool)["w"]
    torch.testing.assert_close(whole, TaskArithmeticAlgorithm(0.5).run(pool)["w"])


def test_dare_drops_its_share_and_keeps_the_mean() -> None:
    pool = {"_pretrained_": {"w": torch.zeros(200, 100)}, "a": {"w": torch.ones(200, 100)}}
    found = DareTaskArithmetic(1.0, 0.9).run(pool)["w"]
    assert set(found.unique().tolist()) == {0.0, torch.tensor(1 / (1 - 0.9)).item()}
    assert abs(float((found == 0).double().mean()) - 0.9) < 0.01  # 20,000 draws: 4.7 sigma
    plain = DareTaskArithmetic(1.0, 0.9, rescale=False).run(pool)["w"]
    assert set(plain.unique().tolist()) == {0.0, 1.0}


def test_dare_on_linear_weights_alone() -> None:
    ones = {"layer.weight": torch.ones(4, 4), "layer.bias": torch.ones(4)}
    ones |= {"embed.weight": torch.ones(9, 4), "conv": torch.ones(2, 2, 2, 2)}
    pool = {"_pretrained_": {name: 0 * value for name, value in ones.items()}, "a": ones}
    found = DareTaskArithmetic(1.0, 0.5, only_on_linear_weights=True).run(pool)
    assert [n for n, value in ones.items() if not torch.equal(found[n], value)] == ["layer.weight"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskArithmeticAlgorithm(scale=1), "no option 'scale'; its options are scal"),
        (lambda: TaskArithmeticAlgorithm(1, 2), "takes 1 options, got 2"),
        (lambda: TaskArithmeticAlgorithm(0.5, True), "by position; name others, such as inplace="),
        (lambda: TaskArithmeticAlgorithm(10**400), "must be a finite number, got 1000"),
        (lambda: TaskArithmeticAlgorithm().run([{}, {}]), "expected models by name, got a list"),
        (lambda: TaskArithmeticAlgorithm(1, scaling_factor=2), "scaling_factor given twice"),
        (lambda: SimpleAverageAlgorithm(t=1), "simple_average has no options, got 't'"),
        (lambda: TiesMergingAlgorithm(threshold=0).run(models()), "threshold must be above 0"),
        (lambda: TiesMergingAlgorithm(threshold=101).run(models()), "at most 100"),
        (lambda: TiesMergingAlgorithm(scope="layer").run(models()), "unknown scope 'layer'"),
        (lambda: TiesMergingAlgorithm(zero_sign="0").run(models()), "unknown zero_sign '0'"),
        (lambda: TiesMergingAlgorithm(merge_func="min").run(models()), "unknown merge_func 'min'"),
        (
            lambda: TiesMergingAlgorithm(weights=[1, 2]).run(models()),
            "weights must be one number, o",
        ),
        (lambda: DareTaskArithmetic(sparsity_ratio=1.0).run(models()), "at least 0 and below 1"),
        (
            lambda: DareTaskArithmetic(weights=[1, -1, 0], normalize=True).run(models()),
            "sum to 0 cannot be",
        ),
        (lambda: merging.SceAlgorithm(select_topk=0).run(models()), "above 0 and at most 1"),
        (lambda: merging.NearswapAlgorithm(t=0).run(models(1)), "nearswap's t must be above 0"),
        (lambda: merging.NuslerpAlgorithm([1, -1]).run(models(2)), "sum to 0 cannot be norm"),
        (lambda: merging.NuslerpAlgorithm().run(models()), "nuslerp merges 2 models, got 3"),
        (lambda: merging.ArceeFusionAlgorithm().run(models()), "arcee_fusion merges 2 models, got"),
        (lambda: WeightedAverageAlgorithm([1]).run(models()), "expected 3 weights, one for each"),
        (lambda: WeightedAverageAlgorithm([1, -1, 0]).run(models()), "sum to 0 cannot be"),
        (lambda: WeightedAverageAlgorithm([1, -1, 1e-9]).run(models()), "sum to 1e-09 cannot be"),
        (lambda: WeightedAverageAlgorithm([0.1, 0.2, -0.3]).run(models()), "e-17 cannot be norm"),
        (lambda: WeightedAverageAlgorithm([1e308] * 3).run(models()), "sum to nan cannot be"),
        (lambda: WeightedAverageAlgorithm([1, np.nan, 0]).run(models()), "of finite numbers"),
        (lambda: SlerpMergeAlgorithm(1.5).run(models(1)), "from 0 to 1, got 1.5"),
        (lambda: SlerpMergeAlgorithm(epsilon=-1).run(models(1)), "epsilon must be at least 0"),
        (lambda: SlerpMergeAlgorithm().run(models()), "slerp merges 2 models, got 4: _pretrained_"),
        (lambda: merging.TaskSingularVectorMerging([1, 2]).run(models()), "or 3 of them, one for"),
        (lambda: merging.TaskSingularVectorMerging("1"), "a finite number, or a list of them"),
        (lambda: merging.ISO_C_Merge(exclude_keys="w"), "exclude_keys must be a list of names"),
        (lambda: merging.ISO_CTS_Merge(1, 1.2).run(models()), "from 0 to 1, got 1.2"),
        (lambda: merging.BreadcrumbsAlgorithm(beta=0.9, gamma=0.1).run(models()), "less than 1"),
        (lambda: merging.BreadcrumbsAlgorithm(gamma=-0.1).run(models()), "must be at least 0"),
        (lambda: merging.DellaAlgorithm(sparsity_ratio=0.05).run(models()), "must be at least 0 a"),
        (lambda: merging.DellaAlgorithm(sparsity_ratio=0.95).run(models()), "below 1, got spars"),
        (lambda: merging.KarcherAlgorithm(max_iter=-1).run(models()), "must be at least 0, got m"),
        (lambda: merging.KarcherAlgorithm(max_iter=2.5), "max_iter must be an integer, got 2.5"),
        (lambda: merging.MultislerpAlgorithm(0.5), "weights must be a list of finite numbers"),
        (lambda: merging.MultislerpAlgorithm([0, 0, 0]).run(models()), "sum to 0 cannot be norma"),
        (lambda: merging.ModelStock("w"), "ignore_keys must be a list of names, got 'w'"),
        (lambda: merging.SvcAlgorithm(inner_options=["a"]), "be a mapping of names to values"),
        (lambda: merging.MultislerpAlgorithm([1, 2]).run(models()), "expected 3 weights, one for"),
        (
            lambda: merging.MultislerpAlgorithm([1, 2, -1]).run(models()),
            "at least 0, got .1, 2, -1",
        ),
        (
            lambda: merging.ConsensusTaskArithmeticAlgorithm(prun_thre_k=4).run(models()),
            "from 0 to the number of models, 3, got 4",
        ),
        (
            lambda: merging.ConsensusTaskArithmeticAlgorithm(tall_mask_lambda=[0.2]).run(models()),
            "tall_mask_lambda must be one number of at least 0, or 3 of them",
        ),
        (lambda: merging.PcbMergingAlgorithm(pcb_ratio=0).run(models()), "above 0 and at most 1"),
        (lambda: merging.WUDIMerging(iter_num=-1).run(models()), "iter_num must be at least 0"),
        (lambda: merging.WudiClosedFormAlgorithm(ridge=0).run(models()), "ridge must be above 0"),
        (lambda: merging.StarAlgorithm(eta=0).run(models()), "above 0 and at most 100"),
        (lambda: get_method("task_arithmetc"), "unknown merging method 'task_arithmetc'; choose"),
        (lambda: ModelPool({"_pretrained_": {}}), "at least one model to merge, got none"),
    ],
)
def test_invalid_options_are_explained(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.needs_pretrained])
def test_methods_that_need_the_pretrained_model(name: str) -> None:
    kind, pool = algorithm_class(METHODS[name].algorithm), models()
    del pool["_pretrained_"]
    with pytest.raises(UsageError, match="needs the pre-trained model, named _pretrained_"):
        kind().run(pool)


@pytest.mark.parametrize("algorithm", ALL[:-1], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_model_with_nan_or_infinity_is_named(algorithm: Algorithm, bad: float) -> None:
    pool = models()
    pool["b"]["w"][2, 1] = bad
    with pytest.raises(UsageError, match=f"b has {bad} at index 7 of w, expected finite weights"):
        algorithm.run(pool)


def test_a_mask_of_infinities_that_all_models_have_is_kept() -> None:
    mask = torch.full((3,), -torch.inf)
    state = {"mask": mask, "h.0.w": torch.ones(2), "h.1.w": torch.ones(2)}
    pool = {name: {n: v.clone() for n, v in state.items()} for name in ("_pretrained_", *"ab")}
    two = pool | {"c": pool["b"]}
    for algorithm in ALL:
        needs_three = "weights" in algorithm.options
        assert torch.equal(algorithm.run(two if needs_three else pool)["mask"], mask)
    for algorithm in (TiesMergingAlgorithm(scope="tensor"), SlerpMergeAlgorithm()):
        if algorithm.method == "slerp":
            pool.pop("b")
        assert torch.equal(algorithm.run(pool)["mask"], mask)


@pytest.mark.parametrize("size", [2, 3, 100])
@pytest.mark.parametrize("plugins", [(), ("normalise",)])
def test_infinities_that_all_models_have_do_not_depend_on_the_pieces(
    size: int, plugins: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PIECE", size)
    mask = torch.tensor([-torch.inf, 0.0, torch.inf, 0.0, 0.0, -torch.inf])
    taus = {"_pretrained_": torch.zeros(6), "a": torch.arange(6.0), "b": torch.arange(6.0) * -3}
    pool = {name: {"h.0.w": mask + tau, "h.1.w": tau} for name, tau in taus.items()}
    finite = {name: {"h.0.w": tau * mask.isfinite(), "h.1.w": tau} for name, tau in taus.items()}
    for kind in (TaskArithmeticAlgorithm, TiesMergingAlgorithm, SimpleAverageAlgorithm):
        algorithm = kind(plugins=plugins)
        expected = algorithm.run(finite)["h.0.w"]
        torch.testing.assert_close(algorithm.run(pool)["h.0.w"], expected + mask)
    for name, wrong in (("a", -torch.inf), ("b", torch.nan), ("_pretrained_", torch.inf)):
        changed = {**pool, name: {**pool[name], "h.0.w": pool[name]["h.0.w"].clone()}}
        changed[name]["h.0.w"][4] = wrong
        with pytest.raises(UsageError, match=rf"{name} has {wrong} at index 4 of h\.0\.w"):
            TaskArithmeticAlgorithm(plugins=plugins).run(changed)


def test_variances_below_zero_are_refused(tmp_path: Path) -> None:
    """A batch norm gives NaN there; on the way to a coefficient that is chosen, this is allowed."""
    variances = {"_pretrained_": 1.0, "a": 0.2, "b": 0.2, "c": 0.2}
    pool = {name: {"bn.running_var": torch.full((2,), v)} for name, v in variances.items()}
    for act in (
        TaskArithmeticAlgorithm(0.5).run,
        lambda pool: TaskArithmeticAlgorithm(0.5).run_to(pool, tmp_path / "m"),
    ):
        with pytest.raises(UsageError, match=r"a variance of -0\.2 at index 0 of bn\.running_var"):
            act(pool)
    far = stream.merged_state(TaskArithmeticAlgorithm(0.5).merge(pool), any_variance=True)
    torch.testing.assert_close(far["bn.running_var"], torch.full((2,), -0.2))
    smaller = TaskArithmeticAlgorithm(0.25).run(pool)
    torch.testing.assert_close(smaller["bn.running_var"], torch.full((2,), 0.4))


def test_overflow_is_blamed_on_the_options() -> None:
    pool = {name: {"w": torch.tensor([0.0])} for name in ("_pretrained_", "a")}
    pool["a"]["w"] += 3e38
    with pytest.raises(UsageError, match="weights that are not finite in w; check its options"):
        TaskArithmeticAlgorithm(10.0).run(pool)
    matrices = {name: {"w": torch.randn(4, 3)} for name in ("_pretrained_", "a", "b")}
    for algorithm in (merging.TaskSingularVectorMerging(1e300), merging.ISO_C_Merge(1e300)):
        with pytest.raises(UsageError, match="weights that are not finite in w; check its options"):
            algorithm.run(matrices)


def test_all_differences_are_listed() -> None:
    pool = models(2)
    pool["a"]["w"] = torch.zeros(2, 2)
    del pool["b"]["s"]
    with pytest.raises(UsageError, match=r"(?s)w: shape \(5, 3\) against \(2, 2\).*first: s"):
        TaskArithmeticAlgorithm().run(pool)


def test_methods_declare_what_they_need() -> None:
    own = [m for m in METHODS.values() if m.function.__module__.startswith("tangent_arithmetic.")]
    assert len(own) == 39
    for method in own:
        assert METHODS[method.name] is method and method.source
        assert method.function.__doc__
    assert {method.name for method in own if method.needs_data} == {
        "fisher_merging",
        "regmean",
        "regmean_plusplus",
        "task_wise_adamerging",
        "layer_wise_adamerging",
        "lot",
        "featcal",
        "prodistill",
    }


@pytest.mark.parametrize("name", sorted(METHODS))
def test_weights_are_read_as_often_as_declared(name: str) -> None:
    """With the default options, but for the number of steps, in single precision."""
    method, data, reads = METHODS[name], small_data(), list[str]()
    states = {key: {n: v.float() for n, v in state.items()} for key, state in data.pool.items()}
    names = list(states)[: method.num_models if method.ordered else None]
    pool: dict[str, Any] = {key: held(states[key]) for key in names}

    def read(key: str) -> Tensor:
        reads.append(key)
        return states["a"][key]

    steps: dict[str, Any] = {
        name: 1 for name in ("iter_num", "max_steps", "epochs") if name in method.defaults
    }
    pool["a"] = replace(pool["a"], read=read)
    algorithm_class(method.algorithm)(**steps).run(pool, data)
    assert reads.count("embed.weight") == method.passes


@pytest.fixture
def quantile() -> Iterator[type[Algorithm]]:
    """A method of another project: between the smallest and the largest weight."""

    @merging_method("quantile", source="none", needs_pretrained=False)
    def quantile(piece: Piece, *, q: float, side: Literal["low", "high"] = "low") -> Tensor:
        """The q-quantile of the models, weight by weight."""
        share = q if side == "low" else 1 - q
        return torch.quantile(torch.stack(piece.thetas), share, dim=0)

    yield algorithm_class("QuantileAlgorithm")
    del METHODS["quantile"]


def test_a_method_from_outside_is_a_method_like_any_other(
    quantile: type[Algorithm], tmp_path: Path
) -> None:
    """Its class, options, messages and recipe follow from the function alone."""
    pool = models()
    found = merging.QuantileAlgorithm(0.0, side="high").run(pool)
    largest = torch.stack([pool[name]["w"] for name in "abc"]).amax(dim=0)
    torch.testing.assert_close(found["w"], largest)
    assert merging.QuantileAlgorithm is quantile and quantile.__doc__ is not None
    assert repr(quantile(q=0.5)) == "QuantileAlgorithm(q=0.5)"
    assert pickle.loads(pickle.dumps(quantile(0.5))).options == {"q": 0.5}
    path = quantile(0.5).run_to(pool, tmp_path / "m.safetensors")
    assert merging.written_recipe(path)["options"] == {"q": 0.5, "side": "low"}
    for options, message in (
        ({}, "quantile needs q"),
        ({"q": "half"}, "quantile's q must be a finite number, got 'half'"),
        ({"q": 0.5, "side": "left"}, "unknown side 'left'; choose from"),
        ({"q": 0.5, "quarter": 1}, "quantile has no option 'quarter'; its options are q, side"),
    ):
        with pytest.raises(UsageError, match=message):
            quantile(**options)


def test_a_method_from_outside_is_a_configuration(
    quantile: type[Algorithm], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for home in ("tangent_arithmetic.merging", "src.merging", "fusion_bench.method.new"):
        node = {"_target_": f"{home}.QuantileAlgorithm", "q": 0.5}
        assert type(algorithm_of(node)) is quantile
    paths = write_files(tmp_path, models())
    listed = ", ".join(f"{name}: {paths[name]}" for name in "abc")
    words = ["modelpool=files", f"modelpool.models={{{listed}}}", "method=quantile"]
    words += [f"merged_model_save_path={tmp_path / 'm.safetensors'}", f"path.output_dir={tmp_path}"]
    assert merge.main(words) == 2
    assert "method.q is not set; expected method.q=VALUE" in capsys.readouterr().err
    assert merge.main([*words, "method.q=0.5"]) == 0
    expected = quantile(0.5).run(models())
    assert torch.equal(load_file(tmp_path / "m.safetensors")["w"], expected["w"])
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        merge.main(["--help"])
    assert re.search(r"^method: .*\bquantile\b", capsys.readouterr().out, flags=re.MULTILINE)


def test_configurations_are_read_from_the_methods_without_importing_them() -> None:
    registered = configurations()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tangent_arithmetic.merging.configurations.METHODS", {})
        read = configurations()
    own = {"task_arithmetic", "ties_merging", "simple_average", "linear/weighted_average"}
    theirs = {"dare/task_arithmetic", "dare/ties_merging", "slerp/slerp", "dummy"}
    short = {"ties", "weighted_average", "dare_task_arithmetic", "dare_ties", "slerp"}
    own |= {"breadcrumbs", "consensus_task_arithmetic", "della", "karcher", "multislerp", "star"}
    own |= {"pcb_merging", "wudi_closed_form", "tsv_m", "iso_c", "iso_cts", "model_stock", "wudi"}
    own |= {"lines_task_arithmetic", "knots", "core_space", "svc", "ace", "consensus_ties"}
    own |= {"sce", "nuslerp", "nearswap", "arcee_fusion"}
    own |= {"breadcrumbs_ties", "dare_linear", "della_linear"}
    theirs |= {"isotropic_merging/iso_c", "isotropic_merging/iso_cts", "wudi/wudi"}
    theirs |= {"task_singular_vector/TaskSingularVectorMerging", "model_stock/model_stock"}
    own |= {"fisher_merging", "regmean", "regmean_plusplus"}
    own |= {"task_wise_adamerging", "layer_wise_adamerging", "lot", "featcal", "prodistill"}
    theirs |= {"fisher_merging/clip_fisher_merging", "regmean/clip_regmean", "adamerging/clip"}
    theirs |= {"regmean_plusplus/clip_regmean_plusplus"}
    assert set(read) == own | theirs | short
    assert read == {name: registered[name] for name in read}
    assert read["linear/weighted_average"]["weights"] == (0.5, 0.5)
    assert "seed" not in read["dare/ties_merging"]  # the configuration has a key of its own
    linear = algorithm_of(read["della_linear"])
    assert isinstance(linear, merging.DellaAlgorithm)
    assert (linear.elect, linear.normalize) == (False, False)
    assert read["breadcrumbs_ties"] == {**read["breadcrumbs"], "elect": True}
    assert read["dare_linear"] == read["dare_task_arithmetic"]


@pytest.mark.parametrize("registry", [METHODS, PLUGINS, COMPRESSIONS], ids=["m", "p", "c"])
def test_every_option_has_a_type_that_is_checked(registry: Mapping[str, Registered]) -> None:
    for name, each in registry.items():
        assert each.types.keys() == each.defaults.keys(), name
        for option, kind in each.types.items():
            assert kind in TYPES or get_origin(kind) is Literal, (name, option, kind)


def test_an_annotation_that_is_not_there_at_run_time_is_named() -> None:
    def function(piece: Missing, *, width: Missing) -> Missing: ...  # type: ignore[name-defined]  # noqa: F821

    message = r"an option of function .* not defined at run time .*Missing.* outside of TYPE_CHECK"
    with pytest.raises(UsageError, match=message):
        merging_method("untyped", source="none")(function)


def test_two_methods_cannot_share_a_name() -> None:
    for names, message in (
        ({}, "share the algorithm name 'TiesMergingAlgorithm'"),
        ({"algorithm": "X", "config": "slerp/slerp"}, "share the config name"),
    ):
        with pytest.raises(UsageError, match=message):
            merging_method("ties_merging", source="none", **names)
    with pytest.raises(UsageError, match="unknown merging algorithm 'TiesAlgorithm'; choose from"):
        algorithm_class("TiesAlgorithm")
    with pytest.raises(AttributeError, match="has no attribute 'TiesAlgorithm'"):
        merging.TiesAlgorithm  # noqa: B018
