"""Adapters as models, against PEFT's own merging in float64."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tangent_arithmetic import merging
from tangent_arithmetic.merging import CLIPVisionModelPool, ModelPool
from tangent_arithmetic.runtime.errors import UsageError
from tests.merging.makers import State


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=8, d_ff=12, d_kv=4, num_heads=2, num_layers=2, vocab_size=20
    )
    return transformers.T5ForConditionalGeneration(config)


def gpt2(kind: Any = transformers.GPT2ForSequenceClassification, **settings: Any) -> nn.Module:
    size: dict[str, Any] = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 8}
    size["vocab_size"] = 20
    made: nn.Module = kind(
        transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0, **settings)
    )
    return made


def untied() -> nn.Module:
    return gpt2(transformers.GPT2LMHeadModel, tie_word_embeddings=False)


def clip() -> nn.Module:
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.CLIPVisionConfig(
        **size, num_attention_heads=2, image_size=8, patch_size=4
    )
    return transformers.CLIPVisionModel(config)


class Plain(nn.Module):
    """A convolution, and attention with one matrix for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, (2, 3))
        self.attn = nn.MultiheadAttention(6, 2)


# name -> the model, settings of its adapters
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "rank and alpha by module": (
        t5,
        {
            "target_modules": ["q", "v", "wo"],
            "rank_pattern": {"v": 3, r"encoder.*\.wo": 1},
            "alpha_pattern": {"encoder.block.0.layer.0.SelfAttention.q": 7, "wo": 5},
        },
    ),
    "rslora": (t5, {"target_modules": ["q"], "r": 4, "lora_alpha": 3, "use_rslora": True}),
    "stored as inputs by outputs": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "stored both ways, which PEFT saves as one": (
        untied,
        {"target_modules": ["c_attn", "c_proj", "lm_head"], "fan_in_fan_out": True},
    ),
    "head, biases and embedding": (
        gpt2,
        {"target_modules": ["c_attn", "wte"], "task_type": "SEQ_CLS", "bias": "lora_only"},
    ),
    "convolution": (Plain, {"target_modules": ["conv"]}),
    "vision tower": (clip, {"target_modules": ["q_proj", "fc1"]}),
}


