from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from tangent_arithmetic import __version__
from tangent_arithmetic.commands.cli import COMMANDS, CONFIGURED, SHELLS, main

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
        "--finetuning-mode {none,standard,linear,posthoc}",
        "--batch-size N",
        "--tasks A,",
    ):
        assert flag in done.stdout
    source = Path(inspect.getfile(inspect.unwrap(main))).with_name(f"{name}.py").read_text()
    assert source.partition("\n")[0].strip('"') in done.stdout


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
