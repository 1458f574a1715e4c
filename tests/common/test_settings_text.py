"""Settings in words."""

from __future__ import annotations

from samv2.common.config import field_kinds
from samv2.common.settings_checks import CHOICES
from samv2.common.settings_text import section_texts, setting_texts


def test_every_setting_has_its_docstring_in_one_line() -> None:
    texts = {text.key: text for text in setting_texts()}
    assert texts.keys() == set(field_kinds())
    assert all(text.meaning and "\n" not in text.meaning for text in texts.values())
    assert texts["federation.rounds"].meaning == "Rounds of the run."
    assert texts["aggregation.momentum"].meaning != texts["edits.momentum"].meaning
    assert texts["seed"].section == "" and texts["data.alpha"].section == "data"


def test_defaults_are_written_as_they_are_set() -> None:
    texts = {text.key: text.default for text in setting_texts()}
    assert texts["train.train_gate"] == "true"
    assert texts["data.domains"] == "legal,bible,biomed,python"
    assert texts["experts.other_k"] == ""


def test_a_first_sentence_does_not_end_at_an_example() -> None:
    texts = {text.key: text for text in setting_texts()}
    drift = texts["data.drift"]
    assert drift.first_sentence.endswith("e.g. ``6:0-1+4=chat``.")
    assert drift.meaning.startswith(drift.first_sentence + " From that round on")
    assert all(text.first_sentence.endswith(".") for text in texts.values())


def test_choices_are_those_that_are_checked() -> None:
    texts = {text.key: text.choices for text in setting_texts()}
    assert texts["data.split"] == ("domain", "shards", "dirichlet")
    assert texts["federation.rounds"] == ()
    assert CHOICES.keys() <= texts.keys()


def test_every_section_says_what_it_is_about() -> None:
    found = section_texts()
    assert set(found) == {key.rpartition(".")[0] for key in field_kinds()}
    assert found["federation"] == "Rounds, clients and what they send."
