"""The classification heads of a run: zero-shot, published, or a linear probe.

A kept head is used only if it was made of the same: its model, class names and prompts for a
zero-shot head; its pre-trained weights, training pictures and class names for a probe.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tangent_arithmetic.data.base import Pictures, SubsetPictures
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.data.loading import EvalBatches, to_device
from tangent_arithmetic.data.registry import split_record
from tangent_arithmetic.data.sampling import stratified
from tangent_arithmetic.data.templates import get_templates
from tangent_arithmetic.encoders import probe
from tangent_arithmetic.encoders.backbones.encoder import BackboneEncoder
from tangent_arithmetic.encoders.base import BUILT, Encoder
from tangent_arithmetic.encoders.built import ACTIVATION, ADOPTED, checked
from tangent_arithmetic.encoders.clip import UnavailableError, canonical
from tangent_arithmetic.encoders.heads import (
    kept_facts,
    recipe_hash,
    sentence_weights,
    zeroshot_weights,
)
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.encoders.models import (
    has_text_tower,
    load_image_encoder,
    reads_texts,
    weights_file,
)
from tangent_arithmetic.encoders.published.loading import load as load_published
from tangent_arithmetic.run.pretrained import zeroshot_hash
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.digests import json_hash
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage.checkpoints import read_checkpoint
from tangent_arithmetic.storage.statedict import content_hash

logger = logging.getLogger(__name__)

MOST_PICTURES = 50_000  # that a probe is fitted to, and as many to choose its regularisation on


def classification_head(run: Run, dataset: str) -> ClassificationHead:
    """The head of a data set, see `head_file`.

    Args:
        run: the run.
        dataset: the data set; X and XVal share a head.

    Raises:
        UsageError: if a zero-shot head is needed and cannot be built, or a head does not fit.
    """
    path, name = head_file(run, dataset), run.suite.check(dataset).removesuffix("Val")
    head = ClassificationHead.load(path)
    _check_fits(head, len(run.data.classnames(name)), None, path)
    return head


def head_file(run: Run, dataset: str) -> Path:
    """The file of a data set's head in the run's folder, which is made there if it has to be.

    With `--head=auto` it is the zero-shot head; without the text tower's weights a published head
    in the run's folder; for a model that has no text tower that or else a linear probe.

    Args:
        run: the run.
        dataset: the data set; X and XVal share a head.

    Raises:
        UsageError: if a zero-shot head is needed and cannot be built.
    """
    name, kinds = run.suite.check(dataset).removesuffix("Val"), _kinds(run)
    theta0_hash = zeroshot_hash(run) if "probe" in kinds else ""
    facts = kept_facts(run.head_path(name))
    recipe = facts["info"].get("recipe") if facts else None
    if not ddp.broadcast(
        recipe is not None
        and (
            recipe in (_recipe(run, name, kind, theta0_hash, facts["hash"]) for kind in kinds)
            or ("probe" in kinds and recipe == _probe_recipe(run, name, theta0_hash, former=True))
        )
    ):
        if ddp.is_main_process():
            _make(run, name, kinds, theta0_hash)
        ddp.barrier()
    return run.head_path(name)


def evaluated_on(run: Run, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What data sets are evaluated with, for provenance.

    Args:
        run: the run.
        names: X for the test split, XVal for the validation split.

    Returns:
        "splits": hash of the examples by name; "heads": hash of what a head is made of, by X.
    """
    names = list(names)
    sets = dict.fromkeys(name.removesuffix("Val") for name in names)
    heads = {name: read_facts(head_file(run, name))["info"]["recipe"] for name in sets}
    return {"splits": run.data.split_hashes(names), "heads": heads}


def _kinds(run: Run) -> tuple[str, ...]:
    """The kinds of head that `--head` allows, the preferred one first."""
    text, kind = has_text_tower(run.model), run.config.head
    if kind == "zeroshot" and not text:
        raise UsageError(
            f"{run.model} has no text tower, which --head=zeroshot needs; use --head=probe, or "
            "leave --head out"
        )
    if kind != "auto":
        return (kind,)
    return ("zeroshot", "published") if text else ("published", "probe")


