"""Downloading, arranging and verifying the public data sets, on miniatures of their archives."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import struct
import tarfile
import tracemalloc
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets as vision

from tangent_arithmetic.data.base import Pictures
from tangent_arithmetic.data.clip20 import PUBLIC_SETS
from tangent_arithmetic.data.prepare import contents, facts, fetch, unpack
from tangent_arithmetic.data.prepare.arrange import ARRANGERS, emnist, gunzipped
from tangent_arithmetic.data.prepare.facts import SETS, Archive, Figure
from tangent_arithmetic.data.prepare.fetch import Place, download
from tangent_arithmetic.data.prepare.verify import is_complete, verify
from tangent_arithmetic.data.suites import SUITES
from tangent_arithmetic.runtime.errors import MissingFileError, UnwritableError, UsageError
from tests.archives import (
    Files,
    Server,
    digest,
    files_below,
    publish,
    put,
    serving,
    tar_bytes,
    zip_bytes,
)
from tests.miniatures import LAND, MAKERS, picture, write

Patch = pytest.MonkeyPatch
OFFICIAL = dict(SETS)
REWRITING = (gunzipped, emnist)  # write the files again


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as started:
        yield started


@pytest.fixture(autouse=True)
def directly(monkeypatch: Patch) -> None:
    """Bypasses proxies between a test and its server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "TIMEOUT", 5.0)


def arrange(name: str, root: Path) -> None:
    ARRANGERS[name](Place(name, facts.SETS[name], root))


def shown(pictures: Pictures) -> list[tuple[int, bytes]]:
    """Labels and pixels."""
    samples = (pictures[i] for i in range(len(pictures)))
    return [(label, image.convert("RGB").tobytes()) for image, label in samples]


# The table of facts


def test_the_table_covers_every_set_of_the_suites() -> None:
    assert set(OFFICIAL) == set(PUBLIC_SETS) == set(ARRANGERS)
    suite = SUITES["clip20"]
    tasks = {**suite.tasks, **suite.related}
    assert {n: OFFICIAL[n].classes for n in tasks} == {n: t.num_classes for n, t in tasks.items()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_figures_per_class_sum_to_the_total_and_files_have_checksums(name: str) -> None:
    public = OFFICIAL[name]
    for figure in public.splits.values():
        sizes = [figure.of_class(label) for label in range(public.classes)]
        assert figure.per_class is None or sum(size or 0 for size in sizes) == figure.total
    for archive in (*public.archives, *public.lists):
        assert len(archive.checksum or "") in (32, 64), archive
        assert archive.urls or public.by_hand, archive
    assert public.source and public.page


def test_archives_are_those_of_torchvision() -> None:
    def first(name: str) -> tuple[str, str | None]:
        archive = OFFICIAL[name].archives[0]
        return archive.urls[0], archive.checksum

    for name, reader in (("CIFAR10", vision.CIFAR10), ("CIFAR100", vision.CIFAR100)):
        assert first(name) == (reader.url, reader.tgz_md5)
    assert first("STL10") == (vision.STL10.url, vision.STL10.tgz_md5)
    assert first("DTD") == (vision.DTD._URL, vision.DTD._MD5)
    assert first("SUN397") == (vision.SUN397._DATASET_URL, vision.SUN397._DATASET_MD5)
    assert [(a.name, a.checksum) for a in OFFICIAL["MNIST"].archives] == vision.MNIST.resources
    svhn = {a.name: [a.urls[0], a.name, a.checksum] for a in OFFICIAL["SVHN"].archives}
    assert svhn["train_32x32.mat"] == list(vision.SVHN.split_list["train"])
    assert svhn["test_32x32.mat"] == list(vision.SVHN.split_list["test"])
    for name, kin in (("FashionMNIST", vision.FashionMNIST), ("KMNIST", vision.KMNIST)):
        files = [(a.name.removeprefix(f"{name}-"), a.checksum) for a in OFFICIAL[name].archives]
        assert files == kin.resources
        urls = [a.urls[0] for a in OFFICIAL[name].archives]
        assert urls == [f"{kin.mirrors[0]}{file}" for file, _ in kin.resources]
    assert first("EMNIST") == first("EMNISTLetters") == (vision.EMNIST.url, vision.EMNIST.md5)
    assert first("Food101") == (vision.Food101._URL, vision.Food101._MD5)
    assert first("RenderedSST2") == (vision.RenderedSST2._URL, vision.RenderedSST2._MD5)
    pets = [(a.urls[0], a.checksum) for a in OFFICIAL["OxfordIIITPet"].archives]
    assert pets == list(vision.OxfordIIITPet._RESOURCES)
    flowers = {(a.name, a.checksum) for a in OFFICIAL["Flowers102"].archives}
    assert flowers == set(vision.Flowers102._file_dict.values())
    fer = [(a.name, a.checksum) for a in OFFICIAL["FER2013"].archives]
    assert fer == [vision.FER2013._RESOURCES["fer"]]
    pcam = [vision.PCAM._FILES[s][k] for s in ("train", "test") for k in ("images", "targets")]
    patches = [(a.name, a.checksum) for a in OFFICIAL["PCAM"].archives]
    assert patches == [(f"{file}.gz", md5) for file, _, md5 in pcam]
    imagenet = {a.name: a.checksum for a in OFFICIAL["ImageNet"].archives}
    assert imagenet == dict(vision.imagenet.ARCHIVE_META.values())


def test_docs_data_md_agrees_with_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name, public in OFFICIAL.items():
        rows = [line.split("|") for line in page.splitlines() if line.startswith(f"| {name} |")]
        (cells,) = [[cell.strip() for cell in row] for row in rows if len(row) == 10]
        figures = [public.splits.get(split) for split in ("train", "val", "test")]
        totals = [f"{figure.total:,}" if figure else "" for figure in figures]
        assert cells[2:6] == [f"{public.classes:,}", *totals]
        assert cells[-2] == ("automatic" if all(a.urls for a in public.archives) else "by hand")


# From archives to our layout


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "EuroSAT"])
def test_archives_become_what_the_loader_reads(
    name: str, tmp_path: Path, server: Server, monkeypatch: Patch
) -> None:
    """Archives are downloaded where possible, else taken from the downloads folder."""
    files = publish(name, tmp_path / "origin", monkeypatch, server.url)
    by_hand = [a.name for a in facts.SETS[name].archives if not a.urls]
    server.files = {key: value for key, value in files.items() if key not in by_hand}
    root = tmp_path / "data"
    for archive in by_hand:
        put(files, root / "downloads", archive)
    assert not is_complete(name, root)
    arrange(name, root)
    assert is_complete(name, root)
    ours, origin = PUBLIC_SETS[name](root), PUBLIC_SETS[name](tmp_path / "origin")
    assert sorted(shown(ours.train)) == sorted(shown(origin.train))
    assert sorted(shown(ours.test)) == sorted(shown(origin.test))
    assert verify(name, root).verdict == "good"
    assert not list(root.rglob("*.part")) and not list(root.glob(".preparing-*"))
    requests = len(server.requests)
    assert requests == len(server.files)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    arrange(name, root)
    assert {path: path.stat().st_mtime_ns for path in before} == before or ARRANGERS[
        name
    ] in REWRITING
    assert len(server.requests) == requests


