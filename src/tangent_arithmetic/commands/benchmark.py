"""Measures what linearisation and loading cost: time and memory, as ratios of paired runs.

Each variant lives in a process of its own. The processes work in turns, in another order each
round, one at a time; a ratio is taken within a round, and its median over rounds is reported with
its smallest and largest value. The first turn of each is not counted.

    python scripts/benchmark.py step      a training step, a forward pass; standard, linear, plain
    python scripts/benchmark.py sweep     21 coefficients: in one pass, and batch by batch
    python scripts/benchmark.py startup   importing the library, `--help` of an entry point
    python scripts/benchmark.py data      loading pictures: by workers, and where the time goes

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from tangent_arithmetic.run.args import Parser
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.ranges import number

ROOT = Path(__file__).resolve().parent.parent
SWEEP_POINTS = 21
NUM_PICTURES = 32
PICTURE_SIZE = (640, 480)
NUM_PHOTOS = 1000
PHOTO_SIZE = (500, 375)  # as most of ImageNet's are


@dataclass(frozen=True)
class Settings:
    """What is measured, on what.

    Attributes:
        model: an architecture of open_clip; its weights are random.
        batch_size: images a batch.
        device: cpu, cuda or mps.
        precision: fp32 or bf16 (autocast).
    """

    model: str
    batch_size: int
    device: str
    precision: Literal["fp32", "bf16"]


Turn = Callable[[], None]


# --- the variants: each builds, in its own process, what one turn does


def _encoder(settings: Settings) -> Any:
    import torch

    from tangent_arithmetic.encoders.images import ImageEncoder

    torch.manual_seed(0)
    return ImageEncoder.without_weights(settings.model)


def _vector(encoder: Any) -> dict[str, Any]:
    """A small random task vector."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return {
        name: 1e-3 * torch.randn(value.shape, generator=generator)
        for name, value in encoder.weights().items()
        if value.is_floating_point()
    }


def _linearized(settings: Settings) -> Any:
    import torch

    from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder

    linear = LinearizedImageEncoder(image_encoder=_encoder(settings))
    with torch.no_grad():
        for value in linear.parameters():  # theta is not theta0
            value.add_(torch.randn_like(value), alpha=1e-3)
    return linear


def _plain(settings: Settings) -> Any:
    """The linearised encoder with `torch.func.jvp` in the place of our engine."""
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


def _passes(build: Callable[[Settings], Any]) -> Callable[[Settings, Path], dict[str, Turn]]:
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


def _image_size(model: Any) -> int:
    import open_clip

    encoder = getattr(model, "linear", model)
    size = open_clip.get_model_config(encoder.model_name.removesuffix("__init__"))
    return int(size["vision_cfg"]["image_size"])


def _args(settings: Settings, folder: Path) -> Any:
    from tangent_arithmetic.run.args import Config

    return Config(
        model=settings.model,
        suite="clip8",
        data_location=str(folder / "data"),
        save=str(folder / "run"),
        batch_size=settings.batch_size,
        device=settings.device,
        precision=settings.precision,
        eval_datasets=["EuroSAT"],
        num_workers=0,
        feature_cache=False,
    )


def _sweeps(points: int, linear: bool, calls: bool) -> Callable[[Settings, Path], dict[str, Turn]]:
    """The accuracies at some coefficients: by one sweep, or by as many evaluations."""

    def turns(settings: Settings, folder: Path) -> dict[str, Turn]:
        from tangent_arithmetic.arithmetic.coefficients import coefficients
        from tangent_arithmetic.arithmetic.task_vectors import (
            LinearizedTaskVector,
            NonLinearTaskVector,
        )
        from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
        from tangent_arithmetic.run.models import classification_head, split_of
        from tangent_arithmetic.run.run import Run

        run = Run.of(_args(settings, folder))
        encoder = _encoder(settings)
        vector: Any = (LinearizedTaskVector if linear else NonLinearTaskVector)(
            vector=_vector(encoder)
        )
        classification_head(run, "EuroSAT")  # built once, outside of the time
        coefs = coefficients(points) if points > 1 else [1.0]
        base = LinearizedImageEncoder(image_encoder=encoder) if linear else encoder

        def turn() -> None:
            split = split_of(run, base, "EuroSAT")
            if not calls:
                split.sweep(base, vector.vector, coefs)
                return
            for coef in coefs:
                split.accuracy(vector.apply_to(base, coef))

        return {"time": turn}

    return turns


