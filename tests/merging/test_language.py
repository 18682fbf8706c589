"""Language models in true folders of transformers: names, ties, heads, vocabularies, shards."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from tangent_arithmetic import merging
from tangent_arithmetic.commands import merge
from tangent_arithmetic.merging import LanguageModelPool, ModelPool, Piece
from tangent_arithmetic.merging.methods.dare import is_linear_weight
from tangent_arithmetic.merging.spectral import is_spectral
from tangent_arithmetic.merging.targets import pool_of
from tangent_arithmetic.merging.weights import is_embedding
from tangent_arithmetic.runtime.errors import UsageError

State = dict[str, Tensor]
WORDS = ["<unk>", "<eos>", "a", "good", "bad", "film", "not", "very"]


def gpt2(kind: Any = transformers.GPT2LMHeadModel, rows: int = 20, **settings: Any) -> Any:
    size: dict[str, Any] = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 8}
    return kind(
        transformers.GPT2Config(**size, vocab_size=rows, bos_token_id=1, eos_token_id=1, **settings)
    )


def t5(rows: int = 20) -> Any:
    size: dict[str, Any] = {"d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**size, vocab_size=rows))


def mamba(rows: int = 20, **settings: Any) -> Any:
    size: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": rows}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**size, **settings))


def of(name: str, kind: str = "CausalLM", rows: int = 20, **settings: Any) -> Any:
    """A small model of a family."""
    size: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "vocab_size": rows, "pad_token_id": 0}
    size |= {"bos_token_id": 1, "eos_token_id": 1}
    config = getattr(transformers, f"{name}Config")(**{**size, **settings})
    return getattr(transformers, f"{name}For{kind}")(config)


def llava(rows: int = 20) -> Any:
    """A model of images and text, whose configuration has the number of tokens inside."""
    size: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    text = transformers.LlamaConfig(**size, num_attention_heads=2, vocab_size=rows)
    image = transformers.CLIPVisionConfig(**size, num_attention_heads=2, image_size=8, patch_size=4)
    config = transformers.LlavaConfig(vision_config=image, text_config=text, image_token_index=1)
    return transformers.LlavaForConditionalGeneration(config)


def tokenizer(added: tuple[str, ...] = (), words: list[str] = WORDS) -> Any:
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", eos_token="<eos>"
    )
    made.add_tokens(list(added))
    return made


def family(root: Path, make: Callable[[], Any], **saving: Any) -> dict[str, Path]:
    """A base model and two others, whose weights are moved by 1 and 2."""
    torch.manual_seed(0)
    base = make()
    places = {}
    for step, name in enumerate(("_pretrained_", "a", "b")):
        model = make()
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for value in model.parameters():
                value.add_(step)
        places[name] = root / name
        model.save_pretrained(places[name], **saving)
        tokenizer().save_pretrained(places[name])
    return places


def tensors(folder: Path) -> State:
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def save_as(state: State, folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    clones = {name: value.clone() for name, value in state.items()}
    save_file(clones, str(folder / "model.safetensors"), metadata={"format": "pt"})


LOADERS: dict[str, tuple[Callable[..., Any], Any]] = {
    "gpt2": (gpt2, transformers.AutoModelForCausalLM),
    "t5": (t5, transformers.AutoModelForSeq2SeqLM),
    "untied": (lambda: gpt2(tie_word_embeddings=False), transformers.AutoModelForCausalLM),
}


@pytest.mark.parametrize("case", LOADERS)
@pytest.mark.parametrize("sharded", [False, True])
def test_folders_merge_and_load(case: str, sharded: bool, tmp_path: Path) -> None:
    make, loader = LOADERS[case]
    size: dict[str, Any] = {"max_shard_size": "3KB"} if sharded else {}
    places = family(tmp_path, make, **size)
    merged = merging.TaskArithmeticAlgorithm(0.5).run_to(
        LanguageModelPool(places), tmp_path / "merged", max_shard_size="base"
    )
    base, found = tensors(places["_pretrained_"]), tensors(merged)
    assert found.keys() == base.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, base[name] + 1.5)
    files = [{file.name for file in folder.glob("model*")} for folder in (merged, places["a"])]
    assert files[0] == files[1] and (len(files[0]) > 2) == sharded
    model = loader.from_pretrained(merged)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (case != "untied")
    assert transformers.AutoTokenizer.from_pretrained(merged)("good film")["input_ids"] == [3, 5]
    assert "README.md" in {file.name for file in merged.iterdir()}


def test_classifiers_merge_into_the_backbone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the published GPT-2 on GLUE: the base has no prefix, old files hold masks."""
    torch.manual_seed(0)
    backbone = gpt2(transformers.GPT2Model)
    backbone.save_pretrained(tmp_path / "base")
    base = tensors(tmp_path / "base")
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(2)}
    save_as(base | masks, tmp_path / "base")
    places = {"_pretrained_": tmp_path / "base"}
    for labels, name in ((2, "cola"), (3, "mnli")):
        model = gpt2(transformers.GPT2ForSequenceClassification, num_labels=labels)
        model.transformer.load_state_dict(backbone.state_dict())
        with torch.no_grad():
            for value in model.parameters():
                value.add_(labels)
        places[name] = tmp_path / name
        model.save_pretrained(places[name])
    with caplog.at_level(logging.INFO):
        merged = merging.TaskArithmeticAlgorithm(1.0).run(LanguageModelPool(places))
    assert "score.weight of cola, a head that the base model lacks" in caplog.text
    assert merged.keys() == (base | masks).keys()
    for name, value in base.items():
        torch.testing.assert_close(merged[name], value + 5)
    assert all(torch.equal(merged[name], value) for name, value in masks.items())
    with pytest.raises(UsageError, match=r"only in the second: score.weight"):
        ModelPool(places).check()


