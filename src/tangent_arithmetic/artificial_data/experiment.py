"""The whole study by one command: data, base model, fine-tuning, edits, tables, figures.

    python -m src.artificial_data.experiment              # three seeds, 17 minutes on 2 CPU cores
    python -m src.artificial_data.experiment --quick      # one seed of a smaller study
    python -m src.artificial_data.experiment --preset=readme --seeds=1      # the public README's

Results go to `results/artificial_data/` (of another preset, to a folder of its name in it). Data
and models are kept in `artificial_datasets*` and `artificial_checkpoints*` for later runs.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tangent_arithmetic.arithmetic.task_vectors import OPERATIONS, TaskVector
from tangent_arithmetic.artificial_data import flags
from tangent_arithmetic.artificial_data.edits import Edits
from tangent_arithmetic.artificial_data.evaluation import accuracy, features, finite, get_head
from tangent_arithmetic.artificial_data.finetune import Freeze, finetune
from tangent_arithmetic.artificial_data.generate import write_dataset
from tangent_arithmetic.artificial_data.presets import BASE, LINEAR, MODES
from tangent_arithmetic.artificial_data.train import train
from tangent_arithmetic.artificial_data.workspace import SPLITS, Data, Workspace
from tangent_arithmetic.encoders.mlp import BackBone, Head
from tangent_arithmetic.runtime.atomic import check_writable
from tangent_arithmetic.runtime.compute import find_device
from tangent_arithmetic.runtime.errors import UsageError, entry_point
from tangent_arithmetic.runtime.logs import progress, setup_logging
from tangent_arithmetic.runtime.private import expanded

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor, nn

logger = logging.getLogger(__name__)
Row = tuple[Any, ...]
COLUMNS = {  # of each table, after the seed
    "training": ("model", "dataset", "split", "accuracy", "chance"),
    "operations": ("start", "dataset", "operation", "coefficient", "accuracy", "finite"),
    "sums": ("mode", "tasks", "coefficient", "dataset", "split", "accuracy"),
    "negations": ("mode", "negated", "coefficient", "dataset", "split", "accuracy"),
    "interpolations": ("mode", "first", "second", "alpha", "dataset", "accuracy"),
}
TABLES = tuple(COLUMNS)
EDITED = ("standard", "posthoc", *LINEAR)  # modes of edited models
STEPS = [round(0.1 * i, 1) for i in range(10)]  # the public README's coefficients of an operation
GRID = [round(0.05 * i, 2) for i in range(21)]  # coefficients of sums and negations
ALPHAS = [round(0.1 * i, 1) for i in range(11)]


def prepare(workspace: Workspace, device: torch.device | str = "cpu") -> None:
    """Makes data, base model and fine-tuned models, unless they exist."""
    preset = workspace.preset
    for name, spec in preset.datasets.items():
        write_dataset(workspace, name, spec)
    train(workspace, device=device)
    for task in preset.tasks:
        if preset.probe is not None:
            finetune(workspace, task, preset.probe, freeze="backbone", device=device)
        freeze: Freeze = "none" if preset.probe is None else "head"
        for mode in MODES:
            from_base: Freeze = "none" if mode == "scratch" else freeze
            finetune(workspace, task, preset.recipe(mode), mode, from_base, device)


class Study:
    """One seed's models and their measurements; the columns of each table are in `COLUMNS`.

    Args:
        workspace: its files, see `prepare`.
        device: where to compute.
    """

    def __init__(self, workspace: Workspace, device: torch.device | str = "cpu") -> None:
        self.workspace = workspace
        self.device = device
        self.tasks = workspace.preset.tasks
        self.probed = workspace.preset.probe is not None
        self.base = self._backbone(BASE, "standard")
        self.data: Callable[[str, str], Data] = functools.cache(self._data)
        self.head: Callable[[str, str], Head] = functools.cache(self._head)
        self.edits: Callable[[str], Edits] = functools.cache(self._edits)

    def _backbone(self, dataset: str, mode: str) -> BackBone:
        path = self.workspace.backbone(dataset, mode)
        return BackBone.load(path).to(self.device).requires_grad_(False)

    def _data(self, dataset: str, split: str) -> Data:
        return self.workspace.data(dataset, split, self.device)

    def _head(self, dataset: str, mode: str) -> Head:
        """The head of a data set under models of a mode."""
        own = dataset != BASE and (mode == "scratch" or (mode in LINEAR and not self.probed))
        head = get_head(dataset, self.workspace, mode if own else "standard")
        return head.to(self.device).requires_grad_(False)

    def _edits(self, mode: str) -> Edits:
        """The models around the base model in a mode."""
        trained = mode if mode in LINEAR else "standard"
        vectors = {
            task: TaskVector(self.base, self._backbone(task, trained)) for task in self.tasks
        }
        return Edits(
            self.base, vectors, mode != "standard", lambda name: self.head(name, mode), self.data
        )

    def _logits(self, backbone: nn.Module, mode: str, dataset: str, split: str) -> Tensor:
        x, _ = self.data(dataset, split)
        logits: Tensor = self.head(dataset, mode)(features(backbone, x))
        return logits

    def _rows(self, model: str, accuracies: Mapping[tuple[str, str], float]) -> Iterator[Row]:
        for (dataset, split), value in accuracies.items():
            chance = 1 / self.workspace.preset.spec(dataset).n_classes
            yield model, dataset, split, value, chance

    def training(self) -> Iterator[Row]:
        """Accuracy of the base model, and on each task before and after fine-tuning."""
        standard = self.edits("standard")
        yield from self._rows("base", standard.accuracies({}, [BASE], SPLITS))
        for task in self.tasks:
            yield from self._rows("pre-trained", standard.accuracies({}, [task], SPLITS))
            for mode in EDITED:
                edited = self.edits(mode).accuracies({task: 1.0}, [task], SPLITS)
                yield from self._rows(mode, edited)
            scratch, found = self._backbone(task, "scratch"), {}
            for split in SPLITS:
                logits = self._logits(scratch, "scratch", task, split)
                found[task, split] = accuracy(logits, self.data(task, split)[1])
            yield from self._rows("scratch", found)

    def operations(self) -> Iterator[Row]:
        """V = theta_ft op theta_0 and theta_0 + lambda v, for four operations, on test.

        Once from models fine-tuned from the base model, once from models trained from scratch.
        """
        starts = {"pre-trained": "standard", "scratch": "scratch"}
        for (start, mode), task, operation in product(starts.items(), self.tasks, OPERATIONS):
            vector = TaskVector(self.base, self._backbone(task, mode), operation=operation)
            for coef in STEPS:
                backbone = vector.apply_to(self.base, coef).requires_grad_(False)
                logits = self._logits(backbone, mode, task, "test")
                share = float(finite(logits).float().mean())
                correct = accuracy(logits, self.data(task, "test")[1])
                yield start, task, operation, coef, correct, share

    def sums(self) -> Iterator[Row]:
        """Sums of all pairs of vectors and of all of them, at each coefficient."""
        groups: list[tuple[str, ...]] = [*combinations(self.tasks, 2)]
        if len(self.tasks) > 2:
            groups.append(tuple(self.tasks))
        for mode, group, coef in product(EDITED, groups, GRID):
            coefs = dict.fromkeys(group, coef)
            accuracies = self.edits(mode).accuracies(coefs, group, ("val", "test"))
            for (dataset, split), value in accuracies.items():
                yield mode, "+".join(group), coef, dataset, split, value

    def negations(self) -> Iterator[Row]:
        """Each vector subtracted, at each coefficient: its task, and the base model's data set."""
        for mode, task, coef in product(EDITED, self.tasks, GRID):
            accuracies = self.edits(mode).accuracies({task: -coef}, [task, BASE], ("val", "test"))
            for (dataset, split), value in accuracies.items():
                yield mode, task, coef, dataset, split, value

    def interpolations(self) -> Iterator[Row]:
        """(1 - alpha) tau_1 + alpha tau_2 for all pairs, on test."""
        for mode, pair, alpha in product(EDITED, combinations(self.tasks, 2), ALPHAS):
            coefs = dict(zip(pair, (1 - alpha, alpha), strict=True))
            for (dataset, _), value in self.edits(mode).accuracies(coefs, pair, ("test",)).items():
                yield mode, *pair, alpha, dataset, value


