"""LoRA adapters in PEFT's format: written for what `lora.py` trains, read for any model."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tangent_arithmetic.runtime.atomic import disk_errors
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.training.lora import SCALE, LowRank, check_peft
from tangent_arithmetic.training.reparametrised import Part, parts_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _peft() -> Any:
    check_peft()
    return importlib.import_module("peft")


def save_adapters(encoder: nn.Module, folder: Path) -> bool:
    """Writes the adapters of an encoder as a PEFT folder; does nothing if it has none.

    Their base is the standard encoder at theta0, see `merged`. PEFT reads them too, but doubles
    the step of output projections inside `nn.MultiheadAttention` (see `_output_projections`), and
    in a forward pass without merging ignores those inside the pooling of CLIP's ResNets.

    Args:
        encoder: the result of `adapted`, or any encoder.
        folder: the folder.

    Returns:
        Whether the encoder has adapters.

    Raises:
        UsageError: if PEFT is not installed.
        UnwritableError: if the folder cannot be written.
    """
    start, parts = parts_of(encoder)
    low_rank = {name: part for name, part in parts.items() if isinstance(part, LowRank)}
    if not low_rank:
        return False
    peft = _peft()
    rank = next(iter(low_rank.values())).a.shape[0]
    config = peft.LoraConfig(
        r=rank, lora_alpha=SCALE * rank, target_modules=_modules(start, low_rank)
    )
    model = peft.get_peft_model(copy.deepcopy(start).cpu().float(), config)
    _fill(model.base_model.model, low_rank)
    state = peft.get_peft_model_state_dict(model)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS)
        config.inference_mode = True
        config.save_pretrained(str(folder))
    return True


def _modules(start: nn.Module, parts: Mapping[str, Part]) -> list[str]:
    """The modules that PEFT wraps; it adapts both projections of `nn.MultiheadAttention`."""
    names = []
    for name in parts:
        path = name.rpartition(".")[0]
        outer = path.rpartition(".")[0]
        inside = isinstance(start.get_submodule(outer), nn.MultiheadAttention)
        names.append(outer if inside else path)
    return list(dict.fromkeys(names))


@torch.no_grad()
def _fill(model: nn.Module, parts: Mapping[str, LowRank]) -> None:
    """Copies A and B into the modules of PEFT; a layer that it adapts beyond ours has B = 0."""
    for path, module in model.named_modules():
        if not (hasattr(module, "lora_A") and "default" in module.lora_A):
            continue
        whole = isinstance(module.get_base_layer(), nn.MultiheadAttention)
        leaf = "in_proj_weight" if whole else "weight"
        part = parts.get(f"{path.replace('.base_layer', '')}.{leaf}")
        for inner, value in (("lora_A", "a"), ("lora_B", "b")):
            weight = getattr(module, inner)["default"].weight
            if part is not None:
                weight.copy_(getattr(part, value).view_as(weight))


def merged(base: nn.Module, folder: str | Path) -> Any:
    """A copy of a model with the adapters of a PEFT folder merged into its weights.

    The task vector of an adapter is `TaskVector(base, merged(base, folder))`.

    Args:
        base: the model that the adapters are for: of our folders, the standard encoder at theta0;
            unchanged.
        folder: the folder.

    Raises:
        MissingFileError: if it holds no adapters in safetensors.
        UsageError: if PEFT is not installed, or the adapters are for another model.
    """
    folder = Path(folder)
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise MissingFileError(f"{folder} has no {missing[0]}, expected a folder saved by PEFT")
    peft = _peft()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # it only warns of missing adapters
            model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    except (UserWarning, ValueError, RuntimeError, KeyError) as error:
        raise UsageError(
            f"the adapters in {folder} do not fit a {type(base).__name__} ({error}); expected "
            "those of its own layers"
        ) from error
    outputs = _output_projections(model.base_model.model)
    result = model.merge_and_unload()
    with torch.no_grad():
        for path, weight in outputs.items():
            result.get_submodule(path).weight.copy_(weight)
    return result


@torch.no_grad()
def _output_projections(model: nn.Module) -> dict[str, Tensor]:
    """W_0 + s B A of the output projections inside `nn.MultiheadAttention`, by module.

    PEFT adds s B A twice there when it merges, and in its forward pass
    (https://github.com/huggingface/peft/pull/3774).
    """
    weights = {}
    for path, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.MultiheadAttention):
            inner: Any = base.out_proj
            delta = sum(inner.get_delta_weight(name) for name in inner.active_adapters)
            weights[f"{path}.out_proj"] = inner.get_base_layer().weight + delta
    return weights
