"""One run of `merge.py`: composed configuration in, merged model and report out."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.merging.algorithms import Algorithm
from tangent_arithmetic.merging.pool import ModelPool
from tangent_arithmetic.merging.registry import get_method
from tangent_arithmetic.merging.saving import SHARD, check_target, recipe, save_merged
from tangent_arithmetic.merging.stream import merged_state
from tangent_arithmetic.merging.targets import (
    algorithm_of,
    data_folder,
    device_settings,
    pool_of,
    task_pool_of,
)
from tangent_arithmetic.runtime.atomic import check_writable, write_json
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.runtime.private import expanded
from tangent_arithmetic.storage.reading import read_json

logger = logging.getLogger(__name__)
AUTO = "auto"
POINTS = 21  # coefficients that scaling_factor=auto chooses from
SAVING = ("max_shard_size", "fsync")


def run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Merges, saves if a path is given, evaluates if there are tasks, and writes the report.

    Args:
        config: the composed configuration, see `config/merge.yaml`.

    Returns:
        The report: {"model_info", one entry a task, "average", "merge", "seconds"}; of a dry run
        {"dry_run", "method", "models"}.

    Raises:
        UsageError: if something in it is not supported, or the models cannot be merged.
    """
    with _understood():
        settings = {
            **device_settings(config["fabric"]), "data_location": data_folder(config["path"])
        }  # fmt: skip
        node, seed = dict(config["method"]), config.get("seed")
        auto = node.get("scaling_factor") == AUTO
        if auto:
            node["scaling_factor"] = 1.0
        algorithm, pool = algorithm_of(node, seed), pool_of(config["modelpool"])
        tasks = task_pool_of(config["taskpool"], settings, bool(config.get("fast_dev_run")))
        saving, target = _saving(config), _report_path(config)
    if config.get("dry_run"):
        return {"dry_run": True, "method": repr(algorithm), "models": list(pool.models)}
    merge = algorithm.merge(pool, show=True)
    place = None
    if config.get("merged_model_save_path"):
        shards = saving.get("max_shard_size", SHARD)
        place = check_target(merge, config["merged_model_save_path"], shards)
    if target is not None:
        _check_report(target, place)
    report: dict[str, Any] = {"model_info": _model_info(pool)}
    if auto:
        if tasks is None:
            raise UsageError(
                "scaling_factor=auto is chosen on validation data; name a taskpool, or a number"
            )
        report["scaling_factor"] = choose_scaling_factor(algorithm, pool, tasks)
        node["scaling_factor"] = report["scaling_factor"]["coefficient"]
        merge = algorithm_of(node, seed).merge(pool, show=True)
    seconds: dict[str, float] = {}
    state: Mapping[str, Tensor] | None = None
    with _timed(seconds, "merge"):
        if config.get("merged_model_save_path"):
            written = save_merged(merge, config["merged_model_save_path"], **saving)
            logger.info("wrote %s", written)
            if tasks is not None:  # what is evaluated is what was written
                found = type(pool).opened_by(written)
                state = dict(found.tensors)
        elif tasks is not None:
            state = merged_state(merge)
    if tasks is not None and state is not None:
        with _timed(seconds, "evaluate"):
            report |= tasks.evaluate(tasks.encoder(pool, state))
    report |= {"merge": recipe(merge), "seconds": seconds}
    if target is not None:
        write_json(target, report)
        logger.info("wrote %s", target)
    return report


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Makes an error of ours of what goes wrong while a configuration is taken apart."""
    try:
        yield
    except UsageError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise UsageError(
            f"the configuration is not understood ({type(error).__name__}: {shown(error)}); see "
            "the groups in config/ for what it may hold"
        ) from error


def _saving(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `save_merged` that `merged_model_save_kwargs` names."""
    found = dict(config.get("merged_model_save_kwargs") or {})
    if strange := sorted(map(str, set(found) - set(SAVING))):
        raise UsageError(
            f"merged_model_save_kwargs has {', '.join(strange)}; it knows {', '.join(SAVING)}"
        )
    if not isinstance(found.get("fsync", True), bool):
        raise UsageError(
            f"merged_model_save_kwargs.fsync must be true or false, got {found['fsync']!r}"
        )
    return found


