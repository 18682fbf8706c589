"""Fine-tuning of chosen parameters by the command: masks, adapters, resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector, NonLinearTaskVector
from tangent_arithmetic.commands import finetune
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts
from tangent_arithmetic.run.modes import get_mode
from tangent_arithmetic.runtime.logs import Tracker
from tangent_arithmetic.training import talos
from tangent_arithmetic.training.adapters import merged
from tests.small_suite import flags, small_suite

MODES = [
    "linear+lora:2",
    "standard+talos:0.05",
    pytest.param("standard+lora:2:mlp", marks=pytest.mark.slow),
    pytest.param("linear+orthoreg+last:1", marks=pytest.mark.slow),
]


@pytest.fixture
def run(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The flags of a run of six steps, with a state after each."""
    monkeypatch.setattr(talos, "IMAGES", 4)
    with small_suite(monkeypatch):
        base = [*flags(tmp_path), "--tasks=Emoji", "--epochs=2", f"--cache-dir={cache}"]
        yield [*base, "--state-every=1", "--seed=0", "--lr=1e-3"]


def checkpoint(folder: Path, mode: str) -> Path:
    return folder / "EmojiVal" / f"{get_mode(mode).checkpoint}.safetensors"


class Killed(Exception):
    pass


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_continues_exactly(mode: str, run: list[str], tmp_path: Path) -> None:
    flags = [*run, f"--finetuning-mode={mode}"]
    assert finetune.main([*flags, f"--save={tmp_path / 'straight'}"]) == 0
    with pytest.MonkeyPatch.context() as patch:

        def log(self: Tracker, values: dict[str, Any], at: int | None = None) -> None:
            if at == 3:
                raise Killed

        patch.setattr(Tracker, "log", log)
        with pytest.raises(Killed):
            finetune.main(flags)
    with pytest.MonkeyPatch.context() as patch:  # the masks are kept
        patch.setattr(talos, "masks_of", None)
        assert finetune.main(flags) == 0
        assert finetune.main(flags) == 0  # done before
    found, straight = (checkpoint(tmp_path / name, mode) for name in ("checkpoints", "straight"))
    assert read_facts(found)["hash"] == read_facts(straight)["hash"]
    assert read_facts(found)["info"]["method"]["trainable"] == get_mode(mode).trainable

    start = ImageEncoder.load("ViT-Nano-8", tmp_path / "checkpoints" / "zeroshot.safetensors")
    kind = LinearizedTaskVector if mode.startswith("linear") else NonLinearTaskVector
    vector = kind(start, found).vector
    moved = {name for name, value in vector.items() if value.any()}
    folder = found.with_name(f"{found.stem}_adapters")
    masks = found.with_name(f"{found.stem}_masks.safetensors")
    assert folder.exists() == ("lora" in mode) and masks.exists() == ("talos" in mode)
    if "lora" in mode:
        part = "mlp" if "mlp" in mode else "attn"
        assert moved and all(f".{part}." in name and name.endswith("weight") for name in moved)
        dense = merged(start, folder)
        for name, value in NonLinearTaskVector(start, dense).vector.items():
            torch.testing.assert_close(value, vector[name], rtol=0, atol=1e-6)
    elif "talos" in mode:
        stored = load_checkpoint(masks, kinds=(talos.KIND,))
        total = sum(value.numel() for value in vector.values())
        ones = sum(int(value.ne(0).sum()) for value in vector.values())
        bits = sum(int(np.unpackbits(value.numpy()).sum()) for value in stored.theta.values())
        assert ones <= bits and 0.02 * total < ones and bits == pytest.approx(0.05 * total, rel=0.2)
    else:
        assert moved and len(moved) < len(vector)
    if mode.startswith("linear"):
        assert isinstance(LinearizedImageEncoder.load(found), LinearizedImageEncoder)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("linear+atention", "matches none of the"),
        ("linear+last:9", "expected at most 4"),
        ("standard+lora:500", "expected a rank of at most"),
        ("standard+talos:2", "expected talos or talos:SHARE"),
    ],
)
def test_what_is_no_choice_ends_in_a_message(
    mode: str, message: str, run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.main([*run, f"--finetuning-mode={mode}"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
