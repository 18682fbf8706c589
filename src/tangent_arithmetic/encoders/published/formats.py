"""Detects the format of a published file, and reads its weights under our names.

Sources: mlfoundations/task_vectors and fredzzhang/atlas (pickled modules), nik-dim/tall_masks
(state dicts), gortizji/tangent_task_arithmetic (linear models by index), Hugging Face (CLIP
folders).
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tangent_arithmetic.encoders.base import BUILT
from tangent_arithmetic.encoders.built import say
from tangent_arithmetic.encoders.clip import (
    VISUAL,
    check_fits,
    check_hint,
    named_models,
    outlined,
    shapes,
)
from tangent_arithmetic.encoders.published import huggingface
from tangent_arithmetic.encoders.published.layout import model_in
from tangent_arithmetic.encoders.published.recorded import recorded
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.checkpoints import (
    BACKBONE,
    CLASSIFIER,
    Checkpoint,
    read_safetensors,
)
from tangent_arithmetic.storage.reading import readable, refuse_pointer
from tangent_arithmetic.storage.statedict import content_hash
from tangent_arithmetic.storage.unpickler import Stub, read_pickle, state_of
from tangent_arithmetic.storage.wrappers import (
    ADAPTER_CONFIG,
    DEEPEST,
    adapter_error,
    refuse_adapter,
    unwrapped,
)

logger = logging.getLogger(__name__)

OPENAI: tuple[str, ...] = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")
OPENAI += ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")
HEAD = {"weight", "bias"}
ENCODER, HEADS = "image_encoder.", "classification_heads."  # the parts of a classifier
Base = Callable[[], Mapping[str, Tensor]]
INDEXED = re.compile(r"model\.params0?\.(\d+)")
MLP = {"block1.block.0.weight", "transition.weight", "block2.block.0.weight"}


def _published(
    label: str,
    kind: str,
    theta: dict[str, Tensor],
    theta0: dict[str, Tensor] | None = None,
    **info: Any,
) -> Checkpoint:
    """A published file's content as a checkpoint; `label` describes its format."""
    theta0_hash = None if theta0 is None else content_hash(theta0)
    info["published"] = label
    return Checkpoint(theta, kind, content_hash(theta), theta0, theta0_hash, info)


def read(path: Path, model: str | None, base: Base) -> Checkpoint:
    """Reads a published file or folder.

    Args:
        path: a file of `torch.save`, `pickle.dump` or safetensors, or a Hugging Face folder.
        model: the model's name; None to infer it from the file.
        base: returns the pre-trained weights; called if the file lacks some.

    Raises:
        UsageError: if the format is unknown, the weights do not fit the model, or the model is
            ambiguous.
    """
    with readable(path, "a checkpoint"):
        if path.is_dir():
            return _from_folder(path, model, base)
        content = _content(path)
        if isinstance(content, Stub):
            return _from_module(path, content, model)
        if isinstance(content, Mapping) and content:
            return _from_dict(path, content, model, base)
        raise UsageError(
            f"{path}: expected an encoder or a head (a pickled module or a dict of tensors), got a "
            f"{type(content).__name__}"
        )


def _content(path: Path) -> Any:
    """The content of a file, read without executing anything."""
    refuse_pointer(path)
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def _from_module(path: Path, module: Stub, model: str | None) -> Checkpoint:
    """A pickled `ClassificationHead`, `ImageEncoder` or CLIP."""
    module = _bare(path, module)
    state, label = dict(state_of(module)), f"pickled {module.path()}"
    refuse_adapter(path, state)
    if (inner := _children(module).get("image_encoder")) is not None:
        return _classifier(path, module, inner, model)
    if set(state) == HEAD:
        return _head(label, state, module.state)
    return _encoder(path, label, state, model, module.state.get("model_name"), recorded(module))


def _children(module: Stub) -> dict[str, Stub]:
    """The modules directly inside a pickled one."""
    children = module.state.get("_modules")
    items = children.items() if isinstance(children, Mapping) else ()
    return {n: child for n, child in items if isinstance(n, str) and isinstance(child, Stub)}


