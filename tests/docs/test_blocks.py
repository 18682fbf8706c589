"""Every shell and Python block of README.md and docs/: it runs as written, or says why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tangent_arithmetic.commands.cli import COMMANDS
from tangent_arithmetic.run.args import parse_names
from tests.docs.blocks import PAGES, ROOT, Block, blocks, commands, run_page

FACES = {
    "src/finetune.py",
    "src/eval_single_task.py",
    "src/eval_task_addition.py",
    "src/eval_task_negation.py",
    "src/analyze.py",
}
FLAGGED = {"finetune", "evaluate", "add", "negate", "analyze"}  # of the shared flags
OWN = {
    "reproduce": ("commands/reproduce.py",),
    "suite": ("commands/suite.py",),
    "language": ("commands/language.py",),
    "checkpoint": ("commands/checkpoint.py",),
    "prepare_data": ("commands/prepare_data.py",),
    "prepare-data": ("commands/prepare_data.py",),
}
SHELL = [block for page in PAGES for block in blocks(page) if block.language == "sh"]


def name_of(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.mark.parametrize("block", SHELL, ids=name_of)
def test_flags_of_a_shell_block_exist(block: Block) -> None:
    for words in commands(block):
        for place, word in enumerate(words):
            rest = words[place + 1 :]
            if word.endswith((".py", ".sh", ".sbatch")) and "/" in word:
                assert (ROOT / word).is_file(), word
            if word in FACES or word == "scripts/slurm/finetune.sbatch":
                parse_names(None, "", rest)
            elif word == "tangent-arithmetic" and rest:
                check(rest)
            elif word.startswith("scripts/") and word.endswith(".py"):
                known_in(ROOT / word, rest)


def check(words: list[str]) -> None:
    """Checks a command line of `tangent-arithmetic`."""
    command, *rest = words
    if command.startswith("-"):
        return
    assert command in COMMANDS, command
    if command in FLAGGED:
        parse_names(None, "", rest)
    for place in OWN.get(command, ()):
        known_in(ROOT / "src/tangent_arithmetic" / place, rest)


def known_in(path: Path, words: list[str]) -> None:
    """Checks that a script of ours, or the shared flags, know each flag."""
    text = path.read_text(encoding="utf-8")
    face = re.search(r"tangent_arithmetic\.commands\.(\w+)", text)
    if face and (module := ROOT / f"src/tangent_arithmetic/commands/{face[1]}.py").is_file():
        text += module.read_text(encoding="utf-8")
    for package in (
        path.parents[0] / path.stem,
        ROOT / "src/tangent_arithmetic/commands/benchmark",
    ):
        if package.is_dir() and path.stem in ("benchmark",):
            text += "".join(each.read_text(encoding="utf-8") for each in package.glob("*.py"))
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag != "--help" and f'"{flag}"' not in text:
            parse_names(None, "", [word])


def test_a_block_that_is_not_run_says_why() -> None:
    reasons = [block.reason for page in PAGES for block in blocks(page) if block.reason]
    assert reasons and all(len(reason.split()) >= 2 for reason in reasons)
    comment = re.compile("^<!-- not run:", flags=re.MULTILINE)
    comments = sum(len(comment.findall((ROOT / page).read_text())) for page in PAGES)
    assert comments == len(reasons)  # each stands right before a block


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not b.reason for b in blocks(page))]
)
def test_the_blocks_of_a_page_run(
    page: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    run_page(page, tmp_path, home)
