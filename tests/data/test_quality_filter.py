import base64
import json
import pydoc
import random
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from phi4.data.screens.decontaminate.self_test.items import passages
from phi4.data.screens.quality.corruption import WINDOW_BYTES, Profile, learn_profile
from phi4.data.screens.quality.filter import Filter, learn_from_rows, load_identify
from phi4.data.screens.quality.screen import Rule, screen
from phi4.errors import DataError

TOPICS = [topics[name] for name in sorted(topics)]
LIMIT = 8.0


@pytest.fixture(scope="module")
def profile() -> Profile:
    return learn_profile(TOPICS[0::2])


def deviations(profile: Profile, text: str) -> float:
    found = profile.oddity(text)
    return abs(found.deviations) if found else 0.0


def test_unseen_documentation_is_normal(profile: Profile) -> None:
    unseen = [*TOPICS[1::2], *passages(TOPICS[1::2])]
    assert len(unseen) > 300
    odd = [text for text in unseen if deviations(profile, text) > LIMIT]
    assert len(odd) <= 0.01 * len(unseen)


GENERATOR = random.Random(0)
CORRUPTIONS = {
    "bytes as latin-1": lambda text: GENERATOR.randbytes(len(text)).decode("latin-1"),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "hex": lambda text: text.encode().hex(),
    "letters shuffled": lambda text: "".join(GENERATOR.sample(text, len(text))),
    "wrong code page": lambda text: text.encode("cp037", "ignore").decode("cp1252", "ignore"),
    "one word": lambda text: "spam " * (len(text) // 5),
    "second half binary": lambda text: (
        text[: len(text) // 2] + GENERATOR.randbytes(len(text) // 2).decode("latin-1")
    ),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corrupted_text_is_odd(profile: Profile, kind: str) -> None:
    texts = [text for text in passages(TOPICS[1::2]) if 600 < len(text) < 4000]
    assert len(texts) > 30
    corrupted = [CORRUPTIONS[kind](text) for text in texts]
    assert np.mean([deviations(profile, text) > LIMIT for text in corrupted]) >= 0.97


def test_broken_page_of_a_long_book_is_found_where_it_is(profile: Profile) -> None:
    book = "".join(TOPICS[1::2])[: 40 * WINDOW_BYTES]
    page = random.Random(1).randbytes(WINDOW_BYTES).hex()[:WINDOW_BYTES]
    cut = 20 * WINDOW_BYTES
    broken = book.encode()[:cut].decode("utf-8", "ignore") + page
    found = profile.oddity(broken + book[cut:])
    assert abs(found.deviations) > LIMIT > deviations(profile, book)
    assert abs(found.start - cut) <= WINDOW_BYTES


def test_short_text_is_not_judged(profile: Profile) -> None:
    assert profile.oddity("\x01" * 127) is None
    assert profile.oddity("\x01" * 128) is not None


def test_few_corrupted_rows_do_not_move_what_is_normal(profile: Profile) -> None:
    noise = [random.Random(i).randbytes(1500).decode("latin-1") for i in range(8)]
    mixed = learn_profile([*TOPICS[0::2], *noise])
    assert all(deviations(mixed, text) > LIMIT for text in noise)
    np.testing.assert_allclose(mixed.median, profile.median, rtol=0.05)


def test_too_little_text_to_learn_from() -> None:
    with pytest.raises(DataError, match="too few to estimate normal text"):
        learn_profile(["short"] * 100)


def first_letter(text: str) -> str:
    return "a-language" if text.startswith("a") else "other"


def test_rows_are_filtered_with_reasons(tmp_path: Path) -> None:
    normal = [text[:3000] for text in TOPICS if len(text) > 500]
    bad = ["ab" * 1500, random.Random(2).randbytes(1500).replace(b"\0", b"").decode("latin-1")]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*normal, *bad]))
    keep = Filter(learn_from_rows([source]))
    outcome = screen([source], tmp_path / "out", Rule(keep.analyse, keep.decide), num_workers=2)
    held = [json.loads(line) for line in (tmp_path / "out/quarantine.rejects").open()]
    assert {"low compression ratio", "high bits per byte"} <= set(outcome.rejected)
    assert [row["reason"] for row in held[-2:]] == ["low compression ratio", "high bits per byte"]
    assert all(abs(row["deviations"]) > 8 and row["start_byte"] in (0, 2048) for row in held[-2:])
    assert outcome.num_kept >= len(normal) - 1


def test_languages_are_what_the_callable_says(tmp_path: Path, profile: Profile) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "alpha"}\n{"text": "beta"}\n')
    keep = Filter(profile, identify=first_letter, languages=frozenset({"a-language"}))
    outcome = screen([source], tmp_path / "out", Rule(keep.analyse, keep.decide))
    (held,) = (json.loads(line) for line in (tmp_path / "out/quarantine.rejects").open())
    assert outcome.num_kept == 1
    assert (held["line"], held["reason"], held["language"]) == (2, "other language", "other")


def test_callable_is_loaded_by_name() -> None:
    assert load_identify("pydoc:plain") is pydoc.plain


@pytest.mark.parametrize("name", ["pydoc:none", "no_such_module:f", "pydoc", ":", "pydoc:__doc__"])
def test_callable_that_cannot_be_loaded(name: str) -> None:
    with pytest.raises(DataError, match=r"module:function|is not a function"):
        load_identify(name)


def test_settings_that_do_not_belong_together(profile: Profile) -> None:
    with pytest.raises(DataError, match="needs a function that identifies them"):
        Filter(profile, languages=frozenset({"en"}))
    with pytest.raises(DataError, match="needs a function that identifies them"):
        Filter(profile, identify=first_letter)
    with pytest.raises(DataError, match="more than 0"):
        Filter(profile, max_deviations=0)
