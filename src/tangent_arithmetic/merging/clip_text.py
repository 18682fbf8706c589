"""The text tower of a CLIP of Hugging Face, for zero-shot heads (needs `transformers`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tangent_arithmetic.merging.weights import open_weights
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError


class TextTower(nn.Module):
    """The text tower with the names that `encoders.heads.zeroshot_weights` asks for."""

    def __init__(self, tower: Any, tokenizer: Any, logit_scale: Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.words = tokenizer
        self.register_buffer("logit_scale", logit_scale.float())

    def tokenizer(self, texts: list[str]) -> Any:
        """Token ids and their mask, padded to the longest text."""
        return self.words(texts, padding=True, truncation=True, return_tensors="pt")

    def encode_text(self, tokens: Any) -> Tensor:
        """Features of texts, shape (batch, features), not normalised."""
        features: Tensor = self.tower(**tokens).text_embeds
        return features


class HuggingFaceText:
    """Reads the text tower of a whole CLIP when it is first called.

    Args:
        place: the CLIP's folder or name on the hub.
        device: where it runs.
    """

    def __init__(self, place: str, device: torch.device) -> None:
        self.place, self.device = place, device
        self._tower: TextTower | None = None

    def __call__(self) -> TextTower:
        """The tower.

        Raises:
            MissingFileError: if `transformers` is not installed, or the CLIP is not there.
            UsageError: if it is not a whole CLIP.
        """
        if self._tower is None:
            self._tower = self._read().to(self.device).eval()
        return self._tower

    def _read(self) -> TextTower:
        weights = open_weights(self.place)
        if weights.folder is None or "logit_scale" not in weights.outline:
            raise UsageError(
                f"base_model={self.place} is not the folder of a whole CLIP (CLIPModel), whose "
                "text tower makes the heads"
            )
        try:
            from transformers import AutoTokenizer, CLIPTextModelWithProjection
        except ImportError as error:
            raise MissingFileError(
                "heads of a CLIP of Hugging Face need the library transformers, which is not "
                'installed (pip install -e ".[hub]")'
            ) from error
        folder = str(weights.folder)
        try:
            tower = CLIPTextModelWithProjection.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of transformers, tokenizers, safetensors, the file system
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(
                f"base_model={self.place} cannot be read as a CLIP ({reason})"
            ) from error
        return TextTower(tower, tokenizer, weights.read("logit_scale"))
