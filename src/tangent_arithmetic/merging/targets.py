"""Objects of a configuration: tables of the names that are allowed as `_target_`.

A target is looked up, never imported or called; one that is not in the tables is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tangent_arithmetic.merging.algorithms import Algorithm, algorithm_class
from tangent_arithmetic.merging.keys import Node, flag, refuse_unknown
from tangent_arithmetic.merging.language import LanguageModelPool
from tangent_arithmetic.merging.methods import METHODS
from tangent_arithmetic.merging.plugins import Specification
from tangent_arithmetic.merging.pool import CLIPVisionModelPool, ModelPool, run_pool
from tangent_arithmetic.merging.registry import OWN, PRETRAINED, Method
from tangent_arithmetic.merging.weights import on_hub
from tangent_arithmetic.runtime.errors import UsageError, unknown

if TYPE_CHECKING:
    from tangent_arithmetic.merging.taskpools import HubRows, TaskPool

METHODS_OF = ("fusion_bench.method.", OWN)
POOLS: dict[str, type[ModelPool]] = {
    "fusion_bench.modelpool.BaseModelPool": ModelPool,
    "fusion_bench.modelpool.AutoModelPool": ModelPool,
    "fusion_bench.modelpool.OpenCLIPVisionModelPool": ModelPool,
    "fusion_bench.modelpool.CLIPVisionModelPool": CLIPVisionModelPool,
    "fusion_bench.modelpool.CausalLMPool": LanguageModelPool,
    "fusion_bench.modelpool.GPT2ForSequenceClassificationPool": LanguageModelPool,
    "fusion_bench.modelpool.Seq2SeqLMPool": LanguageModelPool,
    f"{OWN}ModelPool": ModelPool,
    f"{OWN}LanguageModelPool": LanguageModelPool,
    f"{OWN}CLIPVisionModelPool": CLIPVisionModelPool,
}
RUN_POOL = f"{OWN}run_pool"
CLIP_CLASSES = ("AutoModel", "CLIPModel", "AutoProcessor", "CLIPProcessor", "CLIPVisionModel")
TEXT_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "GPT2Model")
CLASSES = (*CLIP_CLASSES, *TEXT_CLASSES)
LOADERS = tuple(f"transformers.{name}.from_pretrained" for name in CLASSES)
ADAPTED = "fusion_bench.modelpool.seq2seq_lm.modelpool.load_lora_model"
TASK_POOLS = {
    "fusion_bench.taskpool.DummyTaskPool": "dummy",
    f"{OWN}DummyTaskPool": "dummy",
    "fusion_bench.taskpool.CLIPVisionModelTaskPool": "clip",
    f"{OWN}CLIPVisionModelTaskPool": "clip",
    f"{OWN}SuiteTaskPool": "suite",
}
ROWS = "datasets.load_dataset"
FER2013 = "fusion_bench.dataset.fer2013.load_fer2013"  # the same with a path by default
HELD_OUT = "fusion_bench.utils.data.train_validation_split"
TENTH: dict[str, Any] = {"validation_fraction": 0.1, "validation_size": None}
TENTH |= {"random_seed": 0, "return_split": "val"}
# keys of FusionBench's configurations that have no effect here: of any group, and of model pools
MARKS = {"_target_", "_recursive_", "_usage_"}
IGNORED = {*MARKS, "platform", "processor", "data_processor", "train_datasets", "test_datasets"}
IGNORED |= {"val_datasets", "tokenizer", "model_kwargs", "base_model", "_dataset_loader"}
IGNORED |= {"_model_loader"}
# keys of a model: where it is, of which one is given; what has no effect on its weights; and values
# that have none
LOCATIONS = ("pretrained_model_name_or_path", "peft_model_path", "pickle_path", "path")
PLACING = {*LOCATIONS, "_target_", "revision", "model_name", "base_model_path"}
LOADING = {"device_map", "low_cpu_mem_usage", "attn_implementation", "use_cache", "is_trainable"}
LOADING |= {"trust_remote_code"}
USUAL: dict[str, tuple[Any, ...]] = {"torch_dtype": (None, "auto"), "dtype": (None, "auto")}
USUAL |= {"subfolder": (None, ""), "merge_and_unload": (True,)}
OPTIONS_IGNORED = {"_target_", "_recursive_", "show_pbar", "verbose", "dataloader_kwargs"}
# accepted if false or null
OPTIONS_OFF = {"return_single_task_models", "exclude_param_names_regex"}
OPTIONS_OFF |= {"model_save_path", "model_save_kwargs"}  # ours is merged_model_save_path
LONG_NAMES = {  # FusionBench has both
    "IsotropicMergingInCommonSubspace": "ISO_C_Merge",
    "IsotropicMergingInCommonAndTaskSubspace": "ISO_CTS_Merge",
}
OPTIONS_ON = {"weight_transpose"}  # accepted if true
SUITE_KEYS = {"_target_", "model", "suite", "run", "tasks", "results", "batch_size", "num_workers"}
SUITE_KEYS |= {"sample"}
CLIP_KEYS = {*MARKS, "test_datasets", "base_model", "clip_model", "processor", "data_processor"}
CLIP_KEYS |= {"dataloader_kwargs", "layer_wise_feature_save_path"}
CLIP_KEYS |= {"layer_wise_feature_first_token_only", "layer_wise_feature_max_num"}
# keys of `dataloader_kwargs` that are used, that have no effect on accuracies, and that are off
SIZES = ("batch_size", "num_workers")
WORKING = {"pin_memory", "persistent_workers", "prefetch_factor", "timeout"}
OFF = {"drop_last", "shuffle"}
FABRIC_KEYS = {*MARKS, "accelerator", "devices", "strategy", "precision"}
# values of `fabric` -> those of --device and --precision
DEVICES = {"auto": None, "cpu": "cpu", "cuda": "cuda", "gpu": "cuda", "mps": "mps"}
PRECISIONS = {"32": "fp32", "32-true": "fp32", "bf16": "bf16", "bf16-mixed": "bf16"}


def target_of(node: Node, what: str) -> str:
    """The `_target_` of a group of the configuration.

    Raises:
        UsageError: if it has none.
    """
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        raise UsageError(f"{what} has no _target_; choose one of the {what}s that --help lists")
    return re.sub(r"^src\.merging\.", OWN, target)  # the name in earlier versions


def method_of(node: Node) -> Method:
    """The merging method of a configuration.

    Args:
        node: the group `method`.
    """
    target = target_of(node, "method")
    methods = {method.algorithm: method for method in METHODS.values()}
    name = target.rpartition(".")[2]
    name = LONG_NAMES.get(name, name)
    if not target.startswith(METHODS_OF) or name not in methods:
        raise unknown("method._target_", target, (f"{OWN}{known}" for known in methods))
    return methods[name]


def algorithm_of(
    node: Node, seed: int | None = None, plugins: Sequence[Specification] = ()
) -> Algorithm:
    """The merging algorithm of a configuration.

    Args:
        node: the group `method`.
        seed: the seed of random masks, also of an inner method, if the group does not set one.
        plugins: the key `plugins`.
    """
    method = method_of(node)
    ignored = OPTIONS_IGNORED | {key for key in OPTIONS_OFF if not node.get(key)}
    ignored |= {key for key in OPTIONS_ON if node.get(key)}
    options = {key: value for key, value in node.items() if key not in ignored}
    if seed is not None:
        options = _seeded(method, options, seed)
    return algorithm_class(method.algorithm)(**options, plugins=plugins)


def _seeded(method: Method, options: Node, seed: int) -> dict[str, Any]:
    """The options with a seed of random masks where they have none, of inner methods as well."""
    seeded = {**({"seed": seed} if "seed" in method.defaults else {}), **options}
    inner = METHODS.get(str(options.get("inner", method.defaults.get("inner"))))
    given = options.get("inner_options")
    if inner is None or not isinstance(given, Mapping | None):
        return seeded
    own = _seeded(inner, given or {}, seed)
    return {**seeded, "inner_options": own} if own else seeded


def pool_of(node: Node) -> ModelPool:
    """The model pool of a configuration."""
    target = target_of(node, "modelpool")
    if target == RUN_POOL:
        return _run_pool(node)
    if target not in POOLS:
        raise unknown("modelpool._target_", target, (*POOLS, RUN_POOL))
    if node.get("platform") not in (None, "hf"):
        raise UsageError(f"unknown platform {node['platform']!r} of a model pool; choose from hf")
    of_language = POOLS[target] is LanguageModelPool
    own = {"models", "allow_base_mismatch", *(["vocabulary"] if of_language else [])}
    refuse_unknown(node, {*IGNORED, *own}, "modelpool", IGNORED)
    _check_loading(node.get("model_kwargs") or {}, "modelpool.model_kwargs")
    models = _entries(node, "modelpool.models", "models")
    places = {name: place_of(model, f"modelpool.models.{name}") for name, model in models.items()}
    _check_bases(models, places)
    options = {"vocabulary": str(node["vocabulary"])} if node.get("vocabulary") else {}
    return POOLS[target](places, flag(node, "allow_base_mismatch", "modelpool."), **options)


def _check_bases(models: Node, places: Mapping[str, str]) -> None:
    """Checks that adapters are for the pool's pre-trained model."""
    for name, model in models.items():
        base = model.get("base_model_path") if isinstance(model, Mapping) else None
        if base is not None and base != places.get(PRETRAINED):
            raise UsageError(
                f"modelpool.models.{name} has adapters for {base}, but {PRETRAINED} is "
                f"{places.get(PRETRAINED, 'missing')}; expected the same model"
            )


