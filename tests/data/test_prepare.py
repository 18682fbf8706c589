"""Public sets are fetched, arranged and verified, on miniatures of what is published."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import lzma
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
from tangent_arithmetic.data.clip8 import CLIP8_SETS
from tangent_arithmetic.data.prepare import arrange as arrange_module
from tangent_arithmetic.data.prepare import contents, facts, fetch, unpack
from tangent_arithmetic.data.prepare.arrange import ARRANGERS
from tangent_arithmetic.data.prepare.facts import SETS, Archive, Figure
from tangent_arithmetic.data.prepare.fetch import Place, check_sum, download
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
PACKED = ("gz", "xz", "bz2")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture(autouse=True)
def directly(monkeypatch: Patch) -> None:
    """No proxy between a test and its server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "TIMEOUT", 5.0)


def arrange(name: str, root: Path) -> None:
    ARRANGERS[name](Place(name, facts.SETS[name], root))


def shown(pictures: Pictures) -> list[tuple[int, bytes]]:
    """Labels and pixels."""
    found = (pictures[i] for i in range(len(pictures)))
    return [(label, image.convert("RGB").tobytes()) for image, label in found]


# The table of facts


def test_the_table_has_every_set_and_its_classes() -> None:
    assert set(OFFICIAL) == set(CLIP8_SETS) == set(ARRANGERS)
    suite = SUITES["clip8"]
    assert {n: OFFICIAL[n].classes for n in suite.tasks} == {
        n: task.num_classes for n, task in suite.tasks.items()
    }


@pytest.mark.parametrize("name", OFFICIAL)
def test_figures_a_class_sum_to_those_of_the_split(name: str) -> None:
    public = OFFICIAL[name]
    for figure in public.splits.values():
        classes = [figure.of_class(label) for label in range(public.classes)]
        if figure.per_class is not None:
            assert sum(number or 0 for number in classes) == figure.total
        else:
            assert set(classes) == {None}
    assert public.source and public.page


def test_every_file_has_a_checksum() -> None:
    for public in OFFICIAL.values():
        for archive in (*public.archives, *public.lists):
            assert len(archive.checksum or "") in (32, 64), archive
            assert archive.urls or public.by_hand, archive


def test_archives_are_those_of_torchvision() -> None:
    """Where torchvision names them in a way that can be read."""

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
    imagenet = {a.name: a.checksum for a in OFFICIAL["ImageNet"].archives}
    assert imagenet == dict(vision.imagenet.ARCHIVE_META.values())


def test_the_page_on_data_says_what_the_table_says() -> None:
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
    """Downloaded where that is possible, else from where a person put them."""
    files = publish(name, tmp_path / "origin", monkeypatch, server.url)
    by_hand = [a.name for a in facts.SETS[name].archives if not a.urls]
    server.files = {key: value for key, value in files.items() if key not in by_hand}
    root = tmp_path / "data"
    for archive in by_hand:
        put(files, root / "downloads", archive)
    assert not is_complete(name, root)
    arrange(name, root)
    assert is_complete(name, root)
    ours, origin = CLIP8_SETS[name](root), CLIP8_SETS[name](tmp_path / "origin")
    if name == "ImageNet":  # the archive has another order of pictures than of folders
        assert len(ours.train) == len(origin.train)
        assert [shown(ours.test)[i] for i in (0, 500)] == [shown(origin.test)[i] for i in (0, 500)]
    else:
        assert shown(ours.train) == shown(origin.train)
        assert shown(ours.test) == shown(origin.test)
    assert verify(name, root).verdict == "good"
    assert not list(root.rglob("*.part")) and not list(root.glob(".preparing-*"))
    asked = len(server.requests)
    assert asked == len(server.files)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    arrange(name, root)
    assert {path: path.stat().st_mtime_ns for path in before} == before or name == "MNIST"
    assert len(server.requests) == asked


