"""The ridge's strength by cross-validation, and few images a class."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tangent_arithmetic.arithmetic.solving import ridge as ridge_module
from tangent_arithmetic.arithmetic.solving.combining import Settings, combine_linear
from tangent_arithmetic.arithmetic.solving.losses import Term, cross_entropy
from tangent_arithmetic.arithmetic.solving.ridge import RIDGES, cross_validated, fold_of
from tangent_arithmetic.arithmetic.solving.shots import few, shot_indices
from tangent_arithmetic.arithmetic.solving.solver import Objective, minimum, solve
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.runtime.errors import UsageError
from tests.arithmetic.solving.problems import DIRECTIONS, reduced
from tests.arithmetic.tiny import CLASSES, pictures

CENTRE = np.full(DIRECTIONS, 0.1)


def terms(images: int = 60) -> list[Term]:
    return [Term(reduced(seed, images=images), cross_entropy, 0.5) for seed in (0, 1)]


def test_the_strength_with_the_lowest_loss_on_images_left_out() -> None:
    found = cross_validated(terms(), CENTRE)
    assert [row[0] for row in found.table] == sorted(RIDGES, reverse=True)
    losses = {ridge: loss for ridge, loss, _ in found.table}
    assert losses[found.ridge] == min(losses.values()) < losses[math.inf]
    assert found.solution.objective < found.solution.start
    again = cross_validated(terms(), CENTRE)  # the same on a rerun
    assert again.solution.coefficients.tolist() == found.solution.coefficients.tolist()
    assert again.table == found.table
    facts = found.facts()
    assert facts["cross_validation"][0]["ridge"] == "inf" and facts["ridge"] == found.ridge


def test_the_loss_left_out_is_that_of_solutions_on_the_other_folds() -> None:
    ridge, (whole,) = 0.3, terms()[:1]
    found = cross_validated([whole], CENTRE, [ridge], folds=3, seed=5)
    folds, losses = fold_of(whole.reduced.labels.numpy(), 3, 5), []
    for fold in range(3):
        kept, rest = (
            Term(whole.reduced.take(np.flatnonzero(chosen).tolist()), cross_entropy, 0.5)
            for chosen in (folds != fold, folds == fold)
        )
        norms = [kept.reduced.norms(CENTRE)]  # fixed at the uniform point
        alone, _, _ = minimum(Objective([kept], CENTRE, ridge), CENTRE, norms)
        losses.append(rest.value(alone, rest.reduced.norms(CENTRE)))
    assert found.table[0][1] == pytest.approx(np.mean(losses), abs=1e-6)
    assert found.table[0][2] == pytest.approx(np.std(losses, ddof=1) / 3**0.5, abs=1e-6)


def test_of_many_images_a_sample_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strength on a third of the images is the prior of a third of it on all."""
    monkeypatch.setattr(ridge_module, "SAMPLE", 40)
    own = terms()
    found = cross_validated(own, CENTRE)
    alone = cross_validated([term.on(slice(None, None, 3)) for term in own], CENTRE)
    assert found.share == pytest.approx(1 / 3) and alone.share == 1
    assert found.table == alone.table and found.ridge == pytest.approx(alone.ridge / 3)
    whole = solve(Objective(own, CENTRE, found.ridge), CENTRE)
    assert found.solution.coefficients.tolist() == whole.coefficients.tolist()


def test_labels_without_any_pattern_give_a_strong_ridge() -> None:
    own = terms(images=16)
    noisy = [replace(t, reduced=replace(t.reduced, labels=torch.randint(4, (16,)))) for t in own]
    strong = cross_validated(noisy, 0 * CENTRE, seed=1).ridge
    assert strong > cross_validated(own, 0 * CENTRE, seed=1).ridge


@pytest.mark.parametrize("bounds", [(0.0, 0.05), (0.3, 1.0), (-0.2, -0.1)])
def test_bounds_hold_where_they_leave_out_the_uniform_point(bounds: tuple[float, float]) -> None:
    for ridge in (None, 0.1, 1e9):
        settings = Settings(ridge=ridge, bounds=bounds)
        found = combine_linear([reduced(0), reduced(1)], 0.2, settings)
        assert found.coefficients.min() >= bounds[0] and found.coefficients.max() <= bounds[1]
        assert np.isfinite(found.facts["objective"])


def test_one_image_a_split_chooses_the_uniform_point() -> None:
    own = [Term(t.reduced.take([0]), cross_entropy, 0.5) for t in terms()]
    found = cross_validated(own, CENTRE)
    assert math.isinf(found.ridge) and found.solution.coefficients.tolist() == CENTRE.tolist()


@pytest.mark.parametrize("several", [False, True])
def test_folds_have_their_share_of_every_class(several: bool) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=103)
    if several:
        labels = (rng.random((103, 3)) < 0.5).astype(np.uint8)
    found = fold_of(labels, 4, 0)
    _, kinds = np.unique(labels, axis=0, return_inverse=True)
    for kind in np.unique(kinds):
        counts = np.bincount(found[kinds.reshape(-1) == kind], minlength=4)
        assert counts.max() - counts.min() <= 1
    assert found.tolist() == fold_of(labels, 4, 0).tolist() != fold_of(labels, 4, 1).tolist()


def test_shots_of_a_split() -> None:
    split = Split("XVal", torch.nn.Identity(), EvalBatches(pictures(), None))
    assert few(split, None, 0) is split
    chosen = few(split, 2, 0)
    assert chosen.num_images == 2 * CLASSES and chosen.whole == len(pictures())
    labels = pictures().labels
    for shots in (1, 2, 3, 100):
        indices = shot_indices(labels, shots, seed=0)
        assert indices == sorted(set(indices))
        expected = np.minimum(np.bincount(labels), shots)
        assert np.bincount(labels[indices]).tolist() == expected.tolist()
        assert set(shot_indices(labels, max(1, shots - 1), seed=0)) <= set(indices)
    assert shot_indices(labels, 1, seed=0) != shot_indices(labels, 1, seed=1)
    with pytest.raises(UsageError, match=r"expected EvalBatches to choose shots from"):
        few(replace(split, batches=[]), 1, 0)
