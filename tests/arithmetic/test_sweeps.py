"""Accuracies of one model and of sweeps, in one pass, over one or several processes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.levit import Attention
from torch import Tensor, nn

from src.eval import (
    add_normalized_accuracy,
    eval_single_dataset,
    evaluate,
    evaluate_task_vector,
    evaluate_task_vector_at_coef,
)
from tangent_arithmetic.arithmetic import sweeps
from tangent_arithmetic.arithmetic.coefficients import coefficients, find_optimal_coef, warn_of_ties
from tangent_arithmetic.arithmetic.features import linear_features
from tangent_arithmetic.arithmetic.metrics import nonlinear_advantage
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.arithmetic.task_vectors import (
    LinearizedTaskVector,
    NonLinearTaskVector,
    TaskVector,
)
from tangent_arithmetic.commands import add, analyze, negate
from tangent_arithmetic.commands import evaluate as evaluate_command
from tangent_arithmetic.commands.add import addition_table
from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.encoders.base import Encoder, ModuleEncoder
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.run.models import split_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.tangent.functional import functional_call
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tests.arithmetic.tiny import Convolution, pictures
from tests.small_suite import SIZES, random_vector, small_config, small_suite

Patch = pytest.MonkeyPatch
COEFS = [0.0, 0.4, 1.0]
KINDS: dict[bool, Any] = {True: LinearizedTaskVector, False: NonLinearTaskVector}
both = pytest.mark.parametrize("linear", [False, True])


@pytest.fixture
def encoder() -> Convolution:
    return Convolution().eval()


def split(batch_size: int = 10, rank: int = 0, world_size: int = 1, images: int = 24) -> Split:
    """Random images in batches, and a random head."""
    head = ClassificationHead(True, torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))
    arrays, transform = pictures(images), Convolution().val_preprocess
    batches = EvalBatches(arrays, transform, batch_size, rank=rank, world_size=world_size)
    return Split("split", head, batches)


def vector(encoder: Encoder, linear: bool = False) -> TaskVector:
    kind: type[TaskVector] = KINDS[linear]
    return kind(vector=random_vector(encoder.weights(), size=1.0))


def bits(encoder: Encoder) -> str:
    return statedict.content_hash(encoder.weights())


@both
def test_a_sweep_agrees_with_single_evaluations(linear: bool, encoder: Convolution) -> None:
    tau = vector(encoder, linear)
    base = linearized(encoder) if linear else encoder
    before = bits(base)
    swept = split().sweep(base, tau.vector, COEFS)
    assert bits(base) == before
    assert swept == [split().accuracy(tau.apply_to(encoder, coef))["top1"] for coef in COEFS]
    assert len(set(swept)) > 1  # the vector does something
    part = {name: value for name, value in tau.vector.items() if "after" in name}
    rest = {n: torch.zeros_like(v) for n, v in tau.vector.items() if n not in part}
    assert part and rest  # weights that the vector lacks stay
    assert split().sweep(base, part, COEFS) == split().sweep(base, {**rest, **part}, COEFS)


@both
def test_an_evaluation_leaves_the_modes_of_an_encoder(linear: bool, encoder: Convolution) -> None:
    base = linearized(encoder) if linear else encoder
    base.train()
    next(base.children()).eval()
    before = [part.training for part in base.modules()]
    assert len(set(before)) == 2
    tau = vector(encoder, linear).vector
    found = split().accuracy(base), split().sweep(base, tau, COEFS)
    assert [part.training for part in base.modules()] == before
    base.eval()
    assert found == (split().accuracy(base), split().sweep(base, tau, COEFS))
    assert split().sweep(base, tau, []) == []


@both
def test_accuracies_are_those_of_the_forward_pass(linear: bool, encoder: Convolution) -> None:
    model = vector(encoder, linear).apply_to(encoder, 0.8)
    # linear passes save and restore the buffers
    versions = {n: v._version for n, v in model.weights().items() if "before.1" not in n}
    before, arrays = bits(model), pictures()
    images = torch.from_numpy(arrays.images).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        classes = split().head(model(images)).argmax(dim=1)
    top1 = (classes == torch.from_numpy(arrays.labels)).sum().item() / 24
    for batch_size in (7, 10, 32):
        found = split(batch_size).accuracy(model)
        assert {**found, "balanced": None} == {"top1": top1, "balanced": None, "num_images": 24}
    assert bits(model) == before
    assert {name: model.weights()[name]._version for name in versions} == versions


class Filtering(Convolution):
    """Features weighted by complex numbers in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, images: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(super().forward(images)) * self.spectrum, n=6)


