from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tangent_arithmetic.commands.cli import main
from tangent_arithmetic.language import analogy, toxicity
from tangent_arithmetic.language.analogy import Reviews
from tangent_arithmetic.language.checkpoints import load_judge, load_tokenizer
from tangent_arithmetic.language.experiments import EXPERIMENTS
from tangent_arithmetic.language.settings import MODES, Settings
from tangent_arithmetic.language.tasks import TASKS
from tangent_arithmetic.language.toxicity import Study, Toxicity, finite, largest_allowed
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.training.recipe import Recipe
from tests.language.worlds import World

RECIPE = Recipe(0.1, 1, 8, 1, 0, 0.0, 0.0)
QUICK = ("--n-eval-points=2", "--epochs=1", "--batch-size=16", "--warmup-length=0", "--device=cpu")


def run(world: World, folder: Path, experiment: str, *flags: str, mode: str = "standard") -> Any:
    """The results of an experiment."""
    words = [f"--data-location={world.data}", f"--save={folder / 'save'}"]
    words += [f"--results={folder / 'results'}", f"--finetuning-mode={mode}"]
    assert main(["language", experiment, *words, *QUICK, *flags]) == 0
    (file,) = (folder / "results" / "language" / experiment).glob(f"*-{mode}*.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize("mode", MODES)
def test_glue_from_texts_to_a_table(
    world: World, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ("cola", "stsb", "mnli")
    flags = (f"--model={world.model('t5')}", f"--tasks={','.join(tasks)}", "--rows=12")
    found = run(world, tmp_path, "glue", *flags, mode=mode)
    assert set(found["pretrained"]) == set(found["single"]) == {*tasks, "mean"}
    assert set(found["val"]) == {"0", "1"}
    assert found["coefficient"] in (0.0, 1.0) and 0 <= found["test"]["cola"] <= 1
    assert "| single " in capsys.readouterr().out
    kind = "linear" if mode == "linear" else "standard"
    assert (tmp_path / "save" / f"{kind}_cola" / "model.safetensors").is_file()


LEARNING = ("--lr=0.04", "--epochs=10", "--batch-size=9", "--seed=1")


@pytest.mark.parametrize("mode", MODES)
def test_classifiers_learn_and_are_added(world: World, tmp_path: Path, mode: str) -> None:
    tasks = ("sst2", "rte")
    flags = (f"--model={world.model('gpt2')}", f"--tasks={','.join(tasks)}", *LEARNING)
    found = run(world, tmp_path, "gpt2", *flags, mode=mode)
    if mode != "posthoc":
        assert found["single"]["mean"] > max(0.75, found["body0"]["mean"] + 0.1)
    assert found["val"]["0"].keys() == {*tasks, "mean"}
    first = found["single"]
    assert run(world, tmp_path, "gpt2", *flags, mode=mode)["single"] == first  # from the folders


def test_six_tasks_of_inference_are_read(world: World, tmp_path: Path) -> None:
    flags = (f"--model={world.model('t5')}", "--rows=6", "--length=20")
    found = run(world, tmp_path, "nli", *flags)
    assert set(found["test"]) == {"snli", "mnli", "sick", "scitail", "rte", "qnli", "mean"}


def test_published_models_are_evaluated_without_training(world: World, tmp_path: Path) -> None:
    flags = [f"--model={world.model('t5')}", "--tasks=cola,sst2", "--rows=4"]
    flags.append(f"--finetuned=cola={world.model('t5')},sst2={world.model('t5')}")
    found = run(world, tmp_path, "glue", *flags)
    assert found["single"] == found["pretrained"] == found["test"]
    assert not (tmp_path / "save").exists()
    provenance = found["provenance"]
    assert {"datasets", "torch", "transformers"} <= provenance["versions"].keys()
    assert provenance["machine"] and set(provenance["weights"]["cola"]) == {"theta0", "theta"}


def test_results_of_other_settings_are_not_overwritten(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = world.model("t5")
    words = [f"--model={model}", f"--finetuned=cola={model}", f"--results={tmp_path}", *QUICK]
    words += [f"--data-location={world.data}", "--tasks=cola", "--rows=2", "--seed=1"]
    for more in ((), ("--eval-batch-size=1",)):  # on which results do not depend
        assert main(["language", "glue", *words, *more]) == 0
    (file,) = (tmp_path / "language" / "glue").iterdir()
    assert file.name == "t5-standard-cola-rows2-seed1.json"
    assert main(["language", "glue", *words, "--length=20"]) == 2
    assert "other settings (length was 512, is now 20)" in capsys.readouterr().err


def test_texts_that_are_drawn_depend_on_the_kind_of_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "language" / "toxicity" / "gpt2-standard.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"provenance": {"settings": {"device": "cuda"}}}))
    words = ["language", "toxicity", "--model=gpt2", f"--results={tmp_path}", "--device=cpu"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "device was cuda, is now cpu" in said and "eval_batch_size" not in said


@pytest.mark.parametrize("mode", MODES)
def test_toxicity_is_negated(
    world: World, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--model={world.model('gpt2')}", f"--classifier={world.model('judge')}"]
    flags += ["--prompt=you are", "--generations=6", "--tokens=10", "--block=32", "--rows=20"]
    flags += ["--lr=0.01", "--epochs=3", "--perplexity=1000"]
    found = run(world, tmp_path, "toxicity", *flags, mode=mode)
    assert set(found["test"]) == {"pretrained", "finetuned", "negated", "ascent", "harmless"}
    measures = found["test"]["negated"]
    assert 0 <= measures["toxic"] <= 1 and 0 < measures["score"] < 1
    assert found["val"]["0"] == pytest.approx(found["test"]["pretrained"]["perplexity"], rel=1e-5)
    assert found["coefficient"] == 1.0  # so much perplexity is allowed
    assert found["test"]["ascent"]["loss"] != found["test"]["pretrained"]["loss"]
    assert "| negated at -1 " in capsys.readouterr().out
    saved = json.loads(
        (tmp_path / "save" / "standard_ascent" / "tangent_arithmetic.json").read_text()
    )
    assert saved["linear"] is False and saved["last_epoch_loss"] < 0


def test_an_analogy_and_its_controls(world: World, tmp_path: Path) -> None:
    found = run(
        world, tmp_path, "analogy", f"--model={world.model('t5')}", "--rows=3", mode="linear"
    )
    assert len(found["edits"]) == 7
    assert found["edits"]["analogy"]["val"].keys() == {"0", "1"}
    assert {path.name for path in (tmp_path / "save").iterdir()} == {
        f"linear_{name}" for name in ("amazon_lm", "amazon_sent", "yelp_lm", "yelp_sent")
    }


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_says_what_it_needs(
    experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["language", experiment, "--needs"]) == 0
    said = capsys.readouterr().out
    assert EXPERIMENTS[experiment].model in said and "hour" in said


MISTAKES = {
    "no such task": (("glue", "--tasks=cola,mmlu"), "unknown task 'mmlu'; choose from"),
    "no published models": (("nli", "--published"), "no published models of language nli"),
    "no published linear ones": (
        ("gpt2", "--published", "--finetuning-mode=linear"),
        "no published models of language gpt2 in mode linear",
    ),
    "no such model": (("glue", "--model=nowhere"), "nowhere cannot be read as Tokenizer"),
    "no such vector": (("glue", "--finetuned=coal=x"), "unknown vector 'coal'; choose from cola"),
    "no tasks to choose": (("toxicity", "--tasks=cola"), "language toxicity has no tasks"),
    "a flag of another experiment": (
        ("glue", "--top-k=0"),
        "--top-k is a flag of language toxicity, not of language glue; leave it out",
    ),
    "a label of another experiment": (("gpt2", "--toxic-label=rude"), "--toxic-label is a flag"),
    "baselines of another one": (("nli", "--no-baselines"), "--baselines is a flag of language"),
    "a pair that is none": (("glue", "--finetuned=cola"), "expected NAME=MODEL"),
}


@pytest.mark.parametrize("words, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_clear(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = (f"--results={tmp_path}", f"--save={tmp_path}", "--device=cpu")
    try:
        code = main(["language", *words, *folders])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2 and message in capsys.readouterr().err


def test_other_settings_do_not_take_finished_models(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (f"--model={world.model('t5')}", "--tasks=sst2", "--rows=4")
    run(world, tmp_path, "glue", *flags)
    words = [f"--data-location={world.data}", f"--save={tmp_path / 'save'}", *QUICK, *flags]
    assert main(["language", "glue", *words, f"--results={tmp_path}", "--lr=0.5"]) == 2
    assert "recipe lr was 4e-05, is now 0.5" in capsys.readouterr().err


def test_scores_are_those_of_the_classifier(world: World, tmp_path: Path) -> None:
    settings = Settings(world.model("gpt2"), tmp_path, RECIPE, data=world.data, eval_batch_size=2)
    study = Study(settings, Toxicity(world.model("judge"), label="Insult", generations=3))
    texts = ["good film", "a stupid idiot and a fool", "lamp"]
    expected = []
    for text in texts:
        ids = torch.tensor([study.reader(text)["input_ids"]])
        with torch.no_grad():
            expected.append(float(study.judge(input_ids=ids).logits[0, 1].sigmoid()))
    assert study.scores(texts).tolist() == pytest.approx(expected, rel=1e-4)
    assert all(text.startswith("I don't care") for text in study.texts(study.base))
    with pytest.raises(UsageError, match="unknown label of the classifier 'rude'; choose from"):
        Study(settings, Toxicity(world.model("judge"), label="rude"))


def test_drawn_texts_are_the_same_for_any_batch_size(world: World, tmp_path: Path) -> None:
    toxicity = Toxicity(world.model("judge"), prompt="you are", generations=19, tokens=6)
    settings = Settings(world.model("gpt2"), tmp_path, RECIPE, seed=1)
    studies = [Study(replace(settings, eval_batch_size=size), toxicity) for size in (3, 16, 20)]
    first, *others = (study.texts(study.base) for study in studies)
    assert len(set(first)) > 10 and all(texts == first for texts in others)


def test_the_classifier_reads_as_many_tokens_as_it_has_positions(
    world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "judge"
    shutil.copytree(world.model("judge"), folder)
    judge = load_judge(folder)
    config = type(judge.config)(**{**judge.config.to_dict(), "max_position_embeddings": 8})
    type(judge)(config).save_pretrained(folder)
    study = Study(Settings(world.model("gpt2"), tmp_path, RECIPE), Toxicity(str(folder)))
    assert study.scores(["good film " * 9]).isfinite().all()


@pytest.mark.parametrize("texts", [["good", "bad"], ["good", "a nice film"]])
def test_reviews_of_a_word_have_no_second_half(
    texts: list[str], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Dataset.from_dict({TASKS["yelp"].columns[0]: texts})
    monkeypatch.setattr(analogy, "labelled", lambda *_: (rows, [0, 1]))
    reviews = Reviews(Settings(world.model("t5"), tmp_path, RECIPE))
    if "bad" in texts:
        with pytest.raises(UsageError, match=r"yelp: expected reviews of two words .*--rows"):
            reviews.language("yelp")
        return
    assert len(reviews.language("yelp")) == 1


def test_the_words_of_a_text_stay_apart(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(world.model("gpt2"), tmp_path, RECIPE)
    study = Study(settings, Toxicity(world.model("judge"), prompt="You are", generations=1))
    new = torch.tensor([[*study.tokenizer("nice people")["input_ids"], -1]])
    monkeypatch.setattr(toxicity, "generate", lambda *_: new)
    assert study.texts(study.base) == ["You are nice people"]


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "block": ({"block": 1025}, "--block=1025: the model has positions for 1024 .* --block=1024"),
    "tokens": ({"tokens": 2000}, "--tokens=2000: the model has positions for 1024"),
    "length": ({"length": 1025}, "--length=1025: the model has positions for 1024"),
    "a judge that does not pad": ({"classifier": "unpadded"}, "--classifier=.* no padding token"),
    "a prompt as long as a text": (
        {"prompt": "you are nice", "tokens": 5},
        "--prompt='you are nice' has 5 tokens, expected 1 to 4, so that --tokens=5 leaves a new",
    ),
    "no prompt": ({"prompt": ""}, "--prompt='' has 0 tokens, expected 1 to 49"),
    "no comment so toxic": ({"toxic": 1.0}, "comments with a toxicity above 1.0, got none"),
}


@pytest.mark.parametrize("values, message", UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_measured_is_known_before_training(
    world: World, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    if values.get("classifier"):
        values = {"classifier": str(tmp_path / "unpadded")}
        shutil.copytree(world.model("judge"), values["classifier"])
        tokenizer = load_tokenizer(values["classifier"])
        tokenizer.pad_token = None
        tokenizer.save_pretrained(values["classifier"])
    values = {"classifier": world.model("judge"), "length": 512, **values}
    settings = Settings(
        world.model("gpt2"), tmp_path, RECIPE, data=world.data, length=values.pop("length")
    )
    with pytest.raises(UsageError, match=message):
        Study(settings, Toxicity(**values)).comments(toxic=True)


def test_negation_goes_as_far_as_perplexity_allows() -> None:
    losses = {0.0: 1.0, 0.2: 0.9, 0.4: 1.15, 0.6: 1.3, 0.8: 1.0}
    assert largest_allowed(losses, 0.5) == 0.4  # exp(1.3) - exp(1) = 0.95; beyond it is not looked
    assert largest_allowed(losses, 0.0) == 0.2
    assert largest_allowed({0.0: 3.0, 0.5: float("nan"), 1.0: 1.0}, 0.5) == 0.0
    assert finite(710.0) is None and finite(0.0) == 1.0
