"""Suites of tasks, and the registration of further suites and data sets.

A data set of your own is one call:

    register_dataset("pets", train, test, ("cat", "dog"), ("a photo of a {}.",))

where `train` and `test` are plain `torch.utils.data.Dataset`s. On the command line a data set is
named by its source instead (`--tasks=pets=FOLDER`), see `tangent_arithmetic.data.own`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from tangent_arithmetic.runtime.errors import UsageError, unknown
from tangent_arithmetic.runtime.registry import Registry

if TYPE_CHECKING:
    from tangent_arithmetic.data.base import Splits

DEFAULT_CACHE = Path("~/.cache/tangent-arithmetic")
EMBEDDED_MODEL = "ViT-Nano-8"
TEXT_MODEL = "transformers:sentence-transformers/all-MiniLM-L6-v2"
WITHOUT_TEXT = ("timm:", "torchvision:", "python:")  # models that are no CLIPs
READS_TEXT = ("transformers:", "text-tower:")
PUBLIC = ("clip8", "clip14", "clip20", "text")  # suites of public data sets
BUILT_IN = (*PUBLIC, "embedded")
OWN_SUITE = "own"  # of data sets that no suite lists
DEFAULT_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True)
class Task:
    """How long a data set is trained on.

    Attributes:
        epochs: passes over the training images; None to follow from their number, see
            `tangent_arithmetic.data.own.budget`.
        num_classes: number of classes; None if only the data tell.
    """

    epochs: int | None = None
    num_classes: int | None = None


@dataclass(frozen=True)
class RegisteredSet:
    """A data set that is not built in.

    Attributes:
        load: reads its splits; the argument is the data root (`--data-location`).
        templates: prompts with one `{}` for the class name.
        classnames: reads the class names alone, where that is cheaper; the argument is the same.
    """

    load: Callable[[Path], Splits]
    templates: tuple[str, ...]
    classnames: Callable[[Path], tuple[str, ...]] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Suite:
    """A set of tasks that share a control set and a fine-tuning recipe.

    The default recipe is that of the papers.

    Attributes:
        name: as `--suite` spells it.
        tasks: name -> task, in the order of tables and sums.
        control: the data set whose accuracy negation must preserve; None for no control set.
        lr: peak learning rate.
        warmup_length: optimizer steps of linear warm-up.
        batch_size: images per micro-step, over all processes, by model ("": any other model).
        num_grad_accumulation: micro-steps per optimizer step, by model likewise.
        num_workers: data-loading processes per process; None for one per core.
        related: further data sets, trained on and evaluated only when named.
        analogies: those of its analysis, C+B-A=D, or C+B-A=D!W with a control that replaces B.
        steps: optimizer steps, about, for data sets whose epochs are not stated.
        warmup_share: share of the steps of own data sets, at most, that are warm-up.
        sets: the data sets that the suite brings along, by name.
        borrowed: data sets of other suites: name -> (suite, name there).
        model: the model that `--suite` alone means.
    """

    name: str
    tasks: Mapping[str, Task]
    control: str | None = None
    lr: float = 1e-5
    warmup_length: int = 500
    batch_size: Mapping[str, int] = field(default_factory=lambda: {"": 128})
    num_grad_accumulation: Mapping[str, int] = field(default_factory=lambda: {"": 1})
    num_workers: int | None = None
    related: Mapping[str, Task] = field(default_factory=dict)
    analogies: tuple[str, ...] = ()
    steps: int = 2000
    warmup_share: float = 0.1
    sets: Mapping[str, RegisteredSet] = field(default_factory=dict)
    borrowed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    model: str = EMBEDDED_MODEL

    @property
    def names(self) -> tuple[str, ...]:
        """All data sets of the suite."""
        control = () if self.control is None else (self.control,)
        return tuple(dict.fromkeys((*self.tasks, *control, *self.related)))

    def task(self, name: str) -> Task:
        """The training of a data set; four epochs for a control set that states nothing."""
        known = {**self.tasks, **self.related}
        return known.get(name, Task() if name in self.sets else Task(4))

    def listing(self, name: str, task: Task, as_task: bool) -> Suite:
        """The suite with one more data set, as one of its tasks or as a related one."""
        if as_task:
            return replace(self, tasks={**self.tasks, name: task})
        return replace(self, related={**self.related, name: task})

    def own(self, name: str) -> RegisteredSet | None:
        """The entry of a data set that is not built in."""
        return self.sets.get(name) or DATASETS.get((self.name, name))

    def check(self, name: str) -> str:
        """Returns `name` if the suite has this data set (or its Val split).

        Raises:
            UsageError: otherwise; the message lists the choices, nearest first.
        """
        if name.removesuffix("Val") in self.names:
            return name
        raise unknown(f"data set of suite {self.name}", name, self.names)


SUITES: Registry[Suite] = Registry("suite")
DATASETS: dict[tuple[str, str], RegisteredSet] = {}  # keys (suite, name)


def get_suite(name: str) -> Suite:
    """The suite of this name; an unknown one raises a `UsageError` with the choices."""
    return SUITES[name]


def register_suite(suite: Suite) -> None:
    """Adds a suite, to be chosen with `--suite`; its data sets are registered one by one.

    Raises:
        UsageError: if the name is taken or invalid.
    """
    check_name("suite", suite.name)
    SUITES.add(suite.name, suite)


@overload
def register_dataset(
    name: str,
    train: Callable[[Path], Splits],
    test: Sequence[str],
    classnames: str,
    templates: Task | None = None,
) -> None: ...


@overload
def register_dataset(
    name: str,
    train: Any,
    test: Any = None,
    classnames: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    val: Any = None,
    suite: str = OWN_SUITE,
    epochs: int | None = None,
    control: bool = False,
) -> None: ...


@overload
def register_dataset(
    name: str,
    *,
    load: Callable[[Path], Splits],
    templates: Sequence[str],
    suite: str,
    task: Task | None = None,
) -> None: ...


def register_dataset(name: str, *values: Any, **named: Any) -> None:
    """Adds a data set to a suite; every command then knows it by name.

    Either from data sets in memory, `(name, train, test, classnames, templates)`, or from a
    function that reads them, `(name, load, templates, suite, task)`.

    Args:
        name: as flags spell it; `nameVal` is its validation split.
        *values: the following, in this order.
        **named: the following, by name.
        train: the training images or texts, a `torch.utils.data.Dataset` of (image, label) or
            (text, label), or rows with columns of such names, as of the library `datasets` and of
            pandas. An image is a PIL image, an array (height, width[, channels]) or a tensor
            (channels, height, width), of bytes or of numbers from 0 to 1; a label is an integer,
            or a 0/1 vector over the classes where an example has several labels.
        test: the test images likewise; None for a fifth of the training images.
        classnames: one phrase per class, in the order of the labels; None for `train.classes`.
        templates: prompts with one `{}` for the class name.
        val: the validation images; None for a part of the training images, see `hold_out`.
        suite: the suite to extend; by default the suite "own", made by its first data set.
        epochs: passes over the training images; None to follow from their number.
        control: whether it is the control set of the suite "own".
        load: reads the splits; the argument is the data root (`--data-location`).
        task: its epochs and classes; None if the suite already lists them.

    Raises:
        UsageError: if the suite is unknown, the name taken or invalid, a template invalid, or
            `task` missing.
    """
    if "load" in named or (values and _is_loader(values[0])):
        _register_loader(name, *values, **named)
    else:
        _register_datasets(name, *values, **named)


def _is_loader(value: object) -> bool:
    return callable(value) and not hasattr(value, "__getitem__")


def _register_loader(
    name: str,
    load: Callable[[Path], Splits],
    templates: Sequence[str],
    suite: str,
    task: Task | None = None,
) -> None:
    add_dataset(suite, name, RegisteredSet(load, check_templates(name, templates)), task)


def _register_datasets(
    name: str,
    train: Any,
    test: Any = None,
    classnames: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    val: Any = None,
    suite: str = OWN_SUITE,
    epochs: int | None = None,
    control: bool = False,
) -> None:
    from tangent_arithmetic.data.plain import plain_splits

    prompts = check_templates(name, templates)
    splits = plain_splits(name, train, test, val, classnames)
    if suite == OWN_SUITE and suite not in SUITES:
        register_suite(Suite(OWN_SUITE, {}))
    if control and (suite in BUILT_IN or get_suite(suite).control not in (None, name)):
        raise UsageError(
            f"suite {suite} has the control set {get_suite(suite).control}; register {name} "
            "without control=True, and name it with --control-dataset"
        )
    entry = RegisteredSet(lambda location: splits, prompts, lambda location: splits.classnames)
    task = Task(epochs, len(splits.classnames))
    add_dataset(suite, name, entry, task, "control" if control else "tasks")


def add_dataset(
    suite: str, name: str, dataset: RegisteredSet, task: Task | None, role: str = "related"
) -> None:
    """Adds a data set to a registered suite.

    Args:
        suite: the suite.
        name: the data set.
        dataset: its entry.
        task: its epochs and classes; None if the suite already lists them.
        role: "related", or "tasks" or "control" for a suite that is not built in.

    Raises:
        UsageError: if the suite is unknown, the name taken or invalid, or `task` missing.
    """
    entry, kind = get_suite(suite), f"data set of suite {suite}"
    listed = name in entry.names
    if (suite, name) in DATASETS or (listed and suite in BUILT_IN):
        raise UsageError(f"{kind} {name!r} is already registered; choose another name")
    check_name(kind, name)
    if not listed:
        if task is None:
            raise UsageError(
                f"suite {suite} does not list {name}; add task=Task(epochs, num_classes)"
            )
        SUITES[suite] = entry.listing(name, task, role == "tasks" and suite not in BUILT_IN)
        if role == "control":
            SUITES[suite] = replace(SUITES[suite], control=name)
    DATASETS[suite, name] = dataset


def check_templates(name: str, templates: object) -> tuple[str, ...]:
    """The templates of a data set, each with one `{}` for the class name.

    Raises:
        UsageError: otherwise.
    """
    texts: tuple[Any, ...] = tuple(templates) if isinstance(templates, list | tuple) else ()
    if not texts or not all(isinstance(t, str) and _has_one_gap(t) for t in texts):
        raise UsageError(
            f"data set {name}: expected templates with one {{}} each, got {templates!r}; write for "
            "instance ('a photo of a {}.',)"
        )
    return texts


def _has_one_gap(template: str) -> bool:
    try:
        return template.count("{}") == 1 and "\0" in template.format("\0")
    except (LookupError, ValueError):  # other braces
        return False


def check_name(kind: str, name: str) -> None:
    """Checks the name of a suite or a data set.

    Raises:
        UsageError: if it is not one that flags and files can have.
    """
    if not re.fullmatch(r"[\w-]+", name) or name.endswith("Val"):
        raise UsageError(
            f"invalid {kind} {name!r}: expected letters, digits, _ and -, not ending in Val"
        )


def suite_of_model(model: str) -> str:
    """The default suite of a model: clip8 for CLIPs, text for encoders of texts, else embedded."""
    if model.startswith(READS_TEXT):
        return "text"
    embedded = model.partition("__")[0] == EMBEDDED_MODEL or model.startswith(WITHOUT_TEXT)
    return "embedded" if embedded else "clip8"


# epochs: interfaces of the public projects, for clip14 and clip20 those of arXiv:2405.07813; about
# 2,000 steps of 128 each. EMNISTLetters and TinyImageNet: ours, 1,872 and 2,229 steps
_EIGHT = {
    "Cars": Task(35, 196),
    "DTD": Task(76, 47),
    "EuroSAT": Task(12, 10),
    "GTSRB": Task(11, 43),
    "MNIST": Task(5, 10),
    "RESISC45": Task(15, 45),
    "SUN397": Task(14, 397),
    "SVHN": Task(4, 10),
}
_FOURTEEN = _EIGHT | {
    "STL10": Task(60, 10),
    "OxfordIIITPet": Task(82, 37),
    "Flowers102": Task(147, 102),
    "CIFAR100": Task(6, 100),
    "PCAM": Task(1, 2),
    "FER2013": Task(10, 7),
}
_TWENTY = _FOURTEEN | {
    "CIFAR10": Task(6, 10),
    "Food101": Task(4, 101),
    "FashionMNIST": Task(5, 10),
    "RenderedSST2": Task(39, 2),
    "EMNIST": Task(2, 10),
    "KMNIST": Task(5, 10),
}
_CLIP8 = Suite(
    "clip8",
    tasks=_EIGHT,
    control="ImageNet",
    batch_size={"": 128, "ViT-L-14": 64},
    num_grad_accumulation={"": 1, "ViT-L-14": 2},
    related={name: _TWENTY[name] for name in ("CIFAR10", "CIFAR100", "STL10")},
)
register_suite(_CLIP8)
register_suite(replace(_CLIP8, name="clip14", tasks=_FOURTEEN, related={}))
_NAMEABLE = {"EMNISTLetters": Task(2, 26), "TinyImageNet": Task(3, 200)}
register_suite(replace(_CLIP8, name="clip20", tasks=_TWENTY, related=_NAMEABLE))
# epochs: 50 to 75 steps of 64 each
register_suite(
    Suite(
        "embedded",
        tasks={
            "Emoji": Task(5, 9),
            "FashionMNIST": Task(1, 10),
            "LandCover": Task(1, 8),
            "Letters": Task(1, 26),
            "MNIST": Task(1, 10),
            "Signs": Task(1, 20),
            "StreetDigits": Task(1, 10),
            "Textures": Task(1, 16),
        },
        control="Shapes",
        lr=3e-4,
        warmup_length=8,
        steps=60,
        batch_size={"": 64},
        num_workers=0,
        related={"Digits": Task(1, 10), "StreetLetters": Task(1, 26), "Pool": Task(1, 5)},
        analogies=(  # two styles times two label sets
            "Letters+StreetDigits-Digits=StreetLetters",
            "Digits+StreetLetters-Letters=StreetDigits",
            "StreetLetters+Digits-StreetDigits=Letters",
            "StreetDigits+Letters-StreetLetters=Digits",
        ),
    )
)
# epochs: about 55 steps of 32 each
register_suite(
    Suite(
        "text",
        tasks={
            name: Task(1, 2)
            for name in ("Editorials", "Foods", "Movies", "Products", "Spam", "Tweets")
        },
        control="Nouns",
        lr=3e-4,
        warmup_length=8,
        steps=60,
        batch_size={"": 32},
        num_workers=0,
        # whether a text is a film review, ...; without the texts' sentiment
        related={f"{name}Domain": Task(1, 2) for name in ("Movies", "Products", "Tweets")},
        analogies=(
            "Products+MoviesDomain-ProductsDomain=Movies!TweetsDomain",
            "Movies+ProductsDomain-MoviesDomain=Products!TweetsDomain",
        ),
        model=TEXT_MODEL,
    )
)
