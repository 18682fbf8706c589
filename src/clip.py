"""A CLIP of any name: architecture, weights, activation, image transforms, tokenizer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from src.errors import UsageError, closest, unknown
from src.tasks import EMBEDDED_MODEL

PLACES = ("hf-hub:", "local-dir:")  # models that come with their configuration and weights
FAILURES = (RuntimeError, OSError, ValueError, KeyError, UnpicklingError, SafetensorError)
Transform = Callable[..., Tensor]


@dataclass(frozen=True)
class ClipName:
    """A model's name taken apart: `ARCHITECTURE[__pretrained__TAG_OR_FILE | __init__]`.

    Attributes:
        architecture: a name of open_clip, or `hf-hub:ORG/NAME` or `local-dir:FOLDER`.
        pretrained: tag or file of the weights; "" for those that come with the architecture, None
            for random ones.
    """

    architecture: str
    pretrained: str | None

    @classmethod
    def parse(cls, name: str) -> ClipName:
        """Takes a name apart; without a tag, the weights are OpenAI's (or the embedded ones)."""
        if name.endswith("__init__"):
            return cls(name.removesuffix("__init__"), None)
        architecture, _, tag = name.partition("__pretrained__")
        if architecture == EMBEDDED_MODEL:
            from src.data.embedded.model import WEIGHTS

            return cls(architecture, tag or str(WEIGHTS))
        if architecture.startswith(PLACES):
            if tag:
                raise UsageError(f"{architecture} has weights of its own, got {tag!r} as well")
            return cls(architecture, "")
        return cls(architecture, tag or "openai")

    @property
    def file(self) -> Path | None:
        """The file of the weights, if they are named by one."""
        path = Path(self.pretrained or "").expanduser()
        return path if self.pretrained and path.is_file() else None


def _known_architectures() -> list[str]:
    import open_clip

    from src.data.embedded.model import register

    register()
    names: list[str] = open_clip.list_models()
    return names


def create_clip(
    name: str, cache_dir: str | Path | None = None, weights: bool = True
) -> tuple[nn.Module, Transform, Transform]:
    """Builds a CLIP and its two image transforms.

    Weights that were trained with QuickGELU (OpenAI's among them) get it, whatever the
    architecture's name says. The model carries its name, and, unless it is only to be filled, its
    tokenizer, as `.tokenizer`.

    Args:
        name: see `ClipName`.
        cache_dir: where open_clip keeps downloaded weights.
        weights: whether to load the pre-trained weights.

    Returns:
        The model in eval mode, the training transform, the evaluation transform.

    Raises:
        UsageError: for a model or weights that are not known, cannot be had or do not fit, or that
            need a package that is not installed.
    """
    import open_clip

    parsed = ClipName.parse(name)
    if not parsed.architecture.startswith(PLACES):
        _check(parsed)
    folder = str(Path(cache_dir).expanduser()) if cache_dir else None
    archive = parsed.file if weights and parsed.file and is_torchscript(parsed.file) else None
    load = weights and parsed.pretrained is not None and archive is None
    try:
        with contextlib.nullcontext() if load else _without_warnings():
            model, train, val = open_clip.create_model_and_transforms(
                parsed.architecture,
                pretrained=(str(parsed.file or parsed.pretrained or "") or None) if load else None,
                load_weights=load,
                cache_dir=folder,
                pretrained_text=False,  # a text tower's own weights are replaced by the CLIP's
                **_options(parsed),
            )
            if archive is not None:  # open_clip would have to execute it
                _read_archive(model, archive)
            if weights:  # what is only filled needs no tokenizer, which may have to be downloaded
                model.tokenizer = open_clip.get_tokenizer(parsed.architecture, cache_dir=folder)
    except ImportError as error:
        raise UsageError(
            f"{parsed.architecture} needs the package {error.name or error}, which is not "
            'installed: pip install -e ".[hub]"'
        ) from error
    except FAILURES as error:
        raise _not_at_hand(parsed, folder, error) from error
    model.name = name
    return model.eval(), train, val


