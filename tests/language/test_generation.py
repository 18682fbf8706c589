from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector
from tangent_arithmetic.language.generation import Sampling, generate, stepwise
from tangent_arithmetic.language.models import Seq2SeqLM
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tests.language.makers import bart, direction, gpt2, llama, rows, t5

WAYS = {
    "greedy": Sampling(new_tokens=12),
    "sampled": Sampling(new_tokens=12, sample=True, seed=3),
    "filtered": Sampling(8, sample=True, temperature=0.7, top_k=9, top_p=0.8, seed=1),
    "an end": Sampling(new_tokens=12, sample=True, seed=5, end=tuple(range(3, 12))),
}
every_way = pytest.mark.parametrize("sampling", WAYS.values(), ids=WAYS)


@every_way
@pytest.mark.parametrize("make", [gpt2, llama, t5, bart])
def test_a_linear_model_without_a_task_vector_generates_as_transformers(make, sampling) -> None:  # type: ignore[no-untyped-def]
    model = make()
    prompts = rows(gpt2(), (6, 2, 4, 4))
    expected = generate(model, prompts, sampling)
    assert expected.shape[1] <= sampling.new_tokens
    assert torch.equal(generate(LinearizedModel(model), prompts, sampling), expected)
    with torch.random.fork_rng([]):
        torch.manual_seed(sampling.seed)
        assert torch.equal(stepwise(model, prompts, sampling), expected)
    if sampling.end:
        over = torch.isin(expected, torch.tensor(sampling.end)).cumsum(1)
        assert bool(over.any()) and bool((expected[:, 1:][over[:, :-1] > 0] == -1).all())


@pytest.mark.parametrize("make", [gpt2, llama, bart])
def test_padding_of_prompts_may_be_on_the_left(make) -> None:  # type: ignore[no-untyped-def]
    model, prompts = make(), rows(gpt2(), (6, 2, 4))
    left = torch.full_like(prompts, -1)
    for row, ids in zip(left, prompts, strict=True):
        row[int((ids == -1).sum()) :] = ids[ids != -1]
    assert not torch.equal(left, prompts)
    for each in (model, LinearizedModel(model)):
        expected = generate(each, prompts, Sampling(5, end=()))
        assert torch.equal(generate(each, left, Sampling(5, end=())), expected)


def test_prompts_that_cannot_be_continued_are_refused() -> None:
    empty = rows(gpt2(), (3, 2))
    empty[1] = -1
    few, paired = gpt2(n_positions=8), bart()
    cases: list[tuple[Any, Any, int, str]] = [
        (few, empty, 1, "got none in row 1; leave the row out"),
        (few, rows(few, (5, 3)), 4, "the model has positions for 8 tokens, got 9"),
        (paired, rows(few, (5,)), 64, "positions for 64 tokens, got 65"),
        (paired, rows(few, (65,)), 1, "positions for 64 tokens, got 65"),
    ]
    for (model, prompts, new, message), linear in product(cases, (False, True)):
        with pytest.raises(UsageError, match=message):
            generate(LinearizedModel(model) if linear else model, prompts, Sampling(new))
    assert generate(few, rows(few, (5, 3)), Sampling(3, end=())).shape == (2, 3)


@pytest.mark.parametrize("make", [gpt2, t5])
def test_a_linear_model_generates_from_its_own_logits(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    moved = LinearizedTaskVector(vector=direction(model, 0.3)).apply_to(model, 1.0)
    prompt = rows(gpt2(), (4,))
    new = generate(moved, prompt, Sampling(6, end=()))
    assert not torch.equal(new, generate(model, prompt, Sampling(6, end=())))
    text = torch.zeros(1, 1, dtype=torch.int64) if isinstance(model, Seq2SeqLM) else prompt
    for step in range(6):  # each token is the most likely one after those before it
        ids = text
        if isinstance(model, Seq2SeqLM):
            width = max(text.shape[1], prompt.shape[1])
            both = [
                torch.nn.functional.pad(t, (0, width - t.shape[1]), value=-1)
                for t in (prompt, text)
            ]
            ids = torch.stack(both, dim=1)
        chosen = moved(ids)[:, text.shape[1] - 1].argmax(dim=1, keepdim=True)
        assert int(new[0, step]) == int(chosen)
        text = torch.cat([text, chosen], dim=1)


def test_the_model_s_own_generation_settings_do_not_count() -> None:
    model, prompts = gpt2(), rows(gpt2(), (4, 4, 4, 4))
    sampling = Sampling(30, sample=True, end=())
    plain = generate(model, prompts, sampling)
    assert plain.shape == (4, 30) and bool((plain == 2).any() & (plain >= 0).all())  # 2 ends texts
    own = model.model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size = 5.0, 1
    assert torch.equal(generate(model, prompts, sampling), plain)
    assert model.model.generation_config is own


def test_the_seed_decides_and_the_generator_is_left_alone() -> None:
    model, prompts = gpt2(), rows(gpt2(), (4, 4))
    before = torch.get_rng_state()
    draws = [generate(model, prompts, Sampling(8, sample=True, seed=s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)
