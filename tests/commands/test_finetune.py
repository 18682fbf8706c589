"""Fine-tuning by the command: interrupted, changed in between, and run again."""

from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tangent_arithmetic.commands import finetune
from tangent_arithmetic.data import registry
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts
from tangent_arithmetic.run.args import parse_arguments
from tangent_arithmetic.run.models import split_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.validation import Validation, kept_generators
from tangent_arithmetic.runtime import software
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.logs import Tracker
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.states import RunStates
from tests.small_suite import flags, small_suite

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


class Killed(Exception):
    """Simulates SIGKILL: only what is on disk remains."""


@pytest.fixture
def run(tmp_path: Path, cache: Path, monkeypatch: Patch) -> Iterator[list[str]]:
    """The flags of a run of six steps, with a state after each."""
    with small_suite(monkeypatch):
        base = [*flags(tmp_path), "--tasks=Emoji", "--epochs=2", f"--cache-dir={cache}"]
        yield ["--finetuning-mode=linear", "--state-every=1", "--seed=0", *base]


def checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "EmojiVal" / "linear_finetuned.safetensors"


def states(folder: Path) -> list[str]:
    resume = checkpoint(folder).with_name("linear_finetuned_resume")
    return sorted(p.name for p in resume.iterdir()) if resume.is_dir() else []


def kill_at(flags: list[str], step: int) -> None:
    """Runs the command until a step, as if it were killed there."""
    with pytest.MonkeyPatch.context() as patch:

        def log(self: Tracker, values: dict[str, Any], at: int | None = None) -> None:
            if at == step:
                raise Killed

        patch.setattr(Tracker, "log", log)
        with pytest.raises(Killed):
            finetune.main(flags)


def other_pictures(patch: Patch) -> None:
    """The same pictures of the same names, inverted."""
    whole = EMBEDDED_SETS["Emoji"]

    def build(split: Any) -> Any:
        images, labels = whole.build(split)
        return 255 - images, labels

    other = replace(whole, build=build, version=whole.version + 1)
    patch.setitem(EMBEDDED_SETS, "Emoji", other)
    registry._load.cache_clear()


def other_templates(patch: Patch) -> None:
    patch.setitem(EMBEDDED_SETS, "Emoji", replace(EMBEDDED_SETS["Emoji"], templates=("{}",)))


def other_software(patch: Patch) -> None:
    patch.setattr(software, "libraries", lambda: {"torch": "0.0"})


def other_sources(patch: Patch) -> None:
    patch.setattr(software, "sources_hash", lambda _: "0" * 64)


CHANGES = {
    "pictures": (other_pictures, r"content was \w+\.\.\., is now"),
    "prompts": (other_templates, r"head was \w+\.\.\., is now \w+\.\.\."),
    "software": (other_software, r"libraries torch was [\d.]+, is now 0\.0"),
    "sources": (other_sources, r"sources was \w+\.\.\., is now 0{12}"),
}


def test_a_run_is_not_continued_with_other_data_or_software(
    run: list[str], tmp_path: Path, capsys: Capture
) -> None:
    kill_at(run, 3)
    kept = ["00000002.safetensors", "00000003.safetensors"]
    assert states(tmp_path) == kept
    for change, message in CHANGES.values():
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            assert finetune.main(run) == 2
        registry._load.cache_clear()
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert "--restart" in error and "Traceback" not in error
        assert states(tmp_path) == kept and not checkpoint(tmp_path).exists()
    with pytest.MonkeyPatch.context() as patch:
        other_sources(patch)
        assert finetune.main([*run, "--restart"]) == 0
    assert checkpoint(tmp_path).exists() and states(tmp_path) == []


