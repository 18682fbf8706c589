"""Pre-trains ViT-Nano-8, the embedded suite's CLIP, from scratch on the embedded pool.

    python scripts/pretrain_embedded.py --compile --out=FOLDER

Draws the pool (seeded), builds the tokenizer (the subset of open_clip's merges that the captions
need), trains with the contrastive loss, and writes the weights in half precision with their
provenance. Needs the extra `pretrain` (`pip install -e ".[pretrain]"`: Twemoji's images). Takes
about 70 minutes on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors.torch import save_file
from tqdm import tqdm

from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.data.embedded.base import ASSETS
from tangent_arithmetic.data.embedded.pool import draw_pair
from tangent_arithmetic.data.suites import get_suite
from tangent_arithmetic.run.args import LARGEST_SEED, Parser
from tangent_arithmetic.run.provenance import git_commit
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.ranges import number

MEAN, STD = 0.5, 0.25
CONTEXT = 20
MODEL: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 192, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": CONTEXT, "width": 128, "heads": 4, "layers": 2},
}


def draw_chunk(seed: int, span: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """Pairs span[0] to span[1] - 1 of the pool."""
    pairs = [draw_pair(seed, i) for i in range(*span)]
    return np.stack([image for image, _ in pairs]), [caption for _, caption in pairs]


def draw_pool(seed: int, count: int) -> tuple[np.ndarray, list[str]]:
    """The pool's images, uint8 (count, 32, 32, 3), and captions, drawn on all cores."""
    spans = [(i, min(i + 1000, count)) for i in range(0, count, 1000)]
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        drawn = workers.map(partial(draw_chunk, seed), spans)
        chunks = list(tqdm(drawn, total=len(spans), desc="drawing the pool", unit="k"))
    return np.concatenate([c[0] for c in chunks]), [text for c in chunks for text in c[1]]


