"""The suite `text` from archives of their true formats made here, and the published ones."""

from __future__ import annotations

import json
import lzma
import re
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rdata

from tangent_arithmetic.commands import prepare_data
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.data.prepare import verify
from tangent_arithmetic.data.prepare.facts import Figure
from tangent_arithmetic.data.prepare.fetch import Place
from tangent_arithmetic.data.prepare.text import archives, facts
from tangent_arithmetic.data.prepare.text.parts import BEGINNING, Row, parts
from tangent_arithmetic.data.registry import get_dataset, known_datasets
from tangent_arithmetic.data.suites import get_suite
from tangent_arithmetic.data.text_suite import CLASSES, TEMPLATES, TEXT_SETS
from tangent_arithmetic.runtime.errors import UsageError
from tests.archives import tar_bytes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:rdata")
LAZY = lzma.LZMACompressor
MOST = {"train": 100, "test": 100}


def deb_of(files: dict[str, bytes]) -> bytes:
    """A Debian package: an `ar` archive of a version, control files and data."""
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tar_bytes({"control": b"x"}, "w:xz"),
        "data.tar.xz": tar_bytes({f"./{name}": content for name, content in files.items()}, "w:xz"),
    }
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    return out


def r_object(value: Any, folder: Path) -> bytes:
    rdata.write_rds(folder / "x.rds", value, compression=None)
    return (folder / "x.rds").read_bytes()


def vader(folder: Path) -> Path:
    """Two sentences for each document, with ratings around the margin."""

    def lines(name: str) -> list[str]:
        rows = [
            f"{d}_{s}\t{sign * (0.5 + s)}\t{'good' if sign > 0 else 'bad'} {name} &amp; {d} {s}"
            for d, sign in ((d, (-1) ** d) for d in range(60))
            for s in range(2)
        ]
        return [*rows, f"99_1\t0.2\tneutral {name}", f"98_1\t-0.4\tnearly neutral {name}"]

    files = {
        f"hutto_ICWSM_2014/{name}_GroundTruth.txt": ("\r\n".join(lines(name)) + "\r\n").encode()
        for name in archives.SNIPPETS.values()
    }
    path = folder / facts.VADER.name
    path.write_bytes(tar_bytes({archives.INNER: tar_bytes(files)}))
    return path


def mails(folder: Path) -> Path:
    def entry(group: str, number: int, text: str) -> tuple[str, bytes]:
        name = f"package/data/{group}/{number:05}.{'ab' * 16}.json"
        return name, json.dumps({"id": number, "group": group, "text": text}).encode()

    word = {0: "meeting", 1: "money"}
    files = dict(
        entry(
            ("easy-ham-1", "spam-2")[number % 2],
            number,
            f"From x\nSubject: {word[number % 2]} no {chr(97 + number % 26)}{number // 26}\n"
            f"Content-Type: text/html\n\n<html><style>p</style><b>{word[number % 2]}</b> &pound;5 "
            f"{chr(97 + number % 26) * (1 + number // 26)}</html>",
        )
        for number in range(104)
    )
    files["package/lib/index.js"] = b"raise"
    path = folder / facts.MAILS.name
    path.write_bytes(tar_bytes(files))
    return path