def test_unpacked_imagenet_validation_images_are_arranged(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    files, root = publish("ImageNet", tmp_path / "origin", monkeypatch), tmp_path / "data"
    put(files, root / "downloads", "ILSVRC2012_img_train.tar", "ILSVRC2012_devkit_t12.tar.gz")
    write(root / "x.tar", files["ILSVRC2012_img_val.tar"])
    extra = root / "imagenet" / "val" / "ILSVRC2012_val_00999999.JPEG"
    picture(extra, 1)
    unpack.unpack(root / "x.tar", extra.parent)
    with pytest.raises(UsageError, match=r"val_00999999.JPEG is not one of the 21 validation"):
        arrange("ImageNet", root)
    extra.unlink()
    arrange("ImageNet", root)
    assert is_complete("ImageNet", root)
    first = root / "imagenet" / "val_in_folder" / "n01440764"
    expected = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2)]
    assert sorted(path.name for path in first.iterdir()) == expected


@pytest.fixture
def eurosat(tmp_path: Path, monkeypatch: Patch) -> Files:
    return publish("EuroSAT", tmp_path / "origin", monkeypatch)


def test_the_random_split_of_eurosat_is_repeatable(eurosat: Files, tmp_path: Path) -> None:
    splits = []
    for run in ("one", "two"):
        put(eurosat, tmp_path / run / "downloads")
        arrange("EuroSAT", tmp_path / run)
        folder = tmp_path / run / "EuroSAT_splits"
        splits.append(set(files_below(folder, "")))
        assert not (folder / ".unfinished").exists()
    assert splits[0] == splits[1]
    report = verify("EuroSAT", tmp_path / "one")
    assert report.verdict == "good" and report.shared == 0
    assert report.found == {"train": 20, "val": 20, "test": 20}
    every = sorted(Path(name).name for name in splits[0])
    assert every == sorted(f"{name}_{j}.jpg" for name in LAND for j in range(1, 7))


