"""Linearised models of several libraries agree with float64 references."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent import plain_jvp
from tangent_arithmetic.tangent.linearized import LinearizedModel

F32, F64 = torch.float32, torch.float64
BARS = {F64: 1e-10, F32: 1e-5}
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
State = dict[str, Tensor]


# --- the models


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def _clip(layers: Any = 2, quick_gelu: bool = False) -> nn.Module:
    from open_clip.model import CLIP

    return CLIP(
        embed_dim=12,
        vision_cfg={
            "image_size": 32,
            "patch_size": 8,
            "width": 32,
            "layers": layers,
            "head_width": 16,
        },
        text_cfg={"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2},
        quick_gelu=quick_gelu,
    )


def _clip_visual(layers: Any = 2, quick_gelu: bool = False) -> nn.Module:
    visual: nn.Module = _clip(layers, quick_gelu).get_submodule("visual")
    return visual


def _torchvision(name: str, **options: Any) -> nn.Module:
    import torchvision

    made: nn.Module = getattr(torchvision.models, name)(weights=None, **options)
    return made


def _small_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(12, 16, 2), CNBlockConfig(16, None, 1)], num_classes=5)


def _small_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 12, [2, 2], [2, 3], [3, 3], num_classes=5)


def _small_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5)


def _timm(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    made: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **options)
    return made


def _clip_vision_of_transformers() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    made: nn.Module = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            attn_implementation="sdpa",
        )
    )
    return made


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    made: nn.Module = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=8,
            attn_implementation="sdpa",
        )
    )
    return made


def _gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    made: nn.Module = transformers.GPT2Model(
        transformers.GPT2Config(
            vocab_size=20,
            n_positions=8,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    return made


def _encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, activation="gelu", batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Recurrent(nn.Module):
    """An LSTM over two layers and both ways, with more weights than live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0])
        return out


class Tied(nn.Module):
    """Scores words by the table that embeds them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.hidden, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.scores = nn.Linear(8, 20)
        self.scores.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.scores(self.norm(F.gelu(self.hidden(self.words(ids)))))
        return out


def _randoms(*shape: int) -> Inputs:
    return (torch.randn(shape),), {}


def _images(size: int = 32) -> Inputs:
    return _randoms(2, 3, size, size)


def _ids() -> Tensor:
    return torch.tensor([[1, 2, 3, 4, 5, 6, 7, 19], [8, 9, 10, 1, 11, 19, 12, 13]])


def _words() -> Inputs:
    return (), {"input_ids": _ids(), "attention_mask": (_ids() < 12).long()}


def _padded() -> Inputs:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    return (torch.randn(2, 5, 16),), {"src_key_padding_mask": mask}


@dataclass(frozen=True)
class Example:
    """A model, its inputs in float32, and whether it is differentiable everywhere."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs] = _images
    smooth: bool = True


EXAMPLES: dict[str, Example] = {
    "mlp": Example(_mlp, partial(_randoms, 7, 6)),
    "tied weights": Example(Tied, lambda: ((_ids(),), {})),
    # float32 on a CPU takes MKLDNN's LSTM, which has no forward-mode derivative
    "nn.LSTM": Example(Recurrent, partial(_randoms, 3, 4, 5)),
    "nn.TransformerEncoder": Example(partial(_encoder, False), _padded),
    "nn.TransformerEncoder, norm first": Example(partial(_encoder, True), _padded),
    "open_clip ViT": Example(_clip_visual),
    "open_clip ViT, QuickGELU": Example(partial(_clip_visual, quick_gelu=True)),
    "open_clip ModifiedResNet": Example(partial(_clip_visual, [1, 1, 1, 1]), smooth=False),
    "open_clip both towers": Example(_clip, lambda: ((*_images()[0], _ids()), {})),
    "torchvision ConvNeXt, small": Example(_small_convnext),
    "torchvision Swin, small": Example(_small_swin),
    "torchvision ViT, small": Example(_small_vit),
    "torchvision resnet18": Example(partial(_torchvision, "resnet18"), smooth=False),
    "timm vit_tiny": Example(partial(_timm, "vit_tiny_patch16_224", depth=2, img_size=32)),
    "timm tinynet_e": Example(partial(_timm, "tinynet_e")),
    "transformers CLIPVisionModel": Example(_clip_vision_of_transformers),
    "transformers BertModel": Example(_bert, _words),
    "transformers GPT2Model": Example(_gpt2, _words),
}
SLOW: dict[str, Example] = {
    "torchvision convnext_tiny": Example(partial(_torchvision, "convnext_tiny")),
    "torchvision swin_t": Example(partial(_torchvision, "swin_t")),
    "torchvision vit_b_16": Example(partial(_torchvision, "vit_b_16", image_size=32)),
}


# --- a model and its reference


def _flat(tree: Any) -> Tensor:
    """All tensors of a tree, one after another, in float64."""
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return torch.cat([leaf.detach().to(F64).flatten() for leaf in leaves])


def _error(found: Any, expected: Any) -> float:
    one, other = _flat(found), _flat(expected)
    assert one.shape == other.shape
    return ((one - other).norm() / other.norm()).item()


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(cast, tree)


def _live(model: nn.Module) -> nn.Module:
    """The model with weights all of which matter: no zeros, no scales of 1e-6."""
    with torch.no_grad():
        for value in model.parameters():
            size = value.square().mean().sqrt().item()
            if size < 1e-3:
                value.normal_(std=0.1)
            else:
                value.add_(0.1 * size * torch.randn_like(value))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None and module.running_var is not None
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def _weights(model: nn.Module) -> State:
    return {name: value.detach() for name, value in model.named_parameters()}


