"""The subjects of the benchmark: variants to measure, and ratios between them.

A variant is a function that builds its turns, in the process that runs them; so importing this
module is free of torch.
"""

from __future__ import annotations

import functools
import gc
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from tangent_arithmetic.commands.benchmark import images
from tangent_arithmetic.commands.benchmark.objectives import objective_step

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tangent_arithmetic.encoders.images import ImageEncoder
    from tangent_arithmetic.tangent.linearized import LinearizedModel

SWEEP_POINTS = 21
ONE_EVALUATION = "linear, one evaluation"
CLI = "tangent_arithmetic.commands.cli"
ENGINE = "tangent_arithmetic.tangent.linearized"


@dataclass(frozen=True)
class Settings:
    """The model and machine to measure.

    Attributes:
        model: an open_clip architecture; for steps also one of timm, torchvision or transformers
            (`models.py`). Its weights are random.
        batch_size: images or texts per batch.
        device: cpu, cuda or mps.
        precision: fp32 or bf16 (autocast).
        trainable: subset of the parameters that the variant "selected" trains.
    """

    model: str
    batch_size: int
    device: str
    precision: Literal["fp32", "bf16"]
    trainable: str = "attention"


Turn = Callable[[], object]
Build = Callable[[Settings, Path], dict[str, Turn]]  # measure -> one turn


@dataclass(frozen=True)
class Subject:
    """The variants of a subcommand and the ratios to report.

    Attributes:
        variants: name -> builds its turns.
        ratios: name of the ratio -> (measure, variant, variant to divide by).
        on_request: variants that are measured only where they are named.
        prepare: writes the files that the variants need.
    """

    variants: Mapping[str, Build]
    ratios: Mapping[str, tuple[str, str, str]]
    prepare: Callable[[Path], None] = lambda folder: None
    on_request: frozenset[str] = frozenset()


def _encoder(settings: Settings) -> ImageEncoder:
    import torch

    from tangent_arithmetic.encoders.images import ImageEncoder

    torch.manual_seed(0)
    return ImageEncoder.without_weights(f"{settings.model}__init__")


def _standard_model(settings: Settings) -> tuple[nn.Module, Any, Any]:
    from tangent_arithmetic.commands.benchmark.models import build

    return build(settings.model, settings.batch_size)


def _linear_model(settings: Settings) -> tuple[LinearizedModel, Any, Any]:
    import torch

    from tangent_arithmetic.tangent.linearized import LinearizedModel

    model, args, kwargs = _standard_model(settings)
    linear = LinearizedModel(model)
    with torch.no_grad():
        for value in linear.parameters():  # so that theta differs from theta0
            value.add_(torch.randn_like(value), alpha=1e-3)
    return linear, args, kwargs


def _selected_model(settings: Settings) -> tuple[nn.Module, Any, Any]:
    """The linearised model, frozen at theta0 but for a subset of its parameters."""
    import torch

    from tangent_arithmetic.tangent.linearized import LinearizedModel
    from tangent_arithmetic.training.trainable import train_only

    model, args, kwargs = _standard_model(settings)
    linear = LinearizedModel(model)
    train_only(linear, settings.trainable)
    with torch.no_grad():
        for value in (p for p in linear.parameters() if p.requires_grad):
            value.add_(torch.randn_like(value), alpha=1e-3)
    return linear, args, kwargs


