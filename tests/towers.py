"""Tiny CLIPs with each kind of vision tower that open_clip has, made known to it by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["a", "photo", "of", "the", ".", "piece", "clothing", "emoji", "face", "shape", "red"]
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2}
SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
COCA_POOL = {"attentional_pool": True, "attn_pooler_heads": 1}


def timm(name: str, pool: str, proj: str) -> dict[str, Any]:
    """The configuration of a vision tower of timm's."""
    return {"image_size": 32, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}


TOWERS: dict[str, dict[str, Any]] = {
    "ViT-Tiny": {"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT},
    "RN-Tiny": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "ConvNeXt-Tiny": {
        "embed_dim": 8,
        "vision_cfg": timm("test_convnext", pool="", proj="linear"),
        "text_cfg": TEXT,
    },
    "SigLIP-Tiny": {
        "embed_dim": 64,  # a SigLIP has no projection: as wide as the tower
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": timm("test_vit", pool="map", proj="none"),
        "text_cfg": {**TEXT, **SIGLIP_TEXT, "hf_tokenizer_name": "tokenizer"},
    },
    "CoCa-Tiny": {
        "embed_dim": 8,
        "custom_text": True,
        "vision_cfg": {**VIT, **COCA_POOL, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 1},
    },
}


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of words in the Hugging Face format."""
    words = {word: i for i, word in enumerate(("<pad>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@contextmanager
def known_towers(folder: Path) -> Iterator[None]:
    """Makes `TOWERS` known to open_clip; `folder` is for their configurations."""
    from open_clip import factory

    from tangent_arithmetic.data.embedded.model import register

    register()  # so that it stays known when the patch is undone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
        patch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
        for name, config in TOWERS.items():
            text = json.dumps(config).replace('"tokenizer"', json.dumps(str(folder / "tokenizer")))
            (folder / f"{name}.json").write_text(text)
        write_tokenizer(folder / "tokenizer")
        factory.add_model_config(folder)
        yield