def test_a_linear_evaluation_counts_the_steps_of_complex_weights() -> None:
    linear = linearized(Filtering().eval())
    with torch.no_grad():
        linear.model.theta()["spectrum"].sub_(1 + 2j)
    (batch,) = split(batch_size=24).batches
    features = linear_features(linear, [linear.displacement()], [batch])
    assert not torch.allclose(features.at([0.0]), features.at([1.0]))
    torch.testing.assert_close(features.at([1.0]), linear(batch[0]).detach())


def test_a_linear_sweep_starts_at_theta_not_at_theta0(encoder: Convolution) -> None:
    tau = vector(encoder, linear=True).parameters_only()
    moved = tau.apply_to(encoder, 0.6)
    found = split().sweep(moved, tau.vector, [-0.6, 0.0, 0.4])
    assert found == split().sweep(linearized(encoder), tau.vector, [0.0, 0.6, 1.0])


# images of 6 x 6 x 3 float32 numbers, 10 a batch: none, two batches, and all of them fit
@pytest.mark.parametrize(("held", "groups"), [(0, 3), (8_640, 2), (10**9, 1)])
def test_a_standard_sweep_reads_each_image_once_and_moves_the_weights_once_per_group(
    monkeypatch: Patch, encoder: Convolution, held: int, groups: int
) -> None:
    tau, before, coefs = vector(encoder), bits(encoder), [0.3, 0.0, 0.3, 1.0]
    models = [tau.apply_to(encoder, coef) for coef in coefs]
    expected = [bits(model) for model in models]
    top1s = [split().accuracy(model)["top1"] for model in models]
    met: list[tuple[str, int]] = []
    read: list[int] = []
    moved: list[float] = []
    forward, one, move_into = Convolution.forward, ArrayPictures.__getitem__, statedict.move_into

    def watched(self: Convolution, images: Tensor) -> Tensor:
        met.append((bits(self), len(images)))
        return forward(self, images)

    def reading(self: ArrayPictures, index: int) -> Any:
        read.append(index)
        return one(self, index)

    def moving(own: Any, theta: Any, tau: Any, coef: float) -> None:
        moved.append(coef)
        move_into(own, theta, tau, coef)

    monkeypatch.setattr(Convolution, "forward", watched)
    monkeypatch.setattr(ArrayPictures, "__getitem__", reading)
    monkeypatch.setattr(statedict, "move_into", moving)
    monkeypatch.setattr(sweeps, "find_caches", lambda *_: None)
    monkeypatch.setattr(sweeps, "HELD_BYTES", held)
    assert split().sweep(encoder, tau.vector, coefs) == top1s
    assert len(set(top1s)) > 1
    assert read == list(range(24)) and moved == coefs * groups
    order = [weights for i, (weights, _) in enumerate(met) if i == 0 or met[i - 1][0] != weights]
    assert order == expected * groups and len(met) == 3 * len(coefs)
    assert [size for weights, size in met if weights == expected[1]] == [10, 10, 4]
    assert bits(encoder) == before


class Attending(ModuleEncoder):
    """Four tokens that attend to each other, as those of LeViT: biases are cached in eval mode."""

    kind = "attending"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(108, 32), nn.Unflatten(1, (4, 8)))
        self.attention = Attention(8, 4, resolution=(2, 2))
        for parameter in self.parameters():  # some of LeViT's begin at 0
            nn.init.normal_(parameter, std=0.3)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.attention(self.net(images)).mean(dim=1)
        return out


