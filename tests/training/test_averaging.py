"""Averaged iterates, schedules, the recipe that has both, and runs that end early."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.run.run import Run
from tangent_arithmetic.training.averaging import TailMean
from tangent_arithmetic.training.loop import TrainingData, train
from tangent_arithmetic.training.optimizers import OPTIMIZERS
from tangent_arithmetic.training.recipe import Recipe, fast
from tangent_arithmetic.training.schedule import SCHEDULES
from tangent_arithmetic.training.stopping import WATCHED, Stopping
from tests.training.tiny import RECIPE, classifier, continues_exactly, pictures, to_tensor

AVERAGED = replace(RECIPE, schedule="constant", averaging=0.5)


def trained(recipe: Recipe, iterates: list[dict[str, Tensor]] | None = None, **options: Any
) -> dict[str, Tensor]:  # fmt: skip
    """The weights after a run; those after each step are added to `iterates`."""
    model = classifier()

    def keep(parameters: Any, *_: Any) -> None:
        assert iterates is not None
        iterates.append({n: p.detach().clone() for n, p in parameters.items()})

    def adamw(parameters: Any, recipe: Recipe) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS[recipe.optimizer](parameters, recipe)
        if iterates is not None:
            optimizer.register_step_post_hook(functools.partial(keep, parameters))
        return optimizer

    data = TrainingData(pictures(0), to_tensor)
    train(model, data, recipe, optimizer=adamw, **options)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("share", "count"), [(0.5, 6), (0.4, 5), (1.0, 12), (0.01, 1)])
def test_the_weights_are_the_mean_of_the_last_iterates(share: float, count: int) -> None:
    iterates = list[dict[str, Tensor]]()
    found = trained(replace(AVERAGED, averaging=share), iterates)
    assert len(iterates) == 12
    for name, value in found.items():
        mean = torch.stack([one[name].double() for one in iterates[-count:]]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)


def test_without_averaging_they_are_the_last_iterate() -> None:
    iterates = list[dict[str, Tensor]]()
    found = trained(RECIPE, iterates)
    assert all(torch.equal(value, iterates[-1][name]) for name, value in found.items())


def test_the_mean_of_linear_models_has_the_mean_of_their_outputs() -> None:
    iterates, x = list[dict[str, Tensor]](), torch.randn(5, 3, 4, 4).double()
    mean = trained(AVERAGED, iterates)

    def features(weights: dict[str, Tensor]) -> Tensor:
        model = classifier()
        model.load_state_dict({**model.state_dict(), **weights})
        found: Tensor = model.double().image_encoder(x)
        return found.detach()

    outputs = torch.stack([features(one) for one in iterates[-6:]]).mean(0)
    torch.testing.assert_close(features(mean), outputs, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(features(iterates[-1]), outputs, atol=1e-4)


def test_statistics_of_batch_norms_are_averaged_along_with_the_weights(tmp_path: Path) -> None:
    seen = dict[int, Tensor]()

    def run(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.BatchNorm1d(3))
        mean = model.get_buffer("2.running_mean")

        def adamw(parameters: Any, recipe: Recipe) -> torch.optim.Optimizer:
            optimizer = OPTIMIZERS[recipe.optimizer](parameters, recipe)
            done = model.get_buffer("2.num_batches_tracked")
            optimizer.register_step_post_hook(
                lambda *_: seen.update({int(done): mean.detach().clone()})
            )
            return optimizer

        data = TrainingData(pictures(0), to_tensor)
        train(model, data, AVERAGED, optimizer=adamw, **options)
        return dict(model.state_dict())

    continues_exactly(run, tmp_path)
    expected = torch.stack([seen[done] for done in range(7, 13)]).mean(0)
    torch.testing.assert_close(run()["2.running_mean"], expected)
    assert not torch.allclose(expected, seen[12])


@pytest.mark.parametrize("recipe", [AVERAGED, replace(AVERAGED, optimizer="sgd", averaging=1.0)])
def test_an_interrupted_run_continues_exactly(recipe: Recipe, tmp_path: Path) -> None:
    continues_exactly(functools.partial(trained, recipe), tmp_path)


def test_a_mean_of_nothing_leaves_parameters_alone() -> None:
    parameter = nn.Parameter(torch.ones(3))
    average = TailMean({"a": parameter}, 0.0, 10)
    for done in range(1, 11):
        average.update(done)
    average.place()
    assert average.state_dict() == {} and torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize(("share", "steps"), [(1.0, 12), (0.5, 6), (0.25, 3), (0.01, 1)])
def test_a_share_of_the_images_is_a_share_of_the_steps(share: float, steps: int) -> None:
    iterates = list[dict[str, Tensor]]()
    trained(replace(AVERAGED, image_share=share), iterates)
    assert len(iterates) == steps


def test_a_constant_rate_follows_the_warm_up() -> None:
    factor = SCHEDULES["constant"]
    assert [factor(step, 4, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert factor(0, 0, 8) == 1 and factor(0, 9, 2) == 0.5
    assert all(math.isfinite(SCHEDULES[name](0, 0, 1)) for name in SCHEDULES)


def test_a_run_ends_at_its_target_or_when_it_no_longer_gains() -> None:
    values = [0.1, 0.3, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9]

    def steps(**settings: Any) -> tuple[int, list[int]]:
        seen, iterates = list[int](), list[dict[str, Tensor]]()

        def measure(done: int) -> float:
            seen.append(done)
            return values[done - 1]

        stopping = Stopping(measure, **{"checks": 12, **settings})
        trained(RECIPE, iterates, stopping=stopping)
        return len(iterates), seen

    assert steps(checks=0) == (12, [])
    assert steps(checks=WATCHED) == (12, [3, 6, 9])
    assert steps(target=0.5) == (5, [1, 2, 3, 4, 5])
    assert steps(target=0.95) == (12, list(range(1, 12)))
    assert steps(patience=2) == (4, [1, 2, 3, 4])
    assert steps(patience=3)[0] == 12


def test_measurements_are_of_the_mean_once_there_is_one() -> None:
    seen, iterates = dict[int, Tensor](), list[Tensor]()
    model = classifier()
    first = next(p for p in model.parameters() if p.requires_grad)

    def measure(done: int) -> float:
        seen[done] = first.detach().clone()
        return 0.5 + done / 100

    def optimizer(parameters: Any, recipe: Recipe) -> torch.optim.Optimizer:
        found = OPTIMIZERS["adamw"](parameters, recipe)
        found.register_step_post_hook(lambda *_: iterates.append(first.detach().clone()))
        return found

    data, stopping = TrainingData(pictures(0), to_tensor), Stopping(measure, 0.6, checks=12)
    found = train(model, data, AVERAGED, optimizer=optimizer, stopping=stopping)
    assert list(seen) == [7, 8, 9, 10] and found["steps"] == 10 and found["planned"] == 12
    for done, value in seen.items():
        torch.testing.assert_close(value, torch.stack(iterates[6:done]).mean(0))
    assert torch.equal(first, seen[10])


def test_a_run_that_may_end_early_continues_exactly(tmp_path: Path) -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        return trained(
            AVERAGED, stopping=Stopping(lambda done: 0.5, patience=9, checks=12), **options
        )

    continues_exactly(run, tmp_path)


def test_the_fast_recipe_takes_the_place_of_the_tables_but_not_of_flags() -> None:
    run = Run.of(argument(finetuning_mode="linear"))
    plain = run.recipe("MNIST")
    assert plain.schedule == "cosine" and plain.averaging == 0 and plain.image_share == 1
    quick = run.with_(recipe="fast")
    assert quick.recipe("MNIST") == fast(plain, linear=True)
    standard = quick.with_(finetuning_mode="standard")
    assert standard.recipe("MNIST") == fast(plain, linear=False)
    chosen = quick.with_(lr=1e-3, batch_size=5, averaging=0.0, image_share=1.0, epochs=3)
    recipe = chosen.recipe("MNIST")
    assert (recipe.lr, recipe.batch_size, recipe.averaging) == (1e-3, 5, 0)
    assert (recipe.image_share, recipe.epochs, recipe.schedule) == (1, 3, "constant")


def argument(**settings: Any) -> Any:
    return type("Arguments", (), settings)()
