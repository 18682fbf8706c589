"""Measures the cost of linearisation and data loading: time and memory, as paired ratios.

Each variant has its own process. The processes take turns, one at a time, in an order that rotates
every round. Ratios are computed within rounds and reported as median, minimum and maximum over the
rounds; the first turn of each process is warm-up.

    tangent-arithmetic benchmark step      training step and forward pass: standard, linear, plain
    tangent-arithmetic benchmark sweep     21 coefficients: in one sweep, or one by one
    tangent-arithmetic benchmark startup   importing the library, and --help
    tangent-arithmetic benchmark data      loading images: by number of workers, and by stage

"linear" is this project's engine, "plain" is `torch.func.jvp` with unfused attention.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tangent_arithmetic.run.args import Parser
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.ranges import number

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from tangent_arithmetic.encoders.images import ImageEncoder
    from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder

SWEEP_POINTS = 21
NUM_PICTURES = 32
PICTURE_SIZE = (640, 480)
NUM_PHOTOS = 1000
PHOTO_SIZE = (500, 375)  # that of most ImageNet images
ENGINE = "tangent_arithmetic.tangent.linearized"


@dataclass(frozen=True)
class Settings:
    """The model and machine to measure.

    Attributes:
        model: an open_clip architecture; its weights are random.
        batch_size: images per batch.
        device: cpu, cuda or mps.
        precision: fp32 or bf16 (autocast).
    """

    model: str
    batch_size: int
    device: str
    precision: Literal["fp32", "bf16"]


Turn = Callable[[], object]
Build = Callable[[Settings, Path], dict[str, Turn]]  # measure -> one turn


# --- the variants: each builds its turns in its own process


def _encoder(settings: Settings) -> ImageEncoder:
    import torch

    from tangent_arithmetic.encoders.images import ImageEncoder

    torch.manual_seed(0)
    return ImageEncoder.without_weights(settings.model)


def _random_vector(encoder: ImageEncoder) -> dict[str, Tensor]:
    """A small random task vector."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return {
        name: 1e-3 * torch.randn(value.shape, generator=generator)
        for name, value in encoder.weights().items()
        if value.is_floating_point()
    }


def _linearized(settings: Settings) -> LinearizedImageEncoder:
    import torch

    from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder

    linear = LinearizedImageEncoder(image_encoder=_encoder(settings))
    with torch.no_grad():
        for value in linear.parameters():  # so that theta differs from theta0
            value.add_(torch.randn_like(value), alpha=1e-3)
    return linear


def _plain(settings: Settings) -> nn.Module:
    """The linearised encoder with `torch.func.jvp` in place of our engine."""
    from torch import nn

    from tangent_arithmetic.tangent import plain_jvp

    linear = _linearized(settings)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, images: Any) -> Any:
            model = self.linear.model
            theta, theta0 = model.theta(), model.theta0()
            tangents = {name: theta[name] - theta0[name] for name in theta}
            out, d_out = plain_jvp(model._skeleton, theta0, tangents, images)
            return out + d_out

    return Plain()


