r"""Task vectors, \(\tau = \theta - \theta_0\), and their arithmetic.

Source: Ilharco et al., "Editing Models with Task Arithmetic", arXiv:2212.04089;
Ortiz-Jimenez et al., "Task Arithmetic in the Tangent Space", arXiv:2305.12827.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from typing_extensions import Self

from tangent_arithmetic.encoders.base import Encoder, ModuleEncoder, is_encoder, is_linear
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.encoders.registry import encoder_kinds, load_linear, load_standard
from tangent_arithmetic.runtime.errors import UsageError, shown, unknown
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.wrappers import unwrapped
from tangent_arithmetic.tangent.linearized import LinearizedModel

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound="TaskVector")
Source = str | Path | Encoder | nn.Module | Mapping[str, Tensor]
Operation = Literal["subtract", "add", "multiply", "divide"]
OPERATIONS: tuple[Operation, ...] = ("subtract", "add", "multiply", "divide")
KIND = "task_vector"
STATISTICS = ("running_mean", "running_var")  # the floating-point buffers of batch normalisation


def weights_of(source: Source) -> dict[str, Tensor]:
    """The weights theta of a checkpoint, an encoder, any module, or a state dict, by name."""
    return _read(source)[0]


def _read(source: Source) -> tuple[dict[str, Tensor], str, frozenset[str], statedict.Ties]:
    """The weights of a source, their content hash, names known to be buffers, and ties."""
    buffers: frozenset[str] = frozenset()
    if isinstance(source, nn.Module):
        theta = _state_of(source)
        tied = statedict.ties(theta)
        if isinstance(source, LinearizedModel) or is_linear(source):
            parameters = set(source.theta0())
        else:
            parameters = {name for name, _ in source.named_parameters(remove_duplicate=False)}
        buffers = frozenset(n for n in theta if not {n, tied.get(n, n)} & parameters)
    elif isinstance(source, Mapping):
        theta = unwrapped(source).tensors
    else:
        assert isinstance(source, str | Path)
        found = load_checkpoint(source, kinds=encoder_kinds())
        return found.theta, found.hash, buffers, _known_ties(found.info)
    return theta, statedict.content_hash(theta), buffers, statedict.ties(theta)


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module by all their names; of an encoder, those of the vision tower."""
    if isinstance(module, LinearizedModel) or is_encoder(module):
        return module.weights()
    return {n: v for n, v in module.state_dict().items() if isinstance(v, Tensor)}


def _known_ties(info: Mapping[str, Any]) -> dict[str, str]:
    """The ties that a file of ours records."""
    found = info.get(statedict.TIES)
    found = found if isinstance(found, Mapping) else {}
    return statedict.joined({n: str(first) for n, first in found.items() if isinstance(n, str)})