def foods(folder: Path) -> Path:
    data, places = b"", {}
    for split, count in (("training", 20), ("testing", 8)):
        scores = ["great", "other"] * (count // 2)
        table = {
            "review": np.array([f"{s} food {split} {i}" for i, s in enumerate(scores)]),
            "score": np.array(scores),
        }
        content = r_object(table, folder)
        packed = LAZY(lzma.FORMAT_RAW, filters=archives.RAW_LZMA)
        block = struct.pack(">I", len(content)) + b"Z" + packed.compress(content) + packed.flush()
        places[f"{split}_data"] = np.array([len(data), len(block)], dtype=np.int32)
        data += block
    index = zlib.compress(r_object({"variables": places}, folder))
    base = "usr/lib/R/site-library/modeldata/data/Rdata"
    path = folder / facts.FOODS.name
    path.write_bytes(deb_of({f"{base}.rdx": index, f"{base}.rdb": data}))
    return path


def wordnet(folder: Path) -> Path:
    kinds = [*archives.NOUNS, 3]
    lines = ["  1 a licence"] + [
        f'{number:08} {kinds[number % len(kinds)]:02} n 01 word 0 000 | thing {number}; "a case"'
        for number in range(220)
    ]
    path = folder / facts.WORDNET.name
    path.write_bytes(deb_of({"usr/share/wordnet/data.noun": "\n".join(lines).encode()}))
    return path


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    folder.mkdir()
    for make in (vader, mails, foods, wordnet):
        make(folder)
    return folder


def test_what_is_taken_out_of_each_archive(downloads: Path) -> None:
    ratings = list(archives.ratings(downloads / facts.VADER.name, "Tweets"))
    assert len(ratings) == 120 and ratings[0] == Row("0", "good tweets & 0 0", 1)
    domains = list(archives.domains(downloads / facts.VADER.name, "Tweets"))
    assert Counter(row.label for row in domains) == {0: 3 * 122, 1: 122}  # whatever the rating
    assert {row.text for row in domains if row.label} > {row.text for row in ratings}
    letters = list(archives.mails(downloads / facts.MAILS.name))
    assert Counter(row.label for row in letters) == {0: 52, 1: 52}
    assert letters[1].text == "money no b0. money £5 b"
    reviews = list(archives.foods(downloads / facts.FOODS.name))
    assert len(reviews) == 28 and reviews[0] == Row("train0", "great food training 0", 1, "train")
    nouns = list(archives.glosses(downloads / facts.WORDNET.name))
    assert len(nouns) == 200 and nouns[0] == Row("00000000", "thing 0", 0)


def test_parts_keep_documents_together_and_classes_equal() -> None:
    rows = [Row(str(n // 3), f"text {n}", int(n % 4 == 0)) for n in range(300)]
    rows += [Row("x", "text 7", 0), Row("y", " TEXT  8 ", 1), Row("z", "  ", 0)]
    kept = parts(rows, MOST)
    assert kept == parts(list(reversed(rows[:300])) + rows[300:], MOST)
    splits: dict[str, set[str]] = {"train": set(), "test": set()}
    for row in kept:
        splits[row.split].add(row.document)
    assert splits["train"].isdisjoint(splits["test"]) and min(map(len, splits.values())) > 5
    counts = Counter((row.split, row.label) for row in kept)
    for split in splits:
        assert counts[split, 0] == counts[split, 1] > 0
    assert len({row.text.casefold() for row in kept}) == len(kept)
    assert len(parts([*rows, Row("w", "long " * 99, 0)], {"train": 3, "test": 1})) == 8


def test_long_texts_are_cut() -> None:
    rows = [
        Row(f"{split}{label}", f"{split}{label} word " * 99, label, split)
        for split in ("train", "test")
        for label in (0, 1)
    ]
    assert BEGINNING - 1 <= max(len(row.text) for row in parts(rows, MOST)) <= BEGINNING


@pytest.mark.parametrize("name", CLASSES)
def test_arranged_read_and_verified(
    name: str, downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = facts.TEXT_FACTS[name]
    archive = replace(public.archives[0], checksum=None, urls=())
    root = downloads.parent
    facts.arrange(Place(name, replace(public, archives=(archive,)), root))
    data = TEXT_SETS[name](root)
    assert data.classnames == CLASSES[name] and len(TEMPLATES[name]) == 2
    sizes = {"train": labels_of(data.train), "test": labels_of(data.test)}
    classes = len(CLASSES[name])
    figures = {n: Figure(len(labels), len(labels) // classes) for n, labels in sizes.items()}
    monkeypatch.setitem(verify.FACTS, name, replace(public, splits=figures))
    report = verify.verify(name, root)
    assert report.verdict == "good" and report.shared == 0, report.errors
    held = get_dataset(f"{name}Val", None, root, suite="text")
    assert len(held.test) >= 1 and isinstance(held.train[0][0], str)


def test_another_file_than_the_published_is_refused(
    downloads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = prepare_data.main(["--datasets=Tweets", f"--data-location={downloads.parent}"])
    out = capsys.readouterr().out
    assert code == 1 and "is not the published vaderSentiment-3.3.2.tar.gz" in out


def test_a_damaged_package_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.deb"
    for content in (b"nothing", deb_of({"a": b"b"})[:-40]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=re.escape(str(path))):
            list(archives.glosses(path))


def test_missing_data_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prepare-data --suite=text"):
        get_dataset("Movies", None, tmp_path, suite="text")


def test_the_suite_s_names_are_known() -> None:
    suite = get_suite("text")
    assert set(known_datasets("text")) == set(suite.names) == set(CLASSES)
    assert {name: task.num_classes for name, task in suite.tasks.items()} == {
        name: len(CLASSES[name]) for name in suite.tasks
    }


@pytest.mark.network
def test_published_archives(tmp_path: Path) -> None:
    assert prepare_data.main(["--suite=text", f"--data-location={tmp_path}"]) == 0
    assert prepare_data.main(["--suite=text", f"--data-location={tmp_path}", "--check"]) == 0
