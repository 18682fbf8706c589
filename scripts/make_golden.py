"""Makes the golden values of the merging methods, with other people's implementations.

Run it in an environment of its own, which has one of the two libraries (neither is a dependency of
this project), once for each:

    pip install fusion-bench==0.2.33   &&  python scripts/make_golden.py fusion_bench
    pip install mergekit==0.1.5        &&  python scripts/make_golden.py mergekit

Each run writes tests/golden/merging_<library>.json: the models, the random numbers of masks, what
was called with which options, and the merged weights. `tests/merging/test_golden.py` compares ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
from collections import defaultdict
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
MODELS = ("_pretrained_", "a", "b", "c")
State = dict[str, Tensor]


def make_models() -> dict[str, State]:
    """Four small states; some weights are equal, some of opposite sign, so that ties occur."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base = {"0.weight": draw(6, 7), "0.bias": draw(6), "1.weight": draw(3, 6), "1.bias": draw(3)}
    models = {"_pretrained_": base}
    for name in MODELS[1:]:
        models[name] = {key: value + 0.1 * draw(*value.shape) for key, value in base.items()}
    step = torch.tensor([0.5, -0.25, 0.125])
    models["a"]["1.bias"], models["b"]["1.bias"] = base["1.bias"] + step, base["1.bias"] - step
    models["c"]["1.bias"] = base["1.bias"].clone()
    return models


