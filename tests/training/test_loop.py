from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.data.loading import BatchPlan, RankBatches, SeededPictures, train_loader
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import DivergedError, UsageError
from tangent_arithmetic.runtime.logs import Tracker
from tangent_arithmetic.runtime.processes import Stopped
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.states import RunStates
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tangent_arithmetic.training.loop import (
    TrainingData,
    check_batch,
    seed_everything,
    step_gradients,
    train,
    unused_parameters,
    wrap_ddp,
)
from tangent_arithmetic.training.objectives import OBJECTIVES, CrossEntropy, Objective, Setting
from tangent_arithmetic.training.optimizers import OPTIMIZERS
from tangent_arithmetic.training.recipe import Recipe
from tangent_arithmetic.training.resume import Snapshots
from tangent_arithmetic.training.schedule import cosine_factor, cosine_lr
from tangent_arithmetic.training.trainable import TRAINABLE, select
from tests.training.tiny import Interrupted, Recording

RECIPE = Recipe(
    lr=1e-2, epochs=2, batch_size=4, num_grad_accumulation=2, warmup_length=3, wd=0.1, ls=0.1
)


def to_tensor(image: Image.Image) -> Tensor:
    """A transform that draws random numbers, as augmentation does."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return x + 0.1 * torch.randn_like(x)


def pictures(count: int = 13) -> ArrayPictures:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return ArrayPictures(images, np.arange(count) % 3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.GELU(), nn.Linear(8, 3))


def trained(recipe: Recipe = RECIPE, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    model = network()
    workers = options.pop("num_workers", 0)
    train(model, TrainingData(pictures(), to_tensor, workers), recipe, seed=seed, **options)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    flat_a, flat_b = (torch.cat([v.flatten() for v in s.values()]) for s in (a, b))
    return float((flat_a - flat_b).norm() / flat_b.norm())


@pytest.mark.parametrize(
    ("step", "warmup", "steps", "expected"),
    [
        (0, 4, 10, 0.25),
        (3, 4, 10, 1.0),
        (4, 4, 10, 1.0),
        (7, 4, 10, 0.5),
        (9, 4, 10, 0.5 * (1 + math.cos(5 * math.pi / 6))),
        (4, 500, 5, 1.0),  # warm-up is clamped to the run
        (0, 0, 1, 1.0),
    ],
)
def test_warm_up_then_half_cosine(step: int, warmup: int, steps: int, expected: float) -> None:
    assert cosine_factor(step, warmup, steps) == pytest.approx(expected)


def test_cosine_lr_needs_one_rate_per_group() -> None:
    optimizer = torch.optim.SGD(network().parameters(), lr=1.0)
    cosine_lr(optimizer, 2.0, 0, 4)(2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="expected 1 learning rates, one per group, got 2"):
        cosine_lr(optimizer, [1.0, 2.0], 0, 4)


def gradients(rank_world: tuple[int, int], linear: bool, accumulate: int = 2) -> dict[str, Tensor]:
    """The gradient of the epoch's last, incomplete step."""
    plan = BatchPlan(13, batch_size=4, num_grad_accumulation=accumulate, seed=0)
    step = plan.steps_per_epoch - 1
    model: nn.Module = network()
    model = LinearizedModel(model) if linear else model
    wrapped = wrap_ddp(model, torch.device("cpu"))
    batches = iter(
        train_loader(pictures(), to_tensor, RankBatches(plan, step, step + 1, *rank_world), 0)
    )
    step_gradients(wrapped, plan, step, batches, torch.device("cpu"), CrossEntropy(0.1))
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_gradient_is_that_of_the_mean_loss_over_the_whole_step() -> None:
    plan = BatchPlan(13, 4, 2, seed=0)
    keys = [key for batch in plan.micro_batches(1) for key in batch]
    assert len(keys) == 5  # one micro-step of 4 and one of 1
    data = SeededPictures(pictures(), to_tensor, seed=0)
    x = torch.stack([data[key][0] for key in keys])
    y = torch.tensor([data[key][1] for key in keys])
    model = network()
    F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
    reference = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert distance(gradients((0, 1), linear=False), reference) < 1e-6


