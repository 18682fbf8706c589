"""The model card of a merged folder: recipe, parents with their licences, how to make it again."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tangent_arithmetic import __version__
from tangent_arithmetic.encoders.published import hub
from tangent_arithmetic.merging.language import LanguageModelPool
from tangent_arithmetic.merging.pool import ModelPool
from tangent_arithmetic.merging.registry import OWN
from tangent_arithmetic.merging.stream import Merge
from tangent_arithmetic.merging.weights import on_hub
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.reading import read_text

CARD = "README.md"
FENCE = "---"
PLAIN = re.compile(r"[A-Za-z_~/.][\w~/.@-]*")  # strings that Hydra takes without quotes
LICENCE = ("license", "license_name", "license_link")
UNSTATED = "not stated"


def card(merge: Merge, recipe: Mapping[str, Any], title: str) -> str:
    """The model card, in Markdown with the front matter of the Hugging Face hub.

    Args:
        merge: the merge.
        recipe: its recipe, without home folders.
        title: the heading.
    """
    licences = {name: licence_of(merge.pool.weights(name).folder) for name in recipe["models"]}
    table = markdown_table(
        ["model", "from", "licence", "fingerprint"],
        [
            [f"`{name}`", _place(facts), _named(licences[name]), f"`{facts['fingerprint']}`"]
            for name, facts in recipe["models"].items()
        ],
    )
    settings = {"method": recipe["method"], "options": recipe["options"]}
    settings |= {key: recipe[key] for key in ("plugins",) if key in recipe}
    source = "" if recipe["source"] == "none" else f" ({recipe['source']})"
    return "\n".join(
        [
            *(FENCE, _front_matter(recipe, list(licences.values())).strip(), FENCE, ""),
            *(f"# {title}", ""),
            f"A merge of {len(merge.models)} models by `{recipe['method']}`{source}, made with "
            f"tangent-arithmetic {__version__}. It has not been evaluated here.",
            *("", "## Recipe", "", table, "", "```yaml", _yaml(settings).strip(), "```", ""),
            *("## How to make it again", "", *_reproduction(merge, recipe), ""),
            *("## Licences", "", _terms(licences), ""),
        ]
    )


def licence_of(folder: Path | None) -> dict[str, str]:
    """The licence that the model card in a folder states; empty if there is none."""
    import yaml

    path = None if folder is None else folder / CARD
    if path is None or not path.is_file():
        return {}
    found: Any = None
    with contextlib.suppress(UsageError, yaml.YAMLError, RecursionError, ValueError):
        first, fence, rest = read_text(path).partition(f"{FENCE}\n")
        if fence and not first.strip():
            found = yaml.safe_load(rest.partition(f"\n{FENCE}")[0])
    if not isinstance(found, Mapping):
        return {}
    return {key: found[key] for key in LICENCE if isinstance(found.get(key), str)}


def _named(licence: Mapping[str, str]) -> str:
    """The name of a licence; models under licences of their own have "other" as `license`."""
    keys = ("license_name", "license", "license_link")
    return next((licence[key] for key in keys if key in licence), UNSTATED)


def _place(facts: Mapping[str, Any]) -> str:
    return f"`{facts['place']}`" if "place" in facts else "memory"


def _yaml(content: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def _front_matter(recipe: Mapping[str, Any], licences: list[dict[str, str]]) -> str:
    """The metadata of the hub: parents there, and the licence if all parents have the same."""
    places = [str(facts.get("place", "")) for facts in recipe["models"].values()]
    names = [place.removeprefix(hub.HUB) for place in places if on_hub(place)]
    parents = [name.partition("@")[0] for name in names]
    content: dict[str, Any] = {"library_name": "transformers"}
    if parents and len(parents) == len(places):
        content |= {"base_model": parents, "base_model_relation": "merge"}
    if licences[0] and all(found == licences[0] for found in licences):
        content |= licences[0]
    return _yaml({**content, "tags": ["merge", "tangent-arithmetic"]})


def _terms(licences: Mapping[str, Mapping[str, str]]) -> str:
    unstated = [f"`{name}`" for name, found in licences.items() if not found]
    stated = sorted({_named(found) for found in licences.values() if found})
    first, *others = licences.values()
    if not unstated and all(found == first for found in others):
        return f"All parents state the licence {stated[0]}."
    parts = [f"The parents' model cards state {', '.join(stated)}."] if stated else []
    if unstated:
        parts.append(f"No licence was found for {', '.join(unstated)}.")
    return " ".join([*parts, "Check the terms of all parents before you publish this model."])


def _reproduction(merge: Merge, recipe: Mapping[str, Any]) -> Iterator[str]:
    models = recipe["models"]
    if not all("place" in facts for facts in models.values()):
        yield "Models were given in memory; `merge_recipe.json` has fingerprints of their weights."
        return
    if not merge.method.config:
        yield f"`{merge.method.name}` is no method of the command; this was made from Python."
        return
    named = f"modelpool.models={_hydra({name: f['place'] for name, f in models.items()})}"
    if _keys_of(named) != list(models):
        yield "Names of the models cannot be given to the command; `merge_recipe.json` has them."
        return
    words = [f"method={merge.method.config}"]
    changed = merge.method.changed(merge.options)
    if "seed" in changed:
        words.append(f"seed={changed.pop('seed')}")
    words += [f"method.{name}={_hydra(value)}" for name, value in changed.items()]
    if merge.plugins:
        words.append(f"plugins={_hydra(recipe['plugins'])}")
    words.append("modelpool=files")
    if type(merge.pool) is not ModelPool:
        words.append(f"modelpool._target_={OWN}{type(merge.pool).__name__}")
    if isinstance(merge.pool, LanguageModelPool) and merge.pool.vocabulary != "same":
        words.append(f"+modelpool.vocabulary={merge.pool.vocabulary}")
    if merge.pool.allow_base_mismatch:
        words.append("modelpool.allow_base_mismatch=true")
    words.append(named)
    words.append("merged_model_save_path=merged")
    yield from ("```sh", " \\\n    ".join(["tangent-arithmetic merge", *map(shlex.quote, words)]))
    yield from ("```", "", "The paths are those of the machine on which it was made.")
    if merge.method.needs_data:
        yield "The method ran the models on data, which a `taskpool` must name."


def _keys_of(override: str) -> list[str]:
    """The keys that Hydra reads in an override of a mapping; none if it cannot be read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    with contextlib.suppress(HydraException):
        value: Any = OverridesParser.create().parse_override(override).value()
        return [str(key) for key in value]
    return []


def _key(name: object) -> str:
    """A key in the grammar of Hydra's overrides, which knows no quotes there."""
    return re.sub(r"[\\()\[\]{}:=, ]", r"\\\g<0>", str(name))


def _hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Mapping():
            return f"{{{','.join(f'{_key(key)}: {_hydra(v)}' for key, v in value.items())}}}"
        case list() | tuple():
            return f"[{','.join(map(_hydra, value))}]"
        case str() if not PLAIN.fullmatch(value) or value.lower() in ("null", "true", "false"):
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            return f'"{escaped}"'
    return str(value)
