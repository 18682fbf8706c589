"""The text tower of a Hugging Face CLIP, for zero-shot heads (needs `transformers`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from tangent_arithmetic.merging.weights import open_weights
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError


class TextTower(nn.Module):
    """A text tower with the interface that `encoders.heads.zeroshot_weights` expects."""

    def __init__(
        self, tower: nn.Module, tokenizer: Callable[..., Any], logit_scale: Tensor
    ) -> None:
        super().__init__()
        self.tower, self.words = tower, tokenizer
        self.register_buffer("logit_scale", logit_scale.float())

    def tokenizer(self, texts: list[str]) -> Any:
        """Token ids and their attention mask, padded to the longest text."""
        return self.words(texts, padding=True, truncation=True, return_tensors="pt")

    def encode_text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Text features, not normalised, shape (batch, features)."""
        features: Tensor = self.tower(**tokens).text_embeds
        return features


def read_text_tower(place: str) -> TextTower:
    """The text tower of a complete CLIP.

    Args:
        place: the folder of the CLIP, or its name on the hub.

    Raises:
        MissingFileError: if `transformers` is not installed, or the CLIP is missing.
        UsageError: if it is not a complete CLIP.
    """
    weights = open_weights(place)
    if weights.folder is None or "logit_scale" not in weights.outline:
        raise UsageError(
            f"base_model={place}: expected the folder of a complete CLIP (CLIPModel), whose text "
            "tower makes the zero-shot heads"
        )
    try:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection
    except ImportError as error:
        raise MissingFileError(
            "zero-shot heads of a Hugging Face CLIP need the library transformers; install it "
            'with pip install -e ".[hub]"'
        ) from error
    folder = str(weights.folder)
    try:
        tower = CLIPTextModelWithProjection.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of transformers, tokenizers, safetensors, the file system
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"cannot read base_model={place} as a CLIP ({reason})") from error
    return TextTower(tower, tokenizer, weights.read("logit_scale")).eval()