class WithSpare(nn.Module):
    """A network with a layer that its output does not depend on, as a text tower's leftovers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.spare = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.norm(self.net(x))
        return logits


class Shrinking(CrossEntropy):
    """Cross-entropy with a penalty of weights, whose gradient is zero where no image uses them."""

    def penalty(self, model: nn.Module, step: int) -> Tensor:
        return sum(
            ((p * ("spare" not in n)).square().sum() for n, p in model.named_parameters()),
            torch.zeros(()),
        )


class Mixture(nn.Module):
    """Three experts, each for some of the images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.experts = nn.Linear(48, 8), nn.ModuleList(nn.Linear(8, 3) for _ in "abc")

    def forward(self, x: Tensor) -> Tensor:
        rows = (x.flatten(1).sum(1) * 100).long() % len(self.experts)
        hidden, logits = self.first(x.flatten(1)), x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            if (mine := (rows == i).nonzero()[:, 0]).numel():
                logits = logits.index_add(0, mine, expert(hidden[mine]))
        return logits


def mixture(linear: bool) -> dict[str, Tensor]:
    """The mixture's weights after a run in steps of few images."""
    model: nn.Module = LinearizedModel(Mixture()) if linear else Mixture()
    train(model, TrainingData(pictures(16), to_tensor), RECIPE)
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("linear", [False, True])
def test_parameters_that_the_first_images_do_not_use_are_trained(linear: bool) -> None:
    before, after = dict(Mixture().named_parameters()), mixture(linear)
    assert not [name for name, value in before.items() if torch.equal(after[name], value)]


