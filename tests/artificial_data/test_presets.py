from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from sklearn.datasets import make_classification

from tangent_arithmetic.artificial_data.generate import generate
from tangent_arithmetic.artificial_data.presets import PRESETS, get_preset
from tangent_arithmetic.runtime.errors import UsageError


def test_the_readme_preset_is_the_public_readme() -> None:
    datasets = PRESETS["readme"].datasets
    wanted = {
        "dataset1": {"n_samples": 10000, "n_features": 512, "n_classes": 10, "n_informative": 50,
                     "random_state": 42},
        "dataset2": {"n_samples": 8000, "n_features": 512, "n_classes": 15, "n_informative": 60,
                     "random_state": 123},
    }  # fmt: skip
    for name, numbers in wanted.items():
        assert {key: getattr(datasets[name], key) for key in numbers} == numbers
        x, y = make_classification(**{**numbers, "n_samples": 300})
        train, test = generate(replace(datasets[name], n_samples=300))
        both = pd.concat([train, test])
        assert sorted(both["0"]) == sorted(x[:, 0]) and sorted(both["target"]) == sorted(y)
    base, finetuned = PRESETS["readme"].base, PRESETS["readme"].standard
    assert (base.lr, base.batch_size, base.epochs, finetuned.lr) == (1e-3, 32, 100, 1e-4)


def test_seeds_change_the_data_and_nothing_else() -> None:
    zero, one = get_preset("default", 0), get_preset("default", 1)
    assert zero == PRESETS["default"]
    for name in zero.datasets:
        assert zero.spec(name) != one.spec(name)
        assert replace(one.spec(name), random_state=zero.spec(name).random_state) == zero.spec(name)
    assert zero.base == one.base
    with pytest.raises(UsageError, match="unknown preset 'reedme'; choose from readme"):
        get_preset("reedme")
    with pytest.raises(UsageError, match="unknown data set 'dataset9'"):
        zero.spec("dataset9")
