"""Makes the artificial data sets as CSV files.

    python -m src.artificial_data.generate                                   # those of a preset
    python -m src.artificial_data.generate --dataset=dataset9 --n-samples=4000 --n-classes=5

A file has the columns "0", "1", ... and "target"; 80 % of the rows are `<dataset>_train.csv`, 20 %
`<dataset>_test.csv`, with the same shares of the classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from tangent_arithmetic.artificial_data import flags
from tangent_arithmetic.artificial_data.presets import DatasetSpec
from tangent_arithmetic.artificial_data.workspace import Workspace
from tangent_arithmetic.runtime.atomic import atomic, write_json
from tangent_arithmetic.runtime.errors import UsageError, entry_point
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.storage.reading import read_json
from tangent_arithmetic.storage.states import check_settings

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)
TEST_SHARE = 0.2


def generate(spec: DatasetSpec) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The training and the test rows of a data set, columns "0", "1", ... and "target".

    Args:
        spec: arguments of `make_classification`; its `random_state` also splits the rows.

    Raises:
        UsageError: if the numbers contradict one another.
    """
    import pandas as pd
    from sklearn.datasets import make_classification
    from sklearn.model_selection import train_test_split

    try:
        x, y = make_classification(**asdict(spec))
        table = pd.DataFrame(x, columns=[str(i) for i in range(spec.n_features)])
        table["target"] = y
        train, test = train_test_split(
            table, test_size=TEST_SHARE, stratify=y, random_state=spec.random_state
        )
    except ValueError as error:  # from scikit-learn, naming what contradicts
        raise UsageError(f"no data set can be made of {spec}: {error}") from error
    return train, test


def write_dataset(workspace: Workspace, name: str, spec: DatasetSpec) -> bool:
    """Generates and writes a data set, unless its files exist.

    The numbers that it was made with are kept beside the files, in `<name>.json`.

    Returns:
        Whether it was written.

    Raises:
        UsageError: if the files exist and were made with other numbers.
    """
    paths = [workspace.csv(name, split) for split in ("train", "test")]
    facts = paths[0].with_name(f"{name}.json")
    if all(path.is_file() for path in paths):
        if facts.is_file():
            check_settings(paths[0], read_json(facts), asdict(spec), "--root")
        return False
    for path, table in zip(paths, generate(spec), strict=True):
        with atomic(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.8g")
    write_json(facts, asdict(spec))
    shape = f"{spec.n_samples} rows of {spec.n_features} features, {spec.n_classes} classes"
    logger.info("%s: %s, in %s", name, shape, paths[0].parent)
    return True


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = flags.make_parser(__doc__)
    flags.add_seed(parser)
    parser.add_argument("--dataset", help="a name (default: all of the preset)")
    flags.add_fields(parser, DatasetSpec, "make_classification")
    args = parser.parse_args(argv)
    setup_logging()
    workspace, changed = flags.workspace_of(args), flags.given(args, DatasetSpec)
    known = workspace.preset.datasets
    if args.dataset is None and changed:
        raise UsageError(f"--dataset=NAME: which one has {changed}?")
    if args.dataset is not None and args.dataset not in known and not changed:
        workspace.preset.spec(args.dataset)
    wanted = known
    if args.dataset is not None:
        template = known.get(args.dataset, next(iter(known.values())))
        wanted = {args.dataset: replace(template, **changed)}
    for name, spec in wanted.items():
        if not write_dataset(workspace, name, spec):
            logger.info("%s exists", name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