@torch.no_grad()
def adapt(base: nn.Module, folder: Path, seed: int, **settings: Any) -> dict[str, Tensor]:
    """Saves random adapters in PEFT's format; returns the weights that PEFT merges in float64."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings, and of fan_in_fan_out
        config = peft.LoraConfig(**{"r": 2, **settings})
        model = peft.get_peft_model(copy.deepcopy(base), config)
        for name, value in model.named_parameters():
            if value.requires_grad or "lora_" in name:
                value.add_(0.1 * torch.randn_like(value))
        model.save_pretrained(str(folder))
        whole: Any = model.double().merge_and_unload()
    return dict(whole.state_dict())


def save_base(model: nn.Module, folder: Path) -> Path:
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
        return folder
    folder.mkdir()
    save_file(model.state_dict(), str(folder / "model.safetensors"))
    return folder


def pool_of(
    case: str, folder: Path, num_models: int = 2
) -> tuple[dict[str, Path], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    make, settings = CASES[case]
    base = make()
    paths = {"_pretrained_": save_base(base, folder / "base")}
    merged = []
    for seed in range(num_models):
        paths[f"task{seed}"] = folder / f"task{seed}"
        merged.append(adapt(base, paths[f"task{seed}"], seed, **settings))
    return paths, merged


def bare(state: State | dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("vision_model."): value for name, value in state.items()}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_peft_merges(case: str, tmp_path: Path) -> None:
    paths, merged = pool_of(case, tmp_path)
    kind = CLIPVisionModelPool if case == "vision tower" else ModelPool
    pool = kind(paths)
    pool.check()
    base = bare(dict(pool.base.tensors))
    for number, expected in enumerate(map(bare, merged)):
        found = bare(dict(pool.weights(f"task{number}").tensors))
        assert found.keys() == base.keys()
        for name, value in found.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
        assert any(not torch.equal(found[name], base[name]) for name in base)


@pytest.mark.parametrize("case", CASES)
def test_task_arithmetic_of_adapters_is_exact(case: str, tmp_path: Path) -> None:
    paths, merged = pool_of(case, tmp_path)
    kind = CLIPVisionModelPool if case == "vision tower" else ModelPool
    target = tmp_path / "merged"
    merging.TaskArithmeticAlgorithm(0.7).run_to(kind(paths), target)
    found, base = (
        bare(load_file(target / "model.safetensors")),
        bare(dict(kind(paths).base.tensors)),
    )
    for name, value in found.items():
        steps = sum(bare(state)[name] - base[name].double() for state in merged)
        expected = base[name].double() + 0.7 * steps
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_attention_of_torch_has_adapters_once(tmp_path: Path) -> None:
    """PEFT adds the step of the output projection twice (huggingface/peft#3774)."""
    torch.manual_seed(0)
    base = Plain()
    adapt(base, tmp_path / "a", 0, target_modules=["attn"], lora_alpha=6)
    paths = {"_pretrained_": save_base(base, tmp_path / "base"), "a": tmp_path / "a"}
    found, state = (
        ModelPool(paths).weights("a"),
        load_file(paths["a"] / "adapter_model.safetensors"),
    )
    for key, name in (("attn", "in_proj_weight"), ("attn.base_layer.out_proj", "out_proj.weight")):
        a, b = (state[f"base_model.model.{key}.lora_{side}.weight"] for side in "AB")
        expected = base.get_parameter(f"attn.{name}") + 3 * b @ a
        torch.testing.assert_close(found.read(f"attn.{name}"), expected)


@pytest.mark.parametrize("targets", [["shared"], ["shared", "lm_head"]])
def test_tied_embeddings_step_together_unless_each_has_adapters(
    targets: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base: Any = t5()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(state, str(tmp_path / "base" / "model.safetensors"))
    adapt(base, tmp_path / "a", 0, target_modules=["q", *targets])
    found = ModelPool({"_pretrained_": tmp_path / "base", "a": tmp_path / "a"}).weights("a")
    own = load_file(tmp_path / "a" / "adapter_model.safetensors")
    a, b = (own[f"base_model.model.shared.lora_embedding_{side}"] for side in "AB")
    steps = dict.fromkeys(("shared", "encoder.embed_tokens", "decoder.embed_tokens"), 4 * (b @ a).T)
    steps["lm_head"] = steps["shared"]
    if "lm_head" in targets:
        a, b = (own[f"base_model.model.lm_head.lora_{side}.weight"] for side in "AB")
        steps["lm_head"] = 4 * b @ a
    for name, step in steps.items():
        key = f"{name}.weight"
        torch.testing.assert_close(found.read(key), state[key] + step)


def llama(**settings: Any) -> Any:
    size: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "vocab_size": 20, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **settings))


HEAD: dict[str, tuple[Any, dict[str, Any]]] = {
    "head": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "head alone": (llama, {"target_modules": ["lm_head"]}),
    "embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True}),
    "whole": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "whole head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "both": (llama, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
}


def tied(case: str, folder: Path, **more: Any) -> tuple[ModelPool, dict[str, Tensor]]:
    """A model whose file has no tensor of its tied output layer, and adapters."""
    torch.manual_seed(0)
    make, settings = copy.deepcopy(HEAD[case])  # PEFT changes its lists
    base = make() if make is llama else make(transformers.GPT2LMHeadModel)
    paths = {"_pretrained_": save_base(base, folder / "base"), "a": folder / "a"}
    merged = adapt(base, paths["a"], 0, **settings, **more)
    assert "lm_head.weight" not in load_file(paths["_pretrained_"] / "model.safetensors")
    return ModelPool(paths), merged


@pytest.mark.parametrize(
    ("case", "tying"),
    [(case, False) for case in HEAD if case not in {"whole", "whole head", "both"}]
    + [("whole", True), ("whole head", True)],
)
def test_tied_output_layers_are_the_embedding(case: str, tying: bool, tmp_path: Path) -> None:
    pool, merged = tied(case, tmp_path, ensure_weight_tying=tying)
    found = dict(pool.weights("a").tensors)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), merged[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["head", "embedding"])