def test_eurosat_is_split_by_class_the_same_way_each_time(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    files = publish("EuroSAT", tmp_path / "origin", monkeypatch)
    splits = []
    for run in ("one", "two"):
        put(files, tmp_path / run / "downloads")
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


def test_eurosat_follows_lists(tmp_path: Path, monkeypatch: Patch) -> None:
    files = publish("EuroSAT", tmp_path / "origin", monkeypatch)
    put(files, tmp_path / "downloads")
    numbers = {"train": (5, 6), "val": (1, 4), "test": (2, 3)}
    for split, pair in numbers.items():
        names = [f"{name}_{i}.jpg" for name in LAND for i in pair]
        write(tmp_path / "downloads" / f"eurosat-{split}.txt", "\n".join(names))
    arrange("EuroSAT", tmp_path)
    for split, pair in numbers.items():
        found = {p.name for p in (tmp_path / "EuroSAT_splits" / split / "River").iterdir()}
        assert found == {f"River_{i}.jpg" for i in pair}


def test_eurosat_splits_of_a_person_are_left_alone(tmp_path: Path, monkeypatch: Patch) -> None:
    files = publish("EuroSAT", tmp_path / "origin", monkeypatch)
    put(files, tmp_path / "downloads")
    picture(tmp_path / "EuroSAT_splits" / "val" / "River" / "River_1.jpg", 3)
    with pytest.raises(
        UsageError,
        match=r"the images in .*EuroSAT_splits are not split as expected; nothing was changed",
    ):
        arrange("EuroSAT", tmp_path)
    assert len(files_below(tmp_path / "EuroSAT_splits", "")) == 1


def test_an_arrangement_that_was_stopped_is_completed(tmp_path: Path, monkeypatch: Patch) -> None:
    files = publish("EuroSAT", tmp_path / "origin", monkeypatch)
    put(files, tmp_path / "downloads")

    def stop(source: Path, target: Path) -> None:
        if len(files_below(tmp_path / "EuroSAT_splits", "")) > 30:
            raise KeyboardInterrupt
        take(source, target)

    take = arrange_module._take
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(arrange_module, "_take", stop)
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
        ("SUN397", "/../../../victim.txt"),
        ("SUN397", "/a/../../victim.txt"),
    ],
)
def test_what_a_list_names_stays_below_its_folder(
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


def replaced(name: str, files: Files, archive: str, content: bytes, patch: Patch) -> None:
    """Another archive, published as if it were the right one."""
    files[archive] = content
    changed = tuple(
        replace(one, checksum=digest(content)) if one.name == archive else one
        for one in facts.SETS[name].archives
    )
    patch.setitem(facts.SETS, name, replace(facts.SETS[name], archives=changed))


def test_a_list_that_is_no_text_is_named(tmp_path: Path, monkeypatch: Patch) -> None:
    files = publish("EuroSAT", tmp_path / "origin", monkeypatch)
    put(files, tmp_path / "downloads")
    for split in ("train", "val", "test"):
        write(tmp_path / "downloads" / f"eurosat-{split}.txt", "River_1.jpg".encode("utf-16"))
    with pytest.raises(UsageError, match=r"eurosat-train\.txt cannot be read as a text in UTF-8"):
        arrange("EuroSAT", tmp_path)


@pytest.mark.parametrize("name", ["ILSVRC2012_val_x.JPEG", "ILSVRC2012_val_00000002.JPEG"])
def test_validation_pictures_of_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} is not one of the [\d,]+ validation images"):
        arrange_module._synset({1: "n01440764"}, Path(name))


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


