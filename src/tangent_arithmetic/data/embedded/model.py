"""ViT-Nano-8: the suite's own CLIP, registered with open_clip.

After `register()`, `open_clip.create_model("ViT-Nano-8", pretrained=str(WEIGHTS))` and
`open_clip.get_tokenizer("ViT-Nano-8")` work as for open_clip's own models.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tangent_arithmetic.data.embedded.base import ASSETS
from tangent_arithmetic.data.suites import EMBEDDED_MODEL

CONFIG = ASSETS / f"{EMBEDDED_MODEL}.json"
WEIGHTS = ASSETS / f"{EMBEDDED_MODEL}.safetensors"
MERGES = ASSETS / f"{EMBEDDED_MODEL}_merges.txt.gz"
PREPROCESS: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "size": 32}


@cache
def register() -> None:
    """Adds the model's configuration, with the path of its tokenizer, to those of open_clip."""
    import open_clip

    config = json.loads(CONFIG.read_text())
    config["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": str(MERGES)}
    with tempfile.TemporaryDirectory() as folder:  # open_clip reads configurations from files only
        path = Path(folder) / CONFIG.name
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
