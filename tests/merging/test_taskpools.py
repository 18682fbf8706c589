"""Evaluation of merged CLIPs of Hugging Face on local data, in the public projects' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tangent_arithmetic.commands import merge
from tangent_arithmetic.data.registry import get_dataset
from tangent_arithmetic.merging import CLIPVisionModelPool, TaskArithmeticAlgorithm
from tangent_arithmetic.merging.taskpools import CLIPVisionModelTaskPool, HubRows
from tangent_arithmetic.runtime.errors import UsageError
from tests.clip8_miniature import enlarge_mnist
from tests.miniatures import MAKERS
from tests.towers import write_tokenizer

pytestmark = [pytest.mark.clip, pytest.mark.slow]
NAMES = ("red", "blue")
MODELS = {"_pretrained_": "base", "svhn": "svhn", "mnist": "mnist"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP and two towers of ViT-B/32's size with random weights; three data sets."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("taskpools")
    vision: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "image_size": 224}
    vision |= {"num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 99, "eos_token_id": 1}
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=512))
    whole.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    for name in ("mnist", "svhn"):
        tower = CLIPVisionModel(CLIPVisionConfig(**vision))
        tower.save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MNIST", "SVHN"):
            MAKERS[name](folder / "data", patch)
    enlarge_mnist(folder / "data")
    pictures = [Image.new("RGB", (40, 30), color) for color in NAMES for _ in range(3)]
    rows = Dataset.from_dict(
        {"image": pictures, "label": [0] * 3 + [1] * 3},
        features=Features({"image": ImageFeature(), "label": ClassLabel(names=list(NAMES))}),
    )
    (folder / "colors").mkdir()
    rows.to_parquet(folder / "colors" / "test.parquet")
    return folder


def test_the_command_of_fusion_bench_runs_on_local_files(root: Path, tmp_path: Path) -> None:
    models = {name: root / folder for name, folder in MODELS.items()}
    colors = f"{{_target_: datasets.load_dataset, path: '{root / 'colors'}', split: test}}"
    words = ["method=task_arithmetic", "method.scaling_factor=0.5", "fabric.accelerator=cpu"]
    words += ["modelpool=CLIPVisionModelPool/clip-vit-base-patch32_svhn_and_mnist"]
    words += [f"modelpool.models.{name}={path}" for name, path in models.items()]
    words += ["taskpool=CLIPVisionModelTaskPool/clip-vit-base-patch32_svhn_and_mnist"]
    words += [f"taskpool.base_model={root / 'base'}", f"+taskpool.test_datasets.colors={colors}"]
    words += ["~taskpool.test_datasets.svhn", "taskpool.dataloader_kwargs.num_workers=0"]
    words += [f"path.data_dir={root / 'data'}", f"path.output_dir={tmp_path / 'outputs'}"]
    words += [f"report_save_path={tmp_path / 'report.json'}", "print_config=false"]
    words += [f"merged_model_save_path={tmp_path / 'merged'}"]
    assert merge.main(words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"model_info", "mnist", "colors", "average", "merge", "seconds"}
    for name in ("mnist", "colors"):
        assert 0 <= report[name]["accuracy"] <= 1 and report[name]["loss"] > 0
    assert report["colors"]["num_images"] == 6
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def logits_of_transformers(root: Path, merged: Any, images: Any, texts: list[str]) -> torch.Tensor:
    """Logits by `transformers` alone: text and vision towers, projections, scale."""
    from transformers import AutoTokenizer, CLIPModel

    whole = CLIPModel.from_pretrained(root / "base").eval()
    whole.vision_model.load_state_dict(
        {name.removeprefix("vision_model."): value for name, value in merged.items()}, strict=False
    )
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    with torch.no_grad():
        words = whole.text_model(**tokenizer(texts, padding=True, return_tensors="pt"))
        text = F.normalize(whole.text_projection(words.pooler_output), dim=-1)
        features = whole.vision_model(pixel_values=images).pooler_output
        image = F.normalize(whole.visual_projection(features), dim=-1)
        return whole.logit_scale.exp() * image @ text.T


def test_accuracy_and_loss_equal_those_of_transformers(root: Path) -> None:
    pool = CLIPVisionModelPool({"_pretrained_": root / "base", "mnist": root / "mnist"})
    state = TaskArithmeticAlgorithm(0.7).run(pool)
    tasks = CLIPVisionModelTaskPool(
        {"mnist": HubRows("ylecun/mnist", None, "test")},
        str(root / "base"),
        data_location=str(root / "data"),
        device="cpu",
        num_workers=0,
    )
    encoder: Any = tasks.encoder(pool, state)
    report = tasks.evaluate(encoder)["mnist"]
    data = get_dataset("MNIST", encoder.val_preprocess, root / "data", suite="clip8").test
    images = torch.stack([encoder.val_preprocess(data[i][0]) for i in range(len(data))])
    labels = torch.tensor([data[i][1] for i in range(len(data))])
    texts = [f'a photo of the number: "{digit}".' for digit in "0123456789"]
    logits = logits_of_transformers(root, state, images, texts)
    assert report["num_images"] == len(data)
    assert report["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    hits = (logits.argmax(dim=1) == labels).double().mean()
    assert report["accuracy"] == pytest.approx(float(hits))


def test_errors_of_the_evaluation(root: Path) -> None:
    rows = {"colors": HubRows(str(root / "colors"), None, "test")}
    with pytest.raises(UsageError, match="has no validation split, which scaling_factor=auto"):
        tasks = CLIPVisionModelTaskPool(rows, str(root / "base"), device="cpu")
        pool = CLIPVisionModelPool({"_pretrained_": root / "base", "a": root / "mnist"})
        state = {name: pool.base.read(name) for name in pool.base.outline}
        tasks.sweep(tasks.encoder(pool, state), {}, [0.5])
    with pytest.raises(UsageError, match="names its weights in another way than the encoder"):
        tasks.examples(CLIPVisionModelPool({"colors": root / "mnist"})).encoder()
    with pytest.raises(UsageError, match=r"has no visual_projection\.weight"):
        towers = CLIPVisionModelTaskPool(rows, str(root / "mnist"), device="cpu")
        towers.encoder(pool, state)
    with pytest.raises(UsageError, match="expected the folder of a complete CLIP"):
        tasks.base_model = str(root / "base")
        towers.evaluate(tasks.encoder(pool, state))
