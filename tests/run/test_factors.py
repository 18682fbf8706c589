"""Factors of a run's data sets: collected once, reused by their settings, tied to theta0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tangent_arithmetic.run import factors
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.factors import Sample, factors_of, factors_of_set
from tangent_arithmetic.run.models import zeroshot_encoder
from tangent_arithmetic.run.objectives import method_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError


def run_in(folder: Path, **settings: Any) -> Run:
    small = {"factor_images": 2, "factor_rank": 4, "factor_directions": 2, "device": "cpu"}
    return Run.of(
        Config(
            finetuning_mode="linear+tak",
            tasks=["MNIST", "Letters", "Emoji"],
            save=str(folder),
            **{**small, **settings},
        )
    )


def test_each_set_is_collected_once_and_again_for_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = []
    collect = factors.collect

    def counting(*args: Any, **kwargs: Any) -> Any:
        collected.append(len(args[1]))
        return collect(*args, **kwargs)

    monkeypatch.setattr(factors, "collect", counting)
    run = run_in(tmp_path, others=["Letters", "Emoji"])
    merged = factors_of(run, "MNIST")
    assert collected == [2, 2]
    names = sorted(path.name.rpartition("_")[0] for path in tmp_path.glob("factors_*.safetensors"))
    assert names == ["factors_Emoji", "factors_Letters"]
    again = factors_of(run_in(tmp_path, others=["Letters", "Emoji"]), "MNIST")
    assert collected == [2, 2]
    name = merged.blocks[0].name
    assert torch.equal(merged.factors[name].moments, again.factors[name].moments)
    assert [part["set"] for part in merged.info["merged"]] == ["Letters", "Emoji"]
    factors_of(run_in(tmp_path, others=["Emoji"], factor_images=3), "MNIST")
    assert collected == [2, 2, 3]


def test_by_default_they_are_of_all_other_tasks_and_the_control_set(tmp_path: Path) -> None:
    facts = method_of(run_in(tmp_path), "MNIST")
    assert facts["others"] == ["Letters", "Emoji", "Shapes"]
    assert facts["objective"] == "tak" and facts["factors"] == "ekfac"
    assert facts["factor_images"] == 2 and facts["factor_rank"] == 4


def test_a_file_of_another_theta0_is_refused(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    encoder, theta0_hash = zeroshot_encoder(run)
    factors_of_set(run, "Emoji", encoder, theta0_hash)
    (path,) = tmp_path.glob("factors_*")
    with pytest.raises(UsageError, match=r"a Gauss-Newton matrix belongs to one theta0"):
        factors.load_factors(path, "ab" * 32)


def test_a_sample_is_the_same_whenever_it_is_read(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    pictures = run.data.dataset("EmojiVal").train
    first, second = (Sample(pictures, None, 5, 0) for _ in range(2))
    assert len(first) == 5 and first.indices == second.indices
    assert first.indices != Sample(pictures, None, 5, 1).indices
    assert len(list(first)) == 5
    assert len(Sample(pictures, None, 10**9, 0)) == len(pictures)