def test_cars_as_kaggle_has_them(tmp_path: Path, monkeypatch: Patch) -> None:
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
def test_folders_that_a_person_unpacked_are_used(
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


def test_imagenet_validation_pictures_that_lie_flat_are_sorted(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    files = publish("ImageNet", tmp_path / "origin", monkeypatch)
    root = tmp_path / "data"
    put(files, root / "downloads", "ILSVRC2012_img_train.tar", "ILSVRC2012_devkit_t12.tar.gz")
    write(root / "x.tar", files["ILSVRC2012_img_val.tar"])
    (root / "imagenet" / "val").mkdir(parents=True)
    unpack.unpack(root / "x.tar", root / "imagenet" / "val")
    arrange("ImageNet", root)
    assert is_complete("ImageNet", root)
    first = root / "imagenet" / "val_in_folder" / "n01440764"
    assert sorted(p.name for p in first.iterdir()) == [
        f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2)
    ]


# Downloads


CONTENT = bytes(range(256)) * 9_000  # more than two chunks


def published(server: Server, checksum: str | None = None) -> tuple[str, Archive]:
    server.files = {"file.bin": CONTENT}
    archive = Archive("file.bin", (f"{server.url}file.bin",), checksum or digest(CONTENT))
    return archive.urls[0], archive


def test_a_broken_download_is_continued_at_once(server: Server, tmp_path: Path) -> None:
    url, archive = published(server)
    server.cut, server.cuts = 1_500_000, 1
    path = download(url, archive, tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.requests == [("file.bin", 0), ("file.bin", 1_500_000)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_download_is_continued_by_the_next_run(server: Server, tmp_path: Path) -> None:
    url, archive = published(server)
    server.cut, server.cuts = 500_000, 3
    with pytest.raises(OSError, match=r"broke 3 times .*1,500,000 bytes are kept"):
        download(url, archive, tmp_path)
    assert (tmp_path / "file.bin.part").stat().st_size == 1_500_000
    assert download(url, archive, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == ("file.bin", 1_500_000)


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    url, archive = published(server)
    server.cut, server.cuts, server.ranges = 700_000, 1, False
    assert download(url, archive, tmp_path).read_bytes() == CONTENT


def test_a_whole_part_needs_no_more(server: Server, tmp_path: Path) -> None:
    url, archive = published(server)
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert download(url, archive, tmp_path).read_bytes() == CONTENT


def test_another_file_is_refused_and_dropped(server: Server, tmp_path: Path) -> None:
    url, archive = published(server, "0" * 32)
    with pytest.raises(UsageError, match=rf"expected checksum 0{{32}}, got {digest(CONTENT)}"):
        download(url, archive, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_a_download(server: Server, tmp_path: Path, monkeypatch: Patch) -> None:
    url, archive = published(server)

    def full(file: object) -> Iterator[bytes]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch, "_chunks", full)
    both = replace(archive, urls=(url, url))
    place = Place("DTD", replace(SETS["DTD"], archives=(both,)), tmp_path)
    with pytest.raises(UnwritableError, match=r"file\.bin\.part: No space left"):
        place.archive("file.bin")
    assert len(server.requests) == 1


def test_an_archive_that_was_cut_is_refused_where_a_person_put_it(tmp_path: Path) -> None:
    write(tmp_path / "downloads" / "file.bin", CONTENT[:-1])
    archive = Archive("file.bin", (), digest(CONTENT))
    place = Place("DTD", replace(SETS["DTD"], archives=(archive,)), tmp_path)
    with pytest.raises(UsageError, match=r"is not the published file\.bin.*It is incomplete"):
        place.archive("file.bin")


def test_checksums_may_be_sha256(tmp_path: Path) -> None:
    write(tmp_path / "f", CONTENT)
    check_sum(tmp_path / "f", Archive("f", (), hashlib.sha256(CONTENT).hexdigest()))
    with pytest.raises(UsageError, match="is not the published f"):
        check_sum(tmp_path / "f", Archive("f", (), "1" * 64))


@pytest.mark.parametrize("first", [None, b"<html>moved</html>"])
def test_the_next_address_is_tried(first: bytes | None, server: Server, tmp_path: Path) -> None:
    url, archive = published(server)
    if first is not None:
        server.files["first.bin"] = first
    both = replace(archive, urls=(f"{server.url}first.bin", url))
    public = replace(SETS["DTD"], archives=(both,))
    path = Place("DTD", public, tmp_path).archive("file.bin")
    assert path == tmp_path / "downloads" / "file.bin" and path.read_bytes() == CONTENT
    assert [name for name, _ in server.requests] == ["first.bin", "file.bin"]


def test_a_file_that_is_gone_is_named_with_where_to_get_it(
    server: Server, tmp_path: Path, monkeypatch: Patch
) -> None:
    publish("DTD", tmp_path / "origin", monkeypatch, server.url)
    with pytest.raises(MissingFileError) as caught:
        arrange("DTD", tmp_path)
    message = str(caught.value)
    assert f"{server.url}dtd-r1.0.1.tar.gz: HTTP Error 404" in message
    assert "https://www.robots.ox.ac.uk/~vgg/data/dtd/" in message
    assert f"Put the file into {tmp_path / 'downloads'} and run again" in message


def test_without_a_network_the_way_out_is_named(tmp_path: Path, monkeypatch: Patch) -> None:
    publish("DTD", tmp_path / "origin", monkeypatch, "http://127.0.0.1:9/")
    with pytest.raises(MissingFileError, match=r"could not be downloaded .*refused.*downloads"):
        arrange("DTD", tmp_path)


def test_what_a_person_must_fetch_is_not_asked_for(tmp_path: Path, monkeypatch: Patch) -> None:
    publish("Cars", tmp_path / "origin", monkeypatch)

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    with pytest.raises(MissingFileError, match=r"car_devkit\.tgz is missing.*issues/7545"):
        arrange("Cars", tmp_path)


# Archives


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "C:\\evil", "..\\evil"])
@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz", "a.tar"])
def test_names_that_lead_out_of_the_folder_are_refused(
    name: str, kind: str, tmp_path: Path
) -> None:
    files = {"good": b"1", name: b"2"}
    if kind == "a.zip":
        content = zip_bytes(files)
    else:
        content = tar_bytes(files, "w:gz" if kind.endswith("gz") else "w")
    write(tmp_path / kind, content)
    target = tmp_path / "in" / "target"
    target.mkdir(parents=True)
    with pytest.raises(UsageError, match=r"is refused: it names '.*evil', which leads out"):
        unpack.unpack(tmp_path / kind, target)
    assert {p.name for p in tmp_path.rglob("*")} <= {kind, "in", "target", "good"}
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("innocent.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    write(tmp_path / "a.tar", stream.getvalue())
    with pytest.raises(UsageError, match=r"member 'innocent.jpg' is a link or a device"):
        unpack.unpack(tmp_path / "a.tar", tmp_path)


def test_links_in_zip_archives_are_refused(tmp_path: Path) -> None:
    member = zipfile.ZipInfo("innocent.jpg")
    member.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(UsageError, match=r"is a link or a device"):
        unpack.unpack(tmp_path / "a.zip", tmp_path)


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz", "a.tar.xz", "a.tar.bz2", "a.gz"])
def test_archives_that_grow_without_bounds_are_refused(
    kind: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(unpack, "SPARE", 1_000)
    files = {f"{i}": bytes(1 << 20) for i in range(8)}
    if kind == "a.zip":
        content = zip_bytes(files)
    else:
        how = kind.rpartition(".")[2]
        content = gzip.compress(bytes(8 << 20)) if kind == "a.gz" else tar_bytes(files, f"w:{how}")
    write(tmp_path / kind, content)
    (tmp_path / "to").mkdir()
    with pytest.raises(UsageError, match="unpacks to more than"):
        unpack_any(tmp_path / kind, tmp_path / "to")
    written = sum(p.stat().st_size for p in (tmp_path / "to").rglob("*") if p.is_file())
    assert written <= 1_000 + 100 * (tmp_path / kind).stat().st_size


def unpack_any(archive: Path, folder: Path) -> None:
    if archive.name.count(".") == 1 and archive.suffix == ".gz":
        unpack.gunzip(archive, folder / "x")
    else:
        unpack.unpack(archive, folder)


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


LONG = 64 << 20
END = bytes(1024)
TARS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a long name": (lambda: tar_member("x", b"L", bytes(LONG)), "header of 67,108,864 bytes"),
    "a long link name": (lambda: tar_member("x", b"K", bytes(LONG)), "header of 67,108,864"),
    "a long record": (
        lambda: tar_member("x", b"x", record("path", "a" * LONG)), r"header of 67,108,8\d\d bytes",
    ),
    "a long record for all": (
        lambda: tar_member("x", b"g", record("comment", "a" * LONG)), "has a header of 67,108",
    ),
    "a record without an end": (
        lambda: tar_member("x", b"x", b"9" * 16_000 + b" hdrcharset="), "another length",
    ),
    "a record of no length": (lambda: tar_member("x", b"x", b"0 path=\n"), "another length"),
    "a record that is too long": (lambda: tar_member("x", b"x", b"9999 a=b\n"), "another length"),
    "a size of a million digits": (
        lambda: tar_member("x", b"x", record("size", "9" * 15_000)) + tar_member("x"),
        "is damaged .*ValueError",
    ),
    "a negative size": (
        lambda: tar_member("x", b"x", record("size", "-1")) + tar_member("x"), "of -1 bytes",
    ),
    "a sparse file": (lambda: tar_member("x", b"S"), "is a sparse file"),
    "a sparse file by records": (
        lambda: tar_member("x", b"x", record("GNU.sparse.major", "1")) + tar_member("x"),
        "is a sparse file",
    ),
    "a size beyond the end": (lambda: tar_member("x", size=1 << 20), "damaged or truncated"),
    "a size beyond the disk": (lambda: tar_member("x", size=1 << 60), "unpacks to more"),
    "no end": (lambda: tar_member("x"), "damaged or truncated"),
    "headers without files": (lambda: tar_member("x", b"5") * 16_000 + END, "unpacks to more"),
    "a file as a folder": (lambda: tar_member("x") + tar_member("x/y") + END, "cannot be written"),
    "a folder as a file": (lambda: tar_member("x/y") + tar_member("x") + END, "cannot be written"),
    "a name that is too long": (
        lambda: tar_member("x", b"L", b"a" * 5000) + tar_member("x") + END, "cannot be written",
    ),
    "a name that leads out by records": (
        lambda: tar_member("x", b"x", record("path", "../evil")) + tar_member("x") + END,
        r"names '\.\./evil', which leads out",
    ),
    "a name that leads out by a long name": (
        lambda: tar_member("x", b"L", b"/tmp/evil\0") + tar_member("x") + END, "leads out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", TARS)
def test_headers_of_tar_archives_are_not_trusted(label: str, tmp_path: Path) -> None:
    content, message = TARS[label]
    write(tmp_path / "a.tar.gz", gzip.compress(content(), 1))
    (tmp_path / "to").mkdir()
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=message):
            unpack.unpack(tmp_path / "a.tar.gz", tmp_path / "to")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_packed_archive_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    packed = bytearray(lzma.compress(tar_bytes({"x": b""}, "w"), preset=0))
    # the size of the dictionary is a byte of the header of the first block, which has a checksum
    assert packed[12:16] == bytes([2, 0, 0x21, 1])
    packed[16] = 37  # 1 GiB and a half
    packed[20:24] = zlib.crc32(packed[12:20]).to_bytes(4, "little")
    write(tmp_path / "a.tar.xz", bytes(packed))
    with pytest.raises(UsageError, match=r"damaged or truncated .*[Mm]emory"):
        unpack.unpack(tmp_path / "a.tar.xz", tmp_path)


@pytest.mark.parametrize("how", ["", *PACKED])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_all_writers_are_unpacked(how: str, form: int, tmp_path: Path) -> None:
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
    packed = {
        "a.zip": lambda: zip_bytes(files),
        "a.gz": lambda: gzip.compress(b"".join(files.values())),
        "a.tgz": lambda: tar_bytes(files),
        "a.tar.xz": lambda: tar_bytes(files, "w:xz"),
        "a.tar.bz2": lambda: tar_bytes(files, "w:bz2"),
    }
    whole = packed[kind]()
    wanted = {"x": b"".join(files.values())} if kind == "a.gz" else files
    caught = 0
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
            caught += 1
        else:  # a time or an owner
            assert {p.name: p.read_bytes() for p in folder.iterdir()} == wanted
    assert caught > 20


def zip_of(*entries: tuple[str, int, int], size: int = 1000) -> bytes:
    """A zip archive whose directory has these names, offsets and sizes."""
    directory = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, count, count, len(name),
                    0, 0, 0, 0, 0, offset) + name.encode()
        for name, offset, count in entries
    )  # fmt: skip
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(directory), size, 0)
    return bytes(size) + directory + end


ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    "members that overlap": (lambda: zip_of(("a", 0, 900), ("b", 100, 800)), "members overlap"),
    "one member twice": (lambda: zip_of(("a", 0, 900), ("b", 0, 900)), "members overlap"),
    "a member in the directory": (lambda: zip_of(("a", 0, 1000)), "overlaps the directory"),
    "a long directory": (
        lambda: zip_of(*[(f"{i}", 0, 0) for i in range(400_000)]), "directory is longer",
    ),
    "a directory that is said to be long": (
        lambda: zip_of()[:-10] + struct.pack("<2IH", 2**32 - 2, 0, 0), "damaged or truncated",
    ),
    "another way of packing": (lambda: zipped(zipfile.ZIP_LZMA), "but not by deflate"),
}  # fmt: skip


