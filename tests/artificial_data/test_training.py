from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.artificial_data import finetune as finetuning
from tangent_arithmetic.artificial_data import train as training
from tangent_arithmetic.artificial_data.finetune import finetune
from tangent_arithmetic.artificial_data.generate import write_dataset
from tangent_arithmetic.artificial_data.presets import Mode, Recipe
from tangent_arithmetic.artificial_data.train import fit, seeded, train
from tangent_arithmetic.artificial_data.workspace import Workspace
from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts
from tangent_arithmetic.encoders.mlp import BackBone, Head
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.statedict import content_hash, norm, subtract
from tangent_arithmetic.storage.states import RunStates
from tangent_arithmetic.tangent.linearized import linearize

SHORT = Recipe(lr=1e-2, batch_size=8, epochs=3)
NONE = Recipe(lr=1e-2, batch_size=8, epochs=0)


@pytest.fixture
def prepared(workspace: Workspace) -> Workspace:
    """Data sets and base model."""
    for name, spec in workspace.preset.datasets.items():
        write_dataset(workspace, name, spec)
    train(workspace)
    return workspace


def toy() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(50, 5).double(), torch.randint(0, 3, (50,))


def adam(
    loss_of: Callable[[dict[str, Tensor], Tensor], Tensor],
    start: Mapping[str, Tensor],
    count: int,
    recipe: Recipe,
    order: int,
) -> dict[str, Tensor]:
    """Adam, written out (Kingma and Ba, algorithm 1), over the same batches."""
    weights = {name: value.detach().clone() for name, value in start.items()}
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    step = 0
    for epoch in range(recipe.epochs):
        drawn = torch.randperm(count, generator=seeded(order, f"epoch {epoch}"))
        for i in range(0, count - recipe.batch_size + 1, recipe.batch_size):
            rows = drawn[i : i + recipe.batch_size]
            grads = torch.func.grad(lambda w, rows=rows: loss_of(w, rows))(weights)
            step += 1
            for name, grad in grads.items():
                first[name] = 0.9 * first[name] + 0.1 * grad
                second[name] = 0.999 * second[name] + 0.001 * grad**2
                size = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
                weights[name] = weights[name] - recipe.lr * first[name] / (1 - 0.9**step) / size
    return weights


def test_fitting_is_adam_on_cross_entropy() -> None:
    model, x, y = toy()
    start = dict(model.named_parameters())

    def loss_of(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (x[rows],))
        return -logits.log_softmax(1)[torch.arange(len(rows)), y[rows]].mean()

    expected = adam(loss_of, start, 50, SHORT, order=3)
    losses = fit(model, x, y, SHORT, order=3, name="toy")
    assert len(losses) == 3 and losses[-1] < losses[0]
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-9, atol=1e-12)


def test_an_interrupted_run_ends_in_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, x, y = toy()
    recipe, path = replace(SHORT, epochs=5), tmp_path / "toy.safetensors"
    losses = fit(whole, x, y, recipe, order=1, name="toy")

    def stopped(items: Iterable[int], name: str) -> Iterator[int]:
        for epoch in items:
            if epoch == 3:
                raise KeyboardInterrupt
            yield epoch

    part, _, _ = toy()
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(training, "progress", stopped)
        fit(part, x, y, recipe, 1, "toy", RunStates(path, {"seed": 1}, every=1))
    again, _, _ = toy()
    epochs: list[int] = []
    real = training.progress

    def watched(items: Iterable[int], name: str) -> Iterator[int]:
        for epoch in real(items, name):
            epochs.append(epoch)
            yield epoch

    monkeypatch.setattr(training, "progress", watched)
    assert fit(again, x, y, recipe, 1, "toy", RunStates(path, {"seed": 1})) == losses
    assert epochs == [3, 4]
    assert content_hash(again.state_dict()) == content_hash(whole.state_dict())


