"""Measures merging eight models of ViT-B/32's size, beside fusion-bench and mergekit.

    python scripts/benchmark_merging.py [--method task_arithmetic] [--rounds 5] [--output FILE]
        [--fusion-bench PYTHON]   a Python that has fusion-bench (an environment of its own)
        [--mergekit COMMAND]      the command mergekit-pytorch of an environment of its own

Nine folders of `CLIPVisionModel` (350 MB each, float32, in the page cache) are merged. mergekit and
the whole command are measured with task arithmetic only. Each turn is a process of its own; the
variants take turns, one at a time, and the first turn of each is not counted. "in process" is load
+ merge + save without imports; "command" the whole process. Anonymous memory is what the process
had at most above what it had after its imports.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from tangent_arithmetic.run.args import Parser
from tangent_arithmetic.run.provenance import git_commit, versions
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.ranges import number

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("_pretrained_", *(f"task{i}" for i in range(8)))
FACTOR = 0.3
WATCH = """
import sys, threading, time
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024
class Watch:
    def __enter__(self):
        self.start = self.peak = anonymous()
        self.done = False
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        self.begun = time.perf_counter()
        return self
    def look(self):
        while not self.done:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.005)
    def __exit__(self, *_):
        seconds = time.perf_counter() - self.begun
        self.done = True
        self.thread.join()
        print("RESULT", seconds, self.peak - self.start)
folder, out = sys.argv[1:3]
names = ["_pretrained_", *(f"task{i}" for i in range(8))]
"""
OURS = (
    WATCH
    + """
from tangent_arithmetic.merging import CLIPVisionModelPool, CLASS
with Watch():
    pool = CLIPVisionModelPool({name: f"{folder}/{name}" for name in names})
    CLASS(OPTIONS).run_to(pool, out, fsync=FSYNC)
"""
)
THEIRS = (
    WATCH
    + """
from fusion_bench.method import CLASS
from fusion_bench.modelpool import CLIPVisionModelPool
with Watch():
    pool = CLIPVisionModelPool({name: f"{folder}/{name}" for name in names})
    CLASS(OPTIONS).run(pool).save_pretrained(out)
"""
)
METHODS = {  # class, of the same name in both libraries, and options
    "task_arithmetic": ("TaskArithmeticAlgorithm", f"{FACTOR}"),
    "tsv_m": ("TaskSingularVectorMerging", ""),
    "iso_c": ("ISO_C_Merge", "1.0"),
}
CONFIG = {  # of the vision tower of ViT-B/32
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the vision tower of ViT-B/32, as `transformers` names them."""
    width, inner = 768, 3072
    tensors: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 32, 32),
        "embeddings.position_embedding.weight": (50, width),
    }
    linear = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
    linear |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    layers = [f"encoder.layers.{i}." for i in range(12)]
    for layer in layers:
        for name, shape in linear.items():
            tensors[f"{layer}{name}.weight"] = shape
            tensors[f"{layer}{name}.bias"] = shape[:1]
    norms = [f"{layer}layer_norm{i}" for layer in layers for i in (1, 2)]
    for norm in (*norms, "pre_layrnorm", "post_layernorm"):
        tensors |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return {f"vision_model.{name}": shape for name, shape in tensors.items()}


def write_models(folder: Path) -> None:
    """Writes the nine folders, with random weights."""
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        state = {key: 0.02 * torch.randn(s, generator=generator) for key, s in shapes().items()}
        (folder / name).mkdir()
        save_file(state, str(folder / name / "model.safetensors"), metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))


