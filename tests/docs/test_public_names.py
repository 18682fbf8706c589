"""Names, signatures and keys of the public projects that docs/migration.md promises."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src import finetune, utils
from src.eval import nonlinear_advantage
from tangent_arithmetic.arithmetic.task_vectors import (
    LinearizedTaskVector,
    NonLinearTaskVector,
    linear_to_nonlinear,
    nonlinear_to_linear,
)
from tangent_arithmetic.commands import evaluate, negate
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder
from tests.small_suite import TASKS, flags, small_suite

NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "src.args": {"parse_arguments": ()},
    "src.linearize": {
        "LinearizedModel": ("model", "init_model"),
        "LinearizedImageEncoder": ("args", "keep_lang", "image_encoder", "init_encoder"),
        "LinearizedImageEncoder.save": ("filename",),
        "LinearizedImageEncoder.load": ("filename",),
    },
    "src.modeling": {
        "ImageEncoder": ("args", "keep_lang"),
        "ImageEncoder.save": ("filename",),
        "ImageEncoder.load": ("model_name", "filename"),
        "ClassificationHead": ("normalize", "weights", "biases"),
        "ImageClassifier": ("image_encoder", "classification_head"),
        "ImageClassifier.freeze_head": (),
        "MultiHeadImageClassifier": ("image_encoder", "classification_heads"),
        "MultiHeadImageClassifier.forward": ("inputs", "head_idx"),
    },
    "src.task_vectors": {
        **{
            kind: ("pretrained_checkpoint", "finetuned_checkpoint", "vector")
            for kind in ("TaskVector", "NonLinearTaskVector", "LinearizedTaskVector")
        },
        "TaskVector.dot": ("other",),
        "TaskVector.norm": (),
        "TaskVector.apply_to": ("pretrained_checkpoint", "scaling_coef"),
        "TaskVector.apply_to_nonlinear": ("pretrained_checkpoint", "param_names", "scaling_coef"),
        "TaskVector.apply_to_linear": ("pretrained_checkpoint", "scaling_coef"),
        "LinearizedTaskVector.get_named_parameters": ("param_names",),
        "nonlinear_to_linear": ("nonlinear_task_vector",),
        "linear_to_nonlinear": ("linear_task_vector", "param_names"),
    },
    "src.eval": {
        "eval_single_dataset": ("image_encoder", "dataset_name", "args"),
        "evaluate": ("image_encoder", "args"),
        "evaluate_task_vector": (
            "task_vector", "pretrained_checkpoint", "args", "posthoc_linearization",
        ),
        "evaluate_task_vector_at_coef": (
            "task_vector", "pretrained_checkpoint", "args", "scaling_coef", "posthoc_linearization",
        ),
        "add_normalized_accuracy": ("results", "args"),
        "nonlinear_advantage": ("acc_linear", "acc_nonlinear", "num_classes"),
    },
    "src.heads": {
        "build_classification_head": (
            "model", "dataset_name", "template", "data_location", "device",
        ),
        "get_classification_head": ("args", "dataset"),
    },
    "src.utils": {
        "accuracy": ("output", "target", "topk"),
        "cosine_lr": ("optimizer", "base_lrs", "warmup_length", "steps"),
        "find_optimal_coef": (
            "results", "metric", "minimize", "control_metric", "control_metric_threshold",
        ),
        "get_logits": ("inputs", "classifier"),
        "get_probs": ("inputs", "classifier"),
        "LabelSmoothing": ("smoothing",),
        "nonlinear_advantage": ("nonlinear_acc", "linear_acc", "num_classes"),
        "torch_load": ("save_path", "device"),
        "torch_save": ("model", "save_path"),
    },
    "src.evaluation": {"eval_single_dataset": ()},
    "src.merge": {"main": ()},
    "tangent_arithmetic.merging": {"TaskArithmeticAlgorithm.run": ("modelpool",)},
    "tangent_arithmetic.data.registry": {
        "get_dataset": (
            "dataset_name", "preprocess", "location", "batch_size", "num_workers", "val_fraction",
            "max_val_samples",
        ),
    },
    "tangent_arithmetic.data.templates": {"get_templates": ()},
    "tangent_arithmetic.runtime.ddp": {
        "setup_ddp": ("rank", "world_size", "port"),
        "cleanup_ddp": (),
        "is_main_process": (),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in NAMES.items() for name in names]
)
def test_a_public_name_has_its_arguments(module: str, name: str) -> None:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    arguments = list(inspect.signature(found).parameters)
    wanted = [*NAMES[module][name]]
    assert [each for each in arguments if each in wanted] == wanted


def test_attributes_of_linearised_models() -> None:
    linear = importlib.import_module("src.linearize").LinearizedModel(nn.Linear(2, 3))
    for name in ("params", "params0", "func0", "buffers0"):
        assert hasattr(linear, name), name
    assert [value.shape for value in linear.params] == [(3, 2), (3,)]


def test_casts_take_the_public_keywords() -> None:
    tau = NonLinearTaskVector(vector={"w": torch.ones(2)})
    linear = nonlinear_to_linear(nonlinear_task_vector=tau)
    assert isinstance(linear, LinearizedTaskVector)
    back = linear_to_nonlinear(linear_task_vector=linear, param_names=["w"])
    assert isinstance(back, NonLinearTaskVector) and back.vector["w"].tolist() == [1, 1]


def test_accuracy_counts_hits_among_the_k_highest() -> None:
    output = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.0, 0.1, 0.9]])
    target = torch.tensor([2, 0, 0])
    assert utils.accuracy(output, target, topk=(1, 2, 3)) == [1, 2, 3]
    assert utils.accuracy(output, target) == [1]


class Guess:
    """A classifier with scikit-learn's method."""

    def predict_proba(self, inputs: Any) -> Any:
        return inputs / inputs.sum(axis=1, keepdims=True)