def zipped(how: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        archive.writestr("a", bytes(100))
    return stream.getvalue()


@pytest.mark.parametrize("label", ZIPS)
def test_directories_of_zip_archives_are_not_trusted(label: str, tmp_path: Path) -> None:
    content, message = ZIPS[label]
    write(tmp_path / "a.zip", content())
    with pytest.raises(UsageError, match=message):
        unpack.unpack(tmp_path / "a.zip", tmp_path)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: Patch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path / "a.tar", tar_bytes({"x": b"1"}, "w"))
    monkeypatch.setattr(unpack._Part, "read", full)
    with pytest.raises(UnwritableError, match=r"cannot write .*x: No space left"):
        unpack.unpack(tmp_path / "a.tar", tmp_path)


def test_a_pointer_of_git_lfs_is_recognised(tmp_path: Path) -> None:
    write(tmp_path / "a.zip", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UsageError, match=r"a\.zip is a Git LFS pointer.*git lfs pull"):
        unpack.unpack(tmp_path / "a.zip", tmp_path)


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz", "a.tar", "a.gz"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_damaged_archives_are_named(kind: str, share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(200_000)
    whole = {
        "a.zip": zip_bytes({"x": noise}),
        "a.tar.gz": tar_bytes({"x": noise}),
        "a.tar": tar_bytes({"x": noise}, "w"),
        "a.gz": gzip.compress(noise),
    }[kind]
    write(tmp_path / kind, whole[: int(share * len(whole))] or b"no archive")
    with pytest.raises(UsageError, match=rf"{kind} is damaged or truncated .*run again"):
        if kind == "a.gz":
            unpack.gunzip(tmp_path / kind, tmp_path / "x")
        else:
            unpack.unpack(tmp_path / kind, tmp_path)
    assert kind != "a.gz" or not (tmp_path / "x").exists()