def test_lists_override_the_random_split_of_eurosat(eurosat: Files, tmp_path: Path) -> None:
    put(eurosat, tmp_path / "downloads")
    numbers = {"train": (5, 6), "val": (1, 4), "test": (2, 3)}
    for split in numbers:
        write(tmp_path / "downloads" / f"eurosat-{split}.txt", "River_1.jpg".encode("utf-16"))
    with pytest.raises(UsageError, match=r"eurosat-train\.txt cannot be read as a text in UTF-8"):
        arrange("EuroSAT", tmp_path)
    for split, pair in numbers.items():
        names = [f"{name}_{i}.jpg" for name in LAND for i in pair]
        write(tmp_path / "downloads" / f"eurosat-{split}.txt", "\n".join(names))
    arrange("EuroSAT", tmp_path)
    for split, pair in numbers.items():
        names = [path.name for path in (tmp_path / "EuroSAT_splits" / split / "River").iterdir()]
        assert sorted(names) == [f"River_{i}.jpg" for i in pair]


def test_existing_eurosat_splits_are_never_changed(eurosat: Files, tmp_path: Path) -> None:
    put(eurosat, tmp_path / "downloads")
    picture(tmp_path / "EuroSAT_splits" / "val" / "River" / "River_1.jpg", 3)
    message = r"the images in .*EuroSAT_splits are not split as expected; nothing was changed"
    with pytest.raises(UsageError, match=message):
        arrange("EuroSAT", tmp_path)
    assert len(files_below(tmp_path / "EuroSAT_splits", "")) == 1