def _passes(build: Callable[[Settings], nn.Module]) -> Build:
    """A training step with AdamW, and a forward pass without gradients."""

    def turns(settings: Settings, folder: Path) -> dict[str, Turn]:
        import torch

        from tangent_arithmetic.runtime.compute import Compute

        device = torch.device(settings.device)
        model = build(settings).to(device)
        gc.collect()
        size = _image_size(model)
        images = torch.randn(settings.batch_size, 3, size, size, device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        compute = Compute(device, settings.precision)

        def step() -> None:
            model.train()
            with compute.autocast():
                loss = model(images).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def forward() -> None:
            model.eval()
            with torch.no_grad(), compute.autocast():
                model(images)

        return {"step": step, "forward": forward}

    return turns


def _image_size(model: nn.Module) -> int:
    import open_clip

    encoder: Any = getattr(model, "linear", model)
    config = open_clip.get_model_config(encoder.model_name.removesuffix("__init__"))
    return int(config["vision_cfg"]["image_size"])


def _sweeps(points: int, linear: bool, one_by_one: bool) -> Build:
    """The accuracies at some coefficients, in one sweep or one by one."""

    def turns(settings: Settings, folder: Path) -> dict[str, Turn]:
        from tangent_arithmetic.arithmetic.coefficients import coefficients
        from tangent_arithmetic.arithmetic.task_vectors import (
            LinearizedTaskVector,
            NonLinearTaskVector,
        )
        from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
        from tangent_arithmetic.run.args import Config
        from tangent_arithmetic.run.models import classification_head, split_of
        from tangent_arithmetic.run.run import Run

        config = Config(
            **asdict(settings), suite="clip8", eval_datasets=["EuroSAT"], num_workers=0,
            feature_cache=False, data_location=str(folder / "data"), save=str(folder / "run"),
        )  # fmt: skip
        run, encoder = Run.of(config), _encoder(settings)
        vector: Any = (LinearizedTaskVector if linear else NonLinearTaskVector)(
            vector=_random_vector(encoder)
        )
        classification_head(run, "EuroSAT")  # built once, not timed
        coefs = coefficients(points) if points > 1 else [1.0]
        base = LinearizedImageEncoder(image_encoder=encoder) if linear else encoder

        def turn() -> None:
            split = split_of(run, base, "EuroSAT")
            if not one_by_one:
                split.sweep(base, vector.vector, coefs)
                return
            for coef in coefs:
                split.accuracy(vector.apply_to(base, coef))

        return {"time": turn}

    return turns


def _command(*words: str) -> Build:
    """A new Python process."""
    argv = [sys.executable, *words]
    run = functools.partial(subprocess.run, argv, check=True, capture_output=True)
    return lambda settings, folder: {"time": run}


def worker_counts(cores: int) -> list[int]:
    """0, the powers of two up to the number of cores, and that number."""
    powers = [2**i for i in range(cores.bit_length())]
    return sorted({0, *powers, cores})


def _workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def _loading(count: int) -> Build:
    """An epoch of training batches and one of evaluation batches, in the package's own loaders."""

    def turns(settings: Settings, folder: Path) -> dict[str, Turn]:
        from tangent_arithmetic.data.files import class_pictures
        from tangent_arithmetic.data.loading import (
            BatchPlan,
            RankBatches,
            eval_loader,
            train_loader,
        )

        encoder, pictures = _encoder(settings), class_pictures(folder / "photos")
        augment, preprocess = encoder.train_preprocess, encoder.val_preprocess
        del encoder
        plan = BatchPlan(len(pictures), settings.batch_size, 1, seed=0)

        def epoch(loader: Callable[[], Any]) -> Turn:
            def turn() -> None:
                assert sum(len(labels) for _, labels in loader()) == len(pictures)

            return turn

        batches = RankBatches(plan, 0, plan.steps_per_epoch, 0, 1)
        return {
            "train": epoch(lambda: train_loader(pictures, augment, batches, count)),
            "val": epoch(lambda: eval_loader(pictures, preprocess, settings.batch_size, count)),
        }

    return turns


def _stages(settings: Settings, folder: Path) -> dict[str, Turn]:
    """All images, processed up to a stage; each turn includes the stages before it."""
    import io

    from PIL.Image import open as open_image

    from tangent_arithmetic.data.files import class_pictures
    from tangent_arithmetic.data.pictures import to_rgb

    encoder = _encoder(settings)
    paths = [path for path, _ in class_pictures(folder / "photos").samples]
    transforms: dict[str, Any] = {"train": encoder.train_preprocess, "val": encoder.val_preprocess}
    del encoder

    def decode(path: str) -> Image:
        return to_rgb(open_image(io.BytesIO(Path(path).read_bytes())), path)

    def transformed(path: str, steps: Sequence[Callable[[Any], Any]]) -> Any:
        return functools.reduce(lambda image, step: step(image), steps, decode(path))

    def over(work: Callable[[str], object]) -> Turn:
        def turn() -> None:
            for path in paths:
                work(path)

        return turn

    turns = {"read": over(lambda path: Path(path).read_bytes()), "decode": over(decode)}
    for name, transform in transforms.items():
        steps = transform.transforms
        geometry = [step for step in steps if "Crop" in repr(step) or "Resize" in repr(step)]
        turns[f"{name}, resize"] = over(functools.partial(transformed, steps=geometry))
        turns[f"{name}, all"] = over(functools.partial(transformed, steps=steps))
    return turns


@dataclass(frozen=True)
class Comparison:
    """The variants of a subcommand and the ratios to report.

    Attributes:
        variants: name -> builds its turns.
        ratios: name of the ratio -> (measure, variant, variant to divide by).
    """

    variants: Mapping[str, Build]
    ratios: Mapping[str, tuple[str, str, str]]


COMPARISONS = {
    "step": Comparison(
        {"standard": _passes(_encoder), "linear": _passes(_linearized), "plain": _passes(_plain)},
        {
            "step, linear / standard": ("step", "linear", "standard"),
            "step, plain / standard": ("step", "plain", "standard"),
            "step, plain / linear": ("step", "plain", "linear"),
            "forward, linear / standard": ("forward", "linear", "standard"),
            "forward, plain / standard": ("forward", "plain", "standard"),
            "peak memory, linear / standard": ("memory", "linear", "standard"),
            "peak memory, plain / standard": ("memory", "plain", "standard"),
        },
    ),
    "sweep": Comparison(
        {
            "linear, one evaluation": _sweeps(1, linear=True, one_by_one=True),
            "linear, sweep": _sweeps(SWEEP_POINTS, linear=True, one_by_one=False),
            "standard, one by one": _sweeps(SWEEP_POINTS, linear=False, one_by_one=True),
            "standard, sweep": _sweeps(SWEEP_POINTS, linear=False, one_by_one=False),
        },
        {
            "linear sweep / one linear evaluation": (
                "time",
                "linear, sweep",
                "linear, one evaluation",
            ),
            "standard sweep / one by one": ("time", "standard, sweep", "standard, one by one"),
        },
    ),
    "startup": Comparison(
        {
            "import torch": _command("-c", "import torch"),
            f"import {ENGINE}": _command("-c", f"import {ENGINE}"),
            "finetune --help": _command(
                "-m", "tangent_arithmetic.commands.cli", "finetune", "--help"
            ),
        },
        {
            f"{variant} / import torch": ("time", variant, "import torch")
            for variant in (f"import {ENGINE}", "finetune --help")
        },
    ),
    "data": Comparison(
        {
            **{_workers(count): _loading(count) for count in worker_counts(os.cpu_count() or 1)},
            "stages": _stages,
        },
        {
            f"{what}, 0 workers / {_workers(count)}": (what, "0 workers", _workers(count))
            for what in ("train", "val")
            for count in worker_counts(os.cpu_count() or 1)[1:]
        },
    ),
}


# --- processes


def _peak_bytes(device: str) -> int:
    """Peak memory: of the device if it has its own, else of this process."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts from the parent's memory
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def _serve(pipe: Connection, subject: str, variant: str, settings: Settings, folder: Path) -> None:
    """Runs turns on request and sends back the seconds they took."""
    turns = COMPARISONS[subject].variants[variant](settings, folder)
    pipe.send(list(turns))
    while (name := pipe.recv()) is not None:
        if name == "memory":
            pipe.send(_peak_bytes(settings.device))
            continue
        _synchronize(settings.device)
        start = time.perf_counter()
        turns[name]()
        _synchronize(settings.device)
        pipe.send(time.perf_counter() - start)


def measure(
    subject: str, variants: list[str], settings: Settings, rounds: int, folder: Path
) -> dict[str, dict[str, list[float]]]:
    """Measures all variants; returns variant -> measure -> one value per round.

    Args:
        subject: step, sweep, startup or data.
        variants: which of its variants.
        settings: the model and machine.
        rounds: turns of each variant after the warm-up.
        folder: for files.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
    try:
        measures: dict[str, list[str]] = {}
        for name in variants:
            pipes[name], theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, subject, name, settings, folder), daemon=False
            )
            process.start()
            theirs.close()
            processes.append(process)
            measures[name] = pipes[name].recv()  # builds one at a time
        for what in dict.fromkeys(itertools.chain(*measures.values())):
            order = [name for name in variants if what in measures[name]]
            for turn in range(rounds + 1):
                first = turn % len(order)
                for name in order[first:] + order[:first]:
                    pipes[name].send(what)
                    seconds = pipes[name].recv()
                    if turn > 0:
                        figures[name].setdefault(what, []).append(seconds)
                    label = f"round {turn} of {rounds}" if turn else "warm-up"
                    print(f"{name}, {what}, {label}: {seconds:.2f} s", file=sys.stderr, flush=True)
            for name in variants if what == "step" else ():
                pipes[name].send("memory")
                figures[name]["memory"] = [pipes[name].recv() / 2**30]
    finally:
        for pipe in pipes.values():
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()
    return figures


