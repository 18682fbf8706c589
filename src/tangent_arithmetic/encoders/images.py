"""CLIP image encoders, classification heads and the two together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.encoders.base import Transform
from tangent_arithmetic.encoders.clip import (
    ClipName,
    canonical,
    check_fits,
    create_clip,
    model_in,
)
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.checkpoints import ENCODERS, Checkpoint, save_tensors
from tangent_arithmetic.storage.statedict import copy_into

logger = logging.getLogger(__name__)

VISUAL = "model.visual."


class ModelSettings(Protocol):
    """The settings that an encoder is made of, such as a parsed command line."""

    model: str
    openclip_cachedir: str
    load: list[str] | None


class VisionTower(nn.Module):
    """The vision tower of a CLIP under the name it has in the whole model, and nothing else."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Features of images, as `open_clip.CLIP.encode_image`."""
        found = self.visual(images)
        features: Tensor = found[0] if isinstance(found, tuple) else found  # CoCa gives tokens too
        return F.normalize(features, dim=-1) if normalize else features


class ImageEncoder(nn.Module):
    r"""A CLIP image encoder, \(f(x; \theta)\).

    Args:
        args: the model's name, or settings as the public projects have them: an object whose
            `model` is that name, `openclip_cachedir` a folder for downloaded weights, and `load` a
            checkpoint to take the weights from.
        keep_lang: keeps the whole CLIP as `.model`, to build heads. The vision tower alone is saved
            and summed all the same.

    Attributes:
        train_preprocess: transform of a PIL image for training.
        val_preprocess: transform of a PIL image for evaluation.
        model: the vision tower, or with `keep_lang` the whole CLIP.
    """

    train_preprocess: Transform | None
    val_preprocess: Transform | None

    def __init__(self, args: str | ModelSettings, keep_lang: bool = False) -> None:
        super().__init__()
        if isinstance(args, str):
            self._fill(args, None, None, keep_lang)
        else:
            load = args.load[0] if isinstance(args.load, list) else args.load
            self._fill(args.model, args.openclip_cachedir, load, keep_lang)

    @classmethod
    def named(
        cls, model: str, cache_dir: str | None, load: str | None, keep_lang: bool = False
    ) -> ImageEncoder:
        """The encoder of a model.

        Args:
            model: the model's name.
            cache_dir: folder for downloaded weights; None for open_clip's own.
            load: a checkpoint to take the weights from; None for the published ones.
            keep_lang: as for the class.
        """
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder._fill(model, cache_dir, load, keep_lang)
        return encoder

    def _fill(self, model: str, cache_dir: str | None, load: str | None, keep_lang: bool) -> None:
        published = load is None or keep_lang  # the text tower is always the published one
        self._build(model, cache_dir, keep_lang, published)
        if load is not None:
            state = load_checkpoint(load, kinds=ENCODERS, model=model)
            _check_model(state, load, self.model_name)
            self.load_weights(state.theta)

    def _build(
        self, model_name: str, cache_dir: str | None, keep_lang: bool, weights: bool
    ) -> None:
        self.model_name = canonical(model_name)
        self.cache_dir = cache_dir
        model, train, val = create_clip(model_name, cache_dir, weights)
        self.train_preprocess, self.val_preprocess = train, val
        self.model: Any = model if keep_lang else VisionTower(model.get_submodule("visual"))

    def forward(self, images: Tensor) -> Tensor:
        """Features of images, shape (batch, features), not normalised."""
        features: Tensor = self.model.encode_image(images)
        return features

    def weights(self) -> dict[str, Tensor]:
        """theta: the vision tower's parameters and buffers, by name (not copied)."""
        state: dict[str, Tensor] = self.state_dict()
        return {name: value for name, value in state.items() if name.startswith(VISUAL)}

    def load_weights(self, theta: Mapping[str, Tensor]) -> None:
        """Copies theta into the vision tower.

        Raises:
            ValueError: if names or shapes differ, listing all differences.
        """
        copy_into(self.weights(), theta, f"weights of {self.model_name} and the checkpoint")

    def identity(self) -> str:
        """The model's name."""
        return self.model_name

    def save(self, filename: str | Path, **info: Any) -> str:
        """Writes the encoder to a file and returns the content hash of theta.

        Args:
            filename: file to write; `.pt` becomes `.safetensors`.
            **info: facts to keep with the weights; `theta0_hash` is kept as such.
        """
        theta0_hash = info.pop("theta0_hash", None)
        info = {"model": self.model_name, **info}
        return save_tensors(
            filename, self.weights(), "image_encoder", theta0_hash=theta0_hash, info=info
        )

    @classmethod
    def load(
        cls, model_name: str | Path, filename: str | Path | None = None, made_by: str | None = None
    ) -> ImageEncoder:
        """Reads an encoder from a file.

        Args:
            model_name: the model's name, or the file if that is the only argument.
            filename: the file.
            made_by: the command that makes the file, for the message if it is missing.
        """
        path = model_name if filename is None else filename
        named = None if filename is None else str(model_name)
        state = load_checkpoint(path, made_by, ENCODERS, named)
        name = named or model_in(state.info, state.theta, path)
        _check_model(state, path, canonical(name))
        check_fits(name, state.theta, path)
        encoder = cls.without_weights(name)
        encoder.load_weights(state.theta)
        return encoder

    @classmethod
    def without_weights(cls, model_name: str) -> ImageEncoder:
        """An encoder of this architecture, to be filled; nothing is downloaded."""
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder._build(model_name, None, keep_lang=False, weights=False)
        return encoder


