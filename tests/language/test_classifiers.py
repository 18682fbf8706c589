from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector
from tangent_arithmetic.language import checkpoints
from tangent_arithmetic.language.classification import Classification, parts
from tangent_arithmetic.language.models import TextClassifier
from tangent_arithmetic.language.settings import Settings
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.training.recipe import Recipe
from tests.language.makers import direction, drawn, gpt2, llama, rows, t5
from tests.language.worlds import World

RECIPE = Recipe(
    lr=0.01, epochs=1, batch_size=8, num_grad_accumulation=1, warmup_length=0, wd=0, ls=0
)
FAMILIES: dict[str, Callable[..., Any]] = {
    "gpt2": lambda **kw: transformers.GPT2ForSequenceClassification(gpt2(**kw).model.config),
    "llama": lambda **kw: transformers.LlamaForSequenceClassification(llama(**kw).model.config),
    "t5": lambda **kw: transformers.T5ForSequenceClassification(t5(**kw).model.config),
}


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_a_classifier_is_that_of_transformers(make: Any) -> None:
    model = drawn(make(num_labels=3, pad_token_id=0)).eval()
    ids = rows(gpt2(), (7, 3, 5))
    for row, last in enumerate((6, 2, 4)):
        ids[row, last] = 2  # the end of a text, by which T5 knows its last token
    expected = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long()).logits
    assert torch.allclose(TextClassifier(model)(ids), expected, atol=1e-5)


def test_the_head_is_known_by_its_name() -> None:
    for make in FAMILIES.values():
        model = TextClassifier(make(num_labels=2, pad_token_id=0))
        assert any(n.startswith(f"{model.head}.") for n, _ in model.named_parameters())


def test_a_head_on_another_token_is_refused(world: World) -> None:
    with pytest.raises(UsageError, match=r"BertFor.* no head .*expected .*score or classif"):
        checkpoints.load_classifier(world.model("judge"), 2)


def test_a_fine_tuned_model_has_the_head_it_started_from(world: World, tmp_path: Path) -> None:
    def head_of(folder: str) -> torch.Tensor:
        settings = Settings(world.model("gpt2"), tmp_path, RECIPE, finetuned={"cola": folder})
        study = Classification(settings)
        _, head = parts(study.vector("cola"), study.base("cola").head)
        return head["model.score.weight"]

    model = checkpoints.load_classifier(world.model("gpt2"), 2, seed=3)
    with torch.no_grad():
        model.model.score.weight.add_(1)
    model.model.save_pretrained(tmp_path / "published")
    assert torch.equal(head_of(str(tmp_path / "published")), torch.zeros(2, 16))  # not known
    checkpoints.save(model, tmp_path / "own", None, {"seed": 3})
    assert torch.allclose(head_of(str(tmp_path / "own")), torch.ones(2, 16))
    other = checkpoints.load_classifier(world.model("gpt2"), 3)
    other.model.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match=r"head of .* for cola .* not match:\s+weight: shape"):
        head_of(str(tmp_path / "other"))


@pytest.mark.parametrize("mode", ["standard", "posthoc"])
def test_a_sweep_counts_what_each_model_answers(world: World, tmp_path: Path, mode: Any) -> None:
    settings = Settings(
        world.model("gpt2"), tmp_path, RECIPE, mode=mode, data=world.data, eval_batch_size=7
    )
    study = Classification(settings)
    base = study.base("mnli")
    body, head = parts(LinearizedTaskVector(vector=direction(base, 1.0)), base.head)
    assert head.keys() == {f"{base.head}.weight"} and not head.keys() & body.vector.keys()
    coefs = (0.0, 0.3, 1.0)
    swept = study.sweep("mnli", "test", body.vector, head, coefs)
    test = study.rows("mnli", "test")
    for coef in coefs:
        whole = study.vectors.kind(vector={**{n: coef * v for n, v in body.vector.items()}, **head})
        found = whole.apply_to(base)(test.ids).argmax(dim=1)
        assert swept[coef] == pytest.approx(float((found == test.labels).double().mean()))
    assert len(set(swept.values())) > 1