def _entries(node: Node, where: str, what: str) -> dict[str, Any]:
    """The named models or data sets in a group."""
    entries = node.get(where.rpartition(".")[2])
    if not isinstance(entries, Mapping) or not entries:
        raise UsageError(f"{where} must map names to {what}, got {entries!r}")
    return {str(name): entry for name, entry in entries.items()}


def _run_pool(node: Node) -> ModelPool:
    from tangent_arithmetic.run.args import Config
    from tangent_arithmetic.run.suites import suite_of

    refuse_unknown(node, {"_target_", "run", "suite", "tasks", "mode"}, "modelpool", MARKS)
    suite = suite_of(Config(suite=str(node["suite"])))
    tasks = [suite.check(str(task)) for task in node.get("tasks") or suite.tasks]
    return run_pool(str(node["run"]), tasks, str(node.get("mode", "standard")))


def place_of(model: object, where: str) -> str:
    """The path or hub name of a model in a configuration, with its revision.

    Raises:
        UsageError: for a `_target_` that is not one of `LOADERS`, if there is no path or more than
            one, or for a key that would change the model.
    """
    if isinstance(model, str):
        return model
    if isinstance(model, Mapping):
        target = model.get("_target_")
        if target is not None and target not in (*LOADERS, ADAPTED):
            raise unknown(f"_target_ of {where}", str(target), (*LOADERS, ADAPTED))
        named = [key for key in LOCATIONS if isinstance(model.get(key), str)]
        _check_loading({key: value for key, value in model.items() if key not in PLACING}, where)
        if len(named) > 1:
            raise UsageError(f"{where} has {' and '.join(named)}; expected one of them")
        if named:
            return _revised(str(model[named[0]]), model.get("revision"), where)
    raise UsageError(f"{where} must be a path or a name on the hub, got {model!r}")


