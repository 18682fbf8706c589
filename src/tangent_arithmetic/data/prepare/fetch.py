"""Published files: found where the user put them or downloaded, and verified by checksum."""

from __future__ import annotations

import hashlib
import http.client
import logging
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path

from tangent_arithmetic.data.prepare.facts import Archive, OfficialSet
from tangent_arithmetic.runtime.atomic import disk_errors
from tangent_arithmetic.runtime.errors import MissingFileError, UnwritableError, UsageError, shown
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage.reading import readable

logger = logging.getLogger(__name__)

CHUNK = 1 << 20  # bytes
TIMEOUT = 30.0  # seconds without data
TRIES = 3  # per URL, if the connection breaks
BROKEN = (urllib.error.URLError, http.client.HTTPException, OSError, ValueError)


@dataclass(frozen=True)
class Place:
    """A data set and its place below the data root.

    Attributes:
        name: the data set.
        public: the published facts about it.
        root: the data root.
    """

    name: str
    public: OfficialSet
    root: Path

    @property
    def folder(self) -> Path:
        """The data set's folder."""
        return self.root / self.public.folder

    @property
    def downloads(self) -> Path:
        """The folder of archives."""
        return self.root / "downloads"

    def find(self, *names: str) -> Path | None:
        """The first file or folder with one of these names that exists locally."""
        folders = (self.downloads, self.folder, self.root)
        paths = (folder / name for name in names for folder in folders)
        return next((path for path in paths if path.exists()), None)

    def archive(self, name: str) -> Path:
        """The path of a published file, which is downloaded if necessary.

        Raises:
            MissingFileError: if it does not exist and cannot be downloaded.
            UsageError: if the file is not the published one, or the disk is full.
        """
        archive = self.public.archive(name)
        if (path := self.find(name)) is not None:
            check_sum(path, archive)
            return path
        reasons = []
        for url in archive.urls:
            logger.info("%s: downloading %s", self.name, url)
            try:
                return download(url, archive, self.downloads)
            except UnwritableError:
                raise  # another URL would not help
            except (*BROKEN, UsageError) as error:
                reasons.append(f"{url}: {shown(error)}")
        raise MissingFileError(self.instructions(name, reasons))

    def instructions(self, name: str, reasons: list[str]) -> str:
        """How the user can provide a file that cannot be downloaded."""
        tried = f" It could not be downloaded ({'; '.join(reasons)})." if reasons else ""
        hint = f"{self.public.by_hand}. " if self.public.by_hand else ""
        return (
            f"data set {self.name}: {name} is missing.{tried} {hint}Official page: "
            f"{self.public.page}. Put the file into {self.downloads} and run again."
        )


def check_sum(path: Path, archive: Archive) -> None:
    """Compares a file with its published checksum.

    Raises:
        UsageError: if they differ.
    """
    if archive.checksum is None:
        return
    digest = hashlib.md5(usedforsecurity=False) if len(archive.checksum) == 32 else hashlib.sha256()
    chunks = -(-path.stat().st_size // CHUNK)
    with readable(path, f"the published {archive.name}"), path.open("rb") as file:
        parts = iter(partial(file.read, CHUNK), b"")
        for chunk in progress(parts, f"checksum of {path.name}, MiB", chunks):
            digest.update(chunk)
    if digest.hexdigest() != archive.checksum:
        raise UsageError(
            f"{path} is not the published {archive.name}: expected checksum {archive.checksum}, "
            f"got {digest.hexdigest()}. It is incomplete or another version; delete it and run "
            "again to download it."
        )


def download(url: str, archive: Archive, folder: Path) -> Path:
    """Downloads a published file, resuming a previous download.

    torchvision's own downloads always restart from zero, which matters at 37 GB.

    Raises:
        OSError: if the server cannot be reached, lacks the file or breaks the connection each time.
        UnwritableError: if the disk is full.
        UsageError: if the result is not the published file.
    """
    path, part = folder / archive.name, folder / f"{archive.name}.part"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(TRIES):
        try:
            _continue(url, part)
            break
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            if attempt == TRIES - 1:
                size = part.stat().st_size if part.exists() else 0
                raise OSError(
                    f"the connection broke {TRIES} times ({error}); {size:,} bytes are kept, and "
                    "the next run resumes from there"
                ) from error
    try:
        check_sum(part, archive)
    except UsageError:
        part.unlink()
        raise
    part.replace(path)
    return path


def _continue(url: str, part: Path) -> None:
    """Downloads the rest of `part`.

    Raises:
        OSError: if the server cannot be reached or refuses.
        http.client.HTTPException: if the connection ends early.
    """
    done = part.stat().st_size if part.exists() else 0
    resume = {"Range": f"bytes={done}-"} if done else {}
    headers = {"User-Agent": "tangent-arithmetic", **resume}
    request = urllib.request.Request(url, headers=headers)
    try:
        reply = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # already complete; the checksum decides
        raise
    append = reply.status == HTTPStatus.PARTIAL_CONTENT
    with reply, disk_errors(part), part.open("ab" if append else "wb") as file:
        length = reply.headers.get("Content-Length")
        before, expected = file.tell(), None if length is None else int(length)
        chunks = None if expected is None else -(-expected // CHUNK)
        parts = iter(partial(reply.read, CHUNK), b"")
        for chunk in progress(parts, f"{part.stem}, MiB", chunks):
            file.write(chunk)
        got = file.tell() - before
        if expected is not None and got < expected:
            raise http.client.IncompleteRead(b"", expected - got)