def _write(paths: Iterable[Path], size: tuple[int, int]) -> None:
    """Writes images of colour blobs and noise, as costly to decode as photographs."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for path in paths:
        coarse = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        blobs = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
        noisy = blobs.astype(np.int16) + generator.integers(-8, 9, blobs.shape)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path, quality=90)


def write_photos(folder: Path) -> None:
    """JPEG images of the size of photographs, in ten class folders."""
    _write((folder / f"class_{i % 10}" / f"{i:05d}.jpg" for i in range(NUM_PHOTOS)), PHOTO_SIZE)


def write_pictures(folder: Path) -> None:
    """PNG images of the size of photographs, in the layout of EuroSAT."""
    from tangent_arithmetic.data.clip8.eurosat import PHRASES

    root, classes = folder / "EuroSAT_splits", sorted(PHRASES)
    counts = {"train": len(classes), "val": len(classes), "test": NUM_PICTURES}
    paths = (
        root / split / classes[i % len(classes)] / f"{i}.png"
        for split, count in counts.items()
        for i in range(count)
    )
    _write(paths, PICTURE_SIZE)


# --- the report


def summarize(
    figures: Mapping[str, Mapping[str, list[float]]], ratios: Mapping[str, tuple[str, str, str]]
) -> dict[str, Any]:
    """The median of each measure, and statistics of the ratios within rounds."""
    medians = {
        name: {what: median(values) for what, values in measures.items()}
        for name, measures in figures.items()
    }
    summary: dict[str, Any] = {"medians": medians, "ratios": {}}
    for name, (what, above, below) in ratios.items():
        if above in figures and below in figures and what in figures[above]:
            pairs = zip(figures[above][what], figures[below][what], strict=True)
            quotients = [a / b for a, b in pairs]
            summary["ratios"][name] = {
                "median": median(quotients),
                "least": min(quotients),
                "most": max(quotients),
                "pairs": len(quotients),
            }
    return summary


def loading(medians: Mapping[str, Mapping[str, float]], count: int) -> dict[str, Any]:
    """Loading rates and stages.

    Args:
        medians: variant -> measure -> seconds, of the subject data.
        count: number of images.

    Returns:
        "images_per_second" by variant; "milliseconds" per image of each stage, by transform; and
        "bound", the longest stage of each.
    """
    rates = {
        name: {what: round(count / seconds, 1) for what, seconds in measures.items()}
        for name, measures in medians.items()
        if name != "stages"
    }
    facts: dict[str, Any] = {"images_per_second": rates}
    if upto := medians.get("stages"):
        stages = {}
        for kind in ("train", "val"):
            last = ("read", "decode", f"{kind}, resize", f"{kind}, all")
            ends = [0.0, *(upto[stage] for stage in last)]
            spent = [round(1000 * (b - a) / count, 3) for a, b in itertools.pairwise(ends)]
            stages[kind] = dict(zip(("read", "decode", "resize", "rest"), spent, strict=True))
        facts["milliseconds"] = stages
        facts["bound"] = {kind: max(spent, key=spent.__getitem__) for kind, spent in stages.items()}
    return facts


def loading_table(facts: Mapping[str, Any]) -> str:
    """The result of `loading` as Markdown."""
    from tangent_arithmetic.run.results import markdown_table

    rows = [
        [name, *(f"{rates[kind]:.0f}" for kind in ("train", "val"))]
        for name, rates in facts["images_per_second"].items()
    ]
    text = markdown_table(["images/s", "train", "val"], rows)
    for kind, spent in facts.get("milliseconds", {}).items():
        longest, total = facts["bound"][kind], sum(spent.values())
        parts = ", ".join(f"{stage} {value:.2f}" for stage, value in spent.items())
        text += (
            f"\n\n{kind}: {total:.2f} ms per image on one core ({parts}); "
            f"bound by {longest}, {100 * spent[longest] / total:.0f} % of it"
        )
    return text


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    from tangent_arithmetic.run.results import markdown_table

    units = {"memory": "GiB"}
    rows = [
        [name, what, f"{value:.2f} {units.get(what, 's')}"]
        for name, measures in summary["medians"].items()
        for what, value in measures.items()
    ]
    ratios = [
        [name, f"{r['median']:.3f}", f"{r['least']:.3f} to {r['most']:.3f}", str(r["pairs"])]
        for name, r in summary["ratios"].items()
    ]
    return (
        markdown_table(["variant", "measure", "median"], rows)
        + "\n\n"
        + markdown_table(["ratio", "median", "range", "pairs"], ratios)
    )


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with `variants` as a list of known names."""
    parser = Parser(
        prog="tangent-arithmetic benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subject", choices=sorted(COMPARISONS))
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture")
    parser.add_argument("--batch-size", type=number(int, 1), default=32, help="images per batch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=number(int, 1), default=5, help="turns of each variant")
    parser.add_argument("--variants", help="comma-separated (default: all of the subject's)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    known = COMPARISONS[options.subject].variants
    variants = options.variants.split(",") if options.variants else list(known)
    if unknown := set(variants) - known.keys():
        parser.error(f"unknown variants {sorted(unknown)}; choose from {', '.join(known)}")
    if len(set(variants)) < len(variants):
        parser.error(f"--variants={options.variants} names a variant twice")
    options.variants = variants
    return options


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = _options(argv)
    settings = Settings(
        f"{options.model}__init__", options.batch_size, options.device, options.precision
    )
    from tangent_arithmetic.run.results import git_commit, versions

    with tempfile.TemporaryDirectory() as name:
        if options.subject == "sweep":
            write_pictures(Path(name) / "data")
        if options.subject == "data":
            write_photos(Path(name) / "photos")
        figures = measure(options.subject, options.variants, settings, options.rounds, Path(name))
    summary = summarize(figures, COMPARISONS[options.subject].ratios)
    if options.subject == "data":
        pictures = {"pictures": NUM_PHOTOS, "size": list(PHOTO_SIZE), "format": "JPEG, quality 90"}
        summary = {**pictures, **loading(summary["medians"], NUM_PHOTOS), **summary}
    facts = {
        "subject": options.subject,
        **asdict(settings),
        "rounds": options.rounds,
        "machine": f"{platform.system()} {platform.machine()}, {processor()}, "
        f"{os.cpu_count()} cores",
        "versions": versions(),
        "commit": git_commit(),
        **summary,
        "rounds_in_full": figures,
    }
    if options.output:
        from tangent_arithmetic.runtime.atomic import write_json

        write_json(options.output, facts)
    print(f"{settings}\n{facts['machine']}\n\n{table(summary)}")
    if options.subject == "data":
        print(f"\n{loading_table(summary)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
