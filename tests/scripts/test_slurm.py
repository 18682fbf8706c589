"""The batch script, with stand-ins for the cluster's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import wait_for

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "slurm" / "finetune.sbatch"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a cluster runs Linux")

STANDINS = {
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',  # hands signals on
    "scontrol": 'if [ "$1" = show ]; then seq -f node%g 7 9999; else echo "$@" >> requeued; fi',
    # as torchrun and a run that stops when asked, unless it has just ended
    "python": (
        'trap "exit ${WHEN_ASKED:-143}" TERM; echo "$@" > started\n'
        'for _ in $(seq 600); do sleep 0.05; [ ! -e enough ] || exit "$(cat enough)"; done'
    ),
}


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    for name, steps in STANDINS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{steps}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def submit(cluster: Path, *words: str, **more: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ, "PATH": f"{cluster}:{os.environ['PATH']}", "PYTHON": "python",
        "SLURM_SUBMIT_DIR": str(cluster), "SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "4", **more,
    }  # fmt: skip
    process = subprocess.Popen(["bash", str(SCRIPT), *words], env=environment)
    wait_for(lambda: (cluster / "started").exists() or process.poll() is not None)
    assert process.poll() in (None, 0), "the script ended before the run started"
    return process


def test_torchrun_is_started_on_all_nodes(cluster: Path) -> None:
    process = submit(cluster, "--finetuning-mode=linear", "--model=ViT-L-14")
    (cluster / "enough").write_text("0")
    assert process.wait(timeout=30) == 0
    words = (cluster / "started").read_text().split()
    for word in (
        "--nnodes=2", "--nproc-per-node=4", "--rdzv-backend=c10d", "--rdzv-id=4242",
        "--rdzv-endpoint=node7:24242",
    ):  # fmt: skip
        assert word in words
    assert words[-3:] == ["src/finetune.py", "--finetuning-mode=linear", "--model=ViT-L-14"]
    assert not (cluster / "requeued").exists()


def test_a_failure_is_the_jobs(cluster: Path) -> None:
    process = submit(cluster)
    (cluster / "enough").write_text("2")
    assert process.wait(timeout=30) == 2
    assert not (cluster / "requeued").exists()


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_before_the_time_limit_the_run_stops_and_queues_again(
    signum: signal.Signals, cluster: Path
) -> None:
    process = submit(cluster)
    process.send_signal(signum)
    assert process.wait(timeout=30) == 143
    assert (cluster / "requeued").read_text() == "requeue 4242\n"


def test_a_run_that_has_just_ended_is_not_queued_again(cluster: Path) -> None:
    process = submit(cluster, WHEN_ASKED="0")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    assert not (cluster / "requeued").exists()
