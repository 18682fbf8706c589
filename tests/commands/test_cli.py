from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tangent_arithmetic import __version__
from tangent_arithmetic.commands.cli import COMMANDS, CONFIGURED, SHELLS, main
from tangent_arithmetic.run.checks import parse_command
from tangent_arithmetic.run.config import GROUPS
from tangent_arithmetic.run.usage import USAGES

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "numpy", "pandas", "matplotlib"}
REPORT_HEAVY = f"""
import atexit, sys
atexit.register(lambda: print(*sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr))
from tangent_arithmetic.commands.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


def cli(*argv: str) -> subprocess.CompletedProcess[str]:
    """Runs the command; the last line of stderr names the heavy modules that it imported."""
    command = [sys.executable, "-c", REPORT_HEAVY, *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_without_torch(argv: list[str]) -> None:
    done = cli(*argv)
    assert (done.returncode, done.stderr.split()) == (0, [])
    assert done.stdout.startswith("usage: tangent-arithmetic ")
    for name in COMMANDS:
        assert f" {name} " in done.stdout


@pytest.mark.parametrize("name", CONFIGURED)
def test_help_of_a_command_lists_its_flags_without_torch(name: str) -> None:
    done = cli(name, "--seed=3", "--help")
    assert (done.returncode, done.stderr.split()) == (0, [])
    assert done.stdout.startswith(f"usage: tangent-arithmetic {name} ")
    for flag in (
        f"--finetuning-mode {{{','.join(USAGES[name].modes())}}}",
        "--batch-size N",
        "--tasks NAME[=SOURCE],...",
        "--save PATH",
    ):
        assert flag in done.stdout
    assert "DATA_LOCATION" not in done.stdout
    shown = set(re.findall(r"^│ --([a-z-]+)", done.stdout, flags=re.MULTILINE))
    assert shown == {field.replace("_", "-") for field in USAGES[name].fields}
    groups = re.findall(r"^╭─ (\w+) options", done.stdout, flags=re.MULTILINE)
    assert groups == [group for group in GROUPS if group in groups] and len(groups) >= 4
    examples = re.findall(rf"^   tangent-arithmetic ({name}\b.*)$", done.stdout, re.MULTILINE)
    assert tuple(examples) == USAGES[name].examples and len(examples) == 3
    source = Path(inspect.getfile(inspect.unwrap(main))).with_name(f"{name}.py").read_text()
    assert source.partition("\n")[0].strip('"') in done.stdout


@pytest.mark.parametrize("name", CONFIGURED)
def test_examples_of_a_command_are_valid(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for label in ("a", "b"):
        (tmp_path / "pictures" / "pets" / label).mkdir(parents=True)
        (tmp_path / "pictures" / "pets" / label / "1.png").touch()
    for line in USAGES[name].examples:
        command, *words = shlex.split(line)
        assert command == name
        names, _ = parse_command(name, words)
        assert names == [word for word in words if not word.startswith("-")]


def test_a_command_accepts_the_flags_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    _, config = parse_command(
        "add", ["--finetuning-mode=linear", "--lr=0.5", "--pairs=MNIST+Signs"]
    )
    assert config.lr == 0.5 and config.pairs == ["MNIST+Signs"]
    with pytest.raises(SystemExit, match=r"^0$"):
        parse_command("add", ["--lr=0.5", "--help"])
    assert "--lr" not in capsys.readouterr().out


FACES = {
    **{f"src/{usage.script}.py": name for name, usage in USAGES.items()},
    "src/merge.py": "merge",
    "src/checkpoints.py": "checkpoint",
    "scripts/reproduce.py": "reproduce",
    "scripts/prepare_data.py": "prepare-data",
    "scripts/benchmark.py": "benchmark",
}


@pytest.mark.parametrize("face", FACES)
def test_help_of_a_script_imports_no_torch_and_is_quick(face: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / face), "--help"]
    begin = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    end = os.times()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: tangent-arithmetic {FACES[face]}")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    heavy = {"open_clip", "timm", "transformers", *HEAVY}
    heavy -= {"numpy"} if "benchmark" in face else set()  # quick enough
    assert imported & heavy == set()
    seconds = end.children_user + end.children_system
    assert seconds - begin.children_user - begin.children_system < 2  # of the processor, if busy


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - set(CONFIGURED)))
def test_help_of_other_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([name, "--help"]) == 0
    except SystemExit as end:
        assert not end.code
    assert len(capsys.readouterr().out) > 200


@pytest.mark.parametrize("argv", [["finetune", "--lr=-1"], ["analyze", "report", "--lr=-1"]])
def test_a_bad_value_is_refused_before_torch_is_imported(argv: list[str]) -> None:
    done = cli(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --lr: expected at least 0, got -1\n\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["finetne", "--lr=1"], "unknown command 'finetne'; choose from finetune, "),
        (["--hlep"], "unknown command '--hlep'; choose from "),
        (["--tyro-write-completion", "csh", "x"], "expected --tyro-write-completion SHELL FILE"),
        (["--tyro-write-completion", "zsh"], "SHELL one of bash, zsh, fish"),
        (["--completion"], "expected --completion SHELL, SHELL one of bash, zsh, fish"),
        (["--completion", "csh"], "expected --completion SHELL"),
    ],
)
def test_an_unknown_command_ends_with_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.out == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tangent-arithmetic {__version__}\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_completion_script_knows_commands_and_flags(shell: str, tmp_path: Path) -> None:
    path = tmp_path / "completion"
    with pytest.raises(SystemExit, match=r"^$"):
        main(["--tyro-write-completion", shell, str(path)])
    text = path.read_text()
    assert all(name in text for name in COMMANDS) and "--finetuning-mode" in text


def completions(text: str, *words: str) -> set[str]:
    """What bash offers for the last word, by the script."""
    line = " ".join(shlex.quote(word) for word in words)
    ask = (
        f"{text}\nCOMP_WORDS=({line})\nCOMP_CWORD={len(words) - 1}\n"
        '_tyro_tangent_arithmetic\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bash_completes_commands_flags_and_names(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^(0|None|)$"):
        main(["--completion", "bash"])
    text = capfd.readouterr().out
    assert {"finetune", "negate"} <= completions(text, "tangent-arithmetic", "")
    flags = completions(text, "tangent-arithmetic", "add", "--n")
    assert "--n-eval-points" in flags and "--lr" not in flags
    modes = completions(text, "tangent-arithmetic", "finetune", "--finetuning-mode", "")
    assert modes == {"standard", "linear"}
    sets = completions(text, "tangent-arithmetic", "negate", "--tasks", "M")
    assert "MNIST" in sets
    assert "clip8" in completions(text, "tangent-arithmetic", "add", "--suite", "")
