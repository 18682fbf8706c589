"""Classifiers: an image encoder, standard or linearised, with its heads; in one file as well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tangent_arithmetic.encoders.backbones.encoder import BackboneEncoder
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedEncoder, linearized
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.encoders.published.formats import ENCODER, HEADS, prefixed
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.checkpoints import CLASSIFIER, Checkpoint, save_tensors
from tangent_arithmetic.storage.statedict import content_hash

if TYPE_CHECKING:
    from jaxtyping import Float

LINEARIZED = "linearized_"
KINDS: dict[str, type[ImageEncoder] | type[BackboneEncoder]] = {
    ImageEncoder.kind: ImageEncoder,
    BackboneEncoder.kind: BackboneEncoder,
}


class _Classifier(nn.Module):
    def __init__(self, image_encoder: nn.Module) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.train_preprocess = getattr(image_encoder, "train_preprocess", None)
        self.val_preprocess = getattr(image_encoder, "val_preprocess", None)


class ImageClassifier(_Classifier):
    """An image encoder with a classification head."""

    def __init__(self, image_encoder: nn.Module, classification_head: nn.Module) -> None:
        super().__init__(image_encoder)
        self.classification_head = classification_head

    def freeze_head(self) -> None:
        """Excludes the head from training."""
        self.classification_head.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Float[Tensor, "batch classes"]:
        """Logits of images."""
        logits: Tensor = self.classification_head(self.image_encoder(inputs))
        return logits

    def save(self, filename: str | Path, **info: Any) -> None:
        """Writes encoder and head to one file; `.pt` becomes `.safetensors`.

        Args:
            filename: the file.
            **info: metadata, JSON-serialisable.
        """
        save_classifier(filename, self.image_encoder, [self.classification_head], **info)

    @classmethod
    def load(cls, filename: str | Path, model_name: str | None = None) -> ImageClassifier:
        """Reads a file that `save` wrote, or a pickled classifier of the public projects.

        Args:
            filename: the file.
            model_name: the model's name; None for the one in the file.

        Raises:
            UsageError: if it holds several heads, or something else.
        """
        encoder, heads = load_classifier(filename, model_name)
        if len(heads) != 1:
            raise UsageError(
                f"{filename} holds {len(heads)} heads, expected one; read it with "
                "MultiHeadImageClassifier.load"
            )
        return cls(encoder, heads[0])


class MultiHeadImageClassifier(_Classifier):
    """An image encoder with one frozen classification head per task."""

    def __init__(self, image_encoder: nn.Module, classification_heads: Sequence[nn.Module]) -> None:
        super().__init__(image_encoder)
        self.classification_heads = nn.ModuleList(classification_heads)
        self.freeze_head()

    def freeze_head(self) -> None:
        """Excludes the heads from training."""
        self.classification_heads.requires_grad_(False)

    def forward(self, inputs: Tensor, head_idx: int) -> Float[Tensor, "batch classes"]:
        """Logits of images for the task with index `head_idx`."""
        logits: Tensor = self.classification_heads[head_idx](self.image_encoder(inputs))
        return logits

    def save(self, filename: str | Path, **info: Any) -> None:
        """Writes encoder and heads to one file; `.pt` becomes `.safetensors`.

        Args:
            filename: the file.
            **info: metadata, JSON-serialisable.
        """
        save_classifier(filename, self.image_encoder, self.classification_heads, **info)

    @classmethod
    def load(cls, filename: str | Path, model_name: str | None = None) -> MultiHeadImageClassifier:
        """Reads a file of `save`, or a pickled one; see `ImageClassifier.load`."""
        return cls(*load_classifier(filename, model_name))


def save_classifier(
    filename: str | Path, encoder: nn.Module, heads: Iterable[nn.Module], **info: Any
) -> str:
    """Writes an encoder and its heads, and returns their content hash.

    Args:
        filename: file to write; `.pt` becomes `.safetensors`.
        encoder: an `ImageEncoder`, a backbone, or the linearisation of one.
        heads: classification heads.
        **info: further metadata, JSON-serialisable.

    Raises:
        UsageError: if the encoder or a head is of another class.
    """
    made = list(heads)
    linear = encoder if isinstance(encoder, LinearizedEncoder) else None
    kind = str(getattr(encoder, "kind", "")) if linear is None else linear.saved_kind
    known = kind.removeprefix(LINEARIZED) in KINDS
    if not known or not all(isinstance(head, ClassificationHead) for head in made):
        names = ", ".join(type(one).__name__ for one in (encoder, *made))
        raise UsageError(
            f"a classifier of {names} cannot be saved; expected an ImageEncoder, a BackboneEncoder "
            "or a linearised one, with ClassificationHeads"
        )
    assert isinstance(encoder, ModuleEncoder)
    theta = prefixed(ENCODER, encoder.weights())
    facts = []
    for i, head in enumerate(made):
        assert isinstance(head, ClassificationHead)
        theta |= prefixed(f"{HEADS}{i}.", head.state_dict())
        facts.append({"normalize": head.normalize, "classnames": list(head.classnames)})
    theta0 = prefixed(ENCODER, linear.weights0()) if linear else None
    inner = {"kind": kind, "info": {"model": encoder.identity(), "built": encoder.built()}}
    return save_tensors(
        filename, theta, CLASSIFIER, theta0, info={**info, "encoder": inner, "heads": facts}
    )


def load_classifier(
    filename: str | Path, model: str | None = None
) -> tuple[ModuleEncoder, list[ClassificationHead]]:
    """Reads the encoder and the heads of a file of ours, or of a pickled classifier.

    Args:
        filename: the file.
        model: the model's name; None for the one in the file.

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it is damaged, incomplete, or holds something else.
    """
    checkpoint = load_checkpoint(filename, kinds=(CLASSIFIER,), model=model)
    inner, facts = checkpoint.info.get("encoder"), checkpoint.info.get("heads")
    if not isinstance(inner, dict) or not isinstance(facts, list):
        raise UsageError(f"{filename} does not describe its encoder and heads; save it again")
    info = inner.get("info")
    theta = _part(checkpoint.theta, ENCODER)
    theta0 = None if checkpoint.theta0 is None else _part(checkpoint.theta0, ENCODER)
    part = Checkpoint(
        theta,
        str(inner.get("kind")),
        content_hash(theta),
        theta0,
        info=info if isinstance(info, dict) else {},
    )
    heads = [_head(checkpoint, i, one, filename) for i, one in enumerate(facts)]
    return _encoder(part, filename), heads


def _head(checkpoint: Checkpoint, index: int, facts: Any, path: str | Path) -> ClassificationHead:
    state = _part(checkpoint.theta, f"{HEADS}{index}.")
    info = facts if isinstance(facts, dict) else {}
    return ClassificationHead.of(Checkpoint(state, "head", content_hash(state), info=info), path)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def _encoder(checkpoint: Checkpoint, filename: str | Path) -> ModuleEncoder:
    """The encoder in a checkpoint of an image encoder."""
    kind = checkpoint.kind.removeprefix(LINEARIZED)
    if kind not in KINDS:
        raise UsageError(
            f"{filename} holds a classifier with a {shown(checkpoint.kind)}, expected one of "
            f"{', '.join(KINDS)}"
        )
    encoder = KINDS[kind].like(checkpoint, filename)
    encoder.load_weights(checkpoint.theta0 or checkpoint.theta)
    if kind == checkpoint.kind:
        return encoder
    linear = linearized(encoder)
    linear.load_weights(checkpoint.theta)
    return linear
