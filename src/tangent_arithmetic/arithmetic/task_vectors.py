r"""Task vectors, \(\tau = \theta - \theta_0\), and their arithmetic.

Source: Ilharco et al., "Editing Models with Task Arithmetic", arXiv:2212.04089;
Ortiz-Jimenez et al., "Task Arithmetic in the Tangent Space", arXiv:2305.12827.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.swa_utils import AveragedModel
from typing_extensions import Self

from tangent_arithmetic.encoders.base import Encoder, ModuleEncoder, is_encoder, is_linear
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.encoders.registry import encoder_kinds, load_linear, load_standard
from tangent_arithmetic.runtime.errors import UsageError, shown, unknown
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.wrappers import unwrapped, without_prefixes
from tangent_arithmetic.tangent.caches import empty_caches
from tangent_arithmetic.tangent.copies import copy_of, copy_to_move
from tangent_arithmetic.tangent.linearized import LinearizedModel

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound="TaskVector")
Source = str | Path | Encoder | nn.Module | Mapping[str, Tensor]
Operation = Literal["subtract", "add", "multiply", "divide"]
OPERATIONS: tuple[Operation, ...] = ("subtract", "add", "multiply", "divide")
KIND = "task_vector"
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
STATISTICS = ("running_mean", "running_var")  # the floating-point buffers of batch normalisation


def weights_of(source: Source) -> dict[str, Tensor]:
    """The weights theta of a source by name, without the wrappers of training and compiling.

    Args:
        source: a checkpoint (a file, a Hugging Face folder or repository), an encoder, any module,
            or a state dict.
    """
    return _read(source)[0]


def _read(source: Source) -> tuple[dict[str, Tensor], str, frozenset[str], statedict.Ties]:
    """The weights of a source, their content hash, names known to be buffers, and ties."""
    buffers: frozenset[str] = frozenset()
    if isinstance(source, nn.Module):
        module: nn.Module = _inside(source)
        own, names = _state_of(module), _names_in(module)
        theta = {name: own[full] for name, full in names.items()}
        buffers = _buffers_in(module)
    elif isinstance(source, Mapping):
        theta = unwrapped(source).tensors
    else:
        assert isinstance(source, str | Path)
        checkpoint = load_checkpoint(source, kinds=encoder_kinds())
        return checkpoint.theta, checkpoint.hash, buffers, _recorded_ties(checkpoint.info)
    return theta, statedict.content_hash(theta), buffers, statedict.ties(theta)


def _inside(source: Any) -> Any:
    """The linear model or the encoder inside wrappers of training and compiling, or the source."""
    inner = source
    while isinstance(inner, nn.Module):
        if isinstance(inner, LinearizedModel) or is_encoder(inner):
            return inner
        own = "module" if isinstance(inner, WRAPPERS) else "_orig_mod"
        inner = inner._modules.get(own)
    return source


def _buffers_in(module: nn.Module) -> frozenset[str]:
    """The names of a module's weights that are no parameters, without wrappers."""
    own, names = _state_of(module), _names_in(module)
    tied = statedict.ties({name: own[full] for name, full in names.items()})
    if isinstance(module, LinearizedModel) or is_linear(module):
        whole = set(module.theta0())
    else:
        whole = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    parameters = {name for name, full in names.items() if full in whole}
    return frozenset(name for name in names if not {name, tied.get(name, name)} & parameters)


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module by all their names; of an encoder, its `weights`."""
    if isinstance(module, LinearizedModel) or is_encoder(module):
        return module.weights()
    return {n: v for n, v in module.state_dict().items() if isinstance(v, Tensor)}


def _names_in(module: nn.Module) -> dict[str, str]:
    """The names of a module's weights, as those of a state dict: without wrappers -> in it."""
    own = _state_of(module)
    if is_encoder(module) and not isinstance(module, LinearizedModel):
        return {name: name for name in own}
    return without_prefixes(f"the {type(module).__name__}", own)[0]


def _recorded_ties(info: Mapping[str, Any]) -> dict[str, str]:
    """The ties recorded in a checkpoint of ours."""
    tied = info.get(statedict.TIES)
    tied = tied if isinstance(tied, Mapping) else {}
    return statedict.merge_ties({n: str(first) for n, first in tied.items() if isinstance(n, str)})


