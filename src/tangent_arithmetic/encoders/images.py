"""CLIP image encoders and classification heads; `encoders/classifiers.py` combines them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.encoders.base import BUILT, ModuleEncoder
from tangent_arithmetic.encoders.built import (
    ACTIVATION,
    ADOPTED,
    COMPARED,
    PREPROCESS,
    activation_of,
    checked,
    differences,
    identify,
    say,
    set_activation,
    transforms_of,
)
from tangent_arithmetic.encoders.clip import (
    VISUAL,
    ClipName,
    canonical,
    check_fits,
    create_clip,
    model_in,
)
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.checkpoints import ENCODERS, Checkpoint, save_tensors

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger(__name__)


class ModelSettings(Protocol):
    """The settings that determine an encoder, such as a parsed command line."""

    model: str
    openclip_cachedir: str
    load: list[str] | None


class VisionTower(nn.Module):
    """The vision tower of a CLIP, under the name that it has in the full model."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Features of images, as `open_clip.CLIP.encode_image`."""
        out = self.visual(images)
        features: Tensor = out[0] if isinstance(out, tuple) else out  # CoCa returns tokens too
        return F.normalize(features, dim=-1) if normalize else features


class ImageEncoder(ModuleEncoder):
    r"""A CLIP image encoder, \(f(x; \theta)\).

    Args:
        args: the model's name, or settings as in the public projects: an object with the attributes
            `model` (that name), `openclip_cachedir` (a folder for downloaded weights) and `load` (a
            checkpoint to read the weights from).
        keep_lang: keeps the full CLIP as `.model`, to build heads. Only the vision tower is saved
            and edited.

    Attributes:
        train_preprocess: transform of a PIL image for training.
        val_preprocess: transform of a PIL image for evaluation.
        model: the vision tower, or the full CLIP with `keep_lang`.
        adopted: of activation and preprocessing, what a file recorded and the name does not imply.
    """

    kind = "image_encoder"

    def __init__(self, args: str | ModelSettings, keep_lang: bool = False) -> None:
        super().__init__()
        if isinstance(args, str):
            self._build(args, None, keep_lang, weights=True)
            return
        paths = [args.load] if isinstance(args.load, str) else args.load or []
        if len(paths) > 1:
            names = ", ".join(map(str, paths))
            raise UsageError(f"--load takes one checkpoint, got {len(paths)}: {names}")
        # a text tower always has the published weights
        self._build(args.model, args.openclip_cachedir, keep_lang, weights=keep_lang or not paths)
        for path in paths:
            checkpoint = load_checkpoint(path, kinds=ENCODERS, model=args.model)
            _check_model(checkpoint, path, self.model_name)
            self.adopt(checkpoint.info.get(BUILT), path)
            self.load_weights(checkpoint.theta)

    def _build(self, model: str, cache_dir: str | None, keep_lang: bool, weights: bool) -> None:
        self.model_name = canonical(model)
        self.adopted: tuple[str, ...] = ()
        clip, self.train_preprocess, self.val_preprocess = create_clip(model, cache_dir, weights)
        self.model: Any = clip if keep_lang else VisionTower(clip.get_submodule("visual"))

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features"]:
        """Features of images, not normalised."""
        features: Tensor = self.model.encode_image(images)
        return features

    def weights(self) -> dict[str, Tensor]:
        """theta: the vision tower's parameters and buffers by name, not copied."""
        return {name: v for name, v in self.state_dict().items() if name.startswith(VISUAL)}

    def identity(self) -> str:
        """The model's name."""
        return self.model_name

    def built(self) -> dict[str, Any]:
        """The activation and the preprocessing, and which of them its name does not imply."""
        config, activation = self.model.visual.preprocess_cfg, activation_of(self.model.visual)
        facts: dict[str, Any] = {PREPROCESS: {n: config[n] for n in COMPARED if n in config}}
        if activation is not None:
            facts[ACTIVATION] = activation
        return {**facts, ADOPTED: list(self.adopted)} if self.adopted else facts

    def adopt(self, recorded: object, source: str | Path) -> None:
        """Uses the activation and the preprocessing that a file records, with a warning.

        Args:
            recorded: the file's record; None if it has none.
            source: the file, for messages.

        Raises:
            UsageError: if they cannot be used with this model.
        """
        facts, visual = checked(recorded, source), self.model.visual
        own, activation = activation_of(visual), facts.get(ACTIVATION)
        if None not in (own, activation) and own != activation:
            set_activation(self.model, str(activation))
            self.adopted = (*self.adopted, ACTIVATION)
            say(
                f"{source} was made with the activation {activation}, which is used instead of the "
                f"{own} of {self.model_name}"
            )
        changed = differences(facts.get(PREPROCESS, {}), visual.preprocess_cfg)
        if "size" in changed:
            raise UsageError(
                f"{source} was made for images of {changed['size']} pixels, but {self.model_name} "
                f"takes {visual.preprocess_cfg['size']}; name the right model with --model"
            )
        if changed:
            visual.preprocess_cfg = {**visual.preprocess_cfg, **changed}
            self.train_preprocess, self.val_preprocess = transforms_of(visual.preprocess_cfg)
            self.adopted = (*self.adopted, PREPROCESS)
            say(
                f"{source} was made with another preprocessing than that of {self.model_name}, "
                f"and it is used: {', '.join(f'{n} {v}' for n, v in changed.items())}"
            )
        if self.adopted:
            transforms = (self.train_preprocess, True), (self.val_preprocess, False)
            for transform, training in transforms:
                identify(transform, visual.preprocess_cfg, training, activation_of(visual))

    @classmethod
    def load(cls, model_name: str | Path, filename: str | Path | None = None) -> ImageEncoder:
        """Reads an encoder from a file.

        Args:
            model_name: the model's name, or the file if it is the only argument.
            filename: the file.
        """
        path = model_name if filename is None else filename
        name = None if filename is None else str(model_name)
        checkpoint = load_checkpoint(path, kinds=ENCODERS, model=name)
        if name is not None:
            _check_model(checkpoint, path, canonical(name))
        encoder = cls.like(checkpoint, path, name)
        encoder.load_weights(checkpoint.theta)
        return encoder

    @classmethod
    def like(
        cls, checkpoint: Checkpoint, path: str | Path, model_name: str | None = None
    ) -> ImageEncoder:
        """An encoder with arbitrary weights, of the architecture of a checkpoint.

        Args:
            checkpoint: the checkpoint.
            path: its file, for messages.
            model_name: the model's name; None for the one in the checkpoint.

        Raises:
            UsageError: if the checkpoint does not fit the model, or its model is not trusted.
        """
        name = model_name or model_in(checkpoint.info, checkpoint.theta, path)
        check_fits(name, checkpoint.theta, path)
        encoder = cls.without_weights(name)
        encoder.adopt(checkpoint.info.get(BUILT), path)
        return encoder

    @classmethod
    def without_weights(cls, model_name: str) -> ImageEncoder:
        """An encoder of this architecture with arbitrary weights; downloads nothing."""
        encoder = cls.__new__(cls)
        ModuleEncoder.__init__(encoder)
        encoder._build(model_name, None, keep_lang=False, weights=False)
        return encoder