def _commands(*words: str) -> Callable[[Settings, Path], dict[str, Turn]]:
    def turns(settings: Settings, folder: Path) -> dict[str, Turn]:
        def turn() -> None:
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)

        return {"time": turn}

    return turns


def worker_counts(cores: int) -> list[int]:
    """0, 1, 2, 4 ... and as many workers as there are cores."""
    powers = [2**i for i in range(cores.bit_length())]
    return sorted({0, *powers, cores})


def _workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def _loading(count: int) -> Callable[[Settings, Path], dict[str, Turn]]:
    """An epoch of training batches, and one of evaluation batches, in the run's own loaders."""

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

        def train() -> None:
            batches = RankBatches(plan, 0, plan.steps_per_epoch, 0, 1)
            seen = sum(len(labels) for _, labels in train_loader(pictures, augment, batches, count))
            assert seen == len(pictures)

        def val() -> None:
            loader = eval_loader(pictures, preprocess, settings.batch_size, count)
            seen = sum(len(labels) for _, labels in loader)
            assert seen == len(pictures)

        return {"train": train, "val": val}

    return turns


def _stages(settings: Settings, folder: Path) -> dict[str, Turn]:
    """Every picture, as far as a stage: each turn does what the one before it does, and more."""
    import io

    from PIL import Image

    from tangent_arithmetic.data.files import class_pictures
    from tangent_arithmetic.data.pictures import to_rgb

    encoder = _encoder(settings)
    paths = [path for path, _ in class_pictures(folder / "photos").samples]
    transforms = {"train": encoder.train_preprocess, "val": encoder.val_preprocess}
    del encoder

    def decode(path: str) -> Image.Image:
        return to_rgb(Image.open(io.BytesIO(Path(path).read_bytes())), path)

    def resize(path: str, steps: Sequence[Any]) -> Image.Image:
        image = decode(path)
        for step in steps:
            image = step(image)
        return image

    def over(work: Callable[[str], object]) -> Turn:
        def turn() -> None:
            for path in paths:
                work(path)

        return turn

    turns = {"read": over(lambda path: Path(path).read_bytes()), "decode": over(decode)}
    for name, transform in transforms.items():
        steps = transform.transforms
        geometry = [step for step in steps if "Crop" in repr(step) or "Resize" in repr(step)]
        turns[f"{name}, resize"] = over(functools.partial(resize, steps=geometry))
        turns[f"{name}, all"] = over(functools.partial(resize, steps=steps))
    return turns


@dataclass(frozen=True)
class Comparison:
    """The variants of a subcommand, and which ratios say what.

    Attributes:
        variants: name -> what builds its turns.
        ratios: name of a figure -> (measure, variant, variant that it is divided by).
    """

    variants: Mapping[str, Callable[[Settings, Path], dict[str, Turn]]]
    ratios: Mapping[str, tuple[str, str, str]]