class TaskVector:
    r"""\(\tau = \theta - \theta_0\): differences of the floating-point weights, by name.

    A value: operators return new task vectors and leave their operands unchanged. Standard and
    linear weights have the same names, so vectors of both kinds mix; the result has the left
    operand's kind. Vectors of different \(\theta_0\) do not mix. A parameter with several names (a
    tied weight) is in the vector once, under the first name. A vector computed from weights is a
    constant; derivatives propagate through one passed as `vector` or computed from others.

    Args:
        pretrained_checkpoint: theta0: a checkpoint (a file, a Hugging Face folder or repository),
            an encoder, any module, or a state dict.
        finetuned_checkpoint: theta, likewise.
        vector: tau itself, instead of the two.
        operation: how to combine theta and theta0 elementwise: "subtract" for theta - theta0 (a
            task vector), "add", "multiply" or "divide" for theta / theta0, where a quotient that is
            not finite is replaced by 0.
        allow_base_mismatch: allow sums with vectors of another theta0.

    Attributes:
        vector: name -> difference, at least float32.
        base_hash: content hash of theta0; None if unknown.
        buffers: names in `vector` known to be buffers, not parameters.
        ties: other names of tied parameters -> the name in `vector`.

    Raises:
        ValueError: unless given either the vector or two checkpoints.
        UsageError: if names or shapes differ, if the operation is unknown, if vectors of different
            theta0 are combined, or if finite weights overflow.
        MissingFileError: if a checkpoint does not exist.
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
        if vector is not None:
            if pretrained_checkpoint is not None or finetuned_checkpoint is not None:
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
            tied = statedict.consistent_ties(statedict.merge_ties(own0, own), theta, theta0)
            theta, theta0 = (
                statedict.deduplicate(state, tied, "a model") for state in (theta, theta0)
            )
            self.vector = statedict.combine(theta, theta0, operation)
        self._annotate(buffers, tied)

    def _annotate(self, buffers: Iterable[str], tied: statedict.Ties) -> None:
        """Sets `buffers` and `ties`, restricted to the names in `vector`."""
        self.buffers = frozenset(tied.get(name, name) for name in buffers) & self.vector.keys()
        self.ties = {name: first for name, first in tied.items() if first in self.vector}

    def _pair(self, other: TaskVector) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both vectors with the names of this one."""
        tied = statedict.merge_ties(self.ties, other.ties)
        return (
            statedict.deduplicate(self.vector, tied, "the first vector"),
            statedict.deduplicate(other.vector, tied, "the second vector"),
        )

    def _new(self, vector: Mapping[str, Tensor], *others: TaskVector) -> Self:
        """A vector of this kind, computed from this one and the others."""
        result = type(self)(vector=vector)
        operands: list[TaskVector] = [self, *others]
        result.allow_base_mismatch = any(v.allow_base_mismatch for v in operands)
        hashes = {v.base_hash for v in operands if v.base_hash is not None}
        if len(hashes) > 1 and not result.allow_base_mismatch:
            names = ", ".join(f"{each[:12]}..." for each in sorted(hashes))
            raise UsageError(
                f"task vectors of different pre-trained weights ({names}) cannot be combined. "
                "Compute them from the same theta0, or pass allow_base_mismatch=True to one of them"
            )
        result.base_hash = hashes.pop() if len(hashes) == 1 else None
        buffers = frozenset().union(*(v.buffers for v in operands))
        result._annotate(buffers, statedict.merge_ties(*(v.ties for v in operands)))
        return result

    def __add__(self, other: TaskVector | int) -> Self:
        """tau_1 + tau_2; the number 0 is accepted for the sake of `sum`."""
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
        return self._new(statedict.scale(self.vector, _scalar(factor, "the factor")))

    __rmul__ = __mul__

    def __truediv__(self, factor: float | Tensor) -> Self:
        """`tau / factor`, for a number or a tensor of one element other than 0."""
        if isinstance(factor, TaskVector):
            return NotImplemented
        return self._new(statedict.divide(self.vector, _scalar(factor, "the divisor")))

    def __pow__(self, exponent: float) -> Self:
        """`tau ** exponent`, elementwise."""
        return self._new(statedict.power(self.vector, exponent))

    def __repr__(self) -> str:
        """Kind, size and norm."""
        size = sum(value.numel() for value in self.vector.values())
        return f"{type(self).__name__}({size:,} weights, norm {self.norm().item():.4g})"

    def dot(self, other: TaskVector) -> Float[Tensor, ""]:
        """The inner product of two task vectors over all weights."""
        return statedict.dot(*self._pair(other))

    def norm(self) -> Float[Tensor, ""]:
        """The Euclidean norm over all weights."""
        return statedict.norm(self.vector)

    def cosine_similarity(self, other: TaskVector) -> Float[Tensor, ""]:
        """The cosine of the angle between two task vectors; NaN if one is 0."""
        return self.dot(other) / (self.norm() * other.norm())

    cosine = cosine_similarity

    def sub_interpolate(self, other: TaskVector, alpha: float = 0.5) -> Self:
        """`(1 - alpha) * self + alpha * other`."""
        return self * (1.0 - alpha) + other * alpha

    def parameters_only(self) -> Self:
        """The vector without `buffers` and batch statistics, which linear models ignore."""
        dropped = [
            name
            for name in self.vector
            if name in self.buffers or name.rpartition(".")[2] in STATISTICS
        ]
        if not dropped:
            return self
        _log_dropped(len(dropped), dropped[0])
        return self._new({name: v for name, v in self.vector.items() if name not in dropped})

    def save(self, filename: str | Path) -> None:
        """Writes the vector as safetensors; `.pt` becomes `.safetensors`."""
        info: dict[str, Any] = {"class": type(self).__name__, "buffers": sorted(self.buffers)}
        if self.ties:
            info[statedict.TIES] = self.ties
        save_tensors(filename, self.vector, KIND, theta0_hash=self.base_hash, info=info)

    @classmethod
    def load(cls, filename: str | Path) -> Self:
        """Reads a file written by `save`, as a vector of this class.

        Raises:
            MissingFileError: if it does not exist.
            UsageError: if it is damaged or holds something else.
        """
        checkpoint = load_checkpoint(filename, kinds=(KIND,))
        vector = cls(vector=checkpoint.theta)
        vector.base_hash = checkpoint.theta0_hash
        buffers = checkpoint.info.get("buffers")
        names = buffers if isinstance(buffers, list) else ()
        vector._annotate(map(str, names), _recorded_ties(checkpoint.info))
        return vector

    def apply_to(self, pretrained_checkpoint: Source, scaling_coef: float | Tensor = 1.0) -> Any:
        """The model at theta_0 + scaling_coef * tau, of the vector's kind.

        Args:
            pretrained_checkpoint: a checkpoint or an encoder; unchanged. A plain module gives a
                module of its class; a state dict gives a state dict, through which derivatives
                propagate (see `torch.func.functional_call`).
            scaling_coef: the coefficient, a number or a tensor of one element.

        Raises:
            UsageError: if names or shapes do not match, if a dtype of theta_0 cannot hold a result,
                if a model would lose derivatives, or if it cannot be copied, see `copy_of`.
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
                unchanged. The result is of the same type, for a checkpoint an encoder.
            param_names: ignored; the public projects pair weights by position with it.
            scaling_coef: the coefficient; also accepted as the second positional argument.
        """
        if isinstance(param_names, Tensor):
            scaling_coef = param_names
        else:
            with contextlib.suppress(TypeError, ValueError):  # names are not a number
                scaling_coef = float(param_names)  # type: ignore[arg-type]
        if isinstance(pretrained_checkpoint, Mapping):
            coef = _scalar(scaling_coef, "scaling_coef")
            start = unwrapped(pretrained_checkpoint)
            moved = statedict.move(start.tensors, self.vector, coef, self.ties)
            copies = _copied(moved, start.tensors)
            return {start.names[name]: value for name, value in copies.items()}
        source = _inside(pretrained_checkpoint)
        model: Any
        if isinstance(source, str | Path):
            model = load_standard(source)
        elif isinstance(source, LinearizedModel) or is_linear(source):
            model = source.standard()
        else:
            model = _copy(source, copy_to_move)
        return self._moved(model, scaling_coef)

    def apply_to_linear(
        self, pretrained_checkpoint: Source, scaling_coef: float | Tensor = 1.0
    ) -> Any:
        """The linearised model at theta = theta_0 + scaling_coef * tau, expanded at theta_0.

        For a vector of standard fine-tuning this is post-hoc linearisation.

        Args:
            pretrained_checkpoint: a checkpoint, an encoder, any module, or the linearisation of
                one; unchanged. Encoders give a linearised encoder, others a `LinearizedModel`.
            scaling_coef: the coefficient.

        Raises:
            TypeError: for a state dict, which has no forward pass.
        """
        source = _inside(pretrained_checkpoint)
        model: Any
        if isinstance(source, Mapping):
            raise TypeError(
                f"expected a model or a checkpoint, got {type(source)}, which has no forward pass "
                "to linearise"
            )
        if isinstance(source, str | Path):
            model = load_linear(source)
        elif isinstance(source, LinearizedModel) or is_linear(source):
            model = _copy(source, copy_of)
        elif isinstance(source, ModuleEncoder):
            model = linearized(source)
        else:
            assert isinstance(source, nn.Module)
            model = LinearizedModel(source)
        tau = self._new(self.vector)
        tau._annotate(self.buffers | _buffers_in(model), self.ties)
        return tau.parameters_only()._moved(model, scaling_coef)

    def _moved(self, model: Any, scaling_coef: float | Tensor) -> Any:
        """The model, moved in place by scaling_coef * tau."""
        coef = _scalar(scaling_coef, "scaling_coef")
        if any(map(_differentiated, (coef, *self.vector.values()))):
            linear = isinstance(model, LinearizedModel) or is_linear(model)
            name = "model" if isinstance(model, LinearizedModel) or not linear else "encoder.model"
            state = f"{name}.theta()" if linear else "dict(model.state_dict())"
            raise UsageError(
                "derivatives of the coefficient or the vector would be lost in a model's weights. "
                f"Apply the vector to a state dict, theta = tau.apply_to({state}, coef), and call "
                f"torch.func.functional_call({name}, theta, inputs); or, if you need no "
                "derivatives, use torch.no_grad()"
            )
        names = _names_in(model)
        vector = {names.get(name, name): value for name, value in self.vector.items()}
        tied: statedict.Ties = {names.get(n, n): names.get(k, k) for n, k in self.ties.items()}
        read: Callable[[], statedict.State] = functools.partial(_state_of, model)
        if isinstance(model, LinearizedModel):
            read, tied = model.theta, statedict.merge_ties(model.aliases(), tied)
        own = statedict.places(read, type(model).__name__)
        with torch.no_grad():
            moved = statedict.move(own, vector, coef, tied)
            statedict.copy_into(own, moved, "weights of the model and the vector's")
        empty_caches(model)
        return model


