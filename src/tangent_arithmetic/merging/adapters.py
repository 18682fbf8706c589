r"""LoRA adapters in PEFT's format, as models: \(W = W_0 + s\, B A\), tensor by tensor.

The step of a matrix is never rounded to the precision of the weights: task vectors of adapters
have the rank of the adapters.

Source: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; the format is that of PEFT.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tangent_arithmetic.merging.spectral import OUTPUTS, module_of
from tangent_arithmetic.merging.weights import Weights, find, is_embedding, tensors_in
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.storage.reading import read_json, readable

if TYPE_CHECKING:
    from jaxtyping import Float64

logger = logging.getLogger(__name__)
CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
KEY = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
WRAPPED = "base_model.model."
LISTED = 5  # modules in a message
# settings that change more than W_0 + s B A, or need what the adapter's files do not hold
REFUSED = {
    "use_dora": "the magnitudes of DoRA",
    "lora_bias": "a bias beside B",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapters of parameters outside of modules",
    "layer_replication": "replicated layers",
    "use_qalora": "the pooled inputs of QALoRA",
    "use_bdlora": "block-diagonal adapters",
    "alora_invocation_tokens": "adapters that some tokens switch on",
    "arrow_config": "routed adapters",
    "monteclora_config": "sampled adapters",
    "kasa_config": "the singular values of KaSA",
}
# other starts (pissa, olora, corda, loftq, lora_ga) change the pre-trained weights as well
STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Pair:
    """The two matrices of one module, as in the file.

    Attributes:
        a: (rank, inputs, ...).
        b: (outputs, rank, ...).
        scale: s.
        transposed: whether the weight is stored as (inputs, outputs), where its shape allows both.
        embedding: whether the module is an embedding.
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool
    embedding: bool = False

    @property
    def square(self) -> bool:
        """Whether the weight has as many inputs as outputs."""
        return len(self.b) == math.prod(self.a.shape[1:])

    def steps_as(self, other: Pair) -> bool:
        """Whether the two pairs of tied modules, an embedding and a linear layer, are one step."""
        pairs = ((self.a, other.b), (self.b, other.a))
        same = all(a.shape == b.mT.shape and statedict.equal(a, b.mT) for a, b in pairs)
        return same and self.scale == other.scale

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether B A has the shape of the weight, or of its transpose."""
        inner = math.prod(self.a.shape[1:])
        flat = (shape[0], math.prod(shape[1:])) if shape else ()
        outer = (len(self.b), inner)
        matrices = self.a.ndim > 1 and self.b.ndim > 1
        inside = math.prod(self.b.shape[1:]) == len(self.a) > 0
        return matrices and inside and flat in (outer, outer[::-1])

    def factors(self, shape: Sequence[int]) -> Factors:
        """Two matrices whose product is the step, with the rows of the weight as it is stored."""
        a, b = self.a.flatten(1).double(), self.scale * self.b.flatten(1).double()
        if self.transposed if self.square else shape[0] != len(b):
            return a.mT, b.mT
        return b, a


if TYPE_CHECKING:
    Factors = tuple[Float64[Tensor, "m rank"], Float64[Tensor, "rank n"]]


def open_adapters(place: str | Path, base: Weights | None) -> Weights | None:
    """The pre-trained weights with the adapters at a place; None if no adapters are there.

    Args:
        place: a folder, or `[hf-hub:]ORG/NAME`.
        base: the pre-trained weights.

    Raises:
        UsageError: if there are no pre-trained weights, the adapters are for other ones, or they
            are of a kind whose step is not s B A.
    """
    with readable(place, "the weights of a model"):
        folder = find(place)
        if not folder.is_dir() or not (folder / CONFIG).is_file():
            return None
        if base is None:
            raise UsageError(
                f"{place} holds adapters, which need the model that they were trained on; name it "
                "_pretrained_"
            )
        file = _file(folder)
        config = checked(read_json(folder / CONFIG), folder)
        _warn_of_other_base(config, base, folder)
        pairs, whole = _sorted_out(tensors_in(file), config, file)
        names = _names_of(pairs, whole, base, folder)
        steps = {names[module]: pair for module, pair in pairs.items()}
        values = {names[module]: value for module, value in whole.items()}
        _check_shapes(steps, values, base.outline, folder)
        steps = _oriented(steps, base.outline, folder)
    return _adapted(base, steps, values, place=str(place), folder=folder, files=(file,))


def _names_of(
    pairs: Mapping[str, Pair], whole: Mapping[str, Tensor], base: Weights, folder: Path
) -> dict[str, str]:
    """The tensor of each module or tensor; that of a tied output layer is the embedding."""
    embedding, modules = _tied_embedding(base), [*pairs, *whole]
    heads = [name for name in modules if embedding and module_of(name) in OUTPUTS]
    others = [module for module in modules if module not in heads]
    names = _placed(others, base.outline, folder)
    if embedding is not None:
        names |= dict.fromkeys(heads, embedding)
        _check_tied(pairs, whole, names, embedding, base, folder)
    return names


def _warn_of_other_base(config: Mapping[str, Any], base: Weights, folder: Path) -> None:
    """Warns of adapters whose file names another pre-trained model, by the last word of paths."""
    named = config.get("base_model_name_or_path")
    known = [str(place) for place in (base.place, base.config.get("_name_or_path")) if place]
    if named and known and Path(named).name not in {Path(place).name for place in known}:
        logger.warning(
            "%s has adapters for %s, and the pre-trained model is %s: the merge is wrong unless "
            "both hold the same weights",
            *(folder, shown(named), " or ".join(map(shown, known))),
        )


def _tied_embedding(base: Weights) -> str | None:
    """The embedding of tokens of a model that ties its output layer, if its file lacks that."""
    own = (name for name, value in base.outline.items() if is_embedding(name, value))
    known = [name for name in own if name not in base.ties]
    tied = len(known) == 1 and base.config.get("tie_word_embeddings", bool(base.config))
    return known[0] if tied and module_of(known[0]) not in OUTPUTS else None


def _check_tied(
    pairs: Mapping[str, Pair],
    whole: Mapping[str, Tensor],
    names: Mapping[str, str],
    embedding: str,
    base: Weights,
    folder: Path,
) -> None:
    """Checks that an embedding and the output layer tied to it stay one tensor.

    Adapters of one alone step in both, as where PEFT merges.

    Raises:
        UsageError: if they do not. An embedding that was trained whole, without the output layer,
            is accepted with a warning, since the model may have none.
    """
    theta0, heads = base.read(embedding), [name for name in names if module_of(name) in OUTPUTS]
    steps = [pair for module, pair in pairs.items() if names[module] == embedding]
    values = [value for name, value in whole.items() if names[name] == embedding]
    changed = [value for value in values if not statedict.equal(value, theta0)]
    if not heads:
        if changed:
            logger.warning(
                "%s replaces %s; an output layer tied to it, such as lm_head, moves along here, "
                "while PEFT leaves it as it was",
                *(folder, shown(embedding)),
            )
        return
    both = not steps and len(values) > 1 and statedict.equal(*values)
    if (changed and not both) or not all(pair.steps_as(steps[0]) for pair in steps[1:]):
        raise UsageError(
            f"{folder} changes {_listed(heads)} otherwise than {shown(embedding)}, but the model "
            "ties them, and its file has no tensor of the output layer; save the pre-trained model "
            "untied (tie_word_embeddings=False, and a copy of the embedding as its output layer)"
        )


def _file(folder: Path) -> Path:
    files = [folder / name for name in FILES if (folder / name).is_file()]
    if not files:
        raise MissingFileError(f"{folder} has {CONFIG}, but neither {' nor '.join(FILES)}")
    if complete := sorted(folder.glob("model*.safetensors")):
        raise UsageError(
            f"{folder} holds both adapters and a complete model ({complete[0].name}); move one of "
            "them to a folder of its own"
        )
    return files[0]


def checked(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The configuration of adapters that are exactly s B A.

    Raises:
        UsageError: for other adapters.
    """
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise UsageError(f"{folder} holds adapters of type {shown(kind)}, expected LORA")
    start = config.get("init_lora_weights", True)
    problems = [what for key, what in REFUSED.items() if config.get(key)]
    if start not in STARTS:
        problems.append(f"a start by {shown(start)}, which changes the pre-trained weights")
    if problems:
        raise UsageError(
            f"{folder} has {', '.join(problems)}, which W + s B A does not express; merge these "
            "adapters into their model with PEFT (merge_and_unload), save it, and name its folder"
        )
    return config