def write_merges(texts: list[str], path: Path) -> None:
    """Writes the merges of open_clip's tokenizer that these texts need, in their order."""
    stock = SimpleTokenizer()
    used: set[tuple[str, str]] = set()
    words = {
        "".join(stock.byte_encoder[b] for b in word.encode())
        for text in set(texts)
        for word in stock.pat.findall(stock.clean_fn(text))
    }
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = set(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: stock.bpe_ranks.get(pair, 1e9))
            if best not in stock.bpe_ranks:
                break
            used.add(best)
            merged, i = [], 0
            while i < len(parts):
                if i + 1 < len(parts) and (parts[i], parts[i + 1]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
    lines = [" ".join(pair) for pair in sorted(used, key=stock.bpe_ranks.__getitem__)]
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
        file.write("\n".join([f"# merges of {default_bpe_name()}", *lines]).encode())


def default_bpe_name() -> str:
    """The file name of open_clip's merges."""
    return Path(default_bpe()).name


def pixels_to_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 (n, 32, 32, 3) -> normalised float32 (n, 3, 32, 32)."""
    return (images.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


@cache
def validation(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a validation split."""
    return EMBEDDED_SETS[name].build("val")


@torch.no_grad()
def zero_shot(model: open_clip.model.CLIP, tokenizer: SimpleTokenizer) -> dict[str, float]:
    """Zero-shot accuracy on every validation split, to monitor training."""
    model.eval()
    accuracies = {}
    for name, embedded in EMBEDDED_SETS.items():
        images, labels = validation(name)
        texts = [prompt(c) for c in embedded.classnames for prompt in embedded.prompts]
        weights = model.encode_text(tokenizer(texts), normalize=True)
        weights = weights.view(len(embedded.classnames), len(embedded.templates), -1).mean(1)
        features = model.encode_image(pixels_to_input(torch.from_numpy(images)))
        guess = (features @ torch.nn.functional.normalize(weights, dim=-1).T).argmax(1)
        accuracies[name] = round((guess.numpy() == labels).mean().item(), 3)
    model.train()
    tasks = [accuracies[name] for name in get_suite("embedded").tasks]
    return {**accuracies, "mean of tasks": round(float(np.mean(tasks)), 4)}


def write_weights(model: torch.nn.Module, out: Path) -> None:
    """Writes the weights in half precision."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, str(out / "ViT-Nano-8.safetensors"), metadata={"format": "pt"})


def train(
    args: argparse.Namespace, images: np.ndarray, captions: list[str], tokenizer: SimpleTokenizer
) -> tuple[open_clip.model.CLIP, list[dict[str, object]]]:
    """Contrastive training; returns the model and a log of losses and validation accuracies."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng((args.seed, 8))
    model = open_clip.model.CLIP(
        embed_dim=MODEL["embed_dim"],
        vision_cfg=MODEL["vision_cfg"],
        text_cfg={**MODEL["text_cfg"], "vocab_size": tokenizer.vocab_size},
    )
    compute = torch.compile(model) if args.compile else model
    pixels, tokens = torch.from_numpy(images), tokenizer(captions)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6)
    warmup = min(200, args.steps // 10 + 1)
    loss_of, log, order, start = open_clip.ClipLoss(), [], np.empty(0, int), time.time()
    bar = tqdm(range(args.steps), desc="pre-training", unit="step", mininterval=5)
    for step in bar:
        if len(order) < args.batch_size:
            order = np.concatenate([order, rng.permutation(len(pixels))])
        batch, order = order[: args.batch_size], order[args.batch_size :]
        progress = (step - warmup) / max(args.steps - warmup, 1)
        rate = (step + 1) / warmup if step < warmup else 0.5 * (1 + np.cos(np.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        shift = rng.integers(-2, 3, 2).tolist()
        x = torch.roll(pixels_to_input(pixels[batch]), shifts=shift, dims=(2, 3))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            image_features, text_features, scale = compute(x, tokens[batch])
        loss = loss_of(image_features.float(), text_features.float(), scale.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            entry = {"step": step + 1, "loss": round(loss.item(), 4), **zero_shot(model, tokenizer)}
            entry["seconds"] = round(time.time() - start, 1)
            log.append(entry)
            tqdm.write(json.dumps(entry))
            write_weights(model, args.out)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval(), log


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Draws the pool, trains the model and writes all its files."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ASSETS, help="folder to write to")
    add("--pairs", type=number(int, 1), default=300_000, help="images in the pool")
    add("--steps", type=number(int, 1), default=14_000)
    add("--batch-size", type=number(int, 1, 2**20), default=128)
    add("--lr", type=number(float, 0, 1e3), default=1e-3)
    add("--seed", type=number(int, 0, LARGEST_SEED), default=0)
    bf16 = "bfloat16 autocast: faster on CPUs with AVX512-BF16 or AMX, 20 times slower without"
    add("--bf16", action="store_true", help=bf16)
    add("--compile", action="store_true", help="torch.compile: 20 %% faster, needs a C++ compiler")
    add("--log-every", type=number(int, 1), default=700)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    start, commit = time.time(), git_commit()
    images, captions = draw_pool(args.seed, args.pairs)
    prompts = [p(c) for s in EMBEDDED_SETS.values() for c in s.classnames for p in s.prompts]
    merges = args.out / "ViT-Nano-8_merges.txt.gz"
    write_merges([*captions, *prompts], merges)
    tokenizer = SimpleTokenizer(bpe_path=str(merges), context_length=CONTEXT)
    text_cfg = {**MODEL["text_cfg"], "vocab_size": tokenizer.vocab_size}
    config = {**MODEL, "text_cfg": text_cfg}
    (args.out / "ViT-Nano-8.json").write_text(json.dumps(config, indent=2) + "\n")
    model, log = train(args, images, captions, tokenizer)
    provenance = {
        "arguments": {k: v for k, v in vars(args).items() if k != "out"},
        "commit": commit,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "distinct_captions": len(set(captions)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - start, 1),
        "log": log,
    }
    (args.out / "ViT-Nano-8_provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print(f"wrote {args.out / 'ViT-Nano-8.safetensors'} after {provenance['seconds']} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
