"""The keys of a configuration: unknown ones, and values of another type, are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tangent_arithmetic.runtime.errors import UsageError, closest, shown

Node = Mapping[str, Any]
FLAGS = ("fast_dev_run", "dry_run", "print_config", "print_function_call")
ROOT = {*FLAGS, "fabric", "path", "modelpool", "method", "taskpool", "plugins", "seed"}
ROOT |= {"merged_model_save_path", "merged_model_save_kwargs", "report_save_path"}
ROOT |= {"_target_", "_recursive_"}  # FusionBench's, of its program
PATHS = {"root_dir", "output_dir", "data_dir", "cache_dir", "log_dir", "work_dir"}


def refuse_unknown(
    node: Node, known: Collection[str], where: str, unsaid: Collection[str] = ()
) -> None:
    """Refuses keys that have no meaning here.

    Args:
        node: a group of the configuration.
        known: its keys.
        where: its name, for the message.
        unsaid: keys to leave out of the message.

    Raises:
        UsageError: naming the unknown ones.
    """
    if strange := sorted(set(node) - set(known)):
        listed = closest(strange[0], [key for key in sorted(known) if key not in unsaid])
        raise UsageError(
            f"{where} has {', '.join(map(shown, strange))}, which is not supported; its keys are "
            f"{', '.join(listed)}"
        )


def flag(node: Node, key: str, where: str = "") -> bool:
    """A key that is true or false; false if it is missing or null.

    Args:
        node: a group of the configuration.
        key: the key.
        where: what is before the key in messages, such as "modelpool.".

    Raises:
        UsageError: if it is anything else.
    """
    value = node.get(key)
    if not isinstance(value, bool | None):
        raise UsageError(f"{where}{key} must be true or false, got {value!r}")
    return bool(value)


def check_keys(config: Node) -> None:
    """Checks the keys beside the groups, and those of `path`; the other groups check their own.

    Raises:
        UsageError: for an unknown key, or a value of another type.
    """
    refuse_unknown(config, ROOT, "the configuration", ("_target_", "_recursive_"))
    refuse_unknown(config["path"], PATHS, "path")
    for key in FLAGS:
        flag(config, key)
    seed = config.get("seed")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise UsageError(f"seed must be an integer from 0 on, or null, got {seed!r}")