class Caching(Attending):
    """An encoder with a cache of its own, which `train` leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.cache: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        if "scale" not in self.cache:
            self.cache["scale"] = 3 * self.scale
        return super().forward(images) * self.cache["scale"]


caching = pytest.mark.parametrize("kind", [Attending, Caching])


@caching
@pytest.mark.parametrize("filled", [False, True])
def test_a_sweep_fills_caches_of_weights_at_each_coefficient(
    kind: type[Attending], filled: bool
) -> None:
    encoder, images = kind().eval(), torch.randn(5, 3, 6, 6)
    tau = {name: torch.randn_like(p) for name, p in encoder.named_parameters()}
    start = copy.deepcopy(encoder)
    if filled:
        with torch.no_grad():
            encoder(images)
    coefs = [2.0, 0.0, -1.0]
    batches = [(images, torch.zeros(5, dtype=torch.long))]
    points = [[(coef, tau)] for coef in coefs]
    found = {i: z for i, z, _ in sweeps.logits_at(encoder, points, nn.Identity(), batches)}
    for i, coef in enumerate(coefs):
        expected = copy.deepcopy(start)
        expected.load_weights(statedict.move(start.weights(), tau, coef))
        torch.testing.assert_close(found[i], expected(images))
    edited = TaskVector(vector=tau).apply_to(encoder, 2.0)
    torch.testing.assert_close(edited(images), found[0])


def loaded(encoder: Attending, tuned: Attending) -> Attending:
    encoder.load_weights(tuned.weights())
    return encoder


MOVES: dict[str, Callable[[Attending, Attending], Any]] = {
    "load_weights": loaded,
    "apply_to": lambda e, t: TaskVector(e, t).apply_to(e),
    "functional_call": lambda e, t: lambda x: functional_call(e, t.weights(), (x,)),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_an_encoder_with_other_weights_fills_its_caches_anew(
    move: Callable[[Attending, Attending], Any],
) -> None:
    encoder, tuned, images = Attending().eval(), Attending().eval(), torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        before, training = encoder(images), [part.training for part in encoder.modules()]
        torch.testing.assert_close(move(encoder, tuned)(images), tuned(images))
        if move is not loaded:
            torch.testing.assert_close(encoder(images), before)
    assert training == [part.training for part in encoder.modules()]


@caching
def test_a_linear_encoder_becomes_standard_with_empty_caches(kind: type[Attending]) -> None:
    encoder, images = kind().eval(), torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        encoder(images)
    linear = linearized(encoder)
    linear(images)
    with torch.no_grad():
        for p in linear.parameters():
            p.add_(torch.randn_like(p))
    fresh = kind().eval()
    fresh.load_weights(linear.weights())
    torch.testing.assert_close(linear.standard()(images), fresh(images))


class Interrupted(BaseException):
    """Like Ctrl-C, not an `Exception`."""


@pytest.mark.parametrize(
    ("kind", "name", "call"), [(Convolution, "forward", 5), (ArrayPictures, "__getitem__", 15)]
)
def test_an_error_in_a_sweep_restores_the_encoder(
    monkeypatch: Patch, encoder: Convolution, kind: Any, name: str, call: int
) -> None:
    tau, before = vector(encoder).vector, bits(encoder)
    monkeypatch.setattr(sweeps, "HELD_BYTES", 0)
    original, seen = getattr(kind, name), []

    def interrupted(self: Any, argument: Any) -> Any:
        seen.append(bits(encoder))
        if len(seen) == call:
            raise Interrupted
        return original(self, argument)

    monkeypatch.setattr(kind, name, interrupted)
    with pytest.raises(Interrupted):
        split().sweep(encoder, tau, [1.0, 0.5])
    assert seen[-1] != before
    assert bits(encoder) == before


@both
@pytest.mark.parametrize("wrong", ["name", "shape", "broadcastable shape"])
def test_a_vector_of_other_weights_is_refused(
    encoder: Convolution, linear: bool, wrong: str
) -> None:
    base = linearized(encoder) if linear else encoder
    tau, before = vector(encoder).vector, bits(base)
    name = "after.0.weight"
    if wrong == "name":
        tau["after.9.weight"] = tau.pop(name)
    else:
        tau[name] = tau[name][:1] if wrong == "broadcastable shape" else tau[name][:-1]
    with pytest.raises(UsageError, match=r"after.9|shape"):
        split().sweep(base, tau, COEFS)
    assert bits(base) == before


@pytest.mark.parametrize("moved", [False, True])
def test_a_linear_sweep_is_one_pass(monkeypatch: Patch, encoder: Convolution, moved: bool) -> None:
    tau = vector(encoder, linear=True)
    base = tau.apply_to(encoder, 0.5 if moved else 0.0)
    passes: list[tuple[int, int]] = []
    tangents = LinearizedModel.tangents

    def along(self: LinearizedModel, x: Tensor, vectors: Any) -> Any:
        passes.append((len(x), len(vectors)))
        return tangents(self, x, vectors)

    monkeypatch.setattr(LinearizedModel, "tangents", along)
    split().sweep(base, tau.vector, coefficients(21))
    assert passes == [(size, 2 if moved else 1) for size in (10, 10, 4)]


@both
def test_bf16_computes_in_bf16_and_classifies_in_float32(
    monkeypatch: Patch, encoder: Convolution, linear: bool
) -> None:
    base = vector(encoder, True).apply_to(encoder, 0.2) if linear else encoder
    wide, before = split().accuracy(base), bits(base)
    casting: set[bool] = set()
    types: set[torch.dtype] = set()
    forward, classify = Convolution.forward, ClassificationHead.forward

    def watched(self: Convolution, images: Tensor) -> Tensor:
        casting.add(torch.is_autocast_enabled("cpu"))
        return forward(self, images)

    def typed(self: ClassificationHead, inputs: Tensor) -> Tensor:
        logits = classify(self, inputs)
        types.update((inputs.dtype, logits.dtype))
        return logits

    monkeypatch.setattr(Convolution, "forward", watched)
    monkeypatch.setattr(ClassificationHead, "forward", typed)
    narrow = replace(split(), compute=Compute(torch.device("cpu"), "bf16")).accuracy(base)
    assert casting == {True} and types == {torch.float32}
    assert narrow["top1"] == pytest.approx(wide["top1"], abs=0.1)
    assert bits(base) == before


@both
@pytest.mark.parametrize("images", [24, 1])  # with one image the second rank has none
def test_ranks_count_each_image_once(
    monkeypatch: Patch, encoder: Convolution, linear: bool, images: int
) -> None:
    tau = vector(encoder, linear).vector
    base = linearized(encoder) if linear else encoder
    expected = split(images=images).sweep(base, tau, COEFS)
    shares: list[Any] = []

    def gathered(share: Any) -> list[Any]:  # the second rank sees what the first has sent
        shares.append(share)
        return list(shares)

    monkeypatch.setattr(ddp, "gather", gathered)
    for rank in (0, 1):
        part = split(rank=rank, world_size=2, images=images)
        found = part.metrics_at(base, tau, COEFS)
    assert len(shares) == 2 and {one["num_images"] for one in found} == {images}
    assert [one["top1"] for one in found] == expected


@pytest.fixture
def args(tmp_path: Path, monkeypatch: Patch) -> Iterator[Config]:
    """Settings of a run with few images."""
    monkeypatch.setitem(SIZES, "test", 24)
    monkeypatch.setitem(SIZES, "val", 12)
    with small_suite(monkeypatch):
        yield small_config(tmp_path)


@pytest.fixture(scope="module")
def clip() -> ImageEncoder:
    return ImageEncoder(Config())


def test_post_hoc_at_zero_is_zero_shot(args: Config, clip: ImageEncoder) -> None:
    tau = NonLinearTaskVector(vector=random_vector(clip.weights()))
    args.eval_datasets = ["Emoji"]
    zeroshot = evaluate(clip, args)
    posthoc = evaluate_task_vector_at_coef(tau, clip, args, 0.0, posthoc_linearization=True)
    assert posthoc["Emoji:top1"] == zeroshot["Emoji:top1"]
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        difference = tau.apply_to_linear(clip, 0.0)(images) - clip(images)
    assert difference.abs().max() < 1e-5


def test_the_control_set_is_evaluated_but_not_averaged(args: Config, clip: ImageEncoder) -> None:
    tau = NonLinearTaskVector(vector=random_vector(clip.weights()))
    args.eval_datasets, args.control_dataset = ["EmojiVal"], "ShapesVal"
    args.finetuning_accuracies = {"EmojiVal": 0.5}
    curve = evaluate_task_vector(tau, clip, args)
    assert list(curve) == ["0.0", "0.5", "1.0"]
    metrics = curve["0.5"]
    assert metrics["avg_top1"] == metrics["EmojiVal:top1"]
    assert metrics["EmojiVal:normalized_top1"] == pytest.approx(metrics["EmojiVal:top1"] / 0.5)
    assert "ShapesVal:top1" in metrics and "ShapesVal:normalized_top1" not in metrics


def _evaluate(args: Any) -> None:
    """Evaluates on 9 images, in every process of a run."""
    run = Run.of(args)
    root = Path(str(run.config.save))
    with pytest.MonkeyPatch.context() as patch, small_suite(patch):
        patch.setitem(SIZES, "test", 9)
        clip, own = ImageEncoder(run.config), Run.of(small_config(root))
        tau = random_vector(clip.weights())
        linear = linearized(clip)
        bases: list[Any] = [clip, linear, linear]  # the second linear sweep reads the cache
        results = [split_of(own, base, "Emoji").sweep(base, tau, COEFS) for base in bases]
    (root / f"rank{ddp.rank()}.json").write_text(json.dumps(results))


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    _evaluate(Config(save=str(alone)))
    start(_evaluate, Config(save=str(pair), world_size=2, port=12421))
    expected = json.loads((alone / "rank0.json").read_text())
    assert expected[1] == expected[2] and len(set(expected[0])) > 1
    for rank in (0, 1):
        assert json.loads((pair / f"rank{rank}.json").read_text()) == expected


def test_a_data_set_of_another_suite_is_refused(args: Config, clip: ImageEncoder) -> None:
    with pytest.raises(UsageError, match="unknown data set of suite embedded 'Cars'"):
        eval_single_dataset(clip, "Cars", args)


def test_coefficients_are_short_decimals() -> None:
    texts = [str(c) for c in coefficients(21)]
    assert texts[:7] == ["0.0", "0.05", "0.1", "0.15", "0.2", "0.25", "0.3"] and texts[-1] == "1.0"


def test_the_control_metric_limits_the_choice(caplog: pytest.LogCaptureFixture) -> None:
    results = {0.0: {"m": 30.0, "c": 0.9}, 0.5: {"m": 20.0, "c": 0.86}, 1.0: {"m": 1.0, "c": 0.1}}

    def choose(least: float) -> float:
        return find_optimal_coef(results, "m", True, "c", least)

    assert choose(0.85) == 0.5 and choose(0.0) == 1.0
    assert not caplog.records
    assert choose(0.95) == 0.0
    assert "no coefficient keeps c at 0.95" in caplog.text


TIE = {"0.0": 0.5, "0.5": 0.5, "1.0": 0.25}
ABOVE = {"1.0": 0.5, "0.0": 0.25, "0.5": 0.5}


@pytest.mark.parametrize(
    ("values", "num_images", "choice", "message"),
    [
        (TIE, 3, 0.0, r"m: 2 coefficients, 0 to 0\.5, tie .* on 3 images; taking the smallest, 0,"),
        (TIE, 5000, 0.0, "on 5000 images; taking the smallest, 0, the pre-trained model"),
        (TIE, None, 0.0, "tie for the best value; taking the smallest, 0, the pre-trained model"),
        (ABOVE, 3, 0.5, r"0\.5 to 1, tie .* on 3 images; taking the smallest, 0\.5$"),
        (ABOVE, 5000, 0.5, None),
        (ABOVE, None, 0.5, None),
        ({**TIE, "1.0": 0.75}, 3, 1.0, None),
        ({"0.5": 0.0}, None, 0.5, None),
    ],
)
def test_ties_go_to_the_smallest_coefficient_with_a_warning_if_arbitrary(
    values: dict[str, float],
    num_images: int | None,
    choice: float,
    message: str | None,
    caplog: Any,
) -> None:
    results = {coef: {"m": value} for coef, value in values.items()}
    assert find_optimal_coef(results, "m", num_images=num_images) == choice
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (message is not None)
    assert message is None or re.search(message, messages[0])


def test_one_warning_for_ties_of_many_choices(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_ties([[0.0, 0.5], [0.5], [0.5, 1.0]], 3, "subsets")
    (record,) = caplog.records
    assert record.getMessage() == (
        "subsets: in 2 of 3 choices several coefficients tie for the best value on 3 images; "
        "taking the smallest, in 1 of them 0, the pre-trained model"
    )


def test_the_smallest_split_is_found() -> None:
    splits = [split(), split(images=12)]
    assert sweeps.smallest(splits) == 12 and sweeps.smallest([]) is None
    assert sweeps.smallest([*splits, replace(split(), batches=iter(()))]) is None


@pytest.mark.parametrize(
    ("module", "work"),
    [
        (evaluate_command, "single_task_accuracies"),
        (add, "task_addition"),
        (negate, "task_negation"),
        (analyze.tangent_explorer, "explore"),
    ],
    ids=lambda value: str(value)[-20:],
)
@pytest.mark.parametrize(
    "flag", ["--results={file}/results", "--results-db={file}/db", "--results-db={folder}"]
)
def test_unwritable_results_stop_a_run_before_the_work(
    module: Any,
    work: str,
    flag: str,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, work, lambda *_: pytest.fail("worked"))
    argv = [f"--save={tmp_path}/run", f"--results={tmp_path}/results", "--finetuning-mode=linear"]
    argv.append(flag.format(file=tmp_path / "file", folder=tmp_path))
    main = analyze.main if work == "explore" else module.main
    assert main(["report", *argv] if work == "explore" else argv) == 2
    assert re.search("cannot write|--results: expected a folder", capsys.readouterr().err)


def test_normalised_accuracies_exclude_tasks_that_were_not_learned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = Config(finetuning_accuracies={"A": 0.8, "B": 0.5, "Bad": 0.0, "other": 0.1})
    results = {"A:top1": 0.4, "B:top1": 0.5, "Bad:top1": 0.3}
    for _ in range(2):
        metrics = add_normalized_accuracy(results, args)
    assert "Bad:normalized_top1" not in metrics
    assert metrics["avg_normalized_top1"] == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["avg_top1"] == pytest.approx(0.4)
    assert caplog.text.count("where the fine-tuned accuracy is 0: Bad") == 1
    table = addition_table({"zeroshot": metrics, "test": metrics}, ["A", "Bad"], "linear")
    assert table.count("| 40.0 | 30.0 |") == 2 and table.count("| 50.0 |    - |") == 2
    args.finetuning_accuracies = {"Bad": 0.0}
    assert add_normalized_accuracy(results, args)["avg_normalized_top1"] == 0.0


def test_nonlinear_advantage_by_hand() -> None:
    # error rates 0.3 and 0.1 with 5 classes: 0.2 / 0.8
    assert nonlinear_advantage(0.7, 0.9, 5) == pytest.approx(0.25)