def make_numbers(models: dict[str, State]) -> dict[str, State]:
    """The uniform numbers that masks are made of, for each model."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: {key: torch.rand(value.shape, generator=generator) for key, value in state.items()}
        for name, state in models.items()
        if name != "_pretrained_"
    }


def module_of(state: State) -> nn.Module:
    """The state as a module."""
    module = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 3))
    module.load_state_dict(state)
    return module


def fusion_bench(models: dict[str, State], numbers: dict[str, State]) -> list[dict[str, Any]]:
    """What fusion-bench makes of the models."""
    import fusion_bench.method as library
    from fusion_bench import BaseModelPool

    ties = {"scaling_factor": 0.4, "remove_keys": []}
    dare = {"sparsity_ratio": 0.4, "only_on_linear_weights": False}
    cases: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
        ("simple_average", "SimpleAverageAlgorithm", {}, MODELS),
        ("weighted_average", "WeightedAverageAlgorithm",
         {"normalize": True, "weights": [1.0, 2.0, 5.0]}, MODELS),
        ("weighted_average", "WeightedAverageAlgorithm",
         {"normalize": False, "weights": [0.3, 0.3, -0.2]}, MODELS),
        ("task_arithmetic", "TaskArithmeticAlgorithm", {"scaling_factor": 0.5}, MODELS),
        *[("ties", "TiesMergingAlgorithm", {**ties, "threshold": keep, "merge_func": how}, MODELS)
          for keep in (20, 55) for how in ("sum", "mean", "max")],
        ("dare_task_arithmetic", "DareTaskArithmetic",
         {"scaling_factor": 0.6, **dare, "rescale": True}, MODELS),
        ("dare_task_arithmetic", "DareTaskArithmetic",
         {"scaling_factor": 0.6, "sparsity_ratio": 0.7, "only_on_linear_weights": True,
          "rescale": False}, MODELS),
        ("dare_ties", "DareTiesMerging",
         {**dare, "rescale": True, **ties, "threshold": 30, "merge_func": "sum"}, MODELS),
        ("slerp", "SlerpMergeAlgorithm", {"t": 0.3}, ("_pretrained_", "a")),
        ("slerp", "SlerpMergeAlgorithm", {"t": 0.8, "DOT_THRESHOLD": 0.5}, ("a", "b")),
        ("tsv_m", "TaskSingularVectorMerging", {"alpha": 0.7}, MODELS),
        ("iso_c", "ISO_C_Merge", {"scaling_factor": 0.7}, MODELS),
        ("iso_cts", "ISO_CTS_Merge",
         {"scaling_factor": 0.7, "common_space_fraction": 0.5}, MODELS),
        ("wudi", "WUDIMerging", {"iter_num": 20}, MODELS),
        # of more than two models it averages the angles, ours the cosines
        ("model_stock", "ModelStock", {"ignore_keys": ["1.bias"]}, ("_pretrained_", "a", "b")),
    ]  # fmt: skip
    found = []
    for method, name, options, used in cases:
        masks = mask_source(models, numbers)
        pool = BaseModelPool({key: module_of(copy.deepcopy(models[key])) for key in used})
        with patch.object(torch, "rand_like", masks):
            merged = getattr(library, name)(**options).run(pool)
        found.append(case(method, options, used, dict(merged.state_dict()), name))
    return found


def mergekit(models: dict[str, State], numbers: dict[str, State]) -> list[dict[str, Any]]:
    """What mergekit makes of the models."""
    weights = {"a": 0.2, "b": 0.3, "c": 0.5}
    one = dict.fromkeys(weights, 1.0)
    signed = {"a": 1.0, "b": -0.5, "c": 0.75}
    listed = {"weights": list(signed.values())}
    third = {"density": 1 / 3, "gamma": 1 / 3}
    della = {"scaling_factor": 0.9, "sparsity_ratio": 0.5, "epsilon": 0.6, "rescale": False}
    theirs = {"lambda": 0.9, "density": 0.5, "epsilon": 0.3, "rescale": False}
    cases: list[tuple[str, dict[str, Any], str, dict[str, Any], dict[str, float]]] = [
        ("weighted_average", {"weights": [0.2, 0.3, 0.5], "normalize": True}, "linear",
         {"normalize": True}, weights),
        ("task_arithmetic", {"scaling_factor": 0.4}, "task_arithmetic",
         {"lambda": 0.4, "normalize": False}, one),
        *[("ties", {"scaling_factor": 0.7, "threshold": 100 * keep, "scope": "tensor",
                    "zero_sign": "positive", "merge_func": how}, "ties",
           {"lambda": 0.7, "density": keep, "normalize": how == "mean"}, one)
          for keep in (0.2, 0.55) for how in ("sum", "mean")],
        ("dare_task_arithmetic",
         {"scaling_factor": 0.6, "sparsity_ratio": 0.4, "rescale": False}, "dare_linear",
         {"lambda": 0.6, "density": 0.6, "rescale": False, "normalize": False}, one),
        ("slerp", {"t": 0.3}, "slerp", {"t": 0.3}, {"a": 1.0}),
        # shares at which all ways of rounding the number of weights agree
        ("breadcrumbs", {"scaling_factor": 0.4, "beta": 1 / 3, "gamma": 1 / 3}, "breadcrumbs",
         {"lambda": 0.4, "density": 1 / 3, "gamma": 1 / 3, "normalize": False}, one),
        ("model_stock", {}, "model_stock", {}, one),
        ("karcher", {"max_iter": 50, "tol": 1e-9}, "karcher", {"max_iter": 50, "tol": 1e-9}, one),
        # weights of both signs
        *[("ties", {"scaling_factor": 0.7, "threshold": 55, "scope": "tensor", **listed,
                    "zero_sign": "positive", "merge_func": how}, "ties",
           {"lambda": 0.7, "density": 0.55, "normalize": how == "mean"}, signed)
          for how in ("sum", "mean")],
        *[("dare_task_arithmetic",
           {"scaling_factor": 0.6, "sparsity_ratio": 0.4, "rescale": False, **listed,
            "normalize": normalize}, "dare_linear",
           {"lambda": 0.6, "density": 0.6, "rescale": False, "normalize": normalize}, signed)
          for normalize in (False, True)],
        *[("dare_ties",
           {"scaling_factor": 0.6, "sparsity_ratio": 0.4, "rescale": False, "threshold": 100,
            "zero_sign": "positive", "merge_func": how, **listed}, "dare_ties",
           {"lambda": 0.6, "density": 0.6, "rescale": False, "normalize": how == "mean"}, signed)
          for how in ("sum", "mean")],
        *[("breadcrumbs",
           {"scaling_factor": 0.4, "beta": 1 / 3, "gamma": 1 / 3, "elect": elect, **listed,
            "normalize": normalize}, f"breadcrumbs{'_ties' if elect else ''}",
           {"lambda": 0.4, **third, "normalize": normalize}, signed)
          for elect in (False, True) for normalize in (False, True)],
        *[("della", {**della, "elect": elect, "normalize": normalize, **listed},
           f"della{'' if elect else '_linear'}", {**theirs, "normalize": normalize}, signed)
          for elect in (False, True) for normalize in (False, True)],
        *[("sce", {"select_topk": share}, "sce", {"select_topk": share}, one)
          for share in (1.0, 0.5)],
        *[("nuslerp", {"weights": [0.2, 0.3], **how}, "nuslerp", how, {"a": 0.2, "c": 0.3})
          for how in ({}, {"nuslerp_flatten": False},
                      {"nuslerp_flatten": False, "nuslerp_row_wise": True})],
        ("nearswap", {"t": 0.05}, "nearswap", {"t": 0.05}, {"a": 1.0}),
        ("arcee_fusion", {}, "arcee_fusion", {}, {"a": 1.0}),
    ]  # fmt: skip
    found = []
    for method, options, name, parameters, used in cases:
        based = name not in ("linear", "karcher")
        config: dict[str, Any] = {
            "merge_method": name,
            "parameters": parameters,
            "models": [{"model": key, "parameters": {"weight": weight}}
                       for key, weight in used.items()],
        }  # fmt: skip
        if based:
            config["base_model"] = "_pretrained_"
        merged = run_mergekit(config, models, numbers)
        names = ("_pretrained_", *used) if based else tuple(used)
        found.append(case(method, options, names, merged, f"{name} {parameters}"))
    return found


def run_mergekit(
    config: dict[str, Any], models: dict[str, State], numbers: dict[str, State]
) -> State:
    """Runs its command on files."""
    from click.testing import CliRunner
    from mergekit import sparsify
    from mergekit.scripts.merge_raw_pytorch import main

    seen: dict[int, int] = defaultdict(int)
    order = [entry["model"] for entry in config["models"]]

    def bernoulli(chances: Tensor) -> Tensor:
        size = chances.numel()  # tells the tensors apart; DELLA makes a vector one row
        model = order[seen[size] % len(order)]
        seen[size] += 1
        (mine,) = (value for value in numbers[model].values() if value.numel() == size)
        return (mine.view_as(chances) > 1 - chances).to(chances.dtype)

    with tempfile.TemporaryDirectory() as folder:
        for name, state in models.items():
            save_file(state, f"{folder}/{name}.safetensors")
        text = json.loads(json.dumps(config))
        for entry in text["models"]:
            entry["model"] = f"{folder}/{entry['model']}.safetensors"
        if "base_model" in text:
            text["base_model"] = f"{folder}/{text['base_model']}.safetensors"
        Path(folder, "config.yaml").write_text(yaml.safe_dump(text))
        with patch.object(sparsify.torch, "bernoulli", bernoulli):
            done = CliRunner().invoke(main, [f"{folder}/config.yaml", f"{folder}/out"])
        if done.exit_code:
            raise RuntimeError(f"{config}: {done.output} {done.exception!r}")
        files = sorted(Path(folder, "out").glob("*.safetensors"))
        return {key: value for file in files for key, value in load_file(str(file)).items()}


def mask_source(models: dict[str, State], numbers: dict[str, State]) -> Callable[..., Tensor]:
    """Stands for `torch.rand_like`: gives the numbers of one model's tensor after the other."""
    calls: dict[tuple[int, ...], int] = defaultdict(int)
    order = [name for name in models if name != "_pretrained_"]

    def rand_like(value: Tensor, **_options: Any) -> Tensor:
        shape = tuple(value.shape)
        model = order[calls[shape]]
        calls[shape] += 1
        (mine,) = (found for found in numbers[model].values() if found.shape == shape)
        return mine

    return rand_like


def case(
    method: str, options: dict[str, Any], models: tuple[str, ...], merged: State, theirs: str
) -> dict[str, Any]:
    """One entry of the file."""
    listed = {key: value.tolist() for key, value in sorted(merged.items())}
    return {"method": method, "options": options, "models": list(models), "theirs": theirs,
            "merged": listed}  # fmt: skip


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("project", choices=("fusion_bench", "mergekit"))
    library = parser.parse_args().project
    models = make_models()
    numbers = make_numbers(models)
    cases = {"fusion_bench": fusion_bench, "mergekit": mergekit}[library](models, numbers)
    package = library.replace("_", "-")
    content = {
        "made_by": f"scripts/make_golden.py {library}",
        "versions": {package: metadata.version(package), "torch": torch.__version__,
                     "python": platform.python_version()},
        "models": {n: {k: v.tolist() for k, v in s.items()} for n, s in models.items()},
        "numbers": {n: {k: v.tolist() for k, v in s.items()} for n, s in numbers.items()},
        "cases": cases,
    }  # fmt: skip
    GOLDEN.mkdir(exist_ok=True)
    path = GOLDEN / f"merging_{library}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}: {len(cases)} cases")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
