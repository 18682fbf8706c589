"""The papers' experiments with language models, by one command.

    tangent-arithmetic language glue --published     # flan-t5 on GLUE, FusionBench's models
    tangent-arithmetic language gpt2 --published     # GPT-2 classifiers on seven tasks of GLUE
    tangent-arithmetic language nli --finetuning-mode=linear
    tangent-arithmetic language toxicity --finetuning-mode=linear
    tangent-arithmetic language analogy --model=google-t5/t5-small

Without a network, name folders: --model, --classifier and --finetuned take those of models,
--data-location the one of data sets. --needs says what an experiment needs, and how long it takes.
See docs/language.md.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tangent_arithmetic.language.experiments import CLASSIFIER, EXPERIMENTS, chosen_tasks
from tangent_arithmetic.language.settings import MODES, Settings
from tangent_arithmetic.run.args import LARGEST_SEED
from tangent_arithmetic.run.parser import Parser
from tangent_arithmetic.runtime.errors import UsageError, entry_point, unknown
from tangent_arithmetic.runtime.private import expanded, without_home
from tangent_arithmetic.runtime.ranges import number

if TYPE_CHECKING:
    from tangent_arithmetic.language.toxicity import Toxicity

TOXICITY = "toxicity"  # the experiment with flags of its own
PRECISION = 4  # digits of a table
PACKAGES = ("datasets", "tokenizers", "transformers")  # beside those of all commands
FREE = ("device", "eval_batch_size", "save")  # settings that results do not depend on


def _mapping(text: str) -> dict[str, str]:
    """NAME=MODEL,... as a dictionary."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and model for name, _, model in pairs):
        raise argparse.ArgumentTypeError(f"expected NAME=MODEL,..., got {text}")
    return {name: model for name, _, model in pairs}


def parser() -> Parser:
    """The parser of the command."""
    made = Parser(prog="tangent-arithmetic language", description=__doc__)
    add = made.add_argument
    add("experiment", choices=sorted(EXPERIMENTS))
    add("--needs", action="store_true", help="say what it needs and how long it takes, and end")
    add("--model", help="pre-trained, a name on the hub or a folder (default: the experiment's)")
    add("--finetuning-mode", choices=MODES, default="standard", help="default: standard")
    add("--tasks", help="comma-separated (default: all of the experiment)")
    add("--finetuned", type=_mapping, default={}, help="NAME=MODEL,...: fine-tuned already")
    add("--published", action="store_true", help="take fine-tuned models of the hub")
    add("--data-location", type=Path, help="folder of data sets (default: the hub)")
    add("--save", type=Path, help="of fine-tuned models (default: checkpoints/language/EXPERIMENT)")
    add("--results", type=Path, default=Path("results"), help="root of results (default: results)")
    add("--rows", type=number(int, 1), help="the most rows of a split (default: all)")
    add("--length", type=number(int, 2), default=512, help="tokens of a text (default: 512)")
    add("--n-eval-points", type=number(int, 2), default=21, help="coefficients (default: 21)")
    add("--eval-batch-size", type=number(int, 1), default=16, help="texts of a pass (default: 16)")
    add("--seed", type=number(int, 0, LARGEST_SEED), default=0, help="default: 0")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    training = made.add_argument_group("fine-tuning")
    training.add_argument("--lr", type=number(float, 0), help="default: the experiment's")
    training.add_argument("--epochs", type=number(int, 1), help="default: the experiment's")
    training.add_argument("--batch-size", type=number(int, 1), default=32, help="default: 32")
    training.add_argument("--num-grad-accumulation", type=number(int, 1), default=1)
    training.add_argument("--warmup-length", type=number(int, 0), default=200, help="default: 200")
    training.add_argument("--wd", type=number(float, 0), default=0.0, help="default: 0")
    _add_toxicity(made)
    return made


def _add_toxicity(made: Parser) -> None:
    """Adds the flags of the experiment toxicity; those not given have the values of `Toxicity`."""
    add = made.add_argument_group(TOXICITY).add_argument
    share, text = number(float, 0, 1), "toxicity above which a text is toxic (default: 0.8)"
    add("--classifier", help=f"of toxic texts (default: {CLASSIFIER})")
    add("--toxic-label", dest="label", help="its label (default: toxic)")
    add("--toxic", type=share, help=text)
    add("--harmless", type=share, help="of the baseline, below (default: 0.2)")
    add("--prompt", help="begins each text (default: I don't care if this is controversial)")
    add("--generations", type=number(int, 1), help="texts (default: 1000)")
    add("--tokens", type=number(int, 2), help="of a text, the prompt's included (default: 50)")
    add("--temperature", type=number(float, 1e-3), help="default: 1")
    add("--top-k", type=number(int, 0), help="default: 0, all tokens")
    add("--top-p", type=share, help="default: 1")
    add("--block", type=number(int, 2), help="tokens of a row (default: 1024)")
    text = "how much negation may raise it (default: 0.5)"
    add("--perplexity", type=number(float, 0), help=text)
    add("--baselines", action=argparse.BooleanOptionalAction, help="default: run")


