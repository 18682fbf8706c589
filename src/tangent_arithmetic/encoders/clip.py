"""Builds CLIPs by name: architecture, weights, activation, image transforms, tokenizer."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor, nn

from tangent_arithmetic.data.suites import EMBEDDED_MODEL, READS_TEXT
from tangent_arithmetic.encoders.base import Transform, check_shapes
from tangent_arithmetic.encoders.built import say
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, closest, shown, unknown
from tangent_arithmetic.runtime.private import expanded, without_home
from tangent_arithmetic.storage.checkpoints import read_safetensors
from tangent_arithmetic.storage.reading import read_json, refuse_pointer

HUB, FOLDER = "hf-hub:", "local-dir:"
PLACES = (HUB, FOLDER)  # of models with their own configuration and weights
VISUAL = "model.visual."
CONFIG = "open_clip_config.json"
# tokenizer options allowed in a configuration; none of them executes code
HARMLESS = (
    "additional_special_tokens bpe_path clean language reduction_mask strip_sep_token use_fast"
)
MOST_LAYERS = 1_000  # all towers together; the largest CLIPs have about 100
MOST_NUMBERS = 20_000_000_000  # in a model whose file of weights is not available
SPARE_NUMBERS = 10_000_000  # for masks, which are not stored in files
_named: set[str] = set()  # models built in this process at the user's request


class UnavailableError(UsageError):
    """A model cannot be built from the files that are at hand."""


@dataclass(frozen=True)
class ClipName:
    """A parsed model name, `ARCHITECTURE[__pretrained__TAG_OR_FILE | __init__]`.

    Attributes:
        architecture: an open_clip architecture, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.
        pretrained: tag or file of the weights; "" for weights that come with the architecture, None
            for random initialisation.
    """

    architecture: str
    pretrained: str | None

    @classmethod
    def parse(cls, name: str) -> ClipName:
        """Parses a name; without a tag, the weights are OpenAI's (or the embedded ones)."""
        if name.endswith("__init__"):
            return cls(name.removesuffix("__init__"), None)
        architecture, _, tag = name.partition("__pretrained__")
        if architecture == EMBEDDED_MODEL:
            from tangent_arithmetic.data.embedded.model import WEIGHTS

            return cls(architecture, tag or str(WEIGHTS))
        if architecture.startswith(PLACES):
            if tag:
                raise UsageError(f"{architecture} has its own weights; remove __pretrained__{tag}")
            return cls(architecture, "")
        return cls(architecture, tag or "openai")

    @property
    def has_own_config(self) -> bool:
        """Whether configuration and weights come from the hub or a folder, not from open_clip."""
        return self.architecture.startswith(PLACES)

    @property
    def file(self) -> Path | None:
        """The file of the weights, if the name contains one."""
        path = expanded(self.pretrained or "")
        with contextlib.suppress(OSError, ValueError):  # not a valid file name
            return path if self.pretrained and path.is_file() else None
        return None

    @property
    def folder(self) -> Path | None:
        """The absolute folder of a `local-dir:` model; None for other models."""
        if not self.architecture.startswith(FOLDER):
            return None
        return _absolute(self.architecture.removeprefix(FOLDER))

    @property
    def place(self) -> str:
        """The architecture as open_clip expects it."""
        return f"{FOLDER}{self.folder}" if self.folder else self.architecture


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(expanded(path)))  # noqa: PTH100 - a/../b is b


def canonical(name: str) -> str:
    """The canonical form of a model's name, independent of the working directory.

    Paths become absolute, with `~` for the home folder.
    """
    parsed, end = ClipName.parse(name), "__init__" if name.endswith("__init__") else ""
    if parsed.folder:
        return f"{FOLDER}{without_home(parsed.folder)}{end}"
    scheme, _, place = name.removesuffix("__init__").partition(":")
    path, mark, query = place.partition("?")
    if f"{scheme}:" in READS_TEXT and expanded(path).is_dir():
        return f"{scheme}:{without_home(_absolute(path))}{mark}{query}{end}"
    architecture, separator, tag = name.partition("__pretrained__")
    if not end and ("/" in tag or "." in tag):  # a file: no tag contains these characters
        return f"{architecture}{separator}{without_home(_absolute(tag))}"
    return name


