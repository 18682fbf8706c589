"""Plug-ins: their definitions in float64, and every method after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tangent_arithmetic import merging
from tangent_arithmetic.commands import merge
from tangent_arithmetic.merging import Piece, stream
from tangent_arithmetic.merging.plugins import PLUGINS
from tangent_arithmetic.merging.registry import plugin
from tangent_arithmetic.merging.weights import held
from tangent_arithmetic.runtime.errors import UsageError
from tests.merging.makers import State, mixed, write_files
from tests.merging.test_laws import MERGING, OF_THETA, algorithm, close

DEPTHS = {"conv.weight": 0.0, "h.0.w": 0.0, "h.1.w": 0.5, "h.2.w": 1.0, "ln.bias": 0.0}
SHAPES = {"conv.weight": (3, 2, 2), "h.0.w": (4, 6), "h.1.w": (4, 6), "h.2.w": (4, 6)}
SHAPES |= {"ln.bias": (5,)}
BETA = 0.3


def pool_of(dtype: torch.dtype = torch.float64) -> dict[str, State]:
    """Task vectors whose norms differ by up to ten."""
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    scales = {"a": 0.3, "b": 1.0, "c": 3.0}
    others = {
        name: {n: v + scale * torch.randn(v.shape, generator=generator) for n, v in base.items()}
        for name, scale in scales.items()
    }
    states = {"_pretrained_": base, **others}
    return {name: {n: v.to(dtype) for n, v in state.items()} for name, state in states.items()}


def norm(pool: dict[str, State], name: str) -> float:
    base = pool["_pretrained_"]
    parts = [(pool[name][n] - base[n]).double().numpy().reshape(-1) for n in base]
    return float(np.linalg.norm(np.concatenate(parts)))


def changed(pool: dict[str, State], plugins: Sequence[str]) -> dict[str, State]:
    """The pool after plug-ins, written densely."""
    base = pool["_pretrained_"]
    for each in plugins:
        norms = {name: norm(pool, name) for name in pool if name != "_pretrained_"}
        mean = np.mean(list(norms.values()))
        new = {}
        for name in norms:
            by = float(mean) / norms[name] if each == "normalise" else 1.0
            grown = {n: 1 + len(norms) * BETA * DEPTHS[n] * (each == "lines") for n in base}
            new[name] = {n: base[n] + by * grown[n] * (pool[name][n] - base[n]) for n in base}
        pool = {"_pretrained_": base, **new}
    return pool


def given(plugins: Sequence[str]) -> list[Any]:
    return [{"lines": {"beta": BETA}} if name == "lines" else name for name in plugins]


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("plugins", [["normalise"], ["lines"], ["lines", "normalise"]], ids=str)
def test_every_method_merges_what_plug_ins_give(name: str, plugins: list[str]) -> None:
    pool, method = pool_of(), algorithm(name, 3)
    after = type(method)(**method.options, plugins=given(plugins)).run(pool)
    close(after, method.run(changed(pool, plugins)), rtol=1e-6)
    if name not in {"simple_average", "weighted_average", *OF_THETA} or "lines" in plugins:
        before = method.run(pool)
        assert any(not torch.allclose(after[n], before[n]) for n in before)


@pytest.mark.parametrize("factors", [-0.5, [2.0, 0.0, -1.0]])
def test_scale_has_a_factor_for_each_vector(factors: Any) -> None:
    pool, each = pool_of(), factors if isinstance(factors, list) else [factors] * 3
    plugins = [{"scale": {"factors": factors}}]
    found = merging.TaskArithmeticAlgorithm(1.0, plugins=plugins).run(pool)
    for n, base in pool["_pretrained_"].items():
        expected = sum(a * (pool[name][n] - base) for a, name in zip(each, "abc", strict=True))
        torch.testing.assert_close(found[n], base + expected)
    with pytest.raises(UsageError, match="the factors of scale must be one number, or 3 of them"):
        merging.TaskArithmeticAlgorithm(plugins=[{"scale": {"factors": [1.0]}}]).run(pool)


def test_scale_has_no_factor_for_the_pre_trained_model() -> None:
    pool = {name: state for name, state in pool_of().items() if name in ("_pretrained_", "a")}
    base = pool["_pretrained_"]
    scaled = {n: base[n] + 0.5 * (value - base[n]) for n, value in pool["a"].items()}
    plugins = [{"scale": {"factors": [0.5]}}]
    found = merging.SlerpMergeAlgorithm(plugins=plugins).run(pool)
    close(found, merging.SlerpMergeAlgorithm().run({**pool, "a": scaled}))


def test_the_order_of_plug_ins_matters() -> None:
    pool = pool_of()
    both = [given(order) for order in (["lines", "normalise"], ["normalise", "lines"])]
    first, second = (merging.TaskArithmeticAlgorithm(plugins=each).run(pool) for each in both)
    assert not torch.allclose(first["h.2.w"], second["h.2.w"])


def test_normalised_vectors_have_the_mean_norm() -> None:
    pool = pool_of()
    expected = np.mean([norm(pool, name) for name in "abc"])
    for name in "abc":
        weights = [float(name == other) for other in "abc"]
        method = merging.WeightedAverageAlgorithm(weights, plugins=["normalise"])
        merged = method.run(pool)
        assert norm({**pool, "merged": merged}, "merged") == pytest.approx(expected, rel=1e-12)


def test_vectors_of_one_norm_and_zero_vectors_stay() -> None:
    pool = pool_of()
    for state in (pool["b"], pool["c"]):
        state.update({n: v.clone() for n, v in pool["a"].items()})
    plain, method = merging.TaskArithmeticAlgorithm(), merging.TaskArithmeticAlgorithm
    close(method(plugins=["normalise"]).run(pool), plain.run(pool), rtol=1e-12)
    pool["b"] = pool["_pretrained_"]
    close(method(plugins=["normalise"]).run(pool), plain.run(pool), rtol=1e-12)


def test_the_mean_after_lines_is_its_method() -> None:
    pool = pool_of()
    found = merging.TaskArithmeticAlgorithm(1 / 3, plugins=given(["lines"])).run(pool)
    close(found, merging.LinesTaskArithmeticAlgorithm(BETA).run(pool), rtol=1e-12)


@pytest.fixture
def shortened() -> Iterator[list[float]]:
    """Plug-ins of another project: one shortens vectors, the next notes their start."""
    seen: list[float] = []

    @plugin("minute", source="none")
    def minute(piece: Piece) -> Iterator[Tensor]:
        return (tau * 2.0**-20 for tau in piece.taus())

    @plugin("seen", source="none")
    def look(piece: Piece) -> Iterator[Tensor]:
        seen.extend(float(tau[0]) for tau in piece.taus())
        return piece.taus()

    yield seen
    del PLUGINS["minute"], PLUGINS["seen"]


def test_vectors_shorter_than_the_weights_precision_are_not_rounded(shortened: list[float]) -> None:
    base = torch.full((50,), 1000.0)
    pool = {"_pretrained_": {"w": base}, "a": {"w": base + 1024}, "b": {"w": base + 2.0**-12}}
    merging.TaskArithmeticAlgorithm(plugins=["minute", "seen"]).run(pool)
    assert shortened == [2.0**-10, 2.0**-32]


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, method = {n: mixed(i) for i, n in enumerate(("_pretrained_", *"ab"))}, "normalise"
    for state in pool.values():
        del state["steps"]
        state["h.0.w"], state["h.1.w"] = state["half"].clone(), state.pop("big")
    results = []
    for size in (2**18, 1000):
        monkeypatch.setattr(stream, "PIECE", size)
        results.append(merging.TiesMergingAlgorithm(plugins=[method, "lines"]).run(pool))
    close(results[1], results[0], rtol=1e-5)


def test_tied_tensors_count_once() -> None:
    shared = torch.ones(4)
    state = {"a": shared, "b": shared, "c": torch.ones(1)}
    module = torch.nn.Module()
    for name in ("a", "b"):
        module.register_parameter(name, torch.nn.Parameter(shared))
    assert held(dict(module.state_dict(keep_vars=True))).ties == {"b": "a"}
    zero = {name: torch.zeros_like(value) for name, value in state.items()}
    tied = torch.zeros(4)
    pool = {
        "_pretrained_": {"a": tied, "b": tied, "c": zero["c"]},
        "m": state,
        "n": {"a": (x := 3 * torch.ones(4)), "b": x, "c": torch.zeros(1)},
    }
    found = merging.TaskArithmeticAlgorithm(1.0, plugins=["normalise"]).run(pool)
    lengths = 5**0.5, 6.0
    mean = sum(lengths) / 2
    expected = mean / lengths[0] + mean / lengths[1] * 3
    torch.testing.assert_close(found["b"], torch.full((4,), expected))


def test_infinities_that_all_models_have_are_kept() -> None:
    pool: dict[str, State] = {n: {"mask": torch.full((3,), -torch.inf)} for n in ("a", "b")}
    pool["_pretrained_"] = {"mask": pool["a"]["mask"].clone()}
    for i, state in enumerate(pool.values()):
        state["w"] = torch.full((2,), float(i))
    found = merging.TaskArithmeticAlgorithm(plugins=["normalise"]).run(pool)
    assert torch.equal(found["mask"], pool["a"]["mask"]) and found["w"].isfinite().all()


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        (["normalize"], "unknown plug-in 'normalize'; choose from"),
        ("normalise", "plugins must be a list, each a name or"),
        ({"lines": {}}, "plugins must be a list, each a name or"),
        ([{"lines": {}, "normalise": {}}], "plugins must be a list, each a name or"),
        ([{"lines": 0.3}], "plugins must be a list, each a name or"),
        ([3], "plugins must be a list, each a name or"),
        ([{"lines": {"alpha": 1}}], "lines has no option 'alpha'; its options are beta"),
        ([{"lines": {"beta": "x"}}], "lines's beta must be a finite number, got 'x'"),
        ([{"normalise": {"x": 1}}], "normalise has no options, got 'x'"),
        ([{"scale": {"factors": [1, float("nan")]}}], "factors must be a finite number, or a list"),
        ([{"lines": {"beta": float("inf")}}], "beta must be a finite number, got inf"),
    ],
)
def test_other_plug_ins_are_explained(plugins: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merging.TaskArithmeticAlgorithm(plugins=plugins)


@pytest.mark.parametrize("name", ["simple_average", "ties", "dare_ties", "breadcrumbs", "iso_c"])
def test_vectors_that_a_plug_in_makes_infinite_name_the_plug_in(name: str) -> None:
    """Trimming and election would leave a model of NaN out, without a word."""
    plain = algorithm(name, 3)
    method = type(plain)(**plain.options, plugins=[{"scale": {"factors": 1e39}}])
    with pytest.raises(UsageError, match=r"the plug-in scale gives .* not finite in .*: 1e\+39"):
        method.run(pool_of(torch.float32))


def test_plug_ins_need_the_pretrained_model() -> None:
    pool = pool_of()
    del pool["_pretrained_"]
    with pytest.raises(UsageError, match="plug-ins change task vectors and need the pre-trained"):
        merging.SimpleAverageAlgorithm(plugins=["normalise"]).run(pool)


def test_the_command_has_them_and_the_recipe_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = pool_of(torch.float32)
    paths = write_files(tmp_path, pool)
    listed = ", ".join(f"{name}: {path}" for name, path in paths.items())
    target = tmp_path / "merged.safetensors"
    words = ["modelpool=files", f"modelpool.models={{{listed}}}", f"path.output_dir={tmp_path}"]
    words += [f"merged_model_save_path={target}"]
    plugins = "plugins=[normalise,{lines:{beta:0.3}}]"
    assert merge.main([*words, plugins, "dry_run=true"]) == 0
    assert "plugins=[{'normalise': {}}, {'lines': {'beta': 0.3}}]" in capsys.readouterr().out
    assert merge.main([*words, plugins]) == 0
    recipe = merging.written_recipe(target)
    assert recipe["plugins"] == [{"normalise": {}}, {"lines": {"beta": 0.3}}]
    expected = merging.TaskArithmeticAlgorithm(plugins=given(["normalise", "lines"])).run(pool)
    found = load_file(target)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert merge.main([*words, "plugins=normalise"]) == 2
    assert "plugins must be a list" in capsys.readouterr().err


def test_plug_ins_are_documented() -> None:
    for each in PLUGINS.values():
        doc = each.function.__doc__ or ""
        assert "\\(" in doc and all(f"{option}:" in doc for option in each.defaults)
        assert each.source == "none" or "Source:" in doc