def test_a_flag_typo_costs_nothing(run: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert finetune.main([*run, f"--save={tmp_path / 'straight'}"]) == 0
    kill_at(run, 4)
    assert finetune.main([*run, "--lr=0.5"]) == 2
    message = capsys.readouterr().err
    assert "lr was 0.0003, is now 0.5" in message and "continue it" in message
    assert finetune.main(run) == 0
    straight = tmp_path / "straight" / "EmojiVal" / checkpoint(tmp_path).name
    assert read_facts(checkpoint(tmp_path))["hash"] == read_facts(straight)["hash"]


@pytest.mark.parametrize(("flags", "count"), [([], 40), (["--sample=12"], 12)])
def test_validation_accuracy_before_and_after_is_logged_and_recorded(
    flags: list[str], count: int, run: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="tangent_arithmetic"):
        assert finetune.main([*run, *flags]) == 0
    found = read_facts(checkpoint(tmp_path))["info"]["validation"]
    assert found["num_images"] == count and found["metric"] == "top1"
    own = Run.of(parse_arguments([*run, *flags]))
    start = ImageEncoder.load(own.model, own.zeroshot_path)
    for when, encoder in (
        ("before", start),
        ("after", LinearizedImageEncoder.load(checkpoint(tmp_path))),
    ):
        assert found[when] == split_of(own, encoder, "EmojiVal").accuracy(encoder)["top1"]
    before, after = (f"{100 * found[when]:.1f} %" for when in ("before", "after"))
    told = f"validation accuracy {before} before and {after} after, on {count}"
    assert f"{told}{' of 40' if flags else ''} examples; wrote" in caplog.text


def test_a_target_ends_a_run_early_and_is_recorded(
    run: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Capture
) -> None:
    with caplog.at_level("INFO", logger="tangent_arithmetic"):
        assert finetune.main([*run, "--target=0"]) == 0
    assert "1 of 6 steps" in caplog.text
    info = read_facts(checkpoint(tmp_path))["info"]
    assert (info["steps"], info["planned"], info["target"], info["patience"]) == (1, 6, 0, None)
    assert finetune.main([*run, "--target=0"]) == 0  # done before
    assert finetune.main(run) == 2 and "target was 0" in capsys.readouterr().err


def test_what_is_measured_on_the_way_does_not_change_the_weights(
    run: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    logged: list[tuple[dict[str, Any], int | None]] = []
    fake = SimpleNamespace(
        log=lambda values, step=None: logged.append((values, step)), finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: fake))
    hashes: list[str] = []
    for more in ([], ["--wandb"], ["--wandb", "--sample=5"]):
        folder = tmp_path / str(len(hashes))
        assert finetune.main([*run, *more, f"--save={folder}"]) == 0
        hashes.append(read_facts(folder / "EmojiVal" / checkpoint(tmp_path).name)["hash"])
    assert len(set(hashes)) == 1
    curve = [step for values, step in logged if "validation_top1" in values]
    assert curve == [0, 2, 3, 5, 6] * 2  # of six steps
    assert [step for values, step in logged if "loss" in values] == list(range(6)) * 2


def test_a_failing_evaluation_costs_no_training(
    run: list[str], tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    measure = Validation.measure

    def failing(self: Validation, when: str, encoder: Any) -> dict[str, float]:
        if when == "after":
            raise UsageError("a picture cannot be read")
        return measure(self, when, encoder)

    monkeypatch.setattr(Validation, "measure", failing)
    assert finetune.main(run) == 2
    assert "a picture cannot be read" in capsys.readouterr().err
    assert read_facts(checkpoint(tmp_path))["info"]["steps"] == 6
    assert finetune.main(run) == 0  # done before


def test_generators_are_left_as_they_were() -> None:
    finetune.seed_everything(3)
    with kept_generators(torch.device("cpu")):
        expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002


def test_a_finished_checkpoint_of_other_data_does_not_count_as_done(
    run: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert finetune.main(run) == 0
    before = checkpoint(tmp_path).read_bytes()
    assert finetune.main(run) == 0  # done before, skipped
    head = tmp_path / "checkpoints" / "head_Emoji.safetensors"
    for change in (other_pictures, other_templates):
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            if change is other_templates:  # an evaluation has built it anew
                head.unlink()
                info, ones = load_checkpoint(checkpoint(tmp_path)).info, torch.ones(9, 9)
                save_tensors(head, {"weight": ones, "bias": ones[0]}, "head", info=info)
            assert finetune.main(run) == 2
        registry._load.cache_clear()
        message = capsys.readouterr().err
        assert "made of other data" in message and "delete it" in message
        assert checkpoint(tmp_path).read_bytes() == before


def test_the_next_run_removes_what_a_killed_one_left(
    run: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    def killed(self: RunStates) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunStates, "remove", killed)
        with pytest.raises(Killed):
            finetune.main(run)
    part = checkpoint(tmp_path).with_name(f".{checkpoint(tmp_path).name}.abcdefgh.tangent.part")
    part.mkdir()  # of a state that was being written
    (part / "half").write_bytes(b"half")
    assert checkpoint(tmp_path).exists() and states(tmp_path)
    assert finetune.main(run) == 0
    assert [p.name for p in checkpoint(tmp_path).parent.iterdir()] == [checkpoint(tmp_path).name]


def test_a_record_that_cannot_be_written_leaves_no_states(run: list[str], tmp_path: Path) -> None:
    def unwritable(*_: Any) -> None:
        raise PermissionError(13, os.strerror(13), "runs.jsonl")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "append_result", unwritable)
        assert finetune.main(run) == 2
    assert checkpoint(tmp_path).exists() and states(tmp_path) == []


def test_weights_that_are_not_finite_are_not_saved(
    run: list[str], tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    step = torch.optim.AdamW.step

    def overflowing(self: Any, *words: Any) -> None:
        step(self, *words)
        self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    one_step = ["--epochs=1", "--batch-size=70"]
    assert finetune.main([*run, *one_step]) == 2
    assert "weights are not finite after step 1" in capsys.readouterr().err
    assert not checkpoint(tmp_path).exists() and states(tmp_path) == []