def _copy(model: Any, of_module: Callable[[nn.Module], nn.Module]) -> Any:
    """A copy of a module, or of an encoder that is none."""
    return of_module(model) if isinstance(model, nn.Module) else copy.deepcopy(model)


def _scalar(value: float | Tensor, what: str) -> float | Tensor:
    """A real number; a tensor of one element becomes a scalar tensor, and keeps derivatives."""
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value.reshape(())
        got = f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    else:
        try:
            return float(value)
        except (TypeError, ValueError):
            got = repr(value)
    raise UsageError(f"{what} must be one real number, got {shown(got)}")


def _differentiated(value: float | Tensor) -> bool:
    """Whether a tensor carries derivatives, in forward or reverse mode."""
    if not isinstance(value, Tensor):
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return True
    backward = value.requires_grad and torch.is_grad_enabled()
    return backward or forward_ad.unpack_dual(value).tangent is not None


def _copied(moved: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moved weights, with copies of unmoved tensors, so that none share memory with theta."""
    tied, result = statedict.ties(theta), dict(moved)
    for name in [name for name, value in moved.items() if value is theta[name]]:
        result[name] = result[tied[name]] if name in tied else theta[name].clone()
    return result


class NonLinearTaskVector(TaskVector):
    """A task vector of standard fine-tuning; `apply_to` returns an `ImageEncoder`."""


class LinearizedTaskVector(TaskVector):
    """A task vector of linear fine-tuning; `apply_to` returns a `LinearizedImageEncoder`."""

    def apply_to(self, pretrained_checkpoint: Source, scaling_coef: float | Tensor = 1.0) -> Any:
        """The linearised model at theta_0 + scaling_coef * tau.

        A state dict gives a state dict, through which derivatives propagate: those of a linear
        model are its `theta()`.
        """
        if isinstance(pretrained_checkpoint, Mapping):
            return self.apply_to_nonlinear(pretrained_checkpoint, scaling_coef=scaling_coef)
        return self.apply_to_linear(pretrained_checkpoint, scaling_coef)

    def get_named_parameters(self, param_names: object = None) -> dict[str, Tensor]:
        """The vector by name; `param_names` is ignored, since weights are paired by name."""
        return dict(self.vector)


def nonlinear_to_linear(nonlinear_task_vector: TaskVector) -> LinearizedTaskVector:
    """The same tau as a vector of linear fine-tuning, without buffers."""
    return _cast(nonlinear_task_vector.parameters_only(), LinearizedTaskVector)


def linear_to_nonlinear(
    linear_task_vector: TaskVector, param_names: object = None
) -> NonLinearTaskVector:
    """The same tau as a vector of standard fine-tuning; `param_names` is ignored."""
    return _cast(linear_task_vector, NonLinearTaskVector)


def _cast(task_vector: TaskVector, kind: type[Kind]) -> Kind:
    return kind(vector=task_vector.vector)._new(task_vector.vector, task_vector)


@functools.cache  # once, not for each coefficient
def _log_dropped(count: int, first: str) -> None:
    logger.info(
        "%d buffers of the task vector, such as %s, take no part in a linear model and are dropped",
        count,
        first,
    )
