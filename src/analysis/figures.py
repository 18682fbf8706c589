"""Figures of a run's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.checkpoints import atomic
from src.results import arithmetic_path, load_results
from src.settings import control_of, tasks_of
from src.summary import EDITED, SINGLE

COLOURS = {"none": "#888888", "standard": "#d1495b", "linear": "#00798c", "posthoc": "#edae49"}


def overview(args: Any, summary: dict[str, Any], path: Path) -> None:
    """Draws single-task accuracy, the addition sweep and negation, of all modes.

    Args:
        args: settings of the run whose sweep is drawn.
        summary: see `src.summary.collect`.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    _single(axes[0], summary)
    _addition(axes[1], args, summary)
    _negation(axes[2], summary, control_of(args))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _bars(axis: Any, modes: list[str], figures: list[dict[str, Any]], offset: float = 0.0) -> None:
    for i, (mode, one) in enumerate(zip(modes, figures, strict=True)):
        axis.bar(
            i + offset,
            100 * one["mean"],
            0.8 if offset == 0 else 0.38,
            yerr=None if one["std"] is None else 100 * one["std"],
            color=COLOURS[mode],
            alpha=1.0 if offset <= 0 else 0.45,
        )
        axis.text(i + offset, 100 * one["mean"] + 1, f"{100 * one['mean']:.1f}", ha="center")


def _single(axis: Any, summary: dict[str, Any]) -> None:
    _bars(axis, list(SINGLE), [summary["single"][m]["mean"] for m in SINGLE])
    axis.set(title="one task, fine-tuned", ylabel="test accuracy, mean of tasks, %", ylim=(0, 105))
    axis.set_xticks(range(len(SINGLE)), list(SINGLE.values()))


def _addition(axis: Any, args: Any, summary: dict[str, Any]) -> None:
    for mode, label in EDITED.items():
        results = load_results(arithmetic_path(args, mode, "additions"))
        coefs = sorted(results["val"], key=float)
        values = [100 * results["val"][c]["avg_top1"] for c in coefs]
        axis.plot([float(c) for c in coefs], values, color=COLOURS[mode], label=label)
        best = str(results["coefficient"])
        axis.plot(float(best), 100 * results["val"][best]["avg_top1"], "o", color=COLOURS[mode])
    zeroshot = 100 * results["val"]["0.0"]["avg_top1"]
    axis.axhline(zeroshot, color=COLOURS["none"], linestyle=":", label="zero-shot")
    axis.set(
        title=f"all {len(tasks_of(args))} task vectors added",
        xlabel="coefficient",
        ylabel="validation accuracy, mean, %",
    )
    axis.legend(frameon=False)


def _negation(axis: Any, summary: dict[str, Any], control: str) -> None:
    modes = ["none", *EDITED]
    first = summary["negation"]["standard"]
    target = [first["zero-shot"], *(summary["negation"][m]["target"] for m in EDITED)]
    kept = [first["zero-shot control"], *(summary["negation"][m]["control"] for m in EDITED)]
    _bars(axis, modes, target, offset=-0.2)
    _bars(axis, modes, kept, offset=0.2)
    axis.set(title=f"one task negated: task (solid), {control} (pale)", ylim=(0, 105))
    axis.set_ylabel("test accuracy, %")
    axis.set_xticks(range(len(modes)), ["zero-shot", *EDITED.values()])
