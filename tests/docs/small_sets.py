"""Put on the path as `sitecustomize`, it cuts the embedded suite to a few pictures a set.

The kernel of the linear model takes four of each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

SIZES = {"train": 70, "val": 40, "test": 48}
OWN = 2000  # added to versions, so that no cache mixes these with the true sets
DATA, KERNEL = "tangent_arithmetic.data.embedded", "tangent_arithmetic.analysis.kernel"


class Cutter(MetaPathFinder):
    """Cuts the sets, and the images of the kernel, when their modules are first imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """The module's own spec, with a step after its execution."""
        if name not in CUTS:
            return None
        cut = CUTS.pop(name)
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            cut(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def cut_sets(module: Any) -> None:
    """Leaves the first pictures of every split."""
    from tangent_arithmetic.data.embedded import base, shapes

    base.SYNTHETIC_SIZES.update(SIZES)  # type: ignore[arg-type]
    for name, embedded in module.EMBEDDED_SETS.items():
        build = base.render_split(shapes.draw_control, 64, 306, base.SYNTHETIC_SIZES)
        if name != "Shapes":
            build = first(embedded.build)
        module.EMBEDDED_SETS[name] = replace(embedded, build=build, version=embedded.version + OWN)


def cut_kernel(module: Any) -> None:
    """Leaves few images of each task to the kernel."""
    module.sampled = lambda run: run.at_most(4)


CUTS = {DATA: cut_sets, KERNEL: cut_kernel}


def first(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A builder of the first pictures of a split."""

    def few(split: Any) -> Any:
        images, labels = build(split)
        return images[: SIZES[split]], labels[: SIZES[split]]

    return few


sys.meta_path.insert(0, Cutter())