def _check_loading(node: Node, where: str) -> None:
    """Refuses what would change a model's weights as it is loaded, and unknown keys."""
    odd = {k: v for k, v in node.items() if k not in LOADING and v not in USUAL.get(k, ())}
    if odd:
        raise UsageError(
            f"{where} has {', '.join(f'{key}={value!r}' for key, value in odd.items())}, which is "
            f"not supported: leave it out, weights are read as they are stored. Other keys are "
            f"{', '.join(LOCATIONS)}, revision"
        )


def _revised(place: str, revision: object, where: str) -> str:
    """The name of a model on the hub with its revision."""
    if revision is None:
        return place
    if not on_hub(place):
        raise UsageError(f"{where} has revision={revision}, but {place} is no name on the hub")
    return f"{place}@{revision}"


def task_pool_of(node: Node, settings: Node, fast_dev_run: bool = False) -> TaskPool | None:
    """The task pool of a configuration; None for the dummy pool, which evaluates nothing.

    Args:
        node: the group `taskpool`.
        settings: device, precision and data folder, by the names of the flags.
        fast_dev_run: evaluate one batch per task.
    """
    target = target_of(node, "taskpool")
    if target not in TASK_POOLS:
        raise unknown("taskpool._target_", target, TASK_POOLS)
    kind = TASK_POOLS[target]
    if kind == "dummy":
        refuse_unknown(node, {*MARKS, "model_save_path"}, "taskpool", MARKS)
        return None
    from tangent_arithmetic.merging.taskpools import CLIPVisionModelTaskPool, SuiteTaskPool

    if kind == "suite":
        refuse_unknown(node, SUITE_KEYS, "taskpool", MARKS)
        own = {key: value for key, value in node.items() if key != "_target_" and value is not None}
        return SuiteTaskPool(**{**settings, **own}, fast_dev_run=fast_dev_run)
    refuse_unknown(node, CLIP_KEYS, "taskpool", MARKS)
    if node.get("layer_wise_feature_save_path") is not None:
        raise UsageError("taskpool.layer_wise_feature_save_path is not supported; leave it null")
    loader = dict(node.get("dataloader_kwargs") or {})
    off = {key for key in OFF if not loader.get(key)}
    refuse_unknown(loader, {*SIZES, *WORKING, *off}, "taskpool.dataloader_kwargs")
    sizes = {key: loader[key] for key in SIZES if key in loader}
    sets = _entries(node, "taskpool.test_datasets", "data sets")
    rows = {name: rows_of(entry, f"taskpool.test_datasets.{name}") for name, entry in sets.items()}
    return CLIPVisionModelTaskPool(rows, _clip_of(node), fast_dev_run, **{**sizes, **settings})