def outline(name: str) -> nn.Module:
    """A CLIP without storage for its weights, for their names, order and shapes.

    Args:
        name: see `ClipName`; its weights do not matter.
    """
    import open_clip

    parsed = ClipName.parse(name)
    if not parsed.architecture.startswith(PLACES):
        _check(parsed)
    with _without_warnings(), torch.device("meta"):
        model: nn.Module = open_clip.create_model(
            parsed.architecture, load_weights=False, device="meta", pretrained_text=False
        )
    return model


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """open_clip warns of random weights; ours come from a file, or do not matter."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def _check(parsed: ClipName) -> None:
    """Raises a UsageError unless open_clip has the architecture and the weights exist."""
    import open_clip

    architecture, tag = parsed.architecture, parsed.pretrained
    if architecture not in _known_architectures():
        raise unknown("model", architecture, _known_architectures())
    if tag is None or parsed.file:
        return
    if architecture == EMBEDDED_MODEL:
        raise unknown(f"weights of {architecture}", tag, ["a file of weights", "none: its own"])
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise unknown(f"weights of {architecture}", tag, [*closest(tag, tags), "a file of weights"])


def _options(parsed: ClipName) -> dict[str, Any]:
    """Activation and transforms that go with the weights, whether they are loaded or not."""
    import open_clip

    architecture, tag = parsed.architecture, parsed.pretrained
    if architecture.startswith(PLACES):
        return {}
    if architecture == EMBEDDED_MODEL:
        from src.data.embedded.model import PREPROCESS

        return {"image_mean": PREPROCESS["mean"], "image_std": PREPROCESS["std"]}
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag in tags:
        config = open_clip.get_pretrained_cfg(architecture, tag)
        return {**_transform_of(config), "force_quick_gelu": bool(config.get("quick_gelu", False))}
    # random weights, or a file: what all published weights of the architecture agree on
    found = [_transform_of(open_clip.get_pretrained_cfg(architecture, tag)) for tag in tags]
    agreed = found[0] if found and all(one == found[0] for one in found) else {}
    return {**agreed, "force_quick_gelu": bool(parsed.file and is_openai(parsed.file))}


def _transform_of(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("mean", "std", "interpolation", "resize_mode")
    return {f"image_{key}": config[key] for key in keys if key in config}


def is_openai(path: Path) -> bool:
    """Whether a file of weights is OpenAI's: a TorchScript archive, or so named.

    OpenAI published TorchScript archives; the copies on the Hugging Face hub lie in repositories
    such as `timm/vit_base_patch32_clip_224.openai`.
    """
    folders = path.absolute().parts[:-1]
    named = "openai" in path.name.lower() or any(part.endswith(".openai") for part in folders)
    return named or is_torchscript(path)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not is_zipfile(path):
        return False
    with ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _read_archive(model: nn.Module, path: Path) -> None:
    """Copies the tensors of a TorchScript archive into a model, without executing its code."""
    from src.published.unpickler import read_pickle, state_of

    found = state_of(read_pickle(path))
    missing = [name for name in model.state_dict() if name not in found]
    if missing:
        raise ValueError(f"it has no {', '.join(missing[:3])}")
    model.load_state_dict({name: found[name].float() for name in model.state_dict()})


def _not_at_hand(parsed: ClipName, folder: str | None, error: Exception) -> UsageError:
    """What was looked for, why it was not found, and where a file may be put."""
    import open_clip
    from huggingface_hub import constants

    architecture, tag = parsed.architecture, parsed.pretrained
    reason = str(error).strip().replace("\n\t", " ").split("\n")[0][:300]
    reason = f"{type(error).__name__}: {reason}"
    if parsed.file:
        return UsageError(
            f"{parsed.file} does not hold the weights of a whole {architecture} ({reason}). The "
            "text tower is needed for the heads; an image encoder alone goes to --load"
        )
    caches = f"{folder or 'the cache of the Hugging Face hub'}"
    offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    if architecture.startswith("hf-hub:"):
        wanted = architecture.removeprefix("hf-hub:")
        return UsageError(
            f"{architecture} cannot be had{offline}: looked for open_clip_config.json and "
            f"open_clip_model.safetensors of {wanted} in {caches} and on the hub ({reason}). "
            "Without a network put both into a folder and say --model=local-dir:FOLDER"
        )
    if architecture.startswith("local-dir:"):
        return UsageError(
            f"{architecture} cannot be read ({reason}); expected open_clip_config.json and "
            "open_clip_model.safetensors in that folder"
        )
    if tag is None:
        return UsageError(f"{architecture} cannot be built ({reason})")
    config = open_clip.get_pretrained_cfg(architecture, tag)
    sources = [f"{config['hf_hub'].strip('/')} on the Hugging Face hub"] if config["hf_hub"] else []
    sources += [config["url"]] if config["url"] else []
    return UsageError(
        f"the weights {tag} of {architecture} are not at hand{offline}: looked in {caches} and for "
        f"{' and '.join(sources)} ({reason}). Without a network copy the file from a machine that "
        f"has it and say --model={architecture}__pretrained__FILE, or copy that cache and name it "
        f"with --openclip-cachedir. Other weights: "
        f"{', '.join(open_clip.list_pretrained_tags_by_model(architecture))}; "
        f"random ones: --model={architecture}__init__"
    )
