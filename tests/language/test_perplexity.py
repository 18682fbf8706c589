from __future__ import annotations

import math

import pytest
import torch

from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector, TaskVector
from tangent_arithmetic.language.losses import token_loss
from tangent_arithmetic.language.perplexity import linear_sweep, mean_loss, perplexity, sweep
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tests.language.makers import direction, gpt2, llama, rows, t5

COEFS = [0.0, 0.25, 1.0, -2.0]


@pytest.mark.parametrize("make", [gpt2, llama, t5])
def test_a_sweep_is_what_each_model_gives(make) -> None:  # type: ignore[no-untyped-def]
    model = make().double()
    ids, tau = rows(model, (7, 3, 5, 6)), direction(model)
    linear = LinearizedModel(model)
    vector, linear_vector = TaskVector(vector=tau), LinearizedTaskVector(vector=tau)
    swept = {False: sweep(model, tau, ids, COEFS, 3), True: sweep(linear, tau, ids, COEFS, 3)}
    for coef in COEFS:
        moved = vector.apply_to(model, coef)
        assert math.isclose(swept[False][coef], mean_loss(moved, ids), rel_tol=1e-10)
        moved = linear_vector.apply_to(model, coef)
        assert math.isclose(swept[True][coef], mean_loss(moved, ids), rel_tol=1e-10)
    assert swept[True][0.0] == pytest.approx(swept[False][0.0])
    assert abs(swept[True][1.0] - swept[False][1.0]) > 1e-4  # the two differ away from theta0


@pytest.mark.parametrize("positions", [1, 4, 1000])
def test_memory_bounds_do_not_change_the_sums(positions: int) -> None:
    model = gpt2().double()
    ids, tau = rows(model, (7, 2, 5)), direction(model)
    linear = LinearizedModel(model)
    whole = linear_sweep(linear, tau, ids, COEFS, batch_size=3)
    parts = linear_sweep(linear, tau, ids, COEFS, batch_size=2, positions=positions)
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-12)


def test_perplexity_counts_tokens_and_not_rows() -> None:
    model = gpt2().double()
    ids = rows(model, (6, 2))
    logs = model(ids).log_softmax(dim=-1).detach()
    known = [-float(logs[0, i, ids[0, i + 1]]) for i in range(5)] + [-float(logs[1, 0, ids[1, 1]])]
    assert perplexity(model, ids) == pytest.approx(math.exp(sum(known) / 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_those_of_their_logits(dtype: torch.dtype) -> None:
    model = gpt2(vocab_size=3000, n_positions=256)
    ids, tau = torch.randint(3, 3000, (4, 256)), direction(model)
    model, tau = model.to(dtype), {name: value.to(dtype) for name, value in tau.items()}
    with torch.no_grad():
        logits = model(ids)
        logs = logits.double().log_softmax(dim=-1)
    expected = -float(logs[:, :-1].gather(2, ids[:, 1:, None]).mean())
    assert float(token_loss(logits, ids)) == pytest.approx(expected, rel=1e-5)
    for size in (1, 4):
        assert mean_loss(model, ids, size) == pytest.approx(expected, rel=1e-3)
    linear = LinearizedModel(model)
    f0, (step,) = linear.tangents(ids, [tau])
    logs = (f0.double() + 0.5 * step.double()).log_softmax(dim=-1)
    expected = -float(logs[:, :-1].gather(2, ids[:, 1:, None]).mean())
    assert sweep(linear, tau, ids, [0.5], 4)[0.5] == pytest.approx(expected, rel=1e-5)


def test_rows_beyond_the_model_s_positions_are_refused() -> None:
    model = gpt2(n_positions=8)
    ids = torch.nn.functional.pad(rows(model, (8, 5)), (4, 0), value=-1)
    assert math.isfinite(mean_loss(model, ids))  # columns of padding need no position
    for each in (model, LinearizedModel(model)):
        with pytest.raises(UsageError, match="positions for 8 tokens, got 9"):
            sweep(each, direction(model), rows(model, (9, 5)), [0.0])


def test_rows_without_a_next_token_are_refused() -> None:
    with pytest.raises(UsageError, match="two tokens or more"):
        mean_loss(gpt2(), torch.tensor([[4], [5]]))
