"""Tiny CLIPs with each kind of vision tower that open_clip has, made known to it by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WORDS = ["a", "photo", "of", "the", ".", "piece", "clothing", "emoji", "face", "shape", "red"]
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "ViT-Tiny": {"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT},
    "RN-Tiny": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "ConvNeXt-Tiny": {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": "test_convnext",
            "timm_pool": "",
            "timm_proj": "linear",
        },
        "text_cfg": TEXT,
    },
    "SigLIP-Tiny": {
        "embed_dim": 64,  # a SigLIP has no projection: as wide as the tower
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": "test_vit",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
            "hf_tokenizer_name": "tokenizer",
        },
    },
    "CoCa-Tiny": {
        "embed_dim": 8,
        "custom_text": True,
        "vision_cfg": {
            **VIT, "attentional_pool": True, "attn_pooler_heads": 1, "output_tokens": True,
        },
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 1},
    },
}  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of words as the Hugging Face hub has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("<pad>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


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
