"""Accuracies of one model and of sweeps, in one pass, over one or several processes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.eval import (
    add_normalized_accuracy,
    eval_single_dataset,
    evaluate,
    evaluate_task_vector,
    evaluate_task_vector_at_coef,
)
from src.heads import get_classification_head
from tangent_arithmetic.arithmetic import sweeps as evaluation
from tangent_arithmetic.arithmetic.coefficients import coefficients, find_optimal_coef, warn_of_ties
from tangent_arithmetic.arithmetic.metrics import nonlinear_advantage
from tangent_arithmetic.arithmetic.sweeps import Encoder
from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector, NonLinearTaskVector
from tangent_arithmetic.commands import add as eval_task_addition
from tangent_arithmetic.commands import analyze
from tangent_arithmetic.commands import evaluate as eval_single_task
from tangent_arithmetic.commands import negate as eval_task_negation
from tangent_arithmetic.commands.add import addition_table
from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder, VisionTower
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.run.models import split_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tests.small_suite import SIZES, random_vector, small_config, small_suite

COEFS = [0.0, 0.4, 1.0]


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    with small_suite(monkeypatch):
        yield small_config(tmp_path)


@pytest.mark.parametrize("linear", [False, True])
def test_a_sweep_gives_what_single_evaluations_give(args: Config, linear: bool) -> None:
    encoder = ImageEncoder(args)
    kind = LinearizedTaskVector if linear else NonLinearTaskVector
    vector = kind(vector=random_vector(encoder.weights()))
    base = LinearizedImageEncoder(image_encoder=encoder) if linear else encoder
    before = {name: value.clone() for name, value in base.weights().items()}
    swept = split_of(Run.of(args), base, "EmojiVal").sweep(base, vector.vector, COEFS)
    for name, value in base.weights().items():
        assert torch.equal(value, before[name])
    singles = [
        eval_single_dataset(vector.apply_to(encoder, coef), "EmojiVal", args)["top1"]
        for coef in COEFS
    ]
    assert swept == pytest.approx(singles)
    assert len(set(swept)) > 1  # the vector does something


def test_a_linear_sweep_starts_at_theta_not_at_theta0(args: Config) -> None:
    encoder = ImageEncoder(args)
    vector = LinearizedTaskVector(vector=random_vector(encoder.weights()))
    moved = vector.apply_to(encoder, 0.6)
    found = split_of(Run.of(args), moved, "EmojiVal").sweep(moved, vector.vector, [-0.6, 0.0, 0.4])
    start = LinearizedImageEncoder(image_encoder=encoder)
    assert found == pytest.approx(
        split_of(Run.of(args), start, "EmojiVal").sweep(start, vector.vector, [0.0, 0.6, 1.0])
    )


def test_post_hoc_at_zero_is_zero_shot(args: Config) -> None:
    encoder = ImageEncoder(args)
    vector = NonLinearTaskVector(vector=random_vector(encoder.weights()))
    args.eval_datasets = ["Emoji"]
    zeroshot = evaluate(encoder, args)
    posthoc = evaluate_task_vector_at_coef(vector, encoder, args, 0.0, posthoc_linearization=True)
    assert posthoc["Emoji:top1"] == zeroshot["Emoji:top1"]
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        difference = vector.apply_to_linear(encoder, 0.0)(images) - encoder(images)
    assert difference.abs().max() < 1e-5


def test_the_control_set_is_evaluated_too_but_not_averaged(args: Config) -> None:
    encoder = ImageEncoder(args)
    vector = NonLinearTaskVector(vector=random_vector(encoder.weights()))
    args.eval_datasets, args.control_dataset = ["EmojiVal"], "ShapesVal"
    args.finetuning_accuracies = {"EmojiVal": 0.5}
    found = evaluate_task_vector(vector, encoder, args)
    assert list(found) == ["0.0", "0.5", "1.0"]
    metrics = found["0.5"]
    assert metrics["avg_top1"] == metrics["EmojiVal:top1"]
    assert metrics["EmojiVal:normalized_top1"] == pytest.approx(metrics["EmojiVal:top1"] / 0.5)
    assert "ShapesVal:top1" in metrics and "ShapesVal:normalized_top1" not in metrics


def test_every_image_counts_once(args: Config) -> None:
    encoder = ImageEncoder(args)
    assert eval_single_dataset(encoder, "Emoji", args)["num_images"] == 48
    args.batch_size = 7
    assert eval_single_dataset(encoder, "EmojiVal", args)["num_images"] == 40
    linear = LinearizedImageEncoder(image_encoder=encoder)
    assert eval_single_dataset(linear, "EmojiVal", args)["num_images"] == 40
    assert eval_single_dataset(linear, "Emoji", args)["num_images"] == 48


def bits(encoder: Encoder) -> str:
    return statedict.content_hash(encoder.weights())


# images of 32 x 32 x 3 float32 numbers, 20 a batch: none, one, two batches and all of them fit
HELD = pytest.mark.parametrize(("held", "groups"), [(0, 3), (250_000, 3), (491_520, 2), (10**9, 1)])


@HELD
def test_a_standard_sweep_reads_each_picture_once(
    args: Config, monkeypatch: pytest.MonkeyPatch, held: int, groups: int
) -> None:
    encoder = ImageEncoder(args)
    get_classification_head(args, "Emoji")
    args.batch_size = 20
    read: list[int] = []
    one = ArrayPictures.__getitem__

    def counted(self: ArrayPictures, index: int) -> Any:
        read.append(index)
        return one(self, index)

    monkeypatch.setattr(ArrayPictures, "__getitem__", counted)
    monkeypatch.setattr(evaluation, "HELD_BYTES", held)
    split_of(Run.of(args), encoder, "Emoji").sweep(encoder, random_vector(encoder.weights()), COEFS)
    assert read == list(range(48))


@HELD
def test_each_coefficient_meets_the_weights_of_its_own_model_bit_for_bit(
    args: Config, monkeypatch: pytest.MonkeyPatch, held: int, groups: int
) -> None:
    encoder = ImageEncoder(args)
    vector = NonLinearTaskVector(vector=random_vector(encoder.weights()))
    before, coefs = bits(encoder), [0.3, 0.7, 0.0, 0.3, 0.1]
    expected = [bits(vector.apply_to(encoder, coef)) for coef in coefs]
    args.batch_size = 20
    met: list[tuple[str, int]] = []
    forward = ImageEncoder.forward

    def watched(self: ImageEncoder, images: Tensor) -> Tensor:
        met.append((bits(self), len(images)))
        return forward(self, images)

    monkeypatch.setattr(ImageEncoder, "forward", watched)
    monkeypatch.setattr(evaluation, "HELD_BYTES", held)
    split_of(Run.of(args), encoder, "Emoji").sweep(encoder, vector.vector, coefs)
    order = [weights for i, (weights, _) in enumerate(met) if i == 0 or met[i - 1][0] != weights]
    assert order == expected * groups
    assert [size for weights, size in met if weights == expected[1]] == [20, 20, 8]
    assert len(met) == 3 * len(coefs)
    assert bits(encoder) == before


@HELD
def test_how_many_images_are_held_does_not_change_the_accuracies(
    args: Config, monkeypatch: pytest.MonkeyPatch, held: int, groups: int
) -> None:
    encoder = ImageEncoder(args)
    tau = random_vector(encoder.weights())
    args.batch_size = 20
    expected = [
        eval_single_dataset(NonLinearTaskVector(vector=tau).apply_to(encoder, c), "Emoji", args)
        for c in COEFS
    ]
    computed: list[float] = []
    move_into = statedict.move_into

    def counted(own: Any, theta: Any, tau: Any, coef: float) -> None:
        computed.append(coef)
        move_into(own, theta, tau, coef)

    monkeypatch.setattr(statedict, "move_into", counted)
    monkeypatch.setattr(evaluation, "HELD_BYTES", held)
    found = split_of(Run.of(args), encoder, "Emoji").sweep(encoder, tau, COEFS)
    assert found == [result["top1"] for result in expected]
    assert len(set(found)) > 1
    assert computed == COEFS * groups


class Interrupted(BaseException):
    """As Ctrl-C is: nothing that is caught on the way."""


@pytest.mark.parametrize("place", ["model", "pictures"])
def test_an_error_in_a_sweep_leaves_the_encoder_as_it_was(
    args: Config, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    encoder = ImageEncoder(args)
    tau, before = random_vector(encoder.weights()), bits(encoder)
    args.batch_size = 20
    monkeypatch.setattr(evaluation, "HELD_BYTES", 0)
    kind: Any = ImageEncoder if place == "model" else ArrayPictures
    name = "forward" if place == "model" else "__getitem__"
    original, seen = getattr(kind, name), []

    def interrupted(self: Any, argument: Any) -> Any:
        seen.append(bits(encoder))
        if len(seen) == (5 if place == "model" else 30):
            raise Interrupted
        return original(self, argument)

    get_classification_head(args, "Emoji")
    monkeypatch.setattr(kind, name, interrupted)
    with pytest.raises(Interrupted):
        split_of(Run.of(args), encoder, "Emoji").sweep(encoder, tau, [1.0, 0.5])
    assert seen[-1] != before
    assert bits(encoder) == before


def test_an_evaluation_changes_no_weights(args: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ImageEncoder(args)
    before = {name: value.clone() for name, value in encoder.weights().items()}
    versions = {name: value._version for name, value in encoder.weights().items()}
    eval_single_dataset(encoder, "Emoji", args)
    for name, value in encoder.weights().items():
        assert torch.equal(value, before[name]) and value._version == versions[name]


def test_a_vector_that_lacks_weights_leaves_them_where_they_are(args: Config) -> None:
    encoder = ImageEncoder(args)
    tau = random_vector(encoder.weights())
    part = {name: value for name, value in tau.items() if "ln_post" in name or "proj" in name}
    assert 0 < len(part) < len(tau)
    rest = {name: torch.zeros_like(value) for name, value in tau.items() if name not in part}
    for base in (encoder, LinearizedImageEncoder(image_encoder=encoder)):
        found = split_of(Run.of(args), base, "Emoji").sweep(base, part, COEFS)
        assert found == split_of(Run.of(args), base, "Emoji").sweep(base, {**rest, **part}, COEFS)
        assert len(set(found)) > 1


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("wrong", ["name", "shape", "broadcastable shape"])
def test_a_vector_of_other_weights_is_an_error(args: Config, linear: bool, wrong: str) -> None:
    encoder = ImageEncoder(args)
    base = LinearizedImageEncoder(image_encoder=encoder) if linear else encoder
    tau, before = random_vector(encoder.weights()), bits(base)
    name = "model.visual.ln_post.weight"
    if wrong == "name":
        tau["model.visual.ln_past.weight"] = tau.pop(name)
    else:
        tau[name] = tau[name][:1] if wrong == "broadcastable shape" else tau[name][:-1]
    with pytest.raises(ValueError, match=r"ln_past|shape"):
        split_of(Run.of(args), base, "Emoji").sweep(base, tau, COEFS)
    assert bits(base) == before


def test_a_linear_encoder_is_evaluated_as_it_computes(args: Config) -> None:
    encoder = ImageEncoder(args)
    vector = LinearizedTaskVector(vector=random_vector(encoder.weights()))
    head = get_classification_head(args, "Emoji")
    test = Run.of(args).data.dataset("Emoji").test
    labels = torch.tensor([test[i][1] for i in range(len(test))])
    found = []
    for coef in (0.0, 0.8):
        linear = vector.apply_to(encoder, coef)
        images = torch.stack([linear.val_preprocess(test[i][0]) for i in range(len(test))])
        with torch.no_grad():
            hits = head(linear(images)).argmax(dim=1) == labels
        found.append(eval_single_dataset(linear, "Emoji", args))
        assert found[-1] == {"top1": hits.sum().item() / 48, "num_images": 48}
    assert found[0] != found[1]


@pytest.mark.parametrize("moved", [False, True])
def test_a_linear_sweep_is_one_pass(
    args: Config, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    encoder = ImageEncoder(args)
    vector = LinearizedTaskVector(vector=random_vector(encoder.weights()))
    base = vector.apply_to(encoder, 0.5 if moved else 0.0)
    get_classification_head(args, "Emoji")
    args.batch_size = 20
    sizes: list[int] = []
    directions: list[int] = []
    encode, tangents = VisionTower.encode_image, LinearizedModel.tangents

    def counted(self: VisionTower, images: Tensor, normalize: bool = False) -> Tensor:
        sizes.append(len(images))
        return encode(self, images, normalize)

    def along(self: LinearizedModel, x: Any, vectors: Any) -> Any:
        directions.append(len(vectors))
        return tangents(self, x, vectors)

    monkeypatch.setattr(VisionTower, "encode_image", counted)
    monkeypatch.setattr(LinearizedModel, "tangents", along)
    split_of(Run.of(args), base, "Emoji").sweep(base, vector.vector, coefficients(21))
    assert sizes == [20, 20, 8]
    assert directions == [2 if moved else 1] * 3


@pytest.mark.parametrize("linear", [False, True])
def test_bf16_computes_in_bf16_and_classifies_in_float32(
    args: Config, monkeypatch: pytest.MonkeyPatch, linear: bool
) -> None:
    encoder = ImageEncoder(args)
    vector = LinearizedTaskVector(vector=random_vector(encoder.weights()))
    base = vector.apply_to(encoder, 0.2) if linear else encoder
    wide, before = eval_single_dataset(base, "Emoji", args), bits(base)
    casting: set[bool] = set()
    types: set[torch.dtype] = set()
    encode, classify = VisionTower.encode_image, ClassificationHead.forward

    def watched(self: VisionTower, images: Tensor, normalize: bool = False) -> Tensor:
        casting.add(torch.is_autocast_enabled("cpu"))
        return encode(self, images, normalize)

    def typed(self: ClassificationHead, inputs: Tensor) -> Tensor:
        logits = classify(self, inputs)
        types.update((inputs.dtype, logits.dtype))
        return logits

    monkeypatch.setattr(VisionTower, "encode_image", watched)
    monkeypatch.setattr(ClassificationHead, "forward", typed)
    args.precision = "bf16"
    narrow = eval_single_dataset(base, "Emoji", args)
    assert casting == {True} and types == {torch.float32}
    assert narrow["top1"] == pytest.approx(wide["top1"], abs=0.1)
    assert bits(base) == before


def _evaluate(args: Any) -> None:
    """Runs in each of two processes, and in one: 48 images and a single one, all ways."""
    for count in (48, 1):
        with pytest.MonkeyPatch.context() as patch, small_suite(patch):
            patch.setitem(SIZES, "test", count)
            root = Path(str(Run.of(args).config.save)) / str(count)
            own = small_config(root)
            encoder = ImageEncoder(own)
            tau = random_vector(encoder.weights())
            found: dict[str, Any] = {}
            for linear in (False, True):
                base = LinearizedImageEncoder(image_encoder=encoder) if linear else encoder
                for again in range(2):  # the linear one finds what it has kept
                    found[f"sweep {linear} {again}"] = split_of(Run.of(own), base, "Emoji").sweep(
                        base, tau, COEFS
                    )
                kind = LinearizedTaskVector if linear else NonLinearTaskVector
                moved = kind(vector=tau).apply_to(encoder, 0.4)
                found[f"single {linear}"] = eval_single_dataset(moved, "Emoji", own)
        (root / f"rank{ddp.rank()}.json").write_text(json.dumps(found))


def test_two_processes_count_each_image_once_and_agree_with_one(tmp_path: Path) -> None:
    """A batch of 32 images for each of two ranks is more than there are; one rank may have none."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    _evaluate(Config(save=str(alone)))
    start(_evaluate, Config(save=str(both), world_size=2, port=12421))
    for count in (48, 1):
        expected = json.loads((alone / str(count) / "rank0.json").read_text())
        for linear in (False, True):
            assert expected[f"single {linear}"]["num_images"] == count
            assert expected[f"sweep {linear} 0"] == expected[f"sweep {linear} 1"]
        for rank in (0, 1):
            assert json.loads((both / str(count) / f"rank{rank}.json").read_text()) == expected