def test_rar_archives_are_for_other_tools(tmp_path: Path, monkeypatch: Patch) -> None:
    publish("RESISC45", tmp_path / "origin", monkeypatch)
    write(tmp_path / "downloads" / "NWPU-RESISC45.rar", b"Rar!")
    with pytest.raises(UsageError, match=r"NWPU-RESISC45\.rar .*unar, 7z x or bsdtar -xf"):
        arrange("RESISC45", tmp_path)


def test_a_hostile_archive_writes_nothing_anywhere(tmp_path: Path, monkeypatch: Patch) -> None:
    files = publish("DTD", tmp_path / "origin", monkeypatch)
    files["dtd-r1.0.1.tar.gz"] = tar_bytes({"dtd/labels/test1.txt": b"", "../evil": b"x"})
    archive = Archive("dtd-r1.0.1.tar.gz", (), digest(files["dtd-r1.0.1.tar.gz"]))
    monkeypatch.setitem(facts.SETS, "DTD", replace(facts.SETS["DTD"], archives=(archive,)))
    put(files, tmp_path / "data" / "downloads")
    with pytest.raises(UsageError, match=r"names '\.\./evil', which leads out of its folder"):
        arrange("DTD", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == [tmp_path / "data" / "downloads"]
    assert not (tmp_path / "evil").exists()


# Verification


def prepared(name: str, root: Path, patch: Patch) -> Path:
    """A miniature in our layout that the table of facts describes."""
    publish(name, root, patch)
    return root


def test_a_train_picture_in_the_test_folder_under_another_name_is_found(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    root = prepared("DTD", tmp_path, monkeypatch)
    assert verify("DTD", root).verdict == "good"
    copy = root / "dtd" / "val" / "woven" / "woven_80.jpg"
    copy.write_bytes((root / "dtd" / "train" / "banded" / "banded_040.jpg").read_bytes())
    report = verify("DTD", root)
    assert (report.verdict, report.shared) == ("wrong", 1)
    assert report.errors == [
        "dtd/train/banded/banded_040.jpg and dtd/val/woven/woven_80.jpg are the same image in two "
        "splits, so test data would be trained on"
    ]


def test_a_leak_that_the_loader_refuses_is_reported_with_all_its_pictures(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    root = prepared("EuroSAT", tmp_path, monkeypatch)
    for split in ("train", "val", "test"):
        for i, name in enumerate(LAND):
            picture(root / "EuroSAT_splits" / split / name / f"{name}_7.jpg", 10 + i)
    report = verify("EuroSAT", root)
    leaks = [error for error in report.errors if "two splits" in error]
    assert report.shared == len(leaks) == len(LAND)
    assert all("train" in e and "val" in e and "test" in e for e in leaks)


def test_the_validation_list_of_resisc45_counts_too(tmp_path: Path, monkeypatch: Patch) -> None:
    root = prepared("RESISC45", tmp_path, monkeypatch)
    assert verify("RESISC45", root).verdict == "good"
    with (root / "resisc45" / "resisc45-val.txt").open("a") as file:
        file.write("beach_001.jpg\n")
    report = verify("RESISC45", root)
    assert report.found["val"] == 46 and report.shared == 1
    assert any("NWPU-RESISC45/beach/beach_001.jpg" in error for error in report.errors)


def test_copies_within_a_split_are_a_note(tmp_path: Path, monkeypatch: Patch) -> None:
    report = verify("DTD", prepared("DTD", tmp_path, monkeypatch))
    assert "train: 46 images are duplicates" in report.notes
    assert report.verdict == "good"


def test_shared_pictures_of_a_sealed_set_are_a_note(tmp_path: Path, monkeypatch: Patch) -> None:
    root = prepared("SVHN", tmp_path, monkeypatch)
    report = verify("SVHN", root)
    assert report.verdict == "good" and report.shared == 1  # a zero in both
    assert "train image 2 and test image 1 are the same image in two splits, as published" in (
        report.notes
    )
    public = replace(facts.SETS["SVHN"], sealed=False)
    monkeypatch.setitem(facts.SETS, "SVHN", public)
    assert verify("SVHN", root).verdict == "wrong"


def test_counts_are_compared(tmp_path: Path, monkeypatch: Patch) -> None:
    root = prepared("DTD", tmp_path, monkeypatch)
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


@pytest.mark.parametrize("num_workers", [1, 2])
def test_truncated_and_missing_pictures_are_named(
    num_workers: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    root = prepared("Cars", tmp_path, monkeypatch)
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


def test_what_the_loader_refuses_is_wrong_and_what_is_not_there_missing(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    root = prepared("SUN397", tmp_path, monkeypatch)
    (root / "sun397" / "val" / "a_abbey").rename(root / "sun397" / "val" / "a_abbot")
    report = verify("SUN397", root)
    assert report.verdict == "wrong" and "same class folders" in report.errors[0]
    report = verify("MNIST", root)
    assert report.verdict == "missing" and "MNIST/raw/train-images" in report.errors[0]


def test_imagenet_training_pictures_are_read_only_if_asked_for(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    root = prepared("ImageNet", tmp_path, monkeypatch)
    victim = next((root / "imagenet" / "train").rglob("*.JPEG"))
    victim.write_bytes(b"no picture")
    report = verify("ImageNet", root)
    assert report.verdict == "good" and report.found["train"] == 1001
    assert "train: counted only; --thorough reads its images too" in report.notes
    report = verify("ImageNet", root, thorough=True)
    assert report.verdict == "wrong" and report.unreadable == 1


def test_what_was_verified_and_has_not_changed_is_not_read_again(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    root = prepared("DTD", tmp_path, monkeypatch)
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
