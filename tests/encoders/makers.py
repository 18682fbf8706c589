"""Files as the public projects write them, of small random models."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import pretrained
from torch import Tensor, nn

import src.modeling
from tangent_arithmetic.encoders.clip import outlined
from tangent_arithmetic.encoders.published import formats
from tests.towers import known_towers

SMALL = ("ViT-Tiny", "RN-Tiny")


@contextmanager
def small_models(folder: Path) -> Iterator[None]:
    """Makes the small models stand for OpenAI's, so that their names mean QuickGELU."""
    with known_towers(folder), pytest.MonkeyPatch.context() as patch:
        for name in SMALL:
            tag = {"url": "", "hf_hub": "nobody/none", "quick_gelu": True}
            patch.setitem(pretrained._PRETRAINED, name, {"openai": tag})
        patch.setattr(formats, "OPENAI", SMALL)
        outlined.cache_clear()
        yield


class PublishedEncoder(nn.Module):
    """The encoder of task_vectors and its successors: a CLIP without its text transformer."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.model = clip
        _, train, val = open_clip.create_model_and_transforms("ViT-Tiny")
        self.train_preprocess, self.val_preprocess = train, val
        self.cache_dir = None
        if hasattr(clip, "transformer"):
            del clip.transformer


class PublishedHead(nn.Linear):
    """Their classification head."""

    def __init__(self, normalize: bool, weights: Tensor) -> None:
        super().__init__(weights.shape[1], weights.shape[0])
        self.normalize = normalize
        self.weight = nn.Parameter(weights.clone())
        self.bias = nn.Parameter(torch.zeros_like(self.bias))


@contextmanager
def named(**classes: type) -> Iterator[None]:
    """Lets classes be pickled as `src.modeling.NAME`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, kind in classes.items():
            kind.__module__, kind.__qualname__ = "src.modeling", name
            patch.setattr(src.modeling, name, kind)
        yield


def clip(tower: str, seed: int = 0) -> Any:
    """A random CLIP with OpenAI's activation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.create_model(tower, force_quick_gelu=True).eval()


Writer = Callable[[Any, Path], None]


def _legacy(value: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it looks for the classes' source code
        torch.save(value, path, _use_new_zipfile_serialization=False)


def _plain(protocol: int) -> Writer:
    def write(value: Any, path: Path) -> None:
        path.write_bytes(pickle.dumps(value, protocol=protocol))

    return write


WRITERS: dict[str, Writer] = {
    "zip": torch.save,
    "legacy": _legacy,
    **{f"pickle {protocol}": _plain(protocol) for protocol in (2, 3, 4, 5)},
}


def write_encoder(tower: str, path: Path, writer: str = "zip", seed: int = 0) -> Any:
    """Writes a pickled encoder and returns the CLIP in it."""
    model = clip(tower, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named(ImageEncoder=PublishedEncoder):
        WRITERS[writer](PublishedEncoder(model), path)
    return model
