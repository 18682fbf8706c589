"""Checkpoints of encoders with tied weights: a parameter under two names is merged once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tangent_arithmetic.encoders.backbones.encoder import BackboneEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.merging import METHODS, ModelPool, algorithm_class
from tangent_arithmetic.merging.weights import open_weights
from tests.merging.small import Data, small_data

FIRST, FURTHER = "blocks.0.hidden.weight", "blocks.1.hidden.weight"
OPTIONS: dict[str, dict[str, Any]] = {
    "weighted_average": {"weights": [0.3, 0.7]},
    "layer_wise_adamerging": {"max_steps": 2, "batch_size": 4},
    "task_wise_adamerging": {"max_steps": 2, "batch_size": 4},
    "prodistill": {"epochs": 2, "batch_size": 4},
    "wudi": {"iter_num": 2},
}
MODULE = """\
import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x[:, :, :2, :2].flatten(1))))


build = Tied
"""


@pytest.fixture
def data() -> Data:
    """Two models whose two blocks share a weight, with images."""
    data = small_data()
    for encoder in data.encoders.values():
        encoder.blocks[1].hidden.weight = encoder.blocks[0].hidden.weight
    return data


@pytest.fixture
def files(data: Data, tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.safetensors" for name in data.encoders}
    for name, path in paths.items():
        data.encoders[name].save(path)
    return paths


@pytest.mark.parametrize("name", sorted(METHODS))
def test_files_give_the_same_as_modules_that_share_the_weight(
    name: str, data: Data, files: dict[str, Path]
) -> None:
    """So thresholds, norms and random masks count it once, and images fit it once."""
    method = METHODS[name]
    plugins = [] if method.needs_data else ["normalise"]
    merger = algorithm_class(method.algorithm)(**OPTIONS.get(name, {}), plugins=plugins)
    names = list(files)[: method.num_models if method.ordered else None]
    expected = merger.run({each: data.pool[each] for each in names}, data)
    assert torch.equal(expected[FIRST], expected[FURTHER])
    found = merger.run({each: files[each] for each in names}, data)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_regmean_plusplus_sees_the_fit_in_the_later_block(data: Data) -> None:
    seen: list[Tensor] = []
    split = data.split

    def watched(encoder: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(encoder.weights()[FURTHER].clone())
        return split(encoder, *args, **kwargs)

    data.split = watched  # type: ignore[method-assign]
    merged = algorithm_class(METHODS["regmean_plusplus"].algorithm)().run(data.pool, data)
    assert torch.equal(seen[-1], merged[FIRST])


def test_prodistill_leaves_the_weight_of_an_earlier_block_as_it_is(data: Data) -> None:
    from tangent_arithmetic.merging.methods.prodistill import Distillation, Settings

    distillation = Distillation(data, Settings(0.3, 8, 0.1, 3, 8, 0))
    first, second = (distillation.distil(block) for block in ("blocks.0", "blocks.1"))
    assert FIRST in first and FURTHER not in second and second
    assert torch.equal(distillation.student.weights()[FURTHER], first[FIRST])


@pytest.mark.parametrize("name", ["task_arithmetic", "dare_task_arithmetic", "della", "dare_ties"])
def test_merged_checkpoints_are_tied_and_load(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tied_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    base = BackboneEncoder("python:tied_models:build")
    places: dict[str, Path] = {}
    for key in ("_pretrained_", "a", "b"):
        encoder, places[key] = copy.deepcopy(base), tmp_path / f"{key}.safetensors"
        with torch.no_grad():
            for p in encoder.parameters() if key != "_pretrained_" else ():
                p.add_(torch.randn_like(p))
        encoder.save(places[key])
    assert open_weights(places["a"]).ties == {"model.b.weight": "model.a.weight"}
    merger = algorithm_class(METHODS[name].algorithm)()
    path = merger.run_to(ModelPool(places), tmp_path / "merged.safetensors")
    checkpoint = load_checkpoint(path)
    assert checkpoint.info["ties"] == {"model.b.weight": "model.a.weight"}
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(BackboneEncoder.load(path)(x), merger.run(places)(x))
