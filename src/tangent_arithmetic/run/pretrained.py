"""The pre-trained encoder of a run, theta0: read from its file, or made and kept there."""

from __future__ import annotations

from pathlib import Path

from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts, resolve
from tangent_arithmetic.encoders.models import (
    is_at_hand,
    is_random,
    is_standard,
    load_image_encoder,
    pretrained,
)
from tangent_arithmetic.encoders.published.layout import ZEROSHOTS, layout_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import ENCODERS
from tangent_arithmetic.storage.statedict import content_hash

LINEAR_FILES = ("linear_finetuned.pt", "linear_ortho_finetuned.pt")


def zeroshot_encoder(run: Run) -> tuple[ModuleEncoder, str]:
    """The run's pre-trained encoder and its content hash; its file is written if it is not there.

    The weights are those of `--load`, or of a published zero-shot file in the run's folder, or the
    model's own. Random ones are drawn from the run's seed.

    Raises:
        UsageError: if the file holds other weights than the model's own or those of `--load`.
    """
    path = run.zeroshot_path
    missing = ddp.broadcast(not path.is_file())
    kept = None if missing else read_facts(path)["hash"]
    override = run.load
    known = override is not None or is_at_hand(run.model)
    if kept is not None and (not known or is_random(run.model)):
        return load_image_encoder(run.model, path), kept
    if override is not None and not _is_start(override, run.model):
        raise UsageError(
            f"--load={override} is not a standard encoder; a linear checkpoint or a head cannot be "
            "the pre-trained model"
        )
    published = published_zeroshot(run) if kept is None and override is None else None
    if published is not None:
        encoder = _starting_point(run.model, published)
    else:
        encoder = pretrained(run.config, run.seed)
    found = content_hash(encoder.weights())
    if kept is not None and kept != found:
        raise UsageError(
            f"{path} holds other pre-trained weights ({kept[:12]}...) than "
            f"{override or run.model} ({found[:12]}...): runs from different starting "
            "points are not mixed. Name another folder with --save, or delete this one"
        )
    if kept is None:
        if ddp.is_main_process():
            encoder.save(path)
        ddp.barrier()
    return encoder, found


def zeroshot_hash(run: Run) -> str:
    """The content hash of the run's pre-trained encoder, from its file if it is there."""
    if ddp.broadcast(run.zeroshot_path.is_file()):
        digest: str = read_facts(run.zeroshot_path)["hash"]
        return digest
    return zeroshot_encoder(run)[1]


def _is_start(path: str, model: str) -> bool:
    """Whether a file holds pre-trained weights: a standard encoder, or a linear one at theta0."""
    if is_standard(path, model):
        return True
    facts = read_facts(resolve(path), model)
    return bool(facts["kind"] in ENCODERS and facts["hash"] == facts["theta0_hash"])


def _starting_point(model: str, path: Path) -> ModuleEncoder:
    """The encoder at the weights of a zero-shot file, or at theta0 of a linear checkpoint."""
    encoder = load_image_encoder(model, path)
    if (theta0 := load_checkpoint(path, model=model).theta0) is not None:
        encoder.load_weights(theta0)
    return encoder


def published_zeroshot(run: Run) -> Path | None:
    """The file of theta0 that came with published checkpoints in the run's folder, if there is one.

    A zero-shot file lies in the folder itself, or, one for each task, in those of the tasks;
    without one, a linear checkpoint holds theta0 as well. A folder that is named after a way of
    training may have its zero-shot file in the one of the model beside it.
    """
    layout = layout_of(run.folder)
    places = [run.folder] if layout is None else [run.folder, run.folder.parent / layout.model]
    for folder in places:
        for name in ZEROSHOTS:
            for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
                if path.is_file():
                    return path
    linear = LINEAR_FILES if layout is None or layout.mode.startswith("linear") else ()
    files = (path for name in linear for path in sorted(run.folder.glob(f"*/{name}")))
    return next(files, None)
