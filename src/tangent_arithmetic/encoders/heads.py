"""Zero-shot classification heads, built from the text tower or by an encoder of texts."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.data.registry import get_classnames
from tangent_arithmetic.data.texts import pad
from tangent_arithmetic.encoders.backbones.encoder import BackboneEncoder
from tangent_arithmetic.encoders.clip import canonical
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.runtime.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger(__name__)


@torch.no_grad()
def zeroshot_weights(
    model: nn.Module,
    classnames: Sequence[str],
    templates: Sequence[Callable[[str], str]],
    device: torch.device,
) -> Float[Tensor, "classes features"]:
    r"""Rows \(w_c = s \cdot \mathrm{norm}(\mathrm{mean}_t\, \mathrm{norm}(g(t(c))))\).

    Args:
        model: a CLIP with `encode_text`, `logit_scale` and `tokenizer`.
        classnames: phrases c.
        templates: functions t from a phrase to a prompt.
        device: where to run the text tower g.

    Returns:
        The matrix W in float32; s is `exp(logit_scale)`.

    Source: Radford et al., arXiv:2103.00020, section 3.1.4.
    """
    clip: Any = model
    tokenizer = getattr(clip, "tokenizer", None)
    if tokenizer is None:
        raise UsageError(
            "expected a CLIP with a tokenizer, got one without; build it with "
            "tangent_arithmetic.encoders.clip.create_clip, or set model.tokenizer to the "
            "tokenizer it was trained with"
        )
    clip.eval().to(device)
    return _prompt_weights(
        lambda prompts: clip.encode_text(tokenizer(prompts).to(device)),
        classnames,
        templates,
        clip.logit_scale.exp().float(),
    )


@torch.no_grad()
def sentence_weights(
    encoder: BackboneEncoder,
    classnames: Sequence[str],
    templates: Sequence[Callable[[str], str]],
    device: torch.device,
) -> Float[Tensor, "classes features"]:
    """The rows of `zeroshot_weights` by an encoder of texts, which reads prompts and texts alike.

    Args:
        encoder: with a transform that reads texts.
        classnames: phrases.
        templates: functions from a phrase to a prompt.
        device: where to run the encoder.
    """
    tokenize: Any = encoder.val_preprocess
    encoder.eval().to(device)
    return _prompt_weights(
        lambda prompts: encoder(pad([tokenize(prompt) for prompt in prompts]).to(device)),
        classnames,
        templates,
        float(encoder.model.scale),  # type: ignore[arg-type]
    )


def _prompt_weights(
    embed: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Callable[[str], str]],
    scale: Tensor | float,
) -> Tensor:
    rows = []
    for classname in classnames:
        features = embed([template(classname) for template in templates]).float()
        rows.append(F.normalize(F.normalize(features, dim=-1).mean(dim=0), dim=-1))
    return torch.stack(rows) * scale


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
        model: a CLIP with its tokenizer, for instance `ImageEncoder(args, keep_lang=True).model`.
        dataset_name: the data set, for its class names.
        template: prompts, see `tangent_arithmetic.data.templates.get_templates`.
        data_location: the folder that contains the data sets.
        device: where to run the text tower.
        suite: the suite of the data set, see `get_dataset`.
        cache_dir: folder for generated images.
    """
    classnames = get_classnames(dataset_name, data_location, suite, cache_dir)
    weights = zeroshot_weights(model, classnames, template, torch.device(device))
    return ClassificationHead(True, weights.cpu(), classnames=classnames)


def recipe_hash(
    model: str, classnames: Sequence[str], templates: Sequence[Callable[[str], str]]
) -> str:
    """A hash of what determines a zero-shot head: the model's name and the prompts."""
    prompts = [template(name) for name in classnames for template in templates]
    return hashlib.sha256(json.dumps([canonical(model), prompts]).encode()).hexdigest()


def kept_facts(path: Path) -> dict[str, Any]:
    """A kept head's hash and metadata, see `read_facts`; empty if it is missing or damaged."""
    if not path.is_file():
        return {}
    try:
        return read_facts(path)
    except UsageError:
        logger.warning("%s is damaged; building it again", path)
        return {}
