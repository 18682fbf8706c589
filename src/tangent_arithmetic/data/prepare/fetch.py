"""Published files: found where a person put them, else downloaded, and compared by checksum."""

from __future__ import annotations

import hashlib
import http.client
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from tangent_arithmetic.data.prepare.facts import Archive, OfficialSet
from tangent_arithmetic.runtime.atomic import disk_errors
from tangent_arithmetic.runtime.errors import (
    MissingFileError,
    UnwritableError,
    UsageError,
    shown,
)
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage.reading import readable

logger = logging.getLogger(__name__)

CHUNK = 1 << 20  # bytes
TIMEOUT = 30.0  # seconds without a byte
TRIES = 3  # of an address whose connection breaks
BROKEN = (urllib.error.URLError, http.client.HTTPException, OSError, ValueError)


@dataclass(frozen=True)
class Place:
    """One data set and the folder it is to lie in.

    Attributes:
        name: the data set.
        public: what is published about it.
        root: the data root.
    """

    name: str
    public: OfficialSet
    root: Path

    @property
    def folder(self) -> Path:
        """The data set's own folder."""
        return self.root / self.public.folder

    @property
    def downloads(self) -> Path:
        """Where archives are kept."""
        return self.root / "downloads"

    def find(self, *names: str) -> Path | None:
        """The first file or folder of one of these names that a person put here."""
        folders = (self.downloads, self.folder, self.root)
        paths = (folder / name for name in names for folder in folders)
        return next((path for path in paths if path.exists()), None)

    def archive(self, name: str) -> Path:
        """The path of a published file, which is fetched if it is not here.

        Raises:
            MissingFileError: if it is not here and cannot be downloaded.
            UsageError: if the file is not the published one, or the disk is full.
        """
        archive = self.public.archive(name)
        found = self.find(name)
        if found is not None:
            check_sum(found, archive)
            return found
        reasons = []
        for url in archive.urls:
            logger.info("%s: downloading %s", self.name, url)
            try:
                return download(url, archive, self.downloads)
            except UnwritableError:
                raise  # another address does not help
            except (*BROKEN, UsageError) as error:
                reasons.append(f"{url}: {shown(error)}")
        raise MissingFileError(self.instructions(name, reasons))

    def instructions(self, name: str, reasons: list[str]) -> str:
        """What a person does about a file that is not here and cannot be downloaded."""
        tried = f" It could not be downloaded ({'; '.join(reasons)})." if reasons else ""
        hint = f"{self.public.by_hand}. " if self.public.by_hand else ""
        return (
            f"data set {self.name}: {name} is not here.{tried} {hint}Official page: "
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
        for chunk in progress(_chunks(file), f"checksum of {path.name}, MiB", chunks):
            digest.update(chunk)
    if digest.hexdigest() != archive.checksum:
        raise UsageError(
            f"{path} is not the published {archive.name}: expected checksum {archive.checksum}, "
            f"got {digest.hexdigest()}. A download that broke off or another version; delete it "
            "and run again to fetch it anew."
        )


def download(url: str, archive: Archive, folder: Path) -> Path:
    """Downloads a published file; what is there from a broken download is continued.

    torchvision's own downloads start from zero each time, which matters at 37 GB.

    Raises:
        OSError: if the server cannot be reached, does not have it or breaks off each time.
        UnwritableError: if there is no room for it.
        UsageError: if what came is not the published file.
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
                    f"the connection broke {TRIES} times ({error}); {size:,} bytes are kept and "
                    "the next run continues from there"
                ) from error
    try:
        check_sum(part, archive)
    except UsageError:
        part.unlink()
        raise
    part.replace(path)
    return path


def _continue(url: str, part: Path) -> None:
    """Appends to `part` what it lacks.

    Raises:
        OSError: if the server cannot be reached or refuses.
        http.client.HTTPException: if the connection ends before the file does.
    """
    done = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "tangent-arithmetic"}
    if done:
        headers["Range"] = f"bytes={done}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        reply = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is lacking; the checksum decides
        raise
    append = reply.status == HTTPStatus.PARTIAL_CONTENT
    with reply, disk_errors(part), part.open("ab" if append else "wb") as file:
        length = reply.headers.get("Content-Length")
        before, expected = file.tell(), None if length is None else int(length)
        chunks = None if expected is None else -(-expected // CHUNK)
        for chunk in progress(_chunks(reply), f"{part.stem}, MiB", chunks):
            file.write(chunk)
        got = file.tell() - before
        if expected is not None and got < expected:
            raise http.client.IncompleteRead(b"", expected - got)


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk
