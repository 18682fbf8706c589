from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangent_arithmetic.run.args import Config, checked, parse_arguments, parse_names
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.runtime.errors import UsageError

# the flags of the public projects that keep their default (paths after `~` is expanded)
PUBLIC_DEFAULTS = {
    "data_location": "{home}/data",
    "eval_datasets": None,
    "train_dataset": None,
    "exp_name": None,
    "results_db": None,
    "wd": 0.1,
    "ls": 0.0,
    "load": None,
    "save": None,
    "cache_dir": None,
    "openclip_cachedir": "{home}/openclip-cachedir/open_clip",
    "world_size": 1,
    "checkpoint_every": -1,
    "port": 12355,
    "seed": None,
    "finetuning_mode": None,
    "n_eval_points": 21,
    "control_threshold": 0.95,
}
# those whose default now depends on the model or the task
DERIVED = ("suite", "tasks", "batch_size", "num_grad_accumulation", "lr", "warmup_length", "epochs")

# every flag of the public projects, and ours: attribute, text, value
FLAGS = [
    ("recipe", "fast", "fast"),
    ("optimizer", "sgd", "sgd"),
    ("schedule", "constant", "constant"),
    ("averaging", "0.5", 0.5),
    ("image_share", "0.3", 0.3),
    ("target", "0.9", 0.9),
    ("patience", "3", 3),
    ("objective", "taujp", "taujp"),
    ("trainable", "attention", "attention"),
    ("penalty", "3", 3.0),
    ("penalty_norm", "plain", "plain"),
    ("others", "MNIST,DTD", ["MNIST", "DTD"]),
    ("others_batch_size", "8", 8),
    ("others_per_step", "all", "all"),
    ("factors", "kfac", "kfac"),
    ("factor_images", "64", 64),
    ("factor_rank", "32", 32),
    ("factor_directions", "0", 0),
    ("teacher", "linear", "linear"),
    ("coef_min", "0.1", 0.1),
    ("coef_max", "2", 2.0),
    ("coefs_per_step", "3", 3),
    ("coefficients", "task", "task"),
    ("unlabelled", "entropy", "entropy"),
    ("ridge", "0.1", 0.1),
    ("coefficient_bounds", "0,2", ["0", "2"]),
    ("solver", "gauss-newton", "gauss-newton"),
    ("data_location", "d", "d"),
    ("data_source", "torchvision", "torchvision"),
    ("eval_datasets", "MNIST,DTD", ["MNIST", "DTD"]),
    ("train_dataset", " MNIST, DTD,", ["MNIST", "DTD"]),
    ("tasks", "MNIST", ["MNIST"]),
    ("control_dataset", "ImageNet", "ImageNet"),
    ("exp_name", "trial", "trial"),
    ("results_db", "r.jsonl", "r.jsonl"),
    ("results", "r", "r"),
    ("model", "ViT-B-32__pretrained__laion2b_s34b_b79k", "ViT-B-32__pretrained__laion2b_s34b_b79k"),
    ("suite", "clip8", "clip8"),
    ("batch_size", "64", 64),
    ("num_grad_accumulation", "2", 2),
    ("lr", "1e-5", 1e-5),
    ("wd", "0", 0.0),
    ("ls", "0.1", 0.1),
    ("warmup_length", "0", 0),
    ("epochs", "3", 3),
    ("load", "a.pt,b.pt", ["a.pt", "b.pt"]),
    ("save", "s", "s"),
    ("cache_dir", "c", "c"),
    ("openclip_cachedir", "o", "o"),
    ("world_size", "2", 2),
    ("checkpoint_every", "5", 5),
    ("state_every", "5", 5),
    ("port", "29500", 29500),
    ("seed", "7", 7),
    ("finetuning_mode", "posthoc", "posthoc"),
    ("n_eval_points", "5", 5),
    ("control_threshold", "0.5", 0.5),
    ("ahead", "sums", "sums"),
    ("modes", "standard,linear+taujp", ["standard", "linear+taujp"]),
    ("pairs", "MNIST+Signs,Emoji+Letters", ["MNIST+Signs", "Emoji+Letters"]),
    ("kernel_images", "8", 8),
    ("kernel_directions", "0", 0),
    ("grid_points", "5", 5),
    ("subset_sample", "3", 3),
    ("analogies", "C+B-A=D", ["C+B-A=D"]),
    ("shots", "1,10", ["1", "10"]),
    ("sample", "100", 100),
    ("explorer_megabytes", "5", 5.0),
    ("device", "cpu", "cpu"),
    ("precision", "bf16", "bf16"),
    ("num_workers", "0", 0),
    ("template", "a photo of a {}, {}.", "a photo of a {}, {}."),
    ("head", "probe", "probe"),
    ("interference_split", "validation", "validation"),
    ("style", "paper", "paper"),
]
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.one_of(st.text(), st.integers(), st.none())),
    st.dictionaries(st.text(), st.text()),
)
# flags without a value, and their default
SWITCHES = {"wandb": False, "feature_cache": True, "restart": False, "negate": False}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_defaults_of_the_public_projects(home: Path) -> None:
    parsed = vars(parse_arguments([]))
    for name, value in PUBLIC_DEFAULTS.items():
        assert parsed[name] == (value.format(home=home) if isinstance(value, str) else value), name
    assert [parsed[name] for name in DERIVED] == [None] * len(DERIVED)


@pytest.mark.parametrize("sep", "-_")
def test_every_flag_in_both_spellings(sep: str) -> None:
    argv = [f"--{name.replace('_', sep)}={text}" for name, text, _ in FLAGS]
    parsed = vars(parse_arguments(argv))
    for name, _, value in FLAGS:
        assert parsed[name] == value and type(parsed[name]) is type(value), name
    alone = vars(parse_arguments(["--seed=7"]))
    assert {name for name in alone if alone[name] != vars(parse_arguments([]))[name]} == {"seed"}


@pytest.mark.parametrize(
    "argv", [["--batch_size", "4"], ["--batch-size", "4"], ["--batch-size=8", "--batch_size=4"]]
)
def test_the_last_value_of_a_flag_counts_in_any_spelling(argv: list[str]) -> None:
    assert parse_arguments(argv) == parse_arguments(["--batch-size=4"])
    assert parse_arguments(argv).batch_size == 4


def test_the_table_above_has_every_flag() -> None:
    fields = {field.name for field in dataclasses.fields(Config)}
    assert fields - {name for name, _, _ in FLAGS} == {*SWITCHES, "finetuning_accuracies"}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("sep", "-_")
def test_switches(name: str, sep: str) -> None:
    on, off = f"--{name.replace('_', sep)}", f"--no-{name.replace('_', sep)}"
    words = {(): SWITCHES[name], (on,): True, (off,): False, (on, off): False, (off, on): True}
    for argv, value in words.items():
        assert getattr(parse_arguments(argv), name) is value


def test_paths_expand_the_home_folder(home: Path) -> None:
    names = ("data_location", "save", "results", "cache_dir", "openclip_cachedir", "results_db")
    parsed = vars(parse_arguments([*(f"--{name}=~/a" for name in names), "--load=~/a,b~.pt"]))
    assert all(parsed[name] == f"{home}/a" for name in names)
    assert parsed["load"] == [f"{home}/a", "b~.pt"]
    assert parse_arguments(["--save=~"]).save == str(home)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch_size=0"], "error: --batch-size: expected at least 1, got 0"),
        (["--epochs=two"], "--epochs: expected a whole number, got 'two'"),
        (["--lr=fast"], "--lr: expected a number, got 'fast'"),
        (["--lr=-1"], "error: --lr: expected at least 0, got -1"),
        (["--lr", "-1"], "error: --lr: expected at least 0, got -1"),
        (["--n-eval-points=1"], "expected at least 2, got 1"),
        (["--world_size", "0"], "expected at least 1, got 0"),
        (["--finetuning-mode=lineal"], "expected one of none, standard, linear, posthoc, got line"),
        (["--precision=fp16"], "--precision: expected one of fp32, bf16, got fp16"),
        (["--wandb=no"], "unrecognized arguments: no"),
        (["--finetuning-accuracies=1"], "unknown flag '--finetuning-accuracies'"),
        (["MNIST"], "unrecognized arguments: MNIST"),
        (["--lr=nan"], "--lr: expected a finite number, got nan"),
        (["--lr=1e400"], "--lr: expected a finite number, got 1e400"),
        (["--lr=1e38"], "--lr: expected at most 1000, got 1e38"),
        (["--wd=-inf"], "--wd: expected a finite number, got -inf"),
        (["--ls=1"], "--ls: expected a number below 1, got 1"),
        (["--control-threshold=1.01"], "expected at most 1, got 1.01"),
        (["--epochs=1000000000000"], "--epochs: expected at most 1000000, got 1000000000000"),
        (["--seed=-1"], "--seed: expected at least 0, got -1"),
        ([f"--seed={2**32}"], f"--seed: expected at most {2**32 - 1}, got {2**32}"),
        (["--seed=1e3"], "--seed: expected a whole number, got '1e3'"),
        (["--port=0"], "--port: expected at least 1, got 0"),
        (["--port=99999999"], "--port: expected at most 65535, got 99999999"),
        (["--state-every=-2"], "expected at least -1, got -2"),
        (["--tasks=,"], "--tasks: names nothing; leave it out for the default"),
        (["--train-dataset="], "names nothing; leave it out for the default"),
        (["--shots="], "--shots: names nothing; leave it out for the default"),
        (["--load=,"], "--load: names nothing; leave it out for the default"),
        (["--tasks=Emoji,Signs, Emoji"], "--tasks: names Emoji twice"),
        (["--pairs=A+B,A+B"], "--pairs: names A+B twice"),
        (["--shots=1,01"], "--shots: names 1 twice"),
        (["--shots=0"], "--shots: expected at least 1, got 0"),
        (["--shots=1,x"], "--shots: expected a whole number, got 'x'"),
        (["--control-dataset="], "expected a text, got nothing"),
        (["--save="], "--save: expected a path, got nothing"),
        (["--save=a/" + "x" * 256], "names of at most 255, got a/xxx"),
        (["--results=" + "x/" * 2500], "expected a path of at most 4095 bytes"),
        (["--load=a.pt," + "ä" * 128], "names of at most 255, got ää"),
        (["--cache-dir=a\0b"], r"expected a path, got 'a\x00b'"),
        (["--save=~nobody-of-this-name/x"], "home folder of '~nobody-of-this-name/x' is not known"),
        (["\x1b[31m" * 10_000], r"unrecognized arguments: \x1b[31m"),
        (["--epochs=\x1b[31m"], r"expected a whole number, got '\x1b[31m'"),
    ],
)
def test_a_bad_value_ends_in_a_message_and_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        parse_arguments(argv)
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.rstrip("\n").isprintable() and len(captured.err) < 10_000
    assert captured.out == ""


@pytest.mark.parametrize("argv", [["--seed"], ["--seed", "--wandb"]])
def test_a_flag_without_its_value_ends_in_a_message_and_code_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        parse_arguments(argv)
    assert capsys.readouterr().err == "error: --seed: expected a value, got nothing\n"


def test_a_registered_mode_is_a_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        MODES, "mine", dataclasses.replace(MODES["linear"], name="mine", prefix="mine_")
    )
    assert parse_arguments(["--finetuning-mode=mine"]).finetuning_mode == "mine"
    with pytest.raises(SystemExit, match=r"^0$"):
        parse_arguments(["--help"])
    assert "{none,standard,linear,posthoc,mine}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", 1, 1.0),
        ("lr", np.float32(0.5), 0.5),
        ("seed", np.int64(3), 3),
        ("epochs", None, None),
        ("shots", [1, 5], ["1", "5"]),
        ("shots", "1, 5", ["1", "5"]),
        ("tasks", ("Emoji",), ["Emoji"]),
        ("tasks", "Emoji,MNIST", ["Emoji", "MNIST"]),
        ("save", Path("a"), "a"),
        ("save", "~/a", "{home}/a"),
        ("load", ["~/a.pt"], ["{home}/a.pt"]),
        ("save", "x" * 255, "x" * 255),
        ("model", "", ""),
        ("precision", "bf16", "bf16"),
        ("wandb", True, True),
    ],
)
def test_values_assigned_in_python_are_converted(
    name: str, value: Any, expected: Any, home: Path
) -> None:
    if isinstance(expected, list):
        expected = [part.format(home=home) for part in expected]
    elif isinstance(expected, str):
        expected = expected.format(home=home)
    plain = checked(name, value)
    assert plain == expected and type(plain) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", math.nan, "--lr: expected a finite number, got nan"),
        ("lr", "0.1", "--lr: expected a number, got '0.1'"),
        ("lr", 10**400, "--lr: expected a number of ordinary size, got 1000"),
        ("wd", None, "--wd: expected a number, got None"),
        ("wd", torch.tensor(0.1), "--wd: expected a number, got tensor(0.1000)"),
        ("seed", -1, "--seed: expected at least 0, got -1"),
        ("seed", 10**400, "--seed: expected at most 4294967295, got 1000"),
        ("seed", 1.0, "--seed: expected a whole number, got 1.0"),
        ("epochs", True, "--epochs: expected a whole number, got True"),
        ("precision", "fp16", "--precision: expected one of fp32, bf16, got fp16"),
        ("finetuning_mode", "lineal", "--finetuning-mode: expected one of none, standard"),
        ("data_source", ["hub"], "--data-source: expected one of auto, folder"),
        ("tasks", [], "--tasks: names nothing"),
        ("tasks", "", "--tasks: names nothing"),
        ("tasks", {"Emoji": 1}, "--tasks: expected a comma list, got {'Emoji': 1}"),
        ("shots", [5, 5], "--shots: names 5 twice"),
        ("results", None, "--results: expected a path, got None"),
        ("results", 5, "--results: expected a path, got 5"),
        ("results", "a\ud800", "--results: expected a path, got"),
        ("model", None, "--model: expected a text, got None"),
    ],
)
def test_an_invalid_value_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        checked(name, value)


@given(name=st.sampled_from([name for name, _, _ in FLAGS]), value=ANYTHING)
def test_any_value_is_accepted_or_refused_by_name(name: str, value: Any) -> None:
    try:
        found = checked(name, value)
    except UsageError as error:
        flag = f"--{name.replace('_', '-')}"
        assert str(error).startswith(f"{flag}: ") and str(error).isprintable()
    else:
        assert checked(name, found) == found


@given(words=st.lists(st.tuples(st.sampled_from([name for name, _, _ in FLAGS]), st.text())))
def test_any_command_line_is_parsed_or_ends_with_code_2(words: list[tuple[str, str]]) -> None:
    try:
        args = parse_arguments([f"--{name}={text}" for name, text in words])
    except SystemExit as end:
        assert end.code == 2
    else:
        for name, _ in words:
            assert checked(name, getattr(args, name)) == getattr(args, name)


@pytest.mark.parametrize(
    ("argv", "flag", "nearest"),
    [
        (["--modle=ViT-B-32"], "--modle", "--model"),
        (["--lr=0.1", "--warmup_lenght", "5"], "--warmup-lenght", "--warmup-length"),
        (["--finetunning-mode=linear"], "--finetunning-mode", "--finetuning-mode"),
        (["--epoch=3"], "--epoch", "--epochs"),  # abbreviations are no flags
    ],
)
def test_a_misspelt_flag_names_the_nearest_one(
    argv: list[str], flag: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        parse_arguments(argv)
    error = capsys.readouterr().err
    assert error.startswith(f"error: unknown flag {flag!r}; choose from {nearest}, ")


def test_help_has_the_description_and_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        parse_arguments(["--help"], "Adds task vectors.\n\n    python add.py\n")
    text = capsys.readouterr().out
    assert "Adds task vectors.\n" in text and "\n     python add.py\n" in text
    assert "weight decay of AdamW (default: 0.1)" in text and "(default: 1,5,20)" in text
    for name in (*(name for name, _, _ in FLAGS), *SWITCHES):
        assert f"--{name.replace('_', '-')}" in text
    assert "--finetuning-accuracies" not in text
    assert "--load CHECKPOINT" in text and "--tasks NAME[=SOURCE],..." in text


@pytest.mark.parametrize(
    ("misspelt", "nearest"), [("modle", "model"), ("eval_dataset", "eval_datasets")]
)
def test_a_misspelt_attribute_raises(misspelt: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"unknown setting '{misspelt}'; choose from {nearest}, "):
        setattr(Config(), misspelt, "x")


def test_every_setting_can_be_assigned() -> None:
    for name in (field.name for field in dataclasses.fields(Config)):
        config, value = Config(), object()
        setattr(config, name, value)
        assert getattr(config, name) is value


def test_without_flags_every_setting_has_its_default() -> None:
    parsed, defaults = vars(parse_arguments([])), vars(Config())
    expanded = {
        k: v if v is None or "~" not in str(v) else str(Path(v).expanduser())
        for k, v in defaults.items()
    }
    assert parsed == expanded and parsed["shots"] == ["1", "5", "20"]


def test_two_configs_share_no_accuracies() -> None:
    Config().finetuning_accuracies["MNIST"] = 0.5
    assert Config().finetuning_accuracies == {}


@pytest.mark.parametrize(
    "argv", [["b", "a", "--seed=3"], ["--seed=3", "b", "a"], ["b", "--seed", "3", "a"]]
)
def test_names_stand_anywhere_beside_the_flags(argv: list[str]) -> None:
    names, args = parse_names(("a", "b"), "letter", argv)
    assert names == ["b", "a"] and args == parse_arguments(["--seed=3"])


def test_an_unknown_name_lists_the_nearest_first() -> None:
    with pytest.raises(UsageError, match="unknown letter 'bb'; choose from b, a"):
        parse_names(("a", "b"), "letter", ["--seed=3", "bb"])