def _recipe(run: Run, name: str, kind: str, theta0_hash: str, digest: str) -> str:
    """The hash of what a head of this kind is made of today.

    Args:
        run: the run.
        name: the data set.
        kind: zeroshot, published or probe.
        theta0_hash: content hash of the pre-trained encoder; for a probe.
        digest: content hash of the kept head; for a published one, which is never made again.
    """
    if kind == "zeroshot":
        return _zeroshot_recipe(run, name)
    return (
        _hash("published", digest) if kind == "published" else _probe_recipe(run, name, theta0_hash)
    )


def _make(run: Run, name: str, kinds: Sequence[str], theta0_hash: str) -> None:
    """Writes a head of the first of these kinds that there can be."""
    for kind in kinds:
        if kind == "probe":
            return _make_probe(run, name, theta0_hash)
        if kind == "published":
            if _keep_published(run, name):
                return None
            continue
        try:
            return _make_zeroshot(run, name)
        except UnavailableError as error:
            if "published" not in kinds:
                raise
            if not _published_files(run, name):
                raise UnavailableError(
                    f"{error}. Or put the published head_{name}.pt into {run.folder}, or use "
                    "--head=probe"
                ) from error
            logger.warning("%s: no text tower to build a head with (%s)", name, error)
    return None


def _check_fits(
    head: ClassificationHead, num_classes: int, num_features: int | None, path: Path
) -> None:
    """Raises a UsageError if a head has other classes or features than expected."""
    rows, columns = head.weight.shape
    if rows != num_classes or num_features not in (None, columns):
        features = "" if num_features is None else f" of {num_features} features"
        raise UsageError(
            f"{path} holds a head for {rows} classes of {columns} features, expected {num_classes} "
            f"classes{features}; does it belong to another model or data set? Remove it, or name "
            "another folder with --save"
        )


def _hash(*parts: Any) -> str:
    return json_hash(parts)


# --- zero-shot


def _zeroshot_recipe(run: Run, name: str) -> str:
    recipe = recipe_hash(run.model, run.data.classnames(name), get_templates(name, run.suite))
    facts = _built(run)
    return _hash(recipe, facts.get(ACTIVATION)) if ACTIVATION in facts.get(ADOPTED, ()) else recipe


def _built(run: Run) -> dict[str, Any]:
    """What the run's pre-trained encoder records of how it computes, see `encoders.built`."""
    path = run.zeroshot_path
    facts = read_facts(path)["info"].get(BUILT) if path.is_file() else None
    return checked(facts, path)


def _make_zeroshot(run: Run, name: str) -> None:
    """Builds the head with the model's text tower."""
    logger.info("building the zero-shot head of %s", name)
    classnames, templates = run.data.classnames(name), get_templates(name, run.suite)
    if reads_texts(run.model):
        theta0 = BackboneEncoder.load(run.zeroshot_path, run.model)
        weights = sentence_weights(theta0, classnames, templates, run.device)
        _save_zeroshot(run, name, weights, canonical(run.model))
        return
    encoder = ImageEncoder(run.config, keep_lang=True)
    _check_unchanged(run, encoder)
    encoder.adopt(_built(run), run.zeroshot_path)  # the text tower has the same activation
    weights = zeroshot_weights(encoder.model, classnames, templates, run.device)
    _save_zeroshot(run, name, weights, encoder.model_name)


def _save_zeroshot(run: Run, name: str, weights: Tensor, model: str) -> None:
    head = ClassificationHead(True, weights.cpu(), classnames=run.data.classnames(name))
    head.save(run.head_path(name), model=model, recipe=_zeroshot_recipe(run, name))


def _check_unchanged(run: Run, encoder: ImageEncoder) -> None:
    """Checks that a model in a file or folder is still the one that the run began with.

    Raises:
        UsageError: if it has changed: its text tower would not go with the run's encoder.
    """
    path, own = run.zeroshot_path, weights_file(encoder.model_name) and run.load is None
    if own and path.is_file() and read_facts(path)["hash"] != content_hash(encoder.weights()):
        raise UsageError(
            f"the weights of {encoder.model_name} are no longer those of {path}, which the run "
            "began with; put them back, or name another folder with --save"
        )


# --- published


def _published_files(run: Run, name: str) -> list[Path]:
    """Heads that others made, in the run's folder, under the names of the public projects."""
    stems = (f"head_{name}", f"head_{name}Val")
    files = [run.folder / f"{stem}{end}" for stem in stems for end in (".pt", ".safetensors")]
    return [file for file in files if "published" in kept_facts(file).get("info", ())]