def _classifier(path: Path, module: Stub, encoder: Stub, model: str | None) -> Checkpoint:
    """A pickled `ImageClassifier` or `MultiHeadImageClassifier`."""
    children = _children(module)
    one, several = children.get("classification_head"), children.get("classification_heads")
    stubs = [one] if one is not None else list(_children(several).values()) if several else []
    parts = [_from_module(path, part, model) for part in (encoder, *stubs)]
    if not stubs or any(part.kind != "head" for part in parts[1:]):
        raise UsageError(f"{path}: expected a classifier of an encoder and its heads, got others")
    return _composed(parts[0], parts[1:], f"pickled {module.path()}")


def _composed(encoder: Checkpoint, heads: Sequence[Checkpoint], label: str) -> Checkpoint:
    """A published classifier as a checkpoint, of those of its parts."""
    theta = prefixed(ENCODER, encoder.theta)
    for i, head in enumerate(heads):
        theta |= prefixed(f"{HEADS}{i}.", head.theta)
    info = {
        "published": label,
        "encoder": {"kind": encoder.kind, "info": encoder.info},
        "heads": [{"normalize": head.info["normalize"], "classnames": []} for head in heads],
    }
    return Checkpoint(theta, CLASSIFIER, content_hash(theta), info=info)


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names with a prefix."""
    return {f"{prefix}{name}": value for name, value in state.items()}


def _bare(path: Path, module: Stub) -> Stub:
    """The module inside wrappers of DistributedDataParallel or torch.compile; logs them."""
    for _ in range(DEEPEST):
        children = module.state.get("_modules")
        inner = list(children.items()) if isinstance(children, Mapping) else []
        if len(inner) != 1 or inner[0][0] not in ("module", "_orig_mod"):
            break
        if not isinstance(inner[0][1], Stub):
            break
        logger.info("%s: unwrapped a %s", path, shown(module.path()))
        module = inner[0][1]
    return module


def _head(label: str, state: dict[str, Tensor], facts: Mapping[Any, Any]) -> Checkpoint:
    """A head, which normalises features unless the file states otherwise."""
    flag = facts.get("normalize", True)
    normalize = bool(flag) if isinstance(flag, bool | int) else True
    return _published(label, "head", state, normalize=normalize)


def _from_dict(path: Path, content: Mapping[Any, Any], model: str | None, base: Base) -> Checkpoint:
    """A state dict, possibly in wrappers and among other entries."""
    inner = unwrapped(content, path)
    tensors, stated = inner.tensors, inner.facts.get("model_name")
    if set(tensors) == HEAD:
        return _head("state dict of a head", tensors, inner.facts)
    if any(INDEXED.fullmatch(name) for name in tensors):
        return _indexed(path, tensors, model, stated)
    if tensors.keys() >= MLP:
        return _backbone(path, tensors)
    if huggingface.is_clip(tensors):
        return from_huggingface(path, tensors, huggingface.config_beside(path), model, base)
    return _encoder(path, "state dict of an encoder", tensors, model, stated)


def _backbone(path: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """The backbone of the study on artificial data."""
    theta = {name: in_float32(value) for name, value in tensors.items()}
    matrix = theta["transition.weight"]
    if matrix.ndim != 2:
        raise UsageError(
            f"{path}: expected transition.weight to be a matrix, got shape {tuple(matrix.shape)}"
        )
    label = "backbone of the artificial-data study"
    return _published(label, BACKBONE, theta, input_dim=matrix.shape[1])


def _encoder(
    path: Path,
    label: str,
    state: dict[str, Tensor],
    model: str | None,
    stated: object,
    built: dict[str, Any] | None = None,
) -> Checkpoint:
    """The vision tower of a full CLIP, of an encoder, or of a model that contains one of these."""
    parts = [f".{name}".partition(".visual.") for name in state]
    towers = sorted({f"{before}{dots}"[1:] for before, dots, _ in parts if dots})
    if len(towers) > 1:
        raise UsageError(
            f"{path}: expected one image encoder, got {len(towers)}: "
            f"{', '.join(map(shown, towers))}"
        )
    if not towers:
        names = ", ".join(shown(name, 60) for name in list(state)[:3]) or "none"
        raise UsageError(
            f"{path}: expected tensors of an image encoder (model.visual.* or visual.*), a head "
            f"(weight, bias) or a linear model, got {names}"
        )
    theta = {
        f"{VISUAL}{name.removeprefix(towers[0])}": in_float32(value)
        for name, value in state.items()
        if name.startswith(towers[0])
    }
    name = model_of(path, theta, model, stated)
    facts = {BUILT: built} if built else {}
    if not built:
        _say_unrecorded(path, name)
    return _published(label, "image_encoder", fitted(path, theta, name), model=name, **facts)


def _say_unrecorded(path: Path, model: str) -> None:
    """Notes, once, that a file cannot know with which activation its weights were trained."""
    say(
        f"{path} records neither activation nor preprocessing; they are taken to be those of "
        f"{model}. If it was trained with others (open_clip without QuickGELU), name them with "
        "--model",
        logging.INFO,
    )


def in_float32(value: Tensor) -> Tensor:
    """The tensor in float32, our precision for weights; integer tensors are left unchanged."""
    return value.float() if value.is_floating_point() else value


def _indexed(
    path: Path, tensors: dict[str, Tensor], model: str | None, stated: object
) -> Checkpoint:
    """A linear model of the tangent project, with tensors named by index."""
    name = model or stated
    if not isinstance(name, str):
        raise UsageError(f"{path} does not state its model; name it with --model")
    if model is None:
        check_hint(name, path)
    parts: dict[str, list[Tensor]] = {}
    for part in ("params", "params0"):
        numbered = {
            int(key.rpartition(".")[2]): value
            for key, value in tensors.items()
            if key.startswith(f"model.{part}.") and INDEXED.fullmatch(key)
        }
        if sorted(numbered) != list(range(len(numbered))):
            raise UsageError(
                f"{path}: expected model.{part}.0 to {max(numbered, default=0)}, some are missing"
            )
        parts[part] = [numbered[i] for i in range(len(numbered))]
    fitting = [
        names
        for names in orders(name)
        if all([tuple(t.shape) for t in parts[p]] == list(names.values()) for p in parts)
    ]
    if len(fitting) != 1:
        counts = " or ".join(str(len(names)) for names in orders(name))
        raise UsageError(
            f"{path}: expected the parameters of {name} ({counts}) in order and shape, got "
            f"{len(parts['params'])} and {len(parts['params0'])} numbered tensors that do not fit. "
            "Does it belong to another model? Name it with --model"
        )
    named = [
        dict(zip(fitting[0], map(in_float32, values), strict=True)) for values in parts.values()
    ]
    theta, theta0 = ({n: v for n, v in one.items() if n.startswith(VISUAL)} for one in named)
    buffers = sorted(set(shapes(name)) - set(theta))
    if buffers:
        raise UsageError(
            f"{path} is a linear {name} without its buffers ({', '.join(buffers[:3])}, ...), which "
            "this format cannot store; fine-tune it again"
        )
    _say_unrecorded(path, name)
    label = "linear model by index"
    return _published(label, "linearized_image_encoder", theta, theta0, model=name)


def _from_folder(path: Path, model: str | None, base: Base) -> Checkpoint:
    if (path / ADAPTER_CONFIG).is_file():
        raise adapter_error(path, f"it has {ADAPTER_CONFIG}")
    config = huggingface.read_config(path)
    tensors: dict[str, Tensor] = {}
    for file in huggingface.weight_files(path):
        content = _content(file)
        if not isinstance(content, Mapping):
            raise UsageError(f"{file}: expected a state dict, got a {type(content).__name__}")
        tensors |= unwrapped(content, file).tensors
    return from_huggingface(path, tensors, config, model, base)


def from_huggingface(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    model: str | None,
    base: Base,
) -> Checkpoint:
    """The vision tower of a Hugging Face CLIP as one of our image encoders.

    Args:
        path: the file or folder, for messages.
        tensors: its weights, under Hugging Face's names.
        config: its configuration; None if unknown.
        model: our name of the architecture; None to infer it from the shapes.
        base: returns our pre-trained weights; called if the projection is missing.

    Raises:
        UsageError: if it fits no architecture, or only one of OpenAI's with another activation.
    """
    theta = huggingface.to_open_clip(tensors, path)
    projection = f"{VISUAL}proj"
    if projection not in theta:
        width, matrix = theta[f"{VISUAL}conv1.weight"].shape[:1], base().get(projection)
        if matrix is None or matrix.shape[:1] != width:
            got = "is missing" if matrix is None else f"takes {shown(tuple(matrix.shape[:1]))}"
            raise UsageError(
                f"{path} has width {shown(tuple(width))}, but the base model's projection {got}; "
                "name the right base model with --theta0"
            )
        theta[projection] = matrix.clone()
    name, facts = model_of(path, theta, model), dict[str, Any]()
    if config is None:
        _say_unrecorded(path, name)
    else:
        activation, folder = huggingface.activation(config), path if path.is_dir() else path.parent
        if activation != "quick_gelu" and model is None and name in OPENAI:
            raise UsageError(
                f"{path} uses the activation {activation!r}, but {name} with OpenAI's weights uses "
                "'quick_gelu'. Does it belong to other weights? Name them with --model, such as "
                f"{name}__pretrained__laion2b_s34b_b79k"
            )
        facts[BUILT] = huggingface.built(folder, config)
    theta = fitted(path, theta, name)
    return _published("Hugging Face CLIP", "image_encoder", theta, model=name, **facts)


def orders(model: str) -> list[dict[str, tuple[int, ...]]]:
    """Parameters of a full CLIP in order: without its text transformer, and with it.

    The tangent project deletes only `transformer` from the text side, and numbers the rest.
    """
    whole = {f"model.{name}": tuple(p.shape) for name, p in outlined(model).named_parameters()}
    without = {n: shape for n, shape in whole.items() if not n.startswith("model.transformer.")}
    return [without, whole] if len(without) < len(whole) else [whole]


def model_of(
    path: Path, theta: Mapping[str, Tensor], model: str | None, stated: object = None
) -> str:
    """The name of the model that weights belong to.

    It is `model`, else the name stated in the file, else the OpenAI architecture with these shapes.
    It must agree with any architecture that a folder of the path is named after.

    Raises:
        UsageError: if no model fits, or several do, or the folder disagrees.
    """
    if model is not None:
        return model
    if isinstance(stated, str) and stated.partition("__")[0] in OPENAI:
        check_hint(stated, path)
        fitting = [stated]
    else:
        fitting = fitting_models(theta)
    parts = map(model_in, path.absolute().parts[:-1])
    folders = [part for part in parts if part.partition("__")[0] in OPENAI]
    folder = folders[-1] if folders else None
    if not fitting and folder is None:
        raise UsageError(
            f"{path}: the weights' shapes fit none of {', '.join(OPENAI)}; name the model with "
            "--model"
        )
    if folder is not None and fitting and folder.partition("__")[0] not in fitting:
        raise UsageError(
            f"{path} is in a folder {folder}, but its weights belong to {' or '.join(fitting)}; "
            "name the model with --model, or move the file"
        )
    if folder is not None:
        return folder
    if len(fitting) > 1:
        raise UsageError(f"{path} may be {' or '.join(fitting)}; choose one with --model")
    return fitting[0]


def fitting_models(theta: Mapping[str, Tensor]) -> list[str]:
    """OpenAI's models with these shapes; if there are none, models built in this process."""
    actual = {name: tuple(value.shape) for name, value in theta.items()}

    def fits(model: str) -> bool:
        with contextlib.suppress(UsageError):  # the model's folder may have been deleted
            return shapes(model).items() <= actual.items()
        return False

    return list(filter(fits, OPENAI)) or list(filter(fits, named_models()))


def fitted(path: Path, theta: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """The model's weights, in its order; other tensors are dropped, with a log message.

    Raises:
        UsageError: if some are missing or of another shape; lists them.
    """
    expected = shapes(model)
    kept = {name: theta[name].contiguous() for name in expected if name in theta}
    try:
        check_fits(model, kept, path)
    except UsageError as error:
        like = fitting_models(theta)
        raise UsageError(f"{error} Add --model={like[0]}" if like else str(error)) from None
    if dropped := sorted(set(theta) - set(expected)):
        logger.info("%s: dropped tensors not in %s: %s", path, model, ", ".join(dropped[:5]))
    return kept