def _sorted_out(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path
) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """The pairs of matrices by module, and tensors that replace those of the model, by name.

    The latter are trained biases and `modules_to_save`.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    owners, whole, embeddings = dict[str, str](), dict[str, Tensor](), set[str]()
    for key, value in tensors.items():
        name = key.removeprefix(WRAPPED)
        if (match := KEY.fullmatch(name)) is None:
            whole[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = value
            continue
        module = match["module"].replace(".base_layer", "")
        sides.setdefault(module, {})[match["side"]] = value
        owners[module] = match["module"].partition(".base_layer")[0]
        if match["embedding"]:
            embeddings.add(module)
    if lacking := [module for module, both in sides.items() if len(both) < 2]:
        raise UsageError(f"{file} has only one of A and B of {_listed(lacking)}")
    if not sides:
        raise UsageError(f"{file} has no lora_A and lora_B, expected adapters of PEFT")
    pairs = {
        module: Pair(
            both["A"],
            both["B"],
            _scale(config, owners[module], len(both["A"])),
            module in embeddings or bool(config.get("fan_in_fan_out")),
            module in embeddings,
        )
        for module, both in sides.items()
    }
    return pairs, whole


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """s: alpha / rank, or alpha / sqrt(rank) of rsLoRA; the first pattern that fits gives alpha."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _placed(modules: Sequence[str], outline: Mapping[str, Tensor], folder: Path) -> dict[str, str]:
    """The tensor of each module or tensor of the adapters.

    The model may have been loaded by a class that adds or drops a prefix of all names, such as
    `transformer.` or `vision_model.`.
    """
    best: list[str] = list(modules)
    for dropped, added in _renamings(modules, outline):
        names = {module: _tensor_of(module, dropped, added, outline) for module in modules}
        placed = {module: name for module, name in names.items() if name is not None}
        if len(placed) == len(modules):
            return placed
        best = min(best, [module for module in modules if names[module] is None], key=len)
    raise UsageError(
        f"{folder} has adapters for {_listed(best)}, which the pre-trained model lacks; expected "
        "adapters of this model"
    )