def test_a_data_set_of_another_suite_is_refused(args: Config) -> None:
    with pytest.raises(UsageError, match="unknown data set of suite embedded 'Cars'"):
        eval_single_dataset(ImageEncoder(args), "Cars", args)


def test_coefficients_are_short_decimals() -> None:
    assert [str(c) for c in coefficients(21)][:5] == ["0.0", "0.05", "0.1", "0.15", "0.2"]
    assert str(coefficients(21)[6]) == "0.3" and coefficients(21)[-1] == 1.0


def test_ties_go_to_the_smallest_coefficient() -> None:
    results = {"1.0": {"m": 0.5}, "0.05": {"m": 0.5}, "0.15000000000000002": {"m": 0.4}}
    assert find_optimal_coef(results, metric="m") == 0.05
    assert find_optimal_coef(results, metric="m", minimize=True) == 0.15000000000000002


def test_the_control_metric_limits_the_choice(caplog: pytest.LogCaptureFixture) -> None:
    results = {0.0: {"m": 30.0, "c": 0.9}, 0.5: {"m": 20.0, "c": 0.86}, 1.0: {"m": 1.0, "c": 0.1}}

    def choose(least: float) -> float:
        return find_optimal_coef(results, "m", True, "c", least)

    assert choose(0.85) == 0.5 and choose(0.0) == 1.0
    assert not caplog.records
    assert choose(0.95) == 0.0
    assert "no coefficient keeps c at 0.95" in caplog.text


