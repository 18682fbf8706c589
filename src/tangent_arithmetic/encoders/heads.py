"""Zero-shot classification heads from the text tower, built once and cached on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.data.registry import get_classnames
from tangent_arithmetic.encoders.clip import canonical
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.runtime.errors import UsageError

logger = logging.getLogger(__name__)


@torch.no_grad()
def zeroshot_weights(
    model: Any,
    classnames: Sequence[str],
    templates: Sequence[Callable[[str], str]],
    device: torch.device,
) -> Tensor:
    r"""Rows \(w_c = s \cdot \mathrm{norm}(\mathrm{mean}_t\, \mathrm{norm}(g(t(c))))\).

    Args:
        model: a CLIP with `encode_text`, `logit_scale` and its own `tokenizer`.
        classnames: phrases c.
        templates: functions t from a phrase to a prompt.
        device: where to run the text tower g.

    Returns:
        float32 tensor of shape (classes, features); s is `exp(logit_scale)`.

    Source: Radford et al., arXiv:2103.00020, section 3.1.4.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise UsageError(
            "the CLIP model carries no tokenizer; build it with "
            "tangent_arithmetic.encoders.clip.create_clip, or set model.tokenizer to the "
            "one it was trained with"
        )
    model.eval().to(device)
    rows = []
    for classname in classnames:
        tokens = tokenizer([template(classname) for template in templates]).to(device)
        embedding = F.normalize(model.encode_text(tokens).float(), dim=-1).mean(dim=0)
        rows.append(F.normalize(embedding, dim=-1))
    return torch.stack(rows) * model.logit_scale.exp().float()


def build_classification_head(
    model: nn.Module,
    dataset_name: str,
    template: Sequence[Callable[[str], str]],
    data_location: str | Path,
    device: str | torch.device,
    suite: str | None = None,
    cache_dir: str | Path | None = None,
) -> ClassificationHead:
    """The zero-shot head of a data set.

    Args:
        model: a CLIP that carries its tokenizer, for instance `ImageEncoder(args, True).model`.
        dataset_name: the data set, for its class names.
        template: prompts, see `tangent_arithmetic.data.templates.get_templates`.
        data_location: root of the data sets' folders.
        device: where to run the text tower.
        suite: where the name resolves, see `get_dataset`.
        cache_dir: where drawn pictures are kept.
    """
    classnames = get_classnames(dataset_name, data_location, suite, cache_dir)
    weights = zeroshot_weights(model, classnames, template, torch.device(device))
    return ClassificationHead(True, weights.cpu(), classnames=classnames)


def recipe_hash(
    model: str, classnames: Sequence[str], templates: Sequence[Callable[[str], str]]
) -> str:
    """A hash of what a zero-shot head is made of: the model's name and the prompts."""
    prompts = [template(name) for name in classnames for template in templates]
    return hashlib.sha256(json.dumps([canonical(model), prompts]).encode()).hexdigest()


def is_current(path: Path, recipe: str) -> bool:
    """Whether there is a head at `path` made by this recipe."""
    if not path.is_file():
        return False
    try:
        return bool(read_facts(path)["info"].get("recipe") == recipe)
    except UsageError:
        logger.warning("%s is damaged and built again", path)
        return False
