"""Published facts about each public data set: its archives and its numbers of images.

Checksums and URLs of archives are the ones that torchvision and torchgeo use, those of TinyImageNet
avalanche's. Figures that no document of the source states are marked as unconfirmed: deviations are
notes, not errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """A published file.

    Attributes:
        name: of the file.
        urls: mirrors that need no registration, in the order to try.
        checksum: its MD5 (32 digits) or SHA-256 (64 digits); None if none is published.
    """

    name: str
    urls: tuple[str, ...] = ()
    checksum: str | None = None


@dataclass(frozen=True)
class Figure:
    """The number of images of a split.

    Attributes:
        total: number of images.
        per_class: number of images of every class, or of each class in the order of the labels;
            None if classes differ in size and no figures are published.
        confirmed: whether a document of the source states `per_class`.
    """

    total: int
    per_class: int | tuple[int, ...] | None = None
    confirmed: bool = True

    def of_class(self, label: int) -> int | None:
        """The number of images of a class; None if unknown."""
        return self.per_class[label] if isinstance(self.per_class, tuple) else self.per_class


@dataclass(frozen=True)
class OfficialSet:
    """One public data set.

    Attributes:
        folder: its folder below the data root.
        classes: number of classes.
        splits: the figures, by split.
        source: where the figures are published.
        page: the official web page.
        archives: its files.
        lists: published lists of its splits.
        by_hand: instructions for archives that cannot be downloaded automatically.
        sealed: whether its reader verifies all files by published checksums, so that an image in
            two splits was published that way.
        licence: of the data, as the source states it; "" if `page` says more.
    """

    folder: str
    classes: int
    splits: Mapping[str, Figure]
    source: str
    page: str
    archives: tuple[Archive, ...]
    lists: tuple[Archive, ...] = ()
    by_hand: str = ""
    sealed: bool = False
    licence: str = ""

    def archive(self, name: str) -> Archive:
        """The archive or list of this name; for other names, one without URL and checksum."""
        named = {item.name: item for item in (*self.archives, *self.lists)}
        return named.get(name, Archive(name))


_MNIST = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
_GTSRB = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
_STL = "stanford.edu/~acoates/stl10/"
_SVHN = "http://ufldl.stanford.edu/housenumbers/"
_SUN = "vision.princeton.edu/projects/2010/SUN/"
_DTD = "https://www.robots.ox.ac.uk/~vgg/data/dtd/"
_EUROSAT = (
    "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
    "c877bcd43f099cd0196738f714544e355477f3fd/",
    "https://madm.dfki.de/files/sentinel/",
)
_RESISC = (
    "https://huggingface.co/datasets/isaaccorley/resisc45/resolve/"
    "883edc0eee77b2c84225472f10f126e3ed83fa6e/"
)
_RSR = "https://storage.googleapis.com/remote_sensing_representations/"
# fmt: off
_GTSRB_TEST = (
    60, 720, 750, 450, 660, 630, 150, 450, 450, 480, 660, 420, 690, 720, 270, 210, 150, 360, 390,
    60, 90, 90, 120, 150, 90, 480, 180, 60, 150, 90, 150, 270, 60, 210, 120, 390, 120, 60, 690, 90,
    90, 60, 90,
)
# fmt: on


_FER = (
    "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-"
    "challenge"
)
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
_PCAM = "https://zenodo.org/record/2546921/files/"
_TINY = "cs231n.stanford.edu/"


def _at(name: str, checksum: str, *folders: str) -> Archive:
    """An archive that can be downloaded from these folders, whose URLs end in a slash."""
    return Archive(name, tuple(folder + name for folder in folders), checksum)


def _unconfirmed(*per_class: int) -> Figure:
    """The figure of a split with these numbers of images, by label."""
    return Figure(sum(per_class), per_class, confirmed=False)


def _idx(name: str, page: str, folder: str, *checksums: str) -> OfficialSet:
    """A set with the files, and the number of images, of MNIST, and classes of equal size."""
    kinds = ("images-idx3", "labels-idx1")
    files = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in kinds]
    return OfficialSet(
        folder=f"{name}/{name}/raw",
        classes=10,
        splits={"train": Figure(60_000, 6_000), "test": Figure(10_000, 1_000)},
        source=page,
        page=page,
        archives=tuple(  # named apart from MNIST's
            Archive(f"{name}-{file}", (folder + file,), checksum)
            for file, checksum in zip(files, checksums, strict=True)
        ),
    )


def _emnist(classes: int, train: int, test: int) -> OfficialSet:
    page = "https://www.nist.gov/itl/products-and-services/emnist-dataset"
    folder = "https://biometrics.nist.gov/cs_links/EMNIST/"
    return OfficialSet(
        folder="EMNIST/EMNIST/raw",
        classes=classes,
        splits={
            "train": Figure(classes * train, train, confirmed=False),
            "test": Figure(classes * test, test, confirmed=False),
        },
        source="arXiv:1702.05373 (digits); the files, whose letters differ from it (letters)",
        page=page,
        archives=(_at("gzip.zip", "58c8d27c78d21e728a6bc7b3cc06412e", folder),),
    )


def _cifar(classes: int, per_class: int, checksum: str) -> OfficialSet:
    page = "https://www.cs.toronto.edu/~kriz/"
    return OfficialSet(
        folder="cifar-10-batches-py" if classes == 10 else f"cifar-{classes}-python",
        classes=classes,
        splits={"train": Figure(50_000, 5 * per_class), "test": Figure(10_000, per_class)},
        source=f"{page}cifar.html",
        page=f"{page}cifar.html",
        archives=(_at(f"cifar-{classes}-python.tar.gz", checksum, page),),
        sealed=True,
    )


SETS: dict[str, OfficialSet] = {
    "Cars": OfficialSet(
        folder="stanford_cars",
        classes=196,
        splits={"train": Figure(8_144), "test": Figure(8_041)},
        source="torchvision's documentation of StanfordCars; classes differ in size",
        page="https://ai.stanford.edu/~jkrause/cars/car_dataset.html (gone)",
        archives=(
            Archive("car_devkit.tgz", (), "c3b158d763b6e2245038c8ad08e45376"),
            Archive("cars_test_annos_withlabels.mat", (), "b0a2b23655a3edd16d84508592a98d10"),
            Archive("cars_train.tgz", (), "065e5b463ae28d29e77c1b4b166cfe61"),
            Archive("cars_test.tgz", (), "4ce7ebf6a94d07f1952d94dd34c4d501"),
        ),
        by_hand="The official page is gone. github.com/pytorch/vision/issues/7545 collects where "
        "the files still are: pictures at kaggle.com/datasets/jessicali9530/stanford-cars-dataset "
        "(stanford-cars-dataset.zip serves for cars_train.tgz and cars_test.tgz), the developer "
        "kit at github.com/pytorch/vision/files/11644847/car_devkit.tgz, the labels at "
        "kaggle.com/datasets/abdelrahmant11/standford-cars-dataset-meta",
    ),
    "CIFAR10": _cifar(10, 1_000, "c58f30108f718f92721af3b95e74349a"),
    "CIFAR100": _cifar(100, 100, "eb9058c3a382ffc7106e4002c42a8d85"),
    "DTD": OfficialSet(
        folder="dtd",
        classes=47,
        # 120 images per class in three equal parts: train1 and val1, and test1
        splits={"train": Figure(3_760, 80), "test": Figure(1_880, 40)},
        source=f"{_DTD}; which part goes where: github.com/mlfoundations/task_vectors/issues/1",
        page=_DTD,
        archives=(
            _at("dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1", f"{_DTD}download/"),
        ),
    ),
    "EMNIST": _emnist(10, 24_000, 4_000),
    "EMNISTLetters": _emnist(26, 4_800, 800),
    "EuroSAT": OfficialSet(
        folder="EuroSAT_splits",
        classes=10,
        # 27,000 images, 2,000 to 3,000 per class; split totals: the authors of the public projects;
        # 270 per class: a script shared by their users
        splits={
            "train": _unconfirmed(2460, 2460, 2460, 1960, 1960, 1460, 1960, 2460, 1960, 2460),
            "val": Figure(2_700, 270, confirmed=False),
            "test": Figure(2_700, 270, confirmed=False),
        },
        source="arXiv:1709.00029; splits: github.com/mlfoundations/task_vectors/issues/1",
        page="https://github.com/phelber/EuroSAT",
        archives=(_at("EuroSAT.zip", "c8fa014336c82ac7804f0398fcb19387", *_EUROSAT),),
    ),
    "FashionMNIST": _idx(
        "FashionMNIST",
        "https://github.com/zalandoresearch/fashion-mnist",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "FER2013": OfficialSet(
        folder="fer2013",
        classes=7,
        # test: the published PublicTest and PrivateTest
        splits={
            "train": _unconfirmed(3995, 436, 4097, 7215, 4830, 3171, 4965),
            "test": _unconfirmed(958, 111, 1024, 1774, 1247, 831, 1233),
        },
        source="arXiv:1307.0414 (28,709 and two times 3,589 images)",
        page=_FER,
        archives=(Archive("fer2013.csv", (), "f8428a1edbd21e88f42c73edd2a14f95"),),
        by_hand="Register at Kaggle, accept the rules of the competition, and take fer2013.csv out "
        "of its fer2013.tar.gz; icml_face_data.csv, put into the folder fer2013, serves too",
        sealed=True,
    ),
    "Flowers102": OfficialSet(
        folder="flowers102/flowers-102",
        classes=102,
        splits={"train": Figure(1_020, 10), "test": Figure(6_149)},
        source=f"{_OXFORD}flowers/102/",
        page=f"{_OXFORD}flowers/102/",
        archives=(
            _at("102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", f"{_OXFORD}flowers/102/"),
            _at("imagelabels.mat", "e0620be6f572b9609742df49c70aed4d", f"{_OXFORD}flowers/102/"),
            _at("setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c", f"{_OXFORD}flowers/102/"),
        ),
    ),
    "Food101": OfficialSet(
        folder="food101/food-101",
        classes=101,
        splits={"train": Figure(75_750, 750), "test": Figure(25_250, 250)},
        source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        page="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        archives=(
            _at(
                "food-101.tar.gz",
                "85eeb15f3717b99a5da872d97d918f87",
                "http://data.vision.ee.ethz.ch/cvl/",
            ),
        ),
    ),
    "GTSRB": OfficialSet(
        folder="gtsrb",
        classes=43,
        splits={
            "train": Figure(26_640),  # the archive that torchvision takes; the full one has 39,209
            "test": _unconfirmed(*_GTSRB_TEST),
        },
        source="Readme-Images-Final-test.txt in the archive (test); public projects (train)",
        page="https://benchmark.ini.rub.de/gtsrb_dataset.html",
        archives=(
            _at("GTSRB-Training_fixed.zip", "513f3c79a4c5141765e10e952eaa2478", _GTSRB),
            _at("GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185", _GTSRB),
            _at("GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5", _GTSRB),
        ),
    ),
    "ImageNet": OfficialSet(
        folder="imagenet",
        classes=1_000,
        splits={"train": Figure(1_281_167), "test": Figure(50_000, 50)},
        source="arXiv:1409.0575, table 2",
        page="https://image-net.org/challenges/LSVRC/2012/2012-downloads.php",
        archives=(
            Archive("ILSVRC2012_img_train.tar", (), "1d675b47d978889d74fa0da5fadfb00e"),
            Archive("ILSVRC2012_img_val.tar", (), "29b22e2961454d5413ddabcf34fc5622"),
            Archive("ILSVRC2012_devkit_t12.tar.gz", (), "fa75699e90414af021442c21a62c3abf"),
        ),
        by_hand="Register at the official page and accept its terms",
    ),
    "KMNIST": _idx(
        "KMNIST",
        "http://codh.rois.ac.jp/kmnist/",
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    ),
    "MNIST": OfficialSet(
        folder="MNIST/raw",
        classes=10,
        splits={
            "train": _unconfirmed(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
            "test": _unconfirmed(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
        },
        source=_MNIST[1],
        page=_MNIST[1],
        archives=(
            _at("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", *_MNIST),
            _at("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", *_MNIST),
            _at("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", *_MNIST),
            _at("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", *_MNIST),
        ),
    ),
    "OxfordIIITPet": OfficialSet(
        folder="OxfordIIITPet/oxford-iiit-pet",
        classes=37,
        # about 100 of each class for training, and as many to test
        splits={"train": Figure(3_680), "test": Figure(3_669)},
        source="annotations/README in the archive",
        page=f"{_OXFORD}pets/",
        archives=(
            _at("images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c", f"{_OXFORD}pets/data/"),
            _at("annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f", f"{_OXFORD}pets/data/"),
        ),
    ),
    "PCAM": OfficialSet(
        folder="PCAM/pcam",
        classes=2,
        splits={"train": Figure(262_144), "test": Figure(32_768)},
        source="https://github.com/basveeling/pcam",
        page="https://github.com/basveeling/pcam",
        archives=tuple(
            _at(f"camelyonpatch_level_2_split_{part}.h5.gz", checksum, _PCAM)
            for part, checksum in (
                ("train_x", "1571f514728f59376b705fc836ff4b63"),
                ("train_y", "35c2d7259d906cfc8143347bb8e05be7"),
                ("test_x", "d8c2d60d490dbd479f8199bdfa0cf6ec"),
                ("test_y", "60a7035772fbdb7f34eb86d4420cf66a"),
            )
        ),
    ),
    "RenderedSST2": OfficialSet(
        folder="RenderedSST2/rendered-sst2",
        classes=2,
        splits={"train": Figure(6_920, (3_310, 3_610)), "test": Figure(1_821, (912, 909))},
        source="https://github.com/openai/CLIP/blob/main/data/rendered-sst2.md",
        page="https://github.com/openai/CLIP/blob/main/data/rendered-sst2.md",
        archives=(
            _at(
                "rendered-sst2.tgz",
                "2384d08e9dcfa4bd55b324e610496ee5",
                "https://openaipublic.azureedge.net/clip/data/",
            ),
        ),
    ),
    "RESISC45": OfficialSet(
        folder="resisc45",
        classes=45,
        # 700 images per class in total; the splits are not balanced
        splits={"train": Figure(18_900), "val": Figure(6_300), "test": Figure(6_300)},
        source="arXiv:1703.00121; lists: arXiv:1911.06721",
        page="https://gcheng-nwpu.github.io/",
        archives=(
            _at(
                "NWPU-RESISC45.zip",
                "beeecd0b63656290ae6d65cf7763185b0c1c4c54a753ef8088d6fba3faaf1f53",
                _RESISC,
            ),
        ),
        lists=(
            _at("resisc45-train.txt", "b5a4c05a37de15e4ca886696a85c403e", _RSR, _RESISC),
            _at("resisc45-val.txt", "a0770cee4c5ca20b8c32bbd61e114805", _RSR, _RESISC),
            _at("resisc45-test.txt", "3dda9e4988b47eb1de9f07993653eb08", _RSR, _RESISC),
        ),
        by_hand="The authors publish NWPU-RESISC45.rar, which Python cannot unpack: unpack it "
        "yourself (unar, 7z x or bsdtar -xf) to the folder NWPU-RESISC45",
    ),
    "STL10": OfficialSet(
        folder="stl10",
        classes=10,
        splits={"train": Figure(5_000, 500), "test": Figure(8_000, 800)},
        source=f"https://cs.{_STL}",
        page=f"https://cs.{_STL}",
        archives=(
            _at("stl10_binary.tar.gz", "91f7769df0f17e558f3565bffb0c7dfb", f"http://ai.{_STL}"),
        ),
        sealed=True,
    ),
    "SUN397": OfficialSet(
        folder="sun397",
        classes=397,
        splits={"train": Figure(19_850, 50), "test": Figure(19_850, 50)},
        source=f"https://{_SUN}",
        page=f"https://{_SUN}",
        archives=(
            _at("SUN397.tar.gz", "8ca2778205c41d23104230ba66911c7a", f"http://{_SUN}"),
            _at(
                "Partitions.zip",
                "e3311ea5f812d4cc6faef194688343d1111f6cd6f70f2c62f393c2b8d6ba1ec9",
                f"https://{_SUN}download/",
            ),
        ),
    ),
    "SVHN": OfficialSet(
        folder="svhn",
        classes=10,
        splits={
            "train": _unconfirmed(4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659),
            "test": _unconfirmed(1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595),
        },
        source=_SVHN,
        page=_SVHN,
        archives=(
            _at("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", _SVHN),
            _at("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", _SVHN),
        ),
        sealed=True,
    ),
    "TinyImageNet": OfficialSet(
        folder="tiny-imagenet-200",
        classes=200,
        splits={"train": Figure(100_000, 500), "test": Figure(10_000, 50)},
        source=f"http://{_TINY}reports/2015/pdfs/yle_project.pdf",
        page="https://www.kaggle.com/c/tiny-imagenet",
        archives=(
            _at(
                "tiny-imagenet-200.zip",
                "90528d7ca1a48142e341f4ef8d21d0de",
                f"https://{_TINY}",
                f"http://{_TINY}",
            ),
        ),
    ),
}