def model_in(info: Mapping[str, Any], theta: Mapping[str, Tensor], source: str | Path) -> str:
    """The model named in a file of weights, validated before anything is built.

    The name is untrusted: it must not make us open other files or use the network. Allowed are an
    architecture and tag that open_clip knows, and any name that the user has used in this process.

    Args:
        info: metadata of the file.
        theta: the vision tower's weights in the file; names and shapes must match the model.
        source: the file, for messages.

    Raises:
        UsageError: if the model is missing or untrusted, or its shapes differ.
    """
    name = info.get("model")
    if not isinstance(name, str):
        raise UsageError(f"{source} does not state its model; use ImageEncoder.load(NAME, FILE)")
    if canonical(name) not in _named:
        check_hint(name, source)
    check_fits(name, theta, source)
    return name


def check_hint(name: str, source: str | Path) -> None:
    """Raises a UsageError if a model name from a file would need other files or the network."""
    import open_clip

    architecture, _, tag = name.removesuffix("__init__").partition("__pretrained__")
    if architecture in _known_architectures():
        text = (open_clip.get_model_config(architecture) or {}).get("text_cfg", {})
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        trusted = "hf_model_name" not in text and (not tag or tag in tags)
    elif architecture.startswith(PLACES):
        trusted = False
    else:
        near = closest(architecture[:200], _known_architectures())[:5]
        raise UsageError(f"{source}: {unknown('model', shown(architecture), near)}")
    if not trusted:
        raise UsageError(
            f"{source} states the model {shown(name)}, which needs other files or the network; "
            "names in files are not trusted with these. If it is right, name the model yourself: "
            "--model=NAME, or ImageEncoder.load(NAME, FILE)"
        )