COMPARISONS = {
    "step": Comparison(
        {
            "standard": _passes(_encoder),
            "linear": _passes(_linearized),
            "plain": _passes(_plain),
        },
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
            "linear, one evaluation": _sweeps(1, linear=True, calls=True),
            "linear, sweep": _sweeps(SWEEP_POINTS, linear=True, calls=False),
            "standard, one by one": _sweeps(SWEEP_POINTS, linear=False, calls=True),
            "standard, sweep": _sweeps(SWEEP_POINTS, linear=False, calls=False),
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
            "import torch": _commands("-c", "import torch"),
            "import tangent_arithmetic.tangent.linearized": _commands(
                "-c", "import tangent_arithmetic.tangent.linearized"
            ),
            "finetune.py --help": _commands("src/finetune.py", "--help"),
        },
        {
            "import tangent_arithmetic.tangent.linearized / import torch": (
                "time",
                "import tangent_arithmetic.tangent.linearized",
                "import torch",
            ),
            "finetune.py --help / import torch": ("time", "finetune.py --help", "import torch"),
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
    """Most memory held so far: of the device if it has its own, else of this process."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with what the parent held
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def _serve(pipe: Connection, subject: str, variant: str, settings: Settings, folder: Path) -> None:
    """Does turns on request and sends what they took."""
    turns = COMPARISONS[subject].variants[variant](settings, folder)
    pipe.send(list(turns))
    while (name := pipe.recv()) is not None:
        if name == "memory":
            pipe.send(_peak_bytes(settings.device))
            continue
        _wait(settings.device)
        start = time.perf_counter()
        turns[name]()
        _wait(settings.device)
        pipe.send(time.perf_counter() - start)


def measure(
    subject: str, variants: list[str], settings: Settings, rounds: int, folder: Path
) -> dict[str, dict[str, list[float]]]:
    """The figures of each round: variant -> measure -> one value a round.

    Args:
        subject: step, sweep, startup or data.
        variants: which of its variants.
        settings: on what.
        rounds: how often each variant has its turn, after one that is not counted.
        folder: for files.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    found: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
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
            measures[name] = pipes[name].recv()  # one builds at a time
        for what in dict.fromkeys(itertools.chain(*measures.values())):
            having = [name for name in variants if what in measures[name]]
            for turn in range(rounds + 1):
                first = turn % len(having)
                for name in having[first:] + having[:first]:
                    pipes[name].send(what)
                    seconds = pipes[name].recv()
                    if turn > 0:
                        found[name].setdefault(what, []).append(seconds)
                    label = f"round {turn} of {rounds}" if turn else "not counted"
                    print(f"{name}, {what}, {label}: {seconds:.2f} s", file=sys.stderr, flush=True)
            for name in variants if what == "step" else ():
                pipes[name].send("memory")
                found[name]["memory"] = [pipes[name].recv() / 2**30]
    finally:
        for pipe in pipes.values():
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()
    return found


def _picture(generator: np.random.Generator, size: tuple[int, int]) -> Any:
    """Blots of colour under a little noise: as hard to decode as a photograph of this size."""
    from PIL import Image

    coarse = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    noise = generator.integers(-8, 9, picture.shape)
    return Image.fromarray(np.clip(picture.astype(np.int16) + noise, 0, 255).astype(np.uint8))


def write_photos(folder: Path) -> None:
    """JPEG pictures of photographs' size, in ten class folders."""
    generator = np.random.default_rng(0)
    for i in range(NUM_PHOTOS):
        path = folder / f"class_{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        _picture(generator, PHOTO_SIZE).save(path, quality=90)


def write_pictures(folder: Path) -> None:
    """PNG pictures of photographs' size, in the layout of EuroSAT."""
    from tangent_arithmetic.data.clip8.eurosat import PHRASES

    generator = np.random.default_rng(0)
    for split, count in (("train", len(PHRASES)), ("val", len(PHRASES)), ("test", NUM_PICTURES)):
        for i in range(count):
            path = folder / "EuroSAT_splits" / split / sorted(PHRASES)[i % len(PHRASES)]
            path.mkdir(parents=True, exist_ok=True)
            _picture(generator, PICTURE_SIZE).save(path / f"{i}.png")


# --- the report


def summarize(
    found: Mapping[str, Mapping[str, list[float]]], ratios: Mapping[str, tuple[str, str, str]]
) -> dict[str, Any]:
    """Medians of each measure, and of the ratios within rounds."""
    medians = {
        name: {what: median(values) for what, values in figures.items()}
        for name, figures in found.items()
    }
    summary: dict[str, Any] = {"medians": medians, "ratios": {}}
    for name, (what, above, below) in ratios.items():
        if above in found and below in found and what in found[above]:
            quotients = [a / b for a, b in zip(found[above][what], found[below][what], strict=True)]
            summary["ratios"][name] = {
                "median": median(quotients),
                "least": min(quotients),
                "most": max(quotients),
                "pairs": len(quotients),
            }
    return summary


def loading(medians: Mapping[str, Mapping[str, float]], count: int) -> dict[str, Any]:
    """What the times of `count` pictures say of loading.

    Args:
        medians: seconds of each variant and measure of the subject data.
        count: pictures.

    Returns:
        "images_per_second" by variant; "milliseconds" of each stage of a picture, by transform;
        and "bound", the longest stage of each.
    """
    rates = {
        name: {what: round(count / seconds, 1) for what, seconds in figures.items()}
        for name, figures in medians.items()
        if name != "stages"
    }
    found: dict[str, Any] = {"images_per_second": rates}
    if "stages" in medians:
        upto = medians["stages"]
        stages = {}
        for kind in ("train", "val"):
            ends = [
                0.0,
                upto["read"],
                upto["decode"],
                upto[f"{kind}, resize"],
                upto[f"{kind}, all"],
            ]
            spent = [round(1000 * (b - a) / count, 3) for a, b in itertools.pairwise(ends)]
            stages[kind] = dict(zip(("read", "decode", "resize", "rest"), spent, strict=True))
        found["milliseconds"] = stages
        found["bound"] = {
            kind: max(spent, key=lambda s: spent[s]) for kind, spent in stages.items()
        }
    return found


def loading_table(facts: Mapping[str, Any]) -> str:
    """The figures of `loading` as Markdown, and what bounds each transform."""
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
            f"\n\n{kind}: {total:.2f} ms a picture on one core ({parts}); "
            f"bound by {longest}, {100 * spent[longest] / total:.0f} % of it"
        )
    return text


def table(summary: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    from tangent_arithmetic.run.results import markdown_table

    units = {"memory": "GiB"}
    rows = [
        [name, what, f"{value:.2f} {units.get(what, 's')}"]
        for name, figures in summary["medians"].items()
        for what, value in figures.items()
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
    """The processor's name as the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=sorted(COMPARISONS))
    parser.add_argument("--model", default="ViT-B-32", help="an architecture of open_clip")
    parser.add_argument("--batch-size", type=number(int, 1), default=32, help="images a batch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument(
        "--rounds", type=number(int, 1), default=5, help="paired turns of each variant"
    )
    parser.add_argument("--variants", help="comma list (default: all of the subject's)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    comparison = COMPARISONS[options.subject]
    variants: list[str] = (
        options.variants.split(",") if options.variants else list(comparison.variants)
    )
    if unknown := set(variants) - comparison.variants.keys():
        parser.error(
            f"unknown variants {sorted(unknown)}; choose from {', '.join(comparison.variants)}"
        )
    if len(set(variants)) < len(variants):
        parser.error(f"a variant is named twice in --variants={options.variants}")
    settings = Settings(
        f"{options.model}__init__", options.batch_size, options.device, options.precision
    )
    from tangent_arithmetic.run.results import git_commit, versions

    with tempfile.TemporaryDirectory() as name:
        if options.subject == "sweep":
            write_pictures(Path(name) / "data")
        if options.subject == "data":
            write_photos(Path(name) / "photos")
        found = measure(options.subject, variants, settings, options.rounds, Path(name))
    summary = summarize(found, comparison.ratios)
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
        "rounds_in_full": found,
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