@dataclass
class Problem:
    """A model at theta0 and at theta, and what its linearisation gives in float64."""

    example: Example
    init_model: nn.Module = field(init=False)
    model: nn.Module = field(init=False)
    inputs: Inputs = field(init=False)
    f0: Any = field(init=False)
    d: Any = field(init=False)
    gradient: State = field(init=False)

    def __post_init__(self) -> None:
        self.init_model = _live(self.example.make())
        self.model = copy.deepcopy(self.init_model)
        with torch.no_grad():
            for value in self.model.parameters():
                size = value.square().mean().sqrt()
                value.add_(0.05 * size * torch.randn_like(value))
        self.inputs = self.example.inputs()
        self._find_reference()

    def _find_reference(self) -> None:
        wide, (args, kwargs) = self.at(F64, self.init_model), _cast(self.inputs, F64)
        with torch.no_grad():
            self.f0, self.d = plain_jvp(wide, _weights(wide), self.step(), *args, **kwargs)
        leaves = [leaf for leaf in pytree.tree_leaves(wide(*args, **kwargs)) if leaf is not None]
        self.g = [torch.randn(leaf.shape) for leaf in leaves]
        parameters = dict(wide.named_parameters())
        found = torch.autograd.grad(
            leaves, list(parameters.values()), _cast(self.g, F64), allow_unused=True
        )
        self.gradient = {
            name: torch.zeros_like(value) if grad is None else grad
            for (name, value), grad in zip(parameters.items(), found, strict=True)
        }

    @staticmethod
    def at(dtype: torch.dtype, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(dtype)

    def step(self) -> State:
        """Theta - theta0 in float64."""
        ends = (_weights(self.at(F64, model)) for model in (self.model, self.init_model))
        theta, theta0 = ends
        return {name: value - theta0[name] for name, value in theta.items()}

    def linearized(self, dtype: torch.dtype) -> LinearizedModel:
        return LinearizedModel(self.at(dtype, self.model), self.at(dtype, self.init_model))

    def errors(self, dtype: torch.dtype) -> tuple[float, float]:
        """Of the outputs and of the gradients of a linear functional of them."""
        lin, (args, kwargs) = self.linearized(dtype), _cast(self.inputs, dtype)
        out = lin(*args, **kwargs)
        expected = pytree.tree_map(torch.add, self.f0, self.d)
        leaves = [leaf for leaf in pytree.tree_leaves(out) if leaf is not None]
        assert all(leaf.dtype == dtype for leaf in leaves)
        torch.autograd.backward(leaves, _cast(self.g, dtype))
        found = {name: value.grad for name, value in lin.named_parameters()}
        assert list(found) == list(self.gradient)
        filled = [self.gradient[n] * 0 if grad is None else grad for n, grad in found.items()]
        return _error(out, expected), _error(filled, list(self.gradient.values()))


def _some(examples: dict[str, Example], *marks: Any) -> list[Any]:
    return [pytest.param(example, id=name, marks=marks) for name, example in examples.items()]


@pytest.fixture(scope="module", params=[*_some(EXAMPLES), *_some(SLOW, pytest.mark.slow)])
def problem(request: pytest.FixtureRequest) -> Iterator[Problem]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield Problem(request.param)


# --- the laws


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_outputs_and_gradients_are_exact(problem: Problem, dtype: torch.dtype) -> None:
    output, gradient = problem.errors(dtype)
    assert output <= BARS[dtype]
    assert gradient <= BARS[dtype]


def test_the_tangent_is_the_slope_of_the_model(problem: Problem) -> None:
    if not problem.example.smooth:
        pytest.skip("has kinks")
    model, (args, kwargs) = problem.at(F64, problem.init_model), _cast(problem.inputs, F64)
    theta0, v = _weights(model), problem.step()

    def at(size: float) -> Tensor:
        moved = {name: value + size * v[name] for name, value in theta0.items()}
        with torch.no_grad():
            return _flat(torch.func.functional_call(model, moved, args, kwargs))

    with torch.no_grad():
        d = problem.linearized(F64).primal_and_tangent(*args, **kwargs)[1]
    slope = (at(1e-4) - at(-1e-4)) / 2e-4
    assert _error(d, slope) < 1e-6
    assert 1e-3 < _flat(d).norm() / _flat(problem.f0).norm() < 1


def test_at_theta0_it_is_the_model(problem: Problem) -> None:
    model, (args, kwargs) = problem.at(F64, problem.init_model), _cast(problem.inputs, F64)
    with torch.no_grad():
        assert _error(LinearizedModel(model)(*args, **kwargs), model(*args, **kwargs)) <= 1e-13


def test_several_tangents_are_those_of_separate_passes(problem: Problem) -> None:
    lin, (args, kwargs) = problem.linearized(F64), _cast(problem.inputs, F64)
    v = problem.step()
    vectors = [v, {name: torch.randn_like(value) * value for name, value in v.items()}]
    with torch.no_grad():
        out, found = lin.tangents(args, vectors, **kwargs)
        assert _error(out, problem.f0) <= BARS[F64]
        for vector, one in zip(vectors, found, strict=True):
            separate = lin.primal_and_tangent(*args, tangent=vector, **kwargs)[1]
            assert _error(one, separate) <= 1e-12
    assert _error(found[0], problem.d) <= BARS[F64]
