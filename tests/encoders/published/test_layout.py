"""Folders as public projects of linear checkpoints lay them out, generated with small models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tangent_arithmetic.commands import add, analyze, evaluate, negate
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts, resolve
from tangent_arithmetic.encoders.published import layout, loading
from tangent_arithmetic.encoders.published.layout import layout_of
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.models import task_vector, zeroshot_encoder
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.results import load_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.encoders.makers import PublishedEncoder, PublishedHead, clip, named, small_models
from tests.small_suite import TASKS, small_suite

LINEAR, STANDARD = "linearized_image_encoder", "image_encoder"
Write = Callable[[Path, Any, Any], None]


@pytest.fixture(scope="module", autouse=True)
def known_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with small_models(tmp_path_factory.mktemp("towers")):
        yield


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    loading._recent.clear()
    yield


def by_index(path: Path, theta: Any, theta0: Any) -> None:
    """A linear model: the numbered parameters of a CLIP without its text transformer."""
    content: dict[str, Any] = {"model_name": "ViT-Tiny"}
    for key, model in (("params", theta), ("params0", theta0)):
        kept = (v for n, v in model.named_parameters() if not n.startswith("transformer."))
        content |= {f"model.{key}.{i}": value.detach().clone() for i, value in enumerate(kept)}
    torch.save(content, path)


def pickled(path: Path, theta: Any, theta0: Any) -> None:
    """A standard model: the pickled encoder."""
    with named(ImageEncoder=PublishedEncoder):
        torch.save(PublishedEncoder(theta), path)


def state_dict(path: Path, theta: Any, theta0: Any) -> None:
    """A standard model: the encoder's tensors."""
    torch.save({f"model.{name}": value for name, value in theta.state_dict().items()}, path)


def tower(model: Any) -> dict[str, Tensor]:
    return {f"model.{n}": v for n, v in model.state_dict().items() if n.startswith("visual.")}


def published(folder: Path, prefix: str, write: Write, start: str | None = "") -> dict[str, Any]:
    """Writes the files of all tasks; returns their CLIPs by task, and theta0 under "".

    Args:
        folder: the folder of the model.
        prefix: of its files.
        write: writes one.
        start: prefix of the zero-shot files; None for none.
    """
    models = {"": clip("ViT-Tiny", 0)}
    for i, task in enumerate(TASKS):
        place = folder / f"{task}Val"
        place.mkdir(parents=True)
        models[task] = clip("ViT-Tiny", i + 1)
        if start is not None:
            write(place / f"{start or prefix}zeroshot.pt", clip("ViT-Tiny", 0), models[""])
        write(place / f"{prefix}finetuned.pt", models[task], models[""])
        models[task] = clip("ViT-Tiny", i + 1)  # the pickled ones have lost their text
    return models


def heads(folder: Path) -> None:
    for name in (*TASKS, "Shapes"):
        torch.manual_seed(0)
        weights = torch.randn(len(EMBEDDED_SETS[name].classnames), 8)
        with named(ClassificationHead=PublishedHead):
            torch.save(PublishedHead(True, weights), folder / f"head_{name}Val.pt")


