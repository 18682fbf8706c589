"""Classifiers of torchvision without their last layer, with the transforms of their weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from tangent_arithmetic.encoders.backbones.building import Backbone, surplus, unavailable
from tangent_arithmetic.encoders.backbones.names import TORCHVISION, BackboneName
from tangent_arithmetic.encoders.backbones.transforms import IMAGENET, evaluation, training
from tangent_arithmetic.runtime.errors import UsageError, closest, shown, unknown
from tangent_arithmetic.storage.wrappers import read_weights

# All their weights were trained on pixels from -1 to 1, whatever the transform says. They are used
# without auxiliary classifiers, which a second loss would have to train.
OPTIONS = {
    name: {"transform_input": True, "aux_logits": False} for name in ("googlenet", "inception_v3")
}
AUXILIARY = ("aux1", "aux2", "AuxLogits")


def build(name: BackboneName, weights: bool) -> Backbone:
    """A torchvision model by its name.

    Args:
        name: its architecture, and a tag of torchvision's, such as IMAGENET1K_V1, or a file.
        weights: whether to load its weights.

    Raises:
        UsageError: if it is unknown, or its weights are unavailable.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name.architecture not in known:
        near = closest(name.architecture, known)[:5]
        raise unknown("model of torchvision", name.architecture, near)
    published = models.get_model_weights(name.architecture)
    tag = _tag(name, published)
    own = weights and tag is not None
    options: dict[str, Any] = dict(OPTIONS.get(name.architecture, {}))
    if options and own:
        del options["aux_logits"]  # the weights include theirs
    elif options:
        options["init_weights"] = weights and name.weights is None
    with unavailable(f"{TORCHVISION}{name.architecture}", own):
        module = models.get_model(name.architecture, weights=tag if own else None, **options)
    if weights and name.file is not None:
        _load_file(module, name)
    last = _last(module)
    _remove_classifiers(module, last)
    return Backbone(module, *_transforms((tag or published.DEFAULT).transforms()), (last,))


def _tag(name: BackboneName, published: Any) -> Any:
    """The weights of torchvision's that a name means; None for random ones or a file."""
    if name.weights is None or name.file is not None:
        return None
    if not name.weights:
        return published.DEFAULT
    tags = [one.name for one in published]
    if name.weights in tags:
        return published[name.weights]
    raise unknown(
        f"weights of {TORCHVISION}{name.architecture}", name.weights, [*tags, "a file of weights"]
    )


def _load_file(module: nn.Module, name: BackboneName) -> None:
    """Copies the weights of a file into a whole classifier; its own classifier may be missing."""
    assert name.file is not None
    state, own, last = read_weights(name.file), module.state_dict(), _last(module)
    wrong = [
        key
        for key, value in own.items()
        if not key.startswith(f"{last}.") and (key not in state or state[key].shape != value.shape)
    ]
    if wrong:
        names = ", ".join(map(shown, wrong[:3]))
        raise UsageError(
            f"{name.file} does not fit {TORCHVISION}{name.architecture}: {len(wrong)} of "
            f"{len(own)} tensors are missing or of another shape ({names})"
        )
    if more := surplus(state, own, (last,)):
        raise UsageError(
            f"{name.file} does not fit {TORCHVISION}{name.architecture}, which lacks {len(more)} "
            f"of its tensors ({', '.join(map(shown, more[:3]))}). Is it of another model?"
        )
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    module.load_state_dict(fitting, strict=False)


def _last(module: nn.Module) -> str:
    """The name of the layer that gives the logits: the last linear one, or else convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, layer in module.named_modules() if isinstance(layer, kind)]
        if names:
            return str(names[-1])
    raise UsageError(f"a {type(module).__name__} has no linear layer to remove")


def _remove_classifiers(module: Any, last: str) -> None:
    """Removes the last layer, and auxiliary classifiers."""
    parent, _, name = last.rpartition(".")
    setattr(module.get_submodule(parent), name, nn.Identity())
    if hasattr(module, "aux_logits"):
        module.aux_logits = False
        for auxiliary in AUXILIARY:
            if hasattr(module, auxiliary):
                setattr(module, auxiliary, None)


def _transforms(preset: Any) -> tuple[Any, Any]:
    """Transforms with the numbers of a preset of torchvision's."""
    size = list(preset.crop_size) * (2 if len(preset.crop_size) == 1 else 1)
    mean, std, mode = preset.mean, preset.std, preset.interpolation.value
    resize = preset.resize_size[0] if preset.resize_size else IMAGENET["resize"]
    return training(size, mean, std, mode), evaluation(size, resize, mean, std, mode)