def _check_model(state: Checkpoint, path: str | Path, own: str) -> None:
    """Checks that a checkpoint is of the model that it is read for.

    A folder that is gone may lie elsewhere by now: shapes decide, and a warning tells.

    Args:
        state: the checkpoint.
        path: its file, for messages.
        own: the model's name, see `canonical`.

    Raises:
        UsageError: if it is of another one.
    """
    found = canonical(str(state.info.get("model", own)))
    one, other = ClipName.parse(found), ClipName.parse(own)
    if "published" in state.info:  # by its shapes: of the architecture, whatever its weights
        plain = [name.architecture.removesuffix("-quickgelu") for name in (one, other)]
        fits = plain[0] == plain[1]
    else:
        fits = found == own
    if not fits and one.folder and other.folder and not one.folder.is_dir():
        logger.warning("%s: its model was in %s, now in %s", path, one.folder, other.folder)
    elif not fits:
        raise UsageError(
            f"{path} holds weights of {shown(found)}, expected {own}; add --model={shown(found)}"
        )


class ClassificationHead(nn.Linear):
    r"""A linear classifier, \(W \phi / \|\phi\| + b\) of features \(\phi\).

    Args:
        normalize: whether to normalise the features.
        weights: shape (classes, features).
        biases: shape (classes,); zero if None.
        classnames: a phrase a class, kept for the reader.
    """

    def __init__(
        self,
        normalize: bool,
        weights: Tensor,
        biases: Tensor | None = None,
        classnames: Sequence[str] = (),
    ) -> None:
        biases = torch.zeros(weights.shape[:1]) if biases is None else biases
        real = weights.is_floating_point() and biases.is_floating_point()
        if not real or weights.ndim != 2 or biases.shape != weights.shape[:1]:
            raise UsageError(
                f"a head of {weights.dtype} weights {tuple(weights.shape)} and {biases.dtype} "
                f"biases {tuple(biases.shape)}, expected real (classes, features) and (classes,)"
            )
        num_classes, num_features = weights.shape
        super().__init__(num_features, num_classes)
        self.normalize = normalize
        self.classnames = tuple(classnames)
        with torch.no_grad():
            self.weight.copy_(weights)
            self.bias.copy_(biases)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, shape (batch, classes), of features, shape (batch, features)."""
        if self.normalize:
            inputs = F.normalize(inputs, dim=-1)
        return super().forward(inputs)

    def save(self, filename: str | Path, **info: Any) -> None:
        """Writes the head to a file, with facts to keep beside it."""
        info = {"normalize": self.normalize, "classnames": list(self.classnames), **info}
        save_tensors(filename, dict(self.state_dict()), "head", info=info)

    @classmethod
    def load(cls, filename: str | Path) -> ClassificationHead:
        """Reads a head from a file."""
        state = load_checkpoint(filename, kinds=("head",))
        theta, normalize = state.theta, state.info.get("normalize")
        names = state.info.get("classnames", [])
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if set(theta) != {"weight", "bias"} or not isinstance(normalize, bool) or not texts:
            raise UsageError(
                f"{filename} is no whole head: it has {shown(', '.join(theta)) or 'no tensors'}, "
                f"normalize {shown(normalize)}, classnames {shown(names)}; expected weight and "
                "bias, true or false, and texts"
            )
        try:
            return cls(normalize, theta["weight"], theta["bias"], names)
        except UsageError as error:
            raise UsageError(f"{filename} holds {error}") from error


class ImageClassifier(nn.Module):
    """An image encoder with a classification head."""

    def __init__(self, image_encoder: nn.Module, classification_head: nn.Module) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.classification_head = classification_head
        self.train_preprocess = getattr(image_encoder, "train_preprocess", None)
        self.val_preprocess = getattr(image_encoder, "val_preprocess", None)

    def freeze_head(self) -> None:
        """Stops training the head."""
        self.classification_head.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, shape (batch, classes), of images."""
        logits: Tensor = self.classification_head(self.image_encoder(inputs))
        return logits


class MultiHeadImageClassifier(nn.Module):
    """An image encoder with one classification head a task; the heads are frozen."""

    def __init__(self, image_encoder: nn.Module, classification_heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.classification_heads = nn.ModuleList(classification_heads)
        self.train_preprocess = getattr(image_encoder, "train_preprocess", None)
        self.val_preprocess = getattr(image_encoder, "val_preprocess", None)
        self.freeze_head()

    def freeze_head(self) -> None:
        """Stops training the heads."""
        self.classification_heads.requires_grad_(False)

    def forward(self, inputs: Tensor, head_idx: int) -> Tensor:
        """Logits of images for the task of this index."""
        logits: Tensor = self.classification_heads[head_idx](self.image_encoder(inputs))
        return logits
