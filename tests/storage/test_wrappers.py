"""Weights in the wrappers of training programs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.unpickler import read_pickle
from tangent_arithmetic.storage.wrappers import unwrapped


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def lightning(state: Any, prefix: str = "model.") -> dict[str, Any]:
    facts = {"pytorch-lightning_version": "2.4.0", "epoch": 3, "callbacks": {"best": Path("x")}}
    return {**facts, "state_dict": under(prefix, state), "hyper_parameters": {"lr": 0.1}}


def others(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in state.items()}


Wrap = Callable[[Mapping[str, Tensor]], Any]
WRAPPERS: dict[str, tuple[Wrap, tuple[str, ...]]] = {  # a wrapper, and words of the log
    "nothing": (dict, ()),
    "facts beside it": (lambda s: {**s, "epoch": 3, "args": None}, ()),
    "a key": (lambda s: {"state_dict": s, "epoch": 3}, ("'state_dict'",)),
    "a key of torch's tutorials": (
        lambda s: {"epoch": 1, "loss": torch.ones(()), "model_state_dict": s},
        ("'model_state_dict'",),
    ),
    "a module": (lambda s: {"model": with_state(s), "optimizer": {"state": {}}}, ("'model'",)),
    "DDP": (lambda s: under("module.", s), ("module.",)),
    "compile": (lambda s: compiled(s).state_dict(), ("torch.compile",)),
    "a compiled part": (
        lambda s: {name.replace("0.", "0._orig_mod."): value for name, value in s.items()},
        ("torch.compile",),
    ),
    "DDP of compile": (lambda s: under("module._orig_mod.", s), ("torch.compile", "module.")),
    "compile of DDP": (lambda s: under("_orig_mod.module.", s), ("torch.compile", "module.")),
    "FSDP": (lambda s: under("_fsdp_wrapped_module.", s), ("FSDP",)),
    "Lightning": (lightning, ("'state_dict'", "model.")),
    "Lightning, net": (lambda s: lightning(s, "net."), ("net.",)),
    "Lightning of compile": (lambda s: lightning(s, "model._orig_mod."), ("torch.compile",)),
    "open_clip": (
        lambda s: {"epoch": 1, "state_dict": under("module.", s), "optimizer": {"state": {}}},
        ("'state_dict'", "module."),
    ),
    "a model and its average": (
        lambda s: {"model": s, "ema": others(s)},
        ("'model' (not 'ema', also present)",),
    ),
    "timm": (
        lambda s: {"arch": "x", "state_dict": s, "state_dict_ema": others(s)},
        ("not 'state_dict_ema'",),
    ),
    "an average alone": (lambda s: {"model_ema": s, "step": 3}, ("'model_ema' (an average",)),
    "torch's average": (lambda s: AveragedModel(with_state(s)).state_dict(), ("module.",)),
    "in each other": (
        lambda s: {"model": {"state_dict": {"module": under("module.", s)}}},
        ("'model'", "'state_dict'", "'module'", "module."),
    ),
    "configurations under known keys": (
        lambda s: {"model": {"name": "x"}, "net": "y", "state_dict": s},
        ("'state_dict'",),
    ),
}


def compiled(state: Mapping[str, Tensor]) -> Any:
    return torch.compile(with_state(state))


def with_state(state: Mapping[str, Tensor]) -> nn.Module:
    found = model()
    found.load_state_dict(state)
    return found


SLOW = pytest.mark.slow  # imports much


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[SLOW] if n == "compile" else []) for n in WRAPPERS]
)
def test_known_wrappers_are_removed_and_logged(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    wrap, words = WRAPPERS[name]
    theta0, theta = model(0).state_dict(), model(1).state_dict()
    content = wrap(theta)
    found = unwrapped(content, "the file")
    assert found.tensors.keys() == theta.keys()
    assert all(torch.equal(found.tensors[key], theta[key]) for key in theta)
    assert len(caplog.records) == (1 if words else 0)
    assert all(each in caplog.text for each in words)
    vector, plain = TaskVector(theta0, content), TaskVector(theta0, theta)
    assert vector.vector.keys() == plain.vector.keys()
    assert all(torch.equal(vector.vector[key], plain.vector[key]) for key in plain.vector)
    if name != "a module":
        torch.save(content, tmp_path / "file.pt")
        again = unwrapped(read_pickle(tmp_path / "file.pt"), tmp_path / "file.pt")
        assert all(torch.equal(again.tensors[key], theta[key]) for key in theta)


def test_other_entries_of_a_file_do_not_matter(tmp_path: Path) -> None:
    inner, path = model(), tmp_path / "last.ckpt"
    optimizer = torch.optim.AdamW(inner.parameters())
    inner(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    facts = {"best": np.float64(0.5), "folder": tmp_path, "rng": torch.get_rng_state()}
    states = {"state_dict": inner.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**facts, **states}, path)
    found = unwrapped(read_pickle(path)).tensors
    assert all(torch.equal(found[key], value) for key, value in inner.state_dict().items())


@pytest.mark.parametrize("name", ["nothing", "DDP", "facts beside it", "a key", "torch's average"])
def test_vectors_are_applied_to_wrapped_states_under_their_names(name: str) -> None:
    theta0, theta = model(0).state_dict(), model(1).state_dict()
    content = WRAPPERS[name][0](theta0)
    vector = TaskVector(content, WRAPPERS[name][0](theta))
    moved = vector.apply_to(content)
    names = unwrapped(content).names
    assert set(moved) == set(names.values())
    expected = vector.apply_to(theta0)
    assert all(torch.equal(moved[given], expected[own]) for own, given in names.items())


def test_derivatives_go_through_a_state_with_other_entries() -> None:
    theta0 = model(0).state_dict()
    vector = TaskVector(theta0, model(1).state_dict())

    def length(weight: Tensor) -> Tensor:
        state: dict[str, Any] = {**theta0, "0.weight": weight, "epoch": 3}
        moved = vector.apply_to(state)
        return (moved["0.weight"] ** 2).sum()

    found = torch.func.grad(length)(theta0["0.weight"])
    torch.testing.assert_close(found, 2 * (theta0["0.weight"] + vector.vector["0.weight"]))


def test_names_of_the_module_itself_are_kept() -> None:
    """`model.` is a wrapper's prefix in Lightning's files alone; `visual.` never is."""
    state = under("model.visual.", model().state_dict())
    assert unwrapped(state).tensors.keys() == state.keys()
    assert set(unwrapped(lightning(state, "")).tensors) == set(
        under("visual.", model().state_dict())
    )


ONE = torch.ones(1)
LORA = {"weight": torch.ones(2, 2)}
CYCLE: dict[str, Any] = {}
CYCLE["model"] = CYCLE
REFUSED: dict[str, tuple[Any, str]] = {
    "no mapping": (3, "holds a int, expected named tensors"),
    "nothing": ({}, "its values are not tensors; it holds nothing"),
    "no tensors": ({"epoch": 3, "\x1b[31m": 1}, r"it holds epoch, \\x1b\[31m"),
    "arrays": ({"weight": np.ones(2)}, "it holds weight"),
    "unknown keys": ({"a": LORA, "b": LORA}, "tensors lie under a, b: pass one of these"),
    "a cycle": (CYCLE, "is not a state dict"),
    "PEFT": (under("base_model.model.x.lora_A.", LORA), "is a LoRA adapter.*merge_and_unload"),
    "PEFT, loaded": (under("x.lora_B.default.", LORA), "is a LoRA adapter"),
    "in a wrapper": ({"state_dict": under("base_model.model.x.", LORA)}, "is a LoRA adapter"),
    "LoHa": ({"x.hada_w1_a": torch.ones(1)}, "is a LoRA adapter"),
    "kohya": (under("lora_te_text_model.lora_down.", LORA), "is a LoRA adapter"),
    "one name twice": ({"a.x": ONE, "a._orig_mod.x": ONE}, "names coincide without _orig_m"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_content_without_a_model_is_refused(case: str) -> None:
    content, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        unwrapped(content, "it")
    if isinstance(content, Mapping):
        with pytest.raises(UsageError, match=message):
            TaskVector(model().state_dict(), content)


def test_the_content_itself_does_not_change() -> None:
    content = lightning(under("module.", model().state_dict()))
    before = copy.deepcopy(content)
    unwrapped(content)
    assert content.keys() == before.keys()
    assert content["state_dict"].keys() == before["state_dict"].keys()