def _clip_of(node: Node) -> str:
    """The complete CLIP of a task pool: `clip_model`, by default `base_model`."""
    key = "base_model" if node.get("clip_model") is None else "clip_model"
    clip = place_of(node.get(key), f"taskpool.{key}")
    others = [each for each in ("processor", "data_processor") if node.get(each) is not None]
    for other in others:
        if (found := place_of(node[other], f"taskpool.{other}")) != clip:
            raise UsageError(
                f"taskpool.{other} is that of {found}, but taskpool.{key} {clip}, whose tokenizer "
                f"and preprocessing are used; name one for all: taskpool.base_model={clip}"
            )
    return clip


def rows_of(node: Any, where: str) -> HubRows:
    """The data set of a configuration.

    Raises:
        UsageError: for a `_target_` other than `datasets.load_dataset`, its held-out tenth and
            FusionBench's loader of FER2013.
    """
    from tangent_arithmetic.merging.taskpools import HubRows

    target = node.get("_target_") if isinstance(node, Mapping) else None
    if target == HELD_OUT:
        inner, part = rows_of(node["dataset"], where), {key: node.get(key) for key in TENTH}
        refuse_unknown(node, {"_target_", "dataset", *TENTH}, where, MARKS)
        if part != TENTH or inner.split != "train":
            raise UsageError(
                f"{where} holds out {part} of {inner.split}; only a tenth of train with seed 0 is "
                "supported: validation_fraction=0.1, random_seed=0, return_split=val"
            )
        return HubRows(inner.path, inner.config, inner.split, validation=True)
    if target not in (ROWS, FER2013):
        raise unknown(f"_target_ of {where}", str(target), (ROWS, HELD_OUT, FER2013))
    words: Sequence[Any] = list(node.get("_args_") or ())
    usual = "clip-benchmark/wds_fer2013" if target == FER2013 else None
    path = node.get("path", words[0] if words else usual)
    config = node.get("name", words[1] if len(words) > 1 else None)
    if not isinstance(path, str) or len(words) > 2:
        raise UsageError(
            f"{where} needs the path of a data set and at most a configuration, got "
            f"{[*words] or path!r}"
        )
    refuse_unknown(node, {"_target_", "_args_", "path", "name", "split"}, where, MARKS)
    return HubRows(path, config, str(node.get("split", "test")))


def device_settings(fabric: Node) -> dict[str, Any]:
    """The settings of the group `fabric`, by the names of the flags.

    Raises:
        UsageError: for unsupported keys and values, such as several devices.
    """
    refuse_unknown(fabric, FABRIC_KEYS, "fabric", MARKS)
    accelerator = str(fabric.get("accelerator", "auto"))
    if accelerator not in DEVICES:
        raise unknown("fabric.accelerator", accelerator, DEVICES)
    if str(fabric.get("devices", 1)) not in ("1", "auto"):
        raise UsageError(f"fabric.devices={fabric['devices']} is not supported; merging uses one")
    if str(fabric.get("strategy", "auto")) not in ("auto", "single_device"):
        raise UsageError(f"fabric.strategy={fabric['strategy']} is not supported; choose auto")
    precision = "32" if fabric.get("precision") is None else str(fabric["precision"])
    if precision not in PRECISIONS:
        raise unknown("fabric.precision", precision, PRECISIONS)
    return {"device": DEVICES[accelerator], "precision": PRECISIONS[precision]}
