"""Perturbations of task vectors in float64, and the study of what methods lose by them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.commands import merge
from tangent_arithmetic.merging import ModelPool, get_method, stress
from tangent_arithmetic.merging.algorithms import algorithm_class
from tangent_arithmetic.merging.perturbing import (
    COPY,
    COUNTS,
    OUTLIER,
    PERTURBATIONS,
    Subject,
    perturbations,
)
from tangent_arithmetic.merging.weights import Weights
from tangent_arithmetic.runtime.errors import UsageError
from tests.merging.makers import State
from tests.merging.test_dense_references import pool_of

LENGTHS = {"over": 1.5, "under": 0.4}


def subject(dtype: torch.dtype = torch.float64, seed: int = 0) -> Subject:
    pool = pool_of(5, dtype=dtype)
    for state in pool.values():
        state["ids"] = torch.tensor([3])
    return Subject(ModelPool(pool), "b", LENGTHS, seed)


def taus(models: Mapping[str, Weights]) -> dict[str, Tensor]:
    """The whole task vector of each model."""
    base = models["_pretrained_"]
    names = sorted(name for name in base.outline if name != "ids")

    def tau(weights: Weights) -> Tensor:
        return torch.cat([(weights.read(n) - base.read(n)).double().view(-1) for n in names])

    return {name: tau(weights) for name, weights in models.items() if name != "_pretrained_"}


@pytest.mark.parametrize(
    ("label", "factor"),
    [
        *((f"norm x{factor}", factor) for factor in (2, 5, 10)),
        ("over-confident", 1.5),
        ("under-confident", 0.4),
    ],
)
def test_one_vector_changes_its_length(label: str, factor: float) -> None:
    before, found = taus(subject().models()), taus(PERTURBATIONS[label](subject()))
    for name, tau in before.items():
        torch.testing.assert_close(found[name], tau * (factor if name == "b" else 1))


def test_an_outlier_has_the_mean_norm_and_no_direction_of_the_others() -> None:
    before, found = taus(subject().models()), taus(PERTURBATIONS["outlier"](subject()))
    added = found.pop(OUTLIER)
    assert all(torch.equal(found[name], before[name]) for name in before)
    norms = [float(tau.norm()) for tau in before.values()]
    assert float(added.norm()) == pytest.approx(sum(norms) / len(norms), rel=1e-12)
    cosines = [float(added @ t / added.norm() / t.norm()) for t in before.values()]
    assert max(map(abs, cosines)) < 4 / math.sqrt(len(added))
    again = taus(PERTURBATIONS["outlier"](subject()))[OUTLIER]
    other = taus(PERTURBATIONS["outlier"](subject(seed=1)))[OUTLIER]
    assert torch.equal(again, added) and not torch.allclose(other, added)


def test_a_near_duplicate_is_a_tenth_of_its_norm_away() -> None:
    before, found = taus(subject().models()), taus(PERTURBATIONS["near-duplicate"](subject()))
    away = found[COPY] - before["b"]
    assert float(away.norm()) == pytest.approx(0.1 * float(before["b"].norm()), rel=1e-9)


@pytest.mark.parametrize(("label", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_fine_tuned_models_are_rounded(label: str, dtype: torch.dtype) -> None:
    given = subject(torch.float32)
    found = PERTURBATIONS[label](given)
    for name, weights in given.models().items():
        for key, value in weights.tensors.items():
            stored = value.to(dtype).to(value.dtype) if value.is_floating_point() else value
            expected = value if name == "_pretrained_" else stored
            assert torch.equal(found[name].read(key), expected)
    changed = found["a"].read("wide") != given.models()["a"].read("wide")
    assert changed.any()


@pytest.mark.parametrize(
    ("label", "names"), [("1 vector", "a"), ("2 vectors", "ab"), ("4 vectors", "abcd")]
)
def test_the_first_vectors_stay(label: str, names: str) -> None:
    assert list(PERTURBATIONS[label](subject())) == ["_pretrained_", *names]


@pytest.mark.parametrize(("models", "fewer"), [(1, 0), (2, 1), (8, 3), (9, 4), (20, 5)])
def test_fewer_vectors_are_those_than_the_pool_has(models: int, fewer: int) -> None:
    found = perturbations(models)
    assert [label for label in found if label in COUNTS] == list(COUNTS)[:fewer]
    assert list(found) == [label for label in PERTURBATIONS if label in found]
    assert len(PERTURBATIONS) - len(found) == len(COUNTS) - fewer


def test_a_missing_tensor_is_refused_by_name() -> None:
    pool = ModelPool(PERTURBATIONS["missing tensor"](subject()))
    with pytest.raises(UsageError, match=r"only in the first: wide"):
        pool.check()


@pytest.mark.parametrize("label", sorted(perturbations(5).keys() - {"missing tensor"}))
@pytest.mark.parametrize("plugins", [[], ["normalise"]], ids=str)
def test_perturbed_pools_merge_and_keep_dtypes(label: str, plugins: list[str]) -> None:
    given = subject(torch.float32)
    kind = algorithm_class(get_method("ties").algorithm)
    merged: State = kind(plugins=plugins).run(ModelPool(PERTURBATIONS[label](given)))
    outline = given.base.outline
    assert all(merged[n].dtype == outline[n].dtype for n in outline)
    assert all(bool(value.isfinite().all()) for value in merged.values())


# --- the study


class Tasks:
    """Tasks whose accuracy is known in closed form, from the distance to a task's own weight."""

    tasks = ("a", "b", "c")

    def encoder(self, _pool: ModelPool, state: State) -> State:
        return state

    def measure(self, state: State, name: str, *_others: Any) -> list[dict[str, float]]:
        target = 1.0 + self.tasks.index(name)
        return [{"accuracy": 1 - abs(float(state["w"][0]) - target) / 100}]