def run(
    name: str, seeds: int, root: Path, results: Path, device: torch.device | str = "cpu"
) -> dict[str, pd.DataFrame]:
    """Runs a preset for several seeds and writes its results.

    Args:
        name: the preset's name.
        seeds: number of seeds, from 0.
        root: parent of the folders of data and checkpoints.
        results: folder for CSV files, figures and readme.
        device: where to compute.

    Returns:
        The tables, each with a column "seed".
    """
    import pandas as pd

    from tangent_arithmetic.artificial_data.report import write_report

    for file in (*(f"{table}.csv" for table in TABLES), "study.json", "README.md"):
        check_writable(results / file)
    begun = time.monotonic()
    rows: dict[str, list[Row]] = {table: [] for table in TABLES}
    for seed in range(seeds):
        workspace = Workspace(root, name, seed)
        prepare(workspace, device)
        study = Study(workspace, device)
        for table in progress(TABLES, f"seed {seed}: tables"):
            rows[table] += [(seed, *row) for row in getattr(study, table)()]
        logger.info("seed %d is done, %.0f s", seed, time.monotonic() - begun)
    tables = {
        table: pd.DataFrame(found, columns=["seed", *COLUMNS[table]])
        for table, found in rows.items()
    }
    write_report(results, name, tables, time.monotonic() - begun)
    return tables


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = flags.make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed of --preset=quick")
    parser.add_argument("--seeds", type=int, help="how many, from 0 (default: 3; quick: 1)")
    folders = "root of the results' folders (default: results)"
    parser.add_argument("--results", type=Path, default=Path("results"), help=folders)
    parser.set_defaults(preset=None)
    args = parser.parse_args(argv)
    setup_logging()
    if args.quick and args.preset not in (None, "quick"):
        raise UsageError(
            f"--quick is --preset=quick, got --preset={args.preset} too; leave one out"
        )
    name = "quick" if args.quick else args.preset or "default"
    seeds = args.seeds if args.seeds is not None else 1 if name == "quick" else 3
    if seeds < 1:
        raise UsageError(f"--seeds: expected at least 1, got {seeds}")
    folder = expanded(args.results) / "artificial_data"
    folder = folder if name == "default" else folder / name
    run(name, seeds, args.root, folder, find_device(args.device))
    logger.info("results are in %s", folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
