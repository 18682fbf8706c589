"""The public data sets as they are published, in miniature: archives, and a server of them."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from tangent_arithmetic.data.base import Pictures
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.data.prepare import facts
from tangent_arithmetic.data.prepare.facts import Archive, Figure, OfficialSet
from tangent_arithmetic.data.prepare.verify import splits_of
from tests.miniatures import LAND, MAKERS, picture, write

Files = dict[str, bytes]  # content by name
EUROSAT_PICTURES = 6  # of each class


def files_below(folder: Path, inner: str) -> Files:
    """All files below a folder, by their names in an archive that has them below `inner`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{inner}/{path.relative_to(folder)}": path.read_bytes() for path in paths}


def tar_bytes(files: Files, mode: str = "w:gz") -> bytes:
    """A tar archive."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def zip_bytes(files: Files) -> bytes:
    """A zip archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


# From our layout back to what is published


def publish_cars(root: Path) -> Files:
    """One archive a folder, the labels of the test pictures beside them."""
    folder = root / "stanford_cars"
    labels = "cars_test_annos_withlabels.mat"
    return {
        "car_devkit.tgz": tar_bytes(files_below(folder / "devkit", "devkit")),
        "cars_train.tgz": tar_bytes(files_below(folder / "cars_train", "cars_train")),
        "cars_test.tgz": tar_bytes(files_below(folder / "cars_test", "cars_test")),
        labels: (folder / labels).read_bytes(),
    }


def publish_dtd(root: Path) -> Files:
    """All pictures by class, ten splits as lists; here the first."""
    files, lists = {}, {"train1": "", "val1": "", "test1": ""}
    for split, names in {"train": ("train1", "val1"), "val": ("test1", "test1")}.items():
        for i, (name, content) in enumerate(files_below(root / "dtd" / split, "x").items()):
            files[f"dtd/images/{name[2:]}"] = content
            lists[names[i % 2]] += f"{name[2:]}\n"
    files |= {f"dtd/labels/{name}.txt": text.encode() for name, text in lists.items()}
    return {"dtd-r1.0.1.tar.gz": tar_bytes(files)}


def publish_eurosat(root: Path) -> Files:
    """All pictures by class, each another one."""
    for i, name in enumerate(LAND):
        for j in range(EUROSAT_PICTURES):
            picture(root / "2750" / name / f"{name}_{j + 1}.jpg", 20 * i + 3 * j)
    return {"EuroSAT.zip": zip_bytes(files_below(root / "2750", "2750"))}


def publish_gtsrb(root: Path) -> Files:
    """Training pictures, test pictures with a table without labels, the labels."""
    folder = root / "gtsrb" / "GTSRB"
    table = (root / "gtsrb" / "GT-final_test.csv").read_bytes()
    test = files_below(folder / "Final_Test" / "Images", "GTSRB/Final_Test/Images")
    test["GTSRB/Final_Test/Images/GT-final_test.test.csv"] = b"Filename;Width\n"
    return {
        "GTSRB-Training_fixed.zip": zip_bytes(files_below(folder / "Training", "GTSRB/Training")),
        "GTSRB_Final_Test_Images.zip": zip_bytes(test),
        "GTSRB_Final_Test_GT.zip": zip_bytes({"GT-final_test.csv": table}),
    }