@pytest.mark.parametrize("linear", [False, True])
def test_unused_parameters_are_logged_and_stay(
    linear: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model: nn.Module = LinearizedModel(WithSpare()) if linear else WithSpare()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, logits = unused_parameters(model, torch.randn(2, 3, 4, 4))
    assert logits == 3
    assert [name.rpartition("spare")[2] for name in found] == [".weight", ".bias"]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    after = model.state_dict()  # batch norm has counted nothing
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.training
    with caplog.at_level("INFO", logger="tangent_arithmetic"):
        again: nn.Module = LinearizedModel(WithSpare()) if linear else WithSpare()
        train(
            again,
            TrainingData(pictures(16), to_tensor),
            replace(RECIPE, epochs=1),
            objective=Shrinking(),
        )
    assert "not used by the first two images" in caplog.text and "spare" in caplog.text
    spare = [name for name in before if "spare" in name and name in dict(again.named_parameters())]
    assert spare and all(torch.equal(again.state_dict()[n], before[n]) for n in spare)


def test_same_seed_same_weights_and_another_seed_others() -> None:
    first = trained()
    assert distance(trained(), first) == 0.0
    assert distance(trained(seed=1), first) > 1e-4
    assert distance(trained(num_workers=2), first) == 0.0


def test_training_lowers_the_loss() -> None:
    model = network()
    recipe = Recipe(1e-2, 40, 13, 1, 2, 0.0, 0.0)
    facts = train(model, TrainingData(pictures(), to_tensor), recipe)
    assert facts["last_epoch_loss"] < 0.8 < math.log(3)
    assert facts["steps"] == 40


def states(folder: Path, **made: Any) -> RunStates:
    return RunStates(folder / "finetuned.safetensors", made, every=1)


def interrupted(folder: Path, **made: Any) -> list[Path]:
    """The states of a run that was interrupted after its fourth step, the newest last."""
    with pytest.raises(Interrupted):
        trained(snapshots=Snapshots(states(folder, **made)), tracker=Recording(stop=3))
    return sorted((folder / "finetuned_resume").iterdir())


class WithDropout(nn.Module):
    """A network that draws, and that counts batches in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.norm(self.drop(self.net(x)))
        return logits


@pytest.mark.parametrize("linear", [False, True])
def test_an_interrupted_run_continues_exactly(tmp_path: Path, linear: bool) -> None:
    def trained(**options: Any) -> dict[str, Tensor]:
        plain = WithDropout()
        model: nn.Module = LinearizedModel(plain.eval()) if linear else plain
        recipe = replace(RECIPE, epochs=4)
        train(model, TrainingData(pictures(16), to_tensor), recipe, **options)
        return dict(model.state_dict())

    straight, first, second = Recording(), Recording(stop=3), Recording()
    expected = trained(tracker=straight)
    with pytest.raises(Interrupted):
        trained(snapshots=Snapshots(states(tmp_path)), tracker=first)
    kept = sorted(path.name for path in (tmp_path / "finetuned_resume").iterdir())
    assert kept == ["00000002.safetensors", "00000003.safetensors"]
    torch.manual_seed(99)  # where the generators stand does not matter
    found = trained(snapshots=Snapshots(states(tmp_path)), tracker=second)
    assert first.seen[:3] + second.seen == straight.seen and len(straight.seen) == 8
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _in_two_processes(args: Any) -> None:
    """Runs in each of two processes; ends with a user's mistake."""
    folder, found = Path(args.config.save), dict[str, dict[str, Tensor]]()
    for kind in ("standard", "linear"):
        linear = kind == "linear"
        found[f"{kind} gradients"] = gradients((ddp.rank(), ddp.world_size()), linear)
        found[f"{kind} mixture"] = mixture(linear)
        plain = WithSpare()
        plain.net.get_submodule("1").requires_grad_(False)
        spare: nn.Module = LinearizedModel(plain) if linear else plain
        data, recipe = TrainingData(pictures(16), to_tensor), replace(RECIPE, epochs=1)
        train(spare, data, recipe, objective=Shrinking())
        found[f"{kind} spare"] = dict(spare.state_dict())
        for run, stop in (("straight", None), ("interrupted", 5), ("resumed", None)):
            model: nn.Module = LinearizedModel(network()) if linear else network()
            kept = None if run == "straight" else Snapshots(states(folder / kind))
            recipe, tracker = replace(RECIPE, epochs=4), Recording(stop)
            with contextlib.suppress(Interrupted):
                data = TrainingData(pictures(16), to_tensor)
                train(model, data, recipe, snapshots=kept, tracker=tracker)
            found[f"{kind} {run}"] = dict(model.state_dict())
            found[f"{kind} {run} steps"] = {"steps": torch.tensor(len(tracker.seen))}
    torch.save(found, folder / f"{ddp.rank()}.pt")
    assert ddp.all_sum(torch.tensor([ddp.rank() + 1.0])).item() == 3.0
    raise UsageError("no such thing; try another")


def test_two_processes(tmp_path: Path) -> None:
    """Gradients of one process, unused parameters, exact resume, and errors without a trace."""
    with pytest.raises(UsageError, match=r"^no such thing; try another$"):
        start(_in_two_processes, Config(save=str(tmp_path), world_size=2, port=12401))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    initial = dict(network().named_parameters())
    for kind in ("standard", "linear"):
        alone = gradients((0, 1), linear=kind == "linear")
        for found in ranks:
            assert found[f"{kind} gradients"].keys() == alone.keys()
            assert distance(found[f"{kind} gradients"], alone) < 1e-5
            straight, resumed = (found[f"{kind} {run}"] for run in ("straight", "resumed"))
            assert all(torch.equal(resumed[name], straight[name]) for name in straight)
            assert found[f"{kind} resumed steps"]["steps"] == 3  # of 8
        one, other = (found[f"{kind} spare"] for found in ranks)
        shared = [n for n in one if "running" not in n and "num_batches" not in n]
        assert all(torch.equal(one[name], other[name]) for name in shared)
        assert torch.equal(one["spare.weight"], WithSpare().spare.weight)
        assert torch.equal(one["net.1.weight"], initial["1.weight"])
        assert not torch.equal(one["net.3.weight"], initial["3.weight"])
        one, other = (found[f"{kind} mixture"] for found in ranks)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert distance(one, mixture(linear=kind == "linear")) < 1e-4
    assert ddp.world_size() == 1 and ddp.is_main_process()


def test_the_state_of_other_settings_is_neither_continued_nor_replaced(tmp_path: Path) -> None:
    kept = {p: p.read_bytes() for p in interrupted(tmp_path, lr=1, split={"train": "a"})}
    with pytest.raises(
        UsageError,
        match=r"00000003.safetensors is the state of an interrupted run with other settings: "
        r"head was not recorded, is now b; lr was 1, is now 2; split train was a, is now c\. "
        r".* or start anew by deleting .*finetuned_resume \(--restart does that\)$",
    ):
        other = {"lr": 2, "split": {"train": "c"}, "head": "b"}
        flagged = RunStates(tmp_path / "finetuned.safetensors", other, 1, "--restart")
        trained(snapshots=Snapshots(flagged))
    folder = tmp_path / "finetuned_resume"
    assert {path: path.read_bytes() for path in folder.iterdir()} == kept
    states(tmp_path).clear()
    again = trained(seed=1, snapshots=Snapshots(states(tmp_path, lr=2)))
    assert distance(again, trained(seed=1)) == 0.0


def test_a_state_of_more_processes_is_continued_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = interrupted(tmp_path)[-1]
    found = load_checkpoint(newest)
    found.info["facts"]["processes"] = 8
    save_tensors(newest, found.theta, found.kind, info=found.info)
    trained(snapshots=Snapshots(states(tmp_path)))
    assert "processes was 8, is now 1: the weights will equal" in caplog.text


@pytest.mark.parametrize("lr", [1e36, 1e30])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, lr: float) -> None:
    model, recipe = network(), replace(RECIPE, lr=lr, warmup_length=0, epochs=1, wd=1e10)
    snapshots = Snapshots(RunStates(tmp_path / "finetuned.safetensors", {}, every=1))
    plan = replace(recipe, batch_size=13, num_grad_accumulation=1)  # the whole set in one step
    with pytest.raises(DivergedError, match=r"weights are not finite after step 1.*lower --lr"):
        train(model, TrainingData(pictures(), to_tensor), plan, snapshots=snapshots)
    assert not list(tmp_path.rglob("*.safetensors"))


