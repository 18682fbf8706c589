from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tangent_arithmetic.language.losses import token_loss
from tangent_arithmetic.language.models import CausalLM, LanguageModel, Seq2SeqLM, check_positions
from tangent_arithmetic.language.tokens import paired
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.tangent import plain_jvp
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tests.language.makers import MODELS, VOCABULARY, bart, direction, drawn, gpt2, rows, t5

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def central_difference(model: LanguageModel, tau: dict[str, Tensor], ids: Tensor) -> Tensor:
    """J tau in float64, by a difference of fourth order."""
    theta = dict(model.named_parameters())

    def at(coef: float) -> Tensor:
        weights = {name: value + coef * tau[name] for name, value in theta.items()}
        return torch.func.functional_call(model, weights, (ids,))

    h = 1e-3
    with torch.no_grad():
        return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def real(model: LanguageModel, ids: Tensor, values: Tensor) -> Tensor:
    """The values at positions that are not padding."""
    return values[(model.sequence(ids) != -1)[:, : values.shape[1]]]


def _children(module: torch.nn.Module) -> Iterable[tuple[str, Any]]:
    return module.named_children()


def in_float64(model: LanguageModel) -> LanguageModel:
    """The same function in float64 throughout: transformers computes parts in float32."""
    wide = copy.deepcopy(model).double()
    for module in list(wide.modules()):
        for name, child in list(_children(module)):
            if type(child).__name__ in ("LlamaRMSNorm", "T5LayerNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    for part in wide.modules():
        if (config := getattr(part, "config", None)) is not None:
            config._attn_implementation = "sdpa"  # no softmax in float32
    return wide


@every_model
def test_the_tangent_is_exact_with_padding(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    ids, tau = rows(model), direction(model)
    f0, (step,) = LinearizedModel(model).tangents(ids, [tau])
    wide, wide_tau = in_float64(model), {name: value.double() for name, value in tau.items()}
    expected, exact = plain_jvp(wide, {}, wide_tau, ids)
    difference = real(model, ids, exact - central_difference(wide, wide_tau, ids))
    assert float(difference.norm() / real(model, ids, exact).norm()) < 1e-8
    for found, right in ((f0, expected), (step, exact)):
        error = real(model, ids, found - right).norm() / real(model, ids, right).norm()
        assert float(error) < 1e-6


@every_model
def test_what_is_padded_does_not_matter(make) -> None:  # type: ignore[no-untyped-def]
    model = make().double()
    ids, tau = rows(model), direction(model)
    linear = LinearizedModel(model)
    f0, (step,) = linear.tangents(ids, [tau])
    for row in range(len(ids)):
        alone = ids[row : row + 1]
        g0, (ahead,) = linear.tangents(alone, [tau])
        length = int((model.sequence(alone) != -1).sum())
        assert torch.allclose(g0[0, :length], f0[row, :length], atol=1e-10)
        assert torch.allclose(ahead[0, :length], step[row, :length], atol=1e-10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left_is_padding_too(attention: str) -> None:
    model = gpt2(attention).double()
    ids, tau = rows(model, (5, 5)), direction(model)
    left = torch.nn.functional.pad(ids, (3, 0), value=-1)
    linear = LinearizedModel(model)
    f0, (step,) = linear.tangents(ids, [tau])
    g0, (ahead,) = linear.tangents(left, [tau])
    assert torch.allclose(g0[:, 3:], f0, atol=1e-10)
    assert torch.allclose(ahead[:, 3:], step, atol=1e-10)
    assert torch.allclose(token_loss(g0, left), token_loss(f0, ids))


def test_positions_are_those_of_the_model() -> None:
    shape: Any = {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    shape |= {"hidden_size": 16, "max_position_embeddings": 9, "is_decoder": True}
    config = transformers.RobertaConfig(vocab_size=VOCABULARY, pad_token_id=1, **shape)
    model = CausalLM(drawn(transformers.RobertaForCausalLM(config)))
    ids = rows(model, (7, 7))
    left = torch.nn.functional.pad(ids, (3, 0), value=-1)
    expected = model.model(input_ids=ids).logits
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(left)[:, 3:], expected, rtol=1e-5, atol=1e-5)
    check_positions(model, length=7)
    with pytest.raises(UsageError, match="--length=8: the model has positions for 7 tokens"):
        check_positions(model, length=8)


def test_the_first_token_of_a_decoder_has_a_position() -> None:
    model = bart()
    check_positions(model, length=63)
    assert model(paired([[5] * 63], [[5] * 63], model.start)).shape[1] == 64
    with pytest.raises(UsageError, match=r"--length=64: .* give --length=63 or less"):
        check_positions(model, length=64)


def test_tied_weights_are_one_direction() -> None:
    for model, name in ((gpt2(), "lm_head"), (t5(), "decoder.embed_tokens")):
        assert f"model.{name}.weight" in model.state_dict()
        assert f"model.{name}.weight" not in dict(model.named_parameters())
        assert f"model.{name}.weight" in LinearizedModel(model).aliases()


def test_dropout_stays_off_in_training() -> None:
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ids = rows(model)
    assert torch.equal(model.train()(ids), model(ids)) and not model.training


@every_model
def test_the_loss_is_that_of_transformers(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    ids = rows(model)
    sequence = model.sequence(ids)
    inputs = model.inputs(ids[:, 0] if isinstance(model, Seq2SeqLM) else ids)
    if isinstance(model, Seq2SeqLM):  # its labels are shifted by the model itself
        labels = torch.nn.functional.pad(sequence[:, 1:], (0, 1), value=-1)
        expected = model.model(**inputs, labels=labels.where(labels >= 0, -100)).loss
    else:
        expected = model.model(**inputs, labels=ids.where(ids >= 0, -100)).loss
    assert torch.allclose(token_loss(model(ids), sequence), expected, atol=1e-5)