TIE = {"0.0": {"m": 0.5}, "0.5": {"m": 0.5}, "1.0": {"m": 0.25}}
ABOVE = {"0.0": {"m": 0.25}, "0.5": {"m": 0.5}, "1.0": {"m": 0.5}}


@pytest.mark.parametrize(
    ("found", "num_images", "said"),
    [
        (
            TIE,
            3,
            r"m: 2 coefficients, 0 to 0\.5, tie .* on 3 pictures; taking the smallest, 0, the ",
        ),
        (TIE, 5000, "on 5000 pictures; taking the smallest, 0, the pre-trained model"),
        (TIE, None, "tie for the best value; taking the smallest, 0, the pre-trained model"),
        (ABOVE, 3, r"2 coefficients, 0\.5 to 1, tie .* on 3 pictures; taking the smallest, 0\.5$"),
        (ABOVE, 5000, None),
        (ABOVE, None, None),
        ({**TIE, "1.0": {"m": 0.75}}, 3, None),
    ],
)
def test_a_tie_on_a_tiny_split_is_said(
    found: dict[str, Any], num_images: int | None, said: str | None, caplog: Any
) -> None:
    assert find_optimal_coef(found, "m", num_images=num_images) == min(
        float(c) for c, m in found.items() if m["m"] == max(v["m"] for v in found.values())
    )
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (said is not None)
    assert said is None or re.search(said, messages[0])


