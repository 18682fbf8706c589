"""A parameter with several names (tied weights) counts once and moves under all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.task_vectors import NonLinearTaskVector, TaskVector
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.merging import DareTaskArithmetic, SlerpMergeAlgorithm, TiesMergingAlgorithm
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.tangent.linearized import LinearizedModel


class Tied(nn.Module):
    """Reads and writes with one matrix, as language models do; has a buffer no state dict has."""

    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.middle(self.embed(x))))
        return found


def tied(seed: int) -> Tied:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tied().double()


M0, M1 = tied(0), tied(1)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
PAIRS = zip(M0.parameters(), M1.parameters(), strict=True)
NORM = float(torch.cat([(b - a).detach().flatten() for a, b in PAIRS]).norm())


def from_file() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What reading a file of each gives: equal tensors that share no memory."""
    apart = [{name: value.clone() for name, value in m.state_dict().items()} for m in (M0, M1)]
    return apart[0], apart[1]


def reordered() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts in which the other name comes first."""
    found = [dict(reversed(m.state_dict().items())) for m in (M0, M1)]
    return found[0], found[1]


SOURCES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "modules": lambda: (M0, M1),
    "state dicts": lambda: (M0.state_dict(), M1.state_dict()),
    "linear models": lambda: (LinearizedModel(M0), LinearizedModel(M1, M0)),
    "module and linear model": lambda: (M0, LinearizedModel(M1, M0)),
    "module and file": lambda: (M0, from_file()[1]),
    "module and file without the other name": lambda: (M0, dict(M1.named_parameters())),
    "reordered": reordered,
}
TARGETS: dict[str, Callable[[], Any]] = {
    "module": lambda: M0,
    "state dict": M0.state_dict,
    "file": lambda: from_file()[0],
    "parameters": lambda: {name: value.detach() for name, value in M0.named_parameters()},
    "linear model": lambda: LinearizedModel(M0),
}


def vector(name: str) -> TaskVector:
    return NonLinearTaskVector(*SOURCES[name]())


@pytest.mark.parametrize("name", SOURCES)
def test_a_tied_matrix_counts_once_and_moves_under_both_names(name: str) -> None:
    tau = vector(name)
    assert len(tau.vector) == 3 and len(tau.ties) == 1
    assert float(tau.norm()) == pytest.approx(NORM, rel=1e-12)
    assert float(tau.dot(vector("modules"))) == pytest.approx(NORM**2, rel=1e-12)
    assert float(tau.cosine(vector("reordered"))) == pytest.approx(1.0, rel=1e-12)
    for target in TARGETS.values():
        model = target()
        moved = tau.apply_to(model)
        if isinstance(moved, dict):
            assert moved.keys() == model.keys()
            out = torch.func.functional_call(copy.deepcopy(M0), moved, (X,))  # refuses two values
        else:
            out = moved(X)
        torch.testing.assert_close(out, M1(X), rtol=0, atol=1e-14)
    for start in (M0, LinearizedModel(M0)):
        torch.testing.assert_close(tau.apply_to_linear(start)(X), LinearizedModel(M1, M0)(X))
    for other in SOURCES:
        total = tau + 0.5 * vector(other) - 0.5 * vector("modules")
        assert float(total.norm()) == pytest.approx(NORM, rel=1e-12)
        torch.testing.assert_close(total.apply_to(M0)(X), M1(X), rtol=0, atol=1e-13)


def test_modules_and_linear_models_have_the_same_theta0() -> None:
    assert vector("modules").base_hash == vector("linear models").base_hash


def test_saved_vectors_record_the_other_name(tmp_path: Path) -> None:
    tau = vector("modules")
    tau.save(tmp_path / "tau")
    found = TaskVector.load(tmp_path / "tau")
    assert found.ties == {"head.weight": "embed.weight"}
    moved = found.apply_to(from_file()[0])
    assert moved["head.weight"] is moved["embed.weight"]
    torch.testing.assert_close(moved["head.weight"], M1.head.weight.detach())


def test_checkpoints_record_ties(tmp_path: Path) -> None:
    for name, model in (("zeroshot", M0), ("tuned", M1)):
        save_tensors(tmp_path / name, dict(model.state_dict()), "mlp_backbone")
    tau = TaskVector(tmp_path / "zeroshot", tmp_path / "tuned")
    assert float(tau.norm()) == pytest.approx(NORM, rel=1e-12)
    assert load_checkpoint(tmp_path / "tuned").info["ties"] == {"head.weight": "embed.weight"}


def test_untied_weights_are_two_parameters() -> None:
    untied = from_file()[1]
    untied["head.weight"] = untied["head.weight"] + 1.0
    tau = TaskVector(M0, untied)
    assert len(tau.vector) == 4 and not tau.ties
    moved = tau.apply_to(from_file()[0])
    torch.testing.assert_close(moved["head.weight"], untied["head.weight"])
    message = "embed.weight and head.weight are one parameter"
    for use in (
        lambda: tau.apply_to(M0),
        lambda: tau.apply_to(M0.state_dict()),
        lambda: tau.apply_to_linear(M0),
        lambda: tau + vector("modules"),
        lambda: vector("linear models").dot(tau),
        lambda: statedict.copy_into(copy.deepcopy(M0).state_dict(), untied, "weights"),
    ):
        with pytest.raises(UsageError, match=message):
            use()


class Stateful(nn.Linear):
    """A module with a state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None: ...


def test_extra_state_is_not_a_weight() -> None:
    pre, ft = Stateful(2, 2), Stateful(2, 2)
    tau = TaskVector(pre, ft)
    assert tau.vector.keys() == {"weight", "bias"}
    assert torch.equal(tau.apply_to(pre).bias, (pre.bias + (ft.bias - pre.bias)).detach())
    assert isinstance(DareTaskArithmetic().run({"_pretrained_": pre, "a": ft}), Stateful)


def test_a_moved_state_dict_keeps_its_ties_but_shares_no_memory_with_the_original() -> None:
    theta = M0.state_dict()
    for tau in (vector("modules"), TaskVector(vector={"middle.bias": torch.ones(4)})):
        moved = tau.apply_to(theta)
        assert moved["head.weight"] is moved["embed.weight"]
        assert moved["head.weight"].data_ptr() != M0.head.weight.data_ptr()


@pytest.mark.parametrize(
    "algorithm",
    [
        DareTaskArithmetic(1.0, sparsity_ratio=0.5),
        TiesMergingAlgorithm(1.0, threshold=30),
        TiesMergingAlgorithm(1.0, threshold=30, scope="tensor"),
        SlerpMergeAlgorithm(t=0.3),
    ],
    ids=str,
)
def test_merging_counts_tied_weights_once(algorithm: Any) -> None:
    """The masks and thresholds of a model without the other name."""
    models = {"_pretrained_": M0, "a": M1}
    merged = algorithm.run(models)
    assert merged.head.weight is merged.embed.weight
    once = algorithm.run({name: dict(model.named_parameters()) for name, model in models.items()})
    states = algorithm.run({name: model.state_dict() for name, model in models.items()})
    assert states["head.weight"] is states["embed.weight"]
    for name, value in once.items():
        assert torch.equal(merged.get_parameter(name), value)
        assert torch.equal(states[name], value)