def publish_imagenet(root: Path) -> Files:
    """An archive of archives, flat validation pictures, and a kit that says which is what."""
    folder, synsets, val, truth = root / "imagenet", {}, {}, []
    names = sorted(path.name for path in (folder / "train").iterdir())
    for number, synset in enumerate(names):
        content = files_below(folder / "train" / synset, ".")
        synsets[f"{synset}.tar"] = tar_bytes({k[2:]: v for k, v in content.items()}, "w")
        for picture_bytes in files_below(folder / "val_in_folder" / synset, "x").values():
            truth.append(f"{len(names) - number}\n")
            val[f"ILSVRC2012_val_{len(truth):08d}.JPEG"] = picture_bytes
    table = np.zeros((len(names), 1), dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    for row, name in zip(table[:, 0], reversed(names), strict=True):
        row["WNID"] = name
    table["ILSVRC2012_ID"][:, 0] = range(1, len(names) + 1)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": table})
    kit = {"meta.mat": meta.getvalue()}
    kit["ILSVRC2012_validation_ground_truth.txt"] = "".join(truth).encode()
    kit = {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in kit.items()}
    return {
        "ILSVRC2012_img_train.tar": tar_bytes(synsets, "w"),
        "ILSVRC2012_img_val.tar": tar_bytes(val, "w"),
        "ILSVRC2012_devkit_t12.tar.gz": tar_bytes(kit),
    }


def publish_mnist(root: Path) -> Files:
    """Four packed files."""
    return {path.name: path.read_bytes() for path in (root / "MNIST" / "raw").glob("*.gz")}


def publish_resisc45(root: Path) -> Files:
    """All pictures by class, and lists of names."""
    folder = root / "resisc45"
    pictures = files_below(folder / "NWPU-RESISC45", "NWPU-RESISC45")
    lists = {path.name: path.read_bytes() for path in folder.glob("*.txt")}
    return {"NWPU-RESISC45.zip": zip_bytes(pictures), **lists}


def publish_sun397(root: Path) -> Files:
    """Folders of folders, of which the lists name a part."""
    files, lists = {"SUN397/ClassName.txt": b""}, {}
    for split, name in {"train": "Training_01.txt", "val": "Testing_01.txt"}.items():
        lines = []
        for path, content in files_below(root / "sun397" / split, "").items():
            line = re.sub(
                r"^/(\w)_(place_)?", lambda m: f"/{m[1]}/{'place/' if m[2] else ''}", path
            )
            files[f"SUN397{line}"] = content
            lines.append(line)
        lists[name] = "\n".join(lines).encode()
    files["SUN397/a/abbey/sun_not_in_any_list.jpg"] = b"no picture"
    return {"SUN397.tar.gz": tar_bytes(files), "Partitions.zip": zip_bytes(lists)}


def publish_svhn(root: Path) -> Files:
    """Two files, as they are read."""
    return {path.name: path.read_bytes() for path in (root / "svhn").glob("*_32x32.mat")}


def publish_emnist(root: Path) -> Files:
    """All parts packed one by one, in one archive."""
    raw = files_below(root / "EMNIST" / "EMNIST" / "raw", "gzip")
    packed = {f"{name}.gz": gzip.compress(content) for name, content in raw.items()}
    return {"gzip.zip": zip_bytes({**packed, "gzip/emnist-mapping.txt.gz": b"not wanted"})}


def publish_packed(folder: str, prefix: str = "") -> Callable[[Path], Files]:
    """All files packed one by one."""
    return lambda root: {
        f"{prefix}{path.name}.gz": gzip.compress(path.read_bytes())
        for path in (root / folder).iterdir()
    }


def publish_flowers102(root: Path) -> Files:
    """The pictures, and two tables."""
    folder = root / "flowers102" / "flowers-102"
    tables = {path.name: path.read_bytes() for path in folder.glob("*.mat")}
    return {"102flowers.tgz": tar_bytes(files_below(folder / "jpg", "jpg")), **tables}


def publish_pets(root: Path) -> Files:
    """The pictures, and the lists beside what else is annotated."""
    folder = root / "OxfordIIITPet" / "oxford-iiit-pet"
    images = files_below(folder / "images", "images")
    lists = files_below(folder / "annotations", "annotations")
    return {
        "images.tar.gz": tar_bytes({**images, "images/Abyssinian_1.mat": b"not wanted"}),
        "annotations.tar.gz": tar_bytes({**lists, "annotations/trimaps/pug_1.png": b"not wanted"}),
    }


def publish_folder(folder: str, name: str) -> Callable[[Path], Files]:
    """One folder in one packed archive."""
    pack = zip_bytes if name.endswith(".zip") else tar_bytes
    return lambda root: {name: pack(files_below(root / folder, Path(folder).name))}


PUBLISHERS: dict[str, Callable[[Path], Files]] = {
    "Cars": publish_cars,
    "CIFAR10": publish_folder("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "CIFAR100": publish_folder("cifar-100-python", "cifar-100-python.tar.gz"),
    "DTD": publish_dtd,
    "EMNIST": publish_emnist,
    "EMNISTLetters": publish_emnist,
    "EuroSAT": publish_eurosat,
    "FashionMNIST": publish_packed("FashionMNIST/FashionMNIST/raw", "FashionMNIST-"),
    "FER2013": lambda root: {"fer2013.csv": (root / "fer2013" / "fer2013.csv").read_bytes()},
    "Flowers102": publish_flowers102,
    "Food101": publish_folder("food101/food-101", "food-101.tar.gz"),
    "GTSRB": publish_gtsrb,
    "ImageNet": publish_imagenet,
    "KMNIST": publish_packed("KMNIST/KMNIST/raw", "KMNIST-"),
    "MNIST": publish_mnist,
    "OxfordIIITPet": publish_pets,
    "PCAM": publish_packed("PCAM/pcam"),
    "RenderedSST2": publish_folder("RenderedSST2/rendered-sst2", "rendered-sst2.tgz"),
    "RESISC45": publish_resisc45,
    "STL10": publish_folder("stl10/stl10_binary", "stl10_binary.tar.gz"),
    "SUN397": publish_sun397,
    "SVHN": publish_svhn,
    "TinyImageNet": publish_folder("tiny-imagenet-200", "tiny-imagenet-200.zip"),
}


# A server


@dataclass
class Server:
    """Files by HTTP, with ranges.

    Attributes:
        url: the address, ending with a slash.
        files: the served files.
        cut: bytes after which the connection breaks, as long as `cuts` is above zero.
        cuts: replies that break.
        ranges: whether a part of a file can be requested.
        requests: (name, first byte requested), in order.
    """

    url: str = ""
    files: Files = field(default_factory=dict)
    cut: int = 0
    cuts: int = 0
    ranges: bool = True
    requests: list[tuple[str, int]] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[Server]:
    """A server on this machine, until the block ends."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path[1:]
            start = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
            server.requests.append((name, start))
            if name not in server.files:
                self.send_error(404)
                return
            start = start if server.ranges else 0
            content = server.files[name][start:]
            if start and not content:
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if server.cuts > 0:
                server.cuts -= 1
                content = content[: server.cut]
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.02,))
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def digest(content: bytes) -> str:
    """A checksum as MD5."""
    return hashlib.md5(content).hexdigest()


def counted(pictures: Pictures, public: OfficialSet) -> Figure:
    """The figure that a split of a miniature has."""
    labels = labels_of(pictures).tolist()
    return Figure(len(labels), tuple(labels.count(label) for label in range(public.classes)))


def publish(name: str, origin: Path, patch: pytest.MonkeyPatch, url: str = "") -> Files:
    """Makes a miniature in `origin` and describes its archives in the table of facts.

    Args:
        name: the data set.
        origin: folder of the miniature.
        patch: undoes the change of the table.
        url: the server of the archives; those that a person must fetch have no address.

    Returns:
        The archives.
    """
    origin.mkdir(parents=True, exist_ok=True)
    MAKERS[name](origin, patch)
    files = PUBLISHERS[name](origin)
    public = facts.SETS[name]

    def served(archive: Archive) -> Archive:
        urls = (f"{url}{archive.name}",) if archive.urls and url else ()
        return Archive(archive.name, urls, digest(files[archive.name]))

    if name == "EuroSAT":
        figures = {"train": Figure(20, 2), "val": Figure(20, 2), "test": Figure(20, 2)}
        patch.setattr("tangent_arithmetic.data.prepare.arrange.EUROSAT_HELD_OUT", 2)
    else:
        figures = {split: counted(p, public) for split, p in splits_of(name, origin).items()}
    small = replace(
        public,
        splits={split: figures[split] for split in public.splits},
        archives=tuple(map(served, public.archives)),
        lists=tuple(map(served, public.lists)),
    )
    patch.setitem(facts.SETS, name, small)
    return files


def put(files: Files, folder: Path, *names: str) -> None:
    """Writes some of the files, or all."""
    for name in names or files:
        write(folder / name, files[name])