def _renamings(modules: Sequence[str], outline: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Prefixes to drop and to add, the likeliest first."""
    yield "", ""
    words = modules[0].split(".")
    for number in range(1, len(words)):
        yield ".".join(words[:number]) + ".", ""
    within = {name.partition(f".{modules[0]}.")[0] for name in outline if f".{modules[0]}." in name}
    for prefix in sorted(within, key=len):
        yield "", f"{prefix}."


def _tensor_of(module: str, dropped: str, added: str, outline: Mapping[str, Tensor]) -> str | None:
    if not module.startswith(dropped):
        return None
    name = added + module.removeprefix(dropped)
    candidates = (f"{name}.weight", f"{name}.in_proj_weight", name)
    return next((candidate for candidate in candidates if candidate in outline), None)


def _check_shapes(
    steps: Mapping[str, Pair],
    values: Mapping[str, Tensor],
    outline: Mapping[str, Tensor],
    folder: Path,
) -> None:
    wrong = [name for name, pair in steps.items() if not pair.fits(outline[name].shape)]
    wrong += [name for name, value in values.items() if value.shape != outline[name].shape]
    if wrong:
        raise UsageError(
            f"{folder} has other shapes than the pre-trained model in {_listed(wrong)}; expected "
            "adapters of this model, and of convolutions without groups"
        )


def _oriented(
    steps: Mapping[str, Pair], outline: Mapping[str, Tensor], folder: Path
) -> dict[str, Pair]:
    """The pairs; those of square weights are stored as the other weights show.

    PEFT saves one `fan_in_fan_out`, that of the module it visited last, such as `lm_head`.
    """
    inner = {
        name: pair
        for name, pair in steps.items()
        if not pair.embedding and not is_embedding(name, outline[name])
    }
    shown_by = {outline[n].shape[0] != len(p.b) for n, p in inner.items() if not p.square}
    squares = {name: pair for name, pair in inner.items() if pair.square}
    if not squares or not shown_by:
        return dict(steps)
    if len(shown_by) > 1:
        raise UsageError(
            f"{folder} has adapters of weights stored both ways, so that the way of "
            f"{_listed(list(squares))} is unknown; merge these adapters into their model with PEFT "
            "(merge_and_unload), save it, and name its folder"
        )
    (way,) = shown_by
    return {**steps, **{name: replace(pair, transposed=way) for name, pair in squares.items()}}


def _adapted(
    base: Weights, steps: Mapping[str, Pair], values: Mapping[str, Tensor], **facts: Any
) -> Weights:
    """The pre-trained weights with steps of low rank and with tensors that were trained whole.

    A tied tensor steps under all its names, as where PEFT merges, unless adapters of its own are
    there for several. PEFT saves the embedding that it adapts beside its step.
    """
    for first in dict.fromkeys(base.ties.values()):
        names = [first, *(name for name in base.ties if base.ties[name] == first)]
        if own := [name for name in names if name in steps]:
            steps = {**dict.fromkeys(names, steps[own[0]]), **steps}

    def start(name: str) -> Tensor:
        theta0 = base.read(name)
        return values[name].to(theta0) if name in values else theta0

    def low_rank(name: str) -> Factors | None:
        changed = name in values and not statedict.equal(start(name), base.read(name))
        if changed or name not in steps:
            return None
        return steps[name].factors(base.outline[name].shape)

    def read(name: str) -> Tensor:
        theta = start(name)
        if name not in steps:
            return theta
        factors = steps[name].factors(theta.shape)
        step = torch.matmul(*factors).view(theta.shape).to(theta.device)
        return (theta.double() + step).to(theta.dtype)

    known = {key: base.facts[key] for key in ("model",) if key in base.facts}
    return replace(base, read=read, low_rank=low_rank, facts=known, **facts)


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(map(shown, names[:LISTED])) + (f" and {rest} more" if rest > 0 else "")
