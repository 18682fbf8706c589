r"""ProDistill: coefficients of single weights, by distillation from the models, block by block.

\[ \theta = \theta_0 + \sum_k a_k \circ \tau_k, \quad
   \min_a \sum_k \sum_x \|f(h(x); \theta) - f(h_k(x); \theta_k)\|^2 \]

for each block f in turn, with coefficients \(a_k\) of the shape of its weights, by Adam. Images x
of task k enter the merged block as h, the outputs of the merged blocks before it, and model k's
block as \(h_k\), those of model k's own ("dual inputs"). Only one block is trained at a time, on
stored inputs, without labels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.solving.groups import places
from tangent_arithmetic.data.loading import to_device
from tangent_arithmetic.data.texts import tokens_of
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.merging.examples import (
    Examples,
    Merged,
    batches_of,
    check_count,
    part_or_sum,
)
from tangent_arithmetic.merging.moving import merged_encoder
from tangent_arithmetic.merging.registry import PRETRAINED, Piece, merging_method
from tangent_arithmetic.merging.seeds import generator_of
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage.statedict import is_real_float
from tangent_arithmetic.tangent.functional import functional_call

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How blocks are distilled, see `prodistill`."""

    scaling_factor: float
    num_examples: int
    lr: float
    epochs: int
    batch_size: int
    seed: int

    def check(self) -> None:
        """Checks the settings; a `UsageError` if they are out of range."""
        check_count("prodistill", "num_examples", self.num_examples)
        check_count("prodistill", "batch_size", self.batch_size)
        if self.epochs < 0 or not self.lr > 0:
            raise UsageError(
                "prodistill's epochs must be at least 0 and its lr above 0, got "
                f"{self.epochs} and {self.lr}"
            )


@dataclass(frozen=True)
class Example:
    """One batch of a task at one block.

    Attributes:
        args: of the merged block's call, the input first.
        kwargs: of the same.
        target: the output of the model's own block on its own input.
        mask: of texts, the positions that hold tokens.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor
    mask: Tensor | None = None


def blocks_of(encoder: ModuleEncoder) -> list[str]:
    """The names of an encoder's blocks, such as `transformer.resblocks.3`, in order.

    Raises:
        UsageError: if it has none.
    """
    names = list(dict.fromkeys(map("".join, places(encoder.weights()).values())))
    if not names:
        raise UsageError(
            f"prodistill trains one block after the other, and {encoder.identity()} has no list of "
            "blocks; choose a method that merges whole models, such as regmean"
        )
    return names


def output_of(value: Any) -> Tensor:
    """A block's features: its output, or the first of several."""
    features: Tensor = value[0] if isinstance(value, tuple) else value
    return features


