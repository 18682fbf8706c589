r"""Linearisation: the first-order Taylor expansion of a module in its parameters.

\[ f_{lin}(x; \theta) = f(x; \theta_0) + J(x; \theta_0) (\theta - \theta_0) \]

One pass in forward-mode differentiation (`tangent_arithmetic.tangent`) gives both terms; the
Jacobian is never formed.

Source: Ortiz-Jimenez, Favero, Frossard, "Task Arithmetic in the Tangent Space", arXiv:2305.12827.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.tangent import Displacement, check_call, jvp, jvps
from tangent_arithmetic.tangent.backends import TURN, forward_ad_backends
from tangent_arithmetic.tangent.caches import empty_caches
from tangent_arithmetic.tangent.copies import copy_of
from tangent_arithmetic.tangent.functional import functional_call
from tangent_arithmetic.tangent.plain import Unfused
from tangent_arithmetic.tangent.state import uncompiled

logger = logging.getLogger(__name__)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@torch.compiler.disable
def _warn_not_compiled() -> None:
    _warn_once(
        "torch.compile: the linearised module runs uncompiled, since the compiler cannot trace "
        "forward-mode differentiation; what surrounds it is compiled"
    )


def linearize(f: Callable[..., Any], params0: Mapping[str, Tensor]) -> Callable[..., Any]:
    r"""The function \(f_{lin}\) of the same signature as f, expanded at `params0`.

    Args:
        f: called as `f(params, *args, **kwargs)`; gives a tensor or a tree of tensors.
        params0: the point of expansion.

    Returns:
        A function of (params, *args, **kwargs), affine in params and equal to f at `params0` to
        first order.

    Example:
        >>> import torch
        >>> f = lambda p, x: p["w"] ** 2 * x
        >>> f_lin = linearize(f, {"w": torch.tensor(3.0)})
        >>> f_lin({"w": torch.tensor(4.0)}, 1.0)  # 9 + 2 * 3 * (4 - 3)
        tensor(15.)
    """

    def f_lin(params: Mapping[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
        statedict.check_same(params, params0, "params and params0")
        tangents = {name: value - params0[name] for name, value in params.items()}
        with forward_ad_backends(), Unfused():
            out, d_out = torch.func.jvp(
                lambda p: f(p, *args, **kwargs), (dict(params0),), (tangents,)
            )[:2]
        return pytree.tree_map(_sum, out, d_out)

    return f_lin


def _differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _sum(out: Any, d_out: Any) -> Any:
    r"""\(f_0 + J\delta\), summed in at least float32 and left there under autocast."""
    if not _differentiable(out):
        return out
    wide = torch.promote_types(out.dtype, torch.float32)
    total = out.to(wide) + d_out.to(wide)
    return total if torch.is_autocast_enabled(out.device.type) else total.to(out.dtype)


def _aliases(module: nn.Module) -> dict[str, str]:
    """The other names of tied parameters and buffers -> their first name."""
    aliases = dict[str, str]()
    for named in (module.named_parameters, module.named_buffers):
        first = {id(value): name for name, value in named()}
        every = {name: first[id(value)] for name, value in named(remove_duplicate=False)}
        aliases |= {name: own for name, own in every.items() if name != own}
    return aliases


class LinearizedModel(nn.Module):
    r"""The linearisation of a module, itself a module.

    Its parameters are \(\theta\), under the names, in the order and with the `requires_grad` of the
    module's own `named_parameters()`. Frozen parameters that equal theta0 have no tangent and cost
    nothing beyond the forward pass, so freezing all but the attention or the adapters makes a
    cheaper expansion; those that differ from theta0 take part without a gradient.

    \(\theta_0\) is a constant: no parameter, not broadcast by DDP, but moved by `.to()` and kept in
    the state dict under `theta0.`. The module is deep-copied, so the caller's is never touched, and
    behaves as in eval mode whatever `train()` says: batch statistics would make the expansion
    depend on the batch.

    Args:
        model: the module; its weights are the initial theta, its flags those of theta.
        init_model: a module of the same shape whose weights are theta0; `model` itself if None.
        check: compares the tangent of each call with differences in float64, slowly, and names the
            module where they part. Without it the first call for each kind of input is checked.

    Raises:
        ValueError: if the two modules differ in parameters, listing all differences; if attributes
            of the module are functions that enclose it or a part of it, which no copy has.

    Source: arXiv:2305.12827, equation (5).
    """

    _skeleton: nn.Module

    def __init__(
        self, model: nn.Module, init_model: nn.Module | None = None, *, check: bool = False
    ) -> None:
        super().__init__()
        origin = uncompiled(model if init_model is None else init_model)
        model = uncompiled(model)
        theta: dict[str, Tensor] = dict(model.named_parameters())
        skeleton = copy_of(origin).eval().requires_grad_(False)
        theta0: dict[str, Tensor] = dict(skeleton.named_parameters())
        statedict.check_same(theta, theta0, "parameters of model and init_model")
        # not a submodule: theta0 is neither a parameter of ours nor a buffer that DDP broadcasts
        object.__setattr__(self, "_skeleton", skeleton)
        self.check = check
        self._names, self._aliases = list(theta), _aliases(skeleton)
        for name, value in theta.items():
            place, leaf = self._place(name)
            place._parameters[leaf] = nn.Parameter(value.detach().clone(), value.requires_grad)
        kept = skeleton.state_dict(keep_vars=True)
        self._buffer_names = [name for name, _ in skeleton.named_buffers()]
        for name, value in skeleton.named_buffers():
            place, leaf = self._place(name)
            place._buffers[leaf] = value
            if name not in kept:
                place._non_persistent_buffers_set.add(leaf)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The submodule that holds a dotted name, created as needed, and the name's last part.

        Looks in `_modules`, not at attributes: a submodule may have the name of one of our methods.
        """
        *parts, leaf = name.split(".")
        place: Any = self
        for part in parts:
            inner = place._modules.get(part)
            if inner is None:
                inner = place._modules[part] = nn.Module()
            place = inner
        return place, leaf

    def _parameter(self, name: str) -> Tensor:
        place, leaf = self._place(name)
        value = place._parameters.get(leaf)
        if value is None:
            raise RuntimeError(
                f"expected the parameter {name!r}, got none: a parametrisation, pruning or weight "
                "normalisation of the linearised model has replaced it; apply it to the module, "
                "and then linearise that"
            )
        return value

    def _buffer(self, name: str) -> Tensor:
        place, leaf = self._place(name)
        value: Tensor = place._buffers[leaf]  # type: ignore[assignment]
        return value

    @property
    def params(self) -> list[Tensor]:
        """theta, in the order of `named_parameters()`."""
        return [self._parameter(name) for name in self._names]

    @property
    def params0(self) -> list[Tensor]:
        """theta0, in the same order."""
        return list(self.theta0().values())

    @property
    def buffers0(self) -> tuple[Tensor, ...]:
        """The module's buffers, in the order of `named_buffers()`."""
        return tuple(self.module_buffers().values())

    def func0(self, params: Sequence[Tensor], /, *args: Any, **kwargs: Any) -> Any:
        """f(x; params), not linearised; differentiable by `torch.func`.

        Args:
            params: weights in the order of `params`.
            *args: inputs of the module.
            **kwargs: keyword inputs of the module.

        Returns:
            The module's output.
        """
        weights = {**dict(zip(self._names, params, strict=True)), **self.module_buffers()}
        return functional_call(self.module0(), weights, args, kwargs)

    def module0(self) -> nn.Module:
        """The module at theta0 (not copied): its structure is that of theta.

        Its buffers are ours, also after these have been converted, or assigned by
        `load_state_dict`.
        """
        with TURN:
            for name, value in self._buffers_by_all_names().items():
                path, _, leaf = name.rpartition(".")
                self._skeleton.get_submodule(path)._buffers[leaf] = value
        return self._skeleton

    def theta(self) -> dict[str, Tensor]:
        """`theta` by name (not copied)."""
        return {name: self._parameter(name) for name in self._names}

    def theta0(self) -> dict[str, Tensor]:
        """`theta0` by name (not copied)."""
        with TURN:  # in the pass of another thread, dual tensors take their place
            return dict(self._skeleton.named_parameters())

    def module_buffers(self) -> dict[str, Tensor]:
        """The module's own buffers by name (not copied)."""
        return {name: self._buffer(name) for name in self._buffer_names}

    def _buffers_by_all_names(self) -> dict[str, Tensor]:
        own = self.module_buffers()
        return own | {name: own[first] for name, first in self._aliases.items() if first in own}

    def aliases(self) -> dict[str, str]:
        """The other names of tied parameters and buffers -> the name that they have here."""
        return dict(self._aliases)

    def weights(self) -> dict[str, Tensor]:
        """Theta and persistent buffers, under all names in the standard module's state dict.

        Raises:
            UsageError: if a hook gives it names that no parameter or buffer has.
        """
        return self._by_all_names({**self.theta(), **self.module_buffers()})

    def weights0(self) -> dict[str, Tensor]:
        """theta0 and persistent buffers, under the same names."""
        return self._by_all_names({**self.theta0(), **self.module_buffers()})

    def _by_all_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = dict[str, Tensor]()
        for name, value in self._skeleton.state_dict().items():
            first = self._aliases.get(name, name)
            if first in state:
                weights[name] = state[first].detach()
            elif statedict.is_extra(name):
                weights |= {name: value} if isinstance(value, Tensor) else {}
            elif isinstance(value, Tensor):
                raise UsageError(
                    f"expected a state dict with the names of parameters and buffers, got also "
                    f"{shown(name)}: a hook of {type(self._skeleton).__name__} renames them; take "
                    "theta() for the weights of the linear model"
                )
        return weights

    def standard(self) -> nn.Module:
        """A copy of the module itself, not linearised, at theta and with theta's flags."""
        module, theta = copy_of(self.module0()), self.theta()
        statedict.copy_into(dict(module.named_parameters()), theta, "module and theta")
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(theta[name].requires_grad)
        empty_caches(module)
        return module

    def _displacement(self) -> Displacement:
        r"""\(\theta - \theta_0\) without the frozen parameters that equal theta0.

        They are compared in every call: a write through `.data` leaves no trace in `_version`.
        Tensors that `functional_call` puts in place of parameters always take part.
        """
        theta, theta0 = self.theta(), self.theta0()
        frozen = [
            name
            for name, value in theta.items()
            if isinstance(value, nn.Parameter) and not (value.requires_grad or value.is_meta)
        ]
        if frozen:
            device = theta[frozen[0]].device  # one synchronisation, not one a parameter
            differ = [(theta[name] != theta0[name]).any().to(device) for name in frozen]
            moved = torch.stack(differ).tolist()
            for name in (n for n, has_moved in zip(frozen, moved, strict=True) if not has_moved):
                del theta[name]
        for name in [n for n, value in theta.items() if not _differentiable(value)]:
            raise ValueError(
                f"expected {name!r} at theta0, since {theta[name].dtype} has no derivatives; "
                "linearise at this value, or give both models the same"
            )
        return Displacement(theta, theta0)

    def primal_and_tangent(
        self, *args: Any, tangent: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        r"""\(f(x; \theta_0)\) and \(J(x; \theta_0) v\) from one pass.

        Args:
            *args: inputs of the module.
            tangent: v by name; what is missing is zero. theta - theta0 if None.
            **kwargs: keyword inputs of the module.

        Returns:
            Two trees like the module's output.

        Raises:
            ValueError: if v has a name that no parameter has.
        """
        return self._pass(self._displacement() if tangent is None else tangent, args, kwargs)

    def _pass(
        self, v: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        if self.check:
            check_call(self._skeleton, self._weights0(), v, *args, **kwargs)
        return jvp(self._skeleton, self._weights0(), v, *args, **kwargs)

    def _weights0(self) -> dict[str, Tensor]:
        return {**self.theta0(), **self._buffers_by_all_names()}

    def tangents(
        self, x: Any, vectors: Sequence[Mapping[str, Tensor]], /, **kwargs: Any
    ) -> tuple[Any, list[Any]]:
        r"""\(f(x; \theta_0)\) and \(J(x; \theta_0) \tau_t\) for several task vectors.

        All share one pass of the primal: T whole vectors cost 1 + 2T forward passes. A vector that
        moves one layer has no tangent before it and none of its weights after it: T by L equal
        layers cost 1 + T + T (L - 1) / 2. `tangent.at_once` bounds the memory.

        Args:
            x: the module's input; a tuple for several.
            vectors: each tau_t by name; what is missing is zero.
            **kwargs: keyword inputs of the module.

        Returns:
            A tree like the module's output, and a list of such trees.
        """
        args = x if isinstance(x, tuple) else (x,)
        return jvps(self._skeleton, self._weights0(), vectors, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """f_lin of the module's own inputs, of the shape of the module's own outputs."""
        if torch.compiler.is_compiling():
            _warn_not_compiled()
        return self._expand(args, kwargs)

    @torch.compiler.disable
    def _expand(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        primal, d_primal = self._pass(self._displacement(), args, kwargs)
        return pytree.tree_map(_sum, primal, d_primal)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearizedModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._skeleton._apply(fn, recurse)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self.theta0().items():
            destination[f"{prefix}theta0.{name}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = {f"{prefix}theta0.{name}": value for name, value in self.theta0().items()}
        for key, value in ours.items():
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != value.shape:
                error_msgs.append(
                    f"{key}: expected shape {tuple(value.shape)}, "
                    f"got {tuple(state_dict[key].shape)}"
                )
            elif local_metadata.get("assign_to_params_buffers"):
                self._assign_theta0(key[len(prefix) + len("theta0.") :], state_dict[key])
            else:
                with torch.no_grad():
                    value.copy_(state_dict[key])
        rest = {key: value for key, value in state_dict.items() if key not in ours}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _assign_theta0(self, name: str, value: Tensor) -> None:
        parameter = nn.Parameter(value.detach(), requires_grad=False)
        for own in (name, *(other for other, first in self._aliases.items() if first == name)):
            path, _, leaf = own.rpartition(".")
            self._skeleton.get_submodule(path)._parameters[leaf] = parameter