def masked(persistent: bool) -> nn.Module:
    model = network()
    model.register_buffer("causal", torch.full((4, 4), -torch.inf).triu(1), persistent)
    return model


def test_infinite_numbers_of_an_attention_mask_do_not_end_a_run(tmp_path: Path) -> None:
    data, snapshots = TrainingData(pictures(), to_tensor), Snapshots(states(tmp_path))
    train(masked(persistent=False), data, RECIPE, snapshots=snapshots)
    with pytest.raises(UsageError, match=r"infinity in causal; .* persistent=False"):
        train(masked(persistent=True), data, RECIPE)


def test_a_damaged_state_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = interrupted(tmp_path)[-1]
    content = bytearray(last.read_bytes())
    content[-5] ^= 16
    last.write_bytes(content)
    with caplog.at_level("INFO", logger="tangent_arithmetic"):
        assert distance(trained(snapshots=Snapshots(states(tmp_path))), trained()) == 0.0
    assert f"{last} is damaged" in caplog.text and "continuing after step 2" in caplog.text


class SignallingRun(Tracker):
    """Sends this process a signal in the second step, as a cluster does."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if step == 1:
            os.kill(os.getpid(), self.signum)
        assert step is not None and step <= 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_after_the_step_and_keeps_its_state(
    tmp_path: Path, signum: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunStates(tmp_path / "finetuned.safetensors", {}, every=-1)
    before = signal.getsignal(signum)
    with pytest.raises(Stopped) as stopped:
        trained(snapshots=Snapshots(folder), tracker=SignallingRun(signum))
    assert stopped.value.code == 128 + signum and signal.getsignal(signum) is before
    assert "stopped after step 2 of 4" in caplog.text
    assert [p.name for p in folder.folder.iterdir()] == ["00000002.safetensors"]
    assert distance(trained(snapshots=Snapshots(folder)), trained()) == 0.0


def test_a_batch_that_cannot_be_shared_is_refused_with_sizes_that_can() -> None:
    check_batch(12, 3)
    with pytest.raises(
        UsageError,
        match=r"32 images cannot be shared by 3 processes; expected --batch-size=30 or "
        r"--batch-size=33 .* that divides 32: 1, 2, 4, 8, 16, 32$",
    ):
        check_batch(32, 3)
    with pytest.raises(UsageError, match=r"expected --batch-size=3 \("):
        check_batch(2, 3)


@pytest.mark.parametrize("linear", [False, True])
def test_bf16_trains_near_float32_with_float32_weights(linear: bool) -> None:
    moved, losses = {}, {}
    for precision in ("fp32", "bf16"):
        casting: set[bool] = set()
        model: nn.Module = LinearizedModel(network()) if linear else network()
        model.register_forward_pre_hook(
            lambda *_, seen=casting: seen.add(torch.is_autocast_enabled("cpu"))
        )
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        recipe = replace(RECIPE, precision=precision)
        facts = train(model, TrainingData(pictures(), to_tensor), recipe)
        assert casting == {precision == "bf16"} and facts["recipe"]["precision"] == precision
        assert all(p.dtype == torch.float32 for p in model.parameters())
        losses[precision] = facts["last_epoch_loss"]
        moved[precision] = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    assert 0 < (moved["bf16"] - moved["fp32"]).norm() < 0.1 * moved["fp32"].norm()
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_snapshots_come_every_so_many_steps() -> None:
    seen: list[int] = []
    trained(snapshots=Snapshots(every=2, save=seen.append))
    assert seen == [2, 4]


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(tmp_path: Path) -> None:
    model, poisoned = network(), pictures()

    def transform(image: Image.Image) -> Tensor:
        x = to_tensor(image)
        return x if x.mean() < threshold else x * float("inf")

    plan = BatchPlan(13, 4, 2, seed=0)
    data = SeededPictures(poisoned, to_tensor, seed=0)
    means = [
        max(float(data[key][0].mean()) for batch in plan.micro_batches(step) for key in batch)
        for step in range(4)
    ]
    threshold = max(means[:2]) + 1e-6  # the first epoch stays below
    bad = next(step for step, mean in enumerate(means) if mean > threshold)
    snapshots = Snapshots(states(tmp_path))
    with pytest.raises(
        DivergedError,
        match=rf"loss is (nan|inf) at step {bad} \(epoch 1, batch of \d images: image \d+ of "
        r"ArrayPictures, .*The weights before this step are in .*finetuned_resume.*lower --lr",
    ):
        train(model, TrainingData(poisoned, transform), RECIPE, snapshots=snapshots)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    kept = snapshots.states.newest() if snapshots.states else None
    assert kept is not None and kept.done == bad
    assert torch.equal(kept.tensors["params/1.weight"], model[1].weight)  # type: ignore[index]


class Focal(Objective):
    """A loss that counts its calls, and whose weight decays with the count (its state)."""

    def __init__(self, by_image: bool = True) -> None:
        self.by_image, self.calls = by_image, torch.zeros(())

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        self.calls += 1
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        focal = (1 - (-losses).exp()) ** 2 * losses / self.calls + step
        return focal if self.by_image else focal.mean()

    def state_dict(self) -> dict[str, Tensor]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Any) -> None:
        self.calls = state["calls"].clone()


class Failing(Focal):
    """Returns NaN in the second step while it is armed."""

    def __init__(self, armed: bool) -> None:
        super().__init__()
        self.armed = armed

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        losses = super().loss(model, batch, step)
        return losses * math.nan if self.armed and step == 1 else losses


def test_a_run_continues_from_before_the_step_that_failed(tmp_path: Path) -> None:
    def run(armed: bool, **options: Any) -> dict[str, Tensor]:
        model, data = WithDropout(), TrainingData(pictures(16), to_tensor)
        train(model, data, RECIPE, objective=Failing(armed), **options)
        return dict(model.state_dict())

    kept = RunStates(tmp_path / "finetuned.safetensors", {}, every=-1)
    with pytest.raises(DivergedError, match="loss is nan at step 1"):
        run(True, snapshots=Snapshots(kept))
    found, expected = run(False, snapshots=Snapshots(kept)), run(False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Counting(torch.optim.SGD):
    """SGD with momentum whose state holds Python numbers, per parameter and per group."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["share"] = state.get("share", 1.0) / 3.0  # not exact in float32
                parameter.grad.mul_(state["share"] + 1 / group["count"])
        return super().step(closure)


