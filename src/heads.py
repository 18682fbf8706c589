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

from src import ddp
from src.checkpoints import read_facts
from src.clip import ClipName, canonical
from src.data.registry import get_classnames
from src.data.templates import get_templates
from src.errors import UsageError
from src.modeling import ClassificationHead, ImageEncoder
from src.settings import (
    cache_dir,
    data_root,
    device_of,
    head_path,
    pretrained_override,
    setting,
    suite_of,
    zeroshot_path,
)
from src.statedict import content_hash

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
            "the CLIP model carries no tokenizer; build it with src.clip.create_clip, or set "
            "model.tokenizer to the one it was trained with"
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
        template: prompts, see `src.data.templates.get_templates`.
        data_location: root of the data sets' folders.
        device: where to run the text tower.
        suite: where the name resolves, see `get_dataset`.
        cache_dir: where drawn pictures are kept.
    """
    classnames = get_classnames(dataset_name, data_location, suite, cache_dir)
    weights = zeroshot_weights(model, classnames, template, torch.device(device))
    return ClassificationHead(True, weights.cpu(), classnames=classnames)


def _recipe_hash(args: Any, classnames: Sequence[str], templates: Sequence[Any]) -> str:
    prompts = [template(name) for name in classnames for template in templates]
    facts = [canonical(str(setting(args, "model"))), prompts]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def get_classification_head(args: Any, dataset: str) -> ClassificationHead:
    """The zero-shot head of a data set, from the run's folder, or built and kept there.

    A kept head is used only if its model, class names and prompts are those of today.

    Args:
        args: settings.
        dataset: the data set; X and XVal share a head.
    """
    suite, path = suite_of(args), head_path(args, dataset)
    name = suite.check(dataset).removesuffix("Val")
    classnames = get_classnames(name, data_root(args), suite.name, cache_dir(args))
    templates = get_templates(name, suite.name)
    recipe = _recipe_hash(args, classnames, templates)
    if not ddp.all_agree(_is_current(path, recipe)):
        if ddp.is_main_process():
            logger.info("building the zero-shot head of %s", name)
            encoder = ImageEncoder(args, keep_lang=True)
            _check_unchanged(args, encoder)
            weights = zeroshot_weights(encoder.model, classnames, templates, device_of(args))
            head = ClassificationHead(True, weights.cpu(), classnames=classnames)
            head.save(path, model=encoder.model_name, recipe=recipe)
        ddp.barrier()
    return ClassificationHead.load(path)


def _check_unchanged(args: Any, encoder: ImageEncoder) -> None:
    """Checks that a model in a file or folder is still the one that the run began with.

    Raises:
        UsageError: if it has changed: its text tower would not go with the run's encoder.
    """
    path, parsed = zeroshot_path(args), ClipName.parse(encoder.model_name)
    own = (parsed.file or parsed.folder) and pretrained_override(args) is None
    if own and path.is_file() and read_facts(path)["hash"] != content_hash(encoder.weights()):
        raise UsageError(
            f"the weights of {encoder.model_name} are no longer those of {path}, which the run "
            "began with; put them back, or name another folder with --save"
        )


def _is_current(path: Path, recipe: str) -> bool:
    if not path.is_file():
        return False
    try:
        return bool(read_facts(path)["info"].get("recipe") == recipe)
    except UsageError:
        logger.warning("%s is damaged and built again", path)
        return False
