"""The paths of the study's files, and their readers.

Data sets are `artificial_datasets[_PRESET][_SEED]/dataset1_train.csv` and so on; checkpoints
`artificial_checkpoints[_PRESET][_SEED]/mlp_model` (the base model), `mlp_model_dataset2`,
`linear_mlp_model_dataset2`, and their heads with `_head` at the end.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tangent_arithmetic.artificial_data.presets import BASE, MODES, Preset, get_preset
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.runtime.digests import file_hash
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, unknown
from tangent_arithmetic.storage.reading import readable
from tangent_arithmetic.storage.states import check_settings

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "val", "test")
VAL_SHARE = 0.1  # of a training file, stratified: for choosing coefficients
Data = tuple[Tensor, Tensor]  # x (rows, features) float32; y (rows) int64


@dataclass(frozen=True)
class Workspace:
    """The files of one preset and one seed, below a root.

    Attributes:
        root: parent of the two folders; the current folder by default.
        name: the preset's name.
        seed: seed of data, initialisation and order of batches.
    """

    root: Path = Path()
    name: str = "default"
    seed: int = 0

    @property
    def preset(self) -> Preset:
        """The preset, with the data of the seed."""
        return get_preset(self.name, self.seed)

    def _folder(self, stem: str) -> Path:
        parts = [stem]
        if self.name != "default":
            parts.append(self.name)
        if self.seed:
            parts.append(str(self.seed))
        return self.root / "_".join(parts)

    def csv(self, dataset: str, split: str) -> Path:
        """The file of a data set's "train" or "test" rows."""
        return self._folder("artificial_datasets") / f"{dataset}_{split}.csv"

    def backbone(self, dataset: str = BASE, mode: str = "standard") -> Path:
        """The file of the base model's backbone, or of one fine-tuned on a data set."""
        return self._checkpoint(dataset, mode, "")

    def head(self, dataset: str = BASE, mode: str = "standard") -> Path:
        """The file of the head trained along with that backbone, or probed for it."""
        return self._checkpoint(dataset, mode, "_head")

    def _checkpoint(self, dataset: str, mode: str, suffix: str) -> Path:
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        prefix = "" if mode == "standard" or dataset == BASE else f"{mode}_"
        task = "" if dataset == BASE else f"_{dataset}"
        name = f"{prefix}mlp_model{task}{suffix}.safetensors"
        return self._folder("artificial_checkpoints") / name

    def command(self, step: str, *flags: str) -> str:
        """The command that makes a file, for messages."""
        words = [f"python -m tangent_arithmetic.artificial_data.{step}", *flags]
        if self.name != "default":
            words.append(f"--preset={self.name}")
        if self.seed:
            words.append(f"--seed={self.seed}")
        if self.root != Path():
            words.append(f"--root={self.root}")
        return " ".join(words)

    def data(self, dataset: str, split: str, device: torch.device | str = "cpu") -> Data:
        """The rows of a split: x, shape (rows, features), float32, and y, shape (rows), int64.

        "train" and "val" are parts of the training file; "val" is a stratified tenth.

        Raises:
            MissingFileError: if the file is not there.
            UsageError: if it is not of the format, or the split does not exist.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        path = self.csv(dataset, "test" if split == "test" else "train")
        if not path.is_file():
            made_by = self.command("generate", f"--dataset={dataset}")
            raise MissingFileError(f"no data set at {path}. Make it with: {made_by}")
        x, y = _read_csv(path.absolute(), path.stat().st_mtime_ns)
        if split != "test":
            rows = _parts(path, y)[split == "val"]
            x, y = x[rows], y[rows]
        return x.to(device), y.to(device)

    def data_hash(self, dataset: str) -> str:
        """SHA-256 of the training file."""
        path = self.csv(dataset, "train")
        self.data(dataset, "train")  # says what is missing
        return file_hash(path)


@functools.lru_cache(maxsize=8)  # (path, time of the last change) -> content
def _read_csv(path: Path, stamp: int) -> Data:
    import pandas as pd

    with readable(path, "a CSV file; delete it and make it again"):
        table: pd.DataFrame = pd.read_csv(io.BytesIO(path.read_bytes()))
    wanted = [*map(str, range(len(table.columns) - 1)), "target"]
    if list(table.columns) != wanted or not len(table):
        raise UsageError(
            f'{path}: expected rows of the columns "0", "1", ... and "target", got {len(table)} '
            f"rows of {', '.join(map(str, table.columns[:3]))}, ..., {table.columns[-1]}"
        )
    values = table.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    y = values[:, -1]
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1) | (y % 1 != 0) | (y < 0))
    if len(bad):
        raise UsageError(
            f"{path}, row {bad[0] + 1}: expected finite numbers and a class 0, 1, ... as target"
        )
    return torch.tensor(values[:, :-1], dtype=torch.float32), torch.tensor(y).long()


def _parts(path: Path, y: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the rows to train on, and of those to choose coefficients on."""
    from sklearn.model_selection import train_test_split

    try:
        train, val = train_test_split(
            np.arange(len(y)), test_size=VAL_SHARE, stratify=y.numpy(), random_state=0
        )
    except ValueError as error:
        raise UsageError(f"{path} cannot be split into parts ({error})") from error
    return torch.from_numpy(train), torch.from_numpy(val)


def is_done(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether a checkpoint exists and was made with the wanted settings.

    Raises:
        UsageError: if it was made with others; it is not overwritten.
    """
    if not path.is_file():
        return False
    made = read_facts(path)["info"].get("made")
    check_settings(path, made if isinstance(made, dict) else {}, wanted, "--root")
    return True