def check_fits(name: str, theta: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises a UsageError if weights differ from a model's vision tower in names or shapes."""
    check_shapes(shapes(name), theta, name, source, "Does it belong to another --model?")


def named_models() -> list[str]:
    """The models that were built in this process at the user's request."""
    return sorted(_named)


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names, as in our checkpoints, and shapes of the weights of a model's vision tower."""
    state = outlined(name).get_submodule("visual").state_dict()
    return {f"{VISUAL}{key}": tuple(value.shape) for key, value in state.items()}


def _known_architectures() -> list[str]:
    import open_clip

    from tangent_arithmetic.data.embedded.model import register

    register()
    names: list[str] = open_clip.list_models()
    return names


def create_clip(
    name: str, cache_dir: str | Path | None = None, weights: bool = True
) -> tuple[nn.Module, Transform, Transform]:
    """Builds a CLIP and its two image transforms.

    Weights that were trained with QuickGELU (among them OpenAI's) are used with it, whatever the
    architecture's name says. The model gets its name as `.name` and, if `weights`, its tokenizer as
    `.tokenizer`.

    Args:
        name: see `ClipName`.
        cache_dir: folder for weights that open_clip downloads.
        weights: whether to load the pre-trained weights.

    Returns:
        The model in eval mode, the training transform, the evaluation transform.

    Raises:
        UsageError: if the model or its weights are unknown, unavailable or do not match, or a
            package is not installed.
    """
    import open_clip

    parsed = ClipName.parse(name)
    folder = str(expanded(cache_dir)) if cache_dir else None
    _check(parsed)
    load = weights and parsed.pretrained is not None
    if load:
        _say_unrecorded(parsed)
    with _not_at_hand(parsed, folder):
        if parsed.has_own_config:
            _check_size(parsed, folder, load)
        with _safely(parsed), contextlib.nullcontext() if load else _without_warnings():
            model, train, val = open_clip.create_model_and_transforms(
                parsed.place,
                pretrained=(str(parsed.file or parsed.pretrained or "") or None) if load else None,
                load_weights=load,
                cache_dir=folder,
                pretrained_text=False,  # the CLIP's weights replace those of the text tower
                **_options(parsed),
            )
        if weights:  # otherwise no tokenizer is needed, which might have to be downloaded
            model.tokenizer = _tokenizer(parsed, folder)
    _named.add(canonical(name))
    model.name = name
    for transform, training in ((train, True), (val, False)):  # see arithmetic/features.py
        transform.recipe = {"open_clip": model.visual.preprocess_cfg, "training": training}
    return model.eval(), train, val


def outline(name: str, cache_dir: str | None = None) -> nn.Module:
    """A CLIP on the meta device: names, order and shapes of its weights, without storage.

    Args:
        name: see `ClipName`; the part that names the weights is ignored.
        cache_dir: folder for files that open_clip downloads.
    """
    import open_clip

    parsed = ClipName.parse(name)
    _check(parsed)
    with _not_at_hand(parsed, cache_dir), _without_warnings(), torch.device("meta"):
        if parsed.has_own_config:
            _own_config(parsed, cache_dir)
        options: dict[str, Any] = {"load_weights": False, "pretrained_text": False}
        model: nn.Module = open_clip.create_model(
            parsed.place, device="meta", cache_dir=cache_dir, **options
        )
    return model


outlined = cache(outline)


def _own_config(parsed: ClipName, cache_dir: str | None) -> dict[str, Any]:
    """The validated configuration of a hub or folder model.

    Raises:
        MissingFileError: if there is none.
        UsageError: if it would execute code, refers to another model, or has too many layers.
    """
    from open_clip.pretrained import download_pretrained_from_hf

    if parsed.folder is None:
        hub = parsed.architecture.removeprefix(HUB)
        path = Path(download_pretrained_from_hf(hub, CONFIG, cache_dir=cache_dir))
    else:
        path = parsed.folder / CONFIG
        if not path.is_file():
            raise MissingFileError(
                f"{parsed.architecture} cannot be read; expected {CONFIG} and "
                f"open_clip_model.safetensors in {parsed.folder}"
            )
    config: Any = read_json(path).get("model_cfg")
    keys = ("vision_cfg", "text_cfg", "multimodal_cfg")
    towers: list[Any] = [config.get(key, {}) for key in keys] if isinstance(config, dict) else []
    if not towers or not all(isinstance(tower, dict) for tower in towers):
        raise UsageError(f"{path}: expected a model_cfg with vision_cfg and text_cfg, got none")
    options, allowed = towers[1].get("tokenizer_kwargs") or {}, HARMLESS.split()
    strange = sorted(set(options) - set(allowed)) if isinstance(options, dict) else ["no mapping"]
    if strange:
        raise UsageError(
            f"{path} is refused: its tokenizer_kwargs contain {', '.join(map(shown, strange))}, "
            f"which may execute code; allowed are {', '.join(allowed)}"
        )
    timm = towers[0].get("timm_model_name")
    if timm is not None and (not isinstance(timm, str) or ":" in timm or "/" in timm):
        raise UsageError(
            f"{path} is refused: timm_model_name {shown(timm)} is not a timm architecture"
        )
    layers = [tower.get("layers", 0) for tower in towers]
    counts = [n for part in layers for n in (part if isinstance(part, list) else [part])]
    if not all(type(n) is int and n >= 0 for n in counts) or sum(counts) > MOST_LAYERS:
        raise UsageError(
            f"{path} is refused: expected at most {MOST_LAYERS} layers, got {shown(layers)}"
        )
    return dict(config)


def _check_size(parsed: ClipName, cache_dir: str | None, weights: bool) -> None:
    """Checks, before a model is built, that it is not larger than its file of weights.

    Raises:
        MissingFileError: if `weights` and there is no such file.
        UsageError: if the configuration describes a larger model.
    """
    from open_clip.pretrained import download_pretrained_from_hf

    model, files = outline(parsed.architecture, cache_dir), list[Path]()
    if parsed.folder is not None:
        kinds = (".safetensors", ".bin", ".pth")
        files = [path for path in parsed.folder.iterdir() if path.suffix in kinds]
        if weights and not files:
            raise MissingFileError(f"no weights (*.safetensors, *.bin or *.pth) in {parsed.folder}")
    elif weights:
        hub = parsed.architecture.removeprefix(HUB)
        files = [Path(download_pretrained_from_hf(hub, cache_dir=cache_dir))]
    size = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    most = max((file.stat().st_size for file in files), default=MOST_NUMBERS) + SPARE_NUMBERS
    if size > most:
        raise UsageError(
            f"{parsed.architecture} is refused: its configuration describes {size:,} weights, but "
            f"its file holds at most {most:,}"
        )


def tokenizer_of(name: str, cache_dir: str | Path | None = None) -> Any:
    """The tokenizer of a CLIP, by its name; from texts to ids (texts, context length)."""
    return _tokenizer(ClipName.parse(name), str(cache_dir) if cache_dir else None)


def _tokenizer(parsed: ClipName, cache_dir: str | None) -> Any:
    """The model's tokenizer; never executes code from the hub."""
    import open_clip

    if parsed.has_own_config:
        config: Any = _own_config(parsed, cache_dir)
    else:
        config = open_clip.get_model_config(parsed.architecture) or {}
    foreign = config.get("text_cfg", {}).get("hf_tokenizer_name")
    trust = {"trust_remote_code": False} if foreign else {}
    return open_clip.get_tokenizer(parsed.place, cache_dir=cache_dir, **trust)


@contextlib.contextmanager
def _safely(parsed: ClipName) -> Iterator[None]:
    """Makes open_clip read files of weights with our readers, which execute no code.

    open_clip tries `torch.load(weights_only=True)`, but falls back to full unpickling. It also
    interpolates positional embeddings of another size, which the user's own files must not need.
    """
    from open_clip import factory

    def load_state_dict(checkpoint_path: str, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        from tangent_arithmetic.storage.unpickler import Stub, read_pickle
        from tangent_arithmetic.storage.wrappers import unwrapped

        path = Path(checkpoint_path)
        refuse_pointer(path)
        content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
        if not isinstance(content, Stub):
            return unwrapped(content, path).tensors
        own = outlined(f"{parsed.architecture}__init__").state_dict()
        state = unwrapped({"model": content}, path).tensors  # with masks and sizes, too
        return {name: value for name, value in state.items() if name in own}

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(factory, "load_state_dict", load_state_dict))
        if parsed.file or parsed.folder:  # a file of another size is one of another model
            for resize in ("resize_pos_embed", "resize_text_pos_embed"):
                stack.enter_context(patch.object(factory, resize, lambda *args, **kwargs: None))
        yield


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences open_clip's warning about random weights, which are replaced or unused."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def _check(parsed: ClipName) -> None:
    """Raises a UsageError unless open_clip knows the architecture and the weights."""
    import open_clip

    architecture, tag = parsed.architecture, parsed.pretrained
    if parsed.folder is not None and not parsed.folder.is_dir():
        raise MissingFileError(
            f"no folder at {parsed.folder}, the place of {architecture}. Restore it, or name the "
            "model's new folder: --model=local-dir:FOLDER"
        )
    if parsed.has_own_config:
        return
    if architecture not in _known_architectures():
        raise unknown("model", architecture, _known_architectures())
    if tag is None or parsed.file:
        return
    if architecture == EMBEDDED_MODEL:
        raise unknown(f"weights of {architecture}", tag, ["a file of weights", "no tag"])
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise unknown(f"weights of {architecture}", tag, [*closest(tag, tags), "a file of weights"])


def _options(parsed: ClipName) -> dict[str, Any]:
    """The activation and transforms that belong to the weights."""
    import open_clip

    architecture, tag = parsed.architecture, parsed.pretrained
    if parsed.has_own_config:
        return {}
    if architecture == EMBEDDED_MODEL:
        from tangent_arithmetic.data.embedded.model import PREPROCESS

        return {"image_mean": PREPROCESS["mean"], "image_std": PREPROCESS["std"]}
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag in tags:
        config = open_clip.get_pretrained_cfg(architecture, tag)
        return {**_transform_of(config), "force_quick_gelu": bool(config.get("quick_gelu", False))}
    # random weights, or a file: use what all published weights of the architecture share
    options = [_transform_of(open_clip.get_pretrained_cfg(architecture, tag)) for tag in tags]
    agreed = options[0] if options and all(each == options[0] for each in options) else {}
    return {**agreed, "force_quick_gelu": bool(parsed.file and is_openai(parsed.file))}


def _say_unrecorded(parsed: ClipName) -> None:
    """Notes, once, that a file of weights does not say with which activation they were trained."""
    import open_clip

    other = f"{parsed.architecture}-quickgelu"
    if parsed.file and not is_openai(parsed.file) and other in open_clip.list_models():
        say(
            f"{parsed.file} does not record its activation, which is taken to be that of "
            f"{parsed.architecture}, GELU. If it was trained with QuickGELU, as OpenAI's weights "
            f"and what was fine-tuned from them, use --model={other}__pretrained__FILE",
            logging.INFO,
        )


def _transform_of(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("mean", "std", "interpolation", "resize_mode")
    return {f"image_{key}": config[key] for key in keys if key in config}


def is_openai(path: Path) -> bool:
    """Whether a file of weights is OpenAI's, judging by its format or name.

    OpenAI published TorchScript archives; copies on the Hugging Face hub are in repositories such
    as `timm/vit_base_patch32_clip_224.openai`.
    """
    folders = path.absolute().parts[:-1]
    if "openai" in path.name.lower() or any(part.endswith(".openai") for part in folders):
        return True
    if not is_zipfile(path):
        return False
    with ZipFile(path) as archive:  # TorchScript archives contain code
        return any("/code/" in name for name in archive.namelist())


@contextlib.contextmanager
def _not_at_hand(parsed: ClipName, folder: str | None) -> Iterator[None]:
    """Turns errors while a model is built into a `UsageError`."""
    try:
        yield
    except UsageError as error:
        raise _reason(parsed, folder, error) if parsed.file else error from error.__cause__
    except ImportError as error:
        raise UsageError(
            f"{parsed.architecture} needs the package {error.name or error}, which is not "
            'installed: pip install -e ".[hub]"'
        ) from error
    except Exception as error:  # of open_clip, timm, transformers, the hub, the file system
        raise _reason(parsed, folder, error) from error


def _reason(parsed: ClipName, folder: str | None, error: Exception) -> UnavailableError:
    """The error for a model that cannot be built: the cause, and where to put its files."""
    import open_clip
    from huggingface_hub import constants

    architecture, tag = parsed.architecture, parsed.pretrained
    reason = shown(str(error).strip().replace("\n\t", " ").split("\n")[0], 300)
    reason = f"{type(error).__name__}: {reason}"
    if parsed.file:
        return UnavailableError(
            f"{parsed.file} does not hold the weights of a full {architecture} ({reason}). "
            "Building heads needs the text tower; pass an image encoder alone with --load"
        )
    caches = f"{folder or 'the cache of the Hugging Face hub'}"
    offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    files = f"{CONFIG} and open_clip_model.safetensors"
    if parsed.folder:
        return UnavailableError(f"{architecture} cannot be read ({reason}); expected {files} in it")
    if parsed.has_own_config:
        return UnavailableError(
            f"{architecture} is unavailable{offline}: looked for {files} of "
            f"{architecture.removeprefix(HUB)} in {caches} and on the hub ({reason}). Without a "
            "network, put both into a folder and use --model=local-dir:FOLDER"
        )
    if tag is None:
        return UnavailableError(f"{architecture} cannot be built ({reason})")
    config = open_clip.get_pretrained_cfg(architecture, tag)
    hub = f"{config['hf_hub'].strip('/')} on the Hugging Face hub" if config["hf_hub"] else ""
    sources = " and ".join(filter(None, (hub, config["url"])))
    others = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
    return UnavailableError(
        f"the weights {tag} of {architecture} are unavailable{offline}: looked in {caches} and for "
        f"{sources} ({reason}). Without a network, copy the file from a machine that has it and "
        f"use --model={architecture}__pretrained__FILE, or copy that cache and name it with "
        f"--openclip-cachedir. Other weights: {others}; random ones: "
        f"--model={architecture}__init__"
    )