class TaskVector:
    r"""\(\tau = \theta - \theta_0\): the floating-point weights' differences, by name.

    A value: operators give new task vectors and leave their operands alone. Standard and linear
    weights have the same names, so vectors of both kinds mix; the left operand's kind wins. Vectors
    of different \(\theta_0\) do not. A parameter of several names (a tied weight) is in the vector
    once, under the first of them. A vector made of weights is a constant; through one that is given
    or calculated, derivatives go as through any tensor.

    Args:
        pretrained_checkpoint: theta0: a checkpoint (file, folder of Hugging Face, name on its hub),
            an encoder, any module, or a state dict.
        finetuned_checkpoint: theta: likewise.
        vector: tau itself, instead of the two.
        operation: what is formed of theta and theta0, element by element: "subtract" theta - theta0
            (a task vector), "add" theta + theta0, "multiply" theta * theta0, "divide" theta /
            theta0. A quotient that is not finite, since the divisor is (nearly) 0, is 0.
        allow_base_mismatch: whether to take part in sums with vectors of another theta0.

    Attributes:
        vector: name -> difference, at least float32.
        base_hash: content hash of theta0; None if it is not known.
        buffers: names in `vector` that are known to be buffers, not parameters.
        ties: other names of tied parameters -> the name in `vector`.

    Raises:
        ValueError: if neither or both ways are given.
        UsageError: if names or shapes differ, for another operation, where vectors of different
            theta0 meet, or where finite weights give numbers that are not.
        MissingFileError: if a checkpoint is not there.
    """

    def __init__(
        self,
        pretrained_checkpoint: Source | None = None,
        finetuned_checkpoint: Source | None = None,
        vector: Mapping[str, Tensor] | None = None,
        operation: Operation = "subtract",
        allow_base_mismatch: bool = False,
    ) -> None:
        self.base_hash: str | None = None
        self.buffers: frozenset[str] = frozenset()
        self.ties: dict[str, str] = {}
        self.allow_base_mismatch = allow_base_mismatch
        checkpoints = (pretrained_checkpoint, finetuned_checkpoint)
        if vector is not None:
            if any(checkpoint is not None for checkpoint in checkpoints):
                raise ValueError("expected a vector or two checkpoints, got both")
            self.vector = statedict.widened(vector)
            return
        if pretrained_checkpoint is None or finetuned_checkpoint is None:
            raise ValueError(
                "expected pretrained_checkpoint and finetuned_checkpoint, or vector; got "
                f"{pretrained_checkpoint!r}, {finetuned_checkpoint!r}, {vector!r}"
            )
        if operation not in OPERATIONS:
            raise unknown("operation", str(operation), OPERATIONS)
        with torch.no_grad():
            theta, _, buffers, own = _read(finetuned_checkpoint)
            theta0, self.base_hash, _, own0 = _read(pretrained_checkpoint)
            tied = statedict.agreed(statedict.joined(own0, own), theta, theta0)
            theta, theta0 = (statedict.once(each, tied, "a model") for each in (theta, theta0))
            self.vector = statedict.combined(theta, theta0, operation)
        self._know(buffers, tied)

    def _know(self, buffers: Iterable[str], tied: statedict.Ties) -> None:
        """Keeps what is known of the names in `vector`."""
        self.buffers = frozenset(tied.get(name, name) for name in buffers) & self.vector.keys()
        self.ties = {name: first for name, first in tied.items() if first in self.vector}

    def _pair(self, other: TaskVector) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both vectors by the names of this one."""
        tied = statedict.joined(self.ties, other.ties)
        return (
            statedict.once(self.vector, tied, "the first vector"),
            statedict.once(other.vector, tied, "the second vector"),
        )

    def _new(self, vector: Mapping[str, Tensor], *others: TaskVector) -> Self:
        """A vector of this kind; it has the origin of this one and of the others."""
        found = type(self)(vector=vector)
        everyone: list[TaskVector] = [self, *others]
        found.allow_base_mismatch = any(v.allow_base_mismatch for v in everyone)
        hashes = {v.base_hash for v in everyone if v.base_hash is not None}
        if len(hashes) > 1 and not found.allow_base_mismatch:
            raise UsageError(
                "task vectors of different pre-trained weights ("
                + ", ".join(f"{each[:12]}..." for each in sorted(hashes))
                + ") do not start at one point and are not combined. Make them of one theta0, or "
                "pass allow_base_mismatch=True to one of them"
            )
        found.base_hash = hashes.pop() if len(hashes) == 1 else None
        buffers = frozenset().union(*(v.buffers for v in everyone))
        found._know(buffers, statedict.joined(*(v.ties for v in everyone)))
        return found

    def __add__(self, other: TaskVector | int) -> Self:
        """tau_1 + tau_2; adding the number 0 is for `sum`."""
        if isinstance(other, TaskVector):
            return self._new(statedict.add(*self._pair(other)), other)
        return self._new(dict(self.vector)) if other == 0 else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: TaskVector) -> Self:
        """tau_1 - tau_2."""
        if not isinstance(other, TaskVector):
            return NotImplemented
        return self._new(statedict.subtract(*self._pair(other)), other)

    def __neg__(self) -> Self:
        """-tau."""
        return self._new(statedict.scale(self.vector, -1.0))

    def __mul__(self, factor: float | Tensor) -> Self:
        """`factor * tau`, for a number or a tensor of one element."""
        if isinstance(factor, TaskVector):
            return NotImplemented
        return self._new(statedict.scale(self.vector, _one(factor)))

    __rmul__ = __mul__

    def __truediv__(self, factor: float | Tensor) -> Self:
        """`tau / factor`."""
        return self * (1.0 / factor)

    def __pow__(self, exponent: float) -> Self:
        """`tau ** exponent`, by element."""
        return self._new(statedict.power(self.vector, exponent))

    def __repr__(self) -> str:
        """Kind, size and norm."""
        size = sum(value.numel() for value in self.vector.values())
        return f"{type(self).__name__}({size:,} weights, norm {self.norm().item():.4g})"

    def dot(self, other: TaskVector) -> Tensor:
        """The inner product of two task vectors over all weights, a scalar."""
        return statedict.dot(*self._pair(other))

    def norm(self) -> Tensor:
        """The Euclidean norm over all weights, a scalar."""
        return statedict.norm(self.vector)

    def cosine_similarity(self, other: TaskVector) -> Tensor:
        """The cosine of the angle between two task vectors, a scalar; NaN where one is 0."""
        return self.dot(other) / (self.norm() * other.norm())

    cosine = cosine_similarity

    def sub_interpolate(self, other: TaskVector, alpha: float = 0.5) -> Self:
        """`(1 - alpha) * self + alpha * other`, see `interpolate`."""
        return self * (1.0 - alpha) + other * alpha

    def parameters_only(self) -> Self:
        """The vector without its buffers, which take no part in a linear model.

        Buffers are those of `buffers`, and statistics of batch normalisation by their names; a
        message says what was dropped.
        """
        dropped = [name for name in self.vector
                   if name in self.buffers or name.rpartition(".")[2] in STATISTICS]  # fmt: skip
        if not dropped:
            return self
        _say_dropped(len(dropped), dropped[0])
        kept = {name: value for name, value in self.vector.items() if name not in dropped}
        return self._new(kept)

    def save(self, filename: str | Path) -> None:
        """Writes the vector to a file of safetensors; `.pt` becomes `.safetensors`."""
        facts: dict[str, Any] = {"class": type(self).__name__, "buffers": sorted(self.buffers)}
        if self.ties:
            facts[statedict.TIES] = self.ties
        save_tensors(filename, self.vector, KIND, theta0_hash=self.base_hash, info=facts)

    @classmethod
    def load(cls, filename: str | Path) -> Self:
        """Reads what `save` wrote; the class is the one that `load` is called of.

        Raises:
            MissingFileError: if it is not there.
            UsageError: if it is damaged or holds something else.
        """
        found = load_checkpoint(filename, kinds=(KIND,))
        vector = cls(vector=found.theta)
        vector.base_hash = found.theta0_hash
        buffers = found.info.get("buffers")
        names = buffers if isinstance(buffers, list) else ()
        vector._know((str(name) for name in names), _known_ties(found.info))
        return vector

    def apply_to(self, pretrained_checkpoint: Source, scaling_coef: float | Tensor = 1.0) -> Any:
        """The model at theta_0 + scaling_coef * tau, in the world that the vector comes from.

        Args:
            pretrained_checkpoint: a checkpoint or an encoder; untouched. A plain module gives a
                module of its class, a state dict a state dict, through which derivatives go (see
                `torch.func.functional_call`).
            scaling_coef: the coefficient, a number or a tensor of one element.

        Raises:
            UsageError: if names or shapes do not fit, if a type of theta_0 cannot hold where a
                number goes, or if derivatives would be lost in a model.
        """
        return self.apply_to_nonlinear(pretrained_checkpoint, scaling_coef=scaling_coef)

    def apply_to_nonlinear(
        self,
        pretrained_checkpoint: Source,
        param_names: object = None,
        scaling_coef: float | Tensor = 1.0,
    ) -> Any:
        """The standard model at theta_0 + scaling_coef * tau.

        Args:
            pretrained_checkpoint: a checkpoint, an encoder, a plain module or a state dict;
                untouched, and what is given back is of this kind (of a checkpoint: an encoder).
            param_names: ignored; the public projects needed it to pair weights by position.
            scaling_coef: the coefficient; also taken as the second positional argument.
        """
        if isinstance(param_names, Tensor):
            scaling_coef = param_names
        else:
            with contextlib.suppress(TypeError, ValueError):  # names are no number
                scaling_coef = float(param_names)  # type: ignore[arg-type]
        if isinstance(pretrained_checkpoint, Mapping):
            coef = _number(scaling_coef, "scaling_coef")
            given = unwrapped(pretrained_checkpoint)
            moved = statedict.move(given.tensors, self.vector, coef, self.ties)
            apart = _apart(moved, given.tensors)
            return {given.names[name]: value for name, value in apart.items()}
        model: Any
        if isinstance(pretrained_checkpoint, str | Path):
            model = load_standard(pretrained_checkpoint)
        elif isinstance(pretrained_checkpoint, LinearizedModel) or is_linear(pretrained_checkpoint):
            model = pretrained_checkpoint.standard()
        else:
            model = copy.deepcopy(pretrained_checkpoint)
        return self._moved(model, scaling_coef)

    def apply_to_linear(
        self, pretrained_checkpoint: Source, scaling_coef: float | Tensor = 1.0
    ) -> Any:
        """The linearised model at theta = theta_0 + scaling_coef * tau, expanded at theta_0.

        Applied to a standard vector this is post-hoc linearisation.

        Args:
            pretrained_checkpoint: a checkpoint, an encoder, any module, or the linearisation of
                one; untouched. Encoders give a linearised encoder, others a
                `LinearizedModel`.
            scaling_coef: the coefficient.

        Raises:
            TypeError: for a state dict, which has no forward pass.
        """
        if isinstance(pretrained_checkpoint, Mapping):
            raise TypeError(
                f"expected a model or a checkpoint, got {type(pretrained_checkpoint)}, which has "
                "no forward pass to linearise"
            )
        source = pretrained_checkpoint
        model: Any
        if isinstance(source, str | Path):
            model = load_linear(source)
        elif isinstance(source, LinearizedModel) or is_linear(source):
            model = copy.deepcopy(source)
        elif isinstance(source, ModuleEncoder):
            model = linearized(source)
        else:
            assert isinstance(source, nn.Module)
            model = LinearizedModel(source)
        return self.parameters_only()._moved(model, scaling_coef)

    def _moved(self, model: Any, scaling_coef: float | Tensor) -> Any:
        """The model, in place: its weights + scaling_coef * tau."""
        coef = _number(scaling_coef, "scaling_coef")
        if any(map(_differentiated, (coef, *self.vector.values()))):
            raise UsageError(
                "a model keeps numbers, so that the derivatives of the coefficient or the vector "
                "would be lost. Apply the vector to a state dict, theta = tau.apply_to(dict("
                "model.state_dict()), coef), and call torch.func.functional_call(model, theta, "
                "inputs); or, if none are wanted, work under torch.no_grad()"
            )
        tied = self.ties
        own = _state_of(model)
        if isinstance(model, LinearizedModel):
            own, tied = model.theta(), statedict.joined(model.aliases(), tied)
        with torch.no_grad():
            moved = statedict.move(own, self.vector, coef, tied)
            statedict.copy_into(own, moved, "weights of the model and the vector's")
        return model


def _one(value: float | Tensor, what: str = "the factor") -> float | Tensor:
    """A tensor of one element without its dimensions; other numbers as they are."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1 or value.is_complex():
        raise UsageError(f"{what} must be one real number, got {_shape_of(value)}")
    return value.reshape(())


