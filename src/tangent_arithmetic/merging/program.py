"""One job of `merge.py`: composed configuration in, merged model and report out."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tangent_arithmetic.merging.algorithms import Algorithm
from tangent_arithmetic.merging.keys import check_keys, flag
from tangent_arithmetic.merging.methods import get_method
from tangent_arithmetic.merging.pool import ModelPool
from tangent_arithmetic.merging.saving import SHARD, check_target, may_write, recipe, save_merged
from tangent_arithmetic.merging.stream import Merge, merged_state
from tangent_arithmetic.merging.targets import (
    algorithm_of,
    device_settings,
    method_of,
    pool_of,
    task_pool_of,
)
from tangent_arithmetic.runtime.atomic import check_writable, write_json
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.runtime.private import expanded
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.storage.reading import read_json

if TYPE_CHECKING:
    from tangent_arithmetic.encoders.base import Encoder
    from tangent_arithmetic.merging.results import Record
    from tangent_arithmetic.merging.taskpools import TaskPool

logger = logging.getLogger(__name__)
AUTO = "auto"
POINTS = 21  # coefficients that scaling_factor=auto chooses from
SAVING = ("max_shard_size", "fsync")


@dataclass(frozen=True)
class Job:
    """A configuration, resolved.

    Attributes:
        algorithm: the method with its options; its scaling factor is 1 if it is to be chosen.
        auto: whether to choose the scaling factor on validation splits.
        pool: the models.
        tasks: evaluates the merged model; None for no evaluation.
        target: where to save the merged model; None to keep it in memory.
        saving: further arguments of `save_merged`.
        report_path: where to write the report, or None.
    """

    algorithm: Algorithm
    auto: bool
    pool: ModelPool
    tasks: TaskPool | None
    target: str | None
    saving: Mapping[str, Any]
    report_path: Path | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Job:
        """The job of a composed configuration.

        Raises:
            UsageError: if something in it is not supported.
        """
        with _usage_errors():
            check_keys(config)
            settings = device_settings(config["fabric"])
            settings["data_location"] = str(expanded(str(config["path"].get("data_dir", "data"))))
            node = dict(config["method"])
            target = _target(config, node)
            name = method_of(node).coefficient
            if auto := name is not None and node.get(name) == AUTO:
                node[name] = 1.0
            plugins = () if config.get("plugins") is None else config["plugins"]
            algorithm = algorithm_of(node, config.get("seed"), plugins)
            pool = pool_of(config["modelpool"])
            tasks = task_pool_of(config["taskpool"], settings, flag(config, "fast_dev_run"))
            report = str(config.get("report_save_path") or "")
            path = expanded(report.replace("{log_dir}", str(config["path"]["log_dir"])))
            saving = _saving(config)
            return cls(algorithm, auto, pool, tasks, target, saving, path if report else None)

    def merge(self, algorithm: Algorithm) -> Merge:
        """The merge of the models by a method, not yet computed."""
        if self.tasks is None or not get_method(algorithm.method).needs_data:
            return algorithm.merge(self.pool, show=True)
        return algorithm.merge(self.pool, True, self.tasks.examples(self.pool))

    def check(self, merge: Merge) -> Record | None:
        """Checks, before the work, that all results can be written.

        Returns:
            The place of the merge among the results of a run, or None.

        Raises:
            UsageError: if they cannot.
        """
        place = None
        if self.target is not None:
            place = check_target(merge, self.target, self.saving.get("max_shard_size", SHARD))
        if self.report_path is not None:
            _check_report(self.report_path, place, merge)
        record = self.tasks.record(merge, self.auto) if self.tasks is not None else None
        if record is not None:
            record.check()
        return record

    def merged(self, merge: Merge) -> tuple[Path | None, Mapping[str, Tensor] | None]:
        """Merges and saves.

        Returns:
            The path that was written, or None; the merged weights if there are tasks to evaluate
            them on, or None.
        """
        if self.target is None:
            if self.tasks is not None:
                return None, merged_state(merge)
            for _ in merge.parts():  # finds weights that cannot be merged
                pass
            return None, None
        written = save_merged(merge, self.target, **self.saving)
        logger.info("wrote %s", written)
        if self.tasks is None:
            return written, None
        return written, dict(type(self.pool).opened_by(written).tensors)  # evaluates the file


def run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Merges, saves if a path is given, evaluates if there are tasks, and writes the report.

    Args:
        config: the composed configuration, see `config/merge.yaml`.

    Returns:
        The report: {"model_info", an entry per task, "average", "merge", "seconds"}, and "written",
        the path of the merged model or None; of a dry run {"dry_run", "method", "models"}.

    Raises:
        UsageError: if something in it is not supported, or the models cannot be merged.
    """
    job = Job.of(config)
    if config.get("dry_run"):
        return {"dry_run": True, "method": repr(job.algorithm), "models": list(job.pool.models)}
    merge = job.merge(job.algorithm)
    record = job.check(merge)
    size = sum(value.numel() for value in job.pool.base.outline.values())
    info = {"trainable_params": size, "all_params": size, "trainable_percentage": 1.0}
    report: dict[str, Any] = {"model_info": info}
    if job.auto:
        if job.tasks is None:
            raise UsageError(
                "scaling_factor=auto is chosen on validation data; name a taskpool, or a number"
            )
        chosen = choose_scaling_factor(job.algorithm, job.pool, job.tasks)
        report["scaling_factor"] = chosen
        option = {str(merge.method.coefficient): chosen["coefficient"]}
        merge = job.merge(job.algorithm.with_options(**option))
    times = [time.monotonic()]
    written, state = job.merged(merge)
    times.append(time.monotonic())
    if job.tasks is not None and state is not None:
        report |= job.tasks.evaluate(job.tasks.encoder(job.pool, state))
        times.append(time.monotonic())
    spans = [round(end - begin, 2) for begin, end in itertools.pairwise(times)]
    seconds = dict(zip(("merge", "evaluate"), spans, strict=False))
    report |= {"merge": recipe(merge), "seconds": seconds}
    if job.report_path is not None:
        write_json(job.report_path, report)
        logger.info("wrote %s", job.report_path)
    if record is not None:
        record.write(merge, report)
    return {**report, "written": written}


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Turns any error while a configuration is resolved into a `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise UsageError(
            f"invalid configuration ({type(error).__name__}: {shown(error)}); --cfg job prints it, "
            "--help lists the groups"
        ) from error


def _target(config: Mapping[str, Any], method: dict[str, Any]) -> str | None:
    """Where to save the merged model: `merged_model_save_path`, or FusionBench's other names.

    Those are `method.model_save_path`, which is taken out, and that of the dummy task pool.

    Raises:
        UsageError: if they name different places.
    """
    places = {
        "merged_model_save_path": config.get("merged_model_save_path"),
        "method.model_save_path": method.pop("model_save_path", None),
        "taskpool.model_save_path": config["taskpool"].get("model_save_path"),
    }
    named = {key: str(place) for key, place in places.items() if place}
    if len(set(named.values())) > 1:
        listed = " and ".join(f"{key}={place}" for key, place in named.items())
        raise UsageError(f"{listed} differ; name one")
    return next(iter(named.values()), None)


def _saving(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `save_merged` in `merged_model_save_kwargs`."""
    saving = dict(config.get("merged_model_save_kwargs") or {})
    if strange := sorted(map(str, set(saving) - set(SAVING))):
        raise UsageError(
            f"merged_model_save_kwargs has {', '.join(strange)}; its keys are {', '.join(SAVING)}"
        )
    if not isinstance(saving.get("fsync", True), bool):
        raise UsageError(
            f"merged_model_save_kwargs.fsync must be true or false, got {saving['fsync']!r}"
        )
    return saving


def _check_report(path: Path, place: Path | None, merge: Merge) -> None:
    """Checks that the report can be written, and replaces neither the model nor another file.

    Args:
        path: the path of the report.
        place: the path of the merged model, or None.
        merge: the merge.
    """
    if place is not None and (path.resolve() == place.resolve() or may_write(merge, place, path)):
        raise UsageError(
            f"report_save_path={path} is also the path of the merged model "
            "or of one of its files; choose another"
        )
    check_writable(path)
    if path.exists() and not {"merge", "model_info"} <= read_json(path).keys():
        raise UsageError(f"report_save_path={path} is not a report; choose another file")


def choose_scaling_factor(algorithm: Algorithm, pool: ModelPool, tasks: TaskPool) -> dict[str, Any]:
    """The coefficient with the best mean accuracy on the tasks' validation splits.

    It is one of `POINTS` from 0 to the method's `largest`, usually 1. Accuracies are normalised by
    those of the pool's single-task models, if every task has one. Of several best coefficients, the
    smallest is chosen.

    Args:
        algorithm: the method, with the coefficient 1.
        pool: the models.
        tasks: the tasks.

    Returns:
        {"coefficient", "metric", "validation": {coefficient: mean}}.

    Raises:
        UsageError: if the method has no scaling factor.
    """
    from tangent_arithmetic.arithmetic.coefficients import coefficients, find_optimal_coef

    method = get_method(algorithm.method)
    if method.coefficient is None:
        raise UsageError(f"{method.name} has no scaling_factor to choose")
    start = dict(pool.base.tensors)
    if not method.scales:
        at_zero = algorithm.with_options(**{method.coefficient: 0.0})
        start = merged_state(at_zero.merge(pool, show=True), any_variance=True)
    encoder = tasks.encoder(pool, start)
    merged = merged_state(algorithm.merge(pool, show=True), any_variance=True)
    tau = difference(tasks.encoder(pool, merged), encoder)
    coefs = [round(method.largest * coef, 10) for coef in coefficients(POINTS)]
    swept = tasks.sweep(encoder, tau, coefs)
    normalised = set(swept) <= set(pool.model_names)
    best = dict.fromkeys(swept, 1.0)
    for name in swept if normalised else ():
        single = tasks.encoder(pool, dict(pool.weights(name).tensors))
        step = difference(single, encoder)
        best[name] = tasks.measure(encoder, name, step, [1.0], True)[0]["accuracy"]
    means = {
        str(coef): {"mean": sum(swept[n][i] / best[n] for n in swept if best[n]) / len(swept)}
        for i, coef in enumerate(coefs)
    }
    return {
        "coefficient": find_optimal_coef(means, "mean"),
        "metric": "mean normalised accuracy" if normalised else "mean accuracy",
        "validation": {coef: value["mean"] for coef, value in means.items()},
    }


@torch.no_grad()
def difference(encoder: Encoder, start: Encoder) -> dict[str, Tensor]:
    """The task vector of an encoder, from another one."""
    tau = statedict.difference(encoder.weights(), start.weights())
    return {name: value.float().cpu() for name, value in tau.items()}


def table(report: Mapping[str, Any]) -> list[str]:
    """The accuracies of a report, as lines to print."""
    rows = {n: row for n, row in report.items() if isinstance(row, Mapping) and "accuracy" in row}
    width = max(map(len, rows), default=0)
    return [
        f"{name:<{width}}  {100 * row['accuracy']:5.1f} %  loss {row['loss']:.4f}"
        for name, row in rows.items()
    ]