FOLDERS: list[tuple[str, str, Write, str, dict[str, Any]]] = [
    (
        "checkpoints_3/linear_1e-05_ViT-Tiny",
        "linear_",
        by_index,
        "linear",
        {"mode": "linear", "lr": 1e-5, "seed": 3},
    ),
    (
        "checkpoints_0/linear_0.0003_lambda0.1_ViT-Tiny",
        "linear_",
        by_index,
        "linear",
        {"mode": "linear", "lr": 3e-4, "lambda": 0.1, "seed": 0},
    ),
    (
        "checkpoints_3/linear_ortho_1e-05_lambda10.0_ViT-Tiny",
        "linear_ortho_",
        by_index,
        "linear+orthoreg",
        {"mode": "linear_ortho", "lr": 1e-5, "lambda": 10.0, "seed": 3},
    ),
    (
        "checkpoints/standard_1e-05_ViT-Tiny",
        "",
        pickled,
        "standard",
        {"mode": "standard", "lr": 1e-5},
    ),
    (
        "checkpoints_1/standard_ortho_1e-05_lambda1e-05_ViT-Tiny",
        "standard_ortho_",
        state_dict,
        "standard+orthoreg",
        {"mode": "standard_ortho", "lr": 1e-5, "lambda": 1e-5, "seed": 1},
    ),
    (
        "checkpoints_1/linear-2_1e-05_ViT-Tiny",
        "linear-2_",
        state_dict,
        "standard+attention-weights",
        {"mode": "linear-2", "lr": 1e-5, "seed": 1},
    ),
    (
        "checkpoints_1/linear-2_ortho_1e-05_lambda5.0_ViT-Tiny",
        "linear-2_ortho_",
        pickled,
        "standard+orthoreg+attention-weights",
        {"mode": "linear-2_ortho", "lr": 1e-5, "lambda": 5.0, "seed": 1},
    ),
    (
        "checkpoints_reg_strict_2/ViT-Tiny",
        "linear_",
        by_index,
        "linear+taujp",
        {"mode": "linear", "penalty": "strict", "seed": 2},
    ),
    (
        "checkpoints_reg_efficient/ViT-Tiny",
        "linear_",
        by_index,
        "linear+taujp",
        {"mode": "linear", "penalty": "efficient"},
    ),
]


