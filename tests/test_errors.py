from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import MissingFileError, UsageError, closest, entry_point, unknown


def test_closest_prefers_the_likeliest_spelling_in_any_case() -> None:
    assert closest("mnst", ["DTD", "SVHN", "MNIST"])[0] == "MNIST"


def test_closest_breaks_ties_by_the_alphabet() -> None:
    assert closest("x", ["c", "a", "b"]) == ["a", "b", "c"]


@settings(deadline=None, max_examples=50)
@given(choices=st.lists(st.text("abAB", max_size=4), min_size=1, max_size=5), data=st.data())
def test_closest_reorders_the_choices_and_finds_an_exact_one(
    choices: list[str], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(choices))
    found = closest(name, choices)
    assert sorted(found) == sorted(choices)
    assert found[0].lower() == name.lower()


def test_unknown_says_what_was_got_and_what_there_is() -> None:
    error = unknown("suite", "clip9", ["embedded", "clip8"])
    assert isinstance(error, UsageError)
    assert str(error) == "unknown suite 'clip9'; choose from clip8, embedded"


def test_a_missing_file_is_both_kinds_of_error_and_keeps_its_message() -> None:
    error = MissingFileError("no checkpoint. Make it with: python src/finetune.py")
    assert isinstance(error, UsageError)
    assert isinstance(error, FileNotFoundError)
    assert str(error) == "no checkpoint. Make it with: python src/finetune.py"


@pytest.mark.parametrize("kind", [UsageError, MissingFileError])
def test_entry_point_turns_a_usage_error_into_a_message_and_code_2(
    kind: type[UsageError], capsys: pytest.CaptureFixture[str]
) -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> int:
        raise kind("expected this, got that")

    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: expected this, got that\n"
    assert captured.out == ""


def test_entry_point_passes_arguments_and_the_code_of_success() -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> int:
        return len(argv or ())

    assert main(["a", "b", "c"]) == 3
    assert main.__name__ == "main"


def test_entry_point_does_not_hide_our_own_defects() -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> int:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        main([])