def test_ties_of_many_choices_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_ties([[0.0, 0.5], [0.5], [0.5, 1.0]], 3, "subsets")
    (record,) = caplog.records
    assert record.getMessage() == (
        "subsets: in 2 of 3 choices several coefficients tie for the best value on 3 pictures; the "
        "smallest is taken, in 1 of them 0, the pre-trained model"
    )


def test_the_evaluated_pictures_are_counted(args: Config) -> None:
    names = ["EmojiVal", "ShapesVal", "Emoji"]
    assert Run.of(args).data.smallest(names) == 40
    args.sample = 3
    assert Run.of(args).data.smallest(names) == 3


WORKS = [
    (eval_single_task, "single_task_accuracies"),
    (eval_task_addition, "task_addition"),
    (eval_task_negation, "task_negation"),
    (analyze.tangent_explorer, "explore"),
]


@pytest.mark.parametrize(("module", "work"), WORKS, ids=lambda value: str(value)[-20:])
@pytest.mark.parametrize(
    "flag", ["--results={file}/results", "--results-db={file}/db", "--results-db={folder}"]
)
def test_results_that_cannot_be_written_stop_a_run_before_the_work(
    module: Any,
    work: str,
    flag: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, work, lambda *_: pytest.fail("worked"))
    argv = [f"--save={tmp_path}/run", f"--results={tmp_path}/results", "--finetuning-mode=linear"]
    argv.append(flag.format(file=tmp_path / "file", folder=tmp_path))
    main = analyze.main if work == "explore" else module.main
    assert main(["report", *argv] if work == "explore" else argv) == 2
    assert re.search("cannot write|--results: expected a folder", capsys.readouterr().err)


