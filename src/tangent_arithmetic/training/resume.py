"""Files written during a run: snapshots of its model, and states for an exact resume."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import not_finite
from tangent_arithmetic.storage.states import RunStates, differences, pack, unpack

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """What has tensors to continue from."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """The tensors."""

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> object:
        """Continues from them."""


@dataclass(frozen=True)
class Snapshots:
    """Files to write during a run.

    Attributes:
        states: the run's resume states, kept until it ends; the run continues from the newest one.
        every: optimizer steps between snapshots of the model; -1 for no snapshots.
        save: writes a snapshot; called with the number of steps done.
    """

    states: RunStates | None = None
    every: int = -1
    save: Callable[[int], object] = lambda done: None


class Keeper:
    """Writes and reads the states of a run: rank 0 writes, all ranks read.

    Args:
        states: the files; None to write none.
        model: the model in training.
        optimizer: its optimizer.
        others: whatever else has state, by the prefix of its tensors' names.
        unit: name of a step in messages.

    Attributes:
        losses: the mean loss of each step so far.
    """

    def __init__(
        self,
        states: RunStates | None,
        model: nn.Module,
        optimizer: Optimizer,
        others: Mapping[str, Stateful] | None = None,
        unit: str = "step",
    ) -> None:
        self.states, self.model, self.optimizer = states, model, optimizer
        self.others, self.unit = dict(others or {}), unit
        self.losses = list[float]()
        self._before, self._start = 0.0, time.monotonic()
        device = next(model.parameters()).device.type
        self.where = {"processes": ddp.world_size(), "device": device}

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self.losses)

    def seconds(self) -> float:
        """Seconds of training, including those before an interruption."""
        return self._before + time.monotonic() - self._start

    def due(self) -> bool:
        """Whether it is time to write a state."""
        return self.states is not None and ddp.is_main_process() and self.states.due(self.done)

    def save(self) -> None:
        """Writes the current state, unless its weights are not finite."""
        if self.states is not None and ddp.is_main_process() and not not_finite_in(self.model):
            tensors = pack(self.model, self.optimizer)
            for prefix, one in self.others.items():
                tensors |= {f"{prefix}/{name}": value for name, value in one.state_dict().items()}
            tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
            self.states.save(tensors, self.done, {"seconds": self.seconds(), **self.where})
        ddp.barrier()

    def resume(self) -> None:
        """Continues the newest state, if there is one.

        Raises:
            UsageError: if not all ranks see the same states.
        """
        if self.states is None:
            return
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.states.expect(12 * trained)  # weights and two moments, in float32
        state = self.states.newest()
        done = 0 if state is None else state.done
        if done != (first := ddp.broadcast(done)):
            raise UsageError(
                f"rank {ddp.rank()} finds the run at {self.unit} {done} in {self.states.folder}, "
                f"rank 0 at {self.unit} {first}; --save must be a folder that all machines share"
            )
        if state is None:
            return
        tensors = dict(state.tensors)
        self.losses = tensors.pop("losses").tolist()
        for prefix, one in self.others.items():
            own = [name for name in tensors if name.startswith(f"{prefix}/")]
            one.load_state_dict({name[len(prefix) + 1 :]: tensors.pop(name) for name in own})
        unpack(tensors, self.model, self.optimizer)
        self._before = state.facts["seconds"]
        logger.info("continuing after %s %d (%s)", self.unit, self.done, self.states.folder)
        if differ := differences({k: state.facts.get(k) for k in self.where}, self.where):
            note = "the weights will equal those of an uninterrupted run up to rounding only"
            logger.warning("%s: %s", "; ".join(differ), note)


def not_finite_in(model: nn.Module) -> list[str]:
    """The names of what training changes and files keep that is not finite.

    These are trained weights and persistent buffers.
    """
    kept = model.state_dict()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return not_finite({**trained, **{n: b for n, b in model.named_buffers() if n in kept}})