def _check_model(checkpoint: Checkpoint, path: str | Path, expected: str) -> None:
    """Raises a `UsageError` if a checkpoint belongs to another model than `expected`.

    If the model's folder was moved, it logs a warning, and the shapes decide.
    """
    name = canonical(str(checkpoint.info.get("model", expected)))
    one, other = ClipName.parse(name), ClipName.parse(expected)
    if "published" in checkpoint.info:  # identified by its shapes: any weights of the architecture
        plain = [clip.architecture.removesuffix("-quickgelu") for clip in (one, other)]
        fits = plain[0] == plain[1]
    else:
        fits = name == expected
    if not fits and one.folder and other.folder and not one.folder.is_dir():
        logger.warning("%s: its model was in %s, now in %s", path, one.folder, other.folder)
    elif not fits:
        raise UsageError(
            f"{path} holds weights of {shown(name)}, expected {expected}; add --model={shown(name)}"
        )


class ClassificationHead(nn.Linear):
    r"""A linear classifier, \(W \phi / \|\phi\| + b\) of features \(\phi\).

    Args:
        normalize: whether to normalise the features.
        weights: W, one row per class.
        biases: b; zero if None.
        classnames: one phrase per class; not used in the computation.
    """

    def __init__(
        self,
        normalize: bool,
        weights: Float[Tensor, "classes features"],
        biases: Float[Tensor, " classes"] | None = None,
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

    def forward(self, inputs: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Logits of features."""
        if self.normalize:
            inputs = F.normalize(inputs, dim=-1)
        return super().forward(inputs)

    def save(self, filename: str | Path, **info: Any) -> None:
        """Writes the head to a file, with `info` as JSON metadata."""
        info = {"normalize": self.normalize, "classnames": list(self.classnames), **info}
        save_tensors(filename, dict(self.state_dict()), "head", info=info)

    @classmethod
    def load(cls, filename: str | Path) -> ClassificationHead:
        """Reads a head from a file."""
        return cls.of(load_checkpoint(filename, kinds=("head",)), filename)

    @classmethod
    def of(cls, checkpoint: Checkpoint, filename: str | Path) -> ClassificationHead:
        """The head in a checkpoint.

        Args:
            checkpoint: the checkpoint.
            filename: its file, for messages.

        Raises:
            UsageError: if it is incomplete.
        """
        theta, normalize = checkpoint.theta, checkpoint.info.get("normalize")
        names = checkpoint.info.get("classnames", [])
        strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if set(theta) != {"weight", "bias"} or not isinstance(normalize, bool) or not strings:
            raise UsageError(
                f"{filename} is not a complete head: it has tensors "
                f"{shown(', '.join(theta)) or '(none)'}, normalize {shown(normalize)}, classnames "
                f"{shown(names)}; expected weight and bias, true or false, and a list of strings"
            )
        try:
            return cls(normalize, theta["weight"], theta["bias"], names)
        except UsageError as error:
            raise UsageError(f"{filename} holds {error}") from error