@pytest.mark.parametrize("linear", [False, True])
def test_registered_objectives_and_optimizers_train_and_resume_exactly(
    tmp_path: Path, linear: bool
) -> None:
    OBJECTIVES.register("focal")(lambda setting: Focal())

    @OPTIMIZERS.register("counting")
    def counting(parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> Counting:
        biases = [p for name, p in parameters.items() if name.endswith("bias")]
        weights = [p for name, p in parameters.items() if not name.endswith("bias")]
        groups: list[dict[str, Any]] = [{"params": biases, "lr": 0.3}, {"params": weights}]
        return Counting(groups, lr=recipe.lr, momentum=0.9)

    def run(**options: Any) -> dict[str, Tensor]:
        model: nn.Module = LinearizedModel(network()) if linear else network()
        objective, optimizer = OBJECTIVES["focal"](Setting(RECIPE)), OPTIMIZERS["counting"]
        data = TrainingData(pictures(), to_tensor)
        train(model, data, RECIPE, objective=objective, optimizer=optimizer, **options)
        return dict(model.state_dict())

    try:
        expected = run()
        with pytest.raises(Interrupted):
            run(snapshots=Snapshots(states(tmp_path)), tracker=Recording(stop=2))
        second = Recording()
        found = run(snapshots=Snapshots(states(tmp_path)), tracker=second)
        assert [step for step, _ in second.seen] == [2, 3]
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert not torch.equal(found["1.weight"], trained()["1.weight"])
    finally:
        del OBJECTIVES["focal"], OPTIMIZERS["counting"]
    with pytest.raises(UsageError, match=r"unknown objective 'focal'; choose from .*supervised"):
        OBJECTIVES["focal"]


def test_losses_of_images_and_their_mean_are_the_same_objective() -> None:
    each, mean = (trained(objective=Focal(by_image)) for by_image in (True, False))
    assert distance(mean, each) < 1e-5 and distance(each, trained()) > 1e-3
    assert distance(trained(objective=OBJECTIVES["supervised"](Setting(RECIPE))), trained()) == 0.0

    class Wrong(Objective):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
            return torch.as_tensor(model(batch[0]))

    with pytest.raises(ValueError, match=r"returns 4 losses, .* got shape \(4, 3\)"):
        trained(objective=Wrong())


class Block(nn.Module):
    """A layer of a transformer, in small."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x.flatten(2).mT))
        logits: Tensor = self.head((y + self.attn(y, y, y, need_weights=False)[0]).mean(1))
        return logits


ATTENTION = {f"attn.{name}" for name in ("in_proj_weight", "out_proj.weight")}
BIASES = {f"{part}.bias" for part in ("embed", "attn.out_proj", "head")} | {"attn.in_proj_bias"}
CHOICES = {
    "all": ATTENTION | BIASES | {"embed.weight", "norm.weight", "head.weight"},
    "attention": ATTENTION | {"attn.in_proj_bias", "attn.out_proj.bias"},
    "norm_and_bias": BIASES | {"norm.weight"},
}


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("choice", "names"), CHOICES.items())
def test_only_the_selected_parameters_are_trained(
    choice: str, names: set[str], linear: bool
) -> None:
    torch.manual_seed(0)
    block = Block()
    model: nn.Module = LinearizedModel(block) if linear else block
    model.get_parameter("norm.bias").requires_grad_(False)  # frozen before: stays frozen
    select(model, TRAINABLE[choice])
    before = {name: value.clone() for name, value in model.named_parameters()}
    tokens = TrainingData(pictures(16), lambda image: to_tensor(image).reshape(12, 4))
    train(model, tokens, replace(RECIPE, epochs=1))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == names
    with pytest.raises(ValueError, match="expected trainable parameters in"):
        select(model, lambda name, modules: False)


def test_seed_everything_seeds_all_generators() -> None:
    import random

    def draw() -> tuple[float, float, float]:
        seed_everything(5)
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    assert draw() == draw()


def test_a_choice_of_parameters_that_nothing_depends_on_is_refused() -> None:
    model = nn.Linear(4, 3).requires_grad_(False)
    model.unused = nn.Linear(4, 3)
    with pytest.raises(UsageError, match=r"depend on none of the .*frozen .*without gradients"):
        unused_parameters(model, torch.randn(2, 4))