@pytest.mark.parametrize(("name", "prefix", "write", "mode", "facts"), FOLDERS)
def test_a_folder_says_what_its_vectors_are(
    name: str, prefix: str, write: Write, mode: str, facts: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / name
    models = published(folder, prefix, write)
    run = Run.of(Config(save=str(folder), suite="embedded", tasks=list(TASKS)))
    assert (run.config.finetuning_mode, run.model) == (mode, "ViT-Tiny")
    assert (run.mode.name, run.mode.checkpoint) == (mode, layout_of(folder).checkpoint)  # type: ignore[union-attr]
    assert run.config.seed == facts.get("seed")
    encoder, digest = zeroshot_encoder(run)
    theta0 = tower(models[""])
    assert all(torch.equal(value, theta0[n]) for n, value in encoder.weights().items())
    for task in TASKS:
        path = resolve(run.finetuned_path(task, mode))
        assert path == folder / f"{task}Val" / f"{prefix}finetuned.pt"
        found = read_facts(path)
        assert (found["info"]["trained"], found["theta0_hash"]) == (facts, digest)
        assert found["kind"] == (LINEAR if mode.startswith("linear") else STANDARD)
        vector, theta = task_vector(run, task, mode, encoder, digest).vector, tower(models[task])
        assert vector.keys() == theta.keys()
        assert all(torch.equal(v, theta[n] - theta0[n]) for n, v in vector.items())


def test_settings_that_are_given_stay(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints_3" / "linear_ortho_1e-05_lambda10.0_ViT-Tiny"
    published(folder, "linear_", by_index)  # older names, without the mode
    own = Config(save=str(folder), finetuning_mode="linear", model="RN-Tiny", seed=7)
    config = Run.of(own).config
    assert (config.finetuning_mode, config.model, config.seed) == ("linear", "RN-Tiny", 7)
    for mode in ("linear", "linear+orthoreg"):
        found = resolve(Run.of(own).finetuned_path("Emoji", mode))
        assert found == folder / "EmojiVal" / "linear_finetuned.pt"
    for mode in ("standard", "linear+taujp"):  # other ways of training are not there
        with pytest.raises(MissingFileError, match="no checkpoint at"):
            resolve(Run.of(own).finetuned_path("Emoji", mode))


@pytest.mark.parametrize(
    "name",
    [
        *("ViT-Tiny", "linear_ViT-Tiny", "linear_1e-05", "lora_1e-05_ViT-Tiny"),
        *("my_linear_1_ViT-Tiny", "linear_2024.01.15_ViT-Tiny", "linear_1_lambda1.0.0_ViT-Tiny"),
    ],
)
def test_other_names_say_nothing(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints_3" / name
    published(folder, "linear_", by_index)
    assert layout_of(folder) is None
    assert Run.of(Config(save=str(folder))).config.finetuning_mode is None


def test_a_name_alone_is_no_public_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints_3" / "linear_1e-05_ViT-Tiny"
    (folder / "EmojiVal").mkdir(parents=True)
    (folder / "EmojiVal" / "linear_finetuned.safetensors").touch()  # one of ours
    assert layout_of(folder) is None


@pytest.mark.parametrize("place", ["tasks", "beside", "linear"])
def test_theta0_is_found(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints_3" / "linear_1e-05_ViT-Tiny"
    models = published(folder, "linear_", by_index, "" if place == "tasks" else None)
    if place == "beside":
        published(folder.parent / "ViT-Tiny", "", pickled)
    encoder, digest = zeroshot_encoder(Run.of(Config(save=str(folder), suite="embedded")))
    theta0 = tower(models[""])
    assert all(torch.equal(value, theta0[n]) for n, value in encoder.weights().items())
    path = folder / "EmojiVal" / "linear_finetuned.pt"
    assert load_checkpoint(path).theta0_hash == digest


def test_a_linear_model_at_theta0_is_a_pretrained_one(tmp_path: Path) -> None:
    theta, theta0 = clip("ViT-Tiny", 1), clip("ViT-Tiny", 0)
    by_index(tmp_path / "linear_zeroshot.pt", theta0, theta0)
    by_index(tmp_path / "linear_finetuned.pt", theta, theta0)

    def run(name: str) -> Run:
        load = [str(tmp_path / name)]
        return Run.of(Config(model="ViT-Tiny", load=load, save=str(tmp_path / "own")))

    with pytest.raises(UsageError, match="is not a standard encoder; a linear checkpoint or"):
        zeroshot_encoder(run("linear_finetuned.pt"))
    encoder, _ = zeroshot_encoder(run("linear_zeroshot.pt"))
    assert all(torch.equal(v, tower(theta0)[n]) for n, v in encoder.weights().items())


@pytest.mark.parametrize("index", [2, 4, 7])  # linear, standard, of the tau-Jp project
def test_commands_need_the_folder_alone(
    index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, prefix, write, mode, facts = FOLDERS[index]
    published(tmp_path / name, prefix, write)
    heads(tmp_path / name)
    flags = [f"--save={tmp_path / name}", "--suite=embedded", f"--tasks={','.join(TASKS)}"]
    flags += ["--device=cpu", f"--results={tmp_path / 'results'}", f"--cache-dir={tmp_path / 'c'}"]
    with small_suite(monkeypatch):
        assert evaluate.main([*flags, "--finetuning-mode=none"]) == 0
        assert evaluate.main(flags) == 0
        assert add.main([*flags, "--n-eval-points=3"]) == 0
        assert negate.main([*flags, "--n-eval-points=3"]) == 0
        assert analyze.main(["similarity", *flags]) == 0
    results = tmp_path / "results" / "embedded" / f"ViT-Tiny_seed{facts['seed']}"
    single = load_results(results / f"{MODES[mode].accuracies}.json")
    assert {f"{task}Val" for task in TASKS} <= single.keys()
    for operation in ("additions", "negations"):
        assert list(results.glob(f"{MODES[mode].prefix}{operation}*.json"))


def test_the_table_names_our_modes() -> None:
    rows = [*layout.MODES.values(), layout.TAUJP]
    assert [MODES[mode].checkpoint for mode, *_ in rows] == [ours for _, ours, _ in rows]
