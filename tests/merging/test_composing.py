"""Hydra composes, and runs nothing that a configuration names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tangent_arithmetic.commands import merge

MARKER = "executed"
EVIL = (
    f"from pathlib import Path\nPath({{folder!r}}, {MARKER!r}).touch()\ndef call(*_, **__): ...\n"
)
HYDRA = {  # what a group of a user puts at the root -> what is named in the refusal
    "callbacks: {x: {_target_: torch.load, f: ev.pt, weights_only: false}}":
        "hydra.callbacks.x._target_ to torch.load",
    "callbacks: {x: {_target_: evil_module.call}}": "hydra.callbacks.x",
    "callbacks: '${theirs}'": "hydra.callbacks to ${theirs}",
    "launcher: {_target_: evil_module.call}": "hydra.launcher._target_ to evil_module.call",
    "launcher: {_target_: '${theirs}'}": "hydra.launcher._target_",
    "sweeper: {_target_: evil_module.call}": "hydra.sweeper._target_ to evil_module.call",
    "sweeper: {params: {seed: {_target_: evil_module.call}}}": "hydra.sweeper.params",
    "sweeper: {params: {seed: '${theirs}'}}": "hydra.sweeper.params",
    "job_logging: {handlers: {x: {(): evil_module.call}}}": "hydra.job_logging.handlers",
    "job_logging: {handlers: {x: {class: logging.StreamHandler, stream: ext://evil_module.call}}}":
        "hydra.job_logging.handlers",
    "hydra_logging: {formatters: {x: {class: evil_module.call}}}": "hydra.hydra_logging.formatters",
    "job: {env_set: {LD_PRELOAD: evil.so}}": "hydra.job.env_set.LD_PRELOAD to evil.so",
    "job: {env_copy: [PATH]}": "hydra.job.env_set",
}  # fmt: skip


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of configurations; a module that leaves a marker when it is imported lies near."""
    (tmp_path / "evil_module.py").write_text(EVIL.format(folder=str(tmp_path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "conf"
    for group in ("method", "hydra/launcher"):
        (folder / group).mkdir(parents=True)
    (folder / "hydra" / "launcher" / "theirs.yaml").write_text("_target_: evil_module.call\n")
    return folder


def refused(conf: Path, *words: str) -> None:
    """Runs the command, which must end with code 2 and execute nothing."""
    assert merge.main(["--config-dir", str(conf), *words]) == 2
    assert not (conf.parent / MARKER).exists() and "evil_module" not in sys.modules


@pytest.mark.parametrize("node", HYDRA)
def test_groups_cannot_choose_what_hydra_runs(
    node: str, conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        f"# @package _global_\ntheirs: {{x: {{_target_: evil_module.call}}}}\nhydra: {{{node}}}\n"
    )
    (conf / "method" / "shared.yaml").write_text(text)
    for words in (["method=shared"], ["-m", "method=task_arithmetic,shared"]):
        refused(conf, *words)
        error = capsys.readouterr().err
        assert f"the configuration sets {HYDRA[node]}" in error and "which is refused" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra/launcher=theirs"], "hydra.launcher._target_ to evil_module.call"),
        (["-m", "hydra/launcher=theirs", "seed=1,2"], "hydra.launcher._target_"),
        (["+hydra.callbacks.x._target_=evil_module.call"], "hydra.callbacks.x._target_"),
        (["hydra.searchpath=[pkg://evil_module]"], "pkg://evil_module in the search path"),
        (["hydra.searchpath=[structured://evil_module]"], "structured://evil_module in the"),
        (["--config-path", "pkg://evil_module"], "pkg://evil_module in the search path"),
        (["--config-name", "theirs"], "pkg://evil_module in the search path"),
        (["--config-name", "node"], "str is not a subclass of HydraConf"),
        (["--experimental-rerun", "config.pickle"], "--experimental-rerun is refused"),
        (["--exp", "config.pickle"], "--experimental-rerun is refused"),
        (["--cfg", "hydra", "+hydra.callbacks.x._target_=evil_module.call"], "hydra.callbacks"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_other_doors_are_closed_as_well(
    words: list[str], message: str, conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    primary = "defaults: [merge, _self_]\nhydra: {searchpath: ['pkg://evil_module']}\n"
    (conf / "theirs.yaml").write_text(primary)
    (conf / "node.yaml").write_text("defaults: [merge, _self_]\nx: {}\nhydra: ${x}\n")
    refused(conf, *words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfea\x00", b"a: [", b"\x00\x01", b"- 1", b"a: " + b"[" * 5000, b"a: *x", b"a: !!x 1"],
    ids=lambda content: repr(content[:8]),
)  # fmt: skip
def test_files_that_are_no_configuration(
    content: bytes, conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (conf / "method" / "odd.yaml").write_bytes(content)
    refused(conf, "method=odd")
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error


def test_what_hydra_is_for_goes_on(
    conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders of one's own in the search path, and sweeps that a file names."""
    more = tmp_path / "more" / "method"
    more.mkdir(parents=True)
    (more / "mine.yaml").write_text(
        "_target_: tangent_arithmetic.merging.TaskArithmeticAlgorithm\n"
    )
    (conf / "method" / "grid.yaml").write_text(
        "# @package _global_\ndefaults: [task_arithmetic@method, _self_]\n"
        "hydra: {sweeper: {params: {method.scaling_factor: '0.1,0.2'}, max_batch_size: 1}}\n"
    )
    words = ["--config-dir", str(conf), "--cfg", "job", f"hydra.searchpath=[{more.parent}]"]
    assert merge.main([*words, "method=mine"]) == 0
    assert "TaskArithmeticAlgorithm" in capsys.readouterr().out
    assert merge.main(["--config-dir", str(conf), "--cfg", "hydra", "method=grid"]) == 0
    assert "method.scaling_factor: 0.1,0.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cfg", "job", "-m"], "choose one of --run, --multirun, --cfg"),
        (["--resolve"], "--resolve needs --cfg or --help"),
        (["--config-dir", "/nowhere"], "--config-dir: expected a folder, found none at /nowhere"),
        (["--config-path", "merge.yaml"], "--config-path: expected a folder, found none at merge"),
        (["--config-name", "absent"], "Cannot find primary config 'absent'"),
        (["-sc", "query=x"], "--shell-completion: No completion plugin for 'x'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_flags_that_make_no_sense_are_errors(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge.main(words) == 2
    assert message in capsys.readouterr().err


def test_hydras_own_flags_work(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.argv)
    for words, expected in (
        (["--cfg", "job", "--package", "method"], "# @package method"),
        (["-sc", "install=bash"], "hydra_bash_completion"),
        (["--hydra-help"], "Hydra"),
        (["--cfg", "hydra", "--package", "hydra.job.name"], "merge"),
    ):
        assert merge.main(words) == 0
        assert expected in capsys.readouterr().out
    assert sys.argv == before
