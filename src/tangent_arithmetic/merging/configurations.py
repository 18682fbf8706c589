"""The configurations of the merging methods: class, options, defaults.

Read from the source of the methods, so that composing a configuration, or `--help`, does not
import PyTorch. Methods registered elsewhere come from the registry.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tangent_arithmetic.merging.options import RESERVED
from tangent_arithmetic.merging.registry import METHODS, OWN, algorithm_name

FOLDER = Path(__file__).parent / "methods"
MISSING = "???"  # Hydra's mark of a required value
NAMES = {"algorithm", "config"}
SEED = "seed"  # this option is set by the key beside the group `method`
# mergekit's names of variants: the method, and its options that differ from their defaults
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "breadcrumbs_ties": ("breadcrumbs", {"elect": True}),
    "dare_linear": ("dare_task_arithmetic", {}),
    "della_linear": ("della", {"elect": False, "normalize": False}),
}


def configurations() -> dict[str, dict[str, Any]]:
    """The configuration of each method, by its names in the group `method`.

    These are the method's own name, that of FusionBench where it differs, and `VARIANTS`.
    """
    try:
        nodes = {
            name: node
            for path in sorted(FOLDER.glob("*.py"))
            for names, node in _read(path)
            for name in names
        }
    except ValueError:  # a default that is not a literal
        importlib.import_module(f"{OWN}methods")
        nodes = {}
    for method in METHODS.values():
        node = _node(method.algorithm, method.defaults)
        nodes |= {name: node for name in (method.name, method.config)}
    variants = {name: {**nodes[of], **changes} for name, (of, changes) in VARIANTS.items()}
    return {**nodes, **variants}


def _node(algorithm: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    options = {
        name: MISSING if value is inspect.Parameter.empty else value
        for name, value in defaults.items()
        if name != SEED
    }
    return {"_target_": f"{OWN}{algorithm}", **options}


def _read(path: Path) -> Iterator[tuple[set[str], dict[str, Any]]]:
    """The names and the configuration of each method in a source file."""
    for function in ast.parse(path.read_text(encoding="utf-8")).body:
        for call in getattr(function, "decorator_list", ()):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "merging_method":
                name = ast.literal_eval(call.args[0])
                words = {word.arg: word.value for word in call.keywords}
                names = {key: ast.literal_eval(words[key]) for key in NAMES & words.keys()}
                algorithm = names.get("algorithm", algorithm_name(name))
                both = {name, names.get("config", name)}
                yield both, _node(algorithm, _defaults(function))


def _defaults(function: Any) -> dict[str, Any]:
    return {
        option.arg: inspect.Parameter.empty if default is None else ast.literal_eval(default)
        for option, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        if option.arg not in RESERVED
    }