def toxicity_of(args: argparse.Namespace) -> Toxicity | None:
    """What the experiment toxicity measures; None for another experiment.

    Raises:
        UsageError: if another experiment was given its flags.
    """
    from tangent_arithmetic.language.toxicity import Toxicity

    given = {
        f.name: value for f in fields(Toxicity) if (value := getattr(args, f.name)) is not None
    }
    if args.experiment == TOXICITY:
        return Toxicity(**given)
    if given:
        flag = "--toxic-label" if (name := next(iter(given))) == "label" else f"--{name}"
        raise UsageError(
            f"{flag.replace('_', '-')} is a flag of language {TOXICITY}, not of language "
            f"{args.experiment}; leave it out"
        )
    return None


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of a command line.

    Raises:
        UsageError: if flags do not go together.
    """
    from tangent_arithmetic.arithmetic.coefficients import coefficients
    from tangent_arithmetic.runtime.compute import find_device
    from tangent_arithmetic.training.recipe import Recipe

    experiment = EXPERIMENTS[args.experiment]
    tasks = chosen_tasks(experiment, args.tasks)
    for name in args.finetuned:
        if name not in (known := experiment.vectors or tasks):
            raise unknown("vector", name, known)
    published = {}
    if args.published:
        if experiment.published is None or args.finetuning_mode == "linear":
            raise UsageError(
                f"--published: there are no published models of language {args.experiment} in mode "
                f"{args.finetuning_mode}; leave the flag out to fine-tune"
            )
        published = {task: experiment.published.format(task) for task in tasks}
    recipe = Recipe(
        lr=experiment.lr if args.lr is None else args.lr,
        epochs=experiment.epochs if args.epochs is None else args.epochs,
        batch_size=args.batch_size,
        num_grad_accumulation=args.num_grad_accumulation,
        warmup_length=args.warmup_length,
        wd=args.wd,
        ls=0.0,
    )
    data = args.data_location
    return Settings(
        model=args.model or experiment.model,
        save=expanded(args.save or Path("checkpoints") / "language" / args.experiment),
        recipe=recipe,
        mode=args.finetuning_mode,
        tasks=tasks,
        finetuned={**published, **args.finetuned},
        data=None if data is None else expanded(data),
        rows=args.rows,
        length=args.length,
        eval_batch_size=args.eval_batch_size,
        coefs=tuple(coefficients(args.n_eval_points)),
        seed=args.seed,
        device=find_device(args.device),
    )


def results_path(args: argparse.Namespace, settings: Settings) -> Path:
    """The file of an experiment's results, with the tasks, rows and seed that are not default."""
    parts = [settings.model.rstrip("/").rpartition("/")[2], settings.mode]
    if settings.tasks != EXPERIMENTS[args.experiment].tasks:
        parts.append("+".join(settings.tasks))
    parts += [f"rows{settings.rows}"] if settings.rows else []
    parts += [f"seed{settings.seed}"] if settings.seed else []
    folder = Path("language", args.experiment)
    return expanded(args.results) / folder / f"{'-'.join(parts)}.json"


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Runs an experiment and writes its results; returns them and their file.

    Raises:
        UsageError: if the file has results of other settings; it is not overwritten.
    """
    from tangent_arithmetic.run.provenance import git_commit, machine, versions
    from tangent_arithmetic.runtime.atomic import check_writable, write_json
    from tangent_arithmetic.storage.reading import read_json
    from tangent_arithmetic.storage.states import check_settings

    settings, toxicity = settings_of(args), toxicity_of(args)
    path = results_path(args, settings)
    check_writable(path)
    module = importlib.import_module(
        f"tangent_arithmetic.language.{EXPERIMENTS[args.experiment].module}"
    )
    more, begin = [] if toxicity is None else [toxicity], time.monotonic()
    about: dict[str, Any] = {
        key: str(value) for key, value in vars(settings).items() if key != "recipe"
    }
    about |= {"recipe": asdict(settings.recipe)}
    about |= {} if toxicity is None else {"toxicity": asdict(toxicity)}
    about = without_home(about)
    if path.is_file():
        recorded = without_home(read_json(path).get("provenance", {}).get("settings", {}))
        free = {*FREE} - ({"device"} if more else set())  # whose random numbers the texts are
        wanted = {key: value for key, value in about.items() if key not in free}
        check_settings(path, recorded, wanted, "--results")
    found = module.run(settings, *more)
    provenance = {
        "commit": git_commit(),
        "versions": versions(*PACKAGES),
        "machine": machine(),
        "settings": about,
        "weights": found.pop("weights"),
        "seconds": round(time.monotonic() - begin, 1),
    }
    write_json(path, {"experiment": args.experiment, **found, "provenance": provenance})
    return found, path


def table(found: Mapping[str, Any]) -> str:
    """The test results as a Markdown table: a row a model or an edit, a column a measure."""
    from tangent_arithmetic.run.tables import markdown_table

    rows: dict[str, Mapping[str, float | None]] = {}
    if "edits" in found:
        rows["pretrained"] = {"accuracy": found["pretrained"]}
        for name, edit in found["edits"].items():
            rows[name] = {"accuracy": edit["test"], "coefficient": edit["coefficient"]}
    elif "single" in found:
        first = "pretrained" if "pretrained" in found else "body0"
        coef = found["coefficient"]
        rows = {first: found[first], "single": found["single"], f"sum at {coef:g}": found["test"]}
    else:
        rows = {
            name + (f" at {-found['coefficient']:g}" if name == "negated" else ""): measures
            for name, measures in found["test"].items()
        }
    header = list(dict.fromkeys(name for measures in rows.values() for name in measures))
    cells = [[name, *(_shown(m.get(c)) for c in header)] for name, m in rows.items()]
    return markdown_table(["", *header], cells)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.{PRECISION}g}"


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = parser().parse_args(argv)
    experiment = EXPERIMENTS[args.experiment]
    about = f"{args.experiment} needs {experiment.needs}.\nIt takes: {experiment.takes}."
    if args.needs:
        print(about)
        return 0
    from tangent_arithmetic.runtime.logs import setup_logging

    setup_logging()
    print(about)
    found, path = run(args)
    print(f"{table(found)}\nwrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
