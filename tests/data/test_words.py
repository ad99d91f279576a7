import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.data.screens.words import split_words

THAI = "กขคงจฉชซญดตถทธนบปผฝพฟภมยรลวสหอะาิีึืุูเแโใไ่้"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's A\nTEST of_this (ii).", ["it", "s", "a", "test", "of", "this", "ii"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("cafe\u0301 ﬁne Straße", ["café", "fine", "strasse"]),
        ("北京 is カナ \U00020000", ["北", "京", "is", "カ", "ナ", "\U00020000"]),
        ("one\u200btwo soft\u00adhyphen می\u200cخواهم", ["one", "two", "softhyphen", "میخواهم"]),
        ("!? \u2192 \U0001f642", []),
    ],
)
def test_words_of_many_scripts(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def thai(seed: int, num_characters: int) -> str:
    return "".join(random.Random(seed).choices(THAI, k=num_characters))


def test_units_of_unspaced_text_are_about_as_long_as_words() -> None:
    text = thai(1, 4000)
    units = split_words(text)
    assert "".join(units) == unicodedata.normalize("NFKC", text)
    assert 700 <= len(units) <= 1400


@given(st.integers(0, 1000), st.integers(1, 60), st.integers(0, 1000))
def test_units_do_not_depend_on_what_stands_further_away(
    seed: int, num_characters: int, other: int
) -> None:
    passage = thai(seed, num_characters)
    inside = split_words(passage)[1:-1]
    around = split_words(thai(other, 30) + passage + thai(other + 1, 30))
    assert " ".join(inside) in " ".join(around)


def test_zero_width_spaces_change_no_unspaced_text() -> None:
    text = thai(2, 200)
    assert split_words("\u200b".join(text)) == split_words(text)
