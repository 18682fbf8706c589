"""Unwraps the tensors of checkpoints from the keys and prefixes that training frameworks add.

Known wrappers: DistributedDataParallel and DataParallel (`module.`), torch.compile (`_orig_mod`),
FSDP and activation checkpointing, Lightning, open_clip's training checkpoints, and dicts with
`state_dict`, `model`, an average (`ema`) and the like. They may be nested.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.checkpoints import read_safetensors
from tangent_arithmetic.storage.unpickler import Stub, read_pickle, state_of, tensors_of

logger = logging.getLogger(__name__)

KEYS = ("state_dict", "model", "model_state_dict", "model_state", "module", "net", "network")
EMA = ("ema", "model_ema", "ema_model")
AVERAGES = (*EMA, "ema_state_dict", "state_dict_ema", "ema_model_state_dict")
LIGHTNING = "pytorch-lightning_version"
MODULES = ("model", "net", "network", "encoder", "image_encoder", "backbone", "clip", "clip_model")
PREFIXES = tuple(f"{name}." for name in MODULES)  # of Lightning
INSIDE = {  # reserved names, anywhere in a path
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside its `module.`
ADAPTER = ("lora_", "loha_", "hada_w", "lokr_w", "ia3_l", "oft_r")  # prefixes of adapter tensors
ADAPTER_CONFIG = "adapter_config.json"
DEEPEST = 8  # nested wrappers


@dataclass(frozen=True)
class Unwrapped:
    """The content of the wrappers.

    Attributes:
        tensors: by name, without the wrappers' prefixes.
        names: name without prefixes -> original name.
        facts: the entries beside the tensors.
        steps: a description of each wrapper removed, outermost first.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str] = field(default_factory=dict)
    facts: Mapping[Any, Any] = field(default_factory=dict)
    steps: tuple[str, ...] = ()


def unwrapped(content: object, source: str | Path = "the mapping") -> Unwrapped:
    """Removes all known wrappers from a model's weights.

    Args:
        content: a mapping of names to tensors, wrapped or not; other entries are allowed.
        source: where it comes from, for messages.

    Raises:
        UsageError: if it holds no tensors, or an adapter instead of a model.
    """
    steps: list[str] = []
    lightning = False
    for _ in range(DEEPEST):
        if not isinstance(content, Mapping):
            break
        lightning = lightning or LIGHTNING in content
        key = next((key for key in (*KEYS, *AVERAGES) if _is_model(content.get(key))), None)
        if key is None:
            break
        steps.append(_step(key, content))
        content = content[key]
    tensors, facts = _tensors(content)
    if not tensors:
        raise _no_tensors(source, content)
    refuse_adapter(source, tensors)
    names, prefixes = without_prefixes(source, tensors, lightning)
    steps += prefixes
    if steps:
        maker = "a checkpoint of Lightning, " if lightning else ""
        logger.info("%s: %sunwrapped %s", source, maker, ", ".join(steps))
    return Unwrapped({n: tensors[full] for n, full in names.items()}, names, facts, tuple(steps))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file of weights of any origin, without wrappers; executes nothing.

    Args:
        path: a file of safetensors, `torch.save` or `pickle.dump`.

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it is damaged, or holds no named tensors or an adapter.
    """
    if path.suffix == ".safetensors":
        return unwrapped(read_safetensors(path), path).tensors
    content = read_pickle(path)
    return unwrapped({"model": content} if isinstance(content, Stub) else content, path).tensors


def refuse_adapter(source: str | Path, names: Iterable[str]) -> None:
    """Raises a UsageError if these are the names of a LoRA adapter, not of a complete model."""
    for name in names:
        parts = name.split(".")
        if parts[:2] == ["base_model", "model"] or any(part.startswith(ADAPTER) for part in parts):
            raise adapter_error(source, f"it has {shown(name)}")


def adapter_error(source: str | Path, evidence: str) -> UsageError:
    """The error for an adapter where a model is expected."""
    return UsageError(
        f"{source} is a LoRA adapter saved by PEFT ({evidence}): it holds changes to a base "
        "model, not a model's weights. Merge it into the base model first (in PEFT: "
        "model.merge_and_unload()), save the result and use that file"
    )


def _tensors(content: Any) -> tuple[dict[str, Tensor], Mapping[Any, Any]]:
    """The named tensors of a mapping or a module, and the remaining entries."""
    if isinstance(content, Stub):
        return dict(state_of(content)), content.state
    if isinstance(content, nn.Module):
        return dict(content.state_dict()), {}
    if not isinstance(content, Mapping):
        return {}, {}
    facts = {key: value for key, value in content.items() if not isinstance(value, Tensor)}
    return tensors_of(content), facts


def _is_model(value: Any) -> bool:
    """Whether a value holds tensors, or looks like another wrapper."""
    if isinstance(value, Mapping):
        inner = [value[key] for key in (*KEYS, *AVERAGES) if key in value]
        return any(isinstance(entry, Tensor) for entry in value.values()) or any(
            isinstance(entry, Mapping) or _is_module(entry) for entry in inner
        )
    return _is_module(value)


def _is_module(value: Any) -> bool:
    """Whether a value is a module, or the stub of a pickled one."""
    if isinstance(value, Stub):
        return "_modules" in value.state or value.path().startswith("__torch__.")
    return isinstance(value, nn.Module)


def _step(key: str, content: Mapping[Any, Any]) -> str:
    if key in AVERAGES:
        return f"{key!r} (an average of the weights; there are no others)"
    averages = [repr(name) for name in AVERAGES if _is_model(content.get(name))]
    return f"{key!r} (not {', '.join(averages)}, also present)" if averages else repr(key)


def without_prefixes(
    source: str | Path, tensors: Iterable[str], lightning: bool = False
) -> tuple[dict[str, str], list[str]]:
    """The original names by names without the prefixes of wrappers, and the prefixes removed.

    Args:
        source: where the names come from, for messages.
        tensors: the names.
        lightning: whether Lightning wrote them.

    Raises:
        UsageError: if names coincide without their prefixes.
    """
    full = list(tensors)
    parts = [name.split(".") for name in full]
    steps = [f"{word}. ({by})" for word, by in INSIDE.items() if any(word in p for p in parts)]
    short = [".".join(part for part in p if part not in INSIDE) for p in parts]
    prefixes = ["module.", *(PREFIXES if lightning else ())]
    for _ in range(DEEPEST):
        counted = COUNTER in short and len(short) > 1
        rest = [name for name in short if not (counted and name == COUNTER)]
        prefix = next((p for p in prefixes if all(name.startswith(p) for name in rest)), None)
        if prefix is None:
            break
        if counted:
            full.pop(short.index(COUNTER))
        short = [name.removeprefix(prefix) for name in rest]
        steps.append(prefix)
        if prefix in PREFIXES:
            prefixes = ["module."]
    if len(set(short)) < len(short) or "" in short:
        raise UsageError(
            f"{source} holds tensors whose names coincide without {', '.join(steps)}; expected a "
            "file with a single model"
        )
    return dict(zip(short, full, strict=True)), steps


def _no_tensors(source: str | Path, content: Any) -> UsageError:
    """The error for content without tensors; lists its keys."""
    if not isinstance(content, Mapping):
        return UsageError(f"{source} holds a {type(content).__name__}, expected named tensors")
    inner = [key for key, value in content.items() if _is_model(value)]
    keys = ", ".join(shown(key, 40) for key in list(inner or content)[:8]) or "nothing"
    hint = f"tensors lie under {keys}: pass one of these" if inner else f"it holds {keys}"
    return UsageError(f"{source} is not a state dict: its values are not tensors; {hint}")