def _model_info(pool: ModelPool) -> dict[str, float]:
    size = sum(value.numel() for value in pool.base.outline.values())
    return {"trainable_params": size, "all_params": size, "trainable_percentage": 1.0}


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - begun, 2)


def _report_path(config: Mapping[str, Any]) -> Path | None:
    target = config.get("report_save_path")
    if not target:
        return None
    named = str(target).replace("{log_dir}", str(config["path"]["log_dir"]))
    return expanded(named)


def _check_report(path: Path, place: Path | None) -> None:
    """Checks that the report can be written, and takes the place of nothing but a report.

    Args:
        path: the report's.
        place: the merged model's.

    Raises:
        UsageError: if it cannot.
    """
    if place is not None and path.resolve() == place.resolve():
        raise UsageError(f"report_save_path={path} is where the merged model goes; name another")
    check_writable(path)
    if path.exists() and not {"merge", "model_info"} <= read_json(path).keys():
        raise UsageError(f"report_save_path={path} is no report; name another file")


def choose_scaling_factor(algorithm: Algorithm, pool: ModelPool, tasks: Any) -> dict[str, Any]:
    """The coefficient from 0 to 1 with the best mean accuracy on the tasks' validation splits.

    Accuracies are normalised by those of the pool's own model of the task, where each task has one;
    ties go to the smallest coefficient.

    Returns:
        {"coefficient", "metric", "validation": {coefficient: mean}}.

    Raises:
        UsageError: if the method has no scaling factor.
    """
    from tangent_arithmetic.arithmetic.coefficients import coefficients, find_optimal_coef

    method = get_method(algorithm.method)
    if "scaling_factor" not in method.defaults:
        raise UsageError(f"{method.name} has no scaling_factor to choose")
    theta0 = dict(pool.base.tensors)
    merged = merged_state(algorithm.merge(pool, show=True))
    encoder = tasks.encoder(pool, theta0)
    tau = _difference(tasks.encoder(pool, merged), encoder)
    coefs = coefficients(POINTS)
    found = tasks.sweep(encoder, tau, coefs)
    own = set(found) <= set(pool.model_names)
    best = {name: 1.0 for name in found}
    if own:
        for name in found:
            state = {key: pool.weights(name).read(key) for key in pool.base.outline}
            step = _difference(tasks.encoder(pool, state), encoder)
            best[name] = tasks.measure(encoder, name, step, [1.0], True)[0]["accuracy"]
    means = {
        str(coef): {"mean": sum(found[n][i] / best[n] for n in found if best[n]) / len(found)}
        for i, coef in enumerate(coefs)
    }
    return {
        "coefficient": find_optimal_coef(means, "mean"),
        "metric": "mean normalised accuracy" if own else "mean accuracy",
        "validation": {coef: value["mean"] for coef, value in means.items()},
    }


@torch.no_grad()
def _difference(moved: Any, start: Any) -> dict[str, Tensor]:
    theta, theta0 = moved.weights(), start.weights()
    return {
        name: (value.float() - theta0[name].float()).cpu()
        for name, value in theta.items()
        if value.is_floating_point()
    }


def table(report: Mapping[str, Any]) -> list[str]:
    """The report's accuracies as lines for the screen."""
    rows = {name: found for name, found in report.items()
            if isinstance(found, Mapping) and "accuracy" in found}  # fmt: skip
    width = max([len(name) for name in rows], default=0)
    return [
        f"{name:<{width}}  {100 * found['accuracy']:5.1f} %  loss {found['loss']:.4f}"
        for name, found in rows.items()
    ]