def _number(value: float | Tensor, what: str) -> float | Tensor:
    """A coefficient: a number, or a tensor without dimensions, which may have derivatives."""
    if isinstance(value, Tensor):
        return _one(value, what)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} must be one real number, got {shown(repr(value))}") from error


def _shape_of(value: Tensor) -> str:
    return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"


def _differentiated(value: float | Tensor) -> bool:
    """Whether derivatives go through a tensor, in either mode."""
    if not isinstance(value, Tensor):
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return True
    backward = value.requires_grad and torch.is_grad_enabled()
    return backward or forward_ad.unpack_dual(value).tangent is not None


def _apart(moved: dict[str, Tensor], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, those that have not moved copied, so that none share memory with theta."""
    tied, found = statedict.ties(theta), dict[str, Tensor]()
    for name, value in moved.items():
        if value is not theta[name]:
            found[name] = value
        else:
            found[name] = found[tied[name]] if name in tied else value.clone()
    return found


class NonLinearTaskVector(TaskVector):
    """A task vector of standard fine-tuning; `apply_to` gives an `ImageEncoder`."""


class LinearizedTaskVector(TaskVector):
    """A task vector of linear fine-tuning; `apply_to` gives a `LinearizedImageEncoder`."""

    def apply_to(self, pretrained_checkpoint: Source, scaling_coef: float | Tensor = 1.0) -> Any:
        """The linearised model at theta_0 + scaling_coef * tau."""
        return self.apply_to_linear(pretrained_checkpoint, scaling_coef)

    def get_named_parameters(self, param_names: object = None) -> dict[str, Tensor]:
        """`vector`, tau by name; `param_names` is ignored, the vector knows its names."""
        return dict(self.vector)


def nonlinear_to_linear(task_vector: TaskVector) -> LinearizedTaskVector:
    """The same tau as a vector of the linear world, without buffers."""
    return _cast(task_vector.parameters_only(), LinearizedTaskVector)


def linear_to_nonlinear(task_vector: TaskVector, param_names: object = None) -> NonLinearTaskVector:
    """The same tau as a vector of the standard world; `param_names` is ignored."""
    return _cast(task_vector, NonLinearTaskVector)


def _cast(task_vector: TaskVector, kind: type[Kind]) -> Kind:
    found: Kind = kind(
        vector=task_vector.vector, allow_base_mismatch=task_vector.allow_base_mismatch
    )
    found.base_hash = task_vector.base_hash
    found._know(task_vector.buffers, task_vector.ties)
    return found


def interpolate(u: TaskVector, v: TaskVector, alpha: float = 0.5) -> TaskVector:
    """`(1 - alpha) * u + alpha * v`: u at 0, v at 1."""
    return u.sub_interpolate(v, alpha)


@functools.cache  # once, not at every coefficient
def _say_dropped(count: int, first: str) -> None:
    logger.info(
        "%d buffers of the task vector, such as %s, take no part in a linear model and are dropped",
        count,
        first,
    )
