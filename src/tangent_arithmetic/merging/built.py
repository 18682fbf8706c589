"""Whether models compute features alike beyond their weights, as far as their files say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tangent_arithmetic.encoders.base import BUILT
from tangent_arithmetic.encoders.built import (
    ACTIVATION,
    ADOPTED,
    COMPARED,
    PREPROCESS,
    checked,
    differences,
)
from tangent_arithmetic.merging.weights import Weights
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.checkpoints import ENCODERS

HASHES = ("code", "config")  # of files, which change without a change of the function
# entries of a config.json of transformers that change the function, but no name and no shape
FUNCTIONS = (
    *("hidden_act", "activation_function", "hidden_activation", "dense_act_fn"),
    *("feed_forward_proj", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale"),
    *("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "num_experts_per_tok"),
    *("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps", "embedding_multiplier"),
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "logits_scaling"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "query_pre_attn_scalar"),
    *("relative_attention_max_distance", "position_embedding_type"),
    *("residual_multiplier", "attention_multiplier"),
)
NAMED = {"swish": "silu", "gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new"}  # alike
TOWERS = ("vision_config", "text_config")  # of complete models; of a CLIP the first is merged


def check_built(one: Weights, other: Weights, name: str, other_name: str) -> None:
    """Checks that two models record one activation and one preprocessing, see `encoders.built`.

    What only one of them records does not count, nor do hashes of sources. An encoder without a
    record has what its name implies, and differs from one whose file says that it has not.

    Args:
        one: a model.
        other: another one.
        name: the name of the one, for the message.
        other_name: that of the other.

    Raises:
        UsageError: listing what differs.
    """
    if changed := [*_changed(one, other)]:
        raise UsageError(
            f"{name} and {other_name} compute features differently beyond their weights: their "
            f"files record {', '.join(changed)}. Choose models that were made with the same"
        )


def check_functions(one: Weights, other: Weights, name: str, other_name: str) -> None:
    """Checks that the folders of two models have one activation, number of heads and the like.

    Entries of `FUNCTIONS` that only one configuration has do not count.

    Raises:
        UsageError: listing what differs.
    """
    a, b = _functions(one), _functions(other)
    if changed := [n for n in a if n in b and a[n] != b[n]]:
        listed = ", ".join(f"{n} {shown(a[n])} and {shown(b[n])}" for n in changed)
        raise UsageError(
            f"{name} and {other_name} compute different functions of their weights: their "
            f"config.json has {listed}. Choose models with the same, or set "
            "allow_base_mismatch=true"
        )


def _functions(weights: Weights) -> dict[str, Any]:
    """The `FUNCTIONS` of a folder, under one name and with one value in all versions."""
    config = weights.config
    config = next((c for name in TOWERS if isinstance(c := config.get(name), Mapping)), config)
    rotary = config.get("rope_parameters")  # of transformers 5
    known = {**config, **(rotary if isinstance(rotary, Mapping) else {})}
    found = {name: known[name] for name in FUNCTIONS if known.get(name) is not None}
    return {n: NAMED.get(v, v) if isinstance(v, str) else v for n, v in found.items()}


def _changed(one: Weights, other: Weights) -> Iterator[str]:
    records = _record(one), _record(other)
    a, b = map(_entries, records)
    shared = {name: a[name] for name in a if name in b and name not in HASHES}
    changed = differences(shared, b)
    changed |= {n: v for n, v in shared.items() if n not in COMPARED and v != b[n]}
    for name, value in changed.items():
        yield f"{shown(name)} {shown(value)} and {shown(b[name])}"
    if not all(records) and one.is_encoder and other.is_encoder:
        for name in (name for record in records for name in record.get(ADOPTED, ())):
            yield f"another {name} than that of their model in one, and none in the other"


def _record(weights: Weights) -> Mapping[str, Any]:
    """What a file records; empty if it records nothing."""
    recorded = weights.facts.get(BUILT)
    if weights.kind in ENCODERS:
        return checked(recorded, str(weights.place))
    return recorded if isinstance(recorded, Mapping) else {}


def _entries(record: Mapping[str, Any]) -> dict[str, Any]:
    """The activation and the entries of the preprocessing, as far as they are recorded."""
    preprocess = record.get(PREPROCESS)
    inner = preprocess if isinstance(preprocess, Mapping) else {}
    facts = {ACTIVATION: record.get(ACTIVATION), **inner}
    return {name: value for name, value in facts.items() if value is not None}
