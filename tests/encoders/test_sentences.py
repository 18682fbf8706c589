"""Encoders of texts: pooling, padding, exact tangents, names and files; real `transformers`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jvp
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    FNetConfig,
    FNetModel,
    FunnelConfig,
    FunnelModel,
    RobertaConfig,
    RobertaModel,
    XLNetConfig,
    XLNetModel,
)

from tangent_arithmetic.arithmetic.features import _folder
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.data.texts import PADDING, Texts, pad
from tangent_arithmetic.data.texts import tokens_of as positions_with_tokens
from tangent_arithmetic.encoders.backbones import sentence_files
from tangent_arithmetic.encoders.backbones.encoder import BackboneEncoder
from tangent_arithmetic.encoders.clip import tokenizer_of
from tangent_arithmetic.encoders.heads import sentence_weights
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.encoders.published import hub
from tangent_arithmetic.encoders.registry import load_linear
from tangent_arithmetic.runtime.atomic import write_json
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.errors import MissingFileError, PictureError, UsageError
from tangent_arithmetic.storage.reading import read_json
from tests.sentences import KINDS, SIZE, model_folder, module, tokenizer_folder

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
TEXTS = ("the movie was great", "awful", "it is not a very good phone and the battery is poor .")


def encoder_of(folder: Path, kind: str, options: str = "") -> BackboneEncoder:
    return BackboneEncoder(f"transformers:{model_folder(folder, kind)}{options}").eval()


def tokens_of(encoder: BackboneEncoder, texts: tuple[str, ...] = TEXTS) -> Tensor:
    assert encoder.val_preprocess is not None
    return pad([encoder.val_preprocess(text) for text in texts])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_features_are_the_library_s_without_padding(
    kind: str, pooling: str, tmp_path: Path
) -> None:
    encoder = encoder_of(tmp_path, kind, f"?pooling={pooling}")
    tokens = tokens_of(encoder)
    assert (tokens == PADDING).any() and tokens.dtype == torch.int64
    auto: Any = AutoModelForTextEncoding if kind == "t5" else AutoModel
    reference = auto.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        features = encoder(tokens)
        for text, row in zip(TEXTS, features, strict=True):
            hidden = reference(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tangents_are_exact_with_padding(kind: str, attention: str, tmp_path: Path) -> None:
    if kind == "t5" and attention == "sdpa":
        pytest.skip("transformers has no sdpa for T5's relative positions in every version")
    encoder = encoder_of(tmp_path, kind).double()
    encoder.model.model.set_attn_implementation(attention)  # type: ignore[union-attr, operator]
    tokens = tokens_of(encoder)
    theta = dict(encoder.named_parameters())
    torch.manual_seed(1)
    tau = {name: 0.1 * torch.randn_like(value) for name, value in theta.items()}

    eager = encoder_of(tmp_path / "eager", kind).double()  # forward AD has no rule for sdpa
    eager.model.model.set_attn_implementation("eager")  # type: ignore[union-attr, operator]
    f0, step, *_ = jvp(lambda p: functional_call(eager, p, (tokens,)), (theta,), (tau,))
    ours0, (ours,) = linearized(encoder).tangents(tokens, [tau])
    torch.testing.assert_close(ours0, f0, rtol=1e-6, atol=1e-9)
    size = float(
        step.detach().abs().max()
    )  # Llama and T5 have parts in float32 whatever their weights are
    torch.testing.assert_close(ours, step, rtol=0, atol=1e-6 * size)
    torch.testing.assert_close(ours0, encoder(tokens))


def test_dropout_is_off_in_training(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, "gpt2").train()
    tokens = tokens_of(encoder)
    assert torch.equal(encoder(tokens), encoder(tokens))


@pytest.mark.parametrize(
    "key, expected",
    [
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_lasttoken", "last"),
        (None, "mean"),
    ],
)
def test_pooling_follows_the_configuration(key: str | None, expected: str, tmp_path: Path) -> None:
    encoder = BackboneEncoder(f"transformers:{model_folder(tmp_path, 'bert', key)}")
    assert encoder.model.pooling == expected


@pytest.mark.parametrize("mode", ["cls", "mean", "lasttoken"])
def test_files_of_sentence_transformers_since_its_version_6(mode: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "bert", "pooling_mode_mean_tokens")
    own = folder / "1_Pooling" / "config.json"
    own.write_text(json.dumps({"embedding_dimension": 16, "pooling_mode": mode}))
    for stated in ({"transformer_task": "feature-extraction"}, {"max_seq_length": None}):
        (folder / "sentence_bert_config.json").write_text(json.dumps(stated))
        encoder = BackboneEncoder(f"transformers:{folder}")
        assert encoder.model.pooling == mode.replace("lasttoken", "last")
    own.write_text(json.dumps({"pooling_mode": ["cls", "mean"]}))
    with pytest.raises(UsageError, match="has the pooling cls, mean"):
        BackboneEncoder(f"transformers:{folder}")


def test_features_of_another_pooling_or_configuration_are_no_cached_ones(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "bert", "pooling_mode_mean_tokens")
    texts, places = Texts(("a b", "b c"), np.array([0, 1]), "x"), set()
    for change in ("nothing", "pooling", "heads"):
        if change == "pooling":
            own = json.dumps({"pooling_mode": "cls"})
            (folder / "1_Pooling" / "config.json").write_text(own)
        if change == "heads":
            config = read_json(folder / "config.json")
            write_json(folder / "config.json", {**config, "num_attention_heads": 4})
        encoder = linearized(BackboneEncoder(f"transformers:{folder}"))
        batches = EvalBatches(texts, encoder.val_preprocess, 2, 0, "x")
        compute = Compute(torch.device("cpu"))
        places.add(_folder(tmp_path, encoder, batches, compute))
    assert len(places) == 3 and None not in places


def test_a_causal_model_pools_its_last_token(tmp_path: Path) -> None:
    assert encoder_of(tmp_path, "gpt2").model.pooling == "last"


@pytest.mark.parametrize(
    "kind, architecture, more, expected",
    [
        ("gpt2", "GPT2LMHeadModel", {}, "last"),
        ("gpt2", "GPT2Model", {}, "last"),
        ("qwen3", "Qwen3Model", {}, "last"),
        ("llama", "LlamaForSequenceClassification", {}, "last"),
        ("gemma3_text", "Gemma3TextModel", {"use_bidirectional_attention": True}, "mean"),
        ("bert", "BertForSequenceClassification", {}, "mean"),
        ("bert", "BertLMHeadModel", {"is_decoder": True}, "last"),
        ("xlm", "XLMWithLMHeadModel", {}, "mean"),
        ("xlnet", "XLNetLMHeadModel", {}, "mean"),
        ("t5", "T5ForConditionalGeneration", {"is_encoder_decoder": True}, "mean"),
    ],
)
def test_pooling_follows_from_what_a_token_sees(
    kind: str, architecture: str, more: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    stated = {"model_type": kind, "architectures": [architecture], **more}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert sentence_files.pooling(tmp_path) == expected


def sentence_transformers(folder: Path, pooling: dict[str, Any], **prompts: Any) -> Path:
    """A BERT with the files of sentence-transformers, its pooling in the folder `pool`."""
    model_folder(folder, "bert")
    kinds = (("Transformer", ""), ("Pooling", "pool"), ("Normalize", "norm"))
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": p} for kind, p in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "pool").mkdir()
    (folder / "pool" / "config.json").write_text(json.dumps(pooling))
    if prompts:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


def test_files_of_sentence_transformers_say_how_a_text_is_read(tmp_path: Path) -> None:
    plain: Any = encoder_of(tmp_path / "plain", "bert").val_preprocess
    prompts = {"prompts": {"query": "good "}, "default_prompt_name": "query"}
    folder = sentence_transformers(tmp_path / "st", {"pooling_mode_cls_token": True}, **prompts)
    lower = {"max_seq_length": 6, "do_lower_case": True}
    (folder / "sentence_bert_config.json").write_text(json.dumps(lower))
    encoder = BackboneEncoder(f"transformers:{folder}")
    tokenize: Any = encoder.val_preprocess
    assert encoder.model.pooling == "cls" and tokenize.length == 6
    assert torch.equal(tokenize("The MOVIE"), plain("good the movie"))
    assert tokenize.lengths(["Movie", "movie " * 9]) == [4, 6]
    recipes = [tokenize.recipe]
    (folder / "config_sentence_transformers.json").write_text('{"default_prompt_name": null}')
    recipes.append(BackboneEncoder(f"transformers:{folder}").val_preprocess.recipe)  # type: ignore[union-attr]
    assert recipes[0] != recipes[1] and "prompt" not in plain.recipe


@pytest.mark.parametrize(
    "pooling, prompts, message",
    [
        ({"pooling_mode": "mean"}, {"default_prompt_name": "query"}, "default prompt query, expec"),
        (
            {"pooling_mode": "mean", "include_prompt": False},
            {"default_prompt_name": "query", "prompts": {"query": "good "}},
            r"prompt out of the pooling, .*\?pooling=mean pools them as well",
        ),
        ({"pooling_mode": "max"}, {}, "has the pooling max, expected one of"),
        ({}, {}, "has the pooling none, expected one of"),
    ],
)
def test_files_of_sentence_transformers_are_not_half_read(
    pooling: dict[str, Any], prompts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = sentence_transformers(tmp_path, pooling, **prompts)
    with pytest.raises(UsageError, match=message):
        BackboneEncoder(f"transformers:{folder}")


def test_a_model_in_a_folder_of_its_list_is_named(tmp_path: Path) -> None:
    modules = [{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UsageError, match=r"has its model in 0_Transformer; .*\?pooling=mean"):
        BackboneEncoder(f"transformers:{tmp_path}")
    modules[0]["path"] = "../elsewhere"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UsageError, match="leads out of its folder"):
        BackboneEncoder(f"transformers:{tmp_path}")


def test_all_files_that_make_features_are_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    files = ["modules.json", "sentence_xlnet_config.json", "config_sentence_transformers.json"]
    files += ["1_Pooling/config.json", "pool/config.json"]
    wanted = filter_repo_objects([*files, "train.log"], allow_patterns=list(hub.SENTENCES))
    assert list(wanted) == files


@pytest.mark.parametrize("file", ["merges.txt", "added_tokens.json", "spiece.model", "vocab.txt"])
def test_every_file_of_a_tokenizer_is_in_its_recipe(file: str, tmp_path: Path) -> None:
    folder, recipes = model_folder(tmp_path), []
    for content in ("{}", "{ }"):
        (folder / file).write_text(content)
        recipes.append(BackboneEncoder(f"transformers:{folder}").val_preprocess.recipe)  # type: ignore[union-attr]
    assert recipes[0]["tokenizer"] != recipes[1]["tokenizer"]


def test_saved_and_loaded_linear(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path / "m", "bert")
    linear = linearized(encoder)
    with torch.no_grad():
        for value in linear.parameters():
            value.add_(0.01)
    linear.save(tmp_path / "linear.safetensors")
    again = load_linear(tmp_path / "linear.safetensors")
    tokens = tokens_of(encoder)
    torch.testing.assert_close(again(tokens), linear(tokens))


def test_text_tower_of_a_clip() -> None:
    encoder = BackboneEncoder("text-tower:ViT-Nano-8").eval()
    from tangent_arithmetic.encoders.images import ImageEncoder

    clip: Any = ImageEncoder("ViT-Nano-8", keep_lang=True).model
    tokens = tokens_of(encoder, ("a photo of a cat.", "a dog"))
    ids = tokenizer_of("ViT-Nano-8")(["a photo of a cat.", "a dog"])
    with torch.no_grad():
        assert torch.equal(encoder(tokens), clip.encode_text(ids))
    assert torch.equal(tokens == PADDING, ids == 0) and tokens.shape == ids.shape
    positions = positions_with_tokens(tokens)
    assert positions is not None and positions.sum(1).tolist() == [8, 4]
    assert not any(name.startswith("model.clip.visual") for name in encoder.weights())


def test_zero_shot_head_is_the_normalised_mean_of_prompts(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, "bert")
    prompts = ("a {} review .", "the opinion is {} !")
    weights = sentence_weights(
        encoder, ("good", "bad"), [p.format for p in prompts], torch.device("cpu")
    )
    with torch.no_grad():
        for row, word in zip(weights, ("good", "bad"), strict=True):
            each = [encoder(tokens_of(encoder, (p.format(word),)))[0] for p in prompts]
            mean = torch.stack([one / one.norm() for one in each]).mean(0)
            torch.testing.assert_close(row, 20 * mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_long_texts_are_truncated_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoder_of(tmp_path, "bert", "?length=7")
    with caplog.at_level(logging.WARNING):
        tokens = tokens_of(encoder, ("good " * 30, "bad " * 40, "bad"))
    assert tokens.shape == (3, 7)
    assert caplog.text.count("texts of more than 7 tokens are truncated") == 1
    kept = (tokens >= 0).sum(1).tolist()
    tokenize: Any = encoder.val_preprocess
    assert tokenize.lengths(("good " * 30, "bad " * 40, "bad")) == kept


def test_positions_that_begin_after_that_of_padding_are_fewer_tokens(tmp_path: Path) -> None:
    sizes: Any = {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    config = RobertaConfig(
        vocab_size=SIZE, hidden_size=16, max_position_embeddings=18, pad_token_id=1, **sizes
    )
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer_folder(tmp_path)
    encoder = BackboneEncoder(f"transformers:{tmp_path}")
    tokens = tokens_of(encoder, ("good " * 30, "bad"))
    assert tokens.shape == (2, 16) and encoder(tokens).isfinite().all()
    with pytest.raises(UsageError, match="takes at most 16 tokens, got length=17"):
        BackboneEncoder(f"transformers:{tmp_path}?length=17")


@pytest.mark.parametrize(
    "options, message",
    [
        ("?pool=mean", "unknown option of transformers:.*'pool'.*pooling"),
        ("?pooling=max", "unknown pooling 'max'.*mean"),
        ("?length=0", "expected a length of 1 or more, got 0"),
        ("?length=64", "takes at most 32 tokens, got length=64"),
    ],
)
def test_options_are_checked(options: str, message: str, tmp_path: Path) -> None:
    model_folder(tmp_path)
    with pytest.raises(UsageError, match=message):
        BackboneEncoder(f"transformers:{tmp_path}{options}")


def test_missing_weights_are_not_drawn_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model_folder(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"do not fit.*encoder.layer.1.output.dense.weight"):
        BackboneEncoder(f"transformers:{tmp_path}")


def test_other_parts_of_sentence_transformers_are_refused(tmp_path: Path) -> None:
    model_folder(tmp_path)
    kinds = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Dense")]
    (tmp_path / "modules.json").write_text(json.dumps(kinds))
    with pytest.raises(UsageError, match="has the module Dense"):
        BackboneEncoder(f"transformers:{tmp_path}")


def test_a_configuration_larger_than_its_weights_is_refused(tmp_path: Path) -> None:
    model_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"hidden_size": 8192, "intermediate_size": 65536, "num_hidden_layers": 90}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"describes [0-9,]+ weights"):
        BackboneEncoder(f"transformers:{tmp_path}")


def test_a_missing_folder_names_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingFileError, match="org/no-such-model is unavailable"):
        BackboneEncoder("transformers:org/no-such-model")


WITHOUT = [(kind, stated) for kind in KINDS for stated in ("", "tokenizer_config.json")]


@pytest.mark.parametrize("kind, stated", [(k, s) for k, s in WITHOUT if not (s and k == "llama")])
def test_a_folder_without_a_tokenizer_is_refused(kind: str, stated: str, tmp_path: Path) -> None:
    module(kind).save_pretrained(tmp_path)
    if stated:
        (tmp_path / stated).write_text("{}")
    with pytest.raises(UsageError, match=r"has no tokenizer; save it .*save_pretrained\('/"):
        BackboneEncoder(f"transformers:{tmp_path}")


def test_tokens_that_the_model_does_not_embed_are_refused(tmp_path: Path) -> None:
    model_folder(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})  # no text has it
    tokenizer.save_pretrained(tmp_path)
    BackboneEncoder(f"transformers:{tmp_path}")
    tokenizer.add_tokens(["superb"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match=rf"token superb with the number {SIZE + 1}, .* {SIZE} tok"
    ):
        BackboneEncoder(f"transformers:{tmp_path}")


SMALL: dict[str, Any] = {"vocab_size": SIZE, "d_model": 16, "n_head": 2, "d_inner": 32}


def test_features_that_depend_on_padding_are_refused(tmp_path: Path) -> None:
    shape: Any = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    funnel: Any = {**SMALL, "d_head": 8, "block_sizes": [1, 1], "num_decoder_layers": 1}
    fnet = FNetModel(FNetConfig(vocab_size=SIZE, **shape))
    for index, model in enumerate((fnet, FunnelModel(FunnelConfig(**funnel)))):
        folder = tmp_path / str(index)
        model.save_pretrained(folder)
        tokenizer_folder(folder)
        with pytest.raises(UsageError, match="features of a text depend on the padding"):
            BackboneEncoder(f"transformers:{folder}")


def test_a_model_without_a_limit_of_positions(tmp_path: Path) -> None:
    XLNetModel(XLNetConfig(**SMALL, n_layer=1)).save_pretrained(tmp_path)  # states -1 of them
    tokenizer_folder(tmp_path)
    encoder = BackboneEncoder(f"transformers:{tmp_path}")
    assert encoder(tokens_of(encoder)).isfinite().all()


def test_images_and_texts_are_not_mixed(tmp_path: Path) -> None:
    from PIL import Image

    from tangent_arithmetic.data.loading import SeededPictures
    from tangent_arithmetic.data.texts import Texts

    encoder, labels = encoder_of(tmp_path, "bert"), torch.zeros(1).long().numpy()
    picture: Any = [(Image.new("RGB", (8, 8)), 0)]
    with pytest.raises(PictureError, match="is an image, and the model reads texts"):
        SeededPictures(picture, encoder.val_preprocess)[0]
    texts = Texts(("a movie",), labels)
    with pytest.raises(PictureError, match="is a text, and the model reads images"):
        SeededPictures(texts, lambda image: image)[0]