def test_all_zero_metrics_still_give_a_coefficient() -> None:
    assert find_optimal_coef({"0.5": {"m": 0.0}}, metric="m") == 0.5


def test_normalised_accuracy_is_averaged_over_tasks() -> None:
    args = Config(finetuning_accuracies={"A": 0.8, "B": 0.5, "C": 0.1})
    found = add_normalized_accuracy({"A:top1": 0.4, "B:top1": 0.5}, args)
    assert found["avg_normalized_top1"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["avg_top1"] == pytest.approx(0.45)


def test_a_task_that_was_not_learned_has_no_normalised_accuracy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = Config(finetuning_accuracies={"A": 0.8, "Bad": 0.0})
    results = {"A:top1": 0.4, "Bad:top1": 0.2}
    for _ in range(2):
        found = add_normalized_accuracy(results, args)
    assert "Bad:normalized_top1" not in found
    assert found["avg_normalized_top1"] == pytest.approx(0.5)
    assert found["avg_top1"] == pytest.approx(0.3)
    assert caplog.text.count("there is no normalised one: Bad") == 1
    table = addition_table({"zeroshot": found, "test": found}, ["A", "Bad"], "linear")
    assert table.count("| 40.0 | 20.0 |") == 2 and table.count("| 50.0 |    - |") == 2
    args.finetuning_accuracies = {"Bad": 0.0}
    assert add_normalized_accuracy(results, args)["avg_normalized_top1"] == 0.0


def test_nonlinear_advantage_by_hand() -> None:
    # error rates 0.3 and 0.1 with 5 classes: 0.2 / 0.8
    assert nonlinear_advantage(0.7, 0.9, 5) == pytest.approx(0.25)
