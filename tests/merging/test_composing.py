"""Hydra composes, and executes nothing that a configuration names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tangent_arithmetic.commands import merge

MARKER = "executed"
EVIL = (
    f"from pathlib import Path\nPath({{folder!r}}, {MARKER!r}).touch()\ndef call(*_, **__): ...\n"
)
# what a user's group sets in `hydra` -> what the refusal names
SETTINGS = """\
callbacks: {x: {_target_: torch.load, f: ev.pt}} -> callbacks.x._target_ to torch.load
callbacks: {x: {_target_: evil_module.call}} -> callbacks.x
callbacks: '${theirs}' -> callbacks to ${theirs}
launcher: {_target_: evil_module.call} -> launcher._target_ to evil_module.call
launcher: {_target_: '${theirs}'} -> launcher._target_
sweeper: {_target_: evil_module.call} -> sweeper._target_ to evil_module.call
sweeper: {params: {seed: {_target_: evil_module.call}}} -> sweeper.params
sweeper: {params: {seed: '${theirs}'}} -> sweeper.params
job_logging: {handlers: {x: {(): evil_module.call}}} -> job_logging.handlers
job_logging: {handlers: {x: {stream: ext://evil_module.call}}} -> job_logging.handlers
hydra_logging: {formatters: {x: {class: evil_module.call}}} -> hydra_logging.formatters
job: {env_set: {LD_PRELOAD: evil.so}} -> job.env_set.LD_PRELOAD to evil.so
job: {env_copy: [PATH]} -> job.env_set
"""
# command-line words -> error
WORDS = """\
hydra/launcher=theirs -> hydra.launcher._target_ to evil_module.call
-m hydra/launcher=theirs seed=1,2 -> hydra.launcher._target_
+hydra.callbacks.x._target_=evil_module.call -> hydra.callbacks.x._target_
hydra.searchpath=[pkg://evil_module] -> pkg://evil_module in the search path
hydra.searchpath=[structured://evil_module] -> structured://evil_module in the
--config-path pkg://evil_module -> pkg://evil_module in the search path
--config-name theirs -> pkg://evil_module in the search path
--config-name node -> str is not a subclass of HydraConf
--experimental-rerun config.pickle -> --experimental-rerun is refused
--exp config.pickle -> --experimental-rerun is refused
--cfg hydra +hydra.callbacks.x._target_=evil_module.call -> hydra.callbacks
--cfg job -m -> choose one of --run, --multirun, --cfg
--resolve -> --resolve needs --cfg or --help
modelpool=files modelpool.models={a:x,b:y,a:z} -> expected each key once, got {a:x,b:y,a:z}
--config-dir /nowhere -> --config-dir: expected a folder, found none at /nowhere
--config-path merge.yaml -> --config-path: expected a folder, found none at merge
--config-name absent -> Cannot find primary config 'absent'
-sc query=x -> --shell-completion: No completion plugin for 'x'
"""


def cases(table: str) -> pytest.MarkDecorator:
    rows = [line.split(" -> ") for line in table.splitlines()]
    return pytest.mark.parametrize(("text", "message"), rows, ids=[text for text, _ in rows])


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of configurations, beside a module that leaves a marker when it is imported."""
    (tmp_path / "evil_module.py").write_text(EVIL.format(folder=str(tmp_path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "conf"
    for group in ("method", "hydra/launcher"):
        (folder / group).mkdir(parents=True)
    (folder / "hydra" / "launcher" / "theirs.yaml").write_text("_target_: evil_module.call\n")
    return folder


def refuse(conf: Path, *words: str) -> None:
    """Runs the command, which must end with code 2 and execute nothing."""
    assert merge.main(["--config-dir", str(conf), *words]) == 2
    assert not (conf.parent / MARKER).exists() and "evil_module" not in sys.modules


@cases(SETTINGS)
def test_a_group_cannot_choose_what_hydra_executes(
    text: str, message: str, conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = f"theirs: {{x: {{_target_: evil_module.call}}}}\nhydra: {{{text}}}\n"
    (conf / "method" / "shared.yaml").write_text(f"# @package _global_\n{content}")
    for words in (["method=shared"], ["-m", "method=task_arithmetic,shared"]):
        refuse(conf, *words)
        error = capsys.readouterr().err
        assert f"the configuration sets hydra.{message}" in error and "which is refused" in error


@cases(WORDS)
def test_words_that_are_refused_or_contradict_each_other(
    text: str, message: str, conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    primary = "defaults: [merge, _self_]\nhydra: {searchpath: ['pkg://evil_module']}\n"
    (conf / "theirs.yaml").write_text(primary)
    (conf / "node.yaml").write_text("defaults: [merge, _self_]\nx: {}\nhydra: ${x}\n")
    refuse(conf, *text.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfea\x00", b"a: [", b"\x00\x01", b"- 1", b"a: " + b"[" * 900, b"a: *x", b"a: !!x 1"],
    ids=lambda content: repr(content[:8]),
)
def test_invalid_files_give_a_message(
    content: bytes, conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (conf / "method" / "odd.yaml").write_bytes(content)
    refuse(conf, "method=odd")
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error


def test_search_paths_and_sweeps_in_files_work(
    conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tmp_path / "more" / "method"
    more.mkdir(parents=True)
    (more / "mine.yaml").write_text(
        "_target_: tangent_arithmetic.merging.TaskArithmeticAlgorithm\n"
    )
    (conf / "method" / "grid.yaml").write_text(
        "# @package _global_\ndefaults: [task_arithmetic@method, _self_]\n"
        "hydra: {sweeper: {params: {method.scaling_factor: '0.1,0.2'}, max_batch_size: 1}}\n"
    )
    words = ["--config-dir", str(conf), "--cfg"]
    assert merge.main([*words, "job", f"hydra.searchpath=[{more.parent}]", "method=mine"]) == 0
    assert "TaskArithmeticAlgorithm" in capsys.readouterr().out
    assert merge.main([*words, "hydra", "method=grid"]) == 0
    assert "method.scaling_factor: 0.1,0.2" in capsys.readouterr().out


@cases("""\
--cfg job --package method -> # @package method
-sc install=bash -> hydra_bash_completion
--hydra-help -> Hydra
--cfg hydra --package hydra.job.name -> merge
""")
def test_hydras_own_flags_work(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.argv)
    assert merge.main(text.split()) == 0 and sys.argv == before
    assert message in capsys.readouterr().out