def test_an_interrupted_arrangement_is_completed(
    eurosat: Files, tmp_path: Path, monkeypatch: Patch
) -> None:
    put(eurosat, tmp_path / "downloads")
    link = os.link

    def stop(source: Path, target: Path) -> None:
        if len(files_below(tmp_path / "EuroSAT_splits", "")) > 30:
            raise KeyboardInterrupt
        link(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "link", stop)
        arrange("EuroSAT", tmp_path)
    assert not is_complete("EuroSAT", tmp_path)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "EuroSAT_splits").rglob("*.jpg")}
    assert len(kept) >= 30 and not list(tmp_path.glob(".preparing-*"))
    arrange("EuroSAT", tmp_path)
    assert is_complete("EuroSAT", tmp_path)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("DTD", "../../../victim.txt"),
        ("DTD", "banded/../../../../victim.txt"),
        ("DTD", "..\\..\\victim.txt"),
        ("EuroSAT", ".._victim.jpg"),
        ("SUN397", "/a/../../../victim.txt"),
    ],
)
def test_paths_in_lists_cannot_leave_their_folder(
    name: str, names: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    files, root = publish(name, tmp_path / "origin", monkeypatch), tmp_path / "data"
    write(tmp_path / "victim.txt", "mine")
    before = sorted(tmp_path.rglob("victim*"))
    if name == "EuroSAT":
        for split in ("train", "val", "test"):
            write(root / "downloads" / f"eurosat-{split}.txt", names)
    elif name == "DTD":
        content = {f"dtd/labels/{n}1.txt": names.encode() for n in ("train", "val", "test")}
        replaced(name, files, "dtd-r1.0.1.tar.gz", tar_bytes(content), monkeypatch)
    else:
        content = {f"{n}_01.txt": names.encode() for n in ("Training", "Testing")}
        replaced(name, files, "Partitions.zip", zip_bytes(content), monkeypatch)
    put(files, root / "downloads")
    with pytest.raises(UsageError, match=r"is refused: it names .*, which leads out of its folder"):
        arrange(name, root)
    assert (tmp_path / "victim.txt").read_text() == "mine"
    assert sorted(tmp_path.rglob("victim*")) == before
    assert [path.name for path in root.iterdir()] == ["downloads"] or name == "EuroSAT"


def replaced(name: str, files: Files, archive: str, content: bytes, patch: Patch) -> None:
    """Another archive, published as if it were the right one."""
    files[archive] = content
    changed = tuple(
        replace(one, checksum=digest(content)) if one.name == archive else one
        for one in facts.SETS[name].archives
    )
    patch.setitem(facts.SETS, name, replace(facts.SETS[name], archives=changed))


def test_a_truncated_file_is_replaced(tmp_path: Path, monkeypatch: Patch) -> None:
    files = publish("DTD", tmp_path / "origin", monkeypatch)
    put(files, tmp_path / "downloads")
    arrange("DTD", tmp_path)
    victim = tmp_path / "dtd" / "val" / "woven" / "woven_80.jpg"
    whole = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(whole[:100])
    arrange("DTD", tmp_path)
    assert victim.read_bytes() == whole


def test_cars_are_arranged_from_the_archive_of_kaggle(tmp_path: Path, monkeypatch: Patch) -> None:
    files = publish("Cars", tmp_path / "origin", monkeypatch)
    folder, downloads = tmp_path / "origin" / "stanford_cars", tmp_path / "data" / "downloads"
    pictures: Files = {}
    for split in ("cars_train", "cars_test"):
        pictures |= files_below(folder / split, f"{split}/{split}")
    write(downloads / "stanford-cars-dataset.zip", zip_bytes(pictures))
    write(downloads / "car_devkit.tgz", files["car_devkit.tgz"])
    labels = files["cars_test_annos_withlabels.mat"]
    write(downloads / "cars_test_annos_withlabels (1).mat", labels)
    arrange("Cars", tmp_path / "data")
    assert is_complete("Cars", tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "archive", "inner"),
    [
        ("DTD", "dtd-r1.0.1.tar.gz", "dtd"),
        ("EuroSAT", "EuroSAT.zip", "2750"),
        ("RESISC45", "NWPU-RESISC45.zip", "NWPU-RESISC45"),
        ("SUN397", "SUN397.tar.gz", "SUN397"),
    ],
)
def test_folders_unpacked_by_the_user_are_used(
    name: str, archive: str, inner: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    files = publish(name, tmp_path / "origin", monkeypatch)
    downloads = tmp_path / "data" / "downloads"
    put(files, downloads)
    unpack.unpack(downloads / archive, downloads)
    (downloads / archive).unlink()
    assert (downloads / inner).is_dir()
    arrange(name, tmp_path / "data")
    assert is_complete(name, tmp_path / "data")


# Downloads


CONTENT = bytes(range(256)) * 9_000  # more than two chunks


def published(server: Server, checksum: str | None = None) -> tuple[str, Archive]:
    server.files = {"file.bin": CONTENT}
    archive = Archive("file.bin", (f"{server.url}file.bin",), checksum or digest(CONTENT))
    return archive.urls[0], archive


def place_of(archive: Archive, root: Path) -> Place:
    """A data set with this archive."""
    return Place("DTD", replace(SETS["DTD"], archives=(archive,)), root)


@pytest.mark.parametrize(
    ("part", "cut", "ranges", "requests"),
    [
        (0, 1_500_000, True, [0, 1_500_000]),
        (0, 700_000, False, [0, 700_000]),  # a server without ranges sends all again
        (len(CONTENT), 0, True, [len(CONTENT)]),
    ],
)
def test_a_broken_download_is_resumed(
    part: int, cut: int, ranges: bool, requests: list[int], server: Server, tmp_path: Path
) -> None:
    url, archive = published(server)
    server.cut, server.cuts, server.ranges = cut, int(cut > 0), ranges
    if part:
        write(tmp_path / "file.bin.part", CONTENT[:part])
    path = download(url, archive, tmp_path)
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert server.requests == [("file.bin", start) for start in requests]


def test_the_next_run_resumes_a_download(server: Server, tmp_path: Path) -> None:
    url, archive = published(server)
    server.cut, server.cuts = 500_000, 3
    with pytest.raises(OSError, match=r"broke 3 times .*1,500,000 bytes are kept"):
        download(url, archive, tmp_path)
    assert (tmp_path / "file.bin.part").stat().st_size == 1_500_000
    assert download(url, archive, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == ("file.bin", 1_500_000)


def test_a_download_with_another_checksum_is_deleted(server: Server, tmp_path: Path) -> None:
    url, archive = published(server, "0" * 32)
    with pytest.raises(UsageError, match=rf"expected checksum 0{{32}}, got {digest(CONTENT)}"):
        download(url, archive, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_a_download(server: Server, tmp_path: Path) -> None:
    url, archive = published(server)
    place = place_of(replace(archive, urls=(url, url)), tmp_path)
    place.downloads.mkdir()
    (place.downloads / "file.bin.part").symlink_to("/dev/full")
    with pytest.raises(UnwritableError, match=r"file\.bin\.part: No space left"):
        place.archive("file.bin")
    assert len(server.requests) == 1


def test_local_archives_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "downloads" / "file.bin"
    for checksum in (digest(CONTENT), hashlib.sha256(CONTENT).hexdigest()):
        place = place_of(Archive("file.bin", (), checksum), tmp_path)
        write(path, CONTENT)
        assert place.archive("file.bin") == path
        write(path, CONTENT[:-1])
        with pytest.raises(UsageError, match=r"is not the published file\.bin.*It is incomplete"):
            place.archive("file.bin")


@pytest.mark.parametrize("first", [None, b"<html>moved</html>"])
def test_the_next_url_is_tried(first: bytes | None, server: Server, tmp_path: Path) -> None:
    url, archive = published(server)
    if first is not None:
        server.files["first.bin"] = first
    both = replace(archive, urls=(f"{server.url}first.bin", url))
    path = place_of(both, tmp_path).archive("file.bin")
    assert path == tmp_path / "downloads" / "file.bin" and path.read_bytes() == CONTENT
    assert [name for name, _ in server.requests] == ["first.bin", "file.bin"]


def test_errors_of_downloads_name_the_page_and_the_folder(
    server: Server, tmp_path: Path, monkeypatch: Patch
) -> None:
    publish("DTD", tmp_path / "origin", monkeypatch, server.url)
    with pytest.raises(MissingFileError) as caught:
        arrange("DTD", tmp_path)
    message = str(caught.value)
    assert f"{server.url}dtd-r1.0.1.tar.gz: HTTP Error 404" in message
    assert "https://www.robots.ox.ac.uk/~vgg/data/dtd/" in message
    assert f"Put the file into {tmp_path / 'downloads'} and run again" in message
    place = place_of(Archive("file.bin", ("http://127.0.0.1:9/file.bin",)), tmp_path)
    with pytest.raises(MissingFileError, match=r"could not be downloaded .*refused.*downloads"):
        place.archive("file.bin")


def test_files_without_a_url_are_never_requested(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", None)
    with pytest.raises(MissingFileError, match=r"car_devkit\.tgz is missing.*issues/7545"):
        arrange("Cars", tmp_path)


# Archives


def packed(kind: str, files: Files) -> bytes:
    """An archive with this file name; gzip files hold the concatenation of the files."""
    if kind == "a.zip":
        return zip_bytes(files)
    if kind == "a.gz":
        return gzip.compress(b"".join(files.values()))
    modes = {"a.tar": "w", "a.tgz": "w:gz", "a.tar.xz": "w:xz", "a.tar.bz2": "w:bz2"}
    return tar_bytes(files, modes[kind])


def unpack_any(archive: Path, folder: Path) -> None:
    if archive.name == "a.gz":
        unpack.gunzip(archive, folder / "x")
    else:
        unpack.unpack(archive, folder)


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "C:\\evil", "..\\evil"])
@pytest.mark.parametrize("kind", ["a.zip", "a.tgz", "a.tar"])
def test_members_outside_the_folder_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    write(tmp_path / kind, packed(kind, {"good": b"1", name: b"2"}))
    target = tmp_path / "in" / "target"
    target.mkdir(parents=True)
    with pytest.raises(UsageError, match=r"is refused: it names '.*evil', which leads out"):
        unpack.unpack(tmp_path / kind, target)
    assert {p.name for p in tmp_path.rglob("*")} <= {kind, "in", "target", "good"}
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize("kind", ["a.zip", "a.tgz", "a.tar.xz", "a.tar.bz2", "a.gz"])
def test_archive_bombs_are_refused(kind: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(unpack, "SPARE", 1_000)
    write(tmp_path / kind, packed(kind, {f"{i}": bytes(1 << 20) for i in range(8)}))
    (tmp_path / "to").mkdir()
    with pytest.raises(UsageError, match="unpacks to more than"):
        unpack_any(tmp_path / kind, tmp_path / "to")
    written = sum(p.stat().st_size for p in (tmp_path / "to").rglob("*") if p.is_file())
    assert written <= 1_000 + 100 * (tmp_path / kind).stat().st_size


def tar_member(
    name: str = "x", kind: bytes = tarfile.REGTYPE, content: bytes = b"", size: int | None = None
) -> bytes:
    """A header with its content, filled up."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(content) if size is None else size
    header = member.tobuf(tarfile.GNU_FORMAT)
    return header + content + bytes(-len(content) % 512)


def record(key: str, value: str) -> bytes:
    """A record of a pax header."""
    rest = len(f" {key}={value}\n".encode())
    length = next(n for n in range(rest, rest + 20) if n == rest + len(str(n)))
    return f"{length} {key}={value}\n".encode()


def with_record(key: str, value: str) -> bytes:
    """A member after a pax header with one record."""
    return tar_member("x", b"x", record(key, value)) + tar_member("x")


LONG = 32 << 20
END = bytes(1024)
TARS: list[tuple[Callable[[], bytes], str]] = [
    # long names, links and records
    (lambda: tar_member("x", b"L", bytes(LONG)), "header of 33,554,432 bytes"),
    (lambda: tar_member("x", b"K", bytes(LONG)), "header of 33,554,432"),
    (lambda: with_record("path", "a" * LONG), r"header of 33,554,4\d\d bytes"),
    (lambda: tar_member("x", b"g", record("comment", "a" * LONG)), "has a header of 33,554"),
    # damaged records
    (lambda: tar_member("x", b"x", b"9" * 16_000 + b" hdrcharset="), "another length"),
    (lambda: tar_member("x", b"x", b"0 path=\n"), "another length"),
    (lambda: tar_member("x", b"x", b"9999 a=b\n"), "another length"),
    # sizes
    (lambda: with_record("size", "9" * 15_000), "is damaged .*ValueError"),
    (lambda: with_record("size", "-1"), "of -1 bytes"),
    (lambda: tar_member("x", size=1 << 20), "damaged or truncated"),
    (lambda: tar_member("x", size=1 << 60), "unpacks to more"),
    (lambda: tar_member("x"), "damaged or truncated"),  # no end
    (lambda: tar_member("x", b"5") * 300 + END, "unpacks to more"),  # headers only
    # sparse files
    (lambda: tar_member("x", b"S"), "is a sparse file"),
    (lambda: with_record("GNU.sparse.major", "1"), "is a sparse file"),
    # names that cannot be written
    (lambda: tar_member("x") + tar_member("x/y") + END, "cannot be written"),
    (lambda: tar_member("x/y") + tar_member("x") + END, "cannot be written"),
    (lambda: tar_member("x", b"L", b"a" * 5000) + tar_member("x") + END, "cannot be written"),
    # names that lead out of the folder
    (lambda: with_record("path", "../evil") + END, r"names '\.\./evil', which leads out"),
    (lambda: tar_member("x", b"L", b"/tmp/evil\0") + tar_member("x") + END, "leads out"),
    # links and devices
    (lambda: tar_member("x", tarfile.SYMTYPE) + END, "'x' is a link or a device"),
    (lambda: tar_member("x", tarfile.LNKTYPE) + END, "'x' is a link or a device"),
    (lambda: tar_member("x", tarfile.CHRTYPE) + END, "'x' is a link or a device"),
    (lambda: tar_member("x", tarfile.FIFOTYPE) + END, "'x' is a link or a device"),
]


@pytest.mark.parametrize(("content", "message"), TARS)
def test_hostile_tar_headers_are_refused_in_bounded_memory(
    content: Callable[[], bytes], message: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(unpack, "SPARE", 1 << 20)
    write(tmp_path / "a.tar.gz", gzip.compress(content(), 1))
    (tmp_path / "to").mkdir()
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=message):
            unpack.unpack(tmp_path / "a.tar.gz", tmp_path / "to")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_an_xz_archive_that_needs_much_memory_is_refused(tmp_path: Path) -> None:
    packed = bytearray(lzma.compress(tar_bytes({"x": b""}, "w"), preset=0))
    # the size of the dictionary is a byte of the header of the first block, which has a checksum
    assert packed[12:16] == bytes([2, 0, 0x21, 1])
    packed[16] = 37  # 1 GiB and a half
    packed[20:24] = zlib.crc32(packed[12:20]).to_bytes(4, "little")
    write(tmp_path / "a.tar.xz", bytes(packed))
    with pytest.raises(UsageError, match=r"damaged or truncated .*[Mm]emory"):
        unpack.unpack(tmp_path / "a.tar.xz", tmp_path)


@pytest.mark.parametrize("how", ["", "gz", "xz", "bz2"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_tar_formats_are_unpacked(how: str, form: int, tmp_path: Path) -> None:
    names = ["a", "./b", "c/d/e.jpg", f"{'f' * 90}/{'g' * 90}"]
    names += ["h" * 200, "ü" * 120, "i/" * 200 + "j"] if form != tarfile.USTAR_FORMAT else []
    stream = io.BytesIO()
    mode: Any = f"w:{how}"
    with tarfile.open(fileobj=stream, mode=mode, format=form) as archive:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 700 * number, 0.5
            archive.addfile(member, io.BytesIO(bytes([number]) * member.size))
    write(tmp_path / "a.tar", stream.getvalue())
    (tmp_path / "to").mkdir()
    unpack.unpack(tmp_path / "a.tar", tmp_path / "to")
    for number, name in enumerate(names):
        assert (tmp_path / "to" / name).read_bytes() == bytes([number]) * 700 * number


@pytest.mark.parametrize("kind", ["a.tgz", "a.tar.xz", "a.tar.bz2", "a.zip", "a.gz"])
def test_a_flipped_bit_never_changes_what_is_unpacked(kind: str, tmp_path: Path) -> None:
    files = {f"{i}.txt": f"{i} of {i * i} words ".encode() * 40 for i in range(10)}
    whole = packed(kind, files)
    wanted = {"x": b"".join(files.values())} if kind == "a.gz" else files
    refused = 0
    draw = np.random.default_rng(0)
    for number in range(60):
        flipped = bytearray(whole)
        flipped[draw.integers(len(whole))] ^= 1 << draw.integers(8)
        write(tmp_path / kind, bytes(flipped))
        folder = tmp_path / f"to{number}"
        folder.mkdir()
        try:
            unpack_any(tmp_path / kind, folder)
        except UsageError:
            refused += 1
        else:  # a time or an owner
            assert {p.name: p.read_bytes() for p in folder.iterdir()} == wanted
    assert refused > 20


def zip_of(*entries: tuple[str, int, int], size: int = 1000) -> bytes:
    """A zip archive whose directory has these names, offsets and sizes."""
    parts = []
    for name, offset, count in entries:
        fields = (20, 20, 0, 0, 0, 33, 0, count, count, len(name), 0, 0, 0, 0, 0, offset)
        parts += [struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields), name.encode()]
    directory = b"".join(parts)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(directory), size, 0)
    return bytes(size) + directory + end


def zipped(how: int, mode: int = 0) -> bytes:
    stream, member = io.BytesIO(), zipfile.ZipInfo("a")
    member.external_attr, member.compress_type = mode << 16, how
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(member, bytes(100))
    return stream.getvalue()


LONG_DIRECTORY = struct.pack("<2IH", 2**32 - 2, 0, 0)
ZIPS: list[tuple[Callable[[], bytes], str]] = [
    (lambda: zip_of(("a", 0, 900), ("b", 100, 800)), "members overlap"),
    (lambda: zip_of(("a", 0, 900), ("b", 0, 900)), "members overlap"),
    (lambda: zip_of(("a", 0, 1000)), "overlaps the directory"),
    (lambda: zip_of(*[(f"{i}", 0, 0) for i in range(500_000)]), "directory is longer"),
    (lambda: zip_of()[:-10] + LONG_DIRECTORY, "damaged or truncated"),
    (lambda: zipped(zipfile.ZIP_LZMA), "but not by deflate"),
    (lambda: zipped(zipfile.ZIP_STORED, 0o120777), "is a link or a device"),
    (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
]


@pytest.mark.parametrize(("content", "message"), ZIPS)
def test_hostile_zip_archives_are_refused(
    content: Callable[[], bytes], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.zip", content())
    with pytest.raises(UsageError, match=message):
        unpack.unpack(tmp_path / "a.zip", tmp_path)


def test_unpacking_to_a_full_disk_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", tar_bytes({"x": b"1"}, "w"))
    (tmp_path / "x").symlink_to("/dev/full")
    with pytest.raises(UnwritableError, match=r"cannot write .*x: No space left"):
        unpack.unpack(tmp_path / "a.tar", tmp_path)


@pytest.mark.parametrize("kind", ["a.zip", "a.tgz", "a.tar", "a.gz"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_damaged_archives_are_named(kind: str, share: float, tmp_path: Path) -> None:
    whole = packed(kind, {"x": np.random.default_rng(0).bytes(200_000)})
    write(tmp_path / kind, whole[: int(share * len(whole))] or b"no archive")
    with pytest.raises(UsageError, match=rf"{kind} is damaged or truncated .*run again"):
        unpack_any(tmp_path / kind, tmp_path)
    assert kind != "a.gz" or not (tmp_path / "x").exists()


def test_rar_archives_are_left_to_other_programs(tmp_path: Path) -> None:
    write(tmp_path / "downloads" / "NWPU-RESISC45.rar", b"Rar!")
    with pytest.raises(UsageError, match=r"NWPU-RESISC45\.rar .*unar, 7z x or bsdtar -xf"):
        arrange("RESISC45", tmp_path)


# Verification

Prepared = Callable[[str], Path]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: Patch) -> Prepared:
    """Makes the miniature of a data set in our layout, described by the table of facts."""

    def make(name: str) -> Path:
        publish(name, tmp_path, monkeypatch)
        return tmp_path

    return make


def test_a_renamed_copy_of_a_train_image_in_the_test_split_is_reported(prepared: Prepared) -> None:
    root = prepared("DTD")
    report = verify("DTD", root)
    assert report.verdict == "good" and "train: 46 images are duplicates" in report.notes
    copy = root / "dtd" / "val" / "woven" / "woven_80.jpg"
    copy.write_bytes((root / "dtd" / "train" / "banded" / "banded_040.jpg").read_bytes())
    report = verify("DTD", root)
    assert (report.verdict, report.shared) == ("wrong", 1)
    assert report.errors == [
        "dtd/train/banded/banded_040.jpg and dtd/val/woven/woven_80.jpg are the same image in two "
        "splits, so test data would be trained on"
    ]


def test_every_image_shared_by_splits_is_reported(prepared: Prepared) -> None:
    root = prepared("EuroSAT")
    for split in ("train", "val", "test"):
        for i, name in enumerate(LAND):
            picture(root / "EuroSAT_splits" / split / name / f"{name}_7.jpg", 10 + i)
    report = verify("EuroSAT", root)
    leaks = [error for error in report.errors if "two splits" in error]
    assert report.shared == len(leaks) == len(LAND)
    assert all("train" in e and "val" in e and "test" in e for e in leaks)


def test_the_validation_list_of_resisc45_counts_too(prepared: Prepared) -> None:
    root = prepared("RESISC45")
    assert verify("RESISC45", root).verdict == "good"
    with (root / "resisc45" / "resisc45-val.txt").open("a") as file:
        file.write("beach_001.jpg\n")
    report = verify("RESISC45", root)
    assert report.found["val"] == 46 and report.shared == 1
    assert any("NWPU-RESISC45/beach/beach_001.jpg" in error for error in report.errors)


def test_shared_images_of_a_sealed_set_are_a_note(prepared: Prepared, monkeypatch: Patch) -> None:
    root = prepared("SVHN")
    report = verify("SVHN", root)
    assert report.verdict == "good" and report.shared == 1  # a zero in both
    assert "train image 2 and test image 1 are the same image in two splits, as published" in (
        report.notes
    )
    public = replace(facts.SETS["SVHN"], sealed=False)
    monkeypatch.setitem(facts.SETS, "SVHN", public)
    assert verify("SVHN", root).verdict == "wrong"


def test_counts_are_compared(prepared: Prepared, monkeypatch: Patch) -> None:
    root = prepared("DTD")
    figures = {"train": Figure(48), "test": Figure(47, 1)}
    public = replace(facts.SETS["DTD"], splits=figures)
    monkeypatch.setitem(facts.SETS, "DTD", public)
    report = verify("DTD", root)
    assert report.errors == [
        f"test: expected 47 images (source: {public.source}), got 48",
        "test: expected 1 images of class 0, got 2",
    ]
    loose = {"train": Figure(48), "test": Figure(48, 1, confirmed=False)}
    monkeypatch.setitem(facts.SETS, "DTD", replace(public, splits=loose))
    report = verify("DTD", root)
    assert report.verdict == "good"
    assert "test: expected 1 images of class 0, got 2 (an unconfirmed figure)" in (report.notes)


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_truncated_and_missing_images_are_named(
    num_workers: int, prepared: Prepared, monkeypatch: Patch
) -> None:
    root = prepared("Cars")
    monkeypatch.setattr(contents, "SERIAL", 1)
    train = root / "stanford_cars" / "cars_train"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(train / "00002.jpg")
    whole = (train / "00002.jpg").read_bytes()
    (train / "00002.jpg").write_bytes(whole[: len(whole) // 2])
    (train / "00003.jpg").unlink()
    report = verify("Cars", root, num_workers)
    first, second = sorted(e for e in report.errors if "cannot be read" in e)
    assert first.startswith("stanford_cars/cars_train/00002.jpg cannot be read (")
    assert "truncated" in first and second.startswith("stanford_cars/cars_train/00003.jpg")
    assert (report.verdict, report.unreadable) == ("wrong", 2)


def test_a_set_is_wrong_if_its_loader_refuses_it_and_missing_without_files(
    prepared: Prepared,
) -> None:
    root = prepared("SUN397")
    (root / "sun397" / "val" / "a_abbey").rename(root / "sun397" / "val" / "a_abbot")
    report = verify("SUN397", root)
    assert report.verdict == "wrong" and "same class folders" in report.errors[0]
    report = verify("MNIST", root)
    assert report.verdict == "missing" and "MNIST/raw/train-images" in report.errors[0]


def test_imagenet_training_images_are_read_only_if_thorough(prepared: Prepared) -> None:
    root = prepared("ImageNet")
    victim = next((root / "imagenet" / "train").rglob("*.JPEG"))
    victim.write_bytes(b"no picture")
    report = verify("ImageNet", root)
    assert report.verdict == "good" and report.found["train"] == 21
    assert "train: counted only; --thorough reads its images too" in report.notes
    report = verify("ImageNet", root, thorough=True)
    assert report.verdict == "wrong" and report.unreadable == 1


def test_unchanged_sets_are_not_read_again(prepared: Prepared, monkeypatch: Patch) -> None:
    root = prepared("DTD")
    first = verify("DTD", root)
    read: list[str] = []
    inspect = contents.inspect

    def counting(path: str) -> contents.Finding:
        read.append(path)
        return inspect(path)

    monkeypatch.setattr(contents, "inspect", counting)
    assert verify("DTD", root) == first and not read
    assert verify("DTD", root, thorough=True) == first and len(read) == 96
    picture(root / "dtd" / "val" / "woven" / "woven_80.jpg", 90)
    assert verify("DTD", root).verdict == "good" and len(read) == 2 * 96
    (root / ".verified" / "DTD.json").write_text("{")
    assert verify("DTD", root).verdict == "good" and len(read) == 3 * 96