def _keep_published(run: Run, name: str) -> bool:
    """Keeps a published head in our format; whether there is one."""
    for file in _published_files(run, name):
        checkpoint = read_checkpoint(file) or load_published(file)
        if checkpoint.kind != "head":
            raise UsageError(f"{file} holds a {checkpoint.kind}, expected a head")
        head, classnames = ClassificationHead.of(checkpoint, file), run.data.classnames(name)
        width = num_features(_theta0(run)) if run.zeroshot_path.is_file() else None
        _check_fits(head, len(classnames), width, file)
        logger.warning("%s: using the published head %s", name, file)
        head.classnames = classnames
        digest = content_hash(dict(head.state_dict()))
        label = checkpoint.info["published"]
        head.save(run.head_path(name), published=label, recipe=_hash("published", digest))
        return True
    return False


def _theta0(run: Run) -> Encoder:
    """The run's pre-trained encoder, from its file."""
    return load_image_encoder(run.model, run.zeroshot_path)


@torch.no_grad()
def num_features(encoder: Encoder) -> int:
    """The number of features of an encoder."""
    assert encoder.val_preprocess is not None
    example: Any = Image.new("RGB", (64, 64))
    if getattr(encoder.val_preprocess, "reads_texts", False):
        example = "a text"
    return int(encoder.eval()(encoder.val_preprocess(example)[None]).shape[1])


# --- probe


def _probe_recipe(run: Run, name: str, theta0_hash: str, former: bool = False) -> str:
    """A hash of what determines a probe: encoder, pictures, class names.

    Args:
        run: the run.
        name: the data set.
        theta0_hash: content hash of the pre-trained encoder.
        former: that of earlier versions, which did not see the content of pictures. Such a probe is
            kept, since checkpoints record it.
    """
    data = run.data.dataset(f"{name}Val")
    record: dict[str, Any] = dict(split_record(data))
    if not former:
        built = read_facts(run.zeroshot_path)["info"].get(BUILT)  # of any kind of encoder
        record |= {"content": data.content, "built": built}
    return _hash("probe", canonical(run.model), theta0_hash, record, run.data.classnames(name))


def _make_probe(run: Run, name: str, theta0_hash: str) -> None:
    """Fits a head to the features of the frozen pre-trained encoder."""
    encoder, data = _theta0(run), run.data.dataset(f"{name}Val")
    why = "" if has_text_tower(run.model) else f", since {run.model} has no text tower"
    logger.info("fitting a linear probe as the head of %s%s", name, why)
    train, val = (_features(run, encoder, part, name) for part in (data.train, data.test))
    fitted = probe.fit(train, val, data.classnames)
    logger.info(
        "%s: linear probe on %d examples, lambda %g, validation accuracy %.1f %% of %d",
        name,
        len(train.labels),
        fitted.regularisation,
        100 * fitted.accuracy,
        len(val.labels),
    )
    fitted.head.save(
        run.head_path(name),
        model=canonical(run.model),
        recipe=_probe_recipe(run, name, theta0_hash),
        probe={"lambda": fitted.regularisation, "val_accuracy": fitted.accuracy},
        theta0=theta0_hash,
    )


@torch.no_grad()
def _features(run: Run, encoder: Encoder, pictures: Pictures, name: str) -> probe.Labelled:
    """The features of a split, or of a stratified sample of a very large one."""
    if len(pictures) > MOST_PICTURES:
        pictures = _sampled(pictures, MOST_PICTURES)
    batches = EvalBatches(
        pictures, encoder.val_preprocess, run.data.batch_size, run.num_workers, name
    )
    encoder.eval().to(run.device)
    features, labels = [], []
    for batch in progress(batches, f"features of {name} for its probe", len(batches)):
        images, truth = to_device(batch, run.device)
        with run.compute.autocast():
            features.append(encoder(images).float())
        labels.append(truth)
    place = run.device if run.device.type == "cuda" else torch.device("cpu")
    return probe.Labelled(torch.cat(features).to(place), torch.cat(labels).to(place))


def _sampled(pictures: Pictures, count: int) -> Pictures:
    labels = labels_of(pictures)
    if labels.ndim == 1:
        return SubsetPictures(pictures, stratified(labels, count).tolist())
    return SubsetPictures(pictures, np.linspace(0, len(pictures) - 1, count, dtype=int).tolist())