def test_adapters_that_peft_ties_step_once(case: str, tmp_path: Path) -> None:
    """As in the trained model; merge_and_unload adds the step of each name to the one tensor."""
    pool, merged = tied(case, tmp_path, ensure_weight_tying=True)
    name = "model.embed_tokens.weight"
    start, found = pool.base.read(name).double(), pool.weights("a").read(name).double()
    torch.testing.assert_close(found - start, (merged[name] - start) / 2, rtol=1e-5, atol=1e-6)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an old name of transformers
        model: Any = peft.PeftModel.from_pretrained(base, tmp_path / "a")
    merging.TaskArithmeticAlgorithm(1.0).run_to(pool, tmp_path / "merged")
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(own(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["whole head", "both"])
def test_output_layers_that_adapters_untie_are_refused(case: str, tmp_path: Path) -> None:
    pool, _ = tied(case, tmp_path)
    with pytest.raises(UsageError, match=r"changes lm_head.* otherwise than model.* untied"):
        pool.check()
    untied = llama()
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = nn.Parameter(untied.get_input_embeddings().weight.clone())
    untied.save_pretrained(tmp_path / "untied")
    ModelPool({**pool.models, "_pretrained_": tmp_path / "untied"}).check()


def test_an_embedding_replaced_without_its_output_layer_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool, _ = tied("whole", tmp_path)
    pool.check()
    assert "replaces model.embed_tokens.weight; an output layer tied to it" in caplog.text


def test_adapters_that_name_another_model_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool, _ = tied("embedding", tmp_path)
    for named, warns in ((None, False), ("org/base", False), (str(tmp_path / "b"), True)):
        rewrite(tmp_path / "a", base_model_name_or_path=named)
        caplog.clear()
        ModelPool(pool.models).check()
        assert ("has adapters for" in caplog.text) == warns
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "org/b"}))
    caplog.clear()
    ModelPool(pool.models).check()
    assert not caplog.messages


def test_classes_with_and_without_a_prefix_share_adapters(tmp_path: Path) -> None:
    """The adapters say `transformer.h.0`, and a GPT2Model saved by itself `h.0`."""
    torch.manual_seed(0)
    whole: Any = gpt2(transformers.GPT2LMHeadModel)
    inner = save_base(whole.transformer, tmp_path / "inner")
    adapt(whole, tmp_path / "a", 0, target_modules=["c_attn"], fan_in_fan_out=True)
    adapt(whole.transformer, tmp_path / "b", 0, target_modules=["c_attn"], fan_in_fan_out=True)
    outer = save_base(whole, tmp_path / "outer")
    for base in (inner, outer):
        pool = ModelPool({"_pretrained_": base, "a": tmp_path / "a", "b": tmp_path / "b"})
        a, b = (dict(pool.weights(name).tensors) for name in "ab")
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert any(not torch.equal(a[name], value) for name, value in pool.base.tensors.items())


def test_steps_keep_their_rank_in_half_precision(tmp_path: Path) -> None:
    """The weights would round the step away; task vectors are of rank 2, exactly."""
    torch.manual_seed(0)
    base = t5().bfloat16()
    paths = {"_pretrained_": save_base(base, tmp_path / "base")}
    for seed, name in enumerate("ab"):
        adapt(base, tmp_path / name, seed, target_modules=["q"])
        paths[name] = tmp_path / name
    merge = merging.SimpleAverageAlgorithm().merge(ModelPool(paths))
    merge.method = merging.get_method("tsv_m")  # whole tensors
    for piece in merge._pieces("encoder.block.0.layer.0.SelfAttention.q.weight"):
        assert piece.factors is not None
        for tau, (left, right) in zip(piece.taus(), piece.factors, strict=True):
            torch.testing.assert_close(tau.view(piece.shape).double(), left @ right)
            assert torch.linalg.matrix_rank(tau.view(piece.shape), rtol=1e-5) == 2


