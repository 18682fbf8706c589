from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tangent_arithmetic.runtime.atomic import write_json
from tangent_arithmetic.runtime.errors import UnwritableError, UsageError
from tangent_arithmetic.storage import states as module
from tangent_arithmetic.storage.reading import read_json
from tangent_arithmetic.storage.states import RunStates, check_settings, pack, unpack
from tests.processes import ended, wait_for

HOLD = """
import sys, time, os
from pathlib import Path
from tangent_arithmetic.storage.states import RunStates
with RunStates(Path(sys.argv[1]), {}).locked():
    if os.fork() == 0:  # a worker, which outlives its parent
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def states_in(folder: Path, **settings: object) -> RunStates:
    return RunStates(folder / "run.safetensors", settings)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run_resume").iterdir())


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    states = states_in(tmp_path, lr=0.1)
    for done in (3, 5, 12):
        assert states.save({"w": torch.full((2,), float(done))}, done, {"seconds": done / 2})
    assert files(tmp_path) == ["00000005.safetensors", "00000012.safetensors"]
    found = states_in(tmp_path, lr=0.1).newest()
    assert found is not None and (found.done, found.facts) == (12, {"seconds": 6.0})
    assert found.tensors["w"].tolist() == [12.0, 12.0]
    with pytest.raises(UsageError, match=r"lr was 0.1, is now 0.2\. .*by deleting .*run_resume$"):
        states_in(tmp_path, lr=0.2).newest()
    assert files(tmp_path) == ["00000005.safetensors", "00000012.safetensors"]
    states.clean_up()
    assert list(tmp_path.iterdir()) == []


def test_partial_files_of_killed_runs_are_removed(tmp_path: Path) -> None:
    states = states_in(tmp_path)
    names = [f".{name}.safetensors.x1_abcde.tangent.part" for name in ("run", "other", "00000001")]
    part, other = (tmp_path / name for name in names[:2])
    for path in (part, other, tmp_path / "run_resume" / names[2]):
        path.mkdir(parents=True)
        (path / "run.safetensors").write_bytes(b"half")
    states.save({"w": torch.ones(1)}, 1, {})
    assert files(tmp_path) == ["00000001.safetensors"]
    states.remove()
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize(
    ("setting", "other"),
    [
        (f"{Path.home()}/model", "~/other"),
        ([Path.home() / "model"], ["/model"]),
        (float("nan"), 0.0),
        ("a\udc80", "a\udc81"),
        ({1: (2, 3)}, {1: (2, 4)}),
    ],
)
def test_settings_equal_what_is_read_from_a_file(
    setting: object, other: object, tmp_path: Path
) -> None:
    states_in(tmp_path, model=setting).save({"w": torch.ones(1)}, 1, {})
    assert states_in(tmp_path, model=setting).newest() is not None
    with pytest.raises(UsageError, match="other settings: model"):
        states_in(tmp_path, model=other).newest()
    write_json(tmp_path / "facts.json", {"model": setting})
    recorded = read_json(tmp_path / "facts.json")
    check_settings(tmp_path, recorded, {"model": setting}, "--save")
    with pytest.raises(UsageError, match="with other settings"):
        check_settings(tmp_path, recorded, {"model": other}, "--save")


def test_a_disk_that_is_full_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    states = states_in(tmp_path)
    states.save({"w": torch.ones(1)}, 1, {})

    def full(path: Path, *args: object, **options: object) -> None:
        raise UnwritableError(path, "No space left on device")

    monkeypatch.setattr(module, "save_tensors", full)
    assert not states.save({"w": torch.ones(1)}, 2, {})
    assert "the state of the run was not saved: cannot write" in caplog.text
    assert files(tmp_path) == ["00000001.safetensors"]


def test_the_cost_of_a_state_decides_how_often_one_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    states = states_in(tmp_path)
    states.expect(int(2 * module.BYTES_A_SECOND))  # two seconds, hence one in a hundred
    now[0] = 199.0
    assert not states.due(1)
    now[0] = 201.0
    assert states.due(1)

    def slow(*args: object, **options: object) -> None:
        now[0] += 0.5

    monkeypatch.setattr(module, "save_tensors", slow)
    states.save({}, 1, {})
    now[0] = 201.5 + 24.0
    assert not states.due(2)
    now[0] += 2.0
    assert states.due(2)
    assert [states_in(tmp_path).due(n) for n in (1, 2)] == [False, False]
    every = RunStates(tmp_path / "run.safetensors", {}, every=3)
    assert [every.due(n) for n in range(1, 7)] == [False, False, True] * 2
    assert not RunStates(tmp_path / "run.safetensors", {}, every=-1).due(3)


def test_a_second_run_learns_who_holds_the_lock(tmp_path: Path) -> None:
    with states_in(tmp_path).locked():
        owner = rf"another run \(process {os.getpid()} on .*\) is making .*run\.safetensors; wait"
        with pytest.raises(UsageError, match=owner), states_in(tmp_path).locked():
            pass
        assert files(tmp_path) == ["lock"]
    assert list(tmp_path.iterdir()) == []
    with states_in(tmp_path).locked():  # again
        states_in(tmp_path).save({"w": torch.ones(1)}, 1, {})
    assert files(tmp_path) == ["00000001.safetensors"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_lock_of_a_killed_run_is_free_at_once_though_a_worker_lives_on(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        worker = int(owner.stdout.readline())
        with (
            pytest.raises(UsageError, match=f"process {owner.pid} on"),
            states_in(tmp_path).locked(),
        ):
            pass
        owner.kill()
        owner.wait()
        try:
            assert not ended(worker)
            with states_in(tmp_path).locked():
                pass
        finally:
            os.kill(worker, signal.SIGKILL)
    wait_for(lambda: ended(worker))
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(handle: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    with states_in(tmp_path).locked():
        assert "cannot be locked" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_unpack_restores_what_pack_returned() -> None:
    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
        model[2].requires_grad_(False)
        weights = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(weights, lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    x = torch.randn(5, 3)
    (model, optimizer), (other, another) = fresh(0), fresh(1)
    other[2].load_state_dict(model[2].state_dict())  # type: ignore[index]
    unpack(pack(model, optimizer), other, another)  # before the first step too
    step(model, optimizer)
    kept = {name: value.clone() for name, value in pack(model, optimizer).items()}
    unpack(kept, other, another)
    for pair in ((model, optimizer), (other, another)):
        step(*pair)
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"params/0\.weight"):
        unpack({n: v for n, v in kept.items() if n != "params/0.weight"}, other, another)
