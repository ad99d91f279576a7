import json
import random
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.data.quality.duplicates import Duplicates, sketch
from phi4.data.quality.screen import Rule, screen
from phi4.errors import DataError, PlatformError

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def text(seed: int, num_words: int = 200) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=num_words))


def changed(original: str, num_changed: int) -> str:
    """One run of words replaced: about num_changed + 4 shingles differ."""
    words = original.split()
    words[50 : 50 + num_changed] = [f"new{i}" for i in range(num_changed)]
    return " ".join(words)


def jaccard(a: str, b: str) -> float:
    first, second = (
        {tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a.split(), b.split())
    )
    return len(first & second) / len(first | second)


def deduplicate(tmp_path: Path, texts: list[str], similarity: float | None = 0.8, **options: int):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    duplicates = Duplicates(similarity)
    screen([source], tmp_path / "out", Rule(duplicates.sketcher(), duplicates.decide), **options)
    kept = [json.loads(line)["text"] for line in (tmp_path / "out/rows.jsonl").open()]
    return kept, [json.loads(line) for line in (tmp_path / "out/quarantine.rejects").open()]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_first_of_equal_and_similar_rows_stays(tmp_path: Path, num_workers: int) -> None:
    first, second = text(1), text(2)
    near = changed(first, 5).upper().replace(" ", ",\n")
    far = changed(first, 90)
    assert jaccard(first, changed(first, 5)) > 0.9 and jaccard(first, far) < 0.5
    rows = [first, second, near, second, far, "short", "short", "short text"]
    kept, held = deduplicate(tmp_path, rows, num_workers=num_workers)
    assert kept == [first, second, far, "short", "short text"]
    assert [row["reason"].split()[0] for row in held] == ["near", "exact", "exact"]
    assert [row["of"]["line"] for row in held] == [1, 2, 6]
    assert held[0]["similarity"] == pytest.approx(jaccard(first, changed(first, 5)), abs=0.1)


def test_exact_alone_keeps_similar_rows(tmp_path: Path) -> None:
    rows = [text(1), changed(text(1), 1), text(1)]
    kept, held = deduplicate(tmp_path, rows, similarity=None)
    assert kept == rows[:2] and len(held) == 1


def test_duplicate_of_a_duplicate_is_measured_against_the_kept_one(tmp_path: Path) -> None:
    first = text(3)
    step = changed(first, 12)
    words = step.split()
    words[150:190] = [f"other{i}" for i in range(40)]
    kept, _ = deduplicate(tmp_path, [first, step, " ".join(words)], similarity=0.85)
    assert kept == [first, " ".join(words)]


@given(st.integers(0, 30), st.integers(0, 120))
def test_signature_estimates_the_similarity(seed: int, num_changed: int) -> None:
    original = text(seed)
    other = changed(original, num_changed)
    a, b = sketch(original).signature, sketch(other).signature
    # Five standard deviations of a mean over 128 comparisons.
    assert abs(np.mean(a == b) - jaccard(original, other)) <= 5 * 0.5 / np.sqrt(128)


def test_unrelated_texts_all_stay(tmp_path: Path) -> None:
    rows = [text(seed) for seed in range(300)]
    assert deduplicate(tmp_path, rows)[0] == rows


@pytest.mark.parametrize("similarity", [0, -1, 1.5])
def test_bad_similarity(similarity: float) -> None:
    with pytest.raises(DataError, match="more than 0 and at most 1"):
        Duplicates(similarity)


@pytest.mark.parametrize("library", ["xxhash", "datasketch"])
def test_missing_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "phi4.data.quality.duplicates")
    with pytest.raises(PlatformError, match=rf"^{library} finds .* phi4\[data\]"):
        import_module("phi4.data.quality.duplicates")


def test_candidates_below_the_similarity_stay(tmp_path: Path) -> None:
    pairs = [(text(seed), changed(text(seed), 32)) for seed in range(100, 140)]
    assert all(0.65 < jaccard(*pair) < 0.75 for pair in pairs)
    kept, held = deduplicate(tmp_path, [one for pair in pairs for one in pair])
    # Locality-sensitive hashing proposes a fair part of such pairs.
    assert all(row["similarity"] >= 0.8 for row in held)
    assert len(kept) >= 2 * len(pairs) - 5
