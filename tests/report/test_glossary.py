"""Words that explain themselves where they first stand."""

import re

import pytest

from salsa.report.glossary import WORDS, Glossary


def test_a_word_is_marked_where_it_first_stands_and_never_again():
    glossary = Glossary()
    first = glossary.text("a soup & KL, and a soup")
    assert first.count('class="word"') == 2 and first.startswith("a <abbr") and "&amp; <abbr" in first
    assert first.endswith("and a soup") and "soup" in glossary.text("soups")
    assert glossary.text("KL of soups") == "KL of soups"
    assert [word.name for word in glossary.marked] == ["soup", "KL"]
    assert 'aria-describedby="word-1"' in first and "<sup>2</sup>" in first


def test_words_within_names_and_code_stay_as_they_are():
    glossary = Glossary()
    assert glossary.text("larger_kl strong_soup soup_start_ppo") == "larger_kl strong_soup soup_start_ppo"
    assert glossary.text("run `arm KL` <b>") == "run <code>arm KL</code> &lt;b&gt;"
    assert glossary.marked == []


def test_the_longest_of_several_words_is_meant():
    glossary = Glossary()
    glossary.text("adjusted win rates by proxy reward and kl_coef")
    assert [word.name for word in glossary.marked] == ["win rate", "proxy reward", "kl_coef"]


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word.name)
def test_each_word_matches_its_own_name_and_means_something(word):
    assert re.fullmatch(word.pattern, word.name) and word.meaning.endswith(".") and len(word.meaning) < 160
    assert Glossary().text(word.name).startswith("<abbr")