def _point(linear: LinearizedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """theta0 of a linearised model, and theta - theta0 with its gradient."""
    theta, theta0 = linear.theta(), dict(linear.theta0())
    return theta0, {name: theta[name] - theta0[name] for name in theta}


def _plain_model(settings: Settings) -> tuple[nn.Module, Any, Any]:
    """The linearised model with `torch.func.jvp` in place of our engine."""
    from torch import Tensor
    from torch.utils import _pytree as pytree

    from tangent_arithmetic.tangent import plain_jvp

    linear, args, kwargs = _linear_model(settings)

    def add(value: Any, step: Any) -> Any:
        return value + step if isinstance(value, Tensor) else value

    def forward(*args: Any, **kwargs: Any) -> Any:
        values = plain_jvp(linear.module0(), *_point(linear), *args, **kwargs)
        return pytree.tree_map(add, *values)

    linear.forward = forward  # type: ignore[method-assign]
    return linear, args, kwargs


def _compiled_model(settings: Settings) -> tuple[nn.Module, Any, Any]:
    """The standard model by `torch.compile`."""
    import torch

    model, args, kwargs = _standard_model(settings)
    model.forward = torch.compile(model.forward)
    return model, args, kwargs


def _compiled_jvp(settings: Settings) -> tuple[nn.Module, Any, Any]:
    """The linearised model as `torch.compile` makes it from `torch.func.jvp`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils import _pytree as pytree

    linear, args, kwargs = _linear_model(settings)
    torch.backends.mha.set_fastpath_enabled(False)  # it has no forward derivative
    module = linear.module0()

    def output(params: Any, args: Any, kwargs: Any) -> Any:
        leaves = pytree.tree_leaves(torch.func.functional_call(module, params, args, kwargs))
        return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))

    @torch.compile
    def expanded(theta0: Any, tangents: Any, args: Any, kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            point = (theta0,), (tangents,)
            f0, step = torch.func.jvp(lambda p: output(p, args, kwargs), *point)[:2]
        return f0 + step

    def forward(*args: Any, **kwargs: Any) -> Any:
        return expanded(*_point(linear), args, kwargs)

    linear.forward = forward  # type: ignore[method-assign]
    return linear, args, kwargs


def _passes(
    model_of: Callable[[Settings], tuple[nn.Module, Any, Any]], averaged: bool = False
) -> Build:
    """A training step with fine-tuning's AdamW, averaged or not; a pass without gradients."""

    def turns(settings: Settings, folder: Path) -> dict[str, Turn]:
        import torch
        from torch.utils import _pytree as pytree

        from tangent_arithmetic.runtime.compute import Compute
        from tangent_arithmetic.training.averaging import TailMean
        from tangent_arithmetic.training.optimizers import adamw
        from tangent_arithmetic.training.recipe import Recipe

        device = torch.device(settings.device)
        model, args, kwargs = model_of(settings)
        model = model.to(device).eval()  # the expansion is that of eval mode
        args, kwargs = pytree.tree_map(lambda value: value.to(device), (args, kwargs))
        gc.collect()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = adamw(trained, Recipe(1e-6, 1, settings.batch_size, 1, 0, 0.1, 0.0))
        average = TailMean(dict(model.named_parameters()), float(averaged), steps=1)
        compute = Compute(device, settings.precision)

        def output() -> Tensor:
            leaves = pytree.tree_leaves(model(*args, **kwargs))
            out: Tensor = next(v for v in leaves if isinstance(v, torch.Tensor))
            return out

        def step() -> None:
            with compute.autocast():
                loss = output().float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(1 if averaged else 0)

        def forward() -> None:
            with torch.no_grad(), compute.autocast():
                output()

        return {"step": step, "forward": forward}

    return turns


def _sweeps(points: int, linear: bool, one_by_one: bool) -> Build:
    """The accuracies at some coefficients, in one sweep or one by one."""

    def turns(settings: Settings, folder: Path) -> dict[str, Turn]:
        import torch

        from tangent_arithmetic.arithmetic.coefficients import coefficients
        from tangent_arithmetic.arithmetic.task_vectors import (
            LinearizedTaskVector,
            NonLinearTaskVector,
        )
        from tangent_arithmetic.encoders.linearized import linearized
        from tangent_arithmetic.run.models import classification_head, split_of
        from tangent_arithmetic.run.run import Run

        run = Run.of(
            SimpleNamespace(
                **{k: value for k, value in asdict(settings).items() if k != "trainable"},
                suite="clip8",
                eval_datasets=["EuroSAT"],
                num_workers=0,
                feature_cache=False,
                data_location=str(folder / "data"),
                save=str(folder / "run"),
            )
        )
        encoder, generator = _encoder(settings), torch.Generator().manual_seed(1)
        tau = {
            name: 1e-3 * torch.randn(value.shape, generator=generator)
            for name, value in encoder.weights().items()
            if value.is_floating_point()
        }
        vector = (LinearizedTaskVector if linear else NonLinearTaskVector)(vector=tau)
        classification_head(run, "EuroSAT")  # built once, not timed
        coefs = coefficients(points) if points > 1 else [1.0]
        base = linearized(encoder) if linear else encoder

        def turn() -> None:
            split = split_of(run, base, "EuroSAT")
            if not one_by_one:
                split.sweep(base, tau, coefs)
                return
            for coef in coefs:
                split.accuracy(vector.apply_to(base, coef))

        return {"time": turn}

    return turns


NUM_TASKS = 8  # of the subject directions


def bounds(num_layers: int) -> dict[str, int]:
    """The forward passes to whose arithmetic the features of directions amount.

    K whole vectors take 1 + 2K; T tasks by L equal layers 1 + T + T (L - 1) / 2, since a direction
    that moves one layer has no tangent before it and no product with its weights after it.
    """
    tasks = NUM_TASKS
    return {"whole": 1 + 2 * tasks, "blocks": round(1 + tasks + tasks * (num_layers - 1) / 2)}


def by_block(tau: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """A vector split by blocks, the parts of its names up to a number; the rest is left out."""
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, value in tau.items():
        block = re.match(r".*?\.\d+\.", name)
        if block:
            blocks.setdefault(block[0], {})[name] = value
    return list(blocks.values())


def _directions(as_bound: bool) -> Build:
    """Features of whole vectors and of task-by-block directions, or as many forward passes."""

    def turns(settings: Settings, folder: Path) -> dict[str, Turn]:
        import torch

        from tangent_arithmetic.arithmetic.features import few_at_a_time
        from tangent_arithmetic.commands.benchmark.models import image_size
        from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
        from tangent_arithmetic.runtime.compute import Compute
        from tangent_arithmetic.tangent.memory import freed_memory_kept

        compute = Compute(torch.device(settings.device), settings.precision)
        size = image_size(settings.model)
        assert size is not None  # `_encoder` builds models of open_clip alone
        images = torch.randn(settings.batch_size, 3, size, size, device=compute.device)
        encoder = _encoder(settings).to(compute.device).eval()
        linear = LinearizedImageEncoder(image_encoder=encoder)
        theta0 = linear.theta0()
        model = linear.model.module0()
        whole = [
            {name: 1e-3 * torch.randn_like(value) for name, value in theta0.items()}
            for _ in range(1 if as_bound else NUM_TASKS)
        ]
        vectors = {"whole": whole, "blocks": [part for tau in whole for part in by_block(tau)]}
        passes = bounds(len(by_block(whole[0])))

        def forward(count: int) -> None:
            with torch.no_grad(), compute.autocast():
                for _ in range(count):
                    model(images)

        def along(name: str) -> None:
            with compute.autocast(), freed_memory_kept():
                few_at_a_time(linear, images, vectors[name])

        if as_bound:
            return {name: functools.partial(forward, passes[name]) for name in passes}
        return {name: functools.partial(along, name) for name in passes}

    return turns


def _command(*words: str) -> Build:
    """A new Python process."""
    argv = [sys.executable, *words]
    run = functools.partial(subprocess.run, argv, check=True, capture_output=True)
    return lambda settings, folder: {"time": run}


def worker_counts(cores: int) -> list[int]:
    """0, the powers of two up to the number of cores, and that number."""
    return sorted({0, *(2**i for i in range(cores.bit_length())), cores})


def _workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def _loading(count: int) -> Build:
    """An epoch of training batches and one of evaluation batches, in the package's own loaders."""

    def turns(settings: Settings, folder: Path) -> dict[str, Turn]:
        from tangent_arithmetic.data import loading
        from tangent_arithmetic.data.files import class_pictures

        encoder, pictures = _encoder(settings), class_pictures(folder / "photos")
        augment, preprocess = encoder.train_preprocess, encoder.val_preprocess
        del encoder
        plan = loading.BatchPlan(len(pictures), settings.batch_size, 1, seed=0)
        batches = loading.RankBatches(plan, 0, plan.steps_per_epoch, 0, 1)

        def train() -> None:
            _count(loading.train_loader(pictures, augment, batches, count), len(pictures))

        def val() -> None:
            batches = loading.EvalBatches(pictures, preprocess, settings.batch_size, count)
            _count(batches, len(pictures))

        return {"train": train, "val": val}

    return turns


def _count(loader: Iterable[tuple[Any, Sequence[int]]], expected: int) -> None:
    """Loads all batches."""
    assert sum(len(labels) for _, labels in loader) == expected


def _stages(settings: Settings, folder: Path) -> dict[str, Turn]:
    """All images, processed up to a stage; each turn includes the stages before it."""
    from PIL.Image import open as open_image

    from tangent_arithmetic.data.files import class_pictures
    from tangent_arithmetic.data.pictures import to_rgb

    encoder = _encoder(settings)
    paths = [Path(path) for path, _ in class_pictures(folder / "photos").samples]
    transforms: dict[str, Any] = {"train": encoder.train_preprocess, "val": encoder.val_preprocess}
    del encoder

    def decode(path: Path) -> Any:
        return to_rgb(open_image(io.BytesIO(path.read_bytes())), str(path))

    def transformed(steps: Sequence[Callable[[Any], Any]], path: Path) -> Any:
        return functools.reduce(lambda image, step: step(image), steps, decode(path))

    def over(work: Callable[[Path], object]) -> Turn:
        def turn() -> None:
            for path in paths:
                work(path)

        return turn

    turns = {"read": over(Path.read_bytes), "decode": over(decode)}
    for name, transform in transforms.items():
        steps = transform.transforms
        geometry = [step for step in steps if "Crop" in repr(step) or "Resize" in repr(step)]
        turns[f"{name}, resize"] = over(functools.partial(transformed, geometry))
        turns[f"{name}, all"] = over(functools.partial(transformed, steps))
    return turns


CORES = os.cpu_count() or 1
MEASURES = ("step", "forward", "memory")
OTHERS = 16  # images of other data sets in a step
STEP_PAIRS = [
    (above, "standard") for above in ("linear", "plain", "averaged", "compiled", "compiled jvp")
]
SUBJECTS = {
    "step": Subject(
        {
            "standard": _passes(_standard_model),
            "linear": _passes(_linear_model),
            "plain": _passes(_plain_model),
            "averaged": _passes(_linear_model, averaged=True),
            "selected": _passes(_selected_model),
            "compiled": _passes(_compiled_model),
            "compiled jvp": _passes(_compiled_jvp),
        },
        {
            "step, plain / linear": ("step", "plain", "linear"),
            "step, selected / linear": ("step", "selected", "linear"),
        }
        | {
            f"{label}, {above} / {below}": (measure, above, below)
            for label, measure in zip(("step", "forward", "peak memory"), MEASURES, strict=True)
            for above, below in STEP_PAIRS
        },
        on_request=frozenset({"compiled", "compiled jvp"}),
    ),
    "objective": Subject(
        {
            "supervised": objective_step("supervised", _encoder),
            "taujp": objective_step("taujp", _encoder, others=OTHERS),
            "tak": objective_step("tak", _encoder),
        },
        {
            f"{label}, {above} / supervised": (measure, above, "supervised")
            for label, measure in (("step", "step"), ("peak memory", "memory"))
            for above in ("taujp", "tak")
        },
    ),
    "sweep": Subject(
        {
            ONE_EVALUATION: _sweeps(1, linear=True, one_by_one=True),
            "linear, sweep": _sweeps(SWEEP_POINTS, linear=True, one_by_one=False),
            "standard, one by one": _sweeps(SWEEP_POINTS, linear=False, one_by_one=True),
            "standard, sweep": _sweeps(SWEEP_POINTS, linear=False, one_by_one=False),
        },
        {
            "linear sweep / one linear evaluation": ("time", "linear, sweep", ONE_EVALUATION),
            "standard sweep / one by one": ("time", "standard, sweep", "standard, one by one"),
        },
        images.write_pictures,
    ),
    "directions": Subject(
        {"forward passes": _directions(True), "features": _directions(False)},
        {
            f"features of {what} / their bound in forward passes": (
                measure,
                "features",
                "forward passes",
            )
            for measure, what in (
                ("whole", f"{NUM_TASKS} vectors"),
                ("blocks", f"{NUM_TASKS} vectors by block"),
            )
        },
    ),
    "startup": Subject(
        {
            "import torch": _command("-c", "import torch"),
            f"import {ENGINE}": _command("-c", f"import {ENGINE}"),
            "finetune --help": _command("-m", CLI, "finetune", "--help"),
        },
        {
            f"{variant} / import torch": ("time", variant, "import torch")
            for variant in (f"import {ENGINE}", "finetune --help")
        },
    ),
    "data": Subject(
        {**{_workers(count): _loading(count) for count in worker_counts(CORES)}, "stages": _stages},
        {
            f"{what}, 0 workers / {_workers(count)}": (what, "0 workers", _workers(count))
            for what in ("train", "val")
            for count in worker_counts(CORES)[1:]
        },
        images.write_photos,
    ),
}