@torch.no_grad()
def call_of(
    encoder: ModuleEncoder, block: str, images: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """The arguments and the features of a block in a pass of the encoder.

    Raises:
        UsageError: if the pass does not call the block, or does so more than once.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args, kwargs, output_of(output)))

    with encoder.get_submodule(block).register_forward_hook(seen, with_kwargs=True):
        encoder(images)
    if len(calls) != 1:
        raise UsageError(
            f"prodistill trains one block after the other, and {encoder.identity()} calls {block} "
            f"{len(calls)} times; choose a method that merges whole models, such as regmean"
        )
    return calls[0]


def loss_of(block: nn.Module, weights: Mapping[str, Tensor], example: Example) -> Tensor:
    """The squared distance of the block's features to the target, summed over all."""
    out = functional_call(block, dict(weights), example.args, dict(example.kwargs))
    distance = output_of(out) - example.target
    distance = distance.to(torch.promote_types(distance.dtype, torch.float32))
    kept = example.mask is not None and distance.shape[:-1] == example.mask.shape
    return (distance[example.mask] if kept else distance).square().sum()


class Distillation:
    """A merged model that is distilled block by block.

    Args:
        examples: the models and their images.
        settings: how.

    Attributes:
        student: the merged model.
        first: the name of each of its parameters, the first one if there are several.
    """

    def __init__(self, examples: Examples, settings: Settings) -> None:
        self.examples, self.settings = examples, settings
        self.student = merged_encoder(examples, settings.scaling_factor).requires_grad_(False)
        self.expert = examples.encoder()
        self.first = {id(p): name for name, p in self.student.named_parameters()}

    def distil(self, block: str) -> dict[str, Tensor]:
        """Trains the coefficients of a block, and returns its weights, by their whole names."""
        module = self.student.get_submodule(block)
        state = {
            name: p
            for name, p in module.named_parameters()
            if is_real_float(p) and self.first[id(p)] == f"{block}.{name}"
        }
        if not state:  # all of it is that of other blocks
            return {}
        data = {model: self._examples(block, model) for model in self.examples.models}
        theta0 = self._read(PRETRAINED, block, state)
        thetas = [self._read(model, block, state) for model in self.examples.models]
        taus = {n: torch.stack([own[n] for own in thetas]).sub_(theta0[n]) for n in state}
        del thetas
        weights = trained(module, theta0, taus, data, self.settings)
        for name, p in state.items():
            p.copy_(weights[name])
        return {f"{block}.{name}": p.detach() for name, p in state.items()}

    def _read(self, model: str, block: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = self.examples.weights(model)
        return {  # at least in float32, in which small steps count
            name: weights[f"{block}.{name}"].to(
                value.device, torch.promote_types(value.dtype, torch.float32)
            )
            for name, value in like.items()
        }

    def _examples(self, block: str, model: str) -> list[Example]:
        """The batches of a task at a block."""
        self.expert.load_weights(self.examples.weights(model))
        settings, device = self.settings, next(self.student.parameters()).device
        split = self.examples.split(self.expert, model, settings.num_examples, settings.seed)
        examples = []
        for batch in replace(batches_of(split), batch_size=settings.batch_size):
            images, _ = to_device(batch, device)
            args, kwargs, _ = call_of(self.student, block, images)
            target = call_of(self.expert, block, images)[2]
            examples.append(Example(args, kwargs, target, tokens_of(images)))
        return examples


def steps(data: Mapping[str, Sequence[Example]], epochs: int, seed: int) -> Iterator[list[Example]]:
    """A batch of each task a step; every batch once in an epoch, in a random order of its own."""
    generators = {name: generator_of(seed, name) for name in data}
    for _ in range(epochs):
        orders = {
            name: torch.randperm(len(own), generator=generators[name]).tolist()
            for name, own in data.items()
        }
        for step in range(max(map(len, data.values()))):
            yield [data[name][order[step]] for name, order in orders.items() if step < len(order)]


@torch.enable_grad()
def trained(
    block: nn.Module,
    theta0: Mapping[str, Tensor],
    taus: Mapping[str, Tensor],
    data: Mapping[str, Sequence[Example]],
    settings: Settings,
) -> dict[str, Tensor]:
    """The weights of a block after the last epoch.

    Args:
        block: the module.
        theta0: pre-trained weights by name.
        taus: task vectors (models, *shape) by name.
        data: the batches of each task, by the model's name.
        settings: how.
    """
    dtypes = {name: p.dtype for name, p in block.named_parameters()}
    alphas = {
        name: torch.full_like(tau, settings.scaling_factor, requires_grad=True)
        for name, tau in taus.items()
    }

    def weights() -> dict[str, Tensor]:
        moved = {n: theta0[n] + (alphas[n] * tau).sum(0) for n, tau in taus.items()}
        return {n: value.to(dtypes[n]) for n, value in moved.items()}

    optimizer = torch.optim.Adam(alphas.values(), lr=settings.lr)
    count = settings.epochs * max(map(len, data.values()))
    losses = []
    for batch in progress(steps(data, settings.epochs, settings.seed), "distillation", count):
        optimizer.zero_grad()
        moved = weights()
        loss = torch.stack([loss_of(block, moved, example) for example in batch]).sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if losses:
        epoch = len(losses) // settings.epochs
        start, end = (sum(part) / epoch for part in (losses[:epoch], losses[-epoch:]))
        logger.info("squared distance of features, mean of an epoch: %.4g -> %.4g", start, end)
    return {name: value.detach() for name, value in weights().items()}


def prepare(
    examples: Examples,
    *,
    scaling_factor: float,
    num_examples: int,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> Merged:
    """The weights of all blocks."""
    settings = Settings(scaling_factor, num_examples, lr, epochs, batch_size, seed)
    settings.check()
    distillation, merged = Distillation(examples, settings), dict[str, Tensor]()
    for block in blocks_of(distillation.student):
        logger.info("block %s", block)
        merged |= distillation.distil(block)
    return merged


@merging_method(
    "prodistill",
    source="arXiv:2502.12706",
    algorithm="ProDistillAlgorithm",
    prepare=prepare,
    passes=2,
    coefficient=None,  # the result is not affine in it
    needs_data=True,
)
def prodistill(
    piece: Piece,
    *,
    scaling_factor: float = 0.3,
    num_examples: int = 64,
    lr: float = 0.01,
    epochs: int = 100,
    batch_size: int = 16,
    seed: int = 0,
    statistics: Merged,
) -> Tensor:
    r"""\(\theta_0 + \sum_k a_k \circ \tau_k\) of blocks, trained as above.

    Other tensors, of the embedding and the head, have the coefficient `scaling_factor`.

    Args:
        piece: one piece of every model.
        scaling_factor: every coefficient's first value.
        num_examples: validation images of each task.
        lr: Adam's learning rate.
        epochs: passes over the images, for each block.
        batch_size: images of each task in a step.
        seed: of the choice of images and the order of the batches.
        statistics: the result of `prepare`.

    Source: Xu et al., "Scalable Model Merging with Progressive Layer-wise Distillation",
    arXiv:2502.12706; the defaults are those of the authors' code, where a step has 128 images of
    eight tasks.
    """
    return part_or_sum(piece, statistics, scaling_factor)