@pytest.mark.parametrize("with_copies", ["_pretrained_", "a", "all"])
@pytest.mark.parametrize("method", ["task_arithmetic", "tsv_m", "ties"])
def test_copies_of_tied_embeddings_stay_equal(
    with_copies: str, method: str, tmp_path: Path
) -> None:
    """Older versions save all names of a tied parameter, newer ones the first."""
    places = family(tmp_path, t5)
    copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    for name, place in places.items():
        if with_copies in (name, "all"):
            state = tensors(place)
            save_as(state | dict.fromkeys(copies, state["shared.weight"]), place)
    algorithm = merging.algorithm_class(merging.get_method(method).algorithm)()
    merged = algorithm.run(LanguageModelPool(places))
    assert merged.keys() == tensors(places["_pretrained_"]).keys()
    assert all(torch.equal(merged[n], merged["shared.weight"]) for n in copies if n in merged)
    once = {
        name: {n: value for n, value in tensors(place).items() if n not in copies}
        for name, place in places.items()
    }
    expected = algorithm.run(once)
    assert all(torch.allclose(merged[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("algorithm", "warns"),
    [
        (merging.ISO_C_Merge(), ""),
        (merging.SvcAlgorithm(), "svc takes the rows of a matrix for outputs"),
        (merging.CoreSpaceAlgorithm(inner="wudi"), "wudi takes the rows"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("make", [gpt2, t5])
def test_layers_that_store_inputs_first_are_named(
    algorithm: merging.Algorithm,
    warns: str,
    make: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    algorithm.merge(LanguageModelPool(family(tmp_path, make)))
    expected = warns if make is gpt2 else ""
    assert expected in caplog.text and bool(caplog.messages) == bool(expected)


def test_an_embedding_that_one_model_has_untied_is_merged_by_itself(tmp_path: Path) -> None:
    places = family(tmp_path, t5)
    for name, place in places.items():
        state = tensors(place)
        head = state["shared.weight"] + (10 if name == "a" else 0)
        save_as(state | {"lm_head.weight": head}, place)
    merged = merging.TaskArithmeticAlgorithm(1.0).run(LanguageModelPool(places))
    torch.testing.assert_close(merged["lm_head.weight"], merged["shared.weight"] + 10)


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "t5": t5,
    "mamba": mamba,
    "neox": lambda: of("GPTNeoX"),
    "llama": lambda: of("Llama"),
    **{
        name: partial(of, name, "MaskedLM")
        for name in ("Bert", "Roberta", "ModernBert", "DebertaV2")
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_the_modules(family: str) -> None:
    """By type and number of rows; DARE drops the weights of linear layers alone."""
    model = FAMILIES[family]()
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    for owner, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2:
            continue
        name, outputs = f"{owner}.weight", module is model.get_output_embeddings()
        of_tokens = isinstance(module, nn.Embedding) and len(weight) == 20
        assert is_embedding(name, weight) == (of_tokens or outputs), name
        assert is_linear_weight(name, tuple(weight.shape)) == isinstance(module, linear), name
        piece = Piece(name, tuple(weight.shape), 0, None, (), ())
        assert is_spectral(piece, None) != of_tokens, name


@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
@pytest.mark.parametrize(
    "algorithm",
    [merging.ISO_C_Merge(), merging.DareTaskArithmetic(only_on_linear_weights=True)],
    ids=repr,
)
def test_stored_copies_of_a_tied_decoder_stay_equal(
    name: str, algorithm: merging.Algorithm, tmp_path: Path
) -> None:
    model = of(name, "MaskedLM")
    named, embedding = (
        dict(model.named_parameters(remove_duplicate=False)),
        model.get_input_embeddings(),
    )
    first, copied = (name for name, value in named.items() if value is embedding.weight)
    places, state = {}, model.state_dict()
    for seed, key in enumerate(("_pretrained_", "a", "b")):
        torch.manual_seed(seed)
        own = {n: v + 0.1 * torch.randn_like(v) for n, v in state.items() if v.is_floating_point()}
        places[key] = tmp_path / key
        model.save_pretrained(places[key])
        save_as({**own, copied: own[first]}, places[key])
    merged = algorithm.run(LanguageModelPool(places))
    assert torch.equal(merged[copied], merged[first])
    base, a, b = (tensors(place)[first] for place in places.values())
    factor = algorithm.options.get("scaling_factor", 0.3 if "Dare" in repr(algorithm) else 0.5)
    torch.testing.assert_close(merged[first], base + factor * (a + b - 2 * base))


OTHERWISE: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "activation": (gpt2, partial(gpt2, activation_function="relu"), "gelu_new and relu"),
    "heads": (partial(of, "Bert", "MaskedLM"),
              partial(of, "Bert", "MaskedLM", num_attention_heads=4), "attention_heads 2 and 4"),
    "rotation": (partial(of, "Llama"),
                 lambda: of("Llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
                 "rope_theta 10000.0 and 500000.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERWISE)
@pytest.mark.parametrize("in_memory", [False, True])
def test_models_that_compute_otherwise_are_refused(
    case: str, in_memory: bool, tmp_path: Path
) -> None:
    usual, other, told = OTHERWISE[case]
    models: dict[str, Any] = {"_pretrained_": usual(), "a": usual(), "b": other()}
    if not in_memory:
        for name, model in models.items():
            model.save_pretrained(tmp_path / name)
            tokenizer().save_pretrained(tmp_path / name)
            models[name] = tmp_path / name
    with pytest.raises(UsageError, match=rf"_pretrained_ and b compute .*{re.escape(told)}"):
        LanguageModelPool(models).check()
    LanguageModelPool(models, allow_base_mismatch=True).check()
    same = usual()
    if case == "activation":
        same.config.activation_function = "gelu_pytorch_tanh"  # another name of gelu_new
    LanguageModelPool({**models, "b": same}).check()


def test_a_tied_tensor_is_an_embedding_under_all_names() -> None:
    """Sorted names have lm_head first; its rows are merged as an embedding, not as a matrix."""
    pool = {}
    for seed, name in enumerate(("_pretrained_", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(9, 4, generator=generator)
        pool[name] = {"lm_head.weight": shared, "model.embed_tokens.weight": shared}
    merged = merging.ISO_C_Merge().run(pool)
    mean = (pool["a"]["lm_head.weight"] + pool["b"]["lm_head.weight"]) / 2
    for name in pool["a"]:
        torch.testing.assert_close(merged[name], mean)


# --- vocabularies


def with_tokens(root: Path, make: Any = gpt2) -> dict[str, Path]:
    """Models with 8 words and 2 spare rows; a adds three tokens, b one of them and another."""
    torch.manual_seed(0)
    places = {}
    for name, added in {"_pretrained_": (), "a": ("x", "y", "z"), "b": ("w", "y")}.items():
        model = make(rows=max(10, 8 + len(added)))
        places[name] = root / name
        model.save_pretrained(places[name])
        tokenizer(added).save_pretrained(places[name])
    return places


def embedding(places: dict[str, Path], name: str, key: str) -> Tensor:
    return tensors(places[name])[key]


UNITED: dict[str, tuple[Any, str]] = {
    "gpt2": (gpt2, "transformer.wte.weight"),
    "t5": (t5, "shared.weight"),
    "mamba": (mamba, "backbone.embeddings.weight"),
    "neox": (partial(of, "GPTNeoX"), "gpt_neox.embed_in.weight"),
    "bert": (partial(of, "Bert", "MaskedLM"), "bert.embeddings.word_embeddings.weight"),
    "llava": (llava, "language_model.model.embed_tokens.weight"),
}


@pytest.mark.parametrize("case", UNITED)
def test_vocabularies_are_united_by_token(case: str, tmp_path: Path) -> None:
    make, key = UNITED[case]
    places = with_tokens(tmp_path, make)
    with pytest.raises(UsageError, match=r"different sizes; vocabulary=union merges them by token"):
        LanguageModelPool(places).check()
    pool = LanguageModelPool(places, vocabulary="union")
    folder = merging.TaskArithmeticAlgorithm(0.5).run_to(pool, tmp_path / "merged")
    base, a, b = (embedding(places, name, key) for name in places)
    found = tensors(folder)[key]
    assert len(found) == 12
    torch.testing.assert_close(found[:8], base[:8] + 0.5 * (a[:8] + b[:8] - 2 * base[:8]))
    y = (a[9] + b[9]) / 2  # where y starts
    expected = torch.stack([a[8], y + 0.5 * (a[9] + b[9] - 2 * y), a[10], b[8]])
    torch.testing.assert_close(found[8:], expected)
    made = transformers.AutoTokenizer.from_pretrained(folder)
    assert made("good x y z w")["input_ids"] == [3, 8, 9, 10, 11] and len(made) == 12
    model = type(make()).from_pretrained(folder)
    assert model.config.get_text_config().vocab_size == 12
    assert len(model.get_output_embeddings().weight) == 12


def test_a_union_needs_embeddings_and_their_number(tmp_path: Path) -> None:
    places = with_tokens(tmp_path)
    config = places["_pretrained_"] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 9}))
    with pytest.raises(UsageError, match="has no vocab_size of 10, the rows of its embeddings"):
        LanguageModelPool(places, vocabulary="union").check()
    save_as(tensors(config.parent) | {"final_logits_bias": torch.zeros(1, 10)}, config.parent)
    with pytest.raises(UsageError, match="has a number for each token in final_logits_bias, which"):
        LanguageModelPool(places, vocabulary="union").check()
    tokenizer(("x", "y", "z", "v")).save_pretrained(places["a"])
    with pytest.raises(UsageError, match="the tokenizer of a has 12 tokens, but its embeddings 11"):
        LanguageModelPool(places, vocabulary="union").check()
    for place in places.values():
        save_as({"other.weight": torch.ones(8, 2)}, place)
    with pytest.raises(UsageError, match=r"has no such embedding among other\.weight and others"):
        LanguageModelPool(places, vocabulary="union").check()


def test_models_in_other_precisions_are_united_unrounded(tmp_path: Path) -> None:
    places = with_tokens(tmp_path)
    base = tensors(places["_pretrained_"])
    save_as({name: value.bfloat16() for name, value in base.items()}, places["_pretrained_"])
    pool, key = LanguageModelPool(places, vocabulary="union"), "transformer.wte.weight"
    for name, own in (("a", [8, 9, 10]), ("b", [9])):
        value = tensors(places[name])[key]
        found = pool.weights(name).read(key)
        assert found.dtype == torch.float32 and torch.equal(found[:8], value[:8])
        assert torch.equal(found[own], value[own])


def test_a_union_without_new_tokens_is_the_base_vocabulary(tmp_path: Path) -> None:
    places = family(tmp_path, gpt2)
    union = LanguageModelPool(places, vocabulary="union")
    found, expected = (
        merging.TaskArithmeticAlgorithm(0.5).run(pool)
        for pool in (union, LanguageModelPool(places))
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("targets", "key"), [(["wte"], "transformer.wte.weight"), (["lm_head"], "lm_head.weight")]
)
def test_adapters_have_the_vocabulary_of_the_base(
    targets: list[str], key: str, tmp_path: Path
) -> None:
    from tests.merging.test_adapters import adapt

    places = with_tokens(tmp_path, lambda rows: gpt2(rows=rows, tie_word_embeddings=False))
    base = transformers.AutoModelForCausalLM.from_pretrained(places["_pretrained_"])
    modules = {"target_modules": ["c_attn", *targets], "fan_in_fan_out": True}
    expected = adapt(base, tmp_path / "adapters", 0, **modules)
    pool = LanguageModelPool({**places, "b": tmp_path / "adapters"}, vocabulary="union")
    start, a = embedding(places, "_pretrained_", key), embedding(places, "a", key)
    found = merging.TaskArithmeticAlgorithm(1.0).run(pool)[key].double()
    torch.testing.assert_close(found[:8], a[:8].double() + expected[key][:8] - start[:8])
    torch.testing.assert_close(found[8:], a[8:].double())


def test_different_tokens_in_one_row_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places = family(tmp_path, gpt2)
    tokenizer(("x",)).save_pretrained(places["a"])
    LanguageModelPool(places).check()
    assert not caplog.messages
    tokenizer(("y",)).save_pretrained(places["b"])
    LanguageModelPool(places, vocabulary="union").check()
    assert not caplog.messages
    LanguageModelPool(places).check()
    assert "row 8 of the embeddings is x in a, but y in b: different tokens" in caplog.text
    assert "vocabulary=union merges token by token" in caplog.text


def test_other_tokenizers_are_no_union(tmp_path: Path) -> None:
    places = with_tokens(tmp_path)
    tokenizer(words=[*WORDS, "other"]).save_pretrained(places["b"])
    with pytest.raises(UsageError, match="has 1 others, such as 'other'; merge models of one"):
        LanguageModelPool(places, vocabulary="union").check()
    (places["b"] / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="is no tokenizer of transformers"):
        LanguageModelPool(places, vocabulary="union").check()
    (places["b"] / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"needs the tokenizer\.json .*, and b has none"):
        LanguageModelPool(places, vocabulary="union").check()
    with pytest.raises(UsageError, match="unknown vocabulary 'mean'; choose from same, union"):
        LanguageModelPool(places, vocabulary="mean")


def test_the_command_unites_vocabularies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = with_tokens(tmp_path)
    listed = ", ".join(f"{name}: {place}" for name, place in places.items())
    words = ["modelpool=language", f"modelpool.models={{{listed}}}", "merged_model_save_path=out"]
    monkeypatch.chdir(tmp_path)
    assert merge.main(words) == 2
    assert "modelpool=language modelpool.vocabulary=union" in capsys.readouterr().err
    assert merge.main([*words, "modelpool.vocabulary=union"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LanguageModelPool" in card and "+modelpool.vocabulary=union" in card


# --- configurations


@pytest.mark.parametrize(
    ("config", "base", "number", "suffix"),
    [
        ("gpt-2_glue", "openai-community/gpt2", 7, ""),
        ("Seq2SeqLMPool/flan-t5-base_glue", "google/flan-t5-base", 8, ""),
        ("Seq2SeqLMPool/flan-t5-base_glue_lora16", "google/flan-t5-base", 8, "_lora-16"),
        ("Seq2SeqLMPool/flan-t5-large_glue_lora16", "google/flan-t5-large", 8, "_lora-16"),
    ],
)
def test_pools_are_those_of_fusion_bench(
    config: str, base: str, number: int, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from omegaconf import OmegaConf

    assert merge.main([f"modelpool={config}", "--cfg", "job"]) == 0
    node: Any = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    pool = pool_of(node["modelpool"])
    assert isinstance(pool, LanguageModelPool) and pool.models["_pretrained_"] == base
    assert len(pool.model_names) == number
    model = base.rpartition("/")[2]
    for name in pool.model_names:
        assert pool.models[name] == f"tanganke/{model}_{name}{suffix}"


def test_adapters_of_fusion_bench_configurations_are_named(tmp_path: Path) -> None:
    loader = {"_target_": "fusion_bench.modelpool.seq2seq_lm.modelpool.load_lora_model"}
    node = {
        "_target_": "fusion_bench.modelpool.Seq2SeqLMPool",
        "base_model": "google/flan-t5-base",
        "tokenizer": {"_target_": "transformers.AutoTokenizer.from_pretrained"},
        "models": {
            "_pretrained_": {
                "_target_": "transformers.AutoModelForSeq2SeqLM.from_pretrained",
                "pretrained_model_name_or_path": "google/flan-t5-base",
            },
            "a": loader | {"base_model_path": "google/flan-t5-base", "peft_model_path": "x/y"},
        },
    }
    assert pool_of(node).models == {"_pretrained_": "google/flan-t5-base", "a": "x/y"}
    other: Any = json.loads(json.dumps(node))
    other["models"]["a"]["base_model_path"] = "google/flan-t5-large"
    with pytest.raises(UsageError, match="has adapters for google/flan-t5-large, but _pretrained_"):
        pool_of(other)


def test_adapters_merge_in_language_pools(tmp_path: Path) -> None:
    from tests.merging.test_adapters import adapt

    places = family(tmp_path, t5)
    base: nn.Module = transformers.T5ForConditionalGeneration.from_pretrained(
        places["_pretrained_"]
    )
    expected = adapt(base, tmp_path / "adapters", 0, target_modules=["q", "shared"])
    pool = LanguageModelPool({**places, "a": tmp_path / "adapters"})
    merged = merging.TaskArithmeticAlgorithm(1.0).run(pool)
    for name, value in merged.items():
        step = tensors(places["b"])[name] - tensors(places["_pretrained_"])[name]
        torch.testing.assert_close(value.double(), expected[name] + step, rtol=1e-5, atol=1e-6)
