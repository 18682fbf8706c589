"""Helpers of the public projects under their names and signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.coefficients import find_optimal_coef
from tangent_arithmetic.arithmetic.metrics import nonlinear_advantage as _advantage
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.loading import read_facts, resolve
from tangent_arithmetic.encoders.registry import load_linear, load_standard
from tangent_arithmetic.training.schedule import cosine_lr

__all__ = [
    "DotDict",
    "LabelSmoothing",
    "accuracy",
    "cosine_lr",
    "find_optimal_coef",
    "get_logits",
    "get_probs",
    "nonlinear_advantage",
    "torch_load",
    "torch_save",
]


class DotDict(dict[str, Any]):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        """The value of a key; an unknown one raises AttributeError."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    __setattr__ = dict.__setitem__
    __delattr__ = dict.__delitem__


class LabelSmoothing(nn.CrossEntropyLoss):
    """Cross-entropy with the share `smoothing` of a label spread over all classes."""

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing=smoothing)


def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """How many labels are among the k highest logits, for each k; counts, not shares.

    Args:
        output: logits, (batch, classes).
        target: labels, (batch,).
        topk: values of k.
    """
    hits = output.topk(max(topk), dim=1).indices == target.view(-1, 1)
    return [float(hits[:, :k].sum()) for k in topk]


def get_logits(inputs: Tensor, classifier: Any) -> Tensor:
    """The classifier's output; it is moved to the device of the inputs."""
    if isinstance(classifier, nn.Module):
        classifier = classifier.to(inputs.device)
    logits: Tensor = classifier(inputs)
    return logits


def get_probs(inputs: Tensor, classifier: Any) -> Tensor:
    """Probabilities of the classes: of `predict_proba` if there is one, or softmax of logits."""
    if hasattr(classifier, "predict_proba"):
        return torch.from_numpy(classifier.predict_proba(inputs.detach().cpu().numpy()))
    return get_logits(inputs, classifier).softmax(dim=1)


def nonlinear_advantage(nonlinear_acc: float, linear_acc: float, num_classes: int) -> float:
    """The non-linear advantage; note the order, which is another in `src.eval`."""
    return _advantage(linear_acc, nonlinear_acc, num_classes)


def torch_save(model: Any, save_path: str | Path) -> None:
    """Writes an encoder or a head as safetensors, see its `save`."""
    model.save(save_path)


def torch_load(save_path: str | Path, device: torch.device | str | None = None) -> nn.Module:
    """The encoder or head in a file of ours or of the public projects; nothing is executed."""
    kind = read_facts(resolve(save_path))["kind"]
    if kind == "head":
        model: nn.Module = ClassificationHead.load(save_path)
    elif kind.startswith("linearized_"):
        model = load_linear(save_path)
    else:
        model = load_standard(save_path)
    return model if device is None else model.to(device)