def test_logits_and_probabilities() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2), torch.rand(4, 3)
    logits = utils.get_logits(x, layer)
    assert torch.equal(logits, layer(x))
    assert torch.allclose(utils.get_probs(x, layer), F.softmax(logits, dim=1))
    assert torch.allclose(utils.get_probs(x, Guess()), x / x.sum(dim=1, keepdim=True))


def test_label_smoothing_is_the_mean_of_two_losses() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    log_p = F.log_softmax(logits, dim=1)
    expected = 0.9 * F.nll_loss(log_p, labels) - 0.1 * log_p.mean()
    assert torch.allclose(utils.LabelSmoothing(0.1)(logits, labels), expected)


def test_a_dot_dict_is_a_dict_with_attributes() -> None:
    args = utils.DotDict({"lr": 1.0})
    args.model = "ViT-B-32"  # type: ignore[attr-defined]
    assert args == {"lr": 1.0, "model": "ViT-B-32"} and args.lr == 1
    with pytest.raises(AttributeError, match="missing"):
        _ = args.missing


def test_the_two_orders_of_the_nonlinear_advantage() -> None:
    assert utils.nonlinear_advantage(0.9, 0.8, 10) == nonlinear_advantage(0.8, 0.9, 10)
    assert utils.nonlinear_advantage(0.9, 0.8, 10) == pytest.approx(0.1 / 0.9)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    encoder = ImageEncoder("ViT-Nano-8")
    head = ClassificationHead(True, torch.eye(3))
    linear = LinearizedTaskVector(
        vector={name: torch.zeros_like(v) for name, v in encoder.named_parameters()}
    ).apply_to(encoder)
    images = torch.rand(2, 3, 32, 32)
    for name, model, x in (
        ("zeroshot.pt", encoder, images),
        ("linear_finetuned.pt", linear, images),
        ("head_MNISTVal.pt", head, torch.eye(3)),
    ):
        utils.torch_save(model, tmp_path / name)
        loaded = utils.torch_load(tmp_path / name, device="cpu")
        assert type(loaded) is type(model)
        with torch.no_grad():
            assert torch.allclose(loaded(x), model(x), atol=1e-5)


def keys(metrics: dict[str, Tensor]) -> set[str]:
    return set(metrics)


def test_negations_have_the_public_keys(tmp_path: Path) -> None:
    """Normalised ones once the single tasks of the mode have been evaluated."""
    argv = flags(tmp_path)
    mode = "--finetuning-mode=linear"
    path = tmp_path / "results/embedded/ViT-Nano-8/linear_negations.json"
    with pytest.MonkeyPatch.context() as monkeypatch, small_suite(monkeypatch):
        assert finetune.main([mode, *argv]) == 0
        assert evaluate.main(["--finetuning-mode=none", *argv]) == 0
        assert negate.main([mode, *argv]) == 0
        before = json.loads(path.read_text())
        assert evaluate.main([mode, *argv]) == 0
        assert negate.main([mode, *argv]) == 0
    after = json.loads(path.read_text())
    single = json.loads(path.with_name("linear_ft_accuracies.json").read_text())
    for task in TASKS:
        name, plain = f"{task}Val", {f"{task}Val:top1", "ShapesVal:top1", "avg_top1"}
        assert {"test", "test_control", "val"} <= before[task].keys()
        for coef, metrics in before[task]["val"].items():
            assert plain <= keys(metrics) and f"{name}:normalized_top1" not in metrics
            full = after[task]["val"][coef]
            assert plain | {f"{name}:normalized_top1", "avg_normalized_top1"} <= keys(full)
            assert full["avg_top1"] == full[f"{name}:top1"]
            share = full[f"{name}:top1"] / single[name]
            assert full["avg_normalized_top1"] == full[f"{name}:normalized_top1"] == share
        assert after[task]["coefficient"] == before[task]["coefficient"]