def test_adapters_and_complete_models_merge(tmp_path: Path) -> None:
    paths, merged = pool_of("rslora", tmp_path)
    names = load_file(paths["_pretrained_"] / "model.safetensors")
    dense = {name: merged[0][name].float() for name in names}
    save_file(dense, str(tmp_path / "dense.safetensors"))
    mixed = {**paths, "task0": tmp_path / "dense.safetensors"}
    for algorithm in (merging.TaskArithmeticAlgorithm(0.5), merging.ISO_C_Merge()):
        one, other = algorithm.run(paths), algorithm.run(mixed)
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def rewrite(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "adapters of type IA3, expected LORA"),
        ({"use_dora": True}, "has the magnitudes of DoRA, which W"),
        ({"init_lora_weights": "pissa"}, "a start by pissa, which changes the pre-trained weights"),
        ({"layer_replication": [[0, 2]]}, "replicated layers.*merge_and_unload"),
    ],
)
def test_other_kinds_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    paths, _ = pool_of("rslora", tmp_path, 1)
    rewrite(paths["task0"], **settings)
    with pytest.raises(UsageError, match=message):
        ModelPool(paths).check()


def test_dora_is_refused_by_its_file_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = t5()
    adapt(base, tmp_path / "a", 0, target_modules=["q"], use_dora=True)
    paths = {"_pretrained_": save_base(base, tmp_path / "base"), "a": tmp_path / "a"}
    with pytest.raises(UsageError, match="the magnitudes of DoRA"):
        ModelPool(paths).check()
    rewrite(tmp_path / "a", use_dora=False)
    with pytest.raises(UsageError, match=r"adapters for .*lora_magnitude_vector.*lacks"):
        ModelPool(paths).check()


def test_square_weights_among_those_stored_both_ways_are_refused(tmp_path: Path) -> None:
    base = nn.Module()
    base.inputs = transformers.pytorch_utils.Conv1D(6, 4)
    base.outputs, base.square = nn.Linear(6, 4), nn.Linear(4, 4)
    adapt(base, tmp_path / "a", 0, target_modules=["inputs", "outputs", "square"])
    paths = {"_pretrained_": save_base(base, tmp_path / "base"), "a": tmp_path / "a"}
    with pytest.raises(UsageError, match=r"stored both ways, so that the way of square\.weight is"):
        ModelPool(paths).check()


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    paths, _ = pool_of("rslora", tmp_path, 1)
    with pytest.raises(UsageError, match="need the model that they were trained on"):
        ModelPool({"task0": paths["task0"]}).check()
    other = save_base(gpt2(), tmp_path / "other")
    with pytest.raises(UsageError, match=r"adapters for decoder.*and \d+ more.*lacks"):
        ModelPool({**paths, "_pretrained_": other}).check()
    config = transformers.T5Config(d_model=6, d_ff=8, d_kv=4, num_heads=2, num_layers=2)
    config.vocab_size = 20
    narrow = save_base(transformers.T5ForConditionalGeneration(config), tmp_path / "narrow")
    with pytest.raises(UsageError, match="other shapes than the pre-trained model"):
        ModelPool({**paths, "_pretrained_": narrow}).check()


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    paths, _ = pool_of("rslora", tmp_path, 1)
    file = paths["task0"] / "adapter_model.safetensors"
    state = load_file(file)
    lacking = {name: value for name, value in state.items() if "q.lora_B" not in name}
    save_file(lacking, str(file))
    with pytest.raises(UsageError, match="has only one of A and B"):
        ModelPool(paths).check()
    torch.save(state, paths["task0"] / "adapter_model.bin")
    file.unlink()
    ModelPool(paths).check()  # the older format
    save_file(state, str(paths["task0"] / "model.safetensors"))
    with pytest.raises(UsageError, match="both adapters and a complete model"):
        ModelPool(paths).check()
    (paths["task0"] / "model.safetensors").unlink()
    (paths["task0"] / "adapter_model.bin").unlink()
    with pytest.raises(UsageError, match=r"but neither adapter_model\.safetensors nor"):
        ModelPool(paths).check()