def inside(python: str, code: str) -> Callable[[Path, Path], dict[str, float]]:
    """A turn that measures itself."""

    def turn(folder: Path, out: Path) -> dict[str, float]:
        command = [python, "-c", code, str(folder), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        _, seconds, megabytes = line.split()
        return {"seconds": float(seconds), "anonymous MB": float(megabytes)}

    return turn


def whole(words: Callable[[Path, Path], list[str]]) -> Callable[[Path, Path], dict[str, float]]:
    """A turn that is a whole command."""

    def turn(folder: Path, out: Path) -> dict[str, float]:
        begun = time.perf_counter()
        subprocess.run(words(folder, out), capture_output=True, check=True, cwd=folder)
        return {"seconds": time.perf_counter() - begun}

    return turn


def our_command(folder: Path, out: Path) -> list[str]:
    """`merge.py` on the nine folders."""
    models = ", ".join(f"{name}: {folder / name}" for name in NAMES)
    words = ["modelpool=CLIPVisionModelPool/_template", f"modelpool.models={{{models}}}"]
    words += [f"method.scaling_factor={FACTOR}", f"merged_model_save_path={out}"]
    script = [sys.executable, str(ROOT / "src" / "merge.py")]
    return [*script, *words, f"path.output_dir={folder / 'outputs'}"]


def mergekit_command(command: str) -> Callable[[Path, Path], list[str]]:
    """`mergekit-pytorch` on the same files."""

    def words(folder: Path, out: Path) -> list[str]:
        file = {name: str(folder / name / "model.safetensors") for name in NAMES}
        config = {
            "merge_method": "task_arithmetic",
            "base_model": file["_pretrained_"],
            "parameters": {"lambda": FACTOR, "normalize": False},
            "models": [{"model": file[n], "parameters": {"weight": 1.0}} for n in NAMES[1:]],
        }
        (folder / "mergekit.yaml").write_text(json.dumps(config))
        return [command, str(folder / "mergekit.yaml"), str(out)]

    return words


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="task_arithmetic")
    parser.add_argument(
        "--rounds", type=number(int, 1), default=5, help="counted turns of each variant"
    )
    parser.add_argument("--fusion-bench", metavar="PYTHON", help="a Python with fusion-bench")
    parser.add_argument("--mergekit", metavar="COMMAND", help="mergekit-pytorch")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    python = sys.executable
    name, given = METHODS[args.method]
    ours, theirs = (
        code.replace("CLASS", name).replace("OPTIONS", given) for code in (OURS, THEIRS)
    )
    variants = {
        "ours, in process, fsync": inside(python, ours.replace("FSYNC", "True")),
        "ours, in process": inside(python, ours.replace("FSYNC", "False")),
    }
    if args.fusion_bench:
        variants["fusion-bench, in process"] = inside(args.fusion_bench, theirs)
    if args.method == "task_arithmetic":
        variants["ours, command, fsync"] = whole(our_command)
        variants["import torch"] = whole(lambda folder, out: [python, "-c", "import torch"])
    if args.mergekit and args.method == "task_arithmetic":
        variants["mergekit, command"] = whole(mergekit_command(args.mergekit))
    turns_of: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        turns = [(i, variant) for i in range(args.rounds + 1) for variant in variants]
        for i, variant in tqdm(turns, disable=not sys.stderr.isatty()):
            measured = variants[variant](folder, folder / "out")
            shutil.rmtree(folder / "out", ignore_errors=True)
            if i:
                turns_of[variant].append(measured)
    medians = {
        variant: {key: round(median(turn[key] for turn in each), 3) for key in each[0]}
        for variant, each in turns_of.items()
    }
    pairs = [
        ("fusion-bench, in process", "ours, in process"),
        ("fusion-bench, in process", "ours, in process, fsync"),
        ("mergekit, command", "ours, command, fsync"),
    ]
    ratios = {
        f"{theirs} / {ours}": sorted(
            round(a["seconds"] / b["seconds"], 2)
            for a, b in zip(turns_of[theirs], turns_of[ours], strict=True)
        )
        for theirs, ours in pairs
        if theirs in turns_of and ours in turns_of
    }
    content: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "method": args.method,
        "rounds": args.rounds,
        "commit": git_commit(),
        "versions": versions(),
        "medians": medians,
        "ratios of each round": ratios,
    }
    print(json.dumps(content, indent=2))
    if args.output:
        args.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