def test_the_state_of_another_run_is_neither_continued_nor_replaced(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    model, x, y = toy()
    fit(model, x, y, SHORT, 2, "toy", RunStates(path, {"seed": 7}, every=1))
    kept = {state: state.read_bytes() for state in (tmp_path / "toy_resume").iterdir()}
    again, _, _ = toy()
    with pytest.raises(UsageError, match=r"seed was 7, is now 1\. .*by deleting .*toy_resume$"):
        fit(again, x, y, SHORT, 1, "toy", RunStates(path, {"seed": 1}))
    assert {state: state.read_bytes() for state in (tmp_path / "toy_resume").iterdir()} == kept


def test_losses_that_are_not_finite_and_batches_that_are_too_large() -> None:
    model, x, y = toy()
    with pytest.raises(UsageError, match="loss of epoch 1 is not finite"):
        fit(model, x * float("inf"), y, SHORT, 0, "toy")
    with pytest.raises(UsageError, match="50 rows are less than a batch of 51"):
        fit(model, x, y, replace(SHORT, batch_size=51), 0, "toy")
    with pytest.raises(UsageError, match="expected lr >= 0"):
        Recipe(lr=float("nan"), batch_size=1, epochs=1)


def test_backbone_and_head_are_saved_apart_and_kept(
    prepared: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared.backbone().parent
    assert sorted(path.name for path in folder.iterdir()) == [
        "mlp_model.safetensors",
        "mlp_model_head.safetensors",
    ]
    backbone, head = BackBone.load(prepared.backbone()), Head.load(prepared.head())
    x, y = prepared.data("dataset1", "train")
    assert (head(backbone(x)).argmax(1) == y).float().mean() > 0.5  # guessing: 0.25
    monkeypatch.setattr(training, "fit", lambda *_: pytest.fail("trained again"))
    train(prepared)
    with pytest.raises(UsageError, match=r"other settings \(.*lr was 0\.003, is now 0\.01"):
        train(prepared, SHORT)


@pytest.mark.parametrize("mode", ["standard", "linear"])
def test_fine_tuning_starts_from_the_pretrained_backbone(prepared: Workspace, mode: Any) -> None:
    base, start = load_checkpoint(prepared.backbone()), finetune(prepared, "dataset2", NONE, mode)
    assert load_checkpoint(start).hash == load_checkpoint(start).theta0_hash == base.hash
    start.unlink()
    prepared.head("dataset2", mode).unlink()
    moved = load_checkpoint(finetune(prepared, "dataset2", SHORT, mode))
    distance = norm(subtract(moved.theta, base.theta))
    fresh = BackBone(12).state_dict()  # the start in the public code
    assert 0 < distance < 0.5 * norm(subtract(moved.theta, fresh))


def test_training_from_scratch_starts_elsewhere(prepared: Workspace) -> None:
    scratch = load_checkpoint(finetune(prepared, "dataset2", NONE, "scratch"))
    base = load_checkpoint(prepared.backbone())
    assert scratch.theta0_hash is None
    assert norm(subtract(scratch.theta, base.theta)) > norm(base.theta)


def test_a_base_model_that_lacks_a_weight_is_an_error(prepared: Workspace) -> None:
    """In the public code no name fitted, and training went on from random weights."""
    found = load_checkpoint(prepared.backbone())
    theta = {f"layers.{name}": value for name, value in found.theta.items()}
    save_tensors(prepared.backbone(), theta, BackBone.kind, info=found.info)
    with pytest.raises(ValueError, match=r"only in the first: block1\.block\.0\.bias"):
        finetune(prepared, "dataset2", SHORT)


def test_freezing(prepared: Workspace) -> None:
    base = read_facts(prepared.backbone())["hash"]
    head_path = finetune(prepared, "dataset2", SHORT, freeze="backbone")
    assert head_path == prepared.head("dataset2")
    assert not prepared.backbone("dataset2").exists()
    head = read_facts(head_path)
    assert head["theta0_hash"] == base
    for mode in ("standard", "linear"):
        path = finetune(prepared, "dataset2", SHORT, mode, freeze="head")
        assert read_facts(path)["hash"] != base
        assert read_facts(path)["info"]["made"]["head"] == head["hash"]
    assert read_facts(head_path)["hash"] == head["hash"]
    assert not prepared.head("dataset2", "linear").exists()


def test_the_probe_is_trained_on_the_pretrained_features(prepared: Workspace) -> None:
    finetune(prepared, "dataset2", SHORT, freeze="backbone")
    x, y = prepared.data("dataset2", "train")
    head = training.initialized(Head, 0, "head dataset2", input_dim=6, output_dim=3)
    with torch.no_grad():
        features = BackBone.load(prepared.backbone())(x)
    fit(head, features, y, SHORT, 0, "reference")
    probe = Head.load(prepared.head("dataset2")).state_dict()
    assert content_hash(probe) == content_hash(head.state_dict())


@pytest.mark.parametrize("mode", ["linear", "taujp"])
def test_linear_fine_tuning_is_adam_on_the_taylor_expansion(
    mode: Mode, prepared: Workspace
) -> None:
    recipe = Recipe(lr=1e-3, batch_size=40, epochs=1)
    finetune(prepared, "dataset2", SHORT, freeze="backbone")
    path = finetune(prepared, "dataset2", recipe, mode, freeze="head")
    backbone = BackBone.load(prepared.backbone()).double()
    head = Head.load(prepared.head("dataset2")).double()
    x, y = prepared.data("dataset2", "train")
    theta0 = {name: value.detach() for name, value in backbone.named_parameters()}
    f_lin = linearize(lambda w, rows: torch.func.functional_call(backbone, w, (rows,)), theta0)

    others = [prepared.data(n, "train")[0] for n in prepared.preset.tasks if n != "dataset2"]
    steps = itertools.count()

    def loss_of(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(head(f_lin(weights, x[rows].double())), y[rows])
        step = next(steps)
        if mode == "linear":
            return loss
        other = others[step % len(others)]
        drawn = torch.randperm(len(other), generator=seeded(0, f"others {step}"))[:20]
        tau = {name: weights[name] - theta0[name] for name in theta0}
        f0, d = torch.func.jvp(
            lambda w: torch.func.functional_call(backbone, w, (other[drawn].double(),)),
            (theta0,),
            (tau,),
        )[:2]
        size = d.square().sum(1) / f0.square().sum(1)
        return loss + prepared.preset.penalty * size.mean()

    expected = subtract(adam(loss_of, theta0, len(x), recipe, order=0), theta0)
    theta = {name: value.double() for name, value in load_checkpoint(path).theta.items()}
    tau = subtract(theta, theta0)
    assert norm(subtract(tau, expected)) < 1e-2 * norm(expected)  # Adam's first steps are signs


def test_bad_requests(prepared: Workspace, tmp_path: Path) -> None:
    for words, message in [
        (("dataset9", SHORT), "no data set at"),
        (("dataset1", SHORT), "dataset1 is the base model's data set"),
        (("dataset2", SHORT, "lin"), "unknown mode 'lin'"),
        (("dataset2", SHORT, "standard", "heads"), "unknown part to freeze 'heads'; choose from h"),
        (("dataset2", SHORT, "linear", "backbone"), "has no mode"),
        (("dataset2", SHORT, "standard", "head"), "Make it with: .*finetune --dataset=dataset2"),
    ]:
        with pytest.raises(UsageError, match=message):
            finetune(prepared, *words)  # type: ignore[arg-type]
    with pytest.raises(
        MissingFileError, match=r"python -m tangent_arithmetic.artificial_data.train"
    ):
        finetune(Workspace(tmp_path / "empty"), "dataset2", SHORT)
    write_dataset(prepared, "wide", replace(prepared.preset.spec("dataset2"), n_features=20))
    with pytest.raises(UsageError, match="wide has 20 features, expected 12"):
        finetune(prepared, "wide", SHORT)


def test_a_base_model_made_anew_does_not_mix_with_old_fine_tuning(prepared: Workspace) -> None:
    finetune(prepared, "dataset2", SHORT)
    prepared.backbone().unlink()
    prepared.head().unlink()
    train(prepared, SHORT)
    with pytest.raises(UsageError, match=r"other settings \(theta0 was"):
        finetune(prepared, "dataset2", SHORT)


def test_the_commands(prepared: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    root = f"--root={prepared.root}"
    assert training.main([root]) == 0
    words = ["--dataset=dataset2", "--lr=0.01", "--batch-size=16", "--epochs=1", root]
    assert finetuning.main([*words, "--freeze=backbone"]) == 0
    assert finetuning.main([*words, "--freeze=head", "--mode=linear"]) == 0
    assert finetuning.main([*words, "--mode=scratch"]) == 0
    made = read_facts(prepared.backbone("dataset2", "linear"))["info"]["made"]
    assert (made["lr"], made["batch_size"], made["epochs"]) == (0.01, 16, 1)
    assert finetuning.main(["--dataset=dataset1", root]) == 2