def test_lost_accuracy_is_that_of_the_tasks_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = {"_pretrained_": {"w": torch.zeros(2)}}
    pool |= {name: {"w": torch.full((2,), 1.0 + i)} for i, name in enumerate("abc")}
    monkeypatch.setattr(stress, "confident_lengths", lambda *_: LENGTHS)
    monkeypatch.setattr(
        stress,
        "tuned",
        lambda name, *_: algorithm_class(get_method(name).algorithm)(scaling_factor=1.0),
    )
    found = stress.stress(ModelPool(pool), Tasks(), ["task_arithmetic"], "c")  # type: ignore[arg-type]
    row = found["methods"]["task_arithmetic"]
    assert found["task"] == "c" and found["lengths"] == LENGTHS

    def accuracy(w: float, number: int = 3) -> float:
        return sum(1 - abs(w - target) / 100 for target in range(1, number + 1)) / number

    plain, normalised = row["plain"]["perturbed"], row["normalised"]["perturbed"]
    assert plain["norm x10"]["lost"] == pytest.approx(accuracy(6) - accuracy(33))
    mean = (1 + 2 + 30) / 3  # the norm of each, in multiples of sqrt(2)
    assert normalised["norm x10"]["lost"] == pytest.approx(accuracy(6) - accuracy(3 * mean))
    assert plain["2 vectors"]["lost"] == pytest.approx(accuracy(6, 2) - accuracy(3, 2))
    assert set(plain["2 vectors"]["top1"]) == {"a", "b"}
    assert plain["1 vector"]["lost"] == pytest.approx(accuracy(6, 1) - accuracy(1, 1))
    assert set(plain) == set(perturbations(3))
    assert "only in the first: w" in plain["missing tensor"]["refused"]
    text = stress.tables(found)
    lost = 100 * (accuracy(6) - accuracy(33))
    assert f" {lost:.1f} |" in text and text.count("refused") == 2 and "-0.0" not in text
    header = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
    assert header == ["method", "accuracy, %", *perturbations(3)]


def test_the_lengths_of_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose largest probability is 1/2 at 0, 2/3 at 1, and highest at 2."""
    shares = {0.0: 0.5, 1.0: 0.7}

    def logits(_e: Any, _n: str, _t: Any, lengths: list[float], validation: bool) -> Iterator[Any]:
        assert validation
        for _ in range(2):  # batches
            for i, length in enumerate(lengths):
                share = shares.get(length, 0.95 - 0.1 * abs(length - 2))
                share = 0.5 + 0.2 * length if 0 < length < 1 else share
                row = torch.tensor([[share, 1 - share]]).log()
                yield i, row.expand(3, 2), torch.zeros(3, dtype=torch.long)

    monkeypatch.setattr(stress, "difference", lambda *_: {})
    tasks = SimpleNamespace(encoder=lambda *_: None, logits=logits)
    found = stress.confident_lengths(ModelPool(pool_of(1)), tasks, "a")  # type: ignore[arg-type]
    assert found == {"over": 2.0, "under": 0.5}


def test_default_methods_merge_any_number_of_models() -> None:
    names = stress.default_methods()
    assert {"task_arithmetic", "ties", "tsv_m", "karcher"} <= set(names)
    assert not {"slerp", "dummy", "weighted_average"} & set(names)
    pool = {
        name: {f"blocks.{i}.{key}": value + i for key, value in state.items() for i in range(2)}
        for name, state in pool_of(3).items()
    }
    for name in names:
        algorithm_class(get_method(name).algorithm)(plugins=["normalise"]).run(pool)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods=best"], "unknown merging method 'best'; choose from"),
        (["--task=DTD"], "unknown task 'DTD'; choose from"),
        (["--no-such-flag=1"], "--no-such-flag"),
        (["--save=nowhere"], "finetune"),
    ],
)
def test_other_words_are_explained(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = merge.main(["stress", f"--results={tmp_path}", *words])
    except SystemExit as stopped:
        code = int(str(stopped.code))
    assert code == 2
    assert message in capsys.readouterr().err


class Tied(nn.Module):
    """A table of words that is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.dense = nn.Embedding(10, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.words.weight


@pytest.mark.parametrize("label", perturbations(2))
def test_tied_weights_stay_tied(label: str) -> None:
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"_pretrained_": Tied()}
    for name in ("a", "b"):
        models[name] = copy.deepcopy(models["_pretrained_"])
        for value in models[name].parameters():
            value.data.add_(0.1 * torch.randn_like(value))
    own = Subject(ModelPool(models), "a", LENGTHS)
    assert own.floating() == ["words.weight", "dense.weight", "dense.bias"]
    if label == "missing tensor":
        return
    for weights in PERTURBATIONS[label](own).values():
        assert torch.equal(weights.read("words.weight"), weights.read("head.weight"))


def test_methods_that_need_images_are_refused_before_the_work() -> None:
    tasks: Any = None  # not reached
    with pytest.raises(UsageError, match="lot merges by images of the tasks; expected methods"):
        stress.stress(ModelPool(pool_of(2)), tasks, ["task_arithmetic", "lot"], "b")


def test_a_method_that_cannot_merge_the_models_is_named_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = {"_pretrained_": {"l.weight": torch.zeros(4, 4)}, "a": {"l.weight": torch.eye(4)}}
    monkeypatch.setattr(stress, "confident_lengths", lambda *_: 1 / 0)
    with pytest.raises(
        UsageError, match=r"consensus_ties cannot merge .*; leave it out: prun_thre_k"
    ):
        stress.stress(ModelPool(pool), Tasks(), ["ties", "consensus_ties"], "a")  # type: ignore[arg-type]
